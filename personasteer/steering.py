"""What is done to the residual stream: edits with scopes, and steerings as lists of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from personasteer.errors import ArgumentError, IncompatibleVector, VectorError
from personasteer.identity import differences

if TYPE_CHECKING:
    from personasteer.vectors import PersonaVector

log = logging.getLogger("personasteer")

Scope: TypeAlias = str | tuple[int, ...]
PLACES = ("all", "prompt", "response")
ROLES = ("system", "user", "assistant")
SCOPES = (*PLACES, *ROLES, "thinking")
SITES = ("embd", "mid", "block")
Roles: TypeAlias = Mapping[str, NDArray[np.bool_]]  # which tokens each of ROLES and "thinking" covers
Threshold: TypeAlias = "float | Sequence[float] | NDArray[Any] | None"


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


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What all edits have in common: where they apply. Keyword arguments of every edit:

    Args:
        scope: which tokens. For a prompt of P tokens, counted from 0: "all"; "prompt", t <= P - 2; "response",
            t >= P - 1, the prompt's last token and on; "system", "user", "assistant", the contents of these roles'
            messages in the chat template, generated text counting as the assistant's; "thinking", what stands in a
            thinking block, its closing marker included; or positions of given tokens.
        layers: blocks to edit; None for the edit's own default.
        start, stop: only where start <= j < stop, j = t - (P - 1) counting the tokens of the response. Prompt tokens
            have j < 0.
        half_life: the edit's strength is halved every so many tokens of the response, 2^(-max(j, 0) / half_life).

    Raises:
        ArgumentError: an unknown scope, a schedule that is empty, a half-life that is not positive.
    """

    scope: Scope = "all"
    layers: tuple[int, ...] | None = None
    start: int | None = None
    stop: int | None = None
    half_life: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.scope, str):
            if self.scope not in SCOPES:
                raise ArgumentError(f"scope must be one of {', '.join(SCOPES)} or token positions, not {self.scope!r}")
        elif isinstance(self.scope, Iterable) and all(isinstance(t, (int, np.integer)) and t >= 0 for t in self.scope):
            object.__setattr__(self, "scope", tuple(int(t) for t in self.scope))
        else:
            raise ArgumentError(f"token positions must be a list of integers from 0, not {self.scope!r}")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted({int(il) for il in self.layers})))
        if self.start is not None and self.stop is not None and self.start >= self.stop:
            raise ArgumentError(f"the schedule is empty: start {self.start}, stop {self.stop}")
        if self.half_life is not None and not (math.isfinite(self.half_life) and self.half_life > 0):
            raise ArgumentError(f"half_life must be a positive number of tokens, not {self.half_life}")

    def __add__(self, other: Any) -> Steering:
        return Steering([self, *as_steering(other)])

    def __mul__(self, factor: float) -> Self:
        raise ArgumentError(f"{type(self).__name__} has no strength that could be scaled")

    def __rmul__(self, factor: float) -> Self:
        return self * factor

    @property
    def inert(self) -> bool:
        """Whether it changes nothing, wherever it is."""
        return False

    def terms(self, model: SteeredModel) -> dict[int, Term]:
        """What is done at each site of `model`; site il is the output of block il. Raises as the class says."""
        raise NotImplementedError

    def covers(self, n_tokens: int, n_prompt: int | None, roles: Roles | None = None) -> NDArray[np.bool_]:
        """Which of n_tokens given tokens are edited. n_prompt None: all is prompt."""
        n_prompt = n_tokens + 1 if n_prompt is None else n_prompt
        t = np.arange(n_tokens)
        j = t - (n_prompt - 1)
        if self.scope == "all":
            covered = np.ones(n_tokens, bool)
        elif self.scope == "prompt":
            covered = j < 0
        elif self.scope == "response":
            covered = j >= 0
        elif isinstance(self.scope, str):
            if roles is None:
                raise ArgumentError(
                    f"scope {self.scope!r} needs messages in a chat template (chat, or messages to capture): a plain "
                    "text has no roles"
                )
            covered = roles[self.scope].copy()
        else:
            covered = np.isin(t, np.asarray(self.scope, dtype=np.int64))
        if self.start is not None:
            covered &= j >= self.start
        if self.stop is not None:
            covered &= j < self.stop
        return covered

    @property
    def needs_roles(self) -> bool:
        """Whether its scope is a role or the thinking block, which only a chat template tells."""
        return isinstance(self.scope, str) and self.scope not in PLACES

    def covers_generated(self, j: int, thinking: bool) -> bool:
        """Whether the j-th token of the response is edited when it is generated."""
        covered = thinking if self.scope == "thinking" else self.scope in ("all", "response", "assistant")
        return covered and (self.start is None or j >= self.start) and (self.stop is None or j < self.stop)


