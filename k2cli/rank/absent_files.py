"""Weight files that this machine does not have, opened by their headers: they must not be read.

A rank needs the shapes of all tensors to build and cut the model, but the data of its own alone.
mlx opens a file of the right size that holds only the header. The file is cut off after that, so
that mlx raises an error if it is asked for data. Zeros in the place of weights would give wrong
answers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from k2cli.errors import K2Error
from k2cli.files import read_regular
from k2cli.models.part import absent_files, header_path
from k2cli.models.safetensors_header import MAX_HEADER_BYTES, StoredTensor

_HINT = "bring it the whole model: k2 models push MODEL NODE"


def open_absent(folder: Path, name: str) -> dict[str, mx.array]:
    """Open the tensors of an absent file lazily.

    Raises:
        K2Error: if its header cannot be read.
    """
    path = header_path(folder, name)
    try:
        header = read_regular(path, MAX_HEADER_BYTES + 8)
        with tempfile.NamedTemporaryFile(prefix="k2-header-", suffix=".safetensors") as file:
            file.write(header)
            file.flush()
            os.ftruncate(file.fileno(), absent_files(folder)[name])
            opened = mx.load(file.name)
            os.ftruncate(file.fileno(), len(header))
    except OSError as error:
        raise K2Error(f"cannot read {path}: {error.strerror}") from error
    assert isinstance(opened, dict)
    return opened


def refuse_absent(tensors: Iterable[StoredTensor], absent: frozenset[str]) -> None:
    """Refuse tensors of files that this machine does not have.

    Raises:
        K2Error: naming the first.
    """
    for tensor in tensors:
        if tensor.file.name in absent:
            raise K2Error(
                f"this rank reads '{tensor.name}' of {tensor.file}, which was not brought to this "
                "machine",
                _HINT,
            )


@contextmanager
def refused_if_absent(folder: Path, absent: frozenset[str]) -> Iterator[None]:
    """Translate mlx's error if it was asked for the data of an absent file.

    Raises:
        K2Error: naming the folder.
    """
    try:
        yield
    except RuntimeError as error:
        if not absent:
            raise
        raise K2Error(
            f"this rank reads weights that were not brought to {folder} on this machine: {error}",
            _HINT,
        ) from error
