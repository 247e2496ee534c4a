"""A plan for people: a table of the nodes in one unit, a bar per node, and a verdict.

Made to be read at 80 columns. What is needed of a plan is declared here as protocols, since ui
imports no domain. All but the ``print_`` functions return lines of plain text.
"""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from k2cli.ui.output import note, print_text
from k2cli.units import GB, MB, format_bytes, format_gib

_COLUMNS = (
    ("weights", "weights_bytes"),
    ("KV", "kv_cache_bytes"),
    ("activation", "activation_bytes"),
    ("overhead", "overhead_bytes"),
    ("total", "total_bytes"),
    ("limit", "limit_bytes"),
    ("headroom", "headroom_bytes"),
)
_PARTS = ("weights_bytes", "kv_cache_bytes", "activation_bytes", "overhead_bytes")
_UNICODE_CELLS, _ASCII_CELLS = "█▓▒░·", "#=+:."
_WIDTH = 80
_NAME_WIDTH = 14
_BAR_WIDTH = 60


class BudgetView(Protocol):
    """One rank's ledger, in bytes."""

    @property
    def name(self) -> str: ...
    @property
    def limit_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def headroom_bytes(self) -> int: ...
    @property
    def limit_source(self) -> str: ...


class ModelView(Protocol):
    """What is planned."""

    @property
    def reference(self) -> str: ...
    @property
    def parameters(self) -> int: ...
    @property
    def stored_bytes(self) -> int: ...
    @property
    def quantization(self) -> str: ...


class RequestView(Protocol):
    """What there must be room for."""

    @property
    def context_length(self) -> int: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def prefill_chunk_tokens(self) -> int: ...


class PartView(Protocol):
    """One rank's layers, half-open."""

    @property
    def rank(self) -> int: ...
    @property
    def layers(self) -> tuple[int, int]: ...


class PlacementView(Protocol):
    """A strategy and its parts."""

    @property
    def strategy(self) -> str: ...
    @property
    def head(self) -> str: ...
    @property
    def ranks(self) -> Sequence[PartView]: ...
    @property
    def size(self) -> int: ...
    @property
    def layer_count(self) -> int: ...


class PlanView(Protocol):
    """A plan, as far as it is shown."""

    @property
    def model(self) -> ModelView: ...
    @property
    def request(self) -> RequestView: ...
    @property
    def placement(self) -> PlacementView: ...
    @property
    def nodes(self) -> Sequence[BudgetView]: ...
    @property
    def fits(self) -> bool: ...
    @property
    def marks(self) -> Mapping[str, str]: ...
    @property
    def reason(self) -> str: ...


def plan_lines(plan: PlanView, *, unicode: bool = True) -> list[str]:
    """The whole report: model, request, placement, table, bars, verdict."""
    return [
        *_headline(plan),
        "",
        *_table(plan.nodes),
        "",
        *_bars(plan.nodes, _UNICODE_CELLS if unicode else _ASCII_CELLS),
        "",
        verdict(plan),
    ]


def _headline(plan: PlanView) -> list[str]:
    model, request = plan.model, plan.request
    sequences = "1 sequence" if request.concurrency == 1 else f"{request.concurrency} sequences"
    return [
        model.reference,
        f"{_count(model.parameters)} parameters, {format_bytes(model.stored_bytes)} stored, "
        f"quantization: {model.quantization}",
        f"{sequences} of {request.context_length:,} tokens in {request.dtype}, "
        f"prefill in chunks of {request.prefill_chunk_tokens}",
        *_placement_lines(plan),
    ]


def _placement_lines(plan: PlanView) -> list[str]:
    placement = plan.placement
    if placement.strategy == "single":
        return [f"single: all {placement.layer_count} layers on {plan.nodes[0].name}"]
    if placement.strategy == "tensor":
        what = "layers and the head" if placement.head == "sharded" else "layers"
        how = f"a slice of all {placement.layer_count} {what} on each of {placement.size} ranks"
    else:
        how = ", ".join(
            f"layers {part.layers[0]}-{part.layers[1] - 1} on rank {part.rank}"
            for part in reversed(placement.ranks)
        )
    why = f"; {plan.reason}" if plan.reason else ""
    return textwrap.wrap(f"{placement.strategy}: {how}{why}", _WIDTH, subsequent_indent="  ")


def _count(parameters: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= size:
            return f"{parameters / size:,.1f} {unit}"
    return str(parameters)


def _table(nodes: Sequence[BudgetView]) -> list[str]:
    # Small models would be all zeros in GB.
    largest = max(node.total_bytes for node in nodes)
    unit, name = (GB, "GB") if largest >= 10 * GB else (MB, "MB")
    rows = [
        [_short(node.name)] + [f"{getattr(node, field) / unit:.1f}" for _, field in _COLUMNS]
        for node in nodes
    ]
    header = [f"node ({name})", *(title for title, _ in _COLUMNS)]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]


