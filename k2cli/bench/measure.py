"""Measuring: send requests, look at the clocks, repeat.

Where the server sends its own timings and there is one request at a time, they are what counts;
otherwise the client's clock is, network and all. Each case is run once unmeasured first.

Two things that a client can only measure indirectly:

* prompt processing at a depth d is the difference between prompts of d + n and of d tokens, both
  timed in every repetition;
* the speed of concurrent requests is that of all their prompts from the first one's start to the
  last one's first token (pp), and of the tokens that came while all of them were being answered
  (tg): one that has its first token early waits meanwhile for the others' prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from k2cli.bench.cases import BenchCase
from k2cli.bench.prompts import PromptMaker
from k2cli.bench.report import BenchRow, Clock, Sample
from k2cli.errors import K2Error


class CompletionTimings(Protocol):
    """The server's own clock, in seconds."""

    @property
    def prefill_seconds(self) -> float:
        """Computing the prompt and the first token."""
        ...

    @property
    def decode_seconds(self) -> float:
        """All tokens after the first."""
        ...


class CompletionTimes(Protocol):
    """One completion; moments are of the client's monotonic clock."""

    @property
    def started_at(self) -> float:
        """When it was asked for."""
        ...

    @property
    def first_token_at(self) -> float:
        """When its first token was announced."""
        ...

    @property
    def last_token_at(self) -> float:
        """When its last token was announced."""
        ...

    @property
    def token_times(self) -> Sequence[float]:
        """When each token was announced; empty if the server does not count them."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed."""
        ...

    @property
    def timings(self) -> CompletionTimings | None:
        """By the server's clock, if it says."""
        ...


class BenchTarget(Protocol):
    """The server that is measured."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of plain text."""
        ...

    def complete(self, prompt: list[int], tokens: int) -> CompletionTimes:
        """Generate exactly so many tokens, nothing cached. Called from several threads."""
        ...


@dataclass(frozen=True, slots=True)
class RepetitionDone:
    """``index`` 0 is the warm-up, whose sample does not count."""

    case: BenchCase
    index: int
    of: int
    sample: Sample
    clock: Clock = "client"


@dataclass(frozen=True, slots=True)
class RowDone:
    """All repetitions of a case."""

    row: BenchRow


def measure(
    target: BenchTarget,
    cases: Sequence[BenchCase],
    repetitions: int,
    *,
    in_turns: bool = False,
    warm_up: bool = True,
    enough: Callable[[], bool] = lambda: False,
) -> Iterator[RepetitionDone | RowDone]:
    """Measure each case ``repetitions`` times.

    Args:
        in_turns: take the cases in turns, one repetition of each at a time, so that a minute in
            which the machine was busy falls on all of them and not on one. Rows come at the end.
        warm_up: run each case once unmeasured first.
        enough: asked after each repetition, whether to leave out the others.

    Raises:
        K2Error: if a request fails, or a measurement has no meaning.
    """
    prompts = PromptMaker(target.tokenize)
    together = [list(cases)] if in_turns else [[case] for case in cases]
    for group in together:
        samples: dict[BenchCase, list[Sample]] = {case: [] for case in group}
        clocks: dict[BenchCase, Clock] = {}
        for index in range(0 if warm_up else 1, repetitions + 1):
            if index > 1 and enough():
                break
            for case in group:
                clocks[case], sample = _repetition(target, prompts, case)
                if index > 0:
                    samples[case].append(sample)
                yield RepetitionDone(case, index, repetitions, sample, clocks[case])
        for case in group:
            yield RowDone(BenchRow(case, clocks[case], tuple(samples[case])))


def _repetition(target: BenchTarget, prompts: PromptMaker, case: BenchCase) -> tuple[Clock, Sample]:
    finished = _complete(target, prompts, case.prompt_tokens, case.generated_tokens, case)
    clock: Clock = "server" if _server_times(finished) else "client"
    if case.kind == "tg":
        counted, seconds = _decoded(finished, case.generated_tokens)
    else:
        seconds = _prefill_seconds(finished)
        if case.depth:
            seconds -= _prefill_seconds(_complete(target, prompts, case.depth, 1, case))
        counted = case.concurrency * case.tokens
    if seconds <= 0:
        raise K2Error(
            f"{case.name} is too short to be measured: its time came out as {seconds:.6f} s",
            "choose larger sizes",
        )
    first = [one.first_token_at - one.started_at for one in finished]
    return clock, Sample(counted / seconds, seconds, sum(first) / len(first))


def _complete(
    target: BenchTarget, prompts: PromptMaker, prompt_tokens: int, tokens: int, case: BenchCase
) -> list[CompletionTimes]:
    """Run as many requests at a time as the case has clients."""
    asked = [prompts.make(prompt_tokens) for _ in range(case.concurrency)]
    if case.concurrency == 1:  # in this thread: Ctrl-C need not wait for the answer
        finished = [target.complete(asked[0], tokens)]
    else:
        with ThreadPoolExecutor(case.concurrency, thread_name_prefix="bench") as pool:
            finished = list(pool.map(lambda prompt: target.complete(prompt, tokens), asked))
    if cached := sum(one.cached_tokens for one in finished):
        raise K2Error(f"{case.name}: the server took {cached} prompt tokens from a cache")
    return finished


def _server_times(finished: Sequence[CompletionTimes]) -> CompletionTimings | None:
    """The server's clock, if it says what is wanted: it times requests one by one."""
    return finished[0].timings if len(finished) == 1 else None


def _prefill_seconds(finished: Sequence[CompletionTimes]) -> float:
    if (times := _server_times(finished)) is not None:
        return times.prefill_seconds
    return max(one.first_token_at for one in finished) - min(one.started_at for one in finished)


def _decoded(finished: Sequence[CompletionTimes], generated: int) -> tuple[int, float]:
    """Tokens, and the seconds in which they came: while all requests were being answered."""
    if (times := _server_times(finished)) is not None:
        return generated - 1, times.decode_seconds
    begin = max(one.first_token_at for one in finished)
    end = min(one.last_token_at for one in finished)
    together = sum(begin < moment <= end for one in finished for moment in one.token_times)
    if together:
        return together, end - begin
    # They did not meet, or nobody counted: all there is, the first token of the first left out.
    begin = min(one.first_token_at for one in finished)
    return len(finished) * generated - 1, max(one.last_token_at for one in finished) - begin
