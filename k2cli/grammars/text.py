"""The text of a grammar in llguidance's form: Lark rules, JSON schemas and the tokens of markers.

Only text is made here; ``check`` compiles it, and ``mask_process`` computes masks with it. The
form is described in the documentation of llguidance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

WHITESPACE = r"[ \n\r\t]{0,64}"
"""Whitespace between the parts of a JSON text: bounded, since models may repeat it without end."""

ESCAPES = 'nrbtf\\"'
"""Letters after a backslash in JSON strings: without ``u``, by which a name that a schema declares
could be spelled so that its own schema does not count."""


ANY_TEXT = "(?s:.*)"
"""The pattern of any text, newlines included."""


class GrammarText:
    """A grammar that is put together rule by rule.

    Args:
        token_ids: ids of the markers that are tokens of their own, by their texts. llguidance
            matches such a token by its id alone, never by its letters, and no other text
            contains it.
    """

    def __init__(self, token_ids: Mapping[str, int]) -> None:
        self._token_ids = token_ids
        texts = sorted(filter(None, token_ids), key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._rules: list[str] = []
        self._names: dict[str, str] = {}
        self._others: dict[str, dict[str, Any]] = {}

    def is_token(self, text: str) -> bool:
        """Return True if a marker is a token of its own."""
        return text in self._token_ids

    def has_token(self, text: str) -> bool:
        """Return True if a text has a marker that is a token of its own."""
        return self._tokens is not None and self._tokens.search(text) is not None

    def spelled(self, markers: Iterable[str]) -> tuple[str, ...]:
        """Return the markers without tokens, which may stand in a text that is not to have them."""
        return tuple(marker for marker in markers if not self.has_token(marker))

    def rule(self, body: str) -> str:
        """Add a rule and return its name."""
        return self._named("r", body)

    def recursive_rule(self, make: Callable[[str], str]) -> str:
        """Add a rule whose body may have its own name in it, and return its name.

        Args:
            make: makes the body, given the name.
        """
        name = f"r{len(self._rules)}"
        place = len(self._rules)
        self._rules.append("")
        self._rules[place] = f"{name}: {make(name)}"
        return name

    def terminal(self, pattern: str) -> str:
        """Add a terminal that matches a regular expression, and return its name.

        Args:
            pattern: in the syntax of Rust's regex crate, without slashes around it; ``.`` does not
                match a newline.
        """
        return self._named("T", regex(pattern))

    def text(self, *patterns: str, without: Sequence[str] = (), around: str = "") -> str:
        """Add a terminal for texts without tokens of their own, and return its name.

        Args:
            patterns: each must match the whole text; none for any text.
            around: matches what may stand before and after such a text.
            without: letters that it does not contain.
        """
        kept = [regex(pattern) for pattern in patterns or (ANY_TEXT,)]
        if without:
            several = "|".join(map(escaped, sorted(set(without))))
            # A negation alone would match bytes that are no UTF-8.
            kept += [] if ANY_TEXT in patterns or not patterns else [regex(ANY_TEXT)]
            kept.append(f"~{regex(f'{ANY_TEXT}({several}){ANY_TEXT}')}")
        text = self._named("T", " & ".join(kept))
        return self._named("T", f"{regex(around)} {text} {regex(around)}") if around else text

    def text_until(
        self, end: str, *patterns: str, without: Sequence[str] = (), around: str = ""
    ) -> str:
        """Return an expression for a text and what ends it.

        Args:
            end: the first occurrence after a text that is allowed ends it. It must not be empty.
            patterns, without, around: see ``text``.
        """
        found = self._tokens.search(end) if self._tokens else None
        text = self.text(*patterns, without=without, around=around)
        if found is None:
            return self._named("r", text, f"[suffix={_quoted(end)}]")
        if found.start():
            # The letters before a token may stand in the text, too, which ends at the token alone.
            text = self._named("T", f"{text} {_quoted(end[: found.start()])}")
        return f"{text} {self.literal(end[found.start() :])}"

    def _named(self, letter: str, body: str, options: str = "") -> str:
        """Add a rule or terminal unless it is there already. Return its name."""
        key = f"{letter}{options}: {body}"
        if key not in self._names:
            self._names[key] = f"{letter}{len(self._rules)}"
            self._rules.append(f"{self._names[key]}{options}: {body}")
        return self._names[key]

    def letters(self, text: str) -> str:
        """Return an expression for exactly this text, in which markers are letters."""
        return _quoted(text)

    def literal(self, text: str) -> str:
        """Return an expression for exactly this text; markers in it must be their tokens."""
        parts: list[str] = []
        at = 0
        for found in self._tokens.finditer(text) if self._tokens else ():
            if found.start() > at:
                parts.append(_quoted(text[at : found.start()]))
            parts.append(f"<[{self._token_ids[found[0]]}]>")
            at = found.end()
        if at < len(text) or not parts:
            parts.append(_quoted(text[at:]))
        return " ".join(parts)

    def json(self, schema: Mapping[str, Any] | bool, *, lenient: bool = False) -> str:
        """Add a JSON schema and return an expression for JSON texts that obey it.

        Args:
            schema: whose own ``x-guidance`` is replaced.
            lenient: True to ignore keywords that llguidance does not know.
        """
        if schema is True:
            schema = {}
        if schema is False:
            schema = {"not": {}}
        options = {
            "whitespace_pattern": WHITESPACE,
            "json_allowed_escapes": ESCAPES,
            "lenient": lenient,
        }
        return self._other({"json_schema": {**schema, "x-guidance": options}})

    def lark(self, text: str) -> str:
        """Add a grammar of its own, whose first rule is ``start``, and return its expression."""
        return self._other({"lark_grammar": text})

    def _other(self, grammar: dict[str, Any]) -> str:
        key = json.dumps(grammar)
        if key not in self._others:
            self._others[key] = {"name": f"g{len(self._others)}", **grammar}
        return f"@{self._others[key]['name']}"

    def build(self, start: str) -> str:
        """Return the whole grammar, which matches the expression ``start``."""
        lark = "\n".join((f"start: {start}", *self._rules)) + "\n"
        main = {"name": "main", "lark_grammar": lark}
        return json.dumps({"grammars": [main, *self._others.values()]})


def choice(*expressions: str) -> str:
    """Return an expression for one of these."""
    return f"({' | '.join(expressions)})" if len(expressions) > 1 else expressions[0]


def optional(expression: str) -> str:
    """Return an expression that may be left out."""
    return f"({expression})?"


def regex(pattern: str) -> str:
    """Return a terminal's body that matches a regular expression of Rust's regex crate."""
    return f"/{_SLASH.sub(_escaped_slash, pattern)}/"


def escaped(text: str) -> str:
    """Return a regular expression that matches exactly this text."""
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", text).replace("\n", r"\n")


_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")
_SLASH = re.compile(r"\\.|/|\n", re.DOTALL)


def _escaped_slash(found: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n"}.get(found[0], found[0])


def _quoted(text: str) -> str:
    """Return a text as a string of Lark, which has JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)
