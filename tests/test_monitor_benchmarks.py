"""The benchmarks of the monitor in small: on a model with a planted trait, and their figures on made-up numbers."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import graded_prompts
import many_shot
import monitor as alarms
import numpy as np
import planted_model
import pytest

import personasteer as ps
from personasteer import monitor, traits
from personasteer.derive.judge import LogOddsJudge
from personasteer.evaluate import trait_of

pytestmark = pytest.mark.usefixtures("short_conversations")

BLOCK = 3
SHAPES = 1e-4  # float32 sums of one text alone and of many in a batch
GRADED = ["N" * 16, "N" * 12, "N" * 8, "N" * 4, "P" * 4, "P" * 8, "P" * 12, "P" * 16]  # marks for the planted trait
GRADED = [marks + "e" * (16 - len(marks)) for marks in GRADED]
CLEAN = [q for q, _ in monitor.clean_prompts()][:60]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_model.write_planted_model(tmp_path_factory.mktemp("planted") / "m.gguf", BLOCK)[0]


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[ps.Model]:
    with ps.Model(path, n_ctx=2048, n_threads=1) as m:
        yield m


@pytest.fixture(scope="module")
def vector(model: ps.Model) -> ps.PersonaVector:
    return ps.derive(model, planted_model.planted_trait(), max_tokens=16, seed=0)


@pytest.fixture(scope="module")
def threshold(model: ps.Model, vector: ps.PersonaVector) -> monitor.Threshold:
    return monitor.calibrate(model, [vector], clean=CLEAN)[0]


# ---- correlations


def test_correlations_overall_within_and_between_prompts_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 8, 10))
    y += 0.5 * x + np.arange(8)[:, None]
    assert graded_prompts.pearson(x.ravel(), y.ravel()) == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    left = [v - v.mean(1, keepdims=True) for v in (x, y)]
    assert graded_prompts.within(x, y) == pytest.approx(np.corrcoef(left[0].ravel(), left[1].ravel())[0, 1])
    assert graded_prompts.between(x, y) == pytest.approx(np.corrcoef(x.mean(1), y.mean(1))[0, 1])


def test_a_reading_that_only_recognises_the_prompt_correlates_between_prompts_and_not_within() -> None:
    rng = np.random.default_rng(1)
    prompt = np.arange(8.0)[:, None]
    x, y = prompt + 0.1 * rng.standard_normal((8, 40)), prompt + 0.1 * rng.standard_normal((8, 40))
    assert graded_prompts.pearson(x.ravel(), y.ravel()) > 0.99
    assert graded_prompts.between(x, y) > 0.99
    assert abs(graded_prompts.within(x, y)) < 0.2


def test_scores_that_are_missing_are_left_out_of_both_sides() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, 3, 6))
    holes = y.copy()
    holes[0, 2] = holes[2] = np.nan
    known = np.isfinite(holes)
    assert graded_prompts.pearson(x, holes) == pytest.approx(np.corrcoef(x[known], y[known])[0, 1])
    a = [v[0, known[0]] - v[0, known[0]].mean() for v in (x, y)]
    b = [v[1] - v[1].mean() for v in (x, y)]
    expected = np.corrcoef(np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]))[0, 1]
    assert graded_prompts.within(x, holes) == pytest.approx(expected)
    means = graded_prompts.prompt_means(holes, known)
    assert means[:2] == pytest.approx([y[0, known[0]].mean(), y[1].mean()])
    assert np.isnan(means[2])


def test_a_constant_side_has_no_correlation() -> None:
    x, flat = np.random.default_rng(3).standard_normal((4, 5)), np.full((4, 5), 0.1)
    for figure in (graded_prompts.pearson, graded_prompts.within, graded_prompts.between):
        assert np.isnan(figure(x, flat))
    assert np.isnan(graded_prompts.interval(graded_prompts.within, x, flat)).all()


def test_the_interval_over_questions_holds_the_figure_and_narrows_with_questions() -> None:
    rng = np.random.default_rng(4)
    widths = []
    for n in (8, 80):
        x = rng.standard_normal((4, n))
        y = x + rng.standard_normal((4, n))
        low, high = graded_prompts.interval(graded_prompts.within, x, y)
        assert low < graded_prompts.within(x, y) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


# ---- graded prompts


def test_every_trait_has_eight_prompts_that_are_not_the_library_s() -> None:
    prompts = graded_prompts.graded()
    assert len(prompts) >= 5
    assert set(prompts) <= set(traits.names())
    everything = [text for of_one in prompts.values() for text in of_one]
    library = {s for name in traits.names() for pair in traits.get(name).system for s in pair}
    assert not library & set(everything)
    for name, of_one in prompts.items():
        assert len(set(of_one)) == 8, name
        assert all(text.startswith("You are a helpful assistant") for text in of_one[2:5]), name
        lengths = [len(text.split()) for text in of_one]
        assert max(lengths) <= 2 * min(lengths), name


def test_alarms_are_counted_among_fresh_prompts_and_answers(
    model: ps.Model, vector: ps.PersonaVector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PERSONASTEER_CACHE_DIR", str(tmp_path))
    some = {held_out: monitor.clean_prompts(held_out=held_out)[:60] for held_out in (False, True)}
    monkeypatch.setattr("personasteer.monitor.clean_prompts", lambda *, held_out: some[held_out])
    monkeypatch.setattr("personasteer.monitor.everyday.clean_prompts", lambda: some[False])
    (row,) = alarms.measure(model, [vector])
    assert (row["trait"], row["n"]) == ("planted", 60)
    assert (row["auroc"], row["auroc_opposite"], row["seen"]) == (1.0, 1.0, 1.0)
    assert row["alarms"] <= row["watches"] < 40
    kinds = np.array([row["alarms_of"][kind] for kind in alarms.KINDS])
    assert kinds.min() <= row["alarms"] / 60 <= kinds.max()
    low, high = alarms.binomial_interval(0.05, 60, 0.95)
    line, pooled = alarms.table([row]).splitlines()[2], alarms.table([row]).splitlines()[-1]
    assert f"| planted | {row['layer']} | 60 | {row['alarms'] / 60:.1%} | {low:.1%} to {high:.1%} |" in line
    assert f"outside 95 %: {int(not low <= row['alarms'] / 60 <= high)} of 1" in pooled
    monkeypatch.setattr(alarms, "LENGTHS", (8, 16, 24, 32))
    (answers,) = alarms.measure_answers(model, [vector], 12)
    assert answers["n"] == 12
    assert answers["alarms"] == sorted(answers["alarms"])  # the longer, the more often
    assert answers["seen"] > answers["alarms"][1]
    assert f"| {answers['tokens']:.0f} | {answers['alarms'][0]:.0%} |" in alarms.table_of_answers([answers])


@pytest.fixture(scope="module")
def answered(model: ps.Model, vector: ps.PersonaVector, threshold: monitor.Threshold) -> dict[str, Any]:
    result = graded_prompts.answer(model, trait_of(vector), GRADED, (4, 2))
    result |= graded_prompts.read(model, threshold, result)
    return json.loads(json.dumps(result)) | {"seconds": 60.0}  # as it comes out of its file


def test_the_planted_reading_rises_with_the_grade_and_predicts_the_answers_score(answered: dict[str, Any]) -> None:
    x, y = (np.array(answered[key]) for key in ("readings", "scores"))
    assert x.shape == y.shape == (8, 4)
    assert (np.diff(x.mean(1)) > 0).all()
    overall = graded_prompts.pearson(x.ravel(), y.ravel())
    assert overall > 0.75
    others = np.array(answered["random"]["overall"])
    assert len(others) == graded_prompts.N_RANDOM
    assert 30 < (others > 0).sum() < 70  # a direction and its reverse are equally likely
    assert graded_prompts.random_p95(answered, "overall") == pytest.approx(np.sort(np.abs(others))[94], abs=0.02)


def test_readings_answers_and_scores_are_those_of_one_request_at_a_time(
    model: ps.Model, vector: ps.PersonaVector, threshold: monitor.Threshold, answered: dict[str, Any]
) -> None:
    trait, k, q = trait_of(vector), 6, 2
    question, texts = trait.evaluate_questions[q], answered["texts"][k][q]
    assert len(set(texts)) == 2
    turns = [{"role": "system", "content": GRADED[k]}, {"role": "user", "content": question}]
    state = model.capture([[*turns, {"role": "assistant", "content": ""}]], pool="last", span="prompt")[0]
    assert state[threshold.layer] @ threshold.direction == pytest.approx(answered["readings"][k][q], abs=SHAPES)
    # the judge has not seen the graded prompt
    alone = [LogOddsJudge(model).score(trait, [(question, text)])[0] for text in texts]
    assert np.mean(alone) == pytest.approx(answered["scores"][k][q], abs=0.1)
    assert answered["lexicon"][k][q] == np.mean([" a " in f" {t} ".replace(",", " ") for t in texts])


def test_the_table_says_what_was_reached_and_by_which_traits(answered: dict[str, Any]) -> None:
    flat = answered | {"trait": "flat", "scores": [[50.0] * 4] * 8}
    lines = graded_prompts.tables([answered, flat]).splitlines()
    assert lines[2].startswith("| planted | ")
    assert len({line.count("|") for line in lines[:4]}) == 1
    x, y = (np.array(answered[key]) for key in ("readings", "scores"))
    assert f"| {graded_prompts.pearson(x.ravel(), y.ravel()):+.2f} |" in lines[2]
    assert lines[5].startswith("r of 0.75 or more: 1 of 2 (planted). ")
    assert lines[5].endswith(" 0.0% of the answers decline; 0 questions have no other. 2 minutes.")
    assert lines[-1].count("| 50 ") == 8  # every prompt's mean score


def command(monkeypatch: pytest.MonkeyPatch, benchmark: Any, *arguments: Any) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *map(str, arguments)])
    few = functools.partial(monitor.calibrate, clean=CLEAN)
    monkeypatch.setattr("personasteer.monitor.thresholds.calibrate", few)
    benchmark.main()


def test_a_finished_trait_is_not_measured_again_and_other_settings_or_vectors_are_refused(
    path: Path,
    vector: ps.PersonaVector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(graded_prompts, "graded", lambda: {"planted": GRADED})
    monkeypatch.setattr(graded_prompts, "TOKENS", 8)
    file, work = tmp_path / "v.gguf", tmp_path / "w"
    vector.save(file)
    run = functools.partial(command, monkeypatch, graded_prompts, path, file, "--work", work, "--threads", 1)
    run("--questions", 2)
    first = capsys.readouterr().out
    assert "| planted | " in first
    assert {f.name for f in (work / "planted").iterdir()} == {"settings.json", "answers.json", "readings.json"}
    monkeypatch.setattr(graded_prompts, "answer", None)
    monkeypatch.setattr(graded_prompts, "read", None)
    run("--questions", 2)
    assert capsys.readouterr().out == first
    with pytest.raises(SystemExit, match="other settings"):
        run("--questions", 3)
    replace(vector, last_prompt=-1 * vector.last_prompt).save(file)  # type: ignore[operator]
    with pytest.raises(SystemExit, match="other settings"):
        run("--questions", 2)
    monkeypatch.setattr(ps, "Model", None)
    run("--table")
    assert capsys.readouterr().out == first


# ---- many shots

POOL = {kind: {"texts": [[f"{kind} {d} {q}" for q in range(20)] for d in range(3)]} for kind in ("ordinary", "trait")}
QUESTIONS = [f"question {q}" for q in range(20)]


def kinds(turns: Sequence[dict[str, str]]) -> list[bool]:
    """Of each answer, whether it shows the trait."""
    assert [t["role"] for t in turns] == ["user", "assistant"] * (len(turns) // 2)
    return [t["content"].startswith("trait") for t in turns[1::2]]


def test_twenty_pairs_show_every_share_and_a_larger_share_keeps_the_answers_of_a_smaller_one() -> None:
    assert many_shot.counts(20) == [0, 1, 2, 5, 10, 15, 20]
    assert many_shot.counts(4) == [0, 1, 2, 3, 4]
    turns = many_shot.contexts(QUESTIONS, POOL, 20, seed=0)
    shown = np.array([kinds(t) for t in turns])
    assert shown.sum(1).tolist() == many_shot.counts(20)
    assert (shown[1:] >= shown[:-1]).all()
    asked = [[t["content"] for t in of_one[::2]] for of_one in turns]
    assert asked[1:] == asked[:-1]
    assert sorted(asked[0]) == sorted(QUESTIONS)
    for of_one in turns:  # every answer is one to its question
        for question, answer in zip(of_one[::2], of_one[1::2], strict=True):
            assert question["content"].split()[-1] == answer["content"].split()[-1]
    assert any(answer["content"].split()[1] != "0" for answer in turns[0][1::2])


def test_a_seed_gives_the_same_contexts_again_and_another_one_others() -> None:
    of_seeds = [many_shot.contexts(QUESTIONS, POOL, 20, seed) for seed in (0, 0, 1)]
    assert of_seeds[0] == of_seeds[1]
    assert [kinds(of_seeds[k][1]) for k in (0, 2)] != [kinds(of_seeds[2][1])] * 2
    assert of_seeds[0][0] != of_seeds[2][0]


def made_up(seed: int, readings: Sequence[float], scores: Sequence[float], alarm: float = 1.0) -> dict[str, Any]:
    """A seed whose mixtures have these means over two questions that are 2 apart."""
    both = {name: [[v - 1, v + 1] for v in values] for name, values in (("readings", readings), ("scores", scores))}
    sizes = {"counts": [0, 1, 2, 5, 10, 15, 20], "shots": 20, "n_tokens": 900, "layer": 3, "seconds": 60.0}
    return {"trait": "t", "seed": seed, "alarm": alarm, **both, **sizes}


CLEAN_MEANS = (0.0, 0.1, -0.1, 0.2, -0.2)


def test_what_fires_is_above_the_other_seeds_mixtures_without_the_trait() -> None:
    rise = [0.0, 0.3, 0.8, 1.05, 1.5, 3.0, 4.0]
    seeds = [made_up(k, [m + r for r in rise], [m] * 7) for k, m in enumerate(CLEAN_MEANS)]
    fired = many_shot.fires(seeds)
    for k, m in enumerate(CLEAN_MEANS):
        others = np.array([c for c in CLEAN_MEANS if c != m])
        single = np.concatenate([others - 1, others + 1])
        assert fired[k]["alarm"] == [m + r >= 1.0 for r in rise]
        assert fired[k]["reading q95"] == [m + r > np.quantile(single, 0.95) for r in rise]
        assert fired[k]["reading 3sd"] == [m + r > others.mean() + 3 * others.std(ddof=1) for r in rise]
        assert not any(fired[k]["score q95"][0:] + fired[k]["score 3sd"])
    assert fired[0]["reading 3sd"] == [False, False, True, True, True, True, True]
    assert fired[0]["reading q95"] == [False] * 4 + [True] * 3
    with pytest.raises(ValueError, match="2 seeds are too few"):
        many_shot.fires(seeds[:2])


def test_empty_answers_are_left_out_of_the_mean_score() -> None:
    seeds = [made_up(k, [m] * 7, [m] * 7) for k, m in enumerate(CLEAN_MEANS)]
    seeds[0]["scores"][3] = [float("nan"), 5.0]
    seeds[1]["scores"][0] = [float("nan"), float("nan")]
    fired = many_shot.fires(seeds)
    assert fired[0]["score q95"] == [False, False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("early", "late", "verdict"),
    [
        ([0, 0, 1, 1], [0, 0, 0, 1], "earlier"),
        ([0, 1, 0, 0], [0, 0, 1, 1], "earlier"),
        ([0, 0, 1, 1], [0, 0, 0, 0], "earlier"),
        ([0, 0, 1, 1], [0, 0, 1, 0], "equal"),
        ([0, 0, 0, 1], [0, 0, 1, 1], "later"),
        ([0, 0, 0, 0], [0, 0, 1, 1], "later"),
        ([0, 0, 0, 0], [0, 0, 0, 0], "neither fires"),
        ([1, 1, 1, 1], [0, 0, 1, 1], "fires at 0 %"),
        ([0, 1, 1, 1], [1, 0, 1, 1], "fires at 0 %"),
    ],
)
def test_an_onset_is_compared_only_where_nothing_fires_without_the_trait(
    early: list[int], late: list[int], verdict: str
) -> None:
    fired = {"a": list(map(bool, early)), "b": list(map(bool, late))}
    assert many_shot.compare(fired, "a", "b") == verdict
    assert verdict in many_shot.VERDICTS


def test_the_tables_show_curves_onsets_and_how_often_the_reading_is_first() -> None:
    seeds = {
        f"seed-{k}": made_up(k, [m + r for r in (0, 0, 1, 2, 3, 4, 5)], [m + r for r in (0, 0, 0, 0, 0, 2, 4)])
        for k, m in enumerate(CLEAN_MEANS)
    }
    pool = {"ordinary": {"scores": [[20.0, 40.0]]}, "trait": {"scores": [[80.0, 80.0]]}, "seconds": 60.0}
    lines = many_shot.tables({"t": {"answers": pool, **seeds}, "u": {"seed-0": seeds["seed-0"]}}).splitlines()
    assert lines[0].endswith("| 0% | 5% | 10% | 25% | 50% | 75% | 100% |")
    single = np.concatenate([np.array(CLEAN_MEANS) - 1, np.array(CLEAN_MEANS) + 1])
    steps = " | ".join(f"{r / single.std(ddof=1):+.2f}" for r in (0, 0, 1, 2, 3, 4, 5))
    assert f"| t | 3 | reading, in sd of 0 % | {steps} |" in lines
    assert "| t | 3 | score | 0 | 0 | 0 | 0 | 0 | 2 | 4 |" in lines
    alarms = (np.array(CLEAN_MEANS)[:, None] + [[-1, 1]] >= 1).mean()
    assert any(line.startswith(f"| t | 3 | questions in alarm | {alarms:.0%} |") for line in lines)
    assert "| t | 0 | 10% | 25% | 75% | 10% | 75% |" in lines
    assert "| reading q95 beside score q95 | 5 of 5 | 0 of 5 | 0 of 5 | 0 of 5 | 0 of 5 |" in lines
    assert "| u | " not in "\n".join(lines)
    assert "Mean scores of the ordinary and the trait's answers in the contexts: 30 and 80 (t)." in lines[-1]
    assert lines[-1].endswith("7 minutes. Fewer than 3 seeds yet: u.")
    assert many_shot.tables({"u": {"seed-0": seeds["seed-0"]}}) == "No trait has 3 seeds yet."


def test_readings_and_answers_after_a_context_are_those_of_the_whole_conversation(
    model: ps.Model, vector: ps.PersonaVector, threshold: monitor.Threshold
) -> None:
    trait = trait_of(vector)
    n = len(trait.derive_questions)
    pool = {"ordinary": {"texts": [["ehl"] * n]}, "trait": {"texts": [["PPPPPPPP"] * n]}}
    found = many_shot.measure(model, trait, threshold, pool, (4, 3), seed=1)
    x = np.array(found["readings"])
    assert x.shape == (5, 3)
    assert (np.diff(x, axis=0) > 0).all()  # more marks in the context
    turns = many_shot.contexts(trait.derive_questions, pool, 4, seed=1)
    for k, q in ((0, 2), (3, 1), (4, 0)):
        asked = [*turns[k], {"role": "user", "content": trait.evaluate_questions[q]}]
        assert model.chat(asked, temperature=0, max_tokens=many_shot.TOKENS) == found["texts"][k][q]
        state = model.capture([[*asked, {"role": "assistant", "content": ""}]], pool="last", span="prompt")[0]
        # flash attention over a cached context and over one in the batch sum differently
        step = 0.1 * np.diff(x, axis=0).min()
        assert state[threshold.layer] @ threshold.direction == pytest.approx(x[k, q], abs=step)
        pair = (trait.evaluate_questions[q], found["texts"][k][q])
        alone = LogOddsJudge(model, n_prompts=many_shot.N_JUDGED).score(trait, [pair])[0]
        assert alone == pytest.approx(found["scores"][k][q], abs=0.1)


def test_the_trait_s_answers_are_made_with_other_prompts_than_those_that_score(model: ps.Model) -> None:
    planted = planted_model.planted_trait()
    trait = replace(planted, system=(("NN", "PP"), ("NNN", "PPP"), *planted.system))  # the first two say the reverse
    pool = many_shot.gather(model, trait)
    shape = (many_shot.N_KEPT, len(trait.derive_questions))
    assert all(np.array(pool[kind][key]).shape == shape for kind in pool for key in ("texts", "scores"))
    assert np.mean(pool["trait"]["scores"]) < np.mean(pool["ordinary"]["scores"])
    of_rest = many_shot.gather(model, planted)  # one that has no other prompts is scored by its own
    assert np.mean(of_rest["trait"]["scores"]) > np.mean(of_rest["ordinary"]["scores"])


def test_the_trait_answers_that_are_kept_are_those_with_the_highest_scores(
    model: ps.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    trait = planted_model.planted_trait()
    kept = many_shot.gather(model, trait)
    monkeypatch.setattr(many_shot, "N_KEPT", many_shot.N_DRAWS)
    answers, by = many_shot.gather(model, trait), LogOddsJudge(model, n_prompts=many_shot.N_JUDGED)
    for q, question in enumerate(trait.derive_questions):
        of_all = np.array([row[q] for row in answers["trait"]["scores"]])
        assert (np.diff(of_all) <= 0).all()
        one = answers["trait"]["texts"][0][q]
        assert by.score(trait, [(question, one)])[0] == pytest.approx(of_all[0], abs=0.1)
    top = np.array(answers["trait"]["scores"])[:2].mean()
    assert np.mean(kept["trait"]["scores"]) == pytest.approx(top, abs=10)  # other random streams


def test_an_interrupted_run_goes_on_with_the_seeds_that_are_missing(
    path: Path,
    vector: ps.PersonaVector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(many_shot, "TOKENS", 8)
    file, work = tmp_path / "v.gguf", tmp_path / "w"
    vector.save(file)
    sizes = ["--seeds", 3, "--shots", 4, "--questions", 2, "--threads", 1]
    run = functools.partial(command, monkeypatch, many_shot, path, file, "--work", work, *sizes)
    run()
    first = capsys.readouterr().out
    assert "| planted | 2 | " in first
    units = {f.stem: json.loads(f.read_text()) for f in (work / "planted").glob("*.json")}
    assert set(units) == {"settings", "answers", "seed-0", "seed-1", "seed-2"}
    (work / "planted" / "seed-1.json").unlink()
    monkeypatch.setattr(many_shot, "gather", None)
    run()
    again = json.loads((work / "planted" / "seed-1.json").read_text())
    assert again == units["seed-1"] | {"seconds": again["seconds"]}
    monkeypatch.setattr("sys.argv", ["many_shot.py", str(path), str(file), "--shots", "7"])
    with pytest.raises(SystemExit):
        many_shot.main()
    assert "fewer than 7 deriving questions: planted" in capsys.readouterr().err
