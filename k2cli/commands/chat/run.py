"""The run of ``k2 chat``: a live one, or one that this chat starts here and that ends with it."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from k2cli.commands.target import Target, resolve_target, run_serving, target_of
from k2cli.errors import ClusterError, DoesNotFitError, K2Error
from k2cli.units import one_line

if TYPE_CHECKING:
    from k2cli.runs.record import RunRecord

_DEMO = "demo"
"""The only model that is downloaded without being asked for: 98 MB."""

_POLL_SECONDS = 0.1
_ATTEMPTS = 3
_ENDING_SECONDS = 30.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
_NO_LOCKS_HINT = "set K2_STATE_DIR to a folder on a disk of this machine"
"""Network file systems may have no locks."""


class ChatRuns:
    """Runs that one chat talks to. The leases of those that end with their chats are held."""

    def __init__(self) -> None:
        self._leases = ExitStack()

    def close(self) -> None:
        """Release all leases."""
        self._leases.close()

    def find(self, model: str | None, url: str | None, api_key: str | None) -> Target:
        """Return the server at a URL, the live run that serves a model, or else a new run.

        Raises:
            K2Error: if there is none, and none can be started here.
        """
        if url is not None:
            return resolve_target(model, url, api_key)
        for _ in range(_ATTEMPTS):
            run = self._joined(model, api_key)
            if run is not None:
                return target_of(run, api_key)
        return resolve_target(model, url, api_key)

    def again(self, model: str) -> Target:
        """Return the live run that serves a model now.

        Raises:
            K2Error: if there is none.
        """
        target = resolve_target(model, None, None)
        if target.run is not None and target.run.ends_with_chats:
            self._hold(target.run)
        return target

    def _joined(self, model: str | None, api_key: str | None) -> RunRecord | None:
        """Join the run, and wait until it is ready; None if it ended meanwhile.

        Raises:
            K2Error: if there is none, and none can be started here.
        """
        if model is not None and not _any_live():
            with _one_start_at_a_time():
                if not _any_live():
                    return self._started(model, api_key)
        try:
            run = run_serving(model)
        except K2Error as error:
            if model is None:
                error.hint = f"k2 chat {_DEMO}"
            raise
        if not run.ends_with_chats:
            return run
        if run.state == "stopping" or not self._hold(run):
            _wait_for_end(run)
            return None
        return run if run.state == "ready" else _followed(run)

    def _hold(self, run: RunRecord) -> bool:
        from k2cli.runs.lease import hold

        try:
            lease = hold(run.folder)
        except OSError as error:
            reason = error.strerror or str(error)
            hint = _NO_LOCKS_HINT if error.errno in _NO_LOCKS else "k2 ps"
            raise K2Error(f"run {run.run_id} cannot be joined: {reason}", hint) from error
        if lease is not None:
            self._leases.callback(lease.close)
        return lease is not None

    def _started(self, model: str, api_key: str | None) -> RunRecord:
        """Start a run of a model on this machine alone.

        Raises:
            K2Error: if the model is not here, does not fit, or the run fails.
        """
        from k2cli.commands.launch import DISK_VARIABLE, disk_bytes
        from k2cli.commands.run_start import Following, prepare
        from k2cli.launch.request import LaunchRequest
        from k2cli.supervisor.start import cleanup_on_error, launch_detached
        from k2cli.ui.output import note

        _check_present(model)
        note(f"no run is live: starting {one_line(model)} on this machine")
        request = LaunchRequest(
            model=model,
            api_key=api_key or None,
            ends_with_chats=True,
            prefix_disk_bytes=disk_bytes(os.environ.get(DISK_VARIABLE) or None),
        )
        try:
            prepared = prepare(request).record
        except DoesNotFitError as error:
            name = shlex.quote(model)
            raise DoesNotFitError(
                error.message,
                f"k2 plan-memory {name} says what it needs; over several machines: "
                f"k2 launch {name} --nodes NODE,NODE --detach",
            ) from error
        with cleanup_on_error(prepared, note):
            self._hold(prepared)
            note(
                f"run {prepared.run_id}: it ends with its last chat; "
                "Ctrl-C stops it while it starts"
            )
            with Following(prepared) as following:
                return launch_detached(prepared, following.show, following.interrupted)


def _any_live() -> bool:
    from k2cli.runs.record import list_runs

    return any(run.live for run in list_runs())


def _check_present(model: str) -> None:
    """Check that a model is on this machine; download the demo if it is not.

    Raises:
        K2Error: if another model is not here.
    """
    from k2cli.models.reference import local_checkpoint

    try:
        local_checkpoint(model)
    except K2Error as error:
        if model == _DEMO and error.exit_code == K2Error.exit_code:
            _download(model)
            return
        if error.exit_code == K2Error.exit_code and error.hint == f"k2 download {model}":
            name = shlex.quote(model)
            error.hint = f"k2 download {name}, then k2 chat {name} or k2 launch {name}"
        raise


def _download(model: str) -> None:
    from k2cli.commands.download_events import show_event
    from k2cli.models.sources.download import fetch
    from k2cli.ui.output import note, warn
    from k2cli.ui.progress import ByteProgress

    note(f"no run is live, and {model} is not on this machine: downloading it")
    with ByteProgress() as progress:
        fetched = fetch(model, on_event=lambda event: show_event(event, progress))
    for warning in fetched.warnings:
        warn(warning)


def _followed(run: RunRecord) -> RunRecord | None:
    """Wait until a run that another chat started is ready; None if it was stopped before.

    Raises:
        ClusterError: if it failed.
    """
    from k2cli.commands.run_start import Following
    from k2cli.supervisor.start import follow_start
    from k2cli.ui.output import note

    note(f"run {run.run_id} of another chat is {run.state}")
    with Following(run) as following:
        return follow_start(run, following.show)


def _wait_for_end(run: RunRecord) -> None:
    """Wait until a run that its last chat has left is gone.

    Raises:
        ClusterError: if it takes too long.
    """
    from k2cli.runs.record import read_record
    from k2cli.ui.output import note

    note(f"run {run.run_id} is ending, since its last chat has left")
    until = time.monotonic() + _ENDING_SECONDS
    while (found := read_record(run.folder)) is not None and found.live and found.has_supervisor:
        if time.monotonic() > until:
            raise ClusterError(f"run {run.run_id} does not end", f"k2 stop {run.run_id}")
        time.sleep(_POLL_SECONDS)


@contextmanager
def _one_start_at_a_time() -> Iterator[None]:
    """Hold the lock with which one chat starts a run while others wait for its record.

    Raises:
        K2Error: if the folder of k2's state cannot be written, or has no locks.
    """
    from k2cli.files import open_regular, unwritable
    from k2cli.settings import state_directory

    path = state_directory() / "chat-start.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT, mode=0o600)
    except OSError as error:
        raise unwritable(error, path) from error
    try:
        while not _is_locked(descriptor, path) and not _any_live():
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise K2Error(f"'{path}' cannot be locked: {error.strerror}", _NO_LOCKS_HINT) from error
    return True
