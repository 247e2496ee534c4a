"""Random requests for ranks, and the comparison of each answer with its answer alone.

Requests of several keys join at random, follow each other in conversations, are cancelled, end by a
stop token, their limit or a grammar, and wait for each other's memory. Meanwhile every message of
the leader is checked.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from k2cli.protocol import (
    Finished,
    Grammar,
    Paused,
    PromptProgress,
    RequestFailed,
    Sampling,
    Tokens,
    WaitingOrder,
)
from tests.support.rank_pool import Outcome, RankPool

LOGPROB_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Sent:
    """A request as it was sent. ``stop_tokens`` end it, and its grammar if it has one.

    It is cancelled once it has more than ``most_tokens``: so it may need all of the memory and
    costs the test little time.
    """

    owner: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop_tokens: list[int]
    grammar: Grammar | None
    use_prefix_cache: bool
    most_tokens: int

    def submit(
        self, pool: RankPool, *, use_prefix_cache: bool, use_speculation: bool = True
    ) -> str:
        return pool.submit(
            self.prompt,
            self.max_tokens,
            self.sampling,
            self.stop_tokens,
            use_prefix_cache,
            self.grammar,
            prefix_scope=self.owner,
            owner=self.owner,
            use_speculation=use_speculation,
        )


@dataclass
class Workload:
    """Requests that are drawn, sent and checked.

    Args:
        context_length: of the run.
        grammars: those that requests may have, and the token that ends their answers.
        end_token: what a grammar's answer ends with.
        longest_prompt: of requests that continue no other.
        crowd: requests that wait or run at most.
    """

    pool: RankPool
    seed: int
    context_length: int
    grammars: Sequence[Grammar] = ()
    end_token: int = 0
    longest_prompt: int = 10_000
    crowd: int = 12
    sent: dict[str, Sent] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    pauses: Counter[str] = field(default_factory=Counter)
    _progress: dict[str, PromptProgress] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def run(self, requests: int, timeout_seconds: float = 60.0) -> None:
        """Send that many requests, and wait until all have ended."""
        deadline = time.monotonic() + timeout_seconds
        while len(self.sent) < requests or self.open:
            assert time.monotonic() < deadline, f"{len(self.open)} requests have not ended"
            if len(self.sent) < requests and len(self.open) < self.crowd:
                for _ in range(self.draw.choice((0, 1, 1, 4))):
                    self._send(self._drawn())
            if self.open and self.draw.random() < 0.02:
                self._cancel(self.draw.choice(self.open))
            for _ in range(self.draw.randint(1, 12)):
                if self.open:
                    self._take()

    @property
    def open(self) -> list[str]:
        return [name for name in self.sent if name not in self._ended]

    def begin_with_a_pause(self) -> None:
        """Send an answer that takes all memory, and once it has begun, a short request."""
        bias = {320: 200.0, 321: 200.0}  # so that it is paused between drafts
        options = (Sampling(temperature=0.9, seed=3, logit_bias=bias), [], None, False)
        self._send(Sent("a", list(range(320, 340)), 10_000, *options, 70))
        while not self._progress:
            self._take()
        self._send(Sent("b", list(range(350, 360)), 2, *options, 70))

    @property
    def accepted_tokens(self) -> int:
        """The drafted tokens that became part of answers."""
        ends = (self.pool.outcomes[name].finished for name in self.sent)
        return sum(end.accepted_tokens for end in ends if end is not None)

    # --- drawing ---------------------------------------------------------------------------------

    def _send(self, sent: Sent) -> None:
        name = sent.submit(self.pool, use_prefix_cache=sent.use_prefix_cache)
        self.sent[name] = sent

    def _drawn(self) -> Sent:
        draw, owner, prompt = self.draw, self.draw.choice(("", "a", "b")), list[int]()
        if self.sent and draw.random() < 0.4:
            name, earlier = draw.choice(list(self.sent.items()))
            owner = draw.choice((owner, earlier.owner, earlier.owner))
            answer = self.pool.outcomes.get(name, Outcome()).tokens
            prompt = [*earlier.prompt, *answer][: self.context_length * 3 // 4]
            if draw.random() < 0.4:
                prompt = prompt[: draw.randint(0, len(prompt))]  # it goes on in another way
        longest = min(self.context_length - 1 - len(prompt), self.longest_prompt)
        length = min(longest, draw.choice((1, 2, 20, 20, 60, longest * 3 // 4, longest)))
        prompt += draw.choices(range(300, 900), k=length)
        grammar = draw.choice(self.grammars) if self.grammars and draw.random() < 0.2 else None
        stop_tokens = draw.choices(range(300, 900), k=20) if draw.random() < 0.3 else []
        if grammar is not None:
            stop_tokens = [self.end_token]
        return Sent(
            owner,
            prompt,
            draw.choice((1, 2, 6, 30, 10_000, 10_000)),
            self._sampling(),
            stop_tokens,
            grammar,
            draw.random() < 0.8,
            draw.choice((10, 40, 80, self.longest_prompt)),
        )

    def _sampling(self) -> Sampling:
        draw = self.draw
        options: dict[str, float | int | Mapping[int, float]] = {}
        if draw.random() < 0.4:
            options |= {"temperature": 0.9, "seed": draw.randrange(2**40)}
            options |= draw.choice(({}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02}))
        if draw.random() < 0.3:
            options |= draw.choice(
                (
                    {"presence_penalty": 1.0},
                    {"frequency_penalty": 0.5},
                    {"repetition_penalty": 1.2},
                )
            )
        if draw.random() < 0.1:
            options["logit_bias"] = {draw.randrange(300, 900): 5.0}
        elif draw.random() < 0.4:
            # Few tokens have a chance, so that drafts are right.
            first = draw.randrange(300, 890)
            options["logit_bias"] = {first + n: 200.0 for n in range(draw.choice((1, 2, 4)))}
        if draw.random() < 0.3:
            options["top_logprobs"] = draw.choice((0, 3))
        return Sampling(**options)  # type: ignore[arg-type]

    def _cancel(self, name: str) -> None:
        self.cancelled.add(name)
        self.pool.cancel(name)

    # --- checking --------------------------------------------------------------------------------

    def _take(self) -> None:
        message = self.pool.take(20.0)
        match message:
            case WaitingOrder(request_ids=names):
                assert len(names) == len(set(names))
            case Paused(request_id=name):
                assert name not in self._ended
                self.pauses[name] += 1
            case PromptProgress(request_id=name):
                before = self._progress.get(name)
                assert name not in self._ended
                assert message.total == len(self.sent[name].prompt)
                assert message.cached <= message.done <= message.total
                assert before is None or message.done >= before.done
                self._progress[name] = message
            case Tokens(request_id=name):
                assert name not in self._ended
                count = len(self.pool.outcomes[name].tokens)
                if count > self.sent[name].most_tokens and name not in self.cancelled:
                    self._cancel(name)
            case Finished(request_id=name) | RequestFailed(request_id=name):
                assert name not in self._ended
                self._ended.add(name)
            case _:
                pass

    def check(self) -> None:
        """Compare every answer with what it is alone, without a cache and without drafts."""
        for name, sent in self.sent.items():
            outcome = self.pool.outcomes[name]
            if name in self.cancelled and not outcome.tokens:
                continue
            if name in self.cancelled:
                sent = replace(sent, max_tokens=min(sent.max_tokens, len(outcome.tokens)))
            alone = self.pool.outcome(
                sent.submit(self.pool, use_prefix_cache=False, use_speculation=False)
            )
            self._compare(name, outcome, alone)

    def _compare(self, name: str, outcome: Outcome, alone: Outcome) -> None:
        what = f"seed {self.seed}, {name}, {self.pauses[name]} pauses"
        if name not in self.cancelled or outcome.error is not None:
            assert outcome.error == alone.error, what
        if outcome.error is not None:
            return
        finished, expected = outcome.finished, alone.finished
        assert finished is not None, what
        assert expected is not None, what
        count = len(outcome.tokens)
        assert outcome.tokens == alone.tokens[:count], what
        assert finished.pauses == self.pauses[name], what
        assert finished.accepted_tokens <= min(finished.draft_tokens, count), what
        assert finished.completion_tokens == count, what
        assert finished.cached_tokens < len(self.sent[name].prompt), what
        assert min(finished.queue_seconds, finished.prefill_seconds, finished.decode_seconds) >= 0
        if finished.reason == "cancelled":
            assert name in self.cancelled, what
        elif name not in self.cancelled:
            assert (finished.reason, count) == (expected.reason, len(alone.tokens)), what
        assert len(outcome.logprobs) == min(count, len(alone.logprobs)), what
        for one, other in zip(outcome.logprobs, alone.logprobs, strict=False):
            assert abs(one.logprob - other.logprob) < LOGPROB_TOLERANCE, what
            values = [value for _, value in one.top]
            others = [value for _, value in other.top]
            assert len(values) == len(others), what
            for value, known in zip(values, others, strict=True):
                assert abs(value - known) < LOGPROB_TOLERANCE, what
