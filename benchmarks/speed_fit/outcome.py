"""A complete fit: constants from one half of the rows, and predictions of the other half."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from benchmarks.speed_fit.cuda import CudaOutcome, run_cuda_fit
from benchmarks.speed_fit.evaluate import Prediction, Spreads, by_fold, predict, spreads_of
from benchmarks.speed_fit.fit import fit
from benchmarks.speed_fit.rows import FOLDER, Unusable, read_rows, split_rows

_DATA = ("measurements.csv", "models.toml", "cuda.toml")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a fit; ``folds`` and ``sources`` predict each row without its fold or source.

    ``cuda`` is the fit for GPUs of NVIDIA, which has figures of its own.
    """

    constants: dict[str, float]
    spreads: Spreads
    fitted: list[Prediction]
    held_out: list[Prediction]
    folds: list[Prediction]
    sources: list[Prediction]
    unusable: list[Unusable]
    digest: str
    cuda: CudaOutcome


def run_fit() -> Outcome:
    """Run the fit and its checks; takes some seconds."""
    rows, unusable = read_rows()
    fitted, held_out = split_rows(rows)
    constants = fit(fitted)
    spreads = spreads_of(fitted)
    return Outcome(
        constants=constants,
        spreads=spreads,
        fitted=predict(fitted, constants, spreads),
        held_out=predict(held_out, constants, spreads),
        folds=by_fold(rows, spreads, by_source=False),
        sources=by_fold(rows, spreads, by_source=True),
        unusable=list(unusable),
        digest=_digest(),
        cuda=run_cuda_fit(),
    )


def _digest() -> str:
    """Return the digest of the files with rows and models."""
    data = b"".join((FOLDER / name).read_bytes() for name in _DATA)
    return hashlib.sha256(data).hexdigest()[:16]
