"""A server whose log lines and metrics a test can read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from k2cli.server.engine_client import RequestQueue
from k2cli.server.metrics.activity import Activity
from k2cli.server.metrics.run_view import RunSource
from k2cli.server.served_model import ServedModel
from tests.server.requests import SERVED
from tests.server.scripted import ScriptedEngine, serving

Labels = frozenset[tuple[str, str]]
Samples = dict[str, dict[Labels, float]]


@dataclass
class WatchedServer:
    """A server over a scripted engine, and what it has logged."""

    engine: ScriptedEngine
    url: str
    activity: Activity
    lines: list[str] = field(default_factory=list)
    waiting: RequestQueue = field(default_factory=RequestQueue)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=10, verify=False)

    def samples(self, **headers: str) -> Samples:
        """Scrape once no request is in progress; return the samples by name and labels."""
        self.wait(lambda: not self.activity.live)
        return samples_of(self.get("/metrics", **headers).text)

    def status(self) -> Any:
        return self.get("/v1/status").json()

    def wait(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < until, self.lines
            time.sleep(0.01)


def samples_of(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def total(samples: Samples, name: str, **labels: str) -> float:
    """Return the sum of the samples that have these labels."""
    return sum(value for key, value in samples[name].items() if set(labels.items()) <= key)


@contextmanager
def watched(served: ServedModel = SERVED, run: RunSource | None = None) -> Iterator[WatchedServer]:
    engine, lines = ScriptedEngine(), list[str]()
    activity = Activity(lines.append)
    waiting = RequestQueue()
    with serving(engine, served, activity=activity, run=run, waiting=waiting) as url:
        yield WatchedServer(engine, url, activity, lines, waiting)
