"""The stored blocks that the disks of all ranks have, on the leader: names, sizes and last use.

A block is 256 consecutive tokens of one scope. Its name is a chain of keyed digests: of the scope,
of all blocks before it, and of its own tokens. A block counts only if every rank has its part.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from k2cli.prefix_folder import BLOCK_TOKENS
from k2cli.protocol import Assignment, BlocksFound, ForgetBlocks
from k2cli.rank.engine.prefixes.keeper import Sender
from k2cli.rank.kv_cache.block_store import STEP_SECONDS, BlockStore

_NAME_LETTERS = 32


@dataclass(slots=True)
class _Block:
    """The bytes of a block on each rank, and the time of its last use since the epoch."""

    nbytes: list[int]
    used: float


class StoredBlocks:
    """The blocks that every rank has on its disk."""

    def __init__(self, sender: Sender, store: BlockStore, assignment: Assignment) -> None:
        """Know of no block yet; ``store`` is the leader's own."""
        self._sender = sender
        self._store = store
        self._ranks = assignment.size
        self._limit_bytes = assignment.prefix_disk_bytes
        self._secret = b""
        self._own_scope = assignment.prefix_disk_scope
        self._found: dict[int, BlocksFound] = {}
        self._blocks: dict[str, _Block] = {}
        self._bytes = [0] * assignment.size
        self.largest_bytes = 0
        """The bytes of the largest part of a block; 0 as long as none is known."""

    def __contains__(self, block: str) -> bool:
        return block in self._blocks

    @property
    def ready(self) -> bool:
        """True once every rank has reported its blocks."""
        return len(self._found) == self._ranks and self.usable

    @property
    def usable(self) -> bool:
        """False if the disk of a rank cannot be used."""
        return all(found.usable for found in self._found.values())

    # --- which there are -------------------------------------------------------------------------

    def found(self, report: BlocksFound) -> None:
        """Note what a rank has; once all have told, compare it."""
        self._found[report.rank] = report
        if self.ready:
            self._secret = self._store.secret
            self._compare()

    def _compare(self) -> None:
        """Take the blocks that all ranks have, and remove those that only some have."""
        sizes = [
            {block: nbytes for block, nbytes, _ in self._found[rank].blocks}
            for rank in range(self._ranks)
        ]
        common = set(sizes[0]).intersection(*sizes[1:])
        for block, _, used in self._found[0].blocks:
            if block in common:
                self.add(block, [size[block] for size in sizes], used)
        self.forget({block for size in sizes for block in size} - common)
        self.make_room(0, ())

    def add(self, block: str, sizes: list[int], used: float) -> None:
        """Add a block of which every rank has its part, of these sizes."""
        self._blocks[block] = _Block(sizes, used)
        self._bytes = [one + size for one, size in zip(self._bytes, sizes, strict=True)]
        self.largest_bytes = max(self.largest_bytes, *sizes)

    def begin_again(self) -> None:
        """Take the leader's store for empty: it was removed beside this run.

        What is on other machines would not be found by later runs: it is removed.
        """
        self._secret = self._store.secret
        self.forget(list(self._blocks))

    def forget(self, blocks: Iterable[str]) -> None:
        """Remove blocks from all disks."""
        blocks = sorted(blocks)
        for block in blocks:
            known = self._blocks.pop(block, None)
            if known is not None:
                taken = zip(self._bytes, known.nbytes, strict=True)
                self._bytes = [one - size for one, size in taken]
        if blocks:
            self._sender.submit(ForgetBlocks(self._sender.next_number, blocks))

    # --- names and use ---------------------------------------------------------------------------

    def chain(self, tokens: Sequence[int], scope: str) -> list[str]:
        """Return the names of the whole blocks that tokens begin with; only once ``ready``."""
        owner = f"key {scope}" if scope else f"own {self._own_scope}"
        name = folder = self._digest(owner.encode())
        names = []
        for first in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            block = array("q", tokens[first : first + BLOCK_TOKENS])
            name = self._digest(name.encode() + block.tobytes())
            names.append(f"{folder}/{name}")
        return names

    def _digest(self, data: bytes) -> str:
        return hmac.new(self._secret, data, hashlib.sha256).hexdigest()[:_NAME_LETTERS]

    def use(self, chain: Sequence[str]) -> float:
        """Make blocks the most recently used, the first one last; return its time."""
        now = time.time()
        times = {block: now - index * STEP_SECONDS for index, block in enumerate(chain)}
        times = {block: used for block, used in times.items() if block in self._blocks}
        for block, used in times.items():
            self._blocks[block].used = used
        self._store.touch(times)
        return now

    def bytes_of(self, blocks: Iterable[str]) -> int:
        """Return the bytes that the rank with the largest parts reads for blocks."""
        return sum(max(self._blocks[block].nbytes) for block in blocks)

    # --- room ------------------------------------------------------------------------------------

    def make_room(self, nbytes: int, spared: Sequence[str]) -> bool:
        """Remove the least recently used blocks until there is room; False if there is none."""
        removed = []
        others = None
        left = max(self._bytes) + nbytes - self._limit_bytes
        while left > 0:
            if others is None:
                keep = set(spared)
                others = sorted(
                    (block for block in self._blocks if block not in keep),
                    key=lambda block: -self._blocks[block].used,
                )
            if not others:
                break
            removed.append(others.pop())
            left -= min(self._blocks[removed[-1]].nbytes)
        self.forget(removed)
        return max(self._bytes) + nbytes <= self._limit_bytes
