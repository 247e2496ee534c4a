"""Which elements of each whole parameter a rank's part consists of, for any architecture.

A model's own ``shard`` decides what a rank takes; it is code, and says nothing of the ranges it
takes. But it runs on lazy arrays, and mlx can list the graph that it leaves behind: MLX's
``export_function`` hands over every primitive with its arguments, without evaluating one. A
parameter that comes of its whole by ``Split``, ``Slice`` and ``Concatenate`` alone, along one axis,
is a list of ranges along that axis. Whatever else is done to a parameter (it is repeated,
computed, cut along two axes) makes it unknown here, and it is left to mlx, which is as right and
only reads more.

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
    """Elements of a whole array: ``runs`` along ``axis``, one after the other; other axes whole.

    ``source`` names the whole array and ``shape`` is its shape.
    """

    source: str
    shape: tuple[int, ...]
    axis: int
    runs: tuple[Run, ...]

    @classmethod
    def whole(cls, source: str, shape: Sequence[int]) -> AxisSlice:
        """All of an array."""
        return cls(source, tuple(shape), 0, ((0, shape[0] if shape else 1),))

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out."""
        return self.runs == ((0, self.shape[self.axis] if self.shape else 1),)

    @property
    def result_shape(self) -> tuple[int, ...]:
        """Shape of what is taken."""
        if not self.shape:
            return ()
        taken = sum(past_last - first for first, past_last in self.runs)
        return (*self.shape[: self.axis], taken, *self.shape[self.axis + 1 :])

    def narrow(self, axis: int, first: int, past_last: int) -> AxisSlice | None:
        """``[first, past_last)`` of what is taken, along ``axis``; None if that is no AxisSlice."""
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
    """The part of the runs that ``[first, past_last)`` counts out along them."""
    position = 0
    for start, end in runs:
        low = max(first - position, 0)
        high = min(past_last - position, end - start)
        if low < high:
            yield start + low, start + high
        position += end - start


def _merged(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Runs with neighbours that follow one another joined."""
    merged: list[Run] = []
    for first, past_last in runs:
        if merged and merged[-1][1] == first:
            merged[-1] = (merged[-1][0], past_last)
        else:
            merged.append((first, past_last))
    return tuple(merged)


def _joined(parts: Sequence[AxisSlice | None], axis: int) -> AxisSlice | None:
    """Slices of one array, put one after the other along ``axis``."""
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
    """Follows an exported graph: what each of its arrays is of the arrays that go in."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._known: dict[str, AxisSlice] = {}
        self._outputs: list[str] = []

    def take(self, event: Mapping[str, Any]) -> None:
        """One event of ``mx.export_function``; primitives come after those that they build on."""
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
        """What the outputs are, in their order."""
        return [self._known.get(key) for key in self._outputs]


def _apply(
    primitive: str, arguments: Sequence[Any], sources: Sequence[AxisSlice | None]
) -> Sequence[AxisSlice | None]:
    """What a primitive makes of slices; nothing for one that does more than to select."""
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
                # Ends that count from the back, or lie beyond it, are as Python has them.
                first, past_last, step = slice(*bounds).indices(result.result_shape[axis])
                result = result.narrow(axis, first, past_last) if step == 1 else None
        return [result]
    return []


@contextlib.contextmanager
def _without_copies() -> Iterator[None]:
    """While tracing, a contiguous copy is its original: its primitive cannot be exported."""
    original = mx.contiguous
    mx.contiguous = lambda array, *_, **__: array
    try:
        yield
    finally:
        mx.contiguous = original


def follow(
    change: Callable[[dict[str, mx.array]], dict[str, mx.array]], arrays: Mapping[str, mx.array]
) -> dict[str, AxisSlice]:
    """What a function's results are of its arguments, by name; the unknown ones are left out.

    Args:
        change: called once with arrays of the same shapes, which it must not evaluate.
        arrays: lazy, and left so.
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
        if "export" not in str(error):  # the change's own errors are the caller's business
            raise
        return {}
    found = zip(names, graph.outputs(), strict=True)
    return {name: selected for name, selected in found if selected is not None}


def part_slices(
    config: Mapping[str, Any], model: nn.Module, placement: Placement, group: Any
) -> dict[str, AxisSlice]:
    """What each parameter of a rank's part is of the whole model's parameters.

    Args:
        model: the whole model, traced; it is cut in place and of no use afterwards.
        group: has the ``rank()`` whose part it is, and ``size()``.

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

    return follow(change, parameters(model))
