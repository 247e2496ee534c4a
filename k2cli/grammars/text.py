"""The text of a grammar in llguidance's form: Lark rules, JSON schemas and the tokens of markers.

Only text is made here; ``check`` compiles it, and ``mask_process`` computes masks with it. The
form is described in the documentation of llguidance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

WHITESPACE = r"[ \n\r\t]{0,64}"
"""Whitespace between the parts of a JSON text: bounded, since models may repeat it without end."""


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
        self._others: list[dict[str, Any]] = []

    def rule(self, body: str) -> str:
        """Add a rule and return its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def terminal(self, pattern: str) -> str:
        """Add a terminal that matches a regular expression, and return its name.

        Args:
            pattern: in the syntax of Rust's regex crate, without slashes around it; ``.`` does not
                match a newline.
        """
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {regex(pattern)}")
        return name

    def text_until(self, end: str) -> str:
        """Return an expression for any text up to an end, which it includes.

        Args:
            end: the first occurrence ends the text. It must not be empty.
        """
        found = self._tokens.search(end) if self._tokens else None
        if found is not None and found.start() == 0:
            return f"{self.any_text()} {self.literal(end)}"
        first = end if found is None else end[: found.start()]
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}[suffix={_quoted(first)}]: {regex('(?s:.*)')}")
        return name if found is None else f"{name} {self.literal(end[found.start() :])}"

    def any_text(self) -> str:
        """Return an expression for any text without tokens of their own, the empty one included."""
        return self.terminal("(?s:.*)")

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
        options = {"whitespace_pattern": WHITESPACE, "lenient": lenient}
        return self._other({"json_schema": {**schema, "x-guidance": options}})

    def lark(self, text: str) -> str:
        """Add a grammar of its own, whose first rule is ``start``, and return its expression."""
        return self._other({"lark_grammar": text})

    def _other(self, grammar: dict[str, Any]) -> str:
        name = f"g{len(self._others)}"
        self._others.append({"name": name, **grammar})
        return f"@{name}"

    def build(self, start: str) -> str:
        """Return the whole grammar, which matches the expression ``start``."""
        lark = "\n".join((f"start: {start}", *self._rules)) + "\n"
        return json.dumps({"grammars": [{"name": "main", "lark_grammar": lark}, *self._others]})


def choice(*expressions: str) -> str:
    """Return an expression for one of these."""
    return f"({' | '.join(expressions)})" if len(expressions) > 1 else expressions[0]


def optional(expression: str) -> str:
    """Return an expression that may be left out."""
    return f"({expression})?"


def regex(pattern: str) -> str:
    """Return a terminal's body that matches a regular expression of Rust's regex crate."""
    return f"/{_SLASH.sub(_escaped_slash, pattern)}/"


_SLASH = re.compile(r"\\.|/|\n", re.DOTALL)


def _escaped_slash(found: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n"}.get(found[0], found[0])


def _quoted(text: str) -> str:
    """Return a text as a string of Lark, which has JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)
