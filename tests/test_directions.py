"""From activations to directions, on Gaussian data with a planted direction: formulas in NumPy beside the package's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from personasteer import ArgumentError, ElicitationError
from personasteer.derive.contrast import halfway, mean_reading
from personasteer.derive.directions import (
    MASSIVE,
    METHODS,
    Samples,
    best_window,
    check_held_out,
    choose_layers,
    difference_of_means,
    energy_share,
    held_out_quality,
    massive_dimensions,
    pca,
    probe,
    window_range,
)

N_LAYER, N_EMBD, N = 3, 64, 200
Method = Callable[[Samples], NDArray[np.float32]]


def unit_rows(rng: np.random.Generator, *shape: int) -> NDArray[np.float64]:
    rows = rng.standard_normal(shape)
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.asarray((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)))


def planted(
    n: int = N, *, size: float = 4.0, seed: int = 0, shared: float = 3.0
) -> tuple[Samples, NDArray[np.float64]]:
    """Pairs that differ by `size` along a direction of unit length at each block, in unit noise; what both of a pair
    share (the question's part) is `shared` times as large as the noise and cancels in the pair's difference.
    """
    rng = np.random.default_rng(seed)
    direction = unit_rows(rng, N_LAYER, N_EMBD)
    question = shared * rng.standard_normal((n, N_LAYER, N_EMBD))
    noise = rng.standard_normal((2, n, N_LAYER, N_EMBD))
    positive, negative = (question + noise[k] + (0.5 - k) * size * direction for k in (0, 1))
    groups = np.arange(n)
    return Samples(positive.astype(np.float32), negative.astype(np.float32), groups, groups), direction


# ---- the methods


# In unit noise of 64 dimensions, the mean of 200 differences misses by sqrt(2 * 64 / 200) = 0.8 across a length of 4:
# cosine 0.98. The leading component of the pairs' differences misses likewise. The probe weighs by the inverse
# covariance, which 400 samples of 64 dimensions, and the questions' part, estimate worse.
@pytest.mark.parametrize(("name", "least"), [("mean", 0.97), ("pca", 0.97), ("probe", 0.6)])
def test_a_planted_direction_is_found_with_its_sign_and_its_length(name: str, least: float) -> None:
    samples, direction = planted()
    found = METHODS[name](samples)
    assert found.shape == (N_LAYER, N_EMBD)
    assert found.dtype == np.float32
    assert (cosine(found, direction) > least).all(), cosine(found, direction)
    # v = u <u, mean difference>: as long as the samples' means are apart along it
    mean = difference_of_means(samples).astype(np.float64)
    along = (mean * found).sum(1) / np.linalg.norm(found, axis=1)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), along, rtol=1e-5)  # float32 vectors
    swapped = METHODS[name](
        Samples(samples.negative, samples.positive, samples.negative_groups, samples.positive_groups)
    )
    assert (cosine(swapped, -found) > 0.9999).all()  # the solver of the probe stops at a tolerance


def test_the_methods_agree_on_the_axis_where_the_noise_is_small() -> None:
    samples, direction = planted(size=40.0, shared=0.1)
    for method in METHODS.values():
        assert (cosine(method(samples), direction) > 0.99).all()


def test_the_difference_of_means_is_the_difference_of_the_means() -> None:
    samples, _ = planted(7)
    by_hand = np.zeros((N_LAYER, N_EMBD))
    for a, b in zip(samples.positive, samples.negative, strict=True):
        by_hand += (a.astype(np.float64) - b) / 7
    # rounded to float32 once
    np.testing.assert_allclose(difference_of_means(samples), by_hand, rtol=1e-6, atol=1e-7)


def test_sums_are_in_float64() -> None:
    # a large constant hides the difference from a float32 sum: 0.5 is below half a unit in the last place of n * 2^14
    n = 4096
    positive = np.full((n, 1, 2), 2.0**14 + 0.5, np.float32)
    negative = np.full((n, 1, 2), 2.0**14, np.float32)
    positive[:, 0, 1] += np.tile([0.25, 0.0], n // 2).astype(np.float32)
    in_float32 = np.zeros(2, np.float32)
    for row in positive[:, 0] - np.float32(0):
        in_float32 += row
    assert abs(in_float32[1] / n - (2.0**14 + 0.625)) > 0.1  # what adding up in float32 would give
    groups = np.arange(n)
    found = difference_of_means(Samples(positive, negative, groups, groups))
    assert found.tolist() == [[0.5, 0.625]]  # exact: every number here is a sum of powers of two


def test_the_components_of_pairs_are_the_eigenvectors_of_their_differences() -> None:
    samples, _ = planted(20)
    found = pca(samples)
    for il in range(N_LAYER):
        d = samples.positive[:, il].astype(np.float64) - samples.negative[:, il]
        leading = np.linalg.eigh(d.T @ d)[1][:, -1]
        expected = leading * (leading @ d.mean(0))
        np.testing.assert_allclose(
            found[il], expected, atol=1e-5 * float(np.linalg.norm(expected))
        )  # rounded to float32


def test_the_probe_is_scikit_learns_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    samples, _ = planted(30)
    x = np.concatenate([samples.positive[:, 1], samples.negative[:, 1]]).astype(np.float64)
    x -= x.mean(0)
    w = LogisticRegression(max_iter=2000).fit(x / x.std(), [1] * 30 + [0] * 30).coef_[0]
    assert cosine(probe(samples)[1], w) > 0.99999


def test_pairs_are_needed_for_pca_and_not_for_the_others() -> None:
    samples, direction = planted()
    fewer = Samples(samples.positive, samples.negative[:150], samples.positive_groups, samples.negative_groups[:150])
    order = np.random.default_rng(0).permutation(N)
    mixed = Samples(samples.positive, samples.negative[order], samples.positive_groups, samples.negative_groups[order])
    for unpaired in (fewer, mixed):
        assert not unpaired.paired
        with pytest.raises(ArgumentError, match="pca needs pairs"):
            pca(unpaired)
    assert samples.paired
    np.testing.assert_allclose(difference_of_means(mixed), difference_of_means(samples), atol=1e-6)
    assert (cosine(probe(mixed), probe(samples)) > 0.999).all()
    assert (cosine(difference_of_means(fewer), direction) > 0.5).all()  # the questions' part no longer cancels


@pytest.mark.parametrize("name", METHODS)
def test_a_block_without_numbers_or_without_a_difference_has_no_direction(name: str) -> None:
    samples, _ = planted(10)
    positive, negative = samples.positive.copy(), samples.negative.copy()
    positive[:, 0] = np.nan
    positive[:, 1] = negative[:, 1]
    found = METHODS[name](Samples(positive, negative, samples.positive_groups, samples.negative_groups))
    assert np.isnan(found[0]).all()
    assert not np.nan_to_num(found[1]).any()
    assert np.isfinite(found[2]).all()
    assert found[2].any()


def test_a_direction_that_points_the_wrong_way_on_held_out_samples_is_refused() -> None:
    samples, _ = planted(20)
    auroc = held_out_quality(samples).auroc
    check_held_out(auroc, range(N_LAYER), 20)
    # groups whose contrasts point opposite ways: what one half teaches is wrong for the other
    even = samples.positive_groups % 2 == 0
    flip = np.where(even[:, None, None], 1, -1)
    middle = (samples.positive + samples.negative) / 2
    apart = (samples.positive - samples.negative) / 2 * flip
    torn = Samples(middle + apart, middle - apart, samples.positive_groups, samples.negative_groups)
    auroc = held_out_quality(torn).auroc
    with pytest.raises(ElicitationError, match=r"held-out positive texts from negative ones \(AUROC 0\.[0-4]"):
        check_held_out(auroc, range(N_LAYER), 20)
    check_held_out(auroc, range(N_LAYER), 7)  # too few to tell
    auroc[1] = np.nan  # no direction, no sign
    check_held_out(auroc, [1], 20)


# ---- dimensions that are large whatever the text says


def test_massive_dimensions_are_those_beyond_twenty_medians_of_their_block() -> None:
    means = np.ones((2, 8), np.float32)
    means[0] = [1, -1, 0.5, -2, 1, 1, -20.5, 19.5]  # median of the magnitudes: 1
    means[1, 3] = MASSIVE
    assert MASSIVE == 20
    assert np.argwhere(massive_dimensions(means)).tolist() == [[0, 6]]


def test_the_energy_share_is_the_part_of_the_squared_length() -> None:
    directions = np.array([[3, 4, 0], [1, 1, 1], [0, 0, 0], [np.nan] * 3], np.float32)
    where = np.array([[True, False, True], [False, True, True], [True] * 3, [True] * 3])
    share = energy_share(directions, where)
    np.testing.assert_allclose(share[:2], [9 / 25, 2 / 3], rtol=1e-12)
    assert np.isnan(share[2:]).all()


# ---- quality


def test_held_out_quality_is_what_counting_by_hand_gives() -> None:
    # one block, two dimensions; groups 0 and 2 are one half, 1 and 3 the other
    positive = np.array([[4, 1], [5, 0], [2, 3], [1, 2]], np.float32)[:, None]
    negative = np.array([[0, 1], [1, 2], [0, 1], [3, 0]], np.float32)[:, None]
    groups = np.arange(4)
    found = held_out_quality(Samples(positive, negative, groups, groups))
    first = np.array([3.0, 2.0]) - [0.0, 1.0]  # (4 1), (2 3) against (0 1), (0 1): (3, 1)
    second = np.array([3.0, 1.0]) - [2.0, 1.0]  # (5 0), (1 2) against (1 2), (3 0): (1, 0)
    assert found.reliability[0] == pytest.approx(first @ second / np.linalg.norm(first), abs=1e-6)
    # the second half read along (3, 1) / sqrt 10: 15 and 5 against 5 and 9, over sqrt 10
    d_first = ((15 + 5) / 2 - (5 + 9) / 2) / np.sqrt((25.0 + 4.0) / 2)  # the unit of length cancels
    # the first half read along (1, 0): 4 and 2 against 0 and 0
    d_second = (3.0 - 0.0) / np.sqrt((1.0 + 0.0) / 2)
    assert found.separation[0] == pytest.approx((d_first + d_second) / 2, abs=1e-5)
    # 15 > 5, 15 > 9, 5 = 5, 5 < 9: 2.5 of 4; and 4 of 4
    assert found.auroc[0] == pytest.approx((2.5 / 4 + 1.0) / 2, abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_quality_is_high_for_a_planted_direction_and_at_chance_for_none(name: str) -> None:
    samples, _ = planted(shared=0.0)
    found = held_out_quality(samples, METHODS[name])
    # along the true direction d' is 4; a direction of cosine 0.9 reads 3.6
    assert (found.separation > 3.0).all()
    assert (found.auroc > 0.97).all()
    assert (found.reliability > 0.6).all()
    nothing = held_out_quality(planted(size=0.0, shared=0.0)[0], METHODS[name])
    # 100 against 100 held-out samples: the standard error of the AUROC is 0.04, and of d' 0.14
    assert (np.abs(nothing.auroc - 0.5) < 0.16).all()
    assert (np.abs(nothing.separation) < 0.6).all()


def test_samples_of_one_group_and_of_one_side_cannot_be_held_out() -> None:
    samples, _ = planted(4)
    one = Samples(samples.positive, samples.negative, np.zeros(4, int), np.zeros(4, int))
    apart = Samples(samples.positive[:1], samples.negative[:1], np.array([0]), np.array([1]))
    for bad in (one, apart):
        found = held_out_quality(bad)
        for values in (found.separation, found.auroc, found.reliability):
            assert values.shape == (N_LAYER,)
            assert np.isnan(values).all()
    single = held_out_quality(Samples(samples.positive[:2], samples.negative[:2], np.arange(2), np.arange(2)))
    assert np.isnan(single.separation).all()  # one text a side has no spread
    assert set(np.unique(single.auroc)) <= {0.0, 0.5, 1.0}


def test_a_group_is_never_on_both_halves() -> None:
    # both answers of a group share a part that nothing else has: read by itself, it would look like the trait
    rng = np.random.default_rng(0)
    own = 50 * rng.standard_normal((2, 20, 1, N_EMBD))
    positive, negative = (np.repeat(part, 5, axis=0) + rng.standard_normal((100, 1, N_EMBD)) for part in own)
    groups = np.repeat(np.arange(20), 5)
    grouped = held_out_quality(Samples(positive.astype(np.float32), negative.astype(np.float32), groups, groups))
    split = np.arange(100)
    leaked = held_out_quality(Samples(positive.astype(np.float32), negative.astype(np.float32), split, split))
    assert leaked.separation[0] > grouped.separation[0] + 1.0
    assert abs(grouped.reliability[0]) < 0.5 < leaked.reliability[0]


# ---- the control


def test_shuffled_labels_leave_nothing_of_the_direction() -> None:
    samples, direction = planted(shared=0.0)
    lengths, cosines = [], []
    for seed in range(20):
        shuffled = samples.shuffled(seed)
        assert len(shuffled.positive) == len(shuffled.negative) == N
        both = np.concatenate([shuffled.positive, shuffled.negative])
        original = np.concatenate([samples.positive, samples.negative])
        assert sorted(both[:, 0, 0].tolist()) == sorted(original[:, 0, 0].tolist())  # each sample once
        v = difference_of_means(shuffled)
        cosines.append(cosine(v, direction))
        lengths.append(np.linalg.norm(v, axis=1))
        # half of either label on each side: the planted part cancels exactly, whatever the seed
        positives = set(samples.positive[:, 0, 0].tolist())
        assert sum(x in positives for x in shuffled.positive[:, 0, 0].tolist()) == N // 2
    # what stays is noise: of 64 dimensions, a cosine of 1 / 8, and lengths of sqrt(2 * 64 / 200) = 0.8 instead of 4
    assert np.abs(cosines).mean() < 0.15
    assert np.abs(np.mean(cosines)) < 0.05
    assert np.max(lengths) < 1.2
    assert not np.array_equal(difference_of_means(samples.shuffled(0)), difference_of_means(samples.shuffled(1)))
    assert np.array_equal(difference_of_means(samples.shuffled(3)), difference_of_means(samples.shuffled(3)))


@pytest.mark.parametrize(("n_positive", "n_negative"), [(1, 1), (2, 1), (3, 2), (5, 5), (7, 2)])
def test_shuffling_leaves_one_of_an_odd_number_out_and_halves_the_rest(n_positive: int, n_negative: int) -> None:
    sides = [np.full((n, 1, 2), label, np.float32) for n, label in ((n_positive, 1), (n_negative, -1))]
    shuffled = Samples(sides[0], sides[1], np.arange(n_positive), np.arange(n_negative)).shuffled(0)
    for side in (shuffled.positive, shuffled.negative):
        labels = side[:, 0, 0].tolist()
        assert (labels.count(1), labels.count(-1)) == (n_positive // 2, n_negative // 2)


# ---- thresholds and blocks


def test_a_threshold_lies_halfway_between_the_mean_readings() -> None:
    samples, _ = planted(30)
    v = difference_of_means(samples)
    unit = v.astype(np.float64) / np.linalg.norm(v.astype(np.float64), axis=1, keepdims=True)
    means = [(side.astype(np.float64).mean(0) * unit).sum(1) for side in (samples.positive, samples.negative)]
    np.testing.assert_allclose(halfway(samples, v), (means[0] + means[1]) / 2, atol=1e-5)  # float32 results
    np.testing.assert_allclose(mean_reading(samples.positive, v), means[0], atol=1e-5)
    v[1] = 0
    assert np.isnan(halfway(samples, v)[1])


@pytest.mark.parametrize(
    ("n_layer", "expected"),
    [(1, (1, 1, 1)), (2, (1, 1, 2)), (4, (1, 1, 3)), (12, (2, 3, 10)), (30, (5, 7, 26)), (80, (13, 20, 70))],
)
def test_windows_are_a_sixth_wide_between_a_quarter_and_seven_eighths(
    n_layer: int, expected: tuple[int, int, int]
) -> None:
    assert window_range(n_layer) == expected


@pytest.mark.parametrize("n_layer", [2, 4, 30, 80])
def test_the_best_window_is_where_the_mean_score_is_largest(n_layer: int) -> None:
    width, low, high = window_range(n_layer)
    usable = np.ones(n_layer, bool)
    for best in range(low, high - width + 1):
        score = np.zeros(n_layer)
        score[best : best + width] = 1.0
        assert best_window(score, usable) == tuple(range(best, best + width))
    beyond = np.zeros(n_layer)
    beyond[0], beyond[-1] = 100.0, (100.0 if high < n_layer else 0.0)  # outside the range: never chosen
    assert best_window(beyond, usable) == best_window(np.zeros(n_layer), usable)


@pytest.mark.parametrize(
    ("n_layer", "middle"), [(2, (1,)), (4, (1,)), (30, (14, 15, 16, 17, 18)), (80, tuple(range(38, 51)))]
)
def test_equal_scores_choose_the_middle(n_layer: int, middle: tuple[int, ...]) -> None:
    assert best_window(np.zeros(n_layer), np.ones(n_layer, bool)) == middle


def test_a_model_of_one_block_has_no_block_to_choose() -> None:
    with pytest.raises(ElicitationError, match="no block"):
        best_window(np.zeros(1), np.ones(1, bool))


def test_blocks_without_a_direction_are_left_out_and_none_at_all_is_refused() -> None:
    usable = np.ones(30, bool)
    usable[16] = False
    score = np.where(usable, 0.0, -np.inf)
    assert 16 not in best_window(score, usable)
    only = np.arange(30) == 16
    assert best_window(np.where(only, 1.0, -np.inf), only) == (16,)
    with pytest.raises(ElicitationError, match="no block"):
        best_window(np.full(30, -np.inf), np.zeros(30, bool))


def test_layers_by_separation_count_only_what_repeats() -> None:
    separation, reliability = np.ones(30, np.float32), np.full(30, 0.5, np.float32)
    separation[20:25], reliability[20:25] = 5.0, 0.9
    directions = np.ones((30, 4), np.float32)
    assert choose_layers(separation, reliability, directions) == (20, 21, 22, 23, 24)
    reliability[20:25] = -0.5  # directions that contradict each other count for nothing
    assert not {20, 21, 22, 23, 24} & set(choose_layers(separation, reliability, directions))
