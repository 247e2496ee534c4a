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
_CHOICES = " is not one of "


def usage_error_from(error: Exception) -> UsageError:
    """A parser's usage error in k2's words, with a hint that can be copied."""
    command = str(getattr(getattr(error, "ctx", None), "command_path", None) or "k2")
    parameter = getattr(error, "param", None)
    if isinstance(error, typer.BadParameter) and parameter is not None:
        said = str(error.message)
        name = _name(parameter)
        message = _wrong_value(name, parameter.type, said)
        if message is not None:
            return UsageError(message, f"{command} {_example(name, said)}")
    message = str(error.format_message() if hasattr(error, "format_message") else error)
    return UsageError(f"{message[:1].lower()}{message[1:].removesuffix('.')}", f"{command} --help")


def _name(parameter: Any) -> str:
    """``--repetitions`` of an option; of an argument the name that the usage line has."""
    names = [name for name in parameter.opts if name.startswith("-")]
    return max(names, key=len) if names else str(parameter.human_readable_name).strip("[]{}")


def _wrong_value(name: str, kind: Any, said: str) -> str | None:
    """What is wrong with a value; ``said`` is the parser's sentence, which begins with it."""
    value, not_valid, _ = said.rpartition(" is not a valid ")
    if not_valid:
        words = _KINDS.get(str(kind.name).partition(" ")[0])
        return f"{name} '{_shortened(value[1:-1])}' is not {words}" if words else None
    value, beyond, _ = said.partition(" is not in the range ")
    if beyond and kind.min is not None and float(value) < kind.min:
        return f"{name} {_shortened(value)} is too small: the least is {kind.min:g}"
    if beyond:
        return f"{name} {_shortened(value)} is too large: the most is {kind.max:g}"
    if _CHOICES in said:
        return f"{name} {said.removesuffix('.')}"
    return None


def _shortened(value: str) -> str:
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."


def _example(name: str, said: str) -> str:
    """The option with a value that it takes."""
    if name in EXAMPLES:
        return f"{name} {EXAMPLES[name]}"
    choices = said.partition(_CHOICES)[2].rstrip(".")
    return f"{name} {choices.partition(',')[0].strip(chr(39))}" if choices else "--help"
