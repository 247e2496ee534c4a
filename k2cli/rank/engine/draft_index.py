"""Drafts from a request's own context: what followed the last earlier occurrence of its end.

An answer often repeats what the prompt or the answer itself says: code that is changed, text that
is quoted, names, the keys of JSON. So the tokens after an earlier occurrence of the last few tokens
are a cheap guess of the next ones (prompt lookup decoding: Saxena 2023; Yang et al., "Inference
with Reference", 2023).

The index is that of LZ77 compressors: a table by the hash of two tokens holds the last position of
such a pair, and every position the one before it. Adding a token takes constant time, and looking
up compares at most ``_MOST_CANDIDATES`` positions, whatever the context's length or text.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

SHORTEST_MATCH, LONGEST_MATCH = 2, 4
"""Tokens at the end of the context that an earlier place has, too. Longer matches are no better."""

_MOST_CANDIDATES = 16
_TABLE_BITS = 16
_MULTIPLIER = 0x9E3779B1


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier place whose last ``length`` tokens are those of the context's end.

    ``follows`` is the position of the token after it.
    """

    follows: int
    length: int


class DraftIndex:
    """The tokens of one request, and where their pairs occur.

    It takes 8 bytes for each token, and 256 KiB.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens = array("i")
        self._last = array("i", [-1]) * (1 << _TABLE_BITS)
        self._before = array("i")
        """For the position at which a pair ends, the one at which such a pair ended before."""
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add the next tokens of the text."""
        own, last, before = self._tokens, self._last, self._before
        for token in tokens:
            own.append(token)
            if len(own) == 1:
                before.append(-1)
                continue
            place = _hash(own[-2], token)
            before.append(last[place])
            last[place] = len(own) - 1

    def find(self) -> Match | None:
        """Find the longest match, and of those as long as ``LONGEST_MATCH`` the latest."""
        end = len(self._tokens) - 1
        if end < SHORTEST_MATCH:
            return None
        best: Match | None = None
        place = self._before[end]
        for _ in range(_MOST_CANDIDATES):
            if place < 0:
                break
            length = self._common(place, end)
            if length >= SHORTEST_MATCH and (best is None or length > best.length):
                best = Match(place + 1, length)
                if length == LONGEST_MATCH:
                    break
            place = self._before[place]
        return best

    def _common(self, one: int, other: int) -> int:
        """Count the equal tokens up to two positions, at most ``LONGEST_MATCH``."""
        tokens, count = self._tokens, 0
        while count < min(LONGEST_MATCH, one + 1) and tokens[one - count] == tokens[other - count]:
            count += 1
        return count

    def draft(self, match: Match, count: int) -> list[int]:
        """Return ``count`` tokens that a match proposes.

        Where the text ends, the draft goes on with itself, so that a loop is repeated.
        """
        tokens, size = self._tokens, len(self._tokens)
        period = size - match.follows
        return [tokens[match.follows + number % period] for number in range(count)]


def _hash(first: int, second: int) -> int:
    # The high bits of the product depend on all bits of both tokens.
    mixed = (first * _MULTIPLIER ^ second) * _MULTIPLIER & 0xFFFFFFFF
    return mixed >> (32 - _TABLE_BITS)
