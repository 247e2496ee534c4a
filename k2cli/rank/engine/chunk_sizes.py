"""How long prompt chunks take, as seen on this rank: how small and how large a chunk should be.

A small chunk reads the weights for few tokens, and DeepSeek's attention expands the keys and values
of all that is before it anew for each chunk; a large one keeps the other stages of a pipeline, or
running answers, waiting. Where the balance lies depends on model and machine: a GPU reads a mixture
of experts nearly whole for a hundred tokens, a CPU takes as long for each token of a chunk as for
one alone.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from dataclasses import dataclass

# What a size that has not been seen is taken for: enough tokens to hide the reading of weights.
ASSUMED_TOKENS = 256
LEAST_TOKENS = 32
# A token of the smaller chunk may cost this much more than one of a larger chunk.
_TOLERANCE = 1.15
_KEPT = 5

# The first chunk of a run, before its rate is known: 512 tokens of the demo model take a CPU a
# minute, and the watchdog gives a layer ten seconds.
FIRST_CHUNK_TOKENS = LEAST_TOKENS
# While answers are running, a chunk may hold them up for about this long.
STALL_SECONDS = 0.5
# Short prompts in one chunk: the first of them to be answered waits for the last.
TOGETHER_SECONDS = 2.5
# Where nobody is being answered: a cancellation takes effect after a chunk. And after each layer
# the watchdog is told, which gives it ten seconds.
ALONE_SECONDS = 10.0
LAYER_SECONDS = 1.0
# At most, where a long context asks for it: a rank waits a minute for another's part.
_LONGEST_SECONDS = 45.0
_LONGEST_LAYER_SECONDS = 2.5
# A chunk has at least this part of what is before it. Expanding a token's key and value takes K2
# 1.0 GFLOP (61 layers, 64 heads, 2 x 512 x 128 weights), computing a token 64 and its attention: so
# expanding is no more than half of that; up to twice of it while others wait.
_PART_ALONE = 32
_PART_ANSWERING = 128
# MLX's CPU back end computes all scores of a chunk, those that the mask takes away again too. Toys
# of K2 were fastest in chunks of 256 to 512 at 2,048 tokens, and took a fifth more in 1,024.
_CPU_TOKENS = 512
_CPU_PART = 8
# A chunk may be larger by this much if that makes one less. Ten tokens that were left over took two
# ranks 1.2 of 35 seconds.
_EXCESS = 0.25


@dataclass(frozen=True, slots=True)
class ChunkBounds:
    """How many tokens the next chunk of a prompt may have, by the rate seen so far.

    Args:
        most_tokens: of the plan, whose memory was counted with it.
        layers: of this rank; the watchdog is told after each.
        on_gpu: whether MLX computes on a GPU.
    """

    most_tokens: int
    layers: int
    on_gpu: bool

    def alone(self, tokens_per_second: float, context: int) -> int:
        """Where no answer is running, after so many tokens of the prompt. Rate 0: not known."""
        if not tokens_per_second:
            return self._bounded(FIRST_CHUNK_TOKENS)
        seconds = min(ALONE_SECONDS, LAYER_SECONDS * self.layers)
        wanted = max(tokens_per_second * seconds, context // _PART_ALONE)
        if not self.on_gpu:
            wanted = min(wanted, max(_CPU_TOKENS, context // _CPU_PART))
        return self._bounded(min(wanted, self._longest(tokens_per_second)))

    def answering(self, tokens_per_second: float, context: int) -> int:
        """While answers are running. Where even the least chunk stalls them, it must pay."""
        wanted = tokens_per_second * STALL_SECONDS
        if 0 < wanted < LEAST_TOKENS:
            wanted = min(context // _PART_ANSWERING, self._longest(tokens_per_second))
        return self._bounded(wanted)

    def together(self, tokens_per_second: float) -> int:
        """Of several short prompts that are computed as one, where no answer is running."""
        return self._bounded(tokens_per_second * TOGETHER_SECONDS)

    def share(self, left: int, tokens: int) -> int:
        """Of ``left`` tokens, those of the next chunk, where ``tokens`` are wanted.

        Chunks of equal size, and a little more in each rather than a small one at the end.
        """
        chunks = max(math.ceil(left / tokens - _EXCESS), -(-left // self.most_tokens))
        return -(-left // max(chunks, 1))

    def _longest(self, tokens_per_second: float) -> float:
        return tokens_per_second * min(_LONGEST_SECONDS, _LONGEST_LAYER_SECONDS * self.layers)

    def _bounded(self, tokens: float) -> int:
        return min(self.most_tokens, max(LEAST_TOKENS, int(tokens)))


class PrefillPace:
    """Seconds per token of prompt chunks, by size: sizes count together up to their double.

    The first chunk of each size is left out (kernels are compiled for it), and of the last few the
    quickest counts, since whatever disturbs a chunk makes it slower.
    """

    def __init__(self) -> None:
        self._seen: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._known_sizes: set[int] = set()

    def observe(self, tokens: int, seconds: float) -> None:
        """A chunk of so many tokens took this rank so long, without waiting for others."""
        size = tokens.bit_length()
        if size in self._known_sizes and seconds > 0:
            self._seen[size].append(seconds / tokens)
        self._known_sizes.add(size)

    @property
    def least_tokens(self) -> int:
        """The fewest tokens that are worth a chunk of their own."""
        costs = {1 << (size - 1): min(seen) for size, seen in self._seen.items()}
        largest = max(costs, default=0)
        for tokens in sorted(costs):
            if tokens < largest and costs[tokens] <= _TOLERANCE * costs[largest]:
                return min(max(tokens, LEAST_TOKENS), ASSUMED_TOKENS)
        return ASSUMED_TOKENS
