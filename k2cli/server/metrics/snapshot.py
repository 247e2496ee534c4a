"""A run and its requests at one moment, for metrics and status."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from k2cli.server.context import ServerContext
from k2cli.server.metrics.activity import Activity
from k2cli.server.metrics.request_record import RequestRecord, Stage
from k2cli.server.metrics.run_view import RunView


@dataclass(slots=True)
class WaitingRequests:
    """The requests of one key that wait."""

    count: int = 0
    oldest_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run and its requests. ``now`` is of the monotonic clock.

    Attributes:
        positions: of the waiting requests in the queue, by their ids in the engine.
    """

    run: RunView
    model: str
    activity: Activity
    positions: dict[str, int] = field(default_factory=dict)
    now: float = field(default_factory=time.monotonic)

    @property
    def uptime_seconds(self) -> float:
        """Time since the start of the API."""
        return self.now - self.activity.began_at

    @property
    def requests(self) -> tuple[RequestRecord, ...]:
        """The requests in progress, oldest first."""
        return tuple(self.activity.live.values())

    @property
    def stages(self) -> Counter[Stage]:
        """The number of requests in each stage."""
        return Counter(record.stage for record in self.requests)

    @property
    def oldest_wait_seconds(self) -> float:
        """Time that the longest waiting request has waited; 0 if none waits."""
        since = [
            record.queued_at
            for record in self.requests
            if record.stage == "queued" and record.queued_at is not None
        ]
        return self.now - min(since) if since else 0.0

    def waiting_by_key(self) -> dict[str, WaitingRequests]:
        """Return what waits by the name of its key, for all keys that have sent a request."""
        totals = self.activity.totals
        found = {name: WaitingRequests() for name in totals.by_key}
        for record in self.requests:
            if record.stage == "queued" and record.queued_at is not None:
                key = found.setdefault(totals.counted_as(record.key), WaitingRequests())
                key.count += 1
                key.oldest_seconds = max(key.oldest_seconds, self.now - record.queued_at)
        return found


def snapshot_of(context: ServerContext) -> Snapshot:
    """Take a snapshot of a server."""
    return Snapshot(
        context.run.view(), context.served.name, context.activity, context.waiting.positions()
    )
