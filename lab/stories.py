"""Trials of several steps: two users of one cluster, and a run that restarts.

Each trial lasts from the launch to the end of the run, acts as users would, and records what was
wrong. The second user sits at the console, a machine of its own that has no rank.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.laboratory import CONSOLE, Lab
from lab.runs import FOLLOWER, LEADER, LabRun
from lab.trial import Outcome, cleared, note_when_gone

_K2 = [sys.executable, "-m", "k2cli"]
_READY_SECONDS = 90.0
_RESTARTS = 3  # RestartPolicy.limit
BACKENDS = ("ring", "mpi4", "mpi5")


@dataclass(frozen=True, slots=True)
class Story:
    """One row of the table, as ``lab.faults.Fault`` is one.

    Attributes:
        name: used by the tests and the table.
        what: description for the table.
        play: function that runs the trial and fills in the outcome; errors go to ``problems``.
        backends: transports for which the trial makes sense.
    """

    name: str
    what: str
    play: Callable[[Lab, Path, Outcome], None]
    backends: tuple[str, ...] = BACKENDS


def try_story(lab: Lab, story: Story, model: Path, backend: str, strategy: str) -> Outcome:
    """Run a trial, and look for leftovers."""
    outcome = Outcome(story.name, backend, strategy)
    with cleared(lab, outcome):
        story.play(lab, model, outcome)
    return outcome


# --- actions of users -----------------------------------------------------------------------------


def _runs(lab: Lab, host: str) -> list[dict[str, Any]]:
    answer = lab.exec(host, [*_K2, "ps", "--json"]).stdout
    with suppress(ValueError, KeyError):
        return list(json.loads(answer)["runs"])
    raise LabError(f"k2 ps on {host} answered: {answer[:300]}")


def _launched(lab: Lab, model: Path, outcome: Outcome) -> tuple[LabRun, str]:
    """Launch the first user's run, detached; return it when ready, and its id."""
    run = LabRun(lab, model, outcome.backend, outcome.strategy, detach=True)
    if run.talk.wait_end(_READY_SECONDS) != 0:
        raise LabError(f"the first launch failed: {run.talk.text[-500:]}")
    return run, str(_runs(lab, LEADER)[0]["run_id"])


def _second(lab: Lab, model: Path, outcome: Outcome, *options: str) -> LabRun:
    nodes = f"{LEADER},{FOLLOWER}"
    return LabRun(
        lab, model, outcome.backend, outcome.strategy, nodes=nodes, host=CONSOLE, options=options,
        port=8081,
    )  # fmt: skip


def _expect(outcome: Outcome, holds: bool, problem: str) -> None:
    if not holds:
        outcome.problems.append(problem)


def _answers(run: LabRun, port: int = 8080) -> bool:
    talk = run.ask(words=4, most=4, port=port)
    talk.wait_end(60)
    return talk.said("end done")


def _stop(lab: Lab, host: str, outcome: Outcome) -> float:
    began = time.monotonic()
    done = lab.exec(host, [*_K2, "stop", "--all"])
    _expect(outcome, done.returncode == 0, f"k2 stop on {host}: {done.stderr.strip()[-200:]}")
    return began


# --- the stories --------------------------------------------------------------------------------


def _refused(lab: Lab, model: Path, outcome: Outcome) -> None:
    first, name = _launched(lab, model, outcome)
    began = time.monotonic()
    second = _second(lab, model, outcome)
    outcome.exit_status = second.talk.wait_end(60)
    words = f"is in use by {name} of "
    at = second.talk.times_said(words)
    outcome.seen_seconds = at[0] - began if at else None
    outcome.said = next((line for _, line in second.talk.lines if line.startswith("error:")), "")
    _expect(outcome, outcome.exit_status == 5, f"exit {outcome.exit_status}, expected 5")
    _expect(outcome, bool(at), f"'{words}' was not said: {second.talk.text[-300:]}")
    _expect(outcome, _answers(first), "the first run does not answer any more")
    note_when_gone(lab, outcome, _stop(lab, LEADER, outcome))


def _waits(lab: Lab, model: Path, outcome: Outcome) -> None:
    _, name = _launched(lab, model, outcome)
    began = time.monotonic()
    second = _second(lab, model, outcome, "--wait", "120")
    outcome.seen_seconds = second.talk.wait_said(f"is in use by {name} of ", 60) - began
    outcome.said = next(line for _, line in second.talk.lines if f"in use by {name}" in line)
    _stop(lab, LEADER, outcome)
    second.wait_ready()
    _expect(outcome, _answers(second, 8081), "the second run does not answer")
    ended = _stop(lab, CONSOLE, outcome)
    note_when_gone(lab, outcome, ended)
    outcome.exit_status = second.talk.wait_end(30)
    _expect(outcome, outcome.exit_status == 0, f"exit {outcome.exit_status}, expected 0")


def _comes_back(lab: Lab, model: Path, outcome: Outcome) -> None:
    options = ("--restart", "on-failure")
    run = LabRun(lab, model, outcome.backend, outcome.strategy, options=options)
    talk = run.talk
    for attempt in range(1, _RESTARTS + 1):
        run.wait_ready(attempt)
        _expect(outcome, _answers(run), f"attempt {attempt} does not answer on its port")
        began = time.monotonic()
        run.kill("rank-1", signal.SIGKILL)
        at = talk.wait_said(f"rank 1 on {FOLLOWER} failed", 60, since=began)
        outcome.seen_seconds = max(outcome.seen_seconds or 0.0, at - began)
    note_when_gone(lab, outcome, began)
    outcome.exit_status = talk.wait_end(60)
    outcome.said = next((line for _, line in talk.lines if line.startswith("error:")), "")
    _expect(outcome, outcome.exit_status == 5, f"exit {outcome.exit_status}, expected 5")
    _expect(outcome, f"{_RESTARTS} failures in a row" in outcome.said, "the limit was not said")


STORIES: tuple[Story, ...] = (
    Story("second-user", "a second user launches on the same nodes", _refused),
    Story("second-user-waits", "a second user with `--wait`, until the first has stopped", _waits),
    Story(
        "restart",
        "SIGKILL of k2b's rank three times, with `--restart on-failure`",
        _comes_back,
    ),
)


def story_named(name: str) -> Story:
    """Return the trial with this name.

    Raises:
        KeyError: if there is no such trial.
    """
    return {story.name: story for story in STORIES}[name]
