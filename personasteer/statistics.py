"""Small statistics: rank correlation, the area under the ROC curve, bootstrap intervals."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation, ties at their mean rank; NaN where one side is constant or empty."""
    a, b = (_ranks(np.asarray(v, np.float64)) for v in (x, y))
    if not len(a):
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else float("nan")


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return ranks


def auroc(high: NDArray[np.float64], low: NDArray[np.float64]) -> NDArray[np.float64]:
    """The chance that a row of `high` (n, ...) exceeds a row of `low` (m, ...), ties counting half; per column, NaN
    where a side is empty.
    """
    if not len(high) or not len(low):
        return np.full(np.shape(high)[1:], np.nan)
    higher = (high[:, None] > low[None]) + 0.5 * (high[:, None] == low[None])
    out: NDArray[np.float64] = np.asarray(higher.mean((0, 1)))
    return out


def bootstrap_interval(
    values: NDArray[np.float64], *, n: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (n_questions, ...), resampling questions (axis 0)."""
    per_question = values.reshape(len(values), -1).mean(1)
    draws = np.random.default_rng(seed).integers(0, len(per_question), (n, len(per_question)))
    low, high = np.quantile(per_question[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
