"""Slow change over a long conversation: where a series of readings leaves its own beginning, or those of others."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personasteer.errors import ArgumentError

SLACK = 0.5  # of a CUSUM chart, in standard deviations: a shift of one is what it is best at
FEWEST = 4  # readings of a beginning
FALSE = 0.05  # share of series without drift that are called one
WIDEST = 4.0  # standard deviations that one reading counts, at most
DRAWS = 20_000


@dataclass(frozen=True)
class Drift:
    """What a self-starting CUSUM chart says of a series x_1, x_2, ...

    Args:
        up, down: S_t = max(0, S_{t-1} +- z_t - 0.5), of each reading; 0 for those that are the baseline. z_t is the
            normal score of x_t among the n readings before it, the baseline's first: of T = sqrt(n / (n + 1))
            (x_t - mean) / sd, which has n - 1 degrees of freedom; 4 at most.
        change: the index of the reading from which on the series has moved: the one after the last S = 0 before it
            crossed `limit`; None where it never did.
        direction: +1, -1, or 0 without a change.
        mean, spread: of the baseline; without one, of the readings before the change, or of all.
        limit: of S, that 5 % of series of this length without drift cross.
    """

    up: tuple[float, ...]
    down: tuple[float, ...]
    change: int | None
    direction: int
    mean: float
    spread: float
    limit: float


def find_drift(readings: Sequence[float], *, baseline: Sequence[float] | None = None) -> Drift:
    """Whether a series of readings, one a turn, drifts away from a baseline: called so in 5 % of the cases where all
    are independent and normal. Readings that depend on those before are called so more often.

    Args:
        baseline: readings of conversations that did not drift; the first four of the series itself when None.

    Raises:
        ArgumentError: fewer than 4 readings of a baseline, or numbers that are not finite.

    Source: E. S. Page, Continuous inspection schemes, Biometrika 41 (1954); D. M. Hawkins, Self-starting Cusum charts
    for location and scale, The Statistician 36 (1987).
    """
    x = np.asarray(readings, np.float64)
    own = x[:FEWEST] if baseline is None else np.asarray(baseline, np.float64)
    if len(own) < FEWEST:
        raise ArgumentError(f"a baseline of {len(own)} readings is too short: {FEWEST} at least")
    if not (np.isfinite(x).all() and np.isfinite(own).all()):
        raise ArgumentError("readings must be finite")
    start = FEWEST if baseline is None else 0
    scores = _scores(own, x[start:])
    limit = _limit(len(scores))
    charts = {sign: np.concatenate([np.zeros(start), _sums(sign * scores)]) for sign in (1, -1)}
    crossings = [(int(np.argmax(s > limit)), sign) for sign, s in charts.items() if (s > limit).any()]
    change, direction = None, 0
    if crossings:
        crossed, direction = min(crossings)
        zeros = np.flatnonzero(charts[direction][:crossed] == 0)
        change = int(zeros[-1]) + 1 if len(zeros) else 0
    usual = x[:change] if baseline is None else own
    up, down = (tuple(float(s) for s in charts[sign]) for sign in (1, -1))
    return Drift(up, down, change, direction, float(usual.mean()), float(usual.std(ddof=1)), limit)


def _scores(before: NDArray[np.float64], series: NDArray[np.float64]) -> NDArray[np.float64]:
    """z of each of a series, given what came before it."""
    every = np.concatenate([before, series])
    out = np.zeros(len(series))
    for i, value in enumerate(series):
        known = every[: len(before) + i]
        n, difference, spread = len(known), value - known.mean(), known.std(ddof=1)
        if spread > 0:
            t2 = n / (n + 1) * (difference / spread) ** 2
            # of Student's t with n - 1 degrees of freedom, after D. L. Wallace (1959)
            size = (8 * n - 7) / (8 * n - 5) * np.sqrt((n - 1) * np.log1p(t2 / (n - 1)))
        else:
            size = 0.0 if difference == 0 else WIDEST
        out[i] = np.sign(difference) * min(size, WIDEST)
    return out


def _sums(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """S of n scores."""
    out = np.zeros(len(scores))
    total = 0.0
    for i, score in enumerate(scores):
        out[i] = total = max(0.0, total + float(score) - SLACK)
    return out


@functools.cache
def _limit(n: int) -> float:
    """What the larger of S up and S down reaches in 5 % of cases, of n independent normal scores."""
    rng = np.random.default_rng(0)
    up, down, top = np.zeros((3, DRAWS))
    for _ in range(n):
        scores = np.clip(rng.standard_normal(DRAWS), -WIDEST, WIDEST)
        up, down = np.maximum(0.0, up + scores - SLACK), np.maximum(0.0, down - scores - SLACK)
        top = np.maximum(top, np.maximum(up, down))
    return float(np.quantile(top, 1 - FALSE))
