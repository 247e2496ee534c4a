"""JSON and model files that are nested too deeply, endless, or no regular files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import msgspec
import pytest

from k2cli.agent.model import checkpoint_digest
from k2cli.cluster.description import Cluster, clusters_directory, load_cluster
from k2cli.cluster.hostfile import parse_hostfile
from k2cli.errors import ClusterError, K2Error, UsageError
from k2cli.files import decode_json, read_regular
from k2cli.launch.specification import read_specification
from k2cli.models.checkpoint import read_checkpoint, read_config
from k2cli.models.gguf.reader import GgufFile
from k2cli.models.text.tokenizer import Tokenizer
from k2cli.protocol import RunReady
from k2cli.runs.log import follow, last_lines
from k2cli.supervisor.start import _EventFile, _start_supervisor
from tests.test_cli import k2

DEEP = b"[" * 200_000
CONFIG = '{"model_type": "llama"}'


@pytest.mark.parametrize("text", [DEEP, b'{"a":' * 200_000, b'{"hosts": ' + DEEP])
def test_a_deep_hostfile(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(UsageError):
        parse_hostfile(text, "hosts.json")
    path = tmp_path / "hosts.json"
    path.write_bytes(text)
    done = k2("cluster", "import", str(path), "--name", "x")
    assert done.returncode == 2, done.stderr
    assert str(path) in done.stderr


def test_a_deep_field_that_is_not_known() -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_json(b'{"unknown": ' + DEEP, type=Cluster)


def test_a_deep_description_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2_CONFIG_DIR", str(tmp_path))
    clusters_directory().mkdir(parents=True)
    (clusters_directory() / "x.json").write_bytes(b'{"unknown": ' + DEEP)
    with pytest.raises(ClusterError, match=r"x\.json"):
        load_cluster("x")


@pytest.mark.parametrize("kind", ["fifo", "device", "endless"])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
        "tiktoken.model",
    ],
)
def test_a_file_that_is_not_regular(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    plant(tmp_path / name, kind)
    with pytest.raises(K2Error, match=f"{re.escape(name)}: it is not a regular file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "device", "endless", "nothing"])
@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"),
        *("tiktoken.model", "config.json", "generation_config.json"),
    ],
)
def test_a_text_file_that_is_not_regular(
    toy_k2: Path, tmp_path: Path, name: str, kind: str
) -> None:
    """The processes that load a tokenizer may run later, on another node, than a plan."""
    for path in toy_k2.iterdir():
        if path.suffix != ".safetensors" and path.name != "chat_template.jinja":
            (tmp_path / path.name).symlink_to(path)
    Tokenizer.load(tmp_path)
    plant(tmp_path / name, kind)
    with pytest.raises(K2Error, match=re.escape(name)):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "device", "endless"])
def test_a_gguf_that_is_not_regular(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    plant(path, kind)
    with pytest.raises(K2Error, match=r"model\.gguf: it is not a regular file"):
        GgufFile(path)


@pytest.mark.parametrize(
    "command",
    [
        ("plan-memory", "FOLDER", "--hardware", "m3-ultra-512"),
        ("quantize", "FOLDER", "--to", "FOLDER-4bit", "--bits", "4"),
        ("launch", "FOLDER"),
    ],
)
def test_a_command_names_the_file_that_is_not_regular(
    toy_k2: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in toy_k2.iterdir():
        (folder / path.name).symlink_to(path)
    plant(folder / "tokenizer_config.json", "fifo")
    done = k2(*(word.replace("FOLDER", str(folder)) for word in command))
    assert done.returncode == 1, done.stderr
    assert f"{folder}/tokenizer_config.json" in done.stderr


@pytest.mark.parametrize("name", ["run.log", "events.jsonl", "supervisor.log", "launch.json"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_file_of_a_run_that_is_not_regular(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    plant(path, kind)
    match name:
        case "run.log":
            with pytest.raises(K2Error, match=r"run\.log"):
                list(last_lines(path, None))
            with pytest.raises(K2Error, match=r"run\.log"):
                list(follow(path, None, lambda: True))
        case "events.jsonl":
            assert _EventFile(path).new() == []
        case "supervisor.log":  # the supervisor, which finds no run there, does without
            assert _start_supervisor(tmp_path).wait(60) != 0
        case _:
            with pytest.raises(ClusterError, match="no run that can be started"):
                read_specification(tmp_path)


def test_an_event_file_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    good = msgspec.json.encode(RunReady("http://127.0.0.1:1"))
    path.write_bytes(b"\xff\n" + DEEP + b"\n" + good + b'\n{"type": 7}\n')
    assert _EventFile(path).new() == [RunReady("http://127.0.0.1:1")]


def test_a_log_of_one_endless_line(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.write_bytes(b"a" * 5_000_000)
    assert max(map(len, last_lines(path, None))) <= 2**20
    assert sum(map(len, last_lines(path, 2))) <= 2**21


def plant(path: Path, kind: str) -> None:
    """Put something in the place of a file that reading would wait for, or never end."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        targets = {"device": "/dev/null", "endless": "/dev/zero", "nothing": "/nothing/there"}
        path.symlink_to(targets[kind])


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1234")
    assert read_regular(path, 4) == b"1234"
    with pytest.raises(OSError, match="larger than 3"):
        read_regular(path, 3)


@pytest.mark.parametrize("end", [10**30, -(10**30), -1, 2**31, [1, 10**30], "2", True, 1.5, {}])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_token_that_is_no_token(tmp_path: Path, name: str, end: object) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    fields = {"model_type": "llama"} | {"eos_token_id": end}
    (tmp_path / name).write_text(json.dumps(fields))
    with pytest.raises(K2Error, match=f"{re.escape(name)}: eos_token_id"):
        read_config(tmp_path)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "-1", '"0.6"', "true", "[]"])
def test_a_default_for_sampling_that_is_impossible(tmp_path: Path, value: str) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    (tmp_path / "generation_config.json").write_text('{"temperature": ' + value + "}")
    with pytest.raises(K2Error, match=r"generation_config\.json.*temperature"):
        read_config(tmp_path)


def test_defaults_for_sampling_that_are_possible(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba2", "limit": [0.0, Infinity]}')
    text = '{"temperature": 0, "top_k": -1, "top_p": null, "eos_token_id": null}'
    (tmp_path / "generation_config.json").write_text(text)
    assert read_config(tmp_path)["limit"][1] > 1e300


@pytest.mark.parametrize("text", ['{"model_type": "\\ud800"}', '{"model_type": NaN}'])
def test_a_config_that_no_message_can_hold(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(K2Error, match=r"config\.json.*(is not JSON|not nan)"):
        read_config(tmp_path)


def test_a_config_with_a_large_number_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "odd": 10**300}))
    assert len(checkpoint_digest(tmp_path)) == 64
