"""One look at a whole model: what its file is, what character it has, whether it can be steered and watched, and what
changed. The log is audit.json; the page is made of nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from personasteer._native import build_id
from personasteer.derive import derive
from personasteer.engine import Progress
from personasteer.errors import ArgumentError, ModelError, PersonasteerError, TemplateError, TraitError, VectorError
from personasteer.evaluate import Evaluation, cross_talk, evaluate, trait_of
from personasteer.identity import check_model_file, differences
from personasteer.model import Model
from personasteer.monitor.audit.file import describe_file, examine_template
from personasteer.monitor.audit.log import (
    SCHEMA,
    ComparisonEntry,
    FileEntry,
    MonitorEntry,
    ProfileEntry,
    ShiftEntry,
    TraitEntry,
    VectorChange,
    VectorEntry,
    encode,
    logged_profile,
    parse_log,
    read_audit,
    shown,
)
from personasteer.monitor.audit.page import findings, not_tested
from personasteer.monitor.profile import (
    N_PROMPTS,
    N_QUESTIONS,
    Profile,
    Shift,
    compare_profiles,
    measure_profile,
    measure_words,
)
from personasteer.monitor.registry import Registry, TrackedVector
from personasteer.monitor.thresholds import Threshold, last_states, prompted, thresholds_for
from personasteer.monitor.tracking import PROFILE, fresh_prompts, profile_of, subjects_of, texts_of
from personasteer.progress import Meter
from personasteer.ship.fields import read_fields
from personasteer.statistics import bootstrap_interval, wilson_interval
from personasteer.steering import check_fits
from personasteer.traits import Trait, find
from personasteer.vectors import PersonaVector
from personasteer.work import Work, digest

TRAITS = ("sycophantic", "hallucinating", "toxic", "pessimistic", "formal")  # steered by where no vector is given
DERIVE_QUESTIONS = 6  # that a trait's continuations answer, of a vector that is derived here
N_COHERENCE = 4
AT_ONCE = 6  # traits of a profile that are kept together
NO_NUMBERS = "what the model computes are no numbers"
LASTING = ArgumentError, TemplateError, TraitError, VectorError  # the same command would meet them again

Stage: TypeAlias = Callable[[str], Progress]


class _NotNow(Exception):  # noqa: N818
    """What cannot be measured this time."""


@dataclass(frozen=True)
class Earlier:
    """What a model is compared with. texts: digest of its tokenizer and template, "" where only `identity` tells;
    asked: digests of the texts that its profile is of. vectors: of each name (effect, AUROC).
    """

    against: Literal["base", "previous"]
    name: str
    fingerprint: str
    identity: Mapping[str, str]
    texts: str
    profile: Profile
    asked: Mapping[str, str]
    vectors: Mapping[str, tuple[float | None, float | None]]


def load_earlier(where: str | os.PathLike[str]) -> Earlier:
    """A previous audit: its folder or audit.json; or the label or fingerprint of a model that `track add` stored.

    Raises ArgumentError where it is none of these.
    """
    if Path(where).exists():
        log = parse_log(read_audit(where))
        if log.profile is None:
            raise ArgumentError(f"{where}: that audit measured no profile: nothing to compare with")
        figures = {v.name: _figures(v) for v in log.vectors}
        file = log.file
        return Earlier("previous", file.name, file.fingerprint, file.identity, file.texts, logged_profile(log),
                       log.profile.texts, figures)  # fmt: skip
    try:
        with Registry(create=False) as registry:
            model = registry.model(str(where))
            stored = registry.latest(model=model.fingerprint, kind=PROFILE)
    except PersonasteerError as e:
        raise ArgumentError(f"{where}: neither an audit (a folder, an audit.json) nor a tracked model ({e})") from e
    if stored is None:
        raise ArgumentError(f"{where}: was tracked without measurements: add it again")
    return Earlier("previous", model.title, model.fingerprint, model.identity, "", profile_of(stored),
                   stored.content["texts"], {})  # fmt: skip


def _figures(v: VectorEntry) -> tuple[float | None, float | None]:
    return v.evaluation.dose[-1].delta if v.evaluation else None, v.monitor.auroc if v.monitor else None


def audit_model(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    previous: Earlier | None = None,
    vectors: Sequence[PersonaVector] = (),
    traits: Sequence[str] | None = None,
    n_questions: int = 8,
    n_random: int = 12,
    seed: int = 0,
    n_ctx: int = 512,
    n_threads: int | None = None,
    n_gpu_layers: int = -1,
    work: str | os.PathLike[str] | None = None,
    stage: Stage | None = None,
) -> dict[str, Any]:
    """The log of an audit, as plain data: what `write_audit` writes and `render_audit` shows.

    Models are open one after the other. What cannot be measured on a model is left out and named in the log.

    Args:
        base: the model that it is a version of; compared by profile, see compare_profiles.
        previous: an earlier audit, or a tracked model, to compare with; see `load_earlier`.
        vectors: to test; vectors of `traits` are derived here from their written continuations.
        traits: names, or paths of .toml or .json files; TRAITS when None and no vector is given.
        n_questions: held-out questions for each vector's effect. n_random: random vectors beside it.
        work: folder in which finished parts are kept; started again with it, an interrupted audit goes on.
        stage: called with the name of each part; gives its progress callback.

    Raises:
        ModelError: no language model, or none that loads. IncompatibleVector: a vector for another shape.
        TraitError: an unknown trait. ArgumentError: a work folder of another audit.
    """
    stage = stage or (lambda _: lambda done, total: None)
    for given in (path, base):
        if given is not None:
            check_model_file(given)
    fields = read_fields(path)
    file = describe_file(Path(path), fields)
    base_file = None if base is None else describe_file(Path(base), read_fields(base))
    derived = [find(t) for t in (traits if traits is not None else () if vectors else TRAITS)]
    subjects = subjects_of([*(t for v in vectors if (t := _trait(v)) is not None), *derived])
    sizes = {"questions": n_questions, "random": n_random, "profile_questions": N_QUESTIONS, "n_ctx": n_ctx}
    versions = {name: version(name) for name in ("personasteer", "llama-cpp-python")}
    plan = {
        "model": file.fingerprint,
        "base": None if base_file is None else base_file.fingerprint,
        "compared": previous is not None,
        "vectors": [TrackedVector.of(v).digest for v in vectors],
        "traits": [digest(t.as_dict()) for t in derived],
        "build": build_id(),
        "threads": n_threads,
        "seed": seed,
        **versions,
        **sizes,
    }
    options: dict[str, Any] = {"n_ctx": n_ctx, "n_parallel": 16, "n_threads": n_threads, "n_gpu_layers": n_gpu_layers}
    template = examine_template(fields)
    profile, of_base, why_no_profile, why_no_base = None, None, template.trouble, ""
    entries: list[VectorEntry] = []
    talk = None
    with Work(None if work is None else Path(work), plan) as kept:
        if not template.trouble:
            with Model(path, seed=seed, **options) as m:
                for vector in vectors:
                    check_fits(vector, m)
                run = _Run(m, kept, None if work is None else Path(work), stage, seed)
                sizes["threads"] = m.n_threads
                profile, why_no_profile = run.profile("profile", subjects, directions=previous is not None)
                entries, talk = run.vectors(vectors, derived, n_questions, n_random)
        if base is not None and profile is not None:
            why_no_base = examine_template(read_fields(base)).trouble
            if not why_no_base:
                try:
                    with Model(base, seed=seed, **options) as m:
                        run = _Run(m, kept, None, stage, seed)
                        of_base, why_no_base = run.profile("profile of the base", subjects, directions=True)
                except ModelError as e:
                    why_no_base = shown(str(e).replace(str(base), Path(base).name))
    texts = texts_of(subjects)
    comparisons = []
    if profile is not None:
        own = [v for v in vectors if v.n_layer == file.n_layer and (t := _trait(v)) and t.name not in profile.log_odds]
        if base_file is not None and of_base is not None:
            of_file = (base_file.name, base_file.fingerprint, base_file.identity, base_file.texts)
            before = Earlier("base", *of_file, of_base, texts, {})
            comparisons.append(_compare(before, file, profile, texts, own, [], seed))
        if previous is not None:
            comparisons.append(_compare(previous, file, profile, texts, own, entries, seed))
    log: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": versions,
        "build": build_id(),
        "seed": seed,
        "sizes": sizes,
        "findings": [],
        "file": file.model_dump(),
        "template": template.model_dump(),
        "profile": None if profile is None else _profile_entry(profile, texts, seed).model_dump(),
        "vectors": [v.model_dump() for v in entries],
        "cross_talk": talk,
        "comparisons": [c.model_dump() for c in comparisons],
        "not_tested": [],
    }
    for v in log["vectors"]:
        if v["evaluation"] is not None:
            del v["evaluation"]["cells"]
    found = parse_log(json.loads(json.dumps(log)))
    log["not_tested"] = [n.model_dump() for n in not_tested(found, subjects, why_no_profile, why_no_base)]
    log["findings"] = [f.model_dump() for f in findings(parse_log(log), why_no_profile, why_no_base)]
    plain: dict[str, Any] = json.loads(json.dumps(log, allow_nan=False))
    return plain


def _trait(vector: PersonaVector) -> Trait | None:
    try:
        return trait_of(vector)
    except PersonasteerError:
        return None


@dataclass(frozen=True)
class _Run:
    """An open model, and where what is measured on it is kept."""

    model: Model
    kept: Work
    work: Path | None
    stage: Stage
    seed: int

    def why(self, e: PersonasteerError) -> str:
        """An error without the place of the file, which is no part of a report."""
        path = self.model.path
        return shown(" ".join(str(e).replace(str(path), self.model.name).replace(path.name, self.model.name).split()))

    def part(self, name: str, compute: Callable[[], tuple[dict[str, NDArray[Any]], Any]]) -> tuple[Any, Any, str]:
        """(arrays, rest, "") of a part; (None, None, the reason) where it cannot be measured, which is kept where it
        lies in the model or the vector.
        """

        def kept() -> tuple[dict[str, NDArray[Any]], Any]:
            try:
                arrays, rest = compute()
                json.dumps(rest, allow_nan=False)
            except LASTING as e:
                return {}, {"why": self.why(e)}
            except PersonasteerError as e:
                raise _NotNow(self.why(e)) from e
            except ValueError:
                return {}, {"why": NO_NUMBERS}
            return arrays, {"rest": rest}

        try:
            arrays, found = self.kept.part(name, kept)
        except _NotNow as e:
            return None, None, str(e)
        return (None, None, found["why"]) if "why" in found else (arrays, found["rest"], "")

    def profile(self, name: str, subjects: Mapping[str, Trait], *, directions: bool) -> tuple[Profile | None, str]:
        """The profile, with the mean of its states; or why there is none. Kept every few traits."""
        wanted = list(subjects.values())
        meter = Meter(self.stage(name), len(wanted))
        log_odds: dict[str, NDArray[np.float64]] = {}
        under: dict[str, NDArray[np.float32]] = {}
        states, norms = None, None
        for begin in range(0, max(1, len(wanted)), AT_ONCE):
            some = wanted[begin : begin + AT_ONCE]
            compute = partial(self._some_of_profile, some, directions, begin == 0, meter.part(len(some)))
            arrays, names, why = self.part(f"{name.replace(' ', '-')}-{begin // AT_ONCE}", compute)
            if why:
                return None, why
            log_odds |= {n: arrays[f"log_odds/{n}"] for n in names}
            under |= {n: arrays[f"directions/{n}"] for n in names if f"directions/{n}" in arrays}
            if begin == 0:
                states, norms = arrays["states"], arrays["norms"]
        assert states is not None
        assert norms is not None
        return Profile(log_odds, states, norms, under), ""

    def _some_of_profile(
        self, wanted: Sequence[Trait], directions: bool, first: bool, progress: Progress | None
    ) -> tuple[dict[str, NDArray[Any]], Any]:
        """Of some traits; with the states where they are the first."""
        if self.model.unhooked:
            found = _words_only(self.model, wanted, progress)
        else:
            n_prompts = N_PROMPTS if first else 1
            found = measure_profile(self.model, wanted, n_prompts=n_prompts, directions=directions, progress=progress)
        if not all(np.isfinite(values).all() for values in found.log_odds.values()):
            raise ModelError(NO_NUMBERS)
        arrays: dict[str, NDArray[Any]] = {f"log_odds/{n}": values for n, values in found.log_odds.items()}
        arrays |= {f"directions/{n}": rows for n, rows in found.directions.items()}
        if first:
            mean = found.states.mean(0, dtype=np.float64).astype(np.float32)
            arrays |= {"norms": found.norms, "states": mean[None]}
        return arrays, list(found.log_odds)

    def vectors(
        self, given: Sequence[PersonaVector], derived: Sequence[Trait], n_questions: int, n_random: int
    ) -> tuple[list[VectorEntry], dict[str, Any] | None]:
        """Every vector with its effect and its monitor, and the cross-talk of those with an effect."""
        why = "the model cannot be steered" if self.model.unhooked else ""
        made: list[tuple[PersonaVector | None, str]] = [(v, "") for v in given]
        made += [self._derived(t, k, why) for k, t in enumerate(derived)]
        names = [v.name for v in given] + [t.name for t in derived]
        thresholds, fresh, no_monitor = self._thresholds([v for v, _ in made], why)
        entries, evaluated = [], []
        for k, ((vector, failed), name) in enumerate(zip(made, names, strict=True)):
            evaluation = None
            why_not: dict[str, str] = {}
            if vector is None:
                why_not = dict.fromkeys(("vector", "evaluation", "monitor"), failed)
            else:
                evaluation, reason = self._evaluation(vector, k, n_questions, n_random, why)
                why_not |= {"evaluation": reason} if reason else {}
                why_not |= {"monitor": no_monitor[k]} if k not in thresholds else {}
            if vector is not None and evaluation is not None:
                evaluated.append((vector, evaluation))
            entries.append(
                VectorEntry(
                    name=shown(name, 80),
                    trait=evaluation.trait if evaluation else shown(name, 80),
                    given=k < len(given),
                    layers=list(vector.layers) if vector is not None else [],
                    strength=vector.strength if vector is not None else None,
                    evaluation=evaluation,
                    monitor=_monitored(thresholds[k], fresh[k]) if k in thresholds else None,
                    why_not=why_not,
                )
            )
        if len(evaluated) < 2:
            return entries, None
        of, evaluations = zip(*evaluated, strict=True)
        arrays, _, failed = self.part("cross-talk", lambda: ({"delta": cross_talk(self.model, of, evaluations)}, None))
        if failed:
            return entries, None
        names = [shown(v.name, 80) for v in of]
        return entries, {"vectors": names, "traits": [e.trait for e in evaluations], "delta": arrays["delta"].tolist()}

    def _derived(self, trait: Trait, k: int, why: str) -> tuple[PersonaVector | None, str]:
        """The vector of a trait's continuations, with directions at the last prompt token, for a monitor: the
        difference of means under its system prompts and their opposites.
        """
        if why:
            return None, why
        progress = self.stage(f"deriving {trait.name}")
        work = None if self.work is None else self.work / f"derive-{k}"
        try:
            vector = derive(self.model, trait, continuations=True, n_questions=DERIVE_QUESTIONS, work=work,
                            seed=self.seed, progress=progress)  # fmt: skip
        except PersonasteerError as e:
            return None, self.why(e)
        if not self.model.takes_system:
            return vector, ""

        def compute() -> tuple[dict[str, NDArray[Any]], Any]:
            asked = prompted(trait, trait.derive_questions[:DERIVE_QUESTIONS])
            high, low = np.split(last_states(self.model, asked, self.stage(f"prompts for {trait.name}")), 2)
            return {"direction": high.mean(0, dtype=np.float64) - low.mean(0, dtype=np.float64)}, None

        arrays, _, failed = self.part(f"last-prompt-{k}", compute)
        return (vector if failed else replace(vector, last_prompt=arrays["direction"])), ""

    def _evaluation(
        self, vector: PersonaVector, k: int, n_questions: int, n_random: int, why: str
    ) -> tuple[Evaluation | None, str]:
        if why:
            return None, why

        def compute() -> tuple[dict[str, NDArray[Any]], Any]:
            progress = self.stage(f"steering by {vector.name}")
            (found,) = evaluate(
                self.model, [vector], n_questions=n_questions, n_pairs=1, n_random=n_random, n_coherence=N_COHERENCE,
                n_items=0, seed=self.seed, progress=progress,
            )  # fmt: skip
            return {}, asdict(found)

        _, rest, failed = self.part(f"evaluation-{k}", compute)
        return (None, failed) if failed else (TypeAdapter(Evaluation).validate_python(rest), "")

    def _thresholds(
        self, vectors: Sequence[PersonaVector | None], why: str
    ) -> tuple[dict[int, Threshold], dict[int, NDArray[np.float64]], dict[int, str]]:
        """By the vectors' places: thresholds, readings of fresh ordinary prompts, and why there are none."""
        at = {k: v for k, v in enumerate(vectors) if v is not None}
        if not why and not self.model.takes_system:
            why = "the chat template takes no system prompt, so nothing asks the model for the trait"
        missing = {
            k: why or "it has no directions at the last prompt token"
            for k, v in at.items()
            if why or v.last_prompt is None or _trait(v) is None
        }
        watched = [k for k in at if k not in missing]

        def compute() -> tuple[dict[str, NDArray[Any]], Any]:
            found = thresholds_for(self.model, [at[k] for k in watched], progress=self.stage("thresholds"))
            prompts = fresh_prompts()
            states = last_states(self.model, [prompt for prompt, _ in prompts], self.stage("fresh prompts"))
            whose = np.array([name for _, name in prompts])
            arrays = {
                str(k): t.readings(states[whose != trait_of(at[k]).name]) for k, t in zip(watched, found, strict=True)
            }
            return arrays, [t.as_dict() for t in found]

        if not watched:
            return {}, {}, missing
        arrays, rest, failed = self.part("thresholds", compute)
        if failed:
            return {}, {}, missing | dict.fromkeys(watched, failed)
        found = {k: Threshold.from_dict(t) for k, t in zip(watched, rest, strict=True)}
        return found, {k: arrays[str(k)] for k in watched}, missing


