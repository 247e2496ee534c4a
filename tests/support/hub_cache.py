"""Caches of the Hub library, made file by file, with revisions that share contents."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

OLD, NEW = "0" * 40, "1" * 40


def small_model(seed: int, size: int = 40_000) -> dict[str, bytes]:
    """Return the files of a model: two shards, of which the seed changes only the second."""
    files = {"config.json": json.dumps({"model_type": "llama", "seed": seed}).encode()}
    for number, part in enumerate((0, seed), start=1):
        tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        header = json.dumps({f"t{number}": tensor}).encode()
        data = hashlib.shake_128(bytes([number, part])).digest(size)
        name = f"model-{number:05d}-of-00002.safetensors"
        files[name] = len(header).to_bytes(8, "little") + header + data
    return files


def put_revision(
    cache: Path,
    commit: str,
    files: dict[str, bytes],
    *references: str,
    repo: str = "mock/model",
    links: bool = True,
) -> Path:
    """Write a revision as the Hub library does, and return its folder.

    Without ``links`` it is written as on a volume that has none, such as exFAT.
    """
    storage = cache / f"models--{repo.replace('/', '--')}"
    folder = storage / "snapshots" / commit
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        blob = storage / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        if not links:
            path.write_bytes(data)
            continue
        blob.write_bytes(data)
        path.symlink_to(os.path.relpath(blob, path.parent))
    for name in references:
        (storage / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (storage / "refs" / name).write_text(commit)
    return folder
