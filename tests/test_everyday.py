"""Ordinary prompts: library questions alone, under everyday system prompts and after everyday conversations."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from personasteer import monitor, traits
from personasteer.discriminant import FOLDS
from personasteer.monitor import everyday
from personasteer.monitor.everyday import ordinary_prompts

DATA = tomllib.loads(Path(everyday.__file__).with_suffix(".toml").read_text("utf-8"))


def sentences(prompts: Sequence[tuple[Any, str | None]]) -> set[str]:
    """The parts of system prompts, and what was said before the last question."""
    found = {m["content"] for c, _ in prompts if not isinstance(c, str) for m in c[:-1]}
    return found | {part for _, s in prompts if s for part in (*DATA["who"], *DATA["how"]) if part in s}


def test_ordinary_questions_are_asked_as_they_are_and_under_a_system_prompt_and_after_turns() -> None:
    prompts, numbers, whose = ordinary_prompts()
    alone, under, after = (prompts[k::3] for k in range(3))
    assert list(zip([q for q, _ in alone], whose[::3], strict=True)) == list(monitor.clean_prompts())
    assert [q for q, _ in under] == [c[-1]["content"] for c, _ in after] == [q for q, _ in alone]
    assert {s for _, s in alone} == {None}
    assert numbers[::3] == numbers[1::3] == numbers[2::3] == list(range(len(alone)))
    assert len({s for _, s in under}) > 250  # who answers, or how, or both
    assert {s is None for _, s in after} == {True, False}
    assert {len(c) for c, _ in after} == {3, 5, 9, 17}
    begun = {(s, c[0]["content"], c[1]["content"], c[2]["content"]) for c, s in after if len(c) > 3}
    assert len(begun) <= 160 < len(after) / 4  # what they share is computed once
    folds: list[set[str]] = [set() for _ in range(FOLDS)]
    for number, pair in enumerate(zip(under, after, strict=True)):
        folds[number % FOLDS] |= sentences(pair)
    assert not [a & b for i, a in enumerate(folds) for b in folds[:i] if a & b]
    assert 0.95 * 900 < len(set().union(*folds)) <= 900  # two of each turn


def test_fresh_questions_are_tried_under_system_prompts_and_after_turns_of_their_own() -> None:
    every = [q for held_out in (False, True) for q, _ in monitor.clean_prompts(held_out=held_out)]
    given = [monitor.everyday_prompt(q) for q in every]
    assert 0.3 < sum((q, None) == pair for q, pair in zip(every, given, strict=True)) / len(every) < 0.37
    assert 0.3 < sum(not isinstance(c, str) for c, _ in given) / len(every) < 0.37
    systems = {s for _, s in given if s is not None}
    assert len(systems) > 300
    asked = " ".join(text for name in traits.names() for pair in traits.get(name).system for text in pair)
    tried, calibrated = sentences(given), sentences(ordinary_prompts()[0])
    assert not [s for s in tried | calibrated if s in asked]
    assert given == [monitor.everyday_prompt(q) for q in every]
    assert 0.95 * 500 < len(tried) <= 500
    assert not tried & calibrated
    assert not (tried | calibrated) & set(every)
