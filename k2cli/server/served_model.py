"""The served model: name, limits and defaults, fixed for the life of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from k2cli.server.output.output_format import OutputFormat
from k2cli.units import MIB

DEFAULT_MAX_BODY_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model of a server.

    Args:
        name: the model's own name.
        aliases: further names that requests may use, such as those that a client insists on.
        output_format: how the model marks reasoning and tool calls.
        context_length: the maximum number of tokens of prompt and answer together.
        created: seconds since the epoch, shown in ``/v1/models``.
        default_temperature, default_top_p, default_top_k: for requests without these fields.
        api_key: the required ``Authorization: Bearer`` key; None if no key is needed.
        max_body_bytes: a longer request body is refused with 413.
        allowed_hosts: names of this server in ``Host`` headers, beside those of loopback.
        cors_origins: origins of web pages that may use the server; ``*`` is all.
        normalizes_prompts: drop parts of prompts that are not for the model and change with every
            request; see ``dialects.anthropic_conversation``.
        shares_prefixes: use the caches of earlier prompts for requests of other keys, too.
    """

    name: str
    context_length: int
    created: int = field(default_factory=lambda: int(time.time()))
    default_temperature: float = 1.0
    default_top_p: float = 1.0
    default_top_k: int = 0
    api_key: str | None = field(default=None, repr=False)
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    allowed_hosts: frozenset[str] = frozenset()
    cors_origins: frozenset[str] = frozenset()
    aliases: tuple[str, ...] = ()
    output_format: OutputFormat = field(default_factory=OutputFormat)
    normalizes_prompts: bool = True
    shares_prefixes: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The accepted values of ``model`` in a request, the model's own name first."""
        return (self.name, *self.aliases)


def served_model_from(
    generation_config: Mapping[str, Any], name: str, context_length: int
) -> ServedModel:
    """Describe a model for serving, with the sampling defaults that its authors suggest.

    Args:
        generation_config: the content of ``generation_config.json``, empty if there is none. A
            value that is absent, or that the API allows no client to send, gives the default of
            OpenAI's API.
        name: the model's own name.
        context_length: the maximum number of tokens of prompt and answer together.
    """
    return ServedModel(
        name=name,
        context_length=context_length,
        default_temperature=_number(generation_config, "temperature", 1.0, high=2.0),
        default_top_p=_number(generation_config, "top_p", 1.0, high=1.0) or 1.0,
        default_top_k=int(_number(generation_config, "top_k", 0.0, high=float(2**31 - 1))),
    )


def _number(values: Mapping[str, Any], name: str, default: float, *, high: float) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
        return default
    return float(value)
