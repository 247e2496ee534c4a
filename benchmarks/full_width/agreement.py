"""Agreement of k2's ways of dividing a model with one rank and with mlx-lm, by their logits.

    python -m benchmarks.full_width.agreement --model FEW --peer-model FEW_PEER --folder F \\
        --out OUT.json --ways single mlx pipeline:ring tensor:ring tensor:nccl

Each way computes the same prompt in several chunks, and then the same given tokens one by one, so
that a different choice of one step does not change the next. For each step the logits of all
ways are compared: the error is the largest difference, relative to the largest logit.

All of it happens twice. In float32 (the packed weights stay as they are) ways must agree up to
``--bound``, and choose the same token wherever the best two logits differ by more than the largest
error. In the checkpoint's bfloat16 that says little about a model of random weights: a rounding
changes which experts a token gets, and the small model differs by half of the largest logit. There
the error is that to one rank in float32, and no way may have one that is larger by a factor of
``--noise`` than that of one rank in bfloat16. In both, digests of all ranks must be equal after
each step. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.full_width.transfers import rank_environment
from k2cli.protocol import Assignment
from tests.support.rank_pool import assignments, free_ports

RANK_SECONDS = 400.0
_SEED = 11
_EXACT = {"MLX_ENABLE_TF32": "0"}
"""On CUDA, float32 matrices are otherwise multiplied with fewer bits."""


def given_tokens(count: int) -> list[int]:
    """Return the prompt and the tokens that follow it, the same for every way."""
    import random

    return random.Random(_SEED).choices(range(256, 768), k=count)


# --- one rank, in a process of its own ----------------------------------------------------------


def rank_main(assignment_file: Path, prompt_tokens: int, steps: int, out: Path) -> None:
    """Compute the given tokens as one rank; write logits (if it has them) and digests."""
    import mlx.core as mx
    import numpy as np

    from k2cli.protocol import Decode, JoinBatch, OpenSequence, Prefill
    from k2cli.rank.array_bytes import array_digest
    from k2cli.rank.executor import Executor
    from k2cli.rank.group import join_group
    from k2cli.rank.loader import load_part

    assignment = msgspec.json.decode(assignment_file.read_bytes(), type=Assignment)
    group = join_group(assignment)
    began = time.perf_counter()
    part = load_part(assignment, group, lambda done, total: None)
    load_seconds = time.perf_counter() - began
    executor = Executor(part.stage, group)
    tokens = given_tokens(prompt_tokens + steps)
    chunk = assignment.prefill_chunk_tokens
    executor.carry_out(OpenSequence(1, 0))
    number = 2
    for first in range(0, prompt_tokens, chunk):
        past_last = min(first + chunk, prompt_tokens)
        executor.carry_out(Prefill(number, 0, tokens[first:past_last]))
        number += 1
    executor.carry_out(JoinBatch(number, 0, 0))
    logits, digests = [], []
    for step in range(steps):
        number += 1
        token = tokens[prompt_tokens + step]
        result = executor.carry_out(Decode(number, 0, [token], digest=True, state_digest=True))
        mx.eval(*result.to_compute)
        whole = "" if result.logits is None else array_digest(result.logits)
        in_step = result.in_step is None or bool(result.in_step.item())
        digests.append(
            {
                "state": result.state_digest,
                "arrived": result.arrived_digest,
                "computed": result.computed_digest,
                "logits": whole,
                "in_step": in_step,
            }
        )
        if result.logits is not None:
            logits.append(np.array(result.logits.astype(mx.float32))[0])
    if logits:
        np.save(out.with_suffix(".npy"), np.stack(logits))
    document = {"digests": digests, "load_seconds": load_seconds}
    out.with_suffix(".json").write_text(json.dumps(document))
    # What this rank has sent last must arrive before it ends.
    leader = out.with_name(f"{out.name.rpartition('-')[0]}-0.json")
    until = time.monotonic() + RANK_SECONDS
    while not leader.exists() and time.monotonic() < until:
        time.sleep(0.05)
    os._exit(0)  # a transport's finalizer may wait for the other rank


def mlx_main(
    model: Path, prompt_tokens: int, steps: int, chunk: int, dtype: str, out: Path
) -> None:
    """Compute the given tokens with mlx-lm alone; nothing of k2 is used.

    MLX's product of experts is wrong on CUDA for matrices of more than 2^32 elements (see
    ``experts``). So mlx-lm is made to ask for the first and the second half of the experts.
    """
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear
    from mlx_lm.utils import load_model

    QuantizedSwitchLinear.__call__ = _in_halves
    loaded, _ = load_model(model)
    if dtype == "float32":
        loaded.set_dtype(mx.float32)
    cache = make_prompt_cache(loaded)
    tokens = given_tokens(prompt_tokens + steps)
    for first in range(0, prompt_tokens, chunk):
        loaded(mx.array([tokens[first : min(first + chunk, prompt_tokens)]]), cache=cache)
        mx.eval([entry.state for entry in cache])
    logits = []
    for token in tokens[prompt_tokens:]:
        each = loaded(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
        logits.append(np.array(each))
    np.save(out.with_suffix(".npy"), np.stack(logits))


def _in_halves(self: Any, x: Any, indices: Any, sorted_indices: bool = False) -> Any:
    import mlx.core as mx

    count = len(self["weight"])

    def product(first: int, past_last: int) -> Any:
        arrays = [self[name][first:past_last] for name in ("weight", "scales", "biases")]
        return mx.gather_qmm(
            x,
            *arrays,
            rhs_indices=mx.clip(indices.astype(mx.int32) - first, 0, past_last - first - 1),
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            sorted_indices=sorted_indices,
        )

    in_first = (indices < count // 2)[..., None, None]
    return mx.where(in_first, product(0, count // 2), product(count // 2, count))


# --- all ways -------------------------------------------------------------------------------------


def run_way(way: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run all ranks of a way; return its digests and whether they agree.

    Raises:
        RuntimeError: if a rank fails.
    """
    began = time.monotonic()
    base = _base(way, dtype, options)
    common = [str(options.prompt), str(options.steps)]
    if way == "mlx":
        words = ["mlx", str(options.peer_model), *common, str(options.chunk), dtype, f"{base}-0"]
        _wait([_start(words, {}, f"{base}.log")], f"{base}.log")
        return {"seconds": time.monotonic() - began}
    strategy, _, transport = way.partition(":")
    ranks = 1 if strategy == "single" else 2
    ports = free_ports(2)
    parts = assignments(
        options.model,
        strategy,
        ranks,
        dtype=dtype,
        context_length=options.prompt + options.steps + 1,
        prefill_chunk_tokens=options.chunk,
        transport=transport or "local",
        nodes=["localhost"] * ranks,
        head="sharded" if strategy == "tensor" else "replicated",
        nccl_coordinator=f"127.0.0.1:{ports[0]}" if transport == "nccl" else None,
    )
    processes = []
    for rank in range(ranks):
        Path(f"{base}-{rank}.json").unlink(missing_ok=True)
    for rank, part in enumerate(parts):
        file = Path(f"{base}-{rank}.assignment")
        file.write_bytes(msgspec.json.encode(part))
        environment = (
            rank_environment(transport, rank, (ports[0], ports[1]), options.folder)
            if ranks > 1
            else {"MLX_PTX_CACHE_DIR": str(options.folder / "kernels-mlx")}
        )
        processes.append(
            _start(["rank", str(file), *common, f"{base}-{rank}"], environment, f"{base}.log")
        )
    _wait(processes, f"{base}.log")
    found = [json.loads(Path(f"{base}-{rank}.json").read_text()) for rank in range(ranks)]
    return {
        "seconds": time.monotonic() - began,
        "load_seconds": [each["load_seconds"] for each in found],
        "disagreements": disagreements([each["digests"] for each in found]),
    }


