"""Small statistics: correlations, the area under the ROC curve, errors of a mean, intervals."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation, ties at their mean rank; NaN where one side is constant or empty."""
    return pearson(*(_ranks(np.asarray(v, np.float64)) for v in (x, y)))


def pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Correlation of (n,) numbers; NaN where one side is constant (up to rounding) or empty."""
    if not len(x):
        return float("nan")
    a, b = x - x.mean(), y - y.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 1e-12 else float("nan")


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return ranks


def auroc(high: NDArray[np.float64], low: NDArray[np.float64]) -> NDArray[np.float64]:
    """The chance that a row of `high` (n, ...) exceeds a row of `low` (m, ...), ties counting half; per column, NaN
    where a side is empty.
    """
    n, m = len(high), len(low)
    shape = np.shape(high)[1:]
    if not n or not m:
        return np.full(shape, np.nan)
    both = np.concatenate([high, low]).reshape(n + m, -1)
    sums = np.array([(_ranks(column)[:n]).sum() for column in both.T])  # Mann and Whitney's U
    out: NDArray[np.float64] = ((sums - n * (n + 1) / 2) / (n * m)).reshape(shape)
    return out


def over_error(values: ArrayLike) -> float | None:
    """Mean over its standard error; None for fewer than four values, or equal ones."""
    known = np.asarray(values, np.float64)
    spread = float(known.std(ddof=1)) if len(known) >= 4 else 0.0
    return float(known.mean() / spread * np.sqrt(len(known))) if spread else None


def bootstrap_interval(
    values: NDArray[np.float64], *, n: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean of `values` (n_questions, ...), resampling questions (axis 0).

    The percentile interval, widened about the mean by sqrt(n / (n - 1)) t / z for n questions: without that, few
    questions give intervals that cover too little (0.875 instead of 0.95 for six).
    """
    per_question = values.reshape(len(values), -1).mean(1)
    count, mean = len(per_question), float(per_question.mean())
    if count < 2:
        return mean, mean
    draws = np.random.default_rng(seed).integers(0, count, (n, count))
    ends = np.quantile(per_question[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    z = NormalDist().inv_cdf((1 + level) / 2)
    low, high = mean + (ends - mean) * np.sqrt(count / (count - 1)) * _student(z, count - 1) / z
    return float(low), float(high)


def _student(z: float, freedom: int) -> float:
    """The quantile of Student's t that belongs to the normal quantile z, by Cornish and Fisher's expansion."""
    f = float(freedom)
    return (
        z
        + (z**3 + z) / (4 * f)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * f**3)
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    out: NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return out


def divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) of each row, from log-probabilities."""
    out: NDArray[np.float64] = np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0)
    return out


def cohen_d(high: NDArray[np.float64], low: NDArray[np.float64]) -> NDArray[np.float64]:
    """Difference of means over the pooled standard deviation, per column of (n, ...), (m, ...); NaN without spread."""
    spread = np.sqrt((high.var(0) + low.var(0)) / 2)
    spread[spread == 0] = np.nan  # one text a side: no spread to compare with
    out: NDArray[np.float64] = (high.mean(0) - low.mean(0)) / spread
    return out


def slope(y: NDArray[np.floating], x: NDArray[np.floating]) -> float:
    """sum(x y) / sum(x^2) over all numbers: of the line through 0; NaN where all x are 0."""
    square = float(np.square(x, dtype=np.float64).sum())
    return float(np.vdot(x.astype(np.float64), y.astype(np.float64))) / square if square else float("nan")


def wilson_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share, from k of n.

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927).
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle, share = 1 + z * z / n, k / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (share + z * z / (2 * n) - half) / middle, (share + z * z / (2 * n) + half) / middle
