"""Edits of YAML and TOML keep comments and the settings of others."""

from __future__ import annotations

import itertools
import re
import tomllib
from typing import Any

import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st

from k2cli.connect.formats.patch import REMOVE, ConfigError, ListItem, apply_patch
from k2cli.connect.formats.toml import edit_toml, parse_toml
from k2cli.connect.formats.yaml import edit_yaml, parse_yaml

NAMES = st.sampled_from(["model", "name", "own", "provider", "with space"])
SCALARS = (
    st.booleans() | st.integers(0, 10**6) | st.sampled_from(["", "text", "a: b", "# no", "1.0"])
)
MODELS = ListItem("name", {"name": "k2", "apiBase": "http://127.0.0.1:8080/v1", "limit": {"n": 5}})


@st.composite
def yaml_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Draw a configuration such as Continue's, with comments in all places, and its comments."""
    count, found = itertools.count(), []

    def comment() -> str:
        found.append(f"# comment {next(count)}.")
        return found[-1]

    def behind() -> str:
        return f"  {comment()}" if draw(st.booleans()) else ""

    def above(indent: str) -> str:
        return f"{indent}{comment()}\n" if draw(st.booleans()) else ""

    offset = draw(st.sampled_from(["", "  ", "    "]))
    text = above("")
    for name in draw(st.lists(NAMES.filter(str.isalpha), max_size=3, unique=True)):
        text += f"{above('')}{name}: {_quoted(draw(SCALARS))}{behind()}\n"
    if draw(st.booleans()):
        text += f"{above('')}models:{behind()}\n"
        for index in range(draw(st.integers(1, 3))):
            name = draw(st.sampled_from([f"m{index}", "k2"])) if index == 0 else f"m{index}"
            text += f"{above(offset)}{offset}- name: {name}{behind()}\n"
            text += f"{above(offset + '  ')}{offset}  provider: openai{behind()}\n"
    if draw(st.booleans()):
        text += f"{above('')}rules:\n{offset}- one{behind()}\n{offset}- 'two'\n"
    return text + above(""), found


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


@settings(max_examples=30, deadline=None)
@given(yaml_texts(), st.dictionaries(NAMES, SCALARS, max_size=2), st.booleans())
def test_yaml_keeps_comments_and_other_settings(
    drawn: tuple[str, list[str]], scalars: dict[str, Any], with_model: bool
) -> None:
    text, comments = drawn
    patch = {**scalars, **({"models": MODELS} if with_model else {})}
    after = edit_yaml(text, patch)
    assert parse_yaml(after) == apply_patch(parse_yaml(text), patch)
    assert [comment for comment in comments if after.count(comment) != 1] == []
    assert edit_yaml(after, patch) == after


@st.composite
def toml_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Draw a configuration such as Codex's, and its comments."""
    count, found = itertools.count(), []

    def behind(before: str = "  ") -> str:
        if draw(st.booleans()):
            return ""
        found.append(f"# comment {next(count)}.")
        return f"{before}{found[-1]}"

    text = behind("") + "\n"
    for name in draw(st.lists(NAMES.filter(str.isalpha), max_size=3, unique=True)):
        text += f"{name} = {_quoted(draw(SCALARS))}{behind()}\n"
    for table in draw(
        st.lists(st.sampled_from(["tools", "providers.k2", "providers.other", "z.y"]), unique=True)
    ):
        text += f"{behind('')}\n[{table}]{behind()}\n"
        text += f"{draw(st.sampled_from(['url', 'name']))} = 'x'{behind()}\n"
    return text, found


@settings(max_examples=30, deadline=None)
@given(
    toml_texts(),
    st.dictionaries(NAMES.filter(str.isalpha), SCALARS, max_size=3),
    st.dictionaries(st.sampled_from(["url", "key"]), SCALARS | st.just(REMOVE), max_size=2),
)
def test_toml_keeps_comments_and_other_settings(
    drawn: tuple[str, list[str]], scalars: dict[str, Any], provider: dict[str, Any]
) -> None:
    text, comments = drawn
    patch = {**scalars, "providers": {"k2": provider}, "analytics": {"enabled": False}}
    after = edit_toml(text, patch)
    assert parse_toml(after) == apply_patch(parse_toml(text), patch)
    kept = comments if REMOVE not in provider.values() else []
    assert [comment for comment in kept if after.count(comment) != 1] == []
    assert edit_toml(after, patch) == after


def test_yaml_of_comments_alone_and_with_a_document_mark() -> None:
    assert edit_yaml("# mine\n", {"a": 1}) == "# mine\na: 1\n"
    assert edit_yaml("---\n# mine\na: 1 # one\n", {"a": 2}) == "---\n# mine\na: 2 # one\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "line"),
        ("a: 1\na: 2\n", "duplicate"),
        ("a: 1\n---\nb: 2\n", "document"),
        ("a: &x 1\n" + "".join(f"b{i}: *x\n" for i in range(50)), "aliases"),
        ("\tx: 1\n", "line 1"),
        ("a: !!python/object:os.system {}\n", "constructor"),
        ("[" * 3000, "nest"),
        ("- 1\n", "a list, and not a mapping"),
        ("models: text\n", "models is a text, and not a list"),
    ],
)
def test_yaml_that_is_malformed_or_contradicts_the_patch_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        apply_patch(parse_yaml(text), {"models": MODELS})


@pytest.mark.parametrize(
    "text", ["a = ", "a = 1\na = 2\n", "[a]\n[a]\n", "a = [" * 3000, f"a = {'9' * 5000}"]
)
def test_toml_that_is_malformed_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_toml(text)


def test_the_toml_library_and_python_agree() -> None:
    text = edit_toml("x.y = 1\n", {"model": "k", "x": {"z": 2}})
    assert (
        tomllib.loads(text) == tomlkit.parse(text).unwrap() == {"model": "k", "x": {"y": 1, "z": 2}}
    )
