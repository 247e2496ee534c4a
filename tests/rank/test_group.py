"""Joining an MLX group that does not come about."""

from __future__ import annotations

import errno
from typing import Any

import mlx.core as mx
import pytest

from k2cli.errors import ClusterError
from k2cli.rank.group import join_group
from tests.support.as_macos import on_macos
from tests.support.bootstraps import make_assignment


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
