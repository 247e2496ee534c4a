"""The rank's connection to its guard: sends from any thread, listens in a thread of its own."""

from __future__ import annotations

import faulthandler
import os
import queue
import socket
import threading
from collections.abc import Sequence

from k2cli.protocol import Deadlines, GuardMessage, Heartbeat, RankMessage, Start
from k2cli.protocol.wire import Channel, ConnectionLost


class GuardLink:
    """The rank's end of the socket pair to its guard."""

    def __init__(self, descriptor: int) -> None:
        connection = socket.socket(fileno=descriptor)
        self._channel: Channel[GuardMessage] = Channel(connection, GuardMessage)
        self._lock = threading.Lock()
        self.inbox: queue.Queue[GuardMessage] = queue.Queue()

    def send(self, message: RankMessage) -> None:
        """Send a message to the guard; end this process if the guard is gone."""
        self.send_all([message])

    def send_all(self, messages: Sequence[RankMessage]) -> None:
        """Send several messages to the guard in one write."""
        try:
            with self._lock:
                self._channel.send(*messages)
        except ConnectionLost:
            os._exit(1)

    def start_listening(self, deadlines: Deadlines) -> None:
        """Start the thread that fills the inbox and ends the process when the guard is gone."""
        threading.Thread(target=self._listen, args=(deadlines,), daemon=True).start()

    def receive_start(self) -> Start:
        """Receive the first message, which is always the assignment."""
        message = self._channel.receive()
        assert isinstance(message, Start)
        return message

    def _listen(self, deadlines: Deadlines) -> None:
        limit = deadlines.initialisation + deadlines.liveness
        try:
            while True:
                # A timer in C, which needs no GIL: it ends the process if joining the group holds
                # the GIL for ever, on a system that has no parent-death signal.
                faulthandler.dump_traceback_later(limit, exit=True)
                message = self._channel.receive(timeout_seconds=1.0)
                if message is not None and not isinstance(message, Heartbeat):
                    self.inbox.put(message)
        except ConnectionLost:
            os._exit(1)
