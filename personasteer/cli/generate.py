from __future__ import annotations

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
    RpcOption,
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
    workers,
    write_piece,
)


def register(app: typer.Typer) -> None:
    app.command("generate")(generate)


def generate(
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text to continue, without a template.")],
    model: ModelOption = "demo",
    vector: VectorsOption = None,
    cap: CapOption = None,
    floor: FloorOption = None,
    ablate: AblateOption = None,
    scope: ScopeOption = "all",
    offset: OffsetOption = 0,
    predict: PredictOption = 128,
    temp: TempOption = 0.7,
    repeat_penalty: Annotated[float, typer.Option("--repeat-penalty", help="1 is off.")] = 1.0,
    stop: StopOption = None,
    grammar: GrammarOption = None,
    json_schema: SchemaOption = None,
    seed: SeedOption = 0,
    ctx: CtxOption = 2048,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    rpc: RpcOption = None,
    lora: LoraOption = None,
    json: JsonOption = False,
) -> None:
    """Continue a plain text, steered by any number of vectors.

    Example: `personasteer generate -m demo -v pessimistic.gguf:0.3 -p "Tomorrow the weather"`
    """
    steering = load_steering(vector, scope, offset, cap=cap, floor=floor, ablate=ablate)
    with open_model(
        model,
        n_ctx=ctx,
        n_parallel=1,
        n_threads=threads,
        n_gpu_layers=gpu_layers,
        rpc=workers(rpc),
        seed=seed,
        lora=load_adapters(lora),
    ) as m:
        options: dict[str, Any] = {
            "steer": steering,
            "max_tokens": predict,
            "temperature": temp,
            "repeat_penalty": repeat_penalty,
            "stop": stop or (),
            "grammar": read_text(grammar),
            "json_schema": read_text(json_schema),
        }
        if json:
            with m.session() as s:
                print_json(as_dict(prompt, s.submit(prompt=prompt, **options).result()))
        else:
            m.generate(prompt, on_token=write_piece, **options)
            typer.echo()
