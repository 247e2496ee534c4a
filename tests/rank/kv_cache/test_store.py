"""A rank's part of the prefix cache on disk: what it removes to make room."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from k2cli.prefix_folder import blocks_of, naming_secret, remove_secret, remove_store, stores
from k2cli.protocol import OpenStore
from k2cli.rank.kv_cache.block_file import HostArray
from k2cli.rank.kv_cache.store import BlockStore


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


def _opened(reports: list[Any], limit_bytes: int) -> BlockStore:
    fields = {"rank": 0, "size": 1, "model_path": "/models/toy"}
    assignment: Any = type("Assignment", (), fields)()
    store = BlockStore(assignment, 1, reports.append)
    store._open(OpenStore(1, "5" * 32, limit_bytes))
    assert reports.pop().usable
    return store


def test_a_folder_that_cannot_be_used_is_reported_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("K2_CACHE_DIR", str(tmp_path))
    reports: list[Any] = []
    os.close(_opened(reports, 10**9)._mark)
    (tmp_path / "prefixes").chmod(0o777)
    with pytest.raises(AssertionError):
        _opened(reports, 10**9)
    said = capfd.readouterr().err
    assert "switched off: /" in said
    assert "must be a folder that only this user can access" in said


def test_two_runs_of_a_model_share_one_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader of each knows only what its own run has written."""
    monkeypatch.setenv("K2_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("k2cli.rank.kv_cache.store._SIZE_SECONDS", 0.0)
    reports: list[Any] = []
    runs = [_opened(reports, 4000) for _ in range(2)]
    array = HostArray((0, 0, 0), "F32", (256, 1), bytes(1024))
    scope = "5c" * 16
    for number in range(8):
        runs[number % 2]._write(f"{scope}/{number:032x}", [array])
        path = runs[0]._folder / f"{scope}/{number:032x}"
        os.utime(path, (number, number))
    assert not any(report.error for report in reports)
    assert runs[0]._folder == runs[1]._folder
    kept = sorted(file.name[-1] for file in blocks_of(runs[0]._folder))
    assert kept == ["5", "6", "7"]


def test_a_store_that_is_removed_while_blocks_are_written_stays_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`k2 cache clear` beside a run: neither fails, and later blocks are written again."""
    reports: list[Any] = []
    monkeypatch.setenv("K2_CACHE_DIR", str(tmp_path))
    store = _opened(reports, 10**9)
    secret = store.secret
    array = HostArray((0, 0, 0), "F32", (256, 1), bytes(1024))
    synchronize, removed = os.fsync, list[int]()

    def remove_meanwhile(descriptor: int) -> None:
        if not removed:
            removed.append(1)
            remove_store(store._folder)
            remove_secret()
        synchronize(descriptor)

    monkeypatch.setattr(os, "fsync", remove_meanwhile)
    store._write("scope/one", [array])
    store._write("scope/two", [array])
    assert [report.error for report in reports] == ["", ""]
    assert {file.name for file in blocks_of(store._folder)} == {"scope/one", "scope/two"}
    assert {path.name for path in store._folder.parent.iterdir()} == {store._folder.name, "secret"}
    assert naming_secret() == secret  # a later run finds them
    (found,) = stores()
    assert (found.model, found.ranks, found.in_use) == ("toy", 1, True)
