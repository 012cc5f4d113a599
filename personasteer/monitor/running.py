"""What is ordinary while a model answers: running means of readings over its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.chat import Conversation
from personasteer.engine import Progress, Request, Sampling
from personasteer.errors import ArgumentError, VectorError
from personasteer.evaluate import trait_of
from personasteer.model import Model
from personasteer.monitor.everyday import ordinary_prompts
from personasteer.progress import Meter
from personasteer.statistics import auroc, cohen_d
from personasteer.traits import Trait
from personasteer.vectors import PersonaVector

FEWEST = 40  # clean prompts that a 95th percentile is taken of
RESAMPLES = 200  # of the clean readings: their percentiles' mean varies less than the percentile itself
WINDOW = 8  # tokens of a running mean
N_CLEAN_ANSWERS, N_TRAIT_ANSWERS, ANSWER_TOKENS = 120, 40, 64  # that the running mean is calibrated on


def check_numbers(what: str, direction: NDArray[np.float32], watch: float, alarm: float, *more: float) -> None:
    if not (np.isfinite(direction).all() and np.isfinite((watch, alarm, *more)).all()) or watch > alarm:
        raise VectorError(f"threshold of {what}: its numbers are not finite, or watch is above alarm")


def direction_of(values: Any) -> NDArray[np.float32]:
    direction = np.asarray(values, np.float32)
    if direction.ndim != 1:
        raise VectorError("no direction")
    return direction


def state_of(reading: float, before: str, watch: float, alarm: float) -> str:
    """ok, watch or alarm; alarm too where the reading is no number."""
    if not reading < alarm:
        return "alarm"
    if reading >= watch:
        return "alarm" if before == "alarm" else "watch"
    return "ok"


@dataclass(frozen=True)
class Running:
    """One vector's readings while a model answers: the mean over the last tokens of the answer.

    Args:
        layer: the block that is read: the one that best tells the trait's answers from clean ones.
        direction: (n_embd,) u, of length 1, of the vector's response directions.
        window: over how many tokens the mean of <h_layer, u> is taken; there is none before there are so many.
        watch, alarm: running means that the largest of 20 % and 5 % of clean answers exceeds, of 64 tokens at most: of
            longer ones more do.
        auroc: of the largest running means of the trait's answers over those of clean ones, on which the layer was
            chosen, too.
        caps: (n_layer,) readings on the unit response directions that 5 % of the tokens of clean answers exceed; NaN
            where there is no direction.
        n_clean, n_trait: how many answers there were.
    """

    layer: int
    direction: NDArray[np.float32]
    window: int
    watch: float
    alarm: float
    auroc: float
    caps: NDArray[np.float32]
    n_clean: int
    n_trait: int

    def __post_init__(self) -> None:
        check_numbers("a running mean", self.direction, self.watch, self.alarm, self.auroc)

    def state(self, reading: float, before: str = "ok") -> str:
        """As `Threshold.state`."""
        return state_of(reading, before, self.watch, self.alarm)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        caps = [float(x) if np.isfinite(x) else None for x in self.caps]
        return {**vars(self), "direction": [float(x) for x in self.direction], "caps": caps}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Running:
        """Raises KeyError, TypeError, ValueError or VectorError where the data is not of this kind."""
        caps = np.array([np.nan if x is None else float(x) for x in data["caps"]], np.float32)
        numbers = {key: float(data[key]) for key in ("watch", "alarm", "auroc")}
        counts = {key: int(data[key]) for key in ("layer", "window", "n_clean", "n_trait")}
        if counts["window"] < 1:
            raise VectorError("a window of no token")
        return cls(direction=direction_of(data["direction"]), caps=caps, **numbers, **counts)  # type: ignore[arg-type]


def calibrate_running(
    model: Model,
    vectors: Sequence[PersonaVector],
    *,
    clean: Sequence[Conversation] | None = None,
    percentiles: tuple[float, float] = (80.0, 95.0),
    progress: Progress | None = None,
) -> list[Running]:
    """What running means over the model's own (greedy) answers are, for each vector; see Running.

    Args:
        clean: prompts that count as ordinary, instead of the library's; 120 of them are answered.
        percentiles: of clean answers, for watch and alarm.

    Raises:
        VectorError: an unusable direction. TraitError: a vector whose trait is not known.
        ArgumentError: fewer than 40 clean answers that are long enough.
    """
    prompts, _, _ = ordinary_prompts(clean)
    shown = [asked_for(t, t.derive_questions) for t in map(trait_of, vectors)]
    units = []
    for vector in vectors:
        at = [il for il in vector.usable_layers if il < model.n_layer - 1]
        if not at:
            raise VectorError(f"vector {vector.name!r} has no usable response direction below the last block")
        data, lengths = vector.directions_at(at)
        units.append(dict(zip(at, data / lengths[:, None], strict=True)))
    some = spread_over(prompts, N_CLEAN_ANSWERS)
    asked = [spread_over(pairs, N_TRAIT_ANSWERS) for pairs in shown]
    meter = Meter(progress, len(some) + sum(map(len, asked)))
    ordinary = answer_readings(model, some, units, meter.part(len(some)))
    found = []
    for k, (pairs, own) in enumerate(zip(asked, units, strict=True)):
        high = [r[0] for r in answer_readings(model, pairs, [own], meter.part(len(pairs)))]
        found.append(_running(model, own, [r[k] for r in ordinary], high, percentiles))
    return found


def asked_for(trait: Trait, questions: Sequence[str], *, opposite: bool = False) -> list[tuple[str, str]]:
    """(question, system prompt) of each question under each that asks for the trait, or for its opposite."""
    return [(q, pair[opposite]) for q in questions for pair in trait.system]


def spread_over(items: Sequence[Any], n: int) -> list[Any]:
    """n of the items, from all of them alike."""
    return [items[i * len(items) // n] for i in range(n)] if len(items) > n else list(items)


def answer_readings(
    model: Model,
    prompts: Sequence[tuple[Conversation, str | None]],
    units: Sequence[Mapping[int, NDArray[np.float64]]],
    progress: Progress | None = None,
    *,
    max_tokens: int = ANSWER_TOKENS,
) -> list[list[NDArray[np.float32]]]:
    """For each prompt and read-out (n_tokens, layers): the readings of the tokens of the model's answer."""
    requests = []
    for given, system in prompts:
        tokens = model.measured_prompt(given, system)
        requests.append(
            Request(tokens, len(tokens), max_tokens=max_tokens, sampling=Sampling(0.0), reads=tuple(units),
                    reads_from=len(tokens), share_prefix=True)
        )  # fmt: skip
    results = model.run_alone(requests, progress=progress)
    out = []
    for request, result in zip(requests, results, strict=True):
        n = len(request.tokens) + len(result["tokens"])
        layers = sorted({il for own in units for il in own})
        readings = np.asarray(result["readings"])[len(request.tokens) : n]
        out.append([readings[:, [layers.index(il) for il in sorted(own)], k] for k, own in enumerate(units)])
    return out


