"""Slow change over a long conversation: where a series of readings leaves its own beginning, or a band of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from personasteer.errors import ArgumentError

SLACK, LIMIT = 0.5, 5.0  # of a CUSUM chart, in standard deviations: a shift of one is found after about ten readings
FEWEST = 4  # readings of a beginning


@dataclass(frozen=True)
class Drift:
    """What a CUSUM chart says of a series x_1, x_2, ...

    Args:
        up, down: S_t = max(0, S_{t-1} +- (x_t - mean) / spread - SLACK), of each reading.
        change: the index of the reading from which on the series has moved: the one after the last S = 0 before it
            crossed LIMIT; None where it never did.
        direction: +1, -1, or 0 without a change.
        mean, spread: of the baseline.
    """

    up: tuple[float, ...]
    down: tuple[float, ...]
    change: int | None
    direction: int
    mean: float
    spread: float


def find_drift(
    readings: Sequence[float],
    *,
    baseline: Sequence[float] | None = None,
    slack: float = SLACK,
    limit: float = LIMIT,
) -> Drift:
    """Whether a series of readings, one a turn, drifts away from a baseline.

    Args:
        baseline: readings of conversations that did not drift; the first third of the series itself, at least 4 of
            them, when None.
        slack, limit: of the chart, in standard deviations of the baseline.

    Raises:
        ArgumentError: fewer than 4 readings of a baseline, or numbers that are not finite.

    Source: E. S. Page, Continuous inspection schemes, Biometrika 41 (1954).
    """
    x = np.asarray(readings, np.float64)
    start = 0
    if baseline is None:
        start = max(FEWEST, len(x) // 3)
        own = x[:start]
    else:
        own = np.asarray(baseline, np.float64)
    if len(own) < FEWEST:
        raise ArgumentError(f"a baseline of {len(own)} readings is too short: {FEWEST} at least")
    if not (np.isfinite(x).all() and np.isfinite(own).all()):
        raise ArgumentError("readings must be finite")
    mean = float(own.mean())
    spread = float(own.std(ddof=1)) or 1.0
    sums: dict[int, list[float]] = {1: [], -1: []}
    for sign, series in sums.items():
        total = 0.0
        for i, value in enumerate(x):
            total = max(0.0, total + sign * (value - mean) / spread - slack) if i >= start else 0.0
            series.append(total)
    crossings = [(next(i for i, s in enumerate(series) if s > limit), sign) for sign, series in sums.items()
                 if max(series, default=0.0) > limit]  # fmt: skip
    change, direction = None, 0
    if crossings:
        crossed, direction = min(crossings)
        zeros = [i for i in range(crossed) if sums[direction][i] == 0.0]
        change = zeros[-1] + 1 if zeros else 0
    return Drift(tuple(sums[1]), tuple(sums[-1]), change, direction, mean, spread)
