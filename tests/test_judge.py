"""Judges of answers: the probabilities of numbers, the score made of them, and their agreement with human scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import personasteer as ps
from personasteer.derive import judge
from personasteer.derive.judge import (
    Agreement,
    EndpointJudge,
    Labelled,
    LocalJudge,
    NumberTrie,
    agreement,
    labelled_examples,
)
from personasteer.endpoint import Endpoint, Reply
from personasteer.engine import Progress, Request
from personasteer.tiny_model import TEMPLATE, write_tiny_model

TRAIT = ps.Trait(
    name="terse",
    description="The assistant says as little as it can.",
    system=(("Be brief.", "Be long."),),
    derive_questions=("What is rain?",),
    rubric="Give 0 to a long answer and 100 to one of a single word.",
)
PAIRS = [("What is rain?", "Water."), ("Who are you?", "I am an assistant, and I am so glad that you ask.")]


@pytest.fixture(scope="module")
def tiny_model(tiny_path: Path) -> Iterator[ps.Model]:
    with ps.Model(tiny_path, n_ctx=1024, n_threads=1) as m:
        yield m


@pytest.fixture(scope="module")
def smollm2_model(smollm2_path: Path) -> Iterator[ps.Model]:
    with ps.Model(smollm2_path, n_ctx=512, n_threads=2) as m:
        yield m


# -- a local judge ----------------------------------------------------------------------------------------------------


def by_separate_requests(
    model: ps.Model, prompt: Sequence[int], spellings: dict[tuple[int, ...], int], numbers: Sequence[int]
) -> NDArray[np.float64]:
    """p of some numbers: p of their own tokens, less that of every longer number that begins with them."""

    def p(tokens: tuple[int, ...]) -> float:
        text, n = [*prompt, *tokens], len(prompt)
        request = Request(text, outputs=(n - 1, len(text) - 1), keep_scores=True)
        return math.exp(model.run_requests([request])[0]["scores"].astype(float).sum())

    out = []
    for number in numbers:
        own = [tokens for tokens, n in spellings.items() if n == number]
        longer = [t for t in spellings if t[:-1] in own]
        out.append(sum(map(p, own)) - sum(map(p, longer)))
    return np.array(out)


def test_the_tree_gives_what_separate_requests_give_on_a_tokenizer_with_a_space_in_front(tiny_model: ps.Model) -> None:
    spellings = {tuple(tiny_model.tokenize(str(n), add_special=False)): n for n in range(101)}
    spellings |= {tokens[1:]: n for tokens, n in spellings.items()}
    assert len(spellings) == 202
    local = LocalJudge(tiny_model)
    p = local.probabilities(TRAIT, PAIRS)
    assert p.shape == (2, 101)
    expected = by_separate_requests(tiny_model, local._prompt(TRAIT, *PAIRS[0]), spellings, range(101))
    assert expected.min() > 0
    # keys and values are cached in 16 bits, and batches of other shapes add in another order: 0.011 was seen
    np.testing.assert_allclose(np.log(p[0]), np.log(expected), atol=0.03)


def test_the_tree_gives_what_separate_requests_give_on_a_model_that_splits_digits(smollm2_model: ps.Model) -> None:
    spellings = {tuple(smollm2_model.tokenize(str(n), add_special=False)): n for n in range(101)}
    assert {len(tokens) for tokens in spellings} == {1, 2, 3}
    local = LocalJudge(smollm2_model)
    p = local.probabilities(TRAIT, PAIRS[:1])[0]
    some = [0, 7, 10, 42, 100]
    expected = by_separate_requests(smollm2_model, local._prompt(TRAIT, *PAIRS[0]), spellings, some)
    # 4-bit weights round the states to 8 bits in blocks: batches of other shapes move log p by some hundredths
    np.testing.assert_allclose(np.log(p[some]), np.log(expected), atol=0.15)


def digits(number: int) -> list[int]:
    """Token 0 to 9 for each digit."""
    return [int(c) for c in str(number)]


class Certain:
    """A stand-in for a Model that answers one number; its tokens are the digits, and 10 for all else."""

    name = fingerprint = "certain"
    n_vocab = 11

    class template:  # noqa: N801 (a stand-in for the attribute)
        takes_system = staticmethod(lambda: False)

    def __init__(self, says: str, certainty: float = 30.0) -> None:
        self.says, self.certainty = says, certainty
        self.n_requests = 0

    def tokenize(self, text: str, **_: Any) -> list[int]:
        return digits(int(text))

    def detokenize(self, tokens: Sequence[int]) -> str:
        return "".join(map(str, tokens))

    def measured_prompt(self, text: str, *_: Any) -> list[int]:
        self.prompt = text
        return [10, 10, 10]

    def run_requests(self, requests: Sequence[Request], **_: Any) -> list[dict[str, Any]]:
        self.n_requests += len(requests)
        return [{"logits": self._rows(list(r.tokens[3:]), r.outputs)} for r in requests]

    def _rows(self, path: list[int], outputs: tuple[int, int]) -> NDArray[np.float32]:
        assert outputs == (2, 3 + len(path))
        rows = np.zeros((len(path) + 1, 11), np.float32)
        for k in range(len(path) + 1):
            on_the_way = "".join(map(str, path[:k])) == self.says[:k] and k < len(self.says)
            rows[k, int(self.says[k]) if on_the_way else 10] = self.certainty
        return rows


@pytest.mark.parametrize("says", ["0", "1", "7", "10", "80", "99", "100"])
def test_a_model_that_always_says_a_number_gives_that_score(says: str) -> None:
    model = Certain(says)
    np.testing.assert_allclose(LocalJudge(model).score(TRAIT, PAIRS), [int(says)] * 2, atol=1e-6)  # type: ignore[arg-type]


def test_one_request_for_each_first_digit_is_enough() -> None:
    model = Certain("80")
    LocalJudge(model).score(TRAIT, PAIRS)  # type: ignore[arg-type]
    assert model.n_requests == 2 * 9


def test_the_score_is_the_mean_weighted_by_probability() -> None:
    # 0.5 for token 2 and 0.3 for token 5 of a vocabulary whose numbers are single tokens; 0.2 for another word
    trie = NumberTrie([(n, [n]) for n in range(101)])
    assert trie.paths == [()]
    p = trie.probabilities([np.log([[1e-30, 1e-30, 0.5, 1e-30, 1e-30, 0.3, *[1e-30] * 95, 0.2]]).astype(np.float32)])
    assert p.sum() == pytest.approx(0.8, abs=1e-6)
    assert judge._mean(p) == pytest.approx((0.5 * 2 + 0.3 * 5) / 0.8, abs=1e-5)


def test_what_the_longer_numbers_leave_over_belongs_to_the_number_itself() -> None:
    trie = NumberTrie([(8, [0]), (80, [0, 1]), (85, [0, 2])])
    root, after = [0.9, 0.04, 0.03, 0.03], [0.1, 0.5, 0.3, 0.1]  # of the tokens 0 to 3
    p = trie.probabilities([np.log([root, after]).astype(np.float32)])
    assert {n: round(float(p[n]), 6) for n in np.flatnonzero(p)} == {8: 0.18, 80: 0.45, 85: 0.27}


def test_a_number_and_its_spelling_after_a_space_count_together() -> None:
    trie = NumberTrie([(5, [0, 1]), (5, [1])])
    p = trie.probabilities([np.log([[0.4, 0.5, 0.1], [0.25, 0.5, 0.25]]).astype(np.float32)])
    assert p[5] == pytest.approx(0.5 + 0.4 * 0.5, abs=1e-6)


@pytest.mark.parametrize(("share", "scored"), [(0.26, True), (0.24, False)])
def test_a_judge_that_hardly_says_numbers_gives_no_score(share: float, scored: bool) -> None:
    p = np.zeros(101)
    p[40], p[60] = share / 2, share / 2
    np.testing.assert_allclose(judge._mean(p), 50.0 if scored else math.nan, rtol=1e-9)


def test_a_random_model_gives_no_score(tiny_model: ps.Model) -> None:
    assert np.isnan(LocalJudge(tiny_model).score(TRAIT, PAIRS)).all()


def test_the_same_scores_come_again_and_progress_counts_answers(tiny_model: ps.Model) -> None:
    seen: list[tuple[int, int]] = []
    local = LocalJudge(tiny_model)
    first = local.probabilities(TRAIT, PAIRS, progress=lambda *at: seen.append(at))
    np.testing.assert_array_equal(local.probabilities(TRAIT, PAIRS), first)
    assert seen == [(1, 2), (2, 2)]
    assert local.score(TRAIT, []).shape == (0,)


def test_units_of_answers_give_the_same_as_all_at_once(tiny_model: ps.Model) -> None:
    local = LocalJudge(tiny_model)
    whole = local.probabilities(TRAIT, PAIRS)
    local._unit = 1
    # the second unit finds the first one's text in the cache: other shapes, other last bits
    np.testing.assert_allclose(local.probabilities(TRAIT, PAIRS), whole, rtol=1e-3, atol=1e-9)


def test_the_prompt_holds_the_rubric_and_the_answer_and_ends_asking_for_a_number(tiny_model: ps.Model) -> None:
    text = tiny_model.detokenize(LocalJudge(tiny_model)._prompt(TRAIT, *PAIRS[0]))
    for part in ("<|system|>", TRAIT.name, TRAIT.description, TRAIT.rubric, *PAIRS[0]):
        assert part in text
    assert text.endswith("Reply with the number only.\n<|assistant|>")


def test_a_template_without_a_system_role_gets_it_all_from_the_user(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    with ps.Model(write_tiny_model(tmp_path / "m.gguf", chat_template=template), n_ctx=1024, n_threads=1) as m:
        text = m.detokenize(LocalJudge(m)._prompt(TRAIT, *PAIRS[0]))
    assert "<|system|>" not in text
    assert f"<|user|>{judge.SYSTEM}" in text


def test_a_base_model_cannot_judge(tmp_path: Path) -> None:
    with (
        ps.Model(write_tiny_model(tmp_path / "m.gguf", chat_template=None), n_ctx=64, n_threads=1) as m,
        pytest.raises(ps.TemplateError),
    ):
        LocalJudge(m)


# -- a judge behind a server ------------------------------------------------------------------------------------------


class FakeEndpoint(Endpoint):
    """Answers the same whatever it is asked."""

    def __init__(self, text: str, **first_token: float) -> None:
        super().__init__("http://127.0.0.1:9/v1", "fake")
        self.reply = Reply(text, [(token.strip("_"), math.log(p)) for token, p in first_token.items()])
        self.asked: list[Any] = []

    def chat(self, messages: Any, **options: Any) -> Reply:
        self.asked.append((messages, options))
        return self.reply


@pytest.mark.parametrize(
    ("text", "first_token", "score"),
    [
        ("80", {"_80": 1.0}, 80),
        ("80", {"_80": 0.5, "_60": 0.3, "The": 0.2}, (0.5 * 80 + 0.3 * 60) / 0.8),
        ("80", {"_80": 0.15, "_20": 0.09, "I": 0.7}, math.nan),  # 0.24 < 0.25
        ("80", {"_80": 0.4, "_101": 0.4, "_8000": 0.1}, 80),
        ("Sorry", {"Sorry": 0.6, "_30": 0.3}, 30),
        ("Sorry", {"Sorry": 1.0}, math.nan),
        ("85", {"_8": 0.9, "_7": 0.1}, 85),  # a tokenizer that takes numbers apart
        ("Score: 70/100", {}, 70),
        ("I would give it 12.5.", {}, 12.5),
        ("-5", {}, math.nan),
        ("500", {}, math.nan),
        ("no idea", {}, math.nan),
        ("", {}, math.nan),
    ],
)
def test_an_endpoint_is_scored_by_its_first_token_else_by_its_text(
    text: str, first_token: dict[str, float], score: float
) -> None:
    scores = EndpointJudge(FakeEndpoint(text, **first_token)).score(TRAIT, PAIRS)
    np.testing.assert_allclose(scores, [score, score], rtol=1e-9)


def test_a_judge_that_thinks_first_is_asked_again_and_its_thoughts_do_not_count() -> None:
    class Thinks(FakeEndpoint):
        def chat(self, messages: Any, **options: Any) -> Reply:
            super().chat(messages, **options)
            return Reply(self.reply.text[: 12 if options["max_tokens"] == 8 else None])

    endpoint = Thinks("<think>0 to 100? Between 10 and 20? No.</think>\n\n65")
    assert EndpointJudge(endpoint).score(TRAIT, PAIRS).tolist() == [65, 65]
    assert [options["max_tokens"] for _, options in endpoint.asked] == [8, 2048] * 2
    endless = Thinks("<think>Is it 10, or is it 20, or")
    assert np.isnan(EndpointJudge(endless).score(TRAIT, PAIRS)).all()


def test_an_endpoint_is_asked_with_the_rubric_and_for_probabilities() -> None:
    endpoint, seen = FakeEndpoint("5"), []
    EndpointJudge(endpoint).score(TRAIT, PAIRS, progress=lambda *at: seen.append(at))
    messages, options = endpoint.asked[1]
    assert [m["role"] for m in messages] == ["system", "user"]
    assert TRAIT.rubric in messages[1]["content"]
    assert PAIRS[1][1] in messages[1]["content"]
    assert options["top_logprobs"] == 20
    assert seen == [(1, 2), (2, 2)]


# -- agreement --------------------------------------------------------------------------------------------------------


class Recites:
    """A judge with a list of scores by answer."""

    def __init__(self, **scores: float) -> None:
        self.scores = scores
        self.traits: list[str] = []

    def score(
        self, trait: ps.Trait, pairs: Sequence[tuple[str, str]], *, progress: Progress | None = None
    ) -> NDArray[np.float64]:
        self.traits.append(trait.name)
        if progress:
            progress(len(pairs), len(pairs))
        return np.array([self.scores[answer] for _, answer in pairs])


def example(answer: str, score: float, trait: str = "terse") -> Labelled:
    return Labelled(trait, "?", answer, score)


def test_the_figures_of_an_agreement_are_those_worked_out_by_hand() -> None:
    examples = [example("a", 0), example("b", 10), example("c", 60), example("d", 80), example("e", 100)]
    found = agreement(Recites(a=10, b=20, c=20, d=90, e=math.nan), examples, traits={"terse": TRAIT})
    # ranks 1 2 3 4 and 1 2.5 2.5 4: 4.5 / sqrt(5 * 4.5); pairs 1, 1/2, 1, 1 of 4; (10 + 10 + 40 + 10) / 4
    assert found == Agreement(
        n=5,
        spearman=pytest.approx(4.5 / math.sqrt(22.5)),
        auroc=pytest.approx(3.5 / 4),
        mean_abs_error=pytest.approx(17.5),
        unscored=1,
    )


def test_a_judge_that_turns_everything_round_is_told_from_one_that_is_right() -> None:
    examples = [example("a", 5), example("b", 40), example("c", 95)]
    right = agreement(Recites(a=5, b=40, c=95), examples, traits={"terse": TRAIT})
    wrong = agreement(Recites(a=95, b=60, c=5), examples, traits={"terse": TRAIT})
    assert (right.spearman, right.auroc, right.mean_abs_error) == (pytest.approx(1), 1, 0)
    assert (wrong.spearman, wrong.auroc, wrong.mean_abs_error) == (pytest.approx(-1), 0, pytest.approx(200 / 3))


def test_a_judge_that_always_says_80_agrees_with_nobody() -> None:
    examples = [example("a", 0), example("b", 50), example("c", 100)]
    found = agreement(EndpointJudge(FakeEndpoint("80", _80=1.0)), examples, traits={"terse": TRAIT})
    assert math.isnan(found.spearman)
    assert found.auroc == 0.5
    assert found.mean_abs_error == pytest.approx((80 + 30 + 20) / 3)


def test_a_judge_that_scores_nothing_has_no_figures() -> None:
    found = agreement(EndpointJudge(FakeEndpoint("hm")), [example("a", 0), example("b", 90)], traits={"terse": TRAIT})
    assert (found.n, found.unscored) == (2, 2)
    assert all(math.isnan(x) for x in (found.spearman, found.auroc, found.mean_abs_error))


def test_examples_are_judged_trait_by_trait_and_their_order_does_not_matter() -> None:
    traits = {"terse": TRAIT, "pirate": ps.traits.get("pirate")}
    examples = [example("a", 0), example("b", 100, "pirate"), example("c", 90), example("d", 10, "pirate")]
    recites, seen = Recites(a=0, b=100, c=90, d=10), []
    found = agreement(recites, examples, traits=traits, progress=lambda *at: seen.append(at))
    assert found.mean_abs_error == 0
    assert recites.traits == ["terse", "pirate"]
    assert seen == [(2, 4), (4, 4)]


def test_no_examples_and_an_unknown_trait_are_refused() -> None:
    with pytest.raises(ps.ArgumentError, match="examples is empty"):
        agreement(Recites(), [])
    with pytest.raises(ps.TraitError, match="no-such-trait"):
        agreement(Recites(), [example("a", 0, "no-such-trait")])


def test_the_labelled_examples_are_on_traits_of_the_library_and_cover_both_ends_of_each() -> None:
    examples = labelled_examples()
    assert {e.trait for e in examples} <= set(ps.traits.names())
    assert len({(e.question, e.answer) for e in examples}) == len(examples) >= 80
    assert all(0 <= e.score <= 100 and e.question.strip() and e.answer.strip() for e in examples)
    for trait in {e.trait for e in examples}:
        scores = [e.score for e in examples if e.trait == trait]
        assert sum(s >= judge.HIGH for s in scores) >= 3, trait
        assert sum(s <= judge.LOW for s in scores) >= 3, trait