def running_mean(readings: NDArray[Any], window: int) -> NDArray[np.float64]:
    """(n_tokens - window + 1, ...) means of (n_tokens, ...) readings over `window` tokens; none of fewer."""
    sums = np.cumsum(np.concatenate([np.zeros_like(readings[:1]), readings]).astype(np.float64), axis=0)
    out: NDArray[np.float64] = (sums[window:] - sums[:-window]) / window if len(sums) > window else sums[:0]
    return out


def _running(
    model: Model,
    units: Mapping[int, NDArray[np.float64]],
    clean: Sequence[NDArray[np.float32]],
    shown: Sequence[NDArray[np.float32]],
    percentiles: tuple[float, float],
) -> Running:
    clean = [r[np.isfinite(r).all(axis=1)] for r in clean]
    tops = [
        np.array([running_mean(r, WINDOW).max(axis=0) for r in side if len(r) >= WINDOW]).reshape(-1, len(units))
        for side in (clean, shown)
    ]
    low, high = tops
    if len(low) < FEWEST:
        raise ArgumentError(f"only {len(low)} clean answers have {WINDOW} tokens: too few for a percentile")
    areas = np.nan_to_num(auroc(high, low), nan=0.5)
    gaps = np.nan_to_num(cohen_d(high, low)) if len(high) else np.zeros(len(units))
    k = max(range(len(units)), key=lambda i: (round(float(areas[i]), 3), float(gaps[i])))
    layers = sorted(units)
    caps = np.full(model.n_layer, np.nan, np.float32)
    caps[layers] = np.percentile(np.concatenate(clean), percentiles[1], axis=0)
    watch, alarm = (percentile(low[:, k], p) for p in percentiles)
    direction = units[layers[k]].astype(np.float32)
    return Running(layers[k], direction, WINDOW, watch, alarm, float(areas[k]), caps, len(low), len(high))


def percentile(values: NDArray[np.float64], percent: float) -> float:
    """The mean percentile of resamples."""
    at = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return float(np.percentile(values[at], percent, axis=1).mean())
