"""Writing of data that are longer than a system writes at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2cli import files
from k2cli.models.safetensors_writer import ShardWriter, TensorSpec
from tests.support.as_macos import MOST_BYTES_OF_A_WRITE, limit_writes


def test_a_write_is_short_enough_for_macos() -> None:
    assert files.MOST_WRITTEN_BYTES <= MOST_BYTES_OF_A_WRITE


def test_a_tensor_may_be_longer_than_one_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experts of one layer of K2 in 4 bits are one tensor of 2,818,572,288 bytes."""
    monkeypatch.setattr(files, "MOST_WRITTEN_BYTES", 100)
    limit_writes(monkeypatch, 110)
    data = bytes(range(250))
    with ShardWriter(tmp_path, [TensorSpec("experts", "U8", (250,))]) as writer:
        writer.write("experts", 0, data)
    assert (tmp_path / "model.safetensors").read_bytes().endswith(data)
