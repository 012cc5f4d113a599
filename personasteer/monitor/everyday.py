"""Prompts without a trait: ordinary questions, as they are and amid what deployments put before them."""

from __future__ import annotations

import functools
import hashlib
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from personasteer import traits
from personasteer.chat import Conversation
from personasteer.discriminant import FOLDS
from personasteer.traits import Trait

HELD_OUT = 3  # every third clean prompt is left for testing
DEPTHS = (1, 2, 4, 8)  # turns of everyday conversations
N_HELD_OUT = {"who": 150, "how": 150, "turns": 100}  # of each list, to try thresholds with
ORDERS = 32  # of turns, in which conversations begin: what prompts share is computed once
ROLES = ("user", "assistant")


def clean_prompts(*, held_out: bool = False) -> tuple[tuple[str, str], ...]:
    """(question, the trait whose library it is from) of ordinary questions, in a fixed mixed order: two thirds to
    calibrate on, or the third that is left for testing.
    """
    given = [(q, name) for name in traits.names() for q in _questions(traits.get(name))]
    mixed = sorted(dict(given).items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    return tuple(pair for i, pair in enumerate(mixed) if (i % HELD_OUT == 0) == held_out)


def everyday_prompt(question: str) -> tuple[Conversation, str | None]:
    """(prompt, system prompt) that an ordinary question is asked as when a monitor is tried: as it is, under an
    everyday system prompt, or after an everyday conversation; no threshold is calibrated on any of their sentences.
    """
    ways = _ways(question, *(_data()[name][-n:] for name, n in N_HELD_OUT.items()), orders=None)
    return ways[_numbers(question)[0] % len(ways)]


def ordinary_prompts(
    given: Sequence[Conversation] | None = None,
) -> tuple[list[tuple[Conversation, str | None]], list[int], list[str]]:
    """(prompt, system prompt) of the ordinary questions to calibrate on, or of the prompts that are given; the number
    of each one's question; and the trait whose questions they are from.

    The library's are asked three times, one after the other: as they are, under an everyday system prompt, and after an
    everyday conversation, so that a threshold takes neither as such for a trait. Questions of different folds have no
    sentence of them in common: readings that are cross-fitted by question are of what was not seen, either.
    """
    if given is not None:
        return [(c, None) for c in given], list(range(len(given))), [""] * len(given)
    own = [[_data()[name][:-n][fold::FOLDS] for name, n in N_HELD_OUT.items()] for fold in range(FOLDS)]
    asked = [
        (prompt, i, name)
        for i, (q, name) in enumerate(clean_prompts())
        for prompt in _ways(q, *own[i % FOLDS], orders=ORDERS)
    ]
    return [p for p, _, _ in asked], [i for _, i, _ in asked], [name for _, _, name in asked]


def _ways(
    question: str, who: Sequence[str], how: Sequence[str], turns: Sequence[tuple[str, str]], *, orders: int | None
) -> list[tuple[Conversation, str | None]]:
    """The question as it is, under a system prompt, and as the next one of a conversation of some of the turns, every
    second with a system prompt. The turns come in one of so many `orders`, or in one of the question's own.
    """
    which, depth, *own = _numbers(question)[1:]
    which %= orders or 2**16
    order = sorted(turns, key=lambda turn: hashlib.sha256(f"{which} {turn[0]}".encode()).digest())
    before = order[: DEPTHS[depth % len(DEPTHS)]]
    said = [{"role": role, "content": text} for turn in before for role, text in zip(ROLES, turn, strict=True)]
    talk = [*said, {"role": "user", "content": question}]
    amid = _system(_numbers(str(which)), who, how) if which % 2 else None
    return [(question, None), (question, _system(own, who, how)), (talk, amid)]


def _system(choice: Sequence[int], who: Sequence[str], how: Sequence[str]) -> str:
    """Who answers, or how, or, every second time, both."""
    first, second, kind, *_ = choice
    said = who[first % len(who)], how[second % len(how)]
    return " ".join(said) if kind % 4 > 1 else said[kind % 4]


def _digest(text: str) -> bytes:
    return hashlib.sha256(b"everyday " + text.encode()).digest()


def _numbers(text: str) -> list[int]:
    """Sixteen below 2**16."""
    return [int(x) for x in np.frombuffer(_digest(text), "<u2")]


@functools.cache
def _data() -> dict[str, Any]:
    """who, how: sentences of system prompts; turns: (question, answer); in a fixed mixed order."""
    data = tomllib.loads(files(__package__).joinpath("everyday.toml").read_text("utf-8"))
    return {name: sorted(part, key=lambda x: _digest("".join(x))) for name, part in data.items()}


def _questions(trait: Trait) -> tuple[str, ...]:
    return (*trait.derive_questions, *trait.evaluate_questions)
