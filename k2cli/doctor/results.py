"""What a check reads and what it says: the situation of a cluster, and results with their mending.

A check is a function of a ``Situation`` alone, so that one over recorded probes says what it would
have said on the machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from k2cli.agent.software import Software
from k2cli.choices import WantedTransport
from k2cli.cluster.facts.machine import Examination, MachineFacts
from k2cli.cluster.measure import DiskSpeed, LinkMeasurement, Reach
from k2cli.nodes.node import LOCALHOST

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One finding. ``node`` is None if it is about the cluster; ``hint`` mends it.

    ``skip`` is no verdict: what would have told was not there, and ``detail`` says what.
    """

    status: Status
    name: str
    node: str | None
    detail: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """What a plan wants of one node, in bytes; ranks on one machine are added up."""

    total_bytes: int
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything that the checks read.

        ``reference`` is the software of the launching machine, ``live_runs`` and ``ended_runs`` are
        those of its records. ``needs`` maps a node to what a plan
    wants there; empty without a plan. ``reaches``, ``links`` and ``disks`` are None if they were
        not measured.
    """

    nodes: tuple[Examination, ...]
    reference: Software | None = None
    needs: Mapping[str, Need] = field(default_factory=dict)
    transport: WantedTransport = "auto"
    live_runs: frozenset[str] = frozenset()
    ended_runs: frozenset[str] = frozenset()
    reaches: tuple[Reach, ...] | None = None
    links: tuple[LinkMeasurement, ...] | None = None
    disks: Mapping[str, DiskSpeed] | None = None

    @property
    def machines(self) -> dict[str, MachineFacts]:
        """Those that could be read, by node."""
        return {each.node: each.machine for each in self.nodes if each.machine is not None}

    @property
    def software(self) -> dict[str, Software]:
        """Of the nodes on which k2 answers."""
        return {each.node: each.software for each in self.nodes if each.software is not None}

    @property
    def macs(self) -> dict[str, MachineFacts]:
        """The nodes that run macOS."""
        return {name: each for name, each in self.machines.items() if each.os_name == "macos"}


@dataclass(frozen=True, slots=True)
class Check:
    """A check of the registry. ``quick`` ones also run before a launch, from few probes."""

    name: str
    run: Callable[[Situation], Iterable[CheckResult]]
    quick: bool = True


def on_node(node: str, command: str) -> str:
    """A command as the user types it to run it on a node; ``-t`` lets sudo ask its password."""
    return command if node == LOCALHOST else f"ssh -t {node} {command}"


def spread(values: Mapping[str, str]) -> str:
    """``a has 1, b and c have 2``, for messages about nodes that differ."""
    holders: dict[str, list[str]] = {}
    for node, value in values.items():
        holders.setdefault(value, []).append(node)
    parts = [
        f"{' and '.join(nodes)} {'have' if len(nodes) > 1 else 'has'} {value}"
        for value, nodes in holders.items()
    ]
    return ", ".join(parts)
