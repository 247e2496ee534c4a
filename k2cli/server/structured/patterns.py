"""Patterns of schemas in the syntax of Rust's regex crate, in which llguidance reads them.

JSON Schema names ECMA 262's syntax, and validators have their language's own. Where a pattern means
less in one of them, as ``\\w`` does in ECMA 262 and ``\\W`` in Python, the pattern that is held is
the one that matches in all. What Rust alone reads in a class of letters, such as ``[[:alpha:]]``,
is written there as the letters that it is elsewhere.

llguidance 1.9 lets a class that has all control characters match an escaped quote and backslash,
too, even if the class excludes these: ``[^"]`` would match ``\\"``. So no class has U+0000 here,
which answers cannot have anyway.
"""

from __future__ import annotations

import re

from k2cli.server.structured.schema_problem import shown

CANNOT_BE_WRITTEN = "a control character that an answer cannot have"

# Answers have no escapes by number (``grammars.text.ESCAPES``), and of those that are left out of a
# text by itself llguidance would make nothing. Within a class of letters they do no harm.
CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_CONTROL_ESCAPE = re.compile(
    r"\\(?:x(?!0[89acdACD])(?:[01][\da-fA-F]|7[fF])|u00(?!0[89acdACD])(?:[01][\da-fA-F]|7[fF])"
    r"|[xu]\{0*(?![89acdACD]\})(?:1?[\da-fA-F]|7[fF])\}|[0av])"
)

_ATOM = re.compile(
    r"\\(?:[pP](?:\{[^}]*\}|[A-Z])|x\{[^}]*\}|u\{[^}]*\}|x[\da-fA-F]{2}|u[\da-fA-F]{4}|U[\da-fA-F]{8}|.)|.",
    re.DOTALL,
)
"""A letter, or an escape of a letter or of a class of letters."""
_QUANTIFIER = re.compile(r"[*+?]|\{\d*,?\d*\}")
_COUNT = re.compile(r"\{\d+(?:,\d*)?\}|\{,\d+\}")
_FLAGS = re.compile(r"\(\?([a-zA-Z-]*)[:)]")

_SPACES = r"\t\n\f\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LEAST = {
    "d": "0-9",
    "w": "0-9A-Za-z_",
    "s": _SPACES,
    "D": r"\P{Nd}",
    "W": r"[^\p{L}\p{N}_]",
    "S": r"[^\s\ufeff\x1c-\x1f]",
}
"""Letters that a class has in ECMA 262 and in Python and Rust, as a part of a class."""
_MOST = {
    "d": r"\p{Nd}",
    "w": r"\p{L}\p{N}_",
    "s": r"\s\ufeff\x1c-\x1f",
    "D": "[^0-9]",
    "W": "[^0-9A-Za-z_]",
    "S": f"[^{_SPACES}]",
}
"""Letters that a class has in any of these."""
_HEX = re.compile(r"[\da-fA-F]{1,8}")
_SPECIAL = frozenset("[]^-&~")


def held_pattern(pattern: str) -> str:
    """Translate a pattern.

    Raises:
        ValueError: with the reason, if the pattern does not mean the same everywhere, or has a
            letter that cannot be in an answer. Others that Rust does not read are left as they are.
    """
    made: list[str] = []
    at = 0
    repeated = False  # a quantifier has just been read
    while at < len(pattern):
        found = _QUANTIFIER.match(pattern, at)
        if found is not None and (found[0][0] != "{" or _COUNT.fullmatch(found[0])):
            if repeated and found[0] != "?":
                raise ValueError(f"{shown(pattern)} repeats a repetition")
            made.append(found[0])
            at, repeated = found.end(), not repeated
            continue
        repeated = False
        if pattern[at] == "[":
            text, at = _read_class(pattern, at)
            made.append(text)
            continue
        if (flags := _FLAGS.match(pattern, at)) is not None and "x" in flags[1]:
            raise ValueError(f"{shown(pattern)} has the flag x, in which letters say nothing")
        atom = _ATOM.match(pattern, at)
        assert atom is not None
        made.append(_outside(atom[0], pattern))
        at = atom.end()
    return "".join(made)


def _outside(atom: str, pattern: str) -> str:
    """Return an atom that is in no class of letters."""
    if CONTROL.search(atom) or _CONTROL_ESCAPE.fullmatch(atom):
        raise ValueError(f"{shown(pattern)} has {CANNOT_BE_WRITTEN}")
    if atom in "{}":
        return f"\\{atom}"
    if atom[0] == "\\" and atom[1:2] in _LEAST:
        return f"[{_LEAST[atom[1]]}]" if atom[1] in "dws" else _without_nul(_LEAST[atom[1]])
    if atom[:2] in ("\\p", "\\P"):
        return _without_nul(atom)
    return atom


def _without_nul(part: str) -> str:
    return rf"[[{part}]&&[^\x00]]"


def _read_class(pattern: str, start: int) -> tuple[str, int]:
    """Read a class of letters, and return it with the place of what follows it."""
    at = start + 1
    negated = pattern.startswith("^", at)
    at += negated
    if pattern.startswith("]", at):
        raise ValueError(
            f"{shown(pattern)} has a class that begins with ], which programs read differently; "
            r"write \]"
        )
    atoms: list[str] = []
    while not pattern.startswith("]", at):
        found = _ATOM.match(pattern, at)
        if found is None:
            raise ValueError(f"{shown(pattern)} has a class without an end")
        atoms.append(found[0])
        at = found.end()
    classes = _MOST if negated else _LEAST
    parts: list[str] = []
    exact = True  # it has no control character
    index = 0
    while index < len(atoms):
        first = atoms[index]
        if atoms[index + 1 : index + 2] == ["-"] and index + 2 < len(atoms):
            last = atoms[index + 2]
            if _is_class(first) or _is_class(last):
                raise ValueError(f"{shown(pattern)} has a range from or to a class of letters")
            parts.append(f"{_letter(first)}-{_letter(last)}")
            exact = exact and not _may_be_control(first)
            index += 3
            continue
        exact = exact and (first[1] in "dws" if _is_class(first) else not _may_be_control(first))
        parts.append(classes.get(first[1], first) if _is_class(first) else _letter(first))
        index += 1
    body = "".join(parts)
    if negated:
        text = rf"[^{body}\x00]"
    elif exact:
        text = f"[{body}]"
    elif len(parts) == 1 and _CONTROL_ESCAPE.fullmatch(parts[0]):
        raise ValueError(f"{shown(pattern)} has {CANNOT_BE_WRITTEN}")
    else:
        text = _without_nul(body)
    return text, at + 1


def _is_class(atom: str) -> bool:
    return atom[0] == "\\" and atom[1:2] in (*_LEAST, "p", "P")


def _may_be_control(atom: str) -> bool:
    """Return True if an atom may stand for a letter below U+0020."""
    if atom[0] != "\\":
        return atom < " "
    digits = atom[2:].strip("{}")
    if digits:
        return int(digits, 16) < ord(" ") if _HEX.fullmatch(digits) else True
    return atom[1:].isalnum()


def _letter(atom: str) -> str:
    """Return a letter as it stands in a class: what Rust alone reads there has a backslash."""
    return f"\\{atom}" if atom in _SPECIAL else atom
