"""Warm-up before a run is ready: the self-test, and the shapes of steps that requests will use.

The first step of a shape may compile kernels, choose algorithms, and touch weights and memory for
the first time. On CUDA most of MLX's kernels are compiled when they are first used, and those for
quantized matrices exist in versions for up to 16, 32, 64, 128 and more tokens; so the shapes there
are one of each version, the largest chunk, the last part of a prompt, and batches of answers. On a
CPU kernels do not depend on shapes, and Metal's are compiled in advance. There the self-test is
enough, unless its first pass took long and a second one did not: then the machine is cold, and a
few more shapes are computed.

In a pipeline on CUDA, later stages compile kernels while earlier ones do (``early_kernels``).

Batches are warmed up by requests to the engine itself, so that every path of theirs is included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from k2cli.choices import DRAFT_LENGTHS
from k2cli.protocol import (
    Assignment,
    CloseSequence,
    CutBack,
    Decode,
    Generate,
    JoinBatch,
    LeaveBatch,
    OpenSequence,
    Prefill,
    Sampling,
    Warm,
    WarmUp,
)
from k2cli.rank.control import Followers
from k2cli.rank.engine.engine import Engine
from k2cli.rank.startup.link_check import LinkChecker, spread_prompt
from k2cli.rank.startup.self_test import run_self_test

DeviceKind = Literal["cpu", "metal", "cuda"]
Report = Callable[[str, int, int], None]
"""Receives the shape that is being warmed up, its number, and the count (0: not known yet)."""

SELF_TEST = "self-test"
_TILES = (16, 32, 64, 128)
"""Tokens up to which a version of CUDA's kernels for quantized matrices is used (MLX 0.32)."""

_METAL_TOKENS, _CPU_TOKENS = (16, 64, 256), (16,)
"""Tokens of the chunks that a cold machine computes; with them weights and memory are touched."""

_LEFT_TOKENS = 20
"""Tokens of the last part of a prompt, after the largest chunk."""

_PROMPT_TOKENS, _ANSWER_TOKENS = 12, 3
"""Length of the requests that are answered together."""

_MOST_ROWS = 64
"""The most requests that are answered together."""

_LONG_SECONDS = 2.0
"""A first self-test that takes longer may have done more than compute."""

_COLD_RATIO = 4.0
"""It has, and the machine is cold, if it took so many times as long as a second one."""

