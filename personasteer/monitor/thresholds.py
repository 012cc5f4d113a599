"""When a reading is out of the ordinary: thresholds of one vector on one model, from prompts without the trait."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer import traits
from personasteer.engine import Progress
from personasteer.errors import ArgumentError, ModelError, PersonasteerError, VectorError
from personasteer.evaluate import trait_of
from personasteer.files import atomic_write, read_cache, write_cache
from personasteer.identity import PARTS
from personasteer.model import Model
from personasteer.progress import Meter
from personasteer.statistics import auroc, cohen_d
from personasteer.steering import check_fits
from personasteer.traits import Trait
from personasteer.vectors import PersonaVector

log = logging.getLogger("personasteer")

STATES = ("ok", "watch", "alarm")
WATCH, ALARM = 80.0, 95.0  # percentiles of clean prompts
FEWEST = 40  # clean prompts that a 95th percentile is taken of
HELD_OUT = 3  # every third clean prompt is left for testing
RESAMPLES = 200  # of the clean readings: their percentiles' mean varies less than the percentile itself
SCHEMA = 1
CACHE = "thresholds.json"


@dataclass(frozen=True)
class Threshold:
    """One vector's readings at the last prompt token of one model, where the answer is about to begin.

    Args:
        name: of the vector.
        layer: the block that is read: the one that best tells the trait's prompts from clean ones.
        direction: (n_embd,) u, of length 1; the reading is x = <h_layer, u>, in the model's own units.
        watch, alarm: readings that clean prompts exceed in 20 % and in 5 % of cases.
        slope, intercept: P(trait | x) = 1 / (1 + exp(-(slope x + intercept))), for as many trait prompts as clean ones.
        auroc: of trait prompts over clean ones that the layer was not chosen on.
        n_clean, n_trait: how many there were.
        origin: the model's fingerprint, and the parts of its identity.
    """

    name: str
    layer: int
    direction: NDArray[np.float32]
    watch: float
    alarm: float
    slope: float
    intercept: float
    auroc: float
    n_clean: int
    n_trait: int
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = (self.watch, self.alarm, self.slope, self.intercept)
        if not (np.isfinite(self.direction).all() and np.isfinite(numbers).all()) or self.watch > self.alarm:
            raise VectorError(f"threshold of {self.name!r}: its numbers are not finite, or watch is above alarm")

    def probability(self, reading: float) -> float:
        """That a prompt of this reading shows the trait, of two equally frequent kinds."""
        return float(1 / (1 + math.exp(-float(np.clip(self.slope * reading + self.intercept, -60, 60)))))

    def state(self, reading: float, before: str = "ok") -> str:
        """ok, watch or alarm. An alarm lasts until the reading is below `watch`: one that swings does not flicker."""
        if reading >= self.alarm:
            return "alarm"
        if reading >= self.watch:
            return "alarm" if before == "alarm" else "watch"
        return "ok"

    def check(self, model: Model) -> None:
        """Warn where the model has other weights than it was calibrated on.

        Raises VectorError for a model of another shape, ModelError for another chat template or tokenizer: what stands
        at the last prompt token is then something else.
        """
        if len(self.direction) != model.n_embd or not 0 <= self.layer < model.n_layer:
            raise VectorError(
                f"the threshold of {self.name!r} is for block {self.layer} of width {len(self.direction)}"
            )
        own, here = self.origin, model.origin
        if own.get("fingerprint") == here["fingerprint"]:
            return
        given, now = dict(own.get("identity", {})), here["identity"]
        changed = {part: what for part, what in PARTS.items() if given.get(part) != now.get(part)}
        said = "; ".join(changed.values()) or "an unknown one"
        if "metadata" in changed:
            raise ModelError(
                f"the threshold of {self.name!r} was calibrated on another model ({said}): calibrate again"
            )
        log.warning(
            "the threshold of %r was calibrated on another model (%s): calibrate again to trust its alarms",
            self.name, said,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "direction": [float(x) for x in self.direction], "origin": dict(self.origin)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Threshold:
        """Raises VectorError where the data is not a threshold's."""
        try:
            numbers = {key: float(data[key]) for key in ("watch", "alarm", "slope", "intercept", "auroc")}
            counts = {key: int(data[key]) for key in ("layer", "n_clean", "n_trait")}
            direction = np.asarray(data["direction"], np.float32)
            if direction.ndim != 1 or not isinstance(data["name"], str):
                raise VectorError("no direction, or no name")
            return cls(name=data["name"], direction=direction, origin=dict(data["origin"]), **numbers, **counts)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise VectorError(f"not the data of a threshold: {type(e).__name__}: {e}") from e


