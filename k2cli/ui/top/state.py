"""State of the live view: the latest status of a run, and a history of its rate of tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from k2cli.client.status_document import StatusDocument
    from k2cli.client.status_watch import Observation

HISTORY_SAMPLES = 240
_LATE_INTERVALS = 3
_LATE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Sample:
    """The rate of generated tokens per second at a moment; None if the run did not answer."""

    at: float
    tokens_per_second: float | None


@dataclass(slots=True)
class TopState:
    """The observations of a run. Times are of the monotonic clock.

    Attributes:
        place: the server or run that is watched, in words.
        interval_seconds: the pause between two observations.
        began: the start of the view.
        document: the latest status that has come.
        answered_at: when it came.
        problem: the reason for which none has come since then.
        history: the last ``HISTORY_SAMPLES`` samples, oldest first.
    """

    place: str
    interval_seconds: float
    began: float
    document: StatusDocument | None = None
    answered_at: float | None = None
    problem: str = ""
    history: deque[Sample] = field(default_factory=lambda: deque(maxlen=HISTORY_SAMPLES))

    def observe(self, observation: Observation) -> None:
        """Take in an observation."""
        document = observation.document
        self.problem = observation.problem
        rate = None
        if document is not None:
            if self.document is not None and self.document.run_id != document.run_id:
                self.history.clear()
            self.document, self.answered_at = document, observation.at
            rate = document.throughput.completion_tokens_per_second
        self.history.append(Sample(observation.at, rate))

    def silent_seconds(self, now: float) -> float | None:
        """Return for how long the run has not answered; None if the latest status is new."""
        silence = now - (self.began if self.answered_at is None else self.answered_at)
        late = silence > max(_LATE_SECONDS, _LATE_INTERVALS * self.interval_seconds)
        return silence if self.problem or late else None
