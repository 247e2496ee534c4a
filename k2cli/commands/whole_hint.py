"""Hints that name options, shown as the whole command line with these options.

An error is raised where only an option is known: ``--backend ring``. Whoever reads it wants to copy
a command: ``k2 launch demo --nodes a,b --backend ring``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

_ALTERNATIVES = re.compile(r"((?:,|;) or )")
_BEFORE = re.compile(r"(?:(?:use|add) |(?:[^-:]*: )?)(?=--\w)")
_OPTION = r"--[a-z][a-z-]*"
_LEAVE = re.compile(rf"leave (?:out )?({_OPTION}(?:(?:, | and ){_OPTION})*)(?: out)?")
_PLACEHOLDERS = {"--cluster NAME": "the names: k2 cluster list"}
_SECRETS = ("--api-key",)
_LONGEST = 300


def whole_hint(command: Any, words: Sequence[str], hint: str) -> str:
    """Return a hint with whole command lines in place of options.

    Args:
        command: the parser's command ``k2`` with its subcommands.
        words: the command line that failed, without ``k2``.
        hint: the hint of its error; what names no options of the command stays as it is.
    """
    known, short = _options(command, words)
    if any(word.partition("=")[0] in _SECRETS for word in words):
        return hint
    if left := _LEAVE.fullmatch(hint):
        rest = _without(words, re.findall(_OPTION, left[1]), known, short)
        return shlex.join(["k2", *rest]) if rest is not None and rest != list(words) else hint
    parts = _ALTERNATIVES.split(hint)
    # Every second part is the word between two alternatives.
    whole = "".join(
        part if index % 2 else _with_options(words, part, known, short)
        for index, part in enumerate(parts)
    )
    if whole == hint:
        return hint
    more = [text for option, text in _PLACEHOLDERS.items() if option in whole]
    return "; ".join([whole, *more]) if len(whole) <= _LONGEST and whole.isprintable() else hint


def _options(command: Any, words: Sequence[str]) -> tuple[dict[str, bool], dict[str, str]]:
    """Return the long options of the command that a line begins with: True if it has a value.

    Also the short ones, with the long name of each.
    """
    for word in words[:2]:
        command = getattr(command, "commands", {}).get(word, command)
    long: dict[str, bool] = {}
    short: dict[str, str] = {}
    for parameter in command.params:
        names = [name for name in parameter.opts if name.startswith("--")]
        long |= dict.fromkeys(names, not getattr(parameter, "is_flag", False))
        if names:
            short |= {name: names[0] for name in parameter.opts if name not in names}
    return long, short


def _with_options(
    words: Sequence[str], part: str, known: Mapping[str, bool], short: Mapping[str, str]
) -> str:
    before = _BEFORE.match(part)
    if before is None:
        return part
    try:
        added = shlex.split(part[before.end() :])
    except ValueError:
        return part
    names = _names(added, known)
    rest = _without(words, names, known, short) if names else None
    if rest is None:
        return part
    prefix = "" if before[0] in ("use ", "add ") else before[0]
    return prefix + shlex.join(["k2", *rest, *added])


def _names(added: Sequence[str], known: Mapping[str, bool]) -> list[str]:
    """Return the names of options in words that are nothing but options; else nothing."""
    names: list[str] = []
    expects_value = False
    for word in added:
        name = word.partition("=")[0]
        if expects_value:
            expects_value = False
        elif name in known:
            names.append(name)
            expects_value = known[name] and "=" not in word
        else:
            return []
    return [] if expects_value else names


def _without(
    words: Sequence[str],
    names: Sequence[str],
    known: Mapping[str, bool],
    short: Mapping[str, str],
) -> list[str] | None:
    """Return a command line without some options; None if it has something after ``--``."""
    rest: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word == "--":
            return None
        elif short.get(word, word.partition("=")[0]) in names:
            skip = known.get(short.get(word, word), False)
        else:
            rest.append(word)
    return rest
