"""The link check between real ranks: right data pass, wrong data of long prompts are named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
import pytest

from k2cli.errors import ClusterError
from k2cli.protocol import EngineReady, LinkCheck, LoadProgress, StepDigest
from k2cli.rank.startup.link_check import GPU_BOUND, LinkChecker, _Seen
from k2cli.rank.startup.marks import first_difference, kept_output, mark
from tests.support.bootstraps import make_assignment
from tests.support.faults import FAULTY_RANKS
from tests.support.rank_pool import RankPool, assignments, running

CHUNK = 128
CHUNK_BYTES = CHUNK * 256 * 4
"""Hidden states of a chunk of the toy, which computes with float32."""


def _pool(
    checkpoint: Path,
    folder: Path,
    strategy: str,
    size: int,
    fault: str = "",
    tokens: tuple[int, ...] = (300,),
    **changes: Any,
) -> RankPool:
    changes = {"prefill_chunk_tokens": CHUNK, "context_length": 512} | changes
    parts = assignments(checkpoint, strategy, size, link_check=LinkCheck(list(tokens)), **changes)
    paths = [str(FAULTY_RANKS), os.environ["PYTHONPATH"]]
    faults = {"PYTHONPATH": os.pathsep.join(paths), "FAULTY_RANKS_TRANSFER": fault} if fault else {}
    return RankPool(parts, folder, environment=faults)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("strategy", "size"), [pytest.param("pipeline", 2, marks=pytest.mark.soak), ("tensor", 2)]
)
def test_right_data_pass_and_each_chunk_is_reported(
    toy_k2: Path, tmp_path: Path, strategy: str, size: int
) -> None:
    with running(
        _pool(toy_k2, tmp_path, strategy, size, tokens=(100, 9999), context_length=300)
    ) as pool:
        seen = pool.ranks[0].seen
        [ready] = [message for message in seen if isinstance(message, EngineReady)]
        assert ready.checked_tokens == 299  # what the plan has room for
        shapes = [each.shape for each in seen if isinstance(each, LoadProgress) and each.shape]
        for run in ("first", "second"):
            assert f"link check, {run} run of 100 tokens, chunk 1 of 1" in shapes
            for chunk in range(1, 4):
                assert f"link check, {run} run of 299 tokens, chunk {chunk} of 3" in shapes
        # Nothing of the check is left: the plan's whole cache is free for this prompt.
        assert len(pool.generate(list(range(300, 590)), 8)) == 8


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("strategy", "fault", "named"),
    [
        # Four right chunks on rank 0, and the third arrives wrong: its middle position is 256 + 22.
        ("pipeline", f"0 recv {20 * 1024} 4",
         "rank 0 on n0 received other data than rank 1 on n1 sent (chunk 3 of 3, position 278, "
         "first run, "),
        # Only arrays as large as a whole chunk are wrong (in the lab too: tests/lab).
        pytest.param("tensor", f"1 all_sum {CHUNK_BYTES - 1} 0",
         "rank 1 on n1 has other sums than rank 0 on n0 (chunk 1 of 3, position 64, first run, ",
         marks=pytest.mark.soak),
        # Equal on all ranks, but later than in the first run: two sums for each of five layers.
        ("tensor", f"0,1 all_sum {CHUNK_BYTES - 1} 25",
         "rank 1 on n1 computed other data in the second run than in the first (chunk 1 of 3, "
         "position 64, "),
    ],
    ids=["pipeline", "tensor", "second-run"],
)  # fmt: skip
def test_wrong_data_of_long_prompts_are_named(
    toy_k2: Path, tmp_path: Path, strategy: str, fault: str, named: str
) -> None:
    pool = _pool(toy_k2, tmp_path, strategy, 2, fault, tokens=(100, 300))
    with pytest.raises(RuntimeError) as raised, running(pool):
        pass
    said = str(raised.value)
    assert "link check failed over ring with a prompt of 300 tokens" in said
    assert named in said
    assert "k2 doctor --deep" in said


@pytest.mark.soak
@pytest.mark.ranks
def test_a_time_limit_cuts_the_prompt_short(toy_k2: Path, tmp_path: Path) -> None:
    pool = _pool(toy_k2, tmp_path, "pipeline", 2, prefill_chunk_tokens=16)
    pool.assignments = [_with_limit(part, seconds=1e-6) for part in pool.assignments]
    with running(pool):
        [ready] = [each for each in pool.ranks[0].seen if isinstance(each, EngineReady)]
        assert 16 <= ready.checked_tokens <= 48


def _with_limit(part: Any, seconds: float) -> Any:
    return msgspec.structs.replace(part, link_check=LinkCheck([300], seconds))


def test_a_token_after_a_prompt_that_was_cut_short_is_no_chunk() -> None:
    nothing: Any = None
    checker = LinkChecker(nothing, nothing, make_assignment(), nothing, 9, 1.0, on_gpu=False)
    one, other = (
        _Seen({0: StepDigest(0, 5, "", "", caches=caches)}, 48, None) for caches in ("a", "b")
    )
    with pytest.raises(ClusterError, match=r"the token after the prompt, position 48\)"):
        checker._compare_runs(one, other, [16] * 8)


# --- marks --------------------------------------------------------------------------------------


def test_rounding_is_told_from_wrong_data() -> None:
    mx.random.seed(3)
    right = mx.random.normal((1, 600, 512)).astype(mx.bfloat16)
    rounded = (right.astype(mx.float32) * (1 + 0.004 * mx.random.normal(right.shape))).astype(
        mx.bfloat16
    )
    assert first_difference(mark(right), mark(right), 0.0) is None
    assert first_difference(mark(right), mark(rounded), GPU_BOUND) is None
    exact = first_difference(mark(right), mark(rounded), 0.0)
    assert exact is not None
    assert exact[1] < 0.05
    # Data of another position, nothing, or not a number: found where it is.
    wrong = [
        mx.concatenate([right[:, :577], right[:, 10:11], right[:, 578:]], axis=1),
        mx.concatenate([right[:, :577], 0 * right[:, 577:578], right[:, 578:]], axis=1),
        mx.concatenate([right[:, :577], right[:, 577:578] * float("nan"), right[:, 578:]], axis=1),
    ]
    for each in wrong:
        found = first_difference(mark(right), mark(each), GPU_BOUND)
        assert found is not None
        assert found[0] == 577
    assert first_difference(mark(right), mark(right[:, :9]), GPU_BOUND) == (9, float("inf"))


def test_a_layer_whose_output_was_kept_is_as_before() -> None:
    class Layer(nn.Module):
        use_sliding = True

        def __call__(self, x: mx.array) -> tuple[mx.array, int]:
            return x + 1, 7

    layer = Layer()
    before = type(layer)
    with kept_output(layer) as kept:
        assert layer.use_sliding
        assert layer(mx.zeros((1, 2, 3)))[1] == 7
    assert mx.array_equal(kept[0], mx.ones((1, 2, 3)))
    assert type(layer) is before
