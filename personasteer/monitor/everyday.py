"""Prompts without a trait: ordinary questions, as they are and amid what deployments put before them."""

from __future__ import annotations

import functools
import hashlib
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from personasteer import traits
from personasteer.chat import Conversation
from personasteer.monitor.discriminant import FOLDS
from personasteer.traits import Trait

HELD_OUT = 3  # every third clean prompt is left for testing
DEPTHS = (1, 2, 4, 8)  # turns of everyday conversations
N_HELD_OUT = 16  # turns to try thresholds with
ROLES = ("user", "assistant")


def clean_prompts(*, held_out: bool = False) -> tuple[tuple[str, str], ...]:
    """(question, the trait whose library it is from) of ordinary questions, in a fixed mixed order: two thirds to
    calibrate on, or the third that is left for testing.
    """
    given = [(q, name) for name in traits.names() for q in _questions(traits.get(name))]
    mixed = sorted(dict(given).items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    return tuple(pair for i, pair in enumerate(mixed) if (i % HELD_OUT == 0) == held_out)


def everyday_prompt(question: str) -> tuple[Conversation, str | None]:
    """(prompt, system prompt) that an ordinary question is asked as when a monitor is tried: every second as it is, the
    others under an everyday system prompt or after an everyday conversation, with turns that no threshold is calibrated
    on.
    """
    return _amid(question, _data()["turns"][-N_HELD_OUT:]) if _digest(question)[0] % 2 else (question, None)


def ordinary_prompts(
    given: Sequence[Conversation] | None = None,
) -> tuple[list[tuple[Conversation, str | None]], list[int], list[str]]:
    """(prompt, system prompt) of the ordinary questions to calibrate on, or of the prompts that are given; the number
    of each one's question; and the trait whose questions they are from.

    The library's are asked twice, one after the other: as they are, and under an everyday system prompt or after an
    everyday conversation, so that a threshold takes neither as such for a trait. Questions of different folds have no
    turn in common: readings that are cross-fitted by question are of conversations that were not seen, either.
    """
    if given is not None:
        return [(c, None) for c in given], list(range(len(given))), [""] * len(given)
    turns, numbered = _data()["turns"][:-N_HELD_OUT], list(enumerate(clean_prompts()))
    prompts = [p for i, (q, _) in numbered for p in ((q, None), _amid(q, turns[i % FOLDS :: FOLDS]))]
    return prompts, [i for i, _ in numbered for _ in range(2)], [name for _, (_, name) in numbered for _ in range(2)]


def _amid(question: str, turns: Sequence[tuple[str, str]]) -> tuple[Conversation, str | None]:
    """The question under an everyday system prompt, or as the next one of a conversation of some of these turns, every
    second with a system prompt.

    A conversation is the beginning of one of 16 orders of the turns: what prompts share is computed once.
    """
    how, which, depth, *_ = _digest(question)[1:]
    systems = _data()["system"]
    which %= len(systems)
    if how % 2:
        return question, systems[which]
    order = sorted(turns, key=lambda turn: hashlib.sha256(f"{which} {turn[0]}".encode()).digest())
    before = order[: DEPTHS[depth % len(DEPTHS)]]
    said = [{"role": role, "content": text} for turn in before for role, text in zip(ROLES, turn, strict=True)]
    return [*said, {"role": "user", "content": question}], systems[which] if which % 2 else None


def _digest(question: str) -> bytes:
    return hashlib.sha256(b"everyday " + question.encode()).digest()


@functools.cache
def _data() -> dict[str, Any]:
    """system: prompts; turns: (question, answer), the last of which are for trying thresholds."""
    return tomllib.loads(files(__package__).joinpath("everyday.toml").read_text("utf-8"))


def _questions(trait: Trait) -> tuple[str, ...]:
    return (*trait.derive_questions, *trait.evaluate_questions)