def _short(name: str) -> str:
    """Long names lose their middle, which says least: both ends tell machines apart."""
    if len(name) <= _NAME_WIDTH:
        return name
    return f"{name[: _NAME_WIDTH - 8]}…{name[-7:]}"


def _bars(nodes: Sequence[BudgetView], cells: str) -> list[str]:
    """Bytes in proportion; the mark ``|`` is the limit. All bars have one scale."""
    scale = max(max(node.total_bytes, node.limit_bytes) for node in nodes)
    lines = []
    for node in nodes:
        bar = ""
        filled = 0
        for field, cell in zip(_PARTS, cells, strict=False):
            filled += getattr(node, field)
            bar += cell * (round(filled / scale * _BAR_WIDTH) - len(bar))
        limit = round(node.limit_bytes / scale * _BAR_WIDTH)
        bar = bar.ljust(limit, cells[-1])
        bar = bar[:limit] + "|" + bar[limit:]
        lines.append(f"{_short(node.name).ljust(_NAME_WIDTH)}  {bar}")
    legend = ("weights", "KV", "activation", "overhead", "free")
    keys = "  ".join(f"{cell} {title}" for cell, title in zip(cells, legend, strict=True))
    return [*lines, f"{' ' * _NAME_WIDTH}  {keys}  | limit"]


def verdict(plan: PlanView) -> str:
    """One line: fits, with the least headroom; or not, with what is missing where."""
    if plan.fits:
        tightest = min(plan.nodes, key=lambda node: node.headroom_bytes)
        where = "" if len(plan.nodes) == 1 else f" on {tightest.name}"
        return f"fits, with {format_bytes(tightest.headroom_bytes)} to spare{where}"
    return "does not fit: " + shortfalls(plan)


def shortfalls(plan: PlanView) -> str:
    """What is missing on each node that is over its limit."""
    return ", ".join(
        f"{node.name} lacks {format_bytes(-node.headroom_bytes)}"
        for node in plan.nodes
        if node.headroom_bytes < 0
    )


_ORIGINS = {
    "stored_bytes": "the checkpoint as stored: from its headers, or from the config alone",
    "weights_bytes": "held once loaded: mlx-lm's model traced from config and headers, in {dtype}",
    "kv_cache_bytes": "mlx-lm's own cache, traced: {sequences} x {context:,} tokens in {dtype}",
    "activation_bytes": "peak of prefill in chunks of {chunk} tokens, by k2's model of attention",
    "overhead_bytes": "Python and MLX, allocator slack, one layer's cache while it grows",
}


def explanation_lines(plan: PlanView) -> list[str]:
    """Where each number is from and how sure it is."""
    values = {
        "dtype": plan.request.dtype,
        "sequences": plan.request.concurrency,
        "context": plan.request.context_length,
        "chunk": plan.request.prefill_chunk_tokens,
    }
    rows = [
        (field.removesuffix("_bytes").replace("_", " "), plan.marks.get(field, ""), origin)
        for field, origin in _ORIGINS.items()
    ]
    lines = ["where the numbers are from"]
    for title, mark, origin in rows:
        lines += _wrapped(title, mark, origin.format(**values))
    mark = plan.marks.get("limit_bytes", "")
    limits = dict.fromkeys((node.name, node.limit_bytes, node.limit_source) for node in plan.nodes)
    for name, limit, source in limits:
        lines += _wrapped("limit", mark, f"{name}: {format_gib(limit)}, {source}")
    return lines


def _wrapped(title: str, mark: str, text: str) -> list[str]:
    first = f"  {title:<11} {mark:<9} "
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first))


def print_plan(plan: PlanView, *, explain: bool = False) -> None:
    """Write the report to stdout, and where its numbers are from if asked."""
    encoding = (sys.stdout.encoding or "ascii").lower().replace("-", "")
    for line in plan_lines(plan, unicode=encoding.startswith("utf")):
        print_text(line)
    if explain:
        print_text()
        for line in explanation_lines(plan):
            print_text(line)


def print_plan_hints(plan: PlanView, *, saved_as: Path | None) -> None:
    """Say on stderr which command comes next."""
    if saved_as is not None:
        note(f"next: k2 launch {shlex.quote(plan.model.reference)} --plan {saved_as}")
    elif all(node.name == "localhost" for node in plan.nodes):
        nodes = ",".join(node.name for node in plan.nodes)
        note(f"next: k2 launch {shlex.quote(plan.model.reference)} --nodes {nodes}")
