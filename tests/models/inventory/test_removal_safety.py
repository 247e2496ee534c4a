"""What is never removed: files that cannot be seen for now, are the user's, or are in use."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from k2cli import files
from k2cli.agent.weights.stored_models import ModelQuestion, plan_removal, remove
from k2cli.errors import K2Error
from k2cli.models.files import folder_being_made
from k2cli.models.inventory import remove as removal
from k2cli.models.inventory import writers
from k2cli.models.inventory.hub_cache import CachedRepository, read_repository
from k2cli.models.inventory.known_folders import known_folder, remember_folder, stamps_of
from k2cli.models.inventory.prune import find_prunable, prune
from k2cli.models.inventory.remove import remove_models, remove_revisions
from k2cli.models.inventory.stored import stored_models
from k2cli.models.inventory.stored_model import ModelUse
from k2cli.models.inventory.verified import note_path, note_states, read_states, state_of
from k2cli.models.inventory.writers import held, is_held
from k2cli.models.reference import SOURCE_NAME
from k2cli.models.sources import download
from k2cli.models.sources.cache_layout import FolderLayout
from k2cli.models.sources.expected_files import ExpectedFile
from k2cli.models.sources.snapshot_record import SnapshotRecord, record_path, write_record
from k2cli.settings import data_directory, models_directory
from tests.support.as_macos import ignore_case
from tests.support.hub_cache import NEW, OLD, put_revision, small_model

SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub library for this process."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def _record(files: dict[str, bytes]) -> SnapshotRecord:
    listed = [ExpectedFile(n, len(d), hashlib.sha256(d).hexdigest()) for n, d in files.items()]
    return SnapshotRecord("hub", "mock/model", "main", NEW, tuple(listed))


# --- the Hub's cache ------------------------------------------------------------------------------


def test_a_repository_that_cannot_be_read_again_is_not_taken_for_an_empty_one(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = put_revision(cache, OLD, small_model(1), "v1")
    new = put_revision(cache, NEW, small_model(2), "main")
    calls = 0

    def read(folder: Path) -> CachedRepository:
        nonlocal calls
        calls += 1
        if old.exists():
            return read_repository(folder)
        return CachedRepository("mock/model", folder, problem="the disk is gone")

    monkeypatch.setattr(removal, "read_repository", read)
    with pytest.raises(K2Error, match="the disk is gone"):
        remove_revisions(old.parent.parent, {OLD})
    assert calls > 1
    assert (new / SHARD).read_bytes() == small_model(2)[SHARD]


def test_files_of_a_folder_that_cannot_be_listed_are_not_contents_of_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put_revision(cache, NEW, small_model(1), "main")
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if os.fspath(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = find_prunable(0)
    assert found.items == ()
    assert "Permission denied" in found.kept[0]
    with pytest.raises(K2Error, match="cannot be read"):
        remove_revisions(folder.parent.parent, {NEW})


@pytest.mark.parametrize("damage", ["empty", "binary", "fifo", "link", "long"])
def test_a_branch_that_names_no_commit_keeps_revisions_without_one(
    cache: Path, damage: str
) -> None:
    folder = put_revision(cache, OLD, small_model(1), "main")
    branch = folder.parent.parent / "refs" / "main"
    branch.unlink()
    if damage == "fifo":
        os.mkfifo(branch)
    elif damage == "link":
        branch.symlink_to(folder.parent.parent / "elsewhere")
    else:
        branch.write_bytes({"empty": b"", "binary": b"\xff\xfe", "long": b"a" * 999}[damage])
    found = find_prunable(0)
    assert found.items == ()
    assert "'main' names no commit" in found.kept[0]
    (model,) = stored_models().models  # and it is still listed, and can be removed by its name
    remove_models([model])
    assert not folder.parent.parent.exists()


@pytest.mark.parametrize("name", ["snapshots/" + OLD, ".no_exist", ".k2", "trees"])
def test_folders_that_lead_elsewhere_stop_a_removal(cache: Path, tmp_path: Path, name: str) -> None:
    """A revision on another disk has its contents here; a linked folder has other files."""
    storage = put_revision(cache, NEW, small_model(1), "main").parent.parent
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / NEW).mkdir(parents=True)
    for file in (f"{NEW}/kept", f"{NEW}.json"):
        (elsewhere / file).write_text("the user's")
    (storage / name).symlink_to(elsewhere)
    assert "is a link to" in stored_models().problems[0]
    assert find_prunable(0).items == ()
    with pytest.raises(K2Error, match="is a link to"):
        remove_revisions(storage, {NEW})
    assert (elsewhere / NEW / "kept").exists()
    assert (elsewhere / f"{NEW}.json").exists()


def test_a_content_that_a_download_has_linked_meanwhile_stays(cache: Path) -> None:
    folder = put_revision(cache, NEW, small_model(1), "main")
    blobs = folder.parent.parent / "blobs"
    (blobs / "notes.txt").write_text("the user's")
    (blobs / "folder").mkdir()
    content = blobs / ("c" * 64)
    content.write_bytes(b"x" * 5000)
    found = find_prunable(0).items
    assert [item.path for item in found] == [str(content)]
    (folder / "late.json").symlink_to(os.path.relpath(content, folder))
    prune(found)
    assert content.exists()
    (folder / "late.json").unlink()
    (blobs.parent / "refs").rename(blobs.parent / "other")
    (blobs.parent / "refs").symlink_to("other")
    with pytest.raises(K2Error, match="is a link"):
        prune(found)
    assert content.exists()


def test_a_content_stays_that_another_revision_gets_during_a_removal(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = put_revision(cache, OLD, small_model(1), "v1")
    content = (old / SHARD).resolve()
    real = writers.held

    def begin_download(path: Path, name: str) -> Any:
        if path.name == f"{content.name}.lock":
            new = old.with_name(NEW)
            new.mkdir(exist_ok=True)
            (new / SHARD).symlink_to(os.path.relpath(content, new))
        return real(path, name)

    monkeypatch.setattr(removal, "held", begin_download)
    remove_revisions(old.parent.parent, {OLD})
    assert (old.with_name(NEW) / SHARD).read_bytes() == small_model(1)[SHARD]
    assert not old.exists()


# --- other folders --------------------------------------------------------------------------------


def test_names_like_those_of_unfinished_files_are_the_users(cache: Path, tmp_path: Path) -> None:
    folder = _write(tmp_path / "made", small_model(1))
    remember_folder(folder, "quantize", stamps_of(folder))
    own = ["diary.journal", "thesis.partial", ".draft.incomplete", ".a.0123abcd.shared"]
    for name in own:
        (folder / name).write_text("the user's")
    (folder / ".x.k2-incoming").write_text("of a push")
    assert [Path(item.path).name for item in find_prunable(0).items] == [".x.k2-incoming"]
    remove_models(stored_models().models)
    assert sorted(path.name for path in folder.iterdir()) == sorted(own)


def test_a_change_of_the_same_size_makes_a_downloaded_file_the_users(
    cache: Path, tmp_path: Path
) -> None:
    model_files = small_model(1)
    folder = _write(tmp_path / "to", model_files)
    write_record(folder, _record(model_files))
    remember_folder(folder, "download")
    layout = FolderLayout(folder, NEW)
    places = layout.places(list(_record(model_files).files), write=True)
    assert all(place.find() for place in places)
    for name in ("config.json", SHARD):
        edited = model_files[name][:-3] + b"9" + model_files[name][-2:]
        (folder / name).write_bytes(edited)
        later = (folder / name).stat().st_mtime + 60
        os.utime(folder / name, (later, later))
    # A download sees that these are not what it fetched, too.
    changed = {place.file.name for place in places if not place.is_there()}
    assert changed == {"config.json", SHARD}
    (model,) = stored_models().models
    remove_models([model])
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == ["config.json", SHARD]


def test_a_note_of_a_later_version_is_not_read_by_the_rules_of_this_one(
    cache: Path, tmp_path: Path
) -> None:
    folder = _write(tmp_path / "made", small_model(1))
    remember_folder(folder, "quantize", stamps_of(folder))
    (entry,) = (data_directory() / "known-folders").glob("*.json")
    later = msgspec.json.decode(entry.read_bytes()) | {"schema_version": 2}
    entry.write_bytes(msgspec.json.encode(later))
    assert known_folder(folder) is None
    assert "it did not write" in plan_removal(ModelQuestion(str(folder))).problem


def test_notes_of_a_later_version_are_neither_replaced_nor_read(
    cache: Path, tmp_path: Path
) -> None:
    contents = small_model(1)
    folder = _write(tmp_path / "made", contents)

    def note() -> None:
        remember_folder(folder, "push", stamps_of(folder))
        write_record(folder, _record(contents))
        note_states(folder, {SHARD: state_of(folder / SHARD, "a" * 64, "push")})

    note()
    paths = [
        *(data_directory() / "known-folders").glob("*.json"),
        record_path(folder),
        note_path(folder),
    ]
    written = {}
    for path in paths:
        later = msgspec.json.decode(path.read_bytes()) | {"schema_version": 2, "more": 1}
        written[path] = msgspec.json.encode(later)
        path.write_bytes(written[path])
    note()
    assert {path: path.read_bytes() for path in paths} == written
    assert len(written) == 3
    assert read_states(folder, [SHARD]) == {}


@pytest.mark.parametrize("text", ["/", "~", "."])
def test_a_refusal_proposes_no_removal_of_what_is_no_model(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = plan_removal(ModelQuestion(text))
    assert found.problem
    assert "rm " not in found.hint
    spaced = _write(tmp_path / "my models", small_model(1))
    assert plan_removal(ModelQuestion(str(spaced))).hint.endswith(f"ls -la '{spaced}'")


def test_a_folder_of_the_user_in_k2s_own_folder_stays(cache: Path) -> None:
    folder = _write(models_directory() / "mine", small_model(1))
    (model,) = stored_models().models
    assert "did not write" in model.kept_because
    with pytest.raises(K2Error, match="k2 did not write"):
        remove_models([model])
    assert (folder / SHARD).exists()


def test_an_interrupted_removal_of_a_conversion_can_be_ended(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _write(models_directory() / "toy-0123abcd", small_model(1))
    (folder / SOURCE_NAME).write_text("{}")
    saved = shutil.copytree(folder, tmp_path / "saved")
    real, ended = os.unlink, 0
    for number in range(1, 20):
        left = number

        def unlink(path: object, *arguments: object, **options: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            real(path, *arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "unlink", unlink)
        try:
            remove_models(stored_models().models)
        except KeyboardInterrupt:
            pass
        finally:
            monkeypatch.setattr(os, "unlink", real)
        if left > 0:
            break
        remove_models(stored_models().models)
        assert not folder.exists()
        ended += 1
        shutil.copytree(saved, folder)
    assert ended > 3


def test_a_new_conversion_takes_no_file_of_the_user(tmp_path: Path) -> None:
    folder = _write(tmp_path / "made", {**small_model(1), SOURCE_NAME: b"{}"})
    download._refuse_others(folder)
    (folder / "notes.txt").write_text("the user's")
    with pytest.raises(K2Error, match=r"k2 did not write notes\.txt"):
        download._refuse_others(folder)
    (folder / "notes.txt").unlink()
    (folder / "adapters").mkdir()
    with pytest.raises(K2Error, match="k2 did not write adapters"):
        download._refuse_others(folder)


def test_a_folder_that_is_being_made_is_not_pruned(cache: Path, tmp_path: Path) -> None:
    destination = tmp_path / "made"
    remember_folder(destination, "quantize")
    with folder_being_made(destination) as folder:
        (folder / "model.safetensors").write_bytes(b"x")
        assert find_prunable(0).items == ()
        shutil.copytree(folder, tmp_path / ".made.k2-abcdefgh")
        killed = find_prunable(0).items
        assert [Path(item.path).name for item in killed] == [".made.k2-abcdefgh"]
        prune([*killed, msgspec.structs.replace(killed[0], path=str(folder))])
        assert [path.name for path in tmp_path.glob(".made.k2-*")] == [folder.name]
    assert (destination / "model.safetensors").exists()


# --- locks and runs -------------------------------------------------------------------------------


def test_a_lock_that_may_not_be_opened_counts_as_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "x.lock"
    assert not is_held(lock)
    lock.touch()
    assert not is_held(lock)
    real: Callable[..., int] = files.open_regular

    def read_only(path: Path, flags: int = os.O_RDONLY) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return real(path, flags)

    monkeypatch.setattr(writers, "open_regular", read_only)
    assert not is_held(lock)
    with lock.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert is_held(lock)

    def closed(path: Path, flags: int = os.O_RDONLY) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(writers, "open_regular", closed)
    assert is_held(lock)


def test_a_lock_that_its_holder_has_removed_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / ".k2-incoming.lock"
    real = fcntl.flock

    def removed(descriptor: int, operation: int) -> None:
        lock.unlink()
        lock.touch()  # another process begins
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed)
    with pytest.raises(K2Error, match="written by a running push"), held(lock, "x"):
        pass


def test_a_run_on_another_machine_keeps_a_model_on_a_network_volume(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put_revision(cache, NEW, small_model(1), "main")
    use = ModelUse("run-1", str(folder), "mock/model", node="b")
    question = ModelQuestion("mock/model", uses=(use,), folders=(str(folder),))
    assert plan_removal(question).problem == ""  # each machine has its own copy there
    monkeypatch.setattr("k2cli.agent.software.NETWORK_FILESYSTEMS", _Every())
    assert "is used by the run run-1" in remove(question).problem
    assert (folder / SHARD).exists()


def test_a_run_keeps_its_model_in_whatever_case_its_folder_was_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignore_case(monkeypatch)
    folder = put_revision(cache, NEW, small_model(1), "main")
    use = ModelUse("run-1", str(folder).upper(), str(folder).upper())
    question = ModelQuestion("mock/model", uses=(use,), folders=(str(folder),))
    assert "is used by the run run-1" in remove(question).problem
    assert (folder / SHARD).exists()


class _Every:
    def __contains__(self, kind: object) -> bool:
        return True
