from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from personasteer.cli._common import (
    CtxOption,
    GpuOption,
    JsonOption,
    LoraOption,
    MessagesOption,
    OffsetOption,
    PromptsOption,
    ResponsesOption,
    SeedOption,
    ThreadsOption,
    load_adapters,
    load_measured,
    open_model,
    print_json,
    print_table,
    say,
    stages,
)
from personasteer.cli._completion import complete_model
from personasteer.text import printable

if TYPE_CHECKING:
    from personasteer.discover import Diff, Feature

SHOWN = 8


def register(app: typer.Typer) -> None:
    app.command("diff")(diff_)


def diff_(
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
        str, typer.Option("--tuned", metavar="MODEL", help="The fine-tuned model.", autocompletion=complete_model)
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the report, and the work.")],
    lora: LoraOption = None,
    vectors: Annotated[
        list[str] | None, typer.Option("-v", "--vector", metavar="FILE", help="A known trait; may be repeated.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option("--data", metavar="FILE", help="Rows to read, instead of the fixed texts.")
    ] = None,
    messages: MessagesOption = "",
    prompt: PromptsOption = "",
    response: ResponsesOption = "",
    layer: Annotated[int | None, typer.Option("--layer", help="The block whose features are looked for.")] = None,
    dictionary: Annotated[
        Path | None, typer.Option("--dictionary", metavar="FILE", help="An autoencoder (safetensors, npz) made before.")
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help="With --dictionary: the decoder's name in it.")] = None,
    expansion: Annotated[int, typer.Option("--expansion", help="Features for each dimension.", min=1, max=64)] = 8,
    features: Annotated[int, typer.Option("--features", help="How many up, and down, are tried.", min=1)] = 10,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier report.")] = False,
    seed: SeedOption = 0,
    ctx: CtxOption = 2048,
    offset: OffsetOption = 0,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    json: JsonOption = False,
) -> None:
    """Find what a fine-tune changed: predictions, character, and the features of the stream that carry it.

    Needs the extra `train` (PyTorch) unless a dictionary is given. A fine-tune that is an adapter is
    `--tuned BASE --lora FILE`. The folder gets report.html, diff.json, the mean difference and surviving features as
    vectors. An interrupted comparison goes on with the same command.

    Example: `personasteer diff --base demo --tuned demo --lora tuned.gguf --out changed`
    """
    from personasteer.conversations import Columns
    from personasteer.discover import DictionaryRecipe, diff

    recipe = DictionaryRecipe(expansion=expansion, seed=seed)
    options = {"n_ctx": ctx, "n_threads": threads, "n_gpu_layers": gpu_layers}
    loaded = [load_measured(file, offset) for file in vectors or []]
    with (
        open_model(base, **options) as b,
        open_model(tuned, **options, lora=load_adapters(lora)) as t,
        stages() as stage,
    ):
        found = diff(
            b, t, out, vectors=loaded, data=data, columns=Columns(messages, prompt, response), layer=layer,
            dictionary=dictionary or recipe, dictionary_key=key, n_features=features, seed=seed, force=force,
            progress=stage,
        )  # fmt: skip
    if json:
        print_json(found.summary())
        return
    _print(found)
    files = [name for name in ("report.html", "diff.json", "mean-difference.gguf", "vectors") if (out / name).exists()]
    say(f"{out}: {', '.join(files)}")


def _print(found: Diff) -> None:
    say(f"KL(base || tuned) {found.kl[0]:.4f} nats per token; coherence of the tuned model {found.coherence:.2f}")
    changed = [s for s in found.profile if s.suspicious]
    for s in changed[:SHOWN]:
        say(str(s))
    if len(changed) > SHOWN:
        say(f"and {len(changed) - SHOWN} more traits in the report")
    if not found.trait:
        say("no trait's words changed by more than chance and a new quantization explain: no features were tried")
        return
    table = Table(title=escape(printable(f"features at block {found.layer}, tried by {found.trait!r}")))
    for heading in ("", "change", "removed", "induced", "coherent", "survives"):
        table.add_column(heading, justify="left" if not heading else "right")
    for f in sorted(found.features, key=lambda f: not (f.effect and f.effect.survives))[: 2 * SHOWN]:
        table.add_row(*_cells(f))
    print_table(table)


def _cells(f: Feature) -> list[str]:
    e = f.effect
    if e is None:
        return [f.name, f"{f.change:+.2f}", "", "", "", ""]
    sides = (e.removed, e.induced)
    sound = [t.coherence for t in sides if t.coherence is not None]
    return [
        f.name, f"{f.change:+.2f}", *(f"{t.share:.0%} at {t.dose:g}" for t in sides),
        f"{min(sound):.2f}" if len(sound) == len(sides) else "", "yes" if e.survives else "no",
    ]  # fmt: skip
