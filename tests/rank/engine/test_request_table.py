"""The leader's table on random workloads in virtual time: memory, order, pauses, no starvation.

``Ranks`` carries out the table's decisions as a follower would, and refuses impossible ones.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2cli.fair_queue import ANSWER_UNITS, SHORT_UNITS
from k2cli.protocol import (
    CloseSequence,
    Decision,
    DropPrefix,
    Finished,
    Generate,
    JoinBatch,
    LeaveBatch,
    OpenSequence,
    RankMessage,
    RequestFailed,
    SplitPrefix,
)
from k2cli.rank.engine.admission import Admission
from k2cli.rank.engine.budget import used_tokens
from k2cli.rank.engine.pausing import QUANTUM_UNITS
from k2cli.rank.engine.request_table import RequestTable
from k2cli.rank.engine.requests import Running
from k2cli.rank.engine.waiting_line import is_short

CHUNK = 64
CONTEXT = 1024


@dataclass
class Ranks:
    """The caches that every rank has after the decisions so far."""

    sequences: set[int] = field(default_factory=set)
    rows: dict[int, list[int]] = field(default_factory=dict)
    prefixes: dict[int, int | None] = field(default_factory=dict)
    next_number: int = 1
    check_room: Callable[[], None] = lambda: None
    """Called when a cache is made: its memory must be free by then."""

    def submit(self, decision: Decision) -> None:
        assert decision.step == self.next_number
        self.next_number += 1
        match decision:
            case OpenSequence(sequence=sequence, prefix=prefix):
                assert sequence not in self.sequences
                assert prefix is None or prefix in self.prefixes
                self.sequences.add(sequence)
                for released in decision.release:
                    self._drop(released)
                self.check_room()
            case JoinBatch(batch=batch, sequence=sequence):
                self.sequences.remove(sequence)
                self.rows.setdefault(batch, []).append(sequence)
            case LeaveBatch(batch=batch, sequence=sequence, move_to=move_to):
                self.rows[batch].remove(sequence)
                if move_to is not None:
                    self.rows.setdefault(move_to, []).append(sequence)
                self._keep(decision.keep_as, decision.keep_below)
            case CloseSequence(sequence=sequence):
                self.sequences.remove(sequence)
                self._keep(decision.keep_as, decision.keep_below)
            case SplitPrefix(prefix=prefix, above=above):
                self._keep(above, self.prefixes[prefix])
                self.prefixes[prefix] = above
            case DropPrefix(prefix=prefix):
                self._drop(prefix)
            case _:
                raise AssertionError(decision)

    def _drop(self, prefix: int) -> None:
        del self.prefixes[prefix]
        assert prefix not in self.prefixes.values(), "a parent was dropped"

    def _keep(self, keep_as: int | None, below: int | None) -> None:
        if keep_as is not None:
            assert keep_as not in self.prefixes
            assert below is None or below in self.prefixes
            self.prefixes[keep_as] = below


class Machine:
    """A run in virtual time: between two steps of all batches, a chunk of one prompt."""

    def __init__(self, seed: int, concurrency: int, batches: int = 1) -> None:
        self.draw = random.Random(seed)
        self.ranks, self.told = Ranks(), list[RankMessage]()
        self.table = RequestTable(
            self.ranks, self.told.append, context_length=CONTEXT, concurrency=concurrency,
            batches=batches, can_batch=True, cuttable_caches=True,
        )  # fmt: skip
        self.admission = Admission(self.table)
        self.budget_tokens = CONTEXT * concurrency
        self.ranks.check_room = self.check_room
        self.numbers = itertools.count()
        self.sent: dict[str, Generate] = {}
        self.started: list[str] = []
        self.units = 0
        """Work so far, with what was done again."""
        self.ended: dict[str, int] = {}
        """Work until each end."""
        self.reports: dict[str, Finished] = {}

    def send(
        self, owner: str, prompt: Iterable[int] | int, tokens: int, scope: str | None = None
    ) -> str:
        if isinstance(prompt, int):
            prompt = [self.draw.randrange(10**9) for _ in range(prompt)]
        name = f"{owner} {next(self.numbers)}"
        request = Generate(name, list(prompt), tokens, owner=owner, prefix_scope=scope or owner)
        self.sent[name] = request
        self.table.enqueue(request)
        return name

    def step(self, *, always_quiet: bool = False) -> None:
        table, quiet = self.table, list(self.table.batches)
        if not always_quiet and not self.admission.draining and self.draw.random() < 0.7:
            quiet = []  # a step ahead is in flight
        table.end_cancelled()
        self.admission.admit(quiet)
        table.balance(quiet)
        for row in table.prefill_order()[:1]:
            count = min(CHUNK, row.prefill_left)
            row.computed += count
            table.line.charge(row, 1)
            self.units += count
        for row in [row for row in table.prefilling if not row.prefill_left]:
            table.join(row)
            if row.request.request_id not in self.started:
                self.started.append(row.request.request_id)
        for row in [row for rows in table.batches.values() for row in rows]:
            self._decode(row)
        self._check()

    def _decode(self, row: Running) -> None:
        row.steps += 1
        row.computed += 1
        self.table.line.charge(row, ANSWER_UNITS)
        self.units += ANSWER_UNITS
        row.generated.append(len(row.generated))
        full = len(row.request.prompt) + len(row.generated) >= CONTEXT
        if full or len(row.generated) == row.request.max_tokens:
            self.table.end(row, "length")

    def check_room(self) -> None:
        held = {batch: [] for batch in self.table.batches}
        for row in self.table.admitted:
            held[row.batch].append(row.worst_case_tokens)
        assert used_tokens(held) + self.table._prefixes.tokens() <= self.budget_tokens
        assert set(self.table._prefixes) == self.ranks.prefixes.keys()

    def _check(self) -> None:
        table = self.table
        self.check_room()
        assert {row.sequence for row in table.prefilling} == self.ranks.sequences
        for batch, rows in table.batches.items():
            assert [row.sequence for row in rows] == self.ranks.rows.get(batch, [])
        for message in self.told:
            if isinstance(message, Finished):
                assert message.request_id not in self.ended
                self.ended[message.request_id] = self.units
                self.reports[message.request_id] = message
            assert not isinstance(message, RequestFailed), message
        self.told.clear()

    def run_until(self, *names: str, limit: int = 200_000) -> None:
        while not all(name in self.ended for name in names):
            self.step()
            assert self.units < limit, "starved"


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 8]), st.sampled_from([1, 2]))
def test_every_request_ends_whatever_comes_and_memory_never_overflows(
    seed: int, concurrency: int, batches: int
) -> None:
    """Requests of three keys, follow-ups, cancellations, pauses, steps ahead."""
    machine = Machine(seed, concurrency, batches)
    draw, histories = machine.draw, list[tuple[str, list[int]]]()
    for _ in range(40):
        for _ in range(draw.choice([0, 0, 1, 3])):
            owner = draw.choice("abc")
            if histories and draw.random() < 0.4:
                owner, history = draw.choice(histories)
                prompt = [*history, *draw.choices(range(10**9), k=draw.randint(1, 60))][:900]
            else:
                prompt = draw.choices(range(10**9), k=draw.choice([1, 20, 300, 900]))
            for _ in range(draw.choice([1, 1, 3])):  # of the same prompt at the same time
                machine.send(owner, prompt, draw.choice([1, 8, 100, 2000]))
            histories.append((owner, prompt))
        if machine.sent and draw.random() < 0.2:
            machine.table.cancel(draw.choice(list(machine.sent)))
        machine.step()
    machine.run_until(*machine.sent)
    assert machine.table.empty
    assert not machine.ranks.sequences
    assert not any(machine.ranks.rows.values())


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("owner", ["crowd", "other"])
def test_a_short_request_beside_64_clients_waits_for_no_answer(
    concurrency: int, owner: str
) -> None:
    """The bound: what runs is computed for a quantum each, and a chunk and a step."""
    machine = Machine(19, concurrency)
    for _ in range(64):
        machine.send("crowd", 300, 600)
    waits = []
    for _ in range(12):
        for _ in range(machine.draw.randint(10, 60)):
            machine.step(always_quiet=True)
        began = machine.units
        name = machine.send(owner, 40, 1)
        while name not in machine.ended:
            machine.step(always_quiet=True)
        waits.append(machine.ended[name] - began)
        while len(machine.table.line) < 60:
            machine.send("crowd", 300, 600)
    bound = (concurrency + 1) * (QUANTUM_UNITS + 2 * CHUNK) + SHORT_UNITS
    assert max(waits) <= bound, waits


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_flood_of_short_requests_does_not_starve_a_long_one(concurrency: int) -> None:
    """A long answer makes progress beside 20 clients of its own key and 20 of another."""
    machine = Machine(5, concurrency)
    long = machine.send("own", 500, 200)
    machine.step()
    short: list[str] = []
    while long not in machine.ended:
        short = [name for name in short if name not in machine.ended]
        while len(short) < 40:
            short.append(machine.send(("own", "other")[len(short) % 2], 30, 4))
        machine.step()
        # Of 41 conversations and two keys, its fair share of the work is at least one in 41.
        assert machine.units < 41 * (500 + 200 * ANSWER_UNITS) * 1.5, "starved"


def test_keys_get_equal_work_while_both_have_requests_waiting() -> None:
    machine = Machine(6, 8)
    for _ in range(64):
        machine.send("many", 200, 300)
    few = [machine.send("few", 200, 300) for _ in range(16)]
    while len([name for name in few if name in machine.ended]) < 8:
        machine.step()
    counters = [machine.table.line.counter_of(owner) for owner in ("many", "few")]
    one = 200 + 300 * ANSWER_UNITS
    assert abs(counters[0] - counters[1]) <= 8 * one
    many = [name for name in machine.ended if name.startswith("many")]
    assert len(many) <= 12


def test_conversations_that_take_turns_find_their_caches() -> None:
    """Room for six contexts, four of which are running: the others' caches are kept for them."""
    machine = Machine(7, 3)
    histories = [machine.draw.choices(range(10**9), k=250) for _ in range(4)]
    cached = 0
    for _ in range(5):
        names = [machine.send("a", history, 5) for history in histories]
        machine.run_until(*names)
        for index, history in enumerate(histories):
            histories[index] = [*history, *range(4), *machine.draw.choices(range(10**9), k=20)]
        found = [machine.table._prefixes.find(history, "a") for history in histories]
        cached += sum(hit is not None for hit in found)
    assert cached == 20


