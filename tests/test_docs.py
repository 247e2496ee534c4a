"""The documents are true where a program can tell: modules, links, flags and exit codes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from k2cli import errors
from k2cli.cli import _COMMANDS, build_app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CONTRACTS = (ROOT / "docs" / "contracts.md").read_text()


def test_architecture_lists_every_module_and_no_other() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.split("## Modules", 1)[1]
    listed = set(re.findall(r"^\| `([\w/]+\.py)` \|", section, re.MULTILINE))
    present = {
        path.relative_to(ROOT / "k2cli").as_posix()
        for path in (ROOT / "k2cli").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert listed == present


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
    return re.findall(r"(?<![\w-])--?[a-z][\w-]*", cell)


@pytest.mark.parametrize("command", [name for name, _ in _COMMANDS])
def test_every_promised_flag_exists(command: str) -> None:
    shown = CliRunner().invoke(build_app(), [command, "--help"]).stdout
    offered = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown))
    promised = _promised_flags(command)
    assert promised
    assert set(promised) <= offered


def test_exit_codes_are_those_of_the_error_tree() -> None:
    rows = re.findall(r"^\| (\d+) \| .* \| `(\w+)` \|$", CONTRACTS, re.MULTILINE)
    assert {name: int(code) for code, name in rows} == {
        cls.__name__: cls.exit_code for cls in (errors.K2Error, *errors.K2Error.__subclasses__())
    }
