"""The table of faults: the fault, the stage of the run at which it happens, and the error expected.

The tests run a selection of it, and ``lab.reliability`` all of it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lab.errors import LabError
from lab.home import HOME, make_key
from lab.laboratory import Lab
from lab.namespaces import listens
from lab.runs import FOLLOWER, LEADER, LabRun, wait_for
from lab.sshd import end_sshd
from lab.state import ROOT

STATE = f"{HOME}/.local/state"
ALL = ("ring", "mpi4", "mpi5")
MPI = ("mpi4", "mpi5")
_PORT_HOLDER = "import socket, time; s = socket.create_server(('', 8080)); time.sleep(600)"


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the table.

    Attributes:
        name: used by ``scripts/lab fault``, the tests and the table.
        what: description for the table.
        stage: stage of the run at which the fault happens, see ``LabRun.wait_stage``; ``before``
            means before the launch.
        act: function that causes the fault; its run is None if ``stage`` is ``before``.
        mend: function that repairs what ``Lab.mend`` does not.
        exits: accepted exit statuses of ``k2 launch``.
        says: strings of which its output must contain at least one.
        backends: transports for which the fault makes sense.
        detach: launch with ``--detach``, and watch the run with ``k2 ps``.
        unreachable: the hosts do not reach each other until the link is repaired.
    """

    name: str
    what: str
    stage: str
    act: Callable[[Lab, LabRun | None], None]
    exits: tuple[int, ...] = (5,)
    says: tuple[str, ...] = ()
    mend: Callable[[Lab], None] | None = None
    backends: tuple[str, ...] = ALL
    detach: bool = False
    unreachable: bool = False
    states: tuple[str, ...] = field(default=("failed", "lost", "stopped"))


Act = Callable[[Lab, LabRun | None], None]


# --- actions --------------------------------------------------------------------------------------


def _kill(who: str, number: signal.Signals) -> Act:
    def act(lab: Lab, run: LabRun | None) -> None:
        assert run is not None
        run.kill(who, number)

    return act


def _interrupt_twice(lab: Lab, run: LabRun | None) -> None:
    assert run is not None
    run.kill("launcher", signal.SIGINT)
    if not wait_for(lambda: run.talk.said("again") or run.talk.ended_at is not None, 5):
        raise LabError("Ctrl-C was not answered within 5 s")
    if run.talk.ended_at is not None:
        return  # the launcher had nothing to wait for
    run.kill("launcher", signal.SIGINT)


def _link_down(lab: Lab, run: LabRun | None) -> None:
    lab.link_down()


def _silence(lab: Lab, run: LabRun | None) -> None:
    lab.link.set(silent=True)


def _end_sshd(lab: Lab, run: LabRun | None) -> None:
    end_sshd(lab.host(FOLLOWER).state)


