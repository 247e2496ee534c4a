"""Calls that have each argument between tags of its own, streamed argument by argument.

mlx-lm's parser of the family converts each value as it would in a whole call: this module gives it
a call with one argument. The deltas concatenate to one JSON object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial

from k2cli.server.output.emitter import MAX_NAME_LETTERS
from k2cli.server.output.json_calls import until_after_json
from k2cli.server.output.mlx_lm_calls import emit_whole, json_text, parse_whole
from k2cli.server.output.parameter_types import STRING, TYPES, declared_types, value_of_text
from k2cli.server.output.source import WHITESPACE, Reading, Take, TooLong
from k2cli.server.output.tool_format import CallContext

MAX_HEADER_LETTERS = 4 * MAX_NAME_LETTERS

_CDATA = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.DOTALL)
_ATTRIBUTE = re.compile(r'([\w-]+)\s*=\s*"([^"]*)"')


def attribute(*names: str) -> Callable[[str], str | None]:
    """Make a function that finds an attribute in the header of a tag."""

    def find(header: str) -> str | None:
        for name, value in _ATTRIBUTE.findall(header):
            if name in names:
                return str(value).replace("&quot;", '"').replace("&amp;", "&")
        return None

    return find


def unquoted(header: str) -> str | None:
    """Read a name that stands alone in a header, with or without quotation marks."""
    name = header.strip()
    if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'":
        name = name[1:-1]
    return name or None


def without_newlines(value: str) -> str:
    """Remove a newline at either end."""
    return value.removeprefix("\n").removesuffix("\n")


def without_cdata(value: str) -> str:
    """Remove whitespace around a text, or the marks of XML's CDATA and what is around them."""
    found = _CDATA.fullmatch(value.strip())
    return found[1] if found else value.strip()


@dataclass(frozen=True, slots=True)
class TypedFormat:
    """Tags of calls with typed arguments.

    Attributes:
        call, argument: how the tags of a call and of an argument begin.
        header_end: how both end.
        argument_end, call_end: the closing tags.
        section_end: the marker that ends the calls, or nothing.
        name_of, key_of: read the header, which is what stands within a tag.
        raw: how the tag of arguments in one JSON text begins, and its closing tag.
        parser: mlx-lm's parser that converts values of parameters whose type is not known; not
            used with ``is_text``.
        is_text: tells by the header of an argument if its value is a text, or else JSON.
        strip: removes what stands around a text within its tags.
    """

    call: str
    argument: str
    header_end: str
    argument_end: str
    call_end: str
    section_end: str = ""
    name_of: Callable[[str], str | None] = unquoted
    key_of: Callable[[str], str | None] = unquoted
    raw: tuple[str, str] | None = None
    parser: str | None = None
    is_text: Callable[[str], bool] | None = None
    strip: Callable[[str], str] = without_newlines


@dataclass(slots=True)
class _Object:
    """JSON object that is written key by key."""

    take: Take
    empty: bool = True

    def add(self, key: str, value: str) -> None:
        self.take(f"{'{' if self.empty else ', '}{json_text(key)}: {value}")
        self.empty = False

    def add_cut(self, key: str, value: str) -> None:
        """Add a string that was not completed."""
        self.add(key, json_text(value)[:-1])

    def add_cut_key(self, key: str) -> None:
        """Add a key that was not completed."""
        self.take(("{" if self.empty else ", ") + json_text(key)[:-1])
        self.empty = False

    def end(self) -> None:
        if not self.empty:
            self.take("}")


@dataclass(slots=True)
class _Collected:
    """Text that was read: its parts."""

    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


def typed_calls(form: TypedFormat) -> Callable[[CallContext, str], Reading]:
    """Make a reader of such calls: those of a section, or one without a section around it."""

    def read(context: CallContext, marker: str) -> Reading:
        call, call_end = context.markers(form.call, form.call_end)
        if marker == call:
            yield from _typed_call(form, context, only_declared=bool(form.section_end))
            return
        end = context.marker(form.section_end)
        found: str | TooLong | None = call_end
        while found == call_end:
            found = yield from context.source.until((call, end), context.text)
            if found == call:
                found = yield from _typed_call(form, context)

    return read


def _typed_call(
    form: TypedFormat, context: CallContext, *, only_declared: bool = False
) -> Generator[None, None, str | None]:
    """Read a call after the beginning of its tag. Return the marker that ended it."""
    source, emitter = context.source, context.emitter
    header: list[str] = []
    found = yield from source.until(
        context.markers(form.header_end), header.append, limit=MAX_HEADER_LETTERS
    )
    text = "".join(header)
    name = form.name_of(text) if isinstance(found, str) else None
    if only_declared and not context.declares(name):
        name = None
    if name is None or not emitter.begin(name):
        context.text(form.call + text + context.shown(found))
        return None
    written, other = _Object(emitter.arguments), _Collected()
    argument, call_end = context.markers(form.argument, form.call_end)
    raw = context.marker(form.raw[0]) if form.raw else None
    ends = context.markers(form.section_end) if form.section_end else ()
    stops = (argument, call_end, *ends, *((raw,) if raw else ()))
    while True:
        found = yield from source.until(stops, other.parts.append)
        if found == argument:
            found = yield from _argument(form, context, text, written)
            if found is None:
                break
        elif found == raw and form.raw is not None:
            yield from source.until(context.markers(form.header_end), lambda text: None)
            yield from until_after_json(source, context.markers(form.raw[1]), emitter.arguments)
            continue
        if found == call_end or found in ends:
            written.end()
            emitter.end()
            break
        if found is None:
            emitter.end_if_complete()
            break
    if found is not None and other.text.strip():
        context.text(other.text)
    return found if isinstance(found, str) else None


