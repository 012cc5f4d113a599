"""Figures; each function returns a matplotlib Figure."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray


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
    axes.set_title(_short(title, 70), parse_math=False, fontsize=11)
    axes.legend(frameon=False, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def layers(series: Sequence[tuple[str, NDArray[np.floating], float]], chosen: Sequence[int], *, title: str) -> Figure:
    """One panel for each series over the blocks, the steered ones shaded; values that are not finite are left out.

    Args:
        series: (label, (n_layer,) values, the value that says nothing, drawn as a line).
        chosen: the blocks steered at.
    """
    figure = Figure(figsize=(7, 1.0 + 1.25 * len(series)), dpi=150, layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(series), 1, sharex=True))
    for i, ((label, values, nothing), axes) in enumerate(zip(series, panels, strict=True)):
        for il in chosen:
            axes.axvspan(il - 0.5, il + 0.5, color="0.9", zorder=0, linewidth=0)
        at = np.flatnonzero(np.isfinite(values))
        axes.plot(at, np.asarray(values)[at], "o-", markersize=3, color=f"C{i}")
        axes.axhline(nothing, color="0.7", linewidth=0.8)
        axes.set_ylabel(label, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_title(_short(title, 70), parse_math=False, fontsize=11)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("block (steered ones shaded)")
    figure.align_ylabels()
    return figure


def cross_talk(matrix: NDArray[np.floating], vectors: Sequence[str], traits: Sequence[str]) -> Figure:
    """Heat map of how each vector (row) moves each trait's log-odds (column), in nats per token."""
    figure = Figure(figsize=(3.6 + 0.8 * len(traits), 2.6 + 0.55 * len(vectors)), dpi=150, layout="constrained")
    axes = figure.subplots()
    size = float(np.abs(matrix).max()) or 1.0
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-size, vmax=size, aspect="auto")
    axes.set_xticks(range(len(traits)), [_short(t) for t in traits], rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(vectors)), [_short(v) for v in vectors], parse_math=False)
    axes.set_xlabel("trait measured")
    axes.set_ylabel("vector added")
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:+.2f}", ha="center", va="center", fontsize=8,
                      color="white" if abs(value) > 0.6 * size else "black")  # fmt: skip
    figure.colorbar(image, label="change of log-odds\n(nats per token)")
    return figure


def _short(text: str, n: int = 28) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"


def png(figure: Figure) -> bytes:
    """The figure as a PNG that does not name the software. Letters that the font lacks are drawn as boxes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
