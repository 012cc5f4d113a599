"""From contrasting activations to a direction per block: the methods, and the dimensions that may mislead them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.errors import ArgumentError, ElicitationError
from personasteer.statistics import auroc, cohen_d

LEAST_SAMPLES = 8  # a side; fewer held-out samples say nothing
MASSIVE = 20.0  # times the block's median |mean activation|


@dataclass(frozen=True)
class Samples:
    """Activations of contrasting texts, with the group that each text belongs to.

    positive, negative: (n, n_layer, n_embd) float32 each. positive_groups, negative_groups: (n,) numbers; a group (a
    question, a prompt pair) is never split between the halves on which reliability is measured.
    """

    positive: NDArray[np.float32]
    negative: NDArray[np.float32]
    positive_groups: NDArray[np.int64]
    negative_groups: NDArray[np.int64]

    def shuffled(self, seed: int) -> Samples:
        """The control: labels permuted, half of either label on each side, so that no trace of the trait is left.

        One of an odd number is left out.
        """
        both = np.concatenate([self.positive, self.negative])
        groups = np.concatenate([self.positive_groups, self.negative_groups])
        random, n = np.random.default_rng(seed), len(self.positive)
        sides = (random.permutation(n), n + random.permutation(len(self.negative)))
        order = np.concatenate([side[: len(side) - len(side) % 2] for side in sides])
        first, second = order[::2], order[1::2]
        return Samples(both[first], both[second], groups[first], groups[second])

    @property
    def paired(self) -> bool:
        """Whether row i of both sides is one contrast."""
        return len(self.positive) == len(self.negative) and bool(
            np.array_equal(self.positive_groups, self.negative_groups)
        )


def difference_of_means(samples: Samples) -> NDArray[np.float32]:
    """v_il = mean of the positive samples - mean of the negative ones, (n_layer, n_embd), summed in float64.

    Source: arXiv 2507.21509, section 2.2.
    """
    difference = samples.positive.mean(0, dtype=np.float64) - samples.negative.mean(0, dtype=np.float64)
    return np.asarray(difference, np.float32)


def pca(samples: Samples) -> NDArray[np.float32]:
    """The first principal component of pairs that are centred on their midpoints, (n_layer, n_embd).

    That is the leading eigenvector u of sum_i d_i d_i^T over the differences d_i of the pairs, with the sign and the
    length of the mean difference along it: v = u <u, mean d>.

    Raises ArgumentError where the samples are not in pairs.

    Source: arXiv 2310.01405 (representation engineering), as repeng's "pca_center" and llama-cvector-generator do it.
    """
    if not samples.paired:
        raise ArgumentError(
            "method pca needs pairs: as many positive as negative texts, entry i of both belonging together"
        )
    mean = difference_of_means(samples).astype(np.float64)
    out = np.full(mean.shape, np.nan)
    for il in range(len(mean)):
        d = samples.positive[:, il].astype(np.float64) - samples.negative[:, il]
        if np.isfinite(d).all() and d.any():
            values, vectors = np.linalg.eigh(d @ d.T)  # n x n instead of n_embd x n_embd: the same leading component
            u = d.T @ vectors[:, -1] / np.sqrt(values[-1])
            out[il] = u * (u @ mean[il])
    return np.asarray(out, np.float32)


def probe(samples: Samples) -> NDArray[np.float32]:
    """The weights of a logistic regression that tells the sides apart, (n_layer, n_embd), with the length of the mean
    difference along them: v = u <u, mean d>, u = w / ||w||.

    Activations are centred and divided by their overall standard deviation; L2 penalty, C = 1.

    Raises ArgumentError where scikit-learn is not installed (the extra `probe`).
    """
    regression = logistic_regression()
    mean = difference_of_means(samples).astype(np.float64)
    label = np.repeat([1, 0], [len(samples.positive), len(samples.negative)])
    out = np.full(mean.shape, np.nan)
    for il in range(len(mean)):
        x = np.concatenate([samples.positive[:, il], samples.negative[:, il]]).astype(np.float64)
        if np.isfinite(x).all() and mean[il].any():
            x -= x.mean(0)
            w = regression(max_iter=2000).fit(x / x.std(), label).coef_[0]
            u = w / np.linalg.norm(w)
            out[il] = u * (u @ mean[il])
    return np.asarray(out, np.float32)


def logistic_regression() -> Any:
    """scikit-learn's class. Raises ArgumentError where it is not installed."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as e:
        raise ArgumentError("method probe needs scikit-learn: pip install 'personasteer[probe]'") from e
    return LogisticRegression


METHODS: dict[str, Callable[[Samples], NDArray[np.float32]]] = {"mean": difference_of_means, "pca": pca, "probe": probe}


def check_held_out(aurocs: NDArray[np.float32], layers: Sequence[int], n: int) -> None:
    """Raise ElicitationError where directions are no better than chance on held-out samples, or point the wrong way: a
    mean AUROC (see Quality) over these blocks of at most 0.5. Not asked of fewer than eight samples a side.
    """
    known = aurocs[list(layers)]
    if n >= LEAST_SAMPLES and np.isfinite(known).all() and len(known) and known.mean() <= 0.5:
        raise ElicitationError(
            f"the direction does not tell held-out positive texts from negative ones (AUROC {known.mean():.2f})"
        )


