"""The guards that a supervisor on standby has started before the run was prepared."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from k2cli.cluster.launchers import direct_commands
from k2cli.cluster.nodes import LocalNode

STANDBY = "--standby="
"""The supervisor's option, with the number of ranks."""

_END_SECONDS = 3.0
WarmGuards = dict[int, asyncio.subprocess.Process]


async def stand_by(folder: Path, size: int) -> WarmGuards | None:
    """Start the guards of a run on this machine, and wait for the launch to be prepared.

    Args:
        folder: the run's, which need not exist yet.
        size: how many ranks it has.

    Returns:
        The guards by rank; None if there will be no run, with every guard gone.
    """
    node = LocalNode()
    commands = direct_commands(folder.name, [node] * size)
    guards = {
        command.ranks[0]: await node.start((*command.arguments, "--standby"))
        for command in commands
    }
    called = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(0, called.set)
    await called.wait()
    loop.remove_reader(0)
    if os.read(0, 1):
        return guards
    await _end(guards)
    return None


async def _end(guards: Mapping[int, asyncio.subprocess.Process]) -> None:
    """A guard ends with its stdin, and ends its rank; it is killed only if it does not."""
    for process in guards.values():
        if process.stdin is not None:
            process.stdin.close()
    waits = [asyncio.create_task(process.wait()) for process in guards.values()]
    _, late = await asyncio.wait(waits, timeout=_END_SECONDS)
    for process in guards.values():
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    if late:
        await asyncio.wait(late, timeout=_END_SECONDS)


def called_up(process: asyncio.subprocess.Process | None) -> asyncio.subprocess.Process | None:
    """Give a guard the sign to read its bootstrap; None if there is none, or it has ended."""
    if process is None or process.returncode is not None or process.stdin is None:
        return None
    process.stdin.write(b"\n")
    return process
