"""The renderer of answers: nothing is lost, pieces do not matter, and time is linear."""

from __future__ import annotations

import re
import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2cli.ui.chat.code import CodeStyler
from k2cli.ui.chat.markdown import MarkdownRenderer
from k2cli.ui.chat.width import cut, text_width
from k2cli.ui.chat.wrap import wrap

STYLES = re.compile(r"\x1b\[[0-9;]*m")
PARTS = st.sampled_from([
    "\n", "\n\n", " ", "  ", "*", "**", "***", "_", "`", "``", "```", "~~", "~~~", "#", "## ", "> ",
    "- ", "1. ", "12", "|", "|a|b|\n", "|-|:-:|\n", "|1|2|\n", "---", "word", "中文", "，", "“",
    "❤", "\ufe0f", "👩", "\u200d", "💻", "🏽", "é", "e\u0301", "\\", "\t", "(", ")",
    "a-long-word-that-no-narrow-terminal-holds", "python\n", "/*", "*/", '"""', "x = 1\n",
    "0123456789" * 13,
])  # fmt: skip
TEXTS = st.lists(PARTS, max_size=40).map("".join)


def rendered(pieces: list[str], columns: int = 80, *, styled: bool = True) -> str:
    renderer = MarkdownRenderer(lambda: columns, styled=styled)
    return "".join(map(renderer.push, pieces)) + renderer.finish()


def plain(text: str, columns: int = 80) -> str:
    return STYLES.sub("", rendered([text], columns))


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.lists(st.integers(1, 9), min_size=1), st.sampled_from([12, 40, 80]), st.booleans())
def test_pieces_do_not_matter(text: str, sizes: list[int], columns: int, styled: bool) -> None:
    whole = rendered([text], columns, styled=styled)
    pieces, start = [], 0
    while start < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[start : start + size])
        start += size
    assert rendered(pieces, columns, styled=styled) == whole
    assert rendered(list(text), columns, styled=styled) == whole


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from([12, 40, 80]))
def test_without_styles_no_character_is_lost(text: str, columns: int) -> None:
    text = re.sub("[|-]", "", text)  # a table is laid out anew
    shown = rendered([text], columns, styled=False)
    assert "\x1b" not in shown
    assert re.sub(r"\s", "", shown).replace(">", "") == re.sub(r"\s", "", text).replace(">", "")


@given(st.lists(st.sampled_from(["word", "中文，不", "❤\ufe0f", "👩‍💻", "e\u0301", "x" * 10])))
def test_no_line_is_too_long(words: list[str]) -> None:
    for columns in (10, 40):
        text = " ".join(words)
        lines = plain(text, columns).splitlines()
        assert all(text_width(line) <= columns for line in lines)
        text = "".join(words)
        assert all(text_width(line) <= columns for line in wrap(text, columns))
        assert text_width(cut(text, columns)) <= columns


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("a **b** c", "a \x1b[1mb\x1b[0m c"),
        ("`x**y**`", "\x1b[36mx**y**\x1b[0m"),
        ("*a **b***", "\x1b[3ma\x1b[0m \x1b[3;1mb\x1b[0m"),
        ("这是**重要**的", "这是\x1b[1m重要\x1b[0m的"),
        ("# T\nx", "\x1b[1;4mT\x1b[0m\nx"),
        ("- a\n  - b", "• a\n  • b"),
        ("> a", "\x1b[2m│ \x1b[0ma"),
        # What is no span keeps its markers.
        ("2 * 3 * 4 and 2**3", "2 * 3 * 4 and 2**3"),
        ("snake_case_name", "snake_case_name"),
        ("**a\nb**", "**a\nb**"),
        ("*args and **kwargs", "*args and **kwargs"),
        ("`open", "`open"),
        (r"\*no\*", "*no*"),
        ("#hashtag", "#hashtag"),
        ("2026 was", "2026 was"),
        ("| no table", "| no table"),
        (f"**{'a ' * 100}b**", None),
        ("```\n**x**\n```\ny", "\x1b[2m```\x1b[0m\n**x**\n\x1b[2m```\x1b[0m\ny"),
        ("~~~\n```\n~~~\ny", "\x1b[2m~~~\x1b[0m\n```\n\x1b[2m~~~\x1b[0m\ny"),
        ("\n\n\n\n\nx\n\n\n\n", "x"),
    ],
)
def test_styles(text: str, expected: str | None) -> None:
    shown = rendered(list(text), 1000)
    assert shown == (text if expected is None else expected) + "\n"


