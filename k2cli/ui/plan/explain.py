"""Origins of a plan's numbers: terms of memory and speed, and the placements compared."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from k2cli.units import GB, KB, MB, TB, format_bytes, format_duration, format_gib

if TYPE_CHECKING:
    from k2cli.planning.plan import Alternative, NodeBudget, Plan
    from k2cli.planning.speed.estimate import SpeedTerm

_WIDTH = 80

# Title, field of the node's budget or its breakdown, key in the plan's marks, origin.
_TERMS = (
    ("layers", "layer_weights_bytes", "weights_bytes",
     "decoder layers once loaded: mlx-lm's model traced from config and headers, in {dtype}"),
    ("edges", "edge_weights_bytes", "weights_bytes",
     "embedding, norm and head, if held by this node"),
    ("KV cache", "kv_cache_bytes", "kv_cache_bytes",
     "mlx-lm's own cache, traced: {sequences} x {context:,} tokens"),
    ("prefill", "prefill_activation_bytes", "prefill_activation_bytes",
     "peak while the last {chunk} tokens of a full context are computed"),
    ("decode", "decode_activation_bytes", "decode_activation_bytes",
     "peak of a decode step, with a draft or without; the larger of prefill and decode counts"),
    ("messages", "communication_bytes", "communication_bytes",
     "buffers of messages between ranks"),
    ("runtime", "runtime_bytes", "runtime_bytes",
     "Python, MLX and its kernels, tokenizer, of rank and guard"),
    ("slack", "allocator_slack_bytes", "allocator_slack_bytes",
     "what the allocator keeps beside cache and activations"),
    ("growth", "cache_growth_bytes", "cache_growth_bytes",
     "copy of a layer's cache while it grows, in addition to activations"),
    ("total", "total_bytes", "", ""),
    ("limit", "limit_bytes", "limit_bytes", "{limit}, {source}"),
    ("system", "os_reserve_bytes", "os_reserve_bytes", "memory that the limit leaves"),
    ("headroom", "headroom_bytes", "", ""),
)  # fmt: skip


def explanation_lines(plan: Plan) -> list[str]:
    """Explain memory on the tightest node, the predicted speed, and the placements compared."""
    node = min(plan.nodes, key=lambda each: each.headroom_bytes)
    lines = [f"memory on {node.place}, where the numbers are from", *_memory_lines(plan, node)]
    stored = plan.marks.get("stored_bytes", "")
    lines += _term_lines("stored", format_bytes(plan.model.stored_bytes), stored,
                         "the checkpoint's tensors, on disk or on the Hub")  # fmt: skip
    if plan.speed is not None:
        lines += ["", "speed, and what it is made of"]
        lines += _speed_lines(plan.speed.terms, plan.speed.source)
        lines += _stage_lines(plan)
    if len(plan.alternatives) > 1:
        lines += ["", "placements compared", *_alternative_lines(plan.alternatives)]
    return lines


def _memory_lines(plan: Plan, node: NodeBudget) -> list[str]:
    values = {
        "dtype": plan.request.dtype,
        "sequences": plan.request.concurrency,
        "context": plan.request.context_length,
        "chunk": plan.request.prefill_chunk_tokens,
        "limit": format_gib(node.limit_bytes),
        "source": node.limit_source or "as given",
    }
    lines = []
    for title, field, mark, origin in _TERMS:
        # Plans written by older versions have no breakdown.
        holder = node if hasattr(node, field) else node.breakdown
        if holder is not None:
            size = format_bytes(getattr(holder, field))
            lines += _term_lines(title, size, plan.marks.get(mark, ""), origin.format(**values))
    return lines


def _term_lines(title: str, size: str, mark: str, text: str) -> list[str]:
    first = f"  {title:<9}{size:>10}  {mark:<9} "
    if not text:
        return [first.rstrip()]
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first))


def _speed_lines(terms: Sequence[SpeedTerm], constants: str) -> list[str]:
    """Format each term; the source of the constants is written once, as footnote [1]."""
    lines = []
    for term in terms:
        first = f"  {term.name:<42}{_quantity(term.value, term.unit):>14}  "
        source = term.source.replace(constants, "[1]") if constants else term.source
        lines += textwrap.wrap(source, _WIDTH, initial_indent=first, subsequent_indent=" " * 6) or [
            first.rstrip()
        ]
    if not constants:
        return lines
    return lines + textwrap.wrap(
        constants, _WIDTH, initial_indent="  [1] ", subsequent_indent=" " * 6
    )


def _stage_lines(plan: Plan) -> list[str]:
    """Show how long each rank computes in the request by which placements are compared."""
    assert plan.speed is not None
    if len(plan.speed.stages) < 2:
        return []
    request = plan.request
    lines = [
        "",
        f"time of each rank for a prompt of {request.prompt_tokens:,} tokens, and for a step of "
        "its answer",
    ]
    for stage, part in zip(plan.speed.stages, plan.placement.ranks, strict=True):
        first, past_last = part.layers
        lines.append(
            f"  rank {stage.rank} on {part.node:<16}{past_last - first:>4} layers"
            f"{_quantity(stage.prefill_seconds, 's'):>12}{_quantity(stage.decode_seconds, 's'):>12}"
        )
    if plan.speed.exchange_seconds is not None:
        seconds = format_duration(plan.speed.exchange_seconds)
        many = "" if request.concurrency == 1 else f" for {request.concurrency} requests together"
        lines.append(f"  with its answer of {request.answer_tokens} tokens{many}: {seconds}")
    return lines


def _quantity(value: float, unit: str) -> str:
    """Format a figure with a fitting prefix: ``10.1 GB``, ``34.7 ms``, ``20.6 TFLOP/s``."""
    if unit == "s":
        return format_duration(value) if value >= 1 else _small_seconds(value)
    if not unit:
        return f"{value:,.0f}"
    for size, prefix in ((TB, "T"), (GB, "G"), (MB, "M"), (KB, "k")):
        if value >= size:
            return f"{value / size:.1f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _small_seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _alternative_lines(alternatives: Sequence[Alternative]) -> list[str]:
    lines = [
        f"  {'':<10}{'chunk':>6}{'headroom':>11}{'decode':>9}{'prefill':>9}   (tokens/s, expected)"
    ]
    for each in alternatives:
        lines += _alternative(each)
    return lines


def _alternative(each: Alternative) -> list[str]:
    figures = f"{'impossible':>16}" if not each.possible else (
        f"{each.prefill_chunk_tokens:>6}{format_bytes(each.headroom_bytes):>11}"
        f"{_rate(each.decode_tokens_per_second):>9}{_rate(each.prefill_tokens_per_second):>9}"
    )  # fmt: skip
    what = ("chosen: " if each.chosen else "") + each.verdict
    return [
        f"  {each.name:<10}{figures}",
        *textwrap.wrap(what, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"
