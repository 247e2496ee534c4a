"""Calls whose arguments are JSON text in the stream, and are passed on as they are generated.

Three forms: a header, then the arguments (Kimi K2, DeepSeek); objects with a name and arguments
(Hermes, Qwen3, Llama 3, older Mistral); a name, a token, and arguments (Mistral).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass

from k2cli.server.output.emitter import MAX_NAME_LETTERS
from k2cli.server.output.source import WHITESPACE, Machine, Reading, Source, Take, TooLong
from k2cli.server.output.tool_format import CallContext

_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'["\\]')
_SCALAR_END = re.compile(r"[,}\]\n]")
_NAME_KEYS = {"name", "function"}
_ARGUMENT_KEYS = {"arguments", "parameters"}
_OTHER_KEYS = {"id", "type"}


# --- JSON values ---


def read_string(source: Source, take: Take) -> Generator[None, None, bool]:
    """Read a JSON string; its first letter is a quotation mark. True if it ends."""
    source.one(take)
    while letter := (yield from source.scan(_STRING_END, take)):
        source.one(take)
        if letter == '"':
            return True
        if not (yield from source.peek()):
            return False
        source.one(take)
    return False


def read_value(source: Source, take: Take) -> Generator[None, None, bool]:
    """Read a JSON value up to its end by its brackets and strings alone. True if it ends."""
    first = yield from source.peek()
    if first == '"':
        return (yield from read_string(source, take))
    if first not in ("{", "["):
        return bool((yield from source.scan(_SCALAR_END, take)))
    depth = 0
    while letter := (yield from source.scan(_STRUCTURE, take)):
        if letter == '"':
            if not (yield from read_string(source, take)):
                return False
            continue
        source.one(take)
        depth += 1 if letter in "{[" else -1
        if depth == 0:
            return True
    return False


class _OpenString:
    """Scanner that knows if a JSON object or array ends within a string so far."""

    def __init__(self) -> None:
        self._begun = self._is_json = self._inside = self._escape = False

    def add(self, text: str) -> None:
        """Scan more text."""
        if not self._begun:
            text = text.lstrip(WHITESPACE)
            self._begun, self._is_json = bool(text), text[:1] in ("{", "[")
        at = 0
        if self._escape and text:
            self._escape, at = False, 1
        while self._is_json and (found := _STRING_END.search(text, at)):
            at = found.end()
            if found[0] == '"':
                self._inside = not self._inside
            elif self._inside:
                self._escape = at == len(text)
                at += 1

    @property
    def inside(self) -> bool:
        """True if the text ends within a string."""
        return self._is_json and self._inside


def until_after_json(
    source: Source, ends: tuple[str, ...], take: Take
) -> Generator[None, None, str | TooLong | None]:
    """Read a JSON text up to a marker, as ``Source.until`` does.

    A marker of ordinary letters does not end it within a JSON string.
    """
    string = _OpenString()

    def both(text: str) -> None:
        take(text)
        string.add(text)

    while True:
        found = yield from source.until(ends, both)
        if not (isinstance(found, str) and string.inside and found.isprintable()):
            return found
        both(found)


def _text_of(value: str) -> str | None:
    """Return the content of a JSON string, or None if it is none."""
    try:
        found = json.loads(value, strict=False)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, str) else None


# --- objects with a name and arguments ---


class _NotACall(Exception):
    """Text that is no call; what was read of it is shown as text."""


class JsonObjects:
    """Reader of objects such as ``{"name": ..., "arguments": {...}}``, one or more, or a list."""

    def __init__(self, context: CallContext) -> None:
        self._emitter = context.emitter
        self._text = context.text
        self._raw: list[str] = []
        self._name: str | None = None
        self._id: str | None = None
        self._begun = False

    def read(self, source: Source) -> Reading:
        """Read all objects; other text between them is emitted as text."""
        while letter := (yield from source.skip(WHITESPACE + "[],;}", self._raw.append)):
            if letter == "{" and not self._emitter.full:
                try:
                    yield from self._object(source)
                except _NotACall:
                    pass
                else:
                    self._raw = []
                    continue
            # Not calls, or no more: everything that is left is text.
            self._text("".join(self._raw))
            self._raw = []
            yield from source.until((), self._text)
            return
        if not self._begun:
            self._text("".join(self._raw))

    def _object(self, source: Source) -> Reading:
        self._name = self._id = None
        early: list[str] = []
        called = complete = False
        raw = self._raw
        source.one(raw.append)
        while (letter := (yield from source.skip(WHITESPACE + ",", raw.append))) != "}":
            if letter != '"':
                break
            key = yield from self._string(source)
            if self._name is None and key not in _NAME_KEYS | _ARGUMENT_KEYS | _OTHER_KEYS:
                break
            if (yield from source.skip(WHITESPACE, raw.append)) != ":":
                break
            source.one(raw.append)
            value_begin = yield from source.skip(WHITESPACE, raw.append)
            if key in _ARGUMENT_KEYS and not called:
                if self._name is not None:
                    self._begin(self._name)
                    called = True
                    complete = yield from self._arguments(source, self._emitter.arguments)
                else:
                    complete = yield from self._arguments(source, early.append)
            elif key in (*_NAME_KEYS, "id") and value_begin == '"':
                value = yield from self._string(source)
                if key == "id":
                    self._id = value
                elif self._name is None:
                    self._name = value
            else:
                yield from read_value(source, raw.append)
        closed = letter == "}"
        if closed:
            source.one(raw.append)
        if not called:
            if self._name is None or not (closed or complete):
                raise _NotACall
            self._begin(self._name)
            self._emitter.arguments("".join(early))
            complete = True
        if complete or closed:
            self._emitter.end()

    def _begin(self, name: str) -> None:
        if not self._emitter.begin(name, self._id):
            raise _NotACall
        self._begun = True
        self._raw = []

    def _string(self, source: Source) -> Generator[None, None, str]:
        parts: list[str] = []

        def take(text: str) -> None:
            parts.append(text)
            self._raw.append(text)

        yield from read_string(source, take)
        value = "".join(parts)
        return _text_of(value) or value.strip('"')

    def _arguments(self, source: Source, take: Take) -> Generator[None, None, bool]:
        """Read the arguments: an object as it is, or a string that has the object's text."""
        first = yield from source.peek()
        before_begin = take != self._emitter.arguments
        if first in ("{", "["):

            def both(text: str) -> None:
                take(text)
                if before_begin:
                    self._raw.append(text)

            return (yield from read_value(source, both))
        parts: list[str] = []
        complete = yield from read_value(source, parts.append)
        value = "".join(parts)
        if before_begin:
            self._raw.append(value)
        content = _text_of(value)
        if content is not None:
            value = content
        take("" if value.strip() == "null" else value)
        return complete


