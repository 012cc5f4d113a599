"""Tracked models: what fixed texts gave, stored and replayed on another file, and the outcome of the comparison."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import planted_model
import pytest
import samples

import personasteer as ps
from personasteer import monitor, traits
from personasteer.cli import run
from personasteer.monitor import Check, Registry, check_model, compare_models, track_model
from personasteer.monitor.registry import Evaluation
from personasteer.monitor.thresholds import last_states
from personasteer.monitor.tracking import LEAST_COSINE, OUTCOMES
from personasteer.ship.bake import bake
from personasteer.ship.fields import Field
from personasteer.ship.rewrite import ModelFile, rewrite
from personasteer.statistics import wilson_interval
from personasteer.tiny_model import write_tiny_model

pytestmark = pytest.mark.usefixtures("short_conversations")

BLOCK = 3
TRAIT = planted_model.planted_trait()
LIBRARY = ["casual", "formal", "humorous", "optimistic", "pirate", "warm"]  # instead of all: a letter is a token


@pytest.fixture(scope="module", autouse=True)
def small_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traits, "names", lambda: LIBRARY)
        patch.setenv("PERSONASTEER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_model.write_planted_model(tmp_path_factory.mktemp("planted") / "base.gguf", BLOCK)[0]


def opened(path: Path) -> ps.Model:
    return ps.Model(path, n_ctx=1024, n_parallel=4)


@pytest.fixture(scope="module")
def vector(path: Path) -> ps.PersonaVector:
    with opened(path) as model:
        return ps.derive(model, TRAIT, max_tokens=16, seed=0)


@pytest.fixture(scope="module")
def tracked(path: Path, vector: ps.PersonaVector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with the planted model and its vector."""
    file = tmp_path_factory.mktemp("registry") / "registry.sqlite"
    with opened(path) as model, Registry(file) as registry:
        track_model(model, [vector], registry, label="base")
    return file


@pytest.fixture
def registry(tracked: Path, tmp_path: Path) -> Iterator[Registry]:
    with Registry(shutil.copy(tracked, tmp_path / "registry.sqlite")) as r:
        yield r


def changed(path: Path, out: Path, **edits: Callable[[np.ndarray], None]) -> Path:
    """A copy with some tensors changed in place; names with _ for the dot."""
    shutil.copy(path, out)
    for tensor in gguf.GGUFReader(out, "r+").tensors:
        edit = edits.get(tensor.name.removesuffix(".weight").replace(".", "_"))
        if edit is not None:
            edit(tensor.data)
            tensor.data.flush()
    return out


def noisy(path: Path, out: Path, share: float, seed: int = 0) -> Path:
    """A copy whose matrices carry noise, as another quantization's do."""
    rng = np.random.default_rng(seed)
    shutil.copy(path, out)
    for tensor in gguf.GGUFReader(out, "r+").tensors:
        data = tensor.data
        if data.ndim == 2:
            data += (share * data.std() * rng.standard_normal(data.shape)).astype(np.float32)
            data.flush()
    return out


def checked(path: Path, registry: Registry, **options: Any) -> Check:
    with opened(path) as model:
        return check_model(model, registry, **options)


# -- what is stored ---------------------------------------------------------------------------------------------------


def test_what_fixed_texts_gave_is_stored_with_the_vector_and_its_threshold(
    path: Path, vector: ps.PersonaVector, registry: Registry
) -> None:
    (known,) = registry.models()
    assert (known.label, known.file, known.n_layer, known.n_embd) == ("base", "base.gguf", 8, 64)
    ((kept, threshold),) = registry.vectors(known.fingerprint)
    assert kept.name == vector.name
    np.testing.assert_array_equal(kept.load().directions, vector.directions)
    profile = registry.latest(model=known.fingerprint, kind="profile")
    found = registry.latest(model=known.fingerprint, kind="vector", vector=kept.digest)
    assert profile is not None
    assert found is not None
    assert threshold is not None
    with opened(path) as model:
        assert known.fingerprint == model.fingerprint
        wanted = monitor.thresholds_for(model, [vector])[0].as_dict()
        assert {**threshold.as_dict(), "origin": None} == {**wanted, "origin": None}
        sides = [
            last_states(model, [(q, pair[side]) for q in TRAIT.derive_questions for pair in TRAIT.system])
            for side in (0, 1)
        ]
        again = monitor.measure_profile(model, [TRAIT])
    np.testing.assert_allclose(found.arrays["directions"], sides[0].mean(0) - sides[1].mean(0), atol=2e-3)
    np.testing.assert_allclose(found.arrays["shown"], sides[0][:, threshold.layer] @ threshold.direction, atol=2e-3)
    assert len(found.arrays["ordinary"]) == len(monitor.clean_prompts(held_out=True))
    np.testing.assert_allclose(profile.arrays["log_odds/planted"], again.log_odds["planted"], atol=1e-3)
    np.testing.assert_allclose(profile.arrays["states"], again.states.mean(0), atol=2e-3)
    direction = profile.arrays["direction/planted"].astype(np.float32)[:-1]
    cosines = (direction * again.directions["planted"][:-1]).sum(1) / np.linalg.norm(
        again.directions["planted"][:-1], axis=1
    )
    np.testing.assert_allclose(cosines, 1, atol=1e-3)
    assert registry.path.stat().st_size < 2**20


