"""Random models, settings and decisions: k2's latent attention gives what mlx-lm's class gives.

Prompts in chunks of 1 to 300 tokens, prompts together, batches whose rows have other lengths, rows
that leave and are kept, prefixes that are used in part, and drafts that are cut back.
"""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from k2cli.protocol import (
    CutBack,
    Decode,
    JoinBatch,
    LeaveBatch,
    OpenSequence,
    Prefill,
    PrefillTogether,
)
from k2cli.rank.attention import latent
from k2cli.sharding.assemble import build, cast
from k2cli.sharding.latent_ways import LatentSettings
from lab.toy_k2.checkpoint import toy_config
from tests.support.latent_models import MLX_LM, SMALL, Requests

CLOSE = 1e-4
"""Largest difference in float32, relative to the largest logit; the largest seen was 1.2e-6."""

Decisions = list[tuple[Any, tuple[Any, ...], dict[str, Any]]]


def _model(draw: random.Random) -> nn.Module:
    heads = draw.choice((1, 2, 3, 4, 8))
    config = toy_config(SMALL) | {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "qk_nope_head_dim": draw.choice((16, 24, 32, 64)),
        "qk_rope_head_dim": draw.choice((8, 16, 32)),
        "v_head_dim": draw.choice((16, 24, 48, 64)),
        "kv_lora_rank": draw.choice((32, 64, 96, 128)),
        "q_lora_rank": draw.choice((None, 32, 64)),
    }
    if draw.random() < 0.25:
        sparse = {"index_n_heads": 4, "index_head_dim": 64, "index_topk": draw.choice((5, 24, 400))}
        config |= {"model_type": "deepseek_v32", "q_lora_rank": 32, **sparse}
    mx.random.seed(draw.randrange(2**30))
    model = build(config)
    cast(model, mx.float32)
    mx.eval(model.parameters())
    return model


class _Drawn:
    """Decisions for one rank, as a leader may make them."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.decisions: Decisions = []
        self.rows: list[list[int]] = []
        """Sequence and length of each row of the batch."""
        self.kept: dict[int, int] = {}
        self.last = 0
        for _ in range(draw.randint(6, 14)):
            draw.choice(
                (self.prompt, self.prompt, self.together, self.step, self.step, self.leave)
            )()
        self.step()

    def add(self, kind: Any, *arguments: Any, **fields: Any) -> None:
        self.decisions.append((kind, arguments, fields))

    def tokens(self, count: int) -> list[int]:
        return self.draw.choices(range(1, 319), k=count)

    def opened(self, **fields: Any) -> int:
        self.last += 1
        self.add(OpenSequence, self.last, **fields)
        return self.last

    def prompt(self) -> None:
        length, fields = 0, dict[str, int]()
        if self.kept and self.draw.random() < 0.5:
            prefix = self.draw.choice(list(self.kept))
            length = self.draw.randint(1, self.kept[prefix])
            fields = {"prefix": prefix, "kept_tokens": length}
        sequence = self.opened(**fields)
        for _ in range(self.draw.randint(1, 4)):
            count = self.draw.choice((1, 2, 3, 7, 16, self.draw.randint(1, 300)))
            self.add(Prefill, sequence, self.tokens(count))
            length += count
        self.add(JoinBatch, 0, sequence)
        self.rows.append([sequence, length])

    def together(self) -> None:
        counts = [self.draw.choice((1, 2, 5, self.draw.randint(1, 150))) for _ in range(3)]
        sequences = [self.opened() for _ in counts]
        self.add(PrefillTogether, 0, sequences, [self.tokens(count) for count in counts])
        self.rows += [[one, count] for one, count in zip(sequences, counts, strict=True)]

    def step(self) -> None:
        if not self.rows:
            self.prompt()
        if len(self.rows) > 1 or self.draw.random() < 0.3:
            self.add(Decode, 0, self.tokens(len(self.rows)))
            for row in self.rows:
                row[1] += 1
            return
        drafted = self.draw.choice((3, 7, 15))
        wrong = self.draw.randint(0, drafted)
        self.add(Decode, 0, self.tokens(1), drafts=self.tokens(drafted))
        if wrong:
            self.add(CutBack, 0, wrong)
        self.rows[0][1] += 1 + drafted - wrong

    def leave(self) -> None:
        if self.rows:
            sequence, length = self.rows.pop(self.draw.randrange(len(self.rows)))
            self.kept[sequence] = length
            self.add(LeaveBatch, 0, sequence, keep_as=sequence)


def _logits(model: nn.Module, settings: LatentSettings, decisions: Decisions) -> list[mx.array]:
    run = Requests(model, settings)
    found = [run.do(kind, *arguments, **fields) for kind, arguments, fields in decisions]
    return [logits for logits in found if logits is not None]


@pytest.mark.parametrize(
    "seed",
    [*range(4), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(4, 60))],
)
def test_any_decisions_give_mlx_lms_logits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = set[bool]()
    attend = latent._attend

    def noted(*arguments: Any, absorbed: bool) -> mx.array:
        ways.add(absorbed)
        return attend(*arguments, absorbed=absorbed)

    monkeypatch.setattr(latent, "_attend", noted)
    draw = random.Random(seed)
    model, decisions = _model(draw), _Drawn(draw).decisions
    expected = _logits(model, MLX_LM, decisions)
    assert expected
    assert not ways
    for weight in (0.0, 1.0, 3.0):
        settings = LatentSettings(weight, draw.choice((1, 3, 8, 16, 17, 64, 100, 500)))
        for found, wanted in zip(_logits(model, settings, decisions), expected, strict=True):
            most = mx.abs(wanted).max().item()
            assert mx.abs(found - wanted).max().item() < CLOSE * most, settings  # type: ignore[operator]
            assert mx.array_equal(mx.argmax(found, axis=-1), mx.argmax(wanted, axis=-1)), settings
    assert ways == {False, True}