def _words_only(model: Model, subjects: Sequence[Trait], progress: Progress | None) -> Profile:
    """The log-odds of `measure_profile`, on a model whose stream cannot be read."""
    nothing = np.full((1, model.n_layer, model.n_embd), np.nan, np.float32)
    found = measure_words(model, subjects, progress=progress)
    return Profile(found, nothing, nothing[0, :, 0], {})


def _monitored(t: Threshold, fresh: NDArray[np.float64]) -> MonitorEntry:
    alarms = int((fresh >= t.alarm).sum())
    low, high = wilson_interval(alarms, len(fresh))
    return MonitorEntry(
        layer=t.layer, watch=t.watch, alarm=t.alarm, auroc=t.auroc, n_clean=t.n_clean, n_trait=t.n_trait,
        n_fresh=len(fresh), n_alarms=alarms, low=low, high=high,
    )  # fmt: skip


def _profile_entry(profile: Profile, texts: Mapping[str, str], seed: int) -> ProfileEntry:
    rows = []
    for name, values in profile.log_odds.items():
        low, high = bootstrap_interval(values, seed=seed)
        rows.append(TraitEntry(trait=name, log_odds=values.tolist(), mean=float(values.mean()), low=low, high=high))
    read = bool(np.isfinite(profile.states).all() and np.isfinite(profile.norms).all())
    states, norms = (encode(profile.states[0]), encode(profile.norms)) if read else (None, None)
    asked = {"": texts[""]} | {name: texts[name] for name in profile.log_odds}
    return ProfileEntry(traits=rows, states=states, norms=norms, texts=asked)


