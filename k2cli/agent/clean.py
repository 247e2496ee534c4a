"""Removal of processes, locks and files that ended runs have left on this machine.

A run is recognised by its id beside ``--k2-run`` on a command line, by its lock or by its folder.
No process is ended because of its program's name, and no run that has neither a lock nor a folder
in this user's state directory is touched: it may belong to another ``K2_STATE_DIR``.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import msgspec

from k2cli.agent.activity import activity
from k2cli.agent.locks import Lock, list_locks, release
from k2cli.agent.run_folder import remove_bootstraps, run_folder
from k2cli.agent.run_processes import count_processes, kill_run, processes_of_run
from k2cli.files import matching
from k2cli.scratch import remove_scratch
from k2cli.settings import is_run_id, runs_directory


class Cleared(msgspec.Struct, frozen=True):
    """Remains of one run. ``remaining`` lists processes that could not be ended."""

    run_id: str
    ended_processes: int = 0
    remaining: tuple[str, ...] = ()
    removed_lock: bool = False
    removed_files: bool = False


class Cleaning(msgspec.Struct, frozen=True):
    """Result for one machine. ``spared`` lists runs that are alive or not known to be ended."""

    cleared: tuple[Cleared, ...] = ()
    spared: tuple[str, ...] = ()


def clean_machine(live: frozenset[str], gone: frozenset[str] = frozenset()) -> Cleaning:
    """Remove the remains of ended runs from this machine.

    Args:
        live: runs that the asking machine has launched and knows to be alive.
        gone: runs that it knows to have ended, even if their locks here are still held.
    """
    folders = {path.name for path in _folders()}
    running = {run.run_id for run in activity().runs}
    # Last: a launch takes its lock before it makes its folder and processes, so that the lock of
    # each that was found above is seen.
    locks = {lock.claim.run_id: lock for lock in list_locks(count_processes)}
    known = set(locks) | folders
    cleared, spared = [], []
    for run_id in sorted(running | known):
        not_ours = run_id not in known or _is_held(locks.get(run_id))
        if run_id in live or (not_ours and run_id not in gone):
            if run_id in running:
                spared.append(run_id)
            continue
        found = _clear(run_id, locks.get(run_id))
        if found is not None:
            cleared.append(found)
    return Cleaning(tuple(cleared), tuple(spared))


def _folders() -> list[Path]:
    found = matching(runs_directory(), "*")
    return [path for path in found if is_run_id(path.name) and not path.is_symlink()]


def _is_held(lock: Lock | None) -> bool:
    return lock is not None and lock.state == "held"


def _clear(run_id: str, lock: Lock | None) -> Cleared | None:
    """End the processes of a run and remove its files and lock; None if there were none."""
    before = processes_of_run(run_id)
    left = kill_run(run_id) if before else []
    files = _remove_files(run_id)
    if lock is not None and not left:
        with suppress(OSError):  # the lock is another user's
            release(run_id)
    if not (before or files or lock):
        return None
    return Cleared(
        run_id,
        len(before) - len(left),
        tuple(f"{process.pid} {process.command}" for process in left),
        lock is not None and not left,
        files,
    )


def _remove_files(run_id: str) -> bool:
    """Remove scratch folders and unread bootstrap files, and the folder of a run without record."""
    folder = run_folder(run_id)
    scratch = remove_scratch(run_id)
    unread = matching(folder, "bootstrap-*.json")
    remove_bootstraps(run_id)
    abandoned = folder.is_dir() and not (folder / "run.json").exists()
    if abandoned:
        shutil.rmtree(folder, ignore_errors=True)
    return bool(scratch or unread or abandoned)
