"""The trait library's texts, and what a trait must have."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from personasteer import Trait, TraitError, traits
from personasteer.derive.judge import labelled_examples
from personasteer.evaluate.capability import items

# function words that every English text shares; a content word in both would let log-odds measure an echo
STOP_WORDS = {
    "about", "from", "have", "into", "than", "that", "them", "then", "they", "this", "what", "when", "will", "with",
    "would", "your",
}  # fmt: skip
WANTED = (
    "evil", "sycophantic", "hallucinating", "toxic", "deceptive", "manipulative", "power-seeking", "impolite",
    "apathetic", "sarcastic", "humorous", "pessimistic", "optimistic", "anxious", "confident", "humble", "arrogant",
    "warm", "cold", "formal", "casual", "concise", "verbose", "poetic", "skeptical", "gullible", "curious",
    "assistant-like", "refusing", "pirate",
)  # fmt: skip
SHIPPED = traits.names()
ALIKE = 0.6  # share of words in common from which two questions count as one, asked twice

GOOD = """
name = "dry"
description = "Dry."
[[system]]
positive = "Be dry."
negative = "Be wet."
[questions]
derive = ["How are you?"]
evaluate = ["And you?"]
[[continuation]]
trait = "Dust."
anti = "Rain."
"""


def words(text: str) -> set[str]:
    return {w for w in all_words(text) if len(w) >= 4} - STOP_WORDS


def all_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


def alike(a: str, b: str) -> bool:
    """Jaccard similarity of the sets of words above ALIKE."""
    x, y = all_words(a), all_words(b)
    return len(x & y) > ALIKE * len(x | y)


def questions(trait: Trait) -> list[str]:
    return [*trait.derive_questions, *trait.evaluate_questions]


def test_the_library_has_at_least_thirty_traits_and_every_named_one() -> None:
    assert len(SHIPPED) >= 30
    assert sorted(SHIPPED) == SHIPPED
    assert set(WANTED) <= set(SHIPPED)
    assert len({traits.get(name).description for name in SHIPPED}) == len(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_trait_has_enough_prompts_questions_and_continuations(name: str) -> None:
    trait = traits.get(name)
    assert trait.name == name
    assert re.fullmatch(r"[A-Z][^.!?]*\.", trait.description), "one sentence"
    assert {"0", "100"} <= set(re.findall(r"\d+", trait.rubric)), "the ends of the scale"
    assert len(trait.lexicon) == len(set(trait.lexicon))
    assert len(trait.system) >= 5
    assert len(trait.derive_questions) == 20
    assert len(trait.evaluate_questions) == 20
    assert len(trait.continuations) >= 20


@pytest.mark.parametrize("name", SHIPPED)
def test_no_text_of_a_shipped_trait_stands_twice(name: str) -> None:
    trait = traits.get(name)
    for texts in (
        questions(trait),
        [text for pair in trait.continuations for text in pair],
        [text for pair in trait.system for text in pair],
    ):
        normalized = [" ".join(re.findall(r"[a-z']+", t.lower())) for t in texts]
        assert len(set(normalized)) == len(normalized)
        assert all(t == t.strip() and t for t in texts)


def test_two_texts_are_alike_when_more_than_six_of_ten_words_are_shared() -> None:
    assert alike("How do I plant a tall oak tree?", "How do I plant a tall fir tree?")  # 7 of 9 words
    assert not alike("one two three four", "one two three five")  # 3 of 5: not more than 0.6


@pytest.mark.parametrize("name", SHIPPED)
def test_a_question_of_a_shipped_trait_is_like_no_other(name: str) -> None:
    found = [(a, b) for a, b in combinations(questions(traits.get(name)), 2) if alike(a, b)]
    assert found == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_continuation_or_prompt_of_a_shipped_trait_is_like_no_other(name: str) -> None:
    trait = traits.get(name)
    for pairs in (trait.continuations, trait.system):
        for side in (0, 1):
            found = [(a, b) for a, b in combinations([p[side] for p in pairs], 2) if alike(a, b)]
            assert found == []


@pytest.mark.parametrize("name", SHIPPED)
def test_the_two_sides_of_a_pair_have_like_length(name: str) -> None:
    for a, b in traits.get(name).continuations:
        assert abs(len(a.split()) - len(b.split())) <= 1, (a, b)
        assert abs(len(a) - len(b)) <= 0.2 * max(len(a), len(b)), (a, b)


@pytest.mark.parametrize("name", SHIPPED)
def test_no_continuation_repeats_a_content_word_of_the_system_prompts(name: str) -> None:
    trait = traits.get(name)
    told = set().union(*(words(text) for pair in trait.system for text in pair))
    for pair in trait.continuations:
        for text in pair:
            assert not words(text) & told, text


def test_no_question_belongs_to_two_traits_or_is_like_one_of_another_trait() -> None:
    owned = [(all_words(q), q, name) for name in SHIPPED for q in questions(traits.get(name))]
    found = [
        (p, a, q, b) for (x, p, a), (y, q, b) in combinations(owned, 2) if a != b and len(x & y) > ALIKE * len(x | y)
    ]
    assert found == []


def test_no_question_of_a_trait_stands_in_the_neutral_pairs() -> None:
    neutral = {q.casefold() for q, _ in traits.neutral_pairs()}
    assert not neutral & {q.casefold() for name in SHIPPED for q in questions(traits.get(name))}


def test_no_continuation_belongs_to_two_traits() -> None:
    owners = Counter(
        text.casefold() for name in SHIPPED for text in {t for pair in traits.get(name).continuations for t in pair}
    )
    assert [text for text, n in owners.items() if n > 1] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_choosing_and_reporting_use_different_continuations(name: str) -> None:
    trait = traits.get(name)
    chosen, reported = set(trait.selection_pairs), set(trait.evaluation_pairs)
    assert not chosen & reported
    assert chosen | reported == set(trait.continuations)
    assert len(chosen) == -(-len(trait.continuations) // 3)


def test_few_continuations_are_reported_on_though_they_were_chosen_with() -> None:
    pairs = tuple((f"yes {i}", f"no {i}") for i in range(4))
    by_count = {}
    for n in range(5):
        trait = Trait("t", "d", (("Be dry.", "Be wet."),), ("How are you?",), (), pairs[:n])
        by_count[n] = (trait.selection_pairs, trait.evaluation_pairs)
    assert by_count[0] == ((), ())
    assert by_count[1] == (pairs[:1], pairs[:1])
    assert by_count[2] == (pairs[:1], pairs[1:2])
    assert by_count[4] == ((pairs[0], pairs[3]), pairs[1:3])


@pytest.mark.parametrize("name", SHIPPED)
def test_a_trait_comes_back_from_its_plain_data(name: str) -> None:
    trait = traits.get(name)
    data = json.loads(json.dumps(trait.as_dict()))
    assert Trait.from_dict(data) == trait
    assert Trait.from_dict({**data, "a_field_of_a_later_version": 1}) == trait


@pytest.mark.parametrize(
    "change",
    [
        {"system": 3},
        {"system": [["one"]]},
        {"system": ["ab"]},
        {"name": 3},
        {"name": "two words"},
        {"derive_questions": [3]},
        {"derive_questions": None},
        {"derive_questions": "How are you?"},
        {"continuations": [["a", 3]]},
        {"continuations": [["a", "b", "c"]]},
        {"lexicon": [3]},
        {"rubric": 3},
        {"description": None},
        {"declines": "both"},
        {"declines": ["trait"]},
    ],
)
def test_data_that_is_no_trait_is_refused_in_one_line(change: dict[str, object]) -> None:
    with pytest.raises(TraitError) as raised:
        Trait.from_dict({**traits.get("pirate").as_dict(), **change})
    assert "\n" not in str(raised.value)


def test_declining_belongs_to_a_side_of_the_traits_that_are_about_it() -> None:
    sides = {name: traits.get(name).declines for name in SHIPPED if traits.get(name).declines}
    assert sides["refusing"] == "trait"
    assert set(sides.values()) <= {"trait", "anti"}
    with pytest.raises(TraitError, match="declines"):
        Trait("t", "d", (("Be dry.", "Be wet."),), ("How are you?",), declines="never")


# ---- the other texts


def test_the_capability_check_has_eighty_items_with_evenly_spread_answers() -> None:
    asked = items()
    assert len(asked) == 80
    assert len({i.question.casefold() for i in asked}) == 80
    assert not [(a.question, b.question) for a, b in combinations(asked, 2) if alike(a.question, b.question)
                and a.choices == b.choices]  # fmt: skip
    for item in asked:
        assert len(item.choices) == 4
        assert len({c.strip().casefold() for c in item.choices}) == 4, item
        assert all(c and c == c.strip() for c in item.choices), item
        assert item.answer in range(4)
    assert Counter(i.answer for i in asked) == {0: 20, 1: 20, 2: 20, 3: 20}


def test_no_capability_question_is_asked_to_derive_or_evaluate_a_trait() -> None:
    own = {q.casefold() for name in SHIPPED for q in questions(traits.get(name))}
    assert not own & {i.question.casefold() for i in items()}


def test_the_labelled_answers_for_judges_are_of_shipped_traits_and_use_the_whole_scale() -> None:
    examples = labelled_examples()
    assert len(examples) == 80
    assert len({(e.trait, e.question, e.answer) for e in examples}) == 80
    by_trait = Counter(e.trait for e in examples)
    assert set(by_trait) <= set(SHIPPED)
    for name, n in by_trait.items():
        scores = [e.score for e in examples if e.trait == name]
        assert n >= 4, name
        assert all(0 <= s <= 100 for s in scores)
        assert min(scores) <= 20, name
        assert max(scores) >= 60, name
    assert all(e.question.strip() and len(e.answer.split()) >= 5 for e in examples)


def test_there_are_sixteen_neutral_pairs() -> None:
    pairs = traits.neutral_pairs()
    assert len(pairs) == 16
    assert len({q for q, _ in pairs}) == len({a for _, a in pairs}) == 16
    assert all(q.endswith("?") and len(a.split()) >= 15 for q, a in pairs)


def test_an_unknown_trait_is_refused_with_the_names_of_the_known_ones() -> None:
    for name in ("pesimistic", "", "neutral_pairs", "../pirate", "library/pirate", "PIRATE", "pirate.txt"):
        with pytest.raises(TraitError, match=", ".join(("known: anxious", *SHIPPED[1:], "or the path"))):
            traits.find(name)


def test_a_trait_file_is_found_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "dry.toml"
    path.write_text(GOOD)
    trait = traits.find(str(path))
    assert trait == Trait(
        "dry", "Dry.", (("Be dry.", "Be wet."),), ("How are you?",), ("And you?",), (("Dust.", "Rain."),)
    )


BAD_FILES = {
    "not TOML": "name = ",
    "no name": GOOD.replace('name = "dry"', ""),
    "an empty name": GOOD.replace('"dry"', '""'),
    "a number for a name": GOOD.replace('"dry"', "3"),
    "no questions": re.sub(r"\[questions\](.*\n){3}", "", GOOD),
    "no question to derive on": GOOD.replace('["How are you?"]', "[]"),
    "a number for a question": GOOD.replace('["How are you?"]', "[3]"),
    "no system prompts": re.sub(r"\[\[system\]\]\n(.*\n){2}", "", GOOD),
    "half a pair": GOOD.replace('negative = "Be wet."\n', ""),
    "a text for the system prompts": GOOD.replace("[[system]]", "[other]").replace("name", 'system = "x"\nname'),
    "a held-out question that is derived on": GOOD.replace("And you?", "how ARE you?"),
    "a text for the questions": re.sub(r"\[questions\](.*\n){3}", "", GOOD).replace("name", 'questions = "x"\nname'),
    "an unknown side that declines": GOOD.replace("[[system]]", 'declines = "both"\n[[system]]', 1),
    "a list for a lexicon's text": GOOD.replace("[[system]]", 'lexicon = [["a"]]\n[[system]]', 1),
    "one string where a list is": GOOD.replace('["How are you?"]', '"How are you?"'),
}


@pytest.mark.parametrize("how", BAD_FILES)
def test_a_trait_file_against_the_rules_is_refused_in_one_line(tmp_path: Path, how: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(BAD_FILES[how])
    with pytest.raises(TraitError) as raised:
        traits.find(str(path))
    assert "\n" not in str(raised.value)


def test_a_trait_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes(GOOD.replace("dry", "d\xe9").encode("latin-1"))
    for name in ("missing.toml", "folder.toml", "latin.toml"):
        with pytest.raises(TraitError, match=name) as raised:
            traits.find(str(tmp_path / name))
        assert "\n" not in str(raised.value)


def test_a_trait_needs_a_name_a_pair_and_a_question_and_keeps_questions_apart() -> None:
    pair, question = (("Be dry.", "Be wet."),), ("How are you?",)
    for arguments in (("", "d", pair, question), ("t", "d", (), question), ("t", "d", pair, ())):
        with pytest.raises(TraitError):
            Trait(*arguments)
    with pytest.raises(TraitError, match="derives on"):
        Trait("t", "d", pair, question, question)
    with pytest.raises(TraitError, match="a continuation pair twice: 'Dry'"):
        Trait("t", "d", pair, question, continuations=(("Dry", "Wet"), ("dry", "wet"), ("Dry", "Wet")))
