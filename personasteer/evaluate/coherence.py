"""Whether a steered model still makes sense: likelihood of its text, repetition, divergence on everyday text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.engine import Progress, Request, Sampling
from personasteer.model import Model
from personasteer.progress import Meter
from personasteer.steering import Steering, as_steering
from personasteer.traits import Trait, neutral_pairs

LEAST = 0.5  # coherence below this counts as broken: its text is twice as perplexing as the unsteered model's own
SOUND = 0.9  # from here on answers count as unharmed
TEMPERATURE = 0.7
N_OWN = 4  # unsteered answers per question: every steering is compared with them


@dataclass(frozen=True)
class Coherence:
    """Of the answers under one steering.

    nll: mean -log p per token of the steered text under the unsteered model, in nats; repetition: mean share of
    repeated word triples; coherence: exp(-(nll - nll of the unsteered model's own answers)) x (1 - excess repetition),
    both held to at most 1: 1 is as sound as unsteered, 0.5 twice as perplexing. texts: the answers.
    """

    nll: float
    repetition: float
    coherence: float
    texts: tuple[str, ...]


def persona_systems(trait: Trait, models: Iterable[Model]) -> tuple[str, ...]:
    """What `measure_coherence` takes as a steering's system prompts: the trait's first, where all models take one."""
    return tuple(pair[0] for pair in trait.system[:1]) if all(m.takes_system for m in models) else ()


def repetition(text: str) -> float:
    """Share of word triples that stood in the text before; 0 for texts of fewer than four words."""
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())
    triples = list(zip(words, words[1:], words[2:], strict=False))
    if len(triples) < 2:
        return 0.0
    return 1.0 - len(Counter(triples)) / len(triples)


def measure_coherence(
    model: Model,
    questions: Sequence[str],
    steers: Sequence[Any],
    *,
    systems: Sequence[Sequence[str]] = (),
    max_tokens: int = 24,
    seed: int = 0,
    judges: Sequence[Model] = (),
    progress: Progress | None = None,
) -> list[Coherence]:
    """Sampled answers (temperature 0.7) under each steering, scored by the unsteered model.

    Args:
        questions: what to answer; the unsteered model answers each four times, for comparison.
        systems: for each steering, system prompts under which the unsteered model may find its text likely: a persona's
            words are improbable without the persona, and not incoherent for that. The lowest mean NLL counts.
        judges: models of the same tokenizer instead of the unsteered one, such as what it was fine-tuned from. Their
            answers are those that are compared with, and the mean of their probabilities scores each token: between two
            models, a word that either would say is sound.
    """
    judges = tuple(judges) or (model,)
    steerings = [as_steering(s) for s in steers]
    prompts = [model.measured_prompt(q) for q in questions]
    sampling = Sampling(TEMPERATURE, top_k=0, top_p=0.95, min_p=0.02, seed=seed)
    n_own = N_OWN * len(judges)
    systems = [*([()] * n_own), *(systems or [() for _ in steers])]
    n_checks = len(questions) * sum(1 + len(s) for s in systems)
    meter = Meter(progress, len(questions) * (n_own + len(steers)) + len(judges) * n_checks)

    def answers(of: Model, under: Sequence[Steering]) -> list[list[dict[str, Any]]]:
        """[steering][question]"""
        requests = [
            Request(prompt, len(prompt), s, max_tokens=max_tokens, sampling=sampling, share_prefix=True)
            for prompt in prompts
            for s in under
        ]
        found = of.run_alone(requests, progress=meter.part(len(requests)))
        return [found[k :: len(under)] for k in range(len(under))]

    unsteered = [Steering()] * N_OWN
    by_model = answers(model, [*(unsteered if model in judges else ()), *steerings])
    sampled = [a for judge in judges for a in (by_model[:N_OWN] if judge is model else answers(judge, unsteered))]
    sampled += by_model[len(by_model) - len(steerings) :]
    scored: list[tuple[int, int, int]] = []
    checks = []
    for i, question in enumerate(questions):
        for k, given in enumerate(systems):
            tokens = sampled[k][i]["tokens"]
            for j, system in enumerate((None, *given)):
                if not tokens:
                    continue
                prompt = prompts[i] if system is None else model.measured_prompt(question, system)
                checks.append(Request.scored([*prompt, *tokens], len(prompt)))
                scored.append((k, i, j))
    by_judge = [judge.run_alone(checks, progress=meter.part(len(checks))) for judge in judges]
    nll = np.full((len(systems), len(questions), 1 + max(map(len, systems))), np.nan)
    for place, results in zip(scored, zip(*by_judge, strict=True), strict=True):
        log_p = [np.asarray(r["scores"], np.float64) for r in results]
        nll[place] = np.log(len(judges)) - np.logaddexp.reduce(log_p).mean()
    texts = [[_text(a) for a in of_one] for of_one in sampled]
    repeats = [float(np.mean([repetition(t) for t in of_one])) for of_one in texts]
    lowest = [_lowest(of_one) for of_one in nll]
    answered = [x for x in lowest[:n_own] if np.isfinite(x)]
    own = float(np.mean(answered)) if answered else -np.inf  # a model that says nothing vouches for no text
    own_repeats = float(np.mean(repeats[:n_own]))
    out = []
    for k in range(n_own, len(systems)):
        likely = np.exp(min(0.0, own - lowest[k])) if np.isfinite(lowest[k]) else 0.0
        sound = likely * (1.0 - max(0.0, repeats[k] - own_repeats))
        out.append(Coherence(lowest[k], repeats[k], float(sound), tuple(texts[k])))
    return out


def _lowest(nll: NDArray[np.float64]) -> float:
    """The lowest mean over questions; infinite where nearly all answers are empty."""
    answered = nll[np.isfinite(nll[:, 0])]
    if 2 * len(answered) <= len(nll):
        return float("inf")
    return float(min(column.mean() for column in answered.T if np.isfinite(column).all()))


def _text(result: dict[str, Any]) -> str:
    text: str = result["text"].decode("utf-8", "replace")
    return text


def kl_on_neutral(
    model: Model, steers: Sequence[Any], *, n_pairs: int = 8, n_tokens: int = 16, progress: Progress | None = None
) -> NDArray[np.float64]:
    """KL(unsteered || steered) of the next token, mean over the first n_tokens of n_pairs everyday answers,
    (len(steers),) in nats per token.
    """
    steerings = [Steering(), *(as_steering(s) for s in steers)]
    pairs = neutral_pairs()[:n_pairs]
    sums, count = np.zeros(len(steers)), 0
    at_once = max(1, 2**28 // (len(steerings) * n_tokens * 4 * model.n_vocab))  # pairs in 256 MiB of logits
    for begin in range(0, len(pairs), at_once):
        requests = []
        for question, answer in pairs[begin : begin + at_once]:
            tokens, n_prompt = model.pair_tokens(question, answer)
            tokens = tokens[: n_prompt + n_tokens]
            outputs = (n_prompt - 1, len(tokens) - 1)
            requests += [
                Request(tokens, n_prompt, s, outputs=outputs, keep_logits=True, share_prefix=True) for s in steerings
            ]
        rows = [_log_softmax(r["logits"]) for r in model.run_alone(requests)]
        for first in range(0, len(rows), len(steerings)):
            base, p = rows[first], np.exp(rows[first])
            of_steers = rows[first + 1 : first + len(steerings)]
            sums += [float((p * (base - row)).sum(dtype=np.float64)) for row in of_steers]
            count += len(base)
        if progress:
            progress(min(begin + at_once, len(pairs)), len(pairs))
    return sums / max(count, 1)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    out: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return out
