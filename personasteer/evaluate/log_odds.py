"""How much likelier the trait's words become: log-odds of matched continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.engine import Progress, Request, Sampling
from personasteer.errors import ArgumentError
from personasteer.model import Model
from personasteer.steering import as_steering
from personasteer.traits import Trait


@dataclass(frozen=True)
class Cell:
    """One comparison: a question, and a beginning of its answer of the `trait` and one of its opposite, `anti`."""

    question: str
    trait: str
    anti: str


def make_cells(
    questions: Sequence[str], pairs: Sequence[tuple[str, str]], n_pairs: int | None = None
) -> tuple[Cell, ...]:
    """`n_pairs` continuation pairs for each question; the next question goes on where the last one stopped, so that
    few cells use all the pairs. All pairs for every question when None.
    """
    n = len(pairs) if n_pairs is None else min(n_pairs, len(pairs))
    return tuple(Cell(q, *pairs[(i * n + k) % len(pairs)]) for i, q in enumerate(questions) for k in range(n))


def halves(
    questions: Sequence[str], pairs: Sequence[tuple[str, str]], n_pairs: int
) -> tuple[tuple[Cell, ...], tuple[Cell, ...]]:
    """Cells of every other question, and of the rest, each half with pairs from the first one on: what is chosen on one
    is reported on the other. Twice the same where there is one question.
    """
    first, rest = questions[::2], questions[1::2] or questions
    return make_cells(first, pairs, n_pairs), make_cells(rest, pairs, n_pairs)


def cell_log_odds(
    model: Model,
    cells: Sequence[Cell],
    steers: Sequence[Any],
    *,
    system: str | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """log p(trait)/n_tok - log p(anti)/n_tok of each cell under each steering, (len(steers), len(cells)).

    Cells of one question stand next to each other: its text is computed once, for all steerings that leave the prompt
    alone (scope="response").
    """
    steerings = [as_steering(s) for s in steers]
    order = sorted(range(len(cells)), key=lambda i: cells[i].question)
    requests = []
    places = []
    for i in order:
        prompts = [model.pair_tokens(cells[i].question, text, system) for text in (cells[i].trait, cells[i].anti)]
        for k, steering in enumerate(steerings):
            for side, (tokens, n_prompt) in enumerate(prompts):
                requests.append(Request.scored(tokens, n_prompt, steering))
                places.append((k, i, side))
    results = model.run_alone(requests, progress=progress)
    means = np.empty((len(steerings), len(cells), 2))
    for place, result in zip(places, results, strict=True):
        means[place] = result["scores"].mean()
    out: NDArray[np.float64] = means[..., 0] - means[..., 1]
    return out


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
        n_questions: the first so many of the trait's held-out questions; all if None.
        n_pairs: continuation pairs for each question, going round the trait's; all for each if None.
        system: a system prompt for every question (the prompting baseline).

    Returns:
        (len(steers), n_questions, n_pairs), in nats per token; the mean over the last two is the log-odds of a dose.

    Raises:
        ArgumentError: the trait has no held-out questions or no continuations.
    """
    questions = trait.evaluate_questions[:n_questions]
    if not questions or not trait.continuations:
        raise ArgumentError(f"trait {trait.name!r} has no held-out questions or no continuation pairs")
    cells = make_cells(questions, trait.continuations, n_pairs)
    values = cell_log_odds(model, cells, steers, system=system, progress=progress)
    return values.reshape(len(values), len(questions), -1)


def answer_cells(model: Model, trait: Trait, questions: Sequence[str], *, n_tokens: int = 12) -> tuple[Cell, ...]:
    """For a trait without continuations: the model's own (greedy) first tokens under each of its system prompts, the
    two sides of one comparison; questions that are answered alike have none.
    """
    requests = []
    for i, question in enumerate(questions):
        for system in trait.system[i % len(trait.system)]:
            tokens = model.measured_prompt(question, system)
            requests.append(
                Request(tokens, len(tokens), max_tokens=n_tokens, sampling=Sampling(0.0), share_prefix=True)
            )
    texts = [as_beginning(r["text"].decode("utf-8", "replace")) for r in model.run_alone(requests)]
    pairs = zip(questions, texts[::2], texts[1::2], strict=True)
    return tuple(Cell(q, a, b) for q, a, b in pairs if a and b and a != b)


def as_beginning(text: str) -> str:
    """A generated text, cut off somewhere, as the beginning of an answer: tokenizers with a space before every text put
    it back, and the last character may have been cut, too.
    """
    return text.rstrip("\ufffd").strip()
