"""GPUs of a launch, up to the files that its guards read; no rank is started."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from k2cli.choices import WantedTransport
from k2cli.cli import build_app
from k2cli.errors import ClusterError, DoesNotFitError, UsageError
from k2cli.guard.spawn import gpu_settings
from k2cli.launch import prepare
from k2cli.launch.gpus import machines_of
from k2cli.launch.prepare import prepare_run
from k2cli.launch.request import LaunchRequest
from k2cli.launch.specification import RunDecisions, read_specification
from k2cli.nodes.local import LocalNode
from k2cli.nodes.locks import BusyError, release_locks
from k2cli.ui.plan.table import plan_lines
from tests.support.gpu_host import UUIDS, GpuHost, make_gpu_host

TWO = ("localhost", "localhost")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GpuHost:
    return make_gpu_host(tmp_path / "host", 2, monkeypatch)


@contextmanager
def launched(
    model: Path,
    nodes: tuple[str, ...] = TWO,
    plan: Path | None = None,
    *,
    share: bool = False,
    wait_seconds: float = 0.0,
    force: bool = False,
    transport: WantedTransport = "ring",
) -> Iterator[tuple[RunDecisions, list[str]]]:
    """Prepare a run and release its machines at the end; yields it and what it said."""
    said: list[str] = []
    request = LaunchRequest(
        str(model),
        nodes=nodes,
        transport=transport,
        plan_file=plan,
        share=share,
        wait_seconds=wait_seconds,
        force=force,
    )
    run = prepare_run(request, said.append)
    try:
        yield run, said
    finally:
        release_locks([LocalNode()], run.run_id)


def gpus_of(run: RunDecisions) -> list[int]:
    """Return the GPU of each rank, which plan, record and the guard's file must agree on."""
    bootstraps = read_specification(run.record.folder).bootstraps
    planned = [node.gpu for node in run.plan.nodes]
    assert [each.gpu for each in bootstraps] == [rank.gpu for rank in run.record.ranks] == planned
    assert all(gpu is not None for gpu in planned)
    return [gpu.index for gpu in planned if gpu is not None]


def test_two_ranks_of_one_host_get_a_gpu_each(toy_k2: Path, host: GpuHost) -> None:
    with launched(toy_k2) as (run, _):
        assert gpus_of(run) == [0, 1]
        one, two = run.plan.nodes
        assert one.limit_bytes == two.limit_bytes > 149e9  # all of a card, not a half
        variables = [gpu_settings(node.gpu)["CUDA_VISIBLE_DEVICES"] for node in run.plan.nodes]
        assert variables == list(UUIDS[:2])
        named = "rank 0 on GPU 0 (NVIDIA H200); rank 1 on GPU 1 (NVIDIA H200)"
        assert named in plan_lines(run.plan)
        assert named in CliRunner().invoke(build_app(), ["ps"]).stdout
        (shown,) = json.loads(CliRunner().invoke(build_app(), ["ps", "--json"]).stdout)["runs"]
        assert shown["ranks"][1]["gpu"] == {"index": 1, "uuid": UUIDS[1], "name": "NVIDIA H200"}


def test_a_second_run_gets_the_other_gpu_and_a_third_is_refused(
    toy_k2: Path, host: GpuHost
) -> None:
    alone = ("localhost",)
    with launched(toy_k2, alone) as (first, _), launched(toy_k2, alone) as (second, said):
        assert (gpus_of(first), gpus_of(second)) == ([0], [1])
        assert said == [f"node localhost: GPU 0 (NVIDIA H200) is left out: {first.run_id} holds it"]
        with pytest.raises(BusyError, match=r"GPU 0 \(NVIDIA H200\) of node localhost is in use"):
            prepare_run(LaunchRequest(str(toy_k2), nodes=alone))
        with launched(toy_k2, alone, share=True) as (third, _):
            assert gpus_of(third) == [0]


