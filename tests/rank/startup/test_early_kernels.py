"""Kernels of a later stage are compiled before its hidden states arrive, and change no result."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from k2cli.protocol import (
    CutBack,
    Decision,
    Decode,
    JoinBatch,
    LeaveBatch,
    OpenSequence,
    Prefill,
    PrefillTogether,
    Warm,
    WarmUp,
)
from k2cli.rank.executor import Executor
from k2cli.rank.startup import early_kernels
from k2cli.rank.startup.marks import cache_digest
from k2cli.sharding.assemble import build, cast
from k2cli.sharding.stage import cut_stage
from tests.support.latent_models import TOKENS, latent_model

_GROUP = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
_HIDDEN: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320,
    "intermediate_size": 64, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
}  # fmt: skip
_OTHERS: dict[str, dict[str, Any]] = {
    "llama": _HIDDEN | {"model_type": "llama"},
    "three layers": _HIDDEN | {"model_type": "llama", "num_hidden_layers": 3},
    "window": _HIDDEN | {
        "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8,
        "sliding_window_pattern": 2, "query_pre_attn_scalar": 16,
    },
    "recurrent": {
        "model_type": "mamba", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128,
        "state_size": 16, "num_hidden_layers": 2, "conv_kernel": 4, "use_bias": False,
        "use_conv_bias": True, "time_step_rank": 8,
    },
}  # fmt: skip


def _model(name: str) -> nn.Module:
    if name not in _OTHERS:
        return latent_model(name)
    mx.random.seed(3)
    model = build(_OTHERS[name])
    cast(model, mx.float32)
    mx.eval(model.parameters())
    return model


@dataclass
class _Stages:
    """Both stages of a pipeline in this process, and what the last one computed."""

    name: str
    first: Executor = field(init=False)
    last: Executor = field(init=False)
    computed: list[list[float]] = field(default_factory=list)
    caches: list[str] = field(default_factory=list)
    before_arrival: list[int] = field(default_factory=list)
    _step: int = 0

    def __post_init__(self) -> None:
        self.first = Executor(cut_stage(_model(self.name), 0, 1), _GROUP)
        self.last = Executor(cut_stage(_model(self.name), 1, 2), _GROUP)
        sent: list[mx.array] = []
        self.first.exchange.send = sent.append  # type: ignore[method-assign]
        self.last.exchange.receive = lambda rows, length: self._arrive(sent)  # type: ignore
        self.forwards = 0
        forward = self.last.stage.forward

        def count(*arguments: Any) -> mx.array:
            self.forwards += 1
            return forward(*arguments)

        self.last.stage = _Counted(self.last.stage, count)  # type: ignore[assignment]
        self.last._early_kernels._stage = self.last.stage

    def _arrive(self, sent: list[mx.array]) -> mx.array:
        self.before_arrival.append(self.forwards)
        return sent.pop()

    def do(self, kind: Callable[..., Decision], *arguments: Any, **fields: Any) -> None:
        self._step += 1
        decision = kind(self._step, *arguments, **fields)
        self.first.carry_out(decision)
        result = self.last.carry_out(decision)
        if result.logits is not None:
            self.computed.append(result.logits.flatten().tolist())  # type: ignore[arg-type]
        if result.computed_marks is not None:
            self.computed.append([float(each) for each in result.computed_marks.checksums])
        held = [*self.last.caches.sequences.values()]
        held += [batch.caches for batch in self.last.caches.batches.values()]
        self.caches += [cache_digest(each) for each in held if each[0].state is not None]


class _Counted:
    """A stage whose calls of ``forward`` go through a function."""

    def __init__(self, stage: Any, forward: Callable[..., mx.array]) -> None:
        self._stage = stage
        self.forward = forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)


def _steps(stages: _Stages, *, drafts: bool) -> None:
    """Do what a warm-up does: prompts of one or two chunks, batches, and a draft."""
    stages.do(WarmUp, "self-test", 1)
    stages.do(OpenSequence, 0)
    stages.do(Prefill, 0, TOKENS[:20])
    stages.do(Prefill, 0, TOKENS[20:25], marks=True)
    stages.do(JoinBatch, 0, 0)
    stages.do(Decode, 0, [TOKENS[25]])
    if drafts:
        stages.do(Decode, 0, [TOKENS[26]], drafts=TOKENS[27:30])
        stages.do(CutBack, 0, 2)
    stages.do(OpenSequence, 1)
    stages.do(Prefill, 1, TOKENS[40:52])
    stages.do(JoinBatch, 0, 1)
    stages.do(Decode, 0, TOKENS[60:62])
    stages.do(LeaveBatch, 0, 0)
    stages.do(Decode, 0, TOKENS[63:64])
    if drafts:
        for sequence in (2, 3):
            stages.do(OpenSequence, sequence)
        stages.do(PrefillTogether, 1, [2, 3], [TOKENS[:12], TOKENS[5:14]])
        stages.do(Decode, 1, TOKENS[70:72])


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_kernels, "copies_from_host", lambda: True)


@pytest.mark.parametrize(
    "name", ["kimi_k2", "4 bit", "deepseek_v32", "llama", "window", "recurrent"]
)
def test_results_and_caches_are_the_same_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plain, early = _Stages(name), _Stages(name)
    drafts = plain.last.stage.has_plain_caches
    _steps(plain, drafts=drafts)
    monkeypatch.setattr(early_kernels, "copies_from_host", lambda: True)
    _steps(early, drafts=drafts)
    assert early.computed == plain.computed
    assert early.caches == plain.caches
    assert early.forwards > plain.forwards == len(plain.before_arrival)


@pytest.mark.usefixtures("compiles")
def test_a_shape_is_computed_once_more_and_only_in_the_warm_up() -> None:
    stages = _Stages("kimi_k2")
    stages.do(OpenSequence, 0)
    stages.do(Prefill, 0, TOKENS[:4])
    assert stages.before_arrival == [0]
    stages.do(WarmUp, "prefill", 1)
    stages.do(Prefill, 0, TOKENS[4:24])
    stages.do(Prefill, 0, TOKENS[24:44])
    assert stages.before_arrival == [0, 2, 3]
    stages.do(Warm)
    stages.do(Prefill, 0, TOKENS[44:144])
    assert stages.before_arrival == [0, 2, 3, 4]


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("bounds", [(0, 1), (0, 2)])
def test_a_stage_that_waits_for_no_other_computes_nothing_twice(
    monkeypatch: pytest.MonkeyPatch, bounds: tuple[int, int]
) -> None:
    executor = Executor(cut_stage(latent_model("kimi_k2"), *bounds), _GROUP)
    monkeypatch.setattr(early_kernels.copy, "deepcopy", lambda _: pytest.fail("copies caches"))
    executor.exchange.send = lambda output: None  # type: ignore[method-assign]
    executor.carry_out(WarmUp(1, "self-test", 1))
    executor.carry_out(OpenSequence(2, 0))
    executor.carry_out(Prefill(3, 0, TOKENS[:4]))


def test_a_stage_in_the_middle_sends_what_it_computed_with_the_real_hidden_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sent(*, compiles: bool) -> list[object]:
        monkeypatch.setattr(early_kernels, "copies_from_host", lambda: compiles)
        found: list[object] = []
        executor = Executor(cut_stage(_model("three layers"), 1, 2), _GROUP)
        hidden = mx.cos(mx.arange(20 * 64, dtype=mx.float32)).reshape(1, 20, 64)
        executor.exchange.receive = lambda rows, length: hidden[:, :length]  # type: ignore
        executor.exchange.send = lambda output: found.append(output.tolist())  # type: ignore
        executor.carry_out(WarmUp(1, "self-test", 1))
        executor.carry_out(OpenSequence(2, 0))
        executor.carry_out(Prefill(3, 0, TOKENS[:20]))
        executor.carry_out(JoinBatch(4, 0, 0))
        executor.carry_out(Decode(5, 0, [TOKENS[20]]))
        return found

    assert len(sent(compiles=False)) == 2
    assert sent(compiles=True) == sent(compiles=False)


class _Sums:
    """Imitates the sums of a tensor rank: their shapes, between the calls of ``forward``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, meets: bool) -> None:
        self.seen: list[object] = []
        monkeypatch.setattr(mx.distributed, "all_sum", self._sum)
        self.rank = Executor(cut_stage(_model("kimi_k2"), 0, 2), _GROUP, meets=meets)
        forward = self.rank.stage.forward

        def noted(*arguments: Any) -> mx.array:
            self.seen.append("forward")
            output = forward(*arguments)
            return output + mx.distributed.all_sum(mx.zeros(output.shape))

        self.rank.stage = _Counted(self.rank.stage, noted)  # type: ignore[assignment]
        self.rank._early_kernels._stage = self.rank.stage

    def _sum(self, value: mx.array, **_: object) -> mx.array:
        self.seen.append(value.shape)
        return value

    def do(self, kind: Callable[..., Decision], *arguments: Any) -> list[object]:
        self.seen.clear()
        self.rank.carry_out(kind(1, *arguments))
        return self.seen[:]


