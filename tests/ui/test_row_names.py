"""Names of the rows of a plan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from k2cli.ui.plan.bars import name_width, row_names


def nodes(*places: str) -> Any:
    return [SimpleNamespace(place=place, gpu=None) for place in places]


def test_ranks_on_one_machine_are_told_apart() -> None:
    assert row_names(nodes("localhost", "localhost")) == ["localhost rank 0", "localhost rank 1"]
    assert name_width(nodes("localhost", "localhost")) >= len("localhost rank 1")


def test_a_machine_of_its_own_keeps_its_name() -> None:
    assert row_names(nodes("a", "b", "a")) == ["a rank 0", "b", "a rank 2"]
    assert row_names(nodes("m3-ultra-512/1", "m3-ultra-512/2")) == [
        "m3-ultra-512/1", "m3-ultra-512/2",
    ]  # fmt: skip
