"""One listening address for MLX's NCCL, which would listen on all addresses of the machine.

To hand out NCCL's unique id, MLX's rank 0 binds a port of every address (``INADDR_ANY`` in
``mlx/distributed/nccl/nccl.cpp``) and offers no setting for it. Whoever connects first gets the id
and the place of a rank. Therefore the entry for ``bind`` in libmlx's table of imported functions is
replaced by a function that puts the wanted address in place of "all", and calls the real ``bind``.
Only this process is changed. If the entry is not found, k2 does not start NCCL.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

from k2cli.errors import ClusterError

_LIBRARY = "libmlx.so"
_SYMBOL = b"bind"
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_RELOCATIONS, _DYNAMIC_SYMBOLS = 4, 11  # SHT_RELA, SHT_DYNSYM
_SECTION = struct.Struct("<IIQQQQIIQQ")
_ADDRESS = struct.Struct("=H2s4s")  # family, port and address of a sockaddr_in

_installed: list[Any] = []
"""Keeps the replacing function alive as long as the process."""


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


def bind_only_to(host: str) -> None:
    """Let MLX listen on one IPv4 address of this machine where it would listen on all.

    Raises:
        ClusterError: if MLX on this system cannot be made to, or the address is not IPv4.
    """
    try:
        wanted = socket.inet_aton(host)
        base, path = _loaded_library()
        slots = [base + offset for offset in imported_slots(path, _SYMBOL)]
    except (OSError, struct.error, StopIteration) as error:
        raise ClusterError(_refusal(host), "--backend ring") from error
    if not slots or sys.platform != "linux":
        raise ClusterError(_refusal(host), "--backend ring")
    replacement = _bind_instead(wanted)
    _installed.append(replacement)
    pointer = ctypes.cast(replacement, ctypes.c_void_p).value
    assert pointer is not None
    for slot in slots:
        _write_pointer(slot, pointer)


def _refusal(host: str) -> str:
    return (
        f"NCCL cannot be made to listen on {host} alone: the import of 'bind' was not found in "
        f"{_LIBRARY}, and MLX would listen on every address of this machine"
    )


def _bind_instead(wanted: bytes) -> Any:
    """Make a C function like ``bind`` that takes ``wanted`` for "all addresses"."""
    libc = ctypes.CDLL(None, use_errno=True)
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32, use_errno=True
    )

    def bind(descriptor: int, address: int, length: int) -> int:
        given = ctypes.string_at(address, length)
        family, port, host = _ADDRESS.unpack_from(given)
        if family == socket.AF_INET and host == bytes(4):
            given = _ADDRESS.pack(family, port, wanted) + given[_ADDRESS.size :]
        result: int = libc.bind(descriptor, given, length)
        return result

    return prototype(bind)


def _loaded_library() -> tuple[int, Path]:
    """Find MLX's library in this process: its base address and its file."""
    import mlx.core  # noqa: F401  (loads it)

    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        line = next(line.rstrip() for line in maps if line.rstrip().endswith(f"/{_LIBRARY}"))
    fields = line.split(maxsplit=5)
    return int(fields[0].partition("-")[0], 16) - int(fields[2], 16), Path(fields[5])


def imported_slots(library: Path, name: bytes) -> list[int]:
    """List the offsets at which a 64-bit ELF library keeps the address of an imported function."""
    import numpy as np

    with library.open("rb") as file:
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01":
            return []
        (table,) = struct.unpack_from("<Q", header, 40)
        size, count = struct.unpack_from("<HH", header, 58)

        def content(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        sections = [
            _Section(*_SECTION.unpack_from(content(table + size * index, size)))
            for index in range(count)
        ]
        dynamic = next(each for each in sections if each.kind == _DYNAMIC_SYMBOLS)
        names = sections[dynamic.link]
        text = content(names.offset, names.size)
        symbols = np.frombuffer(
            content(dynamic.offset, dynamic.size), [("name", "<u4"), ("rest", "V20")]
        )
        wanted = [
            index
            for index in range(len(symbols))
            if text.startswith(name + b"\0", int(symbols["name"][index]))
        ]
        slots: list[int] = []
        for section in sections:
            if section.kind != _RELOCATIONS:
                continue
            entries = np.frombuffer(
                content(section.offset, section.size),
                [("offset", "<u8"), ("kind", "<u4"), ("symbol", "<u4"), ("addend", "<i8")],
            )
            found = entries[np.isin(entries["symbol"], wanted)]
            slots += [int(offset) for offset in found["offset"]]
    return slots


def _write_pointer(slot: int, pointer: int) -> None:
    """Write into the library's table, which the loader has made read-only."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = slot & -mmap.PAGESIZE
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), _READ_WRITE):
        raise ClusterError(
            f"memory of {_LIBRARY} cannot be changed: {os.strerror(ctypes.get_errno())}"
        )
    ctypes.c_void_p.from_address(slot).value = pointer
