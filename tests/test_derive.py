"""The derivation from end to end: a planted trait is found, what should not count is dropped, a killed run goes on."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted_model
import pytest
from numpy.typing import NDArray
from planted_model import MINUS, PLUS, planted_trait, write_planted_model

import personasteer as ps
from personasteer import traits
from personasteer.cli.derive import summary
from personasteer.derive import (
    Elicited,
    Response,
    Selection,
    calibrate,
    continuation_responses,
    derive,
    difference_of_means,
    elicit,
    load_responses,
    replay,
    select,
)
from personasteer.derive.calibration import falling
from personasteer.derive.directions import METHODS, held_out_quality
from personasteer.derive.selection import require_enough
from personasteer.engine import Request, Taps
from personasteer.evaluate import cell_log_odds, log_odds, make_cells, random_vectors
from personasteer.tiny_model import TEMPLATE, write_tiny_model
from personasteer.work import Work

BLOCK = 4  # where the model of most tests has its direction
TRAIT = planted_trait()
SHORT: dict[str, Any] = {"max_tokens": 10}
RAW: dict[str, Any] = {"max_tokens": 6, "calibrated": False}
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
REFUSAL = "I'm sorry, but I can't help with that."


def opened(path: Path) -> ps.Model:
    return ps.Model(path, n_ctx=512, n_threads=1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[np.float32]]:
    return write_planted_model(tmp_path_factory.mktemp("planted") / "planted.gguf", BLOCK)


@pytest.fixture(scope="module")
def model(planted: tuple[Path, NDArray[np.float32]]) -> Iterator[ps.Model]:
    with opened(planted[0]) as m:
        yield m


@pytest.fixture(scope="module")
def vector(model: ps.Model) -> ps.PersonaVector:
    return derive(model, TRAIT, **SHORT)


def saved(vector: ps.PersonaVector, path: Path) -> bytes:
    vector.save(path)
    return path.read_bytes()


def cosines(vector: ps.PersonaVector, row: NDArray[np.float32]) -> NDArray[np.float64]:
    data = vector.directions.astype(np.float64)
    return np.asarray(data @ row / (np.linalg.norm(data, axis=1) * np.linalg.norm(row)))


def given(n: int = 8, *, seed: int = 0) -> list[Response]:
    """Answers to n questions of either kind of letters, each under its own system prompt: positive, then negative."""
    rng = np.random.default_rng(seed)

    def text(letters: str) -> str:
        return " ".join("".join(rng.choice(list(letters), 4)) for _ in range(3))

    systems = TRAIT.system[0]
    return [
        Response(f"question {chr(97 + i)}", text((PLUS, MINUS)[side]), side == 0, systems[side])
        for i in range(n)
        for side in (0, 1)
    ]


def with_pairs(n: int) -> ps.Trait:
    """TRAIT with n continuation pairs, of three words each."""
    texts = [r.text for r in given(n)]
    return replace(TRAIT, continuations=tuple(zip(texts[::2], texts[1::2], strict=True)))


def changed(responses: Sequence[Response], texts: dict[int, str]) -> list[Response]:
    return [replace(r, text=texts.get(i, r.text)) for i, r in enumerate(responses)]


def mean_difference(found: Elicited, questions: Sequence[int]) -> NDArray[np.float32]:
    """Over the answers to these questions, in float64, rounded once."""
    sides = [
        np.mean([a for r, a in zip(found.rollouts, found.responses, strict=True) if r.positive is side
                 and r.question in questions], axis=0, dtype=np.float64)
        for side in (True, False)
    ]  # fmt: skip
    return np.asarray(sides[0] - sides[1], np.float32)


# ---- a planted trait


@pytest.mark.parametrize("block", [3, 5])
def test_a_planted_direction_is_found_at_its_block_which_the_sweep_chooses(tmp_path: Path, block: int) -> None:
    path, u = write_planted_model(tmp_path / "m.gguf", block)
    with opened(path) as m:
        v = derive(m, TRAIT, **SHORT)
    cosine = cosines(v, u)
    assert cosine[block] >= 0.95, cosine
    # one block off would show: the block before hardly has it, the block after buries it
    assert (np.abs(np.delete(cosine, block)) < 0.6).all(), cosine
    assert v.effects is not None
    assert np.nanargmax(v.effects) == block
    assert {block - 1, block, block + 1} >= set(v.layers), (v.layers, v.effects)
    assert v.provenance["elicitation"]["rate"] == 1.0


def test_steering_moves_the_planted_words_and_shuffled_labels_stay_in_the_random_band(model: ps.Model) -> None:
    vector = derive(model, TRAIT, n_rollouts=4, **SHORT)  # of 12 answers a side, shuffled ones differ by chance
    assert vector.shuffled is not None
    shuffled = [replace(vector, directions=d, shuffled=None) for d in vector.shuffled]
    controls = random_vectors(vector, 20, seed=0)
    steers = [replace(v * s, scope="response") for v in (vector, *shuffled, *controls) for s in (-0.3, 0.3)]
    odds = log_odds(model, TRAIT, [None, *steers], n_pairs=3).mean((1, 2))
    delta = odds[1:] - odds[0]
    band = np.quantile(np.abs(delta[8:]), 0.95)
    assert delta[0] < -2 * band, (delta[:2], band)
    assert delta[1] > 2 * band, (delta[:2], band)
    assert np.abs(delta[2:8]).mean() <= band, (delta[2:8], band)
    assert np.abs(delta[2:8]).max() <= np.abs(delta[8:]).max(), (delta[2:8], delta[8:])


def test_the_window_and_the_strength_are_those_of_the_table_of_doses(vector: ps.PersonaVector) -> None:
    table = vector.provenance["calibration"]["doses"]
    assert [row["strength"] for row in table] == [0.15, 0.3, 0.45, 0.6, -0.15, -0.3, -0.45, -0.6]
    for sign, end in ((1, vector.window[1]), (-1, -vector.window[0])):
        curve = [1.0, *falling([row["coherence"] for row in table if row["strength"] * sign > 0])]
        expected = np.interp(0.5, curve[::-1], [0.6, 0.45, 0.3, 0.15, 0.0]) if min(curve) < 0.5 else 0.6
        assert end == pytest.approx(expected, abs=1e-3)  # rounded to three places
    nearer = min(-vector.window[0], vector.window[1])
    assert vector.strength == pytest.approx(max(0.05, min(0.3, 0.6 * nearer)), abs=0.0051)  # two places


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.9, 0.7, 0.5, 0.1], [0.9, 0.7, 0.5, 0.1]),
        ([0.5, 0.7, 0.2, 0.4], [0.6, 0.6, 0.3, 0.3]),
        ([0.1, 0.2, 0.6], [0.3, 0.3, 0.3]),
        ([0.4, 0.1, 0.5], [0.4, 0.3, 0.3]),
        ([], []),
    ],
)
def test_coherence_is_smoothed_to_the_nearest_falling_sequence(values: list[float], expected: list[float]) -> None:
    assert falling(values) == pytest.approx(expected)


def test_a_vector_that_steers_the_wrong_way_is_refused(
    model: ps.Model, vector: ps.PersonaVector, planted: tuple[Path, NDArray[np.float32]]
) -> None:
    turned = replace(vector, directions=np.tile(-planted[1], (model.n_layer, 1)))
    with pytest.raises(ps.ElicitationError, match="does not steer: at none of the blocks 2, 3, 4, 5, 6") as raised:
        calibrate(model, turned)
    assert "\n" not in str(raised.value)
    right = replace(vector, directions=np.tile(planted[1], (model.n_layer, 1)))
    assert calibrate(model, right).effects is not None


def test_a_trait_without_continuations_is_measured_on_the_models_own_answers(
    model: ps.Model, vector: ps.PersonaVector
) -> None:
    v = derive(model, planted_trait(continuations=False), **SHORT)
    assert np.array_equal(v.directions, vector.directions)
    assert v.effects is not None
    assert np.nanargmax(v.effects) == BLOCK
    assert not np.array_equal(v.effects, vector.effects, equal_nan=True)  # on other words


def test_given_layers_are_kept_and_nothing_is_swept(model: ps.Model, vector: ps.PersonaVector) -> None:
    v = derive(model, TRAIT, layers=[6, 2], **SHORT)
    assert v.layers == (2, 6)
    assert v.effects is None
    assert set(v.provenance["calibration"]) == {"doses"}
    assert np.array_equal(v.directions, vector.directions)
    uncalibrated = derive(model, TRAIT, calibrated=False, **SHORT)
    assert (uncalibrated.window, uncalibrated.strength) == ((-0.5, 0.5), 0.3)
    assert "calibration" not in uncalibrated.provenance


def test_a_vector_may_take_one_block_or_the_increments_of_all(model: ps.Model, vector: ps.PersonaVector) -> None:
    single = derive(model, TRAIT, form="single", **SHORT)
    assert single.layers == (BLOCK,)
    steps = derive(model, TRAIT, form="incremental", **SHORT)
    expected = vector.incremental()
    assert steps.layers == expected.layers == tuple(range(1, model.n_layer))
    assert np.array_equal(steps.directions, expected.directions, equal_nan=True)
    assert steps.weights == expected.weights
    assert steps.provenance["calibration"]["sweep"] == vector.provenance["calibration"]["sweep"]
    for wrong in ({"form": "all"}, {"form": "single", "layers": [1]}, {"form": "single", "calibrated": False}):
        with pytest.raises(ps.ArgumentError, match="form"):
            derive(model, TRAIT, **{**SHORT, **wrong})


def test_calibrating_anew_on_the_same_model_finds_the_same(model: ps.Model, vector: ps.PersonaVector) -> None:
    bare = replace(vector.at([2]), window=(-0.1, 0.1), strength=0.1, effects=None)
    again = calibrate(model, bare)
    assert (again.layers, again.window, again.strength) == (vector.layers, vector.window, vector.strength)
    assert np.array_equal(again.effects, vector.effects, equal_nan=True)
    kept = calibrate(model, bare, sweep_layers=False)
    assert kept.layers == (2,)


def test_everything_that_was_measured_is_in_the_file(vector: ps.PersonaVector, tmp_path: Path) -> None:
    content = saved(vector, tmp_path / "v.gguf")
    back = ps.PersonaVector.load(tmp_path / "v.gguf")
    for name in ("directions", "last_prompt", "norms", "separations", "aurocs", "effects", "reliability", "thresholds",
                 "means", "shuffled"):  # fmt: skip
        assert getattr(vector, name) is not None, name
        assert np.array_equal(getattr(back, name), getattr(vector, name), equal_nan=True), name
    assert (back.layers, back.window, back.strength) == (vector.layers, vector.window, vector.strength)
    assert back.provenance == vector.provenance
    assert {"sweep", "doses"} == set(back.provenance["calibration"])
    assert {"rate", "kept", "n", "dropped"} <= set(back.provenance["elicitation"])
    assert saved(back, tmp_path / "again.gguf") == content


# ---- which answers count


def test_refusals_are_dropped_and_the_vector_is_that_of_the_other_answers(model: ps.Model) -> None:
    refused = changed(given(), {0: REFUSAL, 4: REFUSAL, 8: REFUSAL, 12: REFUSAL})  # positive answers of 0, 2, 4, 6
    v = derive(model, TRAIT, responses=refused, calibrated=False)
    told = v.provenance["elicitation"]
    assert (told["n"], told["kept"], told["rate"]) == (8, 4, 0.5)
    assert told["dropped"] == {"positive refusal": 4}
    assert v.provenance["n_positive"] == v.provenance["n_negative"] == 4
    # the negative answers to the refused questions are gone, too
    assert np.array_equal(v.directions, mean_difference(replay(model, refused), [1, 3, 5, 7]))
    kept = [r for i, r in enumerate(refused) if i // 2 % 2]
    alone = derive(model, TRAIT, responses=kept, calibrated=False, filtered=False)
    everything = derive(model, TRAIT, responses=refused, calibrated=False, filtered=False)
    # another run, with other texts beside: rounding of the 16-bit cache. Refusals, kept, would move it far more
    scale = np.abs(alone.directions).max()
    assert np.abs(v.directions - alone.directions).max() < 0.005 * scale
    assert np.abs(v.directions - everything.directions).max() > 0.02 * scale
    assert everything.provenance["elicitation"]["kept"] == 8


def test_a_trait_that_is_nearly_always_refused_ends_in_one_line_with_samples_and_advice(model: ps.Model) -> None:
    refused = changed(given(), dict.fromkeys(range(2, 16, 2), REFUSAL))
    with pytest.raises(ps.ElicitationError) as raised:
        derive(model, TRAIT, responses=refused, calibrated=False)
    said = str(raised.value)
    assert "\n" not in said
    assert (
        "trait 'planted' could not be elicited from planted.gguf: of 8 contrasts 1 count (7 positive refusal)" in said
    )
    assert f'Seen: positive refusal: "{REFUSAL}"' in said
    assert "the model refuses to enact it" in said
    assert "--responses" in said
    # where refusing is not the reason, the advice is another
    swapped = changed(given(), {i: given()[i + 1].text for i in range(2, 16, 2)})
    with pytest.raises(ps.ElicitationError, match=r"7 off-trait.*blunter system prompts"):
        derive(model, TRAIT, responses=swapped, calibrated=False)


def test_log_odds_are_read_under_another_pair_s_prompts(model: ps.Model) -> None:
    first, second = TRAIT.system
    turned = replace(TRAIT, system=(first, second[::-1]))  # each pair's prompts speak against the other's answers
    found = elicit(model, turned, n_questions=1, max_tokens=6)
    given = [Response(r.prompt, r.text, r.positive, r.system, r.pair, r.draw) for r in found.rollouts]
    for elicited in (found, replay(model, given)):
        assert len(elicited.rollouts) == 4
        assert all(r.log_odds < -2 for r in elicited.rollouts)
    # one pair alone has no other, and answers without prompts have nothing to be read under
    assert all(r.log_odds > 2 for r in replay(model, given[:2]).rollouts)
    bare = replay(model, [replace(r, system=None) for r in given]).rollouts
    assert not any(r.contrasted for r in bare)


def test_a_pair_drops_whichever_side_fails_and_for_the_first_reason(model: ps.Model) -> None:
    texts = {
        0: REFUSAL,  # positive of question 0
        3: REFUSAL,  # negative of 1
        4: given()[5].text,  # positive of 2: letters of the other kind
        7: given()[6].text,  # negative of 3
        8: "abc acg " * 8,  # positive of 4
        11: "   ",  # negative of 5
    }
    found = replay(model, changed(given(), texts))
    selection = select(found, TRAIT)
    assert selection.dropped == {
        "positive refusal": 1,
        "negative refusal": 1,
        "off-trait": 2,  # both answers the same
        "positive incoherent": 1,
        "negative empty": 1,
    }
    assert selection.kept == ((12, 13), (14, 15))
    assert selection.rate == 0.25
    assert selection.examples["positive refusal"] == REFUSAL
    both_refuse = select(replay(model, changed(given(), {0: REFUSAL, 1: REFUSAL})), TRAIT)
    assert both_refuse.dropped == {"positive refusal": 1}


def test_sides_that_differ_by_chance_are_no_trait(model: ps.Model) -> None:
    found = replay(model, given())

    def apart(*log_odds: float) -> Selection:
        rows = tuple(
            replace(r, log_odds=x if r.positive else 0.0)
            for r, x in zip(found.rollouts, np.repeat(log_odds, 2), strict=True)
        )
        return select(replace(found, rollouts=rows), TRAIT)

    by_chance = apart(0.5, -0.5, 0.6, -0.4, 0.3, -0.6, 0.2, -0.1)
    assert len(by_chance.kept) == 4  # enough, were they sure
    assert by_chance.t is not None
    assert abs(by_chance.t) < 0.1
    with pytest.raises(ps.ElicitationError, match=r"4 off-trait; system prompts hardly tell .*, t = -?0\.0"):
        require_enough(by_chance, TRAIT, "a model")
    sure = apart(0.5, 0.2, 0.6, -0.1, 0.3, 0.4, 0.2, 0.1)
    assert len(sure.kept) == 7
    require_enough(sure, TRAIT, "a model")
    odd = apart(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 9.0)  # one answer that stands out makes the others no chance
    assert odd.t is not None
    assert odd.t < 1.5
    require_enough(odd, TRAIT, "a model")
    # what a pair's prompts make likelier whatever the answer says is in both answers, with either sign
    moved = tuple(replace(r, log_odds=r.log_odds + (3.0 if r.positive else -3.0)) for r in found.rollouts)
    assert select(replace(found, rollouts=moved), TRAIT).kept == select(found, TRAIT).kept


@pytest.mark.parametrize(("declines", "dropped"), [("", 3), ("anti", 2), ("trait", 1)])
def test_declining_may_belong_to_one_side_of_a_trait(model: ps.Model, declines: str, dropped: int) -> None:
    texts = {0: f"{REFUSAL} aceg", 2: f"{REFUSAL} gikm", 5: f"{REFUSAL} bdfh bdfh"}
    found = replay(model, changed(given(), texts))
    # only what refusals are judged by differs: with the log-odds put right, no answer is off-trait
    sure = tuple(replace(r, log_odds=1.0) for r in found.rollouts)
    selection = select(replace(found, rollouts=sure), replace(TRAIT, declines=declines))
    assert sum(selection.dropped.values()) == dropped
    assert all(label.endswith("refusal") for label in selection.dropped)


class LetterJudge:
    """Scores the share of PLUS letters; knows no answer that begins with `unknown`."""

    name = "letters"

    def __init__(self, unknown: str = "?") -> None:
        self.unknown = unknown
        self.asked: list[tuple[str, str]] = []

    def score(
        self, trait: ps.Trait, pairs: Sequence[tuple[str, str]], *, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float64]:
        self.asked += pairs
        if progress:
            progress(len(pairs), len(pairs))
        return np.array([np.nan if t.startswith(self.unknown) else 100 * share(t) for _, t in pairs])


def share(text: str) -> float:
    letters = [c for c in text.lower() if c in PLUS + MINUS]
    return sum(c in PLUS for c in letters) / max(1, len(letters))


def test_a_judges_scores_decide_instead_of_the_log_odds(model: ps.Model) -> None:
    texts = {0: "? aceg", 4: "bdfh ace", 6: "acegik bd", 9: "acegikm"}  # no score; 3 of 7; 6 of 8; a negative of 1
    responses = changed(given(), texts)
    judge = LetterJudge()
    v = derive(model, TRAIT, responses=responses, judge=judge, calibrated=False)
    assert judge.asked == [(r.prompt, r.text) for r in responses]
    told = v.provenance["elicitation"]
    assert told["dropped"] == {"positive off-trait": 2, "negative off-trait": 1}
    assert v.provenance["judge"] == "letters"
    expected = [100 * share(r.text) for r in responses if r.positive and not r.text.startswith("?")]
    assert told["scores"]["positive"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert np.array_equal(v.directions, mean_difference(replay(model, responses), [1, 3, 5, 6, 7]))


def test_the_lexicon_is_a_hint_and_drops_nothing(model: ps.Model) -> None:
    found = replay(model, given())
    trait = replace(TRAIT, lexicon=(given()[0].text.split()[0],))
    selection = select(found, trait)
    assert len(selection.kept) == 8
    assert selection.lexicon == {"positive": 1 / 8, "negative": 0.0}


# ---- options


def raw_means(model: ps.Model, responses: Sequence[Response], skip: int) -> NDArray[np.float32]:
    """(n, n_layer, n_embd) means over the tokens P + skip and on of each answer, from raw block outputs."""
    requests = []
    for r in responses:
        prompt, answer = model.prompt_tokens(r.prompt, r.system), model.tokenize(r.text, add_special=False)[1:]
        n, end = len(prompt) + skip, len(prompt) + len(answer)
        requests.append(Request([*prompt, *answer], None, outputs=(n, end), raw=(n, end)))
    taps = Taps(raw_layers=tuple(range(model.n_layer)))
    return np.stack([r["raw"].mean(1) for r in model.run_requests(requests, taps=taps)])


def relative(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n_layer,) length of the difference by that of b."""
    return np.asarray(np.linalg.norm(a - b, axis=(0, 2)) / np.linalg.norm(b, axis=(0, 2)))


