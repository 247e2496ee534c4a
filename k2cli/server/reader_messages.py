"""Messages between the guard and its reader processes until a process takes requests.

They are apart from those about requests (``server.read_request``), whose types take long to import.
"""

from __future__ import annotations

import msgspec

from k2cli.units import GIB

MEMORY_BYTES = 6 * GIB
"""Limit of a reader process: 32 MiB of JSON as Python objects, and K2's tokenizer, need less."""


class KnownTemplates(msgspec.Struct, frozen=True):
    """The chat templates that the first reader process has read: their files and their texts."""

    path: str
    plain: str | None
    tools_path: str
    with_tools: str | None
    others: str = ""


class ReaderSettings(msgspec.Struct, frozen=True):
    """The first frame to a reader process: whose requests it reads.

    ``templates`` are those that an earlier process has read and tried; None for the first one.
    """

    folder: str
    name: str
    context_length: int
    default_temperature: float
    default_top_p: float
    default_top_k: int
    aliases: tuple[str, ...] = ()
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    templates: KnownTemplates | None = None
    memory_bytes: int = MEMORY_BYTES


class Trying(msgspec.Struct, frozen=True, tag=True):
    """News of a reader process: it begins to read or try a file of the model."""

    file: str
    work: str


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """News of a reader process: it takes requests from now on."""

    templates: KnownTemplates


class NotLoaded(msgspec.Struct, frozen=True, tag=True):
    """News of a reader process: a file of the model cannot be used."""

    message: str


ReaderNews = Trying | Loaded | NotLoaded
"""The frames of a reader process before its first answer."""
