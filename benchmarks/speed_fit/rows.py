"""Published measurements as cases that the speed model can predict.

``measurements.csv`` holds figures as their sources published them, with what each is of; where a
row cannot be used, why not. ``models.toml`` says what the models are.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import math
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.even_split import even_split
from k2cli.planning.hardware.chips import chips
from k2cli.planning.hardware.machine import NodeRates
from k2cli.planning.speed.constants import LinkRates
from k2cli.planning.speed.placement_time import PlacementTime
from k2cli.planning.speed.work import LayerWork, ModelWork, model_work
from k2cli.sharding.placement import Placement, RankPlacement

FOLDER = Path(__file__).parent
ASSUMED_CONTEXT_TOKENS = 512
"""Context of a decode whose source names none: that of short chats and benchmarks."""
CHUNK_TOKENS = {"mlx": 2048, "llama.cpp": 512}
"""Defaults of mlx-lm (prefill_step_size) and llama.cpp (ubatch)."""
FIRST_ADDED_ROW = "M200"
"""The first row that was added after the first fit: decode after long contexts, 2026-11-29."""
LEAST_PROMPT_TOKENS = 128
"""A shorter prompt measures how a program starts, not how fast it prefills."""

Quantity = Literal["decode", "prefill"]
QUANTITIES: tuple[Quantity, ...] = ("decode", "prefill")


@dataclass(frozen=True, slots=True)
class Observation:
    """One published figure, in tokens per second, and what it was measured on.

    ``value`` of several requests at a time is all of theirs together.
    """

    row: str
    source: str
    published_model: str
    quantity: Quantity
    value: float
    engine: str
    backend: str
    run: PlacementTime
    peak_bytes_per_second: int
    peak_flops_per_second: int
    two_dies: bool
    context_length: int
    prompt_tokens: int
    concurrency: int
    assumed: str
    where: str

    @property
    def stratum(self) -> tuple[str, str, bool]:
        """Kinds of figure that are each split alike: engine, quantity, several machines or one."""
        return self.engine, self.quantity, self.run.placement.size > 1


@dataclass(frozen=True, slots=True)
class Unusable:
    """A figure, or a whole row, that the model is not fitted to nor compared with."""

    row: str
    source: str
    published_model: str
    reason: str


@functools.cache
def read_rows() -> tuple[tuple[Observation, ...], tuple[Unusable, ...]]:
    """Read the usable figures, and the others with reasons; models are planned for it."""
    with (FOLDER / "measurements.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    usable: list[Observation] = []
    unusable: list[Unusable] = []
    for row in rows:
        named = (row["id"], row["source"], row["published_model"])
        if row["unusable"]:
            unusable.append(Unusable(*named, row["unusable"]))
            continue
        prompt = int(row["prompt_tokens"] or 0)
        if row["decode_tokens_per_second"]:
            usable.append(_observation(row, "decode", prompt))
        if row["prefill_tokens_per_second"] and prompt >= LEAST_PROMPT_TOKENS:
            usable.append(_observation(row, "prefill", prompt))
        elif row["prefill_tokens_per_second"]:
            reason = f"prefill of {prompt} tokens: too short (its decode figure is used)"
            unusable.append(Unusable(*named, reason))
    return tuple(usable), tuple(unusable)


def _observation(row: dict[str, str], quantity: Quantity, prompt: int) -> Observation:
    chip = chips()[row["chip"]]
    cores = int(row["gpu_cores"])
    flops = chip.flops_per_second(cores)
    assert flops is not None
    ranks = int(row["nodes"])
    slices = ranks if row["strategy"] == "tensor" else 1
    work = measured_work(row["model"], row["format"], slices)
    generated = int(row["generated_tokens"] or 0)
    context = prompt + generated // 2 if row["prompt_tokens"] else ASSUMED_CONTEXT_TOKENS
    machines = f"{ranks}x " if ranks > 1 else ""
    return Observation(
        row=row["id"],
        source=row["source"],
        published_model=row["published_model"],
        quantity=quantity,
        value=float(row[f"{quantity}_tokens_per_second"]),
        engine=row["engine"],
        backend=row["backend"],
        run=_run(work, row["strategy"], ranks),
        peak_bytes_per_second=chip.bandwidth_bytes_per_second(cores),
        peak_flops_per_second=flops,
        two_dies=row["chip"].endswith("-ultra"),
        context_length=context,
        prompt_tokens=prompt,
        concurrency=int(row["concurrency"]),
        assumed=row["assumed"],
        where=f"{machines}{chip.name}, {row['engine']}, {row['strategy']}",
    )


_NO_RATES = NodeRates(*[math.nan] * 6)
_NO_LINK = LinkRates(*[math.nan] * 4)


def _run(work: ModelWork, strategy: Any, ranks: int) -> PlacementTime:
    """The placement; rates and link are those of the constants that are tried."""
    layers = len(work.layers)
    ranges = even_split(layers, ranks) if strategy == "pipeline" else [(0, layers)] * ranks
    parts = tuple(RankPlacement(rank, f"n{rank}", ranges[rank]) for rank in range(ranks))
    names = tuple(part.node for part in parts)
    return PlacementTime(work, Placement(strategy, parts), names, (_NO_RATES,) * ranks, _NO_LINK)


@functools.cache
def _models() -> dict[str, Any]:
    return tomllib.loads((FOLDER / "models.toml").read_text(encoding="utf-8"))


@functools.cache
def _traced(model: str, slices: int) -> ModelWork:
    config = {
        "torch_dtype": "bfloat16",
        "rope_scaling": None,
        **_models()["models"][model]["config"],
    }
    return model_work(config, slices=slices)


@functools.cache
def measured_work(model: str, format_name: str, slices: int) -> ModelWork:
    """The traced work of a model in 16 bits, with its bytes as those of a format."""
    bits = _models()["formats"][format_name]
    work = _traced(model, slices)

    def held(layer: LayerWork) -> LayerWork:
        return replace(
            layer,
            dense_bytes=round(layer.dense_bytes * bits["rest"] / 16),
            expert_bytes=round(layer.expert_bytes * bits["experts"] / 16),
        )

    return replace(work, layers=tuple(map(held, work.layers)), head=held(work.head))


def split_rows(observations: list[Observation]) -> tuple[list[Observation], list[Observation]]:
    """Split rows into those to fit and those held out: every second row of each stratum.

    The rule was fixed before any fit: rows of a stratum in the order of the SHA-256 of their id;
    the first, third, fifth... are fitted to. Both figures of a row may so fall on different sides,
    as they are in different strata. Rows that were added later come after the others, so that they
    change nothing about these.
    """

    def place(one: Observation) -> tuple[bool, str]:
        return one.row >= FIRST_ADDED_ROW, hashlib.sha256(one.row.encode()).hexdigest()

    ordered = sorted(observations, key=place)
    fitted: list[Observation] = []
    held_out: list[Observation] = []
    seen: dict[tuple[str, str, bool], int] = {}
    for one in ordered:
        number = seen.get(one.stratum, 0)
        seen[one.stratum] = number + 1
        (fitted if number % 2 == 0 else held_out).append(one)
    return fitted, held_out
