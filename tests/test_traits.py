"""The trait library's texts, and what a trait must have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from personasteer import Trait, TraitError, traits

# function words that every English text shares; a content word in both would let log-odds measure an echo
STOP_WORDS = {
    "about",
    "from",
    "into",
    "that",
    "this",
    "what",
    "with",
    "your",
    "will",
    "would",
    "have",
    "when",
    "them",
    "they",
    "then",
    "than",
}
SHIPPED = ("pessimistic", "pirate", "poetic", "sycophantic")

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
    return {w for w in re.findall(r"[a-z']+", text.lower()) if len(w) >= 4} - STOP_WORDS


def test_the_library_has_its_traits() -> None:
    assert traits.names() == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_trait_has_enough_prompts_questions_and_continuations(name: str) -> None:
    trait = traits.get(name)
    assert trait.name == name
    assert trait.description
    assert trait.rubric
    assert trait.lexicon
    assert len(trait.system) >= 5
    assert len(trait.derive_questions) == 20
    assert len(trait.evaluate_questions) == 20
    assert len(trait.continuations) >= 20


@pytest.mark.parametrize("name", SHIPPED)
def test_no_text_of_a_shipped_trait_stands_twice(name: str) -> None:
    trait = traits.get(name)
    for texts in (
        [*trait.derive_questions, *trait.evaluate_questions],
        [text for pair in trait.continuations for text in pair],
        [text for pair in trait.system for text in pair],
    ):
        normalized = [" ".join(re.findall(r"[a-z']+", t.lower())) for t in texts]
        assert len(set(normalized)) == len(normalized)
        assert all(t == t.strip() and t for t in texts)


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


def test_no_question_belongs_to_two_traits_and_none_to_the_neutral_pairs() -> None:
    seen: dict[str, str] = {q.casefold(): "neutral" for q, _ in traits.neutral_pairs()}
    for name in SHIPPED:
        trait = traits.get(name)
        for q in (*trait.derive_questions, *trait.evaluate_questions):
            assert q.casefold() not in seen, (q, name, seen.get(q.casefold()))
            seen[q.casefold()] = name


def test_there_are_sixteen_neutral_pairs() -> None:
    pairs = traits.neutral_pairs()
    assert len(pairs) == 16
    assert len({q for q, _ in pairs}) == len({a for _, a in pairs}) == 16
    assert all(q.endswith("?") and len(a.split()) >= 15 for q, a in pairs)


def test_an_unknown_trait_is_refused_with_the_names_of_the_known_ones() -> None:
    for name in ("pesimistic", "", "neutral_pairs", "../pirate", "PIRATE"):
        with pytest.raises(TraitError, match="known: pessimistic, pirate, poetic, sycophantic"):
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
        with pytest.raises(TraitError, match=name):
            traits.find(str(tmp_path / name))


def test_a_trait_needs_a_name_a_pair_and_a_question_and_keeps_questions_apart() -> None:
    pair, question = (("Be dry.", "Be wet."),), ("How are you?",)
    for arguments in (("", "d", pair, question), ("t", "d", (), question), ("t", "d", pair, ())):
        with pytest.raises(TraitError):
            Trait(*arguments)
    with pytest.raises(TraitError, match="derives on"):
        Trait("t", "d", pair, question, question)
