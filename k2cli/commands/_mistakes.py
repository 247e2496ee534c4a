"""What is said of a wrong command line: the user's own words, and what to write instead.

The parser's errors have neither. They all pass ``k2cli.cli.main``, which brings them here, so that
one place serves the options of all commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from k2cli.errors import UsageError

EXAMPLES: Mapping[str, str] = {
    "--bits": "4",
    "--chunk": "512",
    "--concurrency": "4",
    "--group-size": "64",
    "--lines": "100",
    "--max-tokens": "256",
    "--port": "8080",
    "--repetitions": "5",
    "--seed": "42",
    "--temperature": "0.7",
    "--wait": "300",
}
"""Values that options of numbers take: tests/test_cli.py walks these options and tries them."""

_KINDS = {"int": "a whole number", "float": "a number"}
_LONGEST = 60


def said_of(error: Exception) -> UsageError:
    """A parser's usage error in k2's words, with a hint that can be copied."""
    command = str(getattr(getattr(error, "ctx", None), "command_path", None) or "k2")
    parameter = getattr(error, "param", None)
    cause: Any = error.__cause__
    if isinstance(error, typer.BadParameter) and parameter is not None and cause is not None:
        details = cause.errors()[0] if hasattr(cause, "errors") else {}
        name = _name(parameter)
        message = _wrong_value(name, details)
        if message is not None:
            return UsageError(message, f"{command} {_example(name, details)}")
    message = str(error.format_message() if hasattr(error, "format_message") else error)
    return UsageError(f"{message[:1].lower()}{message[1:].removesuffix('.')}", f"{command} --help")


def _name(parameter: Any) -> str:
    """``--repetitions`` of an option; of an argument the name that the usage line has."""
    names = [name for name in parameter.opts if name.startswith("-")]
    return max(names, key=len) if names else str(parameter.make_metavar()).strip("[]{}")


def _wrong_value(name: str, details: Mapping[str, Any]) -> str | None:
    kind, bounds = str(details.get("type", "")), details.get("ctx", {})
    value = str(details.get("input"))
    value = value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
    for prefix, words in _KINDS.items():
        if kind.startswith(prefix):
            return f"{name} '{value}' is not {words}"
    if value == "nan":  # neither too small nor too large
        return f"{name} 'nan' is not a number"
    if kind == "greater_than_equal":
        return f"{name} {value} is too small: the least is {bounds['ge']:g}"
    if kind == "less_than_equal":
        return f"{name} {value} is too large: the most is {bounds['le']:g}"
    if kind == "value_error":
        return f"{name} {str(details['msg']).removeprefix('Value error, ').removesuffix('.')}"
    return None


def _example(name: str, details: Mapping[str, Any]) -> str:
    """The option with a value that it takes."""
    bounds = details.get("ctx", {})
    if name in EXAMPLES:
        return f"{name} {EXAMPLES[name]}"
    for bound in ("ge", "le"):
        if bound in bounds:
            return f"{name} {bounds[bound]}"
    choices = str(details.get("msg", "")).partition("is not one of ")[2].rstrip(".")
    return f"{name} {choices.partition(',')[0].strip(chr(39))}" if choices else "--help"
