"""Records of runs, one folder each, and the current state of a recorded run.

Only the supervisor of a run writes its record. A reader checks whether that supervisor is still
alive: if not, the state in the record is out of date.
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from k2cli.agent.activity import activity, is_alive
from k2cli.agent.run_folder import RESERVE_NAME, write_with_reserve
from k2cli.choices import Transport
from k2cli.errors import ClusterError, K2Error
from k2cli.files import decode_json, encode_json, matching, read_regular
from k2cli.gpu_name import GpuName
from k2cli.nodes.node_name import is_node_name
from k2cli.runs import check_run
from k2cli.runs.hand_over import deciding
from k2cli.scratch import remove_scratch
from k2cli.settings import is_run_id, runs_directory

if TYPE_CHECKING:
    from k2cli.protocol import RunEvent

SCHEMA_VERSION = 1
KEPT_RECORDS = 20
_PRUNE_SECONDS = 2.0
_LIMIT_BYTES = 4 * 2**20
EVENTS_NAME = "events.jsonl"
CERTIFICATE_NAME = "tls-certificate.pem"
LOG_NAME = "supervisor.log"
Listener = Callable[["RunEvent"], None]
"""Receives the events of a run."""
RunState = Literal[
    "starting",
    "loading",
    "ready",
    "restarting",
    "stopping",
    "stopped",
    "failed",
    "lost",
    "orphaned",
]
LIVE_STATES: frozenset[RunState] = frozenset(
    {"starting", "loading", "ready", "restarting", "stopping"}
)
_LAUNCH_HINT = "k2 launch MODEL --detach"


@dataclass(frozen=True, slots=True)
class RankRecord:
    """The state of one rank; bytes as measured by the rank, 0 until it has loaded.

    ``gpu`` is the one that k2 gave it on a machine with NVIDIA GPUs. ``bytes_read`` is what it
    read from the checkpoint in ``load_seconds``.
    """

    rank: int
    node: str
    guard_pid: int | None = None
    rank_pid: int | None = None
    weights_bytes: int = 0
    active_memory_bytes: int = 0
    peak_memory_bytes: int = 0
    load_seconds: float = 0.0
    bytes_read: int = 0
    load_bytes_per_second: float = 0.0
    gpu: GpuName | None = None

    @property
    def place(self) -> str:
        """The node, with the number of the rank's GPU if it has one."""
        return self.node if self.gpu is None else f"{self.node} {self.gpu.short}"


@dataclass(frozen=True, slots=True)
class FailureRecord:
    """The root cause of a failed run. ``rank`` is None if no single rank has failed."""

    cause: str
    rank: int | None = None
    node: str | None = None
    exit_status: int | None = None
    last_lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """An attempt that failed and was followed by another one. Times as in ``RunRecord``."""

    number: int
    began: float
    ended: float
    cause: str
    failure: FailureRecord | None = None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run. Times are seconds since the epoch; ``pid`` is the supervisor's.

    ``settings`` are those that k2 chose itself: the transport with its reason, addresses and
    interfaces, environment variables and limits. ``left`` describes the processes that could not
    be killed, or not be checked, at the end of the run, by node. ``model_folders`` are the folders
    of the model by node, empty in the record of an earlier version. ``ends_with_chats``: a chat
    started the run, and it ends with its last chat. ``ends_with_check``: see ``check_run``.

    States of a live run: ``starting``, ``loading``, ``ready``, ``stopping``, and ``restarting``
    between a failure and the next attempt. States of an ended run: ``stopped`` by the user,
    ``failed``, ``lost`` if the supervisor was killed, and ``orphaned`` if it was killed and
    processes of the run remain.
    """

    run_id: str
    model: str
    model_name: str
    state: RunState
    backend: Transport
    strategy: str
    context_length: int
    ranks: tuple[RankRecord, ...]
    created: float
    host: str = ""
    port: int = 0
    url: str = ""
    pid: int = 0
    pid_create_time: float = 0.0
    pid_start: str = ""
    ended: float | None = None
    cause: str = ""
    failure: FailureRecord | None = None
    restart: str = "never"
    attempts: tuple[AttemptRecord, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    model_folders: dict[str, str] = field(default_factory=dict)
    ends_with_chats: bool = False
    ends_with_check: bool = False
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def live(self) -> bool:
        """True if the run serves or may still come to serve."""
        return self.state in LIVE_STATES

    @property
    def has_supervisor(self) -> bool:
        """True if the supervisor's process is still running."""
        return is_alive(self.pid, self.pid_create_time, self.pid_start)

    @property
    def folder(self) -> Path:
        return runs_directory() / self.run_id

    @property
    def log_file(self) -> Path:
        """The merged log of all ranks and guards."""
        return self.folder / "run.log"

    @property
    def api_key_file(self) -> Path | None:
        """The file with the API's key; None if the API requires none."""
        path = self.folder / "api-key"
        return path if path.is_file() else None

    @property
    def certificate_file(self) -> Path | None:
        """The file with the API's TLS certificate, which is the one to trust; None without TLS."""
        path = self.folder / CERTIFICATE_NAME
        return path if path.is_file() else None

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes, each once."""
        return tuple(dict.fromkeys(rank.node for rank in self.ranks))


def new_run_id(model_name: str) -> str:
    """Return a readable id that no run has yet, such as ``demo-3f9a``."""
    words = re.sub(r"[^a-z0-9]+", "-", model_name.rsplit("/", 1)[-1].lower()).strip("-")
    while True:
        run_id = f"{words[:24].strip('-') or 'run'}-{secrets.token_hex(2)}"
        if not (runs_directory() / run_id).exists():
            return run_id


def save_record(record: RunRecord) -> None:
    """Write the record atomically.

    Raises:
        ValueError: if its id cannot be the name of a folder of its own.
        OSError: if it cannot be written.
    """
    if not is_run_id(record.run_id):
        raise ValueError(f"{record.run_id!r} cannot be the id of a run")
    write_with_reserve(record.folder / "run.json", encode_json(record))


def read_record(folder: Path) -> RunRecord | None:
    """Read the record of a run's folder; None if it is damaged or of another version of k2."""
    try:
        return _checked_record(folder)
    except (OSError, ValueError):
        return None


