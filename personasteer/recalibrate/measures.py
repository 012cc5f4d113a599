"""How much of its traits a model shows: what it says, and where its stream stands before it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.engine import Progress
from personasteer.errors import ArgumentError, TraitError
from personasteer.evaluate import Cell, bootstrap_interval, cell_log_odds, make_cells, trait_of
from personasteer.model import Model
from personasteer.monitor import last_states
from personasteer.progress import Meter
from personasteer.steering import check_fits
from personasteer.vectors import PersonaVector

N_PAIRS = 2  # continuation pairs for each held-out question
N_COHERENCE = 6  # questions that are answered to see whether a model is sound


@dataclass(frozen=True)
class Probe:
    """What one trait of a model is measured with.

    Args:
        block: whose output is read: the middle one of the vector's own.
        unit: (n_embd,) v-hat at that block, of the last prompt token where the vector has one.
        scale: m_il of the model that the others are compared with.
        cells: the trait's held-out questions with continuation pairs.
    """

    vector: PersonaVector
    block: int
    unit: NDArray[np.float64]
    scale: float
    cells: tuple[Cell, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """A trait of a model, unsteered.

    Args:
        log_odds: of each held-out question, log p(trait) / n_tok - log p(anti) / n_tok of its continuation pairs, mean,
            in nats per token.
        projection: of each held-out question, <h_il, v-hat> / m_il at the last token of the prompt.
    """

    log_odds: NDArray[np.float64]
    projection: NDArray[np.float64]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {name: x.tolist() for name, x in vars(self).items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Shown:
        """The inverse of `as_dict`."""
        return cls(*(np.asarray(plain[name], np.float64) for name in ("log_odds", "projection")))


@dataclass(frozen=True)
class Change:
    """A trait's change between two models, the means over the questions of what Shown has.

    log_odds, in nats per token, with the 95 % interval log_odds_low to log_odds_high over the questions; projection, in
    the block's typical norm, with projection_low to projection_high.
    """

    log_odds: float
    log_odds_low: float
    log_odds_high: float
    projection: float
    projection_low: float
    projection_high: float

    def as_dict(self) -> dict[str, float]:
        """As plain data."""
        return asdict(self)


def make_probes(
    model: Model, vectors: Sequence[PersonaVector], *, n_questions: int | None = None, n_pairs: int = N_PAIRS
) -> list[Probe]:
    """Of the model that others are compared with.

    Raises:
        VectorError: a vector that does not fit the model, or without a direction at its own blocks.
        TraitError, ArgumentError: a vector without a trait, or one whose trait has no held-out questions.
    """
    found = []
    names = [v.name for v in vectors]
    if len(set(names)) < len(names):
        raise ArgumentError(f"the vectors need different names, not {', '.join(names)}")
    for v in vectors:
        check_fits(v, model)
        trait = trait_of(v)
        questions = trait.evaluate_questions[:n_questions]
        if not questions or not trait.evaluation_pairs:
            raise ArgumentError(f"trait {trait.name!r} has no held-out questions or no continuation pairs")
        layers = v.layers or v.usable_layers
        if not layers:
            raise ArgumentError(f"vector {v.name!r} has no direction to read by")
        il = layers[len(layers) // 2]
        row = v.direction(il).astype(np.float64)
        if v.last_prompt is not None and np.isfinite(v.last_prompt[il]).all() and v.last_prompt[il].any():
            row = v.last_prompt[il].astype(np.float64)
        cells = make_cells(questions, trait.evaluation_pairs, n_pairs)
        found.append(Probe(v, il, row / np.linalg.norm(row), float(model.norms[il]), cells, questions))
    return found


def can_be_probed(vector: PersonaVector) -> bool:
    """Whether it carries, or names, a trait with held-out questions and continuation pairs."""
    try:
        trait = trait_of(vector)
    except (TraitError, ArgumentError):
        return False
    return bool(trait.evaluate_questions and trait.evaluation_pairs)


def measure(model: Model, probes: Sequence[Probe], progress: Progress | None = None) -> dict[str, Shown]:
    """{name of the vector: what the model shows of its trait}."""
    meter = Meter(progress, sum(2 * len(p.cells) + len(p.questions) for p in probes))
    found = {}
    for p in probes:
        values = cell_log_odds(model, p.cells, [None], progress=meter.part(2 * len(p.cells)))[0]
        by_question = values.reshape(len(p.questions), -1).mean(axis=1)  # each question has as many cells
        states = last_states(model, [(q, None) for q in p.questions], meter.part(len(p.questions)))
        found[p.vector.name] = Shown(by_question, states[:, p.block].astype(np.float64) @ p.unit / p.scale)
    return found


def change(before: Shown, after: Shown) -> Change:
    """What changed, question by question."""
    numbers: list[float] = []
    for a, b in ((before.log_odds, after.log_odds), (before.projection, after.projection)):
        numbers += [float((b - a).mean()), *bootstrap_interval(b - a)]
    return Change(*numbers)


def removed(base: Shown, tuned: Shown, now: Shown) -> tuple[float, float]:
    """Shares of the shift from base to tuned that are gone, of the log-odds and of the projection: 1 is all of it,
    NaN where there was none.
    """

    def share(a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64]) -> float:
        shift = float((b - a).mean())
        return 1.0 - float((c - a).mean()) / shift if shift else float("nan")

    return (
        share(base.log_odds, tuned.log_odds, now.log_odds),
        share(base.projection, tuned.projection, now.projection),
    )
