"""What guards and ranks are told, for tests in which no model is loaded."""

from __future__ import annotations

from typing import Any

from k2cli.protocol import Assignment, Bootstrap

SECRET = "5e" * 32


def make_assignment(**fields: Any) -> Assignment:
    """Make a rank's assignment; what the fields do not say is the least that is valid."""
    size = fields.get("size", 1)
    least: dict[str, Any] = {
        "run_id": "demo-1", "rank": 0, "size": size, "nodes": ["a", "b", "c", "d"][:size],
        "transport": "local" if size == 1 else "ring", "model_path": "/nowhere",
        "strategy": "single" if size == 1 else "pipeline", "layers": [], "dtype": "float32",
        "context_length": 1, "concurrency": 1, "prefill_chunk_tokens": 1,
        "expected_weights_bytes": [],
    }  # fmt: skip
    return Assignment(**least | fields)


def make_bootstrap(assignment: Assignment, **fields: Any) -> Bootstrap:
    """Make what the guard of a rank is told."""
    least = {
        "secret": SECRET, "liveness_host": "127.0.0.1", "liveness_port": 0, "model_name": "demo",
    }  # fmt: skip
    return Bootstrap(assignment, **least | fields)
