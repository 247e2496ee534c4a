"""Models held to twenty schemas: every answer validates, or the token limit has cut it off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests.support.faults import k2

CASES = json.loads(
    (Path(__file__).resolve().parents[1] / "data" / "structured" / "schemas.json").read_text()
)["schemas"]
TOKENS = 120
AT_ONCE = 10
LEAST_WHOLE = 15
"""Of 40 answers; the toy writes strings and white space until a schema or the limit ends them."""


@contextmanager
def launched(model: Path, nodes: str) -> Iterator[str]:
    """Launch a model on as many ranks as there are nodes; yields the address of the API."""
    run = k2(
        "launch", str(model), "--nodes", nodes, "--parallel", "pipeline", "--context", "2048",
        "--concurrency", str(AT_ONCE), "--dtype", "float32", "--detach",
    )  # fmt: skip
    try:
        yield f"{run['url']}/v1"
    finally:
        k2("stop", run["run_id"])


def ask(url: str, **members: Any) -> dict[str, Any]:
    """Send a request of Chat Completions; return its choice."""
    body = {"max_tokens": TOKENS, **members}
    answer = httpx.post(f"{url}/chat/completions", json=body, timeout=300)
    assert answer.status_code == 200, (answer.text, members)
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def obeys(schema: Any, text: str) -> None:
    """Check that a text is JSON and is valid under a schema."""
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    validator.validate(json.loads(text))


def answered(url: str, case: dict[str, Any], sampling: dict[str, Any]) -> bool:
    """Ask for one schema and check the answer; return True if it is whole."""
    form = {"name": "answer", "schema": case["schema"], "strict": True}
    choice = ask(
        url,
        messages=[{"role": "user", "content": f"{case['prompt']} Answer in JSON."}],
        response_format={"type": "json_schema", "json_schema": form},
        **sampling,
    )
    if choice["finish_reason"] == "length":
        return False
    assert choice["finish_reason"] == "stop"
    obeys(case["schema"], choice["message"]["content"])
    return True


def _twenty_schemas(model: Path, nodes: str) -> int:
    """Ask for each schema twice, with a seed and greedily; return the number of whole answers."""

    def seeded(numbered: tuple[int, dict[str, Any]]) -> bool:
        number, case = numbered
        return answered(url, case, {"temperature": 1, "seed": number})

    def greedy(case: dict[str, Any]) -> bool:
        return answered(url, case, {"temperature": 0})

    with launched(model, nodes) as url, ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(seeded, enumerate(CASES))) + sum(pool.map(greedy, CASES))


NODES = pytest.mark.parametrize("nodes", ["localhost", "localhost,localhost"], ids=["one", "two"])


@pytest.mark.soak
@pytest.mark.timeout(3600)
@NODES
def test_twenty_schemas_of_the_demo(demo_checkpoint: Path, nodes: str) -> None:
    # A model this small may write until the limit, but most of these schemas end.
    assert _twenty_schemas(demo_checkpoint, nodes) >= 30


@pytest.mark.ranks
@NODES
def test_twenty_schemas_of_the_toy(toy_k2: Path, nodes: str) -> None:
    """The toy knows nothing, so that only the grammar makes its answers JSON."""
    assert _twenty_schemas(toy_k2, nodes) >= LEAST_WHOLE


@pytest.mark.ranks
@NODES
def test_required_calls_of_the_toy_obey_their_schemas(toy_k2: Path, nodes: str) -> None:
    objects = [case["schema"] for case in CASES if case["schema"].get("type") == "object"][:6]
    tools = [
        {"type": "function", "function": {"name": f"use_{number}", "parameters": schema}}
        for number, schema in enumerate(objects)
    ]

    def call(number: int) -> bool:
        named = {"type": "function", "function": {"name": f"use_{number}"}}
        choice = ask(
            url,
            messages=[{"role": "user", "content": "Go on."}],
            tools=[tools[number], tools[number - 1]],
            tool_choice="required" if number % 2 else named,
            parallel_tool_calls=False,
            seed=number,
            temperature=1,
        )
        if choice["finish_reason"] == "length":
            return False
        assert choice["finish_reason"] == "tool_calls"
        (made,) = choice["message"]["tool_calls"]
        index = int(made["function"]["name"].removeprefix("use_"))
        assert index == number or (number % 2 and index == (number - 1) % len(tools))
        obeys(objects[index], made["function"]["arguments"])
        return True

    with launched(toy_k2, nodes) as url, ThreadPoolExecutor(AT_ONCE) as pool:
        assert sum(pool.map(call, range(len(objects)))) >= 2
