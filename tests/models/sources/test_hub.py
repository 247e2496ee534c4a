"""Downloads with the real Hub client from a Hub on this machine.

Each runs in a process of its own: the client reads its address once, when it is imported.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models.mock_hub import hub_of

_SCRIPT = """
import json, sys
from pathlib import Path
from k2cli.errors import K2Error
from k2cli.models.inspection import inspect_model
from k2cli.models.sources.download import fetch
from k2cli.models.sources.parallel_download import DownloadProgress
progress = []
def note(event):
    if isinstance(event, DownloadProgress):
        progress.append([event.done_bytes, event.total_bytes])
options = json.loads(sys.argv[2])
if "destination" in options:
    options["destination"] = Path(options["destination"])
try:
    if options.pop("only_config", False):
        print(json.dumps({"path": str(inspect_model(sys.argv[1]).folder)}))
        sys.exit()
    got = fetch(sys.argv[1], on_event=note, **options)
except K2Error as error:
    print(json.dumps({"error": type(error).__name__, "message": error.message,
                      "hint": error.hint, "exit_code": error.exit_code}))
else:
    print(json.dumps({"path": str(got.path), "was_there": got.was_there, "progress": progress,
                      "stored_bytes": got.stored_bytes, "files": [f.name for f in got.files]}))
"""


@pytest.fixture
def served(toy_k2: Path, tmp_path: Path) -> Path:
    """Folder of the repository: a toy, and files that must not be fetched."""
    folder = shutil.copytree(toy_k2, tmp_path / "served")
    (folder / "tokenization_kimi.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


@pytest.fixture
def files(served: Path) -> dict[str, bytes]:
    """Files of the repository; changes take effect at once."""
    return {path.name: path.read_bytes() for path in sorted(served.iterdir())}


@pytest.fixture
def hub(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Serve a Hub and set the environment for it; return the list of requests."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with hub_of(files) as (address, requested, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield requested


def _fetch(model: str, **options: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, model, json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "the client's own progress bars or warnings are shown"
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_only_data_is_fetched_and_only_once(hub: list[str], toy_k2: Path) -> None:
    planned = _fetch("mock/model", dry_run=True)
    assert not planned["was_there"]
    assert planned["stored_bytes"] == (toy_k2 / "model.safetensors").stat().st_size
    assert not any("/resolve/" in request and "GET" in request for request in hub)

    got = _fetch("mock/model@main")
    folder = Path(got["path"])
    assert not got["was_there"]
    assert got["progress"][-1][0] == got["progress"][-1][1] > planned["stored_bytes"]
    names = {path.name for path in toy_k2.iterdir()}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert (folder / name).read_bytes() == (toy_k2 / name).read_bytes()

    hub.clear()
    assert _fetch("mock/model")["was_there"]
    assert not any("GET /mock" in request for request in hub)


def test_a_folder_of_the_users_choice(hub: list[str], toy_k2: Path, tmp_path: Path) -> None:
    got = _fetch("mock/model", destination=str(tmp_path / "here"), revision="main")
    assert got["path"] == str(tmp_path / "here")
    assert set(got["files"]) == {path.name for path in toy_k2.iterdir()}


def test_the_config_alone_is_enough_for_a_plan(hub: list[str]) -> None:
    folder = Path(_fetch("mock/model", only_config=True)["path"])
    assert json.loads((folder / "config.json").read_text())["model_type"] == "kimi_k2"
    assert not (folder / "model.safetensors").exists()
    # A folder with the config alone is no download of the model.
    assert not _fetch("mock/model")["was_there"]


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("gated/model", "NotAuthorisedError", "is gated"),
        ("secret/model", "NotAuthorisedError", "refuses access"),
        ("absent/model", "K2Error", "no repository 'absent/model'"),
        ("broken/model", "K2Error", "HTTP 500"),
        ("mock/model@nowhere", "K2Error", "no revision 'nowhere'"),
    ],
)
def test_refusals_say_what_to_do(hub: list[str], model: str, error: str, words: str) -> None:
    for options in ({}, {"dry_run": True}, {"only_config": True}):
        got = _fetch(model, **options)
        assert (got["error"], words in got["message"]) == (error, True), got
    assert got["exit_code"] == (4 if error == "NotAuthorisedError" else 1)


def test_without_the_hub_what_is_here_is_used(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _fetch("mock/model")["path"]
    for name, value in (("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
        got = _fetch("mock/model")
        assert (got["path"], got["was_there"]) == (path, True)
        missing = _fetch("mock/other")
        assert missing["error"] == "K2Error"
        assert "mock/other" in missing["message"]


def test_only_what_the_index_names_is_fetched(
    hub: list[str], files: dict[str, bytes], toy_k2: Path
) -> None:
    """``original/`` and Mistral's own layout beside the shards (exo#1800, vllm#30537)."""
    for name in ("original/model.safetensors", "consolidated.safetensors", "._model.safetensors"):
        files[name] = files["model.safetensors"]
    files |= {"original/params.json": b"{}", "README.md": b"# model"}
    for options in ({"dry_run": True}, {}):
        got = _fetch("mock/model", **options)
        assert set(got["files"]) == {path.name for path in toy_k2.iterdir()}
    assert not any("original" in request or "consolidated" in request for request in hub)


