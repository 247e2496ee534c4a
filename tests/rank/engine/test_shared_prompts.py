"""What waits for a prompt that another request computes: its order, its memory, its end."""

from __future__ import annotations

from tests.rank.engine.test_request_table import Machine


def test_no_other_cache_is_dropped_for_a_prompt_that_has_no_room() -> None:
    machine = Machine(1, 2)
    machine.run_until(*[machine.send("kept", 150, 1) for _ in range(2)])
    machine.send("runs", 10, 700)
    machine.step()
    prompt = machine.draw.choices(range(10**9), k=600)
    first, _ = machine.send("a", prompt, 100), machine.send("a", prompt, 100)
    while first not in machine.started:
        assert len(machine.table._prefixes) == 2
        machine.step()
    assert len(machine.table._prefixes) == 2


def test_no_cache_is_copied_for_a_request_that_waits_no_more() -> None:
    machine = Machine(4, 8)
    prompt = machine.draw.choices(range(10**9), k=600)
    first, second = machine.send("a", prompt, 5), machine.send("a", prompt, 5)
    machine.step()
    assert [machine.table.is_awaited(row) for row in machine.table.prefilling] == [True]
    machine.table.cancel(second)
    while first not in machine.started:
        assert not len(machine.table._prefixes)
        machine.step()
    assert not len(machine.table._prefixes)


def test_a_prompt_is_computed_when_the_first_that_waits_for_it_is_due() -> None:
    """A short request that waits for a long one is not passed by all that pass the long one."""
    took = []
    for end in (20, 0):  # of the same beginning, or of none
        machine = Machine(5, 12)
        begin = machine.draw.choices(range(10**9), k=400)

        def others(machine: Machine = machine) -> None:
            while len(machine.table.line.tickets) + len(machine.table.prefilling) < 8:
                machine.send("a", 90, 1)

        others()
        machine.step()
        machine.send("a", [*begin, *machine.draw.choices(range(10**9), k=400)], 200)
        for _ in range(4):
            others()
            machine.step()
        name = machine.send("a", [*begin[: end * 20], *range(420 - end * 20)], 1)
        before = machine.units
        while name not in machine.ended:
            others()
            machine.step()
        took.append(machine.units - before)
    assert took[0] < 1.5 * took[1]


def test_a_request_waits_for_no_prompt_whose_tokens_it_finds_by_now() -> None:
    machine = Machine(6, 8)
    begin = machine.draw.choices(range(10**9), k=450)
    longer = machine.send("b", [*begin, *range(500)], 1, scope="all")
    machine.admission.admit([])
    shorter = machine.send("a", [*begin, 1], 1, scope="all")
    waits = machine.send("c", [*begin, 2], 1, scope="all")
    machine.run_until(shorter, waits)
    assert longer not in machine.started
    assert machine.reports[waits].cached_tokens == 450


def test_a_request_waits_for_no_prompt_of_another_key_whose_turn_is_later() -> None:
    """With --share-prefixes: that key has long answers, so that the prompts of others pass it."""
    waited = []
    for scope in ("all", "a"):
        machine = Machine(2, 16)
        machine.send("c", 30, 60)
        for _ in range(8):
            machine.send("b", 20, 900, scope="all")
        for _ in range(400):
            if not any(row.request.owner == "c" for row in machine.table.admitted):
                machine.send("c", 30, 1)
            machine.step()
        prompt = machine.draw.choices(range(10**9), k=800)
        machine.send("b", prompt, 2, scope="all")
        machine.admission.admit([])
        for _ in range(12):
            machine.send("c", 800, 2)
        before = machine.units
        machine.run_until(machine.send("a", prompt, 2, scope=scope))
        waited.append(machine.units - before)
    assert waited[0] < 2 * waited[1]  # it was three times as long


def test_keys_that_share_prefixes_compute_a_prompt_once() -> None:
    machine = Machine(8, 8)
    prompt = machine.draw.choices(range(10**9), k=800)
    names = [machine.send(owner, prompt, 3, scope="all") for owner in "abc"]
    machine.run_until(*names)
    assert sorted(machine.reports[name].cached_tokens for name in names) == [0, 799, 799]
