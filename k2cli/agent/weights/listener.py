"""The receiver's port: open for one transfer, for senders that know its token.

The token and the fingerprint of the certificate travelled over SSH. A stranger that connects is
closed after some seconds and takes no thread of the transfer.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence

from k2cli.agent.weights.certificate import make_server_context
from k2cli.agent.weights.messages import ADMITTED

_GREETING_SECONDS = 10.0
"""Time that a connection has for the TLS handshake and the token."""
_MAX_STRANGERS = 16
"""Connections that may be in this state at the same time; further ones are closed at once."""
QUIET_SECONDS = 20.0
"""Longest time without a byte: a sender that waits for its next file says that it is alive."""


class Listener:
    """A listening socket whose authenticated connections go to ``on_stream``.

    It is closed when that many of them have come.

    Raises:
        K2Error: if no certificate can be made.
        OSError: if none of the addresses is this machine's.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        token: str,
        streams: int,
        on_stream: Callable[[ssl.SSLSocket], None],
    ) -> None:
        self._context, self.fingerprint = make_server_context()
        self._token = token.encode()
        self._on_stream = on_stream
        self._expected = streams
        self._count_lock = threading.Lock()
        self._strangers = threading.BoundedSemaphore(_MAX_STRANGERS)
        self._socket = _listen(addresses)
        self.host, self.port = self._socket.getsockname()[:2]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Close the port; accepted connections stay."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts, on Linux
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except ConnectionAbortedError:  # a stranger that is gone again, or the port is closed
                continue
            except OSError:
                return
            if not self._strangers.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            stream = self._let_in(connection)
        finally:
            self._strangers.release()
        if stream is None:
            return
        with self._count_lock:
            self._expected -= 1
            if self._expected <= 0:
                self.close()
        self._on_stream(stream)

    def _let_in(self, connection: socket.socket) -> ssl.SSLSocket | None:
        """Authenticate a connection; None if it is a stranger's, which is then closed."""
        stream: socket.socket = connection
        known: ssl.SSLSocket | None = None
        deadline = time.monotonic() + _GREETING_SECONDS
        try:
            connection.settimeout(_GREETING_SECONDS)
            known = self._context.wrap_socket(connection, server_side=True)
            stream = known
            said = b""
            while len(said) < len(self._token):
                # One limit for the whole token: strangers that send it byte by byte would otherwise
                # keep the sender out for minutes.
                known.settimeout(max(0.001, deadline - time.monotonic()))
                if not (part := known.recv(len(self._token) - len(said))):
                    break
                said += part
            if not hmac.compare_digest(said, self._token):
                known = None
                return None
            known.sendall(ADMITTED)
            known.settimeout(QUIET_SECONDS)
            return known
        except (OSError, ValueError):  # ssl's errors are kinds of OSError
            known = None
            return None
        finally:
            if known is None:
                stream.close()


def _listen(addresses: Sequence[str]) -> socket.socket:
    problem: OSError | None = None
    for address in addresses:
        try:
            family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
            listener = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            problem = error
            continue
        try:
            listener.bind((address, 0))
            listener.listen(_MAX_STRANGERS)
            return listener
        except OSError as error:
            listener.close()
            problem = error
    raise problem or OSError("there is no address to listen on")
