"""What a vector does, on questions that it was not derived from, beside controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.engine import Progress
from personasteer.errors import ArgumentError, TraitError
from personasteer.evaluate.capability import capability, items
from personasteer.evaluate.coherence import LEAST, kl_on_neutral, measure_coherence
from personasteer.evaluate.controls import random_vectors, unrelated_vector
from personasteer.evaluate.generations import Generations, lexicon_rates
from personasteer.evaluate.log_odds import Cell, answer_cells, cell_log_odds, make_cells
from personasteer.model import Model
from personasteer.progress import Meter
from personasteer.statistics import bootstrap_interval, spearman
from personasteer.steering import check_fits
from personasteer.traits import Trait, get
from personasteer.vectors import PersonaVector

FRACTIONS = (-1.0, -2 / 3, -1 / 3, 0.0, 1 / 3, 2 / 3, 1.0)  # of the recommended strength
LEAST_SPEARMAN = 0.9


@dataclass(frozen=True)
class Dose:
    """One strength: what it does, and how the model holds.

    log_odds: mean over questions and continuation pairs of (log p(trait)/n_tok - log p(anti)/n_tok), in nats per token;
    delta: minus that at strength 0. ci_low, ci_high: the 95 % interval of delta, resampling questions, placed at
    log_odds. coherence, repetition: of sampled answers, as in Coherence. kl: on everyday answers, in nats per token.
    """

    strength: float
    log_odds: float
    delta: float
    ci_low: float
    ci_high: float
    coherence: float
    repetition: float
    kl: float


@dataclass(frozen=True)
class Controls:
    """Changes of the log-odds by what should do little, and by a system prompt.

    random: at the largest strength, both signs, of n_random norm-matched random vectors; random_p95: the 95th
    percentile of their sizes. shuffled: mean size over vectors of shuffled labels, None where the vector carries
    none. unrelated: of the vector of another trait, `unrelated_trait`, at the largest strength. system_prompt: no
    vector, the trait's system prompts instead, None without a system role or continuation pairs. steered: of the vector
    itself at -/+ the largest strength, on the controls' cells.
    """

    n_random: int
    random: tuple[float, ...]
    random_p95: float
    shuffled: float | None
    unrelated: float
    unrelated_trait: str
    system_prompt: float | None
    steered: tuple[float, float]


@dataclass(frozen=True)
class Evaluation:
    """The evidence for one vector on one model.

    layers, strength: of the vector. dose: by rising strength. controls: beside it. kl_neutral: at the largest strength,
    on everyday answers, in nats per token. capability: share of multiple-choice items right, of "base", "steered" and
    "steered_negative". spearman: of strength and log_odds. verdict: "monotone" (spearman at least 0.9),
    "outside_random" (both ends beyond random_p95), "coherent". generations: how often answers hold words of the trait's
    lexicon. from_continuations: the vector is made of other continuation pairs of the trait that it is evaluated on.
    cells: what was compared.
    """

    vector: str
    trait: str
    model: str
    layers: tuple[int, ...]
    strength: float
    sizes: Mapping[str, int]  # questions, pairs, random vectors, ...
    dose: tuple[Dose, ...]
    controls: Controls
    kl_neutral: float
    capability: Mapping[str, float]
    spearman: float
    verdict: Mapping[str, bool]
    generations: Generations | None = None
    from_continuations: bool = False
    cells: tuple[Cell, ...] = field(default=(), repr=False)

    @property
    def passes(self) -> bool:
        """Monotone, both ends outside what random vectors do, coherent at both ends."""
        return all(self.verdict.values())

    def summary(self) -> dict[str, Any]:
        """What `eval --json` prints."""
        out = asdict(self)
        del out["cells"]
        out["layers"] = list(self.layers)
        out["passes"] = self.passes
        return out


NAME_ONE = ": name a trait (--trait)"


def trait_of(vector: PersonaVector, given: Trait | None = None, *, hint: str = "") -> Trait:
    """The trait that a vector is evaluated on: the given one, or the one that the vector carries.

    Raises TraitError where there is none; hint: what its message ends with.
    """
    if given is not None:
        return given
    texts = vector.provenance.get("texts")
    if isinstance(texts, Mapping):
        return Trait.from_dict(texts)
    name = vector.provenance.get("trait", vector.name)
    try:
        return get(str(name))
    except TraitError as e:
        raise TraitError(
            f"vector {vector.name!r} does not carry the trait's questions, and the library has no trait {name!r}{hint}"
        ) from e


def trait_behind(vector: PersonaVector) -> Trait | None:
    """The trait that a vector, or the first of those that were summed in it, is evaluated on."""
    parts = vector.provenance.get("parts")
    if isinstance(parts, list) and parts:
        vector = replace(vector, name=str(parts[0]["name"]), provenance=parts[0]["provenance"])
    try:
        return trait_of(vector)
    except (TraitError, ArgumentError):
        return None


def evaluate(
    model: Model,
    vectors: Sequence[PersonaVector],
    *,
    traits: Sequence[Trait | None] | None = None,
    n_questions: int | None = 10,
    n_pairs: int = 2,
    n_random: int = 20,
    n_coherence: int = 6,
    n_items: int | None = None,
    n_generations: int = 0,
    strength: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Dose-response of each vector beside controls, on the trait's held-out questions and continuation pairs.

    All steering is on the response. The doses are -1, -2/3, -1/3, 0, 1/3, 2/3 and 1 times the vector's strength.
    Controls are computed at the largest strength, on the first continuation pair of each question.

    Args:
        traits: to evaluate on; a vector's own where None.
        n_questions: held-out questions, the first so many; all when None.
        n_pairs: continuation pairs for each question, going round the pairs held out from calibration.
        n_random: norm-matched random vectors.
        n_coherence: questions answered freely at each dose.
        n_items: multiple-choice items of the capability check; 0 leaves it out, None takes all 80.
        n_generations: held-out questions answered at both ends and at 0, scored by the trait's lexicon; 0: none.
        strength: the largest dose instead of each vector's own.

    Raises:
        TraitError: a vector without a trait. ArgumentError: no held-out questions. IncompatibleVector: another model.
    """
    given = list(traits) if traits is not None else [None] * len(vectors)
    if len(given) != len(vectors):
        raise ArgumentError(f"{len(vectors)} vectors and {len(given)} traits")
    for option, value, least in (
        ("n_questions", 1 if n_questions is None else n_questions, 1),
        ("n_pairs", n_pairs, 1),
        ("n_random", n_random, 1),
        ("n_coherence", n_coherence, 1),
        ("n_items", n_items or 0, 0),
        ("n_generations", n_generations, 0),
    ):
        if value < least:
            raise ArgumentError(f"{option} must be at least {least}, not {value}")
    chosen = [trait_of(v, t, hint=NAME_ONE) for v, t in zip(vectors, given, strict=True)]
    unseen = [_unseen(v, t) for v, t in zip(vectors, chosen, strict=True)]
    for vector, trait, (questions, _) in zip(vectors, chosen, unseen, strict=True):
        check_fits(vector, model)
        if not questions:
            raise ArgumentError(f"trait {trait.name!r} has no held-out questions")
        if not vector.layers:
            raise ArgumentError(f"vector {vector.name!r} names no layers to steer at")
        largest = vector.strength if strength is None else strength
        if not (np.isfinite(largest) and largest):
            raise ArgumentError(f"strength must be finite and not 0, not {largest}")
    share = 1000
    meter = Meter(progress, share * len(vectors))
    out = []
    for vector, trait, (questions, pairs) in zip(vectors, chosen, unseen, strict=True):
        if pairs:
            cells = make_cells(questions[:n_questions], pairs, n_pairs)
        else:
            cells = answer_cells(model, trait, questions[:n_questions])
            if not cells:
                raise ArgumentError(f"trait {trait.name!r} has no continuation pairs, and its prompts change no answer")
        out.append(
            _evaluate_one(
                model,
                vector if strength is None else replace(vector, strength=strength),
                trait,
                cells,
                n_random=n_random,
                n_coherence=n_coherence,
                n_items=len(items()) if n_items is None else min(n_items, len(items())),
                n_generations=n_generations,
                seed=seed,
                progress=meter.part(share),
            )
        )
    return out


