"""Run a program that can reach one port of the loopback and nothing else.

    unshare --net python enclosed.py SOCKET PORT -- PROGRAM ARGUMENTS...

In the empty network namespace that ``unshare`` made, this starts the loopback interface and listens
on PORT. Each connection is carried to the UNIX socket, which crosses network namespaces.
It imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import subprocess
import sys
import threading

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


def start_loopback() -> None:
    """Bring up the interface ``lo`` of this network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(control, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def carry(source: socket.socket, target: socket.socket) -> None:
    """Copy bytes until one side ends, then end the other."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def serve(listener: socket.socket, path: str) -> None:
    """Carry each connection of a listener to a UNIX socket."""
    while True:
        inner, _ = listener.accept()
        outer = socket.socket(socket.AF_UNIX)
        outer.connect(path)
        for pair in ((inner, outer), (outer, inner)):
            threading.Thread(target=carry, args=pair, daemon=True).start()


def main() -> int:
    path, port = sys.argv[1], int(sys.argv[2])
    start_loopback()
    listener = socket.create_server(("127.0.0.1", port), backlog=64)
    threading.Thread(target=serve, args=(listener, path), daemon=True).start()
    return subprocess.run(sys.argv[4:], stdin=subprocess.DEVNULL, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