def clean_prompts(*, held_out: bool = False) -> tuple[tuple[str, str], ...]:
    """(question, the trait whose library it is from) of ordinary questions, in a fixed mixed order: two thirds to
    calibrate on, or the third that is left for testing.
    """
    given = [(q, name) for name in traits.names() for q in _questions(traits.get(name))]
    mixed = sorted(dict(given).items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    return tuple(pair for i, pair in enumerate(mixed) if (i % HELD_OUT == 0) == held_out)


def _questions(trait: Trait) -> tuple[str, ...]:
    return (*trait.derive_questions, *trait.evaluate_questions)


def calibrate(
    model: Model,
    vectors: Sequence[PersonaVector],
    *,
    clean: Sequence[str] | None = None,
    percentiles: tuple[float, float] = (WATCH, ALARM),
    progress: Progress | None = None,
) -> list[Threshold]:
    """Thresholds of vectors on this very model: its weights, quantization and chat template.

    Reads the last token of prompts, where the answer begins, along the vectors' last-prompt-token directions. Trait
    prompts are the trait's own deriving questions under its encouraging system prompts; clean ones are ordinary
    questions without a system prompt, those of other traits in the library. The block is the one with the largest AUROC
    on two thirds of them; AUROC is reported on the rest.

    Args:
        clean: prompts that count as ordinary for you, at least 40, instead of the library's.
        percentiles: of clean prompts, for watch and alarm.

    Raises:
        VectorError: a vector without last-prompt-token directions. TraitError: one whose trait is not known.
        ArgumentError: too few clean prompts, percentiles out of order. TemplateError: a model without a system role.
    """
    low, high = percentiles
    if not 0 < low <= high < 100:
        raise ArgumentError(f"percentiles must be two ascending numbers between 0 and 100, not {percentiles}")
    if clean is not None and len(clean) < FEWEST:
        raise ArgumentError(f"{len(clean)} clean prompts are too few for a percentile: give at least {FEWEST}")
    for vector in vectors:
        check_fits(vector, model)
        if vector.last_prompt is None:
            raise VectorError(
                f"vector {vector.name!r} has no last-prompt-token directions: derive it with personasteer"
            )
    behind = [trait_of(v) for v in vectors]
    prompts = [(q, "") for q in clean] if clean is not None else list(clean_prompts())
    encouraged = [[(q, system) for q in t.derive_questions for system, _ in t.system] for t in behind]
    meter = Meter(progress, len(prompts) + sum(map(len, encouraged)))
    ordinary = last_states(model, [(q, None) for q, _ in prompts], meter.part(len(prompts)))
    found = []
    for vector, trait, pairs in zip(vectors, behind, encouraged, strict=True):
        own = np.array([name == trait.name for _, name in prompts])
        shown = last_states(model, pairs, meter.part(len(pairs)))
        found.append(_threshold(model, vector, ordinary[~own], shown, (low, high)))
    return found


def last_states(
    model: Model, prompts: Sequence[tuple[str, str | None]], progress: Progress | None = None
) -> NDArray[np.float32]:
    """(n, n_layer, n_embd) block outputs at the last token of (question, system prompt), rendered as when derived."""
    items: list[Any] = [
        [
            {"role": "system", "content": system},
            {"role": "user", "content": question},
            {"role": "assistant", "content": ""},
        ]
        if system
        else (question, "")
        for question, system in prompts
    ]
    states: NDArray[np.float32] = model.capture(items, pool="last", span="prompt", share_prefix=True, progress=progress)
    return states


def _threshold(
    model: Model,
    vector: PersonaVector,
    clean: NDArray[np.float32],
    shown: NDArray[np.float32],
    percentiles: tuple[float, float],
) -> Threshold:
    assert vector.last_prompt is not None
    lengths = np.linalg.norm(vector.last_prompt.astype(np.float64), axis=1)
    usable = [il for il in range(vector.n_layer) if np.isfinite(lengths[il]) and lengths[il] > 0]
    if not usable:
        raise VectorError(f"vector {vector.name!r} has no usable last-prompt-token direction")
    units = np.nan_to_num(vector.last_prompt / np.where(lengths > 0, lengths, 1)[:, None])
    low, high = (np.einsum("nld,ld->nl", s, units, dtype=np.float64) for s in (clean, shown))
    choosing = [np.arange(len(x)) % 3 < 2 for x in (low, high)]
    areas = auroc(high[choosing[1]], low[choosing[0]])
    gaps = np.nan_to_num(cohen_d(high[choosing[1]], low[choosing[0]]))
    layer = max(usable, key=lambda il: (round(float(areas[il]), 3), float(gaps[il])))
    x, y = low[:, layer], high[:, layer]
    slope, intercept = _logistic(y, x)
    watch, alarm = (_percentile(x, p) for p in percentiles)
    tested = float(auroc(y[~choosing[1], None], x[~choosing[0], None])[0])
    return Threshold(
        vector.name, layer, units[layer].astype(np.float32), watch, alarm, slope, intercept, tested, len(x), len(y),
        dict(model.origin),
    )  # fmt: skip


def _percentile(values: NDArray[np.float64], percent: float) -> float:
    """The mean percentile of resamples."""
    at = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return float(np.percentile(values[at], percent, axis=1).mean())


def _logistic(high: NDArray[np.float64], low: NDArray[np.float64]) -> tuple[float, float]:
    """(slope, intercept) of the logistic regression of two kinds, each with the same weight: Newton's method on
    standardised readings, with a small ridge, so that kinds that do not overlap have a finite slope.
    """
    x = np.concatenate([high, low])
    mean, spread = float(x.mean()), float(x.std()) or 1.0
    z = np.stack([(x - mean) / spread, np.ones_like(x)], axis=1)
    y = np.concatenate([np.ones_like(high), np.zeros_like(low)])
    weight = np.where(y > 0, 0.5 / len(high), 0.5 / len(low))
    ridge = 1e-3 * np.eye(2)
    b = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(z @ b, -60, 60)))
        gradient = z.T @ (weight * (y - p)) - ridge @ b
        step = np.linalg.solve((z * (weight * p * (1 - p))[:, None]).T @ z + ridge, gradient)
        b = b + step
        if np.abs(step).max() < 1e-9:
            break
    slope = float(b[0]) / spread
    return slope, float(b[1]) - slope * mean


