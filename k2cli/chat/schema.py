"""The JSON schema of ``k2 chat --schema``: its file, and the check of answers against it.

k2's server holds the model to the schema. Other servers may ignore it, so every answer is checked
here, too.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2cli.errors import K2Error, UsageError
from k2cli.files import read_regular
from k2cli.units import MIB

STDIN = "-"
MAX_SCHEMA_BYTES = MIB
"""Of the file. k2's server takes 512 KiB of it without whitespace between its parts."""

_NAME = "answer"
_MAX_SHOWN_LETTERS = 200


@dataclass(frozen=True, slots=True)
class AnswerSchema:
    """A JSON schema that answers must obey.

    Attributes:
        source: the file's name for errors.
        document: the schema as it was read.
    """

    source: str
    document: dict[str, Any] | bool

    def response_format(self) -> dict[str, Any]:
        """Return the member ``response_format`` of a request, in OpenAI's form."""
        members = {"name": _NAME, "schema": self.document, "strict": True}
        return {"type": "json_schema", "json_schema": members}

    def parse(self, text: str, finish_reason: str | None) -> Any:
        """Return the value of a whole answer.

        Raises:
            K2Error: if the answer was cut off, is not JSON, or does not obey the schema.
        """
        if finish_reason == "length":
            raise K2Error(
                "the answer was cut off at the token limit, so its JSON is not whole",
                "give a larger --max-tokens, or see what there is of it with --json",
            )
        if finish_reason != "stop":
            raise K2Error(f"the answer ended with '{finish_reason}', so its JSON is not whole")
        try:
            value = _decoded(text)
        except ValueError as error:
            found = f"the answer is not JSON ({error})"
            raise K2Error(f"{found}: {_IGNORED}", f"it begins: {_shown(text)}") from error
        if (problem := _problem(self.document, value)) is not None:
            raise K2Error(f"the answer does not obey '{self.source}': {problem}: {_IGNORED}")
        return value


_IGNORED = "the server ignored the schema or cannot hold it"


def read_schema(name: str) -> AnswerSchema:
    """Read a JSON schema from a file, or from stdin if the name is ``-``.

    Raises:
        UsageError: if it cannot be read, is too large, or is no JSON schema.
    """
    source = "stdin" if name == STDIN else name
    try:
        data = _read(name)
    except OSError as error:
        hint = "k2 chat --schema - reads it from a pipe" if Path(name).is_fifo() else None
        reason = error.strerror or str(error)
        raise UsageError(f"the schema '{source}' cannot be read: {reason}", hint) from error
    try:
        document = _decoded(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        message = f"the schema '{source}' is not UTF-8: the byte at offset {error.start} is not"
        raise UsageError(message) from error
    except ValueError as error:
        raise UsageError(f"the schema '{source}' is not JSON: {error}") from error
    if not isinstance(document, dict | bool):
        found = "null" if document is None else f"a {type(document).__name__}"
        found = {"a list": "an array", "a str": "a string"}.get(found, found)
        raise UsageError(f"the schema '{source}' must be a JSON object, and is {found}")
    if (problem := _schema_problem(document)) is not None:
        raise UsageError(f"'{source}' is no JSON schema: {problem}")
    return AnswerSchema(source, document)


def _read(name: str) -> bytes:
    if name != STDIN:
        return read_regular(Path(name).expanduser(), MAX_SCHEMA_BYTES, follow_links=True)
    data = sys.stdin.buffer.read(MAX_SCHEMA_BYTES + 1)
    if len(data) > MAX_SCHEMA_BYTES:
        raise OSError(f"it is larger than {MAX_SCHEMA_BYTES} bytes")
    return data


def _decoded(text: str) -> Any:
    """Decode JSON.

    Raises:
        ValueError: with the line and column of the error.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        reason = f"{error.msg[:1].lower()}{error.msg[1:]}"
        raise ValueError(f"line {error.lineno}, column {error.colno}: {reason}") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _schema_problem(document: dict[str, Any] | bool) -> str | None:
    """Return what is wrong with a schema by the metaschema of its draft, or None."""
    return _draft_problem(_draft_of(document), document)


def _draft_problem(draft: Any, document: dict[str, Any] | bool) -> str | None:
    from jsonschema import FormatChecker, SchemaError

    try:
        # Without formats: Python's regular expressions are not those of JSON schemas.
        draft.check_schema(document, format_checker=FormatChecker(formats=()))
    except SchemaError as error:
        return f"{_place(error.absolute_path)}: {_shown(error.message)}"
    except RecursionError:
        return "it is nested too deeply"
    return None


def _draft_of(document: dict[str, Any] | bool) -> Any:
    """Return jsonschema's validator of the draft that a schema names, or else seems to be of."""
    import jsonschema
    from jsonschema.validators import validator_for

    newest = jsonschema.Draft202012Validator
    named = document.get("$schema") if isinstance(document, dict) else None
    for scheme in ("https", "http"):  # many write one for the other
        if isinstance(named, str):
            address = re.sub("^https?", scheme, named.rstrip("#"))
            if (found := validator_for({"$schema": address}, default=None)) is not None:
                return found
    older = (jsonschema.Draft7Validator, jsonschema.Draft4Validator)
    valid = (each for each in (newest, *older) if _draft_problem(each, document) is None)
    return next(valid, newest)


def _problem(document: dict[str, Any] | bool, value: Any) -> str | None:
    """Return where and how a value does not obey a schema, or None.

    Keywords that jsonschema cannot follow (a pattern that Python does not know, a reference to
    another document) are left to the server.
    """
    from jsonschema.exceptions import best_match
    from jsonschema.validators import extend
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    left_out = False

    def tolerant(check: Any) -> Any:
        def run(*arguments: Any) -> Iterator[Any]:
            nonlocal left_out
            try:
                yield from check(*arguments) or ()
            except (Unresolvable, re.error):
                left_out = True

        return run

    draft = _draft_of(document)
    checks = {name: tolerant(check) for name, check in draft.VALIDATORS.items()}
    try:
        # An empty registry: nothing is fetched.
        validator = extend(draft, checks)(document, registry=Registry())
        errors = list(validator.iter_errors(value))
    except RecursionError:
        return "it is nested too deeply"
    if left_out:
        errors = [each for each in errors if _MAY_BE_INVERTED.isdisjoint(each.absolute_schema_path)]
    error = best_match(errors)
    return None if error is None else f"{_place(error.absolute_path)}: {_shown(error.message)}"


_MAY_BE_INVERTED = frozenset(
    {"not", "oneOf", "if", "then", "else", "contains", "unevaluatedItems", "unevaluatedProperties"}
)
"""Keywords that may fail because a keyword within them was left out and so passes."""


def _place(path: Any) -> str:
    """Return a JSON pointer, or words for the whole document."""
    parts = [str(part).replace("~", "~0").replace("/", "~1") for part in path]
    return f"at /{'/'.join(parts)}" if parts else "at the top"


def _shown(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_LETTERS else f"{text[:_MAX_SHOWN_LETTERS]}..."
