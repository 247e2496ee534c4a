"""The stored state of labs: a folder per lab, with a file that names its hosts.

If a lab is killed, only its folder remains; namespaces and mounts end with their processes.
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
    """A started host. ``pid`` is the process id of its init, seen from outside."""

    name: str
    pid: int
    started: int


class LabState(msgspec.Struct, frozen=True):
    """The stored state of a lab; ``networks`` are interface names in order of their subnets."""

    name: str
    networks: list[str]
    console: HostState
    hosts: list[HostState]


def labs_directory() -> Path:
    """Return the folder that holds one folder per lab."""
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "k2-lab"
    return ROOT / ".k2" / "lab"


def lab_folder(name: str) -> Path:
    """Return the folder of a lab.

    Raises:
        LabError: if the name is not valid as the name of a folder.
    """
    if not name or not all(letter.isalnum() or letter in "-_" for letter in name):
        raise LabError(f"'{name}' is not a valid lab name: use only letters, digits, - and _")
    return labs_directory() / name


def start_time(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot (proc(5), field 22); None if gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(host: HostState) -> bool:
    """Return True if the same init that was started still runs."""
    return start_time(host.pid) == host.started


def read_state(folder: Path) -> LabState | None:
    """Read the state of a folder's lab, running or not; None if there is no lab."""
    try:
        return msgspec.json.decode((folder / _STATE_NAME).read_bytes(), type=LabState)
    except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError):
        return None


def save_state(folder: Path, state: LabState) -> None:
    """Write the state atomically."""
    write_atomically(folder / _STATE_NAME, msgspec.json.encode(state))


@contextmanager
def locked() -> Iterator[None]:
    """Lock the folder of all labs, so that one ``up`` or ``down`` runs at a time."""
    directory = labs_directory()
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
