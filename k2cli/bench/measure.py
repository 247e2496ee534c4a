"""Measurement of cases: send requests, time them, repeat.

Single requests are timed by the server's own timings if it sends them. Otherwise the client's clock
counts, which includes the network. Each case is run once unmeasured first.

Two quantities are measured indirectly:

* prompt processing at a depth d is the difference between prompts of d + n and of d tokens, both
  timed in every repetition;
* concurrent prompts (pp) are timed from the start of the first request to the last first token.
  Concurrent generation (tg) counts only tokens that arrive while all requests are generating,
  because a request that has its first token early waits for the other prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from k2cli.bench.cases import BenchCase
from k2cli.bench.prompts import PromptMaker
from k2cli.bench.report import BenchRow, Clock, Sample
from k2cli.errors import K2Error

if TYPE_CHECKING:
    from k2cli.client.answers import Timings
    from k2cli.client.client import Completion


class BenchTarget(Protocol):
    """Server to measure: a ``CompletionSource``, or a simulated server in tests."""

    def tokenize(self, text: str) -> list[int]:
        """Tokenize plain text without special tokens."""
        ...

    def complete(self, prompt: list[int], tokens: int) -> Completion:
        """Generate exactly ``tokens`` tokens without a cache; called from several threads."""
        ...


@dataclass(frozen=True, slots=True)
class RepetitionDone:
    """End of a repetition; ``index`` 0 is the warm-up, which does not count."""

    case: BenchCase
    index: int
    of: int
    sample: Sample
    clock: Clock = "client"


@dataclass(frozen=True, slots=True)
class RowDone:
    """End of all repetitions of a case."""

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
        in_turns: run one repetition of each case at a time, so that a busy minute of the machine
            affects all cases and not only one. Rows come at the end.
        warm_up: run each case once unmeasured first.
        enough: called after each repetition; True skips the remaining ones.

    Raises:
        K2Error: if a request fails, or a measurement is meaningless.
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
            f"{case.name} is too short to be measured: it took {seconds:.6f} s",
            "k2 bench -p 512 -n 128",
        )
    first = [one.first_token_at - one.started_at for one in finished]
    return clock, Sample(counted / seconds, seconds, sum(first) / len(first))


def _complete(
    target: BenchTarget, prompts: PromptMaker, prompt_tokens: int, tokens: int, case: BenchCase
) -> list[Completion]:
    """Run the concurrent requests of a case."""
    asked = [prompts.make(prompt_tokens) for _ in range(case.concurrency)]
    if case.concurrency == 1:  # in this thread, so that Ctrl-C does not wait for the answer
        finished = [target.complete(asked[0], tokens)]
    else:
        with ThreadPoolExecutor(case.concurrency, thread_name_prefix="bench") as pool:
            finished = list(pool.map(lambda prompt: target.complete(prompt, tokens), asked))
    if cached := sum(one.cached_tokens for one in finished):
        raise K2Error(f"{case.name}: the server took {cached} prompt tokens from a cache")
    return finished


def _server_times(finished: Sequence[Completion]) -> Timings | None:
    """Return the server's timings of a single request, if any; they are useless for concurrent."""
    return finished[0].timings if len(finished) == 1 else None


def _prefill_seconds(finished: Sequence[Completion]) -> float:
    if (times := _server_times(finished)) is not None:
        return times.prefill_seconds
    return max(one.first_token_at for one in finished) - min(one.started_at for one in finished)


def _decoded(finished: Sequence[Completion], generated: int) -> tuple[int, float]:
    """Return the number of tokens generated while all requests were generating, and the seconds."""
    if (times := _server_times(finished)) is not None:
        return generated - 1, times.decode_seconds
    begin = max(one.first_token_at for one in finished)
    end = min(one.last_token_at for one in finished)
    together = sum(begin < moment <= end for one in finished for moment in one.token_times)
    if together:
        return together, end - begin
    # The requests did not overlap, or the server does not count tokens: use all tokens but the
    # first one of the first request.
    begin = min(one.first_token_at for one in finished)
    return len(finished) * generated - 1, max(one.last_token_at for one in finished) - begin
