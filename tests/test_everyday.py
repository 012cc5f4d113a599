"""Ordinary prompts: library questions alone, under everyday system prompts and after everyday conversations."""

from personasteer import monitor, traits
from personasteer.monitor.discriminant import FOLDS
from personasteer.monitor.everyday import ordinary_prompts


def test_ordinary_questions_are_asked_as_they_are_and_amid_a_system_prompt_or_a_conversation() -> None:
    prompts, numbers, whose = ordinary_prompts()
    alone, amid = prompts[::2], prompts[1::2]
    assert list(zip([q for q, _ in alone], whose[::2], strict=True)) == list(monitor.clean_prompts())
    assert {s for _, s in alone} == {None}
    assert numbers[::2] == numbers[1::2] == list(range(len(alone)))
    under = [(q, s) for q, s in amid if isinstance(q, str)]
    after = [(c, s) for c, s in amid if not isinstance(c, str)]
    assert 0.45 < len(under) / len(amid) < 0.55
    assert len({s for _, s in under}) == 16
    assert {s is None for _, s in after} == {True, False}
    assert {len(c) for c, _ in after} == {3, 5, 9, 17}
    begun = {(s, c[0]["content"], c[1]["content"], c[2]["content"]) for c, s in after if len(c) > 3}
    assert len(begun) <= 80 < len(after) / 2  # what they share is computed once
    folds: list[set[str]] = [set() for _ in range(FOLDS)]
    for (c, _), number in zip(amid, numbers[1::2], strict=True):
        if not isinstance(c, str):
            folds[number % FOLDS] |= {m["content"] for m in c[:-1]}
    assert not [a & b for i, a in enumerate(folds) for b in folds[:i] if a & b]
    questions = [q if isinstance(q, str) else q[-1]["content"] for q, _ in amid]
    assert questions == [q for q, _ in alone]


def test_fresh_questions_are_tried_as_everyday_prompts_with_turns_of_their_own() -> None:
    every = [q for held_out in (False, True) for q, _ in monitor.clean_prompts(held_out=held_out)]
    given = [monitor.everyday_prompt(q) for q in every]
    assert 0.45 < sum((q, None) == pair for q, pair in zip(every, given, strict=True)) / len(every) < 0.55
    systems = {s for _, s in given if s is not None}
    assert len(systems) == 16
    asked = " ".join(text for name in traits.names() for pair in traits.get(name).system for text in pair)
    assert not [s for s in systems if s in asked]
    assert given == [monitor.everyday_prompt(q) for q in every]
    tried, calibrated = (
        {m["content"] for c, _ in prompts if not isinstance(c, str) for m in c[:-1]}
        for prompts in (given, ordinary_prompts()[0])
    )
    assert (len(tried), len(calibrated)) == (2 * 16, 2 * 40)
    assert not tried & calibrated
    assert not (tried | calibrated) & set(every)
