"""Wheel of the running k2, built from its files: ``k2 cluster prepare`` installs it on nodes.

No build system is used: k2 may itself have been installed from a wheel, without source to build
from, and a node must get exactly the code that runs here, not other code of the same version. The
format is that of the packaging specification "Binary distribution format" (PEP 427).
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import k2cli
from k2cli.agent.self_report import files_digest, package_files
from k2cli.errors import ClusterError

_TAG = "py3-none-any"
# The earliest date of zip files; a fixed date makes wheels of equal files equal.
_DATE = (1980, 1, 1, 0, 0, 0)


@cache
def own_digest() -> str:
    """Return the digest of the running code, as it was at this process's first call."""
    return files_digest(_package_files())


def _package() -> Path:
    return Path(k2cli.__file__).resolve().parent


@cache
def _package_files() -> dict[str, bytes]:
    return package_files(_package())


@cache
def build_own_wheel() -> tuple[str, bytes]:
    """Build the wheel.

    Returns:
        Its file name, which has the digest of the code as build tag, and its bytes.

    Raises:
        ClusterError: if there is neither installed metadata nor a ``pyproject.toml``.
    """
    name = f"k2cli-{k2cli.__version__}"
    files = {f"k2cli/{path}": data for path, data in _package_files().items()}
    info = f"{name}.dist-info"
    files[f"{info}/METADATA"] = _metadata().encode()
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: k2 {k2cli.__version__}\n"
        f"Root-Is-Purelib: true\nTag: {_TAG}\n"
    ).encode()
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\nk2 = k2cli.cli:main\n"
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD").encode()
    return f"{name}-0{own_digest()}-{_TAG}.whl", _zip(files)


def _metadata() -> str:
    """Return ``METADATA`` made from the checkout's ``pyproject.toml``, or as installed."""
    project = _package().parent / "pyproject.toml"
    if project.is_file():
        return _project_metadata(tomllib.loads(project.read_text(encoding="utf-8")))
    try:
        text = importlib.metadata.distribution("k2cli").read_text("METADATA")
    except importlib.metadata.PackageNotFoundError:
        text = None
    if not text:
        raise ClusterError(
            "k2 cannot be copied to other machines: its list of dependencies is missing here",
            "run it from an installed package or a checkout",
        )
    return text


def _project_metadata(project: dict[str, dict[str, object]]) -> str:
    fields = project["project"]
    dependencies = fields.get("dependencies", [])
    assert isinstance(dependencies, list)  # as pyproject.toml has it
    lines = [
        "Metadata-Version: 2.1",
        "Name: k2cli",
        f"Version: {k2cli.__version__}",
        f"Summary: {fields['description']}",
        f"Requires-Python: {fields['requires-python']}",
        *(f"Requires-Dist: {dependency}" for dependency in dependencies),
    ]
    return "\n".join(lines) + "\n"


def _record(files: dict[str, bytes], own: str) -> str:
    lines = []
    for path, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(data)}")
    return "\n".join([*lines, f"{own},,"]) + "\n"


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            entry = zipfile.ZipInfo(path, _DATE)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return buffer.getvalue()
