"""The planned bytes of each rank against the loader's: equal to the byte, in every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from k2cli.models.checkpoint import read_checkpoint
from k2cli.planning.hardware.spec import parse_hardware
from k2cli.rank.loader import load_part
from k2cli.sharding.tensor import StandInGroup
from k2cli.sharding.weights_and_cache import kv_cache_bytes
from tests.planning.plans import make_plan
from tests.quantization import originals
from tests.support.rank_pool import assignments


def compressed(folder: Path) -> Path:
    """A Kimi stored like K2-Thinking: experts' weights as packed int4 with scales, no biases."""
    source = originals.kimi(folder.with_name("plain"))
    config = read_checkpoint(source).config
    tensors: dict[str, mx.array] = {}
    for file in sorted(source.glob("*.safetensors")):
        opened = mx.load(str(file))
        assert isinstance(opened, dict)
        tensors |= opened
    for name in [name for name in tensors if ".experts." in name]:
        weight = tensors.pop(name)
        rows, columns = weight.shape
        tensors[f"{name}_packed"] = mx.random.randint(0, 2**31 - 1, (rows, columns // 8), mx.int32)
        tensors[f"{name}_scale"] = mx.random.uniform(0.05, 0.1, (rows, columns // 32)).astype(
            mx.bfloat16
        )
        tensors[f"{name}_shape"] = mx.array([rows, columns], mx.int32)
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    }  # fmt: skip
    return originals.save(folder, config, tensors)


def packed(mode: str, group_size: int, bits: int) -> Callable[[Path], Path]:
    """An MLX conversion in one of its own modes; experts of layer 1 in another number of bits."""

    def make(folder: Path) -> Path:
        from k2cli.sharding.assemble import assemble
        from k2cli.sharding.trace import parameters

        quantization: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
        if mode == "affine":
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.layers.1.mlp.switch_mlp.{part}"
                quantization[name] = {"group_size": 32, "bits": 8}
        config = {**originals.KIMI, "torch_dtype": "bfloat16", "quantization": quantization}
        return originals.save(folder, config, parameters(assemble(config, None)))

    return make


FORMATS: dict[str, Callable[[Path], Path]] = {
    "bf16": originals.kimi,
    "fp8 blocks": lambda folder: originals.kimi(folder, fp8=True),
    "compressed-tensors int4": compressed,
    "affine, mixed bits": packed("affine", 64, 4),
    "mxfp4": packed("mxfp4", 32, 4),
    "nvfp4": packed("nvfp4", 16, 4),
    "mxfp8": packed("mxfp8", 32, 8),
}
PLACEMENTS = [("single", 1), ("pipeline", 2), ("pipeline", 3), ("tensor", 2), ("tensor", 4)]


@pytest.fixture(scope="module", params=FORMATS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FORMATS[request.param](tmp_path_factory.mktemp("formats") / "model")


def check(checkpoint: Path, strategy: str, size: int) -> None:
    nodes = parse_hardware(f"{size}x m3-ultra-96")
    plan = make_plan(str(checkpoint), nodes, strategy=strategy, context_length=512)
    assert plan.model.stored_bytes == read_checkpoint(checkpoint).stored_bytes
    planned = assignments(
        checkpoint, strategy, size, dtype=plan.request.dtype, head=plan.placement.head,
        layers=[part.layers for part in plan.placement.ranks],
        expected_weights_bytes=[node.weights_bytes for node in plan.nodes],
    )  # fmt: skip
    for assignment, node in zip(planned, plan.nodes, strict=True):
        # The loader itself refuses other bytes than the plan's; here, what it counted is compared.
        part = load_part(assignment, StandInGroup(assignment.rank, size), lambda *_: None)
        assert sum(tensor.nbytes for tensor in part.held) == node.weights_bytes
        assert kv_cache_bytes(part.stage, 512) == node.kv_cache_bytes


@pytest.mark.parametrize(("strategy", "size"), PLACEMENTS)
def test_weights_and_cache_are_those_of_the_loader(
    checkpoint: Path, strategy: str, size: int
) -> None:
    if strategy == "tensor" and size == 4 and "quantization" in json.loads(
        (checkpoint / "config.json").read_text()
    ):  # fmt: skip
        pytest.skip("groups of the toy's narrow matrices do not divide by four")
    check(checkpoint, strategy, size)


@pytest.mark.parametrize(("strategy", "size"), [("single", 1), ("pipeline", 4)])
def test_the_demo_too(demo_checkpoint: Path, strategy: str, size: int) -> None:
    check(demo_checkpoint, strategy, size)
