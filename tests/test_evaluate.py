"""What an evaluation measures, against the same quantities computed by hand from the model's logits."""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import samples
from hypothesis import given
from hypothesis import strategies as st
from planted import LETTERS
from sklearn.isotonic import IsotonicRegression

import personasteer as ps
from personasteer import evaluate as ev
from personasteer.derive import calibrate
from personasteer.derive.calibration import DOSES, _crossing, falling
from personasteer.evaluate import coherence, controls
from personasteer.evaluate.coherence import repetition
from personasteer.evaluate.generations import in_lexicon
from personasteer.evaluate.log_odds import answer_cells
from personasteer.traits import neutral_pairs
from personasteer.traits.formats import as_toml

capability_items = importlib.import_module("personasteer.evaluate.capability")  # the function hides its module
QUICK: dict[str, Any] = {"n_questions": 3, "n_pairs": 1, "n_random": 3, "n_coherence": 2, "n_items": 4}
SHAPES = (
    4e-3  # nats: one text alone and many in a batch; ggml's attention sums half precision in tiles from 64 tokens on
)


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Iterator[ps.Model]:
    with ps.Model(tiny_path, n_ctx=1024, n_threads=1) as m:
        yield m


@pytest.fixture(scope="module")
def vector(tiny_path: Path) -> ps.PersonaVector:
    return planted.letter_vector(tiny_path)


@pytest.fixture(scope="module")
def evaluation(model: ps.Model, vector: ps.PersonaVector) -> ev.Evaluation:
    (found,) = ev.evaluate(model, [vector], n_generations=2, **QUICK)
    return found


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(1, keepdims=True)))


def as_text(model: ps.Model, tokens: list[int]) -> str:
    """The plain text of these very tokens, so that Model.logits can be asked for them."""
    text = model.detokenize(tokens).removeprefix(" ")  # the tokenizer puts one in front
    assert model.tokenize(text) == tokens
    return text


def token_log_p(model: ps.Model, question: str, answer: str, steer: Any = None, system: str | None = None) -> Any:
    """log p of each token of an answer, from the logits of the whole text; steering must be on all tokens."""
    tokens, n_prompt = model.pair_tokens(question, answer, system)
    rows = log_softmax(model.logits([as_text(model, tokens)], steer=steer)[0])
    return np.array([rows[t - 1, tokens[t]] for t in range(n_prompt, len(tokens))])


# ---- log-odds


def test_a_cell_is_the_difference_of_mean_log_p_per_token(model: ps.Model) -> None:
    cells = [ev.Cell("Who calls?", "a short one", "quite a bit longer than that"), ev.Cell("And now?", "x y", "z")]
    edits = [None, samples.vector(seed=1) * 0.4]
    got = ev.cell_log_odds(model, cells, edits)
    assert got.shape == (2, 2)
    for k, steer in enumerate(edits):
        for i, c in enumerate(cells):
            expected = [token_log_p(model, c.question, text, steer).mean() for text in (c.trait, c.anti)]
            assert got[k, i] == pytest.approx(expected[0] - expected[1], abs=SHAPES)
    assert abs(got[1] - got[0]).min() > 3 * SHAPES  # the edit was there at all


def test_a_system_prompt_stands_before_the_question(model: ps.Model) -> None:
    cells = [ev.Cell("Who calls?", "nobody", "somebody")]
    got = ev.cell_log_odds(model, cells, [None], system="Be brief.")[0, 0]
    a, b = (token_log_p(model, "Who calls?", text, system="Be brief.").mean() for text in ("nobody", "somebody"))
    assert got == pytest.approx(a - b, abs=SHAPES)
    assert abs(got - ev.cell_log_odds(model, cells, [None])[0, 0]) > 0.001


def test_cells_in_another_order_keep_their_values_and_their_places(model: ps.Model) -> None:
    cells = ev.make_cells(LETTERS.evaluate_questions[:3], LETTERS.continuations, 2)
    forth, back = (ev.cell_log_odds(model, order, [None, samples.vector() * 0.3]) for order in (cells, cells[::-1]))
    np.testing.assert_allclose(back[:, ::-1], forth, atol=SHAPES)
    between = np.abs(np.subtract.outer(forth.ravel(), forth.ravel()))[np.triu_indices(forth.size, 1)]
    assert between.min() > SHAPES  # mixed up places would show


