"""Judgements of the measurements of full-width layers: agreement, figures, table."""

from __future__ import annotations

import argparse
import copy
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.full_width import gpus
from benchmarks.full_width.agreement import compare, disagreements, noise_verdict, verdict
from benchmarks.full_width.measure import _round, figures, last_value
from benchmarks.full_width.programs import K2Program, MlxProgram, Settings
from benchmarks.full_width.table import table
from benchmarks.statistics import Answer
from tests.support.gpu_host import make_gpu_host
from tests.support.harness import wait_until


def test_tokens_must_agree_where_the_best_two_logits_differ_clearly() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=(20, 50))
    first[:10, 3], first[:10, 4] = 10.0, 9.9995  # no clear choice
    first[10:, 3], first[10:, 4] = 10.0, 8.0
    second = first + rng.uniform(-0.01, 0.01, first.shape)
    second[0, 4] = 10.005
    result = compare(first, second)
    assert result["largest_relative_error"] < 0.0011
    assert (result["steps"], result["clear_steps"]) == (20, 10)
    assert result["same_tokens_in_clear_steps"] == 10
    assert result["same_tokens"] < 20
    assert verdict(result, 0.002) == []
    assert len(verdict(result, 0.0001)) == 1
    assert noise_verdict(result, result, 1.5) == []
    worse = {**result, "median_relative_error": 2 * result["median_relative_error"]}
    assert len(noise_verdict(worse, result, 1.5)) == 1
    second[15, 4] = 10.5
    assert compare(first, second)["largest_relative_error"] > 0.2
    second[15] = np.nan
    assert "logits are not finite" in verdict(compare(first, second), 0.002)


def _digest(**changes: Any) -> dict[str, Any]:
    one = {"state": "s", "arrived": "", "computed": "c", "logits": "l", "in_step": True}
    return {**one, **changes}


def test_disagreeing_ranks_are_named() -> None:
    tensor = [[_digest(), _digest()], [_digest(), _digest()]]
    assert disagreements(tensor) == []
    other = copy.deepcopy(tensor)
    other[1][1]["logits"] = "m"
    assert disagreements(other) == ["step 1: rank 1 has other logits"]
    pipeline = [[_digest(arrived="h")], [_digest(computed="h", logits="")]]
    assert disagreements(pipeline) == []
    assert disagreements([[_digest(arrived="h")], [_digest(computed="i", logits="")]])
    assert disagreements([[_digest(state="t")], [_digest()]]) == [
        "step 0: rank 1 holds another state"
    ]


def test_figures_and_their_table() -> None:
    samples = {"decode 1": {"a": [10.0, 12.0, 11.0], "b": [10.0, 10.0, 11.0]}}
    found = figures(samples, ["a", "b"])
    assert found["decode 1"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.2}
    machine = {"gpus": "2 of them", "cores": "4", "date": "today"}
    start = {
        "ready_seconds": 20.0, "load_seconds": [3.0, 4.0], "load_bytes_per_second": [2e9, 3e9],
        "plan_bytes": [53.4e9, 53.4e9], "memory_before_bytes": [1e9, 1e9],
        "most_memory_bytes": {"gpu 0": 53.5e9, "gpu 1": 52.5e9},
    }  # fmt: skip
    text = table(
        [
            {"machine": machine, "rounds": 3, "figures": found},
            {"machine": machine, "context_bytes": 5e8, "k2:tensor:nccl warm": start},
        ]
    )
    assert text.count("2 of them") == 1
    assert "a: 11.0 (10.0 to 12.0)" in text
    assert "| k2:tensor:nccl warm | 20.0 | 3.0 / 4.0 | 2.00 / 3.00 | 53.4 / 53.4 |" in text
    assert "52.0 / 51.0" in text  # less what was there before and the context
    assert "1.027 / 1.047" in text


