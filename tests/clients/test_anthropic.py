"""Anthropic's SDK: streaming, loops of tools, async, cancellation, counting."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.clients.script import (
    ARGUMENTS,
    FINAL,
    LONG,
    MODEL,
    QUESTION,
    SCHEMA,
    THOUGHT,
    weather,
)

pytestmark = [pytest.mark.ranks, pytest.mark.shared_state]

TOOLS: Any = [{"name": "get_weather", "description": "Weather", "input_schema": SCHEMA}]
LIMIT = 1000


@pytest.fixture
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, timeout=60) as client:
        yield client


def _asked() -> list[Any]:
    return [{"role": "user", "content": QUESTION}]


def _results(content: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [
            {
                "type": "tool_result",
                "tool_use_id": block.id,
                "content": weather(**block.input),
            }
            for block in content
            if block.type == "tool_use"
        ],
    }


def _check_calls(message: Any) -> None:
    assert message.stop_reason == "tool_use"
    kinds = [block.type for block in message.content]
    assert kinds == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, *calls = message.content
    assert thinking.thinking == THOUGHT
    assert text.text == "I look."
    assert len({call.id for call in calls}) == 2
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]+", call.id) for call in calls)
    assert [call.name for call in calls] == ["get_weather"] * 2
    assert [call.input for call in calls] == ARGUMENTS


def _thinking() -> Any:
    return {"type": "adaptive"}


def test_a_loop_of_tools(client: anthropic.Anthropic) -> None:
    messages = _asked()
    first = client.messages.create(
        model=MODEL, max_tokens=LIMIT, messages=messages, tools=TOOLS, thinking=_thinking()
    )
    _check_calls(first)
    messages += [{"role": "assistant", "content": first.content}, _results(first.content)]
    second = client.messages.create(
        model=MODEL, max_tokens=LIMIT, messages=messages, tools=TOOLS, thinking=_thinking()
    )
    assert second.stop_reason == "end_turn"
    assert [block.text for block in second.content if block.type == "text"] == [FINAL]
    # The whole first turn, its answer included, is a beginning of the second prompt.
    computed = first.usage.input_tokens + (first.usage.cache_read_input_tokens or 0)
    assert second.usage.cache_read_input_tokens is not None
    assert second.usage.cache_read_input_tokens >= computed + first.usage.output_tokens


def test_a_loop_of_tools_that_streams(client: anthropic.Anthropic) -> None:
    """The SDK's own accumulator makes the message of the events."""
    messages = _asked()
    with client.messages.stream(
        model=MODEL, max_tokens=LIMIT, messages=messages, tools=TOOLS, thinking=_thinking()
    ) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert kinds.count("input_json") > 4
    assert kinds.count("thinking") > 1
    _check_calls(message)
    messages += [{"role": "assistant", "content": message.content}, _results(message.content)]
    with client.messages.stream(
        model=MODEL, max_tokens=LIMIT, messages=messages, tools=TOOLS
    ) as stream:
        assert "".join(stream.text_stream) == FINAL


def test_the_tool_runner_goes_on_without_a_thread(client: anthropic.Anthropic) -> None:
    """The SDK asks the server to store the conversation, and is told that it does not."""

    @anthropic.beta_tool
    def get_weather(city: str, unit: str) -> str:
        """Weather."""
        return weather(city, unit)

    runner = client.beta.messages.tool_runner(
        model=MODEL, max_tokens=LIMIT, messages=_asked(), tools=[get_weather]
    )
    assert [block.text for block in runner.until_done().content if block.type == "text"] == [FINAL]


async def test_loops_of_tools_side_by_side(url: str) -> None:
    async with anthropic.AsyncAnthropic(
        base_url=url, api_key="any", max_retries=0, timeout=60
    ) as client:

        async def loop() -> str:
            messages = _asked()
            while True:
                answer = await client.messages.create(
                    model=MODEL, max_tokens=LIMIT, messages=messages, tools=TOOLS
                )
                if answer.stop_reason != "tool_use":
                    return "".join(part.text for part in answer.content if part.type == "text")
                messages += [
                    {"role": "assistant", "content": answer.content},
                    _results(answer.content),
                ]

        assert await asyncio.gather(*(loop() for _ in range(4))) == [FINAL] * 4


async def test_a_stream_that_is_left_is_cancelled(url: str) -> None:
    """The long answer would take minutes; the rank computes one request at a time."""
    asked: Any = [{"role": "user", "content": LONG}]
    async with anthropic.AsyncAnthropic(
        base_url=url, api_key="any", max_retries=0, timeout=60
    ) as client:
        async with client.messages.stream(model=MODEL, max_tokens=LIMIT, messages=asked) as stream:
            async for _ in stream.text_stream:
                break
        answer = await client.messages.create(
            model=MODEL, max_tokens=LIMIT, messages=_asked(), tools=TOOLS
        )
    assert answer.stop_reason == "tool_use"


def test_tokens_are_counted_as_the_answer_counts_them(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=_asked(), tools=TOOLS)
    answer = client.messages.create(model=MODEL, max_tokens=LIMIT, messages=_asked(), tools=TOOLS)
    cached = answer.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == answer.usage.input_tokens + cached


def test_a_refusal_is_the_error_of_the_sdk(client: anthropic.Anthropic) -> None:
    image: Any = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"},
    }
    with pytest.raises(anthropic.BadRequestError, match="image"):
        client.messages.create(
            model=MODEL, max_tokens=LIMIT, messages=[{"role": "user", "content": [image]}]
        )
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="another", max_tokens=LIMIT, messages=_asked())
