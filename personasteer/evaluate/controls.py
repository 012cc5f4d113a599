"""Vectors that should do nothing: what an effect is compared with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from personasteer import traits
from personasteer.model import Model
from personasteer.traits import Trait
from personasteer.vectors import PersonaVector

UNRELATED, OTHERWISE = "pirate", "formal"  # the second where a trait is close to the first
UNRELATED_TO = ("archaic", "casual", "childlike", "dramatic", "humorous", "toxic")


def random_vectors(like: PersonaVector, n: int, *, seed: int = 0) -> list[PersonaVector]:
    """n vectors of independent Gaussian directions with the norms of `like` at its layers."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        noise = rng.standard_normal(like.directions.shape)
        norms = np.linalg.norm(like.directions, axis=1, keepdims=True)
        data = noise / np.linalg.norm(noise, axis=1, keepdims=True) * norms
        own = {"directions": data.astype(np.float32), "name": f"random-{i}"}
        out.append(replace(like, **own, last_prompt=None, thresholds=None, means=None, shuffled=None))
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
    acts = model.capture([*sides[0], *sides[1]], layers=like.layers, last_layer=last, share_prefix=True)
    n = len(sides[0])
    directions = acts[:n].mean(0, dtype=np.float64) - acts[n:].mean(0, dtype=np.float64)
    own = {"directions": directions.astype(np.float32), "name": other.name}
    return replace(like, **own, last_prompt=None, thresholds=None, means=None, shuffled=None)
