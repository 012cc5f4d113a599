"""Value biases in place of additions to the block outputs."""

import math

import numpy as np
import pytest

from personasteer.errors import ArgumentError
from personasteer.ship import value_bias

N_LAYER, N_EMBD, FIRST = 6, 24, 2


def random_maps(layers=range(N_LAYER), width=5, seed=0):
    rng = np.random.default_rng(seed)
    return {il: rng.normal(size=(N_EMBD, width)) for il in layers}


def random_rows(seed=1):
    rng = np.random.default_rng(seed)
    return {FIRST: rng.normal(size=N_EMBD), FIRST + 1: rng.normal(size=N_EMBD)}


NORMS = np.linspace(2.0, 7.0, N_LAYER)


def oracle(maps, wanted, norms, ridge=value_bias.RIDGE):
    """The stacked least-squares problem, written out and given to NumPy."""
    layers = sorted(maps)
    rows, targets = [], []
    for il in range(layers[0], len(wanted)):
        rows.append(np.hstack([m if j <= il else 0.0 * m for j, m in sorted(maps.items())]) / norms[il])
        targets.append(wanted[il] / norms[il])
    stacked = np.vstack(rows)
    n = stacked.shape[1]
    damping = ridge * np.square(stacked).sum() / n
    padded = np.vstack([stacked, math.sqrt(damping) * np.eye(n)])
    x = np.linalg.lstsq(padded, np.concatenate([*targets, np.zeros(n)]), rcond=None)[0]
    return dict(zip(layers, np.split(x, len(layers)), strict=True))


