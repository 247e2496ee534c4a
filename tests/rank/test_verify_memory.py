"""The memory of a step that verifies a draft, and what cutting it back leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from k2cli.choices import MOST_VERIFIED_TOKENS
from k2cli.planning.memory.prefill import prefill_activation, shape_of_model
from k2cli.protocol import CutBack, Decode, JoinBatch, OpenSequence, Prefill
from k2cli.rank.executor import Executor
from k2cli.rank.loader import load_part
from tests.support.memory import held_bytes
from tests.support.rank_pool import assignments

CONTEXT = 1024


def test_a_verified_draft_takes_what_is_planned_and_leaves_nothing(toy_k2: Path) -> None:
    [assignment] = assignments(toy_k2, "single", 1)
    part = load_part(assignment, None, lambda done, total: None)
    executor = Executor(part.stage, None)
    tokens = [300 + number % 500 for number in range(CONTEXT)]
    executor.carry_out(OpenSequence(1, 0))
    executor.carry_out(Prefill(2, 0, tokens[: CONTEXT - MOST_VERIFIED_TOKENS]))
    executor.carry_out(JoinBatch(3, 0, 0))
    expected = executor.carry_out(Decode(4, 0, [7])).logits
    assert expected is not None
    mx.eval(expected)
    executor.carry_out(CutBack(5, 0, 1))
    digest = executor.caches.digest(0)

    before = held_bytes()
    step = Decode(6, 0, [7], drafts=tokens[-MOST_VERIFIED_TOKENS + 1 :])
    logits = executor.carry_out(step).logits
    assert logits is not None
    mx.eval(mx.argmax(logits, axis=-1))
    peak = mx.get_peak_memory() - before
    assert logits.shape == (MOST_VERIFIED_TOKENS, expected.shape[-1])
    assert mx.allclose(logits[0], expected[0], atol=1e-4).item()

    shape = shape_of_model(vars(part.stage.model.args), part.stage.model)
    planned = prefill_activation(
        replace(shape, quantized=True), device="cpu", chunk_tokens=MOST_VERIFIED_TOKENS,
        context_length=CONTEXT, concurrency=MOST_VERIFIED_TOKENS, itemsize=4,
        settings=part.stage.model.layers[0].self_attn.settings,
    ).peak_bytes  # fmt: skip
    assert 0 < peak <= planned
    executor.carry_out(CutBack(7, 0, MOST_VERIFIED_TOKENS))
    assert executor.caches.digest(0) == digest
    again = executor.carry_out(Decode(8, 0, [7])).logits
    assert again is not None
    assert mx.array_equal(again, expected).item()
