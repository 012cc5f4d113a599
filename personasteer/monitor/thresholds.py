"""When a reading is out of the ordinary: thresholds of one vector on one model, from prompts without the trait."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.chat import Conversation, as_messages
from personasteer.discriminant import discriminants
from personasteer.engine import Progress
from personasteer.errors import (
    ArgumentError,
    ContextError,
    ModelError,
    PersonasteerError,
    TemplateError,
    VectorError,
)
from personasteer.evaluate import trait_of
from personasteer.files import atomic_write, read_cache, write_cache
from personasteer.identity import PARTS, differences
from personasteer.model import Model
from personasteer.monitor.everyday import ordinary_prompts
from personasteer.monitor.running import (
    FEWEST,
    N_CLEAN_ANSWERS,
    N_TRAIT_ANSWERS,
    Running,
    asked_for,
    calibrate_running,
    check_numbers,
    direction_of,
    percentile,
    state_of,
)
from personasteer.progress import Meter
from personasteer.statistics import auroc, cohen_d
from personasteer.steering import Steering, check_fits
from personasteer.traits import Trait
from personasteer.vectors import PersonaVector

log = logging.getLogger("personasteer")

STATES = ("ok", "watch", "alarm")
WATCH, ALARM = 80.0, 95.0  # percentiles of clean prompts
AT_ONCE = 256  # prompts that are read together: the states of larger models are many
EARLIEST = 3  # of n blocks, n / 3 is the first that is read: earlier ones tell words, not what the model will do
LEAST_AUROC = 0.7  # of a threshold that is used without a warning
SCHEMA = 1
METHOD = 6  # of calibration: thresholds that another one made are not taken from the cache
CACHE = "thresholds.json"


@dataclass(frozen=True)
class Threshold:
    """One vector's readings at the last prompt token of one model, where the answer is about to begin.

    Args:
        name: of the vector.
        layer: the block that is read: the one that best tells the trait's prompts from clean and from opposite ones.
        direction: (n_embd,) u, of length 1; the reading is x = <h_layer, u>, in the model's own units. u is the
            vector's last-prompt-token direction, less what ordinary prompts differ in: see `discriminants`.
        watch, alarm: readings that clean prompts exceed in 20 % and in 5 % of cases.
        slope, intercept: P(trait | x) = 1 / (1 + exp(-(slope x + intercept))), for as many trait prompts as clean ones.
        auroc: of the trait's held-out questions, asked for under its encouraging system prompts, over clean prompts
            that the layer was not chosen on.
        n_clean, n_trait: how many prompts the threshold is from.
        origin: the model's fingerprint, and the parts of its identity.
        running: what to compare the answer with while it is generated; None where it was not calibrated.
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
    running: Running | None = None

    def __post_init__(self) -> None:
        check_numbers(repr(self.name), self.direction, self.watch, self.alarm, self.slope, self.intercept, self.auroc)

    def readings(self, states: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n,) <h_layer, u> of (n, n_layer, n_embd) block outputs."""
        out: NDArray[np.float64] = states[:, self.layer].astype(np.float64) @ self.direction.astype(np.float64)
        return out

    def probability(self, reading: float) -> float:
        """That a prompt of this reading shows the trait, of two equally frequent kinds."""
        return float(1 / (1 + math.exp(-float(np.clip(self.slope * reading + self.intercept, -60, 60)))))

    def state(self, reading: float, before: str = "ok") -> str:
        """ok, watch or alarm. An alarm lasts until the reading is below `watch`: one that swings does not flicker."""
        return state_of(reading, before, self.watch, self.alarm)

    def check(self, model: Model) -> None:
        """Warn where the model has other weights than it was calibrated on.

        Raises VectorError for a model of another shape, ModelError for another chat template or tokenizer: what stands
        at the last prompt token is then something else.
        """
        layers = [self.layer, *([self.running.layer] if self.running else [])]
        if len(self.direction) != model.n_embd or not all(0 <= il < model.n_layer for il in layers):
            raise VectorError(
                f"the threshold of {self.name!r} is for block {self.layer} of width {len(self.direction)}"
            )
        own, here = self.origin, model.origin
        if own.get("fingerprint") == here["fingerprint"]:
            return
        given, now = dict(own.get("identity", {})), here["identity"]
        changed = {part: what for part, what in PARTS.items() if given.get(part) != now.get(part)}
        said = "; ".join(changed.values()) or differences(given, now)
        if "metadata" in changed:
            raise ModelError(
                f"the threshold of {self.name!r} was calibrated on another model ({said}): calibrate again"
            )
        log.warning(
            "the threshold of %r was calibrated on another model (%s): calibrate again to trust its alarms",
            self.name, said,
        )  # fmt: skip

    def warn_if_blind(self) -> None:
        """Warn where prompts that ask for the trait hardly read higher than ordinary ones."""
        if self.auroc < LEAST_AUROC:
            log.warning(
                "prompts that ask for %r read hardly higher than ordinary ones (AUROC %.2f): its alarms say little",
                self.name, self.auroc,
            )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        running = self.running.as_dict() if self.running else None
        direction = [float(x) for x in self.direction]
        return {**vars(self), "direction": direction, "origin": dict(self.origin), "running": running}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Threshold:
        """Raises VectorError where the data is not a threshold's."""
        try:
            numbers = {key: float(data[key]) for key in ("watch", "alarm", "slope", "intercept", "auroc")}
            counts = {key: int(data[key]) for key in ("layer", "n_clean", "n_trait")}
            if not isinstance(data["name"], str):
                raise VectorError("no name")
            if not isinstance(data["origin"].get("identity", {}), Mapping):
                raise VectorError("no identity")
            running = Running.from_dict(data["running"]) if data.get("running") is not None else None
            more: dict[str, Any] = {**numbers, **counts, "origin": dict(data["origin"]), "running": running}
            return cls(name=data["name"], direction=direction_of(data["direction"]), **more)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
            raise VectorError(f"not the data of a threshold: {type(e).__name__}: {e}") from e


