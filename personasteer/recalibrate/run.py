"""Fine-tuning and re-alignment from data to an adapter, measured on the quantized file that people run."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from personasteer._native import build_id
from personasteer.conversations import Columns, benign_rows
from personasteer.engine import Progress
from personasteer.errors import ArgumentError
from personasteer.evaluate import capability, trait_of
from personasteer.files import check_output
from personasteer.identity import check_alike
from personasteer.model import Model
from personasteer.recalibrate.examples import Examples, read_examples, task_loss
from personasteer.recalibrate.measures import (
    Change,
    Probe,
    Shown,
    change,
    coherence_beside,
    make_probes,
    measure,
    removed,
)
from personasteer.recalibrate.torch_models import libraries
from personasteer.recalibrate.training import Recipe, Trainer, block_edits
from personasteer.steering import Steer, as_steering
from personasteer.vectors import PersonaVector
from personasteer.work import Work, digest

Stages: TypeAlias = Callable[[str], Progress]  # names of stages to progress callbacks

METHOD = 1  # work of another is not gone on with
ADAPTER = "adapter.gguf"
HELD_OUT = 0.1  # of the rows, for the task's loss
MOST_HELD_OUT = 40
N_ITEMS = 40  # of the capability check
N_COHERENCE = 6
TARGET = 0.9  # share of the shift that counts as recovered
REALIGNMENT = Recipe(steps=30, rate=3e-4)


@dataclass(frozen=True)
class Point:
    """A model along its training: after `step` steps, what it shows of each trait."""

    step: int
    shown: Mapping[str, Shown]


@dataclass(frozen=True)
class Finetuned:
    """A fine-tune and what it changed.

    Args:
        n_examples, n_steps: rows trained on, steps taken.
        losses: of each step, nats per learned token, steered as it was trained.
        skipped: {what was wrong: rows}.
        task_loss: (before, after), nats per token of held-out rows, unsteered, on the quantized file with the adapter;
            None without held-out rows.
        before: what the untrained model shows of each trait; points: what it showed while it was trained.
        changes: from before to the end.
    """

    n_examples: int
    n_steps: int
    losses: tuple[float, ...]
    skipped: Mapping[str, int]
    task_loss: tuple[float, float] | None
    before: Mapping[str, Shown]
    points: tuple[Point, ...]

    @property
    def changes(self) -> dict[str, Change]:
        if not self.points:
            return {}
        return {name: change(shown, self.points[-1].shown[name]) for name, shown in self.before.items()}

    def summary(self) -> dict[str, Any]:
        """What `finetune --json` prints."""
        return {
            "n_examples": self.n_examples,
            "n_steps": self.n_steps,
            "losses": list(self.losses),
            "skipped": dict(self.skipped),
            "task_loss": None if self.task_loss is None else list(self.task_loss),
            "traits": {
                name: {
                    "before": _means(shown),
                    "points": [{"step": p.step, **_means(p.shown[name])} for p in self.points],
                    "change": self.changes[name].as_dict() if self.points else None,
                }
                for name, shown in self.before.items()
            },
        }


@dataclass(frozen=True)
class Realigned:
    """A re-alignment.

    Args:
        n_samples, n_steps: samples seen, steps taken.
        base, tuned: what both models show of each trait; points: what the re-aligned one showed after some steps.
        recovered: whether of every trait that had shifted `target` of the shift is gone, in what the model says.
        coherence: of the sampled answers of "tuned" and "realigned", judged by the base; 1 is as sound as its own.
        capability: share of multiple-choice items right, of "base", "tuned" and "realigned".
    """

    n_samples: int
    n_steps: int
    target: float
    base: Mapping[str, Shown]
    tuned: Mapping[str, Shown]
    points: tuple[Point, ...]
    coherence: Mapping[str, float]
    capability: Mapping[str, float]
    losses: tuple[float, ...]

    def removed(self, trait: str, point: Point) -> tuple[float, float]:
        """Shares of the trait's shift that are gone, in what it says and in the stream: 1 is all of it."""
        return removed(self.base[trait], self.tuned[trait], point.shown[trait])

    @property
    def recovered(self) -> bool:
        return bool(self.points) and _recovered(self.base, self.tuned, self.points[-1].shown, self.target)

    def summary(self) -> dict[str, Any]:
        """What `realign --json` prints."""
        return {
            "n_samples": self.n_samples,
            "n_steps": self.n_steps,
            "recovered": self.recovered,
            "target": self.target,
            "coherence": dict(self.coherence),
            "capability": dict(self.capability),
            "losses": list(self.losses),
            "traits": {
                name: {
                    "base": _means(self.base[name]),
                    "tuned": _means(self.tuned[name]),
                    "shift": change(self.base[name], self.tuned[name]).as_dict(),
                    "points": [
                        {
                            "step": p.step,
                            **_means(p.shown[name]),
                            **dict(zip(("removed_log_odds", "removed_projection"), self.removed(name, p), strict=True)),
                        }
                        for p in self.points
                    ],
                }
                for name in self.base
            },
        }


