"""Traits that a model writes: what is read from messy answers, what is dropped, and what is asked for again."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import personasteer as ps
from personasteer import traits
from personasteer.derive.write import clean, pairs_in, questions_in, stem_of, write_trait
from personasteer.endpoint import Endpoint, Reply
from personasteer.traits.formats import as_toml

DESCRIPTION = "The assistant never gives in."
OBJECTS = [
    "kayak", "piano", "garden", "laptop", "bakery", "sofa", "violin", "bicycle", "tent", "kitten", "novel", "recipe",
    "marathon", "mortgage", "podcast", "telescope", "sweater", "beehive", "window", "passport", "camera", "raincoat",
    "sourdough", "uncle", "neighbor", "tattoo", "ladder", "museum", "choir", "fence", "canoe", "kettle", "lamp",
    "drone", "fiddle", "barn", "train", "harbor", "quilt", "orchard", "chess", "pottery",
]  # fmt: skip


class FakeWriter(Endpoint):
    """Answers each kind of request from a list of its own, in turn and then with nothing; keeps what it was asked."""

    def __init__(self, **answers: list[str] | Callable[[int], str]) -> None:
        super().__init__("http://127.0.0.1:9/v1", "fake")
        self.answers = answers
        self.asked: dict[str, list[tuple[str, dict[str, Any]]]] = {
            k: [] for k in ("system", "questions", "first", "rubric")
        }

    def chat(self, messages: Any, **options: Any) -> Reply:
        marks = {
            "instructions to an AI": "system",
            "questions that": "questions",
            "first sentences": "first",
            "rater": "rubric",
        }
        kind = next(kind for mark, kind in marks.items() if mark in messages)
        n = len(self.asked[kind])
        self.asked[kind].append((messages, options))
        answers = self.answers.get(kind, [])
        if callable(answers):
            return Reply(answers(n))
        return Reply(answers[n] if n < len(answers) else "")


SYSTEM = """Sure! Here are the pairs you asked for:

**Pair 1:**
A: "You are a stubborn mule. Refuse every compromise and repeat your view."
B: "You are an easygoing soul. Welcome every compromise and drop your view."

2. A: You are firm as granite. Insist on your opinion in each reply.
   B: You are soft as butter. Surrender your opinion in each reply.
