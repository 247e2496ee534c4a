"""Kinds of lines of Markdown, read from their first characters as these arrive."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["blank", "quote", "item", "heading", "hold", "prose"]

_NUMBER = re.compile(r"\d{1,9}[.)]?")
_ITEM_NUMBER = re.compile(r"\d{1,9}[.)]")
_DEEPEST = 40
"""Columns of indentation that are kept."""


@dataclass(frozen=True, slots=True)
class Opening:
    """Beginning of a line.

    Attributes:
        kind: ``hold`` is a line that has to be complete before it can be shown; after ``quote`` and
            ``item`` another beginning follows.
        length: characters that are part of the beginning.
        indent: columns of space before it.
        marker: that of a heading or an item.
    """

    kind: Kind
    length: int = 0
    indent: int = 0
    marker: str = ""


def opening(text: str, *, whole: bool) -> Opening | None:
    """Read the beginning of a line; return None if more text is needed.

    Args:
        text: the line so far, without a line break.
        whole: True if the line is complete.
    """
    rest = text.lstrip(" \t")
    if not rest:
        return Opening("blank", len(text)) if whole else None
    blank = text[: len(text) - len(rest)]
    indent = min(len(blank.expandtabs(4)), _DEEPEST)
    found = _marker(rest, whole=whole)
    if found is None:
        return None
    return Opening(found.kind, len(blank) + found.length, indent, found.marker)


def _marker(rest: str, *, whole: bool) -> Opening | None:
    first = rest[0]
    match first:
        case "`" | "~":
            return _run(rest, first, whole=whole)
        case "#":
            return _heading(rest, whole=whole)
        case ">":
            if len(rest) == 1 and not whole:
                return None
            return Opening("quote", 2 if rest[1:2] == " " else 1)
        case "|":
            return Opening("hold")
        case "-" | "*" | "+" | "_":
            return _dash(rest, first, whole=whole)
    return _number(rest, whole=whole) if first.isascii() and first.isdigit() else Opening("prose")


def _run(rest: str, first: str, *, whole: bool) -> Opening | None:
    """Read what may be the fence of a block of code."""
    run = len(rest) - len(rest.lstrip(first))
    if run >= 3:
        return Opening("hold")
    return None if run == len(rest) and not whole else Opening("prose")


def _heading(rest: str, *, whole: bool) -> Opening | None:
    level = len(rest) - len(rest.lstrip("#"))
    if level == len(rest) and not whole and level <= 6:
        return None
    if level > 6 or rest[level : level + 1] not in (" ", "\t", ""):
        return Opening("prose")
    return Opening("heading", level + 1, marker="#" * level)


def _dash(rest: str, first: str, *, whole: bool) -> Opening | None:
    """Read what may be an item of a list, or a line across the page."""
    marks = rest.replace(" ", "")
    if not marks.strip(first) and len(rest) < _DEEPEST:
        if not whole:
            return None
        if len(marks) >= 3 and first != "+":
            return Opening("hold")
    if first != "_" and rest[1:2] in (" ", "\t", ""):
        return Opening("item", min(2, len(rest)), marker=first)
    return Opening("prose")


def _number(rest: str, *, whole: bool) -> Opening | None:
    if _NUMBER.fullmatch(rest) and not whole:
        return None
    match = _ITEM_NUMBER.match(rest)
    if match is None or rest[match.end() : match.end() + 1] not in (" ", "\t", ""):
        return Opening("prose")
    return Opening("item", match.end() + (match.end() < len(rest)), marker=match.group())
