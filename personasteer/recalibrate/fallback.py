"""Bringing a model back without training: a feature that was suppressed is restored, one that was raised is capped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from personasteer.engine import Progress
from personasteer.errors import ArgumentError, PersonasteerError
from personasteer.evaluate import cell_log_odds, make_cells, measure_coherence, trait_of
from personasteer.identity import check_alike
from personasteer.model import Model
from personasteer.ship import write_bundle
from personasteer.steering import Add, AnyEdit, Cap
from personasteer.vectors import PersonaVector

DOSES = (0.1, 0.2, 0.3, 0.4)
LEAST_COHERENCE = 0.9
N_COHERENCE = 6


@dataclass(frozen=True)
class Remedy:
    """An edit of the fine-tuned model, and what it takes away.

    Args:
        feature: its name; how: "restore", "lower" or "cap"; dose: rho, None of a cap.
        removed: share of the shift of the trait's words that is gone, on held-out questions.
        coherence: of the answers beside the base's; None where it was not tried.
    """

    feature: str
    how: str
    dose: float | None
    trait: str
    removed: float
    coherence: float | None
    edit: AnyEdit

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {name: x for name, x in vars(self).items() if name != "edit"}


def remedies(
    base: Model,
    tuned: Model,
    features: Sequence[PersonaVector],
    *,
    doses: Sequence[float] = DOSES,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Remedy]:
    """What can be done without training, the best first: those that leave the model coherent, by the share removed.

    A suppressed feature is added, a raised one subtracted or capped at the 99th percentile of the base's readings, all
    on the response.

    Args:
        features: vectors that `diff` wrote: survivors of its causal filter.

    Raises:
        ArgumentError: a vector that is no such feature, or models that are no fine-tunes of each other.
    """
    check_alike(base, tuned)
    found: list[Remedy] = []
    for done, v in enumerate(features):
        change = v.provenance.get("change")
        if v.provenance.get("method") != "feature" or not isinstance(change, (int, float)):
            raise ArgumentError(f"{v.name!r} is no feature that `personasteer diff` found")
        found += _of_feature(base, tuned, v, float(change), doses, seed)
        if progress:
            progress(done + 1, len(features))
    return sorted(found, key=lambda r: (not (r.coherence or 0.0) >= LEAST_COHERENCE, -r.removed))


def _of_feature(
    base: Model, tuned: Model, v: PersonaVector, change: float, doses: Sequence[float], seed: int
) -> list[Remedy]:
    trait = trait_of(v)
    cells = make_cells(trait.evaluate_questions, trait.evaluation_pairs, 1)
    sign, how = (1.0, "restore") if change < 0 else (-1.0, "lower")
    edits: list[tuple[str, float | None, AnyEdit]] = [
        (how, dose, Add(v, sign * dose, scope="response")) for dose in doses
    ]
    if change > 0 and v.thresholds is not None:
        edits.append(("cap", None, Cap(v, scope="response")))
    before = float(cell_log_odds(base, cells, [None]).mean())
    values = cell_log_odds(tuned, cells, [None, *(e for *_, e in edits)]).mean(axis=1)
    shift = float(values[0]) - before
    shares = (values[0] - values[1:]) / shift if shift else np.zeros(len(edits))
    questions = trait.evaluate_questions[-N_COHERENCE:]
    sound = measure_coherence(tuned, questions, [e for *_, e in edits], seed=seed, judge=base)
    return [
        Remedy(v.name, kind, dose, trait.name, float(share), c.coherence, edit)
        for (kind, dose, edit), share, c in zip(edits, shares, sound, strict=True)
    ]


def best_remedy(found: Sequence[Remedy]) -> Remedy:
    """The first of `remedies`. Raises PersonasteerError where it takes nothing away, or leaves broken answers."""
    if not found or not found[0].removed > 0 or (found[0].coherence or 0.0) < LEAST_COHERENCE:
        tried = [f"{r.how} {r.feature}: {r.removed:.0%}, coherence {r.coherence or 0:.2f}" for r in found[:3]]
        raise PersonasteerError(
            f"no feature takes the shift away and leaves sound answers ({'; '.join(tried)}): train instead (-v)"
        )
    return found[0]


def write_remedy(
    out: str | os.PathLike[str], tuned: Model, remedy: Remedy, *, force: bool = False, progress: Progress | None = None
) -> Path:
    """A bundle of the fine-tuned model's file and the edit; see `write_bundle`.

    Of a model that is a base with adapters, the bundle holds these adapters, too: it is run with them (`--lora`).
    """
    return write_bundle(
        out,
        model=tuned.path,
        steering=[remedy.edit],
        name=f"{tuned.name} without {remedy.trait}",
        description=f"{remedy.how} of {remedy.feature}: {100 * remedy.removed:.0f} % of the shift removed",
        shipped=[path for path, _ in tuned.adapters],
        force=force,
        progress=progress,
    )


def read_features(folder: str | os.PathLike[str]) -> list[PersonaVector]:
    """The features that a folder of `diff` holds. Raises ArgumentError where it holds none."""
    files = sorted(Path(folder, "vectors").glob("*.gguf"))
    if not files:
        raise ArgumentError(f"{folder}: holds no features (folder vectors): did any survive `personasteer diff`?")
    return [PersonaVector.load(file) for file in files]
