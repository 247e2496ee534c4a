"""A channel that one thread receives from while others send to its peer."""

from __future__ import annotations

import errno
import os
import socket
import threading
from typing import Any

import pytest

from k2cli.protocol import BlocksFound, FollowerMessage
from k2cli.protocol.wire import Channel, ConnectionLost

LONG = BlocksFound(1, [(f"{number:032x}/{number:032x}", number, 0.5) for number in range(4_000)])


def test_a_long_message_is_whole_while_another_thread_waits_with_a_time_limit() -> None:
    """A follower's disk lists its blocks, and its main thread looks for decisions meanwhile."""
    ours, theirs = socket.socketpair()
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        ours.setsockopt(socket.SOL_SOCKET, option, 2**12)
        theirs.setsockopt(socket.SOL_SOCKET, option, 2**12)
    follower: Channel[FollowerMessage] = Channel(ours, FollowerMessage)
    leader: Channel[FollowerMessage] = Channel(theirs, FollowerMessage)
    lost: list[ConnectionLost] = []
    waiting = threading.Event()

    def send() -> None:
        waiting.wait()
        try:
            follower.send(LONG)
        except ConnectionLost as error:
            lost.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    waiting.set()
    for _ in range(30):  # the leader is slow: nothing of it is read meanwhile
        assert follower.receive(0.01) is None
    got: list[FollowerMessage | None] = []
    reader = threading.Thread(target=lambda: got.append(leader.receive()), daemon=True)
    reader.start()
    sender.join(60)
    reader.join(60)
    assert lost == []
    assert got == [LONG]
    follower.close()
    leader.close()


def test_a_channel_that_is_closed_or_left_is_lost_whatever_the_time_limit() -> None:
    ours, theirs = socket.socketpair()
    channel: Channel[FollowerMessage] = Channel(ours, FollowerMessage)
    theirs.close()
    for limit in (None, 0.5, 0.0):
        with pytest.raises(ConnectionLost):
            channel.receive(limit)
    channel.close()
    with pytest.raises(ConnectionLost):
        channel.receive(0.5)


class _ClosedByPeer(socket.socket):
    """A socket of macOS whose peer is gone: it takes no options (capnproto#2365)."""

    def setsockopt(self, *arguments: Any) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def test_a_peer_that_is_gone_is_a_lost_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, _ClosedByPeer() as ours:
        ours.connect(server.getsockname())
        server.accept()[0].close()
        channel: Channel[FollowerMessage] = Channel(ours, FollowerMessage)
        with pytest.raises(ConnectionLost):
            channel.receive(10.0)
