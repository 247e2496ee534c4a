"""``k2 models verify`` and ``path`` on a cache that the real Hub client has filled."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from k2cli.models.inventory.verify import verify_folder
from tests.models.mock_hub import mock_hub
from tests.support.commands import k2


@pytest.fixture
def snapshot(toy_k2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of ``mock/model`` in the cache, as huggingface_hub has written it."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    code = "import huggingface_hub as h; print(h.snapshot_download('mock/model'))"
    with mock_hub(toy_k2) as (address, _):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "HF_ENDPOINT": address},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
    return Path(done.stdout.strip())


def test_a_whole_model_is_verified_and_each_damage_is_named(snapshot: Path) -> None:
    assert k2("models", "path", "mock/model").stdout == f"{snapshot}\n"
    done = k2("models", "verify", "mock/model", "--json")
    files = json.loads(done.stdout)["files"]
    assert done.returncode == 0, done.stderr
    assert {file["name"] for file in files} == {path.name for path in snapshot.iterdir()}
    assert {file["status"] for file in files} == {"verified"}

    weights = (snapshot / "model.safetensors").resolve()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # no header shows it
    weights.write_bytes(data)
    done = k2("models", "verify", "mock/model", "--json")
    damaged = [f for f in json.loads(done.stdout)["files"] if f["status"] == "damaged"]
    assert done.returncode == 1
    assert [file["name"] for file in damaged] == ["model.safetensors"]
    assert weights.name in damaged[0]["reason"]
    assert "hint: k2 models verify mock/model --repair" in done.stderr

    weights.write_bytes(data[:-1])
    done = k2("models", "verify", "mock/model")
    assert (done.returncode, "model.safetensors" in done.stdout) == (1, True)


def test_a_folder_without_digests_is_checked_by_its_headers(toy_k2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_k2, tmp_path / "own")
    done = k2("models", "verify", str(folder))
    assert (done.returncode, "without a recorded hash: only headers" in done.stdout) == (0, True), (
        done.stderr
    )
    os.truncate(folder / "model.safetensors", 1000)
    done = k2("models", "verify", str(folder))
    assert (done.returncode, "cut short" in done.stdout) == (1, True)


def test_a_missing_model_says_how_to_fetch_it(snapshot: Path) -> None:
    (snapshot / "model.safetensors").resolve().unlink()
    done = k2("models", "path", "mock/model")
    assert (done.returncode, done.stdout) == (1, "")
    assert "hint: k2 download mock/model" in done.stderr


def test_large_files_are_compared_by_sha256(toy_k2: Path, tmp_path: Path) -> None:
    """The mock Hub names files by sha1; the Hub names those in LFS by sha256, and links to them."""
    folder = shutil.copytree(toy_k2, tmp_path / "models--a--b" / "snapshots" / "c")
    weights, blobs = folder / "model.safetensors", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    blob = blobs / hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.rename(blob)
    weights.symlink_to(f"../../blobs/{blob.name}")
    status = {file.name: file.status for file in verify_folder(folder).files}
    assert status.pop(weights.name) == "verified"
    assert set(status.values()) == {"no digest known"}
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    assert [file.name for file in verify_folder(folder).damaged] == [weights.name]
