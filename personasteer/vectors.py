"""PersonaVector: one direction per block, and where it came from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from personasteer.errors import ArgumentError, IncompatibleVector, VectorError
from personasteer.steering import Add

WINDOW = (-0.5, 0.5)  # coherence usually starts to go from about 0.5 on
ORIGIN = ("model", "architecture", "fingerprint", "identity")  # the part of a provenance that Model.origin gives


def _frozen(values: ArrayLike) -> NDArray[np.float32]:
    """A copy of its own that nobody can change: what was computed from it stays right."""
    array = np.array(values, dtype=np.float32, order="C")
    array.flags.writeable = False
    return array


@dataclass(frozen=True, eq=False)
class PersonaVector:
    """Directions of one trait in the residual stream of one model.

    Args:
        directions: (n_layer, n_embd) float32; row il lives at the output of block il. A row of NaN means that the
            block has no direction.
        layers: the recommended blocks to steer at.
        name: the trait.
        strength: the recommended total strength rho for export, positive.
        weights: share of the strength per layer, {il: w}; equal over the layers used when empty.
        last_prompt: (n_layer, n_embd) direction at the last prompt token, for monitoring; or None.
        norms: (n_layer,) median norms m_il of the model that it was derived on; or None.
        provenance: method, fingerprint, seed, prompts hash, versions, ...: what a reader needs to derive it again.
        separations: (n_layer,) Cohen's d of the projections of positive against negative samples; or None.
        reliability: (n_layer,) cosine between directions from two halves of the samples; or None.
        thresholds: (n_layer,) tau for Cap, Floor and When, in units of <h, v-hat>; or None.
        means: (n_layer,) the model's mean reading over everyday texts, for Ablate(to="mean"); or None.
        window: (low, high) total strengths between which the model stays coherent; a rule of thumb until calibrated.
        aurocs: (n_layer,) probability that a held-out positive sample reads higher than a negative one; or None.
        effects: (n_layer,) log-odds moved by steering at that block alone, NaN where it was not tried; or None.
        shuffled: (k, n_layer, n_embd) directions of shuffled labels, a control for `eval`; or None.

    Arithmetic: `vector * s` is Add(vector, s); `a + b`, `a - b`, `-a` act on the data.

    Raises:
        VectorError: another shape than (n_layer, n_embd), infinite values, or layers without a usable direction.

    Example:
        >>> vector.save("mood.gguf")
        >>> ps.PersonaVector.load("mood.gguf").layers == vector.layers
        True
        >>> (vector * -0.3).strength
        -0.3
    """

    directions: NDArray[np.float32]
    layers: tuple[int, ...] = ()
    name: str = "vector"
    strength: float = 0.3
    weights: Mapping[int, float] = field(default_factory=dict)
    last_prompt: NDArray[np.float32] | None = None
    norms: NDArray[np.float32] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    separations: NDArray[np.float32] | None = None
    reliability: NDArray[np.float32] | None = None
    thresholds: NDArray[np.float32] | None = None
    means: NDArray[np.float32] | None = None
    window: tuple[float, float] = WINDOW
    aurocs: NDArray[np.float32] | None = None
    effects: NDArray[np.float32] | None = None
    shuffled: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        data = _frozen(self.directions)
        if data.ndim != 2 or 0 in data.shape:
            raise VectorError(f"directions must have the shape (n_layer, n_embd), not {data.shape}")
        if np.isinf(data).any():
            raise VectorError(f"vector {self.name!r} holds infinite values")
        object.__setattr__(self, "directions", data)
        object.__setattr__(self, "layers", tuple(sorted({int(il) for il in self.layers})))
        for il in self.layers:
            self.direction(il)
        for attribute, shape in (
            ("last_prompt", data.shape),
            ("norms", data.shape[:1]),
            ("separations", data.shape[:1]),
            ("reliability", data.shape[:1]),
            ("thresholds", data.shape[:1]),
            ("means", data.shape[:1]),
            ("aurocs", data.shape[:1]),
            ("effects", data.shape[:1]),
            ("shuffled", (*np.asarray(self.shuffled).shape[:1], *data.shape)),  # any number
        ):
            value = getattr(self, attribute)
            if value is not None:
                array = _frozen(value)
                if array.shape != shape:
                    raise VectorError(f"{attribute} must have the shape {shape}, not {array.shape}")
                object.__setattr__(self, attribute, array if array.size else None)  # no shuffled ones are none
        if not np.isfinite(self.strength):
            raise VectorError(f"strength must be finite, not {self.strength}")
        low, high = (float(x) for x in self.window)
        if not (np.isfinite([low, high]).all() and low <= 0.0 <= high):
            raise VectorError(f"window must be (low, high) around 0, not {self.window}")
        object.__setattr__(self, "window", (low, high))
        if not isinstance(self.provenance, Mapping):
            raise VectorError(f"provenance must be a mapping, not {type(self.provenance).__name__}")
        for weight in self.weights.values():
            if not (np.isfinite(weight) and weight >= 0):
                raise VectorError(f"weights must be finite and not negative, not {weight}")

    @property
    def n_layer(self) -> int:
        """Blocks of the model that it belongs to; some of them may have no direction."""
        return int(self.directions.shape[0])

    @property
    def n_embd(self) -> int:
        """Width of the residual stream."""
        return int(self.directions.shape[1])

    def direction(self, il: int) -> NDArray[np.float32]:
        """The direction at block il, (n_embd,). Raises VectorError when it is missing, zero or not finite."""
        if not 0 <= il < self.n_layer:
            raise VectorError(f"layer {il} is out of range: vector {self.name!r} has blocks 0 to {self.n_layer - 1}")
        v: NDArray[np.float32] = self.directions[il]
        if not np.isfinite(v).all():
            raise VectorError(f"vector {self.name!r} has no finite direction at layer {il}")
        if not v.any():
            raise VectorError(f"vector {self.name!r} is zero at layer {il}")
        return v

    @property
    def usable_layers(self) -> tuple[int, ...]:
        """Every block with a direction that is finite and not zero."""
        usable = np.isfinite(self.directions).all(axis=1) & self.directions.any(axis=1)
        return tuple(int(il) for il in np.flatnonzero(usable))

    def directions_at(self, layers: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(directions (len(layers), n_embd), their lengths). Raises VectorError as `direction` does."""
        if any(not 0 <= il < self.n_layer for il in layers):
            self.direction(next(il for il in layers if not 0 <= il < self.n_layer))
        data = self.directions[list(layers)].astype(np.float64)
        lengths: NDArray[np.float64] = np.sqrt(np.einsum("le,le->l", data, data))
        for il, length in zip(layers, lengths, strict=True):
            if not (np.isfinite(length) and length > 0):
                self.direction(il)  # says which of the two it is
        return data, lengths

    def weights_over(self, layers: Sequence[int]) -> dict[int, float]:
        """Share of the total strength for each of `layers`, summing to 1."""
        given = {il: float(self.weights.get(il, 0.0)) for il in layers} if self.weights else {}
        total = sum(given.values())
        if total <= 0:
            return {il: 1.0 / len(layers) for il in layers}
        return {il: w / total for il, w in given.items()}

    def scaled(self, strength: float, norms: NDArray[np.float32], layers: Sequence[int]) -> NDArray[np.float64]:
        """(len(layers), n_embd) rows rho w_il m_il v_il / ||v_il||, the weights over these layers."""
        data, lengths = self.directions_at(layers)
        weights = np.array(list(self.weights_over(layers).values()))
        scales = strength * weights * norms[list(layers)] / lengths
        rows: NDArray[np.float64] = scales[:, None] * data
        return rows

    def at(self, layers: Iterable[int]) -> PersonaVector:
        """The same vector, recommended at other layers."""
        return replace(self, layers=tuple(layers), weights={})

    def incremental(self, layers: Iterable[int] | None = None) -> PersonaVector:
        """The multi-layer form whose edits do not count twice: at each block only what the direction gains there.

        d_il = v_il - v_(il - 1) over `layers` (all usable ones after the first when None), weighted by
        ||d_il|| / m_il, so that the shares of the strength follow the data.

        Raises VectorError where a block below one of `layers` has no direction, or the vector has no norms.

        Source: arXiv 2507.21509, appendix on multi-layer steering.
        """
        usable = self.usable_layers
        chosen = [il for il in usable if il - 1 in usable] if layers is None else sorted({int(il) for il in layers})
        if self.norms is None:
            raise VectorError(f"vector {self.name!r} carries no norms of its model, which weigh the increments")
        if not chosen:
            raise VectorError(f"vector {self.name!r} has no two neighbouring blocks with a direction")
        data = np.full_like(self.directions, np.nan)
        for il in chosen:
            if il == 0:
                raise VectorError("block 0 has no block before it to take the increment from")
            data[il] = self.direction(il) - self.direction(il - 1)
        weights = {il: float(np.linalg.norm(data[il]) / self.norms[il]) for il in chosen}
        name = f"{self.name} (incremental)"
        return PersonaVector(
            data, tuple(chosen), name, self.strength, weights, norms=self.norms, provenance=self._origin(name)
        )

    def __mul__(self, strength: float) -> Add:
        return Add(self, float(strength))

    __rmul__ = __mul__

    def _with(self, data: NDArray[np.float32], name: str) -> PersonaVector:
        usable = [il for il in self.layers if np.isfinite(data[il]).all() and data[il].any()]
        return PersonaVector(data, tuple(usable), name, self.strength, norms=self.norms, provenance=self._origin(name))

    def _origin(self, expression: str) -> dict[str, Any]:
        method = "imported" if self.provenance.get("method") == "imported" else "arithmetic"
        kept = {key: self.provenance[key] for key in ORIGIN if key in self.provenance}
        return {"method": method, "expression": expression, **kept}

    def __add__(self, other: PersonaVector) -> PersonaVector:
        if not isinstance(other, PersonaVector):
            return NotImplemented
        self._check_same(other)
        return self._with(self.directions + other.directions, f"{self.name}+{other.name}")

    def __sub__(self, other: PersonaVector) -> PersonaVector:
        if not isinstance(other, PersonaVector):
            return NotImplemented
        self._check_same(other)
        return self._with(self.directions - other.directions, f"{self.name}-{other.name}")

    def __neg__(self) -> PersonaVector:
        name = f"-{self.name}"
        turned = ("last_prompt", "thresholds", "means", "shuffled")
        flipped = {a: -value for a in turned if (value := getattr(self, a)) is not None}
        low, high = self.window
        return replace(
            self,
            directions=-self.directions,
            name=name,
            window=(-high, -low),
            provenance=self._origin(name),
            **flipped,
        )

    def _check_same(self, other: PersonaVector) -> None:
        if self.directions.shape != other.directions.shape:
            raise IncompatibleVector(
                f"{self.name!r} is {self.directions.shape}, {other.name!r} is {other.directions.shape} "
                "(n_layer, n_embd): they are for different models"
            )

    def cosine(self, other: PersonaVector) -> NDArray[np.float64]:
        """Cosine with another vector per block, (n_layer,); NaN where one has no direction."""
        self._check_same(other)
        a, b = self.directions.astype(np.float64), other.directions.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            out: NDArray[np.float64] = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        return out

    def save(self, path: str | os.PathLike[str], *, strength: float | None = None) -> None:
        """Write a control-vector GGUF that llama.cpp loads as it is; see personasteer.ship.save_control_vector."""
        from personasteer.ship import save_control_vector

        save_control_vector(self, path, strength=strength)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, offset: int = 0) -> PersonaVector:
        """Read a control-vector GGUF of any origin; see personasteer.ship.load_control_vector for `offset`."""
        from personasteer.ship import load_control_vector

        return load_control_vector(path, offset=offset)

    @classmethod
    def from_array(cls, directions: ArrayLike, layers: Iterable[int], name: str = "vector") -> PersonaVector:
        """From any (n_layer, n_embd) array; raises VectorError as the constructor does."""
        try:
            data = np.asarray(directions, dtype=np.float32)
        except (TypeError, ValueError) as e:
            raise ArgumentError(f"directions must be numbers of the shape (n_layer, n_embd): {e}") from e
        return cls(data, tuple(layers), name)

    def __repr__(self) -> str:
        return f"PersonaVector({self.name!r}, n_layer={self.n_layer}, n_embd={self.n_embd}, layers={self.layers})"


def block_ranges(layers: Sequence[int]) -> str:
    """ "3, 5-9" of blocks in ascending order."""
    runs: list[list[int]] = []
    for il in layers:
        if runs and il == runs[-1][1] + 1:
            runs[-1][1] = il
        else:
            runs.append([il, il])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
