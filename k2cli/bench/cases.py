"""What to measure: prompt processing (pp) and text generation (tg) at given sizes.

The names and the meaning of sizes follow llama-bench, so that figures can be put side by side:
``pp512`` computes 512 prompt tokens, ``tg128`` generates 128, each after ``depth`` tokens of
context that are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from k2cli.errors import UsageError

CaseKind = Literal["pp", "tg"]


@dataclass(frozen=True, slots=True)
class BenchCase:
    """One measurement: ``tokens`` of one kind, after ``depth`` tokens, by ``concurrency`` clients.

    All of them in tokens or counts.
    """

    kind: CaseKind
    tokens: int
    depth: int = 0
    concurrency: int = 1

    @property
    def name(self) -> str:
        """``pp512``, ``tg128 @ d4096``, ``tg128 c4``."""
        depth = f" @ d{self.depth}" if self.depth else ""
        concurrency = f" c{self.concurrency}" if self.concurrency > 1 else ""
        return f"{self.kind}{self.tokens}{depth}{concurrency}"

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt that is sent; generation needs one token to start from."""
        return self.depth + self.tokens if self.kind == "pp" else max(self.depth, 1)

    @property
    def generated_tokens(self) -> int:
        """Tokens to generate. The first one comes out of the prompt, so it is not counted."""
        return 1 if self.kind == "pp" else self.tokens + 1

    @property
    def context_tokens(self) -> int:
        """Tokens that the context must hold."""
        return self.prompt_tokens + self.generated_tokens


def parse_sizes(text: str, option: str, *, at_least: int = 0) -> list[int]:
    """Read ``512,2048``.

    Raises:
        UsageError: if it is no list of whole numbers, or one is too small.
    """
    sizes = []
    for part in text.split(","):
        if not part.strip().isdecimal():
            raise UsageError(f"'{text}' is no list of sizes for {option}", f"{option} 512,2048")
        size = int(part)
        if size < at_least:
            raise UsageError(f"{size} is too small for {option}; the least is {at_least}")
        sizes.append(size)
    return sizes


def make_cases(
    prompts: Sequence[int],
    generations: Sequence[int],
    depths: Sequence[int],
    concurrencies: Sequence[int],
) -> list[BenchCase]:
    """Every combination, in the order of llama-bench: pp before tg. A size of 0 is left out.

    Raises:
        UsageError: if nothing is left.
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
    """Refuse sizes that the server could not hold, before anything is measured.

    Raises:
        UsageError: naming the first such case.
    """
    for case in cases:
        if context_length is not None and case.context_tokens > context_length:
            raise UsageError(
                f"{case.name} needs a context of {case.context_tokens} tokens, "
                f"and the server has {context_length}",
                "choose smaller sizes, or launch with a larger --context",
            )