def _compare(
    before: Earlier, file: FileEntry, after: Profile, texts: Mapping[str, str], own: Sequence[PersonaVector],
    entries: Sequence[VectorEntry], seed: int,
) -> ComparisonEntry:  # fmt: skip
    """The stream is compared where both models read the same tokens and have the same shape; the words always."""
    notes = []
    common = [n for n in before.profile.log_odds if before.asked.get(n) == texts.get(n) and n in after.log_odds]
    others = sorted({*before.profile.log_odds, *after.log_odds} - {*common})
    if others:
        notes.append(f"left out, since another version asked other questions: {', '.join(others)}")
    first = replace(before.profile, log_odds={n: before.profile.log_odds[n] for n in common})
    second = replace(after, log_odds={n: after.log_odds[n] for n in common})
    same_text = (
        before.texts == file.texts if before.texts else before.identity.get("metadata") == file.identity["metadata"]
    )
    same_shape = first.states.shape[1:] == second.states.shape[1:]
    read = bool(np.isfinite(first.states).all() and np.isfinite(second.states).all())
    if not (same_text and same_shape and read and before.asked.get("") == texts[""]):
        reason = (
            "the models have other shapes" if not same_shape
            else "the models have other tokenizers or chat templates" if not same_text
            else "the stream cannot be read in this architecture" if not read
            else "the stream was read on other prompts"
        )  # fmt: skip
        notes.append(f"only words are compared: {reason}")
        nowhere = np.full((1, 1, 1), np.nan, np.float32)
        first, second = (replace(p, states=nowhere, norms=nowhere[0, 0], directions={}) for p in (first, second))
        own = []
    elif not first.directions:
        first = replace(first, directions=after.directions)
    shifts = compare_profiles(first, second, own, seed=seed)
    same = before.fingerprint == file.fingerprint
    now = {v.name: _figures(v) for v in entries}
    return ComparisonEntry(
        against=before.against,
        name=before.name,
        fingerprint=before.fingerprint,
        differs="" if same else differences(before.identity, file.identity),
        shifts=[_shift_entry(s, first, second) for s in shifts],
        vectors=[
            VectorChange(vector=n, effect=(then[0], now[n][0]), auroc=(then[1], now[n][1]))
            for n, then in before.vectors.items()
            if n in now
        ],
        note="; ".join(notes),
    )


def _shift_entry(shift: Shift, before: Profile, after: Profile) -> ShiftEntry:
    of_both = [p.log_odds.get(shift.trait) for p in (before, after)]
    means = [None if values is None else float(values.mean()) for values in of_both]
    return ShiftEntry(before=means[0], after=means[1], **shift.as_dict())
