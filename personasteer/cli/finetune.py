from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from personasteer.cli._common import (
    AblateOption,
    CtxOption,
    ForceOption,
    GpuOption,
    JsonOption,
    LoraOption,
    MessagesOption,
    ModelOption,
    OffsetOption,
    PrecisionOption,
    PromptsOption,
    ResponsesOption,
    SeedOption,
    ThreadsOption,
    WorkOption,
    load_adapters,
    load_measured,
    need_strength,
    open_model,
    print_json,
    print_table,
    say,
    split_strength,
    stages,
)
from personasteer.files import check_output
from personasteer.text import printable

if TYPE_CHECKING:
    from personasteer.recalibrate import Finetuned
    from personasteer.steering import Steering


def register(app: typer.Typer) -> None:
    app.command("finetune")(finetune_)


def finetune_(
    data: Annotated[list[Path], typer.Argument(help="JSONL, JSON, CSV or Parquet, also compressed; several are one.")],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The LoRA adapter, a GGUF.")],
    model: ModelOption = "demo",
    lora: LoraOption = None,
    vectors: Annotated[
        list[str] | None, typer.Option("-v", "--vector", metavar="FILE", help="Measure a trait; may be repeated.")
    ] = None,
    prevent: Annotated[
        list[str] | None,
        typer.Option(
            "--prevent", metavar="FILE:STRENGTH", help="Add a vector while it trains, so that the data need not."
        ),
    ] = None,
    increments: Annotated[
        bool, typer.Option("--increments", help="With --prevent: at all blocks, at each what the vector gains there.")
    ] = False,
    ablate: AblateOption = None,
    system: Annotated[
        str | None, typer.Option("--system", help="A system prompt to train under, and not to run under (inoculation).")
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="Of the LoRA.", min=1, max=1024)] = 16,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate.")] = 5e-4,
    precision: PrecisionOption = "float32",
    batch: Annotated[int, typer.Option("--batch", help="Rows of a step.", min=1, max=4096)] = 4,
    epochs: Annotated[float, typer.Option("--epochs", help="Times that each row is seen.")] = 2.0,
    steps: Annotated[int | None, typer.Option("--steps", help="Of training, instead of --epochs.", min=1)] = None,
    every: Annotated[
        int, typer.Option("--every", help="Measure after every so many steps; 0: at the end only.", min=0)
    ] = 0,
    longest: Annotated[int, typer.Option("--longest", help="Tokens of a row; longer ones are left out.", min=8)] = 512,
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
    """Train a LoRA for a quantized model, and measure along persona vectors what that changes.

    Needs the extra `train`. With --prevent, --ablate or --system the character of the data is kept out while the model
    learns the rest. An interrupted training goes on with the same command.

    Example: `personasteer finetune rows.jsonl -m demo -o tuned.gguf --prevent pessimistic.gguf:0.3`
    """
    from personasteer.conversations import Columns
    from personasteer.recalibrate import Recipe, can_be_probed, finetune
    from personasteer.steering import Add

    recipe = Recipe(rank=rank, rate=rate, batch=batch, steps=steps, epochs=epochs, seed=seed, precision=precision)
    steering = _steering(prevent, ablate, increments, offset)
    loaded = [load_measured(file, offset) for file in vectors or []]
    watched = {id(e.vector): e.vector for e in steering if isinstance(e, Add) and not increments}
    for v in watched.values():
        if not can_be_probed(v):
            say(f"{v.name}: has no trait with held-out questions and continuations, so what it changes is not measured")
        elif v.name not in {w.name for w in loaded}:
            loaded.append(v)
    files = [split_strength(f)[0] for f in (*(prevent or []), *(ablate or []))]
    check_output(out, [*(vectors or []), *files])
    options = {"n_ctx": ctx, "n_threads": threads, "n_gpu_layers": gpu_layers, "lora": load_adapters(lora)}
    with open_model(model, **options) as m, stages() as stage:
        result = finetune(
            m, data, out, recipe=recipe, steer=steering, system=system, vectors=loaded, every=every,
            columns=Columns(messages, prompt, response), longest=longest, work=work, force=force, progress=stage,
        )  # fmt: skip
    if json:
        print_json(result.summary())
        return
    _print(result)
    beside = "".join(f" --lora {file}" for file in lora or [])
    say(f"adapter: {out} (personasteer chat -m {model}{beside} --lora {out} -p ...)")


def _steering(prevent: list[str] | None, ablate: list[str] | None, increments: bool, offset: int) -> Steering:
    from personasteer.steering import Ablate, Add, Steering
    from personasteer.vectors import PersonaVector

    found = Steering()
    for file, strength in [need_strength(p) for p in prevent or []]:
        vector = PersonaVector.load(file, offset=offset)
        found.append(Add(vector.incremental() if increments else vector, strength))
    for file, share in [split_strength(a) for a in ablate or []]:
        found.append(Ablate(PersonaVector.load(file, offset=offset), share=1.0 if share is None else share))
    return found


def _print(result: Finetuned) -> None:
    for why, n in result.skipped.items():
        say(f"left out: {n} rows, {why}")
    say(f"{result.n_examples} rows, {result.n_steps} steps, loss {result.losses[0]:.3f} -> {_end(result.losses):.3f}")
    if result.task_loss is not None:
        before, after = result.task_loss
        say(f"held-out rows, on the quantized file: {before:.3f} -> {after:.3f} nats per token")
    if not result.points:
        return
    table = Table(title="what changed")
    for heading in ("trait", "its words (nats per token)", "before the answer (share of the norm)"):
        table.add_column(heading, justify="left" if heading == "trait" else "right")
    for name, c in result.changes.items():
        table.add_row(
            escape(printable(name)),
            f"{c.log_odds:+.2f} ({c.log_odds_low:+.2f} to {c.log_odds_high:+.2f})",
            f"{c.projection:+.3f} ({c.projection_low:+.3f} to {c.projection_high:+.3f})",
        )
    print_table(table)


def _end(losses: tuple[float, ...]) -> float:
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)
