"""Command lines to copy in place of lines that the parser refuses as a whole.

Such are lines with an argument too many, without an argument, with an option or a command that does
not exist, or with an option that lacks its value. ``usage_errors`` has those with a wrong value.
"""

from __future__ import annotations

import difflib
import inspect
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import typer

_INSTEAD: Mapping[str, str] = {
    "k2 cache clear": "k2 cache clear --model {}",
    "k2 models list": "k2 models show {}",
    "k2 models prune": "k2 models remove {}",
}
"""Commands without arguments, and what is meant with one: without it they would do more."""

NEEDED_WITH: Mapping[str, str] = {"--most-tokens": "--deep"}
"""Options without which others are refused."""

_MAKING = ("create", "import", "init")
"""Commands of groups whose argument is not yet in the list of the group."""

_SYNONYMS = (("list", "ls", "show"), ("clear", "remove", "revoke", "rm", "delete"))
_EXTRA = re.compile(r"Got unexpected extra argument(?:\(s\)|s?) \((.*)\)", re.DOTALL)
_NO_COMMAND = re.compile(r"No such command '(.*?)'\.(?: Did you mean '([^']*)')?", re.DOTALL)
_EXAMPLE = "Example: "
_ALIKE = 0.8
_LONGEST = 300
_SECRETS = ("--api-key",)
_USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]
"""The parser's ``UsageError``, which typer does not export."""

_HELP = frozenset({"-h", "--help"})


def corrected_line(
    error: Any, words: Sequence[str], parser: Any, examples: Mapping[str, str]
) -> str | None:
    """Return a command line to copy, or the part of one; None if none is known.

    It is free of the error, but may have another one: see ``refusal_of``.

    Args:
        error: an error of the parser.
        words: the command line that it refused, without ``k2``.
        parser: the parser's command ``k2`` with its subcommands.
        examples: valid values of options that take numbers.
    """
    if has_secret(words):
        return None
    found = _corrected(error, words, parser, examples)
    return found if found and found.isprintable() and len(found) <= _LONGEST else None


def has_secret(words: Sequence[str]) -> bool:
    """True if a line may have a secret, also after an option whose name is almost that of one."""
    return any(_is_secret(word) for word in words)


def _is_secret(word: str) -> bool:
    if "://" in word and "@" in word:
        return True
    name = word.partition("=")[0].lower().replace("_", "-")
    return name.startswith("-") and bool(difflib.get_close_matches(name, _SECRETS, 1, _ALIKE))


def refusal_of(line: str, parser: Any) -> tuple[Any, list[str]] | None:
    """Return the parser's error about a command line, with its words; None if it is accepted.

    Args:
        line: a whole command line.
        parser: the parser's command ``k2`` with its subcommands.
    """
    name, *words = shlex.split(line)
    rest, command, context = list(words), parser, None
    if not words or words[0].startswith("-") or not _HELP.isdisjoint(words):
        return None  # these would print something
    try:
        while getattr(command, "commands", None) is not None and rest:
            context = command.make_context(name, rest[:1], parent=context)
            name, command, _ = command.resolve_command(context, rest[:1])
            rest = rest[1:]
        if rest or getattr(command, "commands", None) is None:
            command.make_context(name, rest, parent=context)
    except _USAGE_ERROR as error:
        return error, words
    return None


def _corrected(
    error: Any, words: Sequence[str], parser: Any, examples: Mapping[str, str]
) -> str | None:
    context, message = getattr(error, "ctx", None), str(error.message)
    match type(error).__name__:
        case "MissingParameter" if context is not None:
            return _without_argument(context)
        case "NoSuchOption":
            return _like_option(words, str(error.option_name), error.possibilities or ())
        case "BadOptionUsage":
            return _without_value(words, str(error.option_name), message, parser, examples)
    if context is None:
        return None
    if extra := _EXTRA.fullmatch(message):
        return _without_extra(words, extra[1], context)
    if unknown := _NO_COMMAND.match(message):
        return _like_command(words, unknown[1], unknown[2], context.command)
    return None


