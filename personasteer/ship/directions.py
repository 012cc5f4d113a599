"""The directions that leave a model: orthonormal, each the same in all blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personasteer.errors import ArgumentError, VectorError
from personasteer.vectors import PersonaVector

LEAST_ANGLE = 1e-3  # sine between a direction and the others, below which it says nothing of its own


@dataclass(frozen=True)
class Removed:
    """What an ablation takes out: `basis` (k, n_embd) float64, orthonormal; `share` of it, 0 to 1.

    vectors: where the directions come from, one block of each.
    """

    basis: NDArray[np.float64]
    share: float
    vectors: tuple[PersonaVector, ...]
    blocks: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        return [v.name for v in self.vectors]


def directions_to_remove(parts: Sequence[tuple[PersonaVector, float | None]], *, layer: int | None = None) -> Removed:
    """One direction of each vector: that of block `layer`; when None, of the recommended block that moves the trait
    most (or else tells the answers apart best, or else the middle one).

    Raises:
        ArgumentError: shares outside 0..1, or unlike each other. VectorError: no usable direction, or two alike.

    Source: arXiv 2406.11717, section 2.4: one direction for all blocks.
    """
    if not parts:
        raise ArgumentError("name at least one vector")
    shares = {1.0 if share is None else float(share) for _, share in parts}
    if len(shares) > 1:
        raise ArgumentError(f"directions leave together, by one share, not by {sorted(shares)}")
    share = shares.pop()
    if not 0.0 < share <= 1.0:
        raise ArgumentError(f"the share of a direction that is taken out must be above 0 and at most 1, not {share:g}")
    vectors = [v for v, _ in parts]
    if len({v.n_embd for v in vectors}) > 1:
        raise VectorError("the vectors are of different widths: they are for different models")
    blocks = [best_block(v) if layer is None else layer for v in vectors]
    basis: list[NDArray[np.float64]] = []
    for vector, il in zip(vectors, blocks, strict=True):
        v = vector.direction(il).astype(np.float64)
        v /= np.linalg.norm(v)
        for _ in range(2):  # once more for what rounding left
            for u in basis:
                v = v - u * (u @ v)
        length = float(np.linalg.norm(v))
        if length < LEAST_ANGLE:
            raise VectorError(f"the direction of {vector.name!r} at block {il} is that of the vectors before it")
        basis.append(v / length)
    return Removed(np.stack(basis), share, tuple(vectors), tuple(blocks))


def best_block(vector: PersonaVector) -> int:
    """The recommended block at which the vector acts most."""
    layers = [il for il in (vector.layers or vector.usable_layers) if il in vector.usable_layers]
    if not layers:
        raise VectorError(f"vector {vector.name!r} has no usable direction")
    for measured in (vector.effects, vector.aurocs, vector.separations):
        if measured is not None and np.isfinite(measured[layers]).any():
            return layers[int(np.nanargmax(np.abs(measured[layers])))]
    return layers[len(layers) // 2]


def in_all_blocks(direction: NDArray[np.float64], n_layer: int, name: str = "removed") -> PersonaVector:
    """One direction as a vector that has it in every block."""
    rows = np.tile(direction.astype(np.float32), (n_layer, 1))
    return PersonaVector(rows, tuple(range(n_layer)), name)
