"""The format of an answer, in the words of OpenAI, Anthropic, vLLM and llama.cpp.

All of them become one ``AnswerFormat``. A request that gives two is refused, since an answer can
have only one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from k2cli.server.client_request import AnswerFormat, FormatKind
from k2cli.server.dialects.body import Body
from k2cli.server.errors import ApiError, invalid, type_named
from k2cli.server.structured.answer_format import MAX_CHOICES

_KINDS = "'text', 'json_object', 'json_schema', 'regex' and 'grammar' are supported"
_SYNTAXES: dict[str, FormatKind] = {"lark": "lark", "gbnf": "gbnf"}
Formats = Iterable[AnswerFormat | None]


def only_format(formats: Formats) -> AnswerFormat | None:
    """Return the only format that a request gives, or None if it gives none.

    Raises:
        ApiError: 400 if it gives two.
    """
    found = [one for one in formats if one is not None]
    if len(found) > 1:
        one, other = found[0].field, found[1].field
        raise invalid(f"'{one}' and '{other}' both give the answer a format; send one", other)
    return found[0] if found else None


def response_format(value: dict[str, Any] | None, field: str) -> AnswerFormat | None:
    """Read ``response_format`` of Chat, or ``text.format`` of Responses.

    Chat has name and schema in an object ``json_schema``; Responses has them beside the type.
    """
    if value is None:
        return None
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            if value.get("schema") is not None:  # of llama.cpp and of several providers
                return _schema(value["schema"], f"{field}.schema")
            return AnswerFormat("json_object", field=field)
        case "json_schema":
            return _json_schema(value, field)
        case "regex":
            return _regex(value.get("regex"), f"{field}.regex")
        case "grammar":
            return _grammar(value.get("grammar"), value.get("syntax"), field)
        case kind:
            raise invalid(f"{field} {type_named(kind)}; {_KINDS}", f"{field}.type")


def json_schema_format(value: dict[str, Any] | None, field: str) -> AnswerFormat | None:
    """Read ``output_config.format`` or ``output_format`` of Anthropic's Messages API."""
    if value is None:
        return None
    if (kind := value.get("type")) != "json_schema":
        message = f"{field} {type_named(kind)}; only 'json_schema' is supported"
        raise invalid(message, f"{field}.type")
    if value.get("schema") is None:
        raise invalid(f"{field}.schema: is required", f"{field}.schema")
    return _schema(value["schema"], f"{field}.schema")


def vllm_formats(
    structured: dict[str, Any] | None, guided: dict[str, Any]
) -> list[AnswerFormat | None]:
    """Read vLLM's ``structured_outputs``, and its older ``guided_...``.

    Args:
        structured: the object ``structured_outputs``.
        guided: the older fields' values, by their names without ``guided_``.
    """
    found: list[AnswerFormat | None] = [
        _vllm_format(kind, value, f"guided_{kind}")
        for kind, value in guided.items()
        if value is not None
    ]
    field = "structured_outputs"
    for kind, value in (structured or {}).items():
        place = f"{field}.{kind}"
        if value is None or (value is False and kind in _VLLM_SWITCHES):
            continue
        if kind not in _VLLM_KINDS:
            known = ", ".join(_VLLM_KINDS)
            message = f"{place} is not supported; {field} may have one of: {known}"
            raise invalid(message, place, "unsupported_parameter")
        found.append(_vllm_format(kind, value, place))
    return found


def llama_cpp_formats(grammar: str | None, schema: Any) -> list[AnswerFormat | None]:
    """Read llama.cpp's ``grammar`` and ``json_schema``."""
    return [
        None if grammar is None else AnswerFormat(_syntax_of(grammar), grammar, "grammar"),
        None if schema is None else _schema(schema, "json_schema"),
    ]


# --- kinds ----------------------------------------------------------------------------------------

_VLLM_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_VLLM_SWITCHES = frozenset(
    {
        "json_object", "disable_fallback", "disable_any_whitespace",
        "disable_additional_properties",
    }
)  # fmt: skip


