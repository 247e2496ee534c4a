"""Decide when a failed run is started again: after which pause, or not at all.

Failures are counted until an attempt has served for long enough, not within a time window: a model
that takes minutes to load could fail for ever without two failures in one window.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Mode = Literal["never", "on-failure"]


class RestartPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits and pauses of restarts.

    The run is given up after ``limit`` failures without ``stable_seconds`` of service between
    them. The first pause is ``first_delay_seconds``, each later one ``factor`` times longer.
    """

    mode: Mode = "never"
    limit: int = 3
    stable_seconds: float = 600.0
    first_delay_seconds: float = 2.0
    factor: float = 5.0


class Attempts:
    """The failures of one run that count towards the limit."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._failures: list[str] = []

    @property
    def first_cause(self) -> str:
        """Cause of the first failure that counts; empty if there is none."""
        return self._failures[0] if self._failures else ""

    @property
    def failures(self) -> int:
        return len(self._failures)

    def failed(self, cause: str, served_seconds: float) -> float | None:
        """Count a failure; return the pause before the next attempt, or None to give up."""
        if self._policy.mode == "never":
            return None
        if served_seconds >= self._policy.stable_seconds:
            self._failures.clear()
        self._failures.append(cause)
        if len(self._failures) >= self._policy.limit:
            return None
        power = self._policy.factor ** (len(self._failures) - 1)
        return float(self._policy.first_delay_seconds * power)
