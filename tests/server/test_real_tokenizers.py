"""The API with the tokenizers of the real demo model and of a toy of K2."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest

from k2cli.models.json_files import read_generation_config
from k2cli.models.text.tokenizer import Tokenizer
from k2cli.protocol import TokenLogprob, Tokens
from k2cli.server.served_model import served_model_from
from tests.server.scripted import Hang, ScriptedEngine, finished, serving

ANSWER = "The capital is Paris 🇫🇷.\n巴黎是首都，naïve café.\n\nEND of it"


@pytest.fixture(params=["demo_checkpoint", "toy_k2"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def test_answers_stops_and_tokenize(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(ANSWER)
    engine = ScriptedEngine()
    scores = [TokenLogprob(-1.0, [(token, -1.0)]) for token in ids]
    each = [Tokens("", [token], [score]) for token, score in zip(ids, scores, strict=True)]
    served = served_model_from(read_generation_config(folder), "model", 2000)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    with serving(engine, served, tokenizer) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=10)
        engine.enqueue([*each, finished(len(ids))])
        stream = client.chat.completions.create(model="model", messages=messages, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        engine.enqueue([*each, Hang()])
        stopped = client.chat.completions.create(
            model="model", messages=messages, stop="首都，na", logprobs=True, top_logprobs=1
        )
        counted = httpx.post(f"{url}/v1/tokenize", json={"messages": messages}).json()
        client.close()
    assert "".join(pieces) == ANSWER
    assert len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)
    choice = stopped.choices[0]
    assert choice.message.content == ANSWER.partition("首都，na")[0]
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.content
    assert choice.logprobs.content[0].token == tokenizer.decode(ids[:1])
    assert engine.cancelled == [engine.submitted[1].request_id]
    request = engine.submitted[0]
    assert counted["tokens"] == request.prompt
    assert "What is the capital of France?" in tokenizer.decode(request.prompt)
    assert request.stop_tokens == sorted(tokenizer.stop_tokens) != []