def test_the_same_model_and_vector_give_the_same_figures(
    path: Path, vector: ps.PersonaVector, registry: Registry, tmp_path: Path
) -> None:
    with opened(path) as model, Registry(tmp_path / "second.sqlite") as second:
        known = track_model(model, [vector], second)
        digest = second.vectors(known.fingerprint)[0][0].digest
        for kind, of in (("profile", None), ("vector", digest)):
            a, b = (r.latest(model=known.fingerprint, kind=kind, vector=of) for r in (registry, second))
            assert a is not None
            assert b is not None
            assert a.content == b.content
            assert {n: x.tobytes() for n, x in a.arrays.items()} == {n: x.tobytes() for n, x in b.arrays.items()}


def test_a_vector_that_cannot_be_steered_by_leaves_nothing_behind(
    path: Path, vector: ps.PersonaVector, tmp_path: Path
) -> None:
    with opened(path) as model, Registry(tmp_path / "r.sqlite") as r:
        for bad, error in (
            (replace(vector, layers=(), weights={}), ps.VectorError),
            (samples.vector(n_layer=9), ps.IncompatibleVector),
            (replace(vector, name="nobody's", provenance={}), ps.TraitError),
        ):
            with pytest.raises(error):
                track_model(model, [vector, bad], r)
        assert r.models() == []


def test_vectors_are_added_to_a_known_model_without_measuring_it_again(
    path: Path, vector: ps.PersonaVector, registry: Registry
) -> None:
    """The second has no threshold: it has no direction at the last prompt token."""
    silent = replace(vector, last_prompt=None, name="silent")
    seen: list[tuple[int, int]] = []
    with opened(path) as model:
        known = track_model(model, [silent], registry, progress=lambda done, total: seen.append((done, total)))
        found = check_model(model, registry)
    assert known.label == "base"
    assert [t is None for _, t in registry.vectors(known.fingerprint)] == [False, True]
    first, second = registry.evaluations(model=known.fingerprint, kind="profile")
    assert first.content == second.content
    assert found.outcome == "reuse"
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# -- the outcomes -----------------------------------------------------------------------------------------------------


def test_the_same_file_is_reused_at_once(path: Path, registry: Registry) -> None:
    seen: list[int] = []
    found = checked(path, registry, progress=lambda done, _: seen.append(done))
    assert (found.outcome, found.differs, found.vectors, seen) == ("reuse", "", (), [])
    assert "same fingerprint" in found.reasons[0]
    stored = registry.latest(model=found.against.fingerprint, kind="check")
    assert stored is not None
    assert stored.content == json.loads(json.dumps(found.as_dict()))


def test_a_slightly_other_quantization_is_reused(path: Path, registry: Registry, tmp_path: Path) -> None:
    found = checked(noisy(path, tmp_path / "new.gguf", 0.001), registry)
    assert (found.outcome, found.differs) == ("reuse", "other weights")
    assert found.against.label == "base"
    (v,) = found.vectors
    assert v.outcome == "reuse"
    assert v.cosine is not None
    assert v.cosine > 0.98
    assert v.ratio == pytest.approx(1, abs=0.1)
    assert v.shown is not None
    assert abs(v.shown[1] - v.shown[0]) <= 1
    assert not any(s.suspicious for s in found.shifts)
    stored = registry.latest(model=found.against.fingerprint, kind="check")
    assert stored is not None
    assert stored.content == json.loads(json.dumps(found.as_dict()))
    assert stored.content["vectors"][0]["cosine"] == v.cosine