def test_ranks_share_the_gpu_that_is_left_unless_they_can_wait(toy_k2: Path, host: GpuHost) -> None:
    with launched(toy_k2, ("localhost",)) as (first, _):
        with launched(toy_k2) as (run, _):
            assert gpus_of(run) == [1, 1]
            assert "shared by 2 ranks" in run.plan.nodes[0].limit_source
            assert "ranks 0 and 1 share GPU 1 (NVIDIA H200)" in plan_lines(run.plan)
        with pytest.raises(BusyError, match=f"GPU 0 .* is in use by {first.run_id}"):
            prepare_run(LaunchRequest(str(toy_k2), nodes=TWO, wait_seconds=0.01))


def test_sharing_counts_what_the_other_run_has_planned_but_not_loaded(
    toy_k2: Path, host: GpuHost
) -> None:
    with launched(toy_k2, ("localhost",), share=True):
        host.set(0, 4, "143000")  # still free: the first run has not loaded its weights
        limit = [gpu.claimed_bytes for gpu in LocalNode().memory().gpus]
        assert limit[0] > 600e6
        assert limit[1] == 0


def test_a_gpu_that_other_programs_have_filled_is_skipped(toy_k2: Path, host: GpuHost) -> None:
    host.use(1, 4321, "trainer", 143_000)
    with launched(toy_k2) as (run, _):
        assert gpus_of(run) == [0, 0]
        assert run.plan.fits
    host.use(0, 4322, "trainer", 143_000)
    with pytest.raises(DoesNotFitError, match="localhost GPU"):
        prepare_run(LaunchRequest(str(toy_k2), nodes=TWO))


def test_a_saved_plan_keeps_its_gpus_or_moves_to_free_ones(
    toy_k2: Path, host: GpuHost, tmp_path: Path
) -> None:
    host.use(0, 4321, "trainer", 50_000)
    saved = tmp_path / "plan.json"
    with launched(toy_k2, ("localhost",)) as (run, _):
        assert gpus_of(run) == [1]
        saved.write_bytes((run.record.folder / "plan.json").read_bytes())
        with launched(toy_k2, ("localhost",), saved) as (moved, _):
            assert gpus_of(moved) == [0]
    with launched(toy_k2, ("localhost",), saved) as (same, _):
        assert gpus_of(same) == [1]
    host.use(0, 4322, "trainer", 93_000)
    host.use(1, 4322, "trainer", 143_000)
    with pytest.raises(DoesNotFitError, match=r"on localhost GPU 1, .*; trainer \(4322\)"):
        prepare_run(LaunchRequest(str(toy_k2), nodes=("localhost",), plan_file=saved))
    with launched(toy_k2, ("localhost",), saved, force=True) as (forced, _):
        assert gpus_of(forced) == [1]


def test_nccl_gives_way_to_the_ring_where_ranks_share_a_gpu(
    toy_k2: Path, host: GpuHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "check_nodes", lambda *_, **__: ("nccl", "measured"))
    with launched(toy_k2, transport="auto") as (run, _):
        assert (run.transport, gpus_of(run)) == ("nccl", [0, 1])
    host.use(1, 4321, "trainer", 143_000)
    with launched(toy_k2, transport="auto") as (run, _):
        assert (run.transport, gpus_of(run)) == ("ring", [0, 0])
        assert "2 ranks share localhost GPU 0" in run.transport_reason
    with (
        pytest.raises(UsageError, match="nccl is not possible: 2 ranks share localhost GPU 0"),
        launched(toy_k2, transport="nccl"),
    ):
        pass


