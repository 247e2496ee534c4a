"""Ends what is left of a run on its nodes, and checks that nothing is.

A node may be out of reach: then its own guard ends what is there, since it hears nothing more from
the leader's guard either. Nobody is kept waiting for such a node longer than for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

from k2cli.agent.run_processes import RunProcess
from k2cli.errors import ClusterError
from k2cli.nodes.node import REACH_SECONDS, Node


class Reaching:
    """Which nodes answer: asked of all at once, from the moment that this is made.

    Args:
        nodes: by name.
    """

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self._nodes = nodes
        self._tasks = {name: asyncio.create_task(_reach(node)) for name, node in nodes.items()}

    async def clear(
        self,
        run_id: str,
        *,
        answered: Collection[str] = (),
        spared: Mapping[str, int] | None = None,
    ) -> dict[str, str]:
        """SIGKILL what lives of a run on every node, and remove what its guards have not read.

        Args:
            run_id: the run.
            answered: nodes that are known to be in reach, however long they take.
            spared: node to the id of a process that stays there.

        Returns:
            Node to what is wrong there, where something is.
        """
        found = await asyncio.gather(
            *(
                self._clear(name, run_id, (spared or {}).get(name), known=name in answered)
                for name in self._nodes
            )
        )
        return {name: problem for name, problem in zip(self._nodes, found, strict=True) if problem}

    async def _clear(self, name: str, run_id: str, spared: int | None, *, known: bool) -> str:
        problem = await self._tasks[name]
        if problem and not known:
            return f"{problem}; its guard ends what is there"
        return await _clear(self._nodes[name], run_id, spared)


async def _reach(node: Node) -> str:
    """Why a node does not answer; empty if it does."""
    try:
        await asyncio.to_thread(node.reach, REACH_SECONDS)
    except ClusterError as error:
        return error.message
    return ""


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
