"""What a supervisor is given: everything about a run that is decided before it starts.

It lies in the run's folder as ``launch.json`` (mode 0600, it holds the run's secret) until the run
has ended, so that ``launch --detach`` can hand a run to a supervisor in another process.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from k2cli.agent.run_folder import write_private
from k2cli.choices import Transport
from k2cli.errors import ClusterError
from k2cli.launch.restart_policy import RestartPolicy
from k2cli.protocol import Bootstrap, Deadlines

_NAME = "launch.json"


class RunSpecification(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One bootstrap per rank, in rank order, and how to start the guards.

    ``nodes`` are names, one per rank. ``scratch`` is mpirun's folder on this machine. ``worker``
    is the module that is a rank. ``networks`` are what MPI may use between machines.
    ``mpi_prefixes`` says where each node has its Open MPI; "" is this machine. ``locked``: locks
    of its nodes were taken, and are the supervisor's to give back.
    """

    run_id: str
    nodes: list[str]
    transport: Transport
    bootstraps: list[Bootstrap]
    worker: str
    scratch: str | None = None
    networks: list[str] = []
    mpi_prefixes: dict[str, str] = {}
    restart: RestartPolicy = RestartPolicy()
    locked: bool = False

    @property
    def deadlines(self) -> Deadlines:
        """The same for all ranks."""
        return self.bootstraps[0].deadlines


def save_specification(specification: RunSpecification) -> None:
    """Write it into the run's folder."""
    write_private(specification.run_id, _NAME, msgspec.json.encode(specification))


def read_specification(folder: Path) -> RunSpecification:
    """Read what ``save_specification`` wrote.

    Raises:
        ClusterError: if it is missing or of another version of k2.
    """
    try:
        return msgspec.json.decode((folder / _NAME).read_bytes(), type=RunSpecification)
    except (OSError, msgspec.MsgspecError) as error:
        raise ClusterError(f"{folder} holds no run that could be started: {error}") from error
