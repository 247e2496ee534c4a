"""A rank's part of the prefix cache on disk: what it removes to make room."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from k2cli.prefix_folder import (
    blocks_of,
    naming_secret,
    open_prefixes_directory,
    remove_secret,
    remove_store,
    stores,
)
from k2cli.protocol import OpenStore, ReadBlocks
from k2cli.rank.kv_cache.block_file import HostArray
from k2cli.rank.kv_cache.store import STEP_SECONDS, BlockStore

ARRAY = HostArray((0, 0, 0), "F32", (256, 1), bytes(1024))


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2_CACHE_DIR", str(tmp_path))


def _opened(reports: list[Any], rank: int = 0, limit: int = 10**9) -> BlockStore:
    fields = {"rank": rank, "size": 1, "model_path": "/models/toy"}
    assignment: Any = type("Assignment", (), fields)()
    store = BlockStore(assignment, 1, reports.append)
    store._open(OpenStore(1, "5" * 32, limit))
    assert reports.pop().usable
    return store


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


def test_other_runs_give_way_while_blocks_are_written() -> None:
    """All of a rank's stores together stay within the limit, not each of them."""
    scope = open_prefixes_directory() / "old-0" / "scope"
    scope.mkdir(parents=True)
    for used in range(5):
        (scope / str(used)).write_bytes(bytes(2000))
        os.utime(scope / str(used), (used, used))
    store = _opened([], limit=10_000)
    assert len(list(scope.iterdir())) == 5
    left = []
    for block in range(4):
        store._write(f"scope/{block}", [ARRAY])  # 1,024 bytes and a header
        left.append(sorted(int(file.name) for file in scope.iterdir()))
    assert left == [[1, 2, 3, 4], [2, 3, 4], [2, 3, 4], [3, 4]]
    store._remove([f"scope/{block}" for block in range(4)])
    store._write("scope/4", [ARRAY])
    assert sorted(int(file.name) for file in scope.iterdir()) == [3, 4]


def test_a_store_that_is_removed_while_blocks_are_written_stays_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`k2 cache clear` beside a run: neither fails, and later blocks are written again."""
    reports: list[Any] = []
    store = _opened(reports)
    synchronize, removed = os.fsync, list[int]()

    def remove_meanwhile(descriptor: int) -> None:
        if not removed:
            removed.append(1)
            remove_store(store._folder)
        synchronize(descriptor)

    monkeypatch.setattr(os, "fsync", remove_meanwhile)
    store._write("scope/one", [ARRAY])
    store._write("scope/two", [ARRAY])
    assert [report.error for report in reports] == ["", ""]
    assert {file.name for file in blocks_of(store._folder)} == {"scope/one", "scope/two"}
    assert list(store._folder.parent.iterdir()) == [store._folder]
    (found,) = stores()
    assert (found.model, found.ranks, found.in_use) == ("toy", 1, True)


def test_a_store_that_another_run_has_made_again_is_marked_and_named_again(tmp_path: Path) -> None:
    """`k2 cache clear` beside a run, and then a second run of the model before the first writes."""
    reports: list[Any] = []
    store = _opened(reports)
    store.secret = naming_secret()
    store._write("scope/one", [ARRAY])
    assert store.removals == 0
    remove_store(store._folder)
    remove_secret()
    second = _opened([])
    store._write("scope/two", [ARRAY])
    assert (store.removals, store.secret) == (1, naming_secret())
    os.close(second._mark)
    assert [(found.tokens, found.in_use) for found in stores()] == [(256, True)]


def test_reading_counts_as_a_use_on_every_rank(tmp_path: Path) -> None:
    reports: list[Any] = []
    store = _opened(reports, rank=1)
    for block in ("scope/one", "scope/two"):
        store._write(block, [ARRAY])
        os.utime(store._folder / block, (1.0, 1.0))
    store._read_blocks(ReadBlocks(5, 1, ["scope/one", "scope/two", "scope/none"], 1000.0))
    assert reports[-1].count == 2
    used = {file.name: file.used for file in blocks_of(store._folder)}
    assert used == {"scope/one": 1000.0, "scope/two": pytest.approx(1000.0 - STEP_SECONDS)}
    assert used["scope/two"] < used["scope/one"]
