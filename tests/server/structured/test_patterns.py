"""Patterns are held so that Python's ``re`` agrees, whatever Rust reads in them or JSON escapes."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from k2cli.server.errors import ApiError
from k2cli.server.structured.call_forms.text_patterns import whole_pattern
from k2cli.server.structured.json_schema import checked_schema
from k2cli.server.structured.patterns import held_pattern
from tests.server.structured.matching import bytes_only, holds, schema_grammar

TEXTS = [
    "", "a", "b", "A", "é", "ſ", "K", "٣", "²", "\u0301", "日", "😀", "\n", "\r", "\t", "\x85",
    "\ufeff", "\u2028", " ", '"', "\\", "/", "[", "]", "^", "-", "&", "~", ":", "{", "}", "_", ".",
    ",",
    "1",
    'a"', "a\\", "ab", "aa", "a]", ":]", "a{", "{a}", "a b", "a-b", "\\n", "ab]",
]  # fmt: skip
# Classes of letters, and of what they exclude; what Rust alone reads in them; braces.
PATTERNS = [
    '^[^"]*$', r"^[^\\]*$", r'^[^"\\]+$', r'^[^"\n]$', '^[^a"]$', '^[^/"]+$', r'^[^\s"]+$',
    r"^[^\x00-\x1f]$", r'^[\x00-!#-\u00ff]$', r"^[\s\S]$", r"^[^\w]$", r"^[^\d]$", r"^[^\s]$",
    r"^\W$", r"^\D$", r"^\S$", r"^\w$", r"^\d$", r"^\s$", r"^[\W_]$", r"^[\D]$", r"^[^\W]$",
    r"^[\w.-]+$", "^[[:alpha:]]$", "^[[a]b]$", "^[a-z&&b]$", "^[a~~b]$", "^[+--]$", "^[a^]$",
    "^[a-]$", r"^[\]\[a]$", "^{a}$", "^a{$", "^a{1,2}$", "^(?:[^\"]|\\\\\")*$", r"^[^\u0022]$",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_matches_here_matches_in_python(pattern: str) -> None:
    grammar = schema_grammar({"type": "string", "pattern": pattern})
    names = schema_grammar({
        "type": "object", "patternProperties": {pattern: {}}, "additionalProperties": False
    })  # fmt: skip
    with warnings.catch_warnings(action="ignore"):  # Python warns of what Rust reads in a class
        judge = re.compile(pattern)
    found = []
    for text in TEXTS:
        written = json.dumps(text, ensure_ascii=False)
        if bytes_only().accepts(grammar, written):
            found.append(text)
            assert judge.search(text), (pattern, text)
        if bytes_only().accepts(names, f"{{{written}:1}}"):
            assert judge.search(text), (pattern, text)
    assert found


def test_ordinary_patterns_still_match_what_they_should() -> None:
    for pattern, text in (
        ('^[^"]*$', "a b\n"), (r"^[^\\]+$", 'a"'), (r"^[\w.+-]+@[\w-]+\.\w+$", "a.b+c@d-e.org"),
        (r"^\S+$", "日😀"), (r"^\d{3}-\d{4}$", "555-1234"), ("^[[:alpha:]]$", "a]"),
        ("^a{$", "a{"),
        (r"^[^<>\s]+$", 'x="1"'), (r"^\$\{[a-z]+}$", "${a}"), ("(?i)^ab$", "Ab"), (r"\Aab\z", "ab"),
    ):  # fmt: skip
        assert holds({"type": "string", "pattern": pattern}, text), pattern


@pytest.mark.parametrize(
    "pattern", ["^[]a]$", "[^]a]", "^a++$", "a{1}{2}", "(?x)a b", r"[a-\d]", "[a"]
)
def test_what_programs_read_differently_is_refused(pattern: str) -> None:
    with pytest.raises(ApiError) as caught:
        checked_schema({"items": {"type": "string", "pattern": pattern}}, "s")
    assert caught.value.message.startswith(f"s/items/pattern: {pattern} ")
    names = {"type": "object", "patternProperties": {pattern: {}}}
    with pytest.raises(ApiError, match="s/patternProperties/"):
        checked_schema(names, "s")


def test_a_refusal_shows_the_pattern_as_it_was_sent() -> None:
    with pytest.raises(ApiError, match=r"the pattern \^\\w\+\\b cannot be held"):
        checked_schema({"type": "string", "pattern": r"^\w+\b"}, "s")


def test_patterns_that_are_the_same_in_other_words_both_count() -> None:
    schema = {
        "type": "object",
        "patternProperties": {r"^\d$": {"type": "integer"}, "^[0-9]$": {"minimum": 3}},
    }
    with pytest.raises(ApiError):  # two patterns for one name cannot be held, and none is lost
        checked_schema(schema, "s")


def test_a_held_pattern_is_a_whole_one_for_texts_without_quotes() -> None:
    assert whole_pattern(held_pattern(r"^[^|$]+\S$")).endswith(
        r"[[[^\s\ufeff\x1c-\x1f]]&&[^\x00]])"
    )


@pytest.mark.parametrize(
    ("form", "valid", "wrong"),
    [
        ("date", ["2024-02-29", "2000-02-29", "0001-01-01"],
         ["2023-02-29", "1900-02-29", "0000-01-01", "2024-02-30", "2024-04-31", "2024-13-01"]),
        ("time", ["23:59:59Z", "01:02:03.123456789+01:00"], ["23:59:60Z", "24:00:00Z", "01:02:03"]),
        ("date-time", ["2024-02-29T00:00:00Z"], ["2023-02-29T00:00:00Z", "2024-02-29 00:00:00Z"]),
    ],
)  # fmt: skip
def test_dates_and_times_exist(form: str, valid: list[str], wrong: list[str]) -> None:
    schema: dict[str, Any] = {"type": "string", "format": form}
    for each, right in ((valid, True), (wrong, False)):
        assert [holds(schema, text) for text in each] == [right] * len(each)
    assert [holds({**schema, "pattern": "^2"}, text) for text in valid] == [
        text.startswith("2") for text in valid
    ]
    checker = Draft202012Validator.FORMAT_CHECKER
    judge = Draft202012Validator(schema, format_checker=checker)
    assert all(judge.is_valid(text) for text in valid)
