"""The prefix cache on disk, on the leader, with two ranks whose disks the test plays."""

from __future__ import annotations

import itertools
import queue
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from k2cli.protocol import (
    AdoptBlocks,
    BlocksFound,
    BlocksRead,
    BlockWritten,
    Decision,
    ForgetBlocks,
    Generate,
    ReadBlocks,
    StoreBlock,
)
from k2cli.rank.engine.prefixes.disk_cache import DiskCache
from k2cli.rank.engine.prefixes.keeper import PrefixKeeper
from k2cli.rank.engine.requests import Waiting
from tests.support.bootstraps import make_assignment

SIZES = (100, 60)
LIMIT = 1000
PROMPT = random.Random(1).choices(range(10**6), k=1100)


@dataclass
class _Store:
    """The leader's own store, which records times of use."""

    times: dict[str, float] = field(default_factory=dict)
    secret: bytes = b"secret"
    removals: int = 0

    def touch(self, times: dict[str, float]) -> None:
        self.times |= times


class Disks:
    """The disks of two ranks: they write and read what the leader decides, when they are told."""

    def __init__(
        self,
        blocks: Sequence[dict[str, int]] = ({}, {}),
        own_scope: str = "own key",
        limit: int = LIMIT,
        secret: bytes = b"secret",
    ) -> None:
        self.next_number = 1
        self.writes = 0
        self.files = [dict(rank) for rank in blocks]
        self.waiting: list[Decision] = []
        self.keeper = PrefixKeeper(self, whole_only=False)
        reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.store = _Store(secret=secret)
        as_store: Any = self.store
        assignment = make_assignment(size=2, prefix_disk_bytes=limit, prefix_disk_scope=own_scope)
        self.cache = DiskCache(self, self.keeper, as_store, reports, assignment)
        for rank, files in enumerate(self.files):
            found = [(name, size, float(index)) for index, (name, size) in enumerate(files.items())]
            self.cache.handle(BlocksFound(rank, found))

    def submit(self, decision: Decision) -> None:
        self.next_number += 1
        if isinstance(decision, ForgetBlocks):
            for rank in self.files:
                for block in decision.blocks:
                    rank.pop(block, None)
        else:
            self.writes += isinstance(decision, StoreBlock)
            self.waiting.append(decision)

    def work(self, *, error: str = "") -> None:
        """Carry out what waits; the second rank may be out of order."""
        waiting, self.waiting = self.waiting, []
        for decision in waiting:
            for rank in (0, 1):
                match decision:
                    case StoreBlock(block=block) if rank and error:
                        self.cache.handle(BlockWritten(rank, block, error=error))
                    case StoreBlock(block=block):
                        self.files[rank][block] = SIZES[rank]
                        self.cache.handle(BlockWritten(rank, block, SIZES[rank]))
                    case ReadBlocks(reading=reading, blocks=blocks):
                        there = [block in self.files[rank] for block in blocks]
                        count = [*there, False].index(False)
                        self.cache.handle(BlocksRead(rank, reading, count))

    def write(self, tokens: Sequence[int], scope: str = "", *, error: str = "") -> None:
        """Keep a sequence, and write it until nothing is left to be written."""
        self.keeper.keep(tokens, scope)
        while self.cache.writing.has_work:
            self.cache.writing.write_some()
            self.work(error=error)

    def request(self, prompt: list[int], scope: str = "") -> Waiting:
        """Let a request wait for what is stored, to the end of reading."""
        waiting = Waiting(Generate("r", prompt, 5, prefix_scope=scope), 0.0)
        self.cache.reading.consider(waiting, 0.0)
        while self.cache.reading.is_reading:
            self.cache.reading.read_some(lambda waiting: True, 100_000)
            adopted = [d for d in self.waiting if isinstance(d, AdoptBlocks)]
            assert all(len(d.tokens) + d.skip == 256 * d.count for d in adopted if d.keep_as)
            self.work()
        assert waiting.is_ready
        return waiting

    def kept(self, prompt: list[int], scope: str = "") -> int:
        hit = self.keeper.tree.find([*prompt, 0], scope)
        return 0 if hit is None else hit.tokens


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test in which the leader's main thread uses a disk, which may hang."""

    def refuse(folder: Path) -> Path:
        raise AssertionError(f"{folder} was used")

    monkeypatch.setattr("k2cli.prefix_folder.private_folder", refuse)


