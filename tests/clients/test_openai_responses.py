"""OpenAI's SDK with the Responses API: streaming, loops of tools, async, cancellation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.script import (
    ARGUMENTS,
    FINAL,
    IDS,
    LONG,
    MODEL,
    QUESTION,
    SCHEMA,
    THOUGHT,
    weather,
)

pytestmark = [pytest.mark.ranks, pytest.mark.shared_state]

TOOLS: Any = [
    {"type": "function", "name": "get_weather", "description": "Weather", "parameters": SCHEMA}
]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def _results(output: Any) -> list[Any]:
    return [
        {
            "type": "function_call_output",
            "call_id": item.call_id,
            "output": weather(**json.loads(item.arguments)),
        }
        for item in output
        if item.type == "function_call"
    ]


def _check_calls(output: Any) -> None:
    reasoning, message, *calls = output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", THOUGHT)
    assert message.content[0].text == "I look."
    assert [call.call_id for call in calls] == IDS
    assert [call.name for call in calls] == ["get_weather"] * 2
    assert [json.loads(call.arguments) for call in calls] == ARGUMENTS


def test_a_loop_of_tools(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input=QUESTION, tools=TOOLS)
    _check_calls(first.output)
    history: Any = [{"role": "user", "content": QUESTION}, *first.output, *_results(first.output)]
    second = client.responses.create(model=MODEL, input=history, tools=TOOLS)
    assert (second.status, second.output_text) == ("completed", FINAL)
    # The whole first turn, its answer included, is a beginning of the second prompt.
    assert first.usage is not None
    assert second.usage is not None
    computed = first.usage.input_tokens + first.usage.output_tokens
    assert second.usage.input_tokens_details.cached_tokens >= computed


def test_a_loop_of_tools_that_streams(client: openai.OpenAI) -> None:
    """The SDK's own accumulator makes the response of the events."""
    with client.responses.stream(model=MODEL, input=QUESTION, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        response = stream.get_final_response()
    assert kinds.count("response.function_call_arguments.done") == 2
    assert kinds.count("response.function_call_arguments.delta") > 4
    assert kinds.count("response.reasoning_text.delta") > 1
    _check_calls(response.output)
    history: Any = [
        {"role": "user", "content": QUESTION},
        *[item.to_dict() for item in response.output],
        *_results(response.output),
    ]
    with client.responses.stream(model=MODEL, input=history, tools=TOOLS) as stream:
        text = "".join(
            event.delta for event in stream if event.type == "response.output_text.delta"
        )
    assert text == FINAL


async def test_loops_of_tools_side_by_side(url: str) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60
    ) as client:

        async def loop() -> str:
            history: Any = [{"role": "user", "content": QUESTION}]
            while True:
                answer = await client.responses.create(model=MODEL, input=history, tools=TOOLS)
                results = _results(answer.output)
                if not results:
                    return answer.output_text
                history += [*answer.output, *results]

        assert await asyncio.gather(*(loop() for _ in range(4))) == [FINAL] * 4


async def test_a_stream_that_is_left_is_cancelled(url: str) -> None:
    """The long answer would take five minutes; the rank computes one request at a time."""
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60
    ) as client:
        stream = await client.responses.create(model=MODEL, input=LONG, stream=True)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        waiting = asyncio.create_task(client.responses.create(model=MODEL, input=LONG))
        await asyncio.sleep(1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        answer = await client.responses.create(model=MODEL, input=QUESTION, tools=TOOLS)
    _check_calls(answer.output)
