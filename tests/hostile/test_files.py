"""JSON and model files that are nested too deeply, endless, or no regular files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest

from k2cli.cluster.description import Cluster, clusters_directory, load_cluster
from k2cli.cluster.hostfile import parse_hostfile
from k2cli.errors import ClusterError, K2Error, UsageError
from k2cli.files import decode_json, read_regular
from k2cli.models.checkpoint import read_checkpoint, read_config
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
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_file_that_is_not_regular(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null" if kind == "device" else "/dev/zero")
    with pytest.raises(K2Error, match=name):
        read_checkpoint(tmp_path)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1234")
    assert read_regular(path, 4) == b"1234"
    with pytest.raises(OSError, match="larger than 3"):
        read_regular(path, 3)


@pytest.mark.parametrize("end", [10**30, -(10**30), 2**31, [1, 10**30]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_token_that_is_no_token(tmp_path: Path, name: str, end: object) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    fields = {"model_type": "llama"} | {"eos_token_id": end}
    (tmp_path / name).write_text(json.dumps(fields))
    with pytest.raises(K2Error, match="eos_token_id"):
        read_config(tmp_path)
