"""From a steering to what the engine takes: one mix of terms for each kind of token of a request."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer._native import load_core
from personasteer.errors import VectorError
from personasteer.steering import (
    ROLES,
    Add,
    AnyEdit,
    Edit,
    Roles,
    SteeredModel,
    Steering,
    Term,
    When,
    check_fits,
    dose,
    name_site,
)

log = logging.getLogger("personasteer")

MAX_TERMS = 64  # per request and block
MAX_CONDITION = 1e4  # of U^T U, beyond which readings cannot be set independently
SAME = 1e-12  # unit directions are one where 1 - |cosine| is below this

SLACK = 1e-6  # of a dose, for rounding

TURN, ADD, WINDOW = 0, 1, 2  # the stages of csrc/mix.h


@dataclass(frozen=True)
class Mix:
    """What is done to one kind of token. terms (n, 5): block, stage, rows of gate, read, write (-1: none); numbers
    (n, 6): gate_at, gate_sign, lo, hi, share, half_life (0: none); vectors (rows, n_embd); rho: the dose it adds.
    """

    key: int
    terms: NDArray[np.int32]
    numbers: NDArray[np.float32]
    vectors: NDArray[np.float32]
    rho: float

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({int(il) for il in self.terms[:, 0]}))

    @cached_property
    def native(self) -> Any:
        """The extension's own."""
        return load_core().Mix(key=self.key, terms=self.terms, numbers=self.numbers, vectors=self.vectors)


MISSING: Any = object()


class MixCache:
    """The mixes that a model has compiled lately, by their edits, so that a persona in use is compiled once."""

    def __init__(self, max_mixes: int = 256, max_bytes: int = 64 * 2**20) -> None:
        self._max_mixes, self._max_bytes, self._n_bytes = max_mixes, max_bytes, 0
        self._mixes: OrderedDict[tuple[AnyEdit, ...], Mix | None] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, edits: tuple[AnyEdit, ...]) -> Any:
        """The mix, None where the edits add up to nothing, MISSING where they are not known."""
        with self._lock:
            if edits not in self._mixes:
                return MISSING
            self._mixes.move_to_end(edits)
            return self._mixes[edits]

    def put(self, edits: tuple[AnyEdit, ...], mix: Mix | None) -> None:
        with self._lock:
            if edits in self._mixes:
                return
            self._mixes[edits] = mix
            self._n_bytes += _size(mix)
            while len(self._mixes) > self._max_mixes or (self._n_bytes > self._max_bytes and len(self._mixes) > 1):
                self._n_bytes -= _size(self._mixes.popitem(last=False)[1])


def _size(mix: Mix | None) -> int:
    return 1000 + (2 * mix.vectors.nbytes if mix else 0)  # the extension holds a copy


@dataclass(frozen=True)
class Reads:
    """Directions to project every token on, (layers, n, n_embd) float32."""

    layers: tuple[int, ...]
    directions: NDArray[np.float32]


@dataclass(frozen=True)
class Plan:
    """A compiled steering: the distinct mixes, the index per given token (-1: none), and for generated tokens
    [(first j, index, index inside a thinking block)].
    """

    mixes: tuple[Mix, ...]
    of_token: list[int]
    generated: list[tuple[int, int, int]]

    def same_as(self, other: Plan) -> bool:
        """Whether both do the same to every token."""
        mine, others = ([m.key for m in plan.mixes] for plan in (self, other))
        return mine == others and (not mine or (self.of_token == other.of_token and self.generated == other.generated))

    @property
    def rho(self) -> float:
        """The largest dose that a token gets."""
        return max((m.rho for m in self.mixes), default=0.0)


def check_steering(steering: Steering, model: SteeredModel) -> None:
    """Raises what a request with these edits would, whatever roles its tokens have."""
    everywhere = {role: np.ones(2, bool) for role in (*ROLES, "thinking")}
    compile_plan(steering, model, n_tokens=2, n_prompt=1, roles=everywhere)


