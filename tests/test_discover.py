"""Comparing a model with its fine-tune: a planted change is found, carries the behaviour, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import planted_change
import planted_model
import pytest
from safetensors.numpy import save_file
from test_report import Page

import personasteer as ps
from personasteer import monitor
from personasteer.cli import run
from personasteer.discover import DictionaryRecipe, Diff, diff, imported_dictionary, rank_features
from personasteer.discover.dictionary import Dictionary, without_outliers
from personasteer.discover.differences import (
    Differences,
    find_differences,
    read_block,
    through_unembedding,
    token_places,
)
from personasteer.discover.features import Behaviour, Feature, blocks_around, try_features
from personasteer.discover.texts import fixed_pairs, make_texts
from personasteer.evaluate import Coherence, halves

pytestmark = pytest.mark.usefixtures("few_texts")

TRAIT = planted_model.planted_trait()
IL = planted_change.BLOCK
N_EMBD = planted_model.N_EMBD


@pytest.fixture(scope="module")
def few_texts() -> Iterator[None]:
    """Two pairs of each trait, two rows of each domain, few ordinary prompts."""
    pairs = fixed_pairs(1, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("personasteer.discover.run.fixed_pairs", lambda: pairs)
        few = monitor.clean_prompts(held_out=True)[:12]
        patch.setattr("personasteer.monitor.profile.clean_prompts", lambda held_out=False: few)
        patch.setattr("personasteer.discover.run.N_ITEMS", 4)
        patch.setattr("personasteer.discover.features.N_ITEMS", 4)
        yield


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, np.ndarray]:
    """(the base, the adapter, u)."""
    folder = tmp_path_factory.mktemp("planted")
    base, u = planted_change.write_base(folder / "base.gguf")
    return base, planted_change.write_change(folder / "tuned.gguf", base, u, planted_change.SIZE), u


@pytest.fixture(scope="module")
def models(planted: tuple[Path, Path, np.ndarray]) -> Iterator[tuple[ps.Model, ps.Model]]:
    base, adapter, _ = planted
    with ps.Model(base, n_ctx=512) as a, ps.Model(base, n_ctx=512, lora=[adapter]) as b:
        yield a, b


@pytest.fixture(scope="module")
def decoder(planted: tuple[Path, Path, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty random directions, the planted one the eighth of them."""
    rows = np.random.default_rng(3).standard_normal((60, N_EMBD)).astype(np.float32)
    rows[7] = 2.5 * planted[2]
    file = tmp_path_factory.mktemp("sae") / "layers.4" / "sae.safetensors"
    file.parent.mkdir()
    save_file({"W_dec": rows}, file)
    return file


@pytest.fixture(scope="module")
def found(
    models: tuple[ps.Model, ps.Model], decoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Diff, Path]:
    folder = tmp_path_factory.mktemp("diff") / "out"
    return diff(*models, folder, layer=IL, dictionary=decoder, subjects=[TRAIT], n_features=5), folder


# ---- differences


def test_a_planted_change_is_the_mean_difference(
    models: tuple[ps.Model, ps.Model], planted: tuple[Path, Path, np.ndarray]
) -> None:
    texts = make_texts(models[0], fixed_pairs(1, 1))[:20]
    d = find_differences(*models, texts)
    u = planted[2]
    assert np.allclose(d.mean[:IL], 0)
    mean = d.mean[IL].astype(np.float64)
    assert mean @ u / np.linalg.norm(mean) > 0.999
    assert (d.kl > 0).all()
    assert d.rank(IL) == (pytest.approx(1.0, abs=0.01), 1)
    assert d.rank(IL - 1) == (0.0, 0)
    early = d.early[IL].astype(np.float64)
    assert early @ u / np.linalg.norm(early) > 0.999


def test_a_model_does_not_differ_from_itself(models: tuple[ps.Model, ps.Model]) -> None:
    texts = make_texts(models[0], fixed_pairs(1, 1))[:6]
    d = find_differences(models[0], models[0], texts)
    assert (d.kl == 0).all()
    assert not d.mean.any()


def test_the_rank_counts_directions() -> None:
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.standard_normal((N_EMBD, 2)))[0].T
    changes = np.stack([u if i % 2 else v for i in range(40)])[:, None].astype(np.float32)
    d = Differences(np.ones(40), changes.mean(0), changes.mean(0), changes, np.ones(1, np.float32))
    participation, n = d.rank(0)
    assert participation == pytest.approx(2.0, abs=1e-5)
    assert n == 2


