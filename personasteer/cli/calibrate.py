from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from personasteer.cli._common import (
    CtxOption,
    GpuOption,
    JsonOption,
    ModelOption,
    OffsetOption,
    SeedOption,
    ThreadsOption,
    open_model,
    print_json,
    print_table,
    say,
    stages,
)
from personasteer.cli._completion import trait_names
from personasteer.errors import ArgumentError
from personasteer.files import check_output


def register(app: typer.Typer) -> None:
    app.command("calibrate")(calibrate)


def calibrate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Control-vector GGUF.")],
    model: ModelOption = "demo",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where to write; if not given, into FILE itself.")
    ] = None,
    trait: Annotated[
        str | None,
        typer.Option(
            "--trait", help="Trait (name or file) to measure by; its own if not given.", autocompletion=trait_names
        ),
    ] = None,
    keep_layers: Annotated[
        bool, typer.Option("--keep-layers", help="Keep the blocks; find the strengths only.")
    ] = False,
    responses: Annotated[
        Path | None,
        typer.Option(
            "--responses", metavar="FILE", help="Answers (JSONL) to set the thresholds of caps and floors by."
        ),
    ] = None,
    offset: OffsetOption = 0,
    seed: SeedOption = 0,
    ctx: CtxOption = 512,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    json: JsonOption = False,
) -> None:
    """Find the blocks and the window of strengths of a vector on a model, and write them into the file.

    Example: `personasteer calibrate pessimistic.gguf -m demo`
    """
    from personasteer.derive import calibrate as calibrate_vector
    from personasteer.derive import load_responses
    from personasteer.traits import find
    from personasteer.vectors import PersonaVector, block_ranges

    target = out or file
    vector = PersonaVector.load(file, offset=offset)
    if out is None and vector.provenance.get("method") == "imported" and "calibration" not in vector.provenance:
        raise ArgumentError(f"{file} is another tool's file: name the file to write with -o")
    check_output(target)
    found = find(trait) if trait else None
    given = load_responses(responses) if responses else None
    options = {"n_ctx": ctx, "n_parallel": 1, "n_threads": threads, "n_gpu_layers": gpu_layers, "seed": seed}
    with open_model(model, **options) as m, stages() as stage:
        vector = calibrate_vector(
            m,
            vector,
            trait=found,
            sweep_layers=not keep_layers,
            responses=given,
            progress=stage(f"calibrating {vector.name}"),
        )
    vector.save(target)
    tables = vector.provenance["calibration"]
    result = {
        "vector": str(target),
        "layers": list(vector.layers),
        "strength": vector.strength,
        "window": list(vector.window),
        "doses": tables["doses"],
        "sweep": tables.get("sweep"),
    }
    if json:
        print_json(result)
        return
    if not keep_layers:
        blocks = Table("block", "effect at ρ = ±0.2", "KL", "coherence", title="Each block alone", title_justify="left")
        for row in tables["sweep"]["blocks"]:
            label = f"▸ {row['layer']}" if row["layer"] in vector.layers else str(row["layer"])
            blocks.add_row(label, f"{row['effect']:+.2f}", f"{row['kl']:.3f}", f"{row['coherence']:.2f}")
        print_table(blocks)
    doses = Table("strength ρ", "coherence", "repetition", "KL", title="The window of strengths", title_justify="left")
    for row in sorted(tables["doses"], key=lambda r: float(r["strength"])):
        doses.add_row(
            f"{row['strength']:+.2f}", f"{row['coherence']:.2f}", f"{row['repetition']:.2f}", f"{row['kl']:.3f}"
        )
    print_table(doses)
    say(
        f"{target}: blocks {block_ranges(vector.layers)}, strength {vector.strength:g}, usable from "
        f"{vector.window[0]:g} to {vector.window[1]:g}"
    )
