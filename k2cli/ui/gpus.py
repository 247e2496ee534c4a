"""Text that says which rank computes on which GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from k2cli.units import one_line

if TYPE_CHECKING:
    from k2cli.gpu_name import GpuName


class _OnGpu(Protocol):
    @property
    def gpu(self) -> GpuName | None: ...


def gpu_text(ranks: Iterable[tuple[str, _OnGpu]]) -> str:
    """Say which ranks are on which GPU, and which of them share one; empty without GPUs.

    Args:
        ranks: the node of each rank, and its entry in a plan or record, in rank order.
    """
    places: dict[tuple[str, str], list[int]] = {}
    nodes = set()
    for rank, (node, entry) in enumerate(ranks):
        if entry.gpu is not None:
            places.setdefault((node, entry.gpu.label), []).append(rank)
            nodes.add(node)
    return "; ".join(
        one_line(f"{_ranks(found)} {label}" + (f" of {node}" if len(nodes) > 1 else ""))
        for (node, label), found in places.items()
    )


def _ranks(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]} on"
    *most, last = map(str, numbers)
    return f"ranks {', '.join(most)} and {last} share"
