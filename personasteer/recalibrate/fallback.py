"""Bringing a model back without training: a feature that was suppressed is restored, one that was raised is capped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personasteer.engine import Progress
from personasteer.errors import ArgumentError, PersonasteerError
from personasteer.evaluate import (
    SOUND,
    bootstrap_interval,
    cell_log_odds,
    halves,
    measure_coherence,
    trait_of,
)
from personasteer.identity import check_alike
from personasteer.model import Model
from personasteer.recalibrate.measures import N_COHERENCE, N_PAIRS
from personasteer.ship import write_bundle
from personasteer.steering import Add, AnyEdit, Cap
from personasteer.vectors import PersonaVector

DOSES = (0.5, 0.75, 1.0, 1.25)  # times the vector's own strength, at which its feature survived


@dataclass(frozen=True)
class Remedy:
    """An edit of the fine-tuned model, and what it takes away.

    Args:
        feature: its name; how: "restore", "lower" or "cap"; dose: rho, None of a cap.
        removed: share of the shift of the trait's words that is gone, on the half of the held-out questions that the
            edit is not chosen by; chosen_by: on the other half.
        coherence: of the answers, each token judged by what base and tuned model say on average: 1 is as sound as
            theirs. None where it was not tried.
    """

    feature: str
    how: str
    dose: float | None
    trait: str
    removed: float
    chosen_by: float
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
    """What can be done without training, the best first: those that leave the model coherent, by how near the share
    removed is to all of it.

    A suppressed feature is added, a raised one subtracted or capped at the 99th percentile of the base's readings, all
    on the response.

    Args:
        features: vectors that `diff` wrote: survivors of its causal filter.
        doses: multiples of each vector's strength.

    Raises:
        ArgumentError: a vector that is no such feature, or one of another fine-tune; models that are no fine-tunes of
            each other; a trait that this one has not shifted along.
    """
    check_alike(base, tuned)
    found: list[Remedy] = []
    for done, v in enumerate(features):
        change = v.provenance.get("change")
        if v.provenance.get("method") != "feature" or not isinstance(change, (int, float)):
            raise ArgumentError(f"{v.name!r} is no feature that `personasteer diff` found")
        if v.provenance.get("tuned", tuned.fingerprint) != tuned.fingerprint:
            raise ArgumentError(f"{v.name!r} is a feature of another fine-tune: compare this one with its base first")
        found += _of_feature(base, tuned, v, float(change), doses, seed)
        if progress:
            progress(done + 1, len(features))
    return sorted(found, key=lambda r: (not (r.coherence or 0.0) >= SOUND, abs(1 - r.chosen_by)))


def _of_feature(
    base: Model, tuned: Model, v: PersonaVector, change: float, doses: Sequence[float], seed: int
) -> list[Remedy]:
    trait = trait_of(v)
    both = halves(trait.evaluate_questions, trait.evaluation_pairs, N_PAIRS)
    cells = [cell for half in both for cell in half]
    sign, how = (1.0, "restore") if change < 0 else (-1.0, "lower")
    edits: list[tuple[str, float | None, AnyEdit]] = [
        (how, dose * v.strength, Add(v, sign * dose * v.strength, scope="response")) for dose in doses
    ]
    if change > 0 and v.thresholds is not None:
        edits.append(("cap", None, Cap(v, scope="response")))
    before = cell_log_odds(base, cells, [None])[0]
    values = cell_log_odds(tuned, cells, [None, *(e for *_, e in edits)])
    n_questions = len({c.question for c in both[0]}) + len({c.question for c in both[1]})
    low, high = bootstrap_interval((values[0] - before).reshape(n_questions, -1).mean(axis=1))
    if low <= 0 <= high:
        raise ArgumentError(
            f"along {trait.name} what the tuned model says has not shifted by more than chance "
            f"({low:+.2f} to {high:+.2f} nats): nothing to bring back"
        )
    chosen_by, removed = (
        (values[0, at] - values[1:, at]).mean(axis=1) / (values[0, at] - before[at]).mean()
        for at in (slice(len(both[0])), slice(len(both[0]), None))
    )
    questions = trait.evaluate_questions[-N_COHERENCE:]
    sound = measure_coherence(tuned, questions, [e for *_, e in edits], seed=seed, judges=(base, tuned))
    return [
        Remedy(v.name, kind, dose, trait.name, float(share), float(chosen), c.coherence, edit)
        for (kind, dose, edit), share, chosen, c in zip(edits, removed, chosen_by, sound, strict=True)
    ]


def best_remedy(found: Sequence[Remedy]) -> Remedy:
    """The first of `remedies`. Raises PersonasteerError where it takes nothing away, or leaves broken answers."""
    if not found or not found[0].removed > 0 or (found[0].coherence or 0.0) < SOUND:
        tried = [f"{r.how} {r.feature}: {r.removed:.0%}, coherence {r.coherence or 0:.2f}" for r in found[:3]]
        raise PersonasteerError(
            f"no feature takes the shift away and leaves sound answers ({'; '.join(tried)}): train instead (-v)"
        )
    return found[0]


def write_remedy(
    out: str | os.PathLike[str], tuned: Model, remedy: Remedy, *, force: bool = False, progress: Progress | None = None
) -> Path:
    """A bundle of the fine-tuned model's file and the edit; see `write_bundle`.

    Of a model that is a base with adapters, the bundle holds these adapters, too, and is run with them.
    """
    return write_bundle(
        out,
        model=tuned.path,
        steering=[remedy.edit],
        name=f"{tuned.name} without {remedy.trait}",
        description=f"{remedy.how} of {remedy.feature}: {100 * remedy.removed:.0f} % of the shift removed",
        adapters=tuned.adapters,
        force=force,
        progress=progress,
    )


def read_features(folder: str | os.PathLike[str]) -> list[PersonaVector]:
    """The features that a folder of `diff` holds. Raises ArgumentError where it holds none."""
    files = sorted(Path(folder, "vectors").glob("*.gguf"))
    if not files:
        raise ArgumentError(f"{folder}: holds no features (folder vectors): did any survive `personasteer diff`?")
    return [PersonaVector.load(file) for file in files]
