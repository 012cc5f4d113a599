"""Models that change: what fixed texts gave on one file, replayed on another, and what of a vector still holds."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer import traits
from personasteer._native import build_id
from personasteer.chat import Conversation
from personasteer.engine import Progress
from personasteer.errors import ModelError, RegistryError, TraitError
from personasteer.evaluate import Cell, cell_log_odds, make_cells, trait_of
from personasteer.evaluate.log_odds import answer_cells
from personasteer.identity import differences
from personasteer.model import Model
from personasteer.monitor.everyday import clean_prompts, everyday_prompt
from personasteer.monitor.profile import Profile, Shift, compare_profiles, measure_profile, whole_states
from personasteer.monitor.registry import Evaluation, Registry, TrackedModel, TrackedVector
from personasteer.monitor.thresholds import ALARM, WATCH, Threshold, last_states, prompted, thresholds_for
from personasteer.progress import Meter
from personasteer.statistics import bootstrap_interval, wilson_interval
from personasteer.steering import check_fits
from personasteer.traits import Trait
from personasteer.vectors import PersonaVector
from personasteer.work import digest as digest_of

log = logging.getLogger("personasteer")

OUTCOMES = ("reuse", "recalibrate", "re-derive", "suspicious")  # from good to bad
LEAST_COSINE = 0.8  # of a direction before and now
EFFECT_BAND = (0.5, 2.0)  # of the effect now over the one before
LEVEL = 0.999  # of binomial intervals: a vector that is checked alarms for two rates of ordinary prompts
N_ORDINARY = 200  # prompts that no threshold was calibrated on
N_CELLS = 8  # comparisons that a vector's effect is measured on
PROFILE, VECTOR, CHECK = "profile", "vector", "check"  # kinds of evaluations
OTHER_TEXTS = "was measured on other texts, by another version of personasteer: add it again"
WEIGHTS = {"thresholds": 1300, "profile": 1800, "ordinary": 200, "vector": 300}  # texts, about; for progress


@dataclass(frozen=True, eq=False)
class Replay:
    """What a vector's fixed texts give on one model; nothing is sampled.

    Args:
        cells: the comparisons of its effect.
        log_odds: (3, n_cells) at minus the vector's strength, at 0 and at plus the strength, in nats per token.
        directions: (n_layer, n_embd) difference of means of block outputs at the last prompt token, over the trait's
            deriving questions under its opposite system prompts. None where the model takes no system prompt.
        ordinary, shown: readings under the threshold of ordinary prompts, and of the trait's deriving questions under
            its encouraging system prompts. None without a threshold.
    """

    cells: tuple[Cell, ...]
    log_odds: NDArray[np.float64]
    directions: NDArray[np.float32] | None
    ordinary: NDArray[np.float64] | None
    shown: NDArray[np.float64] | None

    @property
    def effects(self) -> NDArray[np.float64]:
        """(n_cells,) log-odds at plus the strength minus those at minus the strength."""
        out: NDArray[np.float64] = self.log_odds[2] - self.log_odds[0]
        return out


@dataclass(frozen=True)
class VectorCheck:
    """What of one vector holds on another file. Pairs are (on the tracked model, on the checked one).

    Args:
        outcome: of OUTCOMES. reasons: in words, the worst first.
        cosine: of the replayed directions, mean over `blocks`: those that the vector steers, and the threshold's.
        n_ordinary, n_shown: prompts read. alarms, watches: ordinary ones in that state or above. shown: alarms of
            prompts that ask for the trait.
        effect: mean change of the log-odds from minus to plus `strength`. ratio: of the two; None where the first one's
            95 % interval includes 0.
    """

    name: str
    digest: str
    outcome: str
    reasons: tuple[str, ...]
    blocks: tuple[int, ...]
    cosine: float | None
    cosines: tuple[float, ...]
    n_ordinary: int
    alarms: tuple[int, int] | None
    watches: tuple[int, int] | None
    n_shown: int
    shown: tuple[int, int] | None
    strength: float
    effect: tuple[float, float] | None
    ratio: float | None


@dataclass(frozen=True)
class Check:
    """A model held against a tracked one.

    Args:
        outcome: the worst of its vectors' and of the shifts'. reasons: in words, the worst first.
        differs: how the two files' identities differ, in words; "" for the same fingerprint.
    """

    model: TrackedModel
    against: TrackedModel
    outcome: str
    reasons: tuple[str, ...]
    differs: str
    vectors: tuple[VectorCheck, ...] = ()
    shifts: tuple[Shift, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As plain data, with the limits that decided."""
        limits = {"least_cosine": LEAST_COSINE, "effect_band": EFFECT_BAND, "level": LEVEL}
        return {**asdict(self), "limits": limits}