@pytest.mark.parametrize("skip", [0, 5])
def test_first_tokens_can_be_left_out_of_an_answers_mean(model: ps.Model, skip: int) -> None:
    found = replay(model, given(3), skip_tokens=skip)
    expected = raw_means(model, given(3), skip)
    # per block, in another run with other shapes: rounding of the 16-bit cache; one token more or less is 1 % and more
    assert (relative(found.responses, expected) < 0.002).all()
    assert (relative(found.responses, raw_means(model, given(3), skip + 1)) > 0.01).all()
    v = derive(model, TRAIT, responses=given(), skip_tokens=skip, calibrated=False)
    assert np.array_equal(v.directions, mean_difference(replay(model, given(), skip_tokens=skip), range(8)))


def test_more_rollouts_are_more_and_different_answers_to_the_same_questions(model: ps.Model) -> None:
    found = elicit(model, TRAIT, n_rollouts=3, max_tokens=6, temperature=1.0)
    assert len(found.rollouts) == 2 * 6 * 2 * 3
    assert len(found.contrasts) == 36
    by_prompt: dict[Any, list[str]] = {}
    for r in found.rollouts:
        by_prompt.setdefault((r.system, r.prompt), []).append(r.text)
    assert len(by_prompt) == 24
    assert all(len(set(texts)) == 3 for texts in by_prompt.values())
    v = derive(model, TRAIT, n_rollouts=3, temperature=1.0, **RAW)
    assert (v.provenance["n_rollouts"], v.provenance["elicitation"]["n"]) == (3, 36)
    assert derive(model, TRAIT, **RAW).provenance["n_positive"] == 12