def test_a_value_bias_adds_the_same_to_every_token_whatever_is_attended_to():
    rng = np.random.default_rng(3)
    n_tokens, n_head, n_head_kv, head_dim = 7, 6, 2, 4
    w_o = rng.normal(size=(N_EMBD, n_head * head_dim)).astype(np.float32)
    values = rng.normal(size=(n_tokens, n_head_kv, head_dim))
    scores = rng.normal(size=(n_head, n_tokens, n_tokens))
    attention = np.exp(scores) * np.tril(np.ones((n_tokens, n_tokens)))
    attention /= attention.sum(axis=2, keepdims=True)

    def attend(values):
        heads = [attention[h] @ values[:, h // 3] for h in range(n_head)]  # three query heads read one of values
        return np.hstack(heads) @ w_o.T

    bias = rng.normal(size=n_head_kv * head_dim)
    added = attend(values + bias.reshape(n_head_kv, head_dim)) - attend(values)
    expected = value_bias.value_bias_map(w_o, n_head, n_head_kv) @ bias
    assert added == pytest.approx(np.tile(expected, (n_tokens, 1)), abs=1e-9)


@pytest.mark.parametrize(("n_head", "n_head_kv"), [(5, 1), (6, 4), (0, 1), (6, 0)])
def test_heads_that_do_not_fit_are_named(n_head, n_head_kv):
    with pytest.raises(ArgumentError, match=f"{n_head} heads over {n_head_kv}"):
        value_bias.value_bias_map(np.ones((8, 24)), n_head, n_head_kv)


def test_the_wanted_sums_add_up_the_rows():
    rows = {1: np.array([1.0, 0.0]), 3: np.array([0.5, -2.0])}
    assert value_bias.wanted_sums(rows, 5).tolist() == [[0, 0], [1, 0], [1, 0], [1.5, -2], [1.5, -2]]


@pytest.mark.parametrize("rows", [{}, {7: np.ones(2)}, {-1: np.ones(2)}])
def test_rows_of_no_block_are_refused(rows):
    with pytest.raises(ArgumentError, match="blocks 0 to 4"):
        value_bias.wanted_sums(rows, 5)


@pytest.mark.parametrize("layers", [range(N_LAYER), range(1, N_LAYER), (1, 2, 4)])
@pytest.mark.parametrize("ridge", [1e-2, 0.5, 1e-3])
def test_solve_agrees_with_the_stacked_least_squares(layers, ridge):
    maps, wanted = random_maps(layers), value_bias.wanted_sums(random_rows(), N_LAYER)
    expected = oracle(maps, wanted, NORMS, ridge)
    found = value_bias.solve(maps, wanted, NORMS, ridge=ridge)
    assert list(found) == list(expected)
    for il in expected:  # conjugate gradients stop at 1e-6 of the right side
        assert found[il] == pytest.approx(expected[il], abs=1e-4)


def test_sums_that_biases_can_make_are_made():
    maps = random_maps()
    planted = {il: np.random.default_rng(il).normal(size=5) for il in maps}
    wanted = value_bias.sums_of(maps, planted, N_LAYER)
    found = value_bias.solve(maps, wanted, NORMS, ridge=1e-9)
    for il in planted:
        assert found[il] == pytest.approx(planted[il], abs=1e-3)
    assert value_bias.relative_errors(value_bias.sums_of(maps, found, N_LAYER), wanted) == pytest.approx(0, abs=1e-3)


def test_nothing_wanted_gives_no_bias():
    found = value_bias.solve(random_maps(), np.zeros((N_LAYER, N_EMBD)), NORMS)
    assert all(not b.any() for b in found.values())


def test_the_error_is_relative_and_unknown_where_nothing_is_wanted():
    wanted = np.array([[0.0, 0.0], [3.0, 4.0]])
    errors = value_bias.relative_errors(np.array([[1.0, 0.0], [3.0, 3.0]]), wanted)
    assert math.isnan(errors[0])
    assert errors[1] == pytest.approx(0.2)


def test_the_last_sum_alone_is_met_with_wrong_sums_before_it():
    maps, wanted = random_maps(), value_bias.wanted_sums(random_rows(), N_LAYER)
    naive = value_bias.naive_solve(maps, wanted[-1])
    both = [value_bias.solve(maps, wanted, NORMS), naive]
    ours, theirs = (value_bias.relative_errors(value_bias.sums_of(maps, b, N_LAYER), wanted) for b in both)
    assert theirs[-1] < 1e-3 < ours[-1]
    assert (ours[FIRST:-1] < theirs[FIRST:-1]).all()


def test_the_naive_biases_are_the_smallest_that_meet_the_last_sum():
    maps, total = random_maps(), random_rows()[FIRST]
    found = value_bias.naive_solve(maps, total, ridge=1e-12)
    expected = np.linalg.lstsq(np.hstack(list(maps.values())), total, rcond=None)[0]
    assert np.concatenate(list(found.values())) == pytest.approx(expected, abs=1e-6)


def whole_maps():
    """Orthogonal maps, which reach every direction: the sums are what is asked for, but for the ridge."""
    return {il: np.linalg.qr(m)[0] for il, m in random_maps(range(FIRST, N_LAYER), width=N_EMBD).items()}


@pytest.mark.parametrize(
    ("gain", "errors"),
    [
        (0.6, (0.4, 0.16, 0.064)),  # each correction leaves 1 - gain of the error before
        (1.5, (0.5, 0.25, 0.125)),
        (2.5, (1.5, 2.25, 0.375)),  # the second is worse: from the first again, half as far, 1.5 (1 - 2.5 / 2)
    ],
)
def test_biases_are_corrected_by_what_blocks_make_of_them(gain, errors):
    maps, rows = whole_maps(), random_rows()
    steered = value_bias.wanted_sums(rows, N_LAYER)

    def measure(biases):
        return gain * value_bias.sums_of(maps, biases, N_LAYER)

    found = value_bias.fit(maps, rows, NORMS, steered, measure)
    assert found.errors == pytest.approx(errors, abs=0.05)  # the ridge holds back 1 or 2 %
    left = (measure(found.biases) - steered)[FIRST:] / NORMS[FIRST:, None]
    assert found.error == pytest.approx(np.linalg.norm(left) / np.linalg.norm(steered[FIRST:] / NORMS[FIRST:, None]))
    assert found.error == min(found.errors)


def test_a_correction_asks_for_the_measured_shift_where_blocks_answer_to_nothing():
    maps, rows = random_maps(), random_rows()
    steered = value_bias.wanted_sums(random_rows(seed=9), N_LAYER)
    found = value_bias.fit(maps, rows, NORMS, steered, lambda b: value_bias.sums_of(maps, b, N_LAYER), corrections=1)
    expected = oracle(maps, steered, NORMS)
    for il in maps:
        assert found.biases[il] == pytest.approx(expected[il], abs=1e-4)


def test_the_best_set_is_kept_and_the_blocks_before_the_first_do_not_count():
    maps, rows = random_maps(range(FIRST, N_LAYER)), random_rows()
    steered = value_bias.wanted_sums(rows, N_LAYER)
    given = iter([0.1, 0.9, 0.7])

    def measure(biases):
        shift = steered * (1 - next(given))
        shift[:FIRST] = 1e6
        return shift

    found = value_bias.fit(maps, rows, NORMS, steered, measure)
    assert found.errors == pytest.approx((0.1, 0.9, 0.7))
    expected = oracle(maps, steered, NORMS)
    assert found.error == pytest.approx(0.1)
    assert found.biases[FIRST] == pytest.approx(expected[FIRST], abs=1e-4)


@pytest.mark.parametrize(
    ("shift", "words"), [(np.ones((N_LAYER, 3)), "shape"), (np.full((N_LAYER, N_EMBD), np.nan), "not finite")]
)
def test_a_measured_shift_that_is_none_is_refused(shift, words):
    steered = value_bias.wanted_sums(random_rows(), N_LAYER)
    with pytest.raises(ArgumentError, match=words):
        value_bias.fit(random_maps(), random_rows(), NORMS, steered, lambda _: shift)


@pytest.mark.parametrize(
    ("maps", "shape", "n_norms"),
    [
        ({}, (N_LAYER, N_EMBD), N_LAYER),
        (random_maps(), (N_LAYER - 1, N_EMBD), N_LAYER - 1),
        (random_maps(), (N_LAYER, N_EMBD), N_LAYER - 1),
        (random_maps(), (N_LAYER, N_EMBD + 1), N_LAYER),
    ],
)
def test_shapes_that_do_not_fit_are_refused(maps, shape, n_norms):
    with pytest.raises(ArgumentError, match="do not fit"):
        value_bias.solve(maps, np.ones(shape), np.ones(n_norms))


def counted(effect):
    scales = []

    def of(scale):
        scales.append(scale)
        return effect(scale)

    return of, scales


def test_a_proportional_effect_is_calibrated_in_two_evaluations():
    effect, scales = counted(lambda s: 0.45 * s)
    scale, reached = value_bias.calibrate(effect)
    assert scale == pytest.approx(1 / 0.45)
    assert reached == pytest.approx(1.0)
    assert len(scales) == 2


def test_an_effect_that_is_right_is_left_alone():
    effect, scales = counted(lambda s: 1.02 * s)
    assert value_bias.calibrate(effect) == (1.0, 1.02)
    assert scales == [1.0]


def test_an_effect_that_bends_is_calibrated_by_the_secant():
    effect, scales = counted(lambda s: 0.6 * s - 0.05 * s**2)
    scale, reached = value_bias.calibrate(effect)
    assert reached == pytest.approx(1.0, abs=value_bias.TOLERANCE)
    assert scale == pytest.approx(2.0, rel=0.05)  # 0.6 * 2 - 0.05 * 4 = 1
    assert len(scales) <= 4


def test_an_effect_that_is_wanted_negative_is_calibrated():
    scale, reached = value_bias.calibrate(lambda s: -0.5 * s, wanted=-1.0)
    assert (scale, reached) == pytest.approx((2.0, -1.0))


def test_an_effect_out_of_reach_gives_the_nearest_that_was_tried():
    effect, scales = counted(lambda s: 0.1 * s)
    assert value_bias.calibrate(effect, limits=(0.25, 4.0)) == pytest.approx((4.0, 0.4))
    assert scales == [1.0, 4.0]


def test_an_effect_that_overshoots_is_looked_for_between_the_two_sides():
    effect, scales = counted(lambda s: 0.2 * s**3)
    scale, reached = value_bias.calibrate(effect, most=12)
    assert reached == pytest.approx(1.0, abs=value_bias.TOLERANCE)
    assert scale == pytest.approx(5 ** (1 / 3), rel=0.02)
    assert max(scales) <= 4.0


@pytest.mark.parametrize("effect", [lambda s: -0.2 * s, lambda s: 0.0, lambda s: math.nan])
def test_a_dead_or_wrong_effect_ends_the_search_at_once(effect):
    tried, scales = counted(effect)
    scale, reached = value_bias.calibrate(tried)
    assert scale == 1.0
    assert scales == [1.0]
    assert reached == pytest.approx(effect(1.0), nan_ok=True)


def test_no_more_evaluations_than_allowed():
    effect, scales = counted(lambda s: s**6 / 50)  # so steep that lines between the sides hardly move
    value_bias.calibrate(effect, most=4)
    assert len(scales) == 4