_SEQUENCE = _BATCH = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape of steps.

    A chunk of ``tokens`` and the rest of its prompt, or ``rows`` requests, or a draft of
    ``drafted`` tokens.
    """

    tokens: int = 0
    left_tokens: int = 0
    rows: int = 0
    drafted: int = 0

    @property
    def text(self) -> str:
        if self.rows:
            return f"{self.rows} requests at once"
        if self.drafted:
            return f"a draft of {self.drafted} tokens"
        left = f" and {self.left_tokens} more" if self.left_tokens else ""
        return f"prefill of {self.tokens:,} tokens{left}"


def shapes_to_warm(
    device: DeviceKind,
    *,
    cold: bool,
    context_length: int,
    concurrency: int,
    chunk_tokens: int,
    link_check: bool = False,
    speculates: bool = False,
) -> list[Shape]:
    """Choose the shapes to compute after the self-test, smallest first.

    ``link_check`` True leaves out those that the link check computes: the largest chunk, and on a
    cold machine the chunks that only touch weights and memory.
    """
    if not cold and device != "cuda":
        return []
    largest = min(chunk_tokens, context_length - 1 - _LEFT_TOKENS)
    sizes = {"cpu": _CPU_TOKENS, "metal": _METAL_TOKENS, "cuda": (*_TILES, largest)}[device]
    if link_check:
        sizes = _TILES if device == "cuda" else ()
    tokens = sorted({size for size in sizes if 1 <= size <= largest})
    shapes = [Shape(tokens=size) for size in tokens]
    if shapes:
        shapes[-1] = Shape(tokens=tokens[-1], left_tokens=_LEFT_TOKENS)
    if context_length > _PROMPT_TOKENS + _ANSWER_TOKENS:
        shapes += [Shape(rows=rows) for rows in _batches(device, concurrency)]
    if speculates and device == "cuda" and context_length > _PROMPT_TOKENS + DRAFT_LENGTHS[-1]:
        shapes += [Shape(drafted=drafted) for drafted in DRAFT_LENGTHS]
    return shapes


def _batches(device: DeviceKind, concurrency: int) -> list[int]:
    most = min(concurrency, _MOST_ROWS)
    if device == "cuda":
        return sorted({rows for rows in (2, 8, *_TILES, most) if 2 <= rows <= most})
    return [2] if most >= 2 else []


def warm_up(
    engine: Engine,
    followers: Followers,
    assignment: Assignment,
    report: Report,
    timeout_seconds: float,
) -> int:
    """Run the self-test and the link check, and warm up the shapes of later requests.

    Args:
        timeout_seconds: for the followers' answers to the self-test.

    Returns:
        The tokens of the longest prompt of the link check, 0 without one.

    Raises:
        ClusterError: if the self-test or the link check fails.
    """
    device = _device()
    wanted_check = assignment.link_check if assignment.size > 1 else None

    def shapes(*, cold: bool) -> list[Shape]:
        return shapes_to_warm(
            device,
            cold=cold,
            context_length=assignment.context_length,
            concurrency=assignment.concurrency,
            chunk_tokens=assignment.prefill_chunk_tokens,
            link_check=wanted_check is not None,
            speculates=engine.speculates,
        )

    def announce(text: str, number: int, count: int) -> None:
        report(text, number, count)
        engine.now(WarmUp(engine.next_number, text, number, count))

    def test() -> tuple[int, float]:
        started = time.monotonic()
        vocabulary = run_self_test(engine, followers, assignment.size, timeout_seconds)
        return vocabulary, time.monotonic() - started

    wanted = shapes(cold=False)
    announce(SELF_TEST, 1, 1 + len(wanted) if wanted else 0)
    vocabulary, first_seconds = test()
    if not wanted and first_seconds > _LONG_SECONDS:
        _, seconds = test()
        wanted = shapes(cold=first_seconds > _COLD_RATIO * seconds)
    checked = 0
    if wanted_check is not None:
        check = LinkChecker(engine, followers, assignment, report, vocabulary, timeout_seconds)
        checked = check.check(wanted_check)
    for number, shape in enumerate(wanted, start=2):
        announce(shape.text, number, 1 + len(wanted))
        if shape.rows:
            _answer(engine, shape.rows, vocabulary)
        elif shape.drafted:
            _verify(engine, shape.drafted, vocabulary)
        else:
            _prefill(engine, shape, vocabulary)
    engine.forget_rates()
    engine.now(Warm(engine.next_number))
    return checked


def _device() -> DeviceKind:
    if mx.default_device() != mx.gpu:
        return "cpu"
    return "cuda" if mx.cuda.is_available() else "metal"


def _prefill(engine: Engine, shape: Shape, vocabulary: int) -> None:
    engine.now(OpenSequence(engine.next_number, _SEQUENCE))
    for tokens in filter(None, (shape.tokens, shape.left_tokens)):
        prompt = spread_prompt(tokens, tokens, vocabulary)
        engine.now(Prefill(engine.next_number, _SEQUENCE, prompt))
    engine.now(CloseSequence(engine.next_number, _SEQUENCE))


def _verify(engine: Engine, drafted: int, vocabulary: int) -> None:
    """Verify a draft, and cut it back."""
    engine.now(OpenSequence(engine.next_number, _SEQUENCE))
    prompt = spread_prompt(_PROMPT_TOKENS, drafted, vocabulary)
    engine.now(Prefill(engine.next_number, _SEQUENCE, prompt))
    engine.now(JoinBatch(engine.next_number, _BATCH, _SEQUENCE))
    first, *drafts = spread_prompt(1 + drafted, 0, vocabulary)
    result = engine.now(Decode(engine.next_number, _BATCH, [first], drafts=drafts))
    if result.logits is not None:
        mx.eval(mx.argmax(result.logits, axis=-1))
    engine.now(CutBack(engine.next_number, _BATCH, drafted))
    engine.now(LeaveBatch(engine.next_number, _BATCH, _SEQUENCE))


def _answer(engine: Engine, rows: int, vocabulary: int) -> None:
    """Answer ``rows`` requests at once, half of them with random choices."""
    for row in range(rows):
        random = Sampling(temperature=1.0, top_p=0.9, seed=row) if row % 2 else Sampling()
        prompt = spread_prompt(_PROMPT_TOKENS - row % 3, row, vocabulary)
        engine.accept(Generate(f"warm-up-{rows}-{row}", prompt, _ANSWER_TOKENS, random, [], False))
    while engine.busy:
        engine.advance()
    engine.tick()  # decisions without computing may be left in a pipeline
