"""What macOS does where it differs from Linux, for tests that run on Linux."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

MOST_BYTES_OF_A_WRITE = 2**31 - 1


@contextmanager
def on_macos() -> Iterator[None]:
    """Let code in this process see ``sys.platform`` of macOS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        yield


def limit_writes(patch: pytest.MonkeyPatch, most_bytes: int) -> None:
    """Let ``os.pwrite`` refuse long data, as macOS does from 2 GiB on."""
    true = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if memoryview(data).nbytes > most_bytes:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return true(descriptor, data, offset)

    patch.setattr(os, "pwrite", pwrite)


def first_accepts(patch: pytest.MonkeyPatch, *outcomes: BaseException | None) -> None:
    """Let the first connections of this process be gone when they are accepted.

    Args:
        outcomes: one for each: an error that ``accept`` raises, or None for a connection without
            an address.
    """
    true, left = socket.socket.accept, list(outcomes)

    def accept(listener: socket.socket) -> tuple[socket.socket, Any]:
        connection, address = true(listener)
        if not left:
            return connection, address
        error = left.pop(0)
        if error is not None:
            connection.close()
            raise error
        return connection, None

    patch.setattr(socket.socket, "accept", accept)


def break_command_lines(patch: pytest.MonkeyPatch) -> None:
    """Let psutil fail for processes of others as its versions 7.2.1 and 7.2.2 do on macOS."""
    true = psutil.Process.cmdline
    first, second = psutil.Process().ppid(), 1

    def cmdline(process: psutil.Process) -> list[str]:
        if process.pid == first:
            raise OSError(0, "Undefined error: 0 (originated from sysctl(KERN_PROCARGS2))")
        if process.pid == second:
            raise SystemError(
                "<built-in function proc_cmdline> returned a result with an exception"
            )
        return true(process)

    patch.setattr(psutil.Process, "cmdline", cmdline)


def make_program(folder: Path, name: str, text: str) -> Path:
    """Write a program in the shell's language; return its path."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def ignore_case(patch: pytest.MonkeyPatch) -> None:
    """Let the file system take two paths that differ in case for the same."""

    def samefile(one: Any, other: Any) -> bool:
        return os.path.realpath(one).casefold() == os.path.realpath(other).casefold()

    patch.setattr(os.path, "samefile", samefile)
