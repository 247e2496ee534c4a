"""Markdown table of a benchmark, and text summary of a calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BenchLine:
    """One line of the table; a figure is a mean and its deviation, None if it has none."""

    model: str
    placement: str
    test: str
    tokens_per_second: tuple[float, float | None]
    first_token_seconds: tuple[float, float | None]


def _figure(value: tuple[float, float | None], scale: float, digits: int) -> str:
    mean, deviation = value
    text = f"{mean * scale:.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation * scale:.{digits}f}"


def bench_markdown(lines: Sequence[BenchLine]) -> str:
    """Format the table, with figures aligned to the right."""
    header = ("model", "placement", "test", "t/s", "ttft (ms)")
    cells = [
        (
            line.model,
            line.placement,
            line.test,
            _figure(line.tokens_per_second, 1, 2),
            _figure(line.first_token_seconds, 1000, 1),
        )
        for line in lines
    ]
    widths = [max(len(row[column]) for row in (header, *cells)) for column in range(len(header))]
    left = 2  # columns of text: model and placement

    def row(texts: Sequence[str]) -> str:
        padded = [
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(texts, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rules = [
        "-" * width if column < left else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]
    return "\n".join([row(header), row(rules), *(row(texts) for texts in cells)])


def calibration_lines(members: Mapping[str, Any]) -> list[str]:
    """Summarize a calibration from its JSON members: rates, model error, and noise."""
    rates, spread = members["rates"], members["spread"]
    within = {name: f"(+- {share:.0%})" for name, share in spread.items()}
    lines = [
        f"reads {rates['read_bytes_per_second'] / 1e9:.3g} GB/s {within['read_bytes_per_second']}, "
        f"computes {rates['dense_flops_per_second'] / 1e12:.3g} TFLOP/s "
        f"{within['dense_flops_per_second']}, {rates['dense_layer_seconds'] * 1e6:.0f} us "
        f"{within['dense_layer_seconds']} per layer in addition"
    ]
    if members["collective_seconds"] is not None:
        seconds = members["collective_seconds"]
        lines.append(f"{seconds * 1e6:.0f} us {within['collective_seconds']} per message of ranks")
    worst = max(abs(figure["model_error"]) for figure in members["figures"])
    lines.append(f"with these the model is at most {worst:.0%} off what was measured")
    if members["noisy"]:
        lines.append(
            f"the machines were busy: repetitions of {', '.join(members['noisy'])} differ by "
            f"{members['deviation']:.0%}; predictions are as much less certain. Calibrate again "
            "when the machines are idle"
        )
    elif members["deviation"]:
        lines.append(f"repetitions differ by {members['deviation']:.1%}: the machines were quiet")
    else:
        lines.append("too few repetitions to tell how quiet the machines were")
    lines.append(f"saved in {members['file']}; k2 plan-memory uses it for these machines")
    return lines
