"""One client for both servers: streamed completions, with the moment of each piece of text."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks.statistics import Answer

ANSWER_LIMIT_SECONDS = 300.0
_SPECIAL = re.compile(r"<\|[^|]*\|>")
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: a prompt or a conversation, and the number of tokens wanted."""

    prompt: str | tuple[Message, ...]
    max_tokens: int


def _body(ask: Ask, model: str, extra: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    common = {
        "model": model,
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    } | extra
    if isinstance(ask.prompt, str):
        return "/v1/completions", common | {"prompt": ask.prompt}
    return "/v1/chat/completions", common | {"messages": list(ask.prompt)}


def ask_all(port: int, asks: Sequence[Ask], *, model: str, extra: dict[str, Any]) -> list[Answer]:
    """Send all at the same moment; wait for all answers.

    Raises:
        RuntimeError: if an answer is an error, breaks off, or has another number of tokens than
            asked for.
        OSError: if the server cannot be reached.
    """
    gate = threading.Barrier(len(asks))
    with ThreadPoolExecutor(len(asks)) as pool:
        futures = [pool.submit(_ask, port, *_body(ask, model, extra), gate) for ask in asks]
        try:
            answers = [future.result(ANSWER_LIMIT_SECONDS) for future in futures]
        except (http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError):
                raise
            raise RuntimeError(f"an answer broke off: {type(error).__name__}: {error}") from error
    for ask, answer in zip(asks, answers, strict=True):
        if answer.tokens != ask.max_tokens:
            raise RuntimeError(f"{answer.tokens} tokens came, {ask.max_tokens} were asked for")
    return answers


def _ask(port: int, path: str, body: dict[str, Any], gate: threading.Barrier) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_LIMIT_SECONDS)
    connection.connect()
    payload = json.dumps(body).encode()
    gate.wait(30)
    started = time.perf_counter()
    connection.request("POST", path, payload, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{path} answered {response.status}: {response.read()[:500]!r}")
    text = ""
    marks: list[tuple[float, int]] = []
    usage: dict[str, int] = {}
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        usage = event.get("usage") or usage
        if "error" in event:
            raise RuntimeError(f"{path} broke off: {event['error']}")
        for choice in event.get("choices", ()):
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            if piece:
                text += piece
                marks.append((time.perf_counter() - started, len(text)))
    connection.close()
    if not marks or not usage:
        raise RuntimeError(f"{path} ended without text or usage")
    # mlx-lm spells special tokens out in its text, k2 leaves them out.
    content = _SPECIAL.sub("", text).strip()
    return Answer(usage["prompt_tokens"], usage["completion_tokens"], tuple(marks), content)
