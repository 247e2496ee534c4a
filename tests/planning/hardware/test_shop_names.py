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
        ("NVIDIA H200 141GB HBM3e", "h200-141"),
        ("8x NVIDIA H100 80GB HBM3", "8x h100-80"),
        ("H100 80GB PCIe", "h100-pcie-80"),
        ("NVIDIA H100 PCIe", "h100-pcie-80"),
        ("A100 80GB SXM", "a100-80"),
        ("NVIDIA A100-SXM4-40GB + NVIDIA A100 80GB PCIe", "a100-40 + a100-80"),
        ("2x RTX PRO 6000 Blackwell Workstation Edition", "2x rtx-pro-6000-96"),
        ("RTX PRO 6000 Max-Q 96 GB", "rtx-pro-6000-96"),
        ("GeForce RTX5090 Founders Edition 32GB GDDR7", "rtx-5090-32"),
        ("NVIDIA DGX Spark", "dgx-spark-128"),
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
    "spec",
    [
        "m3 ultra 512 turbo",
        "mac studio",
        "mac studio m3 ultra 500gb",
        "m3 ultra 512 256",
        "RTX 5090 Ti",
        "RTX 5090 Laptop",
        "H200 80GB",
        "RTX 6000 Ada",
        "GPU",
        "H100 80GB 2TB",
    ],
)
def test_words_that_are_not_understood_are_never_left_out(spec: str) -> None:
    with pytest.raises(UsageError):
        parse_hardware(spec)


def test_the_number_of_a_card_alone_is_answered_with_its_name() -> None:
    with pytest.raises(UsageError) as error:
        parse_hardware("4090")
    assert error.value.hint == "--hardware rtx-4090"
    parse_hardware("rtx-4090")