def test_a_block_is_read_as_captured(models: tuple[ps.Model, ps.Model]) -> None:
    model = models[0]
    pairs = fixed_pairs(1, 1)[:5]
    texts = make_texts(model, pairs, longest=512)
    rows = read_block(model, texts, 3)
    places = token_places(texts)
    assert len(rows) == len(places)
    acts = model.capture(pairs, pool="raw", span="response")
    for i, text in enumerate(texts):
        own = places[:, 0] == i
        first = max(8 - text.n_prompt, 0)
        theirs = acts[i][first:, 3]
        left = np.linalg.norm(rows[own] - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
        assert left.max() < 1e-3  # another batch, a cache of float16: other roundings


def test_the_unembedding_names_the_tokens_of_a_direction(
    models: tuple[ps.Model, ps.Model], planted: tuple[Path, Path, np.ndarray]
) -> None:
    (likelier,) = through_unembedding(models[0], planted[2][None], 8)
    assert {t for t, _ in likelier} <= set(planted_model.PLUS)
    values = [c for _, c in likelier]
    assert values == sorted(values, reverse=True)


# ---- features


def test_features_are_ranked_by_the_change_of_their_mean_activation() -> None:
    rng = np.random.default_rng(0)
    units = np.eye(6, dtype=np.float32)
    d = Dictionary(units, np.zeros(6, np.float32), units, np.zeros(6, np.float32), 1.0, 6)
    before = rng.uniform(1, 2, (50, 6)).astype(np.float32)
    after = before + np.array([0, 0.5, 0, -0.9, 0.1, 0], np.float32)
    features, change = rank_features(d, before, after, 2)
    assert np.allclose(change, [0, 0.5, 0, -0.9, 0.1, 0], atol=1e-5)
    assert [f.name for f in features] == ["feature 3", "feature 1", "feature 4"]
    assert [f.rank for f in features] == [1, 2, 3]
    assert [f.sign for f in features] == [-1, 1, 1]


def test_only_k_features_are_active() -> None:
    rng = np.random.default_rng(0)
    d = Dictionary(*(rng.standard_normal(s).astype(np.float32) for s in ((20, 8), (20,), (20, 8), (8,))), 1.0, 3)  # type: ignore[arg-type]
    rows = rng.standard_normal((30, 8)).astype(np.float32)
    f = d.encode(rows)
    before = np.maximum(((rows - d.center) / d.scale) @ d.encoder.T + d.bias, 0)
    for row, whole in zip(f, before, strict=True):
        at = np.argsort(-whole)[:3]
        assert np.allclose(row[at], whole[at])
        assert not np.delete(row, at).any()
    assert np.allclose(d.mean_activations(rows), f.mean(axis=0))


def test_rows_of_many_times_the_median_norm_are_left_out() -> None:
    rows = np.ones((10, 4), np.float32)
    rows[3] *= 4
    rows[5, 0] = np.nan
    assert np.flatnonzero(~without_outliers(rows)).tolist() == [3, 5]


def test_an_imported_dictionary_counts_in_units_of_the_stream() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 8)).astype(np.float32)
    decoder = rng.standard_normal((5, 8)).astype(np.float32)
    d = imported_dictionary(decoder, rows)
    assert np.allclose(np.linalg.norm(d.decoder, axis=1), 1)
    projected = (rows - rows.mean(0)) @ d.decoder.T
    assert np.allclose(d.encode(rows), np.maximum(projected, 0), atol=1e-5)
    with pytest.raises(ps.VectorError, match=r"\(5, 8\), the model's stream 9 wide"):
        imported_dictionary(decoder, np.zeros((3, 9), np.float32))
    with pytest.raises(ps.VectorError, match="zero or not finite"):
        imported_dictionary(0 * decoder, rows)


# ---- the whole


