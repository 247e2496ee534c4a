"""Time collectives between two ranks with arrays of K2's sizes, and print them as JSON.

    python -m benchmarks.full_width.transfers ring|nccl FOLDER [RANK PORT OTHER_PORT]

A hidden state of one token has 14,336 bytes, one of a chunk of 2,048 tokens 29 MB. ``sum``: a sum
over both ranks; ``in a chain``: each of 20 sums that depend on each other, as in ten layers;
``there and back``: a hidden state from one rank to the other and a token back, as in a pipeline.
MLX's NCCL cannot send, so there the other rank adds zeros.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.full_width import gpus

WIDTH = 7168
CHAIN = 20
ROUNDS = 30


def _rank(transport: str) -> dict[str, float]:
    import mlx.core as mx

    group = mx.distributed.init(strict=True, backend=transport)
    rank = group.rank()
    found: dict[str, float] = {}
    for tokens in (1, 8, 2048):
        hidden = mx.random.normal((tokens, WIDTH)).astype(mx.bfloat16)
        token = mx.zeros((tokens,), dtype=mx.uint32)
        mx.eval(hidden, token)

        def one(hidden: mx.array = hidden) -> None:
            mx.eval(mx.distributed.all_sum(hidden, group=group))

        def chain(hidden: mx.array = hidden) -> None:
            value = hidden
            for _ in range(CHAIN):
                value = mx.distributed.all_sum(value * 0.5, group=group)
            mx.eval(value)

        def there(hidden: mx.array = hidden, token: mx.array = token) -> None:
            if transport == "nccl":
                own = hidden if rank == 1 else mx.zeros_like(hidden)
                mx.eval(mx.distributed.all_sum(own, group=group))
                mx.eval(mx.distributed.all_sum(token, group=group))
            elif rank == 1:
                mx.eval(mx.distributed.send(hidden, 0, group=group))
                mx.eval(mx.distributed.recv_like(token, 0, group=group))
            else:
                mx.eval(mx.distributed.recv_like(hidden, 1, group=group))
                mx.eval(mx.distributed.send(token, 1, group=group))

        found[f"sum of {tokens} tokens, us"] = _median_us(one)
        found[f"sum of {tokens} tokens in a chain, us"] = _median_us(chain) / CHAIN
        found[f"{tokens} tokens there and back, us"] = _median_us(there)
    return found


def _median_us(action: Callable[[], None]) -> float:
    for _ in range(3):
        action()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return round(statistics.median(times) * 1e6, 1)


def rank_environment(
    transport: str, rank: int, ports: tuple[int, int], folder: Path
) -> dict[str, str]:
    devices = gpus.count()
    found = {"MLX_RANK": str(rank), "MLX_PTX_CACHE_DIR": str(folder / "kernels-mlx")}
    if devices:
        found["CUDA_VISIBLE_DEVICES"] = str(rank % devices)
    if transport == "ring":
        hosts = folder / f"transfers-{ports[0]}.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        return found | {"MLX_HOSTFILE": str(hosts)}
    nccl = {"MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(ports[0])}
    return found | nccl | {"NCCL_SOCKET_IFNAME": "=lo"}


def main() -> None:
    """Start both ranks, or be one of them."""
    transport, folder = sys.argv[1], Path(sys.argv[2])
    if len(sys.argv) > 3:
        figures: dict[str, Any] = _rank(transport)
        sys.stdout.write(json.dumps(figures) + "\n")
        sys.stdout.flush()
        os._exit(0)
    from tests.support.rank_pool import free_ports

    first, second = free_ports(2)
    (folder / "kernels-mlx").mkdir(exist_ok=True)
    ranks = [
        subprocess.Popen(
            [*(sys.executable, "-m", "benchmarks.full_width.transfers"), *sys.argv[1:3], str(rank)],
            env=os.environ | rank_environment(transport, rank, (first, second), folder),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        sys.exit(1)
    sys.stdout.write(outputs[0].splitlines()[-1] + "\n")


if __name__ == "__main__":
    main()
