"""The reports of all guards about their ranks, from which metrics and status are made.

Every guard reports its rank once a second (``protocol.RankStatus``); those on other hosts do so
over their connections to the leader's guard, which serves the API.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from k2cli.protocol import (
    Bootstrap,
    KvCacheUse,
    LoadProgress,
    PlannedRank,
    RankReady,
    RankStatus,
)
from k2cli.server.engine_client import EngineClient
from k2cli.server.metrics.run_view import RankView, RunView, shown_state

_NOT_PLANNED = PlannedRank(0, 0)


@dataclass(slots=True)
class _Rank:
    """Reports about one rank. ``moved_at`` is of the monotonic clock."""

    status: RankStatus | None = None
    moved_at: float = 0.0
    loaded_bytes: int = 0
    load_bytes: int = 0


class RunWatch:
    """The reports about the ranks of the present attempt: a ``RunSource``.

    Args:
        bootstrap: of the first attempt.
        engine: knows its state.
    """

    def __init__(self, bootstrap: Bootstrap, engine: EngineClient) -> None:
        self._engine = engine
        self._ranks: list[_Rank] = []
        self.begin_attempt(bootstrap)

    def begin_attempt(self, bootstrap: Bootstrap) -> None:
        """Forget what was reported about the attempt before."""
        self._bootstrap = bootstrap
        self._ranks = [_Rank() for _ in range(bootstrap.assignment.size)]
        self._cache_use: KvCacheUse | None = None

    def note(self, report: RankStatus | LoadProgress | RankReady) -> None:
        """Record a report about a rank; ignore one about a rank that does not exist."""
        if not 0 <= report.rank < len(self._ranks):
            return
        rank = self._ranks[report.rank]
        match report:
            case RankStatus(steps=steps, phase=phase):
                before = rank.status
                if before is None or (before.steps, before.phase) != (steps, phase):
                    rank.moved_at = time.monotonic()
                rank.status = report
            case LoadProgress(phase="loading"):
                rank.loaded_bytes, rank.load_bytes = report.done_bytes, report.total_bytes
            case RankReady(weights_bytes=size):
                rank.loaded_bytes = rank.load_bytes = size
            case _:
                pass

    def note_cache_use(self, use: KvCacheUse) -> None:
        """Record what the leader rank reports about the KV cache."""
        self._cache_use = use

    def view(self) -> RunView:
        """Return the run as it is now."""
        bootstrap, engine = self._bootstrap, self._engine
        assignment, planned = bootstrap.assignment, bootstrap.planned
        return RunView(
            assignment.run_id,
            shown_state(engine, attempt=bootstrap.attempt, restarts=bootstrap.restarts),
            engine.cause,
            bootstrap.attempt,
            strategy=assignment.strategy,
            transport=assignment.transport,
            transport_reason=planned.transport_reason if planned else "",
            interfaces=tuple(planned.interfaces) if planned else (),
            ranks=tuple(self._rank_view(number) for number in range(len(self._ranks))),
            cache_use=self._cache_use,
        )

    def _rank_view(self, number: int) -> RankView:
        assignment, planned = self._bootstrap.assignment, self._bootstrap.planned
        rank = self._ranks[number]
        known = planned is not None and number < len(planned.ranks)
        plan = planned.ranks[number] if planned is not None and known else _NOT_PLANNED
        status = rank.status
        view = RankView(
            number,
            assignment.nodes[number],
            plan.device,
            plan.gpu,
            assignment.layers[number] if number < len(assignment.layers) else None,
            planned_bytes=plan.total_bytes,
            limit_bytes=plan.limit_bytes,
            planned_weights_bytes=plan.weights_bytes,
            planned_cache_bytes=plan.kv_cache_bytes,
            planned_activation_bytes=plan.activation_bytes,
            planned_overhead_bytes=plan.overhead_bytes,
            loaded_bytes=rank.loaded_bytes,
            load_bytes=rank.load_bytes,
        )
        return view if status is None else _with_status(view, status, rank.moved_at)


def _with_status(view: RankView, status: RankStatus, moved_at: float) -> RankView:
    return replace(
        view,
        phase=status.phase,
        steps=status.steps,
        progress_seconds=time.monotonic() - moved_at,
        used_bytes=status.mlx_bytes,
        kept_bytes=status.mlx_cached_bytes,
        peak_bytes=status.mlx_peak_bytes,
        resident_bytes=status.resident_bytes,
    )
