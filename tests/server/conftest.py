"""A real server over a scripted engine, and OpenAI's client."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.server.requests import SERVED
from tests.server.scripted import ScriptedEngine, serving


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def url(engine: ScriptedEngine) -> Iterator[str]:
    with serving(engine, SERVED) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=10) as client:
        yield client