def _base(way: str, dtype: str, options: argparse.Namespace) -> Path:
    folder: Path = options.folder
    return folder / f"agreement-{way.replace(':', '-')}-{dtype}"


def _start(words: Sequence[str], environment: dict[str, str], log: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.full_width.agreement", *words]
    with open(log, "ab") as output:
        return subprocess.Popen(
            command, env=os.environ | _EXACT | environment, stdout=output, stderr=subprocess.STDOUT
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]], log: str) -> None:
    until = time.monotonic() + RANK_SECONDS
    try:
        while any(each.poll() is None for each in processes):
            failed = [each for each in processes if each.poll()]
            if failed or time.monotonic() > until:
                raise RuntimeError(f"a rank failed: {Path(log).read_text()[-1500:]}")
            time.sleep(0.1)
    finally:
        for each in processes:
            each.kill()
            each.wait(30)
    if any(each.returncode for each in processes):
        raise RuntimeError(f"a rank failed: {Path(log).read_text()[-1500:]}")


def disagreements(ranks: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """List the steps in which ranks disagree: about state, logits, or what was sent."""
    found = []
    for step, digests in enumerate(zip(*ranks, strict=True)):
        leader = digests[0]
        if not all(each["in_step"] for each in digests):
            found.append(f"step {step}: sums out of step")
        for rank, each in enumerate(digests[1:], start=1):
            if each["state"] != leader["state"]:
                found.append(f"step {step}: rank {rank} holds another state")
            if digests[rank - 1]["arrived"]:
                if digests[rank - 1]["arrived"] != each["computed"]:
                    found.append(f"step {step}: rank {rank} sent another state than arrived")
            elif (each["computed"], each["logits"]) != (leader["computed"], leader["logits"]):
                found.append(f"step {step}: rank {rank} has other logits")
    return found


# --- comparing ------------------------------------------------------------------------------------


def compare(first: Any, second: Any) -> dict[str, Any]:
    """Compare the logits of two ways, ``[steps, vocabulary]``.

    The error of a step is the largest difference over the largest logit. Tokens must be the same
    where the best two logits of ``first`` differ by more than the largest error of all steps, by
    the same measure.
    """
    import numpy as np

    scale = np.abs(first).max(axis=1)
    errors = np.abs(first - second).max(axis=1) / scale
    best = np.sort(first, axis=1)[:, -2:]
    gaps = (best[:, 1] - best[:, 0]) / scale
    same = first.argmax(axis=1) == second.argmax(axis=1)
    clear = gaps > errors.max()
    return {
        "largest_relative_error": float(errors.max()),
        "median_relative_error": float(np.median(errors)),
        "steps": len(errors),
        "same_tokens": int(same.sum()),
        "clear_steps": int(clear.sum()),
        "same_tokens_in_clear_steps": int((same & clear).sum()),
        "finite": bool(np.isfinite(first).all() and np.isfinite(second).all()),
    }


def verdict(result: dict[str, Any], bound: float) -> list[str]:
    """List what is wrong in a comparison in float32."""
    wrong = []
    if not result["finite"]:
        wrong.append("logits are not finite")
    if not result["largest_relative_error"] <= bound:
        wrong.append(f"error {result['largest_relative_error']:.4g} is above {bound}")
    if result["same_tokens_in_clear_steps"] != result["clear_steps"]:
        wrong.append("other tokens where the best two logits differ clearly")
    if not result["clear_steps"]:
        wrong.append("in no step do the best two logits differ clearly")
    return wrong


def noise_verdict(result: dict[str, Any], one_rank: dict[str, Any], factor: float) -> list[str]:
    """List what is wrong in a comparison of a rounded type with float32, beside one rank's own."""
    wrong = [] if result["finite"] else ["logits are not finite"]
    error, own = result["median_relative_error"], one_rank["median_relative_error"]
    if not error <= factor * own:
        wrong.append(f"error {error:.4g}, that of one rank is {own:.4g}")
    return wrong


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="agreement", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peer-model", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", default=["single", "mlx", "pipeline:ring"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "checkpoint"])
    parser.add_argument("--prompt", type=int, default=5000)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--bound", type=float, default=1e-3)
    parser.add_argument("--noise", type=float, default=1.5)
    options = parser.parse_args(arguments)
    options.model, options.folder = options.model.absolute(), options.folder.absolute()
    options.peer_model = (options.peer_model or options.model).absolute()
    (options.folder / "kernels-mlx").mkdir(parents=True, exist_ok=True)
    return options


