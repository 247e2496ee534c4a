"""How fast a placement will be: tokens per second as a band, with the terms that it is made of.

Pure arithmetic over the traced work of the model (``work.py``), the machines' published figures
and constants that were fitted to public measurements (docs/speed-model.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from k2cli.planning.hardware import NodeMemory
from k2cli.planning.work import ModelWork
from k2cli.sharding.placement import Placement


@dataclass(frozen=True, slots=True)
class Band:
    """A figure that is not known exactly; ``low <= expected <= high``, all in the same unit."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True, slots=True)
class SpeedTerm:
    """One part of a prediction, for people: ``value`` in ``unit``, and where it comes from."""

    name: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True, slots=True)
class SpeedEstimate:
    """Predicted speed of one placement at one context.

    ``decode_tokens_per_second`` is that of one request alone; the aggregate is of all
    ``concurrency`` requests together. Prefill and time to first token are of one request alone,
    its prompt not cached.
    """

    decode_tokens_per_second: Band
    prefill_tokens_per_second: Band
    time_to_first_token_seconds: Band
    aggregate_decode_tokens_per_second: Band
    terms: tuple[SpeedTerm, ...]


@dataclass(frozen=True, slots=True)
class SpeedConstants:
    """What was fitted, or measured on the owner's machines."""

    source: str


def speed_obstacle(nodes: Sequence[NodeMemory]) -> str | None:
    """Why no speed can be predicted for these machines, or None."""
    for node in nodes:
        if node.bandwidth_bytes_per_second is None:
            return f"the memory bandwidth of {node.name} is not known"
        if node.gpu_flops_per_second is None:
            return f"the speed of the GPU of {node.name} is not known"
    return "no constants have been fitted yet"


def predict_speed(
    work: ModelWork,
    placement: Placement,
    nodes: Sequence[NodeMemory],
    *,
    backend: str,
    context_length: int,
    concurrency: int = 1,
    prompt_tokens: int | None = None,
    chunk_tokens: int = 512,
    collective_seconds: float | None = None,
    constants: SpeedConstants | None = None,
) -> SpeedEstimate | None:
    """Predict the speed of a placement; None if ``speed_obstacle`` knows why that is impossible.

    Args:
        work: from ``work.model_work(subject.config, ...)``, cut into as many slices as a tensor
            placement has ranks, else uncut. Tracing it costs a few tenths of a second; this
            function is arithmetic and can be called for many contexts and splits.
        nodes: one per rank, rank 0 first.
        backend: what connects the ranks: ``local``, ``mpi``, ``ring``, ``jaccl`` or ``auto``.
        context_length: tokens that are in the cache when a token is generated.
        prompt_tokens: length of the prompt; ``context_length`` if None.
        chunk_tokens: tokens of the prompt per prefill step.
        collective_seconds: seconds of one small collective between the ranks; a default by back
            end if None, and then the band covers what has been published for it.
        constants: fitted ones of the package if None, or calibrated ones.
    """
    return None  # until the fit is in: speed_obstacle says so