def test_a_planted_bake_is_suspicious_and_names_the_trait(
    path: Path, vector: ps.PersonaVector, registry: Registry, tmp_path: Path
) -> None:
    bake(path, tmp_path / "baked.gguf", vector, strength=0.3)
    found = checked(tmp_path / "baked.gguf", registry)
    assert found.outcome == "suspicious"
    assert found.reasons[0].startswith(f"{TRAIT.name}: ")
    assert "moved" in found.reasons[0]
    first = found.shifts[0]
    assert (first.trait, bool(first.suspicious)) == (TRAIT.name, True)
    assert first.drift is not None
    assert first.drift > 0
    assert found.vectors[0].outcome == "suspicious"


def test_another_chat_template_refuses_the_thresholds(path: Path, registry: Registry, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    rewrite(ModelFile(path), tmp_path / "new.gguf", fields=[Field.of("tokenizer.chat_template", template)])
    found = checked(tmp_path / "new.gguf", registry)
    assert found.outcome == "recalibrate", found.reasons
    (v,) = found.vectors
    assert v.outcome == "recalibrate"
    assert "another tokenizer, template or hyperparameters" in v.reasons[0]
    assert "calibrate again" in v.reasons[0]
    assert v.alarms is None
    assert v.cosine is not None
    assert v.cosine >= LEAST_COSINE
    assert all(s.cosine is None for s in found.shifts)  # the stream is not compared


def test_a_scrambled_direction_must_be_derived_again(path: Path, registry: Registry, tmp_path: Path) -> None:
    def turn(weights: np.ndarray) -> None:
        column = np.random.default_rng(5).standard_normal(64)
        column[[planted_model.MARK, planted_model.CONSTANT]] = 0
        weights[:, 0] = 2.0 * column / np.linalg.norm(column)

    found = checked(changed(path, tmp_path / "new.gguf", **{f"blk_{BLOCK}_attn_output": turn}), registry)
    assert found.outcome == "re-derive", found.reasons
    (v,) = found.vectors
    assert v.cosine is not None
    assert v.cosine < LEAST_COSINE
    assert "cosine" in v.reasons[0]


@pytest.mark.parametrize(("times", "outcome"), [(3.0, "re-derive"), (1 / 3, "recalibrate"), (1.5, "reuse")])
def test_a_vector_that_has_lost_its_effect_must_be_derived_again(
    path: Path, registry: Registry, tmp_path: Path, times: float, outcome: str
) -> None:
    """The same model, whose vector once did so many times as much."""
    (known,) = registry.models()
    ((kept, _),) = registry.vectors(known.fingerprint)
    stored = registry.latest(model=known.fingerprint, kind="vector", vector=kept.digest)
    assert stored is not None
    odds = stored.arrays["log_odds"]
    assert odds[2].mean() > odds[1].mean() > odds[0].mean()
    arrays = {**stored.arrays, "log_odds": odds[1] + times * (odds - odds[1])}
    registry.add_evaluation(replace(stored, arrays=arrays))
    found = checked(noisy(path, tmp_path / "new.gguf", 0.001), registry)
    (v,) = found.vectors
    assert v.ratio == pytest.approx(1 / times, rel=0.1)
    assert (found.outcome, v.outcome) == (outcome, outcome)
    assert any("its effect is" in reason for reason in v.reasons)
    assert outcome == "reuse" or "its effect is" in v.reasons[0]


@pytest.mark.parametrize("alarm", ["too often", "too seldom"])
def test_thresholds_that_do_not_fit_are_calibrated_again(
    path: Path, registry: Registry, tmp_path: Path, alarm: str
) -> None:
    """The same model with other limits than it should have."""
    (known,) = registry.models()
    ((kept, threshold),) = registry.vectors(known.fingerprint)
    assert threshold is not None
    stored = registry.latest(model=known.fingerprint, kind="vector", vector=kept.digest)
    assert stored is not None
    ordinary, shown = stored.arrays["ordinary"], stored.arrays["shown"]
    limit = float(np.median(ordinary)) if alarm == "too often" else float(shown.max()) + 1
    registry.set_threshold(
        known.fingerprint, kept.digest, replace(threshold, watch=min(limit, threshold.watch), alarm=limit)
    )
    if alarm == "too seldom":  # before, they all did
        higher = {**stored.arrays, "shown": shown + 10}
        registry.add_evaluation(Evaluation("vector", known.fingerprint, stored.content, higher, kept.digest))
    found = checked(noisy(path, tmp_path / "new.gguf", 0.001), registry)
    assert found.outcome == "recalibrate"
    (v,) = found.vectors
    assert v.alarms is not None
    assert v.shown is not None
    if alarm == "too often":
        assert v.alarms[1] == pytest.approx(v.n_ordinary / 2, rel=0.3)  # the noise moves ordinary readings, too
        assert "ordinary prompts" in v.reasons[0]
    else:
        assert v.shown == (v.n_shown, 0)
        assert "prompts that ask for it" in v.reasons[0]


def test_the_intervals_are_wilsons() -> None:
    """Against the quadratic that they solve: (p - k/n)^2 = z^2 p (1 - p) / n."""
    for k, n in ((0, 10), (3, 10), (10, 10), (12, 200)):
        for p in wilson_interval(k, n, 0.999):
            assert (p - k / n) ** 2 == pytest.approx(3.2905267**2 * p * (1 - p) / n, abs=1e-8)


def test_a_broken_file_is_said_to_be_one(path: Path, registry: Registry, tmp_path: Path) -> None:
    def spoil(weights: np.ndarray) -> None:
        weights[:, 5] = np.nan

    with pytest.raises(ps.ModelError) as caught:
        checked(changed(path, tmp_path / "new.gguf", blk_6_ffn_down=spoil), registry)
    assert "\n" not in str(caught.value)


# -- whom a model is held against -------------------------------------------------------------------------------------


def test_the_last_model_of_the_same_shape_is_meant(path: Path, registry: Registry, tmp_path: Path) -> None:
    newer, third = noisy(path, tmp_path / "newer.gguf", 0.001, 1), noisy(path, tmp_path / "third.gguf", 0.001, 2)
    with opened(newer) as model:
        track_model(model, [], registry)
    found = checked(third, registry)
    assert (found.against.file, found.against.label, found.vectors) == ("newer.gguf", None, ())
    assert found.outcome == "reuse"
    assert checked(path, registry).against.label == "base"  # the same file comes first
    assert checked(newer, registry, against="base").vectors != ()
    with opened(path) as model:
        track_model(model, [], registry)
    assert checked(third, registry).against.label == "base"  # added last now


def test_a_model_of_another_shape_is_refused(registry: Registry, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other.gguf")
    with pytest.raises(ps.ModelError, match=r"a llama of 4 blocks of width 64, base is a llama of 8 blocks"):
        checked(other, registry, against="base")
    with pytest.raises(ps.RegistryError, match="no tracked model is like that; tracked: base"):
        checked(other, registry)


def test_figures_from_other_texts_are_not_compared(
    path: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = noisy(path, tmp_path / "new.gguf", 0.001)
    monkeypatch.setattr(traits, "names", lambda: ["formal", "optimistic", "poetic"])
    with pytest.raises(ps.RegistryError, match="measured on other texts, by another version of personasteer: add it"):
        checked(new, registry)


# -- two tracked models -----------------------------------------------------------------------------------------------


def test_two_tracked_models_are_compared_from_what_is_stored(
    path: Path, vector: ps.PersonaVector, registry: Registry, tmp_path: Path
) -> None:
    bake(path, tmp_path / "baked.gguf", vector, strength=0.3)
    turned = replace(vector, directions=-vector.directions, name="only here")
    with opened(tmp_path / "baked.gguf") as model:
        track_model(model, [vector, turned], registry, label="baked")
    found = compare_models(registry, "base", "baked")
    assert "other tensor shapes" in found.differs
    assert found.only == ((), ("only here",))
    with opened(path) as model:
        track_model(model, [replace(vector, directions=2 * vector.directions)], registry, label="base")
    assert compare_models(registry, "base", "baked").only == ((vector.name,), ("only here",))  # two of that name
    (v,) = found.vectors
    assert (v.same_vector, v.files_cosine) == (True, None)
    assert v.cosine is not None
    assert v.cosine > 0.9
    assert v.effect[0] is not None
    assert v.effect[0] > 0
    assert v.shown[0] is not None
    assert v.ordinary[0] is not None
    assert v.shown[0] > v.ordinary[0]
    assert found.shifts[0].trait == TRAIT.name
    assert found.shifts[0].suspicious
    back = compare_models(registry, "baked", "base").shifts
    assert next(s.delta for s in back if s.trait == TRAIT.name) == pytest.approx(-(found.shifts[0].delta or 0.0))
    same = compare_models(registry, "base", "base")
    assert same.differs == ""
    assert not any(s.suspicious for s in same.shifts)


def test_models_of_other_shapes_are_compared_in_what_they_have_in_common(registry: Registry, tmp_path: Path) -> None:
    with ps.Model(write_tiny_model(tmp_path / "tiny.gguf"), n_ctx=1024) as model:
        track_model(model, [], registry, label="tiny")
    found = compare_models(registry, "base", "tiny")
    assert found.differs == "another architecture or shape"
    assert (found.shifts, found.vectors, found.only) == ((), (), ((TRAIT.name,), ()))


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tracked: Path, vector: ps.PersonaVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the registry, which is the user's, and the vector."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERSONASTEER_REGISTRY", str(shutil.copy(tracked, tmp_path / "registry.sqlite")))
    vector.save("v.gguf")
    return tmp_path


def test_a_model_is_added_listed_and_checked(
    path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    new = noisy(path, place / "new.gguf", 0.001)
    monkeypatch.setenv("PERSONASTEER_REGISTRY", str(place / "own" / "r.sqlite"))
    assert run(["track", "list"]) == 0
    assert "no model is tracked yet" in capfd.readouterr().out
    assert not (place / "own").exists()
    assert run(["track", "add", str(path), "-v", "v.gguf", "--name", "mine", "--json"]) == 0
    out, err = capfd.readouterr()
    added = json.loads(out)
    assert err == ""
    assert (added["label"], added["vectors"][0]["name"], added["last_check"]) == ("mine", TRAIT.name, None)
    assert run(["track", "check", str(new), "--json"]) == 0
    out, err = capfd.readouterr()
    assert (json.loads(out)["outcome"], err) == ("reuse", "")
    assert run(["track", "check", str(new), "--against", "mine"]) == 0
    out = capfd.readouterr().out
    assert "against mine, base.gguf" in out
    assert f"{TRAIT.name}: reuse" in out
    assert out.splitlines()[-1].startswith("reuse: ")
    assert run(["track", "list", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert [m["fingerprint"] for m in listed["models"]] == [added["fingerprint"]]
    assert (listed["models"][0]["last_check"]["model"], listed["models"][0]["last_check"]["outcome"]) == (
        "new.gguf", "reuse",
    )  # fmt: skip
    assert run(["track", "list"]) == 0
    assert "last check, new.gguf: reuse" in capfd.readouterr().out
    assert run(["track", "compare", "mine", added["fingerprint"][:8], "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["differs"] == ""
    assert run(["track", "compare", "mine", "mine"]) == 0
    assert "the same file" in capfd.readouterr().out


def test_a_suspicious_model_is_exit_code_1(
    path: Path, vector: ps.PersonaVector, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bake(path, place / "baked.gguf", vector, strength=0.3)
    assert run(["track", "check", "baked.gguf", "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["shifts"][0]["trait"] == TRAIT.name
    assert run(["track", "check", "baked.gguf"]) == 1
    out = capfd.readouterr().out
    assert out.splitlines()[-1].startswith(f"suspicious: {TRAIT.name}: ")


MISTAKES = {
    "a strength": (["add", "MODEL", "-v", "v.gguf:0.3"], 2, "tracking takes no strength"),
    "no such vector": (["add", "MODEL", "-v", "none.gguf"], 1, "none.gguf"),
    "no such model": (["add", "none.gguf"], 1, "none.gguf: no such file"),
    "an empty label": (["add", "MODEL", "--name", " "], 2, "must not be empty"),
    "no such label": (
        ["check", "MODEL", "--against", "nobody"],
        1,
        "no tracked model has the label or fingerprint 'nobody'",
    ),
    "nothing to compare with": (["compare", "base", "nobody"], 1, "'nobody'; tracked: 'base'"),
    "one model": (["compare", "base"], 2, "--help"),
    "no verb": ([], 2, ""),
}


@pytest.mark.parametrize("how", MISTAKES)
def test_mistakes_end_in_one_line(path: Path, place: Path, capfd: pytest.CaptureFixture[str], how: str) -> None:
    arguments, code, message = MISTAKES[how]
    before = Path("registry.sqlite").read_bytes()
    assert run(["track", *(str(path) if a == "MODEL" else a for a in arguments)]) == code
    out, err = capfd.readouterr()
    if arguments:
        assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert Path("registry.sqlite").read_bytes() == before


@pytest.mark.parametrize("verb", [["list"], ["check", "MODEL"], ["compare", "a", "b"], ["add", "MODEL"]])
def test_a_damaged_registry_ends_in_one_line_and_is_left_as_it_is(
    path: Path, place: Path, capfd: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    content = b"not a registry\n" * 100
    Path("registry.sqlite").write_bytes(content)
    assert run(["track", *(str(path) if a == "MODEL" else a for a in verb)]) == 1
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "damaged" in err
    assert Path("registry.sqlite").read_bytes() == content


def test_outcomes_are_ordered_from_good_to_bad() -> None:
    assert OUTCOMES == ("reuse", "recalibrate", "re-derive", "suspicious")
