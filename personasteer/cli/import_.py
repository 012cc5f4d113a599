from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from personasteer.cli._common import (
    GpuOption,
    JsonOption,
    ThreadsOption,
    check_new,
    model_path,
    open_model,
    print_json,
    say,
)
from personasteer.cli._completion import complete_model, one_of
from personasteer.errors import ArgumentError

KINDS = {
    "personasteer": "a vector of personasteer",
    "control vector": "a control vector",
    "projection": "a projection",
    "safetensors": "directions in safetensors",
    "autoencoder": "a feature of an autoencoder",
}
OFFSETS: dict[str, int | Literal["auto"]] = {"0": 0, "1": 1, "auto": "auto"}


def register(app: typer.Typer) -> None:
    app.command("import")(import_)


def import_(
    file: Annotated[Path, typer.Argument(help="Control-vector GGUF of any tool, safetensors, or an SAE's npz.")],
    base: Annotated[
        str,
        typer.Option("-m", "--model", help="The model that it is for; its norms count.", autocompletion=complete_model),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")],
    offset: Annotated[
        str,
        typer.Option(
            "--offset",
            metavar="0|1|auto",
            help="Block = N - offset; auto: what a GGUF looks like.",
            autocompletion=one_of("0", "1", "auto"),
        ),
    ] = "0",
    feature: Annotated[int | None, typer.Option("--feature", help="Feature of a sparse autoencoder.", min=0)] = None,
    layer: Annotated[int | None, typer.Option("--layer", help="Block that the autoencoder is for.", min=0)] = None,
    key: Annotated[str | None, typer.Option("--key", help="Tensor to take, where there are several.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the vector.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    json: JsonOption = False,
) -> None:
    """Turn directions of another tool into a vector file with the norms of a model, to steer by a relative strength.

    Example: `personasteer import happy.gguf -m demo -o happy-here.gguf --offset auto`
    """
    from personasteer.ship.imports import import_vector

    if offset not in OFFSETS:
        raise ArgumentError(f"--offset must be 0, 1 or auto, not {offset!r}")
    check_new(out, [model_path(base), file], force=force)
    with open_model(base, n_ctx=512, n_parallel=1, n_threads=threads, n_gpu_layers=gpu_layers) as m:
        vector = import_vector(file, m, offset=OFFSETS[offset], feature=feature, layer=layer, key=key, name=name)
        vector.save(out)
    taken: dict[str, Any] = {
        "file": str(out),
        "name": vector.name,
        "kind": vector.provenance.get("kind", "personasteer"),
        "tool": vector.provenance.get("tool"),
        "offset": vector.provenance.get("offset"),
        "layers": list(vector.layers),
        "n_layer": vector.n_layer,
        "n_embd": vector.n_embd,
        "stored_strength": vector.provenance.get("stored_strength"),
    }
    if json:
        print_json(taken)
        return
    lines = [f"{file}: taken for {_described(taken)}", f"{out}: {vector.name!r}, blocks {list(vector.layers)}"]
    if taken["stored_strength"] is not None:
        lines.append(f"added as it stood it was strength {taken['stored_strength']:.3g} on this model")
    if taken["kind"] == "projection":
        lines.append(f"to be projected out: --ablate {out}")
    for line in lines:
        say(line)


def _described(taken: dict[str, Any]) -> str:
    text = KINDS[taken["kind"]]
    if taken["kind"] == "control vector":
        text += f" of {taken['tool'] or 'an unknown tool'}"
    return text if taken["offset"] is None else f"{text}, offset {taken['offset']}: N is block N - {taken['offset']}"
