"""The served model: name, limits and defaults, fixed for the life of a run."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k2cli.files import read_regular
from k2cli.server.output.output_format import OutputFormat
from k2cli.units import MIB

DEFAULT_MAX_BODY_BYTES = 32 * MIB
_MAX_CONFIG_BYTES = 50_000_000


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

    @property
    def names(self) -> tuple[str, ...]:
        """The accepted values of ``model`` in a request, the model's own name first."""
        return (self.name, *self.aliases)


def load_served_model(folder: Path, name: str, context_length: int) -> ServedModel:
    """Describe a checkpoint for serving; sampling defaults come from its generation_config.json.

    Where the file has no such value, the default is that of OpenAI's API. A launch refuses a file
    that cannot be read, and impossible values, before (``models.json_files``).
    """
    suggested = _generation_config(folder / "generation_config.json")
    return ServedModel(
        name=name,
        context_length=context_length,
        default_temperature=_number(suggested, "temperature", 1.0, high=2.0),
        default_top_p=_number(suggested, "top_p", 1.0, high=1.0) or 1.0,
        default_top_k=int(_number(suggested, "top_k", 0.0, high=float(2**31 - 1))),
    )


def _generation_config(path: Path) -> dict[str, Any]:
    try:
        # Not ``decode_json``, which refuses the infinities that some of these files have.
        found = json.loads(read_regular(path, _MAX_CONFIG_BYTES, follow_links=True))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(values: dict[str, Any], name: str, default: float, *, high: float) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
        return default
    return float(value)
