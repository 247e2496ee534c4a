"""Writing of kept prefixes to the disks: which blocks are written, and when, on the leader.

Blocks are written while no request runs, and now and then one while some do: copying one to host
memory takes about as long as building a step. At most ``_MOST_WRITING`` are on their way.
"""

from __future__ import annotations

import time

from k2cli.prefix_folder import BLOCK_TOKENS
from k2cli.protocol import BlockWritten, StoreBlock
from k2cli.rank.engine.prefixes.keeper import PrefixKeeper, Sender
from k2cli.rank.engine.prefixes.stored_blocks import StoredBlocks

_MOST_WRITING = 4
_BESIDE_SECONDS = 2.0
"""Time between two blocks that are written while requests run."""


class BlockWriting:
    """The blocks that are to be written, and those on their way to the disks."""

    def __init__(
        self, sender: Sender, keeper: PrefixKeeper, blocks: StoredBlocks, ranks: int
    ) -> None:
        self._sender = sender
        self._keeper = keeper
        self._blocks = blocks
        self._ranks = ranks
        self._under_way: dict[str, dict[int, int]] = {}
        """Per block the bytes on each rank that has confirmed its part; -1 if that failed."""
        self._sources: dict[str, int] = {}
        """The prefixes to which these blocks belong."""
        self._outdated: set[str] = set()
        """Blocks on their way to the disks under names that later runs will not make."""
        self._prefix = 0
        self._chain: list[str] = []
        self._unwritten: list[tuple[int, str]] = []
        """Blocks of the prefix that is written at present: first token and name, last first."""
        self._writes = True
        self._next_beside = 0.0

    def confirm(self, report: BlockWritten) -> None:
        """Note that a rank has written its part of a block; after an error no more is written."""
        if report.error:
            self._writes = False
            self._unwritten.clear()
        confirmed = self._under_way.get(report.block)
        if confirmed is None:
            return
        confirmed[report.rank] = -1 if report.error else report.nbytes
        if len(confirmed) < self._ranks:
            return
        del self._under_way[report.block], self._sources[report.block]
        sizes = [confirmed[rank] for rank in range(self._ranks)]
        if min(sizes) < 0 or report.block in self._outdated:
            self._outdated.discard(report.block)
            self._blocks.forget([report.block])
        else:
            self._blocks.add(report.block, sizes, time.time())
            self._blocks.make_room(0, ())

    def begin_again(self) -> None:
        """Write what is kept once more: the leader's store was removed beside this run."""
        self._outdated.update(self._under_way)
        self._unwritten.clear()
        self._keeper.added.extend({*self._sources.values(), self._prefix})

    @property
    def has_work(self) -> bool:
        """True if something can be written while no request runs."""
        wanted = self._unwritten or self._keeper.added
        return bool(self._under_way) or (self._blocks.ready and self._writes and bool(wanted))

    def write_now_and_then(self) -> None:
        """Let one block be written beside running requests, if the last one was a while ago."""
        now = time.monotonic()
        if now > self._next_beside and not self._under_way:
            self._next_beside = now + _BESIDE_SECONDS
            self.write_some(1)

    def write_some(self, most: int = _MOST_WRITING) -> None:
        """Let blocks of kept prefixes be written, until so many are on their way.

        The first one of all is written alone, since its size is not known before.
        """
        if not self._blocks.largest_bytes:
            most = 1
        while self._blocks.ready and self._writes and len(self._under_way) < most:
            if not self._unwritten and not self._next_prefix():
                return
            if self._unwritten:
                self._write_one()

    def _next_prefix(self) -> bool:
        """Choose the next prefix to write; return False if there is none."""
        tree = self._keeper.tree
        while self._keeper.added:
            prefix = self._keeper.added.pop()
            if prefix not in tree:
                continue
            self._prefix = prefix
            self._chain = self._blocks.chain(tree.path_tokens(prefix), tree.scope_of(prefix))
            self._blocks.use(self._chain)
            self._unwritten = [
                (index * BLOCK_TOKENS, block)
                for index, block in reversed(list(enumerate(self._chain)))
                if block not in self._blocks and block not in self._under_way
            ]
            return True
        return False

    def _write_one(self) -> None:
        first, block = self._unwritten.pop()
        expected = self._blocks.largest_bytes * (len(self._under_way) + 1)
        room = self._blocks.make_room(expected, self._chain)
        if not room or self._prefix not in self._keeper.tree:
            self._unwritten.clear()
            return
        self._under_way[block], self._sources[block] = {}, self._prefix
        number = self._sender.next_number
        self._sender.submit(StoreBlock(number, self._prefix, first, block))
