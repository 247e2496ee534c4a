"""Weight files that this machine does not have, opened by their headers: they must not be read.

A rank needs the shapes of all tensors to build and cut the model, but the data of its own alone.
mlx opens an absent file as it opens others. If it then asks for data, the rank ends with an error:
zeros in the place of weights would give wrong answers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, cast

import mlx.core as mx

from k2cli.errors import K2Error
from k2cli.files import read_regular
from k2cli.models.checkpoint import MAX_HEADER_BYTES
from k2cli.models.part import absent_files, header_path


class AbsentFiles:
    """The absent files that a rank has opened, and the first one whose data was asked for."""

    def __init__(self) -> None:
        self._read: list[Path] = []

    def open(self, folder: Path, name: str) -> dict[str, mx.array]:
        """Open the tensors of an absent file lazily.

        Raises:
            K2Error: if its header cannot be read.
        """
        path = header_path(folder, name)
        try:
            header = read_regular(path, MAX_HEADER_BYTES + 8)
        except OSError as error:
            raise K2Error(f"cannot read {path}: {error.strerror}") from error
        file = _HeaderFile(header, absent_files(folder)[name], folder / name, self._read)
        opened = mx.load(cast(BinaryIO, file), format="safetensors")
        assert isinstance(opened, dict)
        return opened

    def check(self) -> None:
        """Refuse to go on if the data of an absent file was asked for.

        Raises:
            K2Error: naming the file.
        """
        if self._read:
            raise K2Error(
                f"this rank reads {self._read[0]}, which was not brought to this machine",
                "bring it the whole model: k2 models push MODEL NODE",
            )


class _HeaderFile:
    """Imitation of a safetensors file that has a header and no data, for mlx to read.

    mlx calls ``readinto`` on a thread of its own, on which an exception would end the process.
    """

    closed = False

    def __init__(self, header: bytes, size: int, path: Path, read: list[Path]) -> None:
        self._header = header
        self._size = size
        self._path = path
        self._read = read
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}
        self._position = origins[whence] + offset
        return self._position

    def read(self, count: int = -1) -> bytes:
        """Return part of the header."""
        end = None if count < 0 else self._position + count
        piece = self._header[self._position : end]
        self._position += len(piece)
        return piece

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer from the header; a buffer for data is left as it is, and noted."""
        target = memoryview(buffer).cast("B")
        piece = self._header[self._position : self._position + target.nbytes]
        target[: len(piece)] = piece
        if len(piece) < target.nbytes:
            self._read.append(self._path)
        self._position += target.nbytes
        return target.nbytes