def hermes_calls(close: str) -> Callable[[CallContext, str], Reading]:
    """Make a reader of objects between two markers; without a second one, up to the end."""

    def read(context: CallContext, marker: str) -> Reading:
        objects = JsonObjects(context)
        inner = Machine(context.codes, objects.read)
        ends = context.markers(close) if close else ()
        found = yield from until_after_json(context.source, ends, inner.feed)
        inner.finish()
        if found is not None:
            context.emitter.end()

    return read


# --- a header, then the arguments ---


@dataclass(frozen=True, slots=True)
class Header:
    """The name of a call, and the id that the model gave it, if it did.

    ``rest`` is the beginning of the arguments, if the header has some.
    """

    name: str
    call_id: str | None = None
    rest: str = ""


@dataclass(frozen=True, slots=True)
class HeaderFormat:
    """Markers of calls that have a header and then arguments, in a section of their own."""

    call: str
    arguments: str
    call_end: str
    section_end: str
    read_header: Callable[[str], Header]
    fenced: bool = False
    numbered: bool = False
    """True if the model may write the number of a call alone."""


_K2_HEADER = re.compile(r"(?:functions\.)?(.+?):\d+", re.DOTALL)


def k2_header(text: str) -> Header:
    """Read ``functions.NAME:INDEX``, which is the id of the call."""
    text, brace, rest = text.partition("{")
    text = text.strip()
    if found := _K2_HEADER.fullmatch(text):
        return Header(found[1], text, brace + rest)
    return Header(text.removeprefix("functions."), None, brace + rest)


def deepseek_header(text: str) -> Header:
    """Read a name."""
    return Header(text.strip())


def header_calls(form: HeaderFormat) -> Callable[[CallContext, str], Reading]:
    """Make a reader of such calls: those of a section, or one without a section around it."""

    def read(context: CallContext, marker: str) -> Reading:
        call, end = context.markers(form.call, form.call_end)
        found: str | None = marker
        while True:
            if found != call:
                found = yield from _text_until(context, (call, context.marker(form.section_end)))
                if found != call:
                    return
            found = yield from _header_call(form, context)
            if found != call and (found != end or marker == call):
                return

    return read


def _text_until(
    context: CallContext, markers: tuple[str, ...]
) -> Generator[None, None, str | None]:
    found = yield from context.source.until(markers, context.text)
    return found if isinstance(found, str) else None


def _header_call(form: HeaderFormat, context: CallContext) -> Generator[None, None, str | None]:
    """Read a call after its marker. Return the marker that ended it; None if it is text."""
    parts: list[str] = []
    ends = context.markers(form.call_end, form.section_end, form.call)
    separator = context.marker(form.arguments)
    found = yield from context.source.until(
        (separator, *ends), parts.append, limit=2 * MAX_NAME_LETTERS
    )
    fence = None
    if form.fenced and found == separator and "".join(parts).strip() == "function":
        # DeepSeek V3 and R1: the kind of tool, then the name, then the arguments in a fence.
        parts.append(form.arguments)
        name: list[str] = []
        found = yield from context.source.until(
            ("\n", *ends), name.append, limit=2 * MAX_NAME_LETTERS
        )
        parts += name
        header, fence = Header("".join(name).strip()), _Fence(context.emitter.arguments)
    else:
        header = form.read_header("".join(parts))
    if form.numbered and header.name.isdecimal() and len(context.tools) == 1:
        header = Header(_tool_name(context) or header.name, header.name, header.rest)
    if not isinstance(found, str) or not context.emitter.begin(header.name, header.call_id):
        context.text(form.call + "".join(parts) + context.shown(found))
        return None
    context.emitter.arguments(header.rest)
    if fence is not None and found == "\n":
        if (yield from context.source.skip(WHITESPACE + "`")) == "j":
            yield from context.source.skip("json")
        found = yield from until_after_json(context.source, ends, fence.add)
    elif found == separator:
        found = yield from until_after_json(context.source, ends, context.emitter.arguments)
    if found is not None:
        context.emitter.end()
    context.emitter.end_if_complete()
    return found if isinstance(found, str) else None


def _tool_name(context: CallContext) -> str | None:
    """Return the name of the only tool."""
    function = context.tools[0].get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


class _Fence:
    """Filter that drops the end of a fence around the arguments."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._held = ""

    def add(self, text: str) -> None:
        text = self._held + text
        kept = text.rstrip(WHITESPACE + "`")
        self._held = text[len(kept) :]
        if kept:
            self._take(kept)