def test_tensor_ranks_meet_before_a_step_in_which_one_may_wait_for_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_metal, without = (_Sums(monkeypatch, meets=meets) for meets in (True, False))
    monkeypatch.setattr(mx.distributed, "all_sum", with_metal._sum)
    assert with_metal.do(OpenSequence, 0) == []
    met = [(1,), "forward"]
    assert with_metal.do(Prefill, 0, TOKENS[:20])[:2] == met
    assert with_metal.do(Prefill, 0, TOKENS[20:40])[:2] == met
    with_metal.do(JoinBatch, 0, 0)
    assert with_metal.do(Decode, 0, [TOKENS[40]])[:2] == met
    assert with_metal.do(Decode, 0, [TOKENS[41]])[0] == "forward"
    monkeypatch.setattr(mx.distributed, "all_sum", without._sum)
    without.do(OpenSequence, 0)
    assert without.do(Prefill, 0, TOKENS[:20])[0] == "forward"


def test_tensor_ranks_on_metal_compute_small_steps_alone_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[list[float]] = []
    for metal in (False, True):
        monkeypatch.setattr(mx.metal, "is_available", lambda metal=metal: metal)
        rank = _Sums(monkeypatch, meets=True)
        monkeypatch.setattr(mx.distributed, "all_sum", rank._sum)
        rank.do(WarmUp, "self-test", 1)
        rank.do(OpenSequence, 0)
        steps = rank.do(Prefill, 0, TOKENS[:20])
        # Alone without any sum, then together.
        alone = ["forward"] if metal else []
        assert steps[: len(alone) + 2] == [*alone, (1,), "forward"]
        large = rank.do(Prefill, 0, [*TOKENS, *TOKENS, *TOKENS][:300])
        assert large[:2] == [(1,), "forward"]
        rank.do(JoinBatch, 0, 0)
        result = rank.rank.carry_out(Decode(1, 0, [TOKENS[0]]))
        assert result.logits is not None
        found.append(result.logits.flatten().tolist())  # type: ignore[arg-type]
    assert found[0] == found[1]


