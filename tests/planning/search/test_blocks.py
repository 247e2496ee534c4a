"""Latent attention is planned in blocks where memory asks for them, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from k2cli.choices import Device
from k2cli.planning.hardware.machine import NodeMemory
from k2cli.planning.planner import Planner
from k2cli.planning.request import PlanRequest
from k2cli.planning.search.candidates import GOOD_CHUNK_TOKENS, PlanningProblem
from k2cli.planning.search.strategies import candidate
from k2cli.sharding.latent_ways import BLOCK_TOKENS
from k2cli.units import GB

CONTEXT = 131_072


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner("k2.5")


def _problem(planner: Planner, limit_bytes: int) -> PlanningProblem:
    nodes = [NodeMemory(name, limit_bytes, limit_bytes, "exact", "metal") for name in ("a", "b")]
    return planner.problem(nodes, PlanRequest(context_length=CONTEXT))


def test_room_for_whole_scores_needs_no_blocks(planner: Planner) -> None:
    found = candidate(_problem(planner, 400 * GB), "tensor")
    assert found.fits
    assert found.block_tokens == 0


def test_blocks_keep_the_chunk_large_where_whole_scores_do_not_fit(planner: Planner) -> None:
    problem = _problem(planner, 400 * GB)
    small = problem.chunks[-1]
    least = replace(problem, request=replace(problem.request, chunk_tokens=small))
    needed = candidate(least, "tensor").budgets[0].total_bytes
    tight = candidate(_problem(planner, needed + GB), "tensor")
    assert tight.fits
    assert tight.block_tokens == BLOCK_TOKENS
    assert tight.chunk_tokens >= GOOD_CHUNK_TOKENS


def test_joined_projections_are_planned_on_gpus_unless_switched_off(planner: Planner) -> None:
    problem = _problem(planner, 400 * GB)

    def activation(device: Device, wanted: bool | None) -> int:
        nodes = tuple(replace(node, device=device) for node in problem.nodes)
        request = replace(problem.request, joins_projections=wanted, chunk_tokens=2048)
        found = candidate(replace(problem, nodes=nodes, request=request), "tensor")
        return found.budgets[0].activation_bytes

    # 8 of K2's experts per token, of which each rank has 1,024 outputs, in 16 bit.
    more = 1.3 * 2048 * 8 * 1024 * 2
    gpus: tuple[Device, ...] = ("metal", "cuda")
    for device in gpus:
        assert activation(device, None) == activation(device, True)
        assert activation(device, True) - activation(device, False) == pytest.approx(more, abs=2)
    assert activation("cpu", None) == activation("cpu", False) < activation("cpu", True)
