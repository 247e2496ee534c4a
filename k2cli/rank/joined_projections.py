"""Projections of the same input, computed as one product whose result is split.

A model's own code keeps calling both projections. The first call with an input computes the
products of both, and the other call, with the very same arrays, takes the second. So nothing is
assumed about what a module does with them: its activation, clamping or order of calls. A call
with other arrays computes both anew, and is right, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.sharding.joined_pairs import ProjectionPair, are_joined, output_axis, projection_pairs


def joins_here(wanted: bool | None) -> bool:
    """Decide if this rank joins projections; ``wanted`` None leaves it to the device."""
    gpu = "cuda" if mx.cuda.is_available() else "metal"
    return are_joined(wanted, gpu if mx.default_device() == mx.gpu else "cpu")


@dataclass(frozen=True, slots=True)
class JoinedParameter:
    """A parameter that is made of two: their names, and the length of each along ``axis``."""

    names: tuple[str, str]
    axis: int
    lengths: tuple[int, int]

    def shapes(self, joined: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Return the names and shapes of both, given the shape of the joined one."""
        before, after = joined[: self.axis], joined[self.axis + 1 :]
        return [
            (name, [*before, length, *after])
            for name, length in zip(self.names, self.lengths, strict=True)
        ]


class JoinedProjection(nn.Module):
    """The first of two projections; holds the module that computes ``both``, called like it.

    ``width`` is the number of outputs of the first.
    """

    def __init__(self, both: nn.Module, width: int) -> None:
        super().__init__()
        self.both = both
        self.width = width
        self.kept = _Kept()

    def __call__(self, *inputs: Any, **named: Any) -> mx.array:
        return self.product(0, inputs, named)

    def product(self, which: int, inputs: tuple[Any, ...], named: dict[str, Any]) -> mx.array:
        """Return the product of the first (0) or second (1) projection."""
        kept = self.kept.take(which, inputs, named)
        if kept is not None:
            return kept
        products = mx.split(self["both"](*inputs, **named), [self.width], axis=-1)
        self.kept.put(1 - which, inputs, named, products[1 - which])
        return products[which]


class JoinedSecond(nn.Module):
    """The second of two projections, which the first one computes."""

    def __init__(self, first: JoinedProjection) -> None:
        super().__init__()
        # Not a child: the parameters are the first one's.
        object.__setattr__(self, "first", first)

    def __call__(self, *inputs: Any, **named: Any) -> mx.array:
        product: mx.array = self.first.product(1, inputs, named)
        return product


class _Kept:
    """A product that was computed with the other one, until it is asked for."""

    __slots__ = ("_content",)

    def __init__(self) -> None:
        self._content: tuple[int, tuple[Any, ...], dict[str, Any], mx.array] | None = None

    def put(
        self, which: int, inputs: tuple[Any, ...], named: dict[str, Any], product: mx.array
    ) -> None:
        self._content = which, inputs, named, product

    def take(self, which: int, inputs: tuple[Any, ...], named: dict[str, Any]) -> mx.array | None:
        """Return the product if it is of this projection and of the very same arrays.

        Nothing is kept afterwards, so that no array outlives its step.
        """
        content, self._content = self._content, None
        if content is None:
            return None
        of, its_inputs, its_named, product = content
        same = (
            of == which
            and len(inputs) == len(its_inputs)
            and named.keys() == its_named.keys()
            and all(one is other for one, other in zip(inputs, its_inputs, strict=True))
            and all(value is its_named[name] for name, value in named.items())
        )
        return product if same else None


def join_projections(
    model: nn.Module,
    may_join: Callable[[ProjectionPair, Sequence[JoinedParameter]], bool] = lambda *_: True,
) -> dict[str, JoinedParameter]:
    """Join the projections of a model in place, lazily.

    Args:
        may_join: asked for each pair, with its joined parameters; a pair may be left as it is.

    Returns:
        The joined parameters by their names in the model.
    """
    joined: dict[str, JoinedParameter] = {}
    for pair in projection_pairs(model):
        parts = {name: _joined_parameter(pair, name) for name in pair.members[0]}
        if not may_join(pair, list(parts.values())):
            continue
        first, second = pair.names
        joined |= {f"{_prefix(pair)}{first}.both.{name}": part for name, part in parts.items()}
        width = pair.members[0]["weight"].shape[-2]
        pair.owner[first] = JoinedProjection(_both(pair, parts), width)
        pair.owner[second] = JoinedSecond(pair.owner[first])
    return joined


def _prefix(pair: ProjectionPair) -> str:
    return f"{pair.path}." if pair.path else ""


def _joined_parameter(pair: ProjectionPair, name: str) -> JoinedParameter:
    one, other = (member[name] for member in pair.members)
    axis = output_axis(name, one)
    first, second = (f"{_prefix(pair)}{attribute}.{name}" for attribute in pair.names)
    return JoinedParameter((first, second), axis, (one.shape[axis], other.shape[axis]))


def _both(pair: ProjectionPair, parts: dict[str, JoinedParameter]) -> nn.Module:
    one, other = pair.members
    both: nn.Module = copy.copy(one)
    for name, part in parts.items():
        both[name] = mx.concatenate([one[name], other[name]], axis=part.axis)
    return both
