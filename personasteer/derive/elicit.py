"""Make a model show a trait and its opposite, and record its activations while it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personasteer.derive.contrast import Samples
from personasteer.engine import Progress, Request, Sampling, Taps
from personasteer.errors import ArgumentError, ElicitationError, TemplateError
from personasteer.model import MEASURED_ON, Model, pooled_mean
from personasteer.traits import Trait

N_PARALLEL = 16  # answers generated at once; another number gives other roundings, and so other answers


@dataclass(frozen=True)
class Rollout:
    """One answer: its question, whether the system prompt asked for the trait, its text."""

    question: int
    positive: bool
    text: str


@dataclass(frozen=True)
class Elicited:
    """Answers under both kinds of system prompts with what they did inside.

    responses: mean over the answer's tokens t >= P; last_prompt: at token P - 1; options: how they were elicited.
    """

    rollouts: tuple[Rollout, ...]
    responses: Samples
    last_prompt: Samples
    options: Mapping[str, object]


def elicit(
    model: Model,
    trait: Trait,
    *,
    n_questions: int | None = None,
    max_tokens: int = 40,
    temperature: float = 0.2,
    seed: int = 0,
    progress: Progress | None = None,
) -> Elicited:
    """Ask each question under every system prompt of the trait, sample one answer each, keep pooled activations.

    Activations are pooled inside the graph while the answers are generated: no second pass.

    Args:
        n_questions: how many of the trait's questions to ask, drawn by `seed`; all when None.
        max_tokens: length of an answer, at most.
        temperature: of sampling; 0 is greedy.

    Raises:
        TemplateError: no chat template, or one that takes no system message.
        ElicitationError: nearly all answers were empty.
    """
    if max_tokens < 1:
        raise ArgumentError(f"max_tokens must be at least 1, not {max_tokens}")
    if n_questions is not None and n_questions < 1:
        raise ArgumentError(f"n_questions must be at least 1, not {n_questions}")
    if not model.template.takes_system():
        raise TemplateError(
            f"the chat template of {model.path.name} takes no system message, which derive needs; "
            "use contrast with prompts that carry the instruction themselves"
        )
    questions = np.arange(len(trait.derive_questions))
    if n_questions is not None and n_questions < len(questions):
        questions = np.sort(np.random.default_rng(seed).permutation(questions)[:n_questions])
    sampling = Sampling(temperature, top_k=0, top_p=1.0, min_p=0.02, seed=seed)
    plan = [(pair, positive, int(q)) for pair in trait.system for positive in (True, False) for q in questions]
    requests = []
    for pair, positive, q in plan:
        tokens = model.prompt_tokens(trait.derive_questions[q], system=pair[0 if positive else 1], today=MEASURED_ON)
        spans = ((len(tokens), -1), (len(tokens) - 1, len(tokens)))
        requests.append(
            Request(tokens, len(tokens), max_tokens=max_tokens, sampling=sampling, pools=spans, share_prefix=True)
        )
    taps = Taps(pool_layers=tuple(range(model.n_layer)), n_pools=2)
    results = model.run_alone(requests, n_parallel=N_PARALLEL, taps=taps, progress=progress)
    kept = [i for i, r in enumerate(results) if r["text"].strip()]
    sides = {side: [i for i in kept if plan[i][1] is side] for side in (True, False)}
    if min(len(s) for s in sides.values()) < max(2, len(plan) // 8):
        raise ElicitationError(
            f"{model.path.name} gave {len(kept)} answers to {len(plan)} prompts of trait {trait.name!r}: "
            "too few to derive from"
        )

    def samples(pool: int) -> Samples:
        acts = {side: np.stack([pooled_mean(results[i], pool) for i in chosen]) for side, chosen in sides.items()}
        return Samples(acts[True], acts[False], groups(sides[True]), groups(sides[False]))

    def groups(chosen: list[int]) -> NDArray[np.int64]:
        return np.array([plan[i][2] for i in chosen])

    rollouts = tuple(Rollout(plan[i][2], plan[i][1], results[i]["text"].decode("utf-8", "replace")) for i in kept)
    options = {"n_questions": len(questions), "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    return Elicited(rollouts, samples(0), samples(1), options)
