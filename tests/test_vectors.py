"""Directions and what is made of them: NumPy formulas beside the package's, no model at work."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import samples
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from personasteer import Ablate, Add, ArgumentError, Cap, IncompatibleVector, PersonaVector, Steering, VectorError
from personasteer.evaluate import bootstrap_interval, random_vectors
from personasteer.mixes import ADD, Mix, MixCache, Plan, compile_plan
from personasteer.steering import Edit, Term, as_steering, per_request

NORMS = np.array([5.0, 8.0, 11.0, 13.0], np.float32)


@dataclass
class Shape:
    """What an edit needs to know of a model."""

    n_layer: int = 4
    n_embd: int = 64
    fingerprint: str = "this-model"
    identity: Mapping[str, str] = field(default_factory=lambda: {"metadata": "1", "tensors": "2", "weights": "3"})
    name: str = "shape"
    norms: NDArray[np.float32] = field(default_factory=lambda: NORMS)
    mixes: MixCache | None = None


MODEL = Shape()


def added(edit: Add) -> dict[int, np.ndarray]:
    """What an addition adds at each block, and that it does nothing else."""
    out = {}
    for il, term in edit.terms(MODEL).items():
        assert term.row is not None
        out[il] = term.row
        assert repr(term) == repr(Term(row=term.row))
    return out


def rows_of(v: PersonaVector, rho: float, layers: Sequence[int], weights: Sequence[float]) -> dict[int, np.ndarray]:
    """rho * w * m / ||v|| * v in float64."""
    out = {}
    for il, w in zip(layers, weights, strict=True):
        row = v.directions[il].astype(np.float64)
        out[il] = rho * w * float(NORMS[il]) / np.sqrt((row**2).sum()) * row
    return out


def assert_rows(got: dict[int, np.ndarray], expected: dict[int, np.ndarray]) -> None:
    assert sorted(got) == sorted(expected)
    for il, row in expected.items():  # float64 on both sides; only the order of a few products may differ
        np.testing.assert_allclose(got[il], row, rtol=1e-13)


# ---- PersonaVector


def test_a_number_times_a_vector_is_an_edit_of_that_strength() -> None:
    v = samples.vector()
    for edit in (v * 0.3, 0.3 * v, v * np.float32(0.3)):
        assert isinstance(edit, Add)
        assert edit.vector is v
        assert edit.strength == pytest.approx(0.3, abs=1e-7)
    assert (v * -2).strength == -2.0
    assert (-(v * 0.3)).strength == -0.3
    assert (v * 0.3 * -2).strength == -0.6
    assert (2 * (v * 0.3)).strength == 0.6


def test_sums_and_differences_of_vectors_act_on_the_data() -> None:
    a, b = samples.vector(seed=1), samples.vector(seed=2, layers=(2, 3))
    assert np.array_equal((a + b).directions, a.directions + b.directions)
    assert np.array_equal((a - b).directions, a.directions - b.directions)
    assert np.array_equal((-a).directions, -a.directions)
    assert (a + b).layers == (1, 2)  # the first one's
    assert (a - a).layers == ()  # zero: nothing left to steer at
    told = samples.vector(seed=1, thresholds=NORMS, means=NORMS, window=(-0.2, 0.4), aurocs=NORMS, effects=NORMS,
                          shuffled=a.directions[None])  # fmt: skip
    for c in (told + b, told - b):  # what was measured on one direction does not hold for the sum
        assert (c.thresholds, c.means, c.window) == (None, None, (-0.5, 0.5))
        assert (c.aurocs, c.effects, c.shuffled) == (None, None, None)
    assert np.array_equal(a.directions, samples.vector(seed=1).directions)  # the operands stay what they were


def test_vectors_of_different_models_do_not_add_up() -> None:
    for other in (samples.vector(n_embd=32), samples.vector(n_layer=5)):
        with pytest.raises(IncompatibleVector, match="different models"):
            samples.vector() + other
        with pytest.raises(IncompatibleVector):
            samples.vector() - other
    with pytest.raises(TypeError):
        samples.vector() + 1.0  # type: ignore[operator]


def test_the_cosine_is_taken_per_block_and_is_nan_where_a_direction_is_missing() -> None:
    a, b = samples.vector(seed=1), samples.vector(seed=2)
    data = b.directions.copy()
    data[3] = np.nan
    x, y = a.directions.astype(np.float64), b.directions.astype(np.float64)
    expected = [x[il] @ y[il] / np.sqrt((x[il] @ x[il]) * (y[il] @ y[il])) for il in range(3)]
    cosine = a.cosine(PersonaVector(data))
    np.testing.assert_allclose(cosine[:3], expected, rtol=1e-12)
    assert np.isnan(cosine[3])


@pytest.mark.parametrize("shape", [(64,), (4, 64, 1), (0, 64), (4, 0), ()])
def test_directions_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(VectorError, match="n_layer, n_embd"):
        PersonaVector(np.ones(shape, np.float32))


def test_infinite_values_are_refused_everywhere_and_nan_only_where_it_is_used() -> None:
    data = samples.vector().directions.copy()
    data[0, 5] = np.inf
    with pytest.raises(VectorError, match="infinite"):
        PersonaVector(data, (1,))
    data[0, 5] = np.nan
    assert PersonaVector(data, (1, 2)).layers == (1, 2)
    with pytest.raises(VectorError, match="no finite direction at layer 0"):
        PersonaVector(data, (0, 1))


def test_a_zero_direction_is_refused_where_it_is_used() -> None:
    data = samples.vector().directions.copy()
    data[2] = 0
    with pytest.raises(VectorError, match="zero at layer 2"):
        PersonaVector(data, (1, 2))
    v = PersonaVector(data, (1,))
    with pytest.raises(VectorError, match="zero at layer 2"):
        added(Add(v, 0.1, layers=(2,)))


@pytest.mark.parametrize("il", [-1, 4])
def test_a_layer_that_the_vector_lacks_is_refused(il: int) -> None:
    with pytest.raises(VectorError, match="out of range"):
        samples.vector(layers=(1, il))
    with pytest.raises(VectorError, match="out of range"):
        added(Add(samples.vector(), 0.1, layers=(1, il)))


@pytest.mark.parametrize("weight", [-0.1, np.nan, np.inf])
def test_weights_are_finite_and_not_negative(weight: float) -> None:
    with pytest.raises(VectorError, match="weights"):
        samples.vector(weights={1: 0.5, 2: weight})


@pytest.mark.parametrize(
    ("attribute", "shape"),
    [
        ("norms", (3,)),
        ("last_prompt", (4, 63)),
        ("separations", (5,)),
        ("reliability", (4, 1)),
        ("thresholds", (3,)),
        ("means", (4, 64)),
        ("aurocs", (3,)),
        ("effects", (4, 1)),
        ("shuffled", (4, 64)),
        ("shuffled", (3, 4, 63)),
        ("shuffled", ()),
    ],
)
def test_what_comes_with_the_directions_has_their_shape(attribute: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(VectorError, match=attribute):
        samples.vector(**{attribute: np.ones(shape, np.float32)})


@pytest.mark.parametrize("window", [(0.1, 0.5), (-0.5, -0.1), (0.5, -0.5), (-np.inf, 0.5), (-0.5, np.nan)])
def test_a_window_of_strengths_is_finite_and_has_0_inside(window: tuple[float, float]) -> None:
    with pytest.raises(VectorError, match="window"):
        samples.vector(window=window)
    assert samples.vector(window=(0, 0.5)).window == (0.0, 0.5)
    assert samples.vector().window == (-0.5, 0.5)


def test_the_numbers_of_a_vector_are_its_own_and_stay_what_they_are() -> None:
    data, numbers = samples.vector().directions.copy(), np.ones(4, np.float32)
    more = dict.fromkeys(("norms", "thresholds", "means", "separations", "reliability", "aurocs", "effects"), numbers)
    v = PersonaVector(data, (1,), **more, shuffled=data[None])
    data[:], numbers[:] = 7, 7
    assert np.array_equal(v.directions, samples.vector().directions)
    assert np.array_equal(v.shuffled, samples.vector().directions[None])
    for name in more:
        assert getattr(v, name).tolist() == [1, 1, 1, 1], name
    for array in (v.directions, v.shuffled, *(getattr(v, name) for name in more)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7


def test_layers_are_sorted_and_named_once() -> None:
    assert samples.vector(layers=(2, 1, 2)).layers == (1, 2)
    moved = samples.vector(layers=(1, 2), weights={1: 0.2, 2: 0.8}).at([3, 2])
    assert (moved.layers, moved.weights) == ((2, 3), {})  # what the blocks shared elsewhere does not count here


def test_a_list_of_lists_makes_a_vector_and_text_does_not() -> None:
    v = PersonaVector.from_array([[0.0, 1.0], [2.0, 0.0]], [1], "hand-made")
    assert v.directions.dtype == np.float32
    assert v.directions.tolist() == [[0.0, 1.0], [2.0, 0.0]]
    assert v.layers == (1,)
    for bad in ("text", [[1.0, 2.0], [3.0]], [["a"]]):
        with pytest.raises(ArgumentError, match="n_layer, n_embd"):
            PersonaVector.from_array(bad, [0])


def test_the_increments_of_a_vector_sum_up_to_the_directions_and_weigh_by_their_length() -> None:
    v = samples.vector(norms=NORMS, strength=0.4, thresholds=NORMS, shuffled=np.ones((1, 4, 64)))
    steps = v.incremental()
    assert steps.layers == (1, 2, 3)  # block 0 has none before it
    assert np.isnan(steps.directions[0]).all()
    for il in (1, 2, 3):  # d_1 + ... + d_il = v_il - v_0; float32 sums of a few numbers near 1
        np.testing.assert_allclose(steps.directions[1 : il + 1].sum(0), v.directions[il] - v.directions[0], atol=1e-5)
    lengths = [np.linalg.norm(v.directions[il].astype(np.float64) - v.directions[il - 1]) for il in (1, 2, 3)]
    shares = np.array(lengths) / NORMS[1:]
    got = steps.weights_over(steps.layers)
    np.testing.assert_allclose([got[il] for il in (1, 2, 3)], shares / shares.sum(), rtol=1e-6)
    assert (steps.strength, steps.thresholds, steps.shuffled) == (0.4, None, None)
    assert v.incremental([3, 2, 3]).layers == (2, 3)
    assert_rows(added(steps * 0.3), rows_of(steps, 0.3, (1, 2, 3), [got[il] for il in (1, 2, 3)]))


def test_increments_need_norms_and_a_direction_in_the_block_before() -> None:
    data = samples.vector().directions.copy()
    data[1] = np.nan
    gap = PersonaVector(data, (3,), norms=NORMS)
    assert gap.incremental().layers == (3,)
    for bad in ([2], [1]):
        with pytest.raises(VectorError, match="no finite direction at layer 1"):
            gap.incremental(bad)
    with pytest.raises(VectorError, match="block 0"):
        gap.incremental([0])
    with pytest.raises(VectorError, match="norms"):
        samples.vector().incremental()
    data[2] = np.nan
    with pytest.raises(VectorError, match="no two neighbouring blocks"):
        PersonaVector(data, (3,), norms=NORMS).incremental()


# ---- Add


def test_a_strength_is_the_total_dose_in_units_of_the_streams_norm() -> None:
    v = samples.vector(layers=(1, 2, 3))
    rows = added(v * 0.3)
    assert_rows(rows, rows_of(v, 0.3, (1, 2, 3), (1 / 3, 1 / 3, 1 / 3)))
    dose = sum(np.linalg.norm(row) / NORMS[il] for il, row in rows.items())
    assert dose == pytest.approx(0.3, rel=1e-12)


def test_one_layer_or_three_and_any_scale_of_the_data_are_the_same_dose() -> None:
    v = samples.vector(layers=(1, 2, 3))
    big = PersonaVector(v.directions * 1000, (2,))
    for edit in (v * 0.3, Add(v, 0.3, layers=(2,)), big * 0.3):
        rows = added(edit)
        assert sum(np.linalg.norm(r) / NORMS[il] for il, r in rows.items()) == pytest.approx(0.3, rel=1e-12)
    np.testing.assert_allclose(added(big * 0.3)[2], added(Add(v, 0.3, layers=(2,)))[2], rtol=1e-6)


def test_weights_share_the_dose_and_sum_to_one_over_the_layers_in_use() -> None:
    v = samples.vector(layers=(1, 2, 3), weights={1: 3.0, 2: 1.0, 3: 4.0})
    assert_rows(added(v * -0.2), rows_of(v, -0.2, (1, 2, 3), (3 / 8, 1 / 8, 4 / 8)))
    assert_rows(added(Add(v, 0.2, layers=(1, 2))), rows_of(v, 0.2, (1, 2), (0.75, 0.25)))
    assert_rows(added(Add(v, 0.2, layers=(0,))), rows_of(v, 0.2, (0,), (1.0,)))


def test_a_raw_strength_is_the_factor_of_the_data_as_stored() -> None:
    v = samples.vector(layers=(1, 3), weights={1: 3.0, 3: 1.0})
    rows = added(Add(v, -1.5, raw=True))
    assert_rows(rows, {il: -1.5 * v.directions[il].astype(np.float64) for il in (1, 3)})


@pytest.mark.parametrize("strength", [np.nan, np.inf, -np.inf])
def test_a_strength_is_finite(strength: float) -> None:
    with pytest.raises(ArgumentError, match="finite"):
        samples.vector() * strength


def test_strength_0_adds_zeros_and_says_that_it_does_nothing() -> None:
    v = samples.vector()
    for edit in (v * 0.0, v * -0.0, v * 0.3 * 0, Add(v, 0.0, raw=True)):
        assert edit.inert
        assert sorted(added(edit)) == [1, 2]
        assert not any(row.any() for row in added(edit).values())
    for edit in (v * 1e-30, Add(v, 0.1, scope=(99,))):
        assert not edit.inert


def test_an_addition_takes_all_but_its_vector_and_strength_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        Add(samples.vector(), 0.3, "response")  # type: ignore[misc]
    edit = Add(samples.vector(), 0.3, scope="response", layers=(2, 1, 2), keep_norm=True, start=1, stop=4, half_life=8)
    assert (edit * -2) == Add(edit.vector, -0.6, scope="response", layers=(1, 2), keep_norm=True, start=1, stop=4,
                              half_life=8)  # fmt: skip


@pytest.mark.parametrize("scope", ["everything", "", "Response"])
def test_a_scope_is_one_of_the_known_words_or_positions(scope: str) -> None:
    with pytest.raises(ArgumentError, match="all, prompt, response, system, user, assistant, thinking"):
        Add(samples.vector(), 0.1, scope=scope)


@pytest.mark.parametrize(
    ("scope", "n_prompt", "given", "generated"),
    [
        ("all", 5, [1, 1, 1, 1, 1, 1, 1, 1], True),
        ("prompt", 5, [1, 1, 1, 1, 0, 0, 0, 0], False),  # t <= P - 2
        ("response", 5, [0, 0, 0, 0, 1, 1, 1, 1], True),  # t >= P - 1
        ((0, 4, 99), 5, [1, 0, 0, 0, 1, 0, 0, 0], False),
        ("response", 1, [1, 1, 1, 1, 1, 1, 1, 1], True),
        ("prompt", 8, [1, 1, 1, 1, 1, 1, 1, 0], False),
        ("all", None, [1, 1, 1, 1, 1, 1, 1, 1], True),  # raw text is all prompt
        ("prompt", None, [1, 1, 1, 1, 1, 1, 1, 1], False),
        ("response", None, [0, 0, 0, 0, 0, 0, 0, 0], True),
    ],
)
def test_a_scope_covers_the_tokens_that_the_conventions_say(
    scope: str | tuple[int, ...], n_prompt: int | None, given: list[int], generated: bool
) -> None:
    edit = Add(samples.vector(), 0.1, scope=scope)
    assert edit.covers(8, n_prompt).astype(int).tolist() == given
    for thinking in (False, True):
        assert [edit.covers_generated(j, thinking) for j in (0, 4, 1000)] == [generated] * 3


def test_a_block_with_a_number_that_is_missing_has_no_direction() -> None:
    data = samples.vector().directions.copy()
    data[1, 5] = np.nan
    data[3] = 0.0
    assert PersonaVector(data).usable_layers == (0, 2)
    assert sorted(Ablate(PersonaVector(data)).terms(MODEL)) == [0, 2]


# ---- laws


small = st.floats(-2, 2, width=32).filter(lambda x: abs(x) > 1e-3)
some_layers = st.lists(st.integers(0, 3), min_size=1, unique=True)


@st.composite
def vectors(draw: st.DrawFn, first: int = 0) -> PersonaVector:
    """Directions and weights of any size, at any blocks."""
    layers = draw(some_layers)
    size = draw(st.sampled_from([1e-4, 1.0, 1e4]))
    weights = draw(st.none() | st.lists(st.floats(0.1, 5), min_size=4, max_size=4))
    data = size * samples.vector(seed=first + draw(st.integers(0, 99))).directions
    return PersonaVector(data, tuple(layers), weights=dict(enumerate(weights or [])))


def raw_rows(*edits: Edit) -> np.ndarray:
    """(n_layer, n_embd) that these additions add together, by the mix that they make."""
    plan = compile_plan(Steering(edits), MODEL, 1, None)
    out = np.zeros((4, 64))
    for mix in plan.mixes:
        assert set(mix.terms[:, 1]) == {ADD}
        for (il, _, gate, read, write), numbers in zip(mix.terms, mix.numbers, strict=True):
            assert (gate, read, numbers[4]) == (-1, -1, 1.0)
            out[il] += mix.vectors[write]
    return out


def assert_close(got: np.ndarray, expected: np.ndarray, of: float) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * max(of, 1e-30))  # float32, and what cancels


@given(vectors(), vectors(100), small, small, some_layers)
def test_additions_are_linear_in_the_data_and_in_the_strength(
    v: PersonaVector, w: PersonaVector, a: float, b: float, layers: list[int]
) -> None:
    raw: dict[str, Any] = {"raw": True, "layers": layers}
    size = np.abs(v.directions).max() + np.abs(w.directions).max()
    both = raw_rows(Add(v, a, **raw), Add(w, a, **raw))
    assert_close(raw_rows(Add(v + w, a, **raw)), both, 4 * size)
    assert_close(raw_rows(Add(v - w, a, **raw), Add(w, a, **raw)), raw_rows(Add(v, a, **raw)), 4 * size)
    assert np.array_equal(raw_rows(Add(-v, a, **raw)), raw_rows(Add(v, -a, **raw)))
    assert_close(raw_rows(Add(v, a, **raw), Add(v, b, **raw)), raw_rows(Add(v, a + b, **raw)), 8 * size)
    assert_close(raw_rows(Add(v, a, **raw) * b), raw_rows(Add(v, a * b, **raw)), 8 * size)


@given(vectors(), vectors(100), small, small, st.sampled_from([1e-3, 0.5, 3.0, 1e3]))
def test_a_strength_is_the_dose_whatever_the_data_and_doses_of_one_vector_add_up(
    v: PersonaVector, w: PersonaVector, a: float, b: float, scale: float
) -> None:
    assert Steering([v * a]).rho(MODEL) == pytest.approx(abs(a), rel=1e-6)
    longer = PersonaVector(scale * v.directions, v.layers, weights=v.weights)
    assert_close(raw_rows(longer * a), raw_rows(v * a), 60.0)
    assert_close(raw_rows(v * a, v * b), raw_rows(v * (a + b)), 60.0)
    assert_close(raw_rows(-v * a), raw_rows(v * -a), 60.0)
    assert_close(raw_rows(*((v * a + w * b) * 0.5)), raw_rows(w * (0.5 * b), v * (0.5 * a)), 60.0)
    assert (v * a + v * b).rho(MODEL) == pytest.approx(abs(a + b), abs=1e-5)
    assert (v * a + w * b).rho(MODEL) <= abs(a) + abs(b) + 1e-5


@given(vectors(), st.integers(0, 99))
def test_a_vector_turned_twice_is_itself(v: PersonaVector, seed: int) -> None:
    rng = np.random.default_rng(seed)
    told = replace(
        v, last_prompt=rng.standard_normal((4, 64)), thresholds=rng.standard_normal(4), means=rng.standard_normal(4),
        shuffled=rng.standard_normal((2, 4, 64)), window=(-0.2, 0.4), norms=NORMS,
    )  # fmt: skip
    turned = -told
    for name in ("directions", "last_prompt", "thresholds", "means", "shuffled"):
        assert np.array_equal(getattr(turned, name), -getattr(told, name))
        assert np.array_equal(getattr(-turned, name), getattr(told, name))
    assert (turned.window, (-turned).window) == ((-0.4, 0.2), (-0.2, 0.4))
    assert (turned.layers, turned.weights, turned.strength) == (told.layers, told.weights, told.strength)
    assert np.array_equal(turned.norms, NORMS)


@pytest.mark.parametrize("shape", [{"n_embd": 32}, {"n_layer": 3}, {"n_layer": 5}])
def test_a_vector_of_a_model_of_another_shape_is_refused(shape: dict[str, int]) -> None:
    with pytest.raises(IncompatibleVector, match="blocks of width"):
        added(samples.vector(layers=(1,), **shape) * 0.1)


def test_an_imported_file_may_have_fewer_blocks_than_the_model_but_not_more() -> None:
    imported = {"method": "imported"}
    short = samples.vector(n_layer=3, layers=(2,), provenance=imported)
    assert_rows(added(short * 0.1), rows_of(short, 0.1, (2,), (1.0,)))
    with pytest.raises(IncompatibleVector):
        added(samples.vector(n_layer=5, layers=(2,), provenance=imported) * 0.1)


def test_another_fingerprint_warns_once_and_names_both_models_and_what_differs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    origin = {**MODEL.identity, "tensors": "4"}
    v = samples.vector(provenance={"fingerprint": "feed" * 16, "model": "old-model", "identity": origin})
    same = samples.vector(provenance={"fingerprint": "this-model"})
    with caplog.at_level(logging.WARNING, "personasteer"):
        added(same * 0.1)
        added(samples.vector() * 0.1)
        assert caplog.messages == []
        for strength in (0.1, 0.2):
            added(v * strength)
    (message,) = caplog.messages
    assert "old-model" in message
    assert "shape" in message
    assert "quantization" in message
    assert "template" not in message
    assert "weights" not in message


# ---- Steering


def test_edits_add_up_to_a_steering_which_scales_as_a_whole() -> None:
    a, b, c = (samples.vector(seed=s) * 0.1 * (s + 1) for s in range(3))
    single, pair = Steering([a]), Steering([b, c])
    for steering in (a + b + c, a + (b + c), single + pair, single + list(pair), list(single) + pair, single + b + c):
        assert isinstance(steering, Steering)
        assert list(steering) == [a, b, c]
    assert [e.strength for e in (a + b) * -2] == [-0.2, -0.4]
    assert [e.strength for e in 0.5 * (a + b)] == [0.05, 0.1]


def test_a_steering_grows_and_scales_in_place() -> None:
    a, b = samples.vector(seed=1) * 0.1, samples.vector(seed=2) * 0.2
    steering = a + b
    steering *= 2
    assert [e.strength for e in steering] == [0.2, 0.4]
    steering += a
    assert [e.strength for e in steering] == [0.2, 0.4, 0.1]


def test_one_edit_goes_to_all_requests_and_a_list_gives_one_entry_to_each() -> None:
    a, b = samples.vector(seed=1) * 0.1, samples.vector(seed=2) * 0.1
    assert per_request(a, 2) == [[a], [a]]
    assert per_request(None, 2) == [[], []]
    assert per_request(a + b, 2) == [[a, b], [a, b]]  # a Steering is one thing, not a list of entries
    assert per_request([a, b], 2) == [[a], [b]]
    assert per_request((None, [a, b]), 2) == [[], [a, b]]
    assert all(isinstance(s, Steering) for s in per_request([a, None], 2))
    for entries in ([a], [a, b, None], []):
        with pytest.raises(ArgumentError, match=f"{len(entries)} entries for 2"):
            per_request(entries, 2)


def test_what_is_not_an_edit_is_refused_by_name() -> None:
    v = samples.vector()
    with pytest.raises(ArgumentError, match="multiply it by a strength"):
        as_steering(v)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="multiply it by a strength"):
        as_steering([v * 0.1, v])  # type: ignore[list-item]
    for bad in ("pessimistic", {"a": v * 0.1}, 0.3, b"x"):
        with pytest.raises(ArgumentError, match=type(bad).__name__):
            as_steering(bad)  # type: ignore[arg-type]


# ---- compile_plan


def rows_of_mix(mix: Mix) -> dict[int, np.ndarray]:
    """What a mix adds at each block, and that it does nothing else."""
    out: dict[int, np.ndarray] = {}
    for (il, stage, gate, read, write), (_, _, _, _, share, half_life) in zip(mix.terms, mix.numbers, strict=True):
        assert (stage, gate, read, share, half_life) == (ADD, -1, -1, 1.0, 0.0)
        assert il not in out
        out[int(il)] = mix.vectors[write]
    assert sorted(out) == list(mix.layers)
    return out


def plan_of(*edits: Edit, n_tokens: int = 8, n_prompt: int | None = 5, model: Shape = MODEL) -> Plan:
    plan = compile_plan(Steering(edits), model, n_tokens, n_prompt)
    assert len({m.key for m in plan.mixes}) == len(plan.mixes)
    assert len(plan.of_token) == n_tokens
    return plan


def compiled(
    *edits: Edit, n_tokens: int = 8, n_prompt: int | None = 5
) -> tuple[list[dict[int, np.ndarray]], list[int], int]:
    """Rows of the mixes, mix of each given token, mix of all generated ones: for scopes that do not change with j."""
    plan = plan_of(*edits, n_tokens=n_tokens, n_prompt=n_prompt)
    of_generated = -1
    if plan.generated:
        ((begin, of_generated, of_thinking),) = plan.generated
        assert begin == n_tokens - (n_prompt or n_tokens + 1) + 1  # j of the first token behind the given ones
        assert of_thinking == of_generated
    return [rows_of_mix(m) for m in plan.mixes], plan.of_token, of_generated


@pytest.mark.parametrize(
    "edits",
    [
        (),
        (samples.vector() * 0.0,),
        (samples.vector() * 0.3 * 0,),
        (samples.vector(layers=()) * 0.0,),
        (samples.vector() * 0.3, samples.vector() * -0.3),
        (Add(samples.vector(), 0.3, scope=(99,)),),
        (Add(samples.vector(), 0.3, scope="response"), Add(samples.vector(), -0.3, scope="response")),
        (Add(samples.vector(), 0.3, keep_norm=True), Add(samples.vector(), -0.3, keep_norm=True)),
        (Add(samples.vector(), 0.3, half_life=4), Add(samples.vector(), -0.3, half_life=4)),
        (Add(samples.vector(), 0.3, start=2, stop=4), Add(samples.vector(), -0.3, start=2, stop=4)),
    ],
)
def test_edits_that_do_nothing_or_cancel_leave_no_trace(edits: tuple[Add, ...]) -> None:
    plan = plan_of(*edits)
    assert plan.mixes == ()
    assert plan.of_token == [-1] * 8
    assert all((plain, thinking) == (-1, -1) for _, plain, thinking in plan.generated)
    assert plan.rho == 0.0


def test_an_edit_that_names_no_layer_is_an_error_and_does_not_silently_do_nothing() -> None:
    a = samples.vector()
    for edit in (samples.vector(layers=()) * 0.3, (a - a) * 0.3, Add(a, 0.3, layers=())):
        with pytest.raises(VectorError, match="no layer"):
            compiled(edit)


@pytest.mark.parametrize("scope", [(-1,), (1.5,), 3, ("all",), None])
def test_positions_that_are_none_are_refused(scope: Any) -> None:
    with pytest.raises(ArgumentError):
        Add(samples.vector(), 0.3, scope=scope)


def test_the_negative_of_a_vector_is_the_vector_at_negative_strength() -> None:
    v = samples.vector(
        weights={1: 0.9, 2: 0.1},
        last_prompt=samples.vector(seed=9).directions,
        thresholds=np.array([0.5, -1.0, np.nan, 2.0], np.float32),
        means=np.array([0.1, 0.2, 0.3, -0.4], np.float32),
        window=(-0.2, 0.4),
        shuffled=samples.vector(seed=8).directions[None],
    )
    assert_rows(added((-v) * 0.3), added(v * -0.3))
    assert v.shuffled is not None
    assert np.array_equal((-v).shuffled, -v.shuffled)
    assert v.last_prompt is not None
    assert np.array_equal((-v).last_prompt, -v.last_prompt)
    assert v.thresholds is not None
    assert v.means is not None
    # <h, -v-hat> = -<h, v-hat>
    assert np.array_equal((-v).thresholds, -v.thresholds, equal_nan=True)
    assert np.array_equal((-v).means, -v.means)
    assert (-v).window == (-0.4, 0.2)
    foreign = samples.vector(n_layer=3, provenance={"method": "imported"})  # may name fewer blocks than the model has
    assert_rows(added((-foreign) * 0.3), added(foreign * -0.3))
    assert added(random_vectors(foreign, 1)[0] * 0.3).keys() == {1, 2}


def test_an_edit_without_directions_where_it_is_active_is_an_error_whatever_its_scope() -> None:
    data = samples.vector().directions.copy()
    data[2] = np.nan
    model = Shape(mixes=MixCache())  # as a Model has: what is compiled already must not hide the error
    plan_of(Add(samples.vector(), 0.2, scope="response"), model=model)
    for scope in ("all", "prompt", "response", (0,), (99,), (99,)):
        with pytest.raises(VectorError, match="no finite direction at layer 2"):
            plan_of(Add(PersonaVector(data, (1,)), 0.2, layers=(2,), scope=scope), model=model)


def test_a_plan_of_what_was_compiled_before_is_the_plan_of_a_fresh_model() -> None:
    a, b = samples.vector(seed=1), samples.vector(seed=2, layers=(2, 3))
    model = Shape(mixes=MixCache())
    for edits in (
        (Add(a, 0.2), Add(b, -0.1, scope="response")),
        (Add(a, 0.2, scope="response"), Add(b, -0.1)),
        (Add(a, 0.2),),
        (Add(a, -0.2),),
        (Cap(a, np.arange(4)),),
        (Cap(a, np.arange(4) + 1),),
    ):
        for _ in range(2):
            got, fresh = plan_of(*edits, model=model), plan_of(*edits)
            assert [m.key for m in got.mixes] == [m.key for m in fresh.mixes]
            assert (got.of_token, got.generated, got.rho) == (fresh.of_token, fresh.generated, fresh.rho)


def test_every_combination_of_scopes_on_a_token_is_a_mix_of_the_summed_rows() -> None:
    a, b = samples.vector(seed=1, layers=(1, 2)), samples.vector(seed=2, layers=(2, 3))
    mixes, of_token, of_generated = compiled(Add(a, 0.2), Add(b, -0.1, scope="response"), Add(b, 0.4, scope=(0,)))
    assert len(mixes) == 3
    assert of_token[1:4] == [of_token[1]] * 3
    assert of_token[4:] == [of_generated] * 4
    assert len({of_token[0], of_token[1], of_generated}) == 3
    plain = rows_of(a, 0.2, (1, 2), (0.5, 0.5))
    for at, strength in ((of_token[0], 0.4), (of_token[1], 0.0), (of_generated, -0.1)):
        expected = dict(plain)
        for il, row in rows_of(b, strength, (2, 3), (0.5, 0.5)).items():
            if strength:
                expected[il] = expected.get(il, 0) + row
        assert sorted(mixes[at]) == sorted(expected)
        for il, row in expected.items():  # rounded to float32 once
            np.testing.assert_allclose(mixes[at][il], row, rtol=1e-6, atol=1e-7)


def test_tokens_without_an_edit_have_no_mix() -> None:
    mixes, of_token, of_generated = compiled(Add(samples.vector(), 0.2, scope="response"))
    assert len(mixes) == 1
    assert of_token == [-1, -1, -1, -1, 0, 0, 0, 0]
    assert of_generated == 0
    mixes, of_token, of_generated = compiled(Add(samples.vector(), 0.2, scope="prompt"))
    assert of_token == [0, 0, 0, 0, -1, -1, -1, -1]
    assert of_generated == -1


def test_the_key_of_a_mix_depends_on_its_numbers_and_layers_alone() -> None:
    def key(*edits: Add) -> int:
        (mix,) = plan_of(*edits).mixes
        return mix.key

    v = samples.vector(layers=(1,))
    moved = PersonaVector(np.roll(v.directions, 1, axis=0), (2,))
    assert key(v * 0.2) == key(v * 0.2)
    assert key(v * 0.2) == key(samples.vector(layers=(1,), name="other", provenance={"seed": 3}) * 0.2)
    keys = [key(v * 0.2), key(v * -0.2), key(v * 0.3), key(v.at([2]) * 0.2), key(Add(moved, 0.2, raw=True)),
            key(Add(v, 0.2, raw=True)), key(v * 0.2, samples.vector(seed=9) * 0.1),
            key(Add(v, 0.2, keep_norm=True)), key(Add(v, 0.2, half_life=8))]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert all(0 < k < 2**64 for k in keys)


def test_a_strength_too_large_for_float32_is_an_error() -> None:
    with pytest.raises(VectorError, match="too large"):
        compiled(samples.vector() * 1e39)  # and no warning of NumPy's beside it


# ---- controls


def test_random_vectors_are_as_alike_from_block_to_block_as_the_vector() -> None:
    rng = np.random.default_rng(0)
    common = rng.standard_normal(2048)
    rows = np.stack([common + 0.5 * rng.standard_normal(2048) for _ in range(4)]).astype(np.float32)
    v = PersonaVector(rows, (1, 2, 3), norms=np.ones(4))
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    alike = units @ units.T
    assert alike[0, 1:].min() > 0.7
    for control in random_vectors(v, 5, seed=1):
        own = control.directions / np.linalg.norm(control.directions, axis=1, keepdims=True)
        np.testing.assert_allclose(own @ own.T, alike, atol=0.1)  # a cosine in 2048 dimensions varies by 0.022
        assert np.abs(v.cosine(control)).max() < 0.15


def test_random_vectors_have_the_norms_of_the_vector_and_point_elsewhere() -> None:
    v = samples.vector(n_embd=512, weights={1: 1.0, 2: 3.0}, strength=0.4, thresholds=NORMS, means=NORMS,
                       shuffled=np.ones((3, 4, 512)))  # fmt: skip
    controls = random_vectors(v, 20, seed=3)
    assert len(controls) == 20
    for c in controls:
        np.testing.assert_allclose(
            np.linalg.norm(c.directions, axis=1), np.linalg.norm(v.directions, axis=1), rtol=1e-5
        )
        assert (c.layers, c.weights, c.strength) == (v.layers, v.weights, v.strength)
        assert (c.last_prompt, c.thresholds, c.means, c.shuffled) == (None,) * 4  # of other directions
        # the cosine of random directions in 512 dimensions has a standard deviation of 0.044
        assert (np.abs(v.cosine(c)) < 6 * 0.044).all()
    again = random_vectors(v, 20, seed=3)
    assert all(np.array_equal(a.directions, b.directions) for a, b in zip(controls, again, strict=True))
    assert not np.array_equal(controls[0].directions, controls[1].directions)
    assert not np.array_equal(controls[0].directions, random_vectors(v, 1, seed=4)[0].directions)


def test_the_bootstrap_resamples_questions_and_not_single_pairs() -> None:
    rng = np.random.default_rng(0)
    of_question = rng.standard_normal(50)
    values = of_question[:, None] + np.zeros((50, 30))  # pairs of one question all agree: they add no evidence
    low, high = bootstrap_interval(values, seed=1)
    half_width = 1.96 * of_question.std() / np.sqrt(50)
    assert low < of_question.mean() < high
    assert (high - low) / 2 == pytest.approx(half_width, rel=0.15)  # 2000 draws: about 5 % noise
    assert bootstrap_interval(values, seed=1) == (low, high)
