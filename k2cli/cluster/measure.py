"""Measurements of a cluster: reachable addresses, speed of links, and speed of disks.

Measurements run on the nodes themselves, within time limits, and on all nodes at once if that does
not change the figures. A failed measurement is a result with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import msgspec

from k2cli import event_loop
from k2cli.agent.disk import DiskReading
from k2cli.agent.link import Figures, Specification
from k2cli.agent.reach import Answer, Listening, Target
from k2cli.choices import LinkTransport
from k2cli.cluster.description import Link
from k2cli.cluster.facts.machine import MachineFacts
from k2cli.errors import ClusterError
from k2cli.files import decode_json
from k2cli.nodes.node import Node
from k2cli.nodes.parallel import map_in_parallel

_LISTEN_SECONDS = 30.0
_LINK_LIMIT_SECONDS = 20
# Time that ssh and the import of mlx need beside the measurement.
_START_SECONDS = 15.0
_SKIPPED_KINDS = frozenset({"loopback", "other"})


@dataclass(frozen=True, slots=True)
class Reach:
    """One try to connect from a node to an address of another, over TCP.

    ``interface`` is the source's interface of the connection. ``expected`` is True if both ends
    have an address on one network, so that it should work. ``error`` is None if it worked.
    """

    source: str
    target: str
    address: str
    interface: str | None
    target_interface: str
    expected: bool
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class LinkMeasurement:
    """Speed of a link under a transport (``backend``); times are medians in seconds.

    ``all_reduce_seconds`` is the time of one small all-reduce, ``latency_seconds`` half of a
    ping-pong, ``bytes_per_second`` the rate of big messages one way. ``error`` is the reason if
    there are no figures.
    """

    first: str
    second: str
    backend: LinkTransport
    first_address: str
    second_address: str
    kind: str
    all_reduce_seconds: float | None = None
    latency_seconds: float | None = None
    bytes_per_second: float | None = None
    note: str = ""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Speed at which a node read the checkpoint's own files, past the cache if ``uncached``."""

    path: str
    read_bytes: int
    seconds: float
    uncached: bool
    error: str | None = None

    @property
    def bytes_per_second(self) -> float | None:
        """Rate of reading, or None if nothing was read."""
        return self.read_bytes / self.seconds if self.read_bytes and self.seconds else None


# --- reachability -------------------------------------------------------------------------------


def measure_reach(
    nodes: Sequence[Node], machines: Mapping[str, MachineFacts], links: Sequence[Link]
) -> tuple[Reach, ...]:
    """Try every address of every node from every other, both ways.

    Args:
        nodes: at least two, on which k2 answers.
        machines: the facts of the nodes, by name.
        links: links whose addresses are on one network, so they are expected to work.
    """
    return event_loop.run(_measure_reach(nodes, machines, links))


async def _measure_reach(
    nodes: Sequence[Node], machines: Mapping[str, MachineFacts], links: Sequence[Link]
) -> tuple[Reach, ...]:
    listeners = await asyncio.gather(*(_listen(node) for node in nodes))
    try:
        told = {
            node.name: await _listening(process)
            for node, process in zip(nodes, listeners, strict=True)
            if process is not None
        }
        expected = {pair for link in links for pair in _address_pairs(link)}
        tries = [
            asyncio.to_thread(_try, source, target.name, machines, told.get(target.name), expected)
            for source, target in permutations(nodes, 2)
        ]
        return tuple(reach for found in await asyncio.gather(*tries) for reach in found)
    finally:
        for process in listeners:
            if process is not None:
                await _end(process)


def _address_pairs(link: Link) -> list[tuple[str, str, str]]:
    """List ``(source, target, address of target)`` for both directions."""
    found = []
    for each in (link, link.turned()):
        if each.second_address is not None:
            found.append((each.first, each.second, each.second_address))
    return found


async def _listen(node: Node) -> asyncio.subprocess.Process | None:
    module = "k2cli.agent.reach"
    try:
        return await node.start([node.python, "-P", "-m", module, str(_LISTEN_SECONDS)])
    except ClusterError:
        return None  # every try towards this node reports that there is no listener


async def _listening(process: asyncio.subprocess.Process) -> Listening | None:
    """Return what a listener says of itself, after whatever the shell's start-up files print."""
    assert process.stdout is not None
    with contextlib.suppress(TimeoutError, ValueError):  # a line that never ends
        async with asyncio.timeout(_START_SECONDS):
            while line := await process.stdout.readline():
                with contextlib.suppress(msgspec.MsgspecError):
                    return decode_json(line, type=Listening)
    return None


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a listener by closing its stdin, which also works over ssh."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), 5.0)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            process.kill()
        await process.wait()


def _try(
    source: Node,
    target: str,
    machines: Mapping[str, MachineFacts],
    listening: Listening | None,
    expected: set[tuple[str, str, str]],
) -> list[Reach]:
    wanted = {address for one, other, address in expected if (one, other) == (source.name, target)}
    owners = _tried_addresses(machines[target], wanted)
    if listening is None:
        reason = "k2's listener did not start there"
        return [
            Reach(source.name, target, address, None, owner, True, error=reason)
            for address, owner in owners.items()
        ]
    mine = _interfaces_by_address(machines[source.name])
    return [
        Reach(
            source.name,
            target,
            answer.address,
            mine.get(answer.local or ""),
            owners[answer.address],
            answer.address in wanted,
            answer.seconds,
            answer.error,
        )
        for answer in _answers(source, listening, list(owners))
    ]


