"""The request of a launch: the options of ``k2 launch`` as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from k2cli.choices import Head, Parallel, WantedFloatType, WantedTransport
from k2cli.launch.restart_policy import RestartPolicy
from k2cli.protocol import Deadlines

DEFAULT_WORKER = "k2cli.rank.main"


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """The options of a launch. None and ``auto`` leave the choice to k2."""

    model: str
    nodes: tuple[str, ...] | None = None
    transport: WantedTransport = "auto"
    parallel: Parallel = "auto"
    dtype: WantedFloatType = "auto"
    head: Head = "auto"
    context_length: int | None = None
    concurrency: int | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    plan_file: Path | None = None
    force: bool = False
    cluster: str | None = None
    share: bool = False
    wait_seconds: float = 0.0
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    fast_synch: bool = False
    deadlines: Deadlines = field(default_factory=Deadlines)
    worker: str = DEFAULT_WORKER
