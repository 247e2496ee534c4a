"""A real run answers as its OpenAPI document says; ``scripts/soak openapi`` takes longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.faults import k2
from tests.support.schemathesis_run import fuzz


@pytest.mark.ranks
def test_answers_are_as_the_document_says(toy_k2: Path, tmp_path: Path) -> None:
    run = k2("launch", str(toy_k2), "--context", "256", "--detach")
    try:
        found = fuzz(run["url"], tmp_path, phases="fuzzing", examples=6, seconds=30, seed=1)
        assert found.status == 0, found.report
        assert found.cases > 12, found.report
    finally:
        k2("stop", run["run_id"])
