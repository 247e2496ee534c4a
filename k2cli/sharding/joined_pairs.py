"""Pairs of projections that one matrix can compute: gate and up of feed-forward parts and experts.

Rows of a matrix are outputs, and quantization is per row, so the matrix of both has the rows of the
one and then those of the other, bit for bit. ``rank.joined_projections`` joins the pairs that are
found here; planning asks whether there are any, since the joined result takes more memory.

Only modules that are known to multiply and no more are joined, by their exact classes (not those of
LoRA, for example), and only if both are stored in the same form: element types, bits, group size,
mode, a bias or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from k2cli.mlx_lm_package import mlx_lm_module

NAMES = (("gate_proj", "up_proj"), ("w1", "w3"))
"""Attributes of the projections of one input, as mlx-lm names them."""

JOINED_ON: Mapping[str, bool] = {"cpu": False, "metal": True, "cuda": True}
"""Devices (``choices.Device``) on which projections are joined, unless a launch says that none are:
those where it is faster (docs/design/decisions.md has the measurements)."""

_MATRICES = frozenset(("weight", "scales", "biases"))


def are_joined(wanted: bool | None, device: str) -> bool:
    """Decide if a rank joins projections; ``wanted`` None leaves it to the device."""
    return JOINED_ON[device] if wanted is None else wanted


@dataclass(frozen=True, slots=True)
class ProjectionPair:
    """Two projections of the same input, and the module that holds them.

    ``path`` is the dotted name of ``owner``, and ``names`` its attributes.
    """

    path: str
    owner: nn.Module
    names: tuple[str, str]

    @property
    def members(self) -> tuple[Any, Any]:
        """Both projections."""
        return self.owner[self.names[0]], self.owner[self.names[1]]

    @property
    def is_of_experts(self) -> bool:
        return isinstance(self.members[0], _expert_kinds())


def projection_pairs(model: nn.Module) -> Iterator[ProjectionPair]:
    """Yield the pairs of a model, whole or cut, whose projections can be joined."""
    kinds = (
        nn.Linear, nn.QuantizedLinear, nn.AllToShardedLinear, nn.QuantizedAllToShardedLinear,
        *_expert_kinds(),
    )  # fmt: skip
    for path, owner in list(model.named_modules()):
        for names in NAMES:
            if all(name in owner and type(owner[name]) in kinds for name in names):
                pair = ProjectionPair(path, owner, names)
                if _are_alike(*pair.members):
                    yield pair


def output_axis(name: str, value: mx.array) -> int:
    """Return the axis of outputs of a projection's parameter."""
    return value.ndim - (2 if name in _MATRICES else 1)


def _expert_kinds() -> tuple[type, ...]:
    layers = mlx_lm_module("models.switch_layers")
    return layers.SwitchLinear, layers.QuantizedSwitchLinear


def _are_alike(one: Any, other: Any) -> bool:
    """True if two modules multiply in the same way by matrices stored in the same form."""
    if type(one) is not type(other) or one is other or one.keys() != other.keys():
        return False
    if not one.keys() <= {*_MATRICES, "bias"} or _settings(one) != _settings(other):
        return False
    return all(_form(name, value) == _form(name, other[name]) for name, value in one.items())


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return what a module has beside arrays, such as bits, group size, mode and ranks."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def _form(name: str, value: mx.array) -> tuple[mx.Dtype, list[int]]:
    """Return the element type and the shape without the number of outputs."""
    shape = list(value.shape)
    shape[output_axis(name, value)] = 0
    return value.dtype, shape
