"""Downloads from ModelScope by the command, with its real client against a mock of its API."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2cli.errors import UsageError
from k2cli.models.modelscope_login import stored_token
from k2cli.models.reference import parse_reference
from k2cli.models.sources.snapshot_record import recorded_snapshot
from tests.models.mock_modelscope import TOKEN, MockModelScope, served_modelscope
from tests.models.sources.test_download_command import weights
from tests.support.commands import downloaded, k2

WEIGHTS = "model.safetensors"
MODEL = "modelscope:mock/model"


@pytest.fixture
def scope(
    toy_k2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MockModelScope]:
    pytest.importorskip("modelscope_hub", reason="the extra 'modelscope' is not installed")
    files = {path.name: path.read_bytes() for path in sorted(toy_k2.iterdir())}
    files |= {WEIGHTS: weights(9_000_000), "modeling.py": b"raise SystemExit"}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    with served_modelscope(MockModelScope({"master": files, "c" * 40: files})) as served:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", served.address)
        yield served


def test_a_model_is_found_by_its_reference(scope: MockModelScope, tmp_path: Path) -> None:
    folder = downloaded(MODEL)
    record = recorded_snapshot(folder)
    assert record is not None
    assert (record.source, record.repo, record.revision) == ("modelscope", "mock/model", "master")
    assert (record.commit, record.whole) == ("c" * 40, True)
    wanted = scope.revisions["master"]
    assert {file.name for file in record.files} == wanted.keys() - {"modeling.py"}
    assert all((folder / file.name).read_bytes() == wanted[file.name] for file in record.files)
    assert k2("models", "path", MODEL).stdout == f"{folder}\n"
    sent = scope.sent_bytes
    assert downloaded(MODEL) == folder
    assert scope.sent_bytes == sent
    # The client leaves no identity of a session in the home folder.
    assert not (tmp_path / "home" / ".modelscope").exists()
    # Without the server the complete copy is used.
    assert downloaded(MODEL, MODELSCOPE_ENDPOINT="http://127.0.0.1:9") == folder


def test_a_model_is_listed_and_removed_by_its_reference(scope: MockModelScope) -> None:
    whole = downloaded(MODEL)
    config = downloaded(MODEL, "--revision", "master", "--only", "config")
    listed = json.loads(k2("models", "list", "--json").stdout)["nodes"][0]["models"]
    assert [(each["name"], each["state"], each["folder"]) for each in listed] == [
        (MODEL, "complete", str(whole)),
        (f"{MODEL}@master", "config", str(config)),
    ]
    assert f"repository    {MODEL.partition(':')[2]}\n" in k2("models", "show", MODEL).stdout
    shown = k2("models", "show", MODEL, "--revision", "master").stdout
    assert shown.startswith(f"{MODEL}@master\n")
    assert k2("models", "remove", MODEL, "--yes").returncode == 0
    assert (whole.exists(), config.exists()) == (False, True)
    assert k2("models", "remove", MODEL, "--yes").returncode == 1


def test_a_repair_takes_the_recorded_commit(scope: MockModelScope) -> None:
    folder, old = downloaded(MODEL), scope.revisions["master"][WEIGHTS]
    scope.revisions["master"] = scope.revisions["master"] | {WEIGHTS: weights(8_000_000, 3)}
    data = bytearray(old)
    data[-9] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    scope.requested.clear()
    done = k2("models", "verify", MODEL)
    assert (done.returncode, scope.requested) == (1, [])
    assert f"hint: k2 models verify {MODEL} --repair" in done.stderr
    done = k2("models", "verify", MODEL, "--repair")
    assert done.returncode == 0, done.stderr
    assert (folder / WEIGHTS).read_bytes() == old


def test_a_server_that_names_no_commits(scope: MockModelScope) -> None:
    scope.names_commits = False
    folder = downloaded(MODEL)
    record = recorded_snapshot(folder)
    assert record is not None
    assert record.commit.startswith("listing-")
    os.truncate(folder / WEIGHTS, 5000)
    assert k2("models", "verify", MODEL, "--repair").returncode == 0
    # The branch moves: what was recorded is no longer there.
    os.truncate(folder / WEIGHTS, 5000)
    scope.revisions["master"] = scope.revisions["master"] | {WEIGHTS: weights(8_000_000, 3)}
    done = k2("models", "verify", MODEL, "--repair")
    assert done.returncode == 1
    assert f"has another content of '{WEIGHTS}'" in done.stderr
    # A commit that the list names, but which is no revision with these files, is not believed.
    scope.names_commits, scope.commit = True, "d" * 40
    scope.revisions["d" * 40] = {"config.json": b"{}"}
    assert recorded_snapshot(downloaded(MODEL)).commit.startswith("listing-")  # type: ignore[union-attr]


def test_tokens_go_to_the_server_alone(scope: MockModelScope) -> None:
    scope.private = True
    done = k2("download", MODEL)
    assert done.returncode == 4, done.stderr
    assert "hint: modelscope login" in done.stderr
    done = k2("download", MODEL, MODELSCOPE_API_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert scope.tokens
    assert set(scope.tokens) == {"store "}  # the store is another host


class _Program:
    """What a pickle of another user may have in it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_stored_login_is_used_and_its_pickle_never_loaded(
    scope: MockModelScope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelscope_hub import HubConfig

    scope.private = True
    config = HubConfig()
    config.save_token(TOKEN)
    cookies, mark = config.credentials_dir / "cookies", tmp_path / "ran"
    assert cookies.is_relative_to(tmp_path / "home")
    saved = config.load_cookies()
    cookies.write_bytes(pickle.dumps([_Program(mark), *saved]))
    done = k2("download", MODEL)
    assert (done.returncode, mark.exists()) == (0, False), done.stderr
    assert TOKEN not in done.stdout + done.stderr

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        cookies.write_bytes(pickle.dumps(saved, protocol))
        assert stored_token(cookies) == TOKEN
    for cookie in saved:
        cookie.expires = 1
    for data in (pickle.dumps(saved), b"", b"\x80\x05h\x09.", os.urandom(999), b"x" * 2**21):
        cookies.write_bytes(data)
        assert stored_token(cookies) is None


def test_what_a_server_may_get_wrong(scope: MockModelScope, tmp_path: Path) -> None:
    scope.fault = "damages"
    done = k2("download", MODEL)
    assert (done.returncode, "arrived 3 times with another hash" in done.stderr) == (1, True)
    scope.fault = "is a page"
    done = k2("download", MODEL)
    assert (done.returncode, "cannot be read" in done.stderr) == (1, True), done.stderr
    scope.fault = ""
    right = dict(scope.revisions["master"])
    for name in ("../../escape.safetensors", "/abs.safetensors"):
        files = right | {name: right[WEIGHTS]}
        del files[WEIGHTS]
        index = {"metadata": {}, "weight_map": {"t": name}}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
        scope.revisions |= {"master": files, "c" * 40: files}
        done = k2("download", MODEL, "--to", str(tmp_path / "here"))
        assert done.returncode == 1, done.stderr
        assert "its name" in done.stderr or "is not the name of" in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
    done = k2("download", "modelscope:absent/model")
    assert (done.returncode, "has no model 'absent/model'" in done.stderr) == (1, True)


def test_without_the_client_the_hint_installs_it(tmp_path: Path) -> None:
    (tmp_path / "modelscope_hub.py").write_text("raise ImportError")
    done = k2("download", MODEL, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert f"hint: {sys.executable} -m pip install 'modelscope-hub>=0.5'" in done.stderr


def test_references() -> None:
    found = parse_reference("modelscope:owner/name@v1")
    assert (found.kind, found.modelscope_repo, found.revision) == ("modelscope", "owner/name", "v1")
    assert (found.repo, found.path, found.entry) == (None, None, None)
    for text in ("modelscope:", "modelscope:name", "modelscope:a/b/c", "modelscope:../x"):
        with pytest.raises(UsageError, match="is not modelscope:owner/name"):
            parse_reference(text)
