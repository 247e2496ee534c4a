"""Execution of a planned conversion, into a folder that appears complete or not at all.

Memory use is bounded by one piece of a tensor, or by one stack of experts if the original stores
experts separately, and does not depend on the size of the checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli.errors import K2Error
from k2cli.files import open_regular
from k2cli.models.checkpoint import read_checkpoint
from k2cli.models.files import folder_being_made
from k2cli.models.inventory.known_folders import remember_folder, stamps_of
from k2cli.models.layout import INDEX_NAME
from k2cli.models.safetensors_header import StoredTensor
from k2cli.models.safetensors_writer import ShardWriter
from k2cli.quantization.events import (
    BytesDone,
    LayerQuantized,
    QuantizationEvent,
    QuantizationResult,
)
from k2cli.sharding.recipe import Recipe
from k2cli.system.disk import disk_use
from k2cli.units import format_bytes

if TYPE_CHECKING:
    import mlx.core as mx

    from k2cli.quantization.plan import Conversion, Step

PIECE_BYTES = 64 << 20
_SHARD_BYTES = 5 << 30  # the limit of mlx-lm, which calls it 5 GB
_CACHE_BYTES = 256 << 20
_DISK_MARGIN_BYTES = 64 << 20

COPIED_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "tiktoken.model", "*.tiktoken",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE", "LICENSE.*", "NOTICE",
)  # fmt: skip
"""Files copied unchanged: tokenizer, template, licence. Python files never are."""


def quantize(
    source: Path,
    destination: Path,
    recipe: Recipe,
    *,
    dry_run: bool = False,
    piece_bytes: int = PIECE_BYTES,
) -> Iterator[QuantizationEvent]:
    """Quantize the checkpoint in ``source`` into the new folder ``destination``.

    The events report progress; the last one is the ``QuantizationResult``. Closing the iterator,
    or an exception thrown into it, removes the files written so far.

    Args:
        dry_run: plan and check disk space, but write nothing.
        piece_bytes: number of bytes of a tensor that are read at a time.

    Raises:
        UsageError: if no model can be built from the config.
        K2Error: if the source is already quantized or not readable, the destination is not
            empty, or the disk has no room.
    """
    from k2cli.quantization.plan import plan_conversion

    checkpoint = read_checkpoint(source)
    if not checkpoint.tensors:
        raise K2Error(f"{source} has no tensors to quantize", f"k2 download {source}")
    conversion = plan_conversion(checkpoint, recipe)
    _check_destination(source, destination)
    _check_disk(destination, conversion.stored_bytes)
    result = _result(conversion, destination, recipe, dry_run=dry_run)
    if dry_run:
        yield result
        return
    # Before the work, so that what an interrupted one leaves is found.
    remember_folder(destination, "quantize")
    with folder_being_made(destination) as folder, _bounded_cache():
        largest = yield from _write_tensors(folder, conversion, piece_bytes)
        _write_config(folder, conversion)
        _copy_files(source, folder)
    made = stamps_of(destination)
    remember_folder(destination, "quantize", made, source=str(source), recipe=str(recipe))
    yield _result(conversion, destination, recipe, peak_bytes=_peak_bytes() + largest)


def _result(
    conversion: Conversion,
    destination: Path,
    recipe: Recipe,
    *,
    dry_run: bool = False,
    peak_bytes: int = 0,
) -> QuantizationResult:
    return QuantizationResult(
        path=str(destination),
        stored_bytes=conversion.stored_bytes,
        source_bytes=conversion.source_bytes,
        bits=recipe.bits,
        group_size=recipe.group_size,
        mode=recipe.mode,
        recipe=str(recipe),
        tensors=len(conversion.tensors),
        quantized_modules=sum(step.quantization is not None for step in conversion.steps),
        bits_per_weight=round(conversion.stored_bytes * 8 / conversion.total_parameters, 3),
        peak_memory_bytes=peak_bytes,
        dry_run=dry_run,
    )


def _check_destination(source: Path, destination: Path) -> None:
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise K2Error(f"{destination} already exists", "remove it or name another folder with --to")
    if destination.resolve() == source.resolve():
        raise K2Error("source and destination are the same folder", "name another with --to")


def _check_disk(destination: Path, needed_bytes: int) -> None:
    existing = destination.absolute().parent
    while not existing.exists():
        existing = existing.parent
    free = disk_use(existing).free
    if free < needed_bytes + _DISK_MARGIN_BYTES:
        raise K2Error(
            f"{existing} has {format_bytes(free)} free, the new checkpoint takes "
            f"{format_bytes(needed_bytes)}",
            "free some space, or name a folder on another disk with --to",
        )


@contextlib.contextmanager
def _bounded_cache() -> Iterator[None]:
    """Limit the allocator's cache of freed arrays, and restart the count of peak memory."""
    import mlx.core as mx

    before = mx.set_cache_limit(_CACHE_BYTES)
    mx.reset_peak_memory()
    try:
        yield
    finally:
        mx.set_cache_limit(before)


