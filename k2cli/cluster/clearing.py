"""Ends what is left of a run on its nodes, and checks that nothing is."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from k2cli.cluster.agent import RunProcess
from k2cli.cluster.nodes import Node
from k2cli.errors import ClusterError


async def clear_nodes(
    nodes: Mapping[str, Node], run_id: str, spared: Mapping[str, int] | None = None
) -> dict[str, str]:
    """SIGKILL what lives of a run on every node, and remove what its guards have not read.

    Args:
        nodes: by name.
        run_id: the run.
        spared: node to the id of a process that stays there.

    Returns:
        Node to what is wrong there, where something is.
    """
    found = await asyncio.gather(
        *(_clear(node, run_id, (spared or {}).get(name)) for name, node in nodes.items())
    )
    return {name: problem for name, problem in zip(nodes, found, strict=True) if problem}


async def _clear(node: Node, run_id: str, spared: int | None) -> str:
    kept = [str(spared)] if spared is not None else []
    try:
        left: list[RunProcess] = await asyncio.to_thread(
            node.ask, list[RunProcess], "kill", run_id, *kept
        )
        await asyncio.to_thread(node.remove_bootstraps, run_id)
    except ClusterError as error:
        return error.message
    return ", ".join(f"process {process.pid} could not be ended" for process in left)
