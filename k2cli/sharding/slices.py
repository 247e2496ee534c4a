"""Slices of whole parameters that a rank's part consists of, for any architecture.

A model's own ``shard`` decides the slices; it is code that does not report its ranges. But it runs
on lazy arrays, and MLX can list the graph that results: ``export_function`` passes every primitive
with its arguments to a callback and evaluates none. If a parameter comes from its whole by
``Split``, ``Slice`` and ``Concatenate`` alone, along one axis, it is a list of ranges along that
axis. Any other operation on a parameter (repeating, computing, cutting along two axes) makes it
unknown here, and mlx loads it, with the same result but more bytes read.

Neither memory nor time depends on the sizes: K2's 61 layers take a second.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from k2cli.sharding.placement import Placement
from k2cli.sharding.trace import cut, parameters

Run = tuple[int, int]
"""Half-open range of indices along an axis."""


@dataclass(frozen=True, slots=True)
class AxisSlice:
    """Elements of a whole array: consecutive ``runs`` along ``axis``; other axes whole.

    ``source`` names the whole array and ``shape`` is its shape.
    """

    source: str
    shape: tuple[int, ...]
    axis: int
    runs: tuple[Run, ...]

    @classmethod
    def whole(cls, source: str, shape: Sequence[int]) -> AxisSlice:
        """Make a slice that is the whole array."""
        return cls(source, tuple(shape), 0, ((0, shape[0] if shape else 1),))

    @property
    def is_whole(self) -> bool:
        """True if the slice is the whole array."""
        return self.runs == ((0, self.shape[self.axis] if self.shape else 1),)

    @property
    def result_shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        if not self.shape:
            return ()
        taken = sum(past_last - first for first, past_last in self.runs)
        return (*self.shape[: self.axis], taken, *self.shape[self.axis + 1 :])

    def narrow(self, axis: int, first: int, past_last: int) -> AxisSlice | None:
        """Return ``[first, past_last)`` of the slice along ``axis``; None if no AxisSlice can."""
        if (first, past_last) == (0, self.result_shape[axis]):
            return self
        if axis == self.axis:
            runs = tuple(_within(self.runs, first, past_last))
        elif self.is_whole:
            runs = ((first, past_last),)
        else:
            return None
        return AxisSlice(self.source, self.shape, axis, runs)


def _within(runs: Sequence[Run], first: int, past_last: int) -> Iterator[Run]:
    """Yield the parts of the runs at the positions ``[first, past_last)`` within them."""
    position = 0
    for start, end in runs:
        low = max(first - position, 0)
        high = min(past_last - position, end - start)
        if low < high:
            yield start + low, start + high
        position += end - start


def _merged(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Join neighbouring runs."""
    merged: list[Run] = []
    for first, past_last in runs:
        if merged and merged[-1][1] == first:
            merged[-1] = (merged[-1][0], past_last)
        else:
            merged.append((first, past_last))
    return tuple(merged)


def _joined(parts: Sequence[AxisSlice | None], axis: int) -> AxisSlice | None:
    """Concatenate slices of one array along ``axis``; None if the result is no AxisSlice."""
    runs: list[Run] = []
    for part in parts:
        if part is None or part.source != (parts[0] and parts[0].source):
            return None
        if part.axis == axis:
            runs += part.runs
        elif part.is_whole:
            runs.append((0, part.shape[axis]))
        else:
            return None
    first = parts[0]
    return AxisSlice(first.source, first.shape, axis, _merged(runs)) if first else None


class _Graph:
    """Reader of an exported graph: finds the input slice that each of its arrays is."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._known: dict[str, AxisSlice] = {}
        self._outputs: list[str] = []

    def take(self, event: Mapping[str, Any]) -> None:
        """Process one event of ``mx.export_function``; primitives come in order of dependence."""
        match event["type"]:
            case "inputs":
                for name, (key, shape, _) in zip(self._names, event["inputs"], strict=True):
                    self._known[key] = AxisSlice.whole(name, shape)
            case "outputs":
                self._outputs = [key for key, _, _ in event["outputs"]]
            case "primitive":
                sources = [self._known.get(key) for key, _, _ in event["inputs"]]
                results = _apply(event["name"], event["arguments"], sources)
                for (key, shape, _), result in zip(event["outputs"], results, strict=False):
                    if result is not None and result.result_shape == tuple(shape):
                        self._known[key] = result

    def outputs(self) -> list[AxisSlice | None]:
        """Return the slice that each output is, in order; None if unknown."""
        return [self._known.get(key) for key in self._outputs]


def _apply(
    primitive: str, arguments: Sequence[Any], sources: Sequence[AxisSlice | None]
) -> Sequence[AxisSlice | None]:
    """Apply a primitive to slices; return nothing for one that does more than select."""
    if primitive == "Concatenate":
        return [_joined(sources, arguments[0])]
    source = sources[0] if sources else None
    if source is None:
        return []
    if primitive == "Split":
        indices, axis = arguments
        limits = [0, *indices, source.result_shape[axis]]
        return [
            source.narrow(axis, first, past_last) for first, past_last in itertools.pairwise(limits)
        ]
    if primitive == "Slice":
        result: AxisSlice | None = source
        for axis, bounds in enumerate(zip(*arguments, strict=True)):
            if result is not None:
                # Negative bounds, and bounds after the end, have the same meaning as in Python.
                first, past_last, step = slice(*bounds).indices(result.result_shape[axis])
                result = result.narrow(axis, first, past_last) if step == 1 else None
        return [result]
    return []


@contextlib.contextmanager
def _without_copies() -> Iterator[None]:
    """Replace ``mx.contiguous`` by the identity: its primitive cannot be exported."""
    original = mx.contiguous
    mx.contiguous = lambda array, *_, **__: array
    try:
        yield
    finally:
        mx.contiguous = original


def trace_slices(
    change: Callable[[dict[str, mx.array]], dict[str, mx.array]], arrays: Mapping[str, mx.array]
) -> dict[str, AxisSlice]:
    """Return by name the slice of an argument that each result is, without unknown ones.

    Args:
        change: function to trace, called once with arrays of the same shapes; must not evaluate.
        arrays: the arguments by name; lazy, and not evaluated.
    """
    names: list[str] = []

    def traced(*values: mx.array) -> list[mx.array]:
        results = change(dict(zip(arrays, values, strict=True)))
        names.extend(results)
        return list(results.values())

    graph = _Graph(list(arrays))
    try:
        with _without_copies():
            mx.export_function(graph.take, traced, *arrays.values())
    except ValueError as error:
        if "export" not in str(error):  # an error of ``change`` itself
            raise
        return {}
    found = zip(names, graph.outputs(), strict=True)
    return {name: selected for name, selected in found if selected is not None}


def part_slices(
    config: Mapping[str, Any], model: nn.Module, placement: Placement, group: Any
) -> dict[str, AxisSlice]:
    """Return the slice of the whole model's parameters that each parameter of a part is.

    Args:
        model: the whole model, traced; it is cut in place and not usable afterwards.
        group: its ``rank()`` is the rank of the part; also has ``size()``.

    Returns:
        By the parameter's name in the part; parameters that are more than a selection of ranges
        along one axis are left out.

    Raises:
        UsageError: if the model cannot be cut so.
    """

    def change(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        model.update(tree_unflatten(list(arrays.items())))
        cut(config, model, placement, group)
        return parameters(model)

    return trace_slices(change, parameters(model))
