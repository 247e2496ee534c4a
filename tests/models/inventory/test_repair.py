"""``k2 models verify --repair`` by the command: each damage, and what must not be touched."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k2cli.errors import K2Error
from k2cli.models.inventory.fetch_again import RepairPlace
from k2cli.models.inventory.verified import last_verified, read_states
from k2cli.models.sources.cache_layout import FolderPlace
from k2cli.models.sources.expected_files import ExpectedFile
from tests.models.mock_hub import GOOD_TOKEN, MockHub, served_hub
from tests.models.sources.test_download_command import weights
from tests.support.commands import K2, downloaded, k2

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shard(name: str, nbytes: int, seed: int) -> bytes:
    """Make a shard with one tensor of that name, of one letter."""
    data = weights(nbytes, seed)
    return data.replace(b'"t"', f'"{name}"'.encode(), 1)


@pytest.fixture
def hub(toy_k2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MockHub]:
    files: dict[str, Any] = {
        path.name: path.read_bytes()
        for path in sorted(toy_k2.iterdir())
        if path.suffix != ".safetensors"
    }
    index = {"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    files |= {SHARDS[0]: shard("a", 20_000_000, 1), SHARDS[1]: shard("b", 1_000_000, 2)}
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with served_hub(MockHub(files)) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        yield served


def verify(*arguments: str, code: int = 0, **environment: str) -> tuple[dict[str, str], str]:
    """Verify; return the status of each file that is not simply verified, and stderr."""
    done = k2("models", "verify", *arguments, "--json", **environment)
    assert done.returncode == code, done.stderr
    if not done.stdout:
        return {}, done.stderr
    files = json.loads(done.stdout)["files"]
    return {f["name"]: f["status"] for f in files if f["status"] != "verified"}, done.stderr


def flip(path: Path, at: int = -5) -> None:
    """Change one byte of a file in place, and keep its size and time of change."""
    found, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def sent_weights(hub: MockHub) -> set[str]:
    return {line.rpartition("/")[2] for line in hub.requested if line.startswith("GET /mock")}


def same_as_hub(folder: Path, hub: MockHub) -> bool:
    return all((folder / name).read_bytes() == data for name, data in hub.files.items())


def test_each_damage_is_named_and_repaired_alone(hub: MockHub) -> None:
    folder = downloaded("mock/model")
    assert verify("mock/model") == ({}, f"verifying {folder}\n")
    first = last_verified(folder, hub.files)
    assert first is not None
    assert first.by == "verify"

    flip(folder / SHARDS[0])  # a damaged byte
    os.truncate(folder / "chat_template.jinja", 100)  # a file that is cut short
    (folder / "generation_config.json").unlink()  # a link that is lost; its data are there
    (folder / SHARDS[1]).resolve().unlink()  # lost data
    (folder / SHARDS[1]).unlink()
    wanted = {
        SHARDS[0]: "damaged", SHARDS[1]: "missing", "chat_template.jinja": "damaged",
        "generation_config.json": "not linked",
    }  # fmt: skip
    hub.requested.clear()
    status, said = verify("mock/model", code=1, HF_HUB_OFFLINE="1")
    assert (status, hub.requested) == (wanted, [])
    assert "hint: k2 models verify mock/model --repair" in said
    assert set(read_states(folder, hub.files)) == set(hub.files) - set(wanted)
    assert last_verified(folder, hub.files) is None

    status, _ = verify("mock/model", "--repair")
    assert status == dict.fromkeys(wanted, "repaired")
    assert sent_weights(hub) == {*SHARDS, "chat_template.jinja"}
    assert same_as_hub(folder, hub)
    assert verify("mock/model")[0] == {}
    assert last_verified(folder, hub.files) is not None
    assert not list(folder.parent.parent.glob("blobs/*.*"))
    assert all(path.is_symlink() for path in folder.iterdir())


def test_an_interrupted_repair_keeps_the_old_file_and_continues(hub: MockHub) -> None:
    folder = downloaded("mock/model")
    flip(folder / SHARDS[0])
    damaged = (folder / SHARDS[0]).read_bytes()
    hub.faults[SHARDS[0]] = "sticks"
    hub.sent.clear()
    process = subprocess.Popen(
        [*K2, "models", "verify", "mock/model", "--repair"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while sum(hub.sent) < 8_000_000 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (folder / SHARDS[0]).read_bytes() == damaged
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "to continue: k2 models verify mock/model --repair" in said
    assert (folder / SHARDS[0]).read_bytes() == damaged
    del hub.faults[SHARDS[0]]
    hub.sent.clear()
    assert verify("mock/model", "--repair")[0] == {SHARDS[0]: "repaired"}
    assert sum(hub.sent) < 19_000_000  # the rest had arrived
    assert same_as_hub(folder, hub)


def test_a_first_download_that_was_broken_off_is_found_and_completed(hub: MockHub) -> None:
    hub.faults[SHARDS[0]] = "refuses"  # the branch is noted only at the end of a download
    assert k2("download", "mock/model").returncode != 0
    hub.faults.clear()
    refused = k2("models", "path", "mock/model")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "error: model 'mock/model' is not complete on this machine\n" in refused.stderr
    assert "hint: k2 download mock/model\n" in refused.stderr
    assert verify("mock/model", code=1)[0][SHARDS[0]] == "missing"
    assert verify("mock/model", "--repair")[0][SHARDS[0]] == "repaired"
    folder = Path(k2("models", "path", "mock/model").stdout.strip())
    assert same_as_hub(folder, hub)
    # A folder is complete only if each file has its length, also those that are no weights.
    os.truncate(folder / "generation_config.json", 3)
    refused = k2("models", "path", "mock/model")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "1 of 8 files missing or of another length" in refused.stderr
    assert "hint: k2 models verify mock/model --repair\n" in refused.stderr


def test_a_copy_in_a_folder_is_compared_with_its_record(hub: MockHub, tmp_path: Path) -> None:
    folder = downloaded("mock/model", "--to", str(tmp_path / "my model"))
    cached = downloaded("mock/model")
    assert verify(str(folder))[0] == {}
    flip(folder / SHARDS[0])
    (folder / SHARDS[1]).unlink()
    (folder / "config.json").unlink()
    wrong = {SHARDS[0]: "damaged", SHARDS[1]: "missing", "config.json": "missing"}
    status, said = verify(str(folder), code=1)
    assert status == wrong
    hint = next(line for line in said.splitlines() if line.startswith("hint: "))
    flip(cached / SHARDS[0])  # what is damaged in the cache is no source
    hub.requested.clear()
    done = subprocess.run(
        [*K2, *shlex.split(hint.removeprefix("hint: "))[1:]],
        capture_output=True, text=True, timeout=100, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sent_weights(hub) == {SHARDS[0]}
    assert same_as_hub(folder, hub)
    assert verify(str(folder))[0] == {}


def test_a_cache_without_links(hub: MockHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """On exFAT the snapshot has the files themselves, so only the record knows their hashes."""
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    folder = downloaded("mock/model")
    flip(folder / SHARDS[0])
    (folder / SHARDS[1]).unlink()
    assert verify("mock/model", code=1)[0] == {SHARDS[0]: "damaged", SHARDS[1]: "missing"}
    verify("mock/model", "--repair")
    assert same_as_hub(folder, hub)
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert not any((folder.parent.parent / "blobs").iterdir())


def test_a_branch_that_moved_does_not_matter(hub: MockHub) -> None:
    old, commit = dict(hub.files), hub.commit
    folder = downloaded("mock/model")
    hub.moved(old | {SHARDS[0]: shard("a", 15_000_000, 9)})
    flip(folder / SHARDS[0])
    verify("mock/model", "--repair")
    assert folder.name == commit
    assert (folder / SHARDS[0]).read_bytes() == old[SHARDS[0]]
    # With the new commit as main, the old one is named by its revision, also in the hint.
    assert downloaded("mock/model").name == hub.commit
    flip(folder / SHARDS[0])
    status, said = verify("mock/model", "--revision", commit, code=1)
    assert status == {SHARDS[0]: "damaged"}
    hint = f"k2 models verify mock/model --revision {commit} --repair"
    assert f"hint: {hint}\n" in said
    assert verify("mock/model")[0] == {}
    verify("mock/model", "--revision", commit, "--repair")
    assert (folder / SHARDS[0]).read_bytes() == old[SHARDS[0]]


def test_a_running_download_is_respected(hub: MockHub) -> None:
    process = subprocess.Popen(
        [*K2, "download", "mock/model", "--limit-rate", "1M"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while sum(hub.sent) < 500_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    _, said = verify("mock/model", code=1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert "a download of 'mock/model' is running" in said
    assert "hint: wait until it has ended, and then: k2 models verify mock/model\n" in said
    assert "k2 models verify mock/model --repair\n" in verify("mock/model", code=1)[1]
    folder = downloaded("mock/model")
    with (folder.parent.parent / ".k2-incoming.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another machine is sending 'mock/model' here" in verify("mock/model", code=1)[1]
    assert verify("mock/model")[0] == {}


def test_refusals(hub: MockHub, tmp_path: Path) -> None:
    folder = downloaded("gated/model", HF_TOKEN=GOOD_TOKEN)
    flip(folder / SHARDS[1])
    _, said = verify("gated/model", "--repair", code=4)
    assert f"{hub.address}/gated/model" in said
    assert verify("gated/model", "--repair", HF_TOKEN=GOOD_TOKEN)[0] == {SHARDS[1]: "repaired"}
    flip(folder / SHARDS[1])
    _, said = verify("gated/model", "--repair", code=1, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in said
    # The same commit with another content: not what was recorded.
    hub.files[SHARDS[1]] = shard("b", 1_000_000, 7)
    _, said = verify("gated/model", "--repair", code=1, HF_TOKEN=GOOD_TOKEN)
    assert "has another content of 'model-00002-of-00002.safetensors'" in said
    # A folder that nobody recorded.
    own = tmp_path / "own"
    own.mkdir()
    for name, data in hub.files.items():
        (own / name).write_bytes(data)
    os.truncate(own / SHARDS[1], 1000)
    _, said = verify(str(own), "--repair", code=1)
    assert "no known source" in said
    assert k2("models", "verify", str(own), "--revision", "x").returncode == 2


def test_a_chosen_part_of_the_files_is_verified_as_such(hub: MockHub) -> None:
    folder = downloaded("mock/model", "--only", "config")
    assert verify("mock/model")[0] == {}
    flip(folder / "config.json")
    assert verify("mock/model", code=1)[0] == {"config.json": "damaged"}
    assert verify("mock/model", "--repair")[0] == {"config.json": "repaired"}
    assert not (folder / SHARDS[0]).exists()


def test_a_name_of_255_bytes(hub: MockHub, tmp_path: Path) -> None:
    long = f"model-{'x' * 237}.safetensors"
    hub.files.pop("model.safetensors.index.json")
    hub.files.pop(SHARDS[1])
    hub.files[long] = hub.files.pop(SHARDS[0])
    assert len(long) == 255
    for options in ((), ("--to", str(tmp_path / "here"))):
        folder = downloaded("mock/model", *options)
        model = str(folder) if options else "mock/model"
        flip(folder / long)
        assert verify(model, code=1)[0] == {long: "damaged"}
        assert verify(model, "--repair")[0] == {long: "repaired"}
        assert (
            hashlib.sha256((folder / long).read_bytes()).hexdigest()
            == hashlib.sha256(
                hub.files[long]  # type: ignore[arg-type]
            ).hexdigest()
        )
        hub.requested.clear()
        downloaded("mock/model", *options)
        assert not sent_weights(hub)


def test_what_the_user_puts_in_place_during_a_repair_stays(tmp_path: Path) -> None:
    """The file that was found to be damaged is replaced, and no other."""
    data = b"right"
    file = ExpectedFile("config.json", len(data), hashlib.sha256(data).hexdigest())
    place = FolderPlace(file, tmp_path, "c" * 40)
    place.prepare()
    for broken, kept in ((False, True), (True, False)):
        place.partial.write_bytes(data)
        place.path.write_bytes(b"the user's")
        repairing = RepairPlace(place, lambda name, broken=broken: broken)  # type: ignore[misc]
        if kept:
            with pytest.raises(K2Error, match="has changed during the repair"):
                repairing.put()
            assert place.path.read_bytes() == b"the user's"
        else:
            assert repairing.put().read_bytes() == data
