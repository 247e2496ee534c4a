"""Compile the kernels of full-width layers by several processes at once, before measuring.

    K2_CACHE_DIR=FOLDER/kernels-k2 python -m benchmarks.full_width.kernels all FOLDER

A cold start compiles one kernel after the other, for minutes. Here each shape of a step has a
process of its own, with one dense layer, one layer with experts and the head of K2, as a rank holds
them. What they compile is published in k2's folder of kernels, as a rank does, and copied to
``FOLDER/kernels-mlx`` for mlx-lm, which takes the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.full_width import gpus

SHAPES = (
    "decode:1", "decode:2", "decode:8", "decode:1:mlx-lm", "decode:8:mlx-lm",
    "prefill:16", "prefill:32", "prefill:64", "prefill:128", "prefill:300", "prefill:2048",
)  # fmt: skip
"""Rows of one token, or tokens of a chunk of one prompt; as a rank holds a model, or as mlx-lm."""
FLOAT32 = ("decode:1:float32", "prefill:2048:float32")
"""Shapes of ``agreement``, which also computes in float32."""
VOCABULARY = 163_840
_LIMIT_SECONDS = 280.0


def compile_shape(shape: str, own: Path) -> int:
    """Compute a step of one shape; publish what was compiled, and return the number of kernels."""
    import mlx.core as mx

    from benchmarks.gpu_layers import as_held, random_layers
    from benchmarks.mla_attention import K2_LAYER
    from k2cli.guard.spawn import kernel_folder
    from k2cli.rank.kernels.cache import open_kernel_cache
    from k2cli.sharding.assemble import cast
    from k2cli.sharding.stage import make_cache

    tempfile.tempdir = str(kernel_folder("compile"))
    cache = open_kernel_cache(own)
    kind, count, *form = shape.split(":")
    rows, tokens = (int(count), 1) if kind == "decode" else (1, int(count))
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "vocab_size": VOCABULARY}
    model = random_layers(K2_LAYER | layers, 2)
    mx.eval(model.parameters())
    if form == ["float32"]:
        cast(model, mx.float32)
        mx.eval(model.parameters())
    if form != ["mlx-lm"]:
        as_held(model)
    caches = make_cache(model)
    prompt = mx.array([[7 + index * 31 % 500 for index in range(8)]] * rows)
    step = mx.array([[9 + index * 31 % 500 for index in range(tokens)]] * rows)
    mx.eval(model(prompt, cache=caches))
    for _ in range(2):
        logits = model(step, cache=caches)[:, -1]
        mx.eval(logits, mx.argmax(logits, axis=-1))
    return cache.publish() if cache else 0


def _copy_for_mlx_lm(kernels: Path, folder: Path) -> None:
    for key in kernels.glob("**/ptx/*"):
        if key.name != "processes":
            shutil.copytree(key, folder / "kernels-mlx", dirs_exist_ok=True)


def main() -> None:
    """Compile one shape, or all of them side by side."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what != "all":
        began = time.monotonic()
        new = compile_shape(what, folder / f"own-{what.replace(':', '-')}")
        sys.stdout.write(f"{what}: {new} kernels in {time.monotonic() - began:.0f} s\n")
        sys.stdout.flush()
        os._exit(0)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = (*SHAPES, *FLOAT32) if "--float32" in sys.argv[3:] else SHAPES
    devices = max(gpus.count(), 1)
    processes = []
    for index, shape in enumerate(shapes):
        command = [sys.executable, "-m", "benchmarks.full_width.kernels", shape, str(folder)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(index % devices)}
        processes.append(subprocess.Popen(command, env=environment))
    until = time.monotonic() + _LIMIT_SECONDS
    try:
        failed = sum(bool(each.wait(max(until - time.monotonic(), 1))) for each in processes)
    finally:
        for each in processes:
            each.kill()
            each.wait(30)
    _copy_for_mlx_lm(Path(os.environ["K2_CACHE_DIR"]), folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
