"""``k2 cache``: what is on the disk is listed, and removed after a question."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from k2cli import prefix_folder
from k2cli.cli import run_command_line
from k2cli.errors import K2Error, UsageError
from k2cli.launch.request import LaunchRequest
from k2cli.prefix_folder import (
    PART_MARK,
    StoreNote,
    blocks_of,
    naming_secret,
    open_store,
    prefixes_directory,
    stores,
)


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2_CACHE_DIR", str(tmp_path / "cache"))


def _store(name: str, model: str, blocks: int, rank: int = 0) -> int:
    """Make a store of a rank; return the descriptor that marks it as used."""
    naming_secret()
    lock = open_store(prefixes_directory() / name, StoreNote(model, rank, 2))
    folder = prefixes_directory() / name / ("5c" * 16)
    folder.mkdir(mode=0o700)
    for block in range(blocks):
        (folder / f"{block:032x}").write_bytes(bytes(1000))
    return lock


def test_caches_are_listed_and_removed_by_model(capsys: pytest.CaptureFixture[str]) -> None:
    used = _store("a-0", "kimi", 3)
    os.close(_store("b-0", "demo", 1))
    run_command_line(["cache", "list", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert listed["schema_version"] == 1
    found = {entry["model"]: entry for entry in listed["caches"]}
    assert [found["kimi"][key] for key in ("tokens", "bytes", "in_use", "ranks")] == [
        768, 3000, True, 2,
    ]  # fmt: skip
    assert found["demo"]["in_use"] is False
    with pytest.raises(UsageError) as refused:  # there is no terminal to ask on
        run_command_line(["cache", "clear", "--model", "demo"])
    assert refused.value.hint == "k2 cache clear --model demo --yes"
    for name, hint in (
        ("other", "k2 cache list"),
        ("dmo", "k2 cache clear --model demo"),
        ("./models/demo/", "k2 cache clear --model demo"),
    ):
        with pytest.raises(K2Error, match=f"'{name}'") as unknown:
            run_command_line(["cache", "clear", "--model", name, "--yes"])
        assert unknown.value.hint == hint
    run_command_line(["cache", "clear", "--model", "demo", "--yes"])
    assert sorted(path.name for path in prefixes_directory().iterdir()) == ["a-0", "secret"]
    capsys.readouterr()
    run_command_line(["cache", "clear", "--yes", "--json"])
    assert json.loads(capsys.readouterr().out)["freed_bytes"] == 3000
    assert list(prefixes_directory().iterdir()) == []
    os.close(used)


def test_empty_caches_are_listed_only_while_a_run_uses_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run whose prompts were short, or whose blocks gave way to others, leaves an empty store."""
    used = _store("a-0", "kimi", 0)
    os.close(_store("b-0", "demo", 0))
    run_command_line(["cache", "list"])
    (row,) = capsys.readouterr().out.splitlines()[1:]
    assert row.startswith("kimi")
    assert row.endswith("used by a run, nothing stored yet")
    os.close(used)
    run_command_line(["cache", "list", "--json"])
    assert json.loads(capsys.readouterr().out)["caches"] == []
    run_command_line(["cache", "list"])
    assert "no caches of prompts" in capsys.readouterr().err
    run_command_line(["cache", "clear"])  # asks nothing: nothing is lost
    assert list(prefixes_directory().iterdir()) == []


def test_a_store_that_is_opened_while_somebody_lists_it_is_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To see if a store is used, its lock is taken for a moment."""
    os.close(_store("a-0", "kimi", 1))
    looking = os.open(prefixes_directory() / "a-0" / "lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_EX)
    monkeypatch.setattr(prefix_folder.time, "sleep", lambda seconds: os.close(looking))
    lock = open_store(prefixes_directory() / "a-0", StoreNote("kimi", 0, 2))
    assert [store.in_use for store in prefix_folder.stores()] == [True]
    os.close(lock)


@pytest.mark.parametrize("before", [None, b"cut short"])
def test_runs_that_start_at_once_have_one_secret(
    before: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody would find the blocks of the one whose secret was replaced."""
    if before is not None:
        naming_secret()
        (prefixes_directory() / "secret").write_bytes(before)
    write, others = prefix_folder.write_atomically, list[bytes]()

    def write_after_another(*arguments: Any) -> None:
        monkeypatch.setattr(prefix_folder, "write_atomically", write)
        others.append(naming_secret())
        write(*arguments)

    monkeypatch.setattr(prefix_folder, "write_atomically", write_after_another)
    assert [naming_secret(), naming_secret(b"another".ljust(32))] == others * 2
    assert [path.name for path in prefixes_directory().iterdir()] == ["secret"]


def test_ranks_are_listed_in_order_those_of_the_last_used_model_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, model, rank, used in (
        ("b-0", "old", 0, 50),
        ("a-0", "new", 0, 10),
        ("a-1", "new", 1, 90),
        ("b-1", "old", 1, 50),
    ):
        os.close(_store(name, model, 1, rank))
        os.utime(next((prefixes_directory() / name).glob("*/*")), (used, used))
    run_command_line(["cache", "list"])
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["new", "0"], ["new", "1"], ["old", "0"], ["old", "1"]]


def test_what_a_killed_writer_has_left_goes_at_the_next_start() -> None:
    """But not beside another run that uses the store: it may be writing."""
    used = _store("a-0", "kimi", 1)
    folder, note = prefixes_directory() / "a-0", StoreNote("kimi", 0, 2)
    part = folder / ("5c" * 16) / f"{PART_MARK}x"
    part.write_bytes(b"half")
    os.close(open_store(folder, note))
    assert part.exists()
    os.close(used)
    again = open_store(folder, note)
    assert [file.name for file in blocks_of(folder)] == [f"{'5c' * 16}/{0:032x}"]
    assert [store.in_use for store in stores()] == [True]
    os.close(again)


