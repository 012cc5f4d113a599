"""What is done to the residual stream: edits, and steerings as lists of them."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from personasteer.errors import ArgumentError, IncompatibleVector, VectorError
from personasteer.identity import differences

if TYPE_CHECKING:
    from personasteer.vectors import PersonaVector

log = logging.getLogger("personasteer")

Scope: TypeAlias = str | tuple[int, ...]
SCOPES = ("all", "prompt", "response")


class SteeredModel(Protocol):
    """What an edit needs to know of the model that it runs in."""

    n_layer: int
    n_embd: int
    fingerprint: str
    identity: Mapping[str, str]

    @property
    def norms(self) -> NDArray[np.float32]: ...
    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Add:
    """Adds a direction to the block outputs: h_il <- h_il + c_il v_il.

    With a relative strength rho, c_il = rho * w_il * m_il / ||v_il||, where m_il is the median norm of the block's
    output in this model and the weights w_il sum to 1 over the edited layers: rho is the total dose, in units of the
    stream's own norm, whatever the scale of the data and the number of layers. With `raw`, c_il = strength.

    Args:
        vector: the directions.
        strength: rho, signed; positive is more of the trait. 0.2 to 0.3 is plainly visible on small models, about
            0.5 on one layer is where coherence starts to go. With `raw`, alpha.
        scope: which tokens: "all"; "prompt" (up to the one before the last of the prompt); "response" (from the
            prompt's last token on); or positions of given tokens, counted from 0.
        layers: blocks to edit; the vector's recommended layers when None.
        raw: take the strength as alpha, the factor of the data as stored.

    Raises:
        ArgumentError: a strength that is not finite, an unknown scope.
        VectorError: when used, if there is no layer, or a direction is missing, zero or not finite at an edited layer.

    Source: arXiv 2507.21509, section 3.2 (steering: h <- h + alpha v).
    """

    vector: PersonaVector
    strength: float
    scope: Scope = "all"
    layers: tuple[int, ...] | None = None
    raw: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ArgumentError(f"strength must be a finite number, not {self.strength}")
        if isinstance(self.scope, str):
            if self.scope not in SCOPES:
                raise ArgumentError(f"scope must be one of {', '.join(SCOPES)} or token positions, not {self.scope!r}")
        elif isinstance(self.scope, Iterable) and all(isinstance(t, (int, np.integer)) and t >= 0 for t in self.scope):
            object.__setattr__(self, "scope", tuple(int(t) for t in self.scope))
        else:
            raise ArgumentError(f"token positions must be a list of integers from 0, not {self.scope!r}")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted({int(il) for il in self.layers})))

    def __mul__(self, factor: float) -> Add:
        return replace(self, strength=self.strength * float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> Add:
        return self * -1.0

    def __add__(self, other: Add | Steering) -> Steering:
        return Steering([self]) + other

    def rows(self, model: SteeredModel) -> dict[int, NDArray[np.float64]]:
        """What is added at each block of `model`: {il: (n_embd,)}."""
        vector = self.vector
        check_fits(vector, model)
        layers = self.layers if self.layers is not None else vector.layers
        if self.strength == 0.0:
            return {}
        if not layers:
            raise VectorError(f"vector {vector.name!r} names no layer to steer at: give it some with vector.at([...])")
        for il in layers:
            if not 0 <= il < model.n_layer:
                raise VectorError(f"layer {il} is out of range: the model has blocks 0 to {model.n_layer - 1}")
        data, lengths = vector.directions_at(layers)
        if self.raw:
            scales = np.full(len(layers), self.strength)
        else:
            weights = np.array(list(vector.weights_over(layers).values()))
            scales = self.strength * weights * model.norms[list(layers)] / lengths
        return dict(zip(layers, scales[:, None] * data, strict=True))

    def covers(self, n_tokens: int, n_prompt: int | None) -> tuple[NDArray[np.bool_], bool]:
        """Which of n_tokens given tokens are edited, and whether generated ones are. n_prompt None: all is prompt."""
        index = np.arange(n_tokens)
        response = np.zeros(n_tokens, bool) if n_prompt is None else index >= n_prompt - 1
        if self.scope == "all":
            return np.ones(n_tokens, bool), True
        if self.scope == "prompt":
            return ~response, False
        if self.scope == "response":
            return response, True
        return np.isin(index, np.asarray(self.scope, dtype=np.int64)), False


Edit: TypeAlias = Add

_warned: set[tuple[str, str]] = set()


def check_fits(vector: PersonaVector, model: SteeredModel) -> None:
    """Raise IncompatibleVector for another shape; warn, once per pair of models, for another fingerprint.

    A file of another tool does not say how many blocks its model has; it may have fewer directions.
    """
    known = vector.provenance.get("method") != "imported"
    if vector.n_embd != model.n_embd or vector.n_layer > model.n_layer or (known and vector.n_layer < model.n_layer):
        raise IncompatibleVector(
            f"vector {vector.name!r} is for {vector.n_layer} blocks of width {vector.n_embd}, "
            f"but the model has {model.n_layer} of width {model.n_embd}"
        )
    origin = str(vector.provenance.get("fingerprint") or "")
    if origin and origin != model.fingerprint and (origin, model.fingerprint) not in _warned:
        _warned.add((origin, model.fingerprint))
        log.warning(
            "vector %r was derived on %s, this model is %s with %s; strengths use this model's norms, the effect is "
            "not proven here",
            vector.name,
            vector.provenance.get("model", "another model"),
            model.name,
            differences(vector.provenance.get("identity") or {}, model.identity),
        )


class Steering(list[Edit]):
    """A list of edits that one request runs with. Additions sum up."""

    def __add__(self, other: Any) -> Steering:  # type: ignore[override]
        return Steering([*self, *as_steering(other)])

    def __radd__(self, other: Any) -> Steering:
        return Steering([*as_steering(other), *self])

    def __mul__(self, factor: Any) -> Steering:
        return Steering([edit * float(factor) for edit in self])

    __rmul__ = __mul__

    def __iadd__(self, other: Any) -> Steering:  # type: ignore[override]
        self.extend(as_steering(other))
        return self

    def __imul__(self, factor: Any) -> Steering:
        self[:] = self * factor
        return self


Steer: TypeAlias = Add | Steering | Sequence[Add] | None


def as_steering(steer: Steer) -> Steering:
    """One edit, several, or none, as a Steering."""
    if steer is None:
        return Steering()
    if isinstance(steer, Add):
        return Steering([steer])
    if isinstance(steer, Iterable) and not isinstance(steer, (str, bytes, Mapping)):
        edits = list(steer)
        for edit in edits:
            if not isinstance(edit, Add):
                raise ArgumentError(f"an edit is needed here, such as vector * 0.3, not {_name(edit)}")
        return Steering(edits)
    raise ArgumentError(f"steer must be an edit such as vector * 0.3, a list of edits or None, not {_name(steer)}")


def per_request(steer: Any, n: int) -> list[Steering]:
    """The steering of each of n requests: a plain list is one entry each, anything else goes to all."""
    if isinstance(steer, (list, tuple)) and not isinstance(steer, Steering):
        if len(steer) != n:
            raise ArgumentError(
                f"steer has {len(steer)} entries for {n} requests; pass a Steering to give all the same"
            )
        return [as_steering(s) for s in steer]
    return [as_steering(steer)] * n


def _name(thing: object) -> str:
    if type(thing).__name__ == "PersonaVector":
        return "a bare PersonaVector (multiply it by a strength)"
    return type(thing).__name__


@dataclass(frozen=True)
class Mix:
    """A sum of additions, as the engine takes it: rows (len(layers), n_embd) float32, and their 64-bit fingerprint."""

    key: int
    layers: tuple[int, ...]
    data: NDArray[np.float32]


def compile_mixes(
    steering: Steering, model: SteeredModel, n_tokens: int, n_prompt: int | None
) -> tuple[list[Mix], list[int], int]:
    """(mixes, index of the mix per given token or -1, index for generated tokens or -1) of one request.

    Edits that do nothing (strength 0, empty scope) leave no trace: such a request is an unsteered one.
    """
    rows = [edit.rows(model) for edit in steering]
    scopes = [edit.covers(n_tokens, n_prompt) for edit in steering]
    active = [i for i, r in enumerate(rows) if r]
    if not active:
        return [], [], -1
    signatures = np.stack([np.append(*scopes[i]) for i in active])  # (edits, tokens + 1), the last column: generated
    kinds, of_token = np.unique(signatures, axis=1, return_inverse=True)
    mixes: list[Mix] = []
    index = []
    for kind in kinds.T:
        chosen = [rows[i] for i, on in zip(active, kind, strict=True) if on]
        mix = _sum_rows(chosen, model.n_embd)
        index.append(-1 if mix is None else len(mixes))
        if mix is not None:
            mixes.append(mix)
    per_token = [index[k] for k in np.ravel(of_token)]
    return mixes, per_token[:-1], per_token[-1]


def _sum_rows(rows: list[dict[int, NDArray[np.float64]]], n_embd: int) -> Mix | None:
    total: dict[int, NDArray[np.float64]] = {}
    for r in rows:
        for il, row in r.items():
            total[il] = total[il] + row if il in total else row
    layers = tuple(sorted(total))
    with np.errstate(over="ignore"):  # infinite is refused below
        data = np.array([total[il] for il in layers], np.float64).reshape(-1, n_embd).astype(np.float32)
    if not data.any():
        return None
    if not np.isfinite(data).all():
        raise VectorError("the steering adds numbers that are not finite: the strength is too large for float32")
    digest = hashlib.sha256(np.asarray(layers, np.int64).tobytes() + data.tobytes()).digest()
    return Mix(int.from_bytes(digest[:8], "little") | 1, layers, data)
