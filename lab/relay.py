"""A relay in user space that carries packets between TUN devices, with latency, rate and loss.

Used because not every kernel has ``netem``. Runs beside the hosts, creates one TUN device in each
host's network and forwards by destination address. Reads its settings as lines of JSON from a named
pipe; ``{"stop": true}`` ends it. Imports nothing of k2.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import sys
import time
from dataclasses import dataclass, field

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_PACKET_BYTES = 65536
# The queue of a device is limited, so that a rate limit does not become an endless delay.
_QUEUE_SECONDS = 0.25
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Settings:
    """Condition of the link in each direction."""

    latency_ms: float = 0.0
    rate_mbit: float = 0.0
    loss: float = 0.0
    silent: bool = False
    stop: bool = False


@dataclass(order=True)
class _Packet:
    due: float
    number: int
    data: bytes = field(compare=False)
    out: int = field(compare=False)


def _open_tun(namespace: int, name: str) -> int:
    if _libc.setns(namespace, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI)
    fcntl.ioctl(descriptor, _TUNSETIFF, request)
    return descriptor


class Relay:
    """Forwards packets at the time when they are due."""

    def __init__(self, devices: dict[bytes, int]) -> None:
        self._out = devices
        self._settings = Settings()
        self._waiting: list[_Packet] = []
        self._free_at = dict.fromkeys(devices.values(), 0.0)
        self._count = 0

    def run(self, orders: int) -> None:
        """Forward packets until the stop order."""
        sources = [orders, *self._out.values()]
        while not self._settings.stop:
            timeout = None
            if self._waiting:
                timeout = max(0.0, self._waiting[0].due - time.monotonic())
            ready, _, _ = select.select(sources, [], [], timeout)
            for source in ready:
                if source == orders:
                    self._obey(os.read(orders, 65536))
                else:
                    self._receive(source)
            self._send_due()

    def _obey(self, lines: bytes) -> None:
        for line in lines.splitlines():
            self._settings = Settings(**json.loads(line))

    def _receive(self, source: int) -> None:
        for _ in range(64):
            try:
                data = os.read(source, _PACKET_BYTES)
            except (BlockingIOError, OSError):  # nothing more, or the device is down
                return
            out = self._out.get(data[16:20])
            if out is not None and data[0] >> 4 == 4:
                self._forward(data, out)

    def _forward(self, data: bytes, out: int) -> None:
        settings = self._settings
        if settings.silent or (settings.loss and random.random() < settings.loss):
            return
        due = time.monotonic()
        if settings.rate_mbit:
            begin = max(due, self._free_at[out])
            if begin - due > _QUEUE_SECONDS:
                return
            due = self._free_at[out] = begin + len(data) * 8 / (settings.rate_mbit * 1e6)
        due += settings.latency_ms / 1000
        self._count += 1
        heapq.heappush(self._waiting, _Packet(due, self._count, data, out))

    def _send_due(self) -> None:
        now = time.monotonic()
        while self._waiting and self._waiting[0].due <= now:
            packet = heapq.heappop(self._waiting)
            with contextlib.suppress(OSError):  # the device is down: lost, as on a cut cable
                os.write(packet.out, packet.data)


def main() -> None:
    """Run ``relay.py PIPE DEVICE READY_FD ADDRESS=NAMESPACE_FD ...``."""
    pipe, device, ready = sys.argv[1], sys.argv[2], int(sys.argv[3])
    devices = {}
    for part in sys.argv[4:]:
        address, _, namespace = part.partition("=")
        devices[socket.inet_aton(address)] = _open_tun(int(namespace), device)
    orders = os.open(pipe, os.O_RDWR)
    os.write(ready, b"ready\n")
    os.close(ready)
    Relay(devices).run(orders)


if __name__ == "__main__":
    main()
