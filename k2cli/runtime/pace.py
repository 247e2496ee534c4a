"""How long prompt chunks take, as seen on this rank: how small a chunk is still worth computing.

A small chunk reads the weights for few tokens; a large one keeps the other stages of a pipeline
waiting. Where the balance lies depends on model and machine: a GPU reads a mixture of experts
nearly whole for a hundred tokens, a CPU takes as long for each token of a chunk as for one alone.
"""

from __future__ import annotations

from collections import defaultdict, deque

# What a size that has not been seen is taken for: enough tokens to hide the reading of weights.
ASSUMED_TOKENS = 256
LEAST_TOKENS = 32
# A token of the smaller chunk may cost this much more than one of a larger chunk.
_TOLERANCE = 1.15
_KEPT = 5


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
