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
    ModelOption,
    OffsetOption,
    RpcOption,
    SeedOption,
    ThreadsOption,
    open_model,
    print_json,
    print_table,
    say,
    split_strength,
    stages,
    workers,
)
from personasteer.cli._completion import trait_names
from personasteer.errors import ArgumentError
from personasteer.files import check_folder
from personasteer.text import printable

if TYPE_CHECKING:
    from personasteer.evaluate import Evaluation


def register(app: typer.Typer) -> None:
    app.command("eval")(eval_)


def eval_(
    vectors: Annotated[
        list[str],
        typer.Argument(metavar="FILE[:STRENGTH]..", help="Control vectors to test, at their own strength or this one."),
    ],
    model: ModelOption = "demo",
    trait: Annotated[
        list[str] | None,
        typer.Option(
            "--trait",
            autocompletion=trait_names,
            help="Trait (name or file) to test on: one for all, or one for each vector; its own if not given.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="DIR",
            help="Write report.html, report.md, report.json and the figures into this folder.",
        ),
    ] = None,
    questions: Annotated[int, typer.Option("--questions", help="Held-out questions, at most.", min=2)] = 10,
    pairs: Annotated[int, typer.Option("--pairs", help="Continuation pairs per question.", min=1)] = 2,
    random: Annotated[
        int, typer.Option("--random", help="Random vectors of the same norms to compare with.", min=1)
    ] = 20,
    items: Annotated[int, typer.Option("--items", help="Multiple-choice items, of 80; 0: none.", min=0, max=80)] = 80,
    answers: Annotated[
        int, typer.Option("--answers", help="Free answers per strength, scored by the trait's lexicon; 0: none.", min=0)
    ] = 5,
    offset: OffsetOption = 0,
    seed: SeedOption = 0,
    ctx: CtxOption = 512,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    rpc: RpcOption = None,
    json: JsonOption = False,
) -> None:
    """Measure what vectors do on questions that they were not derived from, beside controls.

    Example: `personasteer eval pessimistic.gguf -m demo --report evidence`
    """
    from personasteer.evaluate import cross_talk, evaluate
    from personasteer.evaluate.report import as_json, write_report
    from personasteer.traits import find
    from personasteer.vectors import PersonaVector

    given = [split_strength(v) for v in vectors]
    loaded = [PersonaVector.load(file, offset=offset) for file, _ in given]
    chosen = [find(t) for t in trait or []]
    if chosen and len(chosen) not in (1, len(loaded)):
        raise ArgumentError(f"{len(loaded)} vectors and {len(chosen)} traits: name one --trait, or one for each vector")
    traits = (chosen * len(loaded))[: len(loaded)] if len(chosen) == 1 else chosen or None
    if report is not None:
        check_folder(report)
    options = {
        "n_ctx": ctx,
        "n_parallel": 16,
        "n_threads": threads,
        "n_gpu_layers": gpu_layers,
        "rpc": workers(rpc),
        "seed": seed,
    }
    with open_model(model, **options) as m, stages() as stage:
        found: list[Evaluation] = []
        for k, (vector, (_, strength)) in enumerate(zip(loaded, given, strict=True)):
            found += evaluate(
                m,
                [vector],
                traits=[traits[k]] if traits else None,
                n_questions=questions,
                n_pairs=pairs,
                n_random=random,
                n_items=items,
                n_generations=answers,
                strength=strength,
                seed=seed,
                progress=stage(f"measuring {vector.name}"),
            )
        matrix = cross_talk(m, loaded, found) if len(loaded) > 1 else None
    written = write_report(report, loaded, found, matrix) if report is not None else []
    if json:
        print_json(as_json(found, matrix))
        return
    for e in found:
        _print(e)
    if matrix is not None:
        names = [escape(printable(e.trait)) for e in found]
        table = Table("vector", *names, title="Change of each trait's log-odds", title_justify="left")
        for e, row in zip(found, matrix, strict=True):
            table.add_row(escape(printable(e.vector)), *(f"{x:+.2f}" for x in row))
        print_table(table)
    if written:
        say(f"report: {report}/report.html, report.md, report.json")


def _print(e: Evaluation) -> None:
    from personasteer.evaluate.report import change_interval, heading, verdict
    from personasteer.vectors import block_ranges

    table = Table(title=escape(printable(f"{heading(e)}, blocks {block_ranges(e.layers)}")), title_justify="left")
    for column in ("strength ρ", "log-odds", "change", "95 % interval", "coherence", "KL, everyday text"):
        table.add_column(column, justify="right")
    for d in e.dose:
        low, high = change_interval(d)
        table.add_row(
            f"{d.strength:+.2f}", f"{d.log_odds:+.2f}", f"{d.delta:+.2f}", f"{low:+.2f} … {high:+.2f}",
            f"{d.coherence:.2f}", f"{d.kl:.3f}",
        )  # fmt: skip
    print_table(table)
    c = e.controls
    parts = [f"{c.n_random} random vectors stay within ±{c.random_p95:.2f} (95 %)"]
    if c.shuffled is not None:
        parts.append(f"vectors from shuffled labels {c.shuffled:.2f} (mean size)")
    parts.append(f"the vector of {c.unrelated_trait!r} {c.unrelated:+.2f}")
    if c.system_prompt is not None:
        parts.append(f"the trait's system prompt alone {c.system_prompt:+.2f}")
    lines = [f"change of log-odds by controls, at ρ = {e.strength:.2f}: " + "; ".join(parts)]
    if e.capability:
        known = e.capability
        lines.append(
            f"multiple choice, {e.sizes['items']} items, share right: {known['base']:.2f} unsteered, "
            f"{known['steered']:.2f} at +ρ, {known['steered_negative']:.2f} at -ρ (chance: 0.25)"
        )
    if e.generations:
        shares = ", ".join(
            f"{r:.2f} at {s:+.2f}" for s, r in zip(e.generations.strengths, e.generations.rates, strict=True)
        )
        lines.append(f"share of free answers with a word of the trait's lexicon: {shares}")
    lines.append(f"Spearman of strength and log-odds {e.spearman:.2f}; {verdict(e)}")
    for line in lines:
        say(line, prose=True)
