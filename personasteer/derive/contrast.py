"""From contrasting activations to a direction per block, with its reliability."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.engine import Progress
from personasteer.errors import ArgumentError, ElicitationError
from personasteer.model import Item, Model
from personasteer.vectors import PersonaVector


@dataclass(frozen=True)
class Samples:
    """Activations of contrasting texts, (n, n_layer, n_embd) float32 each, with the group that each text belongs to.

    A group (a question, a prompt pair) is never split between the halves on which reliability is measured.
    """

    positive: NDArray[np.float32]
    negative: NDArray[np.float32]
    positive_groups: NDArray[np.int64]
    negative_groups: NDArray[np.int64]

    def shuffled(self, seed: int) -> Samples:
        """The control: labels permuted, half of either label on each side, so that no trace of the trait is left."""
        both = np.concatenate([self.positive, self.negative])
        groups = np.concatenate([self.positive_groups, self.negative_groups])
        random, n = np.random.default_rng(seed), len(self.positive)
        order = np.concatenate([random.permutation(n), n + random.permutation(len(self.negative))])
        first, second = order[::2], order[1::2]
        return Samples(both[first], both[second], groups[first], groups[second])


def difference_of_means(samples: Samples) -> NDArray[np.float32]:
    """v_il = mean of the positive samples - mean of the negative ones, (n_layer, n_embd). arXiv 2507.21509, 2.2."""
    difference = samples.positive.mean(0, dtype=np.float64) - samples.negative.mean(0, dtype=np.float64)
    return np.asarray(difference, np.float32)


def held_out_quality(samples: Samples) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(separation, reliability), (n_layer,) each, from two halves with disjoint groups.

    separation: Cohen's d of the projections of one half on the direction of the other, both ways averaged.
    reliability: cosine of the two halves' directions. NaN where a half is empty, or has no spread to measure d.
    """
    groups = np.unique(np.concatenate([samples.positive_groups, samples.negative_groups]))
    nothing = np.full(samples.positive.shape[1], np.nan, np.float32)
    if len(groups) < 2:
        return nothing, nothing
    first = groups[::2]
    masks = [
        (np.isin(samples.positive_groups, first) == side, np.isin(samples.negative_groups, first) == side)
        for side in (True, False)
    ]
    halves = [Samples(samples.positive[p], samples.negative[n], samples.positive_groups[p], samples.negative_groups[n])
              for p, n in masks]  # fmt: skip
    if any(len(h.positive) == 0 or len(h.negative) == 0 for h in halves):
        return nothing, nothing
    directions = [difference_of_means(h).astype(np.float64) for h in halves]
    with np.errstate(invalid="ignore", divide="ignore"):
        units = [d / np.linalg.norm(d, axis=1, keepdims=True) for d in directions]
        reliability = (units[0] * units[1]).sum(1)
        separation = np.mean([_cohen(halves[1], units[0]), _cohen(halves[0], units[1])], axis=0)
    return separation.astype(np.float32), reliability.astype(np.float32)


def _cohen(samples: Samples, unit: NDArray[np.float64]) -> NDArray[np.float64]:
    positive = np.einsum("nle,le->nl", samples.positive, unit)
    negative = np.einsum("nle,le->nl", samples.negative, unit)
    spread = np.sqrt((positive.var(0) + negative.var(0)) / 2)
    spread[spread == 0] = np.nan  # one text a side: no spread to compare with
    out: NDArray[np.float64] = (positive.mean(0) - negative.mean(0)) / spread
    return out


