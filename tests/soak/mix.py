"""The requests of the clients of a long load, and checks of their answers."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.support.faults import CONTEXT, NO_CERTIFICATES, SECONDS, WITNESSES, Served


@dataclass
class Answer:
    """One request as its client saw it; times in seconds, ``began`` since the start of the load."""

    kind: str
    began: float
    seconds: float = 0.0
    first_token_seconds: float | None = None
    tokens: int = 0
    error: str = ""


@dataclass
class Mix:
    """Requests to one run, with the answers that it gives without other load."""

    run: Served
    long_prompts: list[list[int]]
    long_quiet: list[str]

    @classmethod
    def of(cls, run: Served) -> Mix:
        """Ask for the long prompts' answers while nothing else is being computed."""
        prompts = [random.Random(seed).choices(range(300, 900), k=600 + seed) for seed in (1, 99)]
        return cls(run, prompts, [run.complete(prompt, max_tokens=8) for prompt in prompts])

    def short(self, draw: random.Random, answer: Answer) -> None:
        """20 tokens in, 24 out."""
        index = draw.randrange(len(WITNESSES))
        answer.tokens = 24
        assert self.run.complete(WITNESSES[index]) == self.run.quiet[index], "another text"

    def long_prompt(self, draw: random.Random, answer: Answer) -> None:
        """600 to 700 tokens in, 8 out."""
        index = draw.randrange(len(self.long_prompts))
        answer.tokens = 8
        text = self.run.complete(self.long_prompts[index], max_tokens=8)
        assert text == self.long_quiet[index], "another text"

    def long_answer(self, draw: random.Random, answer: Answer) -> None:
        """4 tokens in, 100 to 300 out, streamed, with temperature and seed."""
        wanted = draw.randint(100, 300)
        body = self.run.body(
            [300 + draw.randrange(500)] * 4, max_tokens=wanted, stream=True, temperature=0.8,
            seed=draw.randrange(1000), stream_options={"include_usage": True},
        )  # fmt: skip
        started = time.monotonic()
        with httpx.stream(
            "POST",
            f"{self.run.url}/v1/completions",
            json=body,
            timeout=SECONDS,
            verify=NO_CERTIFICATES,
        ) as r:
            assert r.status_code == 200, r.read().decode()
            for line in r.iter_lines():
                if not line.startswith("data: {"):
                    continue
                if answer.first_token_seconds is None:
                    answer.first_token_seconds = time.monotonic() - started
                if usage := json.loads(line[6:]).get("usage"):
                    answer.tokens = usage["completion_tokens"]
        assert answer.tokens == wanted, f"{answer.tokens} tokens of {wanted}"

    def conversation(self, draw: random.Random, answer: Answer) -> None:
        """Three turns of a chat, each with the kept prefix; the last again without."""
        messages: list[dict[str, str]] = []
        for turn in range(3):
            messages.append({"role": "user", "content": f"{draw.randrange(10_000)} and {turn}?"})
            said, tokens = self._chat(messages, cache=True)
            answer.tokens += tokens
            if turn < 2:
                messages.append({"role": "assistant", "content": said})
        afresh, tokens = self._chat(messages, cache=False)
        answer.tokens += tokens
        assert said == afresh, "another text with a kept prefix"

    def _chat(self, messages: list[dict[str, str]], *, cache: bool) -> tuple[str, int]:
        body = {"messages": messages, "max_tokens": 16, "temperature": 0, "k2": {"cache": cache}}
        url = f"{self.run.url}/v1/chat/completions"
        answer = httpx.post(url, json=body, timeout=SECONDS, verify=NO_CERTIFICATES)
        assert answer.status_code == 200, answer.text
        said = answer.json()
        return said["choices"][0]["message"]["content"], said["usage"]["completion_tokens"]

    def walks_away(self, draw: random.Random, answer: Answer) -> None:
        """A stream that its client leaves after 0 to 9 chunks."""
        self.run.drop([300 + draw.randrange(500)] * 8, draw.randrange(10))

    def malformed(self, draw: random.Random, answer: Answer) -> None:
        """A body with a wrong field, or more tokens than the context."""
        changes: dict[str, Any] = draw.choice([{"stop": [5]}, {"temperature": "hot"}])
        if draw.random() < 0.3:
            changes = {"prompt": [301] * (CONTEXT + 1)}
        refused = self.run.post(**{"prompt": [301], **changes})
        assert 400 <= refused.status_code < 500, f"{refused.status_code}: {refused.text}"


Ask = Callable[[Mix, random.Random, Answer], None]
# Kind, how many of twenty, and how.
KINDS: tuple[tuple[str, int, Ask], ...] = (
    ("short", 8, Mix.short),
    ("long prompt", 3, Mix.long_prompt),
    ("long answer", 3, Mix.long_answer),
    ("conversation", 3, Mix.conversation),
    ("walks away", 2, Mix.walks_away),
    ("malformed", 1, Mix.malformed),
)


def client(
    mix: Mix,
    draw: random.Random,
    started: float,
    until: float,
    kinds: Sequence[tuple[str, int, Ask]] = KINDS,
) -> list[Answer]:
    """Send requests one after the other until the time is over."""
    answers = []
    while time.monotonic() < until:
        name, _, ask = draw.choices(kinds, weights=[share for _, share, _ in kinds])[0]
        began = time.monotonic()
        answer = Answer(name, began - started)
        try:
            ask(mix, draw, answer)
        except (AssertionError, httpx.HTTPError, KeyError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"[:300]
        answer.seconds = time.monotonic() - began
        answers.append(answer)
    return answers
