"""Text report of a plan: a table of nodes, a bar per node, speed, and a verdict.

The report fits 80 columns, on a terminal and in a pipe. All functions return lines of plain text,
except those named ``print_``.
"""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from k2cli.ui.gpus import gpu_text
from k2cli.ui.output import note, print_line, print_styled
from k2cli.ui.plan.bars import bar_lines, name_width, row_names, short_name
from k2cli.ui.plan.explain import explanation_lines
from k2cli.units import GB, MB, format_bytes, format_duration, one_line

if TYPE_CHECKING:
    from k2cli.planning.plan import Advice, Plan
    from k2cli.planning.speed.estimate import Band

_COLUMNS = (
    ("weights", "weights_bytes"),
    ("KV", "kv_cache_bytes"),
    ("activation", "activation_bytes"),
    ("overhead", "overhead_bytes"),
    ("total", "total_bytes"),
    ("limit", "limit_bytes"),
    ("headroom", "headroom_bytes"),
)
_WIDTH = 80
_CLOSE_SHARE = 0.02
_LAUNCH_OPTIONS = (
    "--parallel",
    "--backend",
    "--context",
    "--concurrency",
    "--dtype",
    "--head",
    "--prompt-tokens",
    "--answer-tokens",
    "--kv-bits",
)
"""Options of ``plan-memory`` that a launch has too."""
"""Share of the limit; with less headroom than this, an error in an assumed limit matters."""


def plan_lines(plan: Plan, *, unicode: bool = True) -> list[str]:
    """Format the report without speed and advice: headline, table, bars, verdict."""
    bars = (line.plain for line in bar_lines(plan.nodes, unicode=unicode))
    return [*headline(plan), "", *_table(plan), "", *bars, "", verdict(plan)]


def _kv_bits(bits: int) -> str:
    return f" and a KV cache of {bits} bits" if bits else ""


def _blocks(tokens: int) -> str:
    return f", attention in blocks of {tokens}" if tokens else ""


def headline(plan: Plan) -> list[str]:
    """Describe model, request and placement; the first line is the model's name."""
    model, request = plan.model, plan.request
    lines = [
        f"{_count(model.parameters)} parameters, {format_bytes(model.stored_bytes)} stored, "
        f"quantization: {model.quantization}",
        f"{_sequences(request.concurrency)} of {request.context_length:,} tokens in "
        f"{request.dtype}{_kv_bits(request.kv_bits)}, "
        f"prefill in chunks of {request.prefill_chunk_tokens}"
        f"{_blocks(request.attention_block_tokens)}",
        _placement_text(plan),
        gpu_text((node.name, node) for node in plan.nodes),
    ]
    wrapped = (textwrap.wrap(line, _WIDTH, subsequent_indent="  ") for line in lines if line)
    return [one_line(model.reference), *(line for part in wrapped for line in part)]


def _placement_text(plan: Plan) -> str:
    placement = plan.placement
    if placement.strategy == "single":
        return f"single: all {placement.layer_count} layers on {plan.nodes[0].place}"
    if placement.strategy == "tensor":
        what = "layers and the head" if placement.head == "sharded" else "layers"
        how = f"a slice of all {placement.layer_count} {what} on each of {placement.size} ranks"
    else:
        names = [node.place for node in plan.nodes]
        unique = len(set(names)) == len(names)
        how = ", ".join(
            f"layers {part.layers[0]}-{part.layers[1] - 1} on "
            + (names[part.rank] if unique else f"rank {part.rank}")
            for part in reversed(placement.ranks)
        )
    why = f"; {plan.reason}" if plan.reason else ""
    return f"{placement.strategy}: {how}{why}"


