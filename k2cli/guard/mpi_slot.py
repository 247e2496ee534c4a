"""The guard's side of a slot in an MPI job: waits for mpirun's process, and lets it go."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat

import psutil

from k2cli.errors import ClusterError
from k2cli.protocol.wire import ConnectionLost
from k2cli.protocol.wire_streams import AsyncChannel
from k2cli.settings import scratch_directory

# Beside the environment that a slot hands over: the process id of the slot's parent.
PARENT_NAME = "K2_MPI_SLOT_PARENT"
_LAUNCHERS = frozenset({"mpirun", "prterun", "mpiexec", "orterun"})


def slot_path(run_id: str, rank: int) -> str:
    """Where the guard of a rank waits for its slot: a socket in a folder of this user's alone."""
    return str(scratch_directory(run_id) / f"mpi-slot-{rank}")


def _private_folder(run_id: str) -> None:
    """Make the folder, or take the one that another guard or mpirun has made.

    Raises:
        ClusterError: if it is another user's, or open to others.
    """
    folder = scratch_directory(run_id)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ClusterError(f"{folder} is not a folder of this user's alone")


class MpiSlot:
    """One rank's place in the MPI job. ``take`` once, ``leave`` at the end."""

    def __init__(self, run_id: str, rank: int) -> None:
        self._run_id = run_id
        self._rank = rank
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._environment: asyncio.Future[dict[str, str]] = (
            asyncio.get_running_loop().create_future()
        )
        self._parent = 0
        self.lost = asyncio.Event()

    async def take(self) -> dict[str, str]:
        """Wait for mpirun's process; returns the environment that makes a rank part of the job.

        Raises:
            ClusterError: if the socket cannot be made.
        """
        _private_folder(self._run_id)
        path = slot_path(self._run_id, self._rank)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of the attempt before
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
        # Cancelled at the guard's end; asyncio would log that as an error, in the run's log.
        with contextlib.suppress(ConnectionLost, asyncio.CancelledError):
            environment = await channel.receive()
            self._parent = int(environment.pop(PARENT_NAME, "0"))
            if not self._environment.done():
                self._environment.set_result(environment)
            await reader.read()  # says nothing more; ends when it does
        self.lost.set()

    def leave(self) -> None:
        """Let mpirun's process go."""
        if self._server is not None:
            self._server.close()
        if self._writer is not None:
            self._writer.close()

    def end_daemons(self) -> None:
        """SIGKILL the daemons by which mpirun started the slot from another machine.

        For when that machine is out of reach: a daemon notices it only when TCP gives up, after
        many minutes. They carry the run's id on their command lines; where mpirun itself is the
        slot's parent, the launcher that started it ends it.
        """
        with contextlib.suppress(psutil.Error, ValueError):
            parent = psutil.Process(self._parent)
            for process in (parent, *parent.parents()):
                if process.name() in _LAUNCHERS or self._run_id not in process.cmdline():
                    return
                process.kill()