def _peak_bytes() -> int:
    import mlx.core as mx

    return int(mx.get_peak_memory())


def _write_tensors(
    folder: Path, conversion: Conversion, piece_bytes: int
) -> Generator[QuantizationEvent, None, int]:
    """Write all tensors and the index, and return the size of the largest read buffer."""
    total, done, largest = conversion.stored_bytes, 0, 0
    with ShardWriter(folder, conversion.tensors, _SHARD_BYTES) as writer:
        _write_index(folder, conversion, writer.file_names)
        yield BytesDone(0, total)
        for step in conversion.steps:
            if conversion.reads is not None:
                conversion.reads.read_for(*step.arrays)
            for written, buffered in _pieces(step, writer, piece_bytes):
                done += written
                largest = max(largest, buffered)
                yield BytesDone(done, total)
            # Computed arrays keep their data: free it before the next step.
            step.arrays.clear()
            if step.quantization is not None:
                yield LayerQuantized(
                    step.path, step.quantization["bits"], step.quantization["group_size"]
                )
    return largest


def _pieces(step: Step, writer: ShardWriter, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """Write one step; yield the bytes written and the bytes buffered, for each piece."""
    if step.stored is None:
        yield _write_whole(step, writer), 0
        return
    rows = 1
    for length in step.stored.shape[:-1]:
        rows *= length
    if rows == 0 or step.stored.nbytes == 0:
        return
    row_bytes = step.stored.nbytes // rows
    rows_per_piece = max(1, piece_bytes // row_bytes)
    descriptor = open_regular(step.stored.file, follow_links=True)
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        for first in range(0, rows, rows_per_piece):
            count = min(rows_per_piece, rows - first)
            data = _read(stream.fileno(), step.stored, first * row_bytes, count * row_bytes)
            written = _write_rows(step, writer, data, first, count, rows)
            yield written, len(data)


def _read(file: int, tensor: StoredTensor, at: int, size: int) -> bytes:
    parts: list[bytes] = []
    missing = size
    while missing:
        part = os.pread(file, missing, tensor.offset + at + size - missing)
        if not part:
            raise K2Error(f"{tensor.file} ends in the middle of tensor '{tensor.name}'")
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _write_rows(
    step: Step, writer: ShardWriter, data: bytes, first: int, count: int, rows: int
) -> int:
    """Cast and quantize some rows of a tensor, and write them to their place."""
    import mlx.core as mx
    import numpy as np

    from k2cli.quantization.plan import STREAMED_TYPES

    assert step.stored is not None
    array = mx.array(np.frombuffer(data, dtype=np.uint8)).view(STREAMED_TYPES[step.stored.dtype])
    array = array.reshape(count, -1).astype(step.dtype)
    results = [array]
    if step.quantization is not None:
        results = list(mx.quantize(array, **step.quantization))
    mx.eval(results)
    written = 0
    for output, result in zip(step.outputs, results, strict=True):
        written += _write_array(writer, output.name, first * (output.nbytes // rows), result)
    return written


def _write_whole(step: Step, writer: ShardWriter) -> int:
    import mlx.core as mx

    mx.eval(step.arrays)
    return sum(
        _write_array(writer, output.name, 0, array)
        for output, array in zip(step.outputs, step.arrays, strict=True)
    )


MOST_VIEWED_BYTES = 2**30


def _write_array(writer: ShardWriter, name: str, at: int, array: mx.array) -> int:
    """Write the elements of an array in row-major order; return their bytes.

    A part at a time: MLX counts a dimension with 32 bits, and as one dimension of bytes the experts
    of a layer of Kimi K2 (2.8 GB) have a negative length.
    """
    import mlx.core as mx

    if not array.nbytes:
        return 0
    rows = array if array.ndim else array.reshape(1)
    count = max(1, MOST_VIEWED_BYTES * len(rows) // array.nbytes)
    for first in range(0, len(rows), count):
        flat = mx.contiguous(rows[first : first + count].reshape(-1))
        raw: Any = flat if flat.dtype == mx.uint8 else flat.view(mx.uint8)
        data = memoryview(raw)
        writer.write(name, at, data)
        at += len(data)
    return array.nbytes


def _write_index(folder: Path, conversion: Conversion, file_names: Mapping[str, str]) -> None:
    metadata = {
        "total_size": conversion.stored_bytes,
        "total_parameters": conversion.total_parameters,
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(file_names.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=4), encoding="utf-8")


def _write_config(folder: Path, conversion: Conversion) -> None:
    text = json.dumps(conversion.config, indent=4)
    (folder / "config.json").write_text(text, encoding="utf-8")


def _copy_files(source: Path, folder: Path) -> None:
    for pattern in COPIED_FILES:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.suffix != ".py":
                target = folder / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