def _unseen(vector: PersonaVector, trait: Trait) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """The trait's held-out questions and continuation pairs, less those that another form of the trait, which the
    vector carries, had to derive on.
    """
    texts = vector.provenance.get("texts")
    own = Trait.from_dict(texts) if isinstance(texts, Mapping) else trait
    if own == trait:
        return trait.evaluate_questions, trait.evaluation_pairs
    questions = tuple(q for q in trait.evaluate_questions if q not in own.derive_questions)
    return questions, tuple(p for p in trait.evaluation_pairs if p not in own.selection_pairs)


def _evaluate_one(
    model: Model,
    vector: PersonaVector,
    trait: Trait,
    cells: tuple[Cell, ...],
    *,
    n_random: int,
    n_coherence: int,
    n_items: int,
    n_generations: int,
    seed: int,
    progress: Progress | None,
) -> Evaluation:
    largest = abs(vector.strength)
    # not rounded: what is reported is what was steered by
    doses = [f * largest for f in FRACTIONS]
    zero = FRACTIONS.index(0.0)
    quiet = _without_warning(vector, largest)
    steers = [_response(quiet, d) for d in doses]
    questions = list(dict.fromkeys(c.question for c in cells))
    firsts = [next(i for i, c in enumerate(cells) if c.question == q) for q in questions]
    control_cells = [cells[i] for i in firsts]
    randoms = random_vectors(quiet, n_random, seed=seed)
    other = unrelated_vector(model, quiet, trait)
    ends = (largest, -largest)
    arms = [_response(r, s) for r in randoms for s in ends]
    shuffled = (
        [replace(quiet, directions=d, shuffled=None) for d in vector.shuffled] if vector.shuffled is not None else []
    )
    shuffled = [v for v in shuffled if set(quiet.layers) <= set(v.usable_layers)]
    arms += [_response(v, s) for v in shuffled for s in ends]
    arms += [_response(other, largest)]
    parts = [2 * len(cells) * len(doses), 2 * len(control_cells) * (len(arms) + 1), 40 * len(doses), 4 * n_items * 3]
    meter = Meter(progress, sum(parts))

    odds = cell_log_odds(model, cells, steers, progress=meter.part(parts[0]))
    control = cell_log_odds(model, control_cells, [None, *arms], progress=meter.part(parts[1]))
    changes = (control[1:] - control[0]).mean(1)
    own = (float((odds[0] - odds[zero])[firsts].mean()), float((odds[-1] - odds[zero])[firsts].mean()))
    random, rest = changes[: 2 * n_random], changes[2 * n_random :]
    shuffled_changes, unrelated = rest[:-1], float(rest[-1])
    prompted = _system_prompt_change(model, trait, cells, odds[zero])

    nonzero = [k for k in range(len(doses)) if k != zero]
    systems = [[trait.system[0][0 if doses[k] > 0 else 1]] if model.takes_system else [] for k in nonzero]
    asked = questions[-n_coherence:]
    sound = measure_coherence(
        model, asked, [steers[k] for k in nonzero], systems=systems, seed=seed, progress=meter.part(parts[2])
    )
    kl = kl_on_neutral(model, [steers[k] for k in nonzero])
    steered = dict(zip(nonzero, zip(sound, kl, strict=True), strict=True))
    points = []
    for k, dose in enumerate(doses):
        delta = odds[k] - odds[zero]
        mean = float(odds[k].mean())
        low, high = bootstrap_interval(_by_question(delta, cells, questions), seed=seed)
        shift = mean - float(delta.mean())
        coherence, kl_k = steered.get(k, (None, 0.0))
        points.append(
            Dose(
                dose,
                mean,
                float(delta.mean()),
                shift + low,
                shift + high,
                coherence.coherence if coherence else 1.0,
                coherence.repetition if coherence else 0.0,
                float(kl_k),
            )
        )
    known: list[float] = []
    if n_items:
        sides = [None, steers[-1], steers[0]]
        known = capability(model, sides, n_items=n_items, progress=meter.part(parts[3])).tolist()
    p95 = float(np.quantile(np.abs(random), 0.95))
    rank = float(np.nan_to_num(spearman(doses, [p.log_odds for p in points])))
    return Evaluation(
        vector=vector.name,
        trait=trait.name,
        model=model.name,
        layers=vector.layers,
        strength=largest,
        sizes={"questions": len(questions), "cells": len(cells), "control_cells": len(control_cells), "items": n_items},
        dose=tuple(points),
        controls=Controls(
            n_random,
            tuple(float(x) for x in random),
            p95,
            float(np.abs(shuffled_changes).mean()) if len(shuffled_changes) else None,
            unrelated,
            other.name,
            prompted,
            own,
        ),
        kl_neutral=points[-1].kl,
        capability=dict(zip(("base", "steered", "steered_negative"), known, strict=False)),
        spearman=rank,
        verdict={
            "monotone": rank >= LEAST_SPEARMAN,
            "outside_random": own[1] > p95 and own[0] < -p95,
            "coherent": min(points[0].coherence, points[-1].coherence) >= LEAST,
        },
        generations=lexicon_rates(model, trait, quiet, (-largest, 0.0, largest), n_generations, seed)
        if n_generations
        else None,
        from_continuations=vector.provenance.get("answers") == "continuations",
        cells=cells,
    )


