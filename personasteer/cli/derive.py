from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from personasteer.cli._common import (
    CtxOption,
    GpuOption,
    JsonOption,
    ModelOption,
    SeedOption,
    ThreadsOption,
    open_model,
    print_json,
    stages,
    stdout,
)
from personasteer.derive import derive as derive_vector
from personasteer.files import check_output
from personasteer.traits import find


def register(app: typer.Typer) -> None:
    app.command("derive")(derive)


def derive(
    trait: Annotated[str, typer.Argument(help="A trait of the library, or a .toml file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Control-vector GGUF to write.")],
    model: ModelOption = "demo",
    questions: Annotated[int | None, typer.Option("--questions", help="Questions per system prompt.", min=1)] = None,
    predict: Annotated[int, typer.Option("-n", "--predict", help="Tokens of an answer, at most.", min=1)] = 40,
    temp: Annotated[float, typer.Option("--temp", help="Temperature of the answers.", min=0.0)] = 0.2,
    layers: Annotated[str | None, typer.Option("--layers", help="Blocks to steer at, as 12-17 or 3,5,9.")] = None,
    seed: SeedOption = 0,
    ctx: CtxOption = 512,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    json: JsonOption = False,
) -> None:
    """Derive a trait's vector on a model and write it as a control vector.

    Example: `personasteer derive pessimistic -m demo -o pessimistic.gguf`
    """
    check_output(out)
    found = find(trait)
    chosen = parse_layers(layers) if layers else None
    options = {"n_ctx": ctx, "n_parallel": 1, "n_threads": threads, "n_gpu_layers": gpu_layers, "seed": seed}
    with open_model(model, **options) as m, stages() as stage:
        vector = derive_vector(
            m,
            found,
            n_questions=questions,
            max_tokens=predict,
            temperature=temp,
            layers=chosen,
            progress=stage(f"deriving {found.name}"),
        )
    vector.save(out)
    at = list(vector.layers)
    assert vector.separations is not None
    assert vector.reliability is not None
    result = {
        "vector": str(out),
        "trait": vector.name,
        "layers": at,
        "separation": _mean(vector.separations[at]),
        "split_half_cosine": _mean(vector.reliability[at]),
        "n_positive": vector.provenance["n_positive"],
        "n_negative": vector.provenance["n_negative"],
    }
    if json:
        print_json(result)
    else:
        stdout.print(
            f"{out}: {vector.name}, blocks {at[0]}-{at[-1]}, from {result['n_positive']} + {result['n_negative']} "
            f"answers; separation d {_text(result['separation'])}, "
            f"split-half cosine {_text(result['split_half_cosine'])}",
            markup=False,
            soft_wrap=True,
        )


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 4) if np.isfinite(values).all() else None


def _text(value: float | None) -> str:
    return "not measured (one question only)" if value is None else f"{value:.2f}"


def parse_layers(text: str) -> list[int]:
    """[12, 13, 14] of "12-14" and [3, 5] of "3,5"."""
    out: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part, re.ASCII)
        layers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not layers:
            raise typer.BadParameter(f"layers must look like 12-17 or 3,5,9, not {text!r}")
        out += layers
    return out
