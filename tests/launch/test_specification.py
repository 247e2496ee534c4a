"""Limits on memory that a rank gets from its plan."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from k2cli.launch.request import LaunchRequest
from k2cli.launch.restart_policy import RestartPolicy
from k2cli.launch.specification import (
    RunDecisions,
    cache_limit_bytes,
    link_check_of,
    meets_of,
    memory_limit_bytes,
)
from k2cli.launch.transport import restart_warnings
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.memory.ledger import RUNTIME_BYTES, node_budget
from k2cli.planning.plan import NodeBudget
from k2cli.protocol import LinkCheck
from k2cli.units import GB, MB


def _budget(device: str) -> NodeBudget:
    node = NodeMemory("n", 100 * GB, 90 * GB, "exact", device)  # type: ignore[arg-type]
    return node_budget(
        node,
        sharers=1,
        layer_weights_bytes=40 * GB,
        edge_weights_bytes=2 * GB,
        kv_cache_bytes=3 * GB,
        prefill_activation_bytes=5 * GB,
        decode_activation_bytes=GB,
        communication=GB // 10,
        largest_cache_bytes=3 * GB // 10,
    )


def test_a_gpu_keeps_temporary_arrays_within_the_plan() -> None:
    budget = _budget("metal")
    assert cache_limit_bytes(budget) == 5 * GB + budget.overhead_bytes
    assert memory_limit_bytes(budget) == budget.total_bytes - RUNTIME_BYTES
    # Memory in use, and a step's temporary arrays kept beside it, are within the limit.
    in_use = budget.weights_bytes + budget.kv_cache_bytes + budget.activation_bytes
    assert in_use < (memory_limit_bytes(budget) or 0) < budget.total_bytes


def test_cuda_leaves_room_for_memory_that_mlx_does_not_count() -> None:
    budget = _budget("cuda")
    assert cache_limit_bytes(budget) == cache_limit_bytes(_budget("metal"))
    limit = memory_limit_bytes(budget) or 0
    assert budget.total_bytes - RUNTIME_BYTES - limit == 1500 * MB
    # A small model keeps most of what a step needs.
    small = replace(budget, activation_bytes=30 * MB, overhead_bytes=600 * MB)
    limit = memory_limit_bytes(small) or 0
    assert small.total_bytes - RUNTIME_BYTES - limit == cache_limit_bytes(small) // 3 == 210 * MB


def test_a_cpu_and_an_old_plan_keep_the_overhead_alone() -> None:
    budget = _budget("cpu")
    assert (cache_limit_bytes(budget), memory_limit_bytes(budget)) == (budget.overhead_bytes, None)
    assert memory_limit_bytes(replace(_budget("cuda"), breakdown=None)) is None


@pytest.mark.parametrize(
    ("nodes", "wanted", "checked"),
    [
        ("a,b", "auto", True),
        ("a,a", "auto", False),  # of one machine, where nothing has gone wrong
        ("a,a", "always", True),
        ("a", "always", False),
        ("a,b", "never", False),
    ],
)
def test_the_link_is_checked_where_ranks_are_apart(nodes: str, wanted: Any, checked: bool) -> None:
    run = RunDecisions(LaunchRequest("demo", link_check=wanted))
    run.nodes = [SimpleNamespace(name=name) for name in nodes.split(",")]  # type: ignore[misc]
    for devices, seconds in (("cpu,cpu", 30), ("cpu,metal", 120)):
        budgets = [SimpleNamespace(backend=device) for device in devices.split(",")]
        run.plan = SimpleNamespace(nodes=budgets)  # type: ignore[assignment]
        assert link_check_of(run) == (LinkCheck([4096], seconds) if checked else None)


@pytest.mark.parametrize(
    ("devices", "meets"), [("cpu,metal", True), ("metal", True), ("cuda,cpu", False)]
)
def test_ranks_meet_if_one_of_them_computes_on_metal(devices: str, meets: bool) -> None:
    run = RunDecisions(LaunchRequest("demo"))
    budgets = [SimpleNamespace(backend=device) for device in devices.split(",")]
    run.plan = SimpleNamespace(nodes=budgets)  # type: ignore[assignment]
    assert meets_of(run) is meets


def test_restarts_over_jaccl_say_what_they_may_cost() -> None:
    again = RestartPolicy(mode="on-failure")
    [warning] = restart_warnings("jaccl", again)
    assert "one more launch over JACCL" in warning
    assert restart_warnings("ring", again) == restart_warnings("jaccl", RestartPolicy()) == []
