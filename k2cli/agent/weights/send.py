"""The process that sends files of a model: ``python -m k2cli.agent.weights.send``.

Orders come over standard input, with which it ends. The data go over TLS to a receiver, in several
streams, or over standard output in one; then its events go to standard error.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import queue
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import msgspec

from k2cli.agent.weights.certificate import make_client_context
from k2cli.agent.weights.frames import SegmentWriter, StreamLost
from k2cli.agent.weights.json_lines import Input, Output, decode_line, write_all
from k2cli.agent.weights.listener import QUIET_SECONDS
from k2cli.agent.weights.messages import (
    ADMITTED,
    CONFIRMED,
    Connected,
    Failed,
    Segments,
    SenderOrder,
    SendFiles,
    SendOrder,
    Sent,
)
from k2cli.agent.weights.receive import cpu_seconds, end_with
from k2cli.errors import ClusterError, K2Error
from k2cli.models.inventory.readers import reading
from k2cli.system.awake import kept_awake

_CONNECT_SECONDS = 5.0
_ALIVE_SECONDS = 5.0
_Work = tuple[Segments, int]


class Jobs:
    """Segments that wait to be sent, for several streams."""

    def __init__(self) -> None:
        self._queue: queue.Queue[_Work | None] = queue.Queue()

    def add(self, files: tuple[Segments, ...]) -> None:
        """Add the segments of files, in order."""
        for file in files:
            for number in file.numbers:
                self._queue.put((file, number))

    def end(self, streams: int) -> None:
        """Tell each stream that nothing follows."""
        for _ in range(streams):
            self._queue.put(None)

    def take(self) -> _Work | None:
        """Return the next segment, or None at the end.

        Raises:
            queue.Empty: if there is none for some seconds.
        """
        return self._queue.get(timeout=_ALIVE_SECONDS)


def send_stream(writer: SegmentWriter, folder: Path, jobs: Jobs) -> None:
    """Send segments to one stream until there are no more."""
    writer.begin()
    while True:
        try:
            work = jobs.take()
        except queue.Empty:
            writer.keep_alive()
            continue
        if work is None:
            writer.end()
            return
        writer.send(folder, *work)


def connect(order: SendOrder) -> ssl.SSLSocket:
    """Connect to the receiver, compare its certificate, and send the token.

    Raises:
        ClusterError: if another program answers there.
        OSError: if nothing answers.
    """
    plain = socket.create_connection((order.host, order.port), _CONNECT_SECONDS)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        stream = make_client_context().wrap_socket(plain)
    except BaseException:
        plain.close()
        raise
    shown = hashlib.sha256(stream.getpeercert(binary_form=True) or b"").hexdigest()
    try:
        if not hmac.compare_digest(shown, order.fingerprint):
            raise ClusterError(f"another program than k2's answers at {order.host}:{order.port}")
        stream.sendall(order.token.encode())
        if stream.recv(1) != ADMITTED:
            raise ClusterError(f"the receiver at {order.host}:{order.port} refused the connection")
        stream.settimeout(QUIET_SECONDS)
    except BaseException:
        stream.close()
        raise
    return stream


class Sender:
    """One transfer on the sending machine."""

    def __init__(self, orders: Input) -> None:
        self._orders = orders
        self._jobs = Jobs()
        self._sent_bytes = 0
        self._lock = threading.Lock()

    def run(self) -> None:
        """Send what standard input says; the process ends with it."""
        line = self._orders.line()
        if line is None:
            return
        order = decode_line(line, SenderOrder)
        if not isinstance(order, SendOrder):
            raise ClusterError("the sender was not told where to send to")
        events = Output(1 if order.host else 2)
        try:
            streams = self._connect(order)
        except OSError as error:
            message = f"nothing answers at {order.host}:{order.port}: {error}"
            events.send(Failed(message, again=True))
            return
        with reading(Path(order.folder)):
            self._send(order, events, streams)

    def _send(self, order: SendOrder, events: Output, streams: list[ssl.SSLSocket | None]) -> None:
        events.send(Connected())
        threads = [
            threading.Thread(target=self._work, args=(stream, order, events), daemon=True)
            for stream in streams
        ]
        for thread in threads:
            thread.start()
        self._follow(len(threads))
        for thread in threads:
            thread.join()
        events.send(Sent(self._sent_bytes, cpu_seconds()))

    def _connect(self, order: SendOrder) -> list[ssl.SSLSocket | None]:
        if not order.host:
            return [None]
        return [connect(order) for _ in range(max(1, min(order.streams, 16)))]

    def _follow(self, streams: int) -> None:
        """Take files from standard input until the empty list.

        Raises:
            ClusterError: if the input ends before.
        """
        while (line := self._orders.line()) is not None:
            order = decode_line(line, SenderOrder)
            if isinstance(order, SendFiles) and order.files:
                self._jobs.add(order.files)
                continue
            threading.Thread(target=self._end_with_input, daemon=True).start()
            return self._jobs.end(streams)
        raise ClusterError("the launcher is gone")

    def _end_with_input(self) -> None:
        while self._orders.line() is not None:
            pass
        os._exit(1)

    def _work(self, stream: ssl.SSLSocket | None, order: SendOrder, events: Output) -> None:
        folder = Path(order.folder)
        write: Any = stream.sendall if stream else lambda data: write_all(1, data)
        writer = SegmentWriter(write)
        try:
            send_stream(writer, folder, self._jobs)
            if stream is not None:
                if stream.recv(1) != CONFIRMED:
                    raise StreamLost("the receiver did not confirm the last piece")
                stream.close()
        except OSError as error:
            end_with(events, StreamLost(f"the connection to the receiver was lost: {error}"))
        except Exception as error:
            end_with(events, error)
        with self._lock:
            self._sent_bytes += writer.sent_bytes


def main() -> None:
    """Send files as standard input says."""
    try:
        with kept_awake():
            Sender(Input()).run()
    except (K2Error, OSError, ValueError, msgspec.MsgspecError) as error:
        end_with(Output(2), error)
    os._exit(0)


if __name__ == "__main__":
    main()
