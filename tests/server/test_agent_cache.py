"""How many tokens are computed in each step of an agent: a real rank's cache under a real server.

The toy cannot write calls, so its answers are given: the rank computes them after the prompt, as it
would have when generating them, and keeps the same tokens.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from k2cli.guard.output_format import output_format_of
from k2cli.models.text.tokenizer import Tokenizer
from k2cli.protocol import Finished, Generate, Tokens
from k2cli.server.engine_client import EngineEvent, EngineState
from k2cli.server.served_model import ServedModel
from lab.toy_k2.template import K25_TEMPLATE, THINKING_TEMPLATE
from tests.server.scripted import serving
from tests.support.rank_pool import RankPool, assignments, running

pytestmark = pytest.mark.ranks

SERVED = ServedModel("toy", context_length=4096)
SYSTEM = "You are a coding agent. Work step by step and call tools."
SUB_SYSTEM = "You search files for another agent and answer briefly."
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
        },
    }
    for name, description in (("read", "Read a file."), ("write", "Write a file."))
]


def _call(index: int, path: str, name: str = "read") -> str:
    return (
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>"
        f'{{"path":  "{path}"}}<|tool_call_end|>'
    )


def _calls(*calls: str) -> str:
    return f"<|tool_calls_section_begin|>{''.join(calls)}<|tool_calls_section_end|>"


class CachedEngine:
    """An engine whose answers are given and whose cache is that of a rank."""

    state: EngineState = "ready"
    cause = ""

    def __init__(self, pool: RankPool, tokenizer: Tokenizer) -> None:
        self._pool = pool
        self._tokenizer = tokenizer
        self.answers: deque[str] = deque()

    async def submit(self, request: Generate) -> AsyncIterator[EngineEvent]:
        answer = self._tokenizer.encode(self.answers.popleft())
        name = self._pool.submit([*request.prompt, *answer], 1)
        outcome = await asyncio.to_thread(self._pool.outcome, name)
        assert outcome.finished is not None
        cached = min(outcome.finished.cached_tokens, len(request.prompt))
        yield Tokens(request.request_id, answer)
        yield Finished(
            request.request_id, "stop", len(request.prompt), len(answer) + 1, cached, 0.0, 0.1, 0.1
        )

    def cancel(self, request_id: str) -> None:
        pass


@pytest.fixture(scope="module")
def pool(toy_k2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    parts = assignments(toy_k2, "single", 1, concurrency=2, context_length=SERVED.context_length)
    with running(RankPool(parts, tmp_path_factory.mktemp("pool"))) as started:
        yield started


class Model:
    """A served model. ``computed`` has the prompt tokens that each request had computed."""

    def __init__(self, engine: CachedEngine, client: openai.OpenAI, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._client = client
        self._tokenizer = tokenizer
        self.prompts: list[int] = []
        self.computed: list[int] = []

    def count(self, text: str) -> int:
        """The tokens of a text of the prompt."""
        return len(self._tokenizer.encode(text))

    def answer(self, messages: list[Any], text: str) -> Any:
        """Have the model write ``text``, and return its message as an agent sends it back."""
        self._engine.answers.append(text)
        got = self._client.chat.completions.create(model="toy", messages=messages, tools=TOOLS)
        assert got.usage is not None
        assert got.usage.prompt_tokens_details is not None
        cached = got.usage.prompt_tokens_details.cached_tokens or 0
        self.prompts.append(got.usage.prompt_tokens)
        self.computed.append(got.usage.prompt_tokens - cached)
        return got.choices[0].message.model_dump(exclude_none=True)


@pytest.fixture
def model(request: pytest.FixtureRequest, pool: RankPool, toy_k2: Path, tmp_path: Path) -> Any:
    folder = tmp_path / "toy"
    shutil.copytree(toy_k2, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if template := getattr(request, "param", None):
        (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.load(folder)
    engine = CachedEngine(pool, tokenizer)
    served = replace(SERVED, output_format=output_format_of(tokenizer, None, None))
    with (
        serving(engine, served, tokenizer) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client,
    ):
        yield Model(engine, client, tokenizer)


def _results(message: dict[str, Any], text: str) -> list[dict[str, Any]]:
    calls = message["tool_calls"]
    return [{"role": "tool", "tool_call_id": call["id"], "content": text} for call in calls]


def _task(system: str, text: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


RESULT = "<|im_end|><|im_system|>tool<|im_middle|>## Return of functions.{}\n{}"
NEXT = "<|im_end|><|im_assistant|>assistant<|im_middle|>"


def test_a_loop_of_tools_computes_the_results_alone(model: Model) -> None:
    messages = _task(SYSTEM, "Say what the first loop reads.")
    expected = []
    for step in range(4):
        text = f"I look at file {step}. " if step % 2 else ""
        calls = [_call(2 * step, f"a/{step}.py"), _call(2 * step + 1, f"b/{step}.py", "write")]
        message = model.answer(messages, text + _calls(*calls))
        assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {
            "path": f"a/{step}.py"
        }
        result = f"content {step} of a file, with <|im_end|> in it"
        messages += [message, *_results(message, result)]
        begin, end = result.split("|im_end")
        shown = [
            RESULT.format(f"{name}:{2 * step + number}", begin)
            for number, name in enumerate(("read", "write"))
        ]
        # The marker in the file stays text, so it is encoded in two parts.
        expected.append(sum(map(model.count, shown)) + 2 * model.count("|im_end" + end))
    model.answer(messages, "It reads the files.")
    assert model.computed[1:] == [count + model.count(NEXT) for count in expected]
    assert sum(model.computed[1:]) < model.prompts[-1] / 2


def test_conversations_that_alternate_and_a_sub_agent_keep_their_caches(model: Model) -> None:
    one, two = _task(SYSTEM, "Fix the first bug."), _task(SYSTEM, "Fix the second bug.")
    sub = _task(SUB_SYSTEM, "Where is the parser?")
    for step in range(3):
        for messages in (one, two):
            message = model.answer(messages, _calls(_call(step, "main.py")))
            messages += [message, *_results(message, "import this")]
        message = model.answer(sub, _calls(_call(step, "grep")))
        sub += [message, *_results(message, "nothing")]
    _, first_two, first_sub, *later = model.computed
    declared = json.dumps(TOOLS, separators=(",", ":"))
    tools = model.count(f"<|im_system|>tool_declare<|im_middle|>{declared}<|im_end|>")
    system = model.count(f"<|im_system|>system<|im_middle|>{SYSTEM}<|im_end|>")
    # The second conversation shares tools, system prompt and the beginning of the task; the
    # sub-agent shares the tools, which stand before its system prompt.
    assert first_two < model.prompts[1] - tools - system
    assert tools <= model.prompts[2] - first_sub < tools + system
    for index, count in enumerate(later):
        result = "nothing" if index % 3 == 2 else "import this"
        step = RESULT.format(f"read:{index // 3}", result)
        assert count == model.count(step) + model.count(NEXT), index


@pytest.mark.parametrize("model", [THINKING_TEMPLATE, K25_TEMPLATE], indirect=True)
def test_reasoning_stays_in_the_cache_while_tools_are_called(
    model: Model, request: pytest.FixtureRequest
) -> None:
    opens = "" if "is false else" not in request.node.callspec.params["model"] else "<think>"
    messages = _task(SYSTEM, "Fix it.")
    for step in range(3):
        thought = f"<think>\nI need file {step}.\n</think>".removeprefix(opens)
        message = model.answer(messages, thought + _calls(_call(step, f"{step}.py")))
        assert message["reasoning_content"] == f"\nI need file {step}.\n"
        messages += [message, *_results(message, "import this")]
    thought = "<think>That is all.</think>".removeprefix(opens)
    messages.append(model.answer(messages, f"{thought}Fixed."))
    assert messages[-1]["content"] == "Fixed."
    for step, count in enumerate(model.computed[1:]):
        result = RESULT.format(f"read:{step}", "import this")
        assert count == model.count(result) + model.count(NEXT) + model.count(opens)
    # The next task drops all reasoning, so everything from the first thought on is new.
    messages.append({"role": "user", "content": "Thanks. Now the tests."})
    model.answer(messages, f"{thought}Done.")
    kept = model.prompts[-1] - model.computed[-1]
    assert kept == model.prompts[0] + (0 if opens else 1)
