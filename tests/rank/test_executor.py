"""What the GPU is still computing is not taken to host memory by a transfer."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import pytest

from k2cli.rank import executor as module
from k2cli.rank.executor import Executor
from k2cli.sharding.stage import Stage

CHOSEN = [5, 3, 8]
GROUP = SimpleNamespace(size=lambda: 2, rank=lambda: 0)


class Transfers:
    """Records what transfers get, and which of it they compute themselves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lazy: list[bool] = []
        self.values: list[object] = []
        monkeypatch.setattr(mx.distributed, "send", self._take)
        monkeypatch.setattr(mx.distributed, "all_sum", self._take)

    def _take(self, value: mx.array, *_: object, **__: object) -> mx.array:
        graph = io.StringIO()
        mx.export_to_dot(cast(Any, graph), value)
        self.lazy.append("Add" in graph.getvalue())
        self.values.append(value.tolist())
        return value


def _leader(*, pipeline: bool) -> Executor:
    stage = SimpleNamespace(is_first=not pipeline, is_last=True, model=nn.Module())
    return Executor(cast(Stage, stage), GROUP)


def _being_computed() -> mx.array:
    """Return an array that an earlier evaluation computes, as the engine's chosen tokens are."""
    chosen = mx.argmax(mx.eye(16)[mx.array(CHOSEN)], axis=-1)
    mx.async_eval(chosen)  # type: ignore[no-untyped-call]
    return chosen


@pytest.mark.parametrize("host_copies", [True, False])
@pytest.mark.parametrize("pipeline", [True, False])
def test_tokens_of_a_step_ahead_are_computed_within_their_transfer_on_cuda(
    monkeypatch: pytest.MonkeyPatch, pipeline: bool, host_copies: bool
) -> None:
    monkeypatch.setattr(module, "copies_from_host", lambda: host_copies)
    transfers, leader = Transfers(monkeypatch), _leader(pipeline=pipeline)
    if pipeline:
        leader.feed_ahead(_being_computed())
    else:
        leader._inputs_ahead(len(CHOSEN), _being_computed())
    assert transfers.values == [CHOSEN]
    # Elsewhere host and device share memory, and a transfer waits for its input.
    assert transfers.lazy == [host_copies]
