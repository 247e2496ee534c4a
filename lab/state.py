"""Where a lab keeps what it must remember: one folder per lab, and one file that names its hosts.

Only the folder outlives a lab that was killed; namespaces and mounts end with their processes.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from k2cli.files import write_atomically
from lab.errors import LabError

ROOT = Path(__file__).resolve().parent.parent
_STATE_NAME = "lab.json"


class HostState(msgspec.Struct, frozen=True):
    """A host as it was started. ``pid`` is its init's, seen from outside."""

    name: str
    pid: int
    started: int


class LabState(msgspec.Struct, frozen=True):
    """What makes a lab; ``networks`` are interface names in the order of their subnets."""

    name: str
    networks: list[str]
    console: HostState
    hosts: list[HostState]


def labs_directory() -> Path:
    """The folder that holds one folder per lab."""
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "k2-lab"
    return ROOT / ".k2" / "lab"


def lab_folder(name: str) -> Path:
    """A lab's own folder.

    Raises:
        LabError: if the name cannot be a folder's.
    """
    if not name or not all(letter.isalnum() or letter in "-_" for letter in name):
        raise LabError(f"'{name}' is no name for a lab: letters, digits, - and _ only")
    return labs_directory() / name


def start_time(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot (proc(5), field 22); None if gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(host: HostState) -> bool:
    """Whether the very init that was started still runs."""
    return start_time(host.pid) == host.started


def read_state(folder: Path) -> LabState | None:
    """The lab of a folder, running or not; None if there is none."""
    try:
        return msgspec.json.decode((folder / _STATE_NAME).read_bytes(), type=LabState)
    except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError):
        return None


def save_state(folder: Path, state: LabState) -> None:
    """Write it whole or not at all."""
    write_atomically(folder / _STATE_NAME, msgspec.json.encode(state))


@contextmanager
def locked() -> Iterator[None]:
    """One ``up`` or ``down`` at a time among all labs of this folder."""
    directory = labs_directory()
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
