"""Writing of data that are longer than a system writes at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2cli import files
from k2cli.models.safetensors_writer import ShardWriter, TensorSpec
from tests.support.as_macos import MOST_BYTES_OF_A_WRITE, ignore_case, limit_writes


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


def test_paths_in_another_case_may_be_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, link = tmp_path / "model", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    assert files.is_same_path(folder, link)
    assert not files.is_same_path(folder, tmp_path / "MODEL")
    assert files.is_same_path(tmp_path / "none", str(tmp_path / "none"))
    ignore_case(monkeypatch)
    assert files.is_same_path(folder, tmp_path / "MODEL")
    assert not files.is_same_path(folder, tmp_path / "other")
