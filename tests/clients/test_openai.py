"""OpenAI's SDK: streaming, loops of tools, async, cancellation."""

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
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Weather", "parameters": SCHEMA},
    }
]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def _asked() -> list[Any]:
    return [{"role": "user", "content": QUESTION}]


def _results(calls: Any) -> list[Any]:
    return [
        {
            "role": "tool",
            "tool_call_id": call.id,
            "content": weather(**json.loads(call.function.arguments)),
        }
        for call in calls
    ]


def _check_calls(message: Any) -> None:
    assert message.content == "I look."
    assert message.reasoning_content == THOUGHT
    assert [call.id for call in message.tool_calls] == IDS
    assert [call.function.name for call in message.tool_calls] == ["get_weather"] * 2
    assert [json.loads(call.function.arguments) for call in message.tool_calls] == ARGUMENTS


def test_a_loop_of_tools(client: openai.OpenAI) -> None:
    messages = _asked()
    first = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
    assert first.choices[0].finish_reason == "tool_calls"
    message = first.choices[0].message
    _check_calls(message)
    messages += [message, *_results(message.tool_calls)]
    second = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
    assert second.choices[0].finish_reason == "stop"
    assert second.choices[0].message.content == FINAL
    assert second.choices[0].message.tool_calls is None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    # The whole first turn, its answer included, is a beginning of the second prompt.
    assert first.usage is not None
    computed = first.usage.prompt_tokens + first.usage.completion_tokens
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= computed


def test_a_loop_of_tools_that_streams(client: openai.OpenAI) -> None:
    """The SDK's own accumulator makes the message of the deltas."""
    messages = _asked()
    with client.chat.completions.stream(
        model=MODEL, messages=messages, tools=TOOLS, stream_options={"include_usage": True}
    ) as stream:
        kinds = [event.type for event in stream]
        completion = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert kinds.count("tool_calls.function.arguments.delta") > 4
    message = completion.choices[0].message
    _check_calls(message)
    assert completion.choices[0].finish_reason == "tool_calls"
    messages += [message.to_dict(), *_results(message.tool_calls)]
    with client.chat.completions.stream(model=MODEL, messages=messages, tools=TOOLS) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    assert text == FINAL


async def test_loops_of_tools_side_by_side(url: str) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60
    ) as client:

        async def loop() -> str | None:
            messages = _asked()
            while True:
                answer = await client.chat.completions.create(
                    model=MODEL, messages=messages, tools=TOOLS
                )
                message = answer.choices[0].message
                if not message.tool_calls:
                    return message.content
                messages += [message, *_results(message.tool_calls)]

        assert await asyncio.gather(*(loop() for _ in range(4))) == [FINAL] * 4


async def test_a_stream_that_is_left_is_cancelled(url: str) -> None:
    """The long answer would take five minutes; the rank computes one request at a time."""
    asked: Any = [{"role": "user", "content": LONG}]
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60
    ) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=asked, stream=True)
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                break
        await stream.close()
        waiting = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=asked))
        await asyncio.sleep(1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        answer = await client.chat.completions.create(model=MODEL, messages=_asked(), tools=TOOLS)
    _check_calls(answer.choices[0].message)


def test_without_tools_the_answer_is_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=_asked(), tools=TOOLS, tool_choice="none"
    )
    assert answer.choices[0].message.content == "I have no thermometer."
    assert answer.choices[0].finish_reason == "stop"


def test_a_refusal_is_the_error_of_the_sdk(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="n"):
        client.chat.completions.create(model=MODEL, messages=_asked(), n=2)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=_asked())