class _DyingProgram:
    """A program that ends in its second piece of work, and works after it was started again."""

    def __init__(self, name: str, fatal: int | None) -> None:
        self.name, self.fatal, self.asked, self.starts = name, fatal, 0, 0
        self.closed = False

    def ask(self, asks: Any) -> list[Answer]:
        self.asked += 1
        if self.asked == self.fatal:
            raise RuntimeError("an illegal memory access was encountered")
        return [Answer(16, 128, ((0.5, 1), (1.5, 128)), "") for _ in asks]

    def start(self) -> float:
        self.starts += 1
        return 1.0

    def close(self) -> None:
        self.closed = True

    def hold(self) -> None: ...

    def let_go(self) -> None: ...


def test_a_program_that_ends_in_a_round_is_started_again_and_that_work_counts_for_neither() -> None:
    ours, theirs = _DyingProgram("k2", None), _DyingProgram("mlx", 2)
    options = argparse.Namespace(requests=[1], prompts=[], tokens=128)
    samples: dict[str, dict[str, list[float]]] = {}
    restarts: list[str] = []
    for number in range(3):
        _round([ours, theirs], options, number, samples, restarts)
    assert (theirs.starts, theirs.closed, ours.closed) == (1, True, False)
    assert restarts == ["mlx, decode 1, round 2: an illegal memory access was encountered"]
    assert {name: len(rates) for name, rates in samples["decode 1"].items()} == {"k2": 2, "mlx": 2}


def test_a_peer_that_is_dead_can_be_held_let_go_and_closed(tmp_path: Path) -> None:
    peer = MlxProgram("mlx:tensor", Settings(tmp_path, tmp_path, tmp_path), "tensor")
    peer._processes = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    dead, alive = peer._processes
    dead.kill()
    dead.wait()
    peer.hold()
    peer.let_go()
    peer.close()
    assert alive.returncode == -signal.SIGKILL
    assert peer.pids() == {}


def test_a_run_of_k2_that_is_gone_can_be_closed(tmp_path: Path) -> None:
    program = K2Program("k2:tensor:ring", Settings(tmp_path, tmp_path, tmp_path), "tensor", "ring")
    program.record = {"run_id": "gone-0000"}
    program.close()
    assert "k2 stop gone-0000" in (tmp_path / "k2.log").read_text()
    assert program.record == {}


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo '{\"a\": 1}'", None),
        ("echo nothing; exit 3", "3: nothing"),
        ("true", "the last line is not JSON"),
        ("echo '{'", "the last line is not JSON"),
        ("sleep 60", "no end within 1 s"),
    ],
)
def test_a_step_that_fails_or_hangs_is_a_result_and_leaves_nothing(
    script: str, says: str | None, tmp_path: Path
) -> None:
    child = f"sleep 60 & echo $! > {tmp_path}/pid; {script}"
    found = last_value(["sh", "-c", child], 1.0 if script == "sleep 60" else 30.0)
    assert found == {"a": 1} if says is None else found["error"].startswith(says)
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not psutil.pid_exists(pid) or _is_zombie(pid), 10, "the end of its child")


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_memory_is_watched_on_although_the_driver_fails_at_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_gpu_host(tmp_path / "host", 2, monkeypatch)
    assert gpus.count() == 2
    answers = iter([[5, 6], [], [7, 1]])
    watch = gpus.Watch({"rank 0": os.getpid()})
    monkeypatch.setattr(gpus, "used_bytes", lambda: next(answers))
    for _ in range(3):
        for name, size in watch._sizes().items():
            watch.most[name] = max(size, watch.most.get(name, 0))
    assert watch.most == {"gpu 0": 7, "gpu 1": 6}
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{host.folder}:{os.environ['PATH']}")
    (host.folder / "nvidia-smi").write_text("#!/bin/sh\necho '[N/A]'\n")
    assert gpus.used_bytes() == [0]
    (host.folder / "nvidia-smi").write_text("#!/bin/sh\necho Unable to determine; exit 6\n")
    assert gpus.used_bytes() == []
