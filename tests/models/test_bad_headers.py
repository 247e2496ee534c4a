"""Truncated or wrong headers, drawn by hypothesis: a clear error, or a correct result.

The same bytes go to the reader of folders and, over a mock Hub, to the reader of ranges.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k2cli.errors import K2Error
from k2cli.models.gguf.convert import gguf_checkpoint
from k2cli.models.safetensors_header import DTYPE_BITS, StoredTensor, read_safetensors_header
from k2cli.models.sources.hub_headers import read_headers
from tests.models.gguf_files import original_weights, write_llama
from tests.models.mock_hub import hub_of

FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
MOST_MESSAGE = 1000

sizes = st.one_of(
    st.integers(0, 12), st.integers(-3, -1), st.sampled_from([2**31, 2**48, 2**63, 2**64, 10**40])
)
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), sizes, st.floats(), st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Draw a correct header with up to three of its numbers changed, and the bytes of data."""
    header: dict[str, Any] = {}
    end = 0
    for index in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        nbytes = -(-prod(shape) * DTYPE_BITS[dtype] // 8)
        name = f"t{index}" * draw(st.sampled_from([1, 1, 1, 1000]))
        header[name] = {
            "dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes],
        }  # fmt: skip
        end += nbytes
    for _ in range(draw(st.integers(0, 3)) if header else 0):
        tensor = header[draw(st.sampled_from(sorted(header)))]
        if not isinstance(tensor, dict):
            continue
        match draw(st.sampled_from(["offset", "shape", "field", "dtype", "whole"])):
            case "offset":
                tensor["data_offsets"] = [draw(sizes), draw(sizes)]
            case "shape":
                tensor["shape"] = draw(st.lists(sizes, max_size=3))
            case "dtype":
                tensor["dtype"] = draw(st.sampled_from(["F4", "F64", "F99", "", None]))
            case "field":
                tensor[draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(junk)
            case "whole":
                header[draw(st.sampled_from(sorted(header)))] = draw(junk)
    return header, max(0, end + draw(st.sampled_from([0, 0, 0, -1, 1, 100])))


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Draw such a header in a file, perhaps with a wrong length, perhaps cut short."""
    header, data = draw(headers())
    text = json.dumps(header).encode()
    length = draw(st.one_of(st.just(len(text)), st.just(len(text)), st.integers(0, 2**64 - 1)))
    whole = struct.pack("<Q", length) + text + bytes(data)
    return whole[: draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))]


def check_truth(tensors: dict[str, StoredTensor], size: int) -> None:
    """Check that the accepted tensors describe every byte of the file after the header, once."""
    end = None
    for tensor in tensors.values():
        assert prod(tensor.shape) * DTYPE_BITS[tensor.dtype] == tensor.nbytes * 8
        assert end in (None, tensor.offset)
        end = tensor.offset + tensor.nbytes
    assert end in (None, size)


def check_error(error: K2Error, name: str) -> None:
    assert error.exit_code in (1, 2)
    assert name in error.message
    assert len(error.message) < MOST_MESSAGE


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=FIXTURES)
@given(content=files())
def test_a_header_is_true_or_an_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    try:
        tensors = read_safetensors_header(file)
    except K2Error as error:
        check_error(error, "model.safetensors")
    else:
        check_truth(tensors, len(content))


@pytest.fixture(scope="module")
def served() -> Iterator[dict[str, bytes]]:
    """Files of the repository ``mock/model``; a test adds the files to serve."""
    from huggingface_hub import constants, hf_api

    files: dict[str, bytes] = {}
    with pytest.MonkeyPatch.context() as patch, hub_of(files) as (address, _, _):
        # The value that the library derived from HF_ENDPOINT when it was imported.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(hf_api.api, "endpoint", address)
        yield files


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=FIXTURES)
@given(content=files())
def test_ranges_of_a_repository_say_what_the_file_says(
    tmp_path: Path, served: dict[str, bytes], content: bytes
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    served["model.safetensors"] = content
    local = _outcome(lambda: read_safetensors_header(file), str(file))
    remote = _outcome(lambda: read_headers("mock/model", "main")[0], "mock/model/model.safetensors")
    if content:
        assert remote == local
    else:
        assert isinstance(remote, str)  # there is no range of an empty file


def _outcome(read: Callable[[], dict[str, StoredTensor]], name: str) -> object:
    """Return the tensors that were read, or the error's message without the file's name."""
    try:
        tensors = read()
    except K2Error as error:
        check_error(error, "mock/model" if name.startswith("mock") else name)
        return error.message.replace(name, "FILE")
    return [(tensor.name, tensor.dtype, tensor.shape, tensor.offset) for tensor in tensors.values()]


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=FIXTURES)
@given(data=st.data())
def test_a_gguf_cut_or_changed_anywhere_is_planned_or_an_error(
    tmp_path: Path, data: st.DataObject
) -> None:
    whole = _gguf(tmp_path)
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        damaged[data.draw(st.integers(0, min(len(damaged), 2500) - 1))] = data.draw(
            st.sampled_from([0, 1, 8, 0x7F, 0x80, 0xFF])
        )
    file = tmp_path / "model.gguf"
    file.write_bytes(damaged)
    try:
        checkpoint = gguf_checkpoint(file)
    except K2Error as error:
        check_error(error, "model.gguf")
    else:
        assert checkpoint.tensors
        assert len(damaged) == len(whole)  # a truncated file is never accepted


def _gguf(folder: Path) -> bytes:
    file = folder / "whole.gguf"
    if not file.exists():
        write_llama(file, original_weights(), Type.Q8_0)
    return file.read_bytes()