def test_the_planted_feature_survives_and_random_ones_do_not(
    found: tuple[Diff, Path], planted: tuple[Path, Path, np.ndarray]
) -> None:
    d, folder = found
    assert d.trait == "planted"
    assert d.shift is not None
    assert d.shift > 0.1
    assert d.profile[0].trait == "planted"
    (feature,) = [f for f in d.features if f.name == "feature 7"]
    assert feature.rank <= 5
    assert feature.sign > 0
    assert abs(feature.direction @ planted[2]) > 0.999
    assert {f.name for f in d.survivors} >= {"feature 7", "mean difference"}
    alike = [f for f in d.features if abs(f.direction @ planted[2]) < 0.2]
    assert alike
    assert not any(f.effect is not None and f.effect.survives for f in alike)
    effect = feature.effect
    assert effect is not None
    for side in (effect.removed, effect.induced):
        assert 0.7 <= side.share <= 1.5
        assert side.share > side.chance
        assert side.coherence is not None
        assert side.coherence >= 0.9
    assert sorted(p.name for p in folder.iterdir()) == ["diff.json", "mean-difference.gguf", "report.html", "vectors"]


def test_the_mean_difference_is_a_vector_of_all_blocks(found: tuple[Diff, Path]) -> None:
    vector = ps.PersonaVector.load(found[1] / "mean-difference.gguf")
    assert vector.layers == (IL, IL + 1)  # around the block, where anything moved
    assert vector.usable_layers == tuple(range(IL, 8))
    assert np.allclose(vector.directions[IL], found[0].mean[IL])


def test_survivors_are_vectors_that_steer_and_cap(
    found: tuple[Diff, Path], models: tuple[ps.Model, ps.Model], planted: tuple[Path, Path, np.ndarray]
) -> None:
    vector = ps.PersonaVector.load(found[1] / "vectors" / "feature-7.gguf")
    assert vector.layers == (IL - 1, IL, IL + 1)
    assert vector.provenance["trait"] == "planted"
    assert vector.thresholds is not None
    tau, u = float(vector.thresholds[IL]), vector.direction(IL)
    texts = ["abc def", "hello there"]
    readings = [rows[:, IL] @ u for rows in models[1].capture(texts, pool="raw")]
    capped = [rows[:, IL] @ u for rows in models[1].capture(texts, pool="raw", steer=ps.Cap(vector))]
    assert max(r.max() for r in readings) > tau + 0.01
    assert max(r.max() for r in capped) <= tau + 1e-3
    assert models[0].capture(texts)[0][IL] @ u < tau


@pytest.mark.parametrize(("sound", "other_half", "survives"), [(1.0, 0.5, True), (0.89, 0.5, False), (1.0, 0.1, False)])
def test_an_effect_is_of_the_questions_that_did_not_choose_it(
    models: tuple[ps.Model, ps.Model], monkeypatch: pytest.MonkeyPatch, sound: float, other_half: float, survives: bool
) -> None:
    """A feature moves the choosing questions by all of the shift at 0.3, the others by a share of that."""
    first, rest = halves("abcd", [("yes", "no")], 1)

    def rigged(model: ps.Model, cells: Any, steers: Any, *, progress: Any = None) -> np.ndarray:
        own = 1.0 if model is models[1] else 0.0
        sizes = [0.0 if s.vector.name.startswith("random") else s.strength / 0.3 for s in steers]
        return np.array([[own + x * (1.0 if c.question in "ac" else other_half) for c in cells] for x in sizes])

    answers = Coherence(0.0, 0.0, sound, ())
    for name, fake in (
        ("cell_log_odds", rigged),
        ("measure_coherence", lambda model, questions, steers, **_: [answers] * len(steers)),
        ("kl_on_neutral", lambda model, steers, **_: np.zeros(len(steers))),
        ("capability", lambda model, steers, **_: np.full(len(steers), 0.5)),
    ):
        monkeypatch.setattr(f"personasteer.discover.features.{name}", fake)
    behaviours = [Behaviour(TRAIT, cells, np.zeros(2), np.ones(2)) for cells in (first, rest)]
    feature = Feature("feature 1", np.eye(N_EMBD, dtype=np.float32)[0], 0.0, 1.0)
    (got,) = try_features(*models, [feature], IL, *behaviours)
    assert got.effect is not None
    assert got.effect.survives is survives
    assert got.effect.capability == ((0.5, 0.5) if survives else None)
    for side in (got.effect.removed, got.effect.induced):
        assert side.dose == 0.3
        assert side.share == pytest.approx(other_half if sound == 1.0 else 1.0)


def test_a_feature_is_steered_in_a_third_of_the_depth() -> None:
    assert blocks_around(19, 30) == tuple(range(14, 25))
    assert blocks_around(28, 30) == tuple(range(23, 29))
    assert blocks_around(29, 30) == (*range(24, 29), 29)
    assert blocks_around(2, 30) == tuple(range(1, 8))
    assert blocks_around(2, 4) == (2,)


