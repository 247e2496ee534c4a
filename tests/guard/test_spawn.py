"""The environment that a guard gives its rank."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from k2cli.gpu_name import GpuName
from k2cli.guard.spawn import spawn_rank
from k2cli.protocol import Assignment, Bootstrap

BOOTSTRAP = Bootstrap(
    Assignment(
        run_id="demo-1", rank=0, size=1, nodes=["a"], transport="local", model_path="/nowhere",
        strategy="single", layers=[], dtype="float32", context_length=1, concurrency=1,
        prefill_chunk_tokens=1, expected_weights_bytes=[],
    ),
    "5e" * 32, "127.0.0.1", 0, "demo",
)  # fmt: skip


@pytest.mark.parametrize(
    ("gpu", "visible"),
    [
        (GpuName(1, "GPU-22", "NVIDIA H200"), "GPU-22"),
        (GpuName(0, "", "NVIDIA H200 MIG 1g.18gb"), "0,1"),
        (None, "0,1"),
    ],
)
def test_a_rank_sees_the_gpu_that_the_plan_gave_it_and_no_other(
    gpu: GpuName | None, visible: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "show.py").write_text("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")

    async def output_of_the_rank() -> bytes:
        rank = await spawn_rank(replace(BOOTSTRAP, gpu=gpu), "show")
        shown, _ = await rank.process.communicate()
        rank.connection.close()
        rank.page.close()
        return shown

    assert asyncio.run(output_of_the_rank()).decode().strip() == visible
