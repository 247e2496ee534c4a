"""A rank's part of the prefix cache on disk: what it removes to make room."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from k2cli.prefix_folder import blocks_of, remove_store, stores
from k2cli.protocol import OpenStore
from k2cli.rank.kv_cache.block_file import HostArray
from k2cli.rank.kv_cache.block_store import BlockStore


def test_files_behind_a_link_are_never_removed_to_make_room(tmp_path: Path) -> None:
    """A link in the folder of the cache may lead to anything that the user has."""
    other, root = tmp_path / "documents", tmp_path / "prefixes"
    for folder in (other / "letters", root / "old-0" / "scope"):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x" * 1000)
    (root / "link-0").symlink_to(other)

    class _Assignment:
        rank = 0

    assignment: Any = _Assignment()
    store = BlockStore(assignment, 1, lambda report: None)
    store._remove_others(root, 0)
    assert (other / "letters" / "file").exists()
    assert not (root / "old-0" / "scope" / "file").exists()


def test_a_store_that_is_removed_while_blocks_are_written_stays_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`k2 cache clear` beside a run: neither fails, and later blocks are written again."""
    reports: list[Any] = []
    monkeypatch.setenv("K2_CACHE_DIR", str(tmp_path))
    fields = {"rank": 0, "size": 1, "model_path": "/models/toy"}
    assignment: Any = type("Assignment", (), fields)()
    store = BlockStore(assignment, 1, reports.append)
    store._open(OpenStore(1, "5" * 32, 10**9))
    assert reports.pop().usable
    array = HostArray((0, 0, 0), "F32", (256, 1), bytes(1024))
    synchronize, removed = os.fsync, list[int]()

    def remove_meanwhile(descriptor: int) -> None:
        if not removed:
            removed.append(1)
            remove_store(store._folder)
        synchronize(descriptor)

    monkeypatch.setattr(os, "fsync", remove_meanwhile)
    store._write("scope/one", [array])
    store._write("scope/two", [array])
    assert [report.error for report in reports] == ["", ""]
    assert {file.name for file in blocks_of(store._folder)} == {"scope/one", "scope/two"}
    assert list(store._folder.parent.iterdir()) == [store._folder]
    (found,) = stores()
    assert (found.model, found.ranks, found.in_use) == ("toy", 1, True)