TABLE = """| Name | Value |
|:--|--:|
| first | **1** |
| a \\| b | 22 | too many |
| short |
"""


def test_a_table_is_shown_when_it_is_complete() -> None:
    renderer = MarkdownRenderer(lambda: 80, styled=True)
    assert renderer.push(TABLE) == ""
    assert renderer.waiting_for == "table, 3 rows"
    shown = STYLES.sub("", renderer.push("end\n"))
    assert renderer.waiting_for == ""
    assert shown == (
        "Name  │         Value\n"
        "──────┼──────────────\n"
        "first │             1\n"
        "a | b │ 22 | too many\n"
        "short │ \nend\n"
    )


def test_a_table_fits_or_becomes_a_list() -> None:
    row = "| " + " | ".join(f"column {number} with words" for number in range(4)) + " |\n"
    table = row + "|-|-|-|-|\n" + row + "after"
    for columns in (200, 80, 40):
        lines = plain(table, columns).splitlines()
        assert max(map(text_width, lines)) <= columns
        assert "┼" in plain(table, columns)
    narrow = plain(table, 20).splitlines()
    assert narrow[0] == "column 0 with words:"
    assert max(map(text_width, narrow)) <= 20


def test_a_table_that_does_not_end_is_shown_in_parts() -> None:
    renderer = MarkdownRenderer(lambda: 80, styled=True)
    rows = [f"|{number}|x|\n" for number in range(1000)]
    shown = STYLES.sub("", "".join(map(renderer.push, ["|a|b|\n", "|-|-|\n", *rows])))
    assert "799" in shown
    assert shown.count("┼") == 1


def code_styles(language: str, *lines: str) -> list[list[tuple[str, str]]]:
    styler = CodeStyler(language)
    return [styler.line(line) for line in lines]


def test_code_keeps_its_state_from_line_to_line() -> None:
    green, grey = "32", "2"
    lines = code_styles("python", 'x = """a', "def b", '"""', "def c")
    assert lines[1] == [("def b", green)]
    assert lines[3][0] == ("def", "35")
    for language in ("js", "c", "java", "rust", "go"):
        lines = code_styles(language, "/* a", "b */ x", '"/*" // /*', "y")
        assert lines[1][0] == ("b */", grey), language
        assert lines[3][0][1] != grey, language
    assert code_styles("nonsense", "def x") == [[("def x", "")]]


def test_code_is_never_changed() -> None:
    source = "\tdef f():\n        return '\\n' # x\n" * 3 + "\x0c\n" + "x" * 5000
    for language in ("python", "html", "sh", "json", "diff", "console", "yaml", "php", "markdown"):
        for line in source.split("\n"):
            assert "".join(text for text, _ in CodeStyler(language).line(line)) == line


MIXED = """## Heading with **bold**

Prose with `code`, *emphasis*, **unclosed and 中文字符, and a [link](http://example.org/).

- item one with more words
  1. nested item

```python
def f(x):
    return "text"  # comment
```

| a | b |
|---|---|
| 1 | 2 |

"""


def test_time_is_linear() -> None:
    """Count the calls of both halves of a long answer; every call takes bounded time."""
    assert work(MIXED * (100_000 // len(MIXED)), 40) < 1.1
    for line in ("word ", "*a", "x"):
        assert work(line * (10_000 // len(line)), 4) < 1.1
    for line in ("x = 1\n", "y"):
        assert work("```\n" + line * (10_000 // len(line)), 4) < 1.1


def work(text: str, size: int) -> float:
    """Return the calls during the second half of a text, by those during the first."""
    renderer = MarkdownRenderer(lambda: 80, styled=True)
    counts = []
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    renderer.push(text[:2000])
    pieces = [text[start : start + size] for start in range(2000, len(text), size)]
    for half in (pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]):
        calls = 0
        sys.setprofile(count)
        try:
            for piece in half:
                renderer.push(piece)
        finally:
            sys.setprofile(None)
        counts.append(calls)
    return counts[1] / counts[0]
