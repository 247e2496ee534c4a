"""Make full-width layers of K2 with random weights, by many processes.

    python -m benchmarks.full_width.checkpoint FOLDER [--layers 10] [--fewer 6] [--processes 28]
    python -m benchmarks.full_width.checkpoint FOLDER --headers-only
    python -m benchmarks.full_width.checkpoint FOLDER --small

Ten layers are 88 GB and take about 20 s with 28 processes into memory (``/dev/shm``, which may have
to be made larger: ``mount -o remount,size=210G /dev/shm``). The folders made are ``FOLDER/full``,
``FOLDER/few`` with fewer layers, and both as ``deepseek_v3`` for mlx-lm, ``peer`` and
``few-peer``; all but the first are links. With ``--headers-only`` there is no data: ``k2
plan-memory FOLDER/full`` needs none.

Weights are drawn in packed form, like those of the toy (``lab/toy_k2``). The head's rows are zero
but for the 512 words, so that the best token is always a word and no answer ends early.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.full_width.tensors import (
    FULL_WIDTH,
    SMALL,
    Layout,
    Stored,
    make_view,
    write_headers,
)
from k2cli.models.safetensors_writer import TensorSpec
from lab.toy_k2.checkpoint import Matrix, ToyShape
from lab.toy_k2.vocabulary import RANK_COUNT

FIRST_WORD = 256
SEED = 7
_PART_WORDS = 2**27
"""64-bit words of a weight that one job draws: 1 GiB."""
_DRAWN_WORDS = 2**23
_DRAWN_GROUPS = 2**22
HIGHEST_CODE = 15


@dataclass(frozen=True, slots=True)
class _Job:
    """Data to draw and write: 64-bit words ``[first, past_last)`` of a weight, or a whole array."""

    path: Path
    stored: Stored
    group_size: int
    words: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """The number of elements, by which long jobs start first."""
        if self.words is not None:
            return self.words[1] - self.words[0]
        return math.prod(self.stored.part.shape) // 64


def fill(folder: Path, layout: Layout, shape: ToyShape, processes: int) -> None:
    """Draw and write the data of a checkpoint whose headers are written."""
    jobs = [job for stored in layout.stored for job in _jobs(folder, stored, shape)]
    jobs.sort(key=lambda job: -job.size)
    with Pool(processes) as pool:
        for _ in pool.imap_unordered(_work, jobs):
            pass


def _jobs(folder: Path, stored: Stored, shape: ToyShape) -> Iterator[_Job]:
    whole = _Job(folder / stored.file, stored, shape.group_size)
    yield whole
    if isinstance(stored.part, Matrix):
        assert shape.bits == 4
        words = math.prod(stored.part.shape) * 4 // 64
        for first in range(0, words, _PART_WORDS):
            yield replace(whole, words=(first, min(first + _PART_WORDS, words)))


def _work(job: _Job) -> None:
    descriptor = os.open(job.path, os.O_WRONLY)
    try:
        for offset, array in _data(job):
            _write(descriptor, offset, array)
    finally:
        os.close(descriptor)


def _write(descriptor: int, offset: int, array: NDArray[Any]) -> None:
    left = memoryview(np.ascontiguousarray(array)).cast("B")
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done


def _data(job: _Job) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield arrays and the places in the file that they belong to."""
    part, offsets = job.stored.part, job.stored.offsets
    if job.words is not None:
        random = _random(part.name, job.words[0])
        for first in range(*job.words, _DRAWN_WORDS):
            count = min(_DRAWN_WORDS, job.words[1] - first)
            yield offsets[0] + 8 * first, random.integers(0, 2**64, count, np.uint64)
    elif isinstance(part, Matrix):
        yield from _scales(part, offsets, job.group_size)
    else:
        yield offsets[0], _plain(part)


def _random(name: str, *more: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([SEED, zlib.crc32(name.encode()), *more]))


def _scales(
    part: Matrix, offsets: tuple[int, ...], group_size: int
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield scales, and biases that centre the codes 0 to 15, as in the toy."""
    random = _random(part.name)
    per_row = part.shape[-1] // group_size
    groups = math.prod(part.shape) // group_size
    spread = part.gain / math.sqrt(part.shape[-1])
    unit = spread / math.sqrt(HIGHEST_CODE * (HIGHEST_CODE + 2) / 12)
    for first in range(0, groups, _DRAWN_GROUPS):
        count = min(_DRAWN_GROUPS, groups - first)
        scales = np.float32(unit) + _uniform(random, count, unit / 4)
        if part.name == "lm_head":
            row = np.arange(first, first + count) // per_row
            scales[(row < FIRST_WORD) | (row >= RANK_COUNT)] = 0
        rounded = _bfloat16(scales)
        exact = (rounded.astype(np.uint32) << 16).view(np.float32)
        yield offsets[1] + 2 * first, rounded
        yield offsets[2] + 2 * first, _bfloat16(exact * np.float32(-HIGHEST_CODE / 2))


def _plain(part: TensorSpec) -> NDArray[Any]:
    random, count = _random(part.name), math.prod(part.shape)
    if part.name.endswith("gate.weight"):
        return _bfloat16(_uniform(random, count, 2 / math.sqrt(part.shape[-1])))
    spread = _uniform(random, count, 0.1)
    return spread if part.name.endswith("bias") else _bfloat16(np.float32(1) + spread)


def _uniform(random: np.random.Generator, count: int, deviation: float) -> NDArray[Any]:
    unit = random.random(count, np.float32) - np.float32(0.5)
    values: NDArray[Any] = unit * np.float32(deviation * math.sqrt(12))
    return values


def _bfloat16(values: NDArray[Any]) -> NDArray[Any]:
    bits: NDArray[Any] = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x8000)) >> 16).astype(np.uint16)


def run(arguments: list[str] | None = None) -> int:
    """Make the checkpoint and its views."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder that does not exist")
    parser.add_argument("--layers", type=int, help="number of layers, by default 10")
    parser.add_argument("--fewer", type=int, help="layers of the view 'few', by default 6")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--headers-only", action="store_true", help="write no data")
    parser.add_argument("--small", action="store_true", help="four layers of a toy's width")
    options = parser.parse_args(arguments)
    shape, fewer = (SMALL, 2) if options.small else (FULL_WIDTH, 6)
    shape = replace(shape, layers=options.layers or shape.layers)
    fewer = min(options.fewer or fewer, shape.layers)
    began = time.perf_counter()
    full = options.folder / "full"
    layout = write_headers(full, shape)
    if not options.headers_only:
        fill(full, layout, shape, options.processes)
    make_view(options.folder / "peer", full, shape.layers, "deepseek_v3")
    make_view(options.folder / "few", full, fewer, "kimi_k2")
    make_view(options.folder / "few-peer", full, fewer, "deepseek_v3")
    seconds = time.perf_counter() - began
    sys.stderr.write(
        f"{full}: {shape.layers} layers, {layout.bytes / 1e9:.2f} GB in {seconds:.1f} s\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run())
