"""Room on large disks of macOS, which ``statvfs`` counts in 32 bits."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from k2cli.agent.software import volume_of
from k2cli.guard import spawn
from k2cli.models.sources import hub_download
from k2cli.quantization import convert
from k2cli.system.disk import DiskUse, disk_use
from tests.support.as_macos import on_macos

# A share of a NAS with blocks of 1 KiB: 14 TiB with 4 TiB and 100 MB free, of which the 32 bits of
# ``statvfs`` leave 100 MB (giampaolo/psutil#2174).
BLOCK = 1024
BLOCKS = 14 * 2**40 // BLOCK
FREE = (4 * 2**40 + 100_000_000) // BLOCK


def test_blocks_are_counted_in_64_bits(nas: Path) -> None:
    wrapped = BLOCK * (FREE % 2**32)
    with on_macos():
        assert shutil.disk_usage(nas).free == wrapped < 200_000_000
        assert disk_use(nas) == DiskUse(14 * 2**40, BLOCK * FREE)
        volume = volume_of(nas)
        assert volume is not None
        assert (volume.free_bytes, volume.total_bytes) == (BLOCK * FREE, 14 * 2**40)
        convert._check_disk(nas / "quantized", 600 * 10**9)
        hub_download.check_free_space(nas, 600 * 10**9, "kimi")
        assert spawn._has_room(nas)


def test_what_cannot_be_told_is_an_error_as_elsewhere(nas: Path, tmp_path: Path) -> None:
    with on_macos(), pytest.raises(FileNotFoundError):
        disk_use(tmp_path / "gone")
    assert disk_use(tmp_path) == DiskUse(BLOCK * (BLOCKS % 2**32), BLOCK * (FREE % 2**32))


@pytest.fixture
def nas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder whose system answers ``statvfs`` and ``statfs`` as macOS does."""

    def statvfs(path: object) -> SimpleNamespace:
        assert isinstance(path, str | Path)
        os.stat(path)
        count, free = BLOCKS % 2**32, FREE % 2**32
        return SimpleNamespace(
            f_bsize=2**20, f_frsize=BLOCK, f_blocks=count, f_bfree=free, f_bavail=free
        )

    def statfs(path: bytes, found: ctypes.Array[ctypes.c_char]) -> int:
        if not os.path.exists(path):
            return -1
        # f_bsize, f_iosize, f_blocks, f_bfree, f_bavail, f_files, f_ffree
        data = struct.pack("=Ii5Q", BLOCK, 2**20, BLOCKS, FREE + 5, FREE, 2**32 - 1, 2**31)
        ctypes.memmove(found, data, len(data))
        return 0

    def library(name: str) -> SimpleNamespace:
        assert name == "/usr/lib/libSystem.B.dylib"
        return SimpleNamespace(statfs=statfs)

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr(ctypes, "CDLL", library)
    return tmp_path
