"""Directions against the grain of ordinary prompts, and readings on them that were not fitted to."""

from __future__ import annotations

import numpy as np
import pytest

from personasteer.discriminant import FOLDS, SHRINKAGE, discriminants
from personasteer.statistics import auroc

N_LAYER = 2


def ordinary(n: int, n_embd: int, seed: int = 0) -> np.ndarray:
    """States that differ most along the first axis, and stand away from 0."""
    x = np.random.default_rng(seed).standard_normal((n, N_LAYER, n_embd))
    x[..., 0] *= 20
    return (x + 3).astype(np.float32)


def a_direction(n_embd: int) -> np.ndarray:
    """A trait that shows on the second axis, in a vector that has a part of the first one."""
    v = np.zeros((1, N_LAYER, n_embd), np.float32)
    v[..., :2] = 1
    return v


@pytest.mark.parametrize(("n", "n_embd"), [(300, 12), (30, 64)])
def test_they_are_the_shrunken_inverse_covariance_times_the_direction(n: int, n_embd: int) -> None:
    x, v = ordinary(n, n_embd), a_direction(n_embd)
    found = discriminants(x, v)
    for il in range(N_LAYER):
        s = np.cov(x[:, il].astype(np.float64).T, bias=True)
        c = SHRINKAGE * np.trace(s) / n_embd
        wanted = np.linalg.solve(s + c * np.eye(n_embd), v[0, il].astype(np.float64))
        assert found.units[0, il] == pytest.approx(wanted / np.linalg.norm(wanted), abs=1e-9)
        assert found.offsets[0, il] == pytest.approx(x[:, il].mean(axis=0) @ found.units[0, il], rel=1e-6)


def test_what_ordinary_prompts_differ_in_no_longer_hides_the_trait() -> None:
    n_embd, v = 12, a_direction(12)
    found = discriminants(ordinary(300, n_embd), v)
    clean, shown = ordinary(200, n_embd, 1)[:, 0], ordinary(200, n_embd, 2)[:, 0]
    shown[:, 1] += 3  # standard deviations of the second axis
    raw, better = v[0, 0].astype(np.float64), found.units[0, 0]
    assert auroc((shown @ raw)[:, None], (clean @ raw)[:, None])[0] < 0.7
    assert auroc((shown @ better)[:, None], (clean @ better)[:, None])[0] > 0.95


def test_the_readings_of_ordinary_states_are_like_those_of_fresh_ones() -> None:
    """Few states of many dimensions: those that the direction was fitted to would read far too evenly."""
    n, n_embd = 100, 80
    v = np.random.default_rng(5).standard_normal((1, N_LAYER, n_embd)).astype(np.float32)
    x, fresh = ordinary(n, n_embd), ordinary(4000, n_embd, 9)
    found = discriminants(x, v)
    new = fresh[:, 0] @ found.units[0, 0] - found.offsets[0, 0]
    own = x[:, 0] @ found.units[0, 0] - found.offsets[0, 0]
    assert found.readings[0, :, 0].std() == pytest.approx(new.std(), rel=0.15)
    assert own.std() < 0.9 * new.std()
    assert abs(found.readings[0, :, 0].mean()) < 0.5 * new.std()


def test_what_is_known_of_a_question_does_not_read_the_question_itself() -> None:
    """Nearly the same state twice: one of them, fitted to, makes the other read too evenly."""
    n, n_embd = 100, 80
    v = np.random.default_rng(5).standard_normal((1, N_LAYER, n_embd)).astype(np.float32)
    twice = np.repeat(ordinary(n, n_embd), 2, axis=0)
    alone, paired = discriminants(twice, v), discriminants(twice, v, np.repeat(np.arange(n), 2))
    fresh = ordinary(4000, n_embd, 9)[:, 0] @ paired.units[0, 0]
    assert paired.readings[0, :, 0].std() == pytest.approx(fresh.std(), rel=0.15)
    assert alone.readings[0, :, 0].std() < 0.9 * fresh.std()


def test_a_direction_that_is_none_stays_none() -> None:
    v = np.concatenate([a_direction(8), 0 * a_direction(8), np.nan * a_direction(8)])
    found = discriminants(ordinary(40, 8), v)
    assert found.units[0].any()
    assert not found.units[1:].any()
    assert not found.readings[1:].any()


def test_states_that_do_not_differ_leave_the_direction_as_it_is() -> None:
    same = np.ones((FOLDS + 2, N_LAYER, 8), np.float32)
    found = discriminants(same, a_direction(8))
    assert found.units[0, 0, :2] == pytest.approx(np.sqrt([0.5, 0.5]))
