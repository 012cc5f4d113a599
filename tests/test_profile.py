"""Comparing two models on fixed texts: what moved, along which trait, and what does not count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import planted_model
import pytest
import samples

import personasteer as ps
from personasteer import monitor, traits
from personasteer.monitor import Profile, compare_profiles

N_LAYER, N_EMBD, N_PROMPTS, N_QUESTIONS = 6, 32, 10, 12
NAMES = ("kind", "loud", "odd")


def a_profile(seed: int = 0) -> Profile:
    rng = np.random.default_rng(seed)
    directions = {n: rng.standard_normal((N_LAYER, N_EMBD)).astype(np.float32) for n in NAMES}
    for d in directions.values():
        d[-1] = np.nan
    return Profile(
        {n: rng.standard_normal(N_QUESTIONS) for n in NAMES},
        rng.standard_normal((N_PROMPTS, N_LAYER, N_EMBD)).astype(np.float32),
        np.full(N_LAYER, 4.0, np.float32),
        directions,
    )


def moved(base: Profile, name: str, dose: float, layers: tuple[int, ...] = (3, 4, 5)) -> Profile:
    """The stream of `base` with a dose of a direction from some blocks on."""
    states = base.states.copy()
    for il in layers:
        v = np.nan_to_num(base.directions[name][min(il, 4)])
        states[:, il] += dose * base.norms[il] * v / np.linalg.norm(v)
    return replace(base, states=states)


def reworded(base: Profile, name: str, change: float) -> Profile:
    noise = 0.02 * np.random.default_rng(1).standard_normal(N_QUESTIONS)
    return replace(base, log_odds={**base.log_odds, name: base.log_odds[name] + change + noise})


def test_a_model_beside_itself_has_moved_nowhere() -> None:
    found = compare_profiles(a_profile(), a_profile())
    assert sorted(s.trait for s in found) == sorted(NAMES)
    for s in found:
        assert (s.delta, s.low, s.high, s.drift, s.cosine, s.suspicious) == (0.0, 0.0, 0.0, 0.0, 0.0, "")


@pytest.mark.parametrize("dose", [0.2, -0.1, 0.04])
def test_a_stream_that_moved_along_a_trait_is_suspicious_with_its_dose(dose: float) -> None:
    base = a_profile()
    first, *others = compare_profiles(base, moved(base, "loud", dose))
    assert (first.trait, first.suspicious) == ("loud", "stream")
    assert first.drift == pytest.approx(dose, rel=1e-3)
    assert first.cosine == pytest.approx(np.sign(dose), rel=1e-3)
    assert first.random_p99 is not None
    assert 0.1 < first.random_p99 < 0.9
    assert all(abs(s.cosine or 0) < 0.6 for s in others)


def test_a_small_dose_and_a_move_elsewhere_are_not_suspicious() -> None:
    base = a_profile()
    assert not any(s.suspicious for s in compare_profiles(base, moved(base, "loud", 0.02)))
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((N_LAYER, N_EMBD))
    for d in base.directions.values():  # orthogonal to all traits
        for il in range(N_LAYER - 1):
            others = np.stack([base.directions[n][il] for n in NAMES])
            noise[il] -= others.T @ np.linalg.lstsq(others.T, noise[il], rcond=None)[0]
        assert d.shape == noise.shape
    elsewhere = replace(base, states=base.states + 0.5 * noise.astype(np.float32))
    assert not any(s.suspicious for s in compare_profiles(base, elsewhere))


def test_words_that_changed_are_suspicious_where_chance_does_not_explain_them() -> None:
    base = a_profile()
    first = compare_profiles(base, reworded(base, "odd", 0.3))[0]
    assert (first.trait, first.suspicious) == ("odd", "words")
    assert first.delta == pytest.approx(0.3, abs=0.02)
    assert first.low is not None
    assert first.high is not None
    assert 0.2 < first.low < 0.3 < first.high < 0.4
    assert not any(s.suspicious for s in compare_profiles(base, reworded(base, "odd", 0.05)))
    rng = np.random.default_rng(2)
    wild = {**base.log_odds, "odd": base.log_odds["odd"] + rng.standard_normal(N_QUESTIONS)}
    assert not any(s.suspicious for s in compare_profiles(base, replace(base, log_odds=wild)))


def test_what_moved_in_the_stream_stands_before_what_moved_in_words() -> None:
    base = a_profile()
    both = replace(moved(base, "kind", 0.1), log_odds=reworded(base, "odd", 0.5).log_odds)
    assert [(s.trait, s.suspicious) for s in compare_profiles(base, both)][:2] == [("kind", "stream"), ("odd", "words")]


def test_a_vector_is_taken_instead_of_the_measured_direction() -> None:
    base = a_profile()
    other = moved(base, "loud", 0.1)
    swapped = samples.vector(n_layer=N_LAYER, n_embd=N_EMBD, layers=(3,), name="kind", provenance={})
    swapped = replace(swapped, directions=base.directions["loud"])
    found = {s.trait: s for s in compare_profiles(base, other, [swapped])}
    assert found["kind"].cosine == pytest.approx(1.0, rel=1e-3)


def test_the_mean_of_the_states_says_the_same() -> None:
    base = a_profile()
    other = moved(base, "loud", 0.1)
    short = [replace(p, states=p.states.mean(axis=0, keepdims=True)) for p in (base, other)]
    for a, b in zip(compare_profiles(base, other), compare_profiles(*short), strict=True):
        assert a.trait == b.trait
        assert a.drift == pytest.approx(b.drift, abs=1e-5)


def test_profiles_of_other_shapes_are_refused() -> None:
    base = a_profile()
    with pytest.raises(ps.ArgumentError, match="other shapes"):
        compare_profiles(base, replace(base, states=base.states[:, :-1]))
    fewer = replace(base, log_odds={n: x[:-1] for n, x in base.log_odds.items()})
    with pytest.raises(ps.ArgumentError, match="other questions"):
        compare_profiles(base, fewer)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ps.Model]:
    path = planted_model.write_planted_model(tmp_path_factory.mktemp("planted") / "m.gguf", 3)[0]
    with ps.Model(path, n_ctx=512, n_parallel=4) as m:
        yield m


def test_a_profile_is_measured(model: ps.Model) -> None:
    some = [traits.get("pessimistic"), traits.get("formal")]
    found = monitor.measure_profile(model, some, n_prompts=6, n_questions=4)
    assert {n: x.shape for n, x in found.log_odds.items()} == {"pessimistic": (4,), "formal": (4,)}
    assert found.states.shape == (6, model.n_layer, model.n_embd)
    assert np.isfinite(found.states).all()
    assert {n: d.shape for n, d in found.directions.items()} == dict.fromkeys(
        ("pessimistic", "formal"), (model.n_layer, model.n_embd)
    )
    again = monitor.measure_profile(model, some, n_prompts=6, n_questions=4, directions=False)
    assert not again.directions
    assert not any(s.suspicious or s.delta for s in compare_profiles(found, again))