def _means(shown: Shown) -> dict[str, float]:
    return {"log_odds": float(shown.log_odds.mean()), "projection": float(shown.projection.mean())}


def _recovered(base: Mapping[str, Shown], tuned: Mapping[str, Shown], now: Mapping[str, Shown], target: float) -> bool:
    shifted = [name for name in base if (c := change(base[name], tuned[name])).log_odds_low > 0 or c.log_odds_high < 0]
    return all(removed(base[name], tuned[name], now[name])[0] >= target for name in shifted or base)


def finetune(
    model: Model,
    data: Any,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    steer: Steer = None,
    system: str | None = None,
    vectors: Sequence[PersonaVector] = (),
    every: int = 0,
    columns: Columns | None = None,
    longest: int = 512,
    work: str | Path | None = None,
    force: bool = False,
    progress: Stages | None = None,
) -> Finetuned:
    """Train a LoRA for a quantized model on a chat data set, and measure along persona vectors what that changes.

    The weights are dequantized to float32, the LoRA is trained on the assistant's tokens (values, attention output and
    feed-forward of every block), written as a GGUF adapter and measured on the quantized file. With `steer`, block
    outputs are edited at all positions while it trains, and not afterwards: with vector * rho the data need not move
    the model along the vector (preventative steering), with vector.incremental() * rho at several blocks without
    counting twice, with Ablate(vector) the stream has no such direction to learn on (concept ablation).

    Args:
        data: as of `screen`: files, or rows of Python.
        out: the adapter, a GGUF that llama.cpp takes with --lora.
        steer: Add and Ablate edits on all tokens.
        system: a system prompt that is in front while it trains, and not afterwards (inoculation prompting).
        vectors: what is measured, before and after, and every `every` steps.
        longest: tokens of a conversation; longer ones are left out.
        work: where the work is kept until it is done, `out`.work when None: the same call goes on with it.
        force: replace `out`, and begin anew where the work is of another training.

    Raises:
        ArgumentError: torch, transformers or peft is missing; unusable data, columns, edits or paths.
        ModelError: an architecture that cannot be trained here, a loss that is no number.
        PersonasteerError: it would not fit into memory.

    Source: arXiv 2507.21509, section 5.2 (preventative steering); 2507.16795 (concept ablation fine-tuning).
    """
    libraries()
    recipe, stage = recipe or Recipe(), progress or _silent
    target = _check_out(out, model, force=force)
    steering = as_steering(steer)
    edits = block_edits(steering, model)
    probes = make_probes(model, vectors)
    given = read_examples(model, data, columns=columns, system=system, longest=longest)
    plain = read_examples(model, data, columns=columns, longest=longest) if system else given
    examples, held_out = _split(given, plain, recipe.seed)
    plan = {
        "method": METHOD, "model": model.fingerprint, "build": build_id(), "data": given.digest,
        "recipe": asdict(recipe), "edits": _digest_of(edits), "vectors": _vectors(vectors), "every": every,
    }  # fmt: skip
    n_steps = recipe.n_steps(len(examples))
    with _working(target, work, plan, force=force) as (folder, kept):
        before = _measured(kept, "before", model, probes, stage("measuring before"))
        first = kept.value("task-loss", lambda: [task_loss(model, held_out.examples)])[0] if len(held_out) else None
        trainer = Trainer(model, examples, recipe, edits=edits, folder=folder)
        _train(trainer, model, probes, folder, n_steps, every or n_steps, stage)
        _save(trainer, target, "fine-tuned", given, {"steered": [str(e) for e in steering], "system": system or ""})
        last = None
        if first is not None:
            with _with_adapter(model, target) as trained:
                last = task_loss(trained, held_out.examples)
    return Finetuned(
        n_examples=len(examples),
        n_steps=trainer.done.step,
        losses=tuple(trainer.done.losses),
        skipped=given.skipped,
        task_loss=None if first is None or last is None else (float(first), last),
        before=before,
        points=_points(trainer),
    )


