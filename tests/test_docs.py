"""Check what a program can check in the documents: links, commands, flags and exit codes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from k2cli import errors
from k2cli.cli import _COMMANDS, build_app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
DOCUMENTED = ("k2cli", "scripts", "benchmarks", "lab", "tests")
FLAG = r"(?<![\w-])--?[a-z][\w-]*"
REFERENCE = ROOT / "docs" / "reference"
CONTRACTS = (REFERENCE / "contracts.md").read_text()


def test_command_reference_is_current() -> None:
    command = [sys.executable, "scripts/commands-reference", "--check"]
    done = subprocess.run(command, cwd=ROOT, timeout=60)
    assert done.returncode == 0, "run scripts/commands-reference"


def test_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.name != "README.md"]
    assert [
        path.name
        for path in pages
        if f"]({path.relative_to(ROOT / 'docs').as_posix()})" not in index
    ] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_documents_are_finished() -> None:
    assert [path.name for path in DOCUMENTS if re.search(r"@@|TODO|FIXME", path.read_text())] == []


def test_architecture_names_every_folder() -> None:
    page = (ROOT / "docs" / "design" / "architecture.md").read_text()
    section = page.split("## Where to find things", 1)[1].split("\n## ", 1)[0]
    rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    named = set(re.findall(r"`(\w+)/`", "".join(rows)))
    files = (ROOT / "k2cli").glob("*/__init__.py")
    assert named == {path.parent.name for path in files}


def test_paths_of_documents_exist() -> None:
    wrong = []
    for folder in DOCUMENTED:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in ("", ".py", ".sh", ".toml"):
                named = re.findall(r"\bdocs/[\w/.-]+\.(?:md|json)\b", path.read_text())
                wrong += [f"{path.name}: {name}" for name in named if not (ROOT / name).exists()]
    assert wrong == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_tests_that_documents_name_exist(document: Path) -> None:
    named = re.findall(
        r"`((?:k2cli|tests|lab|benchmarks)/[\w/.-]+\.py)(?:::(\w+))?", document.read_text()
    )
    wrong = [
        f"{path}::{test}" if test else path
        for path, test in named
        if not (ROOT / path).is_file() or (test and f"def {test}(" not in (ROOT / path).read_text())
    ]
    parts = "|".join(path.parent.name for path in (ROOT / "k2cli").glob("*/__init__.py"))
    modules = re.findall(rf"`((?:{parts})/[\w/.-]+\.py)`", document.read_text())
    assert wrong + [path for path in modules if not (ROOT / "k2cli" / path).is_file()] == []


def test_every_environment_variable_is_documented() -> None:
    page = (REFERENCE / "configuration.md").read_text()
    named: set[str] = set()
    for path in (ROOT / "k2cli").rglob("*.py"):
        named |= set(re.findall(r'"(K2_[A-Z_]+)"', path.read_text()))
    assert named
    assert {name for name in named if f"`{name}`" not in page} == set()


def _promised_flags(command: str) -> list[str]:
    """The flags of the "to rely on" column; what is planned stands in another."""
    (row,) = [line for line in CONTRACTS.splitlines() if re.match(rf"\| `k2 {command}[ `]", line)]
    cell = re.split(r"(?<!\\)\|", row)[2]
    return re.findall(FLAG, cell)


@cache
def _offered_flags(command: str) -> frozenset[str]:
    """The flags that a command's help has; none if there is no such command."""
    done = CliRunner().invoke(build_app(), [*command.split(), "--help"])
    return frozenset(re.findall(FLAG, done.stdout if done.exit_code == 0 else ""))


@pytest.mark.parametrize("command", [name for name, _ in _COMMANDS])
def test_every_promised_flag_exists(command: str) -> None:
    promised = _promised_flags(command)
    assert promised
    assert set(promised) <= _offered_flags(command)


def _texts() -> Iterator[tuple[str, str]]:
    """All that tells a user what to type: documents, scripts, and strings of the program."""
    for path in [*DOCUMENTS, ROOT / "scripts" / "quickstart"]:
        yield from ((path.name, line) for line in path.read_text().splitlines())
    for path in (ROOT / "k2cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            words = [
                part.value if isinstance(part, ast.Constant) else "X"
                for part in parts
                if isinstance(part, ast.Constant | ast.FormattedValue)
            ]
            yield path.name, "".join(word for word in words if isinstance(word, str))


def test_every_command_that_is_shown_can_be_typed() -> None:
    wrong = []
    for place, text in _texts():
        for command, rest in re.findall(
            r"\bk2 ((?:cluster |models |keys |cache )?[a-z-]+) ([^\n`|;,&)]*)", text
        ):
            # "what k2 keeps" is prose, and has no flags.
            if flags := re.findall(r"(?<![\w-])--[a-z][\w-]*", rest):
                missing = set(flags) - _offered_flags(command)
                wrong += [f"{place}: k2 {command} has no {flag}" for flag in missing]
    assert not wrong, "\n".join(wrong)


def test_exit_codes_are_those_of_the_error_tree() -> None:
    page = (REFERENCE / "exit-codes.md").read_text()
    rows = re.findall(r"^\| (\d+) \| .* \| `(\w+)` \|$", page, re.MULTILINE)
    assert {name: int(code) for code, name in rows} == {
        cls.__name__: cls.exit_code
        for cls in (errors.K2Error, *errors.K2Error.__subclasses__())
        if cls.__module__ == errors.__name__  # others may be loaded, by whichever tests ran before
    }
