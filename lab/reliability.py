"""Run the table of faults and write docs/measurements/reliability.md (``-m lab.reliability``).

The outcome of each trial is appended to a file of JSON lines at once, so that a table can be made
from several sessions; a later trial of a row replaces an earlier one. The table marks rows that
were not run, and has no figures from other sources.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec

from lab.errors import LabError
from lab.faults import ALL, FAULTS, Fault
from lab.laboratory import Lab
from lab.state import ROOT
from lab.stories import STORIES, Story, try_story
from lab.trial import SEEN_SECONDS, Outcome, try_fault

Row = Fault | Story
ROWS: tuple[Row, ...] = (*FAULTS, *STORIES)
STRATEGIES = ("pipeline", "tensor")
_NAMES = {"ring": "ring", "mpi4": "Open MPI 4.1", "mpi5": "Open MPI 5.0"}
_HEAD = """\
# Reliability

This page shows what happens when something breaks while k2 runs a model over two machines. It was
measured by `python -m lab.reliability` in the two-host lab (`scripts/lab`). The lab's hosts are two
sets of Linux namespaces on one machine, each with its own sshd, home, processes and address. Runs
are launched from the first host over the system's `ssh`, with real ranks that run a toy of Kimi K2
on MLX's CPU device. No Mac was used.

Each row is one trial: `k2 launch` on the host `k2a` with the nodes `k2a,k2b`, then the fault at the
stage that the row names. The columns are:

- **seen**: seconds from the fault until the cause is on the user's terminal, or in `k2 ps` if the
  run was detached (it is asked in a loop; each call takes a third of a second);
- **exit**: the exit status of `k2 launch`;
- **gone**: seconds until no process of the run was left on each host, counted by PID namespace.
  After a cut link each host is counted while it is cut off;
- **told**: the error that the user saw;
- **result**: *ok* if the exit status and the error were correct, the user saw the error within
  {limit:.0f} s, and no process, secret or lock was left once the hosts reached each other again.

The last rows are two longer stories. In one, a second user on a third machine launches on nodes
that another run uses (*seen*: until that launch names the other run; *exit*: of that launch;
*gone*: after `k2 stop`). In the other, a run starts again twice on its port and answers there,
before it is given up (*seen*: the longest of three; *gone*: after the last).

{machine}
"""


def _machine(load: str, run: Sequence[Outcome]) -> str:
    cores = os.cpu_count() or 1
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    days = sorted({outcome.measured_at[:10] for outcome in run} - {""})
    when = " and ".join(days) or "a day not noted"
    text = (
        f"Measured on {when} on a virtual machine with {cores} cores ({model}), Linux "
        f"{platform.release().split('-')[0]}, Python {platform.python_version()}; {load}. Times on "
        "an idle machine are shorter; the deadlines (8 s without a sign of life) are the defaults. "
        f"{_versions(run)}"
    )
    return textwrap.fill(text, 100, break_on_hyphens=False)


def _versions(run: Sequence[Outcome]) -> str:
    """Describe the commits that the rows were measured at."""
    counts = Counter(outcome.commit for outcome in run)
    parts = []
    for commit, count in counts.items():
        times = sorted(o.measured_at[11:] for o in run if o.commit == commit)
        parts.append(f"{count} of {commit or 'a state not noted'} ({times[0]} to {times[-1]})")
    return f"Rows by the commit that was tried: {', '.join(parts)}." if parts else ""


# --- outcomes -----------------------------------------------------------------------------------


def read_outcomes(path: Path) -> list[Outcome]:
    """Read the latest outcome of each row that was tried."""
    if not path.is_file():
        return []
    found = [msgspec.json.decode(line, type=Outcome) for line in path.read_bytes().splitlines()]
    return list({(o.fault, o.backend, o.strategy): o for o in found}.values())


def _keep(path: Path, outcome: Outcome) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(asdict(outcome)) + b"\n")


# --- the document -------------------------------------------------------------------------------


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


def _gone(outcome: Outcome) -> str:
    times = [_seconds(outcome.gone_seconds.get(host)) for host in ("k2a", "k2b")]
    return " / ".join(times)


def _row(fault: Row, backend: str, strategy: str, outcome: Outcome | None) -> str:
    start = f"| {fault.what} | {_NAMES[backend]} | {strategy} |"
    if outcome is None:
        return f"{start} | | | | not run |"
    result = "ok" if outcome.passed else f"**{'; '.join(outcome.problems)[:160]}**"
    told = outcome.said.removeprefix("error: ").replace(f"{Path(sys.executable).parent}/", "")
    told = told[:110].replace("|", "/")
    seen = _seconds(outcome.seen_seconds)
    return f"{start} {seen} | {outcome.exit_status} | {_gone(outcome)} | {told} | {result} |"


def _count(run: Sequence[Outcome], rows: int) -> str:
    return f"{len(run)} of {rows} rows were run, {sum(o.passed for o in run)} of them ok."


def _longest(run: Sequence[Outcome]) -> str:
    """Describe the median and the longest times of the rows that passed."""
    seen = sorted(o.seen_seconds for o in run if o.passed and o.seen_seconds is not None)
    gone = sorted(
        seconds
        for o in run
        for seconds in o.gone_seconds.values()
        if o.passed and seconds is not None
    )
    if not seen or not gone:
        return ""
    return (
        f"In these the user saw the cause after {statistics.median(seen):.1f} s (median) to "
        f"{seen[-1]:.1f} s, and a host was free of the run after {statistics.median(gone):.1f} s "
        f"to {gone[-1]:.1f} s."
    )


def document(outcomes: Sequence[Outcome], load: str) -> str:
    """Return the text of docs/measurements/reliability.md."""
    known = {(o.fault, o.backend, o.strategy): o for o in outcomes}
    rows = [
        (fault, backend, strategy, known.get((fault.name, backend, strategy)))
        for fault in ROWS
        for backend in ALL
        if backend in fault.backends
        for strategy in STRATEGIES
    ]
    run = [outcome for *_, outcome in rows if outcome is not None]
    lines = [_HEAD.format(limit=SEEN_SECONDS, machine=_machine(load, run))]
    lines.append(textwrap.fill(f"{_count(run, len(rows))} {_longest(run)}", 100) + "\n")
    lines.append("| fault | transport | placement | seen | exit | gone k2a / k2b | told | result |")
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    lines += [_row(*row) for row in rows]
    return "\n".join(lines) + "\n"


# --- the command --------------------------------------------------------------------------------


def _model(lab: Lab) -> Path:
    from lab.toy_k2.checkpoint import build_toy_k2

    folder = lab.folder / "models" / "toy-k2"
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        build_toy_k2(folder)
    return folder


def _commit() -> str:
    """Return the commit of the tested code; empty outside a checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _chosen(options: argparse.Namespace) -> list[tuple[Row, str, str]]:
    return [
        (fault, backend, strategy)
        for backend in options.backend
        for strategy in options.strategy
        for fault in ROWS
        if backend in fault.backends and (not options.fault or fault.name in options.fault)
    ]


