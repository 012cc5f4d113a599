from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from personasteer.cli._common import (
    GpuOption,
    JsonOption,
    OffsetOption,
    ThreadsOption,
    open_model,
    print_json,
    split_strength,
    stdout,
)
from personasteer.errors import ArgumentError
from personasteer.files import check_output
from personasteer.model import Model
from personasteer.ship import scaled_directions
from personasteer.steering import check_fits
from personasteer.vectors import PersonaVector

KINDS = ("control-vector",)


def register(app: typer.Typer) -> None:
    app.command("export")(export)


def export(
    kind: Annotated[str, typer.Argument(help="control-vector")],
    vectors: Annotated[
        list[str], typer.Argument(metavar="FILE[:STRENGTH]..", help="Vectors; the strength is folded in.")
    ],
    base: Annotated[str, typer.Option("-m", "--model", help="The model that it is for; its norms count.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    offset: OffsetOption = 0,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    json: JsonOption = False,
) -> None:
    """Write vectors, at given strengths and summed, as one file that llama.cpp loads at scale 1.0.

    Example: `personasteer export control-vector pessimistic.gguf:-0.3 -m demo -o optimist.gguf`
    """
    if kind not in KINDS:
        raise ArgumentError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    check_output(out)
    if out.exists() and not force:
        raise ArgumentError(f"{out}: exists already; --force overwrites it")
    specs = [split_strength(v) for v in vectors]
    loaded = [PersonaVector.load(file, offset=offset) for file, _ in specs]
    with open_model(base, n_ctx=512, n_parallel=1, n_threads=threads, n_gpu_layers=gpu_layers) as m:
        parts = [(v, v.strength if s is None else s) for v, (_, s) in zip(loaded, specs, strict=True)]
        vector = fold(m, parts)
        vector.save(out)
    if json:
        used = [{"file": file, "strength": s} for (file, _), (_, s) in zip(specs, parts, strict=True)]
        print_json({"file": str(out), "kind": kind, "layers": list(vector.layers), "vectors": used})
    else:
        stdout.print(
            f"{out}: blocks {list(vector.layers)}; use it as: llama-cli -m MODEL --control-vector {out}",
            markup=False,
            soft_wrap=True,
        )


def fold(model: Model, parts: Sequence[tuple[PersonaVector, float]]) -> PersonaVector:
    """The vector whose recommended strength does on `model` what all parts do together.

    Scaled directions are summed per block; the total strength is rho = sum_il ||sum|| / m_il, the weights each
    block's share of it.
    """
    for vector, strength in parts:
        check_fits(vector, model)
        if strength == 0:
            raise ArgumentError(f"a strength of 0 for {vector.name!r} exports nothing")
    if len(parts) == 1 and parts[0][1] > 0 and parts[0][0].n_layer == model.n_layer:
        vector, strength = parts[0]
        return replace(vector, norms=model.norms, strength=strength)
    total = np.zeros((model.n_layer, model.n_embd), np.float64)
    for vector, strength in parts:
        for il, row in scaled_directions(replace(vector, norms=model.norms[: vector.n_layer]), strength).items():
            total[il] += row
    share = np.linalg.norm(total, axis=1) / model.norms
    layers = tuple(int(il) for il in np.flatnonzero(share > 0))
    if not layers:
        raise ArgumentError("these vectors cancel: nothing is left to export")
    rho = float(share.sum())
    directions = total.astype(np.float32)
    directions[[il for il in range(model.n_layer) if il not in layers]] = np.nan
    return PersonaVector(
        directions,
        layers,
        "+".join(f"{v.name}:{s:g}" for v, s in parts),
        rho,
        {il: float(share[il] / rho) for il in layers},
        norms=model.norms,
        provenance={
            "method": "fold",
            **model.origin,
            "parts": [{"name": v.name, "strength": s, "provenance": dict(v.provenance)} for v, s in parts],
        },
    )
