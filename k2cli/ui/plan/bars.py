"""Bars of each node's memory: parts differ by colour on a terminal and by character elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from k2cli.planning.plan import NodeBudget

PARTS = ("weights_bytes", "kv_cache_bytes", "activation_bytes", "overhead_bytes")
_LEGEND = ("weights", "KV", "activation", "overhead", "free")
_STYLES = ("blue", "green", "yellow", "magenta", "dim")
_UNICODE_CELLS, _ASCII_CELLS = "█▓▒░·", "#=+:."
_OVER = "bold red"
NAME_WIDTH = 14
_GPU_WIDTH = 16
"""The width with GPUs: ``localhost GPU 12``."""
_BAR_WIDTH = 60


def short_name(name: str, width: int = NAME_WIDTH) -> str:
    """Shorten a long name by cutting out its middle; machines usually differ at the ends."""
    if len(name) <= width:
        return name
    return f"{name[: width - 8]}…{name[-7:]}"


def name_width(nodes: Sequence[NodeBudget]) -> int:
    """Return the width of the nodes' names, of which those with a GPU's number are longer."""
    plain = all(node.gpu is None for node in nodes) and row_names(nodes) == [n.place for n in nodes]
    return NAME_WIDTH if plain else _GPU_WIDTH


def row_names(nodes: Sequence[NodeBudget]) -> list[str]:
    """Name each rank's row: by its machine, and by the rank if several share the machine."""
    places = [node.place for node in nodes]
    return [
        place if places.count(place) == 1 else f"{place} rank {rank}"
        for rank, place in enumerate(places)
    ]


def bar_lines(nodes: Sequence[NodeBudget], *, unicode: bool = True) -> list[Text]:
    """Draw a bar per node, all to one scale, with ``|`` at the limit; fits 80 columns."""
    cells = _UNICODE_CELLS if unicode else _ASCII_CELLS
    scale = max(max(node.total_bytes, node.limit_bytes) for node in nodes)
    width = name_width(nodes)
    names = row_names(nodes)
    lines = [_bar(node, name, scale, cells, width) for node, name in zip(nodes, names, strict=True)]
    legend = Text(" " * (width + 2))
    for cell, title, style in zip(cells, _LEGEND, _STYLES, strict=True):
        legend.append(cell, style).append(f" {title}  ")
    return [*lines, legend.append("| limit")]


def _bar(node: NodeBudget, name: str, scale: int, cells: str, width: int) -> Text:
    line = Text(f"{short_name(name, width).ljust(width)}  ")
    limit = round(node.limit_bytes / scale * _BAR_WIDTH)
    filled = position = 0
    runs: list[tuple[str, str]] = []
    for field, cell, style in zip(PARTS, cells, _STYLES, strict=False):
        filled += getattr(node, field)
        end = round(filled / scale * _BAR_WIDTH)
        runs += [(cell, style)] * (end - position)
        position = end
    runs += [(cells[-1], _STYLES[-1])] * (limit - len(runs))
    for column, (cell, style) in enumerate(runs):
        if column == limit:
            line.append("|", "bold")
        line.append(cell, style if column < limit else _OVER)
    return line if limit < len(runs) else line.append("|", "bold")
