"""Reading of stored blocks for requests that wait, on the leader.

A request whose prompt begins with more stored tokens than are kept in memory waits until they are
read, but no longer than computing them would take about.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from k2cli.prefix_folder import BLOCK_TOKENS
from k2cli.protocol import AdoptBlocks, BlocksRead, ReadBlocks
from k2cli.rank.engine.prefixes.keeper import PrefixKeeper, Sender
from k2cli.rank.engine.prefixes.stored_blocks import StoredBlocks
from k2cli.rank.engine.requests import Waiting
from k2cli.rank.kv_cache.block_store import STEP_SECONDS

_MOST_READING = 2
_BLOCKS_PER_READING = 8
"""2,048 tokens: 144 MB of K2's caches over all ranks, which are in host memory meanwhile."""
_LEAST_WAIT_SECONDS = 2.0
_UNKNOWN_WAIT_SECONDS = 5.0
_SLOW_DISK_BYTES_PER_SECOND = 50e6
"""A disk that reads less is not waited for, but for a few seconds, while it is unknown how long
computing takes."""


@dataclass(slots=True, eq=False)
class _Reading:
    """Blocks to read for a request. ``done`` blocks of ``chain`` are kept or were before.

    ``used`` is the time that counts as the last use of the first block.
    ``number`` is that of the decision in progress, 0 if there is none, and ``answers`` how many
    whole blocks each rank has read for it, of ``wanted``.
    """

    waiting: Waiting
    chain: list[str]
    done: int
    deadline: float
    used: float
    number: int = 0
    wanted: int = 0
    answers: list[int] = field(default_factory=list)


class BlockReading:
    """The requests for which blocks are read, and the blocks on their way to memory."""

    def __init__(
        self, sender: Sender, keeper: PrefixKeeper, blocks: StoredBlocks, ranks: int
    ) -> None:
        self._sender = sender
        self._keeper = keeper
        self._blocks = blocks
        self._ranks = ranks
        self._readings: list[_Reading] = []
        self._numbers = 0

    def answered(self, report: BlocksRead) -> None:
        """Note how many blocks of a reading a rank has read."""
        for reading in self._readings:
            if reading.number == report.reading:
                reading.answers.append(report.count)

    def consider(self, waiting: Waiting, tokens_per_second: float) -> None:
        """Let a new request wait for its stored tokens if they are more than memory has."""
        request = waiting.request
        waiting.considered = True
        if not self._blocks.ready or not request.use_prefix_cache or waiting.paused is not None:
            return
        chain = self._blocks.chain(request.prompt, request.prefix_scope)
        stored = next((i for i, b in enumerate(chain) if b not in self._blocks), len(chain))
        done = self._kept_blocks(waiting)
        if stored <= done or self._is_late:
            return
        if tokens_per_second:
            missing = (stored - done) * BLOCK_TOKENS
            seconds = max(_LEAST_WAIT_SECONDS, missing / tokens_per_second)
        else:
            nbytes = self._blocks.bytes_of(chain[done:stored])
            seconds = max(_UNKNOWN_WAIT_SECONDS, nbytes / _SLOW_DISK_BYTES_PER_SECOND)
        waiting.reading = True
        used, deadline = self._blocks.use(chain[:stored]), time.monotonic() + seconds
        self._readings.append(_Reading(waiting, chain[:stored], done, deadline, used))

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
                if self._is_done(reading):
                    reading.waiting.reading = False
            if time.monotonic() > reading.deadline or not is_waiting(reading.waiting):
                reading.waiting.reading = False
            if not reading.waiting.reading and not reading.number:
                self._readings.remove(reading)
        self._begin_some(free_tokens)
        return changed

    def _begin_some(self, free_tokens: int) -> None:
        """Begin with the oldest requests, and end those that need not or cannot be read for.

        Only as many are looked at as can begin: to find what is kept of a prompt takes some
        milliseconds for 100,000 tokens, and many may wait beside running answers.
        """
        active = [reading for reading in self._readings if reading.number]
        free_tokens -= sum(reading.wanted for reading in active) * BLOCK_TOKENS
        left = _MOST_READING - len(active)
        for reading in [reading for reading in self._readings if not reading.number]:
            if left <= 0:
                return
            done = self._is_done(reading)
            wanted = min(_BLOCKS_PER_READING, len(reading.chain) - reading.done)
            if done or wanted * BLOCK_TOKENS > free_tokens:
                reading.waiting.reading = False
                self._readings.remove(reading)
                continue
            free_tokens -= wanted * BLOCK_TOKENS
            left -= 1
            self._begin(reading, wanted)

    def _is_done(self, reading: _Reading) -> bool:
        reading.done = max(reading.done, self._kept_blocks(reading.waiting))
        return reading.done >= len(reading.chain)

    def _begin(self, reading: _Reading, wanted: int) -> None:
        self._numbers += 1
        reading.number, reading.wanted, reading.answers = self._numbers, wanted, []
        blocks = reading.chain[reading.done : reading.done + wanted]
        used = reading.used - reading.done * STEP_SECONDS
        self._sender.submit(ReadBlocks(self._sender.next_number, reading.number, blocks, used))

    def _adopt(self, reading: _Reading, make_room: Callable[[int], None]) -> bool:
        """Keep what all ranks have read of the blocks in progress; return False if nothing."""
        count, first = min(reading.answers), reading.done * BLOCK_TOKENS
        request = reading.waiting.request
        number, reading.number, reading.answers = reading.number, 0, []
        if count < reading.wanted:
            damaged = reading.chain[reading.done + count]
            reading.chain = reading.chain[: reading.done + count]
            self._blocks.forget([damaged])
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