def calibrate(
    model: Model,
    vectors: Sequence[PersonaVector],
    *,
    clean: Sequence[Conversation] | None = None,
    percentiles: tuple[float, float] = (WATCH, ALARM),
    running: bool = False,
    progress: Progress | None = None,
) -> list[Threshold]:
    """Thresholds of vectors on this very model: its weights, quantization and chat template.

    Reads the last token of prompts, where the answer begins, along the vectors' last-prompt-token directions
    less what clean prompts differ in (`discriminants`). Trait prompts are the trait's own deriving questions under its
    encouraging system prompts; clean ones are ordinary questions, those of other traits in the library, each as it is,
    under an everyday system prompt, and after an everyday conversation. Percentiles are of cross-fitted readings. The
    block is the one, not before a third of them, with the largest AUROC over two thirds of the clean prompts and over
    the same questions under the trait's opposite system prompts, whichever is smaller. The AUROC that is reported is of
    the trait's held-out questions (a third of the deriving ones where it has none) over the other clean prompts.

    Args:
        clean: prompts that count as ordinary for you, at least 40, instead of the library's: texts of the user, or
            messages that end with the user's.
        percentiles: of clean prompts, for watch and alarm.
        running: also calibrate the running mean over answers. The model answers 120 clean prompts, and 40 of each
            trait's, with 64 tokens each.

    Raises:
        VectorError: a vector without last-prompt-token directions. TraitError: one whose trait is not known.
        ArgumentError: too few clean prompts, percentiles out of order. TemplateError: a model without a system role.

    Example:
        >>> (threshold,) = monitor.calibrate(model, [vector])
        >>> threshold.watch < threshold.alarm, threshold.state(threshold.alarm + 1)
        (True, 'alarm')
    """
    if not model.takes_system:
        raise TemplateError(
            f"{model.name}: no system message reaches the model, and thresholds are calibrated with some"
        )
    if not 0 < percentiles[0] <= percentiles[1] < 100:
        raise ArgumentError(f"percentiles must be two ascending numbers between 0 and 100, not {percentiles}")
    if clean is not None and len(clean) < FEWEST:
        raise ArgumentError(f"{len(clean)} clean prompts are too few for a percentile: give at least {FEWEST}")
    for given in clean or ():
        if as_messages(given)[-1]["role"] == "assistant":
            raise ArgumentError("a clean prompt must end with the user's message, not with an answer")
    for vector in vectors:
        check_fits(vector, model)
        if vector.last_prompt is None:
            raise VectorError(
                f"vector {vector.name!r} has no last-prompt-token directions: derive it from answers, not continuations"
            )
    behind = [trait_of(v) for v in vectors]
    prompts, numbers, whose = ordinary_prompts(clean)
    question = np.array(numbers)
    own_questions = [_questions(t) for t in behind]
    asked = [
        [*prompted(t, chosen_on), *asked_for(t, held_out)]
        for t, (chosen_on, held_out) in zip(behind, own_questions, strict=True)
    ]
    n_states = len(prompts) + sum(map(len, asked))
    n_answers = N_CLEAN_ANSWERS + N_TRAIT_ANSWERS * len(vectors) if running else 0
    meter = Meter(progress, n_states + n_answers)
    try:
        ordinary = last_states(model, prompts, meter.part(len(prompts)))
    except ContextError as e:
        raise ContextError(f"{e} (of the ordinary prompts that thresholds are calibrated on)") from e
    directions = np.stack([v.last_prompt for v in vectors if v.last_prompt is not None])
    directions[:, : model.n_layer // EARLIEST] = 0
    fitted = discriminants(ordinary, directions, question)
    found = []
    for k, (vector, trait, pairs) in enumerate(zip(vectors, behind, asked, strict=True)):
        units, offsets, own = fitted.units[k], fitted.offsets[k], np.array([name == trait.name for name in whose])
        states = last_states(model, pairs, meter.part(len(pairs)))
        n = len(own_questions[k][0]) * len(trait.system)
        of_trait = np.split(np.einsum("nld,ld->nl", states, units, dtype=np.float64) - offsets, (n, 2 * n))
        low = fitted.readings[k][~own]
        found.append(_threshold(model, vector, units, offsets, low, question[~own], of_trait, percentiles))
    if not running:
        return found
    answered = calibrate_running(model, vectors, clean=clean, percentiles=percentiles, progress=meter.part(n_answers))
    return [replace(t, running=r) for t, r in zip(found, answered, strict=True)]


def prompted(trait: Trait, questions: Sequence[str]) -> list[tuple[str, str]]:
    """(question, system prompt): those that ask for the trait, then as many that ask for its opposite."""
    return [*asked_for(trait, questions), *asked_for(trait, questions, opposite=True)]


def _questions(trait: Trait) -> tuple[Sequence[str], Sequence[str]]:
    """A trait's questions to calibrate with, and those to try the threshold on."""
    own = trait.derive_questions
    if trait.evaluate_questions:
        return own, trait.evaluate_questions
    return [q for i, q in enumerate(own) if i % 3 < 2], own[2::3] or own


def last_states(
    model: Model, prompts: Sequence[tuple[Conversation, str | None]], progress: Progress | None = None
) -> NDArray[np.float32]:
    """(n, n_layer, n_embd) block outputs at the last token of (conversation, system prompt), rendered as when derived:
    where the answer begins; of the unsteered model, whatever `Model.steering` says.
    """
    items: list[Any] = [
        (given, "")
        if isinstance(given, str) and not system
        else [*as_messages(given, system or None), {"role": "assistant", "content": ""}]
        for given, system in prompts
    ]
    states = np.empty((len(items), model.n_layer, model.n_embd), np.float32)
    meter = Meter(progress, len(items))
    how: dict[str, Any] = {"pool": "last", "span": "prompt", "share_prefix": True, "steer": Steering()}
    order = sorted(range(len(items)), key=lambda i: [m["content"] for m in as_messages(*prompts[i])])
    for begin in range(0, len(items), AT_ONCE):
        some = order[begin : begin + AT_ONCE]  # those that begin alike together
        states[some] = model.capture([items[i] for i in some], **how, progress=meter.part(len(some)))
    return states


def _threshold(
    model: Model,
    vector: PersonaVector,
    units: NDArray[np.float64],
    offsets: NDArray[np.float64],
    low: NDArray[np.float64],
    question: NDArray[np.int64],
    of_trait: Sequence[NDArray[np.float64]],
    percentiles: tuple[float, float],
) -> Threshold:
    """From (n, n_layer) readings, less `offsets`, of clean prompts and the numbers of their questions; and of the
    trait's prompts, of its opposite's, and of the trait's held-out ones.
    """
    high, other, held_out = of_trait
    usable = [il for il in range(len(units)) if units[il].any()]
    if not usable:
        raise VectorError(f"vector {vector.name!r} has no usable last-prompt-token direction")
    choosing = question % 3 < 2
    against = low[choosing], other
    areas = np.min([auroc(high, x) for x in against], axis=0)
    gaps = np.min([np.nan_to_num(cohen_d(high, x)) for x in against], axis=0)
    layer = max(usable, key=lambda il: (round(float(areas[il]), 3), float(gaps[il])))
    x, y = (side[:, layer] + offsets[layer] for side in (low, high))
    slope, intercept = _logistic(y, x)
    watch, alarm = (percentile(x, p) for p in percentiles)
    left = low if choosing.all() else low[~choosing]
    tested = float(auroc(held_out[:, [layer]], left[:, [layer]])[0])
    return Threshold(
        vector.name, layer, units[layer].astype(np.float32), watch, alarm, slope, intercept, tested, len(x), len(y),
        dict(model.origin),
    )  # fmt: skip


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
    model: Model, vectors: Sequence[PersonaVector], *, running: bool = False, progress: Progress | None = None
) -> list[Threshold]:
    """Thresholds of vectors on this model with the library's clean prompts: kept in the cache, or calibrated now.
    running: with those of running means.
    """
    keys = [_key(model, v) for v in vectors]
    known = read_cache(CACHE)
    found: dict[str, Threshold] = {}
    for key in keys:
        with suppress(VectorError, KeyError, AttributeError):
            found[key] = Threshold.from_dict(known[key])  # type: ignore[arg-type]
    of_key = dict(zip(keys, vectors, strict=True))
    missing = [key for key in of_key if key not in found]
    silent = [key for key in of_key if running and (key in missing or not found[key].running)]
    meter = Meter(progress, len(missing) + len(silent))

    def keep(made: Mapping[str, Threshold]) -> None:
        found.update(made)
        write_cache(CACHE, read_cache(CACHE) | {k: t.as_dict() for k, t in made.items()})

    if missing:
        made = calibrate(model, [of_key[k] for k in missing], progress=meter.part(len(missing)))
        keep(dict(zip(missing, made, strict=True)))
    if silent:  # what came before is kept, should this be interrupted
        answered = calibrate_running(model, [of_key[k] for k in silent], progress=meter.part(len(silent)))
        keep({k: replace(found[k], running=r) for k, r in zip(silent, answered, strict=True)})
    for threshold in found.values():
        threshold.warn_if_blind()
    return [found[key] for key in keys]


def _key(model: Model, vector: PersonaVector) -> str:
    directions = b"" if vector.last_prompt is None else vector.last_prompt.tobytes()
    own = json.dumps([METHOD, vector.name, dict(vector.provenance)], sort_keys=True, default=str).encode()
    return f"{model.fingerprint}|{hashlib.sha256(directions + own).hexdigest()}"


def save_thresholds(thresholds: Sequence[Threshold], path: str | os.PathLike[str]) -> None:
    """Write them as JSON, under a temporary name and renamed."""
    content = {"schema": SCHEMA, "thresholds": [t.as_dict() for t in thresholds]}
    try:
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        atomic_write(Path(path), text.encode("utf-8", "backslashreplace"))
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
