"""A real ``k2 launch`` in the lab, from k2a over k2a and k2b, with its processes and stages."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lab.errors import LabError
from lab.home import login_path
from lab.laboratory import Lab
from lab.namespaces import LabProcess

_CLIENT = Path(__file__).with_name("client.py")
_POLL_SECONDS = 0.02
LEADER, FOLLOWER = "k2a", "k2b"
_HOST_OF_RANK = (LEADER, FOLLOWER)
# Debian's Open MPI before the wheel's.
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll a condition; return True if it holds within the time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _is_python(command: str) -> bool:
    return Path(command.split()[0]).name.startswith("python")


class Talk:
    """A process on a host, and its output with the time of each line."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.lines: list[tuple[float, str]] = []
        self.ended_at: float | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for raw in output:
                self.lines.append((time.monotonic(), raw.decode(errors="replace").rstrip()))
        self.process.wait()
        self.ended_at = time.monotonic()

    @property
    def text(self) -> str:
        """The whole output so far."""
        return "\n".join(line for _, line in list(self.lines))

    def times_said(self, words: str, since: float = 0.0) -> list[float]:
        """Return the times of output lines with these words, from a monotonic time on."""
        return [at for at, line in list(self.lines) if at >= since and words in line]

    def said(self, words: str) -> bool:
        """Return True if a line contains these words."""
        return bool(self.times_said(words))

    def wait_said(self, words: str, seconds: float, *, times: int = 1, since: float = 0.0) -> float:
        """Wait until ``times`` lines contain these words; return the time of the last of them.

        Raises:
            LabError: if they do not come within the time, or before the process ends.
        """

        def said() -> bool:
            return len(self.times_said(words, since)) >= times

        if not wait_for(lambda: said() or self.ended_at is not None, seconds) or not said():
            raise LabError(f"'{words}' was not printed within {seconds:.0f} s: {self.text[-2000:]}")
        return self.times_said(words, since)[times - 1]

    def wait_end(self, seconds: float) -> int | None:
        """Wait for the end; return the exit status, or None if the process is still running."""
        wait_for(lambda: self.ended_at is not None, seconds)
        return self.process.returncode if self.ended_at is not None else None

    def close(self) -> None:
        """Wait for the end of the process; ``Lab.end_processes`` ends what still runs."""
        self._reader.join(10)


class LabRun:
    """One launch.

    Args:
        lab: the lab.
        model: folder of a checkpoint, visible on all hosts.
        backend: ``ring``, ``mpi4`` (Debian's Open MPI) or ``mpi5`` (the wheel's).
        strategy: ``pipeline`` or ``tensor``.
        detach: launch with ``--detach``.
        nodes: a node per rank, as the user names them.
        host: host from which it is launched.
        port: port of the API on the leader's host.
        options: further options of ``k2 launch``.
    """

    def __init__(
        self,
        lab: Lab,
        model: Path,
        backend: str,
        strategy: str,
        *,
        detach: bool = False,
        nodes: str = "k2a,k2b",
        host: str = LEADER,
        port: int = 8080,
        options: Sequence[str] = (),
    ) -> None:
        self.lab = lab
        self.backend = backend
        kind = "mpi" if backend.startswith("mpi") else backend
        command = [sys.executable, "-m", "k2cli", "launch", str(model), "--nodes", nodes]
        command += ["--backend", kind, "--parallel", strategy, "--port", str(port)]
        command += ["--context", "4096", "--concurrency", "1"]
        if "--link-check" not in options:  # it would compute a prompt of that length twice
            command += ["--link-check", "never"]
        command += options
        if detach:
            command.append("--detach")
        settings = {"PATH": _SYSTEM_PATH} if backend == "mpi4" else {}
        for found in lab.hosts:
            # Both versions on every host: the same one must be first on the PATH of all.
            login_path(found.folder, Path(sys.executable).parent if backend == "mpi5" else None)
        self.talk = Talk(lab.start(host, command, settings))
        self.client: Talk | None = None

    # --- its processes --------------------------------------------------------------------------

    def _find(self, host: str, test: Callable[[str], bool], what: str) -> LabProcess:
        until = time.monotonic() + 5.0
        while True:
            for found in self.lab.processes(host):
                if test(found.command):
                    return found
            if time.monotonic() > until:
                raise LabError(f"there is no {what} on {host}")
            time.sleep(_POLL_SECONDS)

    def pid(self, who: str) -> int:
        """Return the pid, seen from outside, of ``launcher``, ``guard-0``, ``mpirun``, ..."""
        kind, _, number = who.partition("-")
        if kind in ("guard", "rank"):
            module = "k2cli.guard.main" if kind == "guard" else "k2cli.rank.main"
            host = _HOST_OF_RANK[int(number)]
            # The command line of mpirun and its daemons contains those of their children.
            return self._find(host, lambda line: module in line and _is_python(line), who).pid
        tests: dict[str, Callable[[str], bool]] = {
            "launcher": lambda line: "-m k2cli launch" in line and "nsenter" not in line,
            "supervisor": lambda line: "k2cli.supervisor.supervisor" in line,
            "mpirun": lambda line: line.split()[0].endswith(("mpirun", "prterun")),
        }
        return self._find(LEADER, tests[kind], who).pid

    def kill(self, who: str, number: signal.Signals) -> None:
        """Send a signal to one of the run's processes."""
        os.kill(self.pid(who), number)

    # --- its stages -----------------------------------------------------------------------------

    def wait_stage(self, stage: str) -> None:
        """Wait for a stage: ``started``, ``initialising``, ``loading``, ``ready``, or ``prefill``
        or ``decode`` of a request.

        Raises:
            LabError: if the run does not reach the stage.
        """
        match stage:
            case "started":
                self.talk.wait_said("run ", 60)
            case "initialising" | "loading":
                self.talk.wait_said(f"rank 1 on {FOLLOWER}: {stage}", 60)
            case "ready":
                self.wait_ready()
            case "prefill":
                self.wait_ready()
                self.ask(words=3000, most=8)
                time.sleep(0.3)
            case "decode":
                self.wait_ready()
                self.ask(words=4, most=4000).wait_said("first", 30)

    def wait_ready(self, times: int = 1) -> None:
        """Wait until the launcher has printed ``times`` times that the API is ready.

        Raises:
            LabError: if it does not print that within the time.
        """
        self.talk.wait_said("ready: ", 90, times=times)

    def ask(self, words: int, most: int, port: int = 8080) -> Talk:
        """Start a streamed request from k2a."""
        command = [sys.executable, "-I", str(_CLIENT), str(port), str(words), str(most)]
        self.client = Talk(self.lab.start(LEADER, command))
        return self.client

    def state(self) -> str:
        """Return the state of the run in ``k2 ps`` on k2a."""
        import json

        command = [sys.executable, "-m", "k2cli", "ps", "--json"]
        with contextlib.suppress(ValueError, KeyError, IndexError, subprocess.TimeoutExpired):
            answer = json.loads(self.lab.exec(LEADER, command, timeout_seconds=30).stdout)
            return str(answer["runs"][0]["state"])
        return "unknown"

    def wait_gone(self, seconds: float) -> bool:
        """Wait; return True if no process is left on any host within the time."""
        return wait_for(
            lambda: not any(self.lab.process_count(host.name) for host in self.lab.hosts), seconds
        )

    def close(self) -> None:
        """End the processes that are left."""
        self.lab.end_processes()
        for talk in filter(None, (self.talk, self.client)):
            talk.close()
