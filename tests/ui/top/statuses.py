"""Statuses of invented runs for tests of the live view."""

from __future__ import annotations

from typing import Any

from k2cli.client.status_document import StatusDocument, status_document
from k2cli.client.status_watch import Observation
from k2cli.ui.top.state import TopState
from k2cli.units import GB

INTERFACES = ["studio-a: en5 169.254.1.1", "studio-b: en5 169.254.1.2"]


def rank(number: int, used_gb: float, **changed: Any) -> dict[str, Any]:
    memory = {
        "used_bytes": int(used_gb * GB), "kept_bytes": 8 * GB, "peak_bytes": 431 * GB,
        "resident_bytes": 12 * GB, "planned_bytes": 464 * GB, "limit_bytes": 480 * GB,
    }  # fmt: skip
    return {
        "rank": number, "node": f"studio-{'ab'[number]}", "phase": "busy",
        "layers": [number * 31, number * 30 + 31], "progress_age_seconds": 0.2, "memory": memory,
    } | changed  # fmt: skip


def request(state: str, **changed: Any) -> dict[str, Any]:
    return {
        "id": "9f0a1b2c", "dialect": "chat", "key": "alice", "state": state,
        "queue_position": None, "prompt_tokens_done": 0, "prompt_tokens": 8192,
        "cached_tokens": 0, "generated_tokens": 0, "tokens_per_second": None, "age_seconds": 12.3,
    } | changed  # fmt: skip


REQUESTS = [
    request("decode", prompt_tokens_done=8192, cached_tokens=6144, generated_tokens=412,
            tokens_per_second=18.36, age_seconds=95.1),
    request("prefill", key="bob", prompt_tokens_done=2048, id="11112222"),
    request("queued", key="", dialect="messages", queue_position=1, prompt_tokens=131_000,
            id="33334444", age_seconds=3700.0),
]  # fmt: skip


def document(**changed: Any) -> StatusDocument:
    return status_document(members(**changed))


def members(**changed: Any) -> dict[str, Any]:
    return {
            "schema_version": 1, "run_id": "kimi-k2-1a2b", "version": "0.1.0",
            "model": {"name": "kimi-k2", "aliases": [], "context_length": 131_072},
            "state": "ready", "cause": "", "began": 0.0, "uptime_seconds": 7380.0, "attempt": 2,
            "link": {"transport": "jaccl", "strategy": "pipeline",
                     "reason": "RDMA over Thunderbolt works between all nodes",
                     "interfaces": INTERFACES},
            "ranks": [rank(0, 412.1), rank(1, 398.7, phase="waiting")],
            "kv_cache": {"budget_tokens": 262_144, "reserved_tokens": 147_456,
                         "prefix_tokens": 12_288, "prefixes": 3},
            "requests": {"reading": 0, "queued": 1, "prefill": 1, "decode": 1,
                         "oldest_wait_seconds": 3.2, "listed": REQUESTS},
            "totals": {"requests": {"completed": 118, "failed": 1, "client_gone": 2},
                       "prompt_tokens": 100_000, "cached_tokens": 63_000,
                       "cache_hit_share": 0.63, "cache_hits": 4, "queue": {"count": 10}},
            "throughput": {"window_seconds": 5, "completion_tokens_per_second": 18.36,
                           "prompt_tokens_per_second": 212.5},
    } | changed  # fmt: skip


def watched(*rates: float | None, interval_seconds: float = 1.0) -> TopState:
    """Return the state after observations with these rates, the last one at second 100.

    None stands for a run that did not answer.
    """
    state = TopState("run kimi-k2-1a2b", interval_seconds, 0.0)
    for number, rate in enumerate(rates):
        at = 100.0 - (len(rates) - 1 - number) * interval_seconds
        throughput = {"completion_tokens_per_second": rate, "prompt_tokens_per_second": 212.5}
        state.observe(
            Observation(at, problem="nothing answers")
            if rate is None
            else Observation(at, document(throughput=throughput))
        )
    return state
