"""Models on this machine: what is listed, what removal leaves, and what nothing needs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import scan_cache_dir, snapshot_download

from k2cli.agent.weights.stored_models import ModelQuestion, describe_model, plan_removal, remove
from k2cli.errors import K2Error, UsageError
from k2cli.files import matching
from k2cli.models.inventory import folders, hub_cache
from k2cli.models.inventory.hub_cache import read_hub_cache
from k2cli.models.inventory.known_folders import remember_folder, stamps_of
from k2cli.models.inventory.lookup import matching_models
from k2cli.models.inventory.prune import find_prunable, prune
from k2cli.models.inventory.remove import freed_bytes, remove_models, remove_revisions
from k2cli.models.inventory.stored import stored_models
from k2cli.models.inventory.stored_model import StoredModel
from k2cli.models.inventory.verified import note_states, state_of
from k2cli.models.part import write_part_list
from k2cli.models.sources.expected_files import ExpectedFile
from k2cli.models.sources.snapshot_record import SnapshotRecord, write_record
from k2cli.settings import models_directory
from tests.support.hub_cache import NEW, OLD, put_revision, small_model

SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub library for this process."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def _listed() -> dict[str, StoredModel]:
    return {model.commit or model.name: model for model in stored_models().models}


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]


def _size(files: dict[str, bytes]) -> int:
    return sum(len(data) for data in files.values())


@pytest.mark.parametrize("links", [True, False])
def test_removing_one_revision_leaves_the_other_whole(cache: Path, links: bool) -> None:
    old, new = small_model(1), small_model(2)
    put_revision(cache, OLD, old, "v1", "refs/pr/1", links=links)
    put_revision(cache, NEW, new, "main", links=links)
    found = _listed()
    shared = len(new["model-00001-of-00002.safetensors"]) if links else 0
    assert stored_models().bytes == _size(old) + _size(new) - shared
    assert stored_models().bytes == scan_cache_dir(cache).size_on_disk
    assert found[NEW].name, found[OLD].name == ("mock/model", "mock/model@refs/pr/1")
    assert (found[NEW].added_bytes, found[OLD].added_bytes) == (_size(new), _size(old) - shared)
    assert found[OLD].own_bytes == _size(old) - shared
    assert {model.state for model in found.values()} == {"complete"}

    before = stored_models().bytes
    expected = freed_bytes([found[OLD]], read_hub_cache(cache))
    remove_models([found[OLD]])
    assert before - stored_models().bytes == expected == _size(old) - shared
    scanned = scan_cache_dir(cache)
    assert not scanned.warnings
    assert [revision.refs for repo in scanned.repos for revision in repo.revisions] == [
        frozenset({"main"})
    ]
    loaded = Path(snapshot_download("mock/model", cache_dir=cache, local_files_only=True))
    assert {path.name: path.read_bytes() for path in loaded.iterdir()} == new

    remove_models([_listed()[NEW]])
    assert not _files(cache)
    assert not scan_cache_dir(cache).warnings


def test_an_interrupted_removal_is_listed_as_incomplete_and_can_be_ended(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupt it at every file that it removes, one after the other."""
    put_revision(cache, OLD, small_model(1), "v1")
    new = put_revision(cache, NEW, small_model(2), "main")
    record = [ExpectedFile(name, len(data), hashlib.sha256(data).hexdigest())
              for name, data in small_model(1).items()]  # fmt: skip
    old_record = SnapshotRecord("hub", "mock/model", "v1", OLD, tuple(record))
    write_record(new.with_name(OLD), old_record)
    saved = shutil.copytree(cache, tmp_path / "saved", symlinks=True)
    real, ended = os.unlink, 0
    for number in range(1, 30):
        left = number

        def unlink(path: object, *arguments: object, **options: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            real(path, *arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "unlink", unlink)
        try:
            remove_models([_listed()[OLD]])
        except KeyboardInterrupt:
            pass
        finally:
            monkeypatch.setattr(os, "unlink", real)
        if left > 0:
            break  # it was not interrupted any more
        state = _listed()
        assert state[NEW].state == "complete"
        if OLD in state:  # else only the lock file was left
            assert state[OLD].state == ("complete" if number == 1 else "incomplete")
            remove_models([state[OLD]])
            ended += 1
        assert [*_listed()] == [NEW]
        scanned = scan_cache_dir(cache)
        assert not scanned.warnings
        assert scanned.size_on_disk == _size(small_model(2))
        shutil.rmtree(cache)
        shutil.copytree(saved, cache, symlinks=True)
    assert ended > 5


def test_an_interrupted_download_is_incomplete_by_what_it_lacks(cache: Path) -> None:
    files = small_model(1)
    folder = put_revision(cache, NEW, {n: d for n, d in files.items() if n != SHARD})
    blobs = folder.parent.parent / "blobs"
    digest = hashlib.sha256(files[SHARD]).hexdigest()
    expected = [ExpectedFile(n, len(d), hashlib.sha256(d).hexdigest()) for n, d in files.items()]
    record = SnapshotRecord("hub", "mock/model", "main", NEW, tuple(expected))
    write_record(folder, record)
    (blobs / f"{digest}.partial").write_bytes(files[SHARD][:8192])
    (blobs / f"{digest}.journal").write_bytes(b"x")
    (model,) = _listed().values()
    assert (model.name, model.state) == ("mock/model", "incomplete")
    assert model.missing_bytes == len(files[SHARD]) - 8192
    assert model.verified is None
    shown = describe_model(ModelQuestion("mock/model")).models[0].files
    lacking = [(file.name, file.partial_bytes) for file in shown if not file.is_here]
    assert lacking == [(SHARD, 8192)]
    assert not find_prunable(24).items
    assert [item.what for item in find_prunable(0).items] == ["revision"]
    remove_models([model])
    assert not _files(cache)


def test_leftovers_that_no_revision_lacks_are_pruned_when_they_are_old(cache: Path) -> None:
    files = small_model(1)
    folder = put_revision(cache, NEW, files, "main")
    blobs = folder.parent.parent / "blobs"
    for name in (f"{'a' * 64}.incomplete", f".{'b' * 64}.k2-incoming", f".{'b' * 64}.k2-journal"):
        (blobs / name).write_bytes(bytes(4096))
    (blobs / ("c" * 64)).write_bytes(bytes(5000))
    assert stored_models().leftover_bytes == 3 * 4096 + 5000
    assert [item.what for item in find_prunable(24).items] == ["content"]
    found = find_prunable(0).items
    assert sum(item.bytes for item in found) == 3 * 4096 + 5000
    assert sorted(item.what for item in found) == ["content", "download", "push", "push"]
    lock = cache / ".locks" / "models--mock--model" / f"{'a' * 64}.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert find_prunable(0).items == ()
        assert find_prunable(0).kept == ("mock/model: a download is running",)
        with pytest.raises(K2Error, match="written by a running download"):
            prune(found)
    prune(find_prunable(0).items)
    assert stored_models().leftover_bytes == 0
    assert _listed()[NEW].state == "complete"


def test_only_revisions_that_nobody_asked_for_are_pruned(cache: Path) -> None:
    pinned, used = "2" * 40, "3" * 40
    for number, commit in enumerate((OLD, pinned, used)):
        put_revision(cache, commit, small_model(number + 5))
    put_revision(cache, NEW, small_model(2), "main")
    pin = SnapshotRecord("hub", "mock/model", pinned, pinned, ())
    snapshots = cache / "models--mock--model" / "snapshots"
    write_record(snapshots / pinned, pin)
    found = find_prunable(24, frozenset({str(snapshots / used)}))
    assert [item.path for item in found.items] == [str(snapshots / OLD)]
    assert found.items[0].bytes == len(small_model(5)[SHARD]) + len(small_model(5)["config.json"])
    assert [text.partition(": ")[2] for text in found.kept] == [
        "it was downloaded by its commit",
        "a run uses it",
    ]
    prune(found.items)
    assert sorted(_listed()) == [NEW, pinned, used]


@pytest.mark.parametrize("which", ["download", "push"])
def test_nothing_is_removed_while_it_is_written(cache: Path, which: str) -> None:
    folder = put_revision(cache, NEW, small_model(1), "main")
    storage = folder.parent.parent
    lock = storage / ".k2-incoming.lock"
    if which == "download":
        lock = cache / ".locks" / storage.name / f"{'a' * 64}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(K2Error, match=f"being written by a running {which}"):
            remove_revisions(storage, {NEW})
        (folder / SHARD).unlink()
        assert _listed()[NEW].writer == which
        assert f"by a running {which}" in plan_removal(ModelQuestion("mock/model")).problem


def test_links_are_not_followed_out_of_the_cache(cache: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious.safetensors"
    precious.write_bytes(b"x" * 100)
    folder = put_revision(cache, NEW, small_model(1), "main")
    (folder / "model-00003-of-00003.safetensors").symlink_to(precious)
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    (folder / "more").symlink_to(elsewhere)
    (elsewhere / "file").write_text("kept")
    remove_models([_listed()[NEW]])
    assert not _files(cache)
    assert precious.exists()
    assert (elsewhere / "file").exists()

    moved = put_revision(tmp_path / "big", NEW, small_model(1), "main").parent.parent
    (cache / moved.name).symlink_to(moved)
    assert "is a link to" in stored_models().problems[0]
    with pytest.raises(K2Error, match="nothing of 'mock/model' is removed"):
        remove_revisions(cache / moved.name, {NEW})
    assert (moved / "snapshots" / NEW / SHARD).exists()


def test_a_store_that_repositories_share_keeps_what_another_one_has(cache: Path) -> None:
    """The Hub library keeps contents that came by Xet once, with links from each repository."""
    files = small_model(1)
    for repo in ("mock/model", "mock/copy"):
        put_revision(cache, NEW, files, "main", repo=repo)
    digest, key = hashlib.sha256(files[SHARD]).hexdigest(), "ab" * 32
    store = cache / "blobs" / key[:2] / key
    store.parent.mkdir(parents=True)
    (cache / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    store.write_bytes(files[SHARD])
    links = [cache / f"models--mock--{name}" / "blobs" / digest for name in ("model", "copy")]
    for link in links:
        link.unlink()
        link.symlink_to(os.path.relpath(store, link.parent))
    manifest = "".join(f"{link.relative_to(cache)}\n" for link in links)
    store.with_name(f"{key}.refs").write_text(manifest)

    models = {model.repo: model for model in stored_models().models}
    once = _size(files) - len(files[SHARD])
    assert stored_models().bytes == 2 * once + len(files[SHARD])
    assert freed_bytes([models["mock/copy"]], read_hub_cache(cache)) == once
    remove_models([models["mock/copy"]])
    assert store.read_bytes() == files[SHARD]
    assert [model.state for model in stored_models().models] == ["complete"]
    remove_models([models["mock/model"]])
    assert not store.exists()


def test_a_folder_of_the_user_stays_and_one_that_k2_made_goes(cache: Path, tmp_path: Path) -> None:
    own, made = tmp_path / "own", tmp_path / "made"
    for folder in (own, made):
        folder.mkdir()
        for name, data in small_model(1).items():
            (folder / name).write_bytes(data)
    remember_folder(made, "quantize", stamps_of(made), source="mock/model")
    (made / "notes.txt").write_text("the user's")
    refused = plan_removal(ModelQuestion(str(own)))
    assert "it did not write this folder" in refused.problem
    assert f"ls -la {own}" in refused.hint
    with pytest.raises(K2Error, match="k2 did not write"):
        remove_models(refused.models)
    assert len(_files(own)) == 3

    (model,) = stored_models().models
    assert (model.kind, model.source, model.state) == ("folder", "mock/model", "complete")
    agreed = ModelQuestion(str(made), folders=(model.folder,))
    assert remove(agreed).problem == ""
    assert [path.name for path in _files(made)] == ["notes.txt"]
    assert stored_models().models == ()


def test_a_part_a_config_and_a_conversion_are_told_apart(cache: Path) -> None:
    files = small_model(1)
    part = put_revision(cache, NEW, {n: d for n, d in files.items() if n != SHARD}, "main")
    write_part_list(part, {SHARD: 40_000})
    (part / ".k2-part" / SHARD).write_bytes(files[SHARD][:200])
    put_revision(cache, OLD, {"config.json": files["config.json"]}, "main", repo="a/config")
    put_revision(cache, OLD, {"pytorch_model.bin": b"x"}, "main", repo="a/other")
    converted = models_directory() / "demo"
    converted.mkdir(parents=True)
    for name, data in files.items():
        (converted / name).write_bytes(data)
    found = {model.name: model for model in stored_models().models}
    assert {name: model.state for name, model in found.items()} == {
        "a/config": "config", "a/other": "other", "demo": "complete", "mock/model": "part",
    }  # fmt: skip
    assert found["mock/model"].missing_bytes == 40_000
    assert [*found] == sorted(found)
    remove_models([found["demo"]])
    assert not converted.exists()


def test_a_verification_counts_until_a_file_changes(cache: Path) -> None:
    folder = put_revision(cache, NEW, small_model(1), "main")
    assert _listed()[NEW].verified is None
    states = {name: state_of(folder / name, "h", "verify") for name in small_model(1)}
    note_states(folder, states)
    verified = _listed()[NEW].verified
    assert verified is not None
    assert verified.by == "verify"
    changed = (folder / SHARD).resolve()
    before = changed.stat()
    os.utime(changed, (verified.time + 10, verified.time + 10))
    assert _listed()[NEW].verified is None
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert _listed()[NEW].verified == verified


def test_a_model_is_found_by_each_of_its_names(cache: Path) -> None:
    folder = put_revision(cache, NEW, small_model(1), "main")
    put_revision(cache, OLD, small_model(2), "v1")
    put_revision(cache, OLD, small_model(2), "main", repo="gpt2")
    models = stored_models().models

    def commits(text: str, revision: str = "") -> list[str]:
        return sorted(model.commit for model in matching_models(models, text, revision))

    assert commits("mock/model") == [OLD, NEW]
    assert commits("mock/model@v1") == commits("mock/model", "0000") == [OLD]
    assert commits(str(folder)) == commits("mock/model", "main") == [NEW]
    assert commits("gpt2") == [OLD]
    with pytest.raises(K2Error, match="has no revision 'v9'"):
        commits("mock/model@v9")
    with pytest.raises(K2Error, match="is not on this machine"):
        commits("mock/absent")
    with pytest.raises(UsageError, match="there is no model"):
        commits("nonsense")


def test_a_download_to_a_folder_is_removed_without_what_the_user_has_there(
    cache: Path, tmp_path: Path
) -> None:
    """A file that the user has changed since, and notes that lead elsewhere, are not k2's."""
    folder, elsewhere = tmp_path / "to", tmp_path / "elsewhere"
    (elsewhere / "k2").mkdir(parents=True)
    (elsewhere / "k2" / "kept").write_text("the user's")
    folder.mkdir()
    files = small_model(1)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    expected = [ExpectedFile(n, len(d), hashlib.sha256(d).hexdigest()) for n, d in files.items()]
    write_record(folder, SnapshotRecord("hub", "mock/model", "main", NEW, tuple(expected)))
    remember_folder(folder, "download")
    (folder / "config.json").write_text('{"the user": "changed it"}')
    (model,) = stored_models().models
    assert (model.repo, model.commit, model.state) == ("mock/model", NEW, "incomplete")
    remove_models([model])
    assert [path.name for path in _files(folder)] == ["config.json"]

    remember_folder(folder, "quantize", stamps_of(folder))
    (folder / "config.json").unlink()  # by a removal that was interrupted after it
    remove_models(stored_models().models)
    assert not folder.exists()
    folder.mkdir()
    (folder / ".cache").symlink_to(elsewhere)
    (folder / "model.safetensors").write_bytes(b"x")
    remember_folder(folder, "quantize", stamps_of(folder))
    remove_models(stored_models().models)
    assert [path.name for path in _files(folder)] == [".cache"]
    assert (elsewhere / "k2" / "kept").exists()


def test_what_another_command_removes_meanwhile_is_not_listed_and_is_no_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_revision(cache, OLD, small_model(1), "main")
    for name in ("one", "two"):
        (models_directory() / name).mkdir(parents=True)
        (models_directory() / name / "config.json").write_text("{}")
    described, read = folders.described_folder, hub_cache._references

    def described_too_late(folder: Path, *arguments: Any, **options: Any) -> StoredModel:
        if folder.name == "one":
            shutil.rmtree(folder)
            os.listdir(folder)
        return described(folder, *arguments, **options)

    def read_too_late(folder: Path) -> Any:
        shutil.rmtree(folder.parent)
        os.listdir(folder)
        return read(folder)

    monkeypatch.setattr(folders, "described_folder", described_too_late)
    monkeypatch.setattr(hub_cache, "_references", read_too_late)
    found = stored_models()
    assert [Path(model.folder).name for model in found.models] == ["two"]


def test_files_are_matched_by_name_in_a_folder_that_may_be_gone(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "c.txt"):
        (tmp_path / name).touch()
    assert matching(tmp_path, "*.json") == [tmp_path / "a.json", tmp_path / "b.json"]
    assert matching(tmp_path / "gone", "*") == []
    assert matching(tmp_path / "c.txt", "*") == []
