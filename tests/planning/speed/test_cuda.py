"""The bands of ``plan-memory`` for NVIDIA's GPUs, against what k2 reached on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.full_width.tensors import FULL_WIDTH, write_headers
from benchmarks.speed_fit.cuda import figures_table
from k2cli.planning.hardware.spec import parse_hardware
from k2cli.planning.plan import Plan
from k2cli.planning.planner import Planner
from k2cli.planning.request import PlanRequest
from k2cli.planning.speed.estimate import GREATEST_RATIO, Band

TABLE = figures_table()


@pytest.fixture(scope="module")
def planners(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Planner]:
    """Planners of the measured models, by their number of layers, from headers alone."""
    folder = tmp_path_factory.mktemp("full-width")
    found = {}
    for layers in {run["layers"] for run in TABLE["runs"]}:
        write_headers(folder / str(layers), replace(FULL_WIDTH, layers=layers))
        found[layers] = Planner(str(folder / str(layers)))
    return found


def plan_of(planner: Planner, run: dict[str, Any], hardware: str, **request: Any) -> Plan:
    wanted = PlanRequest(strategy=run["strategy"], transport=run["transport"], **request)
    return planner.plan(parse_hardware(hardware), wanted, limits=False)


def bands(planner: Planner, run: dict[str, Any]) -> dict[str, Band]:
    hardware = f"{run['cards']}x {TABLE['chip']}"
    alone = plan_of(planner, run, hardware, context_length=TABLE["decode_context"]).speed
    eight = {"context_length": TABLE["decode_context"], "concurrency": 8}
    together = plan_of(planner, run, hardware, **eight).speed
    prompts = {
        f"prefill_{tokens}": plan_of(planner, run, hardware, context_length=tokens).speed
        for tokens in (2048, 16384)
    }
    assert alone is not None
    assert together is not None
    found = {
        "decode": alone.decode_tokens_per_second,
        "decode_8": together.aggregate_decode_tokens_per_second,
    }
    for name, speed in prompts.items():
        assert speed is not None
        found[name] = speed.prefill_tokens_per_second
    return found


@pytest.mark.parametrize(
    "run", TABLE["runs"], ids=lambda run: f"{run['strategy']}-{run['transport']}"
)
def test_every_measured_round_is_inside_its_band(
    planners: dict[int, Planner], run: dict[str, Any]
) -> None:
    predicted = bands(planners[run["layers"]], run)
    for name, band in predicted.items():
        assert band.high / band.low <= GREATEST_RATIO * 1.0001
        for rate in run.get(name, []):
            assert band.low <= rate <= band.high, (name, rate, band)


def test_the_plan_names_its_source_and_says_what_is_assumed(planners: dict[int, Planner]) -> None:
    run = TABLE["runs"][1]
    measured = plan_of(planners[10], run, "2x h200-141").speed
    other = plan_of(planners[10], run, "2x h100").speed
    assert measured is not None
    assert other is not None
    assert f"{TABLE['machine']}, {TABLE['measured_on']}" in measured.source
    assert "assumed for h100" in other.source
    rate = other.decode_tokens_per_second
    assert rate.high / rate.low == pytest.approx(GREATEST_RATIO)


def test_auto_sums_over_nccl_between_cards_of_one_host(planners: dict[int, Planner]) -> None:
    plan = planners[10].plan(parse_hardware("2x h200-141"), PlanRequest(), limits=False)
    assert plan.placement.strategy == "tensor"
    assert plan.fits
    assert plan.speed is not None
    nvlink = plan.speed.aggregate_decode_tokens_per_second.expected
    pcie = planners[10].plan(parse_hardware("2x h100-pcie"), PlanRequest(), limits=False)
    assert pcie.speed is not None
    assert nvlink > pcie.speed.aggregate_decode_tokens_per_second.expected
