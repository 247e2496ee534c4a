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
from tests.support.bootstraps import make_assignment

ARRAY = HostArray((0, 0, 0), "F32", (256, 1), bytes(1024))


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2_CACHE_DIR", str(tmp_path))


def _opened(model: Path, reports: list[Any], *, limit_bytes: int = 10**9) -> BlockStore:
    """Open the store of a rank, in this thread."""
    store = BlockStore(make_assignment(model_path=str(model)), 1, reports.append)
    store._open(OpenStore(1, "5" * 32, limit_bytes))
    return store


def test_files_behind_a_link_are_never_removed_to_make_room(tmp_path: Path) -> None:
    """A link in the folder of the cache may lead to anything that the user has."""
    other, root = tmp_path / "documents", tmp_path / "prefixes"
    for folder in (other / "letters", root / "old-0" / "scope"):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x" * 1000)
    root.chmod(0o700)
    (root / "link-0").symlink_to(other)

    store = _opened(tmp_path, [], limit_bytes=0)
    assert store._folder.parent == root
    assert (other / "letters" / "file").exists()
    assert not (root / "old-0" / "scope" / "file").exists()


def test_a_store_that_is_removed_while_blocks_are_written_stays_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`k2 cache clear` beside a run: neither fails, and later blocks are written again."""
    reports: list[Any] = []
    store = _opened(Path("/models/toy"), reports)
    assert reports.pop().usable
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


def test_the_blocks_of_other_runs_give_way_as_this_one_grows(tmp_path: Path) -> None:
    """The limit is that of a rank, whatever stores its blocks are in."""
    others = [tmp_path / "prefixes" / f"other{number}-0" / "scope" / "block" for number in (1, 2)]
    elsewhere = tmp_path / "prefixes" / "other1-1" / "scope" / "block"  # of another rank
    for age, path in enumerate([elsewhere, *others]):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 4000)
        os.utime(path, (1000 + age, 1000 + age))
    (tmp_path / "prefixes").chmod(0o700)
    reports: list[Any] = []
    store = _opened(tmp_path, reports, limit_bytes=10_000)
    assert reports.pop().usable
    store._write("scope/one", [ARRAY])
    assert all(path.exists() for path in others)
    store._write("scope/two", [ARRAY])
    assert [path.exists() for path in others] == [False, True]
    # What was removed, or is written again, counts no more.
    store._remove(["scope/one"])
    for _ in range(9):
        store._write("scope/two", [ARRAY])
    assert others[1].exists()
    for number in range(5):
        store._write(f"scope/{number}", [ARRAY])
    assert not others[1].exists()
    assert elsewhere.exists()
    assert not any(report.error for report in reports)


def test_a_model_whose_folder_has_a_name_that_is_no_text_has_a_store() -> None:
    reports: list[Any] = []
    _opened(Path("/models/\udcff"), reports)
    assert [report.usable for report in reports] == [True]
    assert [store.model for store in stores()] == ["\ufffd"]
