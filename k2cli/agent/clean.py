"""Clears one machine of what runs that are gone have left: for the agent.

A run is known by its own marks: its id beside ``--k2-run`` on a command line, its lock, its
folder. Nothing is ended by a program's name, nor anything of a run that this user's k2 on this
machine does not know of: such as one with another ``K2_STATE_DIR``.
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
from k2cli.settings import runs_directory, scratch_directories


class Cleared(msgspec.Struct, frozen=True):
    """What was left of one run. ``remaining`` are processes that could not be ended."""

    run_id: str
    ended_processes: int = 0
    remaining: tuple[str, ...] = ()
    removed_lock: bool = False
    removed_files: bool = False


class Cleaning(msgspec.Struct, frozen=True):
    """``spared``: runs that live, or that are not this user's or this k2's to end."""

    cleared: tuple[Cleared, ...] = ()
    spared: tuple[str, ...] = ()


def clean_here(live: frozenset[str], gone: frozenset[str] = frozenset()) -> Cleaning:
    """Clear this machine.

    Args:
        live: runs that the asking machine has launched and knows to live.
        gone: those that it knows to be over, whatever their locks here still say.
    """
    locks = {lock.claim.run_id: lock for lock in list_locks(count_processes)}
    running = {run.run_id for run in activity().runs}
    known = set(locks) | {path.name for path in _folders()}
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
    directory = runs_directory()
    return list(directory.iterdir()) if directory.is_dir() else []


def _is_held(lock: Lock | None) -> bool:
    return lock is not None and lock.state == "held"


def _clear(run_id: str, lock: Lock | None) -> Cleared | None:
    """End and remove what is left of a run; None if nothing is."""
    before = processes_of_run(run_id)
    left = kill_run(run_id) if before else []
    files = _remove_files(run_id)
    if lock is not None and not left:
        with suppress(OSError):  # another user's
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
    """Scratch folders and unread secrets; a record of a run stays, and what belongs to it."""
    folder = run_folder(run_id)
    scratch = any(path.exists() for path in scratch_directories(run_id))
    unread = list(folder.glob("bootstrap-*.json")) if folder.is_dir() else []
    remove_bootstraps(run_id)
    abandoned = folder.is_dir() and not (folder / "run.json").exists()
    if abandoned:
        shutil.rmtree(folder, ignore_errors=True)
    return bool(scratch or unread or abandoned)
