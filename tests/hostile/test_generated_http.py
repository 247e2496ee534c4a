"""Generated requests: bodies through the reader, and hostile clients over raw sockets.

``scripts/soak hostile`` sends twenty thousand of the same clients to two real ranks.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from k2cli.guard.http_connection import ConnectionLimits, LimitedConnection
from k2cli.models.text.tokenizer import Tokenizer
from k2cli.protocol import Finished, Generate, Tokens
from k2cli.server.engine_client import EngineEvent, EngineState
from k2cli.server.read_request import ReadRequest, RequestKind, UnreadRequest, read_request
from k2cli.server.served_model import ServedModel
from tests.hostile.attacks import KINDS, PROMPTS, carry_out, complaint, good, make_attack
from tests.hostile.mutation import bounded, generated, mutated_json
from tests.server.scripted import LetterTokenizer, serving

CONTEXT = 1024
SEED = 13
ATTACKS = 300
CLIENTS = 24
SLOW = ("huge body",)  # tests/hostile/test_http.py sends such bodies
WORDS = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hello"}], "name": "a"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
    {"role": "tool", "content": "2", "tool_call_id": "1"},
]
SAMPLING = {
    "model": "toy", "max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1,
    "seed": 1,
    "stop": ["a", "b"], "n": 1, "stream": True, "stream_options": {"include_usage": True},
    "presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.5, "6": -100}, "k2": {"cache": False}, "user": "x", "metadata": {"a": 1},
}  # fmt: skip
BODIES: dict[RequestKind, dict[str, Any]] = {
    "chat": {
        **SAMPLING, "messages": WORDS, "logprobs": True, "top_logprobs": 2, "tool_choice": "auto",
        "tools": [{"type": "function", "function": {"name": "f",
        "parameters": {"type": "object"}}}],
        "chat_template_kwargs": {"thinking": True}, "reasoning_effort": "low",
        "response_format": {"type": "text"}, "modalities": ["text"],
    },
    "completion": {**SAMPLING, "prompt": [1, 2, 3], "logprobs": 2, "best_of": 1, "echo": False},
    "tokenize": {"messages": WORDS, "model": "toy", "add_generation_prompt": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(toy_k2: Path) -> Tokenizer:
    return Tokenizer.load(toy_k2)


@pytest.mark.parametrize("kind", BODIES)
@generated(250)
def test_a_body_is_read_or_refused(toy: Tokenizer, kind: RequestKind, draw: Random) -> None:
    unread = UnreadRequest(kind, mutated_json(BODIES[kind], draw))
    with bounded():
        read = read_request(unread, toy, ServedModel("toy", CONTEXT))
        answer = roundtrip(read)
    if refusal := answer.refusal:
        assert 400 <= refusal.status < 500
        assert len(refusal.message) < 1100
    elif answer.engine_request is not None:
        check_request(answer.engine_request.generate, toy)


def roundtrip(read: ReadRequest) -> ReadRequest:
    """Send an answer to the guard, as the reader process does."""
    import msgspec

    return msgspec.msgpack.decode(msgspec.msgpack.encode(read), type=ReadRequest)


def check_request(asked: Generate, tokenizer: Tokenizer) -> None:
    """Check what a rank relies on."""
    assert 1 <= asked.max_tokens <= CONTEXT - len(asked.prompt)
    assert asked.prompt
    assert all(0 <= token < tokenizer.vocabulary_size for token in asked.prompt)
    sampling = asked.sampling
    assert 0 <= sampling.temperature <= 2
    assert 0 < sampling.top_p <= 1
    assert 0 <= sampling.top_k < 2**31
    assert 0 <= sampling.min_p <= 1
    assert sampling.seed is None or -(2**63) <= sampling.seed < 2**63
    assert 0.001 <= sampling.repetition_penalty <= 10
    assert all(0 <= token < tokenizer.vocabulary_size for token in sampling.logit_bias)


class AnyEngine:
    """An engine whose answer to a prompt is always the same, and which cancels."""

    state: EngineState = "ready"
    cause = ""

    def __init__(self) -> None:
        self.cancelled: set[str] = set()

    def cancel(self, request_id: str) -> None:
        self.cancelled.add(request_id)

    async def submit(self, request: Generate) -> AsyncIterator[EngineEvent]:
        import asyncio

        made = 0
        value = zlib.crc32(repr(request.prompt).encode())
        while made < request.max_tokens and request.request_id not in self.cancelled:
            await asyncio.sleep(0.0005)
            made += 1
            yield Tokens(request.request_id, [97 + (value >> made) % 26])
        reason = "cancelled" if request.request_id in self.cancelled else "length"
        yield Finished(request.request_id, reason, len(request.prompt), made, 0, 0.0, 0.0, 0.0)  # type: ignore[arg-type]


def test_hostile_clients_get_an_answer_or_a_close_and_good_ones_theirs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    http = partial(LimitedConnection, ConnectionLimits(200, 200))
    with serving(AnyEngine(), ServedModel("toy", CONTEXT), LetterTokenizer(), http=http) as url:  # type: ignore[arg-type]
        host, port = url.removeprefix("http://").split(":")
        address = (host, int(port))
        quiet = [carry_out(good(index), address).texts[0] for index in range(len(PROMPTS))]

        def client(number: int) -> str:
            attack = make_attack(SEED, number)
            waits = attack.ending == "read" and attack.kind in ("framing", "cut short")
            if waits or attack.kind in SLOW:  # the former for the server's time limits
                return ""
            wrong = complaint(attack, carry_out(attack, address), quiet)
            if not wrong and number % 10 == 0:
                ordinary = good(number % len(PROMPTS))
                wrong = complaint(ordinary, carry_out(ordinary, address), quiet)
            return (
                wrong and f"seed {SEED}, number {number}, {attack.kind}: {wrong}; {attack!r:.2000}"
            )

        with caplog.at_level(logging.ERROR), ThreadPoolExecutor(CLIENTS) as pool:
            wrong = list(filter(None, pool.map(client, range(ATTACKS))))
    assert not wrong, "\n".join(wrong[:5])
    assert not [record for record in caplog.records if record.exc_info], caplog.text[:3000]


def test_a_third_of_the_clients_reach_a_rank() -> None:
    assert sum(share for _, share, _, reaches in KINDS if reaches) > 333
