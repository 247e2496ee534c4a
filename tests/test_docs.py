"""The documents are true where a program can tell: links, flags and exit codes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from k2cli import errors
from k2cli.cli import _COMMANDS, build_app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FLAG = r"(?<![\w-])--?[a-z][\w-]*"
CONTRACTS = (ROOT / "docs" / "contracts.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_documents_are_finished() -> None:
    assert [path.name for path in DOCUMENTS if re.search(r"@@|TODO|FIXME", path.read_text())] == []


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
        for command, rest in re.findall(r"\bk2 ((?:cluster )?[a-z-]+) ([^\n`|;,&)]*)", text):
            # "what k2 keeps" is prose, and has no flags.
            if flags := re.findall(r"(?<![\w-])--[a-z][\w-]*", rest):
                missing = set(flags) - _offered_flags(command)
                wrong += [f"{place}: k2 {command} has no {flag}" for flag in missing]
    assert not wrong, "\n".join(wrong)


def test_exit_codes_are_those_of_the_error_tree() -> None:
    rows = re.findall(r"^\| (\d+) \| .* \| `(\w+)` \|$", CONTRACTS, re.MULTILINE)
    assert {name: int(code) for code, name in rows} == {
        cls.__name__: cls.exit_code for cls in (errors.K2Error, *errors.K2Error.__subclasses__())
    }
