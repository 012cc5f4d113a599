"""Figures; each function returns a matplotlib Figure."""

from __future__ import annotations

import io
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from matplotlib import colormaps, font_manager, rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Colormap, ListedColormap, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from personasteer.text import printable

Turns: TypeAlias = Sequence[tuple[str, int, int]]  # (role, begin, end) of each turn's own tokens

LINE = 96  # characters of a line of text
LINES = 120  # of a figure of text, at most
COLUMNS = 1000  # of an image of tokens, at most
TOKEN_LABELS = 80  # below an image, at most
ANSWER = "▸ "  # stands for the token before an answer
STATE_COLOURS = {"ok": "white", "watch": "#ffd54a", "alarm": "#ff5a4a"}


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


def reading_heat_map(
    pieces: Sequence[str],
    readings: NDArray[np.floating],
    turns: Turns,
    *,
    threshold: float | None = None,
    states: Sequence[str] = (),
    numbered: bool = True,
    label: str = "reading",
    title: str,
) -> Figure:
    """A text, each token on the colour of its reading; as many lines as `LINES` show of it, from both ends.

    Colours as `colour_range` says. Of the chat template's own tokens only the one before an answer is there, as a mark;
    with `states` it has the colour of the turn's state.

    Args:
        pieces, readings: (n_tokens,) the tokens' texts and readings; what is not finite has no colour.
        turns: (role, begin, end) of each turn's own tokens; without any, all tokens are shown as one text.
        numbered: put a turn's number before its role.
        states: of each turn, what a threshold says before it: "ok", "watch", "alarm", or "".
    """
    marks = {begin - 1: state for (_, begin, _), state in zip(turns, states, strict=False) if state}
    values = np.asarray(readings, np.float64)
    lines = _lines(pieces, turns or [("", 0, len(pieces))], numbered)
    left_out = max(0, len(lines) - LINES)
    if left_out:
        head, tail = lines[: LINES // 2], lines[len(lines) - LINES // 2 :]
        n_tokens = len({i for _, line in lines[len(head) : len(lines) - len(tail)] for i, _, _ in line})
        lines = [*head, (f"… {left_out} lines, {n_tokens} tokens left out …", []), *tail]
    centre, half = colour_range(values, turns, threshold)
    step, pitch, left, top, bottom = 0.19, 1 / 15, 1.1, 0.5, 0.75  # inches; 8 pt DejaVu Sans Mono is 10 of 150 dpi wide
    width, height = left + pitch * LINE + 0.2, top + bottom + step * len(lines)
    figure = Figure(figsize=(width, height), dpi=150)
    axes = figure.add_axes((left / width, bottom / height, pitch * LINE / width, step * len(lines) / height))
    axes.set_xlim(0, LINE)
    axes.set_ylim(len(lines), 0)
    axes.set_axis_off()
    scale = ScalarMappable(Normalize(centre - half, centre + half), _diverging())
    fonts = _fonts()
    boxes, colours = [], []
    for row, (name, line) in enumerate(lines):
        x, side = (0, "left") if name.startswith("…") else (-1, "right")
        axes.text(x, row + 0.5, printable(_short(name, 60)), ha=side, va="center", fontsize=7.5, color="0.35",
                  parse_math=False)  # fmt: skip
        runs: list[tuple[float, str]] = []  # one text for what surely has one width
        for i, column, text in line:
            if text == ANSWER:
                own = to_rgba(STATE_COLOURS[marks[i]]) if i in marks else scale.to_rgba(values[i])
                axes.add_patch(Rectangle((column, row + 0.1), 1.6, 0.8, facecolor=own, linewidth=0.6, edgecolor="0.3"))
                runs += [(column + 0.3, ANSWER), (column + 2, "")]
                continue
            if np.isfinite(values[i]):
                boxes.append(Rectangle((column, row + 0.06), _cells(text), 0.88))
                colours.append(scale.to_rgba(values[i]))
            if runs and text.isascii() and runs[-1][1].isascii():
                runs[-1] = (runs[-1][0], runs[-1][1] + text)
            else:
                runs.append((column, text))
        for at, text in runs:
            begin = at + _cells(text[: len(text) - len(text.lstrip())])
            axes.text(begin, row + 0.5, text.strip(), va="center", fontsize=8, fontfamily=fonts, parse_math=False)
    axes.add_collection(PatchCollection(boxes, facecolors=colours, edgecolors="none", zorder=0))
    figure.text(0.02, 1 - 0.28 / height, printable(_short(title, 95)), fontsize=11, va="center", parse_math=False)
    bar = figure.add_axes((left / width, 0.45 / height, 0.45 * pitch * LINE / width, 0.11 / height))
    figure.colorbar(scale, cax=bar, orientation="horizontal", extend="both", extendfrac=0.03)
    bar.tick_params(labelsize=7)
    bar.xaxis.set_major_locator(MaxNLocator(5))
    said = [_short(label, 60), "white: " + ("the median" if threshold is None else f"the threshold, {threshold:.2f}")]
    if any(text == ANSWER for _, line in lines for _, _, text in line):
        said.append(f"{ANSWER}the token before an answer" + (": yellow is watch, red is alarm" if marks else ""))
    figure.text((left + 0.5 * pitch * LINE) / width, 0.5 / height, "\n".join(said), fontsize=7.5, va="center",
                linespacing=1.4, parse_math=False)  # fmt: skip
    return figure


def reading_drift(
    before: Sequence[tuple[int, float]],
    *,
    means: Sequence[tuple[str, float]] = (),
    thresholds: tuple[float, float] | None = None,
    baseline: tuple[float, float] | None = None,
    change: int | None = None,
    title: str,
) -> Figure:
    """Readings over the turns of a conversation.

    Args:
        before: (turn, reading at the token before it) of each answer.
        means: (role, mean reading over the turn's tokens) of every turn, from 0 on; not finite where it has none.
        thresholds: (watch, alarm), drawn as lines.
        baseline: (mean, standard deviation) of readings that do not drift: a band of two of them to each side.
        change: the first turn that has drifted.
    """
    figure = Figure(figsize=(7.5, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    if baseline is not None:
        mean, spread = baseline
        axes.axhspan(mean - 2 * spread, mean + 2 * spread, color="0.9", zorder=0, label="baseline, mean ± 2 sd")
    many = len(before) > 100
    for i, role in enumerate(dict.fromkeys(role for role, x in means if np.isfinite(x))):
        at = [(k, x) for k, (own, x) in enumerate(means) if own == role and np.isfinite(x)]
        axes.plot(*zip(*at, strict=True), linestyle="none", marker="sD^vPX*"[i % 7], markersize=2 if many else 3.5,
                  color="0.45", markerfacecolor="white" if i % 2 else "0.45", zorder=2,
                  label=f"{_short(printable(role))}, mean of the turn")  # fmt: skip
    if before:
        axes.plot(*zip(*before, strict=True), "-" if many else "o-", color="C3", linewidth=1.2 if many else 1.6,
                  markersize=5, label="before an answer", zorder=3)  # fmt: skip
    for name, value, style in zip(("watch", "alarm"), thresholds or (), (":", "--"), strict=False):
        axes.axhline(value, color="C1", linestyle=style, linewidth=1.2, label=f"{name} from {value:.2f}")
    if change is not None:
        axes.axvline(change - 0.5, color="C0", linewidth=1.2, label=f"drifts from turn {change} on")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("turn")
    axes.set_ylabel("reading ⟨h, v̂⟩")
    axes.set_title(printable(_short(title, 80)), parse_math=False, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        legend = figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def reading_layers(
    pieces: Sequence[str],
    readings: NDArray[np.floating],
    layers: Sequence[int],
    turns: Turns = (),
    *,
    marked: int | None = None,
    title: str,
) -> Figure:
    """Readings of each token (left to right) at each block (bottom to top), each block on its own scale.

    A block's colours are z = (x - median) / (1.4826 median |x - median|), over the turns' tokens. The chat template's
    own tokens are left out, but the ones before answers; more than `COLUMNS` tokens are drawn as means of neighbours.

    Args:
        pieces: (n_tokens,) the tokens' texts, some of which stand below.
        readings: (n_tokens, n_layers); white where they are not finite.
        layers: (n_layers,) the blocks.
        turns: (role, begin, end) of each turn's own tokens.
        marked: a block to point at.
    """
    values = np.asarray(readings, np.float64)
    at = np.concatenate([_answers_at(turns), *(np.arange(begin, end) for _, begin, end in turns)]).astype(int)
    at = np.unique(at) if len(at) else np.arange(len(pieces))
    scales = [colour_range(x, turns) for x in values.T]
    z = np.stack([3 * (x[at] - centre) / half for x, (centre, half) in zip(values.T, scales, strict=True)])
    per = -(-len(at) // COLUMNS)  # tokens a column
    firsts = np.arange(0, len(at), per)
    counts = np.add.reduceat(np.isfinite(z), firsts, axis=1, dtype=np.int64)
    image = np.add.reduceat(np.nan_to_num(z), firsts, axis=1) / np.where(counts, counts, np.nan)
    n = len(firsts)
    figure = Figure(
        figsize=(float(np.clip(3 + 0.15 * n, 7, 14)), float(np.clip(2.6 + 0.13 * len(layers), 3.2, 9))),
        dpi=150, layout="constrained",
    )  # fmt: skip
    axes = figure.subplots()
    drawn = axes.imshow(image, cmap=_diverging(), vmin=-3, vmax=3, aspect="auto", origin="lower",
                        interpolation="nearest")  # fmt: skip
    every = -(-len(layers) // 16)
    axes.set_yticks(range(0, len(layers), every), [str(il) for il in layers[::every]], fontsize=7)
    axes.set_ylabel("block", fontsize=9)
    if marked is not None and marked in layers:
        axes.annotate(f"◂ {marked}", (1.004, list(layers).index(marked)), xycoords=("axes fraction", "data"),
                      va="center", fontsize=7, annotation_clip=False)  # fmt: skip
    step = -(-n // TOKEN_LABELS)
    texts = [_short(printable(pieces[at[k]]).strip() or "·", 12) for k in firsts[::step]]
    axes.set_xticks(range(0, n, step), texts, rotation=90, fontsize=6.5, parse_math=False, fontfamily=_fonts())
    said = ["token" if per == 1 else f"tokens, {per} a column", *([f"one of {per * step} with its text"] * (step > 1))]
    axes.set_xlabel(", ".join(said), fontsize=9)
    starts: dict[float, str] = {}
    for k, (role, begin, end) in enumerate(turns):
        place = float(np.searchsorted(at, begin)) / per - 0.5
        if begin < end and place - max(starts, default=-np.inf) >= n / 80:  # labels that do not run into each other
            axes.axvline(place, color="0.2", linewidth=0.6)
            starts[place] = f"{k} {_short(printable(role), 10)}"
    above = axes.secondary_xaxis("top")
    above.set_xticks(list(starts), list(starts.values()), rotation=45, ha="left", fontsize=6.5, parse_math=False)
    axes.set_title(printable(_short(title, 80)), parse_math=False, fontsize=11)
    bar = figure.colorbar(drawn, extend="both", extendfrac=0.03, fraction=0.03, pad=0.02)
    bar.set_label("robust standard deviations\nfrom the block's median", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def colour_range(
    readings: NDArray[np.floating], turns: Turns = (), threshold: float | None = None
) -> tuple[float, float]:
    """(centre, half the width) of the colours of a series: the threshold, or the median of the turns' tokens, and three
    robust standard deviations of these tokens, 4.45 median |x - median|.
    """
    own = np.zeros(len(readings), bool)
    for _, begin, end in turns or [("", 0, len(readings))]:
        own[begin:end] = True
    known = np.asarray(readings, np.float64)[own & np.isfinite(readings)]
    if not len(known):
        return (0.0 if threshold is None else threshold), 1.0
    median = float(np.median(known))
    half = 3 * 1.4826 * float(np.median(np.abs(known - median))) or float(np.abs(known - median).max()) or 1.0
    return (median if threshold is None else threshold), half


def _answers_at(turns: Turns) -> list[int]:
    """The tokens before answers, where the model is about to begin."""
    return [begin - 1 for role, begin, _ in turns if role == "assistant" and begin > 0]


_Placed: TypeAlias = tuple[int, int, str]  # (token, column, text)


def _lines(pieces: Sequence[str], turns: Turns, numbered: bool) -> list[tuple[str, list[_Placed]]]:
    """(label, tokens placed) of each line: words stay whole where they fit, a turn begins a line."""
    lines: list[tuple[str, list[_Placed]]] = []
    for k, (role, begin, end) in enumerate(turns):
        lines.append(((f"{k} " if numbered and role else "") + _short(role, 12), []))
        if begin - 1 in _answers_at([(role, begin, end)]):
            lines[-1][1].append((begin - 1, 0, ANSWER))
        for word in _words(pieces, begin, end):
            line = lines[-1][1]
            column = line[-1][1] + _cells(line[-1][2]) if line else 0
            total = sum(_cells(text) for _, text in word)
            if column and column + total > LINE >= total:
                lines.append(("", []))
                column = 0
            for i, text in word:
                for part in _parts(text if column or len(lines[-1][1]) or lines[-1][0] else text.lstrip(" ") or text):
                    if column + _cells(part) > LINE:
                        lines.append(("", []))
                        column = 0
                    lines[-1][1].append((i, column, part))
                    column += _cells(part)
            if word[-1][1].endswith("↵"):
                lines.append(("", []))
        if len(lines) > 1 and not lines[-1][1] and not lines[-1][0]:
            lines.pop()
    return lines


def _words(pieces: Sequence[str], begin: int, end: int) -> Iterator[list[tuple[int, str]]]:
    """Runs of tokens between which a line may end."""
    word: list[tuple[int, str]] = []
    for i in range(begin, end):
        if not (text := printable(pieces[i])):
            continue
        if word and (text[0].isspace() or word[-1][1].endswith("↵")):
            yield word
            word = []
        word.append((i, text))
    if word:
        yield word


def _parts(text: str) -> Iterator[str]:
    """A token in pieces that each fit on a line."""
    part = ""
    for c in text:
        if part and _cells(part + c) > LINE:
            yield part
            part = ""
        part += c
    yield part


def _cells(text: str) -> int:
    """Columns that a text takes in a font of one width."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _diverging() -> Colormap:
    """Blue, white, red, light enough for black letters."""
    return ListedColormap(colormaps["RdBu_r"](np.linspace(0.14, 0.86, 255)), name="readings")


def _fonts() -> list[str]:
    """One width for what it has; then what the system offers for other scripts."""
    known = {f.name for f in font_manager.fontManager.ttflist}
    return ["DejaVu Sans Mono", "DejaVu Sans", *(name for name in _OTHER_SCRIPTS if name in known)]


_OTHER_SCRIPTS = (
    "Noto Sans Mono CJK JP", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Hiragino Sans", "Yu Gothic", "Microsoft YaHei",
    "Noto Sans Devanagari", "Arial Unicode MS",
)  # fmt: skip


def _short(text: str, n: int = 28) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"


def png(figure: Figure) -> bytes:
    """The figure as a PNG that does not name the software. Letters that the font lacks are drawn as boxes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


INK = "#010203"  # stands for the page's own text colour while a figure is drawn
MUTED = "#8884"  # what chance does
SERIES = ("#d1495b", "#2e86ab", "#8a8a8a")  # seen on white and on black


def intervals(
    labels: Sequence[str],
    series: Sequence[tuple[str, Sequence[tuple[float, float, float] | None]]],
    *,
    bands: Sequence[tuple[float, float] | None] = (),
    band_label: str = "",
    marked: Sequence[int] = (),
    xlabel: str,
) -> Figure:
    """Values with their intervals, a row for each label, the first on top.

    Args:
        series: (name, (value, low, high) of each row or None), in at most three colours.
        bands: (low, high) of each row, drawn grey behind it; none when empty.
        marked: rows whose label is bold.
    """
    n = len(labels)
    figure = Figure(figsize=(7.2, 0.9 + 0.24 * n + 0.2 * (len(series) > 1)), layout="constrained")
    axes = figure.subplots()
    for row, band in enumerate(bands):
        if band is not None:
            name = band_label if row == next(i for i, b in enumerate(bands) if b is not None) else None
            axes.barh(row, band[1] - band[0], left=band[0], height=0.72, color=MUTED, linewidth=0, label=name)
    for k, (name, values) in enumerate(series):
        colour = SERIES[k]
        at = [(row + 0.16 * (k - (len(series) - 1) / 2), v) for row, v in enumerate(values) if v is not None]
        for y, (_, low, high) in at:
            axes.plot((low, high), (y, y), color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot([v[0] for _, v in at], [y for y, _ in at], "o", color=colour, markersize=4.2, label=name)
    axes.axvline(0, color=INK, linewidth=0.7, alpha=0.5, zorder=0)
    axes.set_yticks(range(n), [_short(label) for label in labels], parse_math=False, fontsize=8.5)
    for row in marked:
        axes.get_yticklabels()[row].set_fontweight("bold")
    axes.set_ylim(n - 0.4, -0.6)
    axes.set_xlabel(xlabel, fontsize=8.5)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=MUTED, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if len(series) > 1 or any(band is not None for band in bands):
        figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=8.5)
    return figure


def ratios(
    labels: Sequence[str],
    panels: Mapping[str, Sequence[tuple[float, float, float]]],
    expected: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    title: str,
) -> Figure:
    """Ratios with their intervals, a row for each label, a panel for each of `panels`, one next to the other.

    Args:
        panels: {name: (ratio, low, high) of each row}.
        expected: {name: what is expected of each row}, drawn as a bar across it where it is not 1.
    """
    n = len(labels)
    figure = Figure(figsize=(8.4, 1.5 + 0.26 * n), dpi=150, layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(all_axes, panels.items(), strict=True):
        for row, (value, low, high) in enumerate(values):
            axes.plot((low, high), (row, row), color=SERIES[1], linewidth=1.8, solid_capstyle="butt")
            axes.plot(value, row, "o", color=SERIES[1], markersize=4.5, label="measured, 95 %" if row == 0 else None)
        wanted = [(row, x) for row, x in enumerate(expected[name]) if x != 1]
        axes.plot([x for _, x in wanted], [r for r, _ in wanted], "|", color=SERIES[0], markersize=11, label="expected")
        axes.axvline(1, color="0.3", linewidth=0.8, zorder=0)
        axes.set_title(name, fontsize=10)
        axes.set_yticks(range(n), list(labels), parse_math=False, fontsize=8.5)
        axes.set_ylim(n - 0.4, -0.6)
        axes.tick_params(axis="x", labelsize=8.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=MUTED, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel(xlabel, fontsize=9)
    figure.suptitle("\n".join(textwrap.wrap(title, 105)), fontsize=8, parse_math=False)
    all_axes[-1].legend(frameon=False, fontsize=8, loc="best")
    return figure


def score_histogram(
    scores: NDArray[np.floating], clean: NDArray[np.floating], threshold: float, *, title: str, label: str
) -> Figure:
    """Scores of rows, those above the threshold in colour, beside a clean reference's; shares of each."""
    figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    both = np.concatenate([scores, clean])
    edges = (
        np.histogram_bin_edges(both, np.clip(int(2 * len(both) ** (1 / 3)), 10, 80)) if len(both) else np.arange(2.0)
    )
    middles, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)

    def shares(values: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.histogram(values, edges)[0] / max(len(values), 1)

    colours = [SERIES[int(x <= threshold)] for x in middles]
    axes.bar(middles, shares(scores), width, color=colours, alpha=0.8, label=f"{len(scores)} rows")
    axes.stairs(shares(clean), edges, color="0.25", linewidth=1.4, label=f"{len(clean)} clean rows")
    axes.axvline(threshold, color="0.2", linestyle="--", linewidth=1.2, label="threshold")
    axes.set_xlabel(label)
    axes.set_ylabel("share of rows")
    axes.set_title(_short(title, 70), parse_math=False, fontsize=11)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def svg(draw: Callable[[], Figure], key: str) -> str:
    """An <svg> element for a page: transparent, in the page's font and, for axes and words, its text colour.

    key: of the figure in the page; the same figure and key give the same text.
    """
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    buffer = io.StringIO()
    with (
        warnings.catch_warnings(),
        rc_context({"svg.fonttype": "none", "svg.hashsalt": key, **dict.fromkeys(ink, INK)}),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        draw().savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for what in (r"<metadata>.*?</metadata>", r"<style.*?</style>"):  # a style would hold for the whole page
        text = re.sub(what, "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<g) id="[^"]*"', r"\1\2", text)
    return text.replace(INK, "currentColor").strip()