def _checked_record(folder: Path) -> RunRecord:
    """Read a record whose id, processes and nodes can be used without another check.

    Raises:
        OSError: if the file cannot be read, or is not a regular file of a sensible size.
        ValueError: if it is not the record of a run in this folder.
    """
    if folder.is_symlink():
        raise ValueError("its folder is a symbolic link")
    data = read_regular(folder / "run.json", _LIMIT_BYTES)
    try:
        record = decode_json(data, type=RunRecord)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error
    if record.schema_version != SCHEMA_VERSION:
        raise ValueError("another version of k2 has written it")
    if record.run_id != folder.name or not is_run_id(record.run_id):
        raise ValueError(f"it is the record of another run, {record.run_id[:100]!r}")
    if record.pid < 0:
        raise ValueError(f"{record.pid} cannot be the id of a process")
    if odd := [name for name in record.nodes if not is_node_name(name)]:
        raise ValueError(f"{odd[0][:100]!r} cannot be the name of a node")
    return record


def remaining_processes(record: RunRecord) -> dict[str, list[str]]:
    """Return the command lines of the run's processes, for each node that has any.

    Raises:
        ClusterError: if a node cannot be asked.
    """
    from k2cli.cluster.node_lookup import node_named  # slow to import, and rarely needed
    from k2cli.nodes.node import REACH_SECONDS

    nodes = {name: node_named(name) for name in record.nodes}
    for node in nodes.values():
        node.reach(REACH_SECONDS)
    found = {name: node.processes_of_run(record.run_id) for name, node in nodes.items()}
    return {
        name: [f"{process.pid} {process.command}" for process in processes]
        for name, processes in found.items()
        if processes
    }


def _is_settled(record: RunRecord) -> bool:
    """True if the state in the record is certainly the current one."""
    if record.live:
        return record.has_supervisor
    return record.state != "orphaned"


def _current(record: RunRecord, running: Collection[str] | None) -> RunRecord:
    """Return the record with its current state, which a killed supervisor could not write.

    Args:
        record: the record as read.
        running: the runs with processes on this machine; None to look for those of this run.
    """
    if _is_settled(record):
        return record
    from k2cli.nodes.node import is_this_machine

    again = read_record(record.folder)
    if again is not None and not again.live and again.state != "orphaned":
        return again  # the run ended between the two reads
    looked = running is not None and all(is_this_machine(name) for name in record.nodes)
    try:
        gone = looked and record.run_id not in (running or ())
        remaining = {} if gone else remaining_processes(record)
    except ClusterError as error:
        return replace(record, state="orphaned", cause=f"launcher gone; {error.message}")
    if remaining:
        count = sum(len(processes) for processes in remaining.values())
        cause = f"launcher gone; {count} process(es) remain on {', '.join(remaining)}"
        return replace(record, state="orphaned", cause=cause)
    lost = replace(record, state="lost", cause="the launcher was killed", ended=time.time())
    with deciding(record.folder):
        again = read_record(record.folder)
        if again is not None and _is_settled(again):
            return again  # its supervisor has taken it over meanwhile, or it is over
        remove_leftovers(lost)
        with suppress(OSError):  # a full disk: the next reader finds the same
            save_record(lost)
    from k2cli.cluster.node_lookup import node_named  # slow to import, and rarely needed
    from k2cli.nodes.locks import release_locks

    release_locks([node_named(name) for name in record.nodes], record.run_id)
    return lost


