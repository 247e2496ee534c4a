"""The run as its server shows it: its state, and its ranks with their memory.

``run_watch`` makes it of what the guards report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from k2cli import __version__
from k2cli.protocol import KvCacheUse
from k2cli.server.engine_client import EngineClient

ShownState = Literal["starting", "ready", "restarting", "stopping"]
"""``restarting``: after a failure, until the next attempt is ready."""


@dataclass(frozen=True, slots=True)
class RankView:
    """One rank. Memory is in bytes, 0 if it is not known yet.

    Attributes:
        device: a ``choices.Device``, or empty; ``gpu`` describes the NVIDIA GPU of the rank.
        layers: half-open range of the decoder layers that it holds, whole or in slices.
        phase: a ``protocol.progress_page.Phase``; empty until its guard has reported.
        steps: its counter of progress, which also counts while it is idle.
        progress_seconds: time since the counter moved; None until its guard has reported.
        used_bytes: arrays of MLX, at the last step; ``kept_bytes`` is memory of freed arrays that
            MLX keeps for new ones.
        peak_bytes: the most that arrays of MLX have held at once.
        resident_bytes: memory of its process as the system counts it.
        planned_bytes: memory that the plan gives it in all; ``limit_bytes`` is the limit.
        planned_weights_bytes, planned_cache_bytes, planned_activation_bytes,
        planned_overhead_bytes: the parts of the plan.
        loaded_bytes, load_bytes: weights that it has loaded so far, and all of its own.
    """

    rank: int
    node: str
    device: str = ""
    gpu: str = ""
    layers: tuple[int, int] | None = None
    phase: str = ""
    steps: int = 0
    progress_seconds: float | None = None
    used_bytes: int = 0
    kept_bytes: int = 0
    peak_bytes: int = 0
    resident_bytes: int = 0
    planned_bytes: int = 0
    limit_bytes: int = 0
    planned_weights_bytes: int = 0
    planned_cache_bytes: int = 0
    planned_activation_bytes: int = 0
    planned_overhead_bytes: int = 0
    loaded_bytes: int = 0
    load_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RunView:
    """A run at one moment.

    Attributes:
        cause: reason for a state other than ``ready``.
        attempt: number of its present start, from 1.
        transport_reason: the reason of the launch for the transport.
        interfaces: those by which the ranks reach each other, in words.
        cache_use: of the KV cache; None until the leader rank is ready.
    """

    run_id: str
    state: ShownState
    cause: str = ""
    attempt: int = 1
    version: str = __version__
    strategy: str = ""
    transport: str = ""
    transport_reason: str = ""
    interfaces: tuple[str, ...] = ()
    ranks: tuple[RankView, ...] = ()
    cache_use: KvCacheUse | None = None

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes, each once."""
        return tuple(dict.fromkeys(rank.node for rank in self.ranks))


class RunSource(Protocol):
    """Source of the present view of a run."""

    def view(self) -> RunView:
        """Return the run as it is now."""
        ...


class UnwatchedRun:
    """A run of which only the state of its engine is known."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def view(self) -> RunView:
        """Return the run without ranks."""
        state = shown_state(self._engine, attempt=1, restarts=False)
        return RunView("", state, self._engine.cause)


def shown_state(engine: EngineClient, *, attempt: int, restarts: bool) -> ShownState:
    """Return the state of a run.

    Args:
        engine: the run's engine.
        attempt: number of the present start.
        restarts: True if the run starts again after a failure.
    """
    match engine.state:
        case "ready":
            return "ready"
        case "starting":
            return "starting" if attempt == 1 else "restarting"
        case "failed" if restarts:
            return "restarting"
        case _:
            return "stopping"
