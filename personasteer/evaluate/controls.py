"""Vectors that should do nothing: what an effect is compared with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from personasteer.vectors import PersonaVector


def random_vectors(like: PersonaVector, n: int, *, seed: int = 0) -> list[PersonaVector]:
    """n vectors of independent Gaussian directions with the norms of `like` at its layers."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        noise = rng.standard_normal(like.directions.shape)
        norms = np.linalg.norm(like.directions, axis=1, keepdims=True)
        data = noise / np.linalg.norm(noise, axis=1, keepdims=True) * norms
        own = {"directions": data.astype(np.float32), "name": f"random-{i}"}
        out.append(replace(like, **own, last_prompt=None, thresholds=None, means=None))
    return out
