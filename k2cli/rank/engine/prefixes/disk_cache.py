"""The prefix cache on disk, on the leader: its parts, and what the ranks report to them."""

from __future__ import annotations

import contextlib
import queue

from k2cli.protocol import (
    Assignment,
    BlocksFound,
    BlocksRead,
    BlockWritten,
    StoreReport,
)
from k2cli.rank.engine.prefixes.block_reading import BlockReading
from k2cli.rank.engine.prefixes.block_writing import BlockWriting
from k2cli.rank.engine.prefixes.keeper import PrefixKeeper, Sender
from k2cli.rank.engine.prefixes.stored_blocks import StoredBlocks
from k2cli.rank.kv_cache.block_store import BlockStore


class DiskCache:
    """The blocks on the disks of all ranks, their writing and their reading."""

    def __init__(
        self,
        sender: Sender,
        keeper: PrefixKeeper,
        store: BlockStore,
        reports: queue.SimpleQueue[StoreReport],
        assignment: Assignment,
    ) -> None:
        """Know of no block yet; ``reports`` are those of the leader's own ``store``."""
        self.blocks = StoredBlocks(sender, store, assignment)
        self.writing = BlockWriting(sender, keeper, self.blocks, assignment.size)
        self.reading = BlockReading(sender, keeper, self.blocks, assignment.size)
        self._store = store
        self._reports = reports
        self._removals = 0

    def take_own_reports(self) -> None:
        """Handle the reports of the leader's own store."""
        reports = []
        with contextlib.suppress(queue.Empty):
            while True:
                reports.append(self._reports.get_nowait())
        if self._store.removals != self._removals:  # counted before the next report of the store
            self._removals = self._store.removals
            self.writing.begin_again()
            self.blocks.begin_again()
        for report in reports:
            self.handle(report)

    def handle(self, report: StoreReport) -> None:
        """Handle a report of any rank."""
        match report:
            case BlocksFound():
                self.blocks.found(report)
            case BlockWritten():
                self.writing.confirm(report)
            case BlocksRead():
                self.reading.answered(report)
