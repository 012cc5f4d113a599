"""Vectors that should do nothing: what an effect is compared with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from personasteer import traits
from personasteer.model import Model
from personasteer.steering import Steering
from personasteer.traits import Trait
from personasteer.vectors import PersonaVector

UNRELATED, OTHERWISE = "pirate", "formal"  # the second where a trait is close to the first
UNRELATED_TO = ("archaic", "casual", "childlike", "dramatic", "humorous", "toxic")


def random_vectors(like: PersonaVector, n: int, *, seed: int = 0) -> list[PersonaVector]:
    """n vectors of Gaussian directions with the norms of `like`, and with its cosines between blocks.

    A vector's directions are nearly the same at neighbouring blocks, so that their additions add up; independent noise
    would cancel, and be a weaker control. With U the unit directions of `like` at its k usable blocks and G = U U^T,
    noise = G^(1/2) Z, Z (k, n_embd) of independent normal numbers.
    """
    rng = np.random.default_rng(seed)
    at = list(like.usable_layers)
    rows, lengths = like.directions_at(at)
    units = rows / lengths[:, None]
    values, vectors = np.linalg.eigh(units @ units.T)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    out = []
    for i in range(n):
        noise = root @ rng.standard_normal(units.shape)
        data = np.full(like.directions.shape, np.nan, np.float32)
        data[at] = noise / np.linalg.norm(noise, axis=1, keepdims=True) * lengths[:, None]
        out.append(_instead_of(like, data, f"random-{i}"))
    return out


def unrelated_vector(model: Model, like: PersonaVector, trait: Trait) -> PersonaVector:
    """The vector of another trait of the library, at the layers of `like` and with its shares of the strength: the
    difference of means over that trait's continuations as answers to its own questions.
    """
    other = traits.get(UNRELATED if trait.name not in (UNRELATED, *UNRELATED_TO) else OTHERWISE)
    questions = other.derive_questions
    sides = [
        [(questions[i % len(questions)], pair[side]) for i, pair in enumerate(other.continuations)] for side in (0, 1)
    ]
    last = like.n_layer - 1 in like.layers
    acts = model.capture(
        [*sides[0], *sides[1]], layers=like.layers, last_layer=last, share_prefix=True, steer=Steering()
    )
    n = len(sides[0])
    directions = acts[:n].mean(0, dtype=np.float64) - acts[n:].mean(0, dtype=np.float64)
    return _instead_of(like, directions.astype(np.float32), other.name)


def _instead_of(like: PersonaVector, directions: NDArray[np.float32], name: str) -> PersonaVector:
    return replace(like, directions=directions, name=name, last_prompt=None, thresholds=None, means=None, shuffled=None)