def test_the_next_question_goes_on_with_the_pairs_where_the_last_one_stopped() -> None:
    pairs = [(f"t{i}", f"a{i}") for i in range(5)]
    assert [(c.question, c.trait, c.anti) for c in ev.make_cells(["p", "q", "r"], pairs, 2)] == [
        ("p", "t0", "a0"), ("p", "t1", "a1"),
        ("q", "t2", "a2"), ("q", "t3", "a3"),
        ("r", "t4", "a4"), ("r", "t0", "a0"),
    ]  # fmt: skip
    everything = ev.make_cells(["p", "q"], pairs)
    assert [c.trait for c in everything] == ["t0", "t1", "t2", "t3", "t4"] * 2
    assert ev.make_cells(["p", "q"], pairs, 9) == everything
    assert ev.make_cells([], pairs, 2) == ()


def test_log_odds_are_the_cells_by_question_and_pair(model: ps.Model) -> None:
    got = ev.log_odds(model, LETTERS, [None, samples.vector() * 0.3], n_questions=2, n_pairs=3)
    assert got.shape == (2, 2, 3)
    cells = ev.make_cells(LETTERS.evaluate_questions[:2], LETTERS.continuations, 3)
    np.testing.assert_array_equal(got.reshape(2, 6), ev.cell_log_odds(model, cells, [None, samples.vector() * 0.3]))


@pytest.mark.parametrize("lacking", ["evaluate_questions", "continuations"])
def test_log_odds_need_questions_and_continuations(model: ps.Model, lacking: str) -> None:
    with pytest.raises(ps.ArgumentError, match="'letters' has no held-out questions or no continuation"):
        ev.log_odds(model, replace(LETTERS, **{lacking: ()}), [None])


