from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.even_split import even_split
from k2cli.choices import Strategy
from k2cli.errors import K2Error
from k2cli.planning.hardware.machine import MeasuredSpeed, NodeMemory, NodeRates, this_machine
from k2cli.planning.hardware.spec import parse_hardware
from k2cli.planning.speed.calibrate import MeasuredFigure, calibrate
from k2cli.planning.speed.calibrations import (
    CalibratedMachines,
    calibration_file,
    machines_of,
    save_calibration,
    with_calibration,
)
from k2cli.planning.speed.estimate import predict_speed
from k2cli.planning.speed.work import ModelWork, model_work
from k2cli.sharding.placement import Placement, RankPlacement

CONFIGS = Path(__file__).resolve().parents[2] / "data" / "configs"
K2 = json.loads((CONFIGS / "k2-thinking" / "config.json").read_text())
SLOW_MAC = NodeRates(450e9, 15e12, 10e12, 8e12, 90e-6, 160e-6)


def _placement(strategy: Strategy, nodes: list[NodeMemory]) -> Placement:
    count = len(nodes)
    ranges = even_split(61, count) if strategy == "pipeline" else [(0, 61)] * count
    parts = (RankPlacement(rank, nodes[rank].name, ranges[rank]) for rank in range(count))
    return Placement(strategy, tuple(parts))


def _figures(
    work: ModelWork, placement: Placement, nodes: list[NodeMemory], transport: str
) -> list[MeasuredFigure]:
    """Predict the figures that machines of these rates would measure."""
    figures = []
    for tokens, concurrency in ((300, 1), (1200, 1), (300, 2)):
        found = predict_speed(
            work,
            placement,
            nodes,
            transport=transport,
            context_length=tokens,
            concurrency=concurrency,
        )
        assert found is not None
        rate = found.aggregate_decode_tokens_per_second.expected
        figures.append(MeasuredFigure("decode", tokens, concurrency, rate))
        if concurrency == 1:
            rate = found.prefill_tokens_per_second.expected
            figures.append(MeasuredFigure("prefill", tokens, 1, rate))
    return figures


@pytest.mark.parametrize(
    ("strategy", "spec", "transport"),
    [
        ("single", "m3-ultra-512", "local"),
        ("pipeline", "2x m3-ultra-512", "ring"),
        ("tensor", "2x m3-ultra-512", "jaccl"),
    ],
)
def test_rates_that_say_what_was_measured_are_found(
    strategy: Strategy, spec: str, transport: str
) -> None:
    nodes = parse_hardware(spec)
    true = [
        dataclasses.replace(
            node, measured=MeasuredSpeed(SLOW_MAC, 150e-6 if len(nodes) > 1 else None, "")
        )
        for node in nodes
    ]
    work = model_work(K2, slices=len(nodes) if strategy == "tensor" else 1)
    placement = _placement(strategy, nodes)
    found = calibrate(
        work,
        placement,
        nodes,
        transport=transport,
        chunk_tokens=512,
        figures=_figures(work, placement, true, transport),
    )
    assert max(map(abs, found.errors)) < 0.05
    measured = MeasuredSpeed(found.rates, found.collective_seconds, "found")
    told = [dataclasses.replace(node, measured=measured) for node in nodes]
    for context in (2000, 16_000):
        wanted, got = (
            predict_speed(work, placement, each, transport=transport, context_length=context)
            for each in (true, told)
        )
        assert wanted is not None
        assert got is not None
        assert got.source == "found"
        for quantity in ("decode_tokens_per_second", "prefill_tokens_per_second"):
            band = getattr(got, quantity)
            assert band.low < getattr(wanted, quantity).expected < band.high


def test_an_unknown_machine_is_calibrated_from_its_figures_alone() -> None:
    node = dataclasses.replace(this_machine(), bandwidth_bytes_per_second=None, chip="")
    work = model_work(K2)
    placement = _placement("single", [node])
    true = dataclasses.replace(
        node, measured=MeasuredSpeed(NodeRates(8e9, 3e11, 2e11, 1e11, 1e-3, 2e-3), None, "")
    )
    figures = _figures(work, placement, [true], "local")
    found = calibrate(work, placement, [node], transport="local", chunk_tokens=512, figures=figures)
    assert max(map(abs, found.errors)) < 0.05
    assert found.collective_seconds is None
    assert found.rates.read_bytes_per_second == pytest.approx(8e9, rel=0.2)
    with pytest.raises(K2Error, match="needs figures of decode and of prefill"):
        calibrate(work, placement, [node], transport="local", chunk_tokens=512, figures=figures[:1])


def _entry(nodes: list[NodeMemory], transport: str, day: str) -> CalibratedMachines:
    return CalibratedMachines(machines_of(nodes), transport, "k2-thinking", day, SLOW_MAC, 1e-4)


def test_a_calibration_is_used_for_its_own_machines_and_replaced_by_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K2_CONFIG_DIR", str(tmp_path / "config"))
    nodes = parse_hardware("2x m3-ultra-512")
    assert with_calibration(nodes, "ring") == nodes
    save_calibration(_entry(nodes, "ring", "2026-11-01"))
    save_calibration(_entry(nodes, "jaccl", "2026-11-02"))
    assert save_calibration(_entry(nodes, "ring", "2026-11-03")) == calibration_file()

    def source(nodes: list[NodeMemory], transport: str) -> str | None:
        measured = with_calibration(nodes, transport)[0].measured
        return None if measured is None else measured.source

    assert "2026-11-03 with k2-thinking" in (source(nodes, "ring") or "")
    assert "2026-11-02" in (source(list(reversed(nodes)), "jaccl") or "")
    assert "2026-11-03" in (source(nodes, "auto") or "")
    assert source(nodes, "mpi") is None
    assert source(nodes[:1], "ring") is None
    assert source(parse_hardware("2x m3-ultra-256"), "ring") is None
    later = calibration_file().read_text().replace('"schema_version": 1', '"schema_version": 9')
    calibration_file().write_text(later)
    with pytest.raises(K2Error, match="of a later version of k2"):
        save_calibration(_entry(nodes, "ring", "2026-11-04"))
    assert calibration_file().read_text() == later


@pytest.mark.parametrize("content", [b"", b"{", b'{"entries": [1]}', b"\xff\xfe"])
def test_a_damaged_file_is_named_with_what_to_do(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K2_CONFIG_DIR", str(tmp_path))
    (tmp_path / "calibration.json").write_bytes(content)
    with pytest.raises(K2Error, match=r"calibration\.json is damaged") as caught:
        with_calibration(parse_hardware("m3-ultra-512"))
    assert caught.value.hint == f"rm {tmp_path / 'calibration.json'}"
