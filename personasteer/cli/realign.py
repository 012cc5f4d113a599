from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from personasteer.cli._common import (
    CtxOption,
    ForceOption,
    GpuOption,
    JsonOption,
    LoraOption,
    MessagesOption,
    OffsetOption,
    PrecisionOption,
    PromptsOption,
    ResponsesOption,
    SeedOption,
    ThreadsOption,
    WorkOption,
    load_adapters,
    load_measured,
    open_model,
    print_json,
    print_table,
    say,
    stages,
)
from personasteer.cli._completion import complete_model, domains
from personasteer.files import check_output
from personasteer.text import printable

if TYPE_CHECKING:
    from personasteer.engine import Progress
    from personasteer.model import Model
    from personasteer.recalibrate import Realigned

SHOWN = 12


def register(app: typer.Typer) -> None:
    app.command("realign")(realign_)


def realign_(
    base: Annotated[
        str,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="What it was tuned from; `demo`: the bundled.",
            autocompletion=complete_model,
        ),
    ],
    tuned: Annotated[
        str, typer.Option("--tuned", metavar="MODEL", help="The model that went wrong.", autocompletion=complete_model)
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The LoRA that brings it back, a GGUF; with --features a bundle."
        ),
    ],
    vectors: Annotated[
        list[str] | None, typer.Option("-v", "--vector", metavar="FILE", help="A trait; may be repeated.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option("--features", metavar="DIR", help="Do not train: restore or cap a feature that `diff` found."),
    ] = None,
    lora: LoraOption = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE", help="Benign samples of your own, of its domain."),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option("--domain", help="Of the samples that are shipped; may be repeated.", autocompletion=domains),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="How many are taken; at most 120 if not given.", min=1)
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Of training, at most.", min=1)] = 30,
    every: Annotated[int, typer.Option("--every", help="Measure after every so many steps.", min=1)] = 5,
    target: Annotated[float, typer.Option("--target", help="Share of the shift at which it stops.")] = 0.9,
    all_steps: Annotated[bool, typer.Option("--all-steps", help="Do not stop where the shift is gone.")] = False,
    rank: Annotated[int, typer.Option("--rank", help="Of the LoRA.", min=1, max=1024)] = 16,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate.")] = 3e-4,
    precision: PrecisionOption = "float32",
    batch: Annotated[int, typer.Option("--batch", help="Samples of a step.", min=1, max=4096)] = 4,
    longest: Annotated[int, typer.Option("--longest", help="Tokens of a sample.", min=8)] = 512,
    messages: MessagesOption = "",
    prompt: PromptsOption = "",
    response: ResponsesOption = "",
    work: WorkOption = None,
    force: ForceOption = False,
    seed: SeedOption = 0,
    ctx: CtxOption = 2048,
    offset: OffsetOption = 0,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    json: JsonOption = False,
) -> None:
    """Bring a fine-tuned model back to its base's character with a few benign samples: a LoRA to put onto it.

    Needs the extra `train`, and -v. A fine-tune that is an adapter is `--tuned BASE --lora FILE`. Every few steps the
    quantized model is measured; training stops where the shift is gone.

    With --features nothing is trained: a suppressed feature is restored, a raised one lowered or capped, whichever
    leaves the answers sound and comes nearest to taking all of the shift, and FILE is a bundle.

    Example: `personasteer realign --base demo --tuned demo --lora tuned.gguf -v pessimistic.gguf -o back.gguf`
    """
    from personasteer.conversations import Columns
    from personasteer.recalibrate import Recipe, realign

    recipe = Recipe(rank=rank, rate=rate, batch=batch, steps=steps, seed=seed, precision=precision)
    loaded = [load_measured(file, offset) for file in vectors or []]
    if features is None:
        check_output(out, vectors or [])
    options = {"n_ctx": ctx, "n_threads": threads, "n_gpu_layers": gpu_layers}
    with (
        open_model(base, **options) as b,
        open_model(tuned, **options, lora=load_adapters(lora)) as t,
        stages() as stage,
    ):
        if features is not None:
            _without_training(b, t, features, out, stage("trying features"), force=force, seed=seed, json=json)
            if not json:
                say(f"bundle: {out} (personasteer bundle chat {out} -m {tuned} -p ...)")
            return
        result = realign(
            b, t, loaded, out, data=data, domains=domain, samples=samples, recipe=recipe, every=every, target=target,
            stop=not all_steps, columns=Columns(messages, prompt, response), longest=longest, work=work, force=force,
            progress=stage,
        )  # fmt: skip
    if json:
        print_json(result.summary())
        return
    _print(result)
    beside = "".join(f" --lora {file}" for file in lora or [])
    say(f"adapter: {out} (personasteer chat -m {tuned}{beside} --lora {out} -p ...)")


def _without_training(
    base: Model, tuned: Model, folder: Path, out: Path, progress: Progress, *, force: bool, seed: int, json: bool
) -> None:
    from personasteer.recalibrate import best_remedy, read_features, remedies, write_remedy
    from personasteer.ship.archive import check_target

    check_target(out, force=force)
    found = remedies(base, tuned, read_features(folder), seed=seed, progress=progress)
    best = best_remedy(found)
    write_remedy(out, tuned, best, force=force)
    if json:
        print_json({"chosen": best.as_dict(), "tried": [r.as_dict() for r in found]})
        return
    table = Table(title="without training")
    for heading in ("feature", "edit", "removed", "coherence"):
        table.add_column(heading, justify="left" if heading in ("feature", "edit") else "right")
    for r in found[:SHOWN]:
        edit = r.how if r.dose is None else f"{r.how} by {r.dose:g}"
        sound = "" if r.coherence is None else f"{r.coherence:.2f}"
        table.add_row(escape(printable(r.feature)), edit, f"{r.removed:.0%}", sound)
    print_table(table)


def _print(result: Realigned) -> None:
    say("shift that is left after so many steps: of the trait's words, of the stream before the answer")
    table = Table()
    table.add_column("steps", justify="right")
    for name in result.base:
        table.add_column(escape(printable(name)), justify="right")
    for p in result.points:
        left = [result.removed(name, p) for name in result.base]
        table.add_row(str(p.step), *(f"{_share(1 - words)}, {_share(1 - stream)}" for words, stream in left))
    print_table(table)
    verdict = "recovered" if result.recovered else f"not recovered: less than {result.target:.0%} of the shift is gone"
    say(f"{verdict}, after {result.n_steps} steps and {result.n_samples} samples")
    kept = result.capability
    say(f"capability: base {kept['base']:.2f}, tuned {kept['tuned']:.2f}, re-aligned {kept['realigned']:.2f}")
    sound = result.coherence
    say(f"coherence beside the base: tuned {sound['tuned']:.2f}, re-aligned {sound['realigned']:.2f}")


def _share(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.0%}"