def test_a_launch_that_loses_a_gpu_while_it_plans_takes_another(
    toy_k2: Path, host: GpuHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, nodes = ("localhost",), [LocalNode()]
    found = prepare._find_model_copies
    faster: list[RunDecisions] = []

    def lose(*arguments: Any) -> None:
        if not faster:
            faster.append(RunDecisions(LaunchRequest(str(toy_k2))))  # the next call is its own
            faster[0] = prepare_run(LaunchRequest(str(toy_k2), nodes=alone))
        found(*arguments)

    monkeypatch.setattr(prepare, "_find_model_copies", lose)
    try:
        with launched(toy_k2, alone) as (run, _):
            assert (gpus_of(faster[0]), gpus_of(run)) == ([0], [1])
            held = [gpu.held_by for gpu in LocalNode().memory().gpus]
            assert held == [(faster[0].run_id,), (run.run_id,)]
    finally:
        release_locks(nodes, faster[0].run_id)


def released_when_waiting(run: RunDecisions) -> Callable[[str], None]:
    """End a run at the message that another launch waits."""

    def say(text: str) -> None:
        if text.startswith("waiting"):
            release_locks([LocalNode()], run.run_id)

    return say


def test_a_launch_that_waits_takes_the_gpu_that_is_free_first(toy_k2: Path, host: GpuHost) -> None:
    alone, nodes = ("localhost",), [LocalNode()]
    waiting = LaunchRequest(str(toy_k2), nodes=alone, wait_seconds=60)
    with launched(toy_k2, alone), launched(toy_k2, alone) as (second, _):
        assert gpus_of(second) == [1]
        third = prepare_run(waiting, released_when_waiting(second))
        release_locks(nodes, third.run_id)
        assert gpus_of(third) == [1]


def test_a_launch_waits_for_a_gpu_of_another_run_where_the_free_one_is_too_small(
    toy_k2: Path, host: GpuHost
) -> None:
    alone, nodes = ("localhost",), [LocalNode()]
    waiting = LaunchRequest(str(toy_k2), nodes=alone, wait_seconds=60)
    host.use(1, 4321, "trainer", 143_000)
    with launched(toy_k2, alone) as (first, _):
        with pytest.raises(DoesNotFitError, match="localhost GPU 1"):
            prepare_run(LaunchRequest(str(toy_k2), nodes=alone))
        second = prepare_run(waiting, released_when_waiting(first))
        release_locks(nodes, second.run_id)
        assert gpus_of(second) == [0]


def test_one_machine_under_two_names_does_not_give_a_gpu_away_twice(
    toy_k2: Path, host: GpuHost
) -> None:
    here = LocalNode()
    other = LocalNode()
    other.name = "gpu-host.example"
    with pytest.raises(
        UsageError, match=r"localhost and gpu-host.example are one machine"
    ) as found:
        machines_of([here, other], LaunchRequest(str(toy_k2)))
    assert found.value.hint == "--nodes localhost,localhost"


def test_ranks_that_would_share_an_exclusive_gpu_are_refused(toy_k2: Path, host: GpuHost) -> None:
    for index in (0, 1):
        host.set(index, 6, "Exclusive_Process")
    with launched(toy_k2) as (run, _):
        assert gpus_of(run) == [0, 1]
        with pytest.raises(ClusterError, match=f"takes one process only, and {run.run_id} holds"):
            prepare_run(LaunchRequest(str(toy_k2), nodes=TWO, share=True))
    with pytest.raises(UsageError, match=r"2 usable GPU\(s\) for 3 ranks") as found:
        prepare_run(LaunchRequest(str(toy_k2), nodes=(*TWO, "localhost"), transport="ring"))
    assert found.value.hint is not None
    assert "nvidia-smi -i 0 -c DEFAULT" in found.value.hint


def test_a_machine_whose_gpus_are_all_unusable_is_refused(toy_k2: Path, host: GpuHost) -> None:
    for index in (0, 1):
        host.set(index, 6, "Prohibited")
    with pytest.raises(ClusterError, match=r"no usable GPU: GPU 0 .*: its compute mode is Prohib"):
        prepare_run(LaunchRequest(str(toy_k2), nodes=TWO, transport="ring"))
