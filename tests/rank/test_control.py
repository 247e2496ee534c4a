"""The leader's control port, and peers that are gone before they are looked at."""

from __future__ import annotations

import errno
import socket
import threading

import pytest

from k2cli.protocol import ControlEndpoint, FollowerMessage
from k2cli.protocol.wire import Channel
from k2cli.rank.control import Followers, connect_to_leader
from tests.support.bootstraps import SECRET


def test_a_stranger_that_is_gone_before_it_is_accepted_does_not_end_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """macOS reports the reset of such a connection to the one who would accept it."""
    accept, aborted = socket.socket.accept, []

    def first_aborted(listening: socket.socket) -> tuple[socket.socket, object]:
        if not aborted:
            aborted.append(1)
            raise ConnectionAbortedError(errno.ECONNABORTED, "Software caused connection abort")
        return accept(listening)

    monkeypatch.setattr(socket.socket, "accept", first_aborted)
    followers = Followers(lambda rank, cause: None)
    listener = followers.listen("127.0.0.1")
    endpoint = ControlEndpoint("127.0.0.1", listener.getsockname()[1])
    channels = []
    follower = threading.Thread(
        target=lambda: channels.append(connect_to_leader(endpoint, 1, SECRET, 20.0))
    )
    follower.start()
    followers.accept(listener, 1, SECRET, 20.0)
    follower.join()
    assert aborted
    followers.close()
    for channel in (*channels, *followers._channels.values()):
        channel.close()


def test_a_channel_of_a_peer_that_is_gone_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS refuses options of such a socket; what was received can still be read."""

    class Gone(socket.socket):
        def setsockopt(self, *option: object) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    with Gone() as connection:
        channel: Channel[FollowerMessage] = Channel(connection, FollowerMessage)
        channel.close()
