"""A rank's part of the prefix cache on disk: what it removes to make room."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from k2cli import prefix_folder
from k2cli.files import open_regular
from k2cli.prefix_folder import (
    StoreNote,
    blocks_of,
    naming_secret,
    open_store,
    remove_if_empty,
    remove_secret,
    remove_store,
    stores,
)
from k2cli.protocol import OpenStore, ReadBlocks
from k2cli.rank.kv_cache.block_file import HostArray
from k2cli.rank.kv_cache.block_store import STEP_SECONDS, BlockStore
from tests.support.bootstraps import make_assignment

ARRAY = HostArray((0, 0, 0), "F32", (256, 1), bytes(1024))


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2_CACHE_DIR", str(tmp_path))


def _opened(
    model: Path,
    reports: list[Any],
    *,
    limit_bytes: int = 10**9,
    rank: int = 0,
    name: str = "5" * 32,
) -> BlockStore:
    """Open the store of a rank, in this thread."""
    assignment = make_assignment(model_path=str(model), rank=rank, size=rank + 1)
    store = BlockStore(assignment, 1, reports.append)
    store._open(OpenStore(1, name, limit_bytes))
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
    secret, synchronize, removed = store.secret, os.fsync, list[int]()

    def remove_meanwhile(descriptor: int) -> None:
        if not removed:
            removed.append(1)
            remove_secret()
            remove_store(store._folder)
        synchronize(descriptor)

    monkeypatch.setattr(os, "fsync", remove_meanwhile)
    store._write("scope/one", [ARRAY])
    store._write("scope/two", [ARRAY])
    assert [report.error for report in reports] == ["", ""]
    assert {file.name for file in blocks_of(store._folder)} == {"scope/one", "scope/two"}
    assert {path.name for path in store._folder.parent.iterdir()} == {store._folder.name, "secret"}
    assert store.secret == naming_secret() == secret  # a later run finds them
    assert store.removals == 1
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


def test_empty_stores_are_removed_unless_a_run_uses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start of a later run: those of its rank, also while another run opens one."""
    root, note, used = tmp_path / "prefixes", StoreNote("toy", 0, 1), []
    root.mkdir(mode=0o700)
    for name in ("used-0", "empty-0", "empty-1", "full-0"):
        used.append(open_store(root / name, note))
    for folder in ("empty-0", "full-0"):  # a scope without blocks, and one with a block
        (root / folder / "scope").mkdir(mode=0o700)
    (root / "full-0" / "scope" / "block").write_bytes(bytes(10))
    for mark in used[1:]:
        os.close(mark)
    first = _opened(Path("/models/toy"), [])
    assert {path.name for path in root.iterdir()} == {
        "secret", "used-0", "empty-1", "full-0", first._folder.name,
    }  # fmt: skip

    # A run that opens a store while another removes it has one all the same.
    os.close(first._mark)
    opened: list[int] = []

    def removed_meanwhile(*arguments: Any, **options: Any) -> int:
        if not opened and arguments[0].name == "lock":
            opened.append(1)
            remove_if_empty(first._folder)
        return open_regular(*arguments, **options)

    monkeypatch.setattr("k2cli.prefix_folder.open_regular", removed_meanwhile)
    reports: list[Any] = []
    second = _opened(Path("/models/toy"), reports)
    monkeypatch.undo()
    monkeypatch.setenv("K2_CACHE_DIR", str(tmp_path))
    second._write("scope/one", [ARRAY])
    assert opened
    assert [report.error for report in reports[1:]] == [""]
    (found,) = [store for store in stores() if store.folder == second._folder]
    assert (found.tokens, found.in_use) == (256, True)


def test_a_model_whose_folder_has_a_name_that_is_no_text_has_a_store() -> None:
    reports: list[Any] = []
    _opened(Path("/models/\udcff"), reports)
    assert [report.usable for report in reports] == [True]
    assert [store.model for store in stores()] == ["\ufffd"]


def test_a_store_that_another_run_has_made_again_is_marked_and_named_again() -> None:
    """`k2 cache clear` beside a run, and then a second run of the model before the first writes."""
    model = Path("/models/toy")
    store = _opened(model, [])
    store._write("scope/one", [ARRAY])
    assert store.removals == 0
    remove_secret()
    remove_store(store._folder)
    second = _opened(model, [])
    store._write("scope/two", [ARRAY])
    assert (store.removals, store.secret) == (1, second.secret)
    os.close(second._mark)
    assert [(found.tokens, found.in_use) for found in stores()] == [(256, True)]


def test_reading_counts_as_a_use_on_every_rank() -> None:
    reports: list[Any] = []
    store = _opened(Path("/models/toy"), reports, rank=1)
    for block in ("scope/one", "scope/two"):
        store._write(block, [ARRAY])
        os.utime(store._folder / block, (1.0, 1.0))
    store._read_blocks(ReadBlocks(5, 1, ["scope/one", "scope/two", "scope/none"], 1000.0))
    assert reports[-1].count == 2
    used = {file.name: file.used for file in blocks_of(store._folder)}
    assert used == {"scope/one": 1000.0, "scope/two": pytest.approx(1000.0 - STEP_SECONDS)}
    assert used["scope/two"] < used["scope/one"]


