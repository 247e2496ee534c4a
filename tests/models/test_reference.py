"""Model references that a user may type, and their folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from k2cli.errors import K2Error, UsageError
from k2cli.models.catalog import HubSource, WheelSource, catalog
from k2cli.models.checkpoint import read_config
from k2cli.models.inspection import inspect_model
from k2cli.models.reference import local_checkpoint, parse_reference
from k2cli.settings import models_directory


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_kinds_of_reference(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.gguf").touch()
    assert parse_reference("demo").kind == "alias"
    assert parse_reference("K2-Thinking").repo == "moonshotai/Kimi-K2-Thinking"
    assert parse_reference("./folder").path == Path("folder")
    assert parse_reference("model.gguf").kind == "local"
    reference = parse_reference("owner/some-model_1.5@v1.0")
    assert (reference.kind, reference.repo) == ("hub", "owner/some-model_1.5")
    assert reference.revision == "v1.0"


def test_an_alias_wins_over_a_folder_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert parse_reference("demo").kind == "alias"
    assert parse_reference("./demo").kind == "local"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("k2-thinkng", "did you mean 'k2-thinking'"),
        ("Qwen3", "did you mean 'qwen3-235b', 'qwen3-235b-4bit', "),
        ("kimi-k3", "did you mean 'k3'"),
        ("deepseek-v3.1-8bit", "'deepseek-v3.1-4bit'"),
        ("nothing", "names that k2 knows start with demo, k2, k3, deepseek, "),
        ("", "names that k2 knows"),
        ("a/b/c", "names that k2 knows"),
        ("-x/y", "names that k2 knows"),
        ("./absent", "check the path"),
        ("absent.gguf", "check the path"),
        ("x" * 5000, "names that k2 knows"),
        ("nul\0byte", "names that k2 knows"),
    ],
)
def test_what_is_no_reference_is_a_usage_error(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    assert reason in f"{caught.value.message} {caught.value.hint}"


def test_a_file_of_another_kind_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_text("{}")
    with pytest.raises(UsageError, match=r"not a \.gguf file"):
        parse_reference("./weights.bin")


def test_a_bare_config_is_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert parse_reference("./config.json").path == Path(".")
    assert inspect_model("config.json").config == {"model_type": "llama"}


def test_a_model_that_is_not_here_tells_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(K2Error) as caught:
        local_checkpoint("demo")
    assert caught.value.hint == "k2 download demo"
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(K2Error, match=r"no config\.json"):
        local_checkpoint(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(K2Error, match=r"no \.safetensors files"):
        local_checkpoint(str(folder))
    assert inspect_model(str(folder)).folder == folder


def test_a_folder_that_k2_did_not_convert_is_not_the_demo() -> None:
    folder = models_directory() / "demo"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(K2Error, match="not on this machine"):
        local_checkpoint("demo")


def test_every_entry_of_the_catalog_is_usable() -> None:
    for alias, entry in catalog().items():
        assert parse_reference(alias).entry == entry
        assert alias == alias.lower()
        assert isinstance(entry.source, HubSource | WheelSource)
        if isinstance(entry.source, HubSource):
            assert parse_reference(entry.source.repo).kind == "hub"
        if entry.config_folder is not None:
            assert isinstance(read_config(entry.config_folder)["model_type"], str)


def test_a_name_without_a_shape_says_that_it_asks_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(K2Error) as caught:
        inspect_model("glm-5.2")
    assert "zai-org/GLM-5.2" in caught.value.message
    assert "k2 carries no shape of 'glm-5.2'" in str(caught.value.hint)


def test_the_shape_of_k2_needs_no_download() -> None:
    assert inspect_model("k2-thinking").config["model_type"] == "kimi_k2"
