"""A CUSUM chart over the turns of a conversation."""

from __future__ import annotations

import numpy as np
import pytest

import personasteer as ps
from personasteer.monitor import find_drift


def by_hand(x: list[float], mean: float, spread: float, sign: int) -> list[float]:
    total, out = 0.0, []
    for value in x:
        total = max(0.0, total + sign * (value - mean) / spread - 0.5)
        out.append(total)
    return out


def test_the_chart_is_pages_sums() -> None:
    baseline = [0.0, 1.0, 2.0, 1.0, 1.0]
    series = [1.0, 2.5, 3.0, 0.0, -4.0]
    found = find_drift(series, baseline=baseline)
    mean, spread = np.mean(baseline), np.std(baseline, ddof=1)
    assert found.up == pytest.approx(by_hand(series, mean, spread, 1))
    assert found.down == pytest.approx(by_hand(series, mean, spread, -1))
    assert (found.mean, found.spread) == pytest.approx((mean, spread))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_shift_is_found_with_its_beginning_and_direction(sign: int) -> None:
    rng = np.random.default_rng(3)
    baseline, noise = rng.standard_normal(200), rng.standard_normal(40)
    noise[20:] += 2.0 * sign
    found = find_drift(noise.tolist(), baseline=baseline.tolist())
    assert found.direction == sign
    assert found.change is not None
    assert abs(found.change - 20) <= 3


def test_noise_seldom_drifts() -> None:
    rng = np.random.default_rng(4)
    flags = [
        find_drift(rng.standard_normal(20).tolist(), baseline=rng.standard_normal(300).tolist()).change is not None
        for _ in range(400)
    ]
    assert np.mean(flags) < 0.08


def test_without_a_baseline_the_beginning_of_the_series_is_one_and_does_not_count() -> None:
    series = [0.0, 1.0, 0.0, 1.0, *[5.0] * 8]
    found = find_drift(series)
    assert (found.change, found.direction) == (4, 1)
    assert found.up[:4] == found.down[:4] == (0.0, 0.0, 0.0, 0.0)
    assert find_drift([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]).change is None


@pytest.mark.parametrize(
    ("series", "baseline", "said"),
    [([1.0, 2.0, 3.0], None, "too short"), ([1.0] * 8, [1.0], "too short"), ([1.0, float("nan")], [1.0] * 5, "finite")],
)
def test_series_that_say_nothing_are_refused(series: list[float], baseline: list[float] | None, said: str) -> None:
    with pytest.raises(ps.ArgumentError, match=said):
        find_drift(series, baseline=baseline)