@dataclass(frozen=True)
class VectorComparison:
    """A vector of one name on two tracked models; pairs are (on the first, on the second), None where not measured.

    Args:
        same_vector: one file on both. files_cosine: of the two files' directions otherwise.
        cosine: of the replayed directions; both are means over the blocks that either steers or reads.
        ordinary, shown: mean readings, along each model's own threshold direction and in its own units. alarms: shares
            of (ordinary prompts, prompts that ask for the trait).
        effect: mean change of the log-odds from minus to plus the vector's strength.
    """

    name: str
    same_vector: bool
    files_cosine: float | None
    cosine: float | None
    blocks: tuple[int | None, int | None]
    ordinary: tuple[float | None, float | None]
    shown: tuple[float | None, float | None]
    alarms: tuple[tuple[float, float] | None, tuple[float, float] | None]
    effect: tuple[float | None, float | None]


@dataclass(frozen=True)
class Comparison:
    """What two tracked models differ in.

    Args:
        differs: which parts of the files, in words; "" for the same fingerprint.
        vectors: those that both were tracked with; only: names of those of the first, and of the second, alone.
        shifts: of each trait, from the first to the second; none where their shapes differ.
    """

    first: TrackedModel
    second: TrackedModel
    differs: str
    vectors: tuple[VectorComparison, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    shifts: tuple[Shift, ...]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


# -- measuring --------------------------------------------------------------------------------------------------------


def describe(model: Model, label: str | None = None) -> TrackedModel:
    """How the registry names an open model."""
    identity = {part: digest for part, digest in model.identity.items() if part != "fingerprint"}
    file = model.path.name.encode("utf-8", "backslashreplace").decode()  # not every name is one, and the table is UTF-8
    return TrackedModel(
        model.fingerprint, model.name, file, model.architecture, model.n_layer, model.n_embd, identity, label
    )


def track_model(
    model: Model,
    vectors: Sequence[PersonaVector],
    registry: Registry,
    *,
    label: str | None = None,
    progress: Progress | None = None,
) -> TrackedModel:
    """Store a model and vectors on it: their thresholds, and what fixed texts give now. All of it, or nothing.

    A vector without a last-prompt-token direction, or on a model without a system role, is stored without a threshold.
    What was stored of the same model before stays; the newest counts. Its profile is not measured again on the same
    texts with the same build of llama.cpp.

    Raises:
        ArgumentError: a label that is empty or another model's. VectorError: a vector without layers to steer at.
        ModelError: figures that are not finite. RegistryError. And as thresholds_for.
    """
    tracked = describe(model, label)
    with registry.rehearsal():
        registry.add_model(tracked)
    chosen = {kept.digest: (kept, vector) for vector in vectors for kept in [TrackedVector.of(vector)]}
    for _, vector in chosen.values():
        check_fits(vector, model)
    before = [kept.load() for kept, _ in registry.vectors(model.fingerprint)]
    subjects = subjects_of([trait_of(v) for v in (*before, *(v for _, v in chosen.values()))])
    weight = WEIGHTS["ordinary"] + WEIGHTS["vector"] * len(chosen)
    meter = Meter(progress, WEIGHTS["thresholds"] + WEIGHTS["profile"] + weight)
    watched = {d: v for d, (_, v) in chosen.items() if v.last_prompt is not None and model.takes_system}
    found = thresholds_for(model, list(watched.values()), progress=meter.part(WEIGHTS["thresholds"]))
    thresholds = dict(zip(watched, found, strict=True))
    part = meter.part(WEIGHTS["profile"])
    stored = registry.latest(model=model.fingerprint, kind=PROFILE)
    if stored is None or stored.content != _origin(subjects):
        profile = _sound(model, measure_profile(model, list(subjects.values()), progress=part))
        stored = _of_profile(model, profile, subjects)
    asked = {digest: (vector, thresholds.get(digest), None) for digest, (_, vector) in chosen.items()}
    replays = _replay(model, asked, meter.part(weight))
    with registry.transaction():
        registry.add_model(tracked)
        registry.add_evaluation(stored)
        for digest, (kept, vector) in chosen.items():
            registry.add_vector(kept)
            registry.set_threshold(model.fingerprint, digest, thresholds.get(digest))
            registry.add_evaluation(_of_replay(model, digest, vector, replays[digest]))
        return registry.model(model.fingerprint)


def _sound(model: Model, profile: Profile) -> Profile:
    """Raises ModelError where a broken file gives no figures."""
    figures: list[NDArray[Any]] = [profile.states, *profile.log_odds.values()]
    if not all(np.isfinite(x).all() for x in figures):
        raise ModelError(f"{model.path.name}: its figures are not finite, the file is damaged")
    return profile


def subjects_of(own: Sequence[Trait]) -> dict[str, Trait]:
    """Whom a profile is about: the library's traits, and the vectors' own, which come first of one name."""
    library = {name: traits.get(name) for name in traits.names()}
    return library | {t.name: t for t in reversed(own)}


def _replay(
    model: Model,
    asked: Mapping[str, tuple[PersonaVector, Threshold | None, tuple[Cell, ...] | None]],
    progress: Progress | None,
) -> dict[str, Replay]:
    """Of each (vector, its threshold, its comparisons or None for the trait's own)."""
    meter = Meter(progress, WEIGHTS["ordinary"] + WEIGHTS["vector"] * len(asked))
    prompts = fresh_prompts()
    read, part = any(t is not None for _, t, _ in asked.values()), meter.part(WEIGHTS["ordinary"])
    states = last_states(model, [prompt for prompt, _ in prompts], part) if read else None
    out = {}
    for digest, (vector, threshold, cells) in asked.items():
        each = Meter(meter.part(WEIGHTS["vector"]), 10)
        trait = trait_of(vector)
        directions, ordinary, shown, part = None, None, None, each.part(7)
        if model.takes_system:
            high, low = np.split(last_states(model, prompted(trait, trait.derive_questions), part), 2)
            directions = (high.mean(0, dtype=np.float64) - low.mean(0, dtype=np.float64)).astype(np.float32)
            if threshold is not None and states is not None:
                others = [i for i, (_, whose) in enumerate(prompts) if whose != trait.name]
                ordinary, shown = (threshold.readings(s) for s in (states[others], high))
        if cells is None:
            questions = trait.evaluate_questions[:N_CELLS]
            pairs_of = trait.evaluation_pairs
            cells = make_cells(questions, pairs_of, 1) if pairs_of else answer_cells(model, trait, questions)
        out[digest] = Replay(cells, _doses(model, vector, cells, each.part(3)), directions, ordinary, shown)
    return out


def fresh_prompts() -> list[tuple[tuple[Conversation, str | None], str]]:
    """((prompt, system prompt), the trait whose library it is from), as those that thresholds are calibrated on."""
    return [(everyday_prompt(q), name) for q, name in clean_prompts(held_out=True)[:N_ORDINARY]]


def _doses(
    model: Model, vector: PersonaVector, cells: Sequence[Cell], progress: Progress | None
) -> NDArray[np.float64]:
    if not cells:
        return np.zeros((3, 0))
    steers = [replace(vector * s, scope="response") for s in (-vector.strength, 0.0, vector.strength)]
    return cell_log_odds(model, cells, steers, progress=progress)


# -- as evaluations ---------------------------------------------------------------------------------------------------


def texts_of(subjects: Mapping[str, Trait]) -> dict[str, str]:
    """Digests of the fixed texts: of each trait, and of the ordinary prompts ("")."""
    return {"": digest_of(clean_prompts(held_out=True), fresh_prompts())} | {
        name: digest_of(trait.as_dict()) for name, trait in subjects.items()
    }


def _texts_of(vector: PersonaVector) -> dict[str, str]:
    trait = trait_of(vector)
    return texts_of({trait.name: trait})


def _origin(subjects: Mapping[str, Trait]) -> dict[str, Any]:
    """What a profile depends on beside its model."""
    return {"texts": texts_of(subjects), "build": build_id()}


def _of_profile(model: Model, profile: Profile, subjects: Mapping[str, Trait]) -> Evaluation:
    """With the mean of the states, and directions of length 1."""
    arrays: dict[str, NDArray[Any]] = {
        "states": profile.states.mean(0, dtype=np.float64).astype(np.float32),
        "norms": profile.norms,
    }
    for name, values in profile.log_odds.items():
        arrays[f"log_odds/{name}"] = values
    for name, rows in profile.directions.items():
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        arrays[f"direction/{name}"] = (rows / np.where(lengths > 0, lengths, 1)).astype(np.float16)
    return Evaluation(PROFILE, model.fingerprint, _origin(subjects), arrays)


def profile_of(found: Evaluation) -> Profile:
    def under(prefix: str) -> dict[str, NDArray[Any]]:
        return {name.removeprefix(prefix): a for name, a in found.arrays.items() if name.startswith(prefix)}

    directions = {name: rows.astype(np.float32) for name, rows in under("direction/").items()}
    return Profile(under("log_odds/"), found.arrays["states"][None], found.arrays["norms"], directions)


def _of_replay(model: Model, digest: str, vector: PersonaVector, found: Replay) -> Evaluation:
    cells = [[c.question, c.trait, c.anti] for c in found.cells]
    content = {"cells": cells, "strength": vector.strength, "texts": _texts_of(vector)}
    arrays = {"log_odds": found.log_odds, "directions": found.directions}
    arrays |= {"ordinary": found.ordinary, "shown": found.shown}
    return Evaluation(VECTOR, model.fingerprint, content, {k: a for k, a in arrays.items() if a is not None}, digest)


def _replay_of(found: Evaluation) -> Replay:
    cells = tuple(Cell(*texts) for texts in found.content["cells"])
    arrays = found.arrays
    return Replay(cells, arrays["log_odds"], arrays.get("directions"), arrays.get("ordinary"), arrays.get("shown"))


def _latest(registry: Registry, kind: str, model: TrackedModel, vector: str | None = None) -> Evaluation:
    found = registry.latest(model=model.fingerprint, kind=kind, vector=vector)
    if found is None:
        raise RegistryError(f"{registry.path}: {model.title} was added without measurements: add it again")
    return found


# -- checking ---------------------------------------------------------------------------------------------------------


def check_model(
    model: Model, registry: Registry, *, against: str | None = None, progress: Progress | None = None
) -> Check:
    """Replay on a model what was measured on a tracked one, and say what of its vectors and thresholds still holds.

    - `reuse`: the replayed directions agree (mean cosine at least 0.8), ordinary prompts alarm as often as calibrated
      (their shares above `watch` and `alarm` within binomial intervals of 99.9 %), prompts that ask for the trait no
      more seldom than before (likewise), and the vector's effect is 0.5 to 2 times what it was.
    - `recalibrate`: the directions agree, but the alarms do not, the effect has grown beyond that, or the thresholds
      are of another chat template or tokenizer.
    - `re-derive`: the directions do not agree, or the effect has fallen below half.
    - `suspicious`: the model has shifted along a trait (see Shift), whatever else. Under another chat template or
      tokenizer only the words are compared: the stream at the last prompt token is then something else.

    Args:
        against: label or fingerprint of the tracked model; when None the same file, else the one of the same
            architecture and shape that was added last.

    Raises:
        ModelError: a model of another architecture or shape than `against`.
        RegistryError: no such model, or one that was measured on other texts, by another version.
    """
    base = registry.model(against) if against is not None else _most_recent(model, registry)
    checked = describe(model)
    with registry.rehearsal():
        registry.add_evaluation(Evaluation(CHECK, base.fingerprint, {}))
    if checked.fingerprint == base.fingerprint:
        found = Check(checked, base, OUTCOMES[0], ("the same fingerprint: nothing has changed",), "")
    else:
        if _shape(checked) != _shape(base):
            raise ModelError(f"{checked.file} is {_shape(checked)}, {base.title} is {_shape(base)}: not comparable")
        with _unwarned():
            found = _checked(model, checked, base, registry, progress)
    registry.add_evaluation(Evaluation(CHECK, base.fingerprint, found.as_dict()))
    return found


def _shape(model: TrackedModel) -> str:
    return f"a {model.architecture} of {model.n_layer} blocks of width {model.n_embd}"


def _most_recent(model: Model, registry: Registry) -> TrackedModel:
    here = describe(model)
    alike = [m for m in registry.models() if _shape(m) == _shape(here)]
    for m in alike:
        if m.fingerprint == here.fingerprint:
            return m
    if not alike:
        known = "; ".join(f"{m.title} ({_shape(m)})" for m in registry.models()) or "none"
        raise RegistryError(f"{here.file} is {_shape(here)}, and no tracked model is like that; tracked: {known}")
    return max(alike, key=lambda m: _latest(registry, PROFILE, m).number)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without the warnings of vectors and thresholds of another file: whether that matters is what is found out."""

    def wanted(record: logging.LogRecord) -> bool:
        return record.funcName not in ("check", "check_fits")

    log.addFilter(wanted)
    try:
        yield
    finally:
        log.removeFilter(wanted)


def _checked(
    model: Model, checked: TrackedModel, base: TrackedModel, registry: Registry, progress: Progress | None
) -> Check:
    stored = _latest(registry, PROFILE, base)
    kept = registry.vectors(base.fingerprint)
    vectors = {k.digest: k.load() for k, _ in kept}
    before = profile_of(stored)
    subjects = _same_subjects(stored, [trait_of(v) for v in vectors.values()], base)
    old = {}
    for k, _ in kept:
        found = _latest(registry, VECTOR, base, k.digest)
        if found.content["texts"] != _texts_of(vectors[k.digest]):
            raise RegistryError(f"{k.name} on {base.title} {OTHER_TEXTS}")
        old[k.digest] = _replay_of(found)
    refused: dict[str, str] = {}
    for k, threshold in kept:
        try:
            if threshold is not None:
                threshold.check(model)
        except ModelError as e:
            refused[k.digest] = str(e)
    weight = WEIGHTS["ordinary"] + WEIGHTS["vector"] * len(kept)
    meter = Meter(progress, WEIGHTS["profile"] + weight)
    measured = [t for name, t in subjects.items() if name in before.log_odds]
    now = _sound(model, measure_profile(model, measured, directions=False, progress=meter.part(WEIGHTS["profile"])))
    if base.identity.get("metadata") == checked.identity.get("metadata"):
        shifts = compare_profiles(before, now, whole_states(vectors.values(), base.n_layer))
    else:
        shifts = compare_profiles(replace(before, directions={}), now)
    asked = {k.digest: (vectors[k.digest], None if k.digest in refused else t, old[k.digest].cells) for k, t in kept}
    new = _replay(model, asked, meter.part(weight))
    flagged = {s.trait: s for s in shifts if s.suspicious}
    judged = [
        _judge(k, vectors[k.digest], t, refused.get(k.digest), old[k.digest], new[k.digest], flagged) for k, t in kept
    ]
    worst = max([OUTCOMES.index(v.outcome) for v in judged], default=0)
    outcome = OUTCOMES[-1] if flagged else OUTCOMES[worst]
    reasons = [str(s) for s in flagged.values()]
    named = sorted(judged, key=lambda v: -OUTCOMES.index(v.outcome))
    reasons += [f"{v.name}: {v.outcome}, {v.reasons[0]}" for v in named if v.outcome not in ("reuse", "suspicious")]
    if not reasons:
        reasons = [f"{_vectors(len(judged))} and the model's answers to {len(measured)} traits' questions hold"]
    if stored.content.get("build") != build_id():
        reasons.append(f"{base.title} was measured by another build of llama.cpp, which alone changes figures a little")
    differs = differences(base.identity, checked.identity)
    return Check(checked, base, outcome, tuple(reasons), differs, tuple(judged), tuple(shifts))


def _vectors(n: int) -> str:
    return f"{n} vector" if n == 1 else f"{n} vectors"


def _same_subjects(stored: Evaluation, own: Sequence[Trait], base: TrackedModel) -> dict[str, Trait]:
    """The traits of a stored profile. Raises RegistryError where their texts have changed since."""
    texts: Mapping[str, str] = stored.content["texts"]
    try:
        known = subjects_of(own)
        subjects = {name: known[name] for name in texts if name}
        if texts_of(subjects) == texts:
            return subjects
    except (KeyError, TraitError):
        pass
    raise RegistryError(f"{base.title} {OTHER_TEXTS}")


def _judge(
    kept: TrackedVector,
    vector: PersonaVector,
    threshold: Threshold | None,
    refused: str | None,
    old: Replay,
    new: Replay,
    flagged: Mapping[str, Shift],
) -> VectorCheck:
    """See `check_model`."""
    reuse, recalibrate, rederive, suspicious = OUTCOMES
    said: list[tuple[str, str]] = []
    shift = flagged.get(trait_of(vector).name)
    if shift is not None:
        said.append((suspicious, f"the model itself has shifted along {shift.trait!r}"))

    blocks = tuple(sorted({*vector.layers, *([threshold.layer] if threshold else [])}))
    cosine: float | None = None
    cosines: tuple[float, ...] = ()
    if old.directions is None or new.directions is None:
        said.append((reuse, "its direction was not replayed: no system role"))
    else:
        cosines = _cosines(old.directions, new.directions, blocks)
        cosine = float(np.mean(cosines))
        holds = cosine >= LEAST_COSINE
        words = f"the replayed direction has cosine {cosine:.2f} with the one before"
        said.append((reuse, words) if holds else (rederive, f"{words}, less than {LEAST_COSINE:g}"))

    alarms = watches = shown = None
    n_ordinary = n_shown = 0
    if threshold is None:
        said.append((reuse, "it has no threshold to compare"))
    elif refused is not None:
        said.append((recalibrate, refused))
    elif old.ordinary is None or old.shown is None or new.ordinary is None or new.shown is None:
        said.append((recalibrate, "its threshold could not be tried: no system role"))
    else:
        n_ordinary, n_shown = len(new.ordinary), len(new.shown)
        alarms = _above(threshold.alarm, old.ordinary, new.ordinary)
        watches = _above(threshold.watch, old.ordinary, new.ordinary)
        shown = _above(threshold.alarm, old.shown, new.shown)
        for k, percentile, what in ((alarms[1], ALARM, "alarm"), (watches[1], WATCH, "are watched or alarm")):
            share = 1 - percentile / 100
            low, high = wilson_interval(k, n_ordinary, LEVEL)
            words = f"{k} of {n_ordinary} ordinary prompts {what}, calibrated for {share:.0%}"
            said.append((reuse if low <= share <= high else recalibrate, words))
        words = f"{shown[1]} of {n_shown} prompts that ask for it alarm, {shown[0]} before"
        fewest = n_shown * wilson_interval(shown[0], n_shown, LEVEL)[0]
        said.append((reuse if shown[1] >= fewest else recalibrate, words))

    effect, ratio = None, None
    if new.cells:
        effect = (float(old.effects.mean()), float(new.effects.mean()))
        words = f"its effect is {effect[1]:+.2f} nats per token, {effect[0]:+.2f} before"
        low, high = bootstrap_interval(old.effects)
        if low <= 0 <= high:
            said.append((reuse, f"{words}: too small for a ratio"))
        else:
            ratio = effect[1] / effect[0]
            low, high = EFFECT_BAND
            outcome = rederive if ratio < low else recalibrate if ratio > high else reuse
            said.append((outcome, f"{words} ({ratio:.2f} times; {low:g} to {high:g} is taken as the same)"))
    else:
        said.append((reuse, "its trait has no questions to measure its effect on"))

    said.sort(key=lambda finding: -OUTCOMES.index(finding[0]))
    return VectorCheck(
        kept.name, kept.digest, said[0][0], tuple(words for _, words in said), blocks, cosine, cosines,
        n_ordinary, alarms, watches, n_shown, shown, vector.strength, effect, ratio,
    )  # fmt: skip


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32], blocks: Sequence[int]) -> tuple[float, ...]:
    """0 where a direction has no length."""
    x, y = a[list(blocks)].astype(np.float64), b[list(blocks)].astype(np.float64)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return tuple(float(c) for c in np.nan_to_num((x * y).sum(1) / np.where(lengths > 0, lengths, 1)))


def _above(limit: float, old: NDArray[np.float64], new: NDArray[np.float64]) -> tuple[int, int]:
    return int((old >= limit).sum()), int((new >= limit).sum())


# -- comparing --------------------------------------------------------------------------------------------------------


def compare_models(registry: Registry, first: str, second: str) -> Comparison:
    """What two tracked models (labels or fingerprints) differ in, from what is stored of them.

    Raises RegistryError where there is no such model, or where they were measured on other ordinary prompts.
    """
    a, b = registry.model(first), registry.model(second)
    stored = [_latest(registry, PROFILE, m) for m in (a, b)]
    alike = _shape(a) == _shape(b)
    texts = [s.content["texts"] for s in stored]
    if alike and texts[0][""] != texts[1][""]:
        raise RegistryError(f"{a.title} and {b.title} were measured on other texts, by other versions: add both again")
    kept = [{k.digest: (k.load(), t) for k, t in registry.vectors(m.fingerprint)} for m in (a, b)]
    pairs = [(d, d) for d in kept[0] if d in kept[1]]
    left = [{v.name: d for d, (v, _) in k.items() if (d, d) not in pairs} for k in kept]  # the newest of a name
    pairs += [(d, left[1][name]) for name, d in left[0].items() if name in left[1]]
    only = [
        tuple(sorted(v.name for d, (v, _) in k.items() if d not in {pair[side] for pair in pairs}))
        for side, k in enumerate(kept)
    ]
    found = []
    for x, y in pairs:
        replays = [_replay_of(_latest(registry, VECTOR, m, d)) for m, d in ((a, x), (b, y))]
        found.append(_compared(kept[0][x], kept[1][y], replays[0], replays[1], x == y, alike))
    shifts: list[Shift] = []
    if alike:
        profiles = [profile_of(s) for s in stored]
        common = [name for name in profiles[0].log_odds if texts[0].get(name) == texts[1].get(name)]
        before, after = (replace(p, log_odds={n: p.log_odds[n] for n in common}) for p in profiles)
        same_template = a.identity.get("metadata") == b.identity.get("metadata")
        vectors = whole_states([v for v, _ in kept[0].values()], a.n_layer) if same_template else []
        shifts = compare_profiles(before if same_template else replace(before, directions={}), after, vectors)
    same = a.fingerprint == b.fingerprint
    differs = "" if same else differences(a.identity, b.identity) if alike else "another architecture or shape"
    return Comparison(a, b, differs, tuple(found), (only[0], only[1]), tuple(shifts))


def _compared(
    a: tuple[PersonaVector, Threshold | None],
    b: tuple[PersonaVector, Threshold | None],
    first: Replay,
    second: Replay,
    same: bool,
    alike: bool,
) -> VectorComparison:
    blocks = sorted({*a[0].layers, *b[0].layers, *(t.layer for _, t in (a, b) if t is not None)})
    cosine = files = None
    if alike:
        if first.directions is not None and second.directions is not None:
            cosine = float(np.mean(_cosines(first.directions, second.directions, blocks)))
        if not same:
            both = [il for il in blocks if il in a[0].usable_layers and il in b[0].usable_layers]
            files = float(np.mean(_cosines(a[0].directions, b[0].directions, both))) if both else None
    sides = ((a[1], first), (b[1], second))

    def of_both(what: Any) -> Any:
        return tuple(what(t, r) for t, r in sides)

    def shares(t: Threshold | None, r: Replay) -> tuple[float, float] | None:
        if t is None or r.ordinary is None or r.shown is None:
            return None
        return float((r.ordinary >= t.alarm).mean()), float((r.shown >= t.alarm).mean())

    return VectorComparison(
        a[0].name,
        same,
        files,
        cosine,
        of_both(lambda t, _: None if t is None else t.layer),
        of_both(lambda _, r: None if r.ordinary is None else float(r.ordinary.mean())),
        of_both(lambda _, r: None if r.shown is None else float(r.shown.mean())),
        of_both(shares),
        of_both(lambda _, r: float(r.effects.mean()) if r.cells else None),
    )
