"""A model as a rank holds it on CUDA gives what mlx-lm's modules give."""

from __future__ import annotations

import mlx.core as mx
import pytest

from k2cli.rank.kernels import device
from k2cli.rank.kernels.device import avoid_wrong_kernels, check_kernels
from k2cli.rank.kernels.experts import PartedExperts
from k2cli.rank.kernels.heads import HeadProjection
from k2cli.sharding.stage import make_cache
from tests.support.latent_models import TOKENS, latent_model


def test_all_that_is_replaced_on_cuda_gives_the_same_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = latent_model("4 bit")

    def logits() -> list[mx.array]:
        """Compute three rows: a chunk, then a token of each."""
        cache = make_cache(model)
        found = [
            model(mx.array([TOKENS[first : first + 30] for first in (0, 9, 60)]), cache=cache),
            model(mx.array([[5], [6], [7]]), cache=cache),
        ]
        mx.eval(found)
        return found

    expected = logits()
    avoid_wrong_kernels(model)
    assert not any(isinstance(each, HeadProjection) for each in model.modules()), "not on a CPU"
    monkeypatch.setattr(device, "copies_from_host", lambda: True)
    avoid_wrong_kernels(model)
    kinds = {type(each) for each in model.modules()}
    assert {HeadProjection, PartedExperts} <= kinds
    assert "K2QuantizedLinear" in {kind.__name__ for kind in kinds}
    for mine, other in zip(logits(), expected, strict=True):
        assert mx.allclose(mine, other, rtol=1e-4, atol=1e-4)
    check_kernels(model)
