"""What k2 asks of one node: its versions, the files and processes of a run, and ports.

On this machine these functions are called; on another they run as
``python -m k2cli.cluster.agent VERB ...`` over ssh and answer in JSON, so that both do the same.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from k2cli import __version__
from k2cli.cluster.activity import activity
from k2cli.cluster.openmpi import find_libmpi, find_mpirun, mpi_major
from k2cli.cluster.ports import choose_port, free_ports, port_holder
from k2cli.files import write_atomically
from k2cli.settings import runs_directory, scratch_directories, scratch_directory

MARK = "k2cli.runtime"
_KILL_SECONDS = 5.0


class NodeFacts(msgspec.Struct, frozen=True):
    """What a node says of itself before a launch."""

    k2_version: str
    python: str
    runs_directory: str
    libmpi: str | None
    mpirun: str | None = None
    mpi_major: int | None = None


class RunProcess(msgspec.Struct, frozen=True):
    """A process that belongs to a run: its command line holds the mark and the run's id."""

    pid: int
    command: str


def facts() -> NodeFacts:
    """Versions and paths of this node."""
    libmpi = find_libmpi()
    mpirun = find_mpirun()
    return NodeFacts(
        __version__,
        sys.executable,
        str(runs_directory()),
        str(libmpi) if libmpi else None,
        str(mpirun) if mpirun else None,
        mpi_major(mpirun) if mpirun else None,
    )


# --- files --------------------------------------------------------------------------------------


def run_folder(run_id: str) -> Path:
    """Where this node keeps what belongs to a run."""
    return runs_directory() / run_id


def write_private(run_id: str, name: str, data: bytes) -> None:
    """Write a file of a run, readable by its owner only, whole or not at all."""
    folder = run_folder(run_id)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(folder / name, data, 0o600)


def remove_bootstraps(run_id: str) -> None:
    """Remove bootstrap files that no guard has read, and the run's folder if that leaves it empty.

    Where the run was launched from, its record stays there.
    """
    folder = run_folder(run_id)
    remove_scratch(run_id)
    for path in folder.glob("bootstrap-*.json"):
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def scratch_path(run_id: str) -> Path:
    """A short path for MPI's sockets and shared memory: in memory where the system has that."""
    return scratch_directory(run_id)


def make_scratch(run_id: str) -> Path:
    """Make that folder, for this user alone."""
    path = scratch_path(run_id)
    path.mkdir(mode=0o700)
    return path


def remove_scratch(run_id: str) -> None:
    """Remove a run's folders of sockets and shared memory."""
    for path in scratch_directories(run_id):
        shutil.rmtree(path, ignore_errors=True)


# --- processes ----------------------------------------------------------------------------------


