"""What a launch says about the prefix cache on disk: each node has a disk of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2cli.errors import ClusterError
from k2cli.launch.prefix_disk import disk_warnings
from k2cli.launch.prepare import prepare_run
from k2cli.launch.request import LaunchRequest
from k2cli.nodes.local import LocalNode
from k2cli.nodes.locks import release_locks

GB = 10**9


class Other(LocalNode):
    """A node with a cache folder and a disk of its own."""

    def __init__(self, name: str, cache: Path, free_bytes: int | None) -> None:
        self.name = name
        self._cache = cache
        self._free_bytes = free_bytes

    def ask(self, kind: Any, verb: str, *arguments: str, **options: Any) -> Any:
        if self._free_bytes is None:
            raise ClusterError(f"node {self.name} does not answer")
        usage = SimpleNamespace(total=2**50, free=self._free_bytes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("K2_CACHE_DIR", str(self._cache))
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            return super().ask(kind, verb, *arguments, **options)


def _warnings(limit: int, nodes: list[Other]) -> list[str]:
    request = SimpleNamespace(prefix_disk_bytes=limit)
    plan = SimpleNamespace(
        request=SimpleNamespace(context_length=1000, concurrency=2),
        nodes=[SimpleNamespace(kv_cache_bytes=40 * 10**6), SimpleNamespace(kv_cache_bytes=1)],
    )
    run: Any = SimpleNamespace(request=request, nodes=nodes, plan=plan)
    return disk_warnings(run)


def test_a_size_that_holds_no_block_is_told() -> None:
    here = Other("gone", Path("/"), None)
    (told,) = _warnings(5 * 10**6, [here])
    assert "in blocks of 256 tokens, which take up to 5.1 MB per rank" in told
    assert told.endswith("with --prefix-cache-disk 5MB nothing is kept")
    assert "blocks" not in "".join(_warnings(6 * 10**6, [here]))


def test_each_node_is_told_apart_with_its_ranks_and_what_they_hold(tmp_path: Path) -> None:
    one = Other("one", tmp_path / "one", 100 * GB)
    two = Other("two", tmp_path / "two", 150 * GB)
    assert _warnings(0, [Other("gone", tmp_path, None)]) == []  # not even asked
    assert _warnings(100 * GB, [one, two]) == []
    assert _warnings(120 * GB, [one, two]) == [
        "on one the prefix cache may take 120.0 GB, and 100.0 GB are free for "
        f"{tmp_path}/one/prefixes: once that disk is full, nothing more is kept; "
        "what fits: --prefix-cache-disk 95GB"
    ]
    # Two ranks of one node share its disk, and what they hold already counts in the size.
    block = tmp_path / "two" / "prefixes" / "store-2" / "scope" / "block"
    block.parent.mkdir(parents=True)
    with block.open("wb") as file:
        file.truncate(30 * GB)  # sparse
    (told,) = _warnings(95 * GB, [one, two, two])
    assert (
        "on two the prefix cache may take 190.0 GB for 2 ranks, of which 30.0 GB are there" in told
    )
    assert told.endswith("what fits: --prefix-cache-disk 85GB")
    assert _warnings(90 * GB, [one, two, two]) == []
    unknown, told = _warnings(200 * GB, [Other("gone", tmp_path, None), one])
    assert unknown == "free disk for the prefix cache: node gone does not answer"
    assert told.startswith("on one the prefix cache may take 200.0 GB")
    (told,) = _warnings(GB, [Other("full", tmp_path, 10)])
    assert told.endswith("nothing more is kept")  # there is no size that fits


def test_a_launch_warns_before_it_starts(
    toy_k2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K2_CACHE_DIR", str(tmp_path / "cache"))
    said: list[str] = []
    free = shutil.disk_usage(tmp_path).free
    for size in (free * 2, 10**6):
        said.clear()
        run = prepare_run(LaunchRequest(str(toy_k2), prefix_disk_bytes=size), said.append)
        release_locks(run.nodes, run.run_id)
        told = [text for text in said if text.startswith("warning: on localhost the prefix cache")]
        assert len(told) == (size > free)
    assert not (tmp_path / "cache").exists()
