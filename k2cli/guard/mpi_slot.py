"""A rank's slot in an MPI job, for the guard: wait for mpirun's process, and release it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path

import psutil

from k2cli.errors import ClusterError
from k2cli.protocol.wire import ConnectionLost
from k2cli.protocol.wire_streams import AsyncChannel
from k2cli.scratch import make_scratch
from k2cli.system.processes import command_of

# Sent with the environment of a slot process: the id of its parent process.
PARENT_NAME = "K2_MPI_SLOT_PARENT"
_MPI_LAUNCHERS = frozenset({"mpirun", "prterun", "mpiexec", "orterun"})


def slot_name(rank: int) -> str:
    """Return the name of the socket where a guard waits for its slot process."""
    return f"mpi-slot-{rank}"


class MpiSlot:
    """One rank's slot in the MPI job. Call ``take`` once, and ``leave`` at the end."""

    def __init__(self, run_id: str, rank: int) -> None:
        self._run_id = run_id
        self._rank = rank
        self._folder: Path | None = None
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._environment: asyncio.Future[dict[str, str]] = (
            asyncio.get_running_loop().create_future()
        )
        self._parent = 0
        self.lost = asyncio.Event()

    async def take(self) -> dict[str, str]:
        """Wait for mpirun's process, and return the environment that makes a rank part of the job.

        Raises:
            ClusterError: if the socket or its folder cannot be made.
        """
        self._folder = make_scratch(self._run_id)
        path = str(self._folder / slot_name(self._rank))
        try:
            self._server = await asyncio.start_unix_server(self._accept, path)
        except OSError as error:
            raise ClusterError(f"cannot listen at {path}: {error}") from error
        return await self._environment

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._writer is not None:
            writer.close()
            return
        self._writer = writer
        channel: AsyncChannel[dict[str, str]] = AsyncChannel(reader, writer, dict[str, str])
        # Cancelled when the guard ends; asyncio would log that as an error in the run's log.
        with contextlib.suppress(ConnectionLost, asyncio.CancelledError):
            environment = await channel.receive()
            self._parent = int(environment.pop(PARENT_NAME, "0"))
            if not self._environment.done():
                self._environment.set_result(environment)
            await reader.read()  # returns when the process ends
        self.lost.set()

    def leave(self) -> None:
        """Close the connection, upon which mpirun's process exits; remove the socket's folder."""
        if self._server is not None:
            self._server.close()
        if self._writer is not None:
            self._writer.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def end_daemons(self) -> None:
        """Kill the daemons with which mpirun started the slot process from another machine.

        Needed if that machine cannot be reached: a daemon notices it only when TCP gives up, after
        many minutes. Daemons carry the run's id on their command lines. An mpirun that is itself
        the parent of the slot process is left to the launcher that started it.
        """
        with contextlib.suppress(psutil.Error, ValueError):
            parent = psutil.Process(self._parent)
            for process in (parent, *parent.parents()):
                if process.name() in _MPI_LAUNCHERS or self._run_id not in command_of(process):
                    return
                process.kill()
