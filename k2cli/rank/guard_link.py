"""The rank's connection to its guard: messages, and the end of the rank when the guard is gone."""

from __future__ import annotations

import faulthandler
import os
import queue
import socket
import sys
import threading
from collections.abc import Sequence

from k2cli.protocol import Deadlines, GuardMessage, Heartbeat, RankMessage, Start
from k2cli.protocol.wire import Channel, ConnectionLost


class GuardLink:
    """The rank's end of the socket pair to its guard; sends from any thread, listens in its own."""

    def __init__(self, descriptor: int) -> None:
        connection = socket.socket(fileno=descriptor)
        self._channel: Channel[GuardMessage] = Channel(connection, GuardMessage)
        self._lock = threading.Lock()
        self._timer_lock = threading.Lock()
        # On Linux the kernel ends the rank with its guard.
        self._has_timer = sys.platform != "linux"
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

    def end_timer(self) -> None:
        """End the timer of ``_renew_timer``: the rank has joined the group."""
        with self._timer_lock:
            if self._has_timer:
                self._has_timer = False
                faulthandler.cancel_dump_traceback_later()

    def _renew_timer(self, limit_seconds: float) -> None:
        """Let a timer in C, which needs no GIL, end this process unless it is renewed in time.

        Joining the group may hold the GIL for ever, and a system without a parent-death signal
        does not end a rank whose guard is gone. The timer cannot tell a pause of this process from
        that, and on macOS it follows the wall clock, so it does not run for longer than needed.
        """
        with self._timer_lock:
            if self._has_timer:
                faulthandler.dump_traceback_later(limit_seconds, exit=True)

    def _listen(self, deadlines: Deadlines) -> None:
        try:
            while True:
                self._renew_timer(deadlines.initialisation + deadlines.liveness)
                message = self._channel.receive(timeout_seconds=1.0)
                if message is not None and not isinstance(message, Heartbeat):
                    self.inbox.put(message)
        except ConnectionLost:
            os._exit(1)
