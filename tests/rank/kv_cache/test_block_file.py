"""Files of the prefix cache on disk: what is damaged, cut short or half written is never used."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2cli.errors import K2Error
from k2cli.prefix_folder import BLOCK_TOKENS
from k2cli.rank.kv_cache.block_file import from_host, read_block, to_host, write_block
from k2cli.rank.kv_cache.segments import Segment


def _layers() -> list[Segment]:
    """Two layers: one as of K2, one as of deepseek_v32, whose second values have no width."""
    shape = (1, 1, BLOCK_TOKENS, 4)
    keys = mx.random.normal(shape).astype(mx.bfloat16)
    return [
        [(keys, mx.random.normal(shape).astype(mx.float16))],
        [(keys + 1, mx.random.normal(shape)), (keys, mx.zeros((1, 1, BLOCK_TOKENS, 0)))],
    ]


def _place(folder: Path) -> Path:
    return folder / "store-0" / "scope" / "block"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = _place(tmp_path_factory.mktemp("written"))
    path.parent.parent.mkdir()
    write_block(path, to_host(_layers()))
    return path.read_bytes()


def test_arrays_come_back_bit_by_bit_in_a_private_file(tmp_path: Path) -> None:
    path, layers = tmp_path / "store" / "scope" / "block", _layers()
    path.parent.parent.mkdir()
    assert write_block(path, to_host(layers))[0] == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    found = from_host(read_block(path, 2))
    for segment, expected in zip(found, layers, strict=True):
        for arrays, known in zip(segment, expected, strict=True):
            for one, other in zip(arrays, known, strict=True):
                assert (one.dtype, one.shape) == (other.dtype, other.shape)
                assert mx.array_equal(one, other)
    other = mx.load(str(path), format="safetensors")
    assert isinstance(other, dict)
    assert mx.array_equal(other["0.0.0"], layers[0][0][0])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_anywhere_is_found(
    written: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A bit that was changed, or an end that is missing. Padding of the header is no data."""
    size = data.draw(st.integers(0, len(written)), "size")
    damaged = bytearray(written[:size])
    if size == len(written) or data.draw(st.booleans(), "early"):
        # Most bytes are data; the header is what a reader could stumble over.
        last = min(size, 800) if data.draw(st.booleans(), "header") else size
        if last:
            damaged[data.draw(st.integers(0, last - 1), "at")] ^= 1 << data.draw(st.integers(0, 7))
    path = _place(tmp_path_factory.mktemp("damaged"))
    path.parent.mkdir(parents=True)
    path.write_bytes(damaged)
    try:
        found = read_block(path, 2)
    except (K2Error, msgspec.DecodeError):
        return
    path.write_bytes(written)
    assert found == read_block(path, 2), "damage was taken for data"


def test_other_layers_links_and_absent_files_are_refused(written: bytes, tmp_path: Path) -> None:
    path = _place(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(written)
    with pytest.raises(K2Error, match="other layers"):
        read_block(path, 3)
    (tmp_path / "link").symlink_to(path)
    for name in ("link", "absent"):
        with pytest.raises(OSError, match=name):
            read_block(tmp_path / name, 2)


@pytest.mark.parametrize("place", ["store-1/scope/block", "store-0/other/block", "store-0/scope/b"])
def test_a_block_in_the_place_of_another_is_refused(
    written: bytes, tmp_path: Path, place: str
) -> None:
    """Of another rank, key or text: whole, and yet wrong there."""
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_bytes(written)
    with pytest.raises(K2Error, match="damaged"):
        read_block(path, 2)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "store" / "scope" / "block"
    path.parent.parent.mkdir()
    with pytest.raises(OSError, match="No space"):
        write_block(path, to_host(_layers()))
    assert list(path.parent.iterdir()) == []


_KILLED = """
import os, signal, sys
from pathlib import Path
from k2cli.rank.kv_cache import block_file
def killed(descriptor):
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = killed
data = bytes(4 * 256)
array = block_file.HostArray((0, 0, 0), "F32", (256, 1), data)
block_file.write_block(Path(sys.argv[1]), [array])
"""


def test_a_kill_while_writing_leaves_no_block(tmp_path: Path) -> None:
    path = tmp_path / "store" / "scope" / "block"
    path.parent.parent.mkdir()
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = path.parent.iterdir()
    assert left.name.startswith(".part-")