def processes_of_run(run_id: str) -> list[RunProcess]:
    """Guards, ranks and MPI launchers of a run that live on this node. Zombies do not count."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if _belongs(command, run_id) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(RunProcess(process.pid, " ".join(command)))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # gone meanwhile, or another user's
    return found


def _belongs(command: Sequence[str], run_id: str) -> bool:
    # Whole arguments: a shell or an editor whose one argument mentions the run is not part of it.
    return run_id in command and any(part.startswith(MARK) for part in command)


def kill_run(run_id: str, spared: int | str = 0) -> list[RunProcess]:
    """SIGKILL every process of a run on this node but ``spared``, and wait until they are gone.

    Returns:
        What is still there: only what hangs in the kernel, or is another user's.
    """
    until = time.monotonic() + _KILL_SECONDS
    while (left := _others(run_id, int(spared))) and time.monotonic() < until:
        for process in left:
            try:
                psutil.Process(process.pid).kill()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        time.sleep(0.05)
    return left


def _others(run_id: str, spared: int) -> list[RunProcess]:
    return [process for process in processes_of_run(run_id) if process.pid != spared]


# --- locks, which are in cluster.lock_files ------------------------------------------------


def count_processes(run_id: str) -> int:
    """How many processes of a run live here."""
    return len(processes_of_run(run_id))


def _lock_take(share: str, input: bytes) -> Any:
    from k2cli.cluster.lock_files import Claim, take

    return take(msgspec.json.decode(input, type=Claim), count_processes, share=share == "1")


def _lock_renew(run_id: str, pid: str, create_time: str) -> Any:
    from k2cli.cluster.lock_files import renew

    return renew(run_id, int(pid), float(create_time))


def _locks() -> Any:
    from k2cli.cluster.lock_files import list_locks

    return list_locks(count_processes)


def _lock_release(run_id: str) -> None:
    from k2cli.cluster.lock_files import release

    release(run_id)


def _clean(live: str, gone: str) -> Any:
    from k2cli.cluster.cleaning_here import clean_here

    return clean_here(*(frozenset(filter(None, names.split(","))) for names in (live, gone)))


def _checkpoint(reference: str, folder: str) -> Any:
    from k2cli.cluster.model_there import find_checkpoint

    return find_checkpoint(reference, folder)


def _checkpoint_heads(reference: str) -> Any:
    from k2cli.cluster.model_here import checkpoint_heads

    return checkpoint_heads(reference)


def _networks() -> Any:
    from k2cli.cluster.networks import own_networks

    return own_networks()


# --- the same, asked for over ssh ---------------------------------------------------------------


def _memory() -> Any:
    from k2cli.planning.hardware import this_machine

    return this_machine()


def _software(model_folder: str | None = None) -> Any:
    from k2cli.cluster.doctor.software import software

    return software(model_folder)


def _reach(targets: str) -> Any:
    from k2cli.cluster.doctor.reach_probe import Target, try_targets

    return try_targets(msgspec.json.decode(targets, type=list[Target]))


def _disk_speed(folder: str) -> Any:
    from k2cli.cluster.doctor.disk_probe import read_speed

    return read_speed(folder)


# A verb and what answers it: a function of strings whose result msgspec can encode.
_VERBS: dict[str, Callable[..., Any]] = {
    "facts": facts,
    "memory": _memory,
    "free-ports": lambda count: free_ports(int(count)),
    "port-holder": lambda host, port: port_holder(host, int(port)),
    "choose-port": lambda host, first: choose_port(host, int(first)),
    "write": write_private,
    "remove-bootstraps": remove_bootstraps,
    "activity": lambda: activity(MARK),
    "processes": processes_of_run,
    "kill": kill_run,
    "lock-take": _lock_take,
    "lock-renew": _lock_renew,
    "lock-release": _lock_release,
    "locks": _locks,
    "clean": _clean,
    "checkpoint": _checkpoint,
    "checkpoint-heads": _checkpoint_heads,
    "networks": _networks,
    "remove-folder": lambda path: shutil.rmtree(path, ignore_errors=True),
    "software": _software,
    "reach": _reach,
    "disk-speed": _disk_speed,
}
# Verbs that get what comes over stdin as their last argument, in bytes.
_WITH_INPUT = frozenset({"write"}) | {"lock-take"}
UNKNOWN_VERB_STATUS = 64


def answer(verb: str, arguments: Sequence[str], input: bytes = b"") -> bytes:
    """Carry out one verb here.

    Returns:
        Its result as JSON.

    Raises:
        KeyError: if there is no such verb.
        OSError: if the verb cannot be carried out.
    """
    function = _VERBS[verb]
    extra = (input,) if verb in _WITH_INPUT else ()
    return msgspec.json.encode(function(*arguments, *extra))


def main() -> None:
    """Carry out the verb of the command line and write its result to stdout as JSON."""
    verb, *arguments = sys.argv[1:]
    if verb not in _VERBS:
        sys.stderr.write(f"k2 {__version__} knows no '{verb}' here\n")
        sys.exit(UNKNOWN_VERB_STATUS)
    try:
        result = answer(verb, arguments, sys.stdin.buffer.read() if verb in _WITH_INPUT else b"")
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)
    os.write(1, result + b"\n")


if __name__ == "__main__":
    main()
