"""Checkpoints that are written: large tensors, on systems that refuse large writes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import mlx.core as mx
import pytest

from k2cli import files
from k2cli.models.safetensors_writer import ShardWriter, TensorSpec


def test_a_tensor_is_written_in_parts_that_macos_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if len(data) > 1000:  # as macOS does above 2 GiB
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(descriptor, data, offset)

    monkeypatch.setattr(files, "MOST_WRITTEN_BYTES", 1000)
    monkeypatch.setattr(os, "pwrite", pwrite)
    expected = mx.arange(3000, dtype=mx.int32)
    with ShardWriter(tmp_path, [TensorSpec("a", "I32", (3000,))]) as writer:
        writer.write("a", 0, memoryview(expected))
    found = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(found, dict)
    assert mx.array_equal(found["a"], expected).item()
