"""The first process of a host: it makes the mounts, reports that it is ready, and reaps.

Runs as process 1 of a new PID namespace, started by ``lab.namespaces`` with a file of
instructions. It imports nothing of k2, so that it starts in milliseconds. When it ends, for any
reason, the kernel ends every process of the host. It exits when its owner's pipe is closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
from typing import Any

# mount(2)
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    encoded = [part.encode() for part in (source, target, kind)]
    if _libc.mount(*encoded, ctypes.c_ulong(flags), data.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} on {target}: {os.strerror(number)}")


def _make_target(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()


def _make_mounts(orders: dict[str, Any]) -> None:
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    # Folders to keep that lie below a new mount are held open, and mounted again on top of it.
    kept = {path: os.open(path, os.O_PATH) for path in orders["keep"]}
    for target, options in orders["tmpfs"].items():
        _mount("tmpfs", target, "tmpfs", 0, options)
    for path, descriptor in kept.items():
        source = f"/proc/self/fd/{descriptor}"
        _make_target(source, path)
        _mount(source, path, "", _MS_BIND | _MS_REC)
        os.close(descriptor)
    for target in orders["folders"]:
        os.makedirs(target, exist_ok=True)
    for source, target in orders["bind"]:
        _make_target(source, target)
        _mount(source, target, "", _MS_BIND)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _serve(owner: int | None) -> None:
    """Reap children until the owner is gone, or for ever without an owner."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    watched = [read_end] if owner is None else [read_end, owner]
    while True:
        _reap()
        ready, _, _ = select.select(watched, [], [])
        if owner in ready:
            return  # never written to: readable means closed
        with contextlib.suppress(BlockingIOError):
            os.read(read_end, 4096)


def main() -> None:
    """Run ``init.py ORDERS.json READY_FD [OWNER_FD]``."""
    with open(sys.argv[1]) as file:
        orders = json.load(file)
    ready = int(sys.argv[2])
    owner = int(sys.argv[3]) if len(sys.argv) > 3 else None
    os.chdir("/")
    _make_mounts(orders)
    socket.sethostname(orders["hostname"])
    os.write(ready, b"ready\n")
    os.close(ready)
    _serve(owner)


if __name__ == "__main__":
    main()
