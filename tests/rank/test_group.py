"""Memory limits of a rank on Metal, and joining an MLX group that does not come about."""

from __future__ import annotations

import errno
from typing import Any

import mlx.core as mx
import pytest

from k2cli.errors import ClusterError
from k2cli.protocol import Assignment
from k2cli.rank.group import join_group, set_memory_limits, wire_weights
from tests.support.as_macos import on_macos
from tests.support.bootstraps import make_assignment

_GB = 10**9


@pytest.fixture
def wired(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Imitate Metal with a working set of 400 GB; return the limits that MLX accepted."""
    accepted: list[int] = []

    def set_wired_limit(limit: int) -> int:
        # mlx 0.32.4, mlx/backend/metal/allocator.cpp
        if limit > 400 * _GB:
            raise ValueError(
                "[metal::set_wired_limit] Setting a wired limit larger than the maximum working "
                "set size is not allowed."
            )
        accepted.append(limit)
        return 0

    info = {"max_recommended_working_set_size": 400 * _GB}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda *_: info)
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    return accepted


def test_the_weights_are_wired_and_not_what_comes_and_goes(
    wired: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assignment = _assignment(limit=398 * _GB, needed=390 * _GB, weights=290 * _GB)
    set_memory_limits(assignment)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 290 * _GB + 5)
    wire_weights(assignment)
    assert wired == [290 * _GB, 290 * _GB + 5 + 64 * 2**20]


def test_a_limit_above_metals_is_lowered_to_it(
    wired: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "get_active_memory", lambda: 400 * _GB - 1)
    wire_weights(_assignment(limit=498 * _GB, needed=390 * _GB))
    wire_weights(_assignment(limit=300 * _GB, needed=290 * _GB))
    assert wired == [400 * _GB, 300 * _GB]


def test_a_plan_that_does_not_fit_any_more_names_the_command(wired: list[int]) -> None:
    with pytest.raises(ClusterError, match=r"Metal allows 400\.0 GB on b now") as caught:
        set_memory_limits(_assignment(limit=498 * _GB, needed=450 * _GB))
    assert "on b: sudo sysctl iogpu.wired_limit_mb=474930 " in (caught.value.hint or "")
    with pytest.raises(ClusterError):
        wire_weights(_assignment(limit=498 * _GB, needed=None, weights=450 * _GB))
    assert wired == []


def _assignment(*, limit: int, needed: int | None, weights: int = 1) -> Assignment:
    values: dict[str, Any] = dict.fromkeys(("run_id", "model_path", "transport"), "")
    return Assignment(
        **values,
        rank=1,
        size=2,
        nodes=["a", "b"],
        strategy="tensor",
        layers=[(0, 1), (0, 1)],
        dtype="checkpoint",
        context_length=1,
        concurrency=1,
        prefill_chunk_tokens=1,
        expected_weights_bytes=[1, weights],
        wired_limit_bytes=limit,
        memory_limit_bytes=needed,
    )


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        # mlx 0.32.4 throws this one as std::invalid_argument.
        (ValueError("[jaccl] Changing queue pair to RTR failed with errno 22"), "k2 doctor"),
        (RuntimeError("[jaccl] Couldn't allocate protection domain"), "ssh -t b sudo shutdown -r"),
        (RuntimeError("[ring] Couldn't bind socket (error: 49)"), "None"),
    ],
)
def test_a_transport_that_does_not_start_is_an_error_of_the_cluster(
    monkeypatch: pytest.MonkeyPatch, error: Exception, hint: str
) -> None:
    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr(mx.distributed, "init", init)
    with pytest.raises(ClusterError, match="did not start on b: ") as caught:
        join_group(_assignment(limit=1, needed=1))
    assert str(caught.value.hint).startswith(hint) or hint in str(caught.value.hint)


@pytest.mark.parametrize(("number", "is_told"), [(errno.EHOSTUNREACH, True), (999, False)])
def test_a_mac_may_keep_a_rank_from_the_local_network(
    number: int, *, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX's text, of mlx-metal 0.32.4, has the number of the error alone."""

    def init(**options: Any) -> None:
        raise RuntimeError(f"[ring] Couldn't connect (error: {number})")

    monkeypatch.setattr(mx.distributed, "init", init)
    with on_macos(), pytest.raises(ClusterError, match="did not start on a") as caught:
        join_group(make_assignment(size=2))
    assert ("Local Network" in (caught.value.hint or "")) == is_told
