"""Highlighting of code, line by line, with the state that a line leaves to the next.

pygments reads whole texts. Its lexers that are made of regular expressions are stacks of states,
and here the stack is kept between lines, so that a string of several lines keeps its colour and
each line is read once. What the lexer cannot read has no style: only the colour may be wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from k2cli.ui.chat.inline import Fragment

if TYPE_CHECKING:
    from pygments.lexer import RegexLexer

LONGEST_LINE = 1000
"""Characters of a line that is highlighted; some expressions of pygments are slow on long ones."""

_COMMENT, _STRING = "2", "32"
_STYLES = (
    ("Comment", _COMMENT), ("Keyword", "35"), ("Operator.Word", "35"), ("Name.Builtin", "36"),
    ("Name.Function", "34"), ("Name.Class", "34"), ("Name.Decorator", "36"), ("Name.Tag", "34"),
    ("Name.Attribute", "36"), ("Literal.String", _STRING), ("Literal.Number", "33"),
    ("Generic.Deleted", "31"), ("Generic.Inserted", "32"), ("Generic.Subheading", "36"),
)  # fmt: skip


class CodeStyler:
    """Highlighter of one block of code in a language; plain if the language is not known."""

    def __init__(self, language: str) -> None:
        self._lexer = _lexer(language)
        self._stack = ["root"]
        self._in_comment = False
        self._block_comments = self._lexer is not None and _has_block_comments(self._lexer)

    def line(self, text: str) -> list[Fragment]:
        """Divide a line into fragments."""
        if self._lexer is None or not text.strip() or len(text) > LONGEST_LINE:
            return [(text, "")]
        if self._block_comments:
            return self._line_with_comments(text)
        return self._highlighted(text)

    def _line_with_comments(self, text: str) -> list[Fragment]:
        """Find the comments of C, which the lexers read as a whole and so need their end."""
        fragments: list[Fragment] = []
        if self._in_comment:
            end = text.find("*/")
            if end < 0:
                return [(text, _COMMENT)]
            self._in_comment = False
            fragments.append((text[: end + 2], _COMMENT))
            text = text[end + 2 :]
        styled = self._highlighted(text) if text else []
        begin = _open_comment(text, styled)
        if begin is None:
            return fragments + styled
        self._in_comment = True
        self._stack = ["root"]
        before = self._highlighted(text[:begin]) if text[:begin] else []
        return [*fragments, *before, (text[begin:], _COMMENT)]

    def _highlighted(self, text: str) -> list[Fragment]:
        from pygments.lexer import ExtendedRegexLexer, LexerContext

        context = LexerContext(f"{text}\n", 0, self._stack, len(text) + 1)
        fragments: list[Fragment] = []
        try:
            # The subclass's method works with the lexers of its base class, too.
            lexer: Any = self._lexer
            for _, kind, value in ExtendedRegexLexer.get_tokens_unprocessed(lexer, context=context):
                fragments.append((value, _style(kind)))
        except Exception:  # a lexer with code of its own that needs another context
            self._lexer = None
        self._stack = context.stack[:100] or ["root"]
        if "".join(part for part, _ in fragments) != f"{text}\n":
            return [(text, "")]
        return [(part, style) for each, style in fragments if (part := each.replace("\n", ""))]


def _style(kind: Any) -> str:
    name = str(kind).removeprefix("Token.")
    return next((style for prefix, style in _STYLES if name.startswith(prefix)), "")


def _lexer(language: str) -> RegexLexer | None:
    if not language:
        return None
    # Importing pygments takes time that an answer without code does not need.
    from pygments.lexer import RegexLexer
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        lexer = get_lexer_by_name(language.lower()[:40])
    except (ClassNotFound, ValueError):
        return None
    return lexer if isinstance(lexer, RegexLexer) else None


def _has_block_comments(lexer: RegexLexer) -> bool:
    first = next((kind for kind, value in lexer.get_tokens("/* x */") if value), None)
    return first is not None and _style(first) == _COMMENT


def _open_comment(text: str, styled: list[Fragment]) -> int | None:
    """Return where a comment begins that the line does not end; None if there is none."""
    begin = text.rfind("/*")
    if begin < 0 or "*/" in text[begin + 2 :]:
        return None
    position = 0
    for part, style in styled:
        if position <= begin < position + len(part):
            inside_other = style == _STRING or (style == _COMMENT and position < begin)
            return None if inside_other else begin
        position += len(part)
    return None
