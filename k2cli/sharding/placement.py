"""Placements: the parts of a model on each rank. Planning makes them, ranks carry them out.

Rank order is mlx-lm's: rank 0 leads and is the LAST pipeline stage (norm, head, sampler); the
highest rank is the first stage (embedding).
"""

from __future__ import annotations

from dataclasses import dataclass

from k2cli.choices import HeadPlacement, Strategy


@dataclass(frozen=True, slots=True)
class RankPlacement:
    """One rank's part: the node it runs on and its decoder layers ``[first, past_last)``."""

    rank: int
    node: str
    layers: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Placement:
    """A strategy and one part per rank, in rank order.

    Raises:
        ValueError: if the parts do not cover the layers as the strategy says.
    """

    strategy: Strategy
    ranks: tuple[RankPlacement, ...]
    head: HeadPlacement = "replicated"

    def __post_init__(self) -> None:
        if [part.rank for part in self.ranks] != list(range(len(self.ranks))) or not self.ranks:
            raise ValueError("ranks of a placement must be 0, 1, ... in order")
        if self.strategy == "pipeline":
            self._check_stages()
        elif len({part.layers for part in self.ranks}) != 1 or self.ranks[0].layers[0] != 0:
            raise ValueError(f"every rank of a {self.strategy} placement holds all layers")
        if self.strategy == "single" and len(self.ranks) != 1:
            raise ValueError("a single placement has one rank")

    def _check_stages(self) -> None:
        expected_first = 0
        for part in reversed(self.ranks):
            first, past_last = part.layers
            if first != expected_first or past_last <= first:
                raise ValueError(
                    f"rank {part.rank} holds layers {first}..{past_last}, expected to start "
                    f"at {expected_first} and to hold at least one"
                )
            expected_first = past_last

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def layer_count(self) -> int:
        """Number of decoder layers of the whole model."""
        return self.ranks[0].layers[1]
