"""Parser of one answer: reasoning, text and calls, whatever the model's markers are."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from k2cli.server.output.emitter import Emitter, Kind
from k2cli.server.output.events import OutputEvent
from k2cli.server.output.harmony import NAME as HARMONY
from k2cli.server.output.harmony import MessageWriter, read_messages
from k2cli.server.output.source import WHITESPACE, Machine, MarkerCodes, Reading, Source
from k2cli.server.output.tool_format import CallContext, ToolFormat, Tools
from k2cli.server.text_assembler import Piece


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Markers of reasoning.

    Attributes:
        name: the name that ``--reasoning-parser`` takes.
        opens: the marker before the reasoning; the prompt may end with it.
        close: the marker after it.
        tokens: markers, or parts of them, that may be special tokens of a vocabulary.
        begins_inside: True if answers begin with reasoning even if the prompt does not open it.
        dropped: other markers around the parts of an answer, which are never shown.
    """

    name: str
    opens: str
    close: str
    tokens: tuple[str, ...]
    begins_inside: bool = False
    dropped: tuple[str, ...] = ()


class _Text:
    """A text between markers, whose outer newlines may belong to the markers.

    Whitespace alone is no text between markers.

    Args:
        emit: called with text and the number of letters after it that are held back.
        drop_codes: drops the letters of special tokens.
        trims: True if newlines beside markers are no part of the text.
        after_marker: True if a marker stands before the text.
    """

    def __init__(
        self,
        kind: Kind,
        emit: Callable[[Kind, str, int], None],
        drop_codes: Callable[[str], str],
        *,
        trims: bool,
        after_marker: bool,
    ) -> None:
        self.kind: Kind = kind
        self.blank = True
        self._emit = emit
        self._drop_codes = drop_codes
        self._trims = trims
        self._after_marker = after_marker
        self._held: list[str] = []

    def add(self, text: str) -> None:
        """Add text; what may turn out to be no part of it is held back."""
        text = self._drop_codes(text)
        if self.blank:
            if self._trims and self._after_marker and not self._held:
                text = text.lstrip("\n")
            self.blank = not text.strip(WHITESPACE)
            if self.blank:
                self._hold(text)
                return
        kept = text.rstrip("\n") if self._trims else text
        if kept:
            self._emit(self.kind, "".join(self._held) + kept, len(text) - len(kept))
            self._held = []
        self._hold(text[len(kept) :])

    def _hold(self, text: str) -> None:
        if text:
            self._held.append(text)

    def end(self, *, at_marker: bool) -> None:
        """End the text, before a marker or with the answer."""
        dropped = self._trims if at_marker else False
        if self.blank:
            dropped = at_marker or self._after_marker
        if self._held and not dropped:
            self._emit(self.kind, "".join(self._held), 0)
        self._held = []


