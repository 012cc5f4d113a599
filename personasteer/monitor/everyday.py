"""Prompts without a trait: ordinary questions, every second under a system prompt without a character."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from importlib.resources import files

from personasteer import traits
from personasteer.chat import Conversation
from personasteer.traits import Trait

HELD_OUT = 3  # every third clean prompt is left for testing


def clean_prompts(*, held_out: bool = False) -> tuple[tuple[str, str], ...]:
    """(question, the trait whose library it is from) of ordinary questions, in a fixed mixed order: two thirds to
    calibrate on, or the third that is left for testing.
    """
    given = [(q, name) for name in traits.names() for q in _questions(traits.get(name))]
    mixed = sorted(dict(given).items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    return tuple(pair for i, pair in enumerate(mixed) if (i % HELD_OUT == 0) == held_out)


def everyday_system(question: str) -> str | None:
    """The system prompt, without a character of its own, that an ordinary question is asked under: none for every
    second, so that a threshold does not take a system prompt as such for a trait.
    """
    prompts = tomllib.loads(files(__package__).joinpath("everyday.toml").read_text("utf-8"))["system"]
    at = hashlib.sha256(b"system " + question.encode()).digest()
    return str(prompts[at[1] % len(prompts)]) if at[0] % 2 else None


def ordinary_prompts(
    given: Sequence[Conversation] | None = None,
) -> tuple[list[tuple[Conversation, str | None]], list[str]]:
    """(prompt, system prompt) of the ordinary questions to calibrate on, or of the prompts that are given; and the
    trait whose questions they are from.
    """
    if given is not None:
        return [(c, None) for c in given], [""] * len(given)
    questions = clean_prompts()
    return [(q, everyday_system(q)) for q, _ in questions], [name for _, name in questions]


def _questions(trait: Trait) -> tuple[str, ...]:
    return (*trait.derive_questions, *trait.evaluate_questions)
