"""One run for all tests of a module; its rank calls a tool and then answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.script import RULES
from tests.support.harness import supervised
from tests.support.scripted_answers import ANSWERS_VARIABLE, save_rules
from tests.support.thinking_model import thinking_model


@pytest.fixture(scope="module")
def url(toy_k2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the run, without ``/v1``."""
    folder = tmp_path_factory.mktemp("clients")
    model = thinking_model(toy_k2, folder / "model")
    save_rules(folder / "answers.json", RULES)
    environment = {ANSWERS_VARIABLE: str(folder / "answers.json")}
    with supervised("local", 1, model=model, context_length=8192, environment=environment) as run:
        yield run.wait_ready().url.removesuffix("/").removesuffix("/v1")