def _tried_addresses(machine: MachineFacts, wanted: set[str]) -> dict[str, str]:
    """Select the addresses of a machine to try, each with its interface."""
    return {
        address: interface
        for interface, addresses in machine.interfaces.items()
        for address in addresses
        if machine.interface_kinds.get(interface) not in _SKIPPED_KINDS or address in wanted
    }


def _answers(source: Node, listening: Listening, addresses: Sequence[str]) -> list[Answer]:
    """Have ``source`` connect to each address; returns an error for each if it does not answer."""
    targets = [
        Target(address, port, listening.word)
        for address in addresses
        if (port := listening.port_v6 if ":" in address else listening.port) is not None
    ]
    try:
        answers: list[Answer] = source.ask(
            list[Answer], "reach", msgspec.json.encode(targets).decode()
        )
    except ClusterError as error:
        return [Answer(each.address, error=error.message) for each in targets]
    return answers


def _interfaces_by_address(machine: MachineFacts) -> dict[str, str]:
    return {
        address: interface
        for interface, addresses in machine.interfaces.items()
        for address in addresses
    }


# --- links --------------------------------------------------------------------------------------


def measure_links(
    nodes: Mapping[str, Node], links: Sequence[Link], transport: LinkTransport
) -> tuple[LinkMeasurement, ...]:
    """Measure links one after the other, because two at once would share the bandwidth.

    If MLX fails, plain TCP is measured too, to distinguish a bad cable from a bad mlx.
    """
    return tuple(
        _with_plain_tcp(
            _measure_link(nodes[link.first], nodes[link.second], link, transport), nodes
        )
        for link in links
    )


def _with_plain_tcp(measured: LinkMeasurement, nodes: Mapping[str, Node]) -> LinkMeasurement:
    if measured.error is None or measured.backend == "tcp" or not measured.first_address:
        return measured
    first, second = nodes[measured.first], nodes[measured.second]
    link = Link(
        measured.first, measured.second, "other", "", measured.first_address, "",
        measured.second_address,
    )  # fmt: skip
    plain = _measure_link(first, second, link, "tcp")
    if plain.error is not None:
        return measured
    figures = (
        f"plain TCP works: {1e6 * (plain.latency_seconds or 0):.0f} us one way, "
        f"{(plain.bytes_per_second or 0) / 1e9:.2f} GB/s"
    )
    return replace(measured, error=f"{measured.error} ({figures})")


@dataclass(frozen=True, slots=True)
class _Side:
    """Result of one rank of a measurement: figures, or the reason that there are none."""

    figures: Figures | None
    error: str


def _measure_link(
    first: Node, second: Node, link: Link, transport: LinkTransport
) -> LinkMeasurement:
    addresses = (link.first_address or "", link.second_address or "")
    outcome = LinkMeasurement(
        link.first, link.second, transport, addresses[0], addresses[1], link.kind
    )
    try:
        sides = _run_both(first, second, link, transport)
    except ClusterError as error:
        return replace(outcome, error=error.message)
    figures = sides[0].figures
    if figures is None or any(side.figures is None for side in sides):
        return replace(outcome, error="; ".join(side.error for side in sides if side.error))
    return replace(
        outcome,
        all_reduce_seconds=figures.all_reduce_seconds,
        latency_seconds=figures.latency_seconds,
        bytes_per_second=figures.bytes_per_second,
    )


def _run_both(first: Node, second: Node, link: Link, transport: LinkTransport) -> list[_Side]:
    """Run both ranks of a measurement, each on its node."""
    ports = (first.free_ports(1)[0], second.free_ports(1)[0])
    devices = ((None, link.first_rdma_device), (link.second_rdma_device, None))
    placed = tuple(
        f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        for address, port in zip(
            (link.first_address or "", link.second_address or ""), ports, strict=True
        )
    )
    specifications = [
        Specification(
            transport, rank, placed, _LINK_LIMIT_SECONDS, devices if transport == "jaccl" else ()
        )
        for rank in range(2)
    ]
    ranks = list(zip((first, second), specifications, strict=True))
    return map_in_parallel(lambda rank: _run_rank(*rank), ranks)


def _run_rank(node: Node, specification: Specification) -> _Side:
    argument = msgspec.json.encode(specification).decode()
    command = [node.python, "-P", "-m", "k2cli.agent.link", argument]
    try:
        done = node.run(command, timeout_seconds=_LINK_LIMIT_SECONDS + _START_SECONDS)
    except ClusterError as error:
        return _Side(None, error.message)
    if done.status == 0:
        return _Side(decode_json(done.stdout.splitlines()[0], type=Figures), "")
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    if done.status < 0 or done.status == 128 + 14 or not lines:  # SIGALRM, there or through a shell
        return _Side(None, f"{node.name} waited {_LINK_LIMIT_SECONDS} s for the other node")
    return _Side(None, f"{node.name}: {lines[-1]}")


# --- disks --------------------------------------------------------------------------------------


def measure_disks(nodes: Sequence[Node], folders: Mapping[str, str]) -> dict[str, DiskSpeed]:
    """Measure the disks of all nodes at once.

    Args:
        nodes: nodes on which k2 answers.
        folders: by node, the folder whose largest checkpoint file is read.
    """
    chosen = [node for node in nodes if node.name in folders]
    speeds = map_in_parallel(lambda node: _disk_speed(node, folders[node.name]), chosen)
    return {node.name: speed for node, speed in zip(chosen, speeds, strict=True)}


def _disk_speed(node: Node, folder: str) -> DiskSpeed:
    try:
        reading: DiskReading = node.ask(DiskReading, "disk-speed", folder)
    except ClusterError as error:
        return DiskSpeed(folder, 0, 0.0, False, error.message)
    return DiskSpeed(
        reading.path, reading.read_bytes, reading.seconds, reading.uncached, reading.error
    )
