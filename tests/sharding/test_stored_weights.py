"""Reads before a GPU computes: on Metal, macOS ends a GPU that waits for a file too long."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from k2cli.quantization import convert, plan
from k2cli.quantization.convert import quantize
from k2cli.rank import loader
from k2cli.sharding.recipe import parse_recipe
from k2cli.sharding.stored_weights import FileReads, _reads
from k2cli.sharding.tensor import StandInGroup
from tests.quantization import originals
from tests.support.rank_pool import assignments


@pytest.fixture
def opened(tmp_path: Path) -> dict[str, mx.array]:
    path = str(tmp_path / "some.safetensors")
    mx.save_safetensors(path, {name: mx.full((64, 64), n) for n, name in enumerate("abcd")})
    found = mx.load(path)
    assert isinstance(found, dict)
    return found


def test_what_an_array_is_made_of_is_read_and_no_more(opened: dict[str, mx.array]) -> None:
    reads = FileReads(opened.values())
    stacked = mx.stack([opened["a"], opened["b"] * 2])
    split = mx.split(opened["c"].astype(mx.float16), 2)
    assert reads.read_for(stacked) == 2
    assert [name for name in opened if _reads(opened[name])] == ["c", "d"]
    assert not _reads(stacked)
    assert reads.read_for(split[1]) == 1
    assert reads.read_for(split[0], stacked) == 0
    assert reads.read_for(opened["d"]) == 1
    assert mx.array_equal(stacked[1], mx.full((64, 64), 2)).item()
    assert not any(_reads(each) for each in opened.values())


def test_a_tensor_that_was_read_is_held_by_what_needs_it_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "some.safetensors")
    mx.save_safetensors(path, {"a": mx.zeros((1024, 1024))})
    before = mx.get_active_memory()
    found: Any = mx.load(path)
    reads, value = FileReads(found.values()), found.pop("a")[:1] + 1
    reads.read_for(value)
    assert mx.get_active_memory() >= before + 2**22
    mx.eval(value)
    assert mx.get_active_memory() < before + 2**22


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Imitate Metal: no evaluation of what a GPU computes may wait for a file."""
    computed: list[int] = []
    evaluate = mx.eval

    def checked(*arrays: Any) -> None:
        flat = [each for group in arrays for each in (group if _is_many(group) else [group])]
        for array in flat:
            if _reads(array) and not _is_read(array):
                raise RuntimeError("a command buffer was committed that waits for a file")
            computed.append(array.nbytes)
        evaluate(*arrays)

    for module in (loader, plan):
        monkeypatch.setattr(module, "gpu_waits_for_reads", lambda: True)
    monkeypatch.setattr(mx, "eval", checked)
    return computed


def _is_many(value: object) -> bool:
    return isinstance(value, Sequence)


def _is_read(array: mx.array) -> bool:
    """True if an array is what a file has, with nothing to compute."""
    text = io.StringIO()
    mx.export_to_dot(text, array)
    return text.getvalue().count("label =") == 1


@pytest.mark.parametrize(("strategy", "size"), [("single", 1), ("tensor", 2)])
def test_a_rank_reads_before_it_computes(
    tmp_path: Path, waits: list[int], strategy: str, size: int
) -> None:
    source = originals.kimi(tmp_path / "original", fp8=True)
    for assignment in assignments(source, strategy, size, dtype="checkpoint"):
        group = StandInGroup(assignment.rank, size) if size > 1 else None
        part = loader.load_part(assignment, group, lambda done, total: None)
        assert part.weights_bytes
    assert waits


def test_quantizing_reads_before_it_computes(tmp_path: Path, waits: list[int]) -> None:
    source = originals.kimi(tmp_path / "original", fp8=True)
    *_, result = quantize(source, tmp_path / "made", parse_recipe("4bit"))
    assert isinstance(result, convert.QuantizationResult)
    assert waits
