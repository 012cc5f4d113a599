from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Column, Table

from personasteer.cli._common import (
    GpuOption,
    JsonOption,
    ModelOption,
    ThreadsOption,
    open_model,
    print_json,
    stages,
    stdout,
)
from personasteer.errors import ArgumentError
from personasteer.evaluate.overhead import as_json, measure_overhead

TOPICS = ("overhead",)


def register(app: typer.Typer) -> None:
    app.command("bench")(bench)


def bench(
    topic: Annotated[str, typer.Argument(help="overhead")],
    model: ModelOption = "demo",
    pairs: Annotated[int, typer.Option("--pairs", help="Interleaved pairs of runs per row.", min=2)] = 30,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Length of the prefill.", min=4)] = 128,
    decode_tokens: Annotated[int, typer.Option("--decode-tokens", help="Tokens decoded one by one.", min=2)] = 12,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    json: JsonOption = False,
) -> None:
    """Measure what steering and capture cost on this machine, against the same llama.cpp without the hook.

    Example: `personasteer bench overhead -m demo --json`
    """
    if topic not in TOPICS:
        raise ArgumentError(f"unknown benchmark {topic!r}; known: {', '.join(TOPICS)}")
    n_ctx = prompt_tokens + decode_tokens + 8
    with (
        open_model(model, n_ctx=n_ctx, n_parallel=1, n_threads=threads, n_gpu_layers=gpu_layers) as m,
        stages() as stage,
    ):
        rows = measure_overhead(
            m,
            ks=(1, 8),
            pairs=pairs,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            progress=stage("measuring"),
        )
    if json:
        print_json(as_json(rows))
        return
    columns = ("phase", "mode", "K", "ratio", "95 % interval", "min … max", "tokens/s", "MiB")
    table = Table(*(Column(c, no_wrap=True) for c in columns), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for r in rows:
        table.add_row(
            r.phase,
            r.mode,
            str(r.k or ""),
            f"{r.ratio_median:.3f}",
            f"{r.ratio_low:.3f} … {r.ratio_high:.3f}",
            f"{r.ratio_min:.3f} … {r.ratio_max:.3f}",
            f"{r.tokens_per_second:.0f}",
            f"{r.hook_mib:.1f}",
        )
    stdout.print(table)
