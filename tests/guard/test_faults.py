"""Each fault of the table once, on two real ranks, by pipeline and by tensor, over mpi and ring.

All combinations, in rounds: ``scripts/soak runtime``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.faults import CONTEXT, FATAL, HARMLESS, Fault, Served, serving

STOPPED, KILLED, WRONG_DIGEST = FATAL

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.fixture(scope="module", params=["mpi-pipeline", "ring-tensor"])
def served(
    request: pytest.FixtureRequest, toy_k2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    backend, strategy = request.param.split("-")
    with serving(toy_k2, backend, strategy, tmp_path_factory.mktemp("faults")) as run:
        yield run


@pytest.mark.shared_state
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=pytest.mark.soak if fault.long else (), id=fault.name)
        for fault in HARMLESS
    ],
)
def test_other_requests_do_not_notice(served: Served, fault: Fault) -> None:
    served.undisturbed_by(fault.do)


@pytest.mark.shared_state
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"model": "another"}, "model"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [301] * CONTEXT}, "prompt"),
    ],
    ids=["temperature", "model", "negative", "vocabulary", "full"],
)
def test_a_malformed_request_is_refused_by_name(
    served: Served, changes: dict[str, object], field: str
) -> None:
    body = {"prompt": [301]} | changes
    answer = served.post(body.pop("prompt"), **body)  # type: ignore[arg-type]
    assert 400 <= answer.status_code < 500, answer.text
    assert field in answer.text


@pytest.mark.shared_state
def test_the_run_ends_everywhere_and_names_the_cause(served: Served) -> None:
    """Last of those that share a run: a wrong digest in the pipeline, a killed rank by tensor."""
    fault = WRONG_DIGEST if served.trigger.name.endswith("pipeline") else KILLED
    served.ended_by(fault.do, fault.cause)


def test_a_follower_stopped_for_ever_ends_the_run(toy_k2: Path, tmp_path: Path) -> None:
    with serving(toy_k2, "ring", "pipeline", tmp_path) as run:
        run.ended_by(STOPPED.do, STOPPED.cause)