def _system_prompt_change(
    model: Model, trait: Trait, cells: Sequence[Cell], unsteered: NDArray[np.float64]
) -> float | None:
    """Mean change of the log-odds by the trait's first two system prompts; None without a system role, and without
    continuations, where the comparisons are made by these prompts themselves.
    """
    if not model.takes_system or not trait.continuations:
        return None
    changes = [(cell_log_odds(model, cells, [None], system=pair[0])[0] - unsteered).mean() for pair in trait.system[:2]]
    return float(np.mean(changes))


def _by_question(values: NDArray[np.float64], cells: Sequence[Cell], questions: Sequence[str]) -> NDArray[np.float64]:
    return np.array([np.mean([v for v, c in zip(values, cells, strict=True) if c.question == q]) for q in questions])


def _response(vector: PersonaVector, strength: float) -> Any:
    return replace(vector * strength, scope="response")


def _without_warning(vector: PersonaVector, strength: float) -> PersonaVector:
    """The vector with a window that holds +-strength: what is measured needs no warning of what it may do."""
    low, high = vector.window
    return replace(vector, window=(min(low, -strength), max(high, strength)))


def cross_talk(
    model: Model, vectors: Sequence[PersonaVector], evaluations: Sequence[Evaluation], *, n_cells: int = 6
) -> NDArray[np.float64]:
    """(vectors, traits) change of each trait's log-odds by each vector at its own strength; the diagonal is its own.
    Measured on the first comparison of each question, of up to n_cells questions.
    """
    pairs = [(v, abs(e.strength)) for v, e in zip(vectors, evaluations, strict=True)]
    steers = [None, *(_response(_without_warning(v, strength), strength) for v, strength in pairs)]
    columns = []
    for e in evaluations:
        firsts = list({c.question: c for c in reversed(e.cells)}.values())[:n_cells]
        odds = cell_log_odds(model, firsts, steers)
        columns.append((odds[1:] - odds[0]).mean(1))
    return np.stack(columns, axis=1)
