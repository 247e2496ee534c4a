"""The coverage proof passes for the tensors of the placement, and for no others."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.even_split import even_split
from k2cli.choices import Strategy
from k2cli.errors import ClusterError
from k2cli.sharding.assemble import build
from k2cli.sharding.coverage import check_coverage, describe_whole
from k2cli.sharding.placement import Placement, RankPlacement
from k2cli.sharding.tensor import StandInGroup
from k2cli.sharding.trace import cut, parameters

CONFIG: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 5, "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}  # fmt: skip

Held = list[dict[str, tuple[int, ...]]]


def _placement(strategy: Strategy, size: int) -> Placement:
    layers = even_split(5, size) if strategy == "pipeline" else ((0, 5),) * size
    parts = tuple(RankPlacement(rank, f"n{rank}", part) for rank, part in enumerate(layers))
    return Placement(strategy, parts)


def _held(placement: Placement) -> Held:
    held = []
    for rank in range(placement.size):
        stage = cut(CONFIG, build(CONFIG), placement, StandInGroup(rank, placement.size))
        held.append({name: value.shape for name, value in parameters(stage.model).items()})
    return held


@pytest.mark.parametrize(
    ("strategy", "size"), [("single", 1), ("pipeline", 2), ("pipeline", 5), ("tensor", 2)]
)
def test_what_was_placed_is_proven(strategy: Strategy, size: int) -> None:
    placement = _placement(strategy, size)
    proven = check_coverage(describe_whole(build(CONFIG)), placement, _held(placement))
    assert proven == len(parameters(build(CONFIG)))


def test_a_layer_that_no_stage_loaded_is_named() -> None:
    placement = _placement("pipeline", 2)
    held = _held(placement)
    held[1] = {name: shape for name, shape in held[1].items() if ".layers.1." not in name}
    with pytest.raises(ClusterError, match=r"model\.layers\.1\..* held by ranks \[\]"):
        check_coverage(describe_whole(build(CONFIG)), placement, held)


def test_two_ranks_that_split_differently_are_found() -> None:
    placement = _placement("pipeline", 2)
    other = Placement("pipeline", (RankPlacement(0, "n0", (3, 5)), RankPlacement(1, "n1", (0, 3))))
    held = [_held(placement)[0], _held(other)[1]]
    with pytest.raises(ClusterError, match=r"layers\.2\..*held by ranks \[0, 1\]"):
        check_coverage(describe_whole(build(CONFIG)), placement, held)


def test_a_slice_that_does_not_add_up_is_found() -> None:
    placement = _placement("tensor", 2)
    held = _held(placement)
    name = "model.layers.0.mlp.up_proj.weight"
    held[1][name] = (held[1][name][0] // 2, *held[1][name][1:])
    with pytest.raises(ClusterError, match=name):
        check_coverage(describe_whole(build(CONFIG)), placement, held)


def test_tensors_that_the_model_does_not_have_are_found() -> None:
    placement = _placement("single", 1)
    held = _held(placement)
    held[0]["model.layers.0.backdoor.weight"] = (1,)
    with pytest.raises(ClusterError, match="backdoor"):
        check_coverage(describe_whole(build(CONFIG)), placement, held)