def massive_dimensions(means: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(n_layer, n_embd): where the model's everyday mean activation is beyond 20 times its block's median magnitude.

    A few such dimensions carry much of the residual stream's norm whatever the text says (arXiv 2402.17762).
    """
    size = np.abs(means)
    out: NDArray[np.bool_] = size > MASSIVE * np.median(size, axis=1, keepdims=True)
    return out


def energy_share(directions: NDArray[np.float32], dimensions: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(n_layer,) share of ||v_il||^2 in the given dimensions; NaN where there is no direction."""
    squares = directions.astype(np.float64) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        out: NDArray[np.float64] = np.where(dimensions, squares, 0.0).sum(1) / squares.sum(1)
    return out


@dataclass(frozen=True)
class Quality:
    """How well the directions tell held-out samples apart, per block: from two halves with disjoint groups.

    separation: Cohen's d of the projections of one half on the direction of the other, both ways averaged. auroc: the
    probability that a positive sample of one half reads higher than a negative one, likewise. reliability: cosine of
    the two halves' directions. NaN where a half is empty; separation also where there is no spread to measure it.
    """

    separation: NDArray[np.float32]
    auroc: NDArray[np.float32]
    reliability: NDArray[np.float32]


def held_out_quality(
    samples: Samples, method: Callable[[Samples], NDArray[np.float32]] = difference_of_means
) -> Quality:
    """See Quality."""
    groups = np.unique(np.concatenate([samples.positive_groups, samples.negative_groups]))
    nothing = np.full(samples.positive.shape[1], np.nan, np.float32)
    if len(groups) < 2:
        return Quality(nothing, nothing, nothing)
    first = groups[::2]
    masks = [
        (np.isin(samples.positive_groups, first) == side, np.isin(samples.negative_groups, first) == side)
        for side in (True, False)
    ]
    halves = [Samples(samples.positive[p], samples.negative[n], samples.positive_groups[p], samples.negative_groups[n])
              for p, n in masks]  # fmt: skip
    if any(len(h.positive) == 0 or len(h.negative) == 0 for h in halves):
        return Quality(nothing, nothing, nothing)
    directions = [method(h).astype(np.float64) for h in halves]
    with np.errstate(invalid="ignore", divide="ignore"):
        units = [d / np.linalg.norm(d, axis=1, keepdims=True) for d in directions]
        reliability = (units[0] * units[1]).sum(1)
        crossed = [_readings(halves[1], units[0]), _readings(halves[0], units[1])]
        separation = np.mean([cohen_d(*c) for c in crossed], axis=0)
        area = np.mean([_auroc(*c) for c in crossed], axis=0)
    return Quality(separation.astype(np.float32), area.astype(np.float32), reliability.astype(np.float32))


def _readings(samples: Samples, unit: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.einsum("nle,le->nl", samples.positive, unit), np.einsum("nle,le->nl", samples.negative, unit)


def _auroc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> NDArray[np.float64]:
    out = auroc(positive, negative)
    out[~np.isfinite(positive + negative[:1]).all(0)] = np.nan
    return out


def choose_layers(
    separation: NDArray[np.float32], reliability: NDArray[np.float32], directions: NDArray[np.float32]
) -> tuple[int, ...]:
    """A sixth of the blocks, next to each other, between a quarter and seven eighths of the depth.

    Among those windows the one with the largest mean of separation x reliability; the middle one where the samples are
    too few to measure them. Block 0 is never chosen: a control-vector file cannot hold it.
    """
    usable: NDArray[np.bool_] = np.isfinite(directions).all(axis=1) & (directions != 0).any(axis=1)
    with np.errstate(invalid="ignore"):
        score = np.where(usable, np.nan_to_num(separation * np.clip(reliability, 0, 1), nan=0.0), -np.inf)
    score[0] = -np.inf
    return best_window(score, usable)


def best_window(score: NDArray[np.float64], usable: NDArray[np.bool_]) -> tuple[int, ...]:
    """The usable blocks of the window, a sixth of all wide, with the largest mean score; the middle one of equals."""
    width, low, high = window_range(len(score))
    starts = range(low, max(low, high - width) + 1)
    middle = (starts[0] + starts[-1]) / 2
    best = max(starts, key=lambda s: (score[s : s + width].sum(), -abs(s - middle)))
    window = tuple(il for il in range(best, min(best + width, len(score))) if usable[il] and il > 0)
    if not window:
        raise ElicitationError("no block tells the positive texts from the negative ones: their activations are equal")
    return window


def window_range(n_layer: int) -> tuple[int, int, int]:
    """(width, first block, end) of the windows that layers are chosen from."""
    width = max(1, n_layer // 6)
    low = max(1, n_layer // 4)
    return width, low, min(max(low + width, (7 * n_layer) // 8), n_layer)
