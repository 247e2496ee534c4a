"""Stand-in for ``mx.fast.cuda_kernel`` that compiles a kernel's text with g++ and runs it here.

It is called as MLX's is, and starts the same grid with the same arguments (``custom_kernel.cpp``).
No memory follows an input, so that reading past its end ends the process; what lies before it, and
outputs that no thread writes, is not a number.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

PRESENT = sys.platform == "linux" and shutil.which("g++") is not None
_HEADER = Path(__file__).with_name("cuda_on_cpu.h")
_PAGE = mmap.PAGESIZE
_ALIGNMENT = 16
"""Of what the kernels load at once; a GPU's buffers are aligned to more."""
_MOST_DIMENSIONS = 8
_MOST_BLOCKS, _MOST_BLOCKS_DOWN = 2**31 - 1, 65_535
_MOST_THREADS = 1024
_TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.uint32: "uint32_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
}
_UNSIGNED: dict[int, mx.Dtype] = {2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def cuda_kernel(
    *,
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str,
    ensure_row_contiguous: bool,
) -> Any:
    """Make a kernel; see ``mx.fast.cuda_kernel``."""

    def launch(
        *,
        inputs: Sequence[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        placed = [
            _Placed(mx.contiguous(each) if ensure_row_contiguous else each) for each in inputs
        ]
        empty = [
            mx.full(shape, float("nan") if mx.issubdtype(dtype, mx.floating) else 2**31 - 1, dtype)
            for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
        ]
        outputs = [_Placed(each) for each in empty]
        # Type and name of each argument, and where its value is.
        arguments: list[tuple[str, str, Any]] = []
        for its_name, of in zip(input_names, placed, strict=True):
            arguments.append((f"const {_TYPES[of.dtype]}*", its_name, of.address))
            if f"{its_name}_shape" in source:
                sizes: Any = (ctypes.c_int32 * _MOST_DIMENSIONS)(*of.shape)
                arguments.append(("Shape", f"{its_name}_shape", sizes))
            if f"{its_name}_strides" in source:
                sizes = (ctypes.c_int64 * _MOST_DIMENSIONS)(*of.strides)
                arguments.append(("Strides", f"{its_name}_strides", sizes))
        for its_name, of in zip(output_names, outputs, strict=True):
            arguments.append((f"{_TYPES[of.dtype]}*", its_name, of.address))
        across, down = -(-grid[0] // threadgroup[0]), grid[1]
        assert (grid[2], *threadgroup[1:]) == (1, 1, 1), "blocks of one dimension, in two"
        assert across in range(1, _MOST_BLOCKS + 1), f"{name}: a grid of {grid}"
        assert down in range(1, _MOST_BLOCKS_DOWN + 1), f"{name}: a grid of {grid}"
        assert threadgroup[0] in range(1, min(_MOST_THREADS, grid[0]) + 1), f"{name}: {threadgroup}"
        text = _program(header, source, tuple((kind, each) for kind, each, _ in arguments))
        values = [ctypes.addressof(v) if not isinstance(v, int) else v for _, _, v in arguments]
        pointers = (ctypes.c_void_p * len(values))(*values)
        _compiled(text).launch(across, down, threadgroup[0], pointers)
        return [of.content() for of in outputs]

    return launch


class _Placed:
    """A copy of an array, with its strides, at whose end no memory follows."""

    def __init__(self, value: mx.array) -> None:
        mx.eval(value)
        self.dtype, self.shape = value.dtype, value.shape
        own = _as_numpy(value)
        size = own.itemsize
        self.strides = [each // size for each in own.strides]
        last = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        misplaced = (_address(own) - _buffers_address()) % _ALIGNMENT
        bytes_held = -(-(misplaced + (last + 1) * size) // _ALIGNMENT) * _ALIGNMENT
        length = -(-bytes_held // _PAGE) * _PAGE
        self._memory = mmap.mmap(-1, length + _PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        _protect(first + length)
        offset = length - bytes_held + misplaced
        self.address = first + offset
        np.frombuffer(self._memory, np.uint8, length)[:] = 0xFF
        flat = np.frombuffer(self._memory, own.dtype, last + 1, offset)
        self._view = np.lib.stride_tricks.as_strided(flat, own.shape, own.strides)
        self._view[...] = own

    def content(self) -> mx.array:
        return mx.array(np.ascontiguousarray(self._view)).view(self.dtype)


def _as_numpy(value: mx.array) -> Any:
    """Return the memory of an evaluated array, with its strides, as unsigned integers."""
    return np.asarray(memoryview(value.view(_UNSIGNED[value.dtype.size])))  # type: ignore[arg-type]


def _address(value: Any) -> int:
    address: int = value.__array_interface__["data"][0]
    return address


@functools.cache
def _buffers_address() -> int:
    """Return where MLX's buffers on a CPU begin, which is behind their size."""
    return _address(_as_numpy(mx.contiguous(mx.zeros((4, 4))))) % _ALIGNMENT


def _protect(address: int) -> None:
    """Let the page at an address be neither read nor written."""
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(_PAGE), 0):
        raise OSError("mprotect failed")


def _program(header: str, source: str, arguments: tuple[tuple[str, str], ...]) -> str:
    """Return C++ text: a kernel, and ``launch``, which starts it with values of its arguments."""
    values = ", ".join(
        f"static_cast<{kind}>(const_cast<void*>(a[{place}]))"
        if kind.endswith("*")
        else f"*static_cast<const {kind}*>(a[{place}])"
        for place, (kind, _) in enumerate(arguments)
    )
    signature = ", ".join(f"{kind} {name}" for kind, name in arguments)
    return (
        f'#include "{_HEADER.name}"\n{_without_assembly(header)}\n'
        f"static void kernel({signature}) {{\n{source}\n}}\n"
        "static void call(const void* const* a) {\n"
        f"kernel({values});\n}}\n"
        'extern "C" void launch(int across, int down, int size, const void* const* arguments) {\n'
        "run_grid(call, across, down, size, arguments);\n}\n"
    )


def _without_assembly(text: str) -> str:
    """Replace the instructions that the kernels write as assembly."""

    def replaced(match: re.Match[str]) -> str:
        if "ld.global.nc.L1::no_allocate.v4.u32" in match[0]:
            return "words = load_16_bytes(from);"
        (kind,) = set(re.findall(r"m16n8k16\.row\.col\.f32\.(f16|bf16)\.\1\.f32", match[0]))
        kinds = {"f16": "__half", "bf16": "__nv_bfloat16"}
        return f"multiply_16_8_16<{kinds[kind]}>(sum, a, b0, b1);"

    return re.sub(r"asm volatile\(.*?\);", replaced, text, flags=re.DOTALL)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder for compiled text, with the header, which takes longest, compiled once."""
    folder: Any = tempfile.TemporaryDirectory(prefix="k2-cuda-on-cpu-")
    header = Path(shutil.copy(_HEADER, folder.name))
    _compile("-x", "c++-header", "-o", f"{header}.gch", str(header))
    return folder  # type: ignore[no-any-return]


@functools.cache
def _compiled(text: str) -> Any:
    place = Path(_folder().name) / hashlib.sha256(text.encode()).hexdigest()[:16]
    source, library = place.with_suffix(".cpp"), place.with_suffix(".so")
    source.write_text(text)
    _compile("-shared", "-o", str(library), str(source))
    return ctypes.CDLL(str(library))


def _compile(*arguments: str) -> None:
    command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"[custom_kernel] {ended.stderr}")
