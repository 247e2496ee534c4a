"""A trial of one fault: cause it in a run, watch the run, and measure the times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from lab.errors import LabError
from lab.faults import Fault
from lab.home import HOME
from lab.laboratory import Host, Lab
from lab.namespaces import mount_points
from lab.runs import LEADER, LabRun, wait_for

SEEN_SECONDS = 15.0
# Time that the watcher goes on after that, to measure the delay.
_PATIENCE_SECONDS = 60.0
_GONE_SECONDS = 30.0
_KILLED = (137, -9)
# A host may keep only the record and the log of a run, and only if it launched the run.
_LEFT = [
    *("find", "/dev/shm", "/tmp", "-mindepth", "1", "-maxdepth", "1"),
    *("(", "-name", "k2-*", "-o", "-name", "ompi*", "-o", "-name", "prte*", ")"),
    *("-not", "-name", "k2-ssh-*", "-type", "d"),
]
_LOCKS = "/var/tmp/k2-locks"
_LEFT_IN_STATE = [
    *("(", "-name", "bootstrap*", "-o", "-name", "launch.json", "-o", "-name", "api-key"),
    *("-o", "-name", "*.lock", ")", "-type", "f"),
]


@dataclass
class Outcome:
    """Result of one trial. Times are in seconds since the fault; None: not within the limit.

    ``gone_seconds`` by host; where the hosts did not reach each other, the second host's counts
    from the fault too, and is measured while it is cut off. ``commit`` is the code's, and
    ``measured_at`` the local time as ``2026-11-23 13:05``.
    """

    fault: str
    backend: str
    strategy: str
    commit: str = ""
    measured_at: str = ""
    exit_status: int | None = None
    seen_seconds: float | None = None
    gone_seconds: dict[str, float | None] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    client: str = ""
    said: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True if everything was as the table requires."""
        return not self.problems


def try_fault(lab: Lab, fault: Fault, model: Path, backend: str, strategy: str) -> Outcome:
    """Launch a run, cause the fault, watch, repair, and look for leftovers."""
    outcome = Outcome(fault.name, backend, strategy)
    with cleared(lab, outcome, locks=not fault.detach, mend=fault.mend):
        if fault.stage == "before":
            fault.act(lab, None)
        began = time.monotonic()
        run = LabRun(lab, model, backend, strategy, detach=fault.detach)
        if fault.stage != "before":
            run.wait_stage(fault.stage)
            if fault.detach:
                run.talk.wait_end(30)
            began = time.monotonic()
            fault.act(lab, run)
        _watch(lab, run, fault, outcome, began)
    return outcome


@contextmanager
def cleared(
    lab: Lab,
    outcome: Outcome,
    *,
    locks: bool = True,
    mend: Callable[[Lab], None] | None = None,
) -> Iterator[None]:
    """Repair the lab after a trial, record leftovers, and make the hosts new again.

    Args:
        lab: the lab.
        outcome: receives the problems, also the error of a trial that could not be run.
        locks: True if a lock that is left is a problem too.
        mend: function that repairs what ``Lab.mend`` does not.
    """
    try:
        yield
    except LabError as error:
        outcome.problems.append(error.message)
    finally:
        if mend is not None:
            mend(lab)
        lab.link.set()
        lab.link.up()
        lab.start_sshd()
        _look_for_leftovers(lab, outcome, locks=locks)
        lab.renew()


def note_when_gone(lab: Lab, outcome: Outcome, began: float) -> None:
    """Wait until no process of a run is left on any host; record the seconds since ``began``."""
    waiting = {host.name for host in lab.hosts}

    def look() -> bool:
        _note_gone(lab, outcome, waiting, began)
        return not waiting

    wait_for(look, _PATIENCE_SECONDS)
    outcome.gone_seconds.update(dict.fromkeys(waiting))


def _note_gone(lab: Lab, outcome: Outcome, waiting: set[str], began: float) -> None:
    now = time.monotonic() - began
    for name in sorted(waiting):
        # On k2a the launcher is the last process to end.
        if not [p for p in lab.processes(name) if not _is_other(p.command)]:
            outcome.gone_seconds[name] = now
            waiting.discard(name)


