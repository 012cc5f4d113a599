"""A CUSUM chart over the turns of a conversation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

import personasteer as ps
from personasteer.monitor import find_drift


def by_hand(baseline: list[float], x: list[float], sign: int) -> list[float]:
    total, out, before = 0.0, [], list(baseline)
    for value in x:
        n = len(before)
        t = (n / (n + 1)) ** 0.5 * (value - np.mean(before)) / np.std(before, ddof=1)
        z = norm.ppf(student.cdf(t, n - 1))
        total = max(0.0, total + sign * np.clip(z, -4.0, 4.0) - 0.5)
        out.append(total)
        before.append(value)
    return out


def test_the_chart_is_the_self_starting_one() -> None:
    baseline = [0.0, 1.0, 2.0, 1.0, 1.0]
    series = [1.0, 2.5, 3.0, 0.0, -4.0, 40.0]
    found = find_drift(series, baseline=baseline)
    assert found.up == pytest.approx(by_hand(baseline, series, 1), abs=0.02)
    assert found.down == pytest.approx(by_hand(baseline, series, -1), abs=0.02)
    assert (found.mean, found.spread) == pytest.approx((np.mean(baseline), np.std(baseline, ddof=1)))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_shift_is_found_with_its_beginning_and_direction(sign: int) -> None:
    rng = np.random.default_rng(3)
    baseline, noise = rng.standard_normal(200), rng.standard_normal(40)
    noise[20:] += 2.0 * sign
    found = find_drift(noise.tolist(), baseline=baseline.tolist())
    assert found.direction == sign
    assert found.change is not None
    assert abs(found.change - 20) <= 3


@pytest.mark.parametrize(("n_baseline", "n"), [(0, 6), (0, 12), (0, 40), (4, 10), (8, 20), (300, 20)])
def test_one_in_twenty_series_of_noise_drifts_however_short_its_baseline(n_baseline: int, n: int) -> None:
    rng = np.random.default_rng(4)
    flags = [
        find_drift(rng.normal(3, 2, n), baseline=rng.normal(3, 2, n_baseline) if n_baseline else None).change
        for _ in range(1000)
    ]
    assert 0.03 < np.mean([f is not None for f in flags]) < 0.07


def test_without_a_baseline_the_beginning_of_the_series_is_one_and_does_not_count() -> None:
    series = [0.0, 1.0, 0.0, 1.0, *[5.0] * 8]
    found = find_drift(series)
    assert (found.change, found.direction) == (4, 1)
    assert found.up[:4] == found.down[:4] == (0.0, 0.0, 0.0, 0.0)
    assert (found.mean, found.spread) == pytest.approx((0.5, np.std([0, 1, 0, 1], ddof=1)))
    calm = find_drift([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    assert (calm.change, calm.mean) == (None, 0.5)


def test_a_constant_series_does_not_drift_and_one_odd_reading_counts_no_more_than_four() -> None:
    assert find_drift([2.0] * 12).change is None
    assert find_drift([2.0] * 20 + [3.0]).up[-1] == 3.5


@pytest.mark.parametrize(
    ("series", "baseline", "said"),
    [([1.0, 2.0, 3.0], None, "too short"), ([1.0] * 8, [1.0], "too short"), ([1.0, float("nan")], [1.0] * 5, "finite")],
)
def test_series_that_say_nothing_are_refused(series: list[float], baseline: list[float] | None, said: str) -> None:
    with pytest.raises(ps.ArgumentError, match=said):
        find_drift(series, baseline=baseline)
