"""Machines as shops and their owners name them."""

from __future__ import annotations

import pytest

from k2cli.errors import UsageError
from k2cli.planning.hardware.spec import hardware_text, parse_hardware


@pytest.mark.parametrize(
    ("spec", "means"),
    [
        ("2x mac studio m3 ultra 512gb", "2x m3-ultra-512"),
        ("2 Mac Studio M3 Ultra 512GB", "2x m3-ultra-512"),
        ("Mac Studio (2025) M3 Ultra, 80-core GPU, 512GB unified memory, 1TB SSD", "m3-ultra-512"),
        ("2 x 512GB M3 Ultra Mac Studios", "2x m3-ultra-512"),
        ("MacBook Pro 16-inch M4 Max 128 GB", "m4-max-128"),
        ("Mac mini M4 Pro 64GB + Apple M3_Ultra 256 GiB", "m4-pro-64 + m3-ultra-256"),
        ("Mac Studio M4 Max, 128GB, limit=100GiB", "m4-max-128:limit=100GiB"),
    ],
)
def test_names_of_shops_are_understood(spec: str, means: str) -> None:
    assert hardware_text(parse_hardware(spec)) == means


def test_the_cores_of_a_gpu_count() -> None:
    (few,) = parse_hardware("Mac Studio M3 Ultra 60-core GPU 256GB")
    (many,) = parse_hardware("Mac Studio M3 Ultra 80-core GPU 256GB")
    assert few == parse_hardware("m3-ultra-256:gpu=60")[0]
    assert few.gpu_flops_per_second is not None
    assert many.gpu_flops_per_second is not None
    assert few.gpu_flops_per_second < many.gpu_flops_per_second


@pytest.mark.parametrize(
    "spec", ["m3 ultra 512 turbo", "mac studio", "mac studio m3 ultra 500gb", "m3 ultra 512 256"]
)
def test_words_that_are_not_understood_are_never_left_out(spec: str) -> None:
    with pytest.raises(UsageError):
        parse_hardware(spec)
