"""Format of tool calls: its markers, its reader, and the things that a reader works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from k2cli.server.output.emitter import Emitter, common_call_id
from k2cli.server.output.source import MarkerCodes, Reading, Source, TooLong

Tools = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class CallContext:
    """The things that a reader of calls uses.

    Attributes:
        source: the text, after the marker that began the calls.
        emitter: the events.
        text: emits ordinary text, for what turns out to be none of the format.
        tools: the tools of the request.
    """

    source: Source
    emitter: Emitter
    text: Callable[[str], None]
    tools: Tools

    @property
    def codes(self) -> MarkerCodes:
        """The letters of special tokens."""
        return self.source.codes

    def declares(self, name: str | None) -> bool:
        """Return True if the request has a tool of that name."""
        functions = [tool.get("function") for tool in self.tools]
        return any(isinstance(each, dict) and each.get("name") == name for each in functions)

    def marker(self, text: str) -> str:
        """Return a marker as the source has it."""
        return self.codes.encode(text)

    def markers(self, *texts: str) -> tuple[str, ...]:
        """Return markers as the source has them."""
        return tuple(self.codes.encode(text) for text in texts)

    def shown(self, marker: str | TooLong | None) -> str:
        """Return the text of a marker that was read."""
        return self.codes.decode(marker) if isinstance(marker, str) else ""


ReadCalls = Callable[[CallContext, str], Reading]
"""Reader of calls; its second argument is the marker that began them."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A format of tool calls.

    Attributes:
        name: the name that ``--tool-parser`` takes.
        opens: markers that begin calls.
        tokens: markers, or parts of them, that may be special tokens of a vocabulary.
        read: the reader.
        loose_opens: markers that begin calls only outside of reasoning.
        bare: letters with which an answer may begin that is a call without a marker.
        make_call_id: makes ids for calls to which the model gives none.
    """

    name: str
    opens: tuple[str, ...]
    tokens: tuple[str, ...]
    read: ReadCalls
    loose_opens: tuple[str, ...] = ()
    bare: str = ""
    make_call_id: Callable[[], str] = field(default=common_call_id)
