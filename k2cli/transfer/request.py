"""Requests, events and results of a transfer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from k2cli.agent.weights.messages import ModelFiles
from k2cli.cluster.description import Cluster
from k2cli.nodes.node import Node
from k2cli.transfer.ways import Over

MAX_STREAMS = 4
"""Streams of one sender: each needs a core at both ends, to encrypt and to hash."""


@dataclass(frozen=True, slots=True)
class PushStep:
    """Start of a step of a transfer; ``text`` describes it for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class PushBytes:
    """Progress within the step."""

    done_bytes: int
    total_bytes: int


OnPushEvent = Callable[[PushStep | PushBytes], None]


@dataclass(frozen=True, slots=True)
class PushRequest:
    """A transfer of one model from one node to others.

    ``wanted`` are the weight files that a node reads, by its name; None, or no entry, stands for
    the whole model. With ``replace``, files of the same name with another content are replaced.
    ``options`` are those of the command line that continues the transfer.
    """

    reference: str
    source: Node
    found: ModelFiles
    nodes: tuple[Node, ...]
    wanted: Mapping[str, frozenset[str]] = field(default_factory=dict)
    cluster: Cluster | None = None
    over: Over = "auto"
    replace: bool = False
    options: tuple[str, ...] = ()
    streams: int = field(default_factory=lambda: max(1, min(MAX_STREAMS, os.cpu_count() or 1)))


@dataclass(slots=True)
class NodeResult:
    """The result of one node. ``route`` says how the data travelled."""

    node: str
    folder: str = ""
    sent_bytes: int = 0
    was_there_bytes: int = 0
    seconds: float = 0.0
    route: str = ""
    receiver_cpu_seconds: float = 0.0
    sender_cpu_seconds: float = 0.0
