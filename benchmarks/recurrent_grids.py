"""Measure the activation grids of all recurrent models in one run, within a limit of time.

    python -m benchmarks.recurrent_grids --out FILE [--seconds 440] [--only mamba2,jamba]

Every model of benchmarks/data/recurrent is measured in a process of its own, in the float types
that the device uses in practice. FILE is written anew after each model, so that what was measured
before a failure or the end of the time is kept. Needs the checkout, mlx, mlx-lm, numpy, msgspec.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k2cli.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "benchmarks" / "data" / "recurrent"
# The most telling first: each kind of recurrence once, then the others, then other float types.
ORDER = (
    "mamba2", "granite-hybrid", "qwen3-next", "mamba", "nemotron-h", "rwkv7", "lfm2",
    "recurrent-gemma", "bailing-linear", "jamba", "kimi-linear", "falcon-h1", "plamo2",
)  # fmt: skip
ALSO_FLOAT32 = ("mamba2", "granite-hybrid", "qwen3-next", "mamba", "jamba")
MODEL_SECONDS = 75.0
GRID = ["--layers", "0", "--runs", "1", "--contexts", "1024", "--rows", "1,4"]
CHUNKS = {
    # These compute token by token: a chunk is as many operations as it has tokens, several times.
    "mamba": "32,128,256", "jamba": "32,64,128", "rwkv7": "32,128,256",
    "bailing-linear": "32,128,256", "qwen3-next": "64,128,256", "kimi-linear": "32,128,256",
}  # fmt: skip


def measure(name: str, dtype: str, chunks: str, timeout_seconds: float) -> dict[str, Any]:
    """Measure one model in another process; an error stands beside the points until then."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "grid.json"
        command = [
            sys.executable, "-m", "benchmarks.activation_grid",
            "--config", str(CONFIGS / f"{name}.json"), "--dtype", dtype, "--chunks", chunks, *GRID,
            "--label", f"small {name}, {dtype}, states together", "--out", str(out),
        ]  # fmt: skip
        with (Path(folder) / "stderr").open("w+") as stderr:
            try:
                status = subprocess.run(
                    command, cwd=ROOT, stderr=stderr, timeout=timeout_seconds, check=False
                ).returncode
                error = f"exit status {status}" if status else None
            except subprocess.TimeoutExpired:
                error = f"not done after {timeout_seconds:.0f} s"
            stderr.seek(0)
            told = stderr.read()
        found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        return found | ({"error": error, "stderr": told[-4000:]} if error else {})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure model after model until all are done or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=440.0, help="for all models together")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--chunks", help="of every model; the default depends on the model")
    parser.add_argument("--only", default=",".join(ORDER))
    given = parser.parse_args(arguments)
    chosen = [name for name in ORDER if name in given.only.split(",")]
    runs = [(name, given.dtype) for name in chosen]
    runs += [(name, "float32") for name in chosen if name in ALSO_FLOAT32]
    end = time.monotonic() + given.seconds
    grids: dict[str, Any] = {}
    for name, dtype in runs:
        left = end - time.monotonic()
        key = f"{name}-{dtype}"
        if left < 5:
            grids[key] = {"error": "no time was left"}
        else:
            started = time.monotonic()
            chunks = given.chunks or CHUNKS.get(name, "64,256,512")
            grids[key] = measure(name, dtype, chunks, min(MODEL_SECONDS, left))
            grids[key]["seconds"] = round(time.monotonic() - started, 1)
            sys.stderr.write(
                f"{key}: {len(grids[key].get('points', ()))} points, "
                f"{grids[key].get('error', 'done')}, {grids[key]['seconds']} s\n"
            )
        write_atomically(given.out, json.dumps({"grids": grids}, indent=1).encode())
    return int(all("error" in grid for grid in grids.values()))


if __name__ == "__main__":
    sys.exit(main())
