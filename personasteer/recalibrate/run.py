"""Fine-tuning and re-alignment from data to an adapter, measured on the quantized file that people run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from personasteer._native import build_id
from personasteer.conversations import Columns, benign_rows, open_data
from personasteer.engine import Progress
from personasteer.errors import ArgumentError
from personasteer.evaluate import capability, measure_coherence, persona_systems, trait_of
from personasteer.files import check_output
from personasteer.identity import check_alike
from personasteer.model import Model
from personasteer.recalibrate.examples import Examples, read_examples, task_loss
from personasteer.recalibrate.measures import N_COHERENCE, Probe, Shown, make_probes, measure
from personasteer.recalibrate.results import Finetuned, Point, Realigned, recovered, shifted
from personasteer.recalibrate.torch_models import libraries
from personasteer.recalibrate.training import CHECKPOINT, Recipe, Trainer, block_edits, check_fits_memory
from personasteer.steering import Steer, as_steering
from personasteer.vectors import PersonaVector
from personasteer.work import Work, digest

Stages: TypeAlias = Callable[[str], Progress]  # names of stages to progress callbacks

METHOD = 1  # work of another is not gone on with
ADAPTER = "adapter.gguf"
HELD_OUT = 0.1  # of the rows, for the task's loss
MOST_HELD_OUT = 40
N_ITEMS = 40  # of the capability check
SAMPLES = 120
TARGET = 0.9  # share of the shift that counts as recovered
REALIGNMENT = Recipe(steps=30, rate=3e-4)


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
    if every < 0:
        raise ArgumentError(f"every must be 0 or more steps, not {every}")
    rows = list(data) if isinstance(data, Iterator) else data
    target = _check_out(out, [model], rows, force=force)
    steering = as_steering(steer)
    edits = block_edits(steering, model)
    probes = make_probes(model, vectors)
    given = read_examples(model, rows, columns=columns, system=system, longest=longest)
    plain = read_examples(model, rows, columns=columns, longest=longest) if system else given
    examples, held_out = _split(given, plain, recipe.seed)
    check_fits_memory(model, examples, recipe)
    plan = {
        "method": METHOD, "model": model.fingerprint, "build": build_id(), "threads": model.n_threads,
        "data": given.digest, "recipe": asdict(recipe), "edits": _digest_of(edits), "vectors": _vectors(vectors),
        "every": every, "gpu_layers": model.options.get("n_gpu_layers"),
    }  # fmt: skip
    n_steps = recipe.n_steps(len(examples))
    with _working(target, work, plan, [model], force=force) as (folder, kept):
        before = _measured(kept, "before", model, probes, stage("measuring before"))
        losses = [kept.value("task-loss", lambda: [task_loss(model, held_out.examples)])[0]] if len(held_out) else []
        trainer = Trainer(model, examples, recipe, edits=edits, folder=folder)
        _train(trainer, model, probes, folder, n_steps, every or n_steps, stage)
        if losses:
            with _with_adapter(model, folder / ADAPTER) as trained:
                losses.append(task_loss(trained, held_out.examples))
        _save(trainer, target, "fine-tuned", given, {"steered": [str(e) for e in steering], "system": system or ""})
    return Finetuned(
        n_examples=len(examples),
        n_steps=trainer.done.step,
        losses=tuple(trainer.done.losses),
        skipped=given.skipped,
        task_loss=(float(losses[0]), float(losses[1])) if losses else None,
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
    samples: int | None = None,
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
        samples: how many are taken, drawn by the recipe's seed; when None 120, or all where there are fewer.
        stop: where the shift is gone; else all steps are taken.
        recipe: 30 steps of 4 by default.

    Raises:
        ArgumentError: as of `finetune`; models of other shapes or tokenizers; fewer samples than are asked for; a
            fine-tune that has not shifted along any of the vectors.

    Source: arXiv 2506.19823 (re-alignment of a misaligned fine-tune with about 120 benign samples).
    """
    libraries()
    stage = progress or _silent
    check_alike(base, tuned)
    if not vectors:
        raise ArgumentError("realign follows the shift along vectors: give at least one (-v), see `derive`")
    if not 0 < target <= 1:
        raise ArgumentError(f"target must be a share of the shift, above 0 and at most 1, not {target}")
    for name, value in (("every", every), ("samples", 1 if samples is None else samples)):
        if value < 1:
            raise ArgumentError(f"{name} must be at least 1, not {value}")
    if data is not None and domains:
        raise ArgumentError("domains are of the samples that are shipped: give data or domains, not both")
    rows = benign_rows(domains) if data is None else list(data) if isinstance(data, Iterator) else data
    place = _check_out(out, [base, tuned], rows, force=force)
    probes = make_probes(base, vectors)
    examples = _drawn(read_examples(tuned, rows, columns=columns, longest=longest, fewest=1), samples, recipe.seed)
    check_fits_memory(tuned, examples, recipe)
    plan = {
        "method": METHOD, "base": base.fingerprint, "model": tuned.fingerprint, "build": build_id(),
        "threads": tuned.n_threads, "data": examples.digest, "recipe": asdict(recipe), "vectors": _vectors(vectors),
        "every": every, "target": target, "stop": stop, "gpu_layers": tuned.options.get("n_gpu_layers"),
    }  # fmt: skip
    n_steps = recipe.n_steps(len(examples))
    with _working(place, work, plan, [base, tuned], force=force) as (folder, kept):
        shown = {
            name: _measured(kept, name, model, probes, stage(f"measuring the {name} model"))
            for name, model in (("base", base), ("tuned", tuned))
        }
        if not shifted(shown["base"], shown["tuned"]):
            raise ArgumentError(
                f"along {', '.join(shown['base'])} what the tuned model says has not shifted by more than chance: "
                "nothing to bring back (other vectors?)"
            )
        trainer = Trainer(tuned, examples, recipe, folder=folder)

        def enough(now: Mapping[str, Shown]) -> bool:
            return stop and recovered(shown["base"], shown["tuned"], now, target)

        _train(trainer, tuned, probes, folder, n_steps, every, stage, enough)
        quality = _quality(kept, base, tuned, folder / ADAPTER, vectors, stage("coherence and capability"))
        _save(trainer, place, "re-aligned", examples, {"domains": list(domains or ())})
    return Realigned(
        n_samples=min(len(examples), trainer.done.step * recipe.batch),
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


def _check_out(out: str | Path, models: Sequence[Model], data: Any, *, force: bool) -> Path:
    """The path of the adapter. Raises ArgumentError where it cannot be written, or is what the work reads."""
    target = Path(out)
    read = [path for m in models for path in (m.path, *(path for path, _ in m.adapters))]
    check_output(target, [*read, *open_data(data).paths])
    if target.exists() and not force:
        raise ArgumentError(f"{target}: exists already; --force overwrites it")
    return target


@contextmanager
def _working(
    out: Path, work: str | Path | None, plan: Mapping[str, Any], models: Sequence[Model], *, force: bool
) -> Iterator[tuple[Path, Work]]:
    """The folder of unfinished work: gone once the work is done, there after an interruption. Work of another plan is
    begun anew where no step of it was taken, or by force.
    """
    folder = Path(work) if work is not None else out.with_name(out.name + ".work")
    for file in (out, *(path for m in models for path, _ in m.adapters)):
        if file.resolve() in [(folder / name).resolve() for name in (CHECKPOINT, ADAPTER)]:
            raise ArgumentError(f"{file}: is a file of the unfinished work in {folder}; name another folder")
    begun = (folder / CHECKPOINT).exists()
    with Work(folder, plan, restart=force or not begun, more=(CHECKPOINT, ADAPTER)) as kept:
        yield folder, kept
        kept.remove()


def _drawn(given: Examples, samples: int | None, seed: int) -> Examples:
    n = min(SAMPLES, len(given)) if samples is None else samples
    if len(given) < n:
        raise ArgumentError(f"there are {len(given)} samples that can be used, {n} are asked for")
    return replace(given, examples=tuple(given[np.random.default_rng(seed).permutation(len(given))[:n].tolist()]))


def _split(given: Examples, plain: Examples, seed: int) -> tuple[Examples, Examples]:
    """(to train on, held out for the task's loss, without a system prompt of the training)."""
    n = min(MOST_HELD_OUT, int(HELD_OUT * len(given))) if len(given) == len(plain) else 0
    order = np.random.default_rng((seed, 1)).permutation(len(given)).tolist()
    return replace(given, examples=tuple(given[order[n:]])), replace(plain, examples=tuple(plain[order[:n]]))


def _vectors(vectors: Sequence[PersonaVector]) -> list[str]:
    """What is measured along each."""
    return [
        digest(
            v.name, list(v.layers), trait_of(v).as_dict(), *(_digest_of_array(x) for x in (v.directions, v.last_prompt))
        )
        for v in vectors
    ]


def _digest_of_array(x: NDArray[np.float32] | None) -> str:
    return "" if x is None else hashlib.sha256(x.tobytes()).hexdigest()


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
    options = {**model.options, "lora": [*model.adapters, (adapter, 1.0)]}
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
    """Train, measure and keep; stop where `enough` says so. What was interrupted before it was measured is measured."""
    doing = stage("training")
    doing(trainer.done.step, n_steps)
    while True:
        step = trainer.done.step
        if step and (step % every == 0 or step == n_steps):
            now = _measured_at(trainer, model, probes, folder)
            if step >= n_steps or (enough is not None and enough(now)):
                doing(n_steps, n_steps)
                return
        trainer.run(min(n_steps, (step // every + 1) * every), lambda done, _: doing(done, n_steps))


def _measured_at(trainer: Trainer, model: Model, probes: Sequence[Probe], folder: Path) -> dict[str, Shown]:
    """What the model with the adapter shows at this step, kept with the training."""
    done = trainer.done
    if not (done.measured and done.measured[-1]["step"] == done.step and (folder / ADAPTER).exists()):
        adapter = folder / ADAPTER
        trainer.save(adapter, {})
        shown: dict[str, Shown] = {}
        if probes:
            with _with_adapter(model, adapter) as trained:
                shown = measure(trained, probes)
        done.measured = [m for m in done.measured if m["step"] != done.step]
        done.measured.append({"step": done.step, "shown": {name: s.as_dict() for name, s in shown.items()}})
        trainer.keep()
    return {name: Shown.from_dict(plain) for name, plain in done.measured[-1]["shown"].items()}


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

    def compute() -> tuple[dict[str, Any], Any]:
        trait = trait_of(vectors[0])
        questions = trait.evaluate_questions[-N_COHERENCE:]
        systems = [persona_systems(trait, (base, tuned))]
        found: dict[str, dict[str, float]] = {"coherence": {}, "capability": {}}
        found["capability"]["base"] = float(capability(base, [None], n_items=N_ITEMS)[0])
        progress(1, 5)
        with _with_adapter(tuned, adapter) as realigned:
            for k, (name, model) in enumerate((("tuned", tuned), ("realigned", realigned))):
                (sound,) = measure_coherence(model, questions, [None], systems=systems, judges=(base,))
                found["coherence"][name] = sound.coherence
                progress(2 * k + 2, 5)
                found["capability"][name] = float(capability(model, [None], n_items=N_ITEMS)[0])
                progress(2 * k + 3, 5)
        return {}, found

    plain: dict[str, dict[str, float]] = kept.part("quality", compute)[1]
    return plain
