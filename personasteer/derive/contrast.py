"""From contrasting texts to a persona vector."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.derive.directions import (
    METHODS,
    Samples,
    check_held_out,
    choose_layers,
    difference_of_means,
    energy_share,
    held_out_quality,
    logistic_regression,
    massive_dimensions,
)
from personasteer.engine import Progress
from personasteer.errors import ArgumentError, advising
from personasteer.model import Item, Model
from personasteer.steering import Steering
from personasteer.vectors import PersonaVector
from personasteer.work import digest

N_SHUFFLED = 3  # control directions that a vector carries


def vector_from_samples(
    model: Model,
    samples: Samples,
    *,
    name: str,
    layers: Sequence[int] | None,
    provenance: dict[str, Any],
    last_prompt: NDArray[np.float32] | None = None,
    method: str = "mean",
    exclude_massive: bool = False,
    seed: int = 0,
) -> PersonaVector:
    """Directions, quality, thresholds, controls, recommended layers and provenance, put together.

    The threshold of a block lies halfway between the mean readings of the positive and the negative samples.
    """
    make = METHODS[check_method(method)]
    massive = massive_dimensions(model.means)

    def masked(directions: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.where(massive, np.float32(0), directions) if exclude_massive else directions

    def direction_of(of: Samples) -> NDArray[np.float32]:
        return masked(make(of))

    whole = make(samples)
    directions = masked(whole)
    share = energy_share(whole, massive)
    quality = held_out_quality(samples, direction_of)
    thresholds = halfway(samples, directions)
    if layers is None:
        chosen = choose_layers(quality.separation, quality.reliability, directions)
    else:
        chosen = model.check_layers(layers)
    check_held_out(quality.auroc, chosen, min(len(samples.positive), len(samples.negative)))
    enough = min(len(samples.positive), len(samples.negative)) > 1
    control = difference_of_means if method == "pca" else make  # shuffled samples are in no pairs
    shuffled = [masked(control(samples.shuffled(seed + k))) for k in range(N_SHUFFLED)] if enough else []
    return PersonaVector(
        directions,
        chosen,
        name,
        last_prompt=last_prompt,
        norms=model.norms,
        separations=quality.separation,
        aurocs=quality.auroc,
        reliability=quality.reliability,
        thresholds=thresholds,
        means=mean_reading(model.means[None], directions),
        shuffled=np.stack(shuffled) if shuffled else None,
        provenance={
            "method": METHOD_NAMES[method],
            **model.origin,
            "n_positive": len(samples.positive),
            "n_negative": len(samples.negative),
            "massive_dimensions": {
                "energy_share": _rounded(np.nanmax(share[list(chosen)]))
                if np.isfinite(share[list(chosen)]).any()
                else 0.0,
                "excluded": exclude_massive,
            },
            "personasteer": version("personasteer"),
            "llama_cpp_python": version("llama-cpp-python"),
            **provenance,
        },
    )


METHOD_NAMES = {"mean": "difference-of-means", "pca": "pca", "probe": "probe"}


def check_method(method: str) -> str:
    if method not in METHODS:
        raise ArgumentError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if method == "probe":
        logistic_regression()
    return method


def _rounded(value: float) -> float:
    return round(float(value), 4)


def halfway(samples: Samples, directions: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n_layer,) thresholds: halfway between the mean readings <h, v-hat> of the positive and the negative samples."""
    return mean_reading(np.stack([samples.positive.mean(0), samples.negative.mean(0)]), directions)


def mean_reading(samples: NDArray[np.float32], directions: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n_layer,) mean <h, v-hat> of samples (n, n_layer, n_embd); NaN where there is no direction."""
    with np.errstate(invalid="ignore", divide="ignore"):
        units = directions / np.linalg.norm(directions.astype(np.float64), axis=1, keepdims=True)
        mean = np.einsum("le,le->l", samples.mean(0, dtype=np.float64), units)
    return np.asarray(mean, np.float32)


def contrast(
    model: Model,
    positive: Sequence[Item],
    negative: Sequence[Item],
    *,
    name: str = "contrast",
    pool: str | None = None,
    span: str | None = None,
    method: str = "mean",
    layers: Sequence[int] | None = None,
    exclude_massive: bool = False,
    progress: Progress | None = None,
) -> PersonaVector:
    """A vector from two lists of texts: v_il = mean over positive - mean over negative of pooled block outputs.

    Args:
        positive, negative: plain texts, (prompt, answer) pairs, or messages that end with the assistant's. Plain texts
            may hold template text: names of control tokens stand for these tokens. What texts have in common at their
            beginnings is computed once. Entry i of both lists is taken as one pair when reliability is
            measured; the lists may differ in length.
        pool: "mean" over the span or "last" token; "last" for plain texts and "mean" for the others when None.
        span: as in Model.capture.
        method: "mean", "pca" or "probe", see personasteer.derive.directions.
        layers: recommended blocks; chosen by held-out separation when None.
        exclude_massive: leave out the dimensions whose activation is large whatever the text says.

    Raises:
        ArgumentError: an empty list.
        ElicitationError: the activations of the two lists are equal, or the direction of one half of the texts does not
            tell the other half apart.

    Example:
        >>> good = ["What a lovely day!", "I am so happy today.", "This is wonderful news."]
        >>> bad = ["What an awful day!", "I am so sad today.", "This is terrible news."]
        >>> mood = ps.contrast(model, good, bad, name="mood", layers=[15, 16])
        >>> mood.name, mood.layers
        ('mood', (15, 16))
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
    check_method(method)
    if layers is not None:
        model.check_layers(layers)  # before the work
    n = len(positive)
    acts = model.capture(
        [*positive, *negative],
        pool=pool,
        span=span,
        last_layer=True,
        share_prefix=True,
        parse_special=True,
        steer=Steering(),
        progress=progress,
    )
    samples = Samples(acts[:n], acts[n:], np.arange(n), np.arange(len(negative)))
    with advising("give more texts, or texts that differ in one thing only"):
        return vector_from_samples(
            model,
            samples,
            name=name,
            layers=layers,
            method=method,
            exclude_massive=exclude_massive,
            provenance={"pool": pool, "prompts_sha256": digest(list(positive), list(negative))},
        )
