"""Kill the remaining processes of a run on its nodes, and check that none is left.

If a node cannot be reached, its own guard ends the processes there, because it hears nothing more
from the leader's guard. So the supervisor does not wait long for such a node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

from k2cli.agent.run_processes import RunProcess
from k2cli.errors import ClusterError
from k2cli.nodes.node import REACH_SECONDS, Node


class RunKiller:
    """Kills the processes of a run. All nodes are contacted at once when it is created.

    Args:
        run_id: the run.
        nodes: those of the run, by name.
    """

    def __init__(self, run_id: str, nodes: Mapping[str, Node]) -> None:
        self._run_id = run_id
        self._nodes = nodes
        self._tasks = {name: asyncio.create_task(_reach(node)) for name, node in nodes.items()}

    async def kill(
        self, *, answered: Collection[str] = (), spared: Mapping[str, int] | None = None
    ) -> dict[str, str]:
        """SIGKILL the run's processes on every node, and remove bootstraps that no guard has read.

        Args:
            answered: nodes that are known to be reachable, so there is no time limit for them.
            spared: node to the id of a process that stays there.

        Returns:
            Node to problem, for each node with a problem.
        """
        found = await asyncio.gather(
            *(
                self._kill_on(name, (spared or {}).get(name), known=name in answered)
                for name in self._nodes
            )
        )
        return {name: problem for name, problem in zip(self._nodes, found, strict=True) if problem}

    async def _kill_on(self, name: str, spared: int | None, *, known: bool) -> str:
        problem = await self._tasks[name]
        if problem and not known:
            return f"{problem}; its guard ends the processes there"
        return await _kill(self._nodes[name], self._run_id, spared)


async def _reach(node: Node) -> str:
    """Return the reason why a node does not answer; empty if it answers."""
    try:
        await asyncio.to_thread(node.reach, REACH_SECONDS)
    except ClusterError as error:
        return error.message
    return ""


async def _kill(node: Node, run_id: str, spared: int | None) -> str:
    kept = [str(spared)] if spared is not None else []
    try:
        left: list[RunProcess] = await asyncio.to_thread(
            node.ask, list[RunProcess], "kill", run_id, *kept
        )
        await asyncio.to_thread(node.remove_bootstraps, run_id)
    except ClusterError as error:
        return error.message
    return ", ".join(f"process {process.pid} could not be killed" for process in left)
