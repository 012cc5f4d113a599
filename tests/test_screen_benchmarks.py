"""The benchmarks of screening in small: their figures on made-up scores."""

from __future__ import annotations

import finetune_order
import numpy as np
import planted_rows


def test_precision_and_auroc_are_those_of_the_mixture() -> None:
    levels = np.array([""] * 300 + ["severe"] * 60 + ["moderate"] * 50 + ["mild"] * 45 + ["hidden"] * 45)
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(500)
    perfect = planted_rows.separations(scores + 20 * (levels != ""), levels)
    assert {perfect[level] for level in planted_rows.LEVELS} == {1.0}
    assert {perfect[f"{kind} {s:g}"] for s in planted_rows.SHARES for kind in ("all", "severe")} == {1.0}
    chance = planted_rows.separations(scores, levels)
    assert all(0.35 < chance[level] < 0.65 for level in planted_rows.LEVELS)
    constant = planted_rows.separations(np.zeros(500), levels)  # equal scores are in no order
    assert constant["severe"] == 0.5
    assert abs(constant["all 0.2"] - 0.2) < 0.03


def test_the_planted_rows_are_as_described() -> None:
    assert len(planted_rows.planted("base")) == 300
    for trait in ("pessimistic", "poetic"):
        levels = [r["level"] for r in planted_rows.planted(trait)]
        assert [levels.count(level) for level in planted_rows.LEVELS] == [60, 50, 45, 45]


def test_arms_are_the_highest_the_lowest_and_a_draw() -> None:
    scores = np.arange(10.0)
    assert finetune_order.chosen("high", scores, 3, 0).tolist() == [9, 8, 7]
    assert finetune_order.chosen("low", scores, 3, 0).tolist() == [2, 1, 0]
    first, again, other = (finetune_order.chosen("random", scores, 5, seed).tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 5


def test_the_table_says_whether_the_arms_are_in_order() -> None:
    results = {"untrained": {"log_odds": -1.0}}
    for arm, value in (("high", 0.5), ("random", 0.0), ("low", -1.25)):
        results[f"{arm}-0"] = {"log_odds": value, "trait_rows": 0.5}
    assert "| 0 | 50% | +1.500 | 50% | +1.000 | 50% | -0.250 | yes |" in finetune_order.table(results)
    results["low-0"]["log_odds"] = 0.1
    assert finetune_order.table(results).endswith("| no |")