def _argument(
    form: TypedFormat, context: CallContext, call: str, written: _Object
) -> Generator[None, None, str | None]:
    """Read an argument after the beginning of its tag. Return the marker that ended it."""
    source = context.source
    header, value = _Collected(), _Collected()
    found = yield from source.until(
        context.markers(form.header_end), header.parts.append, limit=MAX_HEADER_LETTERS
    )
    key = form.key_of(header.text)
    if not isinstance(found, str):
        written.add_cut_key(header.text)
        return None
    ends = context.markers(form.argument_end)
    # The end of the section is certain if it is a special token, even within a value.
    ends += tuple(end for end in context.markers(form.section_end) if end and not end.isprintable())
    name = key if key is not None else header.text
    types = declared_types(context.tools, form.name_of(call) or "", name)
    is_text = STRING in (types or TYPES) if form.is_text is None else form.is_text(header.text)
    read = source.until if is_text else partial(until_after_json, source)
    found = yield from read(ends, value.parts.append)
    if found is None:
        written.add_cut(name, value.text.lstrip("\n"))
    else:
        converted = _converted(form, context, call, header.text, types, value.text)
        written.add(name, json_text(converted))
    return found if isinstance(found, str) else None


def _converted(
    form: TypedFormat,
    context: CallContext,
    call: str,
    header: str,
    types: frozenset[str] | None,
    value: str,
) -> object:
    if form.is_text is not None:
        return value if form.is_text(header) else _json_or_text(value)
    if known := value_of_text(form.strip(value), types):
        return known[0]
    assert form.parser is not None
    tags = (form.call, form.argument, form.argument_end, form.call_end)
    whole = (
        f"{form.call}{call}{form.header_end}{form.argument}{header}{form.header_end}"
        f"{value}{form.argument_end}{form.call_end}"
    )
    found = _value_in(form.parser, whole, context, value, tags)
    return found[0] if found else without_newlines(value)


def _json_or_text(value: str) -> object:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _value_in(
    parser: str, whole: str, context: CallContext, value: str, tags: tuple[str, ...]
) -> list[object]:
    """Return the value of a call's only argument; nothing if it is not certain.

    A value that has a tag of its own form is not given to the parser, which takes quadratic time.
    """
    if any(tag in value for tag in tags):
        return []
    calls = parse_whole(parser, whole, context.tools)
    arguments = calls[0].get("arguments") if len(calls) == 1 else None
    return list(arguments.values()) if isinstance(arguments, dict) and len(arguments) == 1 else []


# --- GLM: a name, then pairs of a key and a value ---


@dataclass(frozen=True, slots=True)
class PairFormat:
    """Tags of keys and values, and mlx-lm's parser of them."""

    parser: str
    key: tuple[str, str]
    value: tuple[str, str]
    section_end: str


def pair_calls(form: PairFormat) -> Callable[[CallContext, str], Reading]:
    """Make a reader of one call, which begins with its name."""

    def read(context: CallContext, marker: str) -> Reading:
        source, emitter = context.source, context.emitter
        end, key_tag = context.markers(form.section_end, form.key[0])
        header = _Collected()
        found = yield from source.until((key_tag, end), header.parts.append)
        if found != key_tag:
            # A call without arguments, or in one of the other forms that GLM may write.
            shown = context.shown
            name = header.text.strip()
            alone = found is not None and not set(name) & set(WHITESPACE + "{[(")
            if alone and emitter.begin(name):
                emitter.end()
                return
            emit_whole(context, form.parser, header.text, shown(marker), shown(found))
            return
        if not emitter.begin(header.text.strip()):
            context.text(context.shown(marker) + header.text + context.shown(found))
            return
        yield from _pairs(form, context, header.text)

    return read


def _pairs(form: PairFormat, context: CallContext, header: str) -> Reading:
    source, emitter = context.source, context.emitter
    written, other = _Object(emitter.arguments), _Collected()
    end, key_tag, key_end, value_tag, value_end = context.markers(
        form.section_end, *form.key, *form.value
    )
    while True:
        key, value = _Collected(), _Collected()
        found = yield from source.until((key_end, end), key.parts.append)
        if found == key_end:
            found = yield from source.until((value_tag, key_tag, end), other.parts.append)
        elif found is None:
            written.add_cut_key(key.text)
        if found == value_tag:
            types = declared_types(context.tools, header.strip(), key.text.strip())
            is_text = STRING in (types or TYPES)
            read = source.until if is_text else partial(until_after_json, source)
            found = yield from read((value_end, end), value.parts.append)
            if found is None:
                written.add_cut(key.text.strip(), value.text)
            else:
                if known := value_of_text(value.text.strip(), types):
                    content = json_text(known[0])
                else:
                    content = _pair_value(form, context, header, key, value)
                written.add(key.text.strip(), content)
        if found == value_end:
            found = yield from source.until((key_tag, end), other.parts.append)
        if found != key_tag:
            break
    if found == end:
        written.end()
        emitter.end()
        if other.text.strip():
            context.text(other.text)


def _pair_value(
    form: PairFormat, context: CallContext, header: str, key: _Collected, value: _Collected
) -> str:
    whole = (
        f"{header}{form.key[0]}{key.text}{form.key[1]}{form.value[0]}{value.text}{form.value[1]}"
    )
    tags = (*form.key, *form.value)
    found = _value_in(form.parser, whole, context, key.text + value.text, tags)
    return json_text(found[0] if found else value.text.strip())
