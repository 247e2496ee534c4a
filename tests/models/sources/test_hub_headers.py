"""Plans of repositories on the Hub, from their headers: real client, real server, kilobytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2cli.models.checkpoint import read_checkpoint
from tests.models.mock_hub import counting_hub
from tests.quantization import originals
from tests.support.commands import k2

COMMAND = ["plan-memory", "mock/model", "--hardware", "2x m3-ultra-512", "--json"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a Kimi in two shards with an index, like those on the Hub."""
    folder = originals.kimi(tmp_path_factory.mktemp("models") / "kimi")
    files = {tensor.name: tensor.file.name for tensor in read_checkpoint(folder).tensors.values()}
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def planned(folder: Path, monkeypatch: pytest.MonkeyPatch, **faults: str) -> tuple[Any, int]:
    """Plan ``folder`` as ``mock/model``; also return the bytes that were sent for it."""
    named = {name.replace("__", "-") + ".safetensors": fault for name, fault in faults.items()}
    with counting_hub(folder, named) as (address, _, sent):
        monkeypatch.setenv("HF_ENDPOINT", address)
        done = k2(*COMMAND)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), sum(sent)


def same_sizes(remote: Any, local: Any) -> None:
    assert remote["model"]["stored_bytes"] == local["model"]["stored_bytes"]
    assert remote["nodes"] == local["nodes"]
    assert remote["marks"]["stored_bytes"] == "exact"


def test_a_repository_plans_as_its_folder_does_from_kilobytes(
    toy_k2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = json.loads(k2("plan-memory", str(toy_k2), *COMMAND[2:]).stdout)
    with counting_hub(toy_k2) as (address, requested, sent):
        monkeypatch.setenv("HF_ENDPOINT", address)
        same_sizes(json.loads(k2(*COMMAND).stdout), local)
        assert sum(sent) < 60_000 < local["model"]["stored_bytes"]
        # A second plan asks only if the commit is still the same.
        requested.clear()
        sent.clear()
        same_sizes(json.loads(k2(*COMMAND).stdout), local)
        assert not any("safetensors" in request for request in requested)
        assert sum(sent) < 10_000
    # First the Hub cannot be reached, then the user sets the offline mode.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    same_sizes(json.loads(k2(*COMMAND).stdout), local)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    same_sizes(json.loads(k2(*COMMAND).stdout), local)
    done = k2("plan-memory", "mock/other", "--hardware", "m3-ultra-512")
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE is set" in done.stderr


def test_shards_are_read_through_redirects_and_passing_failures(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = json.loads(k2("plan-memory", str(sharded), *COMMAND[2:]).stdout)
    remote, sent = planned(
        sharded, monkeypatch,
        model__00001__of__00002="redirects", model__00002__of__00002="fails 1 time",
    )  # fmt: skip
    same_sizes(remote, local)
    assert sent < 100_000 < local["model"]["stored_bytes"]


def test_a_server_that_ignores_ranges_is_not_listened_to_for_long(
    toy_k2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = toy_k2 / "model.safetensors"
    local = json.loads(k2("plan-memory", str(toy_k2), *COMMAND[2:]).stdout)
    remote, _ = planned(toy_k2, monkeypatch, model="ignores ranges")
    same_sizes(remote, local)
    assert big.stat().st_size > 1_000_000


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return apply


def _with_header(data: bytes, header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    (old,) = struct.unpack("<Q", data[:8])
    return struct.pack("<Q", len(text)) + text + data[8 + old :]


def _lying(data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"] = [2**40]
    return _with_header(data, header)


def _one_of_two(folder: Path) -> None:
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    (folder / "model.safetensors").rename(folder / first)
    index = {"weight_map": {"a": first, "b": second}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (damaged(lambda data: data[:-1000]), "is cut short"),
    "empty header": (damaged(lambda data: b"\0" * 8 + data), "is not JSON"),
    "enormous header": (damaged(lambda data: struct.pack("<Q", 2**60) + data[8:]), "2**60"),
    "lying": (damaged(_lying), "1099511627776"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "a shard that is not there": (_one_of_two, "names model-00002-of-00002.safetensors"),
    "an index that points outside": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../../secret.safetensors"}}'
        ) and None,
        "is not the name of a safetensors file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_repository_is_named_with_what_is_wrong(
    tmp_path: Path, toy_k2: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import shutil

    folder = shutil.copytree(toy_k2, tmp_path / "damaged")
    damage, words = DAMAGES[name]
    damage(folder)
    with counting_hub(folder) as (address, _, sent):
        monkeypatch.setenv("HF_ENDPOINT", address)
        done = k2(*COMMAND)
        assert sum(sent) < 100_000
    assert done.returncode == 1
    assert words.replace("2**60", str(2**60)) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("fault", "exit_code", "words"),
    [("refuses", 4, "refuses access"), ("breaks off", 1, "mock/model")],
)
def test_a_refused_or_broken_answer_is_an_error(
    toy_k2: Path, monkeypatch: pytest.MonkeyPatch, fault: str, exit_code: int, words: str
) -> None:
    with counting_hub(toy_k2, {"model.safetensors": fault}) as (address, _, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        done = k2(*COMMAND)
    assert done.returncode == exit_code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("model", "exit_code"), [("gated/model", 4), ("absent/model", 1), ("mock/model@nowhere", 1)]
)
def test_what_the_hub_does_not_give_has_its_exit_code(
    toy_k2: Path, monkeypatch: pytest.MonkeyPatch, model: str, exit_code: int
) -> None:
    with counting_hub(toy_k2) as (address, _, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        done = k2("plan-memory", model, "--hardware", "m3-ultra-512")
    assert done.returncode == exit_code, done.stderr
    assert "hint:" in done.stderr or model.endswith("nowhere")
