"""Grammars of calls whose arguments have a tag each.

Required parameters are written in the order of the schema, and optional ones may be left out. The
tags are those of ``server.output``; what stands within and between them is what the chat templates
of the models write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from k2cli.grammars.text import GrammarText, choice
from k2cli.server.errors import ApiError
from k2cli.server.output.parameter_types import STRING, TYPES
from k2cli.server.output.typed_calls import TypedFormat
from k2cli.server.output.typed_formats import PAIR_FORMATS, TYPED_FORMATS
from k2cli.server.structured.call_forms.parameters import NotHeld, Parameters, parameter_sets
from k2cli.server.structured.call_forms.parts import (
    Calls,
    Function,
    Opening,
    arguments_object,
    as_object,
    gap,
    joined,
    object_schema,
    refuse,
)
from k2cli.server.structured.call_forms.typed_values import (
    ValuePlace,
    ValueSchema,
    json_value,
    text_value,
    untold_value,
)

_CALL_NUMBER = "[1-9][0-9]{0,3}"
_TEXT = frozenset({STRING})
_RAW_HEADER = ' type="object"'
WriteArgument = Callable[[str, ValueSchema], str]
"""Writes the expression of an argument by its key and schema; raises ``NotHeld``."""


def argument_lists(
    form: str,
    function: Function,
    write: WriteArgument,
    in_order: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> list[list[tuple[str, bool]]]:
    """Return expressions for the arguments of a call, one list for each set of parameters.

    Each comes with True if it is required.

    Args:
        form, function: the format and the function, for errors, too.
        write: writes one argument.
        in_order: brings the keys in order; that of the schema by default.

    Raises:
        ApiError: if the function is strict and a grammar cannot hold its schema, or if a required
            parameter cannot be written.
    """
    # What cannot be expressed for one parameter need not count for the others.
    root = object_schema(form, function) if function.strict else as_object(function.parameters)
    try:
        sets = parameter_sets(root, strict=function.strict)
    except NotHeld as error:
        raise refuse(form, function, str(error)) from error
    if not sets:
        raise refuse(form, function, "its parameters are no object")
    ordered = (Parameters({k: p.schemas[k] for k in in_order(p.schemas)}, p.required) for p in sets)
    return [_arguments(form, function, write, each, root) for each in ordered]


def _arguments(
    form: str, function: Function, write: WriteArgument, parameters: Parameters, root: object
) -> list[tuple[str, bool]]:
    found = []
    for key, schema in parameters.schemas.items():
        required = key in parameters.required
        try:
            found.append((write(key, ValueSchema(schema, root, function.strict)), required))
        except NotHeld as error:
            if required or function.strict:
                raise refuse(form, function, f"its parameter '{key}': {error}") from error
    return found


def _rows(form: str, function: Function, text: GrammarText, write: WriteArgument) -> list[str]:
    """Return expressions for all arguments of a call, in tags that follow each other."""
    return [
        " ".join(
            f"{text.rule(f'{gap(text)} {argument}')}{'' if required else '?'}"
            for argument, required in arguments
        )
        or '""'
        for arguments in argument_lists(form, function, write)
    ]


# --- a tag for each argument ---


@dataclass(frozen=True, slots=True)
class _Style:
    """Writing of one format.

    Attributes:
        call: writes the header of a call's tag by the name, in two parts between which a number
            stands, or one.
        argument: writes the header of an argument's tag by the key and the types of its value;
            several if the value has one of several types.
        place: what stands around values.
        is_section: True if a section has one call.
    """

    call: Callable[[str], tuple[str, ...]]
    argument: Callable[[str, frozenset[str]], tuple[str, ...]]
    place: Callable[[TypedFormat], ValuePlace]
    is_section: bool = False


def _quoted(name: str) -> str:
    return f'"{name}"'


def _attribute(name: str) -> str:
    value = name.replace("&", "&amp;").replace('"', "&quot;")
    return f'"{value}"'


def _k3_types(key: str, types: frozenset[str]) -> tuple[str, ...]:
    kinds = sorted({"number" if kind == "integer" else kind for kind in types})
    return tuple(f' key={_attribute(key)} type="{kind}"' for kind in kinds)


def _dsml_header(key: str, types: frozenset[str]) -> tuple[str, ...]:
    return (f' name={_attribute(key)} string="{"true" if types == _TEXT else "false"}"',)


def _plain_place(form: TypedFormat) -> ValuePlace:
    return ValuePlace(form.argument_end)


def _stripped_place(form: TypedFormat, limited_without: tuple[str, ...] = ()) -> ValuePlace:
    place = ValuePlace(form.argument_end, strip=form.strip, is_stripped=True)
    return replace(place, limited_without=limited_without)


def _lines_place(form: TypedFormat) -> ValuePlace:
    # The template writes truth values in Python's words.
    words = ("True", "False")
    return ValuePlace(form.argument_end, "\n", "\n", r"\n", strip=form.strip, booleans=words)


_DSML = _Style(
    lambda name: (f" name={_attribute(name)}",),
    _dsml_header,
    _plain_place,
)
_STYLES: dict[str, _Style] = {
    "kimi_k3": _Style(
        lambda name: (f' tool={_attribute(name)} index="', '"'), _k3_types, _plain_place
    ),
    "deepseek_v32": _DSML,
    "deepseek_v4": _DSML,
    "qwen3_coder": _Style(
        lambda name: (name,), lambda key, types: (key,), _lines_place, is_section=True
    ),
    "minimax_m2": _Style(
        lambda name: (_quoted(name),), lambda key, types: (_quoted(key),), _stripped_place
    ),
    "minicpm5": _Style(
        lambda name: (_quoted(name),),
        lambda key, types: (_quoted(key),),
        partial(_stripped_place, limited_without=("<![CDATA[",)),
    ),
    "muse_spark": _Style(
        lambda name: (f" name={_attribute(name)}",),
        lambda key, types: (f" name={_attribute(key)}",),
        _stripped_place,
    ),
}


@dataclass(frozen=True, slots=True)
class _TypedWriter:
    """Writer of calls in one format."""

    name: str
    text: GrammarText

    @property
    def form(self) -> TypedFormat:
        return TYPED_FORMATS[self.name]

    @property
    def style(self) -> _Style:
        return _STYLES[self.name]

    def after_tag(self, function: Function) -> str:
        """Return an expression for a call after the beginning of its tag."""
        form, text = self.form, self.text
        header = self.style.call(function.name)
        read = form.name_of("1".join(header))
        if read != function.name or not self._is_writable("".join(header)):
            raise refuse(self.name, function, "its name cannot be written in a tag")
        number = f" {text.terminal(_CALL_NUMBER)} "
        begin = number.join(map(text.letters, header))
        begin = f"{begin} {text.literal(form.header_end)}"
        return f"{begin} {self._arguments(function)} {gap(text)} {text.literal(form.call_end)}"

    def _arguments(self, function: Function) -> str:
        """Return an expression for all arguments, in tags or, if the format has it, in one JSON."""
        form, text = self.form, self.text
        if form.raw is None:
            return choice(*_rows(self.name, function, text, self.argument))
        begin, end = (text.literal(tag) for tag in form.raw)
        header = f"{text.letters(_RAW_HEADER)} {text.literal(form.header_end)}"
        raw = f"{begin} {header} {arguments_object(self.name, text, function)} {end}"
        try:
            rows = _rows(self.name, function, text, self.argument)
        except ApiError:
            return raw
        return choice(*rows, raw)

    def _is_writable(self, header: str) -> bool:
        form = self.form
        tags = (form.header_end, form.argument_end, form.call_end, form.section_end)
        return not self.text.has_token(header) and not any(tag and tag in header for tag in tags)

    def argument(self, key: str, value: ValueSchema) -> str:
        """Return an expression for an argument."""
        header_of = self.style.argument
        for header in header_of(key, TYPES):
            if self.form.key_of(header) != key or not self._is_writable(header):
                raise NotHeld("its key cannot be written in a tag")
        at = self.style.place(self.form)
        if self.form.is_text is None:
            return self._tagged(header_of(key, TYPES), untold_value(self.text, value, at))
        strings, others = value.parts()
        ways = []
        if strings:
            content = text_value(self.text, value, strings, at)
            ways.append(self._tagged(header_of(key, _TEXT), content))
        if others:
            types = frozenset[str]().union(*map(value.types_of, others))
            content = json_value(self.text, value, others, at)
            ways.append(self._tagged(header_of(key, types), content))
        return choice(*ways)

    def _tagged(self, headers: Sequence[str], content: str) -> str:
        text = self.text
        header = choice(*map(text.letters, headers))
        begin, end = text.literal(self.form.argument), text.literal(self.form.header_end)
        return f"{begin} {header} {end} {content}"


def typed_calls(
    name: str, opens: str, functions: Sequence[Function], text: GrammarText, *, several: bool
) -> Calls:
    """Return the calls of one of ``TYPED_FORMATS``."""
    writer = _TypedWriter(name, text)
    form = writer.form
    call = text.rule(choice(*(writer.after_tag(function) for function in functions)))
    begin = text.literal(form.call)
    if not form.section_end:
        following = f"{gap(text)} {begin}"
        return Calls((Opening(form.call, joined(call, following, several=several)),))
    section_end = f"{gap(text)} {text.literal(form.section_end)}"
    if not writer.style.is_section:
        calls = joined(f"{gap(text)} {begin} {call}", "", several=several)
        return Calls((Opening(opens, f"{calls} {section_end}"),))
    whole = text.rule(f"{gap(text)} {begin} {call} {section_end}")
    calls = joined(whole, f"{gap(text)} {text.literal(opens)}", several=several)
    loose = joined(call, f"{gap(text)} {begin}", several=several)
    return Calls((Opening(opens, calls), Opening(form.call, loose)))


# --- pairs of a key and a value ---


def pair_calls(
    name: str, opens: str, functions: Sequence[Function], text: GrammarText, *, several: bool
) -> Calls:
    """Return the calls of one of ``PAIR_FORMATS``."""
    form = PAIR_FORMATS[name]
    tags = (*form.key, *form.value, form.section_end, opens)
    at = ValuePlace(
        form.value[1], without=text.spelled([form.section_end]), strip=str.strip, is_stripped=True
    )

    def write(key: str, value: ValueSchema) -> str:
        if key != key.strip() or not key or text.has_token(key) or any(tag in key for tag in tags):
            raise NotHeld("its key cannot be written in a tag")
        begin = f"{text.literal(form.key[0])} {text.letters(key)} {text.literal(form.key[1])}"
        content = untold_value(text, value, at)
        return f"{begin} {gap(text)} {text.literal(form.value[0])} {content}"

    each = []
    for function in functions:
        has_tag = text.has_token(function.name) or any(tag in function.name for tag in tags)
        if has_tag or set(function.name) & set(" {[("):
            raise refuse(name, function, "its name cannot be written before its arguments")
        rows = _rows(name, function, text, write)
        each.append(f"{text.letters(function.name)} {choice(*rows)}")
    call = text.rule(f"{choice(*each)} {gap(text)} {text.literal(form.section_end)}")
    calls = joined(call, f"{gap(text)} {text.literal(opens)}", several=several)
    return Calls((Opening(opens, calls),))
