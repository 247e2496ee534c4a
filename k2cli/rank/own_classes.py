"""Subclasses of mlx's and mlx-lm's modules, in whose place k2 puts them in a model."""

from __future__ import annotations

import functools
from typing import Any

import mlx.nn as nn


def use_own_class(module: nn.Module, own: type) -> None:
    """Let a module be of a class whose methods are those of ``own`` and then those that it had.

    Its parameters stay what they are, and ``super()`` in ``own`` is the class that it had.
    """
    kinds: Any = own, type(module)
    module.__class__ = _subclass(*kinds)


def leave_own_class(module: nn.Module, own: type) -> None:
    """Give a module back the class that it had before ``own``, if it has that."""
    kind: Any = type(module)
    if isinstance(module, own) and vars(kind).get("added") is own:
        module.__class__ = kind.__bases__[1]


@functools.cache
def _subclass(own: Any, base: Any) -> type:
    return type(f"K2{base.__name__}", (own, base), {"added": own})
