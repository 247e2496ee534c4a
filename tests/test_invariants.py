"""The invariants of a run: each has tests that exist, and none is held by unpickling."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNSAFE = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def test_every_invariant_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "design" / "invariants.md").read_text()
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", page, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 11))
    for number, cell in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", cell)
        assert named, number
        for file, test in named:
            tree = ast.parse((ROOT / file).read_text())
            functions = ast.FunctionDef | ast.AsyncFunctionDef
            assert test in {node.name for node in tree.body if isinstance(node, functions)}, test


def test_nothing_is_ever_unpickled() -> None:
    imported = set()
    for path in (ROOT / "k2cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add((node.module or "").split(".")[0])
    assert imported & UNSAFE == set()
