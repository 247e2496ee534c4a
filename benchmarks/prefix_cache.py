"""The prefix cache on disk: the time to the first token after a restart, and memory that is shared.

``python -m benchmarks.prefix_cache`` measures runs of one and two ranks on this machine, and prints
the tables of docs/measurements/prefix-cache.md. The model is the small toy of the benchmarks.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoints import SMALL_TOY, make_toy
from benchmarks.comparison import say
from benchmarks.report import environment
from k2cli.prefix_folder import BLOCK_TOKENS, stores
from k2cli.protocol import Finished, PromptProgress, Tokens
from tests.support.rank_pool import RankPool, assignments, running

_PLACEMENTS = (("single", 1), ("pipeline", 2), ("tensor", 2))
_WRITE_SECONDS = 120.0
_TIMEOUT_SECONDS = 1800.0

_PAGE_TEXT = """\
{machine}.
{versions}. Load average at the end: {load}; other work used the cores too.

A run is started with a prefix cache on disk, gets a prompt of {tokens:,} tokens, and is stopped
once the blocks of the prompt are on the disk. A second run gets the same prompt: its blocks are
read, and what is left, at least the last token, is computed. *First* and *second* are the seconds
from the request to the first token. *Beside it* is another answer that goes on meanwhile in a third
run: the longest time between two of its tokens while the blocks are read.

| ranks | first | second | ratio | cached tokens | on disk, all ranks | beside it |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

The answers of both starts are the same. The blocks of the prompt were on the disk {written} s
after the answer.
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds to the first token at both starts, and what the second took from the disk."""

    strategy: str
    ranks: int
    first_seconds: float
    second_seconds: float
    cached_tokens: int
    stored_bytes: int
    written_seconds: float
    longest_gap_seconds: float


def _ask(pool: RankPool, prompt: list[int]) -> tuple[list[int], float, int]:
    """Return the answer, the seconds to its first token, and how many tokens were cached."""
    began = time.monotonic()
    name, first = pool.submit(prompt, 4), 0.0
    while True:
        message = pool.take(_TIMEOUT_SECONDS)
        if isinstance(message, Tokens) and message.request_id == name and not first:
            first = time.monotonic() - began
        if isinstance(message, Finished) and message.request_id == name:
            return pool.outcomes[name].tokens, first, message.cached_tokens


def _beside(pool: RankPool, prompt: list[int], draw: random.Random) -> float:
    """Return the longest time between two tokens of an answer while the prompt is read."""
    other = pool.submit(draw.choices(range(300, 900), k=20), 2000, use_prefix_cache=False)
    while len(pool.outcomes.get(other, _NONE).tokens) < 10:
        pool.take()
    name = pool.submit(prompt, 2)
    longest, last = 0.0, time.monotonic()
    while True:
        message = pool.take(_TIMEOUT_SECONDS)
        now = time.monotonic()
        if isinstance(message, PromptProgress) and message.request_id == name:
            return longest  # it has been read, and what is left is computed
        if isinstance(message, Tokens):
            longest, last = max(longest, now - last), now


@dataclass(frozen=True, slots=True)
class _Nothing:
    tokens: tuple[int, ...] = ()


_NONE = _Nothing()


def _measure(model: Path, strategy: str, ranks: int, tokens: int, folder: Path) -> Measured:
    os.environ["K2_CACHE_DIR"] = str(folder / f"cache-{strategy}-{ranks}")
    draw = random.Random(ranks)
    prompt = draw.choices(range(300, 900), k=tokens)
    parts = assignments(
        model, strategy, ranks, context_length=2 * tokens, prefill_chunk_tokens=512,
        concurrency=2, prefix_disk_bytes=10**11,
    )  # fmt: skip
    with running(RankPool(parts, folder)) as pool:
        answer, first, _ = _ask(pool, prompt)
        began = time.monotonic()
        while sum(store.tokens for store in stores()) < ranks * (tokens // BLOCK_TOKENS * 256):
            if time.monotonic() > began + _WRITE_SECONDS:
                raise SystemExit("the blocks were not written")
            time.sleep(0.05)
        written = time.monotonic() - began
    say(f"{strategy} {ranks}: first token after {first:.2f} s, written after {written:.2f} s")
    with running(RankPool(parts, folder)) as pool:
        again, second, cached = _ask(pool, prompt)
    if again != answer:
        raise SystemExit(f"another answer: {again} after {answer}")
    say(f"{strategy} {ranks}: second start {second:.2f} s, {cached} tokens from the disk")
    with running(RankPool(parts, folder)) as pool:
        gap = _beside(pool, prompt, draw)
    stored = sum(store.nbytes for store in stores())
    return Measured(strategy, ranks, first, second, cached, stored, written, gap)


def _page(measured: Sequence[Measured], tokens: int) -> str:
    rows = "\n".join(
        f"| {m.ranks} ({m.strategy}) | {m.first_seconds:.2f} | {m.second_seconds:.2f} | "
        f"{m.second_seconds / m.first_seconds:.3f} | {m.cached_tokens:,} | "
        f"{m.stored_bytes / 1e6:.1f} MB | {m.longest_gap_seconds * 1e3:.0f} ms |"
        for m in measured
    )
    found = environment()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return _PAGE_TEXT.format(
        machine=f"{found['cpu']}, {found['cores']} cores, {found['system']}",
        versions=f"Python {found['python']}, {versions}",
        load=f"{found['load_average'][0]:.1f}",
        tokens=tokens,
        rows=rows,
        written=f"{min(m.written_seconds for m in measured):.1f} to "
        f"{max(m.written_seconds for m in measured):.1f}",
    )


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix_cache")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the prompt")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="k2-prefix-cache-") as name:
        folder = Path(name)
        os.environ["K2_STATE_DIR"] = str(folder / "state")
        model = make_toy(folder / "toy", SMALL_TOY)
        measured = [
            _measure(model, strategy, ranks, arguments.tokens, folder)
            for strategy, ranks in _PLACEMENTS
        ]
    sys.stdout.write(_page(measured, arguments.tokens))


if __name__ == "__main__":
    main()