@dataclass(frozen=True)
class Gate:
    """Open for a token where sign * (<h, direction> - at) > 0; h is the block's output before its edits."""

    direction: NDArray[np.float64]  # unit length
    at: float
    sign: float


@dataclass(frozen=True)
class Term:
    """What one edit does at one block. Additions: `row`. Windows: the reading on `read` is kept in [low, high], or
    (`target`) moved over to another direction.
    """

    row: NDArray[np.float64] | None = None
    keep_norm: bool = False
    read: NDArray[np.float64] | None = None  # unit length, as `target`
    low: float = -math.inf
    high: float = math.inf
    share: float = 1.0
    target: NDArray[np.float64] | None = None
    gate: Gate | None = None


@dataclass(frozen=True)
class Add(Edit):
    """Adds a direction to the block outputs: h_il <- h_il + c_il v_il.

    With a relative strength rho, c_il = rho * w_il * m_il / ||v_il||, where m_il is the median norm of the block's
    output in this model and the weights w_il sum to 1 over the edited layers: rho is the total dose, in units of the
    stream's own norm, whatever the scale of the data and the number of layers. With `raw`, c_il = strength. With
    `keep_norm` the stream is turned and keeps its length: h <- (h + b) ||h|| / ||h + b||, b the sum of such additions;
    plain additions come after that.

    Args:
        vector: the directions.
        strength: rho, signed; positive is more of the trait. 0.2 to 0.3 is plainly visible on small models, about
            0.5 on one layer is where coherence starts to go. With `raw`, alpha.
        raw: take the strength as alpha, the factor of the data as stored.
        keep_norm: turn the stream instead of lengthening it.
        layers: blocks to edit; the vector's recommended layers when None. More in Edit.

    Raises:
        ArgumentError: a strength that is not finite, an unknown scope.
        VectorError: when used, if there is no layer, or a direction is missing, zero or not finite at an edited layer.

    Source: arXiv 2507.21509, section 3.2 (steering: h <- h + alpha v).
    """

    vector: PersonaVector
    strength: float
    raw: bool = field(default=False, kw_only=True)
    keep_norm: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.strength):
            raise ArgumentError(f"strength must be a finite number, not {self.strength}")

    def __mul__(self, factor: float) -> Add:
        return replace(self, strength=self.strength * float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> Add:
        return self * -1.0

    @property
    def inert(self) -> bool:
        return self.strength == 0.0

    def terms(self, model: SteeredModel) -> dict[int, Term]:
        layers = _layers_of(self, self.vector, model, self.vector.layers)
        if self.raw:
            rows = self.strength * self.vector.directions_at(layers)[0]
        elif np.isfinite(model.norms[list(layers)]).all():
            rows = self.vector.scaled(self.strength, model.norms, layers)
        else:
            raise VectorError(
                f"the norms of {model.name} are not known, so strength {self.strength} has no scale: pass raw=True"
            )
        return {il: Term(row=row, keep_norm=self.keep_norm) for il, row in zip(layers, rows, strict=True)}


@dataclass(frozen=True)
class Cap(Edit):
    """Keeps the reading <h, v-hat> from rising above tau: h <- h - v-hat max(<h, v-hat> - tau, 0).

    Args:
        vector: the directions; v-hat = v / ||v||.
        tau: (n_layer,) thresholds in units of <h, v-hat>; a number for one layer; None for those stored in the vector.
        layers: blocks to edit; the vector's recommended layers when None. More in Edit.

    Raises:
        VectorError: when used, if no threshold is stored, or one is missing or not finite at an edited layer.
        ArgumentError: a single number for several layers, thresholds of another length.

    Source: arXiv 2601.10387 (activation capping).
    """

    vector: PersonaVector
    tau: Threshold = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tau", _numbers(self.tau, "tau"))

    def terms(self, model: SteeredModel) -> dict[int, Term]:
        return {il: Term(read=v, high=t) for il, v, t in self._thresholds(model)}

    def _thresholds(self, model: SteeredModel) -> list[tuple[int, NDArray[np.float64], float]]:
        layers = _layers_of(self, self.vector, model, self.vector.layers)
        units = _units(self.vector, layers)
        limits = _values_at(self.vector, model, "thresholds", self.tau, layers, "tau")
        return list(zip(layers, units, limits, strict=True))


@dataclass(frozen=True)
class Floor(Cap):
    """Keeps the reading <h, v-hat> from falling below tau: h <- h + v-hat max(tau - <h, v-hat>, 0).

    The mirror of Cap, with the same arguments and errors.
    """

    def terms(self, model: SteeredModel) -> dict[int, Term]:
        return {il: Term(read=v, low=t) for il, v, t in self._thresholds(model)}


@dataclass(frozen=True)
class Ablate(Edit):
    """Takes a direction out of the residual stream: h <- h + share * v-hat (to - <h, v-hat>).

    Args:
        vector: the directions; v-hat = v / ||v||.
        to: the reading that is left: 0; "mean", the model's mean over everyday texts as stored in the vector; an
            (n_layer,) array, or a number for one layer.
        share: how much of the way, 0 to 1.
        sites: where in a block. "block", its output; "mid", the stream between its attention and its feed-forward,
            with the block's direction; "embd", the token embeddings, with the direction of the lowest of the layers.
            One direction at all three is what no weight writes any more: see personasteer.ship.ablate_weights.
        layers: blocks to edit; every block with a direction when None. More in Edit.

    Raises:
        ArgumentError: a share outside 0..1, an unknown site.
        VectorError: when used, if "mean" is asked for and none is stored, or a direction is unusable.
        ModelError: when used, if the architecture has no such site.

    Source: arXiv 2406.11717, section 2.4 (directional ablation).
    """

    vector: PersonaVector
    to: float | str | Sequence[float] | NDArray[Any] = 0.0
    share: float = 1.0
    sites: tuple[str, ...] = field(default=("block",), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        sites = (self.sites,) if isinstance(self.sites, str) else tuple(self.sites)
        if not sites or not set(sites) <= set(SITES):
            raise ArgumentError(f"sites must be some of {', '.join(SITES)}, not {self.sites!r}")
        object.__setattr__(self, "sites", tuple(site for site in SITES if site in sites))
        if not (math.isfinite(self.share) and 0.0 <= self.share <= 1.0):
            raise ArgumentError(f"share must be between 0 and 1, not {self.share}")
        if isinstance(self.to, str) and self.to != "mean":
            raise ArgumentError(f'to must be a number, an array or "mean", not {self.to!r}')
        if not isinstance(self.to, str):
            object.__setattr__(self, "to", _numbers(self.to, "to"))

    def __mul__(self, factor: float) -> Ablate:
        return replace(self, share=self.share * float(factor))

    __rmul__ = __mul__

    @property
    def inert(self) -> bool:
        return self.share == 0.0

    def terms(self, model: SteeredModel) -> dict[int, Term]:
        layers = _layers_of(self, self.vector, model, self.vector.usable_layers)
        units = _units(self.vector, layers)
        if isinstance(self.to, (int, float)) and self.to == 0:
            targets = [0.0] * len(layers)
        else:
            given = None if isinstance(self.to, str) else self.to
            targets = _values_at(self.vector, model, "means", given, layers, "to")
        here = {
            il: Term(read=v, low=t, high=t, share=self.share) for il, v, t in zip(layers, units, targets, strict=True)
        }
        first = here[min(here)]
        at: dict[int, Term] = {}
        for site in self.sites:
            if site == "embd":
                at[2 * model.n_layer] = first
            else:
                at |= {site_at(site, il, model): t for il, t in here.items()}
        return at


@dataclass(frozen=True)
class Redirect(Edit):
    """Moves what the stream reads on one direction over to another: the reading of `vector` becomes 0, that of
    `target` grows by as much. For orthogonal directions a, b of unit length: h <- h + (b - a) <h, a>.

    Args:
        vector, target: the directions, of which the lengths do not matter.
        share: how much of it, 0 to 1.
        layers: blocks to edit; every block where both have a direction when None. More in Edit.

    Raises:
        ArgumentError: a share outside 0..1.
        VectorError: when used, if a direction is unusable or the two are the same.
    """

    vector: PersonaVector
    target: PersonaVector
    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.share) and 0.0 <= self.share <= 1.0):
            raise ArgumentError(f"share must be between 0 and 1, not {self.share}")

    def __mul__(self, factor: float) -> Redirect:
        return replace(self, share=self.share * float(factor))

    __rmul__ = __mul__

    @property
    def inert(self) -> bool:
        return self.share == 0.0

    def terms(self, model: SteeredModel) -> dict[int, Term]:
        both = tuple(il for il in self.vector.usable_layers if il in set(self.target.usable_layers))
        layers = _layers_of(self, self.vector, model, both)
        check_fits(self.target, model)
        pairs = zip(_units(self.vector, layers), _units(self.target, layers), strict=True)
        return {
            il: Term(read=a, low=0.0, high=0.0, share=self.share, target=b)
            for il, (a, b) in zip(layers, pairs, strict=True)
        }


