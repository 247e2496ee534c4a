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

_SYNONYMS = (
    ("list", "ls", "show"),
    ("clear", "remove", "revoke", "rm", "delete"),
    ("launch", "run", "serve", "start", "load", "up"),
    ("stop", "kill", "down", "unload"),
    ("ps", "status", "list", "ls", "runs"),
    ("download", "pull", "get", "fetch"),
    ("plan-memory", "estimate", "memory"),
)
"""Words of one meaning, those of other programs for the same too."""

_OPTIONS_INSTEAD: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("k2 bench", "--json"): ("-o", "json"),
    ("k2 plan-memory", "--nodes"): ("--hardware", "{}x this"),
}
"""Options of other commands, and what does the same here; ``{}`` is how many values they have."""

_EXTRA = re.compile(r"Got unexpected extra argument(?:\(s\)|s?) \((.*)\)", re.DOTALL)
_NO_COMMAND = re.compile(r"No such command '(.*?)'\.(?: Did you mean '([^']*)')?", re.DOTALL)
_EXAMPLE = "Example: "
_ALIKE = 0.8
_SIMILAR = 0.6
_LEAST_ABBREVIATION = 3
_ABBREVIATED = 0.4
"""Least share of a name's letters in its abbreviation: ``--ctx`` of ``--context``."""

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
            return _like_option(words, str(error.option_name), context)
        case "BadOptionUsage":
            return _without_value(words, str(error.option_name), message, parser, examples)
    if context is None:
        return None
    if extra := _EXTRA.fullmatch(message):
        return _without_extra(words, extra[1], context)
    if unknown := _NO_COMMAND.match(message):
        return _like_command(words, unknown[1], context.command)
    return None


def what_is_unknown(error: Any) -> str | None:
    """Return the sentence about an option or a command that does not exist; None for other errors.

    The parser's own compares letters alone: it offers ``--help`` for ``--model``, and ``launch``
    for ``plan``.
    """
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoSuchOption":
        name = str(error.option_name)
        similar = _similar_options(name, context)
        possible = f" (Possible options: {', '.join(similar)})" if similar else ""
        return f"no such option: {name}{possible}"
    unknown = _NO_COMMAND.match(str(getattr(error, "message", "")))
    if unknown is None or context is None:
        return None
    like = _command_like(unknown[1], context.command)
    return f"no such command '{unknown[1]}'" + (f". Did you mean '{like}'?" if like else "")


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
    """Return the line without the arguments that are too many, or with them where they belong.

    After a value of an option that takes a list with commas, they are more of its values:
    ``--nodes a b``.
    """
    left = extra
    places: list[int] = []
    values = _values(words, context.command)
    for index in reversed(range(len(words))):
        if index in values:
            continue
        if left == words[index] or left.endswith(f" {words[index]}"):
            left = left.removesuffix(words[index]).removesuffix(" ")
            places.append(index)
            if not left:
                break
    if left or not places:
        return None
    if joined := _joined_values(words, values, len(places), context.command):
        return _line(joined)
    rest = [word for index, word in enumerate(words) if index not in places]
    instead = _INSTEAD.get(str(context.command_path))
    return _line(rest) if instead is None else instead.format(shlex.quote(words[places[-1]]))


def _joined_values(
    words: Sequence[str], values: set[int], count: int, command: Any
) -> list[str] | None:
    """Return the line with ``count`` arguments as further values of the list before them."""
    lists = {
        name
        for parameter in command.params
        if "," in (getattr(parameter, "metavar", None) or "")
        for name in parameter.opts
    }
    for index in sorted(values):
        if words[index - 1] not in lists:
            continue
        more = words[index + 1 : index + 1 + count]
        if len(more) == count and not any(word.startswith("-") for word in more):
            value = ",".join(word.strip(",") for word in [words[index], *more])
            return [*words[:index], value, *words[index + 1 + count :]]
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


def _like_option(words: Sequence[str], name: str, context: Any) -> str | None:
    """Return the line with what is meant by an unknown option in its place."""
    places = [index for index, word in enumerate(words) if word.partition("=")[0] == name]
    if not places or context is None:
        return None
    index = places[0]
    before, after = words[:index], words[index + 1 :]
    value = words[index][len(name) :]
    if instead := _OPTIONS_INSTEAD.get((str(context.command_path), name)):
        if instead[-1].count("{}"):
            value, after = (value[1:], after) if value else ("".join(after[:1]), after[1:])
            instead = (*instead[:-1], instead[-1].format(value.count(",") + 1))
        return _line([*before, *instead, *after])
    for parameter in context.command.params:
        if parameter.param_type_name == "argument" and f"--{parameter.name}" == name:
            return _line([*before, *([value[1:]] if value else []), *after])
    like = _option_like(name, context)
    return _line([*before, like + value, *after]) if like else None


def _long_options(context: Any) -> list[str]:
    return [
        name
        for parameter in context.command.params
        for name in parameter.opts
        if name.startswith("--")
    ]


def _option_like(name: str, context: Any) -> str | None:
    """Return the option that is almost the same, or the only one that is shorter or longer."""
    known = _long_options(context)
    like = difflib.get_close_matches(name, known, 1, _ALIKE)
    if like:
        return like[0]
    short = [option for option in known if _is_abbreviation(name, option)]
    return short[0] if len(short) == 1 else None


def _similar_options(name: str, context: Any) -> list[str]:
    """Return the one option that is meant, else those that are like it."""
    if context is None:
        return []
    if like := _option_like(name, context):
        return [like]
    known = {option.lstrip("-"): option for option in _long_options(context)}
    found = difflib.get_close_matches(name.lstrip("-"), known, 3, _SIMILAR)
    return sorted(known[each] for each in found)


def _is_abbreviation(one: str, other: str) -> bool:
    """True if the letters of the shorter name are in the longer one, in their order."""
    short, long = sorted((one.lstrip("-"), other.lstrip("-")), key=len)
    least = max(_LEAST_ABBREVIATION, _ABBREVIATED * len(long))
    if len(short) < least or short[0] != long[0]:
        return False
    letters = iter(long)
    return all(letter in letters for letter in short)


def _like_command(words: Sequence[str], name: str, group: Any) -> str | None:
    """Return the line with a command of the same meaning or almost the same name."""
    command = _command_like(name, group)
    if command is None or name not in words:
        return None
    index = list(words).index(name)
    before, after = [*words[:index], command], words[index + 1 :]
    takes = any(each.param_type_name == "argument" for each in group.commands[command].params)
    if takes or not after or after[0].startswith("-"):
        return _line([*before, *after])
    return _INSTEAD.get(_line(before), _line(before)).format(shlex.quote(after[0]))


def _command_like(name: str, group: Any) -> str | None:
    """Return the command of a group that is almost the same, begins so, or means the same."""
    known: list[str] = list(group.commands)
    if like := difflib.get_close_matches(name, known, 1, _ALIKE):
        return like[0]
    same = [other for names in _SYNONYMS if name in names for other in names]
    if meant := next((other for other in same if other in known), None):
        return meant
    begun = [other for other in known if other.startswith(name)]
    return begun[0] if len(begun) == 1 and len(name) >= _LEAST_ABBREVIATION else None


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
