"""Models held to twenty schemas: every answer validates, or the token limit has cut it off."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
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
TOKENS = 150
AT_ONCE = 10
CALLS = 4
LEAST_WHOLE_SHARE = 0.4
"""Of the toy's answers, which writes strings and white space until a schema or the limit ends."""
Question = tuple[dict[str, Any], dict[str, Any]]
"""A schema with its prompt, and how to sample."""


@contextmanager
def launched(model: Path, nodes: str) -> Iterator[str]:
    """Launch a model on as many ranks as there are nodes; yields the address of the API.

    Without a parser of reasoning: the toy, which writes anything, would not end its reasoning.
    """
    # Ranks of MPI wait by polling, which would take the processors from the others.
    placement = ["--parallel", "pipeline", "--backend", "ring"] if "," in nodes else []
    run = k2(
        "launch", str(model), "--nodes", nodes, *placement, "--context", "2048",
        "--concurrency", str(AT_ONCE), "--dtype", "float32", "--reasoning-parser", "none",
        "--detach",
    )  # fmt: skip
    try:
        yield f"{run['url']}/v1"
    finally:
        k2("stop", run["run_id"])


def ask(url: str, **members: Any) -> dict[str, Any]:
    """Send a request of Chat Completions; return its choice."""
    body = {"max_tokens": TOKENS, **members}
    answer = httpx.post(f"{url}/chat/completions", json=body, timeout=1200)
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


def whole_answers(url: str, questions: Sequence[Question]) -> int:
    """Ask all questions; return the number of whole answers."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(lambda question: answered(url, *question), questions))


SEEDED: list[Question] = [
    (case, {"temperature": 1, "seed": number}) for number, case in enumerate(CASES)
]
GREEDY: list[Question] = [(case, {"temperature": 0}) for case in CASES]


def required_calls(url: str) -> int:
    """Ask for calls, named and required in turn; return the number of whole ones."""
    objects = [case["schema"] for case in CASES if case["schema"].get("type") == "object"][:CALLS]

    def call(number: int) -> bool:
        function = {"name": f"use_{number}", "parameters": objects[number]}
        named = {"type": "function", "function": {"name": f"use_{number}"}}
        choice = ask(
            url,
            messages=[{"role": "user", "content": "Go on."}],
            tools=[{"type": "function", "function": function}],
            tool_choice="required" if number % 2 else named,
            parallel_tool_calls=False,
            seed=number,
            temperature=1,
        )
        if choice["finish_reason"] == "length":
            return False
        assert choice["finish_reason"] == "tool_calls"
        (made,) = choice["message"]["tool_calls"]
        assert made["function"]["name"] == f"use_{number}"
        obeys(objects[number], made["function"]["arguments"])
        return True

    with ThreadPoolExecutor(CALLS) as pool:
        return sum(pool.map(call, range(CALLS)))


NODES = pytest.mark.parametrize("nodes", ["localhost", "localhost,localhost"], ids=["one", "two"])


@pytest.mark.soak
@pytest.mark.timeout(3600)
@NODES
def test_the_demo_obeys(demo_checkpoint: Path, nodes: str) -> None:
    """A model this small may write until the limit, but most of these schemas end."""
    with launched(demo_checkpoint, nodes) as url:
        assert whole_answers(url, SEEDED + GREEDY) >= 30


@pytest.mark.ranks
@pytest.mark.parametrize(
    "nodes",
    [pytest.param("localhost", marks=pytest.mark.soak), "localhost,localhost"],
    ids=["one", "two"],
)
def test_the_toy_obeys(toy_k2: Path, nodes: str) -> None:
    """The toy knows nothing, so that only the grammar makes its answers JSON.

    The ranks themselves are compared on every placement in ``tests/rank/engine/test_grammars.py``.
    """
    questions = GREEDY[::2] + SEEDED[1::2] if nodes == "localhost" else GREEDY[::5] + SEEDED[2::5]
    with launched(toy_k2, nodes) as url:
        assert whole_answers(url, questions) >= LEAST_WHOLE_SHARE * len(questions)
        assert required_calls(url) >= 1