def compile_plan(
    steering: Steering,
    model: SteeredModel,
    n_tokens: int,
    n_prompt: int | None,
    roles: Roles | None = None,
    decided: Sequence[bool] = (),
) -> Plan:
    """The plan of one request with n_tokens given tokens, n_prompt of them prompt (None: all, without a response).

    Edits that do nothing (strength 0, empty scope) leave no trace: such a request is an unsteered one. `decided` tells
    which conditions on the prompt hold, in the order of the list; without it none does, yet.

    Raises:
        VectorError: an unusable direction, more terms than fit, directions too much alike to be set independently.
        ArgumentError: a scope that the request does not have.
    """
    verdicts = iter(decided)
    edits: list[tuple[AnyEdit, Edit]] = []  # what gives the terms, what gives the scope
    masks: list[NDArray[np.bool_]] = []
    j = np.arange(n_tokens) - (n_tokens if n_prompt is None else n_prompt - 1)
    for edit in steering:
        inner = edit.edit if isinstance(edit, When) else edit
        covered = inner.covers(n_tokens, n_prompt, roles)
        if isinstance(edit, When) and edit.on == "prompt":
            if not next(verdicts, False):
                continue
            covered &= j >= 0
        if edit.inert:
            check_fits(_vector_of(edit), model)
            continue
        edits.append((edit, inner))
        masks.append(covered)
    if not edits:
        return Plan((), [-1] * n_tokens, [])
    cache = getattr(model, "mixes", None)
    terms: list[dict[int, Term]] = []
    mixes: list[Mix] = []
    known: dict[bytes, int] = {}
    used = np.zeros(len(edits), bool)

    def index_of(active: NDArray[np.bool_]) -> int:
        kind = active.tobytes()
        if kind not in known:
            used[active] = True
            chosen = tuple(e for (e, _), on in zip(edits, active, strict=True) if on)
            mix = cache.get(chosen) if cache is not None else MISSING
            if mix is MISSING:
                if not terms:
                    terms.extend(edit.terms(model) for edit, _ in edits)
                mix = _make_mix([(e, i, t) for (e, i), t, on in zip(edits, terms, active, strict=True) if on], model)
                if cache is not None:
                    cache.put(chosen, mix)
            known[kind] = -1 if mix is None else len(mixes)
            if mix is not None:
                mixes.append(mix)
        return known[kind]

    of_token = _per_column(np.stack(masks), index_of)
    generated: list[tuple[int, int, int]] = []
    first = int(j[-1]) + 1 if n_tokens else 0
    turns = {t for _, inner in edits for t in (inner.start, inner.stop) if t is not None and t > first}
    for begin in sorted({first, *turns}):
        plain, thinking = (
            index_of(np.array([inner.covers_generated(begin, thinks) for _, inner in edits]))
            for thinks in (False, True)
        )
        if not generated or generated[-1][1:] != (plain, thinking):
            generated.append((begin, plain, thinking))
    for (edit, _), ever in zip(edits, used, strict=True):
        if not (ever or terms):
            edit.terms(model)  # an unusable edit is an error also where its scope is empty
    return Plan(tuple(mixes), of_token, generated)


def _per_column(masks: NDArray[np.bool_], index_of: Callable[[NDArray[np.bool_]], int]) -> list[int]:
    """index_of every column, asked once for each distinct one."""
    packed = np.ascontiguousarray(np.packbits(masks, axis=0).T)
    if not len(packed):
        return []
    _, at, inverse = np.unique(packed.view([("", np.void, packed.shape[1])]), return_index=True, return_inverse=True)
    indices = np.full(len(at), -1)
    for kind in np.argsort(at):  # in the order of the text
        indices[kind] = index_of(masks[:, at[kind]])
    return [int(i) for i in indices[np.ravel(inverse)]]


def _vector_of(edit: AnyEdit) -> Any:
    return _vector_of(edit.edit) if isinstance(edit, When) else getattr(edit, "vector")  # noqa: B009


Active = list[tuple[AnyEdit, Edit, dict[int, Term]]]


class _Builder:
    """Collects the terms of a mix, and the vectors they share."""

    def __init__(self, n_embd: int) -> None:
        self.n_embd = n_embd
        self.terms: list[tuple[int, int, int, int, int]] = []
        self.numbers: list[tuple[float, float, float, float, float, float]] = []
        self.vectors: list[NDArray[np.float64]] = []
        self._rows: dict[int, int] = {}  # by identity; `vectors` keeps them alive

    def row(self, vector: NDArray[np.float64] | None) -> int:
        if vector is None:
            return -1
        with np.errstate(over="ignore"):  # infinite is refused when all are there
            at = self._rows.setdefault(id(vector), len(self.vectors))
        if at == len(self.vectors):
            self.vectors.append(vector)
        return at

    def push(
        self,
        il: int,
        stage: int,
        write: NDArray[np.float64],
        *,
        like: Term,
        half_life: float,
        read: NDArray[np.float64] | None = None,
        low: float = 0.0,
        high: float = 0.0,
    ) -> None:
        gate = like.gate
        self.terms.append((il, stage, self.row(gate.direction if gate else None), self.row(read), self.row(write)))
        at, sign = (gate.at, gate.sign) if gate else (0.0, 1.0)
        self.numbers.append((at, sign, low, high, like.share, half_life))


