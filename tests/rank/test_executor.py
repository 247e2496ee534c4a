"""Tokens that travel between ranks ahead of their decision: sent when computed, and checked."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import pytest

from k2cli.errors import ClusterError
from k2cli.protocol import LeaveBatch
from k2cli.rank import exchange
from k2cli.rank import executor as module
from k2cli.rank.executor import Executor
from k2cli.sharding.stage import Stage

CHOSEN = [5, 3, 8]
GROUP = SimpleNamespace(size=lambda: 2, rank=lambda: 0)


@pytest.fixture(autouse=True)
def _no_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages of these tests have no layers."""
    monkeypatch.setattr(module, "CacheTable", lambda _: SimpleNamespace())


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
    monkeypatch.setattr(exchange, "copies_from_host", lambda: host_copies)
    transfers, leader = Transfers(monkeypatch), _leader(pipeline=pipeline)
    if pipeline:
        leader.exchange.feed_ahead(_being_computed())
    else:
        leader.exchange.inputs_ahead(len(CHOSEN), _being_computed())
    assert transfers.values == [CHOSEN]
    # Elsewhere host and device share memory, and a transfer waits for its input.
    assert transfers.lazy == [host_copies]


def _first_stage() -> Executor:
    model = nn.Module()
    model.args = SimpleNamespace(vocab_size=16)
    stage = SimpleNamespace(is_first=True, is_last=False, model=model)
    first = Executor(cast(Stage, stage), GROUP)
    first.caches = cast(Any, SimpleNamespace(fed=[], leave=lambda *_: None))
    fed = cast(Any, first.caches).fed
    cast(Any, first.caches).feed = lambda sequence, tokens: fed.append((sequence, tokens))
    return first


def test_a_token_that_arrived_otherwise_than_the_leader_chose_ends_the_run() -> None:
    first = _first_stage()
    first._check_arrived([7, 9], [5, 3])
    first.carry_out(LeaveBatch(1, 0, 7, told=5))
    assert cast(Any, first.caches).fed == [(7, [5])]
    with pytest.raises(ClusterError, match="token 4 arrived as 3 from rank 0"):
        first.carry_out(LeaveBatch(2, 0, 9, told=4))


def test_a_token_that_the_model_does_not_have_never_reaches_the_embedding() -> None:
    with pytest.raises(ClusterError, match="token 16 arrived from rank 0; the model has 16"):
        _first_stage()._check_arrived([7], [16])