def test_the_texts_that_are_compared_are_of_both_sides(models: tuple[ps.Model, ps.Model], tmp_path: Path) -> None:
    seen: list[list[tuple[int, ...]]] = []

    def spy(base: ps.Model, tuned: ps.Model, texts: Any, progress: Any) -> Differences:
        seen.append([t.tokens for t in texts])
        raise KeyboardInterrupt

    pairs = fixed_pairs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("personasteer.discover.run.fixed_pairs", lambda: pairs)
        patch.setattr("personasteer.discover.run.find_differences", spy)
        rows = np.eye(N_EMBD, dtype=np.float32)
        save_file({"W_dec": rows}, tmp_path / "sae.safetensors")
        with pytest.raises(KeyboardInterrupt):
            diff(*models, tmp_path / "out", layer=IL, dictionary=tmp_path / "sae.safetensors", subjects=[TRAIT])
    n = 6 * len(ps.traits.names())
    sides = [{t.tokens for t in make_texts(models[0], pairs[side : 2 * n : 2])} for side in (0, 1)]
    shares = [sum(tokens in side for tokens in seen[0]) / len(seen[0]) for side in sides]
    assert len(seen[0]) == 96
    assert all(0.2 < share < 0.5 for share in shares)


def test_a_vector_of_fewer_blocks_is_left_out(models: tuple[ps.Model, ps.Model]) -> None:
    whole = ps.PersonaVector(np.ones((8, N_EMBD), np.float32), (3,), TRAIT.name)
    short = ps.PersonaVector(np.ones((7, N_EMBD), np.float32), (3,), TRAIT.name, provenance={"method": "imported"})
    assert monitor.whole_states([whole, short], models[0].n_layer) == [whole]


def test_a_model_against_itself_yields_nothing(
    models: tuple[ps.Model, ps.Model], decoder: Path, tmp_path: Path
) -> None:
    d = diff(models[0], models[0], tmp_path / "out", layer=IL, dictionary=decoder, subjects=[TRAIT], n_features=3)
    assert d.kl == (0.0, 0.0, 0.0)
    assert not d.survivors
    assert d.trait == ""
    assert not any(s.suspicious for s in d.profile)
    assert not list((tmp_path / "out" / "vectors").iterdir())
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "No trait changed by more than chance" in page


def test_the_report_says_what_the_json_says(found: tuple[Diff, Path]) -> None:
    d, folder = found
    plain = json.loads((folder / "diff.json").read_text("utf-8"))
    assert plain == json.loads(json.dumps(d.summary()))
    assert plain["survivors"] == [f.name for f in d.survivors]
    text = (folder / "report.html").read_text("utf-8")
    Page(text)
    for f in d.features:
        assert f.name in text
    assert "survives" in text