def _make_mix(active: Active, model: SteeredModel) -> Mix | None:
    """The mix of some edits together, or None where they add up to nothing."""
    build = _Builder(model.n_embd)
    layers = sorted({il for _, _, terms in active for il in terms})
    added: dict[int, NDArray[np.float64]] = {}
    for il in layers:
        first = len(build.terms)
        here = [(inner, terms[il]) for _, inner, terms in active if il in terms]
        sums: dict[Any, tuple[Term, float, NDArray[np.float64]]] = {}  # additions of one kind are one row
        for inner, term in here:
            if term.row is None:
                continue
            half_life = inner.half_life or 0.0
            gate = term.gate
            kind = (term.keep_norm, half_life, gate and (gate.direction.tobytes(), gate.at, gate.sign))
            row = sums[kind][2] + term.row if kind in sums else term.row
            sums[kind] = (term, half_life, row)
            added[il] = added[il] + term.row if il in added else term.row
        for term, half_life, row in sums.values():
            if row.any():
                build.push(il, TURN if term.keep_norm else ADD, row, like=term, half_life=half_life)
        _push_windows(build, il, name_site(il, model), [(inner, term) for inner, term in here if term.row is None])
        if sum(t[1] == WINDOW or t[2] >= 0 for t in build.terms[first:]) > MAX_TERMS:
            raise VectorError(
                f"more than {MAX_TERMS} terms at {name_site(il, model)}: fewer vectors, or fewer conditions, are needed"
            )
    if not build.terms:
        return None
    terms = np.array(build.terms, np.int32)
    limit = np.finfo(np.float32).max
    numbers = np.clip(build.numbers, -limit, limit).astype(np.float32)
    with np.errstate(over="ignore"):  # infinite is refused below
        vectors = np.array(build.vectors, np.float64).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise VectorError("the steering adds numbers that are not finite: the strength is too large for float32")
    if not vectors[terms[:, 4]].any():
        return None
    digest = hashlib.blake2b(digest_size=8)
    for part in (terms, numbers, vectors):
        digest.update(part.data)
    total = dose(added, model)
    _warn_of_dose(active, total, model)
    return Mix(int.from_bytes(digest.digest(), "little") | 1, terms, numbers, vectors, total)


@dataclass
class _Window:
    """A window on one direction of the basis."""

    basis: int
    low: float
    high: float
    half_life: float
    term: Term
    target: int = -1  # of a redirection
    factor: float = 0.0  # what leaves arrives there this many times


def _push_windows(build: _Builder, il: int, where: str, edits: list[tuple[Edit, Term]]) -> None:
    """The caps, floors, ablations and redirections of one block, in the dual basis of all their directions: with
    W = U (U^T U)^-1 each moves its own reading and none of the others'.
    """
    if not edits:
        return
    given = [d for _, term in edits for d in (term.read, term.target) if d is not None]
    basis, places = _basis(np.stack(given))
    place = iter(places)
    windows: dict[tuple[int, Any], _Window] = {}
    for inner, term in edits:
        i, sign = next(place)
        low, high = (term.low, term.high) if sign > 0 else (-term.high, -term.low)
        half_life = inner.half_life or 0.0
        if term.target is not None:
            target, target_sign = next(place)
            if target == i:
                raise VectorError(f"a redirection at {where} goes from a direction to itself")
            # one term reads a and writes both: what leaves a arrives at b
            to = len(windows)
            windows[i, to] = _Window(i, low, high, half_life, term, target, sign * target_sign)
            continue
        gate = term.gate
        kind = (half_life, term.share, gate and (gate.direction.tobytes(), gate.at, gate.sign))
        if (i, kind) in windows:
            w = windows[i, kind]
            w.low, w.high = max(w.low, low), min(w.high, high)
            if w.low > w.high:
                raise VectorError(
                    f"two edits of one direction at {where} contradict each other: at least {w.low:g}, at most "
                    f"{w.high:g}"
                )
        else:
            windows[i, kind] = _Window(i, low, high, half_life, term)
    per_direction = [w.basis for w in windows.values()]
    if len(set(per_direction)) != len(per_direction):
        raise VectorError(
            f"one direction is capped, floored, ablated or redirected twice at {where}, with different shares, "
            "conditions or half-lives: say it once"
        )
    gram = basis @ basis.T
    condition = 1.0
    if len(basis) > 1:
        eigenvalues = np.linalg.eigvalsh(gram)
        condition = float(eigenvalues[-1] / max(eigenvalues[0], np.finfo(float).tiny))
    if not condition < MAX_CONDITION:
        raise VectorError(
            f"the directions of caps, floors and ablations at {where} are too much alike to be set independently "
            f"(condition number {condition:.3g}, limit {MAX_CONDITION:g})"
        )
    dual = basis if len(basis) == 1 else np.linalg.solve(gram, basis)  # row i moves the reading on direction i alone
    for w in windows.values():
        write = dual[w.basis] if w.target < 0 else dual[w.basis] - w.factor * dual[w.target]
        build.push(il, WINDOW, write, like=w.term, half_life=w.half_life, read=basis[w.basis], low=w.low, high=w.high)