@pytest.mark.parametrize("when", ["listed", "renamed", "emptied"])
def test_a_store_that_another_command_removes_at_the_same_time_is_no_error(
    when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a-0", "b-0"):
        os.close(_store(name, "kimi", 2))
    if when == "listed":
        read = prefix_folder.read_regular

        def remove(path: Path, limit: int) -> bytes:
            shutil.rmtree(path.parent)
            return read(path, limit)

        monkeypatch.setattr(prefix_folder, "read_regular", remove)
    elif when == "renamed":
        found = stores()
        monkeypatch.setattr(prefix_folder, "stores", lambda: found)
        prefix_folder.remove_store(prefixes_directory() / "a-0")
    else:
        unlink = os.unlink

        def after_another(*arguments: Any, **options: Any) -> None:
            unlink(*arguments, **options)
            unlink(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", after_another)
            for folder in list(prefixes_directory().glob("*-0")):
                prefix_folder.remove_store(folder)
        assert [path.name for path in prefixes_directory().iterdir()] == ["secret"]
        return
    run_command_line(["cache", "clear", "--yes"])
    capsys.readouterr()
    assert not list(prefixes_directory().iterdir())


@pytest.mark.parametrize("words", [["list"], ["clear", "--yes"]])
def test_folders_that_k2_has_not_made_are_never_removed(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever links the folder to a larger disk must not lose that disk's folders."""
    disk = tmp_path / "disk"
    (disk / "photos" / "2026-1").mkdir(parents=True)
    (disk / "secret").write_bytes(b"mine")
    prefixes_directory().parent.mkdir()
    prefixes_directory().symlink_to(disk)
    with pytest.raises(K2Error, match="is a link") as refused:
        run_command_line(["cache", *words])
    assert refused.value.hint == f"ls -ld {prefixes_directory()}"
    prefixes_directory().unlink()
    prefixes_directory().write_bytes(b"")
    with pytest.raises(K2Error, match="is no folder"):
        run_command_line(["cache", *words])
    prefixes_directory().unlink()
    os.close(_store("a-0", "kimi", 1))
    (prefixes_directory() / "photos" / "holidays").mkdir(parents=True)
    run_command_line(["cache", *words])
    capsys.readouterr()
    assert (prefixes_directory() / "photos" / "holidays").is_dir()
    assert (disk / "photos" / "2026-1").is_dir()
    assert (disk / "secret").read_bytes() == b"mine"


def test_a_cache_that_cannot_be_removed_stays_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in range(3):
        os.close(_store(f"a-{rank}", "kimi", 1, rank))
    stuck = prefixes_directory() / "a-1"
    rename = Path.rename

    def refusing(path: Path, target: Path) -> Path:
        if path == stuck:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)  # as of a file that macOS has locked
    with pytest.raises(
        K2Error, match=r"1 of 3 caches could not be removed: .*a-1.*not perm"
    ) as one:
        run_command_line(["cache", "clear", "--yes", "--json"])
    assert one.value.hint == f"ls -ld {prefixes_directory()} {stuck}"
    printed = json.loads(capsys.readouterr().out)
    assert printed["freed_bytes"] == 2000
    assert [cache["rank"] for cache in printed["removed"]] == [0, 2]
    assert [store.folder for store in stores()] == [stuck]


def test_a_folder_that_others_can_access_is_not_used(tmp_path: Path) -> None:
    naming_secret()
    prefixes_directory().chmod(0o755)
    with pytest.raises(OSError, match="only this user"):
        naming_secret()


@pytest.mark.parametrize(
    ("words", "variable", "expected"),
    [
        ([], "", 0),
        (["--prefix-cache-disk", "2GB"], "", 2 * 10**9),
        ([], "3GB", 3 * 10**9),
        (["--no-prefix-cache-disk"], "3GB", 0),
    ],
)
def test_a_launch_keeps_caches_on_disks_only_if_asked(
    words: list[str], variable: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[LaunchRequest] = []
    monkeypatch.setattr(
        "k2cli.commands.launch._launch", lambda request, **options: seen.append(request)
    )
    if variable:
        monkeypatch.setenv("K2_PREFIX_CACHE_DISK", variable)
    run_command_line(["launch", "demo", *words])
    assert [request.prefix_disk_bytes for request in seen] == [expected]


@pytest.mark.parametrize(
    ("size", "hint"),
    [
        ("0", "leave out --prefix-cache-disk"),
        ("much", "--prefix-cache-disk 50GB"),
        ("-1GB", "--prefix-cache-disk 50GB"),
        # The unit was forgotten. Fifty bytes would remove what is kept of all models.
        ("50", "--prefix-cache-disk 50GB"),
        ("200", "--prefix-cache-disk 200GB"),
        ("20kB", "--prefix-cache-disk 50GB"),
    ],
)
def test_a_size_that_is_none_is_refused_by_its_name(size: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"--prefix-cache-disk '{size}'") as refused:
        run_command_line(["launch", "demo", f"--prefix-cache-disk={size}"])
    assert refused.value.hint == hint


def test_a_size_of_the_environment_is_refused_by_the_name_of_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for size, hint in (
        ("0", "unset K2_PREFIX_CACHE_DISK"),
        ("9", "export K2_PREFIX_CACHE_DISK=9GB"),
    ):
        monkeypatch.setenv("K2_PREFIX_CACHE_DISK", size)
        with pytest.raises(UsageError, match=f"K2_PREFIX_CACHE_DISK '{size}'") as refused:
            run_command_line(["launch", "demo"])
        assert refused.value.hint == hint
