"""Markdown of the results of ``measure``: one section per machine and day."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown for results, grouped by the machine that made them."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for document in documents:
        groups.setdefault(_machine(document["machine"]), []).append(document)
    parts = []
    for machine, group in groups.items():
        rows = [*_starts(group), *_rounds(group), *_lists(group)]
        parts.append(f"**{machine}**\n\n" + "\n".join(rows))
    return "\n\n".join(parts)


def _machine(found: Mapping[str, str]) -> str:
    versions = [f"{name} {found[name]}" for name in ("mlx", "mlx-lm") if name in found]
    driver = [f"driver {found['driver']}"] if found.get("driver") else []
    return ", ".join([found["gpus"], f"{found['cores']} cores", *driver, *versions, found["date"]])


def _starts(group: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for document in group:
        context = document.get("context_bytes", 0)
        for key, value in document.items():
            if key.endswith((" cold", " warm")):
                rows.append(_start(key, value, context))
    if not rows:
        return []
    head = [
        "| program | ready, s | load, s | GB/s per rank | plan, GB | most seen less context, GB "
        "| plan / seen | CUDA context, GB | first 16 and 300 tokens, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return [*head, *rows, ""]


def _start(key: str, value: Mapping[str, Any], context: int) -> str:
    seen = _seen(value, context)
    plan = value.get("plan_bytes", [])
    share = [p / s for p, s in zip(plan, seen, strict=False) if s > 0]
    first = [value[name] for name in value if name.startswith("first_") and "token_" in name]
    cells = [
        key,
        f"{value['ready_seconds']:.1f}",
        _each(value.get("load_seconds", []), 1),
        _each([rate / 1e9 for rate in value.get("load_bytes_per_second", [])], 2),
        _each([size / 1e9 for size in plan], 1),
        _each([size / 1e9 for size in seen], 1),
        _each(share, 3),
        f"{context / 1e9:.2f}",
        _each(first, 1),
    ]
    return "| " + " | ".join(cells) + " |"


def _seen(value: Mapping[str, Any], context: int) -> list[float]:
    """Return the most memory of each rank without what was there before and the CUDA context."""
    most = value.get("most_memory_bytes", {})
    loading = value.get("most_memory_while_loading_bytes", {})
    before = value.get("memory_before_bytes", [])
    found = []
    for index, name in enumerate(sorted(most)):
        peak = max(most[name], loading.get(name, 0))
        base = before[index] if index < len(before) else 0
        found.append(peak - base - context)
    # A GPU that the program did not use shows nothing.
    return [size for size in found if size > context]


def _each(values: Sequence[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values) or "-"


def _rounds(group: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for document in group:
        for work, entry in document.get("figures", {}).items():
            names = [name for name in entry if name != "ratio"]
            cells = [
                f"{name}: {entry[name]['median']:.1f} ({entry[name]['low']:.1f} to "
                f"{entry[name]['high']:.1f})"
                for name in names
            ]
            ratio = entry.get("ratio")
            text = (
                f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
                if ratio
                else "-"
            )
            rows.append(f"| {work} | {' | '.join(cells)} | {text} | {document['rounds']} |")
    if not rows:
        return []
    head = [
        "| work | first, tok/s, median (range) | second, tok/s | ratio | rounds |",
        "| --- | --- | --- | --- | --- |",
    ]
    return [*head, *rows, ""]


def _lists(group: Sequence[Mapping[str, Any]]) -> list[str]:
    rows: list[str] = []
    for document in group:
        for stage in ("loading", "transfers", "caching"):
            for way, values in document.get(stage, {}).items():
                good = [value for value in values if "error" not in value]
                for name in good[0] if good else ():
                    if name in ("bytes", "seconds"):
                        continue  # the rate says it
                    figures = sorted(value[name] for value in good)
                    middle = figures[len(figures) // 2]
                    scale = 1e9 if name.startswith("bytes") else 1
                    rows.append(
                        f"| {stage}: {way} | {name}{' (GB)' if scale > 1 else ''} "
                        f"| {middle / scale:.2f} | {figures[0] / scale:.2f} to "
                        f"{figures[-1] / scale:.2f} |"
                    )
    if not rows:
        return []
    return ["| stage | figure | median | range |", "| --- | --- | --- | --- |", *rows, ""]
