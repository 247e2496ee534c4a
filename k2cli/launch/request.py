"""The request of a launch, and the names of the nodes that it means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from k2cli.choices import Head, Parallel, WantedFloatType, WantedTransport
from k2cli.errors import UsageError
from k2cli.launch.restart_policy import RestartPolicy
from k2cli.nodes.node import LOCALHOST
from k2cli.protocol import Deadlines

if TYPE_CHECKING:
    from k2cli.cluster.description import Cluster
    from k2cli.planning.plan import Plan


DEFAULT_WORKER = "k2cli.rank.main"


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """The options of a launch. None and ``auto`` leave the choice to k2."""

    model: str
    nodes: tuple[str, ...] | None = None
    transport: WantedTransport = "auto"
    parallel: Parallel = "auto"
    dtype: WantedFloatType = "auto"
    head: Head = "auto"
    context_length: int | None = None
    concurrency: int | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    api_key: str | None = None
    plan_file: Path | None = None
    force: bool = False
    cluster: str | None = None
    share: bool = False
    wait_seconds: float = 0.0
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    fast_synch: bool = False
    deadlines: Deadlines = field(default_factory=Deadlines)
    worker: str = DEFAULT_WORKER


def node_names(request: LaunchRequest, plan: Plan | None, cluster: Cluster | None) -> Sequence[str]:
    """Return the nodes of ``--nodes``, else those of the cluster or the plan, else this machine.

    Raises:
        UsageError: if a name is invalid, or the plan is for machines of the catalog.
    """
    if request.nodes is not None:
        if not all(request.nodes):
            raise UsageError(f"--nodes '{','.join(request.nodes)}' has an empty name")
        if odd := [name for name in request.nodes if name.startswith("-") or " " in name]:
            raise UsageError(f"'{odd[0]}' is not a valid name of a node")
        return request.nodes
    if cluster is not None:
        return [node.name for node in cluster.nodes]
    if plan is None:
        return [LOCALHOST]
    names = [part.node for part in plan.placement.ranks]
    if any("/" in name for name in names):
        # Names such as m3-ultra-512/1 are machines of the catalog.
        raise UsageError(
            f"the plan is for {', '.join(names)}, which are machines of the catalog",
            f"--nodes {','.join([LOCALHOST] * len(names))}",
        )
    return names