def thresholds_for(
    model: Model, vectors: Sequence[PersonaVector], *, progress: Progress | None = None
) -> list[Threshold]:
    """Thresholds of vectors on this model with the library's clean prompts: kept in the cache, or calibrated now."""
    keys = [_key(model, v) for v in vectors]
    known = read_cache(CACHE)
    found: dict[str, Threshold] = {}
    for key in keys:
        with suppress(VectorError, KeyError, AttributeError):
            found[key] = Threshold.from_dict(known[key])  # type: ignore[arg-type]
    missing = {key: v for key, v in zip(keys, vectors, strict=True) if key not in found}
    if missing:
        made = calibrate(model, list(missing.values()), progress=progress)
        found |= dict(zip(missing, made, strict=True))
        write_cache(CACHE, read_cache(CACHE) | {key: found[key].as_dict() for key in missing})
    return [found[key] for key in keys]


def _key(model: Model, vector: PersonaVector) -> str:
    directions = b"" if vector.last_prompt is None else vector.last_prompt.tobytes()
    own = json.dumps([vector.name, dict(vector.provenance)], sort_keys=True, default=str).encode()
    return f"{model.fingerprint}|{hashlib.sha256(directions + own).hexdigest()}"


def save_thresholds(thresholds: Sequence[Threshold], path: str | os.PathLike[str]) -> None:
    """Write them as JSON, under a temporary name and renamed."""
    content = {"schema": SCHEMA, "thresholds": [t.as_dict() for t in thresholds]}
    try:
        atomic_write(Path(path), (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as e:
        raise PersonasteerError(f"{path}: cannot be written ({e.strerror or e})") from e


def load_thresholds(path: str | os.PathLike[str]) -> list[Threshold]:
    """Read what `save_thresholds` wrote. Raises VectorError for anything else, or a newer schema."""
    file = Path(path)
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise VectorError(f"{file}: cannot be read as thresholds ({getattr(e, 'strerror', None) or e})") from e
    if not isinstance(content, dict) or not isinstance(content.get("thresholds"), list):
        raise VectorError(f"{file}: holds no thresholds")
    if content.get("schema") != SCHEMA:
        raise VectorError(f"{file}: has schema {content.get('schema')!r}; this version reads {SCHEMA}")
    try:
        return [Threshold.from_dict(t) for t in content["thresholds"]]
    except VectorError as e:
        raise VectorError(f"{file}: {e}") from e
