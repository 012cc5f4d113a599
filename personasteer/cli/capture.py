from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personasteer.cli._common import (
    CtxOption,
    GpuOption,
    JsonOption,
    ModelOption,
    OffsetOption,
    RpcOption,
    ScopeOption,
    ThreadsOption,
    VectorsOption,
    load_steering,
    open_model,
    print_json,
    say,
    stages,
    workers,
)
from personasteer.cli._completion import one_of
from personasteer.errors import ArgumentError
from personasteer.files import atomic_write, check_output, parse_line, read_lines

if TYPE_CHECKING:
    from personasteer.model import Item


def register(app: typer.Typer) -> None:
    app.command("capture")(capture)


def capture(
    texts: Annotated[Path, typer.Option("-f", "--file", help="Texts, one a line; or .jsonl of pairs or messages.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="safetensors file to write.")],
    model: ModelOption = "demo",
    pool: Annotated[
        str, typer.Option("--pool", help="mean, last or raw.", autocompletion=one_of("mean", "last", "raw"))
    ] = "mean",
    span: Annotated[
        str | None,
        typer.Option("--span", help="all, prompt or response.", autocompletion=one_of("all", "prompt", "response")),
    ] = None,
    last_layer: Annotated[bool, typer.Option("--last-layer", help="Also the last block (mean, raw).")] = False,
    vector: VectorsOption = None,
    scope: ScopeOption = "all",
    offset: OffsetOption = 0,
    ctx: CtxOption = 2048,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    rpc: RpcOption = None,
    json: JsonOption = False,
) -> None:
    """Write the block outputs of texts as safetensors.

    A .jsonl line is a string, a pair ["prompt", "answer"], {"prompt": .., "answer": ..} or {"messages": [..]}.
    Tensor `activations` is (n, n_layer, n_embd); with --pool raw, `activations.<i>` is (n_tokens, n_layer, n_embd).

    Example: `personasteer capture -m demo -f texts.txt -o activations.safetensors --pool mean`
    """
    import numpy as np
    from safetensors.numpy import save

    check_output(out)
    items = read_items(texts)
    steering = load_steering(vector, scope, offset)
    with (
        open_model(model, n_ctx=ctx, n_threads=threads, n_gpu_layers=gpu_layers, rpc=workers(rpc)) as m,
        stages() as stage,
    ):
        found = m.capture(
            items, pool=pool, span=span, last_layer=last_layer, steer=steering, progress=stage("capturing")
        )
        metadata = {"model": m.name, "fingerprint": m.fingerprint, "pool": pool, "span": span or "default"}
        metadata["steering"] = f"{' '.join(vector)} scope={scope}" if vector else ""
    if pool == "raw":
        tensors = {f"activations.{i}": np.ascontiguousarray(a) for i, a in enumerate(found)}
    else:
        tensors = {"activations": found}
    atomic_write(out, save(tensors, metadata))
    shapes = {k: list(v.shape) for k, v in tensors.items()}
    if json:
        print_json({"file": str(out), "n": len(items), "shapes": shapes, **metadata})
    else:
        first = next(iter(shapes.values()))
        say(f"{out}: {len(items)} texts, {pool}, shape {first}")


def read_items(path: Path) -> list[Item]:
    """The texts, pairs or messages of a file. Raises ArgumentError when it is missing, malformed or empty."""
    lines = read_lines(path)
    if not lines:
        raise ArgumentError(f"{path}: holds no text")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_item(line, where) for where, line in lines]


def _item(line: str, where: str) -> Item:
    value = parse_line(line, where)
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return list(value["messages"])
    if isinstance(value, dict):
        value = [value.get("prompt"), value.get("answer")]
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value):
        return (value[0], value[1])
    raise ArgumentError(f'{where}: needs a string, ["prompt", "answer"], a prompt and an answer, or messages')
