"""At which blocks and how strongly: a causal sweep over blocks, and the window of strengths that stays coherent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.derive.directions import best_window, window_range
from personasteer.derive.elicit import Elicited
from personasteer.engine import Progress
from personasteer.errors import ElicitationError
from personasteer.evaluate.coherence import LEAST, kl_on_neutral, measure_coherence
from personasteer.evaluate.log_odds import Cell, answer_cells, as_beginning, cell_log_odds, make_cells
from personasteer.model import Model
from personasteer.progress import Meter
from personasteer.statistics import over_error
from personasteer.steering import Add
from personasteer.traits import Trait
from personasteer.vectors import PersonaVector
from personasteer.work import Work

RHO = 0.2  # of the sweep over blocks
DOSES = (0.15, 0.3, 0.45, 0.6)  # tried on either side for the window
RECOMMENDED = 0.3  # strength, where the window allows it
MARGIN = 0.6  # of the window's nearer end that the strength may take: both are measured on few answers
LEAST_T = 1.5  # mean effect over its standard error, at one block at least: a sieve, `eval` is the test
FORMS = ("window", "single", "incremental")
N_BLOCKS = 8  # blocks tried, at most
N_QUESTIONS = 4
N_PAIRS = 2  # continuation pairs per question
BROKEN = 0.25  # coherence below which a block is left out of the sweep: one strong edit at one block is harsh
ANSWER_TOKENS = 24
REPLY_TOKENS = 12  # of the model's own answers, where a trait has no continuations


def selection_cells(
    model: Model, trait: Trait, found: Elicited | None, kept: Sequence[tuple[int, int]]
) -> tuple[Cell, ...]:
    """What layers and strengths are chosen on: derive questions with the trait's selection pairs, or, for a trait
    without continuations, with the beginnings of the answers that the model gave, or gives, under either prompt.

    Raises ElicitationError where these are alike.
    """
    n = N_QUESTIONS if trait.selection_pairs else N_QUESTIONS * N_PAIRS
    questions = trait.derive_questions[:: max(1, len(trait.derive_questions) // n)][:n]
    if trait.selection_pairs:
        return make_cells(questions, trait.selection_pairs, N_PAIRS)
    cells = own_cells(model, found, kept) if found is not None else answer_cells(model, trait, questions)
    if not cells:
        raise ElicitationError("the answers of either side begin alike: nothing to measure an effect with")
    return cells


def own_cells(model: Model, found: Elicited, kept: Sequence[tuple[int, int]]) -> tuple[Cell, ...]:
    """Comparisons of the model's own answers: the first 12 tokens of either side's, for up to 8 questions."""
    cells: dict[int, Cell] = {}
    for positive, negative in kept:
        a, b = found.rollouts[positive], found.rollouts[negative]
        if a.question not in cells and len(cells) < N_QUESTIONS * N_PAIRS:
            begin = [
                as_beginning(model.detokenize(model.tokenize(r.text, add_special=False)[:REPLY_TOKENS])) for r in (a, b)
            ]
            if all(begin) and begin[0] != begin[1]:
                cells[a.question] = Cell(a.prompt, *begin)
    return tuple(cells.values())


def candidate_blocks(vector: PersonaVector) -> tuple[int, ...]:
    """The blocks that the sweep tries: at most 8, evenly over the range that windows come from."""
    _, low, high = window_range(vector.n_layer)
    usable = [il for il in vector.usable_layers if low <= il < high and il > 0]
    step = max(1, -(-len(usable) // N_BLOCKS))
    return tuple(usable[step // 2 :: step] or usable)


def sweep(
    model: Model,
    vector: PersonaVector,
    cells: Sequence[Cell],
    *,
    systems: tuple[str, str] | None = None,
    form: str = "window",
    work: Work | None = None,
    progress: Progress | None = None,
) -> tuple[PersonaVector, dict[str, Any]]:
    """The vector at the blocks where steering moves the trait most, and the table of what was tried.

    Each candidate block is steered alone by rho = +-0.2 on the response. Its effect is half the difference of the
    log-odds, in nats per token; its KL the mean divergence from the unsteered model on everyday answers. Small edits
    move the log-odds in proportion to rho and the KL to rho^2, so effect / sqrt(KL) compares blocks at equal
    disturbance. Blocks whose text falls apart (coherence below 0.25, mean of both signs) do not count; between
    candidates the figure is interpolated. Chosen is the window of a sixth of the blocks with its largest mean; with
    form="single" the one block with the largest figure, with form="incremental" all blocks of
    PersonaVector.incremental, whatever the sweep says.

    Raises ElicitationError where no block moves the trait the right way, by 1.5 standard errors over the
    comparisons.
    """
    blocks = candidate_blocks(vector)
    if not blocks:
        raise ElicitationError(
            f"vector {vector.name!r} has no direction at the blocks that a sweep tries: keep its layers"
        )
    n = len(blocks)
    n_odds, n_kl, n_answers = 4 * n * len(cells), 8 * n, 4 * n
    meter = Meter(progress, n_odds + n_kl + n_answers)
    steers = [_response(vector.at([il]) * s) for il in blocks for s in (RHO, -RHO)]

    kept = work or Work(None, {})
    questions = list(dict.fromkeys(c.question for c in cells))
    odds = []
    for i, question in enumerate(questions):
        asked = [c for c in cells if c.question == question]
        part = meter.part(n_odds * len(asked) // len(cells))
        odds.append(kept.value(f"sweep-{i}", partial(cell_log_odds, model, asked, steers, progress=part)))
    moved = np.concatenate(odds, axis=1)
    moved = (moved[::2] - moved[1::2]) / 2
    told = meter.part(n_kl)
    kl = kept.value("sweep-kl", lambda: kl_on_neutral(model, steers, n_pairs=4, n_tokens=12, progress=told))
    of_sign = [[s] for s in systems] if systems else [[], []]

    def answers() -> list[float]:
        given = of_sign * n
        part = meter.part(n_answers)
        sound = measure_coherence(model, questions[:2], steers, systems=given, max_tokens=16, progress=part)
        return [s.coherence for s in sound]

    coherence = kept.value("sweep-answers", answers)
    table: list[dict[str, Any]] = [
        {
            "layer": il,
            "effect": float(moved[k].mean()),
            "t": over_error(moved[k]),
            "kl": float(max(kl[2 * k], kl[2 * k + 1])),
            "coherence": float(coherence[2 * k : 2 * k + 2].mean()),
        }
        for k, il in enumerate(blocks)
    ]
    effects = np.full(vector.n_layer, np.nan, np.float32)
    for row in table:
        effects[row["layer"]] = row["effect"]
    coherent = [row for row in table if row["coherence"] >= BROKEN] or [max(table, key=lambda r: float(r["coherence"]))]
    if not any(row["effect"] > 0 and (row["t"] is None or row["t"] >= LEAST_T) for row in coherent):
        raise ElicitationError(
            f"vector {vector.name!r} does not steer: at none of the blocks {', '.join(map(str, blocks))} does adding "
            "it make the trait's words reliably likelier"
        )
    usable = np.isin(np.arange(vector.n_layer), vector.usable_layers)
    figures = [row["effect"] / np.sqrt(max(row["kl"], 1e-9)) for row in coherent]
    score = np.interp(np.arange(vector.n_layer), [row["layer"] for row in coherent], figures)
    if form == "single":
        chosen = vector.at([coherent[int(np.argmax(figures))]["layer"]])
    elif form == "incremental":
        own = vector.incremental()
        chosen = replace(
            vector,
            directions=own.directions,
            layers=own.layers,
            weights=own.weights,
            thresholds=None,  # these read the whole direction
            means=None,
            shuffled=None if vector.shuffled is None else np.diff(vector.shuffled, axis=1, prepend=np.nan),
            provenance={**vector.provenance, "form": form},
        )
    else:
        chosen = vector.at(best_window(np.where(usable, score, -np.inf), usable))
    return replace(chosen, effects=effects), {"rho": RHO, "blocks": table}


def find_window(
    model: Model,
    vector: PersonaVector,
    questions: Sequence[str],
    *,
    systems: tuple[str, str] | None = None,
    work: Work | None = None,
    progress: Progress | None = None,
) -> tuple[PersonaVector, list[dict[str, float]]]:
    """The vector with its usable window of rho and a strength inside it, and the table of the doses tried.

    Coherence (see personasteer.evaluate.coherence) is taken to fall from dose to dose, going out from 0 (isotonic fit);
    the window ends where it crosses 0.5. The strength is 0.3, or 0.6 of the window's nearer end if that is less.
    """
    doses = [s * d for s in (1.0, -1.0) for d in DOSES]
    tried = replace(vector, window=(-1.0, 1.0))  # the question is where it ends
    steers = [_response(tried * d) for d in doses]
    meter = Meter(progress, len(doses))

    def compute() -> tuple[dict[str, NDArray[Any]], Any]:
        given = [[systems[0 if d > 0 else 1]] for d in doses] if systems else ()
        asked = list(questions)[:N_QUESTIONS]
        sound = measure_coherence(
            model, asked, steers, systems=given, max_tokens=ANSWER_TOKENS, progress=meter.part(len(doses))
        )
        kl = kl_on_neutral(model, steers, n_pairs=4, n_tokens=12)
        return {}, [
            {"strength": d, "coherence": s.coherence, "repetition": s.repetition, "nll": s.nll, "kl": float(k)}
            for d, s, k in zip(doses, sound, kl, strict=True)
        ]

    table = (work.part("window", compute) if work else compute())[1]
    by_dose = {row["strength"]: row["coherence"] for row in table}
    low, high = (-_crossing([by_dose[-d] for d in DOSES]), _crossing([by_dose[d] for d in DOSES]))
    strength = round(min(MARGIN * min(-low, high), RECOMMENDED), 2)
    table = [{k: (v if np.isfinite(v) else None) for k, v in row.items()} for row in table]
    return replace(vector, window=(low, high), strength=strength), table


def _crossing(coherence: Sequence[float]) -> float:
    """The dose at which a falling curve through (0, 1) and the measured points crosses LEAST; the last dose if none."""
    fitted = [1.0, *falling(coherence)]
    doses = (0.0, *DOSES)
    for k in range(1, len(fitted)):
        if fitted[k] < LEAST:
            share = (fitted[k - 1] - LEAST) / (fitted[k - 1] - fitted[k])
            return round(doses[k - 1] + share * (doses[k] - doses[k - 1]), 3)
    return doses[-1]


def falling(values: Sequence[float]) -> list[float]:
    """The nearest non-increasing sequence in the sense of least squares (pool adjacent violators)."""
    pools: list[list[float]] = []  # [mean, count]
    for value in values:
        pools.append([value, 1])
        while len(pools) > 1 and pools[-1][0] > pools[-2][0]:
            mean, n = pools.pop()
            before = pools[-1]
            before[0], before[1] = (before[0] * before[1] + mean * n) / (before[1] + n), before[1] + n
    return [mean for mean, n in pools for _ in range(int(n))]


def with_calibration(vector: PersonaVector, **tables: Any) -> PersonaVector:
    """The vector with these tables under "calibration" in its provenance."""
    before = vector.provenance.get("calibration")
    known = before if isinstance(before, Mapping) else {}
    return replace(vector, provenance={**vector.provenance, "calibration": {**known, **tables}})


def _response(edit: Add) -> Add:
    return replace(edit, scope="response")
