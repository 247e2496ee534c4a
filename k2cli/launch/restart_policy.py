"""When a failed run is started again: after which pause, and when it is given up.

An attempt that served for long enough wipes the slate clean. Without that, failures add up, however
long each took to load: a window in time alone would let a model that needs minutes fail for ever.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from k2cli.protocol import Assignment, Bootstrap, HttpEndpoint

Mode = Literal["never", "on-failure"]


class RestartPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``limit`` failures without ``stable_seconds`` of service between them are the end.

    The pause before the second attempt is ``first_delay_seconds``, and ``factor`` times longer
    before each one after it.
    """

    mode: Mode = "never"
    limit: int = 3
    stable_seconds: float = 600.0
    first_delay_seconds: float = 2.0
    factor: float = 5.0


class Attempts:
    """What is known of the attempts of one run."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._failures: list[str] = []

    @property
    def first_cause(self) -> str:
        """Of the failures that count; empty if there is none."""
        return self._failures[0] if self._failures else ""

    @property
    def failures(self) -> int:
        """How many there were without long enough a service between them."""
        return len(self._failures)

    def failed(self, cause: str, served_seconds: float) -> float | None:
        """Take note of a failure; returns the pause before the next attempt, or None to give up."""
        if self._policy.mode == "never":
            return None
        if served_seconds >= self._policy.stable_seconds:
            self._failures.clear()
        self._failures.append(cause)
        if len(self._failures) >= self._policy.limit:
            return None
        power = self._policy.factor ** (len(self._failures) - 1)
        return float(self._policy.first_delay_seconds * power)


def renewed(
    bootstraps: Sequence[Bootstrap],
    free_ports: Callable[[str, int], list[int]],
    *,
    http_port: int | None = None,
    hold: str | None = None,
) -> list[Bootstrap]:
    """The bootstraps of the next attempt: a new secret and new ports, the API's port as it was.

    Args:
        bootstraps: of the attempt before, one per rank.
        free_ports: ``(node, count)`` to ports that are free there.
        http_port: the port that the API got, if it is known.
        hold: for a fresh guard of the leader: the cause to answer with until it is told to begin.
    """
    liveness_port, ring, coordinator = _new_addresses(bootstraps[0].assignment, free_ports)
    secret = secrets.token_hex(32)
    return [
        replace(
            bootstrap,
            assignment=replace(
                bootstrap.assignment, ring_hosts=ring, jaccl_coordinator=coordinator
            ),
            secret=secret,
            liveness_port=liveness_port,
            http=_on_port(bootstrap.http, http_port),
            hold=hold,
        )
        for bootstrap in bootstraps
    ]


def _new_addresses(
    assignment: Assignment, free_ports: Callable[[str, int], list[int]]
) -> tuple[int, list[list[str]] | None, str | None]:
    """A port for liveness, and the addresses of ring and coordinator with new ports, if any."""
    names = assignment.nodes
    leader = names[0]
    ports = {
        name: iter(free_ports(name, names.count(name) + 2 * (name == leader)))
        for name in dict.fromkeys(names)
    }
    liveness_port, coordinator_port = next(ports[leader]), next(ports[leader])
    ring = None
    if assignment.ring_hosts is not None:
        ring = [
            [_with_port(address, next(ports[name])) for address in addresses]
            for name, addresses in zip(names, assignment.ring_hosts, strict=True)
        ]
    coordinator = assignment.jaccl_coordinator
    if coordinator is not None:
        coordinator = _with_port(coordinator, coordinator_port)
    return liveness_port, ring, coordinator


def _on_port(http: HttpEndpoint | None, port: int | None) -> HttpEndpoint | None:
    if http is None or port is None:
        return http
    return replace(http, port=port, next_port_will_do=False)


def _with_port(address: str, port: int) -> str:
    return f"{address.rpartition(':')[0]}:{port}"