@pytest.fixture
def files() -> list[dict[str, int]]:
    """What a run that had the prompt leaves on the disks."""
    disks = Disks()
    disks.write(PROMPT)
    assert [len(rank) for rank in disks.files] == [4, 4]
    return disks.files


def test_a_later_run_reads_what_memory_lacks(files: list[dict[str, int]]) -> None:
    disks = Disks(files)
    disks.keeper.keep(PROMPT[:300], "")
    waiting = disks.request([*PROMPT, 5])
    assert disks.kept(PROMPT) == 1024
    assert waiting.prefix is not None
    assert disks.keeper.tree.path_tokens(waiting.prefix) == PROMPT[:1024]
    # One that diverges gets what it shares, in whole blocks.
    again = Disks(files)
    again.request([*PROMPT[:700], *PROMPT])
    assert again.kept(PROMPT) == 512


def test_what_is_not_to_be_stored_stays_in_memory() -> None:
    disks = Disks()
    disks.keeper.keep(PROMPT, "", stores=False)
    assert not disks.cache.writing.has_work
    assert disks.kept(PROMPT) == len(PROMPT)
    # What others ask after it is stored with all that it begins with.
    disks.write([*PROMPT, *range(300)])
    assert [len(rank) for rank in disks.files] == [5, 5]


def test_a_key_finds_its_own_prompts_only(files: list[dict[str, int]]) -> None:
    disks = Disks(files)
    disks.write(PROMPT, "a")
    assert len(disks.files[0]) == 8
    other = Disks(disks.files)
    other.request(PROMPT, "b")
    assert other.kept(PROMPT, "b") == 0
    other.request(PROMPT, "a")
    assert other.kept(PROMPT, "a") == 1024
    # The run's own key is another one than that of the run before.
    own = Disks(disks.files, own_scope="another")
    own.request(PROMPT)
    assert own.kept(PROMPT) == 0


def test_a_block_counts_only_if_every_rank_has_its_part(files: list[dict[str, int]]) -> None:
    third = list(files[1])[2]
    del files[1][third]
    disks = Disks(files)
    assert third not in disks.files[0]
    disks.request(PROMPT)
    assert disks.kept(PROMPT) == 512


def test_what_cannot_be_read_is_forgotten_and_computed(files: list[dict[str, int]]) -> None:
    disks = Disks(files)
    second = list(files[1])[1]
    del disks.files[1][second]  # damaged, which is seen only when it is read
    disks.request(PROMPT)
    assert disks.kept(PROMPT) == 256
    assert second not in disks.files[0]
    disks.write(PROMPT)
    assert second in disks.files[0]


@pytest.mark.parametrize("new", [b"secret", b"that of a run which started meanwhile"])
def test_what_is_written_after_the_cache_was_cleared_is_found_by_the_next_run(
    files: list[dict[str, int]], new: bytes
) -> None:
    """`k2 cache clear` on the leader's machine removes the secret on which all names depend."""
    disks = Disks(files)
    disks.keeper.keep(PROMPT, "")
    disks.files[0].clear()  # the second rank is on another machine
    old = set(disks.files[1])
    other = random.Random(2).choices(range(10**6), k=600)
    disks.keeper.keep(other, "")
    disks.cache.writing.write_some()  # the leader learns of it only by what its writer finds
    disks.store.secret, disks.store.removals = new, 1
    disks.cache.take_own_reports()
    disks.work()
    disks.write([*PROMPT, 7])
    assert bool(old & set(disks.files[1])) is (new == b"secret")
    assert sum(disks.files[0].values()) == 6 * SIZES[0]
    later = Disks(disks.files, secret=new)
    later.request([*PROMPT, 5])
    later.request([*other, 5])
    assert (later.kept(PROMPT), later.kept(other)) == (1024, 512)


def test_no_block_is_kept_if_the_limit_is_less_than_one() -> None:
    disks = Disks(limit=max(SIZES) - 1)
    disks.write(PROMPT)
    disks.write(PROMPT[::-1])
    assert disks.writes == 1  # of one whose size was not known before
    assert disks.files == [{}, {}]


