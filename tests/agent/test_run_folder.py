"""Removal of what a run leaves on a node, beside others that remove or write there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from k2cli.agent import clean, run_folder
from k2cli.agent.clean import clean_machine
from k2cli.agent.disk import largest_weights
from k2cli.agent.locks import lock_path
from k2cli.errors import ClusterError
from k2cli.nodes.local import LocalNode
from k2cli.nodes.locks import RankNeed, take_locks


def test_a_folder_that_somebody_else_removes_meanwhile_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_folder.write_private("demo-1", "bootstrap-0.json", b"{}")
    folder, unlink = run_folder.run_folder("demo-1"), Path.unlink

    def unlink_and_all(path: Path, *, missing_ok: bool = False) -> None:
        unlink(path)
        folder.rmdir()

    monkeypatch.setattr(Path, "unlink", unlink_and_all)
    run_folder.remove_bootstraps("demo-1")
    assert not folder.exists()
    run_folder.remove_bootstraps("demo-1")


def test_a_folder_that_somebody_else_writes_into_meanwhile_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_folder.write_private("demo-1", "bootstrap-0.json", b"{}")
    folder, rmdir = run_folder.run_folder("demo-1"), Path.rmdir

    def too_late(path: Path) -> None:
        (folder / "run.json").write_text("{}")
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", too_late)
    run_folder.remove_bootstraps("demo-1")
    assert os.listdir(folder) == ["run.json"]


def test_a_folder_that_cannot_be_read_is_an_error_with_the_name_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The supervisor expects no other kind of error at the end of a run."""

    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(run_folder.os, "listdir", refuse)
    with pytest.raises(ClusterError, match="this machine"):
        LocalNode().remove_bootstraps("demo-1")


def test_a_run_that_is_launched_while_a_machine_is_cleaned_is_not_taken_for_a_left_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = {"folders": clean._folders, "locks": clean.list_locks}
    launched = []

    def launch_after(name: str) -> object:
        def look(*arguments: object) -> object:
            found = looks[name](*arguments)  # type: ignore[operator]
            if not launched:
                launched.append(name)
                take_locks([LocalNode()], "demo-1", {"localhost": [RankNeed(1, 2)]})
                run_folder.write_private("demo-1", "bootstrap-0.json", b"{}")
            return found

        return look

    monkeypatch.setattr(clean, "_folders", launch_after("folders"))
    monkeypatch.setattr(clean, "list_locks", launch_after("locks"))
    assert clean_machine(frozenset()).cleared == ()
    assert lock_path("demo-1").exists()
    assert (run_folder.run_folder("demo-1") / "bootstrap-0.json").exists()


def test_the_largest_weights_are_found_though_other_files_are_removed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("a", 2**21), ("b", 2**22), ("c", 2**23)):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(size))
    stat = Path.stat

    def stat_too_late(path: Path, **options: bool) -> os.stat_result:
        if path.name == "c.safetensors":
            path.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", stat_too_late)
    assert largest_weights(tmp_path) == tmp_path / "b.safetensors"
