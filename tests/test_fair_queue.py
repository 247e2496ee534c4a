"""The order of requests as properties, on random workloads in virtual time."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from k2cli.fair_queue import (
    ANSWER_UNITS,
    EXPECTED_ANSWER_TOKENS,
    LEAST_UNITS,
    MOST_UNITS,
    FairQueue,
    Ticket,
)


@dataclass(eq=False)
class Job:
    """A request: its own tokens, and what it takes to compute them."""

    owner: str
    prompt: list[int]
    answer: int
    came: float = 0.0
    work_before: dict[str, float] = field(default_factory=dict)

    @property
    def units(self) -> int:
        return len(self.prompt) + ANSWER_UNITS * self.answer


def _prompt(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(10**9) for _ in range(length)]


def _join(queue: FairQueue[Job], job: Job) -> Ticket[Job]:
    return queue.join(job, job.owner, job.prompt, job.answer, 0)


def _serve(queue: FairQueue[Job], ticket: Ticket[Job]) -> None:
    """Compute a whole request, one after another."""
    queue.start(ticket)
    queue.charge(ticket, ticket.item.units)
    queue.end(ticket)


def _first(queue: FairQueue[Job]) -> Ticket[Job]:
    return next(queue.in_order())


JOBS = st.tuples(
    st.sampled_from("abc"), st.integers(1, 3000), st.integers(1, EXPECTED_ANSWER_TOKENS)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(JOBS, st.integers(0, 3)), min_size=1, max_size=40), st.integers(0, 9999))
def test_no_key_that_waits_falls_behind_another_by_more_than_two_requests(
    plan: list[tuple[tuple[str, int, int], int]], seed: int
) -> None:
    """The bound of virtual token counters, with requests that come at any time."""
    draw, queue = random.Random(seed), FairQueue[Job]()
    largest = max(Job(*_sized(draw, job)).units for job, _ in plan)
    arrivals = list(plan)
    # Work for each other key since a key has had requests waiting without a break.
    since: dict[str, dict[str, float]] = {}
    while arrivals or len(queue):
        if arrivals and (not len(queue) or draw.random() < 0.6):
            job = Job(*_sized(draw, arrivals.pop()[0]))
            if not queue.waiting_of(job.owner):
                since[job.owner] = dict.fromkeys("abc", 0.0)
            _join(queue, job)
            continue
        ticket = _first(queue)
        _serve(queue, ticket)
        waiting = [owner for owner in "abc" if queue.waiting_of(owner)]
        for owner in list(since):
            if owner in waiting:
                since[owner][ticket.owner] += ticket.item.units
                both = {other for other in waiting if other in since}
                for other in both - {owner}:
                    ahead = since[owner][other] - since[owner][owner]
                    assert ahead <= 2 * largest
            elif owner != ticket.owner:
                since.pop(owner)
        if ticket.owner not in waiting:
            since.pop(ticket.owner, None)


def _sized(draw: random.Random, job: tuple[str, int, int]) -> tuple[str, list[int], int]:
    owner, length, answer = job
    return owner, _prompt(draw, length), answer


@settings(max_examples=40, deadline=None)
@given(st.integers(1, MOST_UNITS), st.integers(1, 40), st.integers(0, 9999))
def test_a_request_is_passed_with_at_most_its_own_work_for_each_conversation(
    units: int, crowd: int, seed: int
) -> None:
    """New conversations of the same key keep coming, always ``crowd`` of them at a time."""
    draw, queue = random.Random(seed), FairQueue[Job]()
    for _ in range(draw.randint(0, 5)):
        _join(queue, Job("a", _prompt(draw, draw.randint(1, 500)), draw.randint(1, 64)))
    early = sum(ticket.item.units for ticket in queue.in_order())
    ours = _join(queue, Job("a", _prompt(draw, units), 1))
    passed = 0.0
    largest = 0
    while (ticket := _first(queue)) is not ours:
        passed += ticket.item.units
        _serve(queue, ticket)
        while len(queue) < crowd + 1:
            job = Job("a", _prompt(draw, draw.randint(1, 200)), draw.randint(1, 16))
            largest = max(largest, job.units, LEAST_UNITS)
            _join(queue, job)
    active = max(crowd + 1, 7)
    # Requests of less than the least cost count as that; at most once per conversation.
    assert passed <= early + active * (ours.cost + largest)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999))
def test_short_requests_pass_long_ones_and_conversations_keep_their_order(seed: int) -> None:
    draw, queue = random.Random(seed), FairQueue[Job]()
    starts = [_prompt(draw, draw.randint(8, 60)) for _ in range(4)]
    sent: dict[int, list[Job]] = {index: [] for index in range(4)}
    for _ in range(30):
        index = draw.randrange(4)
        start = starts[index]
        job = Job("a", list(start), draw.randint(1, 300))
        starts[index] = [*start, *_prompt(draw, draw.randint(5, 400))]
        sent[index].append(job)
        _join(queue, job)
        if draw.random() < 0.3:
            _serve(queue, _first(queue))
    one = _join(queue, Job("a", _prompt(draw, 12), 1))
    waiting = [ticket.item for ticket in queue.in_order()]
    # All else that is due before it continues a conversation that was behind, or is as short.
    assert waiting.index(one.item) <= 4
    for jobs in sent.values():
        left = [job for job in waiting if job in jobs]
        assert left == [job for job in jobs if job in left]


def test_a_key_that_had_nothing_to_do_saves_nothing_up() -> None:
    draw, queue = random.Random(1), FairQueue[Job]()
    for _ in range(50):
        ticket = _join(queue, Job("busy", _prompt(draw, 500), 100))
        _serve(queue, ticket)
    served = []
    for owner in ("late", "busy") * 10:
        _join(queue, Job(owner, _prompt(draw, 500), 100))
    while len(queue):
        ticket = _first(queue)
        served.append(ticket.owner)
        _serve(queue, ticket)
    assert all(abs(served[:n].count("late") - served[:n].count("busy")) <= 1 for n in range(20))


def test_conversations_are_told_apart_by_tokens_alone() -> None:
    """A shared system prompt does not make two one; another ending does not end a conversation."""
    draw, queue = random.Random(2), FairQueue[Job]()
    system, opening = _prompt(draw, 2000), [1, 2, 3]
    first = [*system, 11, 12, *opening]
    other = [*system, 21, 22, *opening]
    tickets = [_join(queue, Job("a", prompt, 10)) for prompt in (first, other)]
    # The answer follows an opening of which the last two tokens differ.
    again = _join(queue, Job("a", [*first[:-2], 4, 5, 6, 7, *opening], 10))
    foreign = _join(queue, Job("b", list(first), 10))
    assert tickets[0].conversation is not tickets[1].conversation
    assert again.conversation is tickets[0].conversation
    assert foreign.conversation is not tickets[0].conversation


def test_the_records_of_conversations_and_keys_are_bounded() -> None:
    draw, queue = random.Random(3), FairQueue[Job]()
    for number in range(3000):
        _serve(queue, _join(queue, Job(f"key {number % 1500}", _prompt(draw, 9), 1)))
    for _ in range(1200):
        _serve(queue, _join(queue, Job("one", _prompt(draw, 9), 1)))
    assert len(queue._keys) <= 1025
    assert len(queue._keys["one"].known) <= 513