def choose_layers(
    separation: NDArray[np.float32], reliability: NDArray[np.float32], directions: NDArray[np.float32]
) -> tuple[int, ...]:
    """A sixth of the blocks, next to each other, between a quarter and seven eighths of the depth.

    Among those windows the one with the largest mean of separation x reliability; the middle one where the samples are
    too few to measure them. Block 0 is never chosen: a
    control-vector file cannot hold it.
    """
    n_layer = len(directions)
    usable: NDArray[np.bool_] = np.isfinite(directions).all(axis=1) & (directions != 0).any(axis=1)
    with np.errstate(invalid="ignore"):
        score = np.where(usable, np.nan_to_num(separation * np.clip(reliability, 0, 1), nan=0.0), -np.inf)
    score[0] = -np.inf
    width = max(1, n_layer // 6)
    low = max(1, n_layer // 4)
    high = max(low + width, (7 * n_layer) // 8)
    starts = range(low, max(low, min(high, n_layer) - width) + 1)
    middle = (starts[0] + starts[-1]) / 2
    best = max(starts, key=lambda s: (score[s : s + width].mean(), -abs(s - middle)))
    window = tuple(il for il in range(best, min(best + width, n_layer)) if usable[il] and il > 0)
    if not window:
        raise ElicitationError("no block tells the positive texts from the negative ones: their activations are equal")
    return window


def vector_from_samples(
    model: Model,
    samples: Samples,
    *,
    name: str,
    layers: Sequence[int] | None,
    provenance: dict[str, Any],
    last_prompt: NDArray[np.float32] | None = None,
) -> PersonaVector:
    """Directions, quality, thresholds, recommended layers and provenance, put together.

    The threshold of a block lies halfway between the mean readings of the positive and the negative samples.
    """
    directions = difference_of_means(samples)
    separation, reliability = held_out_quality(samples)
    thresholds = _mean_reading(np.stack([samples.positive.mean(0), samples.negative.mean(0)]), directions)
    chosen = choose_layers(separation, reliability, directions) if layers is None else model.check_layers(layers)
    return PersonaVector(
        directions,
        chosen,
        name,
        last_prompt=last_prompt,
        norms=model.norms,
        separations=separation,
        reliability=reliability,
        thresholds=thresholds,
        means=_mean_reading(model.means[None], directions),
        provenance={
            "method": "difference-of-means",
            **model.origin,
            "n_positive": len(samples.positive),
            "n_negative": len(samples.negative),
            "personasteer": version("personasteer"),
            "llama_cpp_python": version("llama-cpp-python"),
            **provenance,
        },
    )


def _mean_reading(samples: NDArray[np.float32], directions: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n_layer,) mean <h, v-hat> of samples (n, n_layer, n_embd); NaN where there is no direction."""
    with np.errstate(invalid="ignore", divide="ignore"):
        units = directions / np.linalg.norm(directions.astype(np.float64), axis=1, keepdims=True)
        mean = np.einsum("le,le->l", samples.mean(0, dtype=np.float64), units)
    return np.asarray(mean, np.float32)


def prompts_hash(*parts: Any) -> str:
    """SHA-256 of the texts that a vector was derived from."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def contrast(
    model: Model,
    positive: Sequence[Item],
    negative: Sequence[Item],
    *,
    name: str = "contrast",
    pool: str | None = None,
    span: str | None = None,
    layers: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> PersonaVector:
    """A vector from two lists of texts: v_il = mean over positive - mean over negative of pooled block outputs.

    Args:
        positive, negative: plain texts (template text included, if any is wanted), (prompt, answer) pairs, or
            messages that end with the assistant's. Entry i of both lists is taken as one pair when reliability is
            measured; the lists may differ in length.
        pool: "mean" over the span or "last" token; "last" for plain texts and "mean" for the others when None.
        span: as in Model.capture.
        layers: recommended blocks; chosen by held-out separation when None.

    Raises:
        ArgumentError: an empty list.
        ElicitationError: the activations of the two lists are equal.
    """
    for label, items in (("positive", positive), ("negative", negative)):
        if isinstance(items, str):
            raise ArgumentError(f"{label} must be a list of texts, not one string")
        if len(items) == 0:
            raise ArgumentError(f"the list of {label} texts is empty")
    if pool is None:
        pool = "last" if all(isinstance(item, str) for item in [*positive, *negative]) else "mean"
    if pool not in ("mean", "last"):
        raise ArgumentError(f"pool must be mean or last, not {pool!r}")
    if layers is not None:
        model.check_layers(layers)  # before the work
    n = len(positive)
    acts = model.capture([*positive, *negative], pool=pool, span=span, last_layer=True, progress=progress)
    samples = Samples(acts[:n], acts[n:], np.arange(n), np.arange(len(negative)))
    return vector_from_samples(
        model,
        samples,
        name=name,
        layers=layers,
        provenance={"pool": pool, "prompts_sha256": prompts_hash(list(positive), list(negative))},
    )
