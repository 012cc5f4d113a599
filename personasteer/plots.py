"""Figures; each function returns a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure


def dose_response(
    strengths: Sequence[float],
    log_odds: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    random_band: tuple[float, float],
    *,
    baselines: Sequence[tuple[str, float]] = (),
    title: str,
) -> Figure:
    """Log-odds of trait against anti-trait continuations over the total strength rho.

    Args:
        intervals: 95 % interval of each point.
        random_band: (low, high) log-odds that 95 % of norm-matched random vectors stay within.
        baselines: (label, log-odds) of other ways to move the model, drawn as horizontal lines.
    """
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.axhspan(*random_band, color="0.85", label="random vectors, 95 %", zorder=0)
    below = [y - low for y, (low, _) in zip(log_odds, intervals, strict=True)]
    above = [high - y for y, (_, high) in zip(log_odds, intervals, strict=True)]
    axes.errorbar(strengths, log_odds, yerr=[below, above], fmt="o-", color="C3", capsize=4, label="steered")
    for i, (label, value) in enumerate(baselines):
        axes.axhline(value, color=f"C{i}", linestyle="--", linewidth=1.2, label=label)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_xlabel("total strength ρ (share of the residual stream's norm)")
    axes.set_ylabel("log-odds per token, trait − anti-trait (nats)")
    axes.set_title(title)
    axes.legend(frameon=False, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
