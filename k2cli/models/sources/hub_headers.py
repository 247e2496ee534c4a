"""Config and tensor headers of a repository on the Hub, read without downloading weights.

Range requests read what ``read_checkpoint`` reads of a folder, with the same checks. That costs
kilobytes for an MLX conversion; an original with a tensor per expert has headers of some
megabytes. A commit never changes, so the result is cached without expiry.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from k2cli.errors import K2Error
from k2cli.files import decode_json, name_with, read_regular, write_atomically
from k2cli.models.checkpoint import Checkpoint, read_config, read_tensors, weight_map_of
from k2cli.models.json_files import json_object
from k2cli.models.layout import INDEX_NAME, no_safetensors_error
from k2cli.models.safetensors_header import StoredTensor, header_length, tensors_of_header
from k2cli.models.sources import hub
from k2cli.settings import data_directory

FIRST_READ_BYTES = 32 * 1024
"""Size of the first request to each shard; a longer header takes a second request."""

_PARALLEL_REQUESTS = 8
_MAX_INDEX_BYTES = 50_000_000
_MAX_SHARDS = 4096
_MAX_KEPT_BYTES = 2**30
_LAYOUT = 1


def remote_checkpoint(repo: str, revision: str | None = None) -> Checkpoint:
    """Read config and tensors of a repository; ``file`` of a tensor is a name in the repository.

    A repository without safetensors gives no tensors and 0 bytes.

    Raises:
        NotAuthorisedError: if the repository is gated or private.
        K2Error: if it does not exist, the Hub cannot be reached, or a header is malformed.
    """
    folder = hub.download_config(repo, revision)
    config, commit = read_config(folder), folder.name
    kept = _kept_file(repo, commit)
    warnings: tuple[str, ...] = ()
    tensors = _read_kept(kept)
    if tensors is None:
        tensors, warnings = read_headers(repo, commit)
        if not warnings:
            _keep(kept, tensors)
    return Checkpoint(folder, config, tensors, sum(t.nbytes for t in tensors.values()), warnings)


def read_headers(repo: str, commit: str) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Read all tensors of a repository at a commit, and warnings, without the cache.

    Raises:
        K2Error: if the Hub cannot be reached, or a header is malformed.
    """
    names = hub.repository_files(repo, commit)
    with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:

        def read(files: Sequence[str]) -> Iterator[dict[str, StoredTensor]]:
            if len(files) > _MAX_SHARDS:
                raise K2Error(
                    f"{repo} has {len(files)} safetensors files, k2 reads at most {_MAX_SHARDS}"
                )
            return pool.map(lambda name: _read_header(repo, commit, name), files)

        found = read_tensors(Path(repo), names, read_weight_map(repo, commit, names), read)
    if not found[0] and any(name.endswith(".gguf") for name in names):
        raise no_safetensors_error(names, repo, repo)
    return found


def read_weight_map(
    repo: str, revision: str | None, names: Collection[str]
) -> dict[str, str] | None:
    """Read the index of a repository with these files; None if it has none.

    Raises:
        K2Error: if the Hub cannot be reached, or the index is malformed.
    """
    if INDEX_NAME not in names:
        return None
    return weight_map_of(Path(repo) / INDEX_NAME, _read_index(repo, revision))


def _read_index(repo: str, commit: str | None) -> dict[str, Any]:
    data, size = hub.read_range(repo, commit, INDEX_NAME, 0, _MAX_INDEX_BYTES)
    path = Path(repo) / INDEX_NAME
    if size > _MAX_INDEX_BYTES:
        raise K2Error(f"{path} is larger than {_MAX_INDEX_BYTES} bytes")
    return json_object(data, path)


def _read_header(repo: str, commit: str, name: str) -> dict[str, StoredTensor]:
    file = Path(repo) / name
    data, size = hub.read_range(repo, commit, name, 0, FIRST_READ_BYTES)
    length = header_length(file, data[:8], size)
    text = data[8 : 8 + length]
    if len(text) < length:
        more, _ = hub.read_range(repo, commit, name, len(data), length - len(text))
        text += more
    return tensors_of_header(file, text, size)


# --- cache --------------------------------------------------------------------------------------


class _KeptHeaders(msgspec.Struct, frozen=True):
    """The cached result: for each tensor its dtype, shape, bytes, file and offset."""

    layout: int
    tensors: dict[str, tuple[str, tuple[int, ...], int, str, int]]


def _kept_file(repo: str, commit: str) -> Path:
    name = f"{repo.replace('/', '--')}@{commit}"
    return data_directory() / "headers" / name_with(name, ".json.gz")


def _unpacked(packed: bytes) -> bytes:
    """Unpack at most 1 GiB, piece by piece: one read takes as much memory as it asks for.

    Raises:
        ValueError: if there is more.
        OSError, EOFError, zlib.error: if it is damaged.
    """
    data = bytearray()
    with gzip.open(io.BytesIO(packed)) as stream:
        while piece := stream.read(2**20):
            data += piece
            if len(data) > _MAX_KEPT_BYTES:
                raise ValueError("it is too large")
    return bytes(data)


def _read_kept(path: Path) -> dict[str, StoredTensor] | None:
    """Read a cached result; None if there is none or it is damaged."""
    try:
        packed = read_regular(path, _MAX_KEPT_BYTES)
        kept = decode_json(_unpacked(packed), type=_KeptHeaders)
    except (OSError, EOFError, ValueError, zlib.error, msgspec.DecodeError):
        return None
    if kept.layout != _LAYOUT:
        return None
    return {
        name: StoredTensor(name, dtype, shape, nbytes, Path(file), offset)
        for name, (dtype, shape, nbytes, file, offset) in kept.tensors.items()
    }


def _keep(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """Cache a result; if that fails, it is read from the Hub again next time."""
    entries = {
        t.name: (t.dtype, t.shape, t.nbytes, t.file.as_posix(), t.offset) for t in tensors.values()
    }
    document = {"layout": _LAYOUT, "tensors": entries}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, gzip.compress(json.dumps(document).encode(), 5))
