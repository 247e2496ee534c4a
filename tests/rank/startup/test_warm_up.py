"""Which shapes are warmed up before a run is ready."""

from __future__ import annotations

import pytest

from k2cli.rank.startup.warm_up import DeviceKind, shapes_to_warm


def _texts(
    device: DeviceKind, *, cold: bool, context: int = 4096, chunk: int = 2048, requests: int = 20
) -> list[str]:
    shapes = shapes_to_warm(
        device, cold=cold, context_length=context, concurrency=requests, chunk_tokens=chunk
    )
    return [shape.text for shape in shapes]


def test_on_cuda_every_version_of_the_kernels_is_used_cold_or_not() -> None:
    expected = [
        *(f"prefill of {tokens} tokens" for tokens in (16, 32, 64, 128)),
        "prefill of 2,048 tokens and 20 more",
        *(f"{rows} requests at once" for rows in (2, 8, 16, 20)),
    ]
    assert _texts("cuda", cold=False) == _texts("cuda", cold=True) == expected


def test_drafts_are_warmed_up_where_kernels_are_compiled() -> None:
    def drafted(device: DeviceKind, *, speculates: bool) -> list[int]:
        shapes = shapes_to_warm(
            device, cold=False, context_length=4096, concurrency=1, chunk_tokens=2048,
            speculates=speculates,
        )  # fmt: skip
        return [shape.drafted for shape in shapes if shape.drafted]

    assert drafted("cuda", speculates=True) == [3, 7, 15]
    assert drafted("cuda", speculates=False) == drafted("cpu", speculates=True) == []


@pytest.mark.parametrize("device", ["cpu", "metal"])
def test_elsewhere_only_a_cold_machine_computes_more_than_the_self_test(
    device: DeviceKind,
) -> None:
    assert _texts(device, cold=False) == []
    assert len(_texts(device, cold=True)) >= 2


def test_what_the_link_check_computes_is_not_computed_again() -> None:
    def texts(device: DeviceKind) -> list[str]:
        shapes = shapes_to_warm(
            device,
            cold=True,
            context_length=8192,
            concurrency=2,
            chunk_tokens=2048,
            link_check=True,
        )
        return [shape.text for shape in shapes]

    assert texts("metal") == texts("cpu") == ["2 requests at once"]
    assert texts("cuda")[3:] == ["prefill of 128 tokens and 20 more", "2 requests at once"]


@pytest.mark.parametrize("context", [1, 2, 16, 22, 40, 300])
@pytest.mark.parametrize("requests", [1, 3])
def test_no_shape_is_larger_than_the_plan(context: int, requests: int) -> None:
    for device in ("cpu", "metal", "cuda"):
        for shape in shapes_to_warm(
            device, cold=True, context_length=context, concurrency=requests, chunk_tokens=128
        ):
            assert shape.tokens + shape.left_tokens < context
            assert shape.tokens <= 128
            assert shape.rows <= requests
