"""A GGUF file plans from its own header, as the checkpoint that k2 makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2cli.errors import K2Error
from k2cli.models.gguf.convert import convert_gguf
from k2cli.planning.hardware.spec import parse_hardware
from tests.models.conftest import demo_gguf  # noqa: F401 - a fixture
from tests.planning.plans import make_plan


def test_it_plans_as_its_conversion_does(demo_gguf: Path, tmp_path: Path) -> None:  # noqa: F811
    nodes = parse_hardware("2x m3-ultra-96")
    converted = make_plan(str(convert_gguf(demo_gguf, tmp_path / "made")), nodes)
    plan = make_plan(str(demo_gguf), nodes)
    assert plan.nodes == converted.nodes
    assert plan.placement == converted.placement
    assert plan.model.stored_bytes == converted.model.stored_bytes


@pytest.mark.parametrize("size", [0, 3, 20, 5_000, 3_000_000])
def test_one_that_is_cut_short_says_so(
    demo_gguf: Path,  # noqa: F811
    tmp_path: Path,
    size: int,
) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(demo_gguf.read_bytes()[:size])
    with pytest.raises(K2Error, match=r"short\.gguf is (empty|cut short)") as caught:
        make_plan(str(short), parse_hardware("m3-ultra-96"))
    assert caught.value.exit_code in (1, 2)
