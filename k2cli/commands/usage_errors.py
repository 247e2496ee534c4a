"""Messages for wrong command lines: they quote the user's value and show a correct one.

The parser's own errors do neither. ``k2cli.cli.main`` passes all of them through here, so that one
place serves the options of all commands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from k2cli.commands.corrected_line import (
    NEEDED_WITH,
    corrected_line,
    has_secret,
    refusal_of,
    what_is_unknown,
)
from k2cli.commands.whole_hint import whole_hint
from k2cli.errors import K2Error, UsageError

EXAMPLES: Mapping[str, str] = {
    "--answer-tokens": "500",
    "--bits": "4",
    "--chunk": "512",
    "--concurrency": "4",
    "--group-size": "64",
    "--interval": "2",
    "--kv-bits": "8",
    "--lines": "100",
    "--max-concurrent": "2",
    "--max-queued": "4",
    "--max-tokens": "256",
    "--most-tokens": "8192",
    "--older-than": "24",
    "--port": "8080",
    "--prompt-tokens": "2000",
    "--repetitions": "5",
    "--seed": "42",
    "--temperature": "0.7",
    "--tokens-per-minute": "60000",
    "--wait": "300",
}
"""Valid values of options that take numbers; tests/test_cli.py tries each of them."""

_KINDS = {"int": "a whole number", "float": "a number"}
_LONGEST = 60
_MOST_ERRORS = 4
"""Errors of one line that its hint corrects."""

_EXTRA = "Got unexpected extra argument"
_CHOICES = " is not one of "


def usage_error_from(
    error: Exception,
    command: str = "k2",
    words: Sequence[str] = (),
    parser: Any = None,
    most_errors: int = _MOST_ERRORS,
) -> UsageError:
    """Convert a usage error of the parser, with a hint that can be copied.

    Args:
        error: an error of the parser.
        command: the command of the line, for errors that do not know theirs.
        words: the line, without ``k2``.
        parser: the parser's command ``k2`` with its subcommands.
        most_errors: how many errors of the line the hint may correct.
    """
    command = str(getattr(getattr(error, "ctx", None), "command_path", None) or command)
    parameter = getattr(error, "param", None)
    if isinstance(error, typer.BadParameter) and parameter is not None:
        text = str(error.message)
        name = _name(parameter)
        message = _wrong_value(name, parameter.type, text)
        if message is not None:
            with_it = [NEEDED_WITH[name]] if name in NEEDED_WITH else []
            example = _example(name, text, parameter)
            whole = _whole_line([*with_it, example], words, parser)
            return UsageError(
                message, whole or " ".join([command, *_arguments(error), *with_it, example])
            )
    message = what_is_unknown(error) or str(
        error.format_message() if hasattr(error, "format_message") else error
    )
    if message.startswith(_EXTRA) and has_secret(words):
        message = _EXTRA
    hint = corrected_line(error, words, parser, EXAMPLES)
    if hint is not None and hint.startswith("k2 "):
        hint = _accepted(hint, command, parser, most_errors)
    return UsageError(
        f"{message[:1].lower()}{message[1:].removesuffix('.')}", hint or f"{command} --help"
    )


def _whole_line(options: Sequence[str], words: Sequence[str], parser: Any) -> str | None:
    """Return the user's line with options in place of the same ones with a wrong value.

    None if the parser would refuse it for something else.
    """
    if parser is None or has_secret(words):
        return None
    line = whole_hint(parser, words, " ".join(options))
    try:
        accepted = line.startswith("k2 ") and refusal_of(line, parser) is None
    except K2Error:  # a value is wrong in a way that the command itself finds
        return None
    return line if accepted else None


def _accepted(line: str, command: str, parser: Any, most_errors: int) -> str | None:
    """Return a command line, or what is said about it if the parser refuses it for another error.

    None if that is not a whole line, or there are too many errors.
    """
    try:
        refused = refusal_of(line, parser)
    except K2Error:  # a value is wrong in a way that the command itself finds
        return None
    if refused is None:
        return line
    error, words = refused
    if most_errors == 1:
        return None
    hint = usage_error_from(error, command, words, parser, most_errors - 1).hint
    return hint if hint is not None and hint.startswith("k2 ") else None


def _arguments(error: typer.BadParameter) -> list[str]:
    """Return the names of the arguments without which the command cannot run.

    The parser reads options before arguments, so that the user's values are not known yet.
    """
    if error.ctx is None or error.param is None or error.param.param_type_name == "argument":
        return []
    parameters = error.ctx.command.params
    return [_name(p) for p in parameters if p.param_type_name == "argument" and p.required]


def _name(parameter: Any) -> str:
    """Return the long name of an option, or the name of an argument in the usage line."""
    names = [name for name in parameter.opts if name.startswith("-")]
    return max(names, key=len) if names else str(parameter.human_readable_name).strip("[]{}")


def _wrong_value(name: str, kind: Any, text: str) -> str | None:
    """Rewrite the parser's sentence about a value, or return None; it begins with the value."""
    value, not_valid, _ = text.rpartition(" is not a valid ")
    if not_valid:
        words = _KINDS.get(str(kind.name).partition(" ")[0])
        return f"{name} '{_shortened(value[1:-1])}' is not {words}" if words else None
    value, beyond, _ = text.partition(" is not in the range ")
    if beyond and kind.min is not None and float(value) < kind.min:
        return f"{name} {_shortened(value)} is too small: the minimum is {kind.min:g}"
    if beyond:
        return f"{name} {_shortened(value)} is too large: the maximum is {kind.max:g}"
    if _CHOICES in text:
        return f"{name} {text.removesuffix('.')}"
    return None


def _shortened(value: str) -> str:
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."


def _example(name: str, text: str, parameter: Any) -> str:
    """Return the option with a valid value: its default if it is one of a few, else the first."""
    if name in EXAMPLES:
        return f"{name} {EXAMPLES[name]}"
    choices = [choice.strip(" .'") for choice in text.partition(_CHOICES)[2].split(",")]
    default = str(getattr(parameter.default, "value", parameter.default))
    value = default if default in choices else choices[0]
    return f"{name} {value}" if value else "--help"
