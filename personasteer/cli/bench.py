from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Column, Table

from personasteer.cli._common import (
    GpuOption,
    JsonOption,
    ModelOption,
    RpcOption,
    ThreadsOption,
    open_model,
    print_json,
    print_table,
    say,
    stages,
    stderr,
    workers,
)
from personasteer.errors import ArgumentError
from personasteer.files import atomic_write, check_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from personasteer.evaluate.overhead import OverheadRow

TOPICS = ("overhead",)
OPERATORS, KS, BESIDE = ("add", "cap"), (1, 8), ("readings", "capture", "personas x16")


def register(app: typer.Typer) -> None:
    app.command("bench")(bench)


def bench(
    topic: Annotated[str, typer.Argument(help="overhead")] = "overhead",
    model: ModelOption = "demo",
    seconds: Annotated[float, typer.Option("--seconds", help="About how long, once the model is loaded.", min=1)] = 60,
    pairs: Annotated[
        int | None, typer.Option("--pairs", help="Interleaved pairs of runs per row, however long they take.", min=2)
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", help="Length of the prefill; by the time when not given.", min=4)
    ] = None,
    decode_tokens: Annotated[
        int | None, typer.Option("--decode-tokens", help="Tokens decoded one by one; likewise.", min=2)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw a figure of the ratios.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    rpc: RpcOption = None,
    json: JsonOption = False,
) -> None:
    """Measure what steering and capture cost on this machine, against the same llama.cpp without the hook.

    Example: `personasteer bench overhead -m demo --plot overhead.png --markdown`
    """
    from personasteer import plots
    from personasteer.evaluate.overhead import (
        LEAST_PAIRS,
        SHAPES,
        about,
        as_json,
        as_markdown,
        measure_overhead,
        modes_of,
        shape_within,
    )

    if topic not in TOPICS:
        raise ArgumentError(f"unknown benchmark {topic!r}; known: {', '.join(TOPICS)}")
    if json and markdown:
        raise ArgumentError("--json and --markdown are two forms of the same table: give one")
    if plot is not None:
        check_output(plot)
    n_ctx = (prompt_tokens or SHAPES[0][0]) + (decode_tokens or SHAPES[0][1]) + 8
    with (
        open_model(model, n_ctx=n_ctx, n_parallel=1, n_threads=threads, n_gpu_layers=gpu_layers, rpc=workers(rpc)) as m,
        stages() as stage,
    ):
        fitting = SHAPES[0] if pairs else shape_within(m, seconds, modes_of(m, OPERATORS, KS, BESIDE))
        shape = prompt_tokens or fitting[0], decode_tokens or fitting[1]
        rows = measure_overhead(
            m,
            operators=OPERATORS,
            ks=KS,
            beside=BESIDE,
            pairs=pairs or 100,
            seconds=None if pairs else seconds,
            prompt_tokens=shape[0],
            decode_tokens=shape[1],
            progress=stage("measuring"),
        )
        what = about(m, rows, *shape)
    if plot is not None:
        atomic_write(plot, plots.png(_figure(rows, what)))
    if json:
        print_json({**as_json(rows), "about": what})
    elif markdown:
        print(f"{what}\n\n{as_markdown(rows)}")
    else:
        _print(rows, what)
    if (n := min(r.pairs for r in rows)) < LEAST_PAIRS * 2:
        stderr.print(f"{n} pairs a row: the intervals are wide (--seconds or --pairs for more)")


def _figure(rows: list[OverheadRow], what: str) -> Figure:
    from personasteer import plots
    from personasteer.evaluate.overhead import PHASES

    of = {phase: [r for r in rows if r.phase == phase] for phase in PHASES}
    return plots.ratios(
        [f"{r.mode}, K = {r.k}" if r.k else r.mode for r in of[PHASES[0]]],
        {phase: [(r.ratio_median, r.ratio_low, r.ratio_high) for r in of[phase]] for phase in PHASES},
        {phase: [r.expected for r in of[phase]] for phase in PHASES},
        xlabel="time with over time without",
        title=what,
    )


def _print(rows: list[OverheadRow], what: str) -> None:
    columns = ("phase", "mode", "K", "ratio", "95 % interval", "tokens/s", "MiB")
    table = Table(*(Column(c, no_wrap=True) for c in columns), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for r in rows:
        table.add_row(
            r.phase,
            r.mode,
            str(r.k or ""),
            f"{r.ratio_median:.3f}",
            f"{r.ratio_low:.3f} … {r.ratio_high:.3f}",
            f"{r.tokens_per_second:.0f}",
            f"{r.hook_mib:.1f}",
        )
    print_table(table)
    say(f'{what} The ratio is the time with over the time without; "off" is a second run without: the noise.')