def test_a_comparison_goes_on_where_it_was_interrupted(
    found: tuple[Diff, Path], models: tuple[ps.Model, ps.Model], decoder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = {"layer": IL, "dictionary": decoder, "subjects": [TRAIT], "n_features": 5}
    with monkeypatch.context() as patch:
        patch.setattr("personasteer.discover.run.try_features", stop)
        with pytest.raises(KeyboardInterrupt):
            diff(*models, tmp_path / "out", **options)
    assert (tmp_path / "out" / "diff.work").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr("personasteer.discover.run.find_differences", stop)
        patch.setattr("personasteer.discover.run.measure_profile", stop)
        patch.setattr("personasteer.discover.run.read_block", stop)
        again = diff(*models, tmp_path / "out", **options)
    assert again.summary() == found[0].summary()
    for name in ("diff.json", "report.html", "vectors/feature-7.gguf"):
        assert (tmp_path / "out" / name).read_bytes() == (found[1] / name).read_bytes()


def test_an_earlier_report_is_not_replaced_unasked(
    found: tuple[Diff, Path], models: tuple[ps.Model, ps.Model], decoder: Path
) -> None:
    with pytest.raises(ps.ArgumentError, match="holds a report already; --force replaces it"):
        diff(*models, found[1], layer=IL, dictionary=decoder, subjects=[TRAIT])


def test_what_lies_beside_a_report_stays(models: tuple[ps.Model, ps.Model], decoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("vectors/own.gguf", "work/own.txt"):
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
    options: dict[str, Any] = {"layer": IL, "dictionary": decoder, "subjects": [TRAIT], "n_features": 1}
    diff(*models, out, **options)
    assert (out / "mean-difference.gguf").exists()
    diff(models[0], models[0], out, force=True, **options)
    left = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert left == {"diff.json", "report.html", "vectors/own.gguf", "work/own.txt"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layer": 0}, "features of block 0 cannot be written"),
        ({"data": [{"prompt": "a", "response": "b"}] * 5}, "tokens of answers behind the first 8"),
        (
            {"vectors": [ps.PersonaVector(np.ones((4, 64), np.float32), (2,), "short")]},
            "is for 4 blocks of width 64, but the model has 8",
        ),
    ],
)
def test_what_cannot_be_compared_is_told_at_once(
    models: tuple[ps.Model, ps.Model], decoder: Path, tmp_path: Path, options: dict[str, Any], expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("personasteer.discover.run.find_differences", too_late)
    given = {"layer": IL, "subjects": [TRAIT], **options}
    if "data" not in options:
        given["dictionary"] = decoder
    else:
        pytest.importorskip("torch", reason="torch is not installed (CPU is enough)", exc_type=ImportError)
    with pytest.raises(ps.PersonasteerError, match=expected):
        diff(*models, tmp_path / "out", **given)


def test_models_of_another_shape_are_no_fine_tune(
    models: tuple[ps.Model, ps.Model], tiny_path: Path, tmp_path: Path
) -> None:
    with (
        ps.Model(tiny_path, n_ctx=256) as other,
        pytest.raises(ps.ArgumentError, match="other numbers of blocks, 8 and 4: one is no fine-tune of the other"),
    ):
        diff(models[0], other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--layer", "99"], 2, "layer 99 is out of range"),
        (["--dictionary", "missing.safetensors"], 1, "missing.safetensors: cannot be read"),
        (["--tuned", "missing.gguf"], 1, "missing.gguf: no such file"),
        (["--lora", "missing.gguf"], 1, "missing.gguf"),
    ],
)
def test_bad_input_is_one_line(
    planted: tuple[Path, Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str],
    code: int, expected: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    base = str(planted[0])
    given = ["diff", "--base", base, "--tuned", base, "--out", str(tmp_path / "out"), "-c", "512", *arguments]
    assert run(given) == code
    said = capsys.readouterr().err.strip()
    assert expected in said
    assert "\n" not in said


# ---- with torch


@pytest.mark.torch
def test_a_trained_dictionary_finds_the_planted_direction(
    models: tuple[ps.Model, ps.Model], planted: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="torch is not installed (CPU is enough)", exc_type=ImportError)
    recipe = DictionaryRecipe(expansion=4, k=8, steps=600, batch=256)
    d = diff(*models, tmp_path / "out", layer=IL, dictionary=recipe, subjects=[TRAIT], n_features=5)
    u = planted[2]
    top = [f for f in d.features if 1 <= f.rank <= 5]
    cosines = [abs(float(f.direction @ u)) for f in top]
    assert max(cosines) >= 0.9
    best = top[int(np.argmax(cosines))]
    assert best in d.survivors
    assert not any(f in d.survivors for f in d.features if abs(float(f.direction @ u)) < 0.2)
    assert d.unexplained < 0.5
    assert 0 <= d.dead < 1


@pytest.mark.torch
def test_a_dictionary_reconstructs_sparse_data_and_repeats_itself() -> None:
    pytest.importorskip("torch", reason="torch is not installed (CPU is enough)", exc_type=ImportError)
    from personasteer.discover import train_dictionary

    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((24, 16)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = np.zeros((4000, 24), np.float32)
    for row in codes:
        row[rng.choice(24, 2, replace=False)] = rng.uniform(1, 2, 2)
    rows = codes @ atoms
    recipe = DictionaryRecipe(expansion=2, k=2, steps=2500, batch=256)
    d = train_dictionary(rows, recipe)
    assert d.unexplained < 0.1
    best = np.abs(atoms @ d.decoder.T).max(axis=1)
    assert np.mean(best > 0.9) > 0.8
    again = train_dictionary(rows, recipe)
    assert np.array_equal(d.decoder, again.decoder)


def test_without_torch_one_line_says_what_to_install(
    planted: tuple[Path, Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    base = str(planted[0])
    assert run(["diff", "--base", base, "--tuned", base, "--out", str(tmp_path / "out"), "-c", "512"]) == 2
    said = capsys.readouterr().err.strip()
    assert said == "personasteer: a sparse dictionary needs torch: pip install 'personasteer[train]'"
