"""The language rule of docstrings: each can be read alone, as an instruction or a noun phrase."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "k2cli"

# A docstring that begins with one of these words is part of a sentence: it answers a question that
# the reader does not see, or continues a name that stands elsewhere. Begin with a verb
# ("Return ..."), with the object ("Folder of ..."), or with "True if ...".
FRAGMENTS = {
    "question": "what whether who whose where why how when which",
    "continuation": "and but that as so only not here there if",
    "preposition": "of by without with in on over to for from",
}
FORBIDDEN = {word for words in FRAGMENTS.values() for word in words.split()}


def _fragments(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            word = re.match(r"\w*", text)
            if word is not None and word[0].lower() in FORBIDDEN:
                name = "the file" if isinstance(node, ast.Module) else node.name
                yield f"{name}: {text.splitlines()[0]}"


@pytest.mark.parametrize(
    "path",
    sorted(PACKAGE.rglob("*.py")),
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_docstrings_are_no_fragments(path: Path) -> None:
    found = list(_fragments(path))
    assert not found, "\n".join(found)