@dataclass(frozen=True)
class When:
    """Applies an edit only where a condition holds.

    on="prompt": the condition is read once, while the prompt is computed; where it holds, the edit applies from the
    prompt's last token on. It holds when the mean over its layers of (reading - threshold) is above 0, the reading
    being <h, c-hat> averaged over the prompt's tokens but the first (pool="mean"; the first is where attention parks,
    with a norm of its own), or that of its last token (pool="last"). A text without a response never meets it.
    on="token": each token is judged by itself, at each edited block by its own reading there, before the block's edits.

    Args:
        condition: the directions to read.
        edit: Add, Cap, Floor, Ablate or Redirect. Its scope still holds.
        threshold: (n_layer,) array in units of <h, c-hat>; a number for one layer; None for those stored in
            `condition`.
        above: hold above the threshold; below it when False.
        layers: blocks to read on="prompt"; the condition's recommended layers when None.

    Raises:
        ArgumentError: an unknown `on` or `pool`, a condition inside a condition.
        VectorError: when used, if no threshold is stored, or a direction is unusable at a layer that is read.

    Source: arXiv 2409.05907 (conditional activation steering).
    """

    condition: PersonaVector
    edit: Edit
    threshold: Threshold = None
    above: bool = True
    on: str = "prompt"
    pool: str = "mean"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.edit, Edit):
            raise ArgumentError(f"When needs one edit such as vector * 0.3, not {_name(self.edit)}")
        if type(self.condition).__name__ != "PersonaVector":
            raise ArgumentError(f"the condition must be a PersonaVector, not {type(self.condition).__name__}")
        if self.on not in ("prompt", "token"):
            raise ArgumentError(f"on must be prompt or token, not {self.on!r}")
        if self.pool not in ("mean", "last"):
            raise ArgumentError(f"pool must be mean or last, not {self.pool!r}")
        object.__setattr__(self, "threshold", _numbers(self.threshold, "threshold"))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted({int(il) for il in self.layers})))

    def __add__(self, other: Any) -> Steering:
        return Steering([self, *as_steering(other)])

    def __mul__(self, factor: float) -> When:
        return replace(self, edit=self.edit * factor)

    __rmul__ = __mul__

    @property
    def inert(self) -> bool:
        """Whether the edit changes nothing even where the condition holds."""
        return self.edit.inert

    def terms(self, model: SteeredModel) -> dict[int, Term]:
        """The edit's terms; on="token" with a gate each."""
        terms = self.edit.terms(model)
        if self.on == "prompt" or not terms:
            return terms
        check_fits(self.condition, model)
        layers = tuple(sorted({block_of_site(site, model) for site in terms}))
        units = _units(self.condition, layers)
        limits = _values_at(self.condition, model, "thresholds", self.threshold, layers, "threshold")
        sign = 1.0 if self.above else -1.0
        gates = {il: Gate(v, t, sign) for il, v, t in zip(layers, units, limits, strict=True)}
        return {site: replace(term, gate=gates[block_of_site(site, model)]) for site, term in terms.items()}

    def probe(self, model: SteeredModel) -> tuple[tuple[int, ...], list[NDArray[np.float64]], list[float]]:
        """(layers, unit directions, thresholds) to read on the prompt."""
        layers = _layers_of(self, self.condition, model, self.condition.layers)
        if self.pool == "mean" and model.n_layer - 1 in layers:
            raise ArgumentError(
                f"the condition reads block {model.n_layer - 1}, the last one, which llama.cpp computes for the "
                'prompt\'s last token only: use pool="last" or other layers'
            )
        units = _units(self.condition, layers)
        return layers, units, _values_at(self.condition, model, "thresholds", self.threshold, layers, "threshold")