def realign(
    base: Model,
    tuned: Model,
    vectors: Sequence[PersonaVector],
    out: str | Path,
    *,
    data: Any = None,
    domains: Sequence[str] | None = None,
    samples: int = 120,
    recipe: Recipe = REALIGNMENT,
    every: int = 5,
    target: float = TARGET,
    stop: bool = True,
    columns: Columns | None = None,
    longest: int = 512,
    work: str | Path | None = None,
    force: bool = False,
    progress: Stages | None = None,
) -> Realigned:
    """Train a fine-tuned model back to its base's character with a few benign samples: a LoRA to put onto it.

    It is trained on the fine-tuned weights and measured on the quantized file every `every` steps; it stops where
    `target` of the shift is gone along every trait that had shifted.

    Args:
        base, tuned: open models of one architecture and tokenizer; `tuned` with the adapters it was tuned by, if it
            is the base with adapters.
        vectors: of the traits whose shift is followed.
        out: the adapter, for the fine-tuned model (beside its own adapters).
        data: samples, as of `finetune`; those that are shipped when None. domains: of these, all when None.
        samples: how many are taken, drawn by the recipe's seed.
        stop: where the shift is gone; else all steps are taken.
        recipe: 30 steps of 4 by default.

    Raises:
        ArgumentError: as of `finetune`; models of other shapes or tokenizers; fewer samples than are asked for.

    Source: arXiv 2506.19823, section on re-alignment (a few hundred benign samples; 120 in figure 13).
    """
    libraries()
    stage = progress or _silent
    check_alike(base, tuned)
    place = _check_out(out, tuned, force=force)
    if not vectors:
        raise ArgumentError("realign follows the shift along vectors: give at least one (-v), see `derive` and `diff`")
    if not 0 < target <= 1:
        raise ArgumentError(f"target must be a share of the shift, above 0 and at most 1, not {target}")
    probes = make_probes(base, vectors)
    if data is not None and domains:
        raise ArgumentError("domains are of the samples that are shipped: give data or domains, not both")
    given = benign_rows(domains) if data is None else data
    everything = read_examples(tuned, given, columns=columns, longest=longest, fewest=max(1, min(samples, 4)))
    if len(everything) < samples:
        raise ArgumentError(f"there are {len(everything)} samples that can be used, {samples} are asked for")
    chosen = np.random.default_rng(recipe.seed).permutation(len(everything))[:samples]
    examples = replace(everything, examples=tuple(everything[chosen.tolist()]))
    plan = {
        "method": METHOD, "base": base.fingerprint, "model": tuned.fingerprint, "build": build_id(),
        "data": examples.digest, "recipe": asdict(recipe), "vectors": _vectors(vectors), "every": every,
        "target": target, "stop": stop,
    }  # fmt: skip
    n_steps = recipe.n_steps(len(examples))
    with _working(place, work, plan, force=force) as (folder, kept):
        shown = {
            name: _measured(kept, name, model, probes, stage(f"measuring the {name} model"))
            for name, model in (("base", base), ("tuned", tuned))
        }
        trainer = Trainer(tuned, examples, recipe, folder=folder)

        def enough(now: Mapping[str, Shown]) -> bool:
            return stop and _recovered(shown["base"], shown["tuned"], now, target)

        _train(trainer, tuned, probes, folder, n_steps, every, stage, enough)
        _save(trainer, place, "re-aligned", examples, {"domains": list(domains or ())})
        quality = _quality(kept, base, tuned, place, vectors, stage("coherence and capability"))
    return Realigned(
        n_samples=min(samples, trainer.done.step * recipe.batch),
        n_steps=trainer.done.step,
        target=target,
        base=shown["base"],
        tuned=shown["tuned"],
        points=_points(trainer),
        coherence=quality["coherence"],
        capability=quality["capability"],
        losses=tuple(trainer.done.losses),
    )


# ---- parts


def _silent(_: str) -> Progress:
    return lambda done, total: None


def _check_out(out: str | Path, model: Model, *, force: bool) -> Path:
    target = Path(out)
    check_output(target, [model.path, *(path for path, _ in model.options.get("lora", ()))])
    if target.exists() and not force:
        raise ArgumentError(f"{target}: exists already; --force overwrites it")
    return target


class _working:  # noqa: N801 (a context)
    """The folder of unfinished work: gone once the work is done, there after an interruption."""

    def __init__(self, out: Path, work: str | Path | None, plan: Mapping[str, Any], *, force: bool) -> None:
        self._folder = Path(work) if work is not None else out.with_name(out.name + ".work")
        self._own, self._plan, self._force = work is None, plan, force

    def __enter__(self) -> tuple[Path, Work]:
        try:
            self._work = Work(self._folder, self._plan)
        except ArgumentError:
            if not (self._force and (self._folder / "plan.json").is_file()):
                raise
            shutil.rmtree(self._folder)
            self._work = Work(self._folder, self._plan)
        return self._folder, self._work

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._work.close()
        if kind is None and self._own:
            shutil.rmtree(self._folder, ignore_errors=True)