def test_a_trait_without_continuations_is_compared_by_the_models_own_answers(
    model: ps.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(model, monkeypatch)
    questions = LETTERS.evaluate_questions
    cells = answer_cells(model, LETTERS, questions)
    ((requests, results),) = spy.runs
    asked = [(q, s) for i, q in enumerate(questions) for s in LETTERS.system[i % 2]]  # the prompts in turn
    assert [r.tokens for r in requests] == [model.prompt_tokens(q, s) for q, s in asked]
    assert {(r.max_tokens, r.sampling.temperature) for r in requests} == {(12, 0.0)}
    texts = [r["text"].decode("utf-8", "replace").rstrip("\ufffd").strip() for r in results]
    both = [(q, *texts[2 * i : 2 * i + 2]) for i, q in enumerate(questions)]
    assert [(c.question, c.trait, c.anti) for c in cells] == [x for x in both if x[1] != x[2]]
    assert cells


def test_questions_that_both_prompts_answer_alike_are_no_comparison(model: ps.Model) -> None:
    same = replace(LETTERS, system=(("Be so.", "Be so."), ("Say ace.", "Say bdf.")))
    assert [c.question for c in answer_cells(model, same, ["Who calls?", "And now?", "Why?"])] == ["And now?"]


def test_the_bootstrap_resamples_questions_and_not_pairs() -> None:
    per_question = np.random.default_rng(3).normal(1.0, 0.5, 40)
    low, high = ev.bootstrap_interval(per_question)
    wide = 1.96 * per_question.std() / np.sqrt(40)
    assert low == pytest.approx(per_question.mean() - wide, abs=0.15 * wide)  # 2000 draws, nearly normal
    assert high == pytest.approx(per_question.mean() + wide, abs=0.15 * wide)
    # the same figure fifty times over tells nothing new of a question
    assert ev.bootstrap_interval(np.tile(per_question[:, None], (1, 50))) == pytest.approx((low, high))
    assert ev.bootstrap_interval(per_question, seed=1) != (low, high)
    narrow = ev.bootstrap_interval(per_question, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_the_bootstrap_of_one_value_is_that_value() -> None:
    assert ev.bootstrap_interval(np.array([[2.0, 4.0]])) == (3.0, 3.0)


# ---- ranks and falling curves


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 2, 3], [10, 20, 90], 1.0),
        ([1, 2, 3], [9, 2, -4], -1.0),
        ([1, 2, 2, 3], [1, 3, 2, 4], 4.5 / np.sqrt(4.5 * 5)),  # ranks 0 1.5 1.5 3 and 0 2 1 3
        ([1, 1, 2, 2], [1, 1, 1, 5], 2 / np.sqrt(4 * 3)),  # ranks .5 .5 2.5 2.5 and 1 1 1 3
        ([1, 2, 3], [7, 7, 7], np.nan),
    ],
)
def test_spearman_gives_ties_their_mean_rank(x: list[float], y: list[float], expected: float) -> None:
    assert ev.spearman(x, y) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert ev.spearman(y, x) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_falling_curve_pools_what_rises() -> None:
    assert falling([0.5, 0.9, 0.4, 0.6]) == pytest.approx([0.7, 0.7, 0.5, 0.5])
    assert falling([0.9, 0.5, 0.1]) == [0.9, 0.5, 0.1]
    assert falling([0.1, 0.2, 0.9]) == pytest.approx([0.4, 0.4, 0.4])
    assert falling([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_a_falling_curve_is_scikit_learns_isotonic_fit(values: list[float]) -> None:
    oracle = IsotonicRegression(increasing=False).fit_transform(np.arange(len(values)), values)
    np.testing.assert_allclose(falling(values), oracle, atol=1e-9)


@pytest.mark.parametrize(
    ("measured", "crossing"),
    [
        ([0.9, 0.75, 0.25, 0.0], 0.375),  # halfway between 0.3 and 0.45
        ([0.9, 0.8, 0.7, 0.6], 0.6),  # never
        ([0.0, 0.0, 0.0, 0.0], 0.075),  # from 1 at 0
        ([0.4, 0.9, 0.2, 0.2], 0.3 + 0.15 * 0.15 / 0.45),  # the first two pooled at 0.65
        ([0.5, 0.5, 0.5, 0.5], 0.6),  # 0.5 is not below 0.5
    ],
)
def test_the_window_ends_where_the_curve_crosses_one_half(measured: list[float], crossing: float) -> None:
    assert DOSES == (0.15, 0.3, 0.45, 0.6)
    assert _crossing(measured) == pytest.approx(crossing, abs=6e-4)  # rounded to three places


# ---- coherence, divergence, knowledge


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("one two three", 0.0),
        ("one two three four", 0.0),
        ("a b c a b c", 1 / 4),  # abc bca cab abc
        ("No, no. NO no! No?", 2 / 3),  # one triple three times
        ("it's it's it's it's", 1 / 2),
        ("", 0.0),
        ("... --- ...", 0.0),
        ("a_b a_b", 0.0),  # a b a b: aba bab
    ],
)
def test_repetition_is_the_share_of_word_triples_seen_before(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


class Spy:
    """Hands requests on and keeps the results of every run."""

    def __init__(self, model: ps.Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[tuple[Any, Any]] = []
        run_alone = model.run_alone

        def noted(requests: Any, **options: Any) -> Any:
            results = run_alone(requests, **options)
            self.runs.append((requests, results))
            return results

        monkeypatch.setattr(model, "run_alone", noted)


def mean_nll(model: ps.Model, prompt: list[int], tokens: list[int]) -> float:
    """Of an answer that is tokens, some of them perhaps no text, under the unsteered model."""
    whole = [*prompt, *tokens]
    request = ps.engine.Request(whole, outputs=(0, len(whole)), keep_logits=True)
    rows = log_softmax(model.run_requests([request])[0]["logits"])
    return float(-np.mean([rows[t - 1, whole[t]] for t in range(len(prompt), len(whole))]))


def test_coherence_is_how_much_likelier_the_models_own_answers_are(
    model: ps.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(model, monkeypatch)
    questions = ["Who calls?", "And now?"]
    steer = replace(samples.vector(seed=2) * 0.5, scope="response")
    (got,) = ev.measure_coherence(model, questions, [steer], systems=[["Be brief."]], max_tokens=8)
    answers = spy.runs[0][1]
    own = [[answers[5 * i + k] for i in range(2)] for k in range(4)]  # four unsteered answers to each question
    steered = [answers[5 * i + 4] for i in range(2)]

    def over_questions(results: Any, system: str | None) -> float:
        prompts = [model.prompt_tokens(q, system) for q in questions]
        nll = [mean_nll(model, prompt, r["tokens"]) for prompt, r in zip(prompts, results, strict=True)]
        return float(np.mean(nll))

    base = np.mean([over_questions(draw, None) for draw in own])
    under = [over_questions(steered, s) for s in (None, "Be brief.")]
    assert got.nll == pytest.approx(min(under), abs=SHAPES)
    texts = [[r["text"].decode("utf-8", "replace") for r in side] for side in (*own, steered)]
    assert got.texts == tuple(texts[-1])
    repeats = [np.mean([repetition(t) for t in side]) for side in texts]
    assert got.repetition == repeats[-1]
    expected = np.exp(min(0.0, base - min(under))) * (1 - max(0.0, repeats[-1] - np.mean(repeats[:-1])))
    assert got.coherence == pytest.approx(expected, abs=SHAPES)


def test_a_strength_of_0_is_as_coherent_as_unsteered_where_the_texts_are_the_same(
    model: ps.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coherence, "TEMPERATURE", 0.0)  # drawn texts would differ by the draw
    nothing, same = ev.measure_coherence(model, ["Who calls?", "And now?"], [None, samples.vector() * 0.0])
    assert nothing.texts == same.texts
    assert nothing.repetition == same.repetition
    assert nothing.nll == pytest.approx(same.nll, abs=SHAPES)
    assert [nothing.coherence, same.coherence] == pytest.approx([1.0, 1.0], abs=SHAPES)


def test_a_text_that_the_unsteered_model_would_not_write_scores_low(model: ps.Model) -> None:
    steers = [replace(samples.vector(layers=(3,)) * s, scope="response") for s in (0.05, 20.0)]
    mild, broken = ev.measure_coherence(model, ["Who calls?", "And now?"], steers)
    assert broken.nll > mild.nll
    assert broken.coherence < coherence.LEAST < mild.coherence


@pytest.mark.parametrize(
    ("systems", "nll"),
    [((), 4.0), (("Be brief.",), 4.0), (("Be a pirate.",), 2.5), (("Be brief.", "Be a pirate.", "x"), 2.5)],
)
def test_a_text_that_a_persona_makes_likely_is_coherent_under_it(
    model: ps.Model, monkeypatch: pytest.MonkeyPatch, systems: tuple[str, ...], nll: float
) -> None:
    def rigged(requests: Any, **_: Any) -> Any:
        """The model's own answers cost 2 nats per token; the steered ones 4, and 2.5 for a pirate."""
        out = []
        for r in requests:
            if r.max_tokens:
                out.append({"tokens": [270, 271], "text": b"ahoy"} if r.steering else {"tokens": [280], "text": b"hi"})
            else:
                cost = 2.0 if r.tokens[-1] == 280 else 2.5 if "pirate" in model.detokenize(r.tokens) else 4.0
                out.append({"scores": np.full(r.outputs[1] - r.outputs[0], -cost)})
        return out

    monkeypatch.setattr(model, "run_alone", rigged)
    (got,) = ev.measure_coherence(model, ["Who calls?", "And now?"], [samples.vector() * 0.3], systems=[systems])
    assert got == coherence.Coherence(nll, 0.0, pytest.approx(np.exp(2.0 - nll)), ("ahoy", "ahoy"))


def test_halves_have_other_questions_and_the_same_pairs() -> None:
    pairs = [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")]
    first, rest = ev.halves([f"q{i}" for i in range(5)], pairs, 2)
    assert [c.question for c in first] == ["q0", "q0", "q2", "q2", "q4", "q4"]
    assert [c.question for c in rest] == ["q1", "q1", "q3", "q3"]
    assert {(c.trait, c.anti) for c in first} == {(c.trait, c.anti) for c in rest} == set(pairs)
    assert ev.halves(["q0"], pairs, 1)[0] == ev.halves(["q0"], pairs, 1)[1]


def test_two_judges_share_the_judgement_of_each_token(
    model: ps.Model, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steers = [replace(samples.vector(seed=2) * 0.5, scope="response")]
    (alone,) = ev.measure_coherence(model, ["Who calls?"], steers, max_tokens=8)
    (same,) = ev.measure_coherence(model, ["Who calls?"], steers, max_tokens=8, judges=(model,))
    assert same == alone
    with ps.Model(tiny_path) as other:
        # each finds every other token of the steered answer likely, and its own answers at 1 nat a token
        for m, ahead in ((model, 0), (other, 1)):

            def rigged(requests: Any, ahead: int = ahead, **_: Any) -> Any:
                out = []
                for r in requests:
                    if r.max_tokens:
                        tokens = [270, 271, 272, 273] if r.steering else [280]
                        out.append({"tokens": tokens, "text": b"ahoy" if r.steering else b"hi"})
                    else:
                        cost = np.where((np.arange(r.outputs[1] - r.outputs[0]) + ahead) % 2, 1.0, 40.0)
                        out.append({"scores": -cost if r.tokens[-1] != 280 else np.array([-1.0])})
                return out

            monkeypatch.setattr(m, "run_alone", rigged)
        (both,) = ev.measure_coherence(model, ["Who calls?"], steers, judges=(model, other))
        (one,) = ev.measure_coherence(model, ["Who calls?"], steers, judges=(other,))
    assert both.nll == pytest.approx(1 + np.log(2))
    assert both.coherence == pytest.approx(0.5)
    assert one.nll == pytest.approx(20.5)


def test_an_answer_that_ends_at_once_is_not_coherent(model: ps.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    run_alone = model.run_alone

    def cut(requests: Any, **options: Any) -> Any:
        results = run_alone(requests, **options)
        for r, request in zip(results, requests, strict=True):
            if request.steering:
                r["tokens"], r["text"] = [], b""
        return results

    monkeypatch.setattr(model, "run_alone", cut)
    (got,) = ev.measure_coherence(model, ["Who calls?"], [samples.vector() * 0.3])
    assert got.coherence == 0.0
    assert got.texts == ("",)


def test_kl_is_0_for_nothing_and_numpys_for_an_edit(model: ps.Model) -> None:
    never = ps.When(samples.vector(seed=1), samples.vector() * 0.5, threshold=np.full(4, 1e9), on="token")
    steer = samples.vector(seed=3) * 0.3
    got = ev.kl_on_neutral(model, [None, samples.vector() * 0.0, never, steer], n_pairs=3, n_tokens=6)
    # the steered rows follow a shared prompt, the unsteered ones are computed with it: another shape, other roundings
    np.testing.assert_allclose(got[:3], 0.0, atol=1e-5)
    terms = []
    for question, answer in neutral_pairs()[:3]:
        tokens, n_prompt = model.pair_tokens(question, answer)
        text = as_text(model, tokens)
        base, other = (log_softmax(model.logits([text], steer=s)[0]) for s in (None, steer))
        rows = slice(n_prompt - 1, n_prompt + 5)  # those that predict the answer's first six tokens
        terms += (np.exp(base[rows]) * (base[rows] - other[rows])).sum(1).tolist()
    assert len(terms) == 18
    assert got[3] == pytest.approx(np.mean(terms), rel=1e-3)
    assert got[3] > 0.01


def test_the_items_are_many_and_the_right_answer_is_at_no_favourite_place() -> None:
    items = capability_items.items()
    assert len(items) >= 60
    assert len({i.question for i in items}) == len(items)
    for item in items:
        assert len(set(item.choices)) == 4
    places = Counter(i.answer for i in items)
    assert sorted(places) == [0, 1, 2, 3]
    assert max(places.values()) <= 0.4 * len(items)
    for extreme in (min, max):  # log p is summed, so a habit of short answers must not help
        by_length = [extreme(i.choices, key=len) == i.choices[i.answer] for i in items]
        assert np.mean(by_length) < 0.45


def test_capability_is_the_share_of_items_whose_answer_is_the_likeliest(
    model: ps.Model, vector: ps.PersonaVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = ("bdf", "ace", "hjb", "fhd")
    rigged = tuple(capability_items.Item(f"Item {i}?", choices, 1 if i < 3 else 2) for i in range(4))
    monkeypatch.setattr(capability_items, "items", lambda: rigged)
    strong = replace(vector * 3.0, scope="response")
    got = ev.capability(model, [strong, strong * -1.0, None])
    assert got[0] == 0.75  # the trait's letters are the answer of three of four
    assert got[1] in (0.0, 0.25)  # never "ace"
    by_hand = []
    for item in rigged:
        log_p = [token_log_p(model, f"{item.question} {capability_items.HOW}", c).sum() for c in item.choices]
        by_hand.append(np.argmax(log_p) == item.answer)
    assert got[2] == np.mean(by_hand)
    assert ev.capability(model, [strong], n_items=3).tolist() == [1.0]


def test_a_random_model_answers_by_chance(model: ps.Model) -> None:
    (share,) = ev.capability(model, [None])
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 80)  # four standard deviations


# ---- controls


def test_random_vectors_have_the_norms_of_theirs_and_nothing_else(vector: ps.PersonaVector) -> None:
    like = samples.vector(seed=5, thresholds=np.ones(4), means=np.ones(4), last_prompt=np.ones((4, 64)))
    a, b = ev.random_vectors(like, 2, seed=1)
    for v in (a, b):
        lengths = np.linalg.norm(v.directions, axis=1)
        np.testing.assert_allclose(lengths, np.linalg.norm(like.directions, axis=1), rtol=1e-5)
        assert v.layers == like.layers
        assert v.last_prompt is v.thresholds is v.means is v.shuffled is None
        assert np.nanmax(np.abs(v.cosine(like))) < 0.6  # of 64 dimensions: five standard deviations
    assert np.abs(a.cosine(b)).max() < 0.6
    np.testing.assert_array_equal(a.directions, ev.random_vectors(like, 1, seed=1)[0].directions)
    assert not np.array_equal(a.directions, ev.random_vectors(like, 1, seed=2)[0].directions)


def test_the_unrelated_vector_is_another_traits_difference_of_means(model: ps.Model, vector: ps.PersonaVector) -> None:
    got = ev.unrelated_vector(model, replace(vector, layers=(1, 3)), LETTERS)
    assert got.name == "pirate"
    assert got.layers == (1, 3)
    other = ps.traits.get("pirate")
    asked = [other.derive_questions[i % len(other.derive_questions)] for i in range(len(other.continuations))]
    items = [list(zip(asked, side, strict=True)) for side in zip(*other.continuations, strict=True)]
    acts = [np.stack([a.mean(0) for a in model.capture(side, pool="raw", last_layer=True)]) for side in items]
    expected = acts[0].mean(0) - acts[1].mean(0)
    np.testing.assert_allclose(got.directions[[1, 3]], expected[[1, 3]], atol=1e-3)
    assert not np.isfinite(got.directions[[0, 2]]).any()


@pytest.mark.parametrize(("name", "other"), [("pirate", "formal"), ("casual", "formal"), ("letters", "pirate")])
def test_a_trait_is_not_its_own_control(model: ps.Model, vector: ps.PersonaVector, name: str, other: str) -> None:
    assert ev.unrelated_vector(model, vector, replace(LETTERS, name=name)).name == other
    assert {controls.UNRELATED, controls.OTHERWISE, *controls.UNRELATED_TO} <= set(ps.traits.names())


# ---- the whole


def test_a_vector_that_must_work_is_seen_to_work(evaluation: ev.Evaluation) -> None:
    assert [d.strength for d in evaluation.dose] == pytest.approx([-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3])
    assert evaluation.spearman == pytest.approx(1.0)
    assert evaluation.verdict["monotone"]
    assert evaluation.verdict["outside_random"]
    assert evaluation.dose[-1].delta > evaluation.controls.random_p95 > 0
    assert evaluation.dose[0].delta < -evaluation.controls.random_p95
    assert evaluation.dose[-1].kl > evaluation.dose[4].kl > 0
    assert evaluation.layers == (3,)


def test_a_vector_across_the_trait_is_seen_to_do_nothing(model: ps.Model, vector: ps.PersonaVector) -> None:
    across = np.random.default_rng(1).standard_normal(64)
    v = vector.directions[3].astype(np.float64)
    across -= v * (v @ across) / (v @ v)
    (found,) = ev.evaluate(model, [replace(vector, directions=np.tile(across, (4, 1)))], **{**QUICK, "n_random": 10})
    assert not found.verdict["outside_random"]
    assert not found.passes


def test_the_summary_has_the_promised_structure_and_finite_numbers(evaluation: ev.Evaluation) -> None:
    data = json.loads(json.dumps(evaluation.summary(), allow_nan=False))
    assert len(data["dose"]) == 7
    for point in data["dose"]:
        assert {"strength", "log_odds", "ci_low", "ci_high", "coherence"} <= set(point)
        assert point["ci_low"] <= point["log_odds"] <= point["ci_high"]
        assert 0 <= point["coherence"] <= 1
        assert 0 <= point["repetition"] <= 1
        assert point["kl"] >= 0
    assert {"random_p95", "shuffled", "unrelated", "system_prompt"} <= set(data["controls"])
    assert data["kl_neutral"] == data["dose"][-1]["kl"]
    assert {"base", "steered"} <= set(data["capability"])
    assert -1 <= data["spearman"] <= 1
    assert data["passes"] is all(data["verdict"].values())
    assert data["sizes"] == {"questions": 3, "cells": 3, "control_cells": 3, "items": 4}
    assert "cells" not in data
    assert data["generations"]["questions"] == list(LETTERS.evaluate_questions[:2])


def test_nothing_changes_at_dose_0(evaluation: ev.Evaluation) -> None:
    zero = evaluation.dose[3]
    assert (zero.strength, zero.delta, zero.kl, zero.coherence) == (0.0, 0.0, 0.0, 1.0)
    assert zero.ci_low == zero.log_odds == zero.ci_high
    for d in evaluation.dose:
        assert d.log_odds - zero.log_odds == pytest.approx(d.delta, abs=1e-12)


def test_the_random_band_is_the_95th_percentile_of_the_sizes(evaluation: ev.Evaluation) -> None:
    c = evaluation.controls
    assert c.n_random == 3
    assert len(c.random) == 6
    assert c.random_p95 == pytest.approx(np.quantile(np.abs(c.random), 0.95))
    assert c.shuffled is None
    assert c.unrelated_trait == "pirate"


def test_shuffled_labels_are_a_control_where_the_vector_carries_them(model: ps.Model, vector: ps.PersonaVector) -> None:
    data = np.random.default_rng(0).standard_normal((2, 4, 64))
    (found,) = ev.evaluate(model, [replace(vector, shuffled=data)], **QUICK)
    cells = [c for i, c in enumerate(found.cells) if c.question not in [d.question for d in found.cells[:i]]]
    steers = [replace(replace(vector, directions=d) * s, scope="response") for d in data for s in (0.3, -0.3)]
    odds = ev.cell_log_odds(model, cells, [None, *steers])
    expected = np.abs((odds[1:] - odds[0]).mean(1)).mean()
    assert found.controls.shuffled == pytest.approx(expected, abs=SHAPES)
    assert found.controls.shuffled > 3 * SHAPES


def test_the_same_seed_gives_the_same_numbers_in_a_model_of_any_size(
    tiny_path: Path, vector: ps.PersonaVector, evaluation: ev.Evaluation
) -> None:
    for sizes in ({"n_parallel": 1, "n_batch": 64}, {"n_parallel": 7, "n_batch": 512}):
        with ps.Model(tiny_path, n_ctx=1024, n_threads=1, **sizes) as m:
            (again,) = ev.evaluate(m, [vector], n_generations=2, **QUICK)
        assert again.summary() == evaluation.summary()
    with ps.Model(tiny_path, n_ctx=1024, n_threads=1) as m:
        (other,) = ev.evaluate(m, [vector], n_generations=2, seed=1, **QUICK)
    assert other.controls.random != evaluation.controls.random
    assert other.generations != evaluation.generations


def test_another_strength_and_fewer_items_may_be_asked_for(model: ps.Model, vector: ps.PersonaVector) -> None:
    (found,) = ev.evaluate(model, [vector], strength=0.12, **{**QUICK, "n_items": 0})
    assert [found.dose[0].strength, found.dose[-1].strength] == [-0.12, 0.12]
    assert found.capability == {}
    assert found.generations is None
    assert found.strength == 0.12


def test_a_trait_without_continuations_is_evaluated_on_its_prompts_answers(
    model: ps.Model, vector: ps.PersonaVector
) -> None:
    bare = replace(LETTERS, continuations=())
    (found,) = ev.evaluate(model, [vector], traits=[bare], **{**QUICK, "n_items": 0})
    assert found.cells == answer_cells(model, bare, bare.evaluate_questions[:3])
    assert found.controls.system_prompt is None  # it made the comparisons: what it does to them shows nothing
    calibrated = calibrate(model, vector, trait=bare, sweep_layers=False)
    assert len(calibrated.provenance["calibration"]["doses"]) == 8
    alike = replace(bare, system=(("Be so.", "Be so."),))
    with pytest.raises(ps.ArgumentError, match="'letters' has no continuation pairs, and its prompts change no answer"):
        ev.evaluate(model, [vector], traits=[alike], **QUICK)


def test_the_system_prompt_control_is_the_mean_over_two_prompts(model: ps.Model, evaluation: ev.Evaluation) -> None:
    cells = list(evaluation.cells)
    base, *prompted = (
        ev.cell_log_odds(model, cells, [None], system=s)[0].mean() for s in (None, "Use a, c and e.", "Say ace.")
    )
    assert evaluation.controls.system_prompt == pytest.approx(np.mean(prompted) - base, abs=SHAPES)


def test_free_answers_are_scored_by_the_lexicon(evaluation: ev.Evaluation) -> None:
    g = evaluation.generations
    assert g is not None
    assert g.strengths == (-0.3, 0.0, 0.3)
    assert len(g.texts) == 3
    for rate, texts in zip(g.rates, g.texts, strict=True):
        assert len(texts) == 2
        assert rate == np.mean([in_lexicon(t, LETTERS) for t in texts])


@pytest.mark.parametrize(
    ("text", "hit"), [("An ACE!", True), ("a cage.", True), ("pace", False), ("aces", False), ("", False)]
)
def test_the_lexicon_counts_whole_words(text: str, hit: bool) -> None:
    assert in_lexicon(text, LETTERS) is hit
    assert not in_lexicon(text, replace(LETTERS, lexicon=()))


def test_progress_counts_up_to_its_end(model: ps.Model, vector: ps.PersonaVector) -> None:
    seen: list[tuple[int, int]] = []
    ev.evaluate(model, [vector], progress=lambda done, total: seen.append((done, total)), **QUICK)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert {t for _, t in seen} == {1000}
    assert seen[-1] == (1000, 1000)


def test_cross_talk_has_each_vectors_own_effect_on_its_diagonal(model: ps.Model, vector: ps.PersonaVector) -> None:
    vectors = [vector, replace(samples.vector(seed=6, layers=(2,)), provenance=vector.provenance, strength=0.2)]
    found = ev.evaluate(model, vectors, **{**QUICK, "n_items": 0})
    matrix = ev.cross_talk(model, vectors, found)
    assert matrix.shape == (2, 2)
    for k, e in enumerate(found):  # one pair a question and fewer than six questions: the same cells
        assert matrix[k, k] == pytest.approx(e.dose[-1].delta, abs=SHAPES)
    assert matrix[1, 0] == pytest.approx(matrix[1, 1], abs=SHAPES)  # both columns are the same trait
    assert abs(matrix[0, 0] - matrix[1, 0]) > 0.1


# ---- what cannot be evaluated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"traits": []}, "1 vectors and 0 traits"),
        ({"n_random": 0}, "n_random must be at least 1, not 0"),
        ({"n_pairs": 0}, "n_pairs must be at least 1, not 0"),
        ({"n_questions": 0}, "n_questions must be at least 1, not 0"),
        ({"n_coherence": 0}, "n_coherence must be at least 1, not 0"),
        ({"n_items": -1}, "n_items must be at least 0, not -1"),
        ({"n_generations": -1}, "n_generations must be at least 0, not -1"),
        ({"strength": 0.0}, "strength must be finite and not 0"),
        ({"strength": float("nan")}, "strength must be finite and not 0"),
    ],
)
def test_a_bad_argument_is_named(
    model: ps.Model, vector: ps.PersonaVector, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ps.ArgumentError, match=re.escape(message)):
        ev.evaluate(model, [vector], **options)


def test_a_vector_that_carries_no_trait_needs_one_named(model: ps.Model, tiny_path: Path) -> None:
    with pytest.raises(ps.TraitError, match=r"'vector' does not carry the trait's questions.*--trait"):
        ev.evaluate(model, [samples.vector()])
    (found,) = ev.evaluate(model, [samples.vector()], traits=[LETTERS], **{**QUICK, "n_items": 0})
    assert found.trait == "letters"


def test_the_name_in_a_vector_is_looked_for_in_the_library_and_never_opened(tmp_path: Path) -> None:
    assert ev.trait_of(samples.vector(name="pirate")).name == "pirate"
    assert ev.trait_of(samples.vector(provenance={"trait": "formal"})).name == "formal"
    secret = tmp_path / "secret.toml"
    secret.write_text(as_toml(LETTERS))
    with pytest.raises(ps.TraitError, match=r"no trait '.*secret\.toml'"):
        ev.trait_of(samples.vector(provenance={"trait": str(secret)}))


@pytest.mark.parametrize(
    "texts",
    [
        {"name": "x"},
        {**LETTERS.as_dict(), "name": 3},
        {**LETTERS.as_dict(), "system": [["alone"]]},
        {**LETTERS.as_dict(), "system": [[1, 2]]},
        {**LETTERS.as_dict(), "continuations": [["alone"]]},
        {**LETTERS.as_dict(), "continuations": ["ab"]},
        {**LETTERS.as_dict(), "evaluate_questions": "one text"},
        {**LETTERS.as_dict(), "evaluate_questions": [7]},
        {**LETTERS.as_dict(), "lexicon": [7]},
    ],
    ids=str,
)
def test_a_vector_whose_trait_is_damaged_is_refused(texts: dict[str, Any]) -> None:
    with pytest.raises(ps.TraitError):
        ev.trait_of(samples.vector(provenance={"texts": texts}))


def test_a_trait_without_held_out_questions_is_refused(model: ps.Model, vector: ps.PersonaVector) -> None:
    with pytest.raises(ps.ArgumentError, match="'letters' has no held-out questions"):
        ev.evaluate(model, [vector], traits=[replace(LETTERS, evaluate_questions=())])


def test_what_the_vector_was_derived_on_is_not_evaluated_on_after_the_trait_was_edited(
    model: ps.Model, vector: ps.PersonaVector
) -> None:
    edited = replace(
        LETTERS,
        derive_questions=LETTERS.derive_questions[1:],
        evaluate_questions=(LETTERS.derive_questions[0], *LETTERS.evaluate_questions),
        continuations=(("cc aa ee", "dd bb ff"), *LETTERS.continuations),  # every "third" is another one now
    )
    assert set(edited.evaluation_pairs) & set(LETTERS.selection_pairs)
    (found,) = ev.evaluate(model, [vector], traits=[edited], **QUICK | {"n_questions": None, "n_pairs": 6})
    assert {c.question for c in found.cells} == set(LETTERS.evaluate_questions)
    assert {(c.trait, c.anti) for c in found.cells} == set(edited.evaluation_pairs) - set(LETTERS.selection_pairs)
    seen = replace(edited, evaluate_questions=LETTERS.derive_questions[:1])
    with pytest.raises(ps.ArgumentError, match="'letters' has no held-out questions"):
        ev.evaluate(model, [vector], traits=[seen])


def test_a_vector_without_layers_is_refused(model: ps.Model, vector: ps.PersonaVector) -> None:
    with pytest.raises(ps.ArgumentError, match="'letters' names no layers"):
        ev.evaluate(model, [replace(vector, layers=())])


def test_a_vector_of_another_model_is_refused(model: ps.Model, vector: ps.PersonaVector) -> None:
    other = samples.vector(n_embd=32, layers=(1,), provenance=vector.provenance)
    with pytest.raises(ps.IncompatibleVector, match="width 32"):
        ev.evaluate(model, [vector, other])
