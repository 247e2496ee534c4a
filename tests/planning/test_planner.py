"""Plans of the full K2 from its config alone, of real checkpoints, and of invalid input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from k2cli.errors import K2Error, UsageError
from k2cli.models.checkpoint import read_checkpoint
from k2cli.planning.hardware.machine import NodeMemory, this_machine
from k2cli.planning.hardware.spec import parse_hardware
from k2cli.planning.plan import Plan, plan_from_json, plan_to_json
from k2cli.planning.planner import Planner
from k2cli.planning.request import PlanRequest
from k2cli.sharding.assemble import assemble
from k2cli.units import GB, GIB
from tests.planning.plans import make_plan
from tests.quantization import originals

CONFIGS = Path(__file__).resolve().parent.parent / "data" / "configs"
K2 = str(CONFIGS / "k2-mlx-4bit")


def weights(plan: Plan) -> list[int]:
    return [node.weights_bytes for node in plan.nodes]


def machine(name: str, size: int, device: Any = "metal") -> NodeMemory:
    return NodeMemory(name, size, size, "exact", device)


# --- the full K2 --------------------------------------------------------------------------------


def test_k2_on_one_machine_does_not_fit_and_says_by_how_much() -> None:
    plan = make_plan(K2, parse_hardware("1x m3-ultra-512"), context_length=131_072)
    (node,) = plan.nodes
    assert node.weights_bytes == 577_593_515_008
    assert node.kv_cache_bytes == 9_210_691_584
    assert plan.model.parameters == 1_026_408_232_448
    assert plan.model.stored_bytes == 577_593_515_008
    assert plan.placement.strategy == "single"
    assert not plan.fits
    assert node.headroom_bytes == node.limit_bytes - node.total_bytes < -79 * GB
    assert plan.marks["weights_bytes"] == plan.marks["kv_cache_bytes"] == "exact"
    assert plan.marks["limit_bytes"] == "assumed"


@pytest.mark.parametrize(
    ("head", "placed", "weights_bytes"),
    [
        ("auto", "sharded", 289_552_964_608),
        ("sharded", "sharded", 289_552_964_608),
        ("replicated", "replicated", 289_883_266_048),
    ],
)
def test_k2_by_tensor_on_two_replicates_the_cache(
    head: str, placed: str, weights_bytes: int
) -> None:
    nodes = parse_hardware("2x m3-ultra-512")
    plan = make_plan(K2, nodes, strategy="tensor", context_length=131_072, head=head)
    assert plan.placement.head == placed
    assert weights(plan) == [weights_bytes] * 2
    assert [node.kv_cache_bytes for node in plan.nodes] == [9_210_691_584] * 2
    assert plan.fits


def test_k2_by_pipeline_splits_weights_and_cache() -> None:
    nodes = parse_hardware("2x m3-ultra-512")
    plan = make_plan(K2, nodes, strategy="pipeline", context_length=131_072)
    # The head costs as much as a layer or two.
    assert [part.layers for part in plan.placement.ranks] == [(31, 61), (0, 31)]
    assert sum(weights(plan)) == 577_593_515_008
    assert sum(node.kv_cache_bytes for node in plan.nodes) == 9_210_691_584
    assert plan.request.dtype == "bfloat16"


@pytest.mark.parametrize("name", ["k2-thinking", "k2.5"])
def test_native_int4_is_stored_smaller_than_it_is_held(name: str) -> None:
    plan = make_plan(str(CONFIGS / name), parse_hardware("2x m3-ultra-512"), strategy="pipeline")
    assert round(plan.model.stored_bytes / GB) == 594
    assert round(sum(weights(plan)) / GB) == 658
    assert plan.marks["stored_bytes"] == "modelled"


def test_fp8_original_is_stored_at_one_byte_per_weight_and_held_at_two() -> None:
    plan = make_plan("k2-instruct", parse_hardware("4x m3-ultra-512"), strategy="pipeline")
    # The published checkpoint's headers add up to 1029.17 GB.
    assert round(plan.model.stored_bytes / 1e7) == 102_917
    assert round(sum(weights(plan)) / GB) == 2053
    assert not plan.fits


def test_an_uneven_split_is_found_where_the_even_one_does_not_fit() -> None:
    nodes = parse_hardware("m3-ultra-512 + m3-ultra-256")
    plan = make_plan(str(CONFIGS / "k2-thinking"), nodes, strategy="pipeline")
    (late, early) = plan.placement.ranks
    assert plan.fits
    assert late.layers[1] - late.layers[0] > early.layers[1] - early.layers[0]


def test_three_machines_cannot_share_64_heads() -> None:
    nodes = parse_hardware("3x m3-ultra-256")
    with pytest.raises(UsageError, match="64 attention heads, which 3 ranks"):
        make_plan(K2, nodes, strategy="tensor")
    plan = make_plan(K2, nodes)
    assert plan.placement.strategy == "pipeline"
    assert "64 attention heads" in plan.reason


@pytest.mark.parametrize("hardware", ["2x m3-ultra-512", "m3-ultra-512"])
def test_the_full_k2_needs_little_memory_to_plan(hardware: str) -> None:
    script = (
        "import re, resource, sys\n"
        "from k2cli.planning.advice import advise\n"
        "from k2cli.planning.curve import context_curve\n"
        "from k2cli.planning.hardware.spec import parse_hardware\n"
        "from k2cli.planning.planner import Planner\n"
        "from k2cli.planning.request import PlanRequest\n"
        "planner, nodes = Planner(sys.argv[1]), parse_hardware(sys.argv[2])\n"
        "request = PlanRequest(context_length=262144, free_order=True)\n"
        "plan = planner.plan(nodes, request)\n"
        "plan.fits or advise(planner, nodes, request, plan)\n"
        "context_curve(planner, nodes, request, plan)\n"
        # On Linux ru_maxrss begins with that of the process that started this one.
        "if sys.platform == 'linux':\n"
        "    status = open('/proc/self/status').read()\n"
        "    print(int(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1]) * 1024)\n"
        "else:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "assert not {'transformers', 'huggingface_hub', 'torch'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", script, str(CONFIGS / "k2.5"), hardware]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 250_000_000


# --- checkpoints --------------------------------------------------------------------------------


def test_a_checkpoints_headers_decide(toy_k2: Path) -> None:
    plan = make_plan(str(toy_k2), parse_hardware("2x m3-ultra-512"))
    checkpoint = read_checkpoint(toy_k2)
    assert plan.model.stored_bytes == checkpoint.stored_bytes
    # Stored in float32 and packed integers, and torch_dtype says float32: nothing is cast.
    assert sum(weights(plan)) == checkpoint.stored_bytes
    assert plan.marks["stored_bytes"] == "exact"


@pytest.mark.parametrize("fp8", [False, True])
def test_an_original_plans_to_what_loading_it_holds(tmp_path: Path, fp8: bool) -> None:
    source = originals.kimi(tmp_path / "source", fp8=fp8)
    plan = make_plan(str(source), parse_hardware("2x m3-ultra-512"), strategy="pipeline")
    opened: dict[str, Any] = {}
    for file in source.glob("*.safetensors"):
        opened |= mx.load(str(file))
    loaded = assemble(read_checkpoint(source).config, opened, "bfloat16")
    held = sum(value.nbytes for _, value in tree_flatten(loaded.parameters()))
    assert sum(weights(plan)) == held
    assert plan.model.stored_bytes == read_checkpoint(source).stored_bytes


def test_ranks_of_one_machine_share_its_limit(toy_k2: Path) -> None:
    plan = make_plan(str(toy_k2), [this_machine(), this_machine()])
    assert [node.name for node in plan.nodes] == ["localhost", "localhost"]
    assert [node.limit_bytes for node in plan.nodes] == [this_machine().limit_bytes // 2] * 2
    if plan.nodes[0].backend == "cpu":
        assert plan.request.dtype == "float32"


def test_quantized_keys_and_values_are_refused_for_nvidia_gpus() -> None:
    request = PlanRequest(context_length=4096, kv_bits=8)
    with pytest.raises(UsageError, match="--kv-bits needs Metal or a CPU, and h200-141"):
        Planner("qwen3-235b").plan(parse_hardware("2x h200-141"), request)
    assert Planner("qwen3-235b").plan(parse_hardware("2x m3-ultra-512"), request).fits


def test_default_context_is_the_models_but_at_most_32768(toy_k2: Path, tmp_path: Path) -> None:
    node = [machine("a", 600 * GB)]
    assert make_plan(str(toy_k2), node).request.context_length == 32_768
    shorter = edited(tmp_path, max_position_embeddings=4096)
    assert make_plan(shorter, node).request.context_length == 4096
    with pytest.raises(UsageError, match=r"4,097 tokens is beyond this model's maximum of 4,096"):
        make_plan(shorter, node, context_length=4097)


def test_a_plan_survives_its_json() -> None:
    plan = make_plan(K2, parse_hardware("2x m3-ultra-512"))
    assert plan_from_json(plan_to_json(plan), "plan.json") == plan


def test_a_plan_of_the_previous_version_loads_and_is_made_again() -> None:
    saved = (CONFIGS.parent / "previous" / "plan.json").read_bytes()
    # Joined projections have been added since, and take memory.
    request = PlanRequest(free_order=True, joins_projections=False)
    plan = Planner("k2-thinking").plan(parse_hardware("2x m3-ultra-512"), request)
    assert plan_from_json(saved, "plan.json").placement == plan.placement
    # The page that a term's source names has moved since.
    moved = saved.replace(b"docs/speed", b"docs/design/speed")
    made = json.loads(without_predictions(plan_to_json(plan)))
    # Fields that have been added since.
    assert [node.pop("gpu") for node in made["nodes"]] == [None, None]
    assert made["request"].pop("prompt_tokens") == 2000
    assert made["request"].pop("answer_tokens") == 500
    assert made["request"].pop("attention_block_tokens") == 0
    assert made["request"].pop("kv_bits") == 0
    assert made["speed"].pop("exchange_seconds") > 0
    assert len(made["speed"].pop("stages")) == 2
    then = json.loads(without_predictions(moved))
    # Steps that verify a draft have been added since: they have logits of 16 rows.
    for node, before in zip(made["nodes"], then["nodes"], strict=True):
        assert node["breakdown"].pop("decode_activation_bytes") > before["breakdown"].pop(
            "decode_activation_bytes"
        )
        logits = 15 * 163840 * 2
        before["breakdown"]["communication_bytes"] += logits
        before["overhead_bytes"] += logits
        before["total_bytes"] += logits
        before["headroom_bytes"] -= logits
    then["alternatives"][0]["headroom_bytes"] -= logits
    # The constants of speed have been fitted again: they moved, but not far.
    old, new = (without_speeds(document) for document in (then, made))
    assert new == pytest.approx(old, rel=0.1)
    assert made == then


def without_speeds(document: dict[str, Any]) -> list[float]:
    """Take predicted speeds out of a plan, and return the expected ones."""
    speed = document.pop("speed")
    found = [value["expected"] for value in speed.values() if isinstance(value, dict)]
    for alternative in document["alternatives"]:
        found += [alternative.pop(f"{kind}_tokens_per_second") for kind in ("decode", "prefill")]
    return found


def without_predictions(document: bytes) -> bytes:
    """Leave the predicted seconds out of the reasons for a placement."""
    return re.sub(rb"[\d.]+ (s|times)\b", rb"# \1", document)


# --- nonsense -----------------------------------------------------------------------------------


def edited(folder: Path, **changes: Any) -> str:
    """Write K2's config with changes into a folder; a value of None removes the field."""
    config = json.loads((CONFIGS / "k2-mlx-4bit" / "config.json").read_text())
    config |= changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", None), ("num_hidden_layers", -1), ("num_hidden_layers", 10**12),
        ("num_hidden_layers", "61"), ("num_hidden_layers", 0), ("num_hidden_layers", True),
        ("hidden_size", None), ("hidden_size", 10**9), ("hidden_size", 7168.5),
        ("hidden_size", 10**400), ("vocab_size", None), ("vocab_size", 2**60),
        ("kv_lora_rank", None), ("n_routed_experts", -5), ("n_routed_experts", "many"),
        ("num_experts_per_tok", 1000), ("moe_intermediate_size", []), ("v_head_dim", {}),
        ("num_attention_heads", 0), ("rope_theta", "x"), ("rope_theta", -1), ("rope_scaling", 5),
        ("max_position_embeddings", 0), ("model_type", None), ("model_type", "gpt-17"),
        ("model_type", "../../etc/passwd"), ("quantization", {"bits": 4}),
        ("quantization", {"bits": 99, "group_size": 64}), ("quantization", "4bit"),
        ("quantization", {"bits": 4, "group_size": 0}), ("text_config", 7),
        ("topk_method", "guess"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_named_with_its_value(tmp_path: Path, field: str, value: Any) -> None:
    source = edited(tmp_path, **{field: value})
    with pytest.raises(K2Error) as caught:
        make_plan(source, parse_hardware("2x m3-ultra-512"))
    told = field if field != "topk_method" else "topk"
    assert told in caught.value.message


@pytest.mark.parametrize("text", ["", "[]", "{", "nul", '{"a": 1}', "\x00", "[" * 100_000])
def test_what_is_no_config_is_an_error_not_a_traceback(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(K2Error, match=r"config\.json"):
        make_plan(str(tmp_path), parse_hardware("m3-ultra-512"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 0}, "at least 1 token, not 0"),
        ({"context_length": 262_145}, "262,145 tokens is beyond this model's maximum of 262,144"),
        ({"concurrency": 0}, "concurrency must be between 1 and 4096, not 0"),
        ({"concurrency": 10**9}, "not 1000000000"),
        ({"strategy": "single"}, "runs on one node, not on 2"),
    ],
)
def test_wrong_requests_are_usage_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(K2, parse_hardware("2x m3-ultra-512"), **options)


def test_more_nodes_than_layers_is_refused(tmp_path: Path) -> None:
    source = edited(tmp_path, num_hidden_layers=2)
    nodes = [machine(f"n{i}", 512 * GIB) for i in range(3)]
    with pytest.raises(UsageError, match="2 layers, there are 3 nodes"):
        make_plan(source, nodes, strategy="pipeline")
