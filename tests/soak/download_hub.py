"""Mock Hub in a process of its own, for measurements: ``python -m tests.soak.download_hub FOLDER``.

It prints its address, and for each line that it reads the bytes of bodies that it has sent since
the line before. Its files stay on disk and are sent by the kernel, so that the server takes little
of the machine that is measured.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from k2cli.models.digests import sha256_of
from k2cli.models.layout import INDEX_NAME
from k2cli.models.safetensors_writer import ShardWriter, TensorSpec
from tests.models.mock_hub import Content, MockHub, StoredFile, served_hub
from tests.soak.page import ROOT

SHARDS = 8
TENSORS_PER_SHARD = 5
HASHES = "hashes"


def make_model(toy: Path, folder: Path, total_bytes: int) -> int:
    """Write a model of pseudo-random weights in shards, with the small files of a toy.

    Returns:
        The bytes of all its files.
    """
    folder.mkdir(parents=True)
    for path in toy.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    count = SHARDS * TENSORS_PER_SHARD
    length = total_bytes // count
    specs = [TensorSpec(f"t{number:03d}", "U8", (length,)) for number in range(count)]
    source = np.random.default_rng(17)
    with ShardWriter(folder, specs, shard_bytes=length * TENSORS_PER_SHARD) as writer:
        for spec in specs:
            writer.write(spec.name, 0, source.bytes(length))
    index = {"metadata": {}, "weight_map": writer.file_names}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    hashes = {path.name: sha256_of(path) for path in folder.glob("*.safetensors")}
    size = sum(path.stat().st_size for path in folder.iterdir())
    (folder / HASHES).write_text(json.dumps(hashes))
    return size


class HubProcess:
    """A mock Hub in another process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self._line()

    def sent_bytes(self) -> int:
        """Return the bytes of bodies that it has sent since the last call."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def hub_process(folder: Path) -> Iterator[HubProcess]:
    """Serve a folder that ``make_model`` made."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.soak.download_hub", str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield HubProcess(process)
    finally:
        process.kill()
        process.wait(timeout=10)


def _stored(folder: Path) -> dict[str, Content]:
    hashes = json.loads((folder / HASHES).read_text())
    return {
        path.name: StoredFile(path, hashes[path.name]) if path.name in hashes else path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name != HASHES
    }


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Serve until the input ends."""
    with served_hub(MockHub(_stored(Path(sys.argv[1])))) as hub:
        _say(hub.address)
        for _ in sys.stdin:
            count, hub.sent[:] = sum(hub.sent), []
            _say(str(count))


if __name__ == "__main__":
    main()