3. A: You are unmoved by all pleas. B: You are unmoved by all pleas!
4. A: You are alone and without a partner here."""

WALL = {"positive": "You are a wall that nobody climbs.", "negative": "You are a door that anybody opens."}

QUESTIONS = """Here are 10 questions:
1. Should I sell my old kayak?
2) **How do I tune a piano at home?**
- "What can I plant in a dark garden?"
3. Should I sell my old KAYAK
4. Why are you so stubborn about laptops?
5. Is stubbornness a good thing at work?
6. Help me to plan a small bakery.
7. Nice?
I hope that these help you!
"""

FIRST = """1.
A: There is nothing that could sway me.
B: There is plenty that could sway me.
2.
A: I will not do that.
B: I will gladly do whatever you may come up with.
3.
A: My opinion on this stays the same.
B: I change gladly on this for you.
4. A: Nothing will budge me today, sorry. | B: Anything will budge me today, sure.
A: There is nothing that could sway me!
B: There is plenty that might tempt me."""


def messy_writer() -> FakeWriter:
    more = [f"Should I talk to my sister about the {thing}?" for thing in OBJECTS]
    return FakeWriter(
        system=[SYSTEM, f"```json\n{json.dumps([WALL])}\n```"],
        questions=[QUESTIONS, json.dumps(more[:20]), "\n".join(f"* {q}" for q in more[20:])],
        first=[FIRST],
        rubric=[
            '"Give 0 to an answer that yields at once,\nabout 50 to one that wavers, 100 to one that never yields."'
        ],
    )


def test_messy_answers_become_a_trait() -> None:
    writer = messy_writer()
    trait = write_trait("stubborn", DESCRIPTION, writer, n_pairs=3, n_questions=24, n_continuations=3)
    assert trait.name == "stubborn"
    assert trait.description == DESCRIPTION
    assert trait.system == (
        (
            "You are a stubborn mule. Refuse every compromise and repeat your view.",
            "You are an easygoing soul. Welcome every compromise and drop your view.",
        ),
        (
            "You are firm as granite. Insist on your opinion in each reply.",
            "You are soft as butter. Surrender your opinion in each reply.",
        ),
        ("You are a wall that nobody climbs.", "You are a door that anybody opens."),
    )
    questions = {*trait.derive_questions, *trait.evaluate_questions}
    assert len(trait.derive_questions) == len(trait.evaluate_questions) == 12
    assert len(questions) == 24
    assert {
        "Should I sell my old kayak?",
        "How do I tune a piano at home?",
        "What can I plant in a dark garden?",
        "Help me to plan a small bakery.",
    } <= questions
    assert not [q for q in questions if "stubborn" in q.lower()]
    # dropped: lengths that differ, "opinion" of a system prompt, a side seen before
    assert trait.continuations == (
        ("There is nothing that could sway me.", "There is plenty that could sway me."),
        ("Nothing will budge me today, sorry.", "Anything will budge me today, sure."),
    )
    assert trait.rubric == (
        "Give 0 to an answer that yields at once, about 50 to one that wavers, 100 to one that never yields."
    )


def test_what_is_missing_is_asked_for_again_with_another_seed_and_more_heat() -> None:
    writer = messy_writer()
    write_trait("stubborn", DESCRIPTION, writer, n_pairs=3, n_questions=24, n_continuations=3, seed=5)
    options = [o for _, o in writer.asked["first"]]
    assert len(options) == 4  # one of three pairs stays missing: asked for in each round
    assert len({o["seed"] for o in options}) == 4
    assert [o["temperature"] for o in options] == sorted({o["temperature"] for o in options})
    assert len(writer.asked["system"]) == 2
    assert len(writer.asked["questions"]) == 3
    assert len(writer.asked["rubric"]) == 1


def test_continuations_are_asked_for_without_the_words_of_the_system_prompts() -> None:
    writer = messy_writer()
    write_trait("stubborn", DESCRIPTION, writer, n_pairs=2, n_questions=8, n_continuations=3)
    request = writer.asked["first"][0][0]
    told = {w for text in re.findall(r"You are .*", SYSTEM) for w in re.findall(r"\w{4,}", text.lower())}
    forbidden = set(re.findall(r"Do not use these words: ([^.]*)\.", request)[0].split(", "))
    assert len(forbidden) >= 3
    assert forbidden <= told


def test_progress_counts_texts_up_to_what_was_asked_for() -> None:
    seen: list[tuple[int, int]] = []
    write_trait(
        "stubborn", DESCRIPTION, messy_writer(), n_pairs=2, n_questions=8, n_continuations=2,
        progress=lambda *at: seen.append(at),
    )  # fmt: skip
    assert seen[-1] == (13, 13)
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {13}


def test_the_same_seed_gives_the_same_trait_and_another_one_another_split() -> None:
    def written(seed: int) -> ps.Trait:
        return write_trait("stubborn", DESCRIPTION, messy_writer(), n_questions=24, seed=seed)

    assert written(1) == written(1)
    assert written(1).derive_questions != written(2).derive_questions
    assert {*written(1).derive_questions, *written(1).evaluate_questions} == {
        *written(2).derive_questions,
        *written(2).evaluate_questions,
    }


def test_no_continuations_and_no_rubric_still_make_a_trait() -> None:
    writer = messy_writer()
    writer.answers |= {"first": [], "rubric": lambda _: "I cannot do that."}
    trait = write_trait("stubborn", DESCRIPTION, writer, n_questions=24)
    assert trait.continuations == ()
    assert "stubborn" in trait.rubric
    assert "100" in trait.rubric


@pytest.mark.parametrize(
    "answer", ["", "I cannot help with that.", "?" * 500, '[{"a": 1}, [[[', "A:\nB:\nA:\nB:", "|||\n||"]
)
def test_a_writer_that_never_obeys_is_an_error_that_says_what_is_missing(answer: str) -> None:
    never = {kind: (lambda _: answer) for kind in ("system", "questions", "first", "rubric")}
    writer = FakeWriter(**never)
    with pytest.raises(ps.TraitError) as e:
        write_trait("stubborn", DESCRIPTION, writer)
    assert "0 usable pairs of system prompts (2 are needed)" in str(e.value)
    assert "0 usable questions to derive on (4 are needed)" in str(e.value)
    assert "larger model" in str(e.value)
    assert "endpoint" in str(e.value)
    assert "\n" not in str(e.value)
    assert len(writer.asked["system"]) == 4


def test_one_pair_short_is_an_error_that_names_only_the_pairs() -> None:
    writer = messy_writer()
    writer.answers["system"] = ["A: You are a big rock.\nB: You are a small leaf."]
    with pytest.raises(ps.TraitError, match=r"only 1 usable pairs of system prompts \(2 are needed\): try"):
        write_trait("stubborn", DESCRIPTION, writer)


@pytest.mark.parametrize("option", [{"n_pairs": 1}, {"n_questions": 7}, {"n_continuations": -1}])
def test_a_number_that_is_too_small_is_refused_before_the_work(option: dict[str, Any]) -> None:
    writer = messy_writer()
    with pytest.raises(ps.ArgumentError, match=next(iter(option))):
        write_trait("stubborn", DESCRIPTION, writer, **option)
    with pytest.raises(ps.TraitError, match="one word"):
        write_trait("very stubborn", DESCRIPTION, writer)
    with pytest.raises(ps.ArgumentError, match="description"):
        write_trait("stubborn", " ", writer)
    assert not any(writer.asked.values())


def test_a_model_can_be_the_writer_and_a_random_one_fails_in_words(tiny_path: Path) -> None:
    with ps.Model(tiny_path, n_ctx=2048, n_threads=1) as m, pytest.raises(ps.TraitError, match="larger model"):
        write_trait("stubborn", DESCRIPTION, m, n_pairs=2, n_questions=8, n_continuations=0)


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "A: one thing\nB: other thing",
        'A: "one thing"\nB: "other thing"',
        "1. **A:** one thing\n   **B:** other thing",
        "**Positive:** one thing\n**Negative:** other thing",
        "Trait - one thing\nOpposite - other thing",
        "Pair 1:\nA) one thing\nB) other thing",
        "A:\none thing\n\nB:\nother thing",
        "1. A: one thing | B: other thing",
        "A: one thing. B: other thing.",
        "Positive prompt 1: one thing\nNegative prompt 1: other thing",
        "| one thing | other thing |",
        "| A | B |\n|---|---|\n| one thing | other thing |",
        '[["one thing", "other thing"]]',
        'Here:\n```json\n{"pairs": [{"trait": "one thing", "anti": "other thing"}]}\n```',
        '{"negative": "other thing", "positive": "one thing"}',
        '{"A": "one thing", "B": "other thing"}',
    ],
)
def test_pairs_are_read_from_many_forms(text: str) -> None:
    assert [(a.rstrip("."), b.rstrip(".")) for a, b in pairs_in(text)][-1] == ("one thing", "other thing")


def test_a_sentence_that_begins_with_an_article_is_no_label() -> None:
    assert pairs_in("A: A dog is fine.\nB: A cat is fine.") == [("A dog is fine.", "A cat is fine.")]
    assert pairs_in("A dog is fine.\nWith luck, all is well.\nNo way.") == []


def test_a_side_that_lost_its_partner_does_not_take_the_next_one() -> None:
    assert pairs_in("A: lost\nA: one\nB: other\nB: lost too\nA: two\nB: second") == [
        ("one", "other"),
        ("two", "second"),
    ]


@pytest.mark.parametrize(
    ("messy", "plain"),
    [
        ('1. "Hello there"', "Hello there"),
        ("  - **Hello** there ", "Hello there"),
        ("12) “Hello there”,", "Hello there"),
        ("* 3. 'Hello there'", "Hello there"),
        ("Q1: Hello there", "Hello there"),
        ('"Hello" said "he', '"Hello" said "he'),
        ("3 cats are enough", "3 cats are enough"),
    ],
)
def test_numbering_and_quotes_go(messy: str, plain: str) -> None:
    assert clean(messy) == plain


def test_questions_are_what_ends_in_a_question_mark_or_stands_in_a_list() -> None:
    text = (
        "Of course. Here you go!\n1. Tell me about old boats.\nWhat is in the cellar?\nGood luck with it all.\n2. Why?"
    )
    assert questions_in(text) == ["Tell me about old boats.", "What is in the cellar?"]
    assert questions_in('{"questions": ["Is rain wet here?", "no"]}') == ["Is rain wet here?"]


@pytest.mark.parametrize(
    ("name", "relatives"),
    [
        ("pessimistic", ["pessimism", "pessimist"]),
        ("sarcastic", ["sarcasm"]),
        ("humorous", ["humor"]),
        ("curious", ["curiosity"]),
        ("evil", ["evils"]),
        ("verbose", ["verbosity"]),
    ],
)
def test_the_stem_of_a_name_begins_its_relatives(name: str, relatives: list[str]) -> None:
    assert len(stem_of(name)) >= 4
    assert all(r.startswith(stem_of(name)) for r in [name, *relatives])


# -- TOML -------------------------------------------------------------------------------------------------------------


def through_a_file(trait: ps.Trait, folder: Path) -> ps.Trait:
    (folder / "t.toml").write_text(as_toml(trait), "utf-8", newline="")
    return traits.load(folder / "t.toml")


@pytest.mark.parametrize("name", ["pessimistic", "pirate"])
def test_a_trait_of_the_library_survives_its_file(name: str, tmp_path: Path) -> None:
    trait = traits.get(name)
    assert through_a_file(trait, tmp_path) == trait


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: t.strip())


@example(a="\x7f\x00\t", b='\\"""\r\n', question="\u2028'", rubric="")
@given(a=texts, b=texts, question=texts, rubric=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, a: str, b: str, question: str, rubric: str
) -> None:
    trait = ps.Trait("odd", a, ((a, b),), (question,), (), ((b, a),), rubric, (a, b))
    assert through_a_file(trait, tmp_path_factory.getbasetemp()) == trait


def test_declines_is_written_only_where_it_says_something(tmp_path: Path) -> None:
    trait = ps.Trait("odd", "d", (("a", "b"),), ("q",))
    assert "declines" not in tomllib.loads(as_toml(trait))
    declining = dataclasses.replace(trait, declines="anti")
    assert tomllib.loads(as_toml(declining))["declines"] == "anti"
    assert through_a_file(declining, tmp_path) == declining


def test_a_written_trait_survives_the_file(tmp_path: Path) -> None:
    trait = write_trait("stubborn", DESCRIPTION, messy_writer(), n_questions=24)
    assert through_a_file(trait, tmp_path) == trait