def test_the_budget_holds_and_the_least_recently_used_go_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = itertools.count(10**9)
    monkeypatch.setattr("time.time", lambda: float(next(seconds)))
    disks = Disks()
    draw = random.Random(3)
    prompts = [draw.choices(range(10**6), k=520) for _ in range(9)]
    for prompt in prompts:
        disks.write(prompt)
        disks.write(prompts[0])
        disks.cache.reading.consider(Waiting(Generate("r", prompts[0], 1), 0.0), 0.0)
        disks.keeper.keep([*prompts[0], *draw.choices(range(9), k=20)], "")
        assert sum(disks.files[0].values()) <= LIMIT
    kept = [all(b in disks.files[0] for b in disks.cache.blocks.chain(p, "")) for p in prompts]
    assert kept == [True, *[False] * 4, *[True] * 4]


def test_one_block_at_a_time_is_written_beside_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    disks = Disks()
    disks.keeper.keep(PROMPT, "")
    for blocks in (1, 1, 2, 2, 3):
        disks.cache.writing.write_now_and_then()
        disks.work()
        assert len(disks.files[0]) == blocks
        now[0] += 1.1
    now[0] += 10.0
    disks.cache.writing.write_now_and_then()
    now[0] += 10.0
    disks.cache.writing.write_now_and_then()  # the disk is slow
    assert len(disks.waiting) == 1


def test_an_error_of_one_disk_switches_writing_off() -> None:
    disks = Disks()
    disks.write(PROMPT, error="No space left on device")
    assert disks.files[0] == {}
    disks.write([*PROMPT[:600], 1, 2, 3, *PROMPT])
    assert disks.files == [{}, {}]
    assert not disks.cache.writing.has_work


def test_a_request_does_not_wait_longer_than_computing_takes(
    files: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    disks, now = Disks(files), [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    waiting = Waiting(Generate("r", PROMPT, 5), 0.0)
    disks.cache.reading.consider(waiting, 100.0)
    disks.cache.reading.read_some(lambda waiting: True, 100_000)
    assert not waiting.is_ready
    now[0] += 10.0
    disks.cache.reading.read_some(lambda waiting: True, 100_000)
    assert not waiting.is_ready
    now[0] += 0.3  # of 1,024 tokens
    disks.cache.reading.read_some(lambda waiting: True, 100_000)
    assert waiting.is_ready
    disks.work()  # the disk answers late: what it has read is kept for others
    disks.cache.reading.read_some(lambda waiting: False, 100_000)
    assert disks.kept(PROMPT) == 1024
    assert not disks.cache.reading.is_reading


def test_a_disk_that_hangs_delays_one_request_and_not_for_long(
    files: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    disks, now = Disks(files), [1000.0]
    reading = disks.cache.reading
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    waiting = Waiting(Generate("r", PROMPT, 5), 0.0)
    reading.consider(waiting, 0.0)  # the rate of computing is unknown
    reading.read_some(lambda waiting: True, 100_000)
    now[0] += 5.1
    reading.read_some(lambda waiting: True, 100_000)
    assert waiting.is_ready
    others = [Waiting(Generate(str(number), PROMPT, 5), 0.0) for number in range(2)]
    reading.consider(others[0], 0.0)
    assert others[0].is_ready
    disks.work()  # the disk goes on
    reading.read_some(lambda waiting: False, 100_000)
    disks.keeper.tree.remove(disks.keeper.tree.oldest() or 0)
    reading.consider(others[1], 0.0)
    assert not others[1].is_ready


def test_nothing_is_read_that_memory_has_no_room_for(files: list[dict[str, int]]) -> None:
    disks = Disks(files)
    waiting = Waiting(Generate("r", PROMPT, 5), 0.0)
    disks.cache.reading.consider(waiting, 0.0)
    for _ in range(2):
        disks.cache.reading.read_some(lambda waiting: True, 1000)
    assert waiting.is_ready
    assert not disks.waiting


def test_many_waiting_requests_do_not_make_every_step_slow(
    files: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of a prompt are looked up when its turn comes, not before each step."""
    disks, looked_up = Disks(files), list[int]()
    waiting = [Waiting(Generate(str(n), [*PROMPT, n], 5), 0.0) for n in range(20)]
    for each in waiting:
        disks.cache.reading.consider(each, 0.0)
    find = disks.keeper.tree.find
    monkeypatch.setattr(disks.keeper.tree, "find", lambda *of: (looked_up.append(1), find(*of))[1])
    for _ in range(10):
        disks.cache.reading.read_some(lambda waiting: True, 100_000)
    assert len(looked_up) <= 2
    disks.work()
    disks.cache.reading.read_some(lambda waiting: True, 100_000)
    # What the first have read is there for all.
    assert all(each.is_ready for each in waiting)
    assert not disks.cache.reading.is_reading