@pytest.mark.usefixtures("compiles")
def test_a_failure_before_the_hidden_states_arrive_does_not_end_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = _Stages("kimi_k2")
    stages.do(WarmUp, "self-test", 1)
    stages.do(OpenSequence, 0)
    tried = []

    def fail(_: Any) -> None:
        tried.append(True)
        raise RuntimeError("[malloc] Unable to allocate 1 bytes.")

    monkeypatch.setattr(early_kernels.copy, "deepcopy", fail)
    stages.do(Prefill, 0, TOKENS[:4])
    stages.do(Prefill, 0, TOKENS[4:24])
    assert stages.last.caches.sequences[0][0].offset == 24
    assert tried == [True]


_ALONE = """
import os, pathlib, sys, tempfile
from k2cli.rank.startup import early_kernels
from tests.rank.startup.test_early_kernels import compiled_at_arrival
early_kernels.copies_from_host = lambda: sys.argv[1] == "early"
found = compiled_at_arrival(pathlib.Path(tempfile.gettempdir()))
sys.stdout.write(" ".join(map(str, found)))
sys.stdout.flush()
os._exit(0)
"""


def compiled_at_arrival(folder: Path) -> list[int]:
    """Count the libraries that MLX's CPU compiled: when hidden states arrived, and at the end."""
    stages = _Stages("kimi_k2")
    found: list[int] = []
    arrive = stages.last.exchange.receive

    def receive(rows: int, length: int) -> Any:
        found.append(len(list(folder.rglob("*.so"))))
        return arrive(rows, length)

    stages.last.exchange.receive = receive  # type: ignore[method-assign]
    stages.do(WarmUp, "self-test", 1)
    stages.do(OpenSequence, 0)
    stages.do(Prefill, 0, TOKENS[:20])
    stages.do(JoinBatch, 0, 0)
    stages.do(Decode, 0, [TOKENS[20]])
    return [found[-1], len(list(folder.rglob("*.so")))]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["early", "late"])
def test_all_kernels_of_a_step_are_compiled_when_its_hidden_states_arrive(
    tmp_path: Path, when: str
) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", _ALONE, when]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    at_arrival, in_the_end = map(int, found.stdout.split())
    assert in_the_end > 0
    assert (at_arrival == in_the_end) == (when == "early")