def _basis(directions: NDArray[np.float64]) -> tuple[NDArray[np.float64], list[tuple[int, float]]]:
    """The distinct ones of unit directions, and for each where it stands among them and whether the same way round (1)
    or the other (-1).
    """
    if len(directions) == 1:
        return directions, [(0, 1.0)]
    cosines = directions @ directions.T
    alike = np.tril(1.0 - np.abs(cosines) < SAME)
    first = [int(np.argmax(row)) if row.any() else i for i, row in enumerate(alike)]
    distinct = sorted(set(first))
    at = {i: k for k, i in enumerate(distinct)}
    return directions[distinct], [(at[f], float(np.sign(cosines[i, f]))) for i, f in enumerate(first)]


_warned: set[tuple[Any, ...]] = set()


def _warn_of_dose(active: Active, total: float, model: SteeredModel) -> None:
    """Say once when a dose leaves the range in which the vectors are known to keep the model coherent."""
    widest, outside = 0.0, False
    for _, inner, terms in active:
        if not isinstance(inner, Add):
            continue
        low, high = inner.vector.window
        widest = max(widest, -low, high)
        alone = len(active) == 1
        own = total if alone else dose({il: t.row for il, t in terms.items() if t.row is not None}, model)
        own = own if inner.strength > 0 else -own
        if low - SLACK <= own <= high + SLACK:
            continue
        outside = True
        if _first_time(inner.vector.name, round(own, 3)):
            log.warning(
                "strength %.3g of %r is outside its window %g to %g: the model may lose coherence",
                own, inner.vector.name, low, high,
            )  # fmt: skip
    if widest and total > widest + SLACK and not outside and _first_time("mix", round(total, 3)):
        log.warning("the mix adds rho %.3g in all, its vectors' windows end at %g: the model may lose coherence",
                    total, widest)  # fmt: skip


def _first_time(*what: Any) -> bool:
    if what in _warned or len(_warned) > 1000:
        return False
    _warned.add(what)
    return True


class Conditions:
    """The conditions on the prompt of one steering: what to read, and what follows from the readings."""

    def __init__(self, steering: Steering, model: SteeredModel) -> None:
        self._edits = [e for e in steering if isinstance(e, When) and e.on == "prompt" and not e.inert]
        self._all = [e for e in steering if isinstance(e, When) and e.on == "prompt"]
        self._probes = [e.probe(model) for e in self._edits]

    def __bool__(self) -> bool:
        return bool(self._edits)

    @property
    def directions(self) -> list[dict[int, NDArray[np.float64]]]:
        """One read-out for each condition: {il: direction}."""
        return [dict(zip(layers, units, strict=True)) for layers, units, _ in self._probes]

    def decide(self, readings: NDArray[np.float32], layers: Sequence[int], n_prompt: int) -> list[bool]:
        """Which hold; readings (tokens, layers, n) with this object's read-outs first."""
        holds: dict[int, bool] = {}
        for k, (edit, (at, _, limits)) in enumerate(zip(self._edits, self._probes, strict=True)):
            columns = [list(layers).index(il) for il in at]
            first = n_prompt - 1 if edit.pool == "last" else min(1, n_prompt - 1)
            values = readings[first:n_prompt, columns, k].astype(np.float64).mean(axis=0)
            margin = float(np.mean(values - np.asarray(limits)))
            holds[id(edit)] = margin > 0 if edit.above else margin < 0
        return [holds.get(id(e), False) for e in self._all]


def make_reads(columns: Sequence[dict[int, NDArray[np.float64]]], n_embd: int) -> Reads | None:
    """Read-outs {il: direction} side by side over all their layers; zero where one does not read."""
    layers = tuple(sorted({il for column in columns for il in column}))
    if not layers:
        return None
    directions = np.zeros((len(layers), len(columns), n_embd), np.float32)
    for k, column in enumerate(columns):
        for il, direction in column.items():
            directions[layers.index(il), k] = direction
    return Reads(layers, directions)
