"""The leader's part of the prefix cache on disk: which blocks there are, what is written and read.

A block is 256 consecutive tokens of one scope. Its name is a chain of keyed digests: of the scope,
of all blocks before it, and of its own tokens. A block counts only if every rank has its part.

Blocks are written while no request runs, and now and then one while some do: copying one to host
memory takes about as long as building a step. At most ``_MOST_WRITING`` are on their way. A request
whose prompt begins with more stored tokens than are kept in memory waits until they are read, but
no longer than computing them would take about.
"""

from __future__ import annotations

import hashlib
import hmac
import queue
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from k2cli.prefix_folder import BLOCK_TOKENS
from k2cli.protocol import (
    AdoptBlocks,
    Assignment,
    BlocksFound,
    BlocksRead,
    BlockWritten,
    ForgetBlocks,
    ReadBlocks,
    StoreBlock,
    StoreReport,
)
from k2cli.rank.engine.prefix_keeper import PrefixKeeper, Sender
from k2cli.rank.engine.requests import Waiting
from k2cli.rank.kv_cache.store import BlockStore

_MOST_WRITING = 4
_BESIDE_SECONDS = 2.0
_MOST_READING = 2
_BLOCKS_PER_READING = 8
"""2,048 tokens: 144 MB of K2's caches over all ranks, which are in host memory meanwhile."""
_LEAST_WAIT_SECONDS = 2.0
_UNKNOWN_WAIT_SECONDS = 5.0
_SLOW_DISK_BYTES_PER_SECOND = 50e6
"""A disk that reads less is not waited for, but for a few seconds, while it is unknown how long
computing takes."""
_NAME_LETTERS = 32


@dataclass(slots=True)
class _Block:
    """The bytes of a block on each rank, and the time of its last use since the epoch."""

    nbytes: list[int]
    used: float


@dataclass(slots=True, eq=False)
class _Reading:
    """Blocks to read for a request. ``done`` blocks of ``chain`` are kept or were before.

    ``number`` is that of the decision in progress, 0 if there is none, and ``answers`` how many
    whole blocks each rank has read for it, of ``wanted``.
    """

    waiting: Waiting
    chain: list[str]
    done: int
    deadline: float
    number: int = 0
    wanted: int = 0
    answers: list[int] = field(default_factory=list)