AnyEdit: TypeAlias = Edit | When


def site_at(site: str, il: int, model: SteeredModel) -> int:
    """The number of "block" or "mid" of block il among the sites of a model, as csrc/graph_edit.h counts them."""
    return il if site == "block" else model.n_layer + il


def name_site(site: int, model: SteeredModel) -> str:
    """A site in words."""
    if site < model.n_layer:
        return f"layer {site}"
    return f"the mid of block {site - model.n_layer}" if site < 2 * model.n_layer else "the embeddings"


def block_of_site(site: int, model: SteeredModel) -> int:
    """The block that a site belongs to; block 0 for the embeddings."""
    return site % model.n_layer if site < 2 * model.n_layer else 0


def _layers_of(
    edit: Edit | When, vector: PersonaVector, model: SteeredModel, default: Sequence[int]
) -> tuple[int, ...]:
    check_fits(vector, model)
    layers = edit.layers if edit.layers is not None else tuple(default)
    if not layers:
        raise VectorError(f"vector {vector.name!r} names no layer to steer at: give it some with vector.at([...])")
    for il in layers:
        if not 0 <= il < model.n_layer:
            raise VectorError(f"layer {il} is out of range: the model has blocks 0 to {model.n_layer - 1}")
    return layers


def _units(vector: PersonaVector, layers: Sequence[int]) -> list[NDArray[np.float64]]:
    data, lengths = vector.directions_at(layers)
    return list(data / lengths[:, None])