def _try(lab: Lab, row: Row, model: Path, backend: str, strategy: str) -> Outcome:
    if isinstance(row, Story):
        return try_story(lab, row, model, backend, strategy)
    return try_fault(lab, row, model, backend, strategy)


def _run(options: argparse.Namespace, results: Path) -> int:
    done = {(o.fault, o.backend, o.strategy) for o in read_outcomes(results) if o.passed}
    failed = 0
    commit = _commit()
    until = time.monotonic() + options.minutes * 60
    lab = Lab.up(f"reliability-{os.getpid()}", tied=True)
    try:
        model = _model(lab)
        for fault, backend, strategy in _chosen(options):
            if time.monotonic() > until:
                sys.stdout.write("out of time\n")
                break
            if options.resume and (fault.name, backend, strategy) in done:
                continue
            outcome = _try(lab, fault, model, backend, strategy)
            outcome.commit, outcome.measured_at = commit, time.strftime("%Y-%m-%d %H:%M")
            _keep(results, outcome)
            failed += not outcome.passed
            sys.stdout.write(f"{_row(fault, backend, strategy, outcome)}\n")
            sys.stdout.flush()
    finally:
        lab.down()
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if every trial passed."""
    parser = argparse.ArgumentParser(prog="python -m lab.reliability")
    parser.add_argument("--docs", type=Path, help="write this document from the results")
    parser.add_argument("--results", type=Path, default=ROOT / ".k2" / "reliability.jsonl")
    parser.add_argument("--backend", nargs="*", choices=ALL, default=list(ALL))
    parser.add_argument("--strategy", nargs="*", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--fault", nargs="*", choices=[fault.name for fault in ROWS])
    parser.add_argument("--minutes", type=float, default=240, help="start no trial after this time")
    parser.add_argument(
        "--resume", action="store_true", help="run only rows that have not passed yet"
    )
    parser.add_argument("--only-docs", action="store_true", help="run no trial")
    parser.add_argument(
        "--load", default="nothing else ran", help="other load on the machine, for the document"
    )
    options = parser.parse_args(arguments)
    try:
        failed = 0 if options.only_docs else _run(options, options.results)
    except LabError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
        return 1
    if options.docs is not None:
        text = document(read_outcomes(options.results), options.load)
        options.docs.write_text(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
