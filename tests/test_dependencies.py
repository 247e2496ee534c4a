"""Check that pyproject.toml declares every package that is imported."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from k2cli.commands.top import TEXTUAL

ROOT = Path(__file__).resolve().parent.parent
OWN = {"k2cli", "tests", "lab", "benchmarks"}


def _names(requirements: list[str]) -> set[str]:
    return {_normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _imported(folder: str) -> set[str]:
    """Return the third-party packages that the files of a folder import."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - OWN - sys.stdlib_module_names


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = _names(project["dependencies"])
    development = needed | _names(project["optional-dependencies"]["dev"])
    distributions = packages_distributions()

    def missing(folder: str, declared: set[str]) -> set[str]:
        return {
            name
            for name in _imported(folder)
            if not {_normal(each) for each in distributions.get(name, [name])} & declared
        }

    # typing_extensions is imported for types only, ModelScope's client for ``modelscope:`` alone,
    # textual for ``k2 top``, and mcp by the process that runs the tools of a chat.
    optional = project["optional-dependencies"]
    extras = _names([*optional["modelscope"], *optional["top"], *optional["mcp"]])
    assert missing("k2cli", needed | extras | {"typing-extensions"}) == set()
    assert {*optional["top"], *optional["mcp"]} <= set(optional["dev"])
    assert TEXTUAL in optional["top"]
    for folder in ("tests", "lab", "benchmarks"):
        assert missing(folder, development) == set(), folder


def test_constraints_allow_what_is_declared() -> None:
    pinned = _names(
        [
            line
            for line in (ROOT / "constraints.txt").read_text().splitlines()
            if line and not line.startswith("#")
        ]
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert _names(declared) - pinned == set()