def test_a_cache_that_a_request_finds_after_a_pause_is_free() -> None:
    """It was paused before anything was computed, and a shorter one left its beginning."""
    machine = Machine(8, 1)
    prompt = machine.draw.choices(range(10**9), k=600)
    long = machine.send("a", prompt, 400)
    machine.admission.admit(list(machine.table.batches))
    short = machine.send("a", prompt[:100], 1)
    machine.run_until(long, short)
    report = machine.reports[long]
    assert (report.pauses, report.cached_tokens) == (1, 100)
    assert machine.table.line.counter_of("a") == machine.units


def test_a_prompt_that_several_requests_have_is_computed_once() -> None:
    machine = Machine(11, 8)
    prompt, end = (machine.draw.choices(range(10**9), k=count) for count in (600, 50))
    same = [machine.send("a", prompt, 5) for _ in range(3)]
    machine.step()
    begins = machine.send("a", [*prompt[:400], *end], 5)
    other_key = machine.send("b", prompt, 5)
    machine.run_until(*same, begins, other_key)
    cached = [machine.reports[name].cached_tokens for name in (*same, begins, other_key)]
    assert cached == [0, 599, 599, 400, 0]
    assert machine.units == 599 + 49 + 599 + 5 * 5 * ANSWER_UNITS

    # One that has much more to compute is not waited for, nor one of few tokens.
    longer = machine.send("a", [*end, *range(800)], 5)
    machine.step()
    shorter = machine.send("a", [*end, *range(300), *end], 5)
    few = [machine.send("c", prompt[:200], 5) for _ in range(2)]
    machine.run_until(longer, shorter, *few)
    assert [machine.reports[name].cached_tokens for name in (longer, shorter, *few)] == [0] * 4

    # The one that computes is cancelled: another goes on from there.
    again = [machine.send("d", prompt, 5) for _ in range(3)]
    machine.step()
    machine.table.cancel(again[0])
    machine.run_until(*again)
    assert [machine.reports[name].cached_tokens for name in again] == [0, CHUNK, 599]


def test_a_request_whose_cache_is_gone_when_it_starts_is_not_short() -> None:
    machine = Machine(9, 1)
    prompt = machine.draw.choices(range(10**9), k=700)
    machine.run_until(machine.send("a", prompt, 1))
    follow_up = machine.send("a", [*prompt, 1], 1)
    (ticket,) = machine.table.line.tickets
    assert is_short(ticket)
    assert ticket.item.prefix is not None
    machine.table.keeper.drop(ticket.item.prefix)
    machine.admission.admit(list(machine.table.batches))
    assert [row.is_short for row in machine.table.admitted] == [False]
    machine.run_until(follow_up)


def test_short_requests_without_room_are_not_tried_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before each step, room is looked for once for each key and size, however many wait."""
    machine = Machine(10, 8)
    for index in range(400):
        machine.send("abcd"[index % 4], 20, 20)
    machine.step(always_quiet=True)
    assert len(machine.table.line) > 300
    tried, place = list[object](), machine.admission._place

    def counted(*given: Any) -> object:
        tried.append(given)
        return place(*given)

    monkeypatch.setattr(machine.admission, "_place", counted)
    machine.admission.admit(list(machine.table.batches))
    assert 1 <= len(tried) <= 4