def _count(parameters: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= size:
            return f"{parameters / size:,.1f} {unit}"
    return str(parameters)


def _table(plan: Plan) -> list[str]:
    """Format a row per node, and a last row with the certainty of each column."""
    nodes = plan.nodes
    # In GB, a small model's table would show only zeros.
    largest = max(node.total_bytes for node in nodes)
    unit, name = (GB, "GB") if largest >= 10 * GB else (MB, "MB")
    rows = [
        [short_name(row, name_width(nodes))]
        + [f"{getattr(node, field) / unit:.1f}" for _, field in _COLUMNS]
        for node, row in zip(nodes, row_names(nodes), strict=True)
    ]
    header = [f"node ({name})", *(title for title, _ in _COLUMNS)]
    marks = ["", *(plan.marks.get(field, "") for _, field in _COLUMNS)]
    if any(marks):
        rows.append(marks)
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= _WIDTH else " "
    return [
        gap.join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


def _sequences(count: int) -> str:
    return "1 sequence" if count == 1 else f"{count} sequences"


def verdict(plan: Plan) -> str:
    """Summarize in one line: the smallest headroom if the plan fits, else the shortfalls."""
    if plan.fits:
        tightest = min(plan.nodes, key=lambda node: node.headroom_bytes)
        where = "" if len(plan.nodes) == 1 else f" on {tightest.place}"
        return f"fits, with {format_bytes(tightest.headroom_bytes)} to spare{where}"
    return "does not fit: " + shortfalls(plan)


def caution_lines(plan: Plan) -> list[str]:
    """Warn if the plan fits only narrowly under a limit that is not exactly known."""
    tightest = min(plan.nodes, key=lambda node: node.headroom_bytes / max(node.limit_bytes, 1))
    close = 0 <= tightest.headroom_bytes < _CLOSE_SHARE * tightest.limit_bytes
    if not close or plan.marks.get("limit_bytes") == "exact":
        return []
    return textwrap.wrap(
        f"that is little, and the limit is {plan.marks.get('limit_bytes', 'assumed')}: check it on "
        "such a machine before you rely on it",
        _WIDTH,
    )


def shortfalls(plan: Plan) -> str:
    """List the missing bytes of nodes over their limits; of more than two, only the worst."""
    over = sorted(
        (node for node in plan.nodes if node.headroom_bytes < 0),
        key=lambda node: node.headroom_bytes,
    )
    named = over if len(over) <= 2 else over[:1]
    lacking = [f"{node.place} lacks {format_bytes(-node.headroom_bytes)}" for node in named]
    others = len(over) - len(named)
    return ", ".join(lacking) + (f", {others} others lack less" if others else "")


def speed_lines(plan: Plan) -> list[str]:
    """Format the predicted speeds, and the largest context and concurrency that would fit.

    A plan that does not fit has neither, so nothing is returned for it.
    """
    lines = []
    if plan.fits and plan.speed is not None:
        speed, request = plan.speed, plan.request
        lines += [
            f"{'predicted':<16}{'low':>12}{'expected':>12}{'high':>12}",
            _rate("decode", speed.decode_tokens_per_second, "tokens/s, one sequence"),
        ]
        if request.concurrency > 1:
            what = f"tokens/s, all {request.concurrency}"
            lines.append(_rate("  together", speed.aggregate_decode_tokens_per_second, what))
        lines += [
            _rate("prefill", speed.prefill_tokens_per_second, "tokens/s"),
            _row("first token", map(format_duration, _figures(speed.time_to_first_token_seconds)),
                 f"after {request.context_length:,} tokens"),
        ]  # fmt: skip
        lines += _message_lines(plan)
    elif plan.fits and plan.speed_note:
        lines += textwrap.wrap(f"no speed predicted: {plan.speed_note}", _WIDTH)
    return [*lines, *_limit_lines(plan), *_alone_lines(plan)]


def _message_lines(plan: Plan) -> list[str]:
    """State the assumed latency of a message between nodes, which only measuring can tell."""
    assert plan.speed is not None
    found = [term for term in plan.speed.terms if term.name == "seconds per message"]
    if plan.placement.size == 1 or not found:
        return []
    return [
        f"taking {found[0].value * 1e6:,.0f} us per message between nodes (--collective-latency)"
    ]


def _figures(band: Band) -> tuple[float, float, float]:
    return band.low, band.expected, band.high


def _rate(title: str, band: Band, unit: str) -> str:
    return _row(title, (rate_text(value) for value in _figures(band)), unit)


def _row(title: str, cells: Iterable[str], unit: str) -> str:
    return f"{title:<16}" + "".join(f"{cell:>12}" for cell in cells) + f"  {unit}"


def rate_text(value: float) -> str:
    """Format tokens per second: ``9.04``, ``24.1``, ``1,240``."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _alone_lines(plan: Plan) -> list[str]:
    """State that a single machine would be enough, if the planner found one."""
    for each in plan.alternatives:
        if each.name == "single" and not each.chosen:
            rate = each.decode_tokens_per_second
            speed = "" if rate is None else f", decode {rate_text(rate)} tokens/s"
            return [f"it also {each.verdict}{speed}"]
    return []


def _limit_lines(plan: Plan) -> list[str]:
    request = plan.request
    if not plan.fits or not plan.max_context_length:
        return []  # plans written by older versions have no limits
    sequences = _sequences(request.concurrency)
    own = plan.max_context_length == plan.model.context_length
    context = f"{plan.max_context_length:,} tokens of context" + (", the model's most," * own)
    return [
        f"room for up to {context} with {sequences},",
        f"or up to {plan.max_concurrency:,} sequences of {request.context_length:,} tokens, "
        "in smaller chunks if need be",
    ]


def advice_lines(plan: Plan, command: Mapping[str, str]) -> list[str]:
    """List changes that would make the plan fit, each with the command that plans it.

    Args:
        command: options of the command given; each advice replaces some of them.
    """
    if plan.fits:
        return []
    if not plan.advice:
        return ["nothing that k2 can change makes it fit there; machines that hold it:",
                *plan_command(plan.model.reference, _shop_options(command))]  # fmt: skip
    lines = ["what would make it fit (each planned):"]
    for advice in plan.advice:
        lines += _one_advice(plan.model.reference, advice, command)
    return lines


def _one_advice(model: str, advice: Advice, command: Mapping[str, str]) -> list[str]:
    gains = [f"{format_bytes(advice.headroom_bytes)} to spare"]
    if advice.decode_tokens_per_second is not None:
        gains.append(f"decode {rate_text(advice.decode_tokens_per_second)} tokens/s")
    text = f"{advice.change}: {', '.join(gains)}"
    lines = textwrap.wrap(text, _WIDTH, initial_indent="- ", subsequent_indent="  ")
    if advice.command:
        lines.append(f"    {advice.command}")
    if advice.options:
        # --hardware names machines of the catalog and replaces --cluster.
        kept = {k: v for k, v in command.items()
                if k != "--cluster" or "--hardware" not in advice.options}  # fmt: skip
        lines += plan_command(model, {**kept, **advice.options})
    return lines


def _shop_options(command: Mapping[str, str]) -> dict[str, str]:
    """Keep the options of the request, drop those that name machines, and add ``--shop``."""
    kept = ("--context", "--concurrency", "--quantize")
    return {name: command[name] for name in kept if name in command} | {"--shop": ""}


def plan_command(model: str, options: Mapping[str, str]) -> list[str]:
    """Format a ``k2 plan-memory`` command to copy, indented, and wrapped if it is long."""
    lines = [f"    k2 plan-memory {shlex.quote(model)}"]
    for name, value in options.items():
        option = f"{name} {shlex.quote(value)}" if value else name
        if len(lines[-1]) + len(option) + 3 > _WIDTH:
            lines[-1] += " \\"
            lines.append(f"      {option}")
        else:
            lines[-1] += f" {option}"
    return lines


def print_plan(plan: Plan, *, command: Mapping[str, str], explain: bool = False) -> None:
    """Print the report to stdout; ``explain`` adds the origins of its numbers."""
    _print_block([*headline(plan), "", *_table(plan), ""])
    for line in bar_lines(plan.nodes, unicode=can_print_unicode()):
        print_styled(line)
    said = [*textwrap.wrap(verdict(plan), _WIDTH), *caution_lines(plan)]
    blocks = [speed_lines(plan), said, advice_lines(plan, command)]
    if explain:
        blocks.append(explanation_lines(plan))
    for block in blocks:
        if block:
            _print_block(["", *block])


def can_print_unicode() -> bool:
    """Return True if stdout is encoded in UTF-8 or another UTF."""
    encoding = (sys.stdout.encoding or "ascii").lower().replace("-", "")
    return encoding.startswith("utf")


def _print_block(lines: Sequence[str]) -> None:
    for line in lines:
        print_line(line)


def print_plan_hints(
    plan: Plan, *, saved_as: Path | None, command: Mapping[str, str], first: str = ""
) -> None:
    """Print the next command on stderr.

    Args:
        plan: the plan that was made.
        saved_as: its file, if it was saved.
        command: the options that were given; a launch needs the same to carry out this plan.
        first: a command that must run before a launch.
    """
    if first:
        note(f"next: {first}")
    elif saved_as is not None:
        name = shlex.quote(plan.model.reference)
        note(one_line(f"next: k2 launch {name} --plan {saved_as}"))
    elif all(node.name == "localhost" for node in plan.nodes):
        words = ["k2", "launch", plan.model.reference]
        words += ["--nodes", ",".join(node.name for node in plan.nodes)]
        for option in _LAUNCH_OPTIONS:
            if option in command:
                words += [option, command[option]]
        note(one_line(f"next: {shlex.join(words)}"))