def test_a_stale_index_does_not_keep_a_model_from_being_fetched(
    hub: list[str], files: dict[str, bytes]
) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    got = _fetch("mock/model")
    assert "model.safetensors" in got["files"]


@pytest.mark.parametrize("damage", ["cut short", "empty", "overwritten", "config cut short"])
def test_a_damaged_file_in_the_cache_is_fetched_again(
    hub: list[str], toy_k2: Path, damage: str
) -> None:
    """A full disk or a crash leaves such files (huggingface_hub#4223, #1396)."""
    folder = Path(_fetch("mock/model")["path"])
    name = "config.json" if damage.startswith("config") else "model.safetensors"
    file = (folder / name).resolve()
    data = file.read_bytes()
    file.write_bytes(
        {"empty": b"", "overwritten": b"\xff" * len(data)}.get(damage, data[: len(data) // 2])
    )
    hub.clear()
    got = _fetch("mock/model")
    assert not got.get("was_there", got), got
    assert (folder / name).read_bytes() == (toy_k2 / name).read_bytes()
    fetched = [request for request in hub if request.startswith("GET /mock")]
    assert {request.rpartition("/")[2] for request in fetched} == {name}


@pytest.mark.parametrize(
    ("names", "words", "hint"),
    [
        (["x-Q4_K_M.gguf", "x-Q8_0.gguf"], "GGUF files: x-Q4_K_M.gguf, x-Q8_0.gguf",
         "hf download mock/model --include x-Q4_K_M.gguf --local-dir ."),
        (["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"], "x-00002-of-00002.gguf",
         "hf download mock/model --include 'x-*-of-00002.gguf' --local-dir ."),
        ([], "only pickled weights: pytorch_model.bin", "mlx-community"),
    ],
)  # fmt: skip
def test_a_repository_without_safetensors_says_what_it_has(
    hub: list[str], files: dict[str, bytes], names: list[str], words: str, hint: str
) -> None:
    """unsloth's repositories of GGUF files have a config.json beside them."""
    del files["model.safetensors"]
    files.update(dict.fromkeys(names, b"GGUF"))
    for options in ({}, {"dry_run": True}):
        got = _fetch("mock/model", **options)
        assert (got.get("exit_code"), words in got["message"]) == (1, True), got
        assert hint in got["hint"]
    assert not any("GET /mock/model/resolve" in request for request in hub)


def test_the_named_command_fetches_the_gguf_file(
    hub: list[str], files: dict[str, bytes], tmp_path: Path
) -> None:
    del files["model.safetensors"]
    files["x-Q4_K_M.gguf"] = b"GGUF"
    command = shlex.split(_fetch("mock/model", dry_run=True)["hint"])
    command[0] = str(Path(sys.executable).with_name("hf"))
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert (tmp_path / "x-Q4_K_M.gguf").read_bytes() == b"GGUF"
