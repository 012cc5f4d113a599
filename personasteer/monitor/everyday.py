"""Prompts without a trait: ordinary questions, as they are and under system prompts without a character."""

from __future__ import annotations

import functools
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
    """The system prompt, without a character of its own, that an ordinary question is asked under when a monitor is
    tried: none for every second.
    """
    return _system_of(question) if _digest(question)[0] % 2 else None


def ordinary_prompts(
    given: Sequence[Conversation] | None = None,
) -> tuple[list[tuple[Conversation, str | None]], list[int], list[str]]:
    """(prompt, system prompt) of the ordinary questions to calibrate on, or of the prompts that are given; the number
    of each one's question; and the trait whose questions they are from.

    The library's are asked twice, one after the other: as they are, and under an everyday system prompt, so that a
    threshold does not take a system prompt as such for a trait.
    """
    if given is not None:
        return [(c, None) for c in given], list(range(len(given))), [""] * len(given)
    twice = [(i, q, s, name) for i, (q, name) in enumerate(clean_prompts()) for s in (None, _system_of(q))]
    return [(q, s) for _, q, s, _ in twice], [i for i, *_ in twice], [name for *_, name in twice]


def _system_of(question: str) -> str:
    return _systems()[_digest(question)[1] % len(_systems())]


def _digest(question: str) -> bytes:
    return hashlib.sha256(b"system " + question.encode()).digest()


@functools.cache
def _systems() -> list[str]:
    found: list[str] = tomllib.loads(files(__package__).joinpath("everyday.toml").read_text("utf-8"))["system"]
    return found


def _questions(trait: Trait) -> tuple[str, ...]:
    return (*trait.derive_questions, *trait.evaluate_questions)