def _numbers(value: Any, name: str) -> float | tuple[float, ...] | None:
    """Per-layer numbers as an edit keeps them: so that equal edits are equal."""
    if value is None:
        return None
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as e:
        raise ArgumentError(f"{name} must be numbers, one for each layer, not {value!r:.80}") from e
    if array.ndim > 1:
        raise ArgumentError(f"{name} must have one number for each layer, not the shape {array.shape}")
    return float(array) if array.ndim == 0 else tuple(float(x) for x in array)


def _values_at(
    vector: PersonaVector, model: SteeredModel, stored: str, given: Any, layers: Sequence[int], name: str
) -> list[float]:
    """Per-layer numbers: given ones, or the vector's own."""
    if given is None:
        given = getattr(vector, stored)
        if given is None:
            raise VectorError(f"vector {vector.name!r} stores no {stored}: pass {name}=")
    array = np.asarray(given, np.float64)
    if array.ndim == 0 and len(layers) != 1:
        raise ArgumentError(
            f"{name}={given} is one number for {len(layers)} layers: readings differ from layer to layer, pass "
            "an array of n_layer numbers"
        )
    # a vector of another tool may have fewer blocks than the model
    if array.ndim and array.shape not in ((model.n_layer,), (vector.n_layer,)):
        raise ArgumentError(
            f"{name} must have one number for each of the {model.n_layer} layers, not the shape {array.shape}"
        )
    values = array[list(layers)] if array.ndim else array[None]
    if not np.isfinite(values).all():
        raise VectorError(f"{name} is not finite at layer {layers[int(np.argmin(np.isfinite(values)))]}")
    return [float(v) for v in values]


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


class Steering(list[AnyEdit]):
    """A list of edits that one request runs with, together: additions first, then what caps, floors and ablates.

    Example:
        >>> steering = vector * 0.2 + ps.Ablate(other, scope="response")
        >>> [type(edit).__name__ for edit in steering]
        ['Add', 'Ablate']
        >>> round(steering.rho(model), 3)
        0.2
    """

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

    @property
    def needs_roles(self) -> bool:
        """Whether some edit's scope is a role or the thinking block."""
        return any((e.edit if isinstance(e, When) else e).needs_roles for e in self)

    def rho(self, model: SteeredModel) -> float:
        """The total dose of its additions, all active: sum over layers of ||sum of the added vectors|| / m_il."""
        rows: dict[int, NDArray[np.float64]] = {}
        for edit in self:
            for il, term in edit.terms(model).items() if not edit.inert else ():
                if term.row is not None:
                    rows[il] = rows[il] + term.row if il in rows else term.row
        return dose(rows, model)


def dose(rows: Mapping[int, NDArray[np.float64]], model: SteeredModel) -> float:
    """Total rho of rows {site: (n_embd,)} that are added."""
    if not rows:
        return 0.0
    stack = np.stack(list(rows.values()))
    norms = model.norms[[block_of_site(site, model) for site in rows]]
    return float((np.sqrt(np.einsum("le,le->l", stack, stack)) / norms).sum())


Steer: TypeAlias = AnyEdit | Steering | Sequence[AnyEdit] | None


def as_steering(steer: Steer) -> Steering:
    """One edit, several, or none, as a Steering."""
    if steer is None:
        return Steering()
    if isinstance(steer, (Edit, When)):
        return Steering([steer])
    if isinstance(steer, Iterable) and not isinstance(steer, (str, bytes, Mapping)):
        edits = list(steer)
        for edit in edits:
            if not isinstance(edit, (Edit, When)):
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
