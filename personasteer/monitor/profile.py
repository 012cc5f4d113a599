"""A model on fixed texts: how it takes the traits' words, and where its stream stands before it answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.engine import Progress
from personasteer.errors import ArgumentError
from personasteer.evaluate import Cell, cell_log_odds, make_cells, random_vectors, trait_of
from personasteer.model import Model
from personasteer.monitor.everyday import clean_prompts
from personasteer.monitor.thresholds import last_states, prompted
from personasteer.progress import Meter
from personasteer.statistics import bootstrap_interval
from personasteer.steering import Steering
from personasteer.traits import Trait
from personasteer.vectors import PersonaVector

N_PROMPTS = 60  # of the ordinary prompts left for testing
N_QUESTIONS = 12  # of each trait's held-out ones, with a continuation pair each
N_ASKED = 3  # of each trait's deriving ones, under all its system prompts
N_RANDOM = 200

LEAST_DOSE = 0.03  # of a stream that moved; a new quantization moves it by about 0.001 along a trait
LEAST_COSINE = 0.2
LEAST_WORDS = 0.1  # nats per token; a new quantization changes them by up to 0.03


@dataclass(frozen=True)
class Profile:
    """A model as it answers, unsteered.

    Args:
        log_odds: for each trait (n_questions,): log p(trait) / n_tok - log p(anti) / n_tok of a continuation pair, in
            nats per token.
        states: (n_prompts, n_layer, n_embd) block outputs at the last token of ordinary prompts, or (1, ..) their mean.
        norms: (n_layer,) m_il of the model.
        directions: for each trait (n_layer, n_embd), the difference of means of block outputs at the last token of
            three of its deriving questions, under its encouraging and its opposite system prompts; of a model without a
            system role, over its continuations as answers, NaN at the last block.
    """

    log_odds: Mapping[str, NDArray[np.float64]]
    states: NDArray[np.float32]
    norms: NDArray[np.float32]
    directions: Mapping[str, NDArray[np.float32]]


def measure_profile(
    model: Model,
    traits: Sequence[Trait],
    *,
    n_prompts: int = N_PROMPTS,
    n_questions: int = N_QUESTIONS,
    n_pairs: int = 1,
    directions: bool = True,
    from_answers: bool = False,
    progress: Progress | None = None,
) -> Profile:
    """The profile of a model, of traits that have continuations and held-out questions (others are left out).

    Args:
        n_pairs: continuation pairs for each question.
        directions: measure them, too; what a model is compared with needs them, the other one does not.
        from_answers: take them over continuations as answers, as of a model without a system role.
    """
    measured = [t for t in traits if t.continuations and t.evaluate_questions]
    n_cells = sum(len(_cells(t, n_questions, n_pairs)) for t in measured)
    prompts_differ = model.takes_system and not from_answers
    sides = {
        t.name: prompted(t, t.derive_questions[:N_ASKED]) if prompts_differ else _answers(t)
        for t in (measured if directions else ())
    }
    prompts = [(q, None) for q, _ in clean_prompts(held_out=True)[:n_prompts]]
    meter = Meter(progress, len(prompts) + 2 * n_cells + sum(map(len, sides.values())))
    states = last_states(model, prompts, meter.part(len(prompts)))
    words = meter.part(2 * n_cells)
    log_odds = measure_words(model, measured, n_questions=n_questions, n_pairs=n_pairs, progress=words)
    found: dict[str, NDArray[np.float32]] = {}
    for name, texts in sides.items():
        part = meter.part(len(texts))
        if prompts_differ:
            acts = last_states(model, texts, part)
        else:
            acts = model.capture(texts, share_prefix=True, steer=Steering(), progress=part)
        high, low = np.split(acts.astype(np.float64), 2)
        found[name] = (high.mean(0) - low.mean(0)).astype(np.float32)
    return Profile(log_odds, states, np.asarray(model.norms), found)


def measure_words(
    model: Model,
    traits: Sequence[Trait],
    *,
    n_questions: int = N_QUESTIONS,
    n_pairs: int = 1,
    progress: Progress | None = None,
) -> dict[str, NDArray[np.float64]]:
    """The log-odds of a profile alone, of traits that have continuations and held-out questions: of each question, the
    mean over its pairs.
    """
    cells = {t.name: _cells(t, n_questions, n_pairs) for t in traits if t.continuations and t.evaluate_questions}
    if not cells:
        return {}
    flat = cell_log_odds(model, [cell for some in cells.values() for cell in some], [None], progress=progress)[0]
    ends = np.cumsum([len(some) for some in cells.values()])
    n_asked = {t.name: len(t.evaluate_questions[:n_questions]) for t in traits}
    found = zip(cells, np.split(flat, ends[:-1]), strict=True)
    return {name: values.reshape(n_asked[name], -1).mean(axis=1) for name, values in found}


def _cells(trait: Trait, n_questions: int, n_pairs: int) -> Sequence[Cell]:
    return make_cells(trait.evaluate_questions[:n_questions], trait.evaluation_pairs, n_pairs)


def _answers(trait: Trait) -> list[tuple[str, str]]:
    """(question, answer): those of the trait, then their opposites."""
    questions = trait.derive_questions
    return [
        (questions[i % len(questions)], pair[side]) for side in (0, 1) for i, pair in enumerate(trait.continuations)
    ]


def whole_states(vectors: Iterable[PersonaVector], n_layer: int) -> list[PersonaVector]:
    """Those that tell a block's whole state, which profiles are compared along: an imported one may have fewer blocks
    than the model, increments tell the step from one block to the next.
    """
    return [v for v in vectors if v.n_layer == n_layer and v.provenance.get("form") != "incremental"]


@dataclass(frozen=True)
class Shift:
    """What changed along one trait from one model to another of the same shape.

    With D_l the mean change of the stream at block l, at the token before the answer, over those blocks where
    ||D_l|| / m_l is at least half of its largest value:

    Args:
        trait: its name.
        delta: mean change of the log-odds, question by question, in nats per token; low, high: its interval, at 95 %
            for all the compared traits together (Bonferroni). None for a trait without continuations.
        drift: the largest <D_l, v-hat_l> / m_l, with its sign: the dose of v that would move the stream as far. None
            without a direction.
        cosine: mean of the cosines of D_l and v_l. None without a direction.
        random_p99: 99th percentile of |cosine| over random directions that are as alike from block to block.
        suspicious: "stream", where |drift| is at least 0.03 and |cosine| at least 0.2 and above random_p99; else
            "words", where the interval of delta leaves out 0 and |delta| is at least 0.1; else "".
    """

    trait: str
    delta: float | None
    low: float | None
    high: float | None
    drift: float | None
    cosine: float | None
    random_p99: float | None
    suspicious: str

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        said = [f"{self.trait}:"]
        if self.cosine is not None:
            said.append(f"the stream moved by {self.drift:+.3f} of its norm along it, cosine {self.cosine:+.2f}")
            said.append(f"(random directions: {self.random_p99:.2f});")
        if self.delta is not None:
            said.append(f"its words changed by {self.delta:+.2f} nats per token ({self.low:+.2f} to {self.high:+.2f})")
        return " ".join(said).rstrip(";")


def compare_profiles(
    base: Profile, other: Profile, vectors: Sequence[PersonaVector] = (), *, seed: int = 0
) -> list[Shift]:
    """What changed along each trait from `base` to `other`, the most suspicious first: by the cosine where the stream
    moved, then by the words.

    A vector's directions are taken instead of the base's own for its trait.

    Raises ArgumentError for profiles of models of other shapes, or of other questions.

    Source: arXiv 2507.21509, section 4 (shift of the last prompt token along persona vectors predicts trait changes);
    arXiv 2506.19823 (features ranked by their change between two models).
    """
    if base.states.shape[1:] != other.states.shape[1:]:
        raise ArgumentError(f"the models have other shapes: {base.states.shape[1:]} and {other.states.shape[1:]}")
    moved = other.states.mean(axis=0, dtype=np.float64) - base.states.mean(axis=0, dtype=np.float64)
    directions = dict(base.directions) | {_name(v): v.directions for v in vectors}
    common = [t for t in base.log_odds if t in other.log_odds]
    names = sorted({*common, *directions})
    found = []
    for name in names:
        delta, low, high = _words(base, other, name, len(common)) if name in common else (None, None, None)
        drift, cosine, chance = None, None, None
        if name in directions:
            drift, cosine, chance = _stream(moved, base.norms, directions[name], seed)
        found.append(
            Shift(name, delta, low, high, drift, cosine, chance, _verdict(delta, low, high, drift, cosine, chance))
        )
    return sorted(found, key=_order)


def _order(shift: Shift) -> tuple[Any, ...]:
    return (
        ("stream", "words", "").index(shift.suspicious),
        -abs(shift.cosine or 0.0) if shift.suspicious == "stream" else 0.0,
        -abs(shift.delta or 0.0),
        shift.trait,
    )


def _name(vector: PersonaVector) -> str:
    return trait_of(vector).name if "trait" in vector.provenance or "texts" in vector.provenance else vector.name


def _words(base: Profile, other: Profile, name: str, n_traits: int) -> tuple[float, float, float]:
    before, after = base.log_odds[name], other.log_odds[name]
    if len(before) != len(after):
        raise ArgumentError(f"the profiles asked other questions of {name!r}: {len(before)} and {len(after)}")
    change = after - before
    low, high = bootstrap_interval(change, n=20_000, level=1 - 0.05 / n_traits)
    return float(change.mean()), low, high


def _stream(
    moved: NDArray[np.float64], norms: NDArray[np.float32], direction: NDArray[np.float32], seed: int
) -> tuple[float | None, float | None, float | None]:
    """(drift, cosine, 99th percentile of |cosine| of random directions)."""
    lengths = np.linalg.norm(direction.astype(np.float64), axis=1)
    sizes = np.linalg.norm(moved, axis=1) / norms
    usable = np.isfinite(lengths) & (lengths > 0) & np.isfinite(sizes)
    if not usable.any():
        return None, None, None
    largest = float(sizes[usable].max())
    if largest == 0:
        return 0.0, 0.0, 0.0
    at = [int(il) for il in np.flatnonzero(usable & (sizes >= largest / 2))]
    units = moved[at] / np.linalg.norm(moved[at], axis=1, keepdims=True)

    def cosines(v: PersonaVector) -> NDArray[np.float64]:
        rows, of = v.directions_at(at)
        out: NDArray[np.float64] = np.einsum("le,le->l", units, rows) / of
        return out

    vector = PersonaVector(direction, tuple(at), "direction")
    own = cosines(vector)
    drifts = own * sizes[at]
    chance = [abs(cosines(r).mean()) for r in random_vectors(vector, N_RANDOM, seed=seed)]
    return float(drifts[np.argmax(np.abs(drifts))]), float(own.mean()), float(np.percentile(chance, 99))


def _verdict(
    delta: float | None, low: float | None, high: float | None,
    drift: float | None, cosine: float | None, chance: float | None,
) -> str:  # fmt: skip
    if abs(drift or 0.0) >= LEAST_DOSE and abs(cosine or 0.0) >= max(LEAST_COSINE, chance or 0.0):
        return "stream"
    spans_zero = low is None or high is None or low <= 0 <= high
    return "words" if abs(delta or 0.0) >= LEAST_WORDS and not spans_zero else ""
