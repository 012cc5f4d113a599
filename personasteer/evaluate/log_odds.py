"""How much likelier the trait's words become: log-odds of matched continuations on held-out questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.engine import Progress, Request
from personasteer.errors import ArgumentError
from personasteer.model import Model
from personasteer.steering import as_steering
from personasteer.traits import Trait


def log_odds(
    model: Model,
    trait: Trait,
    steers: Sequence[Any],
    *,
    n_questions: int | None = None,
    n_pairs: int | None = None,
    system: str | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """log p(trait continuation)/n_tok - log p(anti-trait continuation)/n_tok, per steering, question and pair.

    Args:
        steers: steerings to compare. With scope="response" the questions' text is computed once for all of them.
        n_questions, n_pairs: the first so many of the trait's held-out questions and continuation pairs; all if None.
        system: a system prompt for every question (the prompting baseline).

    Returns:
        (len(steers), n_questions, n_pairs), in nats per token; the mean over the last two is the log-odds of a dose.

    Raises:
        ArgumentError: the trait has no held-out questions or no continuations.
    """
    questions, pairs = trait.evaluate_questions[:n_questions], trait.continuations[:n_pairs]
    if not questions or not pairs:
        raise ArgumentError(f"trait {trait.name!r} has no held-out questions or no continuation pairs")
    steerings = [as_steering(s) for s in steers]
    texts = [text for pair in pairs for text in pair]
    requests = []
    for question in questions:  # grouped by question: its text is shared
        prompts = [model.pair_tokens(question, text, system) for text in texts]
        for steering in steerings:
            for tokens, n_prompt in prompts:
                outputs = (n_prompt - 1, len(tokens) - 1)
                requests.append(
                    Request(tokens, n_prompt, steering, outputs=outputs, keep_scores=True, share_prefix=True)
                )
    results = model.run_requests(requests, progress=progress)
    means = np.array([r["scores"].mean() for r in results])
    means = means.reshape(len(questions), len(steerings), len(pairs), 2)
    out: NDArray[np.float64] = (means[..., 0] - means[..., 1]).transpose(1, 0, 2)
    return out


def bootstrap_interval(
    values: NDArray[np.float64], *, n: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (n_questions, ...), resampling questions (axis 0)."""
    per_question = values.reshape(len(values), -1).mean(1)
    draws = np.random.default_rng(seed).integers(0, len(per_question), (n, len(per_question)))
    low, high = np.quantile(per_question[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