def _line(words: Sequence[str]) -> str:
    return shlex.join(["k2", *words])


def _without_argument(context: Any) -> str | None:
    """Return where the names are listed, else the example of the command's help."""
    path, group = str(context.command_path), getattr(context.parent, "command", None)
    if "list" in getattr(group, "commands", {}) and path.rpartition(" ")[2] not in _MAKING:
        return f"{path.rpartition(' ')[0]} list"
    lines = (inspect.getdoc(context.command.callback) or "").splitlines()
    return next((line[len(_EXAMPLE) :] for line in lines if line.startswith(_EXAMPLE)), None)


def _without_extra(words: Sequence[str], extra: str, context: Any) -> str | None:
    """Return the line without the arguments that are too many."""
    rest, left = list(words), extra
    values = _values(words, context.command)
    for index in reversed(range(len(rest))):
        if index in values:
            continue
        if left == rest[index] or left.endswith(f" {rest[index]}"):
            left = left.removesuffix(rest[index]).removesuffix(" ")
            first = rest.pop(index)
            if not left:
                instead = _INSTEAD.get(str(context.command_path))
                return _line(rest) if instead is None else instead.format(shlex.quote(first))
    return None


def _values(words: Sequence[str], command: Any) -> set[int]:
    """Return the places of the words that are values of options."""
    taking = {
        name
        for parameter in command.params
        if not getattr(parameter, "is_flag", False)
        for name in parameter.opts
        if name.startswith("-")
    }
    found: set[int] = set()
    for index, word in enumerate(words):
        if index in found:
            continue
        if word == "--":
            break
        if word in taking:
            found.add(index + 1)
    return found


def _like_option(words: Sequence[str], name: str, possible: Sequence[str]) -> str | None:
    """Return the line with the option that is almost the same in place of an unknown one."""
    like = difflib.get_close_matches(name, possible, 1, _ALIKE)
    if not like:
        return None
    places = [index for index, word in enumerate(words) if word.partition("=")[0] == name]
    if not places:
        return None
    index = places[0]
    return _line([*words[:index], like[0] + words[index][len(name) :], *words[index + 1 :]])


def _like_command(words: Sequence[str], name: str, suggested: str | None, group: Any) -> str | None:
    """Return the line with a command of the same meaning or almost the same name."""
    same = [other for names in _SYNONYMS if name in names for other in names]
    alike = difflib.get_close_matches(name, [suggested] if suggested else [], 1, _ALIKE)
    command = next((other for other in [*same, *alike] if other in group.commands), None)
    if command is None or name not in words:
        return None
    index = list(words).index(name)
    before, after = [*words[:index], command], words[index + 1 :]
    takes = any(each.param_type_name == "argument" for each in group.commands[command].params)
    if takes or not after or after[0].startswith("-"):
        return _line([*before, *after])
    return _INSTEAD.get(_line(before), _line(before)).format(shlex.quote(after[0]))


def _without_value(
    words: Sequence[str], name: str, message: str, parser: Any, examples: Mapping[str, str]
) -> str | None:
    """Return the line with a value, or without the value of a flag; or the kind of the value."""
    if "does not take a value" in message:
        return _line([name if word.startswith(f"{name}=") else word for word in words])
    command = parser
    for word in words[:2]:
        command = getattr(command, "commands", {}).get(word, command)
    parameter = next((each for each in command.params if name in each.opts), None)
    value = examples.get(name) or _choice(parameter)
    if value is not None:
        needed = [NEEDED_WITH[name]] if name in NEEDED_WITH else []
        return _line([*words, value, *(each for each in needed if each not in words)])
    kind = getattr(parameter, "metavar", None)
    return f"{name} {kind}" if kind is not None and kind.isupper() else None


def _choice(parameter: Any) -> str | None:
    """Return the value that an option of a few values has by default, else the first of them."""
    choices = [str(each) for each in getattr(getattr(parameter, "type", None), "choices", ())]
    default = getattr(parameter, "default", None)
    default = str(getattr(default, "value", default))
    return default if default in choices else next(iter(choices), None)