def _vllm_format(kind: str, value: Any, place: str) -> AnswerFormat:
    match kind:
        case "json":
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                except (ValueError, RecursionError) as error:
                    raise invalid(f"{place}: is not JSON", place) from error
            return _schema(value, place)
        case "regex":
            return _regex(value, place)
        case "choice":
            return _choice(value, place)
        case "grammar":
            if not isinstance(value, str) or not value:
                raise _needed(place, "a text")
            return AnswerFormat(_syntax_of(value), value, place)
        case _:
            if value is not True:
                raise _needed(place, "true")
            return AnswerFormat("json_object", field=place)


def _json_schema(value: dict[str, Any], field: str) -> AnswerFormat:
    nested = "schema" not in value or "json_schema" in value
    place = f"{field}.json_schema" if nested else field
    members = value.get("json_schema") if nested else value
    if not isinstance(members, dict):
        raise _needed(place, "an object with a 'schema'")
    for name, kind, what in (
        ("name", str, "a text"),
        ("description", str, "a text"),
        ("strict", bool, "true or false"),
    ):
        if members.get(name) is not None and not isinstance(members[name], kind):
            raise _needed(f"{place}.{name}", what)
    if members.get("schema") is None:
        raise invalid(f"{place}.schema: is required", f"{place}.schema")
    strict = members.get("strict") is not False
    return _schema(members["schema"], f"{place}.schema", strict=strict)


def _schema(value: Any, place: str, *, strict: bool = True) -> AnswerFormat:
    if not isinstance(value, dict | bool):
        raise _needed(place, "a JSON schema, which is an object")
    return AnswerFormat("json_schema", value, place, strict)


def _regex(value: Any, place: str) -> AnswerFormat:
    if not isinstance(value, str) or not value:
        raise _needed(place, "a text that is not empty")
    return AnswerFormat("regex", value, place)


def _choice(value: Any, place: str) -> AnswerFormat:
    if not isinstance(value, list) or not value:
        raise _needed(place, "an array of one text or more")
    if len(value) > MAX_CHOICES:
        raise invalid(f"{place}: has {len(value)} texts, and the most are {MAX_CHOICES}", place)
    if not all(isinstance(each, str) and each for each in value):
        raise _needed(place, "an array of texts that are not empty")
    return AnswerFormat("choice", value, place)


def _grammar(value: Any, syntax: Any, field: str) -> AnswerFormat:
    if not isinstance(value, str) or not value:
        raise _needed(f"{field}.grammar", "a text")
    kind = _syntax_of(value) if syntax is None else _SYNTAXES.get(str(syntax))
    if kind is None:
        raise _needed(f"{field}.syntax", "'lark' or 'gbnf'")
    return AnswerFormat(kind, value, f"{field}.grammar")


def _syntax_of(grammar: str) -> FormatKind:
    """Return the syntax of a grammar by its sign of definition."""
    return "gbnf" if "::=" in grammar else "lark"


def _needed(place: str, what: str) -> ApiError:
    return invalid(f"{place}: must be {what}", place)


# --- fields ---------------------------------------------------------------------------------------


class FormatFields(Body):
    """OpenAI's field, and those of vLLM and llama.cpp. A request may have one of them."""

    response_format: dict[str, Any] | None = None
    # Fields of vLLM, and its older ones.
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    # Fields of llama.cpp.
    grammar: str | None = None
    json_schema: Any = None

    @property
    def answer_format(self) -> AnswerFormat | None:
        """The format of the answer, or None for any text.

        Raises:
            ApiError: 400 if it is not understood, or there are two.
        """
        guided = {
            "json": self.guided_json,
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }
        return only_format(
            [
                response_format(self.response_format, "response_format"),
                *vllm_formats(self.structured_outputs, guided),
                *llama_cpp_formats(self.grammar, self.json_schema),
            ]
        )