def remove_leftovers(record: RunRecord) -> None:
    """Remove what only a live run needs: its secrets, key, certificate and reserve, and mpirun's
    folder.
    """
    names = ("launch.json", "api-key", CERTIFICATE_NAME, RESERVE_NAME)
    for path in (
        *(record.folder / name for name in names),
        *matching(record.folder, "bootstrap-*.json"),
    ):
        with suppress(OSError):
            path.unlink()
    remove_scratch(record.run_id)


def list_runs(
    on_damaged: Callable[[str, str], None] = lambda run_id, text: None,
) -> list[RunRecord]:
    """Return all recorded runs with their current states, newest first.

    Check runs that are over are removed, and left out.

    Args:
        on_damaged: called with the name of the folder and a line for each record that cannot be
            used and is left out.
    """
    known = []
    for folder in matching(runs_directory(), "*"):
        try:
            known.append(_checked_record(folder))
        except (FileNotFoundError, NotADirectoryError):
            continue  # the folder of a run that was launched on another machine, or a stray file
        except (OSError, ValueError) as error:
            on_damaged(folder.name, f"the record in {str(folder)!r} is left out: {error}")
    known.sort(key=lambda record: record.created, reverse=True)
    # One look at all processes, after the supervisors were seen to be gone.
    unsettled = sum(not _is_settled(record) for record in known)
    running = {run.run_id for run in activity().runs} if unsettled > 1 else None
    found = [_current(record, running) for record in known]
    for record in found:
        if check_run.is_over(record):
            check_run.forget(record)
    return [record for record in found if not check_run.is_over(record)]


def find_run(run_id: str | None = None, *, live: bool = True) -> RunRecord:
    """Return the run with this id or beginning of an id; without an id, the most recent run.

    If several ids begin like this, the only live run among them is meant.

    Args:
        run_id: the argument of the user, or None.
        live: without an id, consider only live runs. False also takes the most recent of several
            that have ended.

    Raises:
        K2Error: if there is no such run, or several ids begin like this.
    """
    damaged: dict[str, str] = {}
    runs = list_runs(damaged.__setitem__)
    if run_id is not None:
        return _by_name(run_id, runs, damaged, live=live)
    candidates = [run for run in runs if run.live] if live else runs
    if candidates:
        return candidates[0]
    if live and runs and runs[0].state == "failed":
        raise K2Error(
            f"no run is live; the last one, {runs[0].run_id}, failed: {runs[0].cause}",
            f"k2 logs {runs[0].run_id}, then k2 launch {runs[0].model} --detach",
        )
    raise K2Error("no run is live" if live else "there is no run yet", _LAUNCH_HINT)


def _by_name(
    run_id: str, runs: list[RunRecord], damaged: dict[str, str], *, live: bool
) -> RunRecord:
    exact = [run for run in runs if run.run_id == run_id]
    begun = exact or [run for run in runs if run_id and run.run_id.startswith(run_id)]
    alive = [run for run in begun if run.live or run.state == "orphaned"]
    if len(begun) == 1 or (begun and not alive and not live):
        return begun[0]
    if len(alive) == 1:
        return alive[0]
    if begun:
        names = ", ".join(run.run_id for run in begun)
        raise K2Error(f"'{run_id}' is the beginning of several runs: {names}", "k2 ps")
    if own := [line for name, line in damaged.items() if run_id and name.startswith(run_id)]:
        raise K2Error(own[0], "remove the folder if no process of the run is left")
    raise K2Error(f"there is no run '{run_id}'", f"k2 ps; or {_LAUNCH_HINT}")


def prune_records() -> None:
    """Remove the folders of all but the most recent ended runs, for ``_PRUNE_SECONDS`` at most."""
    ended = [run for run in list_runs() if not run.live and run.state != "orphaned"]
    until = time.monotonic() + _PRUNE_SECONDS
    for run in ended[KEPT_RECORDS:]:
        if time.monotonic() > until:
            return  # the next launch removes more
        shutil.rmtree(run.folder, ignore_errors=True)
