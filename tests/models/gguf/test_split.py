"""GGUF models that are split into several files (vllm-metal#720, lmstudio-bug-tracker#1252)."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2cli.errors import K2Error
from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.gguf.convert import convert_gguf
from k2cli.models.inspection import inspect_model
from k2cli.models.reference import conversion_source, converted_folder, parse_reference
from tests.models.gguf_files import original_weights, write_llama


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Three parts, named as llama.cpp's own tools name them."""
    write_llama(tmp_path / "m.gguf", original_weights(), tensors_per_file=8)
    found = sorted(tmp_path.glob("m-*.gguf"))
    assert found[0].name == f"m-00001-of-0000{len(found)}.gguf"
    assert len(found) == 3
    return found


@pytest.mark.parametrize("number", [0, 1, 2])
def test_each_part_stands_for_the_whole_model(
    parts: list[Path], number: int, tmp_path: Path
) -> None:
    whole = write_llama(tmp_path / "whole.gguf", original_weights())
    expected = inspect_model(str(whole))
    found = inspect_model(str(parts[number]))
    assert found.config == expected.config
    assert found.tensors.keys() == expected.tensors.keys()
    assert found.stored_bytes == expected.stored_bytes


def test_all_parts_convert_to_one_folder(parts: list[Path], tmp_path: Path) -> None:
    references = [parse_reference(str(part)) for part in parts]
    assert len({converted_folder(each) for each in references}) == 1
    source = conversion_source(references[1])
    assert source is not None
    assert source["bytes"] == sum(part.stat().st_size for part in parts)
    whole = write_llama(tmp_path / "whole.gguf", original_weights())
    split, single = tmp_path / "split", tmp_path / "single"
    assert references[2].path is not None
    convert_gguf(references[2].path, split)
    convert_gguf(whole, single)
    assert (split / "model.safetensors").read_bytes() == (single / "model.safetensors").read_bytes()
    assert read_checkpoint(split).config == read_checkpoint(single).config


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    for part in (parts[0], parts[2]):
        with pytest.raises(K2Error, match=r"m-00002-of-00003\.gguf is missing: the model is split"):
            inspect_model(str(part))


def test_a_part_of_another_model_is_refused(parts: list[Path], tmp_path: Path) -> None:
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(K2Error, match="says that it is part 2"):
        inspect_model(str(parts[0]))


def test_a_renamed_part_says_what_it_is(parts: list[Path], tmp_path: Path) -> None:
    renamed = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(K2Error, match="is one of 3 parts"):
        inspect_model(str(renamed))
