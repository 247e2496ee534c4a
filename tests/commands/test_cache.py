"""``k2 cache``: what is on the disk is listed, and removed after a question."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from k2cli.cli import run_command_line
from k2cli.errors import K2Error, UsageError
from k2cli.launch.request import LaunchRequest
from k2cli.prefix_folder import (
    PART_MARK,
    SECRET_NAME,
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


def _store(name: str, model: str, blocks: int) -> int:
    """Make a store of a rank; return the descriptor that marks it as used."""
    naming_secret()
    lock = open_store(prefixes_directory() / name, StoreNote(model, 0, 2))
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
    with pytest.raises(K2Error, match="'other'"):
        run_command_line(["cache", "clear", "--model", "other", "--yes"])
    run_command_line(["cache", "clear", "--model", "demo", "--yes"])
    assert sorted(path.name for path in prefixes_directory().iterdir()) == ["a-0", "secret"]
    capsys.readouterr()
    run_command_line(["cache", "clear", "--yes", "--json"])
    assert json.loads(capsys.readouterr().out)["freed_bytes"] == 3000
    assert list(prefixes_directory().iterdir()) == []
    os.close(used)


def test_a_folder_that_others_can_access_is_not_used(tmp_path: Path) -> None:
    naming_secret()
    prefixes_directory().chmod(0o755)
    with pytest.raises(OSError, match="only this user"):
        naming_secret()


def test_runs_that_start_together_get_one_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    link, others = os.link, list[bytes]()

    def late(*arguments: Any, **named: Any) -> None:
        if not others:
            others.append(b"")  # another run is faster
            others.append(naming_secret())
        link(*arguments, **named)

    monkeypatch.setattr(os, "link", late)
    first = naming_secret()
    assert first == others[1]
    assert naming_secret(b"another".ljust(32)) == first
    (prefixes_directory() / SECRET_NAME).write_bytes(first[:7])
    assert len(naming_secret()) == 32
    assert [path.name for path in prefixes_directory().iterdir()] == [SECRET_NAME]


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


def test_a_size_that_is_none_is_refused_by_its_name() -> None:
    for size in ("0", "much", "-1GB"):
        with pytest.raises(UsageError, match=f"--prefix-cache-disk '{size}'"):
            run_command_line(["launch", "demo", f"--prefix-cache-disk={size}"])