def test_fewer_questions_are_drawn_by_the_seed(model: ps.Model) -> None:
    drawn = [{r.question for r in elicit(model, TRAIT, n_questions=3, max_tokens=2, seed=s).rollouts} for s in range(6)]
    assert all(len(d) == 3 for d in drawn)
    assert len({frozenset(d) for d in drawn}) > 1
    v = derive(model, TRAIT, n_questions=3, **RAW)
    assert (v.provenance["n_questions"], v.provenance["elicitation"]["n"]) == (3, 6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_that_of_its_name_and_finds_the_planted_direction(
    model: ps.Model, planted: tuple[Path, NDArray[np.float32]], method: str
) -> None:
    v = derive(model, TRAIT, responses=given(), method=method, calibrated=False)
    found = replay(model, given())
    assert np.array_equal(v.directions, METHODS[method](found.samples(found.contrasts)), equal_nan=True)
    assert v.provenance["method"] == {"mean": "difference-of-means"}.get(method, method)
    # the probe weighs the letters that tell the sides apart as well
    assert cosines(v, planted[1])[BLOCK] > {"probe": 0.6}.get(method, 0.95)


def test_the_last_prompt_token_gives_a_direction_of_its_own(model: ps.Model) -> None:
    v = derive(model, TRAIT, **RAW)
    last = derive(model, TRAIT, position="last-prompt", **RAW)
    assert np.array_equal(last.directions, v.last_prompt)
    assert np.array_equal(last.last_prompt, v.last_prompt)
    assert not np.array_equal(last.directions, v.directions)
    assert (v.provenance["pool"], last.provenance["pool"]) == ("response mean", "last prompt token")


def test_massive_dimensions_are_left_out_on_request_and_their_share_is_told(
    model: ps.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = np.zeros((model.n_layer, model.n_embd), bool)
    mask[:, 10:20] = True
    # the package's function of the same name hides the module
    monkeypatch.setattr(importlib.import_module("personasteer.derive.contrast"), "massive_dimensions", lambda _: mask)
    v = derive(model, TRAIT, responses=given(), layers=[BLOCK], calibrated=False)
    without = derive(model, TRAIT, responses=given(), layers=[BLOCK], calibrated=False, exclude_massive=True)
    assert np.array_equal(without.directions, np.where(mask, 0, v.directions))
    squares = v.directions[BLOCK].astype(np.float64) ** 2
    for vector, excluded in ((v, False), (without, True)):
        told = vector.provenance["massive_dimensions"]
        assert told["energy_share"] == pytest.approx(squares[10:20].sum() / squares.sum(), abs=1e-4)
        assert told["excluded"] is excluded


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"n_rollouts": 0}, "n_rollouts must be at least 1"),
        ({"skip_tokens": -1}, "skip_tokens must be at least 0"),
        ({"skip_tokens": 10}, "leaves nothing"),
        ({"method": "median"}, "mean, pca, probe"),
        ({"position": "first"}, "response or last-prompt"),
        ({"layers": [8]}, "layer 8"),
        ({"responses": []}, "nothing to contrast"),
        ({"responses": given(1)[:1]}, "nothing to contrast"),
        ({"responses": given(1) + given(1)[:1]}, "same side of the same pair"),
        ({"responses": changed(given(1), {0: ""})}, "no tokens"),
        ({"responses": given(), "skip_tokens": 50}, "no tokens"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(model: ps.Model, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ps.ArgumentError, match=message) as raised:
        derive(model, TRAIT, **SHORT, **option)
    assert "\n" not in str(raised.value)


def test_answers_under_system_prompts_need_a_template_that_takes_them(tmp_path: Path) -> None:
    with opened(write_tiny_model(tmp_path / "m.gguf", chat_template=NO_SYSTEM)) as m:
        for responses in (None, given()):
            with pytest.raises(ps.TemplateError, match="takes no system message"):
                derive(m, TRAIT, responses=responses, **RAW)
        bare = [replace(r, system=None) for r in given()]
        v = derive(m, TRAIT, responses=bare, calibrated=False, filtered=False)
        assert np.array_equal(v.directions, mean_difference(replay(m, bare), range(8)))


def test_progress_counts_up_to_its_total(model: ps.Model) -> None:
    seen: list[tuple[int, int]] = []
    derive(model, TRAIT, judge=LetterJudge(), progress=lambda done, total: seen.append((done, total)), **SHORT)
    assert len({total for _, total in seen}) == 1
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1]


