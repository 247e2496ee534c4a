"""Input and output of checks: the situation of a cluster, and results with hints.

A check is a pure function of a ``Situation``, so recorded probes give the same results as the
machines.
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
    """One finding. ``node`` is None if it is about the cluster; ``hint`` tells how to fix it.

    ``skip`` means that the check could not be made; ``detail`` is the reason.
    """

    status: Status
    name: str
    node: str | None
    detail: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """Memory that a plan needs on one node, in bytes, summed over its ranks there.

    ``ranks_bytes`` has the parts of the sum, for a machine that gives each rank a GPU.
    """

    total_bytes: int
    weights_bytes: int
    ranks_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything that the checks read.

    ``reference`` is the software of the launching machine; ``live_runs`` and ``ended_runs`` are
    from its records. ``needs`` maps a node to the memory that a plan needs there, and is empty
    without a plan. ``reaches``, ``links`` and ``disks`` are None if not measured.
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
        """Machines whose facts could be read, by node."""
        return {each.node: each.machine for each in self.nodes if each.machine is not None}

    @property
    def software(self) -> dict[str, Software]:
        """Software of the nodes on which k2 answers."""
        return {each.node: each.software for each in self.nodes if each.software is not None}

    @property
    def macs(self) -> dict[str, MachineFacts]:
        """Machines that run macOS, by node."""
        return {name: each for name, each in self.machines.items() if each.os_name == "macos"}


@dataclass(frozen=True, slots=True)
class Check:
    """A check of the registry. ``quick`` checks also run before a launch, with fewer probes."""

    name: str
    run: Callable[[Situation], Iterable[CheckResult]]
    quick: bool = True


def on_node(node: str, command: str) -> str:
    """Format a command for the user to run on a node; ``-t`` lets sudo ask for a password."""
    return command if node == LOCALHOST else f"ssh -t {node} {command}"


def spread(values: Mapping[str, str]) -> str:
    """Describe values that differ between nodes: ``a has 1, b and c have 2``."""
    holders: dict[str, list[str]] = {}
    for node, value in values.items():
        holders.setdefault(value, []).append(node)
    parts = [
        f"{' and '.join(nodes)} {'have' if len(nodes) > 1 else 'has'} {value}"
        for value, nodes in holders.items()
    ]
    return ", ".join(parts)
