from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from personasteer.cli._common import JsonOption, SeedOption, ThreadsOption, print_json, print_table, say, stages, stdout
from personasteer.cli._completion import trait_names

if TYPE_CHECKING:
    from personasteer.demo import DemoReport


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the vector and the plot.")] = Path("personasteer-demo"),
    trait: Annotated[
        str, typer.Option("--trait", help="A trait of the library.", autocompletion=trait_names)
    ] = "pessimistic",
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Derive a persona on the bundled SmolLM2, show it at three strengths, and measure it against controls.

    Example: `personasteer demo --out my-demo`
    """
    from personasteer.demo import run_demo

    with stages() as stage:
        report = run_demo(out, trait_name=trait, seed=seed, n_threads=threads, stage=stage)
    if json:
        print_json(report.summary())
    else:
        _print(report)


def _print(report: DemoReport) -> None:
    from personasteer.demo import SHOWN

    chosen = set(report.vector.layers)
    layers = Table(title=f"“{report.trait}” in {report.model}, per block (▸ steered)", title_justify="left")
    for column in ("block", "‖v‖ / m", "separation d", "split-half cosine"):
        layers.add_column(column, justify="right")
    for row in report.layer_rows:
        il = int(row["layer"])
        cells = (f"{row['norm_ratio']:.3f}", f"{row['separation']:.2f}", f"{row['split_half_cosine']:.2f}")
        layers.add_row(f"▸ {il}" if il in chosen else str(il), *cells, style="bold" if il in chosen else "dim")
    print_table(layers)

    answers = Table(title="Held-out questions, answered at three strengths", title_justify="left", show_lines=True)
    answers.add_column("question", ratio=1)
    for strength in SHOWN:
        answers.add_column(f"ρ = {strength:+.1f}" if strength else "unsteered", ratio=2)
    for question, texts in report.answers:
        answers.add_row(question, *(escape(text) for text in texts))
    print_table(answers)

    dose = Table(title="Log-odds per token of trait against anti-trait continuations", title_justify="left")
    for column in ("strength ρ", "log-odds", "delta", "95 % interval of delta"):
        dose.add_column(column, justify="right")
    for point in report.dose:
        interval = f"{point['low']:+.2f} … {point['high']:+.2f}"
        dose.add_row(f"{point['strength']:+.2f}", f"{point['log_odds']:+.2f}", f"{point['delta']:+.2f}", interval)
    print_table(dose)
    largest = max(p["strength"] for p in report.dose)
    random, shuffled = report.random, report.shuffled
    stdout.print(
        f"Controls at ρ = ±{largest}: {random['n']:.0f} random vectors move it by at most {random['p95_abs']:.2f} "
        f"(95th percentile); {shuffled['n']:.0f} vectors from shuffled labels by {shuffled['mean_abs']:.2f} on "
        f"average; the system prompt alone, without a vector, by {report.system_prompt_delta:+.2f}."
    )
    say(f"vector  {report.vector_path}")
    say(f"plot    {report.plot_path}")
    say(f"answers {report.picture_path}")
    say(
        f"derived in {report.seconds['derive']:.0f} s, all of it in {report.seconds['total']:.0f} s. Next: "
        f'personasteer chat -m demo -v {report.vector_path}:0.3 -p "How is my plan?"'
    )
