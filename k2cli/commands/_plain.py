"""Reads plain command lines without typer's parser, whose types are pydantic's.

Building that parser, for all commands, takes 0.15 s of a core, while a launch waits for it. A line
is plain if every word of it is a known option in full, a value that is right beyond doubt, or an
argument. Of any other line (help, an abbreviation, a mistake) nothing is said here: typer reads it,
so that there is one place that explains mistakes.
"""

from __future__ import annotations

import inspect
import os
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any

from k2cli.errors import K2Error

_WHOLE_NUMBER = re.compile(r"[0-9]{1,18}")
_NUMBER = re.compile(r"[0-9]{1,15}(\.[0-9]{1,15})?")
_UNUSUAL = ("callback", "is_eager", "default_factory", "count", "prompt", "hide_input", "clamp",
            "exists", "resolve_path", "allow_dash", "shell_complete")  # fmt: skip
"""What an option may have in typer that is not understood here."""


class _NotPlain(Exception):
    """Typer must read it."""


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One parameter of a command: its name, what typer knows of it, its type without None."""

    name: str
    info: Any
    kind: Any
    default: Any

    @property
    def is_argument(self) -> bool:
        return type(self.info).__name__ == "ArgumentInfo"

    @property
    def words(self) -> tuple[str, ...]:
        """The option's names; in ``Annotated`` typer takes the first of them for the default."""
        first = (self.info.default,) if isinstance(self.info.default, str) else ()
        declared = (*first, *(self.info.param_decls or ()))
        return declared or (f"--{self.name.replace('_', '-')}",)


def plain_arguments(command: Callable[..., object], words: Sequence[str]) -> dict[str, Any] | None:
    """The arguments with which typer would call a command; None if the line is not plain.

    Args:
        command: a function as typer takes it, every parameter ``Annotated``.
        words: of the command line, after the command's name.
    """
    try:
        return _arguments(_parameters(command), list(words))
    except (_NotPlain, K2Error):
        return None


def _parameters(command: Callable[..., object]) -> list[_Parameter]:
    hints = typing.get_type_hints(command, include_extras=True)
    found = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind, *notes = typing.get_args(hints[name])
        info = next((note for note in notes if hasattr(note, "param_decls")), None)
        if info is None or any(getattr(info, field, None) for field in _UNUSUAL):
            raise _NotPlain
        given = [each for each in typing.get_args(kind) if each is not NoneType]
        plain_kind = given[0] if len(given) == 1 and NoneType in typing.get_args(kind) else kind
        found.append(_Parameter(name, info, plain_kind, parameter.default))
    return found


def _arguments(parameters: Sequence[_Parameter], words: list[str]) -> dict[str, Any]:
    options = {word: each for each in parameters if not each.is_argument for word in each.words}
    positional = [each for each in parameters if each.is_argument]
    found: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            option, value = (positional.pop(0) if positional else None), word
        else:
            option = options.get(name)
            if option is not None and option.kind is not bool and not equals:
                value = words.pop(0) if words else "-"
        if option is None or option.name in found or (option.kind is bool and equals):
            raise _NotPlain
        found[option.name] = True if option.kind is bool else _value(option, value)
    for each in parameters:
        if each.name not in found:
            found[each.name] = _default(each)
    return found


def _default(parameter: _Parameter) -> Any:
    variable = parameter.info.envvar
    if parameter.default is inspect.Parameter.empty or (variable and variable in os.environ):
        raise _NotPlain
    return parameter.default


def _value(parameter: _Parameter, word: str) -> Any:
    """What a word means to a parameter, if there is no doubt."""
    info, kind = parameter.info, parameter.kind
    if not word or word.startswith("-"):
        raise _NotPlain
    if info.parser is not None:
        return info.parser(word)
    if kind is str:
        return word
    if kind is Path:
        return Path(word)
    if isinstance(kind, type) and issubclass(kind, Enum):
        if word in {member.value for member in kind}:
            return kind(word)
        raise _NotPlain
    if (kind is int and _WHOLE_NUMBER.fullmatch(word)) or (
        kind is float and _NUMBER.fullmatch(word)
    ):
        return _within(kind(word), info.min, info.max)
    raise _NotPlain


def _within(number: float, least: float | None, most: float | None) -> float:
    if (least is not None and number < least) or (most is not None and number > most):
        raise _NotPlain
    return number
