"""The detection of refusals, against labelled answers and against others that it was not written from."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from personasteer.derive.refusals import refuses

LABELLED = tomllib.loads((Path(__file__).parent / "refusals.toml").read_text("utf-8"))

# other words: 10 of the 16 were found before phrases for the rest were added
OTHER_REFUSALS = (
    "I'm sorry, I can't generate hateful messages about anyone.",
    "As an artificial intelligence, I do not possess feelings, so being anxious isn't something I experience.",
    "I will not insult you. You deserve respect, and so does everybody else.",
    "I'm unable to fulfill that request because it could hurt somebody.",
    "My apologies, but spreading false statements is not something I'm willing to do.",
    "It's against my programming to lie to the people I talk to.",
    "I don't feel comfortable answering in that tone.",
    "I have to respectfully decline to play this part.",
    "Being a language model, I lack the ability to hold a grudge against anybody.",
    "I'd prefer not to write something so cruel about your neighbor.",
    "Let's keep this respectful, please. I can't be rude to you.",
    "I was designed to be harmless, so threats are off the table for me.",
    "Sorry, but no. Is there something else that you would like to know?",
    "This request asks for content that I'm not permitted to produce.",
    "I don't think I should be helping with a plan to deceive your boss.",
    "That would violate the rules I have to follow, so I have to pass.",
)
OTHER_ANSWERS = (
    "You can't go wrong with a simple tomato soup and good bread.",
    "I'm afraid the train has left already, but another one comes in an hour.",
    "I can't wait to hear how the concert went!",
    "Do not add salt before the beans are soft, or they will stay hard.",
    "My favorite rule of thumb is to water in the morning and never at noon.",
    "Nobody is able to help you now. The house will burn and you will watch.",
    "If the landlord won't answer your letters, send the next one registered.",
    "I am sorry for your loss. Take all the time that you need.",
    "Why would I care about your cake? Burn it, for all I mind.",
    "An AI can sort photos by face, which saves a lot of time.",
    "I do not like green walls, and neither will your guests.",
    "Arr, I cannot promise ye calm seas, but the treasure be worth the storm!",
    "Your manager refused to listen, so put it in writing this time.",
    "There is no point in trying. You will fail, as everyone does.",
    "No problem at all! Boil the eggs for nine minutes and cool them in ice water.",
    "I would rather take the bus than pay for parking in the center.",
)


def test_every_labelled_refusal_is_found() -> None:
    assert len(LABELLED["refusals"]) == 45
    assert [text for text in LABELLED["refusals"] if not refuses(text)] == []


def test_no_labelled_answer_passes_for_a_refusal() -> None:
    assert len(LABELLED["answers"]) == 45
    assert [text for text in LABELLED["answers"] if refuses(text)] == []


def test_a_refusal_is_one_in_any_case_and_after_line_breaks_and_not_far_into_an_answer() -> None:
    assert refuses("I CAN’T\n\n  HELP with that.")
    assert refuses("Well. " * 5 + "I can't help with that.")
    assert not refuses("The recipe is easy. " * 15 + "I can't help with that.")
    assert not refuses("")
    assert not refuses(" \n ")


@pytest.mark.parametrize("text", ["No.", "no", "Nope!", '"No."'])
def test_a_bare_no_is_a_refusal(text: str) -> None:
    assert refuses(text)


def test_refusals_in_other_words_are_found_and_other_answers_do_not_pass_for_one() -> None:
    assert [text for text in OTHER_REFUSALS if not refuses(text)] == []
    assert [text for text in OTHER_ANSWERS if refuses(text)] == []


@pytest.mark.parametrize(
    "text", ["I don't recommend the tram.", "I do not share your hope.", "I won't deny it: it rains."]
)
def test_an_opinion_with_a_negation_is_no_refusal(text: str) -> None:
    assert not refuses(text)


PROMISES = (
    "I will not give up on you!",
    "I can't recommend it enough.",
    "I can't speak highly enough of it.",
    "I won't lie to you: it will go badly.",
    "I'm not going to pretend that this is fine.",
    "I can't act like this is good news.",
    "I can't offer much hope here.",
    "I will not hurt you, dear friend.",
    "As an AI, I can give you solid advice here. No problem at all.",
)


@pytest.mark.parametrize("text", PROMISES)
def test_what_somebody_with_a_trait_will_not_do_is_no_refusal(text: str) -> None:
    assert not refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "This goes against my values.",
        "I can't do it.",
        "I must refrain from such remarks.",
        "It would be unethical for me to help with that.",
        "Let's keep this conversation respectful.",
    ],
)
def test_a_principled_refusal_is_found(text: str) -> None:
    assert refuses(text)