def test_a_folder_that_cannot_be_used_is_reported_in_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reports: list[Any] = []
    os.close(_opened(Path("/models/toy"), reports)._mark)
    (tmp_path / "prefixes").chmod(0o777)
    store = _opened(Path("/models/toy"), reports)
    assert [report.usable for report in reports] == [True, False]
    assert "must be a folder that only this user can access" in store.problem
    assert f"switched off: {store.problem}" in capfd.readouterr().err


SCOPE = "5c" * 16


@pytest.mark.parametrize("others", ["of the same model", "of another model"])
def test_two_runs_share_one_size_at_every_moment(
    others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader of each knows only what its own run has written."""
    monkeypatch.setattr("k2cli.rank.kv_cache.block_store._SIZE_SECONDS", 0.0)
    monkeypatch.setattr("k2cli.rank.kv_cache.block_store._COUNT_SHARE", 1.0)
    reports: list[Any] = []
    names = ["5" * 32, ("5" if others == "of the same model" else "6") * 32]
    runs = [_opened(Path("/models/toy"), reports, limit_bytes=4000, name=name) for name in names]
    largest = 0
    for number in range(9):
        run = runs[number // 2 % 2]
        run._write(f"{SCOPE}/{number:032x}", [ARRAY])
        os.utime(run._folder / f"{SCOPE}/{number:032x}", (number + 1, number + 1))
        held = sum(file.nbytes for one in {run._folder for run in runs} for file in blocks_of(one))
        assert held <= 4000
        largest = max(largest, held)
    assert not any(report.error for report in reports[2:])
    assert largest > 3000  # the size is used
    kept = {file.name[-1] for run in runs for file in blocks_of(run._folder)}
    # The oldest of this model's blocks give way, but before them those of other models.
    assert kept == ({"6", "7", "8"} if others == "of the same model" else {"5", "7", "8"})


def test_a_change_by_another_run_is_counted_before_the_next_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One's own changes are not, nor those that come before a count has paid off."""
    counts: list[int] = []
    find = BlockStore._find_others
    monkeypatch.setattr(
        BlockStore, "_find_others", lambda store: (counts.append(1), find(store))[1]
    )
    monkeypatch.setattr("k2cli.rank.kv_cache.block_store._COUNT_SHARE", 1.0)
    store = _opened(Path("/models/toy"), [], limit_bytes=10_000)
    for number in range(3):
        store._write(f"{SCOPE}/{number:032x}", [ARRAY])
    store._remove([f"{SCOPE}/{0:032x}"])
    store._write(f"{SCOPE}/{3:032x}", [ARRAY])
    assert len(counts) == 2  # at the start, and before the first block
    other = store._folder.with_name("6" * 32 + "-0") / SCOPE
    other.mkdir(parents=True)
    (other / "block").write_bytes(bytes(9000))
    store._write(f"{SCOPE}/{4:032x}", [ARRAY])
    assert len(counts) == 3
    assert not (other / "block").exists()
    # The counts must not take most of the time: a change is counted later then, and not forgotten.
    store._earliest_count = float("inf")
    (other / "block").write_bytes(bytes(9000))
    os.utime(other, (1, 1))
    store._write(f"{SCOPE}/{5:032x}", [ARRAY])
    assert (len(counts), (other / "block").exists()) == (3, True)
    store._earliest_count = 0.0
    store._write(f"{SCOPE}/{6:032x}", [ARRAY])
    assert (len(counts), (other / "block").exists()) == (4, False)

    # A change before own blocks are removed, as a leader lets them be for each new one.
    (other / "block").write_bytes(bytes(9000))
    os.utime(other, (3, 3))
    store._remove([f"{SCOPE}/{6:032x}"])
    store._write(f"{SCOPE}/{6:032x}", [ARRAY])
    assert (len(counts), (other / "block").exists()) == (5, False)

    # A change while a block is written, which changes the same folder.
    synchronize = os.fsync

    def change(descriptor: int) -> None:
        (store._folder / SCOPE / f"{99:032x}").write_bytes(bytes(9000))
        os.utime(store._folder / SCOPE, (2, 2))
        synchronize(descriptor)

    monkeypatch.setattr(os, "fsync", change)
    store._write(f"{SCOPE}/{7:032x}", [ARRAY])
    monkeypatch.setattr(os, "fsync", synchronize)
    store._write(f"{SCOPE}/{8:032x}", [ARRAY])
    assert len(counts) == 6
    assert sum(file.nbytes for file in blocks_of(store._folder)) <= 10_000


def test_a_store_that_others_remove_again_and_again_while_it_is_empty_is_opened_at_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run that starts removes the empty stores of others; several may start at once."""
    made, removals = prefix_folder.private_folder, []

    def removed_at_once(folder: Path) -> Path:
        found = made(folder)
        if len(removals) < 3:
            removals.append(folder)
            folder.rmdir()
        return found

    root = prefix_folder.open_prefixes_directory()
    monkeypatch.setattr(prefix_folder, "private_folder", removed_at_once)
    os.close(open_store(root / "5-0", StoreNote()))
    assert len(removals) == 3


def test_the_secret_may_be_removed_at_any_moment_while_a_run_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link, removals = os.link, []

    def removed_at_once(*paths: Path) -> None:
        link(*paths)
        if len(removals) < 2:
            removals.append(paths)
            remove_secret()

    monkeypatch.setattr(os, "link", removed_at_once)
    assert naming_secret() == naming_secret()
    assert len(removals) == 2