def _compared(
    way: str, dtype: str, logits: dict[str, Any], document: dict[str, Any], options: Any
) -> None:
    """Compare a way with those before it, and note what is wrong."""
    mine, pairs = f"{way} {dtype}", document["pairs"]
    for other in (f"single {dtype}", f"mlx {dtype}"):
        if other in logits and other != mine:
            pairs[f"{other} / {mine}"] = result = compare(logits[other], logits[mine])
            if dtype == "float32":
                wrong = verdict(result, options.bound)
                document["wrong"] += [f"{other} / {mine}: {each}" for each in wrong]
    exact, own = "single float32", f"single {dtype}"
    if dtype != "float32" and exact in logits:
        pairs[f"{exact} / {mine}"] = result = compare(logits[exact], logits[mine])
        wrong = noise_verdict(result, pairs.get(f"{exact} / {own}", result), options.noise)
        document["wrong"] += [f"{exact} / {mine}: {each}" for each in wrong]


def _main(arguments: Sequence[str]) -> int:
    import numpy as np

    options = _options(arguments)
    document: dict[str, Any] = {"options": vars(options), "ways": {}, "pairs": {}, "wrong": []}
    logits: dict[str, Any] = {}
    for dtype in options.dtypes:
        for way in options.ways:
            name = f"{way} {dtype}"
            try:
                document["ways"][name] = found = run_way(way, dtype, options)
                document["wrong"] += [f"{name}: {each}" for each in found.get("disagreements", ())]
                logits[name] = np.load(f"{_base(way, dtype, options)}-0.npy")
                _compared(way, dtype, logits, document, options)
            except RuntimeError as error:
                document["ways"][name] = {"error": str(error)}
                document["wrong"].append(f"{name}: {error}")
            options.out.write_text(json.dumps(document, indent=1, default=str))
            sys.stdout.write(f"{name}: {json.dumps(document['ways'][name])[:300]}\n")
            sys.stdout.flush()
    for pair, result in document["pairs"].items():
        sys.stdout.write(f"{pair}: {json.dumps(result)}\n")
    sys.stdout.write("\n".join(["wrong:", *document["wrong"]] if document["wrong"] else ["agreed"]))
    sys.stdout.write("\n")
    return 1 if document["wrong"] else 0


def main() -> None:
    """Run all ways and compare them, or be one rank of a way."""
    kind, *words = sys.argv[1:]
    if kind == "rank":
        rank_main(Path(words[0]), int(words[1]), int(words[2]), Path(words[3]))
    elif kind == "mlx":
        prompt, steps, chunk = (int(word) for word in words[1:4])
        mlx_main(Path(words[0]), prompt, steps, chunk, words[4], Path(words[5]))
    else:
        sys.exit(_main(sys.argv[1:]))


if __name__ == "__main__":
    main()