def _fill_disk(lab: Lab, run: LabRun | None) -> None:
    """Mount a full file system at the folder of k2's runs."""
    lab.exec(FOLLOWER, ["mkdir", "-p", STATE])
    lab.exec(FOLLOWER, ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", STATE])
    lab.exec(FOLLOWER, ["dd", "if=/dev/zero", f"of={STATE}/full", "bs=4k"])


def _free_disk(lab: Lab) -> None:
    lab.exec(FOLLOWER, ["umount", "-l", STATE])


def _cover(host: str, pairs: list[tuple[str, str]]) -> Act:
    def act(lab: Lab, run: LabRun | None) -> None:
        for source, target in pairs:
            lab.exec(host, ["mount", "--bind", source, target])

    return act


def _uncover(host: str, targets: list[str]) -> Callable[[Lab], None]:
    def mend(lab: Lab) -> None:
        for target in targets:
            lab.exec(host, ["umount", "-l", target])

    return mend


def _metadata_of_mlx() -> str:
    from importlib.metadata import distribution

    return str(distribution("mlx").locate_file(f"mlx-{distribution('mlx').version}.dist-info"))


def _older_mlx(lab: Lab, run: LabRun | None) -> None:
    path = Path(_metadata_of_mlx()) / "METADATA"
    changed = lab.host(FOLLOWER).home / "METADATA"
    lines = path.read_text().splitlines(keepends=True)
    old = ["Version: 0.31.0\n" if line.startswith("Version:") else line for line in lines]
    changed.write_text("".join(old))
    lab.exec(FOLLOWER, ["mount", "--bind", f"{HOME}/METADATA", str(path)])


def _mend_mlx(lab: Lab) -> None:
    lab.exec(FOLLOWER, ["umount", "-l", f"{_metadata_of_mlx()}/METADATA"])


def _change_host_key(lab: Lab, run: LabRun | None) -> None:
    folder = lab.host(FOLLOWER).folder / "ssh"
    for name in ("host_key", "host_key.pub"):
        (folder / name).rename(folder / f"{name}.old")
    make_key(folder / "host_key", "another")
    end_sshd(lab.host(FOLLOWER).state)
    lab.start_sshd(FOLLOWER)


def _old_host_key(lab: Lab) -> None:
    folder = lab.host(FOLLOWER).folder / "ssh"
    for name in ("host_key", "host_key.pub"):
        (folder / f"{name}.old").rename(folder / name)
    end_sshd(lab.host(FOLLOWER).state)
    lab.start_sshd(FOLLOWER)


def _take_port(lab: Lab, run: LabRun | None) -> None:
    lab.start_background(LEADER, [sys.executable, "-c", _PORT_HOLDER])
    wait_for(lambda: listens(lab.host(LEADER).state, 8080), 10)


def _mpiruns() -> list[str]:
    found = [Path(sys.executable).parent / "mpirun", Path("/usr/bin/mpirun")]
    return [str(path.resolve()) for path in found if path.exists()]


def _hide_mpirun(lab: Lab, run: LabRun | None) -> None:
    for path in _mpiruns():
        lab.exec(LEADER, ["mount", "--bind", "/dev/null", path])


# --- the table ----------------------------------------------------------------------------------


def _signals() -> list[Fault]:
    rows = [
        Fault("launcher-kill", "SIGKILL of `k2 launch`", "ready",
              _kill("launcher", signal.SIGKILL), (137, -9)),
        Fault("supervisor-kill", "SIGKILL of the supervisor", "ready",
              _kill("supervisor", signal.SIGKILL), (0,), detach=True),
        Fault("mpirun-kill", "SIGKILL of mpirun", "ready", _kill("mpirun", signal.SIGKILL),
              says=("mpirun was killed",), backends=MPI),
    ]  # fmt: skip
    for number, (host, node) in enumerate(((LEADER, "localhost"), (FOLLOWER, FOLLOWER))):
        says = (f"rank {number} on {node} failed",)
        rows.append(
            Fault(f"guard-{number}-kill", f"SIGKILL of {host}'s guard", "ready",
                  _kill(f"guard-{number}", signal.SIGKILL), says=says)
        )  # fmt: skip
        for name in ("SIGKILL", "SIGSTOP"):
            for stage in ("initialising", "ready"):
                where = " during group initialisation" if stage == "initialising" else ""
                short = f"rank-{number}-{name[3:].lower()}{'-early' if where else ''}"
                act = _kill(f"rank-{number}", signal.Signals[name])
                rows.append(Fault(short, f"{name} of {host}'s rank{where}", stage, act, says=says))
    return rows


def _links() -> list[Fault]:
    says = ("rank 1 on k2b failed",)
    rows = [
        Fault("sshd-kill", "sshd of k2b and its sessions killed", "ready", _end_sshd,
              says=says),
    ]  # fmt: skip
    for stage in ("loading", "prefill", "decode"):
        rows.append(
            Fault(f"link-down-{stage}", f"link down during {stage}", stage, _link_down,
                  says=says, unreachable=True)
        )  # fmt: skip
    rows.append(
        Fault("link-silent", "link that loses everything silently, during decode", "decode",
              _silence, says=says, unreachable=True)
    )  # fmt: skip
    return rows


def _before() -> list[Fault]:
    return [
        Fault("disk-full", "k2b's disk is full", "before", _fill_disk,
              says=("disk", "No space left"), mend=_free_disk),
        Fault("mlx-version", "another mlx version on k2b", "before", _older_mlx,
              says=("0.31.0",), mend=_mend_mlx),
        Fault("k2-missing", "no k2 on k2b", "before",
              _cover(FOLLOWER, [("/run/lock", str(ROOT / "k2cli"))]),
              says=("k2 is not installed on node k2b", "No module named"),
              mend=_uncover(FOLLOWER, [str(ROOT / "k2cli")])),
        Fault("host-key", "k2b's host key has changed", "before", _change_host_key,
              exits=(5,), says=("host key",), mend=_old_host_key),
        Fault("port-taken", "the API's port is taken", "before", _take_port, exits=(1, 5),
              says=("port 8080",)),
        Fault("mpirun-missing", "no mpirun", "before", _hide_mpirun, exits=(5,),
              says=("mpirun",), backends=("mpi4",),
              mend=_uncover(LEADER, _mpiruns())),
    ]  # fmt: skip


def _terminal() -> list[Fault]:
    rows = []
    for stage in ("started", "initialising", "loading", "ready", "prefill", "decode"):
        once = _kill("launcher", signal.SIGINT)
        where = f"during {stage}" if stage != "ready" else "when ready"
        rows += [
            Fault(f"ctrl-c-{stage}", f"Ctrl-C {where}", stage, once, exits=(130,),
                  says=("topping",)),
            Fault(f"ctrl-c-twice-{stage}", f"Ctrl-C twice {where}", stage, _interrupt_twice,
                  exits=(130,), says=("topping",)),
        ]  # fmt: skip
    rows.append(
        Fault("hangup", "the terminal is closed (SIGHUP)", "ready",
              _kill("launcher", signal.SIGHUP), exits=(0, 5, 129, 130))
    )  # fmt: skip
    return rows


FAULTS: tuple[Fault, ...] = (*_signals(), *_links(), *_before(), *_terminal())

# Faults for ``scripts/lab fault``: they need no run, and last until they are repaired.
CONDITIONS: dict[str, Fault] = {
    **{fault.name: fault for fault in FAULTS if fault.stage == "before"},
    **{fault.name.removesuffix("-decode"): fault for fault in FAULTS
       if fault.act in (_end_sshd, _link_down, _silence)},
}  # fmt: skip


def mend_condition(lab: Lab, fault: Fault) -> None:
    """Repair the fault of a condition."""
    if fault.mend is not None:
        fault.mend(lab)
    lab.mend()


def fault_named(name: str) -> Fault:
    """Return the fault with this name.

    Raises:
        KeyError: if there is no such fault.
    """
    return {fault.name: fault for fault in FAULTS}[name]
