"""The leader's directory of kept prefixes: which tokens have a KV cache on every rank.

Pure bookkeeping; the caches themselves lie on the ranks under the same ids. What to keep, use
again and forget is decided here and sent as decisions, so that it is the same on all ranks.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# One token, as the directory keeps it.
_TOKEN = "q"
_TOKEN_BYTES = 8
# Below this many tokens, a copy of a cache costs about what computing it again would.
LEAST_REUSE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Hit:
    """A kept prefix that a prompt begins with: its id, and how many tokens they share."""

    prefix: int
    tokens: int


class PrefixDirectory:
    """Kept token sequences, least recently used first."""

    def __init__(self, *, whole_only: bool) -> None:
        """``whole_only``: caches cannot be cut back, so only a whole prefix can be used again."""
        self._whole_only = whole_only
        self._entries: dict[int, bytes] = {}
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._entries)

    def tokens(self) -> int:
        """Tokens that all kept prefixes hold together, in allocation steps of the cache."""
        return sum(cache_tokens(len(entry) // _TOKEN_BYTES) for entry in self._entries.values())

    def best(self, prompt: Sequence[int]) -> Hit | None:
        """The kept prefix that saves most of a prompt; at least its last token is left to do."""
        wanted = _kept(prompt[:-1])
        hits = [Hit(prefix, self._shared(entry, wanted)) for prefix, entry in self._entries.items()]
        best = max(hits, key=lambda hit: hit.tokens, default=None)
        if best is None or best.tokens < LEAST_REUSE_TOKENS:
            return None
        self._entries[best.prefix] = self._entries.pop(best.prefix)  # now the most recent
        return best

    def _shared(self, entry: bytes, wanted: bytes) -> int:
        shared = _common_bytes(entry, wanted) // _TOKEN_BYTES
        return shared if not self._whole_only or shared * _TOKEN_BYTES == len(entry) else 0

    def redundant(self, tokens: Sequence[int]) -> Iterator[int]:
        """Kept prefixes that a new one of these tokens would contain."""
        wanted = _kept(tokens)
        for prefix, entry in self._entries.items():
            if wanted.startswith(entry):
                yield prefix

    def has(self, tokens: Sequence[int]) -> bool:
        """Whether a kept prefix already contains all of these tokens."""
        wanted = _kept(tokens)
        return not self._whole_only and any(
            entry.startswith(wanted) for entry in self._entries.values()
        )

    def add(self, tokens: Sequence[int]) -> int:
        """Keep these tokens; the id under which every rank must keep their cache."""
        self._next_id += 1
        self._entries[self._next_id] = _kept(tokens)
        return self._next_id

    def oldest(self) -> int | None:
        """The prefix to forget first."""
        return next(iter(self._entries), None)

    def remove(self, prefix: int) -> None:
        """Forget a prefix."""
        del self._entries[prefix]


def _kept(tokens: Sequence[int]) -> bytes:
    return array(_TOKEN, tokens).tobytes()


def _common_bytes(one: bytes, other: bytes) -> int:
    """How many bytes the two begin with in common."""
    same, limit = 0, min(len(one), len(other))
    while same < limit:
        # Halve what is left until it is equal: each byte is compared about twice.
        middle = (same + limit + 1) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            limit = middle - 1
    return same


def cache_tokens(tokens: int, step: int = 256) -> int:
    """Tokens that mlx-lm's KV caches allocate room for: whole steps of 256."""
    return -(-tokens // step) * step