class MarkedOutput:
    """Parser of an answer with markers; see ``events.OutputParser``.

    Args:
        codes: letters of the special tokens among the markers.
        reasoning: the markers of reasoning, or None.
        tools: the format of calls, or None if their markers are text.
        schemas: the tools of the request.
        begins_in_reasoning: True if the prompt ends within reasoning.
        trims_newlines: True if newlines beside markers belong to them.
        only_first_call: True if the answer ends after its first call.
    """

    def __init__(
        self,
        codes: MarkerCodes,
        reasoning: ReasoningFormat | None,
        tools: ToolFormat | None,
        schemas: Tools,
        *,
        begins_in_reasoning: bool = False,
        trims_newlines: bool = False,
        only_first_call: bool = False,
    ) -> None:
        self._emitter = Emitter(only_first_call=only_first_call, before_call=self._before_call)
        if tools is not None:
            self._emitter.make_call_id = tools.make_call_id
        self._reasoning = reasoning
        self._tools = tools
        self._schemas = schemas
        self._trims = trims_newlines
        self._answered = False
        self._reasoning_left_open = False
        self._bare_tried = False
        self._calls_begin = 0
        self._text_end: int | None = None
        self._machine = Machine(codes, self._read)
        self._source = self._machine.source
        inside = reasoning is not None and begins_in_reasoning
        self._text = self._new_text("reasoning" if inside else "answer", after_marker=inside)

    @property
    def calls(self) -> int:
        """The number of calls that have begun."""
        return self._emitter.calls

    @property
    def reasoning_tokens(self) -> int:
        """The number of generated tokens that belong to reasoning, without its markers."""
        return self._emitter.reasoning_tokens

    @property
    def closed(self) -> bool:
        """True once the only call that is wanted is complete; nothing follows then."""
        return self._emitter.closed

    def push(self, piece: Piece) -> list[OutputEvent]:
        """Add text and return the events that are now certain."""
        self._emitter.add(piece)
        self._machine.feed(self._source.codes.of_piece(piece))
        return self._emitter.take_events()

    def finish(self) -> list[OutputEvent]:
        """Return the events of text that was held back, once the answer has ended."""
        self._machine.finish()
        self._emitter.rest_of_tokens(self._text.kind, show=not self.calls)
        return self._emitter.take_events()

    # --- the reading of an answer ---

    def _read(self, source: Source) -> Reading:
        encode = source.codes.encode
        form = self._reasoning
        opens, close = (encode(form.opens), encode(form.close)) if form else ("", "")
        dropped = tuple(map(encode, form.dropped)) if form else ()
        if self._is_harmony:
            yield from read_messages(source, self._message_writer())
            self._text.end(at_marker=False)
            return
        while True:
            if self._text.kind == "answer" and (yield from self._bare_call(source)):
                continue
            calls = self._call_opens()
            markers = (opens, close, *calls)
            if self._text.kind == "answer":
                markers = (*markers, *dropped)
            # ``add`` is looked up each time, because a call replaces the text.
            found = yield from source.until(markers, lambda text: self._text.add(text), coded=True)
            if found in calls:
                assert isinstance(found, str)
                assert self._tools is not None
                self._calls_begin = source.offset - len(source.codes.decode(found))
                yield from self._tools.read(self._context(source), found)
                self._after_calls()
            elif found == close and self._text.kind == "reasoning":
                self._switch("answer", source.offset - len(source.codes.decode(close)))
            elif found == close:
                self._stray(close)
            elif found == opens:
                at_start = self._text.blank and not self._answered
                if opens.isprintable() and not at_start:
                    self._text.add(opens)  # it is not a special token, and not at the beginning
                elif self._text.kind == "answer":
                    self._switch("reasoning", source.offset - len(source.codes.decode(opens)))
            elif found is None:
                self._text.end(at_marker=False)
                return

    @property
    def _is_harmony(self) -> bool:
        return any(
            form is not None and form.name == HARMONY for form in (self._reasoning, self._tools)
        )

    def _message_writer(self) -> MessageWriter:
        return MessageWriter(
            self._emitter,
            self._switch,
            lambda text: self._text.add(text),
            "answer" if self._reasoning is None else "reasoning",
            with_calls=self._tools is not None,
        )

    def _stray(self, close: str) -> None:
        """Drop a marker that ends no reasoning, unless it is ordinary text."""
        if close.isprintable() and not self._reasoning_left_open:
            self._text.add(close)
        self._reasoning_left_open = False

    def _bare_call(self, source: Source) -> Generator[None, None, bool]:
        """Read calls without a marker, with which the answer may begin."""
        tools = self._tools
        if tools is None or not tools.bare or self._bare_tried or self._answered:
            return False
        letter = yield from source.skip(WHITESPACE, self._text.add)
        self._bare_tried = True
        if letter == "" or letter not in tools.bare:
            return False
        yield from tools.read(self._context(source), "")
        self._after_calls()
        return True

    def _call_opens(self) -> tuple[str, ...]:
        if self._tools is None or self._emitter.full:
            return ()
        loose = self._tools.loose_opens if self._text.kind == "answer" else ()
        return tuple(map(self._source.codes.encode, (*self._tools.opens, *loose)))

    def _context(self, source: Source) -> CallContext:
        return CallContext(source, self._emitter, lambda text: self._text.add(text), self._schemas)

    def _before_call(self) -> None:
        """End the text before a call. Reasoning ends there, too, even without its marker."""
        if self._text.kind == "reasoning":
            self._reasoning_left_open = True
        self._switch("answer", self._calls_begin)
        self._answered = True

    def _after_calls(self) -> None:
        if self._text.kind == "answer" and self._text.blank:
            self._emitter.drop(self._source.offset, "answer")

    def _switch(self, kind: Kind, offset: int) -> None:
        """End the text at the offset of a marker that was read, and begin one of a kind."""
        self._text_end = offset
        self._text.end(at_marker=True)
        self._text_end = None
        self._answered = self._answered or (self._text.kind == "answer" and not self._text.blank)
        self._emitter.drop(offset, self._text.kind)
        self._emitter.drop(self._source.offset, "answer")
        self._bare_tried = False
        self._text = self._new_text(kind, after_marker=True)

    def _new_text(self, kind: Kind, *, after_marker: bool) -> _Text:
        return _Text(
            kind,
            self._emit_text,
            self._source.codes.without,
            trims=self._trims,
            after_marker=after_marker,
        )

    def _emit_text(self, kind: Kind, text: str, held: int) -> None:
        end = self._source.offset if self._text_end is None else self._text_end
        self._emitter.text(kind, text, end - held)
