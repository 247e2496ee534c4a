"""Modules that stand for what another pipeline stage holds, or that watch what is held.

A stage is the whole model with these in the places of layers, embedding, norm and head that are
elsewhere (``stage``). They have no parameters.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


class NotHeldHere(AttributeError):
    """A model's forward code reads more of an absent layer than its plain attributes."""


class Hollow(nn.Module):
    """Answers for the plain attributes of a module that another stage holds, and its parts'.

    A model's forward code may ask its layers for them (``use_sliding``, ``self_attn.is_local``).
    """

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        properties = (n for n, value in vars(type(replaced)).items() if isinstance(value, property))
        for name in (*vars(replaced), *properties):
            value = None if name.startswith("_") else getattr(replaced, name, None)
            if isinstance(value, bool | int | float | str):
                object.__setattr__(self, name, value)
        for name, part in replaced.children().items():
            if isinstance(part, nn.Module):
                object.__setattr__(self, name, Hollow(part))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise NotHeldHere(name) from error


class AbsentLayer(Hollow):
    """A decoder layer that another stage holds: passes hidden states through."""

    def __call__(self, *arguments: Any, **named: Any) -> mx.array:
        return _hidden_among(*arguments, *named.values())


def _hidden_among(*arguments: Any) -> mx.array:
    """The hidden states ``[batch, length, hidden]`` among what a layer is called with."""
    for each in arguments:
        if isinstance(each, mx.array) and each.ndim == 3:
            return each
    raise NotHeldHere("hidden states")


class ArrivalLayer(AbsentLayer):
    """Replaces the hidden states by those that arrived: ``[batch, length, hidden]``."""

    arrived: mx.array | None

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__(replaced)
        object.__setattr__(self, "arrived", None)

    def __call__(self, *arguments: Any, **named: Any) -> mx.array:
        if self.arrived is not None:
            return self.arrived
        return _hidden_among(*arguments, *named.values())


class DepartureLayer(AbsentLayer):
    """Keeps the hidden states that go to the next stage: ``[batch, length, hidden]``."""

    departing: mx.array | None

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__(replaced)
        object.__setattr__(self, "departing", None)

    def __call__(self, *arguments: Any, **named: Any) -> mx.array:
        hidden = _hidden_among(*arguments, *named.values())
        object.__setattr__(self, "departing", hidden)
        return hidden


class WitnessLayer(nn.Module):
    """Does what a layer does, and notes how many arrays it hands on."""

    handed_on: int

    def __init__(self, watched: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "watched", watched)
        object.__setattr__(self, "handed_on", 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["watched"], name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        result = self.__dict__["watched"](*arguments, **named)
        if isinstance(result, tuple | list):
            object.__setattr__(self, "handed_on", len(result))
        return result


class AbsentEmbedding(nn.Module):
    """Stands for an embedding that another stage holds: zeros of the right shape and type."""

    def __init__(self, width: int, dtype: mx.Dtype) -> None:
        super().__init__()
        self.width = width
        self.dtype = dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        return mx.zeros((*tokens.shape, self.width), dtype=self.dtype)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """The tied head, which this stage does not have either."""
        return hidden


class AbsentModule(nn.Module):
    """Stands for a norm or a head that another stage holds: the identity."""

    def __call__(self, hidden: mx.array, *_: Any, **__: Any) -> mx.array:
        return hidden
