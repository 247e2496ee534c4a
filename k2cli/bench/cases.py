"""Cases of a benchmark: prompt processing (pp) and text generation (tg) at given sizes.

Names and sizes follow llama-bench, so that results can be compared: ``pp512`` processes 512 prompt
tokens, ``tg128`` generates 128, each after ``depth`` tokens of context that are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from k2cli.errors import UsageError
from k2cli.units import parse_tokens

CaseKind = Literal["pp", "tg"]

_EXAMPLES = {0: "512,2048", 1: "1,4"}
"""Lists for hints, by the least size."""


@dataclass(frozen=True, slots=True)
class BenchCase:
    """Measurement of ``tokens`` of one kind after ``depth`` tokens, by ``concurrency`` clients."""

    kind: CaseKind
    tokens: int
    depth: int = 0
    concurrency: int = 1

    @property
    def name(self) -> str:
        """Name as in llama-bench: ``pp512``, ``tg128 @ d4096``, ``tg128 c4``."""
        depth = f" @ d{self.depth}" if self.depth else ""
        concurrency = f" c{self.concurrency}" if self.concurrency > 1 else ""
        return f"{self.kind}{self.tokens}{depth}{concurrency}"

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt to send; generation needs at least one token."""
        return self.depth + self.tokens if self.kind == "pp" else max(self.depth, 1)

    @property
    def generated_tokens(self) -> int:
        """Number of tokens to generate; the first belongs to prefill and is not counted."""
        return 1 if self.kind == "pp" else self.tokens + 1

    @property
    def context_tokens(self) -> int:
        """Context length that the case needs."""
        return self.prompt_tokens + self.generated_tokens


def parse_sizes(text: str, option: str, *, at_least: int = 0) -> list[int]:
    """Parse a list of sizes such as ``512,2048`` or ``2k,16k``.

    Args:
        text: the value of the option.
        option: the name of the option.
        at_least: the least size that makes sense.

    Raises:
        UsageError: if the text is not a list of numbers of tokens, or one is too small.
    """
    sizes = []
    for part in text.split(","):
        try:
            size = parse_tokens(part)
        except UsageError as error:
            message = f"{option} '{text}' is not a list of sizes"
            raise UsageError(message, f"{option} {_EXAMPLES[at_least]}") from error
        if size < at_least:
            raise UsageError(
                f"{option} {size} is too small: the minimum is {at_least}",
                f"{option} {_EXAMPLES[at_least]}",
            )
        sizes.append(size)
    return sizes


def make_cases(
    prompts: Sequence[int],
    generations: Sequence[int],
    depths: Sequence[int],
    concurrencies: Sequence[int],
) -> list[BenchCase]:
    """Build all combinations in the order of llama-bench, pp before tg; sizes of 0 are left out.

    Raises:
        UsageError: if there are no cases.
    """
    cases = []
    for concurrency in concurrencies:
        for depth in depths:
            cases += [BenchCase("pp", size, depth, concurrency) for size in prompts if size]
            cases += [BenchCase("tg", size, depth, concurrency) for size in generations if size]
    if not cases:
        raise UsageError("there is nothing to measure", "k2 bench -p 512 -n 128")
    return cases


def check_context(cases: Sequence[BenchCase], context_length: int | None) -> None:
    """Refuse cases that exceed the server's context, before anything is measured.

    Raises:
        UsageError: if a case exceeds it.
    """
    for case in cases:
        if context_length is not None and case.context_tokens > context_length:
            raise UsageError(
                f"{case.name} needs a context of {case.context_tokens} tokens, "
                f"and the server has {context_length}",
                f"k2 stop; k2 launch MODEL --context {case.context_tokens}, "
                "with the MODEL that k2 ps shows",
            )
