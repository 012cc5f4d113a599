from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from personasteer.cli._common import (
    AblateOption,
    CapOption,
    CtxOption,
    FloorOption,
    GpuOption,
    GrammarOption,
    JsonOption,
    LoraOption,
    ModelOption,
    OffsetOption,
    PredictOption,
    SchemaOption,
    ScopeOption,
    SeedOption,
    StopOption,
    TempOption,
    ThreadsOption,
    VectorsOption,
    as_dict,
    load_adapters,
    load_steering,
    open_model,
    print_json,
    read_text,
    stderr,
    write_piece,
)


def register(app: typer.Typer) -> None:
    app.command("chat")(chat)


def chat(
    model: ModelOption = "demo",
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="One message; a dialogue without it.")] = None,
    vector: VectorsOption = None,
    cap: CapOption = None,
    floor: FloorOption = None,
    ablate: AblateOption = None,
    scope: ScopeOption = "all",
    offset: OffsetOption = 0,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    predict: PredictOption = 256,
    temp: TempOption = 0.7,
    repeat_penalty: Annotated[float, typer.Option("--repeat-penalty", help="1 is off.")] = 1.0,
    stop: StopOption = None,
    grammar: GrammarOption = None,
    json_schema: SchemaOption = None,
    seed: SeedOption = 0,
    ctx: CtxOption = 2048,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    lora: LoraOption = None,
    json: JsonOption = False,
) -> None:
    """Chat through the model's template, steered by any number of vectors.

    Example: `personasteer chat -m demo -v pessimistic.gguf:0.3 -p "How will my exam go?"`
    """
    steering = load_steering(vector, scope, offset, cap=cap, floor=floor, ablate=ablate)
    if prompt is None and json:
        raise typer.BadParameter("--json needs -p")
    with open_model(
        model, n_ctx=ctx, n_parallel=1, n_threads=threads, n_gpu_layers=gpu_layers, seed=seed, lora=load_adapters(lora)
    ) as m:
        options: dict[str, Any] = {
            "max_tokens": predict,
            "temperature": temp,
            "repeat_penalty": repeat_penalty,
            "steer": steering,
            "stop": stop or (),
            "grammar": read_text(grammar),
            "json_schema": read_text(json_schema),
        }
        if json:
            with m.session() as s:
                print_json(as_dict(prompt or "", s.submit(prompt or "", system=system, **options).result()))
            return
        messages: list[dict[str, str]] = []
        while True:
            if prompt is None:
                if sys.stdin.isatty():
                    stderr.print("> ", end="")
                line = sys.stdin.readline()
                if not line or line.strip() in ("/exit", "/quit"):
                    return
                if not line.strip():
                    continue
            messages.append({"role": "user", "content": prompt if prompt is not None else line.strip()})
            answer = m.chat(messages, system=system, reuse_cache=True, on_token=write_piece, **options)
            typer.echo()
            if prompt is not None:
                return
            messages.append({"role": "assistant", "content": answer})
