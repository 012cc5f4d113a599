"""A second look, at free answers: how often words of the trait's lexicon turn up."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from personasteer.engine import Request, Sampling
from personasteer.model import Model
from personasteer.steering import Steering, as_steering
from personasteer.traits import Trait
from personasteer.vectors import PersonaVector

TOKENS = 48


@dataclass(frozen=True)
class Generations:
    """Sampled answers to held-out questions at several strengths: texts[k] at strengths[k], and the share of them with
    a word of the lexicon.
    """

    strengths: tuple[float, ...]
    rates: tuple[float, ...]
    questions: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]


def in_lexicon(text: str, trait: Trait) -> bool:
    """Whether a text holds a word or phrase of the trait's lexicon."""
    words = "|".join(re.escape(w) for w in trait.lexicon)
    return bool(words) and re.search(rf"(?<!\w)(?:{words})(?!\w)", text, re.IGNORECASE) is not None


def generate(
    model: Model, vector: PersonaVector, questions: Sequence[str], strengths: Sequence[float], *, seed: int = 0
) -> tuple[tuple[str, ...], ...]:
    """Answers of up to 48 tokens (temperature 0.7) under each strength on the response, [strength][question]."""
    sampling = Sampling(0.7, seed=seed)
    steerings = [as_steering(replace(vector * s, scope="response")) if s else Steering() for s in strengths]
    prompts = [model.measured_prompt(q) for q in questions]
    requests = [
        Request(p, len(p), s, max_tokens=TOKENS, sampling=sampling, share_prefix=True)
        for p in prompts
        for s in steerings
    ]
    texts = [r["text"].decode("utf-8", "replace") for r in model.run_alone(requests)]
    return tuple(tuple(texts[k :: len(steerings)]) for k in range(len(steerings)))


def lexicon_rates(
    model: Model, trait: Trait, vector: PersonaVector, strengths: Sequence[float], n_questions: int, seed: int = 0
) -> Generations:
    """The share of free answers with a word of the trait's lexicon, per strength."""
    questions = trait.evaluate_questions[:n_questions]
    texts = generate(model, vector, questions, strengths, seed=seed)
    rates = tuple(float(np.mean([in_lexicon(t, trait) for t in of_one])) for of_one in texts)
    return Generations(tuple(strengths), rates, tuple(questions), texts)
