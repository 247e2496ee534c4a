"""Sizes of prompt chunks, chosen by the time that chunks have taken on this rank.

A small chunk reads the weights for few tokens, and DeepSeek's attention expands the keys and values
of all earlier tokens anew for each chunk; a large one keeps the other stages of a pipeline, or
running answers, waiting. The best size depends on model and machine: a GPU reads nearly all experts
of an MoE model for a hundred tokens; on a CPU each token of a chunk takes as long as one alone.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from dataclasses import dataclass

# Chunk size while no times are known: enough tokens to hide the reading of weights.
ASSUMED_TOKENS = 256
LEAST_TOKENS = 32
# A token of a small chunk may take this many times as long as one of the largest chunk.
_TOLERANCE = 1.15
_KEPT = 5

# First chunk of a run, before the rate is known: 512 tokens of the demo model take a CPU a
# minute, and the watchdog gives a layer ten seconds.
FIRST_CHUNK_TOKENS = LEAST_TOKENS
# While answers are running, a chunk may delay them by about this long.
STALL_SECONDS = 0.5
# Short prompts computed in one chunk: the first waits as long as the last.
TOGETHER_SECONDS = 2.5
# While no answer is running: a cancellation takes effect after a chunk, and the watchdog, which
# sees progress after each layer, gives a layer ten seconds.
ALONE_SECONDS = 10.0
LAYER_SECONDS = 1.0
# Upper limits in a long context: a rank waits 90 s for another's part of a step.
_LONGEST_SECONDS = 45.0
_LONGEST_LAYER_SECONDS = 2.5
# A chunk has at least this fraction of the tokens before it. K2 expands a token's key and value
# with 1.0 GFLOP (61 layers, 64 heads, 2 x 512 x 128 weights) and computes a token with 64 and
# attention: so expanding takes at most half as much, and while answers run up to twice as much.
_PART_ALONE = 32
_PART_ANSWERING = 128
# MLX on a CPU computes all scores of a chunk, also those that the mask removes. Toy models of K2
# were fastest in chunks of 256 to 512 at 2,048 tokens, and took a fifth more in 1,024.
_CPU_TOKENS = 512
_CPU_PART = 8
# A chunk may be larger by this fraction if that saves a chunk. A last chunk of ten tokens took two
# ranks 1.2 of 35 seconds.
_EXCESS = 0.25


@dataclass(frozen=True, slots=True)
class ChunkBounds:
    """Limits on the tokens of the next chunk of a prompt, by the rate measured so far.

    Args:
        most_tokens: the plan's chunk size, for which memory was counted.
        layers: number of layers of this rank; the watchdog sees progress after each.
        on_gpu: True if MLX computes on a GPU.
    """

    most_tokens: int
    layers: int
    on_gpu: bool

    def alone(self, tokens_per_second: float, context: int) -> int:
        """Limit while no answer is running, after ``context`` tokens; rate 0 means unknown."""
        if not tokens_per_second:
            return self._bounded(FIRST_CHUNK_TOKENS)
        seconds = min(ALONE_SECONDS, LAYER_SECONDS * self.layers)
        wanted = max(tokens_per_second * seconds, context // _PART_ALONE)
        if not self.on_gpu:
            wanted = min(wanted, max(_CPU_TOKENS, context // _CPU_PART))
        return self._bounded(min(wanted, self._longest(tokens_per_second)))

    def answering(self, tokens_per_second: float, context: int) -> int:
        """Limit while answers are running; larger if even the smallest chunk would stall them."""
        wanted = tokens_per_second * STALL_SECONDS
        if 0 < wanted < LEAST_TOKENS:
            wanted = min(context // _PART_ANSWERING, self._longest(tokens_per_second))
        return self._bounded(wanted)

    def together(self, tokens_per_second: float) -> int:
        """Limit for several short prompts in one chunk, while no answer is running."""
        return self._bounded(tokens_per_second * TOGETHER_SECONDS)

    def share(self, left: int, tokens: int) -> int:
        """Divide the ``left`` tokens of a prompt into equal chunks of about ``tokens``.

        Chunks may be a little larger if that avoids a small one at the end.
        """
        chunks = max(math.ceil(left / tokens - _EXCESS), -(-left // self.most_tokens))
        return -(-left // max(chunks, 1))

    def _longest(self, tokens_per_second: float) -> float:
        return tokens_per_second * min(_LONGEST_SECONDS, _LONGEST_LAYER_SECONDS * self.layers)

    def _bounded(self, tokens: float) -> int:
        return min(self.most_tokens, max(LEAST_TOKENS, int(tokens)))


class ChunkTimes:
    """Seconds per token of prompt chunks, by size rounded down to a power of two.

    The first chunk of each size is left out, because kernels are compiled for it. The fastest of
    the last few counts, since every disturbance makes a chunk slower.
    """

    def __init__(self) -> None:
        self._seen: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._known_sizes: set[int] = set()

    def observe(self, tokens: int, seconds: float) -> None:
        """Record the time that this rank took for a chunk, without waiting for other ranks."""
        size = tokens.bit_length()
        if size in self._known_sizes and seconds > 0:
            self._seen[size].append(seconds / tokens)
        self._known_sizes.add(size)

    @property
    def least_tokens(self) -> int:
        """The smallest chunk that is nearly as fast per token as the largest."""
        costs = {1 << (size - 1): min(seen) for size, seen in self._seen.items()}
        largest = max(costs, default=0)
        for tokens in sorted(costs):
            if tokens < largest and costs[tokens] <= _TOLERANCE * costs[largest]:
                return min(max(tokens, LEAST_TOKENS), ASSUMED_TOKENS)
        return ASSUMED_TOKENS