def _split(given: Examples, plain: Examples, seed: int) -> tuple[Examples, Examples]:
    """(to train on, held out for the task's loss, without a system prompt of the training)."""
    n = min(MOST_HELD_OUT, int(HELD_OUT * len(given))) if len(given) == len(plain) else 0
    order = np.random.default_rng((seed, 1)).permutation(len(given)).tolist()
    return replace(given, examples=tuple(given[order[n:]])), replace(plain, examples=tuple(plain[order[:n]]))


def _vectors(vectors: Sequence[PersonaVector]) -> list[str]:
    return [digest(v.name, hashlib.sha256(v.directions.tobytes()).hexdigest(), list(v.layers)) for v in vectors]


def _digest_of(edits: Mapping[int, Any]) -> str:
    total = hashlib.sha256()
    for il in sorted(edits):
        e = edits[il]
        for part in (e.row, e.basis):
            total.update(f"{il} {e.share} {None if part is None else part.shape}".encode())
            total.update(b"" if part is None else part.tobytes())
    return total.hexdigest()[:32]


def _measured(
    kept: Work, name: str, model: Model, probes: Sequence[Probe], progress: Progress | None
) -> dict[str, Shown]:
    def compute() -> tuple[dict[str, Any], Any]:
        return {}, {trait: shown.as_dict() for trait, shown in measure(model, probes, progress).items()}

    return {trait: Shown.from_dict(plain) for trait, plain in kept.part(name, compute)[1].items()}


def _with_adapter(model: Model, adapter: Path) -> Model:
    options = {**model.options, "lora": [*model.options.get("lora", ()), (str(adapter), 1.0)]}
    return Model(model.path, **options)


def _train(
    trainer: Trainer,
    model: Model,
    probes: Sequence[Probe],
    folder: Path,
    n_steps: int,
    every: int,
    stage: Stages,
    enough: Callable[[Mapping[str, Shown]], bool] | None = None,
) -> None:
    """Train, measure and keep; stop where `enough` says so."""
    doing = stage("training")
    doing(trainer.done.step, n_steps)
    while True:
        last = trainer.done.measured[-1] if trainer.done.measured else None
        if last is not None and last["step"] == trainer.done.step:
            now = {trait: Shown.from_dict(plain) for trait, plain in last["shown"].items()}
            if trainer.done.step >= n_steps or (enough is not None and enough(now)):
                doing(n_steps, n_steps)
                return
        until = min(n_steps, (trainer.done.step // every + 1) * every)
        trainer.run(until, lambda done, _: doing(done, n_steps))
        adapter = folder / ADAPTER
        trainer.save(adapter, {})
        shown: dict[str, Shown] = {}
        if probes:
            with _with_adapter(model, adapter) as trained:
                shown = measure(trained, probes)
        plain = {trait: s.as_dict() for trait, s in shown.items()}
        trainer.done.measured.append({"step": trainer.done.step, "shown": plain})
        trainer.keep()


def _points(trainer: Trainer) -> tuple[Point, ...]:
    return tuple(
        Point(m["step"], {trait: Shown.from_dict(plain) for trait, plain in m["shown"].items()})
        for m in trainer.done.measured
        if m["shown"]
    )


def _save(trainer: Trainer, out: Path, kind: str, examples: Examples, more: Mapping[str, Any]) -> None:
    provenance = {
        "name": f"{kind} for {trainer.done.step} steps", "kind": kind, "recipe": asdict(trainer.recipe),
        "n_steps": trainer.done.step, "n_examples": len(examples), "data": examples.digest, **more,
    }  # fmt: skip
    trainer.save(out, provenance)


def _quality(
    kept: Work, base: Model, tuned: Model, adapter: Path, vectors: Sequence[PersonaVector], progress: Progress
) -> dict[str, dict[str, float]]:
    """How sound the answers of both are beside the base's, and what all three know."""
    trait = trait_of(vectors[0])
    questions = trait.evaluate_questions[-N_COHERENCE:]
    systems = [pair[0] for pair in trait.system[:1]] if base.takes_system else []
    found: dict[str, dict[str, float]] = {"coherence": {}, "capability": {}}
    found["capability"]["base"] = float(capability(base, [None], n_items=N_ITEMS)[0])
    progress(1, 5)
    with _with_adapter(tuned, adapter) as realigned:
        for k, (name, model) in enumerate((("tuned", tuned), ("realigned", realigned))):
            found["coherence"][name] = coherence_beside(base, model, questions, systems)[0]
            progress(2 * k + 2, 5)
            found["capability"][name] = float(capability(model, [None], n_items=N_ITEMS)[0])
            progress(2 * k + 3, 5)
    return found
