from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from personasteer.cli._common import (
    CtxOption,
    GpuOption,
    JsonOption,
    MessagesOption,
    ModelOption,
    OffsetOption,
    PromptsOption,
    ResponsesOption,
    ThreadsOption,
    open_model,
    print_json,
    print_table,
    say,
    split_strength,
    stages,
)
from personasteer.cli._completion import one_of
from personasteer.errors import ArgumentError
from personasteer.text import printable

if TYPE_CHECKING:
    from personasteer.screen import Screening, Shift

SHOWN = 12  # lines of a trait's ordering in the terminal


def register(app: typer.Typer) -> None:
    app.command("screen")(screen_)


def screen_(
    data: Annotated[list[Path], typer.Argument(help="JSONL, JSON, CSV or Parquet, also compressed; several are one.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the results, and the work.")],
    vectors: Annotated[list[str], typer.Option("-v", "--vector", metavar="FILE", help="A trait; may be repeated.")],
    model: ModelOption = "demo",
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            help="fast: no generation; full: against the model's own answers; projection: neither.",
            autocompletion=one_of("fast", "full", "projection"),
        ),
    ] = "fast",
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            metavar="below|above",
            help="Also copy the rows below (above) all thresholds.",
            autocompletion=one_of("below", "above"),
        ),
    ] = None,
    percentile: Annotated[
        float, typer.Option("--percentile", help="Of the clean reference, from which a row is flagged.")
    ] = 95.0,
    clean: Annotated[
        Path | None, typer.Option("--clean", metavar="FILE", help="Ordinary rows, instead of the 240 shipped ones.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="FILE", help="Rows to compare the whole set with.")
    ] = None,
    messages: MessagesOption = "",
    prompt: PromptsOption = "",
    response: ResponsesOption = "",
    system: Annotated[str, typer.Option("--system", metavar="COLUMN", help="The column of system prompts.")] = "",
    row_id: Annotated[str, typer.Option("--id", metavar="COLUMN", help="The column that names rows.")] = "",
    by: Annotated[
        list[str] | None,
        typer.Option("--by", metavar="COLUMN", help="Compare a column's values; may be repeated."),
    ] = None,
    sample: Annotated[
        int, typer.Option("--sample", help="Rows that mode fast scores in full, too, for the correlation.", min=0)
    ] = 64,
    predict: Annotated[int, typer.Option("-n", "--predict", help="Tokens of an own answer.", min=1, max=2**20)] = 128,
    layer: Annotated[
        int | None, typer.Option("--layer", help="The block to read; the middle of a vector's own when not given.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Score along the vectors as they are, not against the grain of clean rows.")
    ] = False,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="Compute on a Ray cluster; `local` starts one here.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Models on the cluster.", min=1)] = None,
    force: Annotated[bool, typer.Option("--force", help="Begin anew where DIR holds another screening.")] = False,
    ctx: CtxOption = 2048,
    batch: Annotated[
        int, typer.Option("-b", "--batch-size", help="Tokens that are computed together.", min=64, max=2**16)
    ] = 512,
    offset: OffsetOption = 0,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    json: JsonOption = False,
) -> None:
    """Score the rows of a chat data set along persona vectors, before a model is trained on them.

    Which columns hold the conversation is found out and printed. The folder gets scores.parquet, report.html and
    summary.json; work is kept there as it is done, and the same command goes on with it after an interruption.

    Example: `personasteer screen train.jsonl -m demo -v pessimistic.gguf --out screened --keep below`
    """
    from personasteer.screen import Columns, layout_of, screen
    from personasteer.vectors import PersonaVector

    for spec in vectors:
        if split_strength(spec)[1] is not None:
            raise ArgumentError(f"{spec}: screening takes no strength")
    loaded = [PersonaVector.load(file, offset=offset) for file in vectors]
    columns = Columns(messages, prompt, response, system, row_id, tuple(by or ()))
    layout = layout_of(data, columns)  # before a model is opened
    if not json:
        say(f"columns: {layout}")
    if threads is None and workers and ray == "local":
        threads = max(1, (os.cpu_count() or 1) // workers)
    options = {"n_ctx": ctx, "n_batch": batch, "n_parallel": 1, "n_threads": threads}
    with open_model(model, n_gpu_layers=gpu_layers, **options) as m, stages() as stage:
        result = screen(
            m, loaded, data, out, mode=mode, columns=columns, clean=clean, baseline=baseline, percentile=percentile,
            keep=keep, sample=sample, max_tokens=predict, layer=layer, plain=plain, ray=ray, workers=workers,
            force=force, progress=stage,
        )  # fmt: skip
    if json:
        print_json(result.summary())
        return
    _print(result)
    say(f"results: {out}/report.html, scores.parquet, summary.json" + (", kept and quarantine" if keep else ""))


def _print(result: Screening) -> None:
    for problem, found in result.problems.items():
        say(f"not scored: {found['n']} rows, {problem} (row {', '.join(map(str, found['rows'][:5]))})")
    repeated = result.duplicates
    if repeated["ids"] or repeated["words"]:
        say(f"repeated: {repeated['ids']} ids, the words of {repeated['words']} rows")
    scored = int((~result.unscored).sum())
    if result.n_without_answer:
        say(f"not scored: {result.n_without_answer} rows, to whose prompts the model answers nothing")
    say(f"{len(result.rows)} rows, {scored} scored, {int(result.flagged.sum())} flagged")
    for t in result.traits:
        table = Table(title=escape(printable(f"{t.name}, block {t.layer}: flagged above {t.threshold:.2f}")))
        for heading in ("rows", "n", "mean score", "less clean", "above"):
            table.add_column(heading, justify="left" if heading == "rows" else "right")
        for s in t.ordering[:SHOWN]:
            table.add_row(*_cells(s))
        print_table(table)
        if len(t.ordering) > SHOWN:
            say(f"and {len(t.ordering) - SHOWN} more in the report")
        if t.correlation:
            r = t.correlation
            say(f"fast score against full on {r['n']} rows: r {r['fast_pearson']}, ranks {r['fast_spearman']}")


def _cells(s: Shift) -> list[str]:
    def interval(x: float | None, low: float | None, high: float | None) -> str:
        if x is None:
            return "–"
        return f"{x:.2f}" if low is None or high is None else f"{x:.2f} ± {(high - low) / 2:.2f}"

    above = "–" if s.above is None else f"{100 * s.above:.1f} %"
    return [
        escape(printable(s.name)), str(s.n), interval(s.mean, s.low, s.high),
        interval(s.shift, s.shift_low, s.shift_high), above,
    ]  # fmt: skip
