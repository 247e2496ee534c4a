"""Least squares on the logarithms of published speeds, with priors, little moved by outliers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from benchmarks.speed_fit.model import ENGINE_OF, ENGINES, PRIORS, Constants, errors, uses
from benchmarks.speed_fit.rows import Observation

ROW_SPREAD = 0.12
"""Difference between two good measurements of the same thing, as a logarithm."""
OUTLIER = 2.0
"""Errors beyond so many spreads pull with constant force (Huber)."""
_MOST_STEPS = 30
_MOST_ROUNDS = 200
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
    """Gauss-Newton in the logarithms of the constants; each step weighs the outliers anew.

    The predictions, which take nearly all of the time, are computed once per step and constant.
    """
    centre = np.array([math.log(PRIORS[name].value) for name in names])
    spread = np.array([PRIORS[name].spread for name in names])

    def cost(error: np.ndarray, at: np.ndarray) -> float:
        size = np.abs(error) / ROW_SPREAD
        huber = np.where(size <= OUTLIER, size**2, 2 * OUTLIER * size - OUTLIER**2)
        return float(np.sum(huber) + np.sum(((at - centre) / spread) ** 2))

    at = centre.copy()
    error = np.array(errors(rows, _constants(names, at)))
    for _ in range(_MOST_STEPS):
        slopes = np.zeros((len(rows), len(names)))
        for index, name in enumerate(names):
            moved = at.copy()
            moved[index] += _STEP
            used = [number for number, row in enumerate(rows) if uses(row, name)]
            then = np.array(errors([rows[number] for number in used], _constants(names, moved)))
            slopes[used, index] = (then - error[used]) / _STEP
        change = np.clip(_change(error, slopes, (at - centre) / spread, spread), -0.5, 0.5)
        # The slowest of several ranks is another one beyond a point: there a step is too long.
        while float(np.max(np.abs(change))) >= _SMALL:
            then = np.array(errors(rows, _constants(names, at + change)))
            if cost(then, at + change) < cost(error, at):
                break
            change /= 2
        else:
            break
        at, error = at + change, then
    return {name: _rounded(value) for name, value in _constants(names, at).items()}


def _change(
    error: np.ndarray, slopes: np.ndarray, beside: np.ndarray, spread: np.ndarray
) -> np.ndarray:
    """Solve the problem in which errors are linear, reweighting until the change stays the same.

    Args:
        error: error of each row, as a logarithm.
        slopes: their derivatives by the logarithms of the constants: rows by constants.
        beside: distance of each constant from its prior, in spreads of the prior.
        spread: spread of each prior.
    """
    change = np.zeros(len(spread))
    for _ in range(_MOST_ROUNDS):
        size = np.abs(error + slopes @ change) / ROW_SPREAD
        weight = np.minimum(1.0, OUTLIER / np.maximum(size, 1e-9)) / ROW_SPREAD**2
        normal = slopes.T @ (slopes * weight[:, None]) + np.diag(1 / spread**2)
        pull = slopes.T @ (weight * error) + beside / spread
        before, change = change, -np.linalg.solve(normal, pull)
        if float(np.max(np.abs(change - before))) < _SMALL / 100:
            break
    return change


def _constants(names: Sequence[str], logarithms: np.ndarray) -> Constants:
    return {name: math.exp(value) for name, value in zip(names, logarithms, strict=True)}


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS - 1}e}")
