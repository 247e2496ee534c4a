"""One attempt to bring a model to nodes: receivers, senders, and the events between them.

Every file travels along a chain: from the source to the first node that lacks it, from there to the
next one as soon as the first has verified it. So the source sends each byte once. Where a node
cannot reach the next one, the source sends to that one too.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from k2cli.agent.weights.messages import (
    Begin,
    Checked,
    Connected,
    Failed,
    FileReceived,
    Finish,
    Finished,
    Lacks,
    Listen,
    Listening,
    Offer,
    Received,
    Segments,
    SendFiles,
    SendOrder,
    Sent,
    Stream,
)
from k2cli.errors import ClusterError, InternalError, NodeAccessError
from k2cli.nodes.node import Node
from k2cli.transfer.addresses import receiving_addresses
from k2cli.transfer.destination import Destination, NodeFailed, Pair
from k2cli.transfer.needs import find_needs
from k2cli.transfer.parts import Share
from k2cli.transfer.process import NodeProcess
from k2cli.transfer.request import NodeResult, OnPushEvent, PushBytes, PushRequest, PushStep
from k2cli.units import format_bytes

_ALIVE_SECONDS = 4.0
"""Time between two signs of life; a receiver ends after 20 s without one (``QUIET_SECONDS``)."""
_QUIET_SECONDS = 120.0
"""Longest time without an event: receivers and senders report several times a second."""


class Attempt:
    """Receivers and senders of one attempt; ``close`` ends them all."""

    def __init__(self, request: PushRequest, shares: dict[str, Share], say: OnPushEvent) -> None:
        self._request = request
        self._say = say
        self._events: queue.Queue[tuple[NodeProcess, Any]] = queue.Queue()
        self._processes: list[NodeProcess] = []
        self._destinations: dict[str, Destination] = {}
        self._owners: dict[int, tuple[Destination, Pair | None]] = {}
        self._source_has: set[str] | None = None
        self._source_done = True
        self._pair_count = 0
        self._shares = shares
        self._closed = threading.Event()
        self._began = time.monotonic()

    def start(self, nodes: Sequence[Node]) -> None:
        """Start a receiver on each node.

        Raises:
            NodeFailed: if one cannot be reached.
        """
        threading.Thread(target=self._say_alive, daemon=True).start()
        for node in nodes:
            try:
                self._add(node, self._shares[node.name])
            except NodeAccessError as error:
                raise NodeFailed(node.name, error.message, error.hint, again=False) from error
            except ClusterError as error:
                raise NodeFailed(node.name, error.message, error.hint, again=True) from error

    def _say_alive(self) -> None:
        """Tell receivers that the launcher is there, also while it waits for something."""
        while not self._closed.wait(_ALIVE_SECONDS):
            for found in list(self._destinations.values()):
                found.process.say_alive()

    def _add(self, node: Node, share: Share) -> None:
        process = self._start(node, "receive")
        found = Destination(node, share, process, NodeResult(node.name))
        self._destinations[node.name] = found
        self._owners[id(process)] = found, None
        target = self._request.found.target
        if target is None:
            raise InternalError("a model without a place was offered")
        record = self._request.found.record
        process.send(Offer(target, share.files, dict(share.absent), record))

    def _start(self, node: Node, module: Any, data: int | None = None) -> NodeProcess:
        process = NodeProcess(node, module, self._events, data)
        self._processes.append(process)
        return process

    def close(self) -> None:
        """End all processes of the attempt."""
        self._closed.set()
        threads = [threading.Thread(target=each.end) for each in self._processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    # --- a source that grows --------------------------------------------------------------------

    def source_grows(self) -> None:
        """Say that the source does not have the files yet: ``source_has`` will name them."""
        self._source_has, self._source_done = set(), False

    def source_has(self, name: str | None) -> None:
        """Add a file that the source has by now, from any thread; None: it has all of them."""
        self._events.put((self._processes[0], _SourceHas(name)))

    # --- the loop -------------------------------------------------------------------------------

    @property
    def received_bytes(self) -> int:
        """Bytes that have arrived in this attempt, on all nodes."""
        return sum(found.received_bytes for found in self._destinations.values())

    @property
    def results(self) -> list[NodeResult]:
        """The result of each node in this attempt."""
        return [found.result for found in self._destinations.values()]

    def run(self) -> None:
        """Bring the model to the nodes.

        Raises:
            NodeFailed: if one of them fails; the others keep what they have received.
        """
        while not all(found.finished for found in self._destinations.values()):
            try:
                process, event = self._events.get(timeout=_QUIET_SECONDS)
            except queue.Empty:
                if not self._source_done:
                    continue
                name = next(n for n, d in self._destinations.items() if not d.finished)
                text = f"node {name} received nothing for {_QUIET_SECONDS:.0f} s"
                raise NodeFailed(name, text, None, again=True) from None
            if isinstance(event, _SourceHas):
                self._grow(event.name)
                continue
            found, pair = self._owners[id(process)]
            if pair is not None and process is not pair.process:
                continue  # the last words of a sender that could not connect, and was replaced
            self._on_event(found, pair, event)

    def _on_event(self, found: Destination, pair: Pair | None, event: Any) -> None:
        match event:
            case Checked():
                self._say(PushBytes(event.done_bytes, event.total_bytes))
            case Lacks():
                self._on_lacks(found, event)
            case Listening():
                self._on_listening(found, event)
            case Connected():
                self._on_connected(found, pair)
            case Received():
                found.received_bytes = event.done_bytes
                self._report()
            case FileReceived():
                found.there.add(found.share.files[event.index].name)
                self._move_on()
            case Sent():
                self._on_sent(found, pair, event)
            case Finished():
                found.finished = True
                found.result.folder = event.folder
                found.result.receiver_cpu_seconds = event.cpu_seconds
                found.result.seconds = time.monotonic() - self._began
                found.result.sent_bytes = found.missing_bytes
            case Failed():
                self._on_failed(found, pair, event)

    def _report(self) -> None:
        total = sum(found.missing_bytes for found in self._destinations.values())
        self._say(PushBytes(min(self.received_bytes, total), total))

    # --- what is missing ------------------------------------------------------------------------

    def _on_lacks(self, found: Destination, lacks: Lacks) -> None:
        found.lacks = lacks
        try:
            needs = find_needs(self._request, found.node.name, found.share, lacks)
        except ClusterError as error:
            raise NodeFailed(found.node.name, error.message, error.hint, again=False) from error
        found.needs = needs
        found.missing = needs.missing
        found.to_assign = set(needs.missing)
        found.result.was_there_bytes = needs.there_bytes
        found.process.send(Begin(needs.same, needs.replaced))
        if all(each.needs is not None for each in self._destinations.values()):
            total = sum(each.missing_bytes for each in self._destinations.values())
            names = ", ".join(self._destinations)
            self._say(PushStep(f"sending {format_bytes(total)} to {names}"))
            self._move_on()

    # --- who sends what -------------------------------------------------------------------------

    def _move_on(self) -> None:
        """Give files to senders that may send them now, and finish nodes that have everything."""
        if any(found.needs is None for found in self._destinations.values()):
            return
        for found in self._destinations.values():
            for index in sorted(found.to_assign):
                sender = self._sender_of(found, found.share.files[index].name)
                if sender is None:
                    continue
                found.to_assign.discard(index)
                self._give(found, sender, index)
            if not found.to_assign:
                for pair in found.pairs.values():
                    self._tell_end(pair)
            self._finish_if_complete(found)

    def _sender_of(self, found: Destination, name: str) -> str | None:
        """Return who sends a file to a node, once it has it: the node before it in the chain."""
        for other in reversed(self._before(found, name)):
            usable = self._request.over in ("auto", "tls") and not other.node.is_local
            if usable and other.node.name not in found.unreachable_from:
                return other.node.name if name in other.there else None
        plain = found.share.sources.get(name, name)
        if self._source_has is None or plain in self._source_has:
            return self._request.source.name
        return None

    def _before(self, found: Destination, name: str) -> list[Destination]:
        """List the nodes before this one that have a file, or will have it."""
        before: list[Destination] = []
        for other in self._destinations.values():
            if other is found:
                return before
            if any(file.name == name for file in other.share.files):
                before.append(other)
        return before

    def _give(self, found: Destination, sender: str, index: int) -> None:
        file = found.share.files[index]
        source = file.name
        if sender == self._request.source.name:
            source = found.share.sources.get(source, source)
        work = Segments(index, source, file.nbytes, found.missing[index])
        pair = found.pairs.get(sender)
        if pair is None:
            pair = self._make_pair(found, sender)
        if pair.connected and pair.process is not None:
            pair.process.send(SendFiles((work,)))
        pair.waiting.append(work)

    def _tell_end(self, pair: Pair) -> None:
        if pair.connected and not pair.told_end and pair.process is not None:
            pair.told_end = True
            pair.process.send(SendFiles(()))

    def _finish_if_complete(self, found: Destination) -> None:
        complete = len(found.there) == len(found.share.files)
        if complete and not found.finishing and all(pair.done for pair in found.pairs.values()):
            found.finishing = True
            found.process.send(Finish())

    def _grow(self, name: str | None) -> None:
        if name is None:
            self._source_has, self._source_done = None, True
        elif self._source_has is not None:
            self._source_has.add(name)
        self._move_on()

    # --- connections ----------------------------------------------------------------------------

    def _node(self, name: str) -> Node:
        if name == self._request.source.name:
            return self._request.source
        return self._destinations[name].node

    def _make_pair(self, found: Destination, sender: str) -> Pair:
        self._pair_count += 1
        addresses: tuple[str, ...] = ()
        if self._request.over != "ssh":
            addresses = receiving_addresses(self._request.cluster, self._node(sender), found.node)
        pair = found.pairs[sender] = Pair(self._pair_count, sender, addresses)
        self._connect(found, pair)
        return pair

    def _connect(self, found: Destination, pair: Pair) -> None:
        """Ask the receiver to listen for a sender, or else let the data go through ssh."""
        if pair.addresses:
            streams = self._request.streams
            found.process.send(Listen(pair.number, pair.token, pair.addresses, streams))
        elif pair.sender != self._request.source.name:
            self._give_up(found, pair)
        elif self._request.over == "tls":
            raise NodeFailed(
                found.node.name,
                f"node {found.node.name} has no address at which {pair.sender} reaches it",
                "--over auto",
                again=False,
            )
        else:
            self._stream(found, pair)

    def _give_up(self, found: Destination, pair: Pair) -> None:
        """Let the source send what another node cannot send to this one."""
        del found.pairs[pair.sender]
        found.unreachable_from.add(pair.sender)
        found.to_assign |= {work.index for work in pair.waiting}
        self._move_on()

    def _on_listening(self, found: Destination, event: Listening) -> None:
        pair = next((p for p in found.pairs.values() if p.number == event.number), None)
        if pair is None:
            return
        if event.problem:
            pair.addresses = ()
            self._connect(found, pair)
            return
        # If the sender does not reach this address, those after it are tried.
        tried = pair.addresses.index(event.host) if event.host in pair.addresses else 0
        pair.addresses = pair.addresses[tried + 1 :]
        folder = self._folder(pair.sender)
        pair.process = self._start(self._node(pair.sender), "send")
        self._owners[id(pair.process)] = found, pair
        pair.process.send(
            SendOrder(folder, event.host, event.port, event.fingerprint, pair.token,
                      self._request.streams)
        )  # fmt: skip
        found.result.route = f"TLS to {event.host}"

    def _stream(self, found: Destination, pair: Pair) -> None:
        data = found.process.lend_input(Stream())
        try:
            pair.process = self._start(self._node(pair.sender), "send", data)
        finally:
            os.close(data)
        self._owners[id(pair.process)] = found, pair
        pair.process.send(SendOrder(self._folder(pair.sender)))
        found.result.route = "inside ssh"

    def _folder(self, sender: str) -> str:
        if sender == self._request.source.name:
            return self._request.found.folder
        lacks = self._destinations[sender].lacks
        return lacks.folder if lacks is not None else ""

    def _on_connected(self, found: Destination, pair: Pair | None) -> None:
        if pair is None or pair.process is None:
            return
        pair.connected = True
        if pair.waiting:
            pair.process.send(SendFiles(tuple(pair.waiting)))
        if not found.to_assign:
            self._tell_end(pair)

    def _on_sent(self, found: Destination, pair: Pair | None, event: Sent) -> None:
        if pair is not None:
            pair.done = True
            found.process.take_input_back()
            found.result.sender_cpu_seconds += event.cpu_seconds
        self._finish_if_complete(found)

    def _on_failed(self, found: Destination, pair: Pair | None, event: Failed) -> None:
        if (pair is None and found.finished) or (pair is not None and pair.done):
            return  # the end of a process that had done its work
        if pair is not None and not pair.connected and pair.process is not None:
            pair.process = None
            self._connect(found, pair)
            return
        name = found.node.name
        message = event.message if name in event.message else f"node {name}: {event.message}"
        raise NodeFailed(name, message, event.hint or None, again=event.again)


@dataclass(frozen=True, slots=True)
class _SourceHas:
    """A file that the source has by now; None: all of them."""

    name: str | None