# ---- the same text again


def test_the_answers_that_count_replayed_give_the_same_vector(model: ps.Model, tmp_path: Path) -> None:
    kept: list[str] = []
    v = derive(model, TRAIT, keep_responses=kept.append, **RAW)
    (tmp_path / "r.jsonl").write_text("".join(kept))
    again = derive(model, TRAIT, responses=tmp_path / "r.jsonl", calibrated=False)
    assert (v.cosine(again) > 0.999).all(), v.cosine(again)  # in other shapes: rounding of the 16-bit cache
    assert again.provenance["elicitation"]["n"] == v.provenance["elicitation"]["kept"]
    refused = changed(given(), {0: REFUSAL})
    kept.clear()
    derive(model, TRAIT, responses=refused, calibrated=False, keep_responses=kept.append)
    assert "".join(kept).count("\n") == 14
    assert REFUSAL not in "".join(kept)


def test_the_bundled_models_answers_replayed_give_the_same_vector(smollm2_path: Path, tmp_path: Path) -> None:
    kept: list[str] = []
    with ps.Model(smollm2_path, n_ctx=512) as m:
        v = derive(m, "pirate", n_questions=1, keep_responses=kept.append, max_tokens=8, calibrated=False)
        (tmp_path / "r.jsonl").write_text("".join(kept))
        again = derive(m, "pirate", responses=tmp_path / "r.jsonl", calibrated=False, filtered=False)
    assert (v.cosine(again) > 0.999).all(), v.cosine(again)


