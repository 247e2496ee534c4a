"""What a rank says of the error that ends it, for the messages of MLX 0.32 on each device."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from k2cli.errors import ClusterError
from k2cli.protocol import Assignment
from k2cli.protocol.wire import ConnectionLost
from k2cli.rank.fatal_errors import Kind, fatal

_BUFFER = "[METAL] Command buffer execution failed: "
_TIMEOUT = f"{_BUFFER}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)."


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            f"{_BUFFER}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
            "memory",
        ),
        (
            "[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum "
            "allowed buffer size of 9 bytes.",
            "memory",
        ),
        ("[metal::malloc] Resource limit (499000) exceeded.", "memory"),
        ("[malloc] Unable to allocate 17 bytes.", "memory"),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", "memory"),
        ("[ring] connection to a peer was lost", "lost peer"),
        ("[jaccl] Send failed with error code 12", "lost peer"),
        (
            f"{_BUFFER}Discarded (victim of GPU error/recovery) "
            "(00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim).",
            "lost peer",
        ),
        ("[matmul] Last dimension of first input does not match", "internal"),
    ],
)
def test_errors_of_mlx_are_told_apart(text: str, kind: Kind) -> None:
    message = fatal(RuntimeError(text), _assignment("pipeline"))
    assert message.kind == kind
    assert text in message.error
    assert "Traceback" in message.traceback or "RuntimeError" in message.traceback


def test_a_gpu_that_waited_for_another_rank_is_a_symptom() -> None:
    shared = fatal(RuntimeError(_TIMEOUT), _assignment("tensor"))
    assert shared.kind == "lost peer"
    assert "most likely for another rank: RuntimeError: [METAL]" in shared.error
    alone = fatal(RuntimeError(_TIMEOUT), _assignment("tensor", size=1))
    stage = fatal(RuntimeError(_TIMEOUT), _assignment("pipeline"))
    for each in (alone, stage):
        assert each.kind == "internal"
        assert "took longer than some 5 s" in each.error
        assert "--chunk 512" in each.error


def test_a_display_that_needs_the_gpu_is_named_with_the_command() -> None:
    text = (
        f"{_BUFFER}Impacting Interactivity "
        "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)."
    )
    message = fatal(RuntimeError(text), _assignment("pipeline"))
    assert "ssh studio-2 pmset displaysleepnow" in message.error
    assert "ssh localhost" in fatal(RuntimeError(text), None).error


def test_errors_of_k2_and_of_connections_stay_as_they_are() -> None:
    assert fatal(ClusterError("a", "b"), None).error == "a (b)"
    assert fatal(ConnectionLost("closed"), None).kind == "lost peer"
    assert fatal(MemoryError(), None).kind == "memory"


def _assignment(strategy: Literal["pipeline", "tensor"], size: int = 2) -> Assignment:
    values: dict[str, Any] = dict.fromkeys(("run_id", "model_path", "transport"), "")
    return Assignment(
        **values,
        rank=size - 1,
        size=size,
        nodes=["studio-1", "studio-2"][:size],
        strategy=strategy,
        layers=[(0, 1)] * size,
        dtype="checkpoint",
        context_length=1,
        concurrency=1,
        prefill_chunk_tokens=1,
        expected_weights_bytes=[1] * size,
    )
