"""State of one receiving node in an attempt, and of the senders that send to it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from k2cli.agent.weights.messages import Lacks, Segments
from k2cli.errors import ClusterError
from k2cli.nodes.node import Node
from k2cli.transfer.needs import Needs
from k2cli.transfer.parts import Share
from k2cli.transfer.process import NodeProcess
from k2cli.transfer.request import NodeResult


class NodeFailed(ClusterError):
    """A node could not receive. ``again`` is True if another attempt may succeed."""

    def __init__(self, node: str, message: str, hint: str | None, *, again: bool) -> None:
        super().__init__(message, hint)
        self.node = node
        self.again = again


@dataclass(slots=True)
class Pair:
    """One sender for one receiver.

    Attributes:
        number: the number of the order ``Listen``, which the receiver's answer repeats.
        sender: the name of the node that sends.
        addresses: addresses of the receiver that were not tried yet.
        token: what the sender shows to the receiver.
        waiting: the files that it was given; they are sent once it is connected.
        told_end: True once it knows that nothing more follows.
        done: True once it has sent everything, and the receiver has confirmed it.
    """

    number: int
    sender: str
    addresses: tuple[str, ...]
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    process: NodeProcess | None = None
    connected: bool = False
    waiting: list[Segments] = field(default_factory=list)
    told_end: bool = False
    done: bool = False


@dataclass(slots=True)
class Destination:
    """One receiving node.

    Attributes:
        share: the files that it is to have.
        lacks: its answer to the offer of its share.
        missing: the numbers of the segments that it needs, by the index of the file.
        to_assign: the indexes of files that no sender was given yet.
        there: the names of the files that it has complete and verified.
        pairs: its senders, by the name of their node.
        unreachable_from: names of nodes that cannot send to it.
        finishing, finished: True once it was told to complete the model, and once it has.
    """

    node: Node
    share: Share
    process: NodeProcess
    result: NodeResult
    lacks: Lacks | None = None
    needs: Needs | None = None
    missing: dict[int, tuple[int, ...]] = field(default_factory=dict)
    to_assign: set[int] = field(default_factory=set)
    there: set[str] = field(default_factory=set)
    pairs: dict[str, Pair] = field(default_factory=dict)
    unreachable_from: set[str] = field(default_factory=set)
    received_bytes: int = 0
    finishing: bool = False
    finished: bool = False

    @property
    def missing_bytes(self) -> int:
        """Bytes that it lacked when the attempt began."""
        return self.needs.missing_bytes if self.needs else 0
