"""The leader's directory of kept prefixes: token sequences whose KV cache every rank keeps.

It holds tokens only; the caches are on the ranks under the same ids. The leader decides which
prefixes to keep, use again and drop, and sends decisions, so that all ranks do the same.

Each prefix belongs to a scope, and only requests of that scope find it: the time to the first token
would otherwise tell the user of one key what that of another has asked.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

# Array type of one token in the directory.
_TOKEN = "q"
_TOKEN_BYTES = 8
# Copying a cache of fewer tokens takes about as long as computing it again.
LEAST_REUSE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Hit:
    """A kept prefix that a prompt begins with: its id, and the number of shared tokens."""

    prefix: int
    tokens: int


class PrefixDirectory:
    """Kept token sequences, least recently used first."""

    def __init__(self, *, whole_only: bool) -> None:
        """Allow reuse of whole prefixes only if ``whole_only``: their caches cannot be cut back."""
        self._whole_only = whole_only
        self._entries: dict[int, bytes] = {}
        self._scopes: dict[int, str] = {}
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, prefix: int) -> bool:
        return prefix in self._entries

    def tokens_of(self, prefixes: Collection[int]) -> int:
        """Return the tokens that those of these prefixes take which are still kept."""
        kept = (self._entries[prefix] for prefix in prefixes if prefix in self._entries)
        return sum(cache_tokens(len(entry) // _TOKEN_BYTES) for entry in kept)

    def tokens(self) -> int:
        """Return the tokens that all kept prefixes take, in allocation steps of the cache."""
        return sum(cache_tokens(len(entry) // _TOKEN_BYTES) for entry in self._entries.values())

    def best(self, prompt: Sequence[int], scope: str = "") -> Hit | None:
        """Find the kept prefix that saves most of a prompt, and make it the most recently used."""
        best = self.find(prompt, scope)
        if best is not None:
            self._entries[best.prefix] = self._entries.pop(best.prefix)
        return best

    def find(self, prompt: Sequence[int], scope: str = "") -> Hit | None:
        """Find the kept prefix that saves most of a prompt, whose last token is always computed."""
        wanted = _kept(prompt[:-1])
        hits = [
            Hit(prefix, self._shared(entry, wanted)) for prefix, entry in self._entries_of(scope)
        ]
        best = max(hits, key=lambda hit: hit.tokens, default=None)
        if best is None or best.tokens < LEAST_REUSE_TOKENS:
            return None
        return best

    def _entries_of(self, scope: str) -> Iterator[tuple[int, bytes]]:
        for prefix, entry in self._entries.items():
            if self._scopes[prefix] == scope:
                yield prefix, entry

    def _shared(self, entry: bytes, wanted: bytes) -> int:
        shared = _common_bytes(entry, wanted) // _TOKEN_BYTES
        return shared if not self._whole_only or shared * _TOKEN_BYTES == len(entry) else 0

    def redundant(self, tokens: Sequence[int], scope: str = "") -> Iterator[int]:
        """Yield the kept prefixes that a new one of these tokens would contain."""
        wanted = _kept(tokens)
        for prefix, entry in self._entries_of(scope):
            if wanted.startswith(entry):
                yield prefix

    def has(self, tokens: Sequence[int], scope: str = "") -> bool:
        """True if a kept prefix already contains all of these tokens."""
        wanted = _kept(tokens)
        return not self._whole_only and any(
            entry.startswith(wanted) for _, entry in self._entries_of(scope)
        )

    def add(self, tokens: Sequence[int], scope: str = "") -> int:
        """Add these tokens; return the id under which every rank must keep their cache."""
        self._next_id += 1
        self._entries[self._next_id] = _kept(tokens)
        self._scopes[self._next_id] = scope
        return self._next_id

    def oldest(self, spared: Collection[int] = ()) -> int | None:
        """Return the least recently used prefix; None if there is none.

        Those that are ``spared`` are returned only if there are no others.
        """
        others = (prefix for prefix in self._entries if prefix not in spared)
        return next(others, next(iter(self._entries), None))

    def remove(self, prefix: int) -> None:
        """Remove a prefix."""
        del self._entries[prefix], self._scopes[prefix]


def _kept(tokens: Sequence[int]) -> bytes:
    return array(_TOKEN, tokens).tobytes()


def _common_bytes(one: bytes, other: bytes) -> int:
    """Return the length of the common beginning."""
    same, limit = 0, min(len(one), len(other))
    while same < limit:
        # Bisection; each byte is compared about twice.
        middle = (same + limit + 1) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            limit = middle - 1
    return same


def cache_tokens(tokens: int, step: int = 256) -> int:
    """Round up to the tokens that mlx-lm's KV caches allocate room for: whole steps of 256."""
    return -(-tokens // step) * step
