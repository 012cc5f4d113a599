"""Which answers count: refusals, off-trait and incoherent ones are dropped together with their opposites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personasteer.derive.elicit import Elicited, Rollout, given_instead
from personasteer.derive.refusals import refuses
from personasteer.errors import ElicitationError
from personasteer.evaluate.coherence import repetition
from personasteer.evaluate.generations import in_lexicon
from personasteer.statistics import over_error
from personasteer.traits import Trait

MOST_REPETITION = 0.5  # share of repeated word triples
LEAST_LOG_ODDS = 0.02  # nats per token, of both answers together; less is rounding
LEAST_T = 1.5  # of their mean over questions, over its standard error ...
SURE = 0.75  # ... unless this share of the contrasts is told apart, which one odd answer does not change
MIDDLE = 50.0  # of a judge's 0 to 100


@dataclass(frozen=True)
class Selection:
    """Contrasts that count, and why others do not.

    kept: (positive, negative) row numbers; n: contrasts before; dropped: contrasts by the first reason found, "positive
    refusal" and so on; examples: an answer for each reason; lexicon: share of answers with a word of the trait's
    lexicon, on either side (a hint, not a reason); scores: mean score of those scored, on either side; t: how surely
    answers show their own side, the two answers' log-odds together, mean over questions over its standard error, and
    told_apart: the share of contrasts in which they are enough; of those that are answered under prompts, None for
    fewer than four questions, and with a judge.
    """

    kept: tuple[tuple[int, int], ...]
    n: int
    dropped: Mapping[str, int]
    examples: Mapping[str, str]
    lexicon: Mapping[str, float]
    scores: Mapping[str, float]
    t: float | None = None
    told_apart: float | None = None

    @property
    def rate(self) -> float:
        """The elicitation rate: the share of contrasts that count."""
        return len(self.kept) / self.n if self.n else 0.0

    def summary(self) -> dict[str, object]:
        """For a vector's provenance."""
        return {
            "rate": round(self.rate, 4),
            "n": self.n,
            "kept": len(self.kept),
            "dropped": dict(self.dropped),
            "lexicon": {k: round(v, 4) for k, v in self.lexicon.items()},
            "scores": {k: round(v, 4) for k, v in self.scores.items()},
            "t": None if self.t is None else round(self.t, 4),
        }


def select(found: Elicited, trait: Trait, *, scores: NDArray[np.float64] | None = None) -> Selection:
    """Keep the contrasts whose two answers both answer, on their own side of the trait, coherently.

    A contrast is off-trait where its answers are not told apart by another pair of system prompts (their own where
    there is one pair): the log-odds of both (see Rollout), each for its own side, must be 0.02 nats per token or more
    together. What a prompt makes likelier whatever the answer says is in both, and cancels. Given answers without
    prompts pass. With a judge's `scores` (0 to 100 for each rollout) a positive answer below 50 is off-trait, a
    negative one of 50 and above, and one without a score (NaN).
    """
    skipped = int(found.options.get("skip_tokens", 0))
    rows = found.rollouts
    reasons = [_reason(r, trait, None if scores is None else float(scores[i]), skipped) for i, r in enumerate(rows)]
    kept, dropped, examples = [], Counter[str](), dict[str, str]()
    together: dict[int, list[float]] = {}
    contrasts = found.contrasts
    for positive, negative in contrasts:
        side, reason = next(
            ((side, reasons[i]) for side, i in (("positive", positive), ("negative", negative)) if reasons[i]), ("", "")
        )
        if reason:
            label = f"{side} {reason}"
            dropped[label] += 1
            examples.setdefault(label, rows[positive if side == "positive" else negative].text)
            continue
        if scores is None and rows[positive].contrasted and rows[negative].contrasted:
            both = rows[positive].log_odds + rows[negative].log_odds
            together.setdefault(rows[positive].question, []).append(both)
            if both < LEAST_LOG_ODDS:
                dropped["off-trait"] += 1
                examples.setdefault("off-trait", rows[positive].text)
                continue
        kept.append((positive, negative))
    values = np.array([r.log_odds if r.contrasted else np.nan for r in rows]) if scores is None else scores
    by_side = {
        name: [i for i, r in enumerate(rows) if r.positive is positive]
        for name, positive in (("positive", True), ("negative", False))
    }
    hits = np.array([in_lexicon(r.text, trait) for r in rows], np.float64)
    hints = {name: float(hits[at].mean()) if at else 0.0 for name, at in by_side.items()}
    means = {}
    for name, at in by_side.items():
        known = values[at][np.isfinite(values[at])]
        if len(known):
            means[name] = float(known.mean())
    t = over_error([np.mean(of_one) for of_one in together.values()])
    compared = [x for of_one in together.values() for x in of_one]
    told_apart = float(np.mean(np.array(compared) >= LEAST_LOG_ODDS)) if t is not None else None
    return Selection(tuple(kept), len(contrasts), dict(dropped), examples, hints, means, t, told_apart)


def select_all(found: Elicited) -> Selection:
    """Every contrast of two answers that are not empty."""
    rows = found.rollouts
    skipped = int(found.options.get("skip_tokens", 0))
    kept = tuple((p, n) for p, n in found.contrasts if min(rows[p].n_tokens, rows[n].n_tokens) > skipped)
    return Selection(kept, len(found.contrasts), {}, {}, {}, {})


def _reason(r: Rollout, trait: Trait, score: float | None, skipped: int) -> str:
    if not r.text.strip() or r.n_tokens <= skipped:
        return "empty"
    if refuses(r.text) and trait.declines != ("trait" if r.positive else "anti"):
        return "refusal"
    if repetition(r.text) > MOST_REPETITION:
        return "incoherent"
    if score is None:
        return ""
    on_side = score >= MIDDLE if r.positive else score < MIDDLE  # False for NaN
    return "" if on_side else "off-trait"


def require_enough(selection: Selection, trait: Trait, model_name: str, *, least_rate: float = 0.25) -> None:
    """Raise ElicitationError, with samples and what to try, where fewer than 2 contrasts or a quarter of all count, and
    where those that count may do so by chance.
    """
    told = selection.told_apart
    chance = selection.t is not None and told is not None and selection.t < LEAST_T and told < SURE
    if len(selection.kept) >= max(2, least_rate * selection.n) and not chance:
        return
    reasons = ", ".join(f"{n} {label}" for label, n in sorted(selection.dropped.items(), key=lambda x: -x[1]))
    samples = "; ".join(f'{label}: "{_short(text)}"' for label, text in selection.examples.items())
    refused = sum(n for label, n in selection.dropped.items() if label.endswith("refusal"))
    given = given_instead(trait)
    advice = (
        f"the model refuses to enact it: try system prompts that ask for a character in a story, {given}, or another "
        "model"
        if 2 * refused > selection.n - len(selection.kept)
        else f"try blunter system prompts, more or other questions, a larger model, {given}, or a judge (--judge)"
    )
    if chance:
        reasons += f"; system prompts hardly tell the two sides apart, t = {selection.t:.1f}"
    raise ElicitationError(
        f"trait {trait.name!r} could not be elicited from {model_name}: of {selection.n} contrasts "
        f"{len(selection.kept)} count ({reasons or 'no contrast was answered'}). Seen: {samples or 'nothing'}. "
        f"What helps: {advice}"
    )


def _short(text: str, n: int = 90) -> str:
    text = " ".join(text.split())
    return text if len(text) <= n else text[: n - 1].rstrip() + "…"
