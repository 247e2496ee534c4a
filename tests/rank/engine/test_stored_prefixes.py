"""The leader's directory of stored prefixes, with two ranks whose disks the test plays."""

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
from k2cli.rank.engine.prefix_keeper import PrefixKeeper
from k2cli.rank.engine.requests import Waiting
from k2cli.rank.engine.stored_prefixes import StoredPrefixes

SIZES = (100, 60)
LIMIT = 1000
PROMPT = random.Random(1).choices(range(10**6), k=1100)


@dataclass
class _Store:
    """The leader's own store, which records times of use."""

    times: dict[str, float] = field(default_factory=dict)
    secret: bytes = b"secret"

    def touch(self, times: dict[str, float]) -> None:
        self.times |= times


@dataclass(frozen=True)
class _Assignment:
    size: int = 2
    prefix_disk_bytes: int = LIMIT
    prefix_disk_scope: str = "own key"


class Disks:
    """The disks of two ranks: they write and read what the leader decides, when they are told."""

    def __init__(
        self, blocks: Sequence[dict[str, int]] = ({}, {}), own_scope: str = "own key"
    ) -> None:
        self.next_number = 1
        self.files = [dict(rank) for rank in blocks]
        self.waiting: list[Decision] = []
        self.keeper = PrefixKeeper(self, whole_only=False)
        reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        store: Any = _Store()
        assignment: Any = _Assignment(prefix_disk_scope=own_scope)
        self.stored = StoredPrefixes(self, self.keeper, store, reports, assignment)
        for rank, files in enumerate(self.files):
            found = [(name, size, float(index)) for index, (name, size) in enumerate(files.items())]
            self.stored.handle(BlocksFound(rank, found))

    def submit(self, decision: Decision) -> None:
        self.next_number += 1
        if isinstance(decision, ForgetBlocks):
            for rank in self.files:
                for block in decision.blocks:
                    rank.pop(block, None)
        else:
            self.waiting.append(decision)

    def work(self, *, error: str = "") -> None:
        """Carry out what waits; the second rank may be out of order."""
        waiting, self.waiting = self.waiting, []
        for decision in waiting:
            for rank in (0, 1):
                match decision:
                    case StoreBlock(block=block) if rank and error:
                        self.stored.handle(BlockWritten(rank, block, error=error))
                    case StoreBlock(block=block):
                        self.files[rank][block] = SIZES[rank]
                        self.stored.handle(BlockWritten(rank, block, SIZES[rank]))
                    case ReadBlocks(reading=reading, blocks=blocks):
                        there = [block in self.files[rank] for block in blocks]
                        count = [*there, False].index(False)
                        self.stored.handle(BlocksRead(rank, reading, count))

    def write(self, tokens: Sequence[int], scope: str = "", *, error: str = "") -> None:
        """Keep a sequence, and write it until nothing is left to be written."""
        self.keeper.keep(tokens, scope)
        while self.stored.has_work:
            self.stored.write_some()
            self.work(error=error)

    def request(self, prompt: list[int], scope: str = "") -> Waiting:
        """Let a request wait for what is stored, to the end of reading."""
        waiting = Waiting(Generate("r", prompt, 5, prefix_scope=scope), 0.0)
        self.stored.consider(waiting, 0.0)
        while self.stored.is_reading:
            self.stored.read_some(lambda waiting: True, 100_000)
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
        disks.stored.consider(Waiting(Generate("r", prompts[0], 1), 0.0), 0.0)
        disks.keeper.keep([*prompts[0], *draw.choices(range(9), k=20)], "")
        assert sum(disks.files[0].values()) <= LIMIT
    kept = [all(b in disks.files[0] for b in disks.stored.chain(p, "")) for p in prompts]
    assert kept == [True, *[False] * 4, *[True] * 4]


def test_one_block_at_a_time_is_written_beside_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    disks = Disks()
    disks.keeper.keep(PROMPT, "")
    for blocks in (1, 1, 2, 2, 3):
        disks.stored.write_now_and_then()
        disks.work()
        assert len(disks.files[0]) == blocks
        now[0] += 1.1
    now[0] += 10.0
    disks.stored.write_now_and_then()
    now[0] += 10.0
    disks.stored.write_now_and_then()  # the disk is slow
    assert len(disks.waiting) == 1


def test_an_error_of_one_disk_switches_writing_off() -> None:
    disks = Disks()
    disks.write(PROMPT, error="No space left on device")
    assert disks.files[0] == {}
    disks.write([*PROMPT[:600], 1, 2, 3, *PROMPT])
    assert disks.files == [{}, {}]
    assert not disks.stored.has_work


def test_a_request_does_not_wait_longer_than_computing_takes(
    files: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    disks, now = Disks(files), [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    waiting = Waiting(Generate("r", PROMPT, 5), 0.0)
    disks.stored.consider(waiting, 100.0)
    disks.stored.read_some(lambda waiting: True, 100_000)
    assert not waiting.is_ready
    now[0] += 10.0
    disks.stored.read_some(lambda waiting: True, 100_000)
    assert not waiting.is_ready
    now[0] += 0.3  # of 1,024 tokens
    disks.stored.read_some(lambda waiting: True, 100_000)
    assert waiting.is_ready
    disks.work()  # the disk answers late: what it has read is kept for others
    disks.stored.read_some(lambda waiting: False, 100_000)
    assert disks.kept(PROMPT) == 1024
    assert not disks.stored.is_reading


def test_a_disk_that_hangs_delays_one_request_and_not_for_long(
    files: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    disks, now = Disks(files), [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    waiting = Waiting(Generate("r", PROMPT, 5), 0.0)
    disks.stored.consider(waiting, 0.0)  # the rate of computing is unknown
    disks.stored.read_some(lambda waiting: True, 100_000)
    now[0] += 5.1
    disks.stored.read_some(lambda waiting: True, 100_000)
    assert waiting.is_ready
    others = [Waiting(Generate(str(number), PROMPT, 5), 0.0) for number in range(2)]
    disks.stored.consider(others[0], 0.0)
    assert others[0].is_ready
    disks.work()  # the disk goes on
    disks.stored.read_some(lambda waiting: False, 100_000)
    disks.keeper.tree.remove(disks.keeper.tree.oldest() or 0)
    disks.stored.consider(others[1], 0.0)
    assert not others[1].is_ready


def test_nothing_is_read_that_memory_has_no_room_for(files: list[dict[str, int]]) -> None:
    disks = Disks(files)
    waiting = Waiting(Generate("r", PROMPT, 5), 0.0)
    disks.stored.consider(waiting, 0.0)
    for _ in range(2):
        disks.stored.read_some(lambda waiting: True, 1000)
    assert waiting.is_ready
    assert not disks.waiting
