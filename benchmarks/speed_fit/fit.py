"""Least squares on the logarithms of published speeds, with priors, little moved by outliers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from benchmarks.speed_fit.model import ENGINE_OF, ENGINES, PRIORS, Constants, errors
from benchmarks.speed_fit.rows import Observation

ROW_SPREAD = 0.12
"""Difference between two good measurements of the same thing, as a logarithm."""
OUTLIER = 2.0
"""Errors beyond so many spreads pull with constant force (Huber)."""
_MOST_ROUNDS = 30
_SMALL = 1e-4
_STEP = 1e-4
_DIGITS = 3


def fit(rows: Sequence[Observation]) -> dict[str, float]:
    """The most likely constants, three digits each. Engines have none in common."""
    constants: dict[str, float] = {}
    for engine in ENGINES:
        names = [name for name in PRIORS if ENGINE_OF[name] == engine]
        constants |= _fit_engine(tuple(row for row in rows if row.engine == engine), tuple(names))
    return {name: constants[name] for name in PRIORS}


# A fit without one source is another one for that source's engine alone.
@functools.cache
def _fit_engine(rows: tuple[Observation, ...], names: tuple[str, ...]) -> dict[str, float]:
    """Gauss-Newton in the logarithms of the constants, reweighted in every round."""
    centre = np.array([math.log(PRIORS[name].value) for name in names])
    spread = np.array([PRIORS[name].spread for name in names])
    at = centre.copy()
    for _ in range(_MOST_ROUNDS):
        error = np.array(errors(rows, _constants(names, at)))
        slopes = np.empty((len(rows), len(names)))
        for index in range(len(names)):
            moved = at.copy()
            moved[index] += _STEP
            slopes[:, index] = (np.array(errors(rows, _constants(names, moved))) - error) / _STEP
        size = np.abs(error) / ROW_SPREAD
        weight = np.minimum(1.0, OUTLIER / np.maximum(size, 1e-9)) / ROW_SPREAD**2
        normal = slopes.T @ (slopes * weight[:, None]) + np.diag(1 / spread**2)
        pull = slopes.T @ (weight * error) + (at - centre) / spread**2
        change = np.clip(np.linalg.solve(normal, pull), -0.5, 0.5)
        at = at - change
        if float(np.max(np.abs(change))) < _SMALL:
            break
    return {name: _rounded(value) for name, value in _constants(names, at).items()}


def _constants(names: Sequence[str], logarithms: np.ndarray) -> Constants:
    return {name: math.exp(value) for name, value in zip(names, logarithms, strict=True)}


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS - 1}e}")
