"""Has the processes of a launch start while the launch is still being planned.

What takes the time of a start is Python importing modules: in the command, the supervisor, the
guards and the ranks, one after the other. For ``launch --detach`` on this machine alone the
supervisor is therefore started first, and guards and ranks by it. They are on standby: they know
the run's id, so that whoever looks for processes of a run finds them, and nothing else; they hold
no memory of a model, no port and no lock. The command gives the sign, one byte through a pipe, once
the run is prepared; if the pipe is closed instead, by a failed launch or a killed one, all end.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from k2cli.cluster.launch_request import LaunchRequest
from k2cli.cluster.nodes import is_this_machine, python_environment
from k2cli.cluster.run_id import new_run_id
from k2cli.settings import runs_directory

_END_SECONDS = 5.0


class Standby:
    """A supervisor on standby, or none.

    Attributes:
        run_id: of the run that it is for; None if there is none.
    """

    def __init__(self, run_id: str | None, process: subprocess.Popen[bytes] | None) -> None:
        self.run_id = run_id
        self._process = process

    def take(self) -> subprocess.Popen[bytes] | None:
        """Give the sign; returns the supervisor that carries out the run from here on.

        None if there is none, or if it has ended by now.
        """
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin is not None
        try:
            process.stdin.write(b"\n")
            process.stdin.close()
        except OSError:
            process.wait()
            return None
        return process

    def end(self) -> None:
        """Let it end, if it was not taken."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            # Its guards end when its end of their pipes is gone.
            process.kill()
            process.wait()


@contextmanager
def standing_by(request: LaunchRequest, *, detach: bool) -> Iterator[Standby]:
    """A supervisor on standby for as long as the context lasts, where the launch can use one."""
    standby = _start(request) if detach and _suits(request) else Standby(None, None)
    try:
        yield standby
    finally:
        standby.end()


def _suits(request: LaunchRequest) -> bool:
    """Whether every rank will be here, on a transport that asks nothing of its environment."""
    nodes = request.nodes or ()
    decided = request.transport in ("local", "ring") or (
        request.transport == "auto" and len(nodes) < 2
    )
    elsewhere = request.cluster is not None or request.plan_file is not None
    return (
        decided
        and not elsewhere
        and not request.fast_synch
        # Whoever waits for a machine must not use it meanwhile.
        and request.wait_seconds == 0
        and all(is_this_machine(name) for name in nodes)
    )


def _start(request: LaunchRequest) -> Standby:
    run_id = new_run_id(request.model.rstrip("/"))
    size = len(request.nodes or ("this machine",))
    return Standby(run_id, start_supervisor(runs_directory() / run_id, standby_size=size))


def start_supervisor(
    folder: Path, *, log: Path | None = None, standby_size: int = 0
) -> subprocess.Popen[bytes]:
    """Start the supervisor of a run as a process that outlives this one.

    Args:
        folder: the run's.
        log: where it writes; on standby it opens its own.
        standby_size: how many ranks it has stand by; 0 if the run is prepared already.
    """
    options = [f"--standby={standby_size}"] if standby_size else []
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("ab")) if log is not None else subprocess.DEVNULL
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "k2cli.cluster.supervisor", *options, str(folder)],
            stdin=subprocess.PIPE if standby_size else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
            env=python_environment(),
        )