class StoredPrefixes:
    """Directory of the blocks on the disks of all ranks."""

    def __init__(
        self,
        sender: Sender,
        keeper: PrefixKeeper,
        store: BlockStore,
        reports: queue.SimpleQueue[StoreReport],
        assignment: Assignment,
    ) -> None:
        """Make an empty directory; ``reports`` are those of the leader's own ``store``."""
        self._sender = sender
        self._keeper = keeper
        self._store = store
        self._reports = reports
        self._ranks = assignment.size
        self._limit_bytes = assignment.prefix_disk_bytes
        self._own_scope = assignment.prefix_disk_scope
        self._found: dict[int, BlocksFound] = {}
        self._blocks: dict[str, _Block] = {}
        self._bytes = [0] * assignment.size
        self._written: dict[str, dict[int, int]] = {}
        """Blocks on their way to the disk: the bytes on each rank that has confirmed its part."""
        self._prefix = 0
        self._chain: list[str] = []
        self._unwritten: list[tuple[int, str]] = []
        """Blocks of the prefix that is written at present: first token and name, last first."""
        self._writes = True
        self._next_beside = 0.0
        self._readings: list[_Reading] = []
        self._numbers = 0

    @property
    def ready(self) -> bool:
        """True once every rank has reported its blocks."""
        return len(self._found) == self._ranks and self.usable

    @property
    def usable(self) -> bool:
        """False if the disk of a rank cannot be used."""
        return all(found.usable for found in self._found.values())

    # --- reports ---------------------------------------------------------------------------------

    def take_own_reports(self) -> None:
        """Handle the reports of the leader's own store."""
        while True:
            try:
                self.handle(self._reports.get_nowait())
            except queue.Empty:
                return

    def handle(self, report: StoreReport) -> None:
        """Handle a report of any rank."""
        match report:
            case BlocksFound():
                self._found[report.rank] = report
                if self.ready:
                    self._compare()
            case BlockWritten():
                self._confirm(report)
            case BlocksRead():
                for reading in self._readings:
                    if reading.number == report.reading:
                        reading.answers.append(report.count)

    def _compare(self) -> None:
        """Take the blocks that all ranks have, and remove those that only some have."""
        sizes = [
            {block: nbytes for block, nbytes, _ in self._found[rank].blocks}
            for rank in range(self._ranks)
        ]
        common = set(sizes[0]).intersection(*sizes[1:])
        for block, _, used in self._found[0].blocks:
            if block in common:
                self._add(block, [size[block] for size in sizes], used)
        self._forget({block for size in sizes for block in size} - common)
        self._make_room(0, ())

    def _add(self, block: str, sizes: list[int], used: float) -> None:
        self._blocks[block] = _Block(sizes, used)
        self._bytes = [one + size for one, size in zip(self._bytes, sizes, strict=True)]

    def _forget(self, blocks: Iterable[str]) -> None:
        blocks = sorted(blocks)
        for block in blocks:
            known = self._blocks.pop(block, None)
            if known is not None:
                taken = zip(self._bytes, known.nbytes, strict=True)
                self._bytes = [one - size for one, size in taken]
        if blocks:
            self._sender.submit(ForgetBlocks(self._sender.next_number, blocks))

    def _confirm(self, report: BlockWritten) -> None:
        if report.error:
            self._writes = False
            self._unwritten.clear()
        confirmed = self._written.get(report.block)
        if confirmed is None:
            return
        confirmed[report.rank] = -1 if report.error else report.nbytes
        if len(confirmed) < self._ranks:
            return
        del self._written[report.block]
        sizes = [confirmed[rank] for rank in range(self._ranks)]
        if min(sizes) < 0:
            self._forget([report.block])
        else:
            self._add(report.block, sizes, time.time())

    # --- names -----------------------------------------------------------------------------------

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
        return hmac.new(self._store.secret, data, hashlib.sha256).hexdigest()[:_NAME_LETTERS]

    def _use(self, chain: Sequence[str]) -> None:
        """Make blocks the most recently used: the later ones of a chain go first."""
        now = time.time()
        times = {block: now - index * 1e-6 for index, block in enumerate(chain)}
        times = {block: used for block, used in times.items() if block in self._blocks}
        for block, used in times.items():
            self._blocks[block].used = used
        self._store.touch(times)

    # --- writing ---------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """True if something can be written while no request runs."""
        wanted = self._unwritten or self._keeper.added
        return bool(self._written) or (self.ready and self._writes and bool(wanted))

    def write_now_and_then(self) -> None:
        """Let one block be written beside running requests, if the last one was a while ago."""
        now = time.monotonic()
        if now > self._next_beside and not self._written:
            self._next_beside = now + _BESIDE_SECONDS
            self.write_some(1)

    def write_some(self, most: int = _MOST_WRITING) -> None:
        """Let blocks of kept prefixes be written, until so many are on their way."""
        while self.ready and self._writes and len(self._written) < most:
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
            self._chain = self.chain(tree.path_tokens(prefix), tree.scope_of(prefix))
            self._use(self._chain)
            self._unwritten = [
                (index * BLOCK_TOKENS, block)
                for index, block in reversed(list(enumerate(self._chain)))
                if block not in self._blocks and block not in self._written
            ]
            return True
        return False

    def _write_one(self) -> None:
        first, block = self._unwritten.pop()
        expected = max((max(b.nbytes) for b in self._blocks.values()), default=0)
        room = self._make_room(expected * (len(self._written) + 1), self._chain)
        if not room or self._prefix not in self._keeper.tree:
            self._unwritten.clear()
            return
        self._written[block] = {}
        number = self._sender.next_number
        self._sender.submit(StoreBlock(number, self._prefix, first, block))

    def _make_room(self, nbytes: int, spared: Sequence[str]) -> bool:
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
        self._forget(removed)
        return max(self._bytes) + nbytes <= self._limit_bytes

    # --- reading ---------------------------------------------------------------------------------

    def consider(self, waiting: Waiting, tokens_per_second: float) -> None:
        """Let a new request wait for its stored tokens if they are more than memory has."""
        request = waiting.request
        waiting.considered = True
        if not self.ready or not request.use_prefix_cache or waiting.paused is not None:
            return
        chain = self.chain(request.prompt, request.prefix_scope)
        stored = next((i for i, b in enumerate(chain) if b not in self._blocks), len(chain))
        done = self._kept_blocks(waiting)
        if stored <= done or self._is_late:
            return
        if tokens_per_second:
            missing = (stored - done) * BLOCK_TOKENS
            seconds = max(_LEAST_WAIT_SECONDS, missing / tokens_per_second)
        else:
            nbytes = sum(max(self._blocks[block].nbytes) for block in chain[done:stored])
            seconds = max(_UNKNOWN_WAIT_SECONDS, nbytes / _SLOW_DISK_BYTES_PER_SECOND)
        waiting.reading = True
        self._use(chain[:stored])
        self._readings.append(_Reading(waiting, chain[:stored], done, time.monotonic() + seconds))

    @property
    def _is_late(self) -> bool:
        """True if a disk has not read in time: nobody else waits for it until it has."""
        now = time.monotonic()
        return any(reading.number and now > reading.deadline for reading in self._readings)

    @property
    def is_reading(self) -> bool:
        """True if requests wait for what is read, or something is still read for one."""
        return bool(self._readings)

    def _kept_blocks(self, waiting: Waiting) -> int:
        """Return how many whole blocks of a request's prompt are kept in memory."""
        request = waiting.request
        hit = self._keeper.tree.find([*request.prompt, 0], request.prefix_scope)
        return 0 if hit is None else hit.tokens // BLOCK_TOKENS

    def read_some(
        self,
        is_waiting: Callable[[Waiting], bool],
        free_tokens: int,
        make_room: Callable[[int], None] = lambda tokens: None,
    ) -> bool:
        """Go on with reading; return True if prefixes were kept.

        Args:
            is_waiting: True if a request still waits.
            free_tokens: room in memory beside running requests and prefixes that are waited for.
            make_room: drops prefixes until there is room for so many tokens more.
        """
        changed = False
        for reading in list(self._readings):
            if len(reading.answers) == self._ranks:
                changed = self._adopt(reading, make_room) or changed
            gone = not is_waiting(reading.waiting)
            if time.monotonic() > reading.deadline or gone:
                reading.waiting.reading = False
            if not reading.number and (not reading.waiting.reading or self._is_done(reading)):
                reading.waiting.reading = False
                self._readings.remove(reading)
        self._begin_some(free_tokens)
        return changed

    def _begin_some(self, free_tokens: int) -> None:
        active = [reading for reading in self._readings if reading.number]
        free_tokens -= sum(reading.wanted for reading in active) * BLOCK_TOKENS
        waiting = [reading for reading in self._readings if not reading.number]
        for reading in waiting[: max(0, _MOST_READING - len(active))]:
            wanted = min(_BLOCKS_PER_READING, len(reading.chain) - reading.done)
            if wanted * BLOCK_TOKENS > free_tokens:
                reading.chain = reading.chain[: reading.done]  # it ends the next time
                continue
            free_tokens -= wanted * BLOCK_TOKENS
            self._begin(reading, wanted)

    def _is_done(self, reading: _Reading) -> bool:
        reading.done = max(reading.done, self._kept_blocks(reading.waiting))
        return reading.done >= len(reading.chain)

    def _begin(self, reading: _Reading, wanted: int) -> None:
        self._numbers += 1
        reading.number, reading.wanted, reading.answers = self._numbers, wanted, []
        blocks = reading.chain[reading.done : reading.done + wanted]
        self._sender.submit(ReadBlocks(self._sender.next_number, reading.number, blocks))

    def _adopt(self, reading: _Reading, make_room: Callable[[int], None]) -> bool:
        """Keep what all ranks have read of the blocks in progress; return False if nothing."""
        count, first = min(reading.answers), reading.done * BLOCK_TOKENS
        request = reading.waiting.request
        number, reading.number, reading.answers = reading.number, 0, []
        if count < reading.wanted:
            damaged = reading.chain[reading.done + count]
            reading.chain = reading.chain[: reading.done + count]
            self._forget([damaged])
        past_last = first + count * BLOCK_TOKENS
        # Before the ranks make the arrays, not after. If the part before these is dropped for it,
        # nothing is kept.
        make_room(count * BLOCK_TOKENS)
        keep = self._keeper.keep_read(request.prompt[:past_last], request.prefix_scope, first)
        step = self._sender.next_number
        if not count or keep.prefix is None:
            if not count or self._kept_blocks(reading.waiting) < reading.done + count:
                reading.chain = reading.chain[: reading.done]
            self._sender.submit(AdoptBlocks(step, number))
            return False
        reading.done += count
        if reading.waiting.reading:
            reading.waiting.prefix = keep.prefix
        self._sender.submit(
            AdoptBlocks(
                step,
                number,
                count,
                keep.first - first,
                keep.prefix,
                keep.below,
                request.prompt[keep.first : past_last],
            )
        )
        return True
