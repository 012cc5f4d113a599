"""Files of traits and contrasting texts: the layouts of other tools, and one line for everything that is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from personasteer import Trait, TraitError, traits
from personasteer.derive import Response, load_responses
from personasteer.traits.formats import load_lines, load_pairs, parse_json, parse_toml

# the layout of the published persona_vectors artefacts (github.com/safety-research/persona_vectors), data_generation/
PUBLISHED: dict[str, Any] = {
    "instruction": [{"pos": "Be dry.", "neg": "Be wet."}, {"pos": "Be a desert.", "neg": "Be a sea."}],
    "questions": ["How are you?", "And the sea?", "What now?", "Is it far?", "Why?"],
    "eval_prompt": "Rate the dryness of {answer} from 0 to 100.",
}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def assert_one_line(call: Callable[[Path], object], path: Path, pattern: str = "") -> None:
    """Refused as a trait, in one line that names the file."""
    with pytest.raises(TraitError, match=pattern) as raised:
        call(path)
    assert "\n" not in str(raised.value)
    assert path.name in str(raised.value)
    assert len(str(raised.value)) < 1000


# ---- the published JSON layout


def test_a_published_artefact_becomes_a_trait_whose_questions_alternate(tmp_path: Path) -> None:
    path = write(tmp_path / "dry.json", json.dumps(PUBLISHED))
    assert traits.find(str(path)) == Trait(
        name="dry",
        description="The trait of dry.json.",
        system=(("Be dry.", "Be wet."), ("Be a desert.", "Be a sea.")),
        derive_questions=("How are you?", "What now?", "Why?"),
        evaluate_questions=("And the sea?", "Is it far?"),
        rubric="Rate the dryness of {answer} from 0 to 100.",
    )
    assert traits.find(str(path)) == traits.load(path)


def test_keys_of_the_librarys_layout_are_taken_from_json_where_they_are_there() -> None:
    more = {
        "name": "arid",
        "description": "Arid.",
        "continuation": [{"trait": "Dust.", "anti": "Rain."}],
        "lexicon": ["dust"],
        "declines": "anti",
    }
    trait = parse_json(json.dumps(PUBLISHED | more), "x.json", "x")
    assert (trait.name, trait.description, trait.continuations) == ("arid", "Arid.", (("Dust.", "Rain."),))
    assert (trait.lexicon, trait.declines) == (("dust",), "anti")


@pytest.mark.parametrize(
    ("stem", "name"),
    [("evil", "evil"), ("power seeking", "power-seeking"), ("evil.v2", "evil-v2"), ("..", "trait"), ("böse", "böse")],
)
def test_a_file_name_becomes_a_name_of_one_word(stem: str, name: str) -> None:
    assert parse_json(json.dumps(PUBLISHED), f"{stem}.json", stem).name == name


def without(key: str) -> str:
    return json.dumps({k: v for k, v in PUBLISHED.items() if k != key})


BAD_JSON: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "not valid JSON"),
    "no JSON": ("instruction: yes", "not valid JSON"),
    "JSON cut short": (json.dumps(PUBLISHED)[:-20], "not valid JSON"),
    "JSON too deep": ("[" * 100_000, "not valid JSON"),
    "objects too deep": ('{"a":' * 100_000, "not valid JSON"),
    "a list": (json.dumps([PUBLISHED]), "JSON object is needed, not list"),
    "a number": ("3", "JSON object is needed, not int"),
    "null": ("null", "JSON object is needed"),
    "no prompts": (without("instruction"), "'instruction' is missing"),
    "no questions": (without("questions"), "'questions' is missing"),
    "an empty list of prompts": (json.dumps(PUBLISHED | {"instruction": []}), "no pair of system prompts"),
    "an empty list of questions": (json.dumps(PUBLISHED | {"questions": []}), "no question to derive on"),
    "half a pair": (json.dumps(PUBLISHED | {"instruction": [{"pos": "Be dry."}]}), "'neg' is missing"),
    "a text for the prompts": (json.dumps(PUBLISHED | {"instruction": "Be dry."}), "list of pairs"),
    "a number for the prompts": (json.dumps(PUBLISHED | {"instruction": 3}), "list of pairs"),
    "texts for the pairs": (json.dumps(PUBLISHED | {"instruction": ["Be dry."]}), "list of pairs"),
    "a number for a prompt": (json.dumps(PUBLISHED | {"instruction": [{"pos": 1, "neg": 2}]}), "text is needed"),
    "an empty prompt": (json.dumps(PUBLISHED | {"instruction": [{"pos": " ", "neg": "x"}]}), "empty text"),
    "a text for the questions": (json.dumps(PUBLISHED | {"questions": "How are you?"}), "list of texts is needed"),
    "a number for a question": (json.dumps(PUBLISHED | {"questions": [1, 2]}), "text is needed"),
    "a question twice": (json.dumps(PUBLISHED | {"questions": ["Why?", "why?"]}), "derives on"),
    "a number for the rubric": (json.dumps(PUBLISHED | {"eval_prompt": 3}), "text is needed"),
    "a name of two words": (json.dumps(PUBLISHED | {"name": "a b"}), "one word"),
    "another encoding": (json.dumps(PUBLISHED, ensure_ascii=False).replace("dry", "d\xe9").encode("latin-1"), "utf-8"),
}


@pytest.mark.parametrize("how", BAD_JSON)
def test_json_that_holds_no_trait_is_refused_in_one_line(tmp_path: Path, how: str) -> None:
    content, pattern = BAD_JSON[how]
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(TraitError, match=pattern) as raised:
        traits.find(str(path))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("load", [traits.load, load_pairs, load_lines, load_responses])
def test_a_folder_a_missing_file_and_another_encoding_are_refused_in_one_line(
    tmp_path: Path, load: Callable[[Path], object]
) -> None:
    (tmp_path / "folder.json").mkdir()
    write(tmp_path / "latin.json", b'{"prompt": "caf\xe9"}')
    for name in ("folder.json", "latin.json", "missing.json"):
        assert_one_line(load, tmp_path / name, "cannot be read")


def test_toml_too_deep_is_refused_in_one_line() -> None:
    with pytest.raises(TraitError, match=r"deep\.toml: not valid TOML") as raised:
        parse_toml("a = " + "[" * 100_000, "deep.toml")
    assert "\n" not in str(raised.value)


# ---- chat pairs


def test_chat_pairs_are_answers_to_one_prompt_or_pairs_or_messages(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be."}, {"role": "user", "content": "q"}]
    said = [[*chat, {"role": "assistant", "content": a}] for a in ("dust", "rain")]
    lines = [
        {"prompt": "How?", "positive": "Dust.", "negative": "Rain."},
        {"question": "Where?", "positive": "There\u2028above.", "negative": "Here."},
        {"positive": ["Why?", "Dry."], "negative": ["Why not?", "Wet."]},
        {"positive": said[0], "negative": said[1], "more": 1},
    ]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    positive, negative = load_pairs(write(tmp_path / "p.jsonl", text))
    assert positive == [("How?", "Dust."), ("Where?", "There\u2028above."), ("Why?", "Dry."), said[0]]
    assert negative == [("How?", "Rain."), ("Where?", "Here."), ("Why not?", "Wet."), said[1]]


GOOD_LINE = '{"prompt": "How?", "positive": "Dust.", "negative": "Rain."}\n'
BAD_PAIRS: dict[str, tuple[str, str]] = {
    "nothing": ("", "holds no pair"),
    "blank lines": ("\n  \n", "holds no pair"),
    "no JSON": (GOOD_LINE + "positive\n", "line 2.*not valid JSON"),
    "JSON cut short": (GOOD_LINE + '{"positive": ', "line 2.*not valid JSON"),
    "JSON too deep": ("\n" + "[" * 100_000, "line 2.*not valid JSON"),
    "a number": ("3", "line 1"),
    "a list": ("[]", "line 1"),
    "null": ("null", "line 1"),
    "no negative": ('{"prompt": "q", "positive": "a"}', "line 1: the key 'negative' is missing"),
    "no positive": ('{"prompt": "q", "negative": "a"}', "line 1: the key 'positive' is missing"),
    "an answer to nothing": ('{"positive": "a", "negative": "b"}', 'needs the "prompt"'),
    "a number for the prompt": ('{"prompt": 3, "positive": "a", "negative": "b"}', 'needs the "prompt"'),
    "a number for an answer": ('{"prompt": "q", "positive": 3, "negative": "b"}', "line 1: an answer"),
    "an empty answer": ('{"prompt": "q", "positive": " ", "negative": "b"}', "line 1: an answer is empty"),
    "an empty answer in a pair": ('{"positive": ["q", ""], "negative": ["q", "b"]}', "line 1: an answer is empty"),
    "three texts": ('{"positive": ["a", "b", "c"], "negative": ["a", "b"]}', "line 1: an answer"),
    "no messages": ('{"positive": [], "negative": []}', "line 1: an answer"),
    "mixed": ('{"positive": [{"role": "user", "content": "x"}, "b"], "negative": ["a", "b"]}', "line 1: an answer"),
    "a message without a role": ('{"positive": [{"content": "x"}, {}], "negative": ["a", "b"]}', "text is needed"),
    "a chat without an answer": (
        '{"positive": [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}], "negative": ["a", "b"]}',
        "end with the assistant's",
    ),
    "an answer alone": (
        '{"positive": [{"role": "assistant", "content": "x"}], "negative": ["a", "b"]}',
        "end with the assistant's",
    ),
}


@pytest.mark.parametrize("how", BAD_PAIRS)
def test_a_line_that_holds_no_chat_pair_is_refused_with_its_number(tmp_path: Path, how: str) -> None:
    content, pattern = BAD_PAIRS[how]
    assert_one_line(load_pairs, write(tmp_path / "bad.jsonl", content), pattern)


# ---- llama-cvector-generator's files


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (r"<|im_start|>user\nHello<|im_end|>\n", "<|im_start|>user\nHello<|im_end|>\n"),
        (r"tab\tquote\"and\'slash\\n", "tab\tquote\"and'slash\\n"),
        (r"a\\nb", r"a\nb"),  # an escaped backslash, then n
        (r"a\\\nb", "a\\\nb"),
        (r"\x41\x7a\x0A", "Az\n"),
        (r"\q \x4 \xzz \u0041", r"\q \x4 \xzz \u0041"),  # unknown ones stay
        ("trailing \\", "trailing \\"),
        ("naïve ☂", "naïve ☂"),
        ("  spaces stay  ", "  spaces stay  "),
    ],
)
def test_escapes_in_a_cvector_file_stand_for_their_characters(tmp_path: Path, line: str, text: str) -> None:
    assert load_lines(write(tmp_path / "positive.txt", f"first\n{line}\n")) == ["first", text]


def test_empty_lines_of_a_cvector_file_are_skipped_and_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert load_lines(write(tmp_path / "p.txt", "a\n\nb\r\nc")) == ["a", "b", "c"]
    for content in ("", "\n\n"):
        assert_one_line(load_lines, write(tmp_path / "empty.txt", content), "holds no text")


# ---- given answers


def test_given_answers_may_name_their_fields_either_way(tmp_path: Path) -> None:
    lines = [
        {"question": "q", "answer": "a", "positive": True, "system": "s", "pair": 2, "draw": 1},
        {"prompt": "q", "response": "b", "positive": False},
    ]
    path = write(tmp_path / "r.jsonl", "\n\n".join(map(json.dumps, lines)))
    assert load_responses(path) == [Response("q", "a", True, "s", 2, 1), Response("q", "b", False)]


BAD_RESPONSES: dict[str, tuple[str, str]] = {
    "nothing": ("\n", "holds no answer"),
    "no JSON": ("x", "line 1"),
    "JSON too deep": ("\n" + "[" * 100_000, "line 2"),
    "a list": ("[]", "line 1"),
    "a number": ("3", "line 1"),
    "no answer": ('{"question": "q", "positive": true}', '"question" and "answer" must be texts'),
    "no side": ('{"question": "q", "answer": "a"}', "true or false"),
    "a number for the side": ('{"question": "q", "answer": "a", "positive": 1}', "true or false"),
    "a number for the system prompt": ('{"question": "q", "answer": "a", "positive": true, "system": 3}', '"system"'),
    "a text for the pair": ('{"question": "q", "answer": "a", "positive": true, "pair": "x"}', "line 1"),
    "a list for the pair": ('{"question": "q", "answer": "a", "positive": true, "pair": []}', "line 1"),
    "infinity for the pair": ('{"question": "q", "answer": "a", "positive": true, "pair": 1e999}', "line 1"),
    "half a pair": ('{"question": "q", "answer": "a", "positive": true, "pair": 0.5}', "line 1"),
}


@pytest.mark.parametrize("how", BAD_RESPONSES)
def test_a_line_that_holds_no_answer_is_refused_with_its_number(tmp_path: Path, how: str) -> None:
    content, pattern = BAD_RESPONSES[how]
    assert_one_line(load_responses, write(tmp_path / "bad.jsonl", content), pattern)
