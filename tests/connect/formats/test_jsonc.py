"""Edits of JSON with comments change what they name, and not a byte beside it."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2cli.connect.formats.jsonc import edit_json, parse_json
from k2cli.connect.formats.patch import REMOVE, ConfigError, ListItem, Patch, apply_patch

NAMES = st.sampled_from(["a", "b", "c", "d", 'q"uote', "ü//x", "/*"])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**9), 10**9),
    st.sampled_from(["", "text", "// no comment", "/* none */", 'q"\\', "\t", "😀", "\u2028"]),
)
DATA = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(NAMES, DATA, max_size=4)
GAPS = st.sampled_from(
    ["", "", "", " ", "\n", "\r\n  ", "\n\t", " // {}\n", "/* {} */", "\n// {}\n"]
)


def tokens(value: Any, draw: st.DrawFn) -> list[str]:
    """Return the text of a value, with trailing commas here and there, in its tokens."""
    if not isinstance(value, dict | list):
        return [json.dumps(value, ensure_ascii=draw(st.booleans()))]
    parts = []
    for name in value:
        if isinstance(value, dict):
            parts.append([json.dumps(name), ":", *tokens(value[name], draw)])
        else:
            parts.append(tokens(name, draw))
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    inner = [token for part in parts for token in (*part, ",")]
    if inner and draw(st.booleans()):
        inner.pop()
    return [opening, *inner, closing]


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Draw a text with comments, and its comments."""
    count = itertools.count()
    text, comments = "", []
    for token in ["", *tokens(draw(OBJECTS), draw)]:
        gap = draw(GAPS)
        if "{}" in gap:
            comments.append(f"comment {next(count)}.")
            gap = gap.format(comments[-1])
        text += token + gap
    return text, comments


@st.composite
def patches(draw: st.DrawFn, data: Any, *, removing: bool) -> Patch:
    """Draw a patch of an object that replaces scalars only, so that no comment may get lost."""
    patch: dict[str, Any] = {}
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        old = data.get(name)
        if name in data and removing and draw(st.booleans()):
            patch[name] = REMOVE
        elif isinstance(old, dict):
            patch[name] = draw(patches(old, removing=removing))
        elif not isinstance(old, list):
            patch[name] = draw(SCALARS if old is not None else DATA)
    return patch


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_edit_sets_what_it_names_and_keeps_all_else(drawn: st.DataObject) -> None:
    text, comments = drawn.draw(documents())
    before = parse_json(text)
    patch = drawn.draw(patches(before, removing=False))
    after = edit_json(text, patch)
    assert parse_json(after) == apply_patch(before, patch)
    assert [comment for comment in comments if comment not in after] == []
    assert edit_json(after, patch) == after
    if not patch:
        assert after == text


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_edit_with_removals(drawn: st.DataObject) -> None:
    text, _ = drawn.draw(documents())
    before = parse_json(text)
    patch = drawn.draw(patches(before, removing=True))
    assert parse_json(edit_json(text, patch)) == apply_patch(before, patch)


@settings(max_examples=30, deadline=None)
@given(OBJECTS, st.sampled_from([None, 2, "\t"]), st.data())
def test_strict_json_stays_strict(data: Any, indent: Any, drawn: st.DataObject) -> None:
    patch = drawn.draw(patches(data, removing=True))
    after = edit_json(json.dumps(data, indent=indent), patch, comments=False)
    assert json.loads(after) == apply_patch(data, patch)


ZED = """\
// My settings
{
  "theme": "One Dark", // at night
  "agent": {
    "default_model": {"provider": "zed.dev", "model": "x"} // was good
  },
  "list": [
    {"name": "mine", "tokens": 1, "own": true}, // kept
  ],
  // "vim_mode": true,
}
"""


def test_the_text_is_formatted_like_its_surroundings() -> None:
    patch = {
        "agent": {"default_model": {"provider": "k2"}, "new": 1},
        "list": ListItem("name", {"name": "other", "tokens": 2}),
        "more": {"deep": ["a"]},
    }
    after = edit_json(ZED, patch)
    assert (
        after
        == """\
// My settings
{
  "theme": "One Dark", // at night
  "agent": {
    "default_model": {"provider": "k2", "model": "x"}, // was good
    "new": 1
  },
  "list": [
    {"name": "mine", "tokens": 1, "own": true}, // kept
    {
      "name": "other",
      "tokens": 2
    },
  ],
  "more": {
    "deep": [
      "a"
    ]
  },
  // "vim_mode": true,
}
"""
    )
    changed = edit_json(after, {"list": ListItem("name", {"name": "mine", "tokens": 5})})
    assert changed == after.replace('"tokens": 1', '"tokens": 5')


def test_a_file_of_comments_alone_gets_its_first_settings() -> None:
    after = edit_json("// see the documentation\n", {"a": 1})
    assert after == '// see the documentation\n{\n  "a": 1\n}\n'
    assert edit_json("", {"a": REMOVE, "b": {"c": REMOVE}}) == '{\n  "b": {}\n}\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "line 1, column 2"),
        ('{"a": 1,,}', "column 9"),
        ('{"a": 1} {}', "follows"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ("{'a': 1}", "name of a member"),
        ('{"a" 1}', "colon"),
        ('{"a": nul}', "'nul'"),
        ('{"a": NaN}', "NaN"),
        ('{"a": 01}', "'01'"),
        ('{"a": "x\ny"}', "line 1"),
        ('{"a": "\\x"}', "escape"),
        ("/* no end", "does not end"),
        ("[" * 1000, "nested"),
        ('{"a": ' * 1000, "nested"),
        ("[1]", "a list, and not a mapping"),
        ("3", "a number, and not a mapping"),
        ('{"env": "text"}', "env is a text, and not a mapping"),
        ('{"list": {"b": 1}}', "list is a mapping, and not a list"),
        ('{"list": [{"n": 1}, {"n": 1}]}', "list has '1' 2 times"),
    ],
)
def test_what_is_malformed_or_contradicts_the_patch_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        edit_json(text, {"env": {"x": 1}, "list": ListItem("n", {"n": 1})})


@pytest.mark.parametrize("text", ['{"a": 1,}', '{"a": 1} // x', '{/* x */"a": 1}'])
def test_comments_and_trailing_commas_are_refused_where_the_agent_refuses_them(text: str) -> None:
    with pytest.raises(ConfigError):
        edit_json(text, {"a": 2}, comments=False)
