"""A small multiple-choice check that a steered model still knows what it knew."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.engine import Progress, Request
from personasteer.model import Model
from personasteer.steering import as_steering

HOW = "Answer in a few words."


@dataclass(frozen=True)
class Item:
    """A question with four answers, of which one is right."""

    question: str
    choices: tuple[str, ...]
    answer: int


@functools.cache
def items() -> tuple[Item, ...]:
    """The 80 items that come with the package."""
    data = tomllib.loads(files(__package__).joinpath("capability.toml").read_text("utf-8"))
    return tuple(Item(d["question"], tuple(d["choices"]), d["answer"]) for d in data["item"])


def capability(
    model: Model, steers: Sequence[Any], *, n_items: int | None = None, progress: Progress | None = None
) -> NDArray[np.float64]:
    """Share of items right under each steering, (len(steers),): the choice with the highest log p as the answer to the
    question counts; chance is 0.25.
    """
    steerings = [as_steering(s) for s in steers]
    asked = items()[:n_items]
    requests = []
    for item in asked:
        texts = [model.pair_tokens(f"{item.question} {HOW}", choice) for choice in item.choices]
        for s in steerings:
            for tokens, n in texts:
                requests.append(Request.scored(tokens, n, s))
    results = model.run_alone(requests, progress=progress)
    scores = np.array([r["scores"].sum() for r in results]).reshape(len(asked), len(steerings), -1)
    right = np.array([item.answer for item in asked])
    out: NDArray[np.float64] = (scores.argmax(2) == right[:, None]).mean(0)
    return out
