"""One rank of the measurement of a link with MLX's own communication.

``cluster.measure`` starts ``python -m k2cli.agent.link SPECIFICATION`` on both nodes. The ranks
join a group of two and time small all-reduces, ping-pong and big messages. Joining holds Python's
global lock until the peer has joined, so SIGALRM ends a process that waits for too long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import msgspec

from k2cli.choices import LinkTransport
from k2cli.files import decode_json
from k2cli.rdma_launches import PREFERRED_SETTINGS, count_launch
from k2cli.stderr import say_on_stderr

WARM_UP = 5
ROUNDS = 50
ROUNDS_SECONDS = 0.5
"""Time limit of all rounds together: a slow link gets fewer than ``ROUNDS``."""

SMALL_BYTES = 8192
"""About the size of the hidden state of one token: 14,336 bytes for K2 in bfloat16."""
_FIRST_BYTES = 2**20
_BIG_BYTES = 2**28
_BIG_SECONDS = 0.3
_BIG_ROUNDS = 2
_SOCKET_SECONDS = 10.0


class Specification(msgspec.Struct, frozen=True):
    """Request for a measurement. ``addresses`` are ``host:port`` by rank.

    ``rdma_devices[i][j]`` is the device through which rank i reaches rank j, for JACCL.
    """

    transport: LinkTransport
    rank: int
    addresses: tuple[str, ...]
    limit_seconds: int
    rdma_devices: tuple[tuple[str | None, ...], ...] = ()


class Figures(msgspec.Struct, frozen=True):
    """Medians in seconds, and bytes per second one way; None if not measured."""

    all_reduce_seconds: float | None
    latency_seconds: float | None
    bytes_per_second: float | None


def measure(specification: Specification) -> Figures:
    """Join the group and measure; returns the figures of this rank."""
    if specification.transport == "tcp":
        return _measure_tcp(specification)
    with tempfile.TemporaryDirectory(prefix="k2-link-") as folder:
        group = _join(specification, folder)
        return _measure_group(group)


def _join(specification: Specification, folder: str) -> Any:
    """Set the variables that MLX reads from its environment, and join the group."""
    if specification.transport == "ring":
        hosts = [[address] for address in specification.addresses]
        _configure(MLX_RANK=str(specification.rank), MLX_HOSTFILE=_file(folder, "hosts", hosts))
    elif specification.transport == "jaccl":
        devices = _file(folder, "devices", specification.rdma_devices)
        for name in PREFERRED_SETTINGS:
            os.environ.pop(name, None)
        _configure(
            MLX_RANK=str(specification.rank),
            MLX_JACCL_COORDINATOR=specification.addresses[0],
            MLX_IBV_DEVICES=devices,
        )
        with contextlib.suppress(OSError):
            count_launch("measurement", os.getpid())
    import mlx.core as mx

    group = mx.distributed.init(strict=True, backend=specification.transport)
    if group.size() != 2:
        raise RuntimeError(f"{specification.transport} made a group of {group.size()}, not 2")
    return group


def _configure(**values: str) -> None:
    os.environ.update(values)


def _file(folder: str, name: str, content: object) -> str:
    path = os.path.join(folder, f"{name}.json")
    with open(path, "wb") as file:
        file.write(msgspec.json.encode(content))
    return path


def _measure_group(group: Any) -> Figures:
    import mlx.core as mx

    stream, rank = mx.cpu, group.rank()
    small = mx.zeros((SMALL_BYTES // 4,), dtype=mx.float32)
    mx.eval(small)

    def reduce() -> None:
        mx.eval(mx.distributed.all_sum(small, group=group, stream=stream))

    def exchange(message: Any, answer: Any) -> None:
        """Send and wait for the answer on rank 0; receive and answer on rank 1."""
        if rank == 0:
            mx.eval(mx.distributed.send(message, 1, group=group, stream=stream))
            mx.eval(mx.distributed.recv_like(answer, 1, group=group, stream=stream))
        else:
            mx.eval(mx.distributed.recv_like(message, 0, group=group, stream=stream))
            mx.eval(mx.distributed.send(answer, 0, group=group, stream=stream))

    def agreed(value: int) -> int:
        """Return rank 0's value on both ranks."""
        mine = mx.array(value if rank == 0 else 0, dtype=mx.int32)
        agreed_on: Any = mx.distributed.all_sum(mine, group=group, stream=stream).item()
        return int(agreed_on)

    token = mx.zeros((1,), dtype=mx.float32)
    all_reduce = _median(reduce, agreed)
    ping = _median(lambda: exchange(token, token), agreed)

    def send_big(count: int) -> float:
        big = mx.zeros((count // 4,), dtype=mx.float32)
        mx.eval(big)
        return _timed(lambda: exchange(big, token))

    rate = _rate(send_big, agreed, ping)
    return Figures(all_reduce, ping / 2, rate)


def _rate(send_big: Callable[[int], float], agreed: Callable[[int], int], ping: float) -> float:
    """Measure bytes per second one way, with messages that take some tenths of a second."""
    first = max(send_big(_FIRST_BYTES) - ping, 1e-6)
    wanted = int(_FIRST_BYTES * _BIG_SECONDS / first)
    # Whole MiB, so that the agreed number is small and exact.
    mebibytes = agreed(max(1, min(_BIG_BYTES, wanted) // 2**20))
    seconds = min(send_big(mebibytes * 2**20) for _ in range(_BIG_ROUNDS))
    return mebibytes * 2**20 / max(seconds - ping / 2, 1e-6)


def _timed(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _median(action: Callable[[], None], agreed: Callable[[int], int]) -> float:
    """Measure the median time of a round; both ranks agree on the number of rounds."""
    warm = min(_timed(action) for _ in range(WARM_UP))
    rounds = agreed(max(3, min(ROUNDS, int(ROUNDS_SECONDS / max(warm, 1e-6)))))
    return statistics.median(_timed(action) for _ in range(rounds))


# --- without MLX --------------------------------------------------------------------------------


def _measure_tcp(specification: Specification) -> Figures:
    """Measure over plain TCP, if MLX failed: an upper bound for its ring."""
    connection = _meet(specification)
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(_SOCKET_SECONDS)

        def exchange(count: int) -> None:
            if specification.rank == 0:
                connection.sendall(bytes(count))
                _receive(connection, 1)
            else:
                _receive(connection, count)
                connection.sendall(b"\0")

        def agreed(value: int) -> int:
            if specification.rank == 0:
                connection.sendall(value.to_bytes(8, "big"))
                return value
            return int.from_bytes(_receive(connection, 8), "big")

        ping = _median(lambda: exchange(1), agreed)
        rate = _rate(lambda count: _timed(lambda: exchange(count)), agreed, ping)
        return Figures(None, ping / 2, rate)


def _meet(specification: Specification) -> socket.socket:
    """Listen at the own address on rank 1; connect to it on rank 0."""
    host, _, port = specification.addresses[1].rpartition(":")
    address = (host.strip("[]"), int(port))
    if specification.rank == 1:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with socket.create_server(address, family=family) as listener:
            listener.settimeout(specification.limit_seconds)
            return listener.accept()[0]
    # A plain clock, as that of the alarm which ends this process after the same time.
    until = time.monotonic() + specification.limit_seconds
    while True:
        try:
            return socket.create_connection(address, 2.0)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _receive(connection: socket.socket, count: int) -> bytes:
    parts, left = [], count
    while left:
        part = connection.recv(min(left, 2**20))
        if not part:
            raise ConnectionError("the other rank has closed the connection")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def main() -> None:
    """Measure, and write the figures to stdout as JSON."""
    specification = decode_json(sys.argv[1], type=Specification)
    # The default action of SIGALRM ends the process even if its threads are blocked.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(specification.limit_seconds)
    try:
        figures = measure(specification)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        say_on_stderr(f"{type(error).__name__}: {error}")
        os._exit(1)  # the transport's finalizer may wait for the other rank
    os.write(1, msgspec.json.encode(figures) + b"\n")


if __name__ == "__main__":
    main()
