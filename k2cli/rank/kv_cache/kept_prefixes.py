"""The kept prefixes of one rank: a tree of token sequences, each node with its own tokens' caches.

What several sequences share is held once: a node holds the segment of its own tokens, and a cache
for the whole sequence is made by joining the segments from the root on. Caches that cannot be cut
are held whole, in nodes without parents. The leader decides each change.
"""

from __future__ import annotations

import copy
import zlib
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from k2cli.rank.kv_cache.segments import Segment, cut, fill, joined, segment_of

LayerCaches = list[Any]


@dataclass(slots=True)
class _Kept:
    """A node: its own tokens, after those of ``parent``, and per layer a segment or whole cache."""

    parent: int | None
    tokens: array[int]
    layers: list[Any]


@dataclass(slots=True)
class KeptPrefixes:
    """All kept prefixes of a rank, by the leader's ids.

    Args:
        cuttable: True if the caches of all layers can be cut at any token.
        make_empty: makes an empty cache entry for each layer.
    """

    cuttable: bool
    make_empty: Callable[[], LayerCaches]
    _nodes: dict[int, _Kept] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._nodes)

    def open(
        self, prefix: int, tokens: int, release: Collection[int] = ()
    ) -> tuple[array[int], LayerCaches]:
        """Return the first ``tokens`` of a prefix, and new caches that hold them.

        Nodes of its path to ``release`` are dropped, layer by layer: so both the nodes and the copy
        are held of one layer at a time.
        """
        path = self._path(prefix)
        known = array("i")
        for node in path:
            known.extend(node.tokens)
        if not self.cuttable:
            # Arrays are shared until one is written to.
            caches = copy.deepcopy(path[-1].layers)
            for cache in caches:
                if cache.size() > tokens:
                    cache.trim(cache.size() - tokens)
            for one in release:
                self.drop(one)
            return known[:tokens], caches
        caches = self.make_empty()
        released = [self._nodes.pop(one) for one in release]
        for layer, cache in enumerate(caches):
            fill(cache, [node.layers[layer] for node in path], tokens)
            for node in released:
                node.layers[layer] = None
            if released:
                mx.clear_cache()
        return known[:tokens], caches

    def _path(self, prefix: int | None) -> list[_Kept]:
        """Return the nodes from the root to a prefix."""
        path = []
        while prefix is not None:
            path.append(self._nodes[prefix])
            prefix = path[-1].parent
        return path[::-1]

    def keep(
        self, prefix: int, tokens: array[int], caches: LayerCaches, below: int | None, first: int
    ) -> None:
        """Keep the caches of a sequence from token ``first`` on; ``caches`` is emptied.

        Layer by layer, so that a copy of one layer at a time is held beside the caches.
        """
        if not self.cuttable:
            self._nodes[prefix] = _Kept(None, tokens, caches)
            return
        layers: list[Any] = []
        for layer, cache in enumerate(caches):
            layers.append(segment_of(cache, first, len(tokens)))
            caches[layer] = None
            del cache
        self._nodes[prefix] = _Kept(below, tokens[first:], layers)

    def adopt(
        self,
        prefix: int,
        tokens: Sequence[int],
        blocks: list[list[Segment]],
        below: int | None,
        skip: int,
    ) -> None:
        """Keep consecutive blocks that were read from a disk, but for the first ``skip`` tokens.

        ``blocks`` is emptied, layer by layer.
        """
        layers: list[Any] = []
        for layer in range(len(blocks[0])):
            pieces = [block[layer] for block in blocks]
            whole = joined(pieces, skip + len(tokens))
            layers.append(cut(whole, skip, skip + len(tokens)) if skip else whole)
            for block in blocks:
                block[layer] = []
        self._nodes[prefix] = _Kept(below, array("i", tokens), layers)

    def split(self, prefix: int, above: int, tokens: int) -> None:
        """Make the first ``tokens`` of a node one of their own, the node's new parent."""
        node = self._nodes[prefix]
        length, upper = len(node.tokens), list[Any]()
        for layer in range(len(node.layers)):
            whole: Segment = node.layers[layer]
            upper.append(cut(whole, 0, tokens))
            node.layers[layer] = cut(whole, tokens, length)
            del whole
        self._nodes[above] = _Kept(node.parent, node.tokens[:tokens], upper)
        node.parent, node.tokens = above, node.tokens[tokens:]

    def drop(self, prefix: int) -> None:
        """Release a node, which is no parent."""
        del self._nodes[prefix]
        mx.clear_cache()

    def segments(self, prefix: int, first: int, past_last: int) -> list[Segment]:
        """Copy the tokens ``first`` to ``past_last`` of a prefix: a segment per layer."""
        start, tokens, wanted = 0, past_last - first, list[tuple[_Kept, int, int]]()
        for node in self._path(prefix):
            end = start + len(node.tokens)
            low, high = max(first, start), min(past_last, end)
            if low < high:
                wanted.append((node, low - start, high - start))
            start = end
        return [
            joined([_some(node.layers[layer], low, high) for node, low, high in wanted], tokens)
            for layer in range(len(wanted[0][0].layers))
        ]

    def checksums(self) -> list[tuple[object, ...]]:
        """Return id, parent and checksum of each node's tokens, equal on all ranks."""
        return [
            (prefix, node.parent, *checksum(node.tokens))
            for prefix, node in sorted(self._nodes.items())
        ]


def _some(segment: Segment, low: int, high: int) -> Segment:
    return [tuple(array[..., low:high, :] for array in arrays) for arrays in segment]


def checksum(tokens: array[int]) -> tuple[int, int]:
    """Return the number of tokens and their CRC-32."""
    return len(tokens), zlib.crc32(tokens)
