"""Make docs/design/memory-model.md, which compares the activation model with measured peaks.

    scripts/memory-model                       # write the page from the recorded measurements
    scripts/memory-model --check               # does the page say what the model says now?
    python -m benchmarks.activation_grid ...   # measure: its output belongs into benchmarks/data

Every point is a peak of ``mx.get_peak_memory`` beside weights and cache. It is compared with the
step's peak or, if that is more, the copy of one layer's growing cache, which is made before the
step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.activation_grid import modelled_decode_bytes
from k2cli.planning.memory.prefill import (
    COPIES,
    ActivationShape,
    activation_shape,
    prefill_activation,
    shape_of_model,
)
from k2cli.sharding.assemble import build
from k2cli.units import MB

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "benchmarks" / "data" / "activation"
PAGE = ROOT / "docs" / "design" / "memory-model.md"
MARK = "<!-- made by scripts/memory-model -->"
TOLERANCE = 0.10
# A plan keeps 600 MB per rank for what is not modelled, such as MLX's own buffers.
SMALL_BYTES = 50 * MB


@dataclass(frozen=True, slots=True)
class Compared:
    """One point, measured and modelled, in bytes."""

    phase: str
    chunk: int
    context: int
    rows: int
    measured_bytes: int
    modelled_bytes: int

    @property
    def ratio(self) -> float:
        """Modelled / measured: above 1, the plan asks for more than is needed."""
        return self.modelled_bytes / self.measured_bytes


def recordings() -> list[dict[str, Any]]:
    """Every recorded grid, by file name."""
    return [json.loads(path.read_text()) for path in sorted(DATA.glob("*.json"))]


def _shape(recording: dict[str, Any]) -> ActivationShape:
    """Return the shape of a recorded model; a recurrent one is built lazily, to find its layers."""
    if not recording.get("recurrent"):
        return activation_shape(recording["config"])
    return shape_of_model(recording["config"], build(recording["config"]))


def compared(recording: dict[str, Any]) -> Iterator[Compared]:
    """The points of one grid beside what the model says of them."""
    shape = _shape(recording)
    for point in recording["points"]:
        common: dict[str, Any] = {
            "device": recording["backend"],
            "context_length": point["context"],
            "concurrency": point["rows"],
            "itemsize": recording["itemsize"],
        }
        prefill = point["phase"] == "prefill"
        if prefill:
            step = prefill_activation(
                shape, chunk_tokens=point["chunk"], samples=False, **common
            ).peak_bytes
        else:
            step = modelled_decode_bytes(
                shape, recording["backend"], point["context"], point["rows"],
                recording["itemsize"], recording["layers"],
            )  # fmt: skip
        modelled = max(step, point["growth_bytes"])
        yield Compared(
            point["phase"],
            point["chunk"],
            point["context"],
            point["rows"],
            point["peak_bytes"],
            modelled,
        )


def share_within(points: Sequence[Compared], small_bytes: int = 0) -> float:
    """The share of points that are modelled to ``TOLERANCE``, or to so many bytes."""
    near = [
        point
        for point in points
        if abs(point.ratio - 1) <= TOLERANCE
        or abs(point.modelled_bytes - point.measured_bytes) <= small_bytes
    ]
    return len(near) / len(points)


def _summary_row(recording: dict[str, Any], phase: str, points: list[Compared]) -> str:
    ratios = [point.ratio for point in points]
    return (
        f"| {recording['backend']} | {recording['label']} | {phase} | {len(points)} "
        f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} "
        f"| {share_within(points):.0%} | {share_within(points, SMALL_BYTES):.0%} |"
    )


def _point_row(recording: dict[str, Any], point: Compared) -> str:
    return (
        f"| {recording['backend']} | {recording['label']} | {point.phase} | {point.chunk} "
        f"| {point.context} | {point.rows} | {point.measured_bytes / 1e6:,.1f} "
        f"| {point.modelled_bytes / 1e6:,.1f} | {point.ratio:.2f} |"
    )


def _copies_rows() -> Iterator[str]:
    for kind, backends in COPIES.items():
        for backend, copies in backends.items():
            numbers = " | ".join(
                f"{getattr(copies, name):g}"
                for name in (
                    "scores", "expanded", "latent", "hidden", "inner", "expert_hidden",
                    "expert_inner",
                )
            )  # fmt: skip
            yield f"| {kind} | {backend} | {numbers} |"


def tables() -> str:
    """Everything below the mark of the page."""
    summary, points = [], []
    for recording in recordings():
        found = list(compared(recording))
        for phase in ("prefill", "decode"):
            if chosen := [point for point in found if point.phase == phase]:
                summary.append(_summary_row(recording, phase, chosen))
        points += [_point_row(recording, point) for point in found]
    return "\n".join(
        [
            MARK,
            "",
            "## Copies of each array at the peak of prefill",
            "",
            "| attention | device | scores | expanded | latent per head | hidden | inner "
            "| expert hidden | expert inner |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            *_copies_rows(),
            "",
            "## Modelled against measured",
            "",
            "Ratio is modelled / measured.",
            "",
            "| device | model | phase | points | median | range | within 10 % | or 50 MB |",
            "| --- | --- | --- | ---: | ---: | --- | ---: | ---: |",
            *summary,
            "",
            "## Every point",
            "",
            "| device | model | phase | chunk | context | rows | measured, MB | modelled, MB "
            "| ratio |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
            *points,
            "",
        ]
    )


def page() -> str:
    """The whole page: what people wrote above the mark, and the tables."""
    return PAGE.read_text().split(MARK)[0] + tables()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or say whether it is what would be written."""
    parser = argparse.ArgumentParser(prog="scripts/memory-model", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it differs")
    given = parser.parse_args(arguments)
    text = page()
    if given.check:
        return int(PAGE.read_text() != text)
    PAGE.write_text(text)
    sys.stderr.write(f"wrote {PAGE.relative_to(ROOT)}\n")
    return 0