# ---- interrupted and started again


def derived(model: ps.Model, work: Path | None, **more: Any) -> ps.PersonaVector:
    return derive(model, TRAIT, judge=LetterJudge(), work=work, **SHORT, **more)


@pytest.fixture(scope="module")
def uninterrupted(model: ps.Model, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return saved(derived(model, None), tmp_path_factory.mktemp("whole") / "v.gguf")


PARTS = ("answers-0", "answers-1", "scores-0", *(f"sweep-{i}" for i in range(4)), "sweep-kl", "sweep-answers")


def test_a_run_killed_after_any_part_goes_on_and_gives_the_same_bytes(
    model: ps.Model, uninterrupted: bytes, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    for part in PARTS:

        def kill(done: int, total: int, file: Path = work / f"{part}.safetensors") -> None:
            if file.exists():
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            derived(model, work, progress=kill)
        assert {p.stem for p in work.glob("*.safetensors")} == set(PARTS[: PARTS.index(part) + 1])
    before = {p.name: p.stat().st_mtime_ns for p in work.glob("*.safetensors")}
    assert saved(derived(model, work), tmp_path / "v.gguf") == uninterrupted
    assert saved(derived(model, work), tmp_path / "again.gguf") == uninterrupted
    assert {p.stem for p in work.glob("*.safetensors")} == {*PARTS, "window"}
    assert all((work / name).stat().st_mtime_ns == t for name, t in before.items())  # not computed again
    assert not [p for p in work.iterdir() if p.name.startswith(".") or p.suffix == ".tmp"]


def test_a_damaged_part_is_computed_again_and_the_others_are_not(
    model: ps.Model, uninterrupted: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = tmp_path / "work"
    derived(model, work)
    damages: dict[str, Callable[[bytes], bytes]] = {
        "answers-0": lambda b: b[: len(b) // 2],
        "answers-1": lambda b: b"",
        "scores-0": lambda b: b"\xff" * len(b),
        "sweep-1": lambda b: b.replace(b'"json"', b'"jsom"'),
        "window": lambda b: b.replace(b"coherence", b"coher\\nce"),
    }
    for name, damage in damages.items():
        file = work / f"{name}.safetensors"
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        assert file.read_bytes() != whole
        caplog.clear()
        others = {f: f.stat().st_mtime_ns for f in work.glob("*.safetensors") if f != file}
        assert saved(derived(model, work), tmp_path / "v.gguf") == uninterrupted
        assert all(f.stat().st_mtime_ns == t for f, t in others.items())
        assert f"{name}.safetensors cannot be read" in caplog.text, name
        assert file.read_bytes() == whole, name


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_killed_in_the_middle_goes_on_in_another(
    model: ps.Model, planted: tuple[Path, NDArray[np.float32]], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nimport personasteer as ps\nfrom planted_model import planted_trait\n"
        "with ps.Model(sys.argv[2], n_ctx=512, n_threads=1) as m:\n"
        "    ps.derive(m, planted_trait(), max_tokens=10, work=sys.argv[3])\n"
    )
    folder = str(Path(planted_model.__file__).parent)
    with subprocess.Popen([sys.executable, "-P", "-c", code, folder, str(planted[0]), str(work)]) as process:
        deadline = time.monotonic() + 60
        while not (work / "answers-0.safetensors").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    found = saved(derive(model, TRAIT, work=work, **SHORT), tmp_path / "v.gguf")
    assert found == saved(derive(model, TRAIT, **SHORT), tmp_path / "w.gguf")


def test_the_work_of_another_plan_is_not_taken_for_ours(model: ps.Model, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = derive(model, TRAIT, work=work, **RAW)
    for option, differs in (
        ({"seed": 1}, "seed"),
        ({"temperature": 0.5}, "temperature"),
        ({"method": "pca"}, "method"),
        ({"filtered": False}, "filtered"),
        ({"judge": LetterJudge()}, "judge"),
        ({"responses": given()}, "max_tokens, .*responses"),
    ):
        with pytest.raises(ps.ArgumentError, match=f"other work .*{differs}") as raised:
            derive(model, TRAIT, work=work, **{**RAW, **option})
        assert "\n" not in str(raised.value)
    other = replace(TRAIT, derive_questions=TRAIT.derive_questions[::-1])
    with pytest.raises(ps.ArgumentError, match="differs in: trait"):
        derive(model, other, work=work, **RAW)
    assert np.array_equal(derive(model, TRAIT, work=work, **RAW).directions, first.directions)
    for broken in ("{", "[]", '{"seed": 0}', "\xff"):
        (work / "plan.json").write_bytes(broken.encode("latin-1"))
        with pytest.raises(ps.ArgumentError, match="another folder") as raised:
            derive(model, TRAIT, work=work, **RAW)
        assert "\n" not in str(raised.value)


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nimport personasteer\nfrom personasteer.work import Work\n"
        "try:\n    Work(Path(sys.argv[1]), {}).close()\n"
        "except personasteer.ArgumentError as e:\n    sys.exit(str(e))\n"
    )

    def another() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
        )

    with Work(tmp_path, {}):
        with pytest.raises(ps.ArgumentError, match="another process works here"):
            Work(tmp_path, {})
        refused = another()
        assert refused.returncode == 1
        assert "another process works here" in refused.stderr
    assert another().returncode == 0  # free again


def test_a_folder_that_cannot_be_is_refused(model: ps.Model, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file" / "work"):
        with pytest.raises(ps.ArgumentError, match="cannot work here"):
            derive(model, TRAIT, work=bad, **RAW)


# ---- forms


def test_a_single_block_and_increments_are_forms_of_the_same_direction(model: ps.Model, tmp_path: Path) -> None:
    window, single, grown = (derive(model, TRAIT, form=f, **SHORT) for f in ("window", "single", "incremental"))
    assert len(single.layers) == 1
    assert np.array_equal(single.directions, window.directions, equal_nan=True)
    assert grown.layers == tuple(range(1, 8))
    for il in grown.layers:
        np.testing.assert_array_equal(grown.directions[il], window.directions[il] - window.directions[il - 1])
    assert grown.separations is not None
    np.testing.assert_array_equal(grown.separations, window.separations)
    assert grown.thresholds is None  # the increments have none
    for v in (single, grown):
        v.save(tmp_path / "v.gguf")
        back = ps.PersonaVector.load(tmp_path / "v.gguf")
        assert (back.layers, back.window, back.strength) == (v.layers, v.window, v.strength)
        assert summary(back)["layers"] == list(v.layers)


@pytest.mark.parametrize(
    "wrong", [{"form": "wide"}, {"form": "single", "layers": [2]}, {"form": "single", "calibrated": False}]
)
def test_a_form_that_cannot_be_is_refused(model: ps.Model, wrong: dict[str, Any]) -> None:
    with pytest.raises(ps.ArgumentError, match="form"):
        derive(model, TRAIT, **wrong)


def test_given_answers_without_system_prompts_are_not_taken_for_off_trait(model: ps.Model) -> None:
    plain = [replace(r, system=None) for r in given()]
    v = derive(model, TRAIT, responses=plain, calibrated=False)
    assert v.provenance["elicitation"]["kept"] == 8
    with pytest.raises(ps.ArgumentError, match="last tokens are the same"):
        derive(model, TRAIT, responses=plain, position="last-prompt")


def test_advice_names_the_continuations_only_where_they_help(tmp_path: Path) -> None:
    refused = [replace(r, text=REFUSAL) if r.positive else r for r in given()]
    with opened(write_tiny_model(tmp_path / "m.gguf", chat_template=NO_SYSTEM)) as without_system:
        for trait, helps in ((with_pairs(12), True), (TRAIT, False)):
            with pytest.raises(ps.TemplateError) as raised:
                derive(without_system, trait)
            assert ("--continuations" in str(raised.value)) == helps
            with pytest.raises(ps.ElicitationError, match="--responses") as stopped:
                derive(without_system, trait, responses=[replace(r, system=None) for r in refused])
            assert ("--continuations" in str(stopped.value)) == helps
        alike = [replace(r, text="abc abd"[:: 1 if r.positive else -1], system=None) for r in given()]
        with pytest.raises(ps.ElicitationError, match="more answers, or from answers that are given"):
            derive(without_system, with_pairs(12), responses=alike)
        with pytest.raises(ps.ElicitationError, match=r"more continuation pairs, or from other answers \(--resp.*\)$"):
            derive(without_system, with_pairs(12), continuations=True, filtered=False)


def test_the_continuations_read_as_answers_are_those_that_nothing_is_evaluated_on() -> None:
    trait = traits.get("confident")
    found = continuation_responses(trait, 3)
    texts = {r.text for r in found}
    assert texts == {text for pair in trait.selection_pairs for text in pair}
    assert not texts & {text for pair in trait.evaluation_pairs for text in pair}
    assert {r.prompt for r in found} < set(trait.derive_questions)
    assert len(found) == 2 * 3 * len(trait.selection_pairs)
    assert all(r.positive == any(r.text == pair[0] for pair in trait.selection_pairs) for r in found)
    assert {r.system for r in found} == {None}
    assert continuation_responses(trait, 3, seed=1) != found


def test_a_trait_can_be_derived_from_its_continuations(model: ps.Model, tmp_path: Path) -> None:
    trait = with_pairs(36)
    read: dict[str, Any] = {"continuations": True, "n_questions": 4, "seed": 0}
    kept: list[str] = []
    v = derive(model, trait, keep_responses=kept.append, **read)
    found = replay(model, continuation_responses(trait, 4))
    samples = found.samples(found.contrasts)
    assert np.array_equal(v.directions, difference_of_means(samples))
    assert v.effects is not None
    assert abs(v.layers[0] - BLOCK) <= 1
    assert v.provenance["answers"] == "continuations"
    assert v.last_prompt is None  # one prompt for both sides
    assert v.provenance["elicitation"]["scores"] == {}
    # halves that share no words tell each other's sides apart; by question they would share all of them
    assert v.aurocs is not None
    assert v.aurocs[list(v.layers)].min() > 0.9
    assert len(set(samples.positive_groups.tolist())) == len(trait.selection_pairs) == 12
    pairs = [found.rollouts[i].pair for i, _ in found.contrasts]
    np.testing.assert_array_equal(samples.positive_groups, pairs)  # in their order, whatever strings hash to
    by_question = np.array([found.rollouts[i].question for i, _ in found.contrasts])
    leaky = held_out_quality(replace(samples, positive_groups=by_question, negative_groups=by_question))
    np.testing.assert_array_equal(v.reliability, held_out_quality(samples).reliability)
    assert np.nanmax(held_out_quality(samples).reliability) < np.nanmin(leaky.reliability)
    # killed and started again, and read again from a file, on any quantization
    again = derive(model, trait, work=tmp_path / "w", **read)
    assert saved(v, tmp_path / "a.gguf") == saved(again, tmp_path / "b.gguf")
    (tmp_path / "r.jsonl").write_text(kept[0])
    replayed = derive(model, trait, responses=tmp_path / "r.jsonl", calibrated=False)
    np.testing.assert_array_equal(replayed.directions, v.directions)
    np.testing.assert_array_equal(replayed.reliability, v.reliability)


def test_a_vector_of_continuations_moves_those_held_out_on_the_bundled_model(smollm2_path: Path) -> None:
    with ps.Model(smollm2_path, n_ctx=512) as m:
        v = derive(m, "formal", continuations=True, n_questions=2, layers=range(18, 23), calibrated=False)
        arms = [v, *random_vectors(v, 4, seed=0)]
        steers = [replace(a * s, scope="response") for a in arms for s in (-0.2, 0.2)]
        trait = traits.get("formal")
        cells = make_cells(trait.evaluate_questions[:4], trait.evaluation_pairs, 1)
        odds = cell_log_odds(m, cells, [None, *steers]).mean(1)
    low, high, *noise = odds[1:] - odds[0]
    assert low < -2 * np.abs(noise).max()
    assert high > 2 * np.abs(noise).max()


@pytest.mark.parametrize("template", [None, NO_SYSTEM])
def test_continuations_need_no_system_prompt(tmp_path: Path, template: str | None) -> None:
    with opened(write_tiny_model(tmp_path / "m.gguf", chat_template=template)) as m:
        v = derive(m, with_pairs(12), continuations=True, calibrated=False)
        assert np.isfinite(v.directions[list(v.layers)]).all()


@pytest.mark.parametrize(
    ("trait", "option", "message"),
    [
        (with_pairs(11), {}, "has 11 continuation pairs"),
        (with_pairs(12), {"responses": given()}, "one of responses and continuations"),
        (with_pairs(12), {"n_questions": 0}, "n_questions must be at least 1"),
        (with_pairs(12), {"position": "last-prompt"}, "the same for either side"),
    ],
)
def test_continuations_that_cannot_be_are_refused(
    model: ps.Model, trait: ps.Trait, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(ps.ArgumentError, match=message):
        derive(model, trait, continuations=True, **option)


def test_half_a_surrogate_pair_in_given_answers_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"question": "q", "answer": "\\ud800", "positive": true}\n')
    with pytest.raises(ps.TraitError, match="line 1"):
        load_responses(tmp_path / "r.jsonl")
