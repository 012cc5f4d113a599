"""From scores to what they say: shifts, percentiles, flags, groups, and how the fast score agrees with the full one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.discriminant import FOLDS
from personasteer.errors import ArgumentError
from personasteer.screen.journal import Journal
from personasteer.screen.readouts import Readouts
from personasteer.screen.score import SCORE
from personasteer.statistics import pearson, spearman, wilson_interval

MODES = ("fast", "full", "projection")
FEWEST = 20  # clean rows with a score
MOST_GROUPS = 200  # of a column: one with more values names rows, not groups


@dataclass(frozen=True)
class Scores:
    """Of one part of the data: float64 arrays (n_rows, n_axes), NaN for a row with a problem.

    For a row with the answers y_1 .. y_k, of n_i tokens each, after the prompts x_i, and an axis with the unit
    direction v at its block, all weighted by n_i:

    projection: mean_i a(x_i, y_i), where a is the mean over the answer's tokens of <h, v>.
    fast: mean_i [a(x_i, y_i) - <h, v> at the last token of x_i].
    full: mean_i [a(x_i, y_i) - a(x_i, y'_i)], y' the model's own greedy answer; NaN where there is none.

    tokens: (n_rows,) of all answers.

    Source: arXiv 2507.21509, section 6 (projection difference) and its appendix on estimating it without generation.
    """

    projection: NDArray[np.float64]
    fast: NDArray[np.float64]
    full: NDArray[np.float64]
    tokens: NDArray[np.int64]

    def of(self, mode: str) -> NDArray[np.float64]:
        """The score that a mode goes by."""
        return {"fast": self.fast, "full": self.full, "projection": self.projection}[mode]


def collect(journal: Journal, part: str, readouts: Readouts) -> Scores:
    """The scores of a part of the journal: of clean rows along all axes, of others along each trait's v-hat and what it
    is scored with, one after the other.
    """
    at = np.arange(len(readouts.axes)) if part == "clean" else readouts.shown
    n = journal.n_rows(part)
    sums = np.zeros((3, n, len(at)))
    tokens = np.zeros(n, np.int64)
    nothing = np.full(len(readouts.axes), np.nan, np.float32)
    for row, n_prompt, n_tokens, score, mean in journal.turns(part):
        own = np.frombuffer(score, SCORE)
        answer = np.frombuffer(mean, "<f4") if mean is not None else nothing
        count = n_tokens - n_prompt
        sums[:, row] += count * np.stack([own["mean"][at], own["last"][at], answer[at]]).astype(np.float64)
        tokens[row] += count
    with np.errstate(invalid="ignore"):
        sums /= np.where(tokens, tokens, np.nan)[:, None]
    sums[1:] = sums[0] - sums[1:]
    return Scores(sums[0], sums[1], sums[2], tokens)


@dataclass(frozen=True)
class Shift:
    """The mean score of some rows along one trait.

    Args:
        name: of the rows.
        n: rows with a score.
        mean, low, high: of the score, and its 95 % interval (normal; None for fewer than two rows).
        shift, shift_low, shift_high: the mean less that of the clean reference, and its interval (Welch).
        above, above_low, above_high: the share of rows above the threshold, and its 95 % interval (Wilson).
    """

    name: str
    n: int
    mean: float | None
    low: float | None
    high: float | None
    shift: float | None
    shift_low: float | None
    shift_high: float | None
    above: float | None
    above_low: float | None
    above_high: float | None

    def as_dict(self) -> dict[str, Any]:
        """As plain data, rounded."""
        return {key: round(x, 6) if isinstance(x, float) else x for key, x in vars(self).items()}


def _without(content: dict[str, Any], *words: str) -> dict[str, Any]:
    return {key: x for key, x in content.items() if not key.startswith(words)}


def shift_of(name: str, values: NDArray[np.float64], clean: NDArray[np.float64], threshold: float) -> Shift:
    own = np.sort(values[np.isfinite(values)])  # sums do not hang on the order of the rows
    if not len(own):
        return Shift(name, 0, *[None] * 9)
    mean, error = _mean_and_error(own)
    reference, spread = _mean_and_error(clean)
    above = int((own > threshold).sum())
    both = None if error is None or spread is None else 1.96 * math.hypot(error, spread)
    half = None if error is None else 1.96 * error
    return Shift(
        name, len(own), mean, *_around(mean, half), mean - reference, *_around(mean - reference, both),
        above / len(own), *wilson_interval(above, len(own)),
    )  # fmt: skip


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float | None]:
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), error


def _around(x: float, half: float | None) -> tuple[float | None, float | None]:
    return (None, None) if half is None else (x - half, x + half)


@dataclass(frozen=True)
class TraitResult:
    """One trait of a screening.

    Args:
        name, layer, norm: of the vector, the block that is read, and m_il there.
        threshold: the percentile of the clean reference from which a row is flagged.
        clean: (n_clean,) the reference's scores, ascending.
        score, percentile: (n_rows,) of the data; a percentile is the share of clean rows below, in %.
        all: of the whole data; published: the same along v-hat itself, the mean projection difference of the paper.
        groups: {column: of the rows of each value}, the highest first.
        ordering: the data, its groups and the sets to compare with, by the mean score, the highest first.
        correlation: of the fast score and of the projection with the full one over the sampled rows.
    """

    name: str
    layer: int
    norm: float
    threshold: float
    clean: NDArray[np.float64]
    score: NDArray[np.float64]
    percentile: NDArray[np.float64]
    all: Shift
    published: Shift
    groups: dict[str, list[Shift]]
    ordering: list[Shift]
    correlation: dict[str, Any] | None

    @cached_property
    def flagged(self) -> NDArray[np.bool_]:
        """(n_rows,) above the threshold."""
        return np.asarray(self.score > self.threshold)

    @property
    def relative_shift(self) -> float | None:
        """The shift along v-hat over m_il: in units of steering strength."""
        return None if self.published.shift is None else round(self.published.shift / self.norm, 6)

    def as_dict(self) -> dict[str, Any]:
        """As plain data, rounded."""
        numbers = {"trait": self.name, "layer": self.layer, "norm": round(self.norm, 6)}
        return {
            **numbers,
            "threshold": round(self.threshold, 6),
            "n_clean": len(self.clean),
            **_without(self.all.as_dict(), "name"),
            "published": _without(self.published.as_dict(), "name", "above"),
            "relative_shift": self.relative_shift,
            "n_flagged": int(self.flagged.sum()),
            "groups": {column: [s.as_dict() for s in shifts] for column, shifts in self.groups.items()},
            "ordering": [s.as_dict() for s in self.ordering],
            "correlation": self.correlation,
        }


def trait_result(
    readouts: Readouts,
    k: int,
    scores: Mapping[str, Scores],
    *,
    folds: NDArray[np.intp],
    norm: float,
    mode: str,
    percentile: float,
    groups: Mapping[str, Mapping[str, NDArray[np.intp]]],
    answered: NDArray[np.intp],
) -> TraitResult:
    """Of trait k.

    Args:
        scores: of "data", "clean", and "baseline" where there is one, a column for each axis.
        folds: (n_clean,) of the clean rows.
        groups: {column: {value: rows}}.
        answered: rows of the data with the model's own answers.
    """
    own, along = scores["data"].of(mode)[:, 2 * k + 1], scores["data"].of(mode)[:, 2 * k]
    columns = np.array([readouts.clean(k, f) for f in range(FOLDS)])[folds]
    clean = scores["clean"].of(mode)[np.arange(len(folds)), columns]
    plain = scores["clean"].of(mode)[:, readouts.plain(k)]
    clean, plain = np.sort(clean[np.isfinite(clean)]), np.sort(plain[np.isfinite(plain)])
    if len(clean) < FEWEST:
        raise ArgumentError(f"only {len(clean)} rows of the clean reference have a score: {FEWEST} at least")
    threshold = float(np.quantile(clean, percentile / 100))
    below = np.searchsorted(clean, own, "left").astype(np.float64)
    percentiles = np.where(np.isfinite(own), 100 * below / len(clean), np.nan)
    whole = shift_of("data", own, clean, threshold)
    by = {
        column: sorted(
            (shift_of(value, own[rows], clean, threshold) for value, rows in values.items()), key=_highest_first
        )
        for column, values in groups.items()
    }
    others = [shift_of("clean", clean, clean, threshold)]
    if "baseline" in scores:
        others.append(shift_of("baseline", scores["baseline"].of(mode)[:, 2 * k + 1], clean, threshold))
    parts = [replace(s, name=f"{column}: {s.name}") for column, shifts in by.items() for s in shifts]
    ordering = sorted([whole, *others, *parts], key=_highest_first)
    published = shift_of("data", along, plain, np.inf)
    return TraitResult(
        readouts.traits[k].name, readouts.traits[k].layer, norm, threshold, clean, own, percentiles, whole, published,
        by, ordering, _correlation(scores["data"], 2 * k + 1, answered),
    )  # fmt: skip


def _highest_first(s: Shift) -> tuple[float, str]:
    return (-s.mean if s.mean is not None else math.inf), s.name


def _correlation(scores: Scores, at: int, answered: NDArray[np.intp]) -> dict[str, Any] | None:
    full = scores.full[answered, at]
    known = np.isfinite(full)
    if known.sum() < 3:
        return None
    out: dict[str, Any] = {"n": int(known.sum())}
    for name, values in (("fast", scores.fast), ("projection", scores.projection)):
        own = values[answered, at][known]
        for kind, r in (("pearson", pearson(own, full[known])), ("spearman", spearman(own, full[known]))):
            out[f"{name}_{kind}"] = None if math.isnan(r) else round(r, 4)
    return out


class Groups:
    """Rows by the values of some columns; a column of more than MOST_GROUPS values is dropped."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._rows: dict[str, dict[str, list[int]] | None] = {column: {} for column in columns}

    def add(self, row: int, values: Sequence[str | None]) -> None:
        for column, value in zip(self._rows, values, strict=False):
            rows = self._rows[column]
            if rows is not None and value is not None:
                rows.setdefault(value, []).append(row)
                if len(rows) > MOST_GROUPS:
                    self._rows[column] = None

    def rows(self) -> dict[str, dict[str, NDArray[np.intp]]]:
        """{column: {value: its rows}} of the columns with more than one value."""
        return {
            column: {value: np.asarray(at, np.intp) for value, at in rows.items()}
            for column, rows in self._rows.items()
            if rows and len(rows) > 1
        }


@dataclass(frozen=True)
class Screening:
    """What a screening found.

    Args:
        traits: in the order of the vectors.
        scores: of the data, along v-hat and what each trait is scored with, one after the other; readouts: these
            directions.
        rows: (id, hash, problem) of each row; the hash is of its words, whatever the layout.
        mode, percentile: as they were asked for; layout: where the conversation was found.
        problems: {kind: {"n": how many rows have it, "rows": the first of them}}.
        duplicates: rows whose id, or whose words, an earlier row has, too, and some of these ids; they are scored like
            others.
        model: its name.
        n_without_answer: scored rows without an own answer, which have no score in mode "full".
    """

    traits: list[TraitResult]
    scores: Scores
    readouts: Readouts
    rows: list[tuple[str | None, str, str]]
    mode: str
    layout: str
    percentile: float
    problems: dict[str, dict[str, Any]]
    duplicates: dict[str, Any]
    model: str
    n_without_answer: int

    @cached_property
    def flagged(self) -> NDArray[np.bool_]:
        """(n_rows,) above the threshold of any trait."""
        return np.asarray(np.any([t.flagged for t in self.traits], axis=0))

    @cached_property
    def unscored(self) -> NDArray[np.bool_]:
        """(n_rows,) without a score along every trait: with a problem, or in mode "full" without an own answer."""
        return ~np.asarray(np.isfinite(np.stack([t.score for t in self.traits])).all(axis=0))

    def summary(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {
            "model": self.model,
            "mode": self.mode,
            "layout": self.layout,
            "percentile": self.percentile,
            "n_rows": len(self.rows),
            "n_scored": int((~self.unscored).sum()),
            "n_flagged": int(self.flagged.sum()),
            "n_without_own_answer": self.n_without_answer,
            "n_tokens": int(self.scores.tokens.sum()),
            "problems": self.problems,
            "duplicates": self.duplicates,
            "traits": [t.as_dict() for t in self.traits],
        }
