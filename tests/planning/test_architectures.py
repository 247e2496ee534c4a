"""Every architecture of mlx-lm either plans, or is refused with a readable sentence."""

from __future__ import annotations

import re
import sys

import mlx.core as mx
import pytest

from benchmarks.architectures import PAGE, Outcome, examine, page, recorded
from benchmarks.model_types import supported_model_types
from tests.support.memory import held_bytes

RECORDED = recorded()

DIVIDED_BOTH_WAYS = {
    "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss",
    "kimi_k2", "kimi_k25", "llama", "minimax_m2", "mistral", "qwen2", "qwen3", "qwen3_5",
    "qwen3_5_moe", "qwen3_moe",
}  # fmt: skip
"""Those that people run on several machines, at their published sizes."""


MOST_BYTES_OF_A_PLAN = 2**20
"""The most is 20 kB, of tables that mlx-lm makes; the smallest of these models has 30 MB."""

WORDS_OF_PYTHON = re.compile(
    r"\w+Error\b|object has no|has no attribute|NoneType|to unpack|unpacked|positional argument|"
    r"__\w+__|unexpected keyword|arg is an empty|out of range|not in list|not subscriptable|"
    r"not iterable|not callable|unsupported operand|not supported between|unhashable|"
    r"must be real number|invalid literal|division by zero|\[[a-z]\w+\] |<class|Array split|"
    r"array initialization|Shapes .* cannot be broadcast|Layer'|Traceback"
)
"""Texts of exceptions of Python and of MLX, which tell a user nothing."""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Filled by the tests of single architectures, for the page."""
    return {}


def test_every_model_type_has_a_recorded_config() -> None:
    assert list(RECORDED) == supported_model_types(), "run scripts/architecture-table --collect"


@pytest.mark.parametrize("model_type", RECORDED)
def test_it_plans_or_says_why_not(
    model_type: str, outcomes: dict[str, Outcome], capfd: pytest.CaptureFixture[str]
) -> None:
    before = held_bytes()
    outcome = outcomes[model_type] = examine(RECORDED[model_type][1])
    # Nothing of the model is computed, which would allocate its weights.
    assert mx.get_peak_memory() - before < MOST_BYTES_OF_A_PLAN
    said = [outcome.refusal] if outcome.refusal is not None else [w for _, w in outcome.obstacles]
    for message in said:
        assert len(message) > 20
        assert (found := WORDS_OF_PYTHON.search(message)) is None, (found, message)
    if model_type in DIVIDED_BOTH_WAYS:
        assert {"pipeline", "tensor"} <= set(outcome.forms), outcome
    assert capfd.readouterr().out == ""  # an architecture's own print is not k2's answer


def test_most_plan(outcomes: dict[str, Outcome]) -> None:
    refused = [name for name, outcome in outcomes.items() if outcome.refusal is not None]
    assert len(refused) <= 0.05 * len(outcomes)


@pytest.mark.skipif(sys.platform != "linux", reason="the page is what a machine without Metal says")
def test_the_page_is_up_to_date(outcomes: dict[str, Outcome]) -> None:
    if outcomes.keys() != RECORDED.keys():
        pytest.skip("needs all the tests before it")
    assert PAGE.read_text(encoding="utf-8") == page(outcomes), "run scripts/architecture-table"
