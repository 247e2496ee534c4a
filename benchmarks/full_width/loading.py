"""Load a checkpoint on one rank in one of several ways, and print the rate as JSON.

    python -m benchmarks.full_width.loading mlx|k2|k2-fresh|k2-pinned MODEL

``mlx`` is MLX's own loader; ``k2`` is k2's; ``k2-fresh`` the same without the reuse of host memory;
``k2-pinned`` also registers that memory with CUDA, so that the GPU copies from it directly.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx

from k2cli.models.checkpoint import read_checkpoint
from k2cli.rank import loader
from k2cli.rank.host_buffers import reused_host_memory
from k2cli.rank.tensor_reader import TensorReader
from tests.support.rank_pool import assignments


def _by_mlx(model: Path) -> tuple[int, float]:
    began = time.perf_counter()
    arrays: dict[str, mx.array] = {}
    for file in sorted({tensor.file for tensor in read_checkpoint(model).tensors.values()}):
        opened = mx.load(str(file))
        assert isinstance(opened, dict)
        arrays.update(opened)
    mx.eval(list(arrays.values()))
    seconds = time.perf_counter() - began
    return sum(array.nbytes for array in arrays.values()), seconds


def _by_k2(model: Path) -> tuple[int, float]:
    (part,) = assignments(
        model,
        "single",
        1,
        dtype="checkpoint",
        context_length=4096,
        prefill_chunk_tokens=512,
    )
    began = time.perf_counter()
    loaded = loader.load_part(part, None, lambda done, total: None)
    return loaded.bytes_read, time.perf_counter() - began


class _Pinned:
    """Registers each block of host memory with CUDA when it is first filled."""

    def __init__(self) -> None:
        self._cuda: Any = ctypes.CDLL("libcudart.so.13")
        self._known: dict[int, int] = {}
        self._fill = TensorReader._fill

    def install(self) -> None:
        """Replace the reader's way of filling a block."""
        pinned = self

        def fill(reader: TensorReader, target: memoryview, *rest: Any) -> None:
            pinned.register(target)
            pinned._fill(reader, target, *rest)

        TensorReader._fill = fill  # type: ignore[method-assign]

    def register(self, target: memoryview) -> None:
        """Pin a block, unless one that is as large at this address is pinned."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(target))
        if self._known.get(address, 0) >= target.nbytes:
            return
        if address in self._known:
            self._cuda.cudaHostUnregister(ctypes.c_void_p(address))
        status = self._cuda.cudaHostRegister(
            ctypes.c_void_p(address), ctypes.c_size_t(target.nbytes), 0
        )
        if status == 0:
            self._known[address] = target.nbytes

    def forget(self) -> None:
        """Unpin everything."""
        for address in self._known:
            self._cuda.cudaHostUnregister(ctypes.c_void_p(address))


def main() -> None:
    """Load as the command line says."""
    way, model = sys.argv[1], Path(sys.argv[2])
    mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))  # the device starts before the clock
    pinned = None
    if way == "k2-fresh":
        loader.copies_from_host = lambda: False
    elif way == "k2-pinned":
        pinned = _Pinned()
        pinned.install()
        # The blocks stay pinned, so they must not go back to the system before the end.
        loader.reused_host_memory = _kept if loader.copies_from_host() else nullcontext
    count, seconds = _by_mlx(model) if way == "mlx" else _by_k2(model)
    if pinned is not None:
        pinned.forget()
    result = {"bytes": count, "seconds": seconds, "bytes_per_second": count / seconds}
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)


_never_left: list[Any] = []


def _kept() -> Any:
    _never_left.append(reused_host_memory())
    _never_left[-1].__enter__()
    return nullcontext()


if __name__ == "__main__":
    main()