def _watch(lab: Lab, run: LabRun, fault: Fault, outcome: Outcome, began: float) -> None:
    talk = run.talk
    waiting = {host.name for host in lab.hosts}
    states: list[str] = []

    def look() -> bool:
        _note_gone(lab, outcome, waiting, began)
        if outcome.seen_seconds is None:
            _look_at_user(run, fault, outcome, began, states)
        return not waiting and (talk.ended_at is not None) and outcome.seen_seconds is not None

    wait_for(look, _PATIENCE_SECONDS)
    outcome.gone_seconds.update(dict.fromkeys(waiting))
    outcome.exit_status = talk.wait_end(1)
    outcome.said = _told(fault, talk.text, outcome.exit_status, states)
    if run.client is not None:
        run.client.wait_end(5)
        outcome.client = run.client.lines[-1][1] if run.client.lines else ""
    later = [line for at, line in talk.lines if at >= began]
    _judge(fault, "\n".join(later), outcome)


def _is_other(command: str) -> bool:
    """Return True for processes outside the run: a client, ``k2 ps``, the holder of a port."""
    return "client.py" in command or " ps --json" in command or "create_server" in command


def _look_at_user(
    run: LabRun, fault: Fault, outcome: Outcome, began: float, states: list[str]
) -> None:
    """Record when the user first sees the cause: on the terminal, or in ``k2 ps`` if detached."""
    if fault.detach:
        states.append(run.state())
        if states[-1] in fault.states:
            outcome.seen_seconds = time.monotonic() - began
        return
    later = [
        (at, line)
        for at, line in list(run.talk.lines)
        if at >= began and (not fault.says or any(words in line for words in fault.says))
    ]
    if later and fault.says:
        outcome.seen_seconds = later[0][0] - began
    elif run.talk.ended_at is not None:
        outcome.seen_seconds = run.talk.ended_at - began


def _told(fault: Fault, text: str, status: int | None, states: list[str]) -> str:
    if fault.detach:
        return f"k2 ps: {states[-1]}" if states else ""
    return "" if status in _KILLED else _last_words(text, fault.says)


def _last_words(text: str, says: tuple[str, ...]) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    told = errors or [line for line in lines if any(words in line for words in says)] or lines
    return told[-1] if told else ""


def _judge(fault: Fault, text: str, outcome: Outcome) -> None:
    problems = outcome.problems
    if outcome.exit_status not in fault.exits:
        problems.append(f"exit {outcome.exit_status}, expected {fault.exits}")
    if outcome.seen_seconds is None or outcome.seen_seconds > SEEN_SECONDS:
        problems.append(f"the user saw it after {outcome.seen_seconds} s")
    if fault.says and not any(words in text for words in fault.says):
        problems.append(f"none of {fault.says} was said: {outcome.said}")
    if "Traceback" in outcome.said:
        problems.append("a traceback was shown")


def _look_for_leftovers(lab: Lab, outcome: Outcome, *, locks: bool) -> None:
    """Record processes, secrets and locks that are left after the link is repaired."""
    hosts = [*lab.hosts, lab.console]

    def empty() -> bool:
        return not any(
            not _is_other(found.command) for host in hosts for found in lab.processes(host.name)
        )

    if not wait_for(empty, _GONE_SECONDS):
        for host in hosts:
            outcome.left += [f"{host.name}: {p.command[:100]}" for p in lab.processes(host.name)]
        outcome.problems.append(f"left: {outcome.left}")
    if outcome.exit_status in _KILLED:
        # The launcher was killed before it cleaned up; the next command cleans up instead.
        with suppress(OSError):
            lab.exec(LEADER, ["python", "-m", "k2cli", "ps"])
    for host in hosts:
        found = _scratch(lab, host)
        state = f"{HOME}/.local/state/k2"
        found += lab.exec(host.name, ["find", state, *_LEFT_IN_STATE]).stdout.split()
        if outcome.exit_status not in _KILLED and locks:
            # The lock of a killed launcher stays until the next launch finds it stale.
            found += lab.exec(host.name, ["find", _LOCKS, "-name", "*.json"]).stdout.split()
        if found:
            outcome.left += [f"{host.name}:{path}" for path in found]
            outcome.problems.append(f"files left on {host.name}: {' '.join(found)}")


def _scratch(lab: Lab, host: Host) -> list[str]:
    """Return folders of runs in /dev/shm and /tmp, without mounts from outside."""
    mounted = mount_points(host.state)
    return [
        path
        for path in lab.exec(host.name, _LEFT).stdout.split()
        if not any(point == path or point.startswith(f"{path}/") for point in mounted)
    ]
