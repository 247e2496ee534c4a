"""Settings and warnings of the prefix cache on disk: for how much it is, and if the disks have it.

The cache grows until a disk is full, and is switched off then: so the launch warns before.
"""

from __future__ import annotations

from k2cli.errors import ClusterError
from k2cli.launch.specification import RunDecisions
from k2cli.nodes.node import Node
from k2cli.prefix_folder import BLOCK_TOKENS, PrefixRoom
from k2cli.units import format_bytes, one_line

_PRECISION = 2**20
"""Tokens whose bytes are counted, so that whole numbers are exact enough."""

_SPARE_SHARE = 0.95
"""Of what is free: the part that a size which is recommended takes."""


def disk_setting(run: RunDecisions) -> str:
    """Describe the limit of the prefix cache on disk, with two digits of its tokens."""
    limit = run.request.prefix_disk_bytes
    tokens = limit * _PRECISION // _bytes_of(run, _PRECISION)
    tokens -= tokens % 10 ** max(len(str(tokens)) - 2, 0)
    return f"{format_bytes(limit)} per rank, about {tokens:,} tokens"


def _bytes_of(run: RunDecisions, tokens: int) -> int:
    """Return the bytes of so many tokens on the rank that takes most for them, at least 1."""
    planned = run.plan.request
    taken = max(node.kv_cache_bytes for node in run.plan.nodes)
    return max(taken * tokens // (planned.context_length * planned.concurrency), 1)


def disk_warnings(run: RunDecisions) -> list[str]:
    """Return a warning for each node whose disk has less room than its ranks may take.

    Also one for a size that holds not even one block.
    """
    limit = run.request.prefix_disk_bytes
    if not limit:
        return []
    block = _bytes_of(run, BLOCK_TOKENS)
    if limit < block:
        return [
            f"the prefix cache on disk is written in blocks of {BLOCK_TOKENS} tokens, which take "
            f"up to {format_bytes(block)} per rank: with --prefix-cache-disk {_size(limit)} "
            "nothing is kept"
        ]
    ranks: dict[str, list[int]] = {}
    for rank, node in enumerate(run.nodes):
        ranks.setdefault(node.name, []).append(rank)
    unknown, small, sizes = [], [], []
    for node in {node.name: node for node in run.nodes}.values():
        try:
            room: PrefixRoom = node.ask(PrefixRoom, "prefix-room")
        except ClusterError as error:  # it costs the cache at most
            unknown.append(f"free disk for the prefix cache: {error.message}")
            continue
        held = [room.held_bytes.get(rank, 0) for rank in ranks[node.name]]
        if sum(max(limit - each, 0) for each in held) > room.free_bytes:
            small.append(_warning(node, room, limit, held))
            sizes.append(int((room.free_bytes + sum(held)) / len(held) * _SPARE_SHARE))
    if sizes and (fits := _size(min(sizes))):
        small[-1] += f"; what fits: --prefix-cache-disk {fits}"
    return unknown + small


def _warning(node: Node, room: PrefixRoom, limit: int, held: list[int]) -> str:
    whole = format_bytes(limit)
    if len(held) > 1:
        whole = f"{format_bytes(limit * len(held))} for {len(held)} ranks"
    there = f", of which {format_bytes(sum(held))} are there" if sum(held) else ""
    return (
        f"on {node.name} the prefix cache may take {whole}{there}, and "
        f"{format_bytes(room.free_bytes)} are free for {one_line(room.folder)}: once that disk is "
        "full, nothing more is kept"
    )


def _size(count: int) -> str:
    """Return a size for the option that is not larger; "" if that would be too small."""
    if count >= 10**9:
        return f"{count // 10**9}GB"
    return f"{count // 10**6}MB" if count >= 10**6 else ""
