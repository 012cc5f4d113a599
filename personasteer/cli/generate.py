from __future__ import annotations

from typing import Annotated

import typer

from personasteer.cli._common import (
    CtxOption,
    GpuOption,
    JsonOption,
    ModelOption,
    OffsetOption,
    PredictOption,
    ScopeOption,
    SeedOption,
    TempOption,
    ThreadsOption,
    VectorsOption,
    load_steering,
    open_model,
    print_json,
    write_piece,
)


def register(app: typer.Typer) -> None:
    app.command("generate")(generate)


def generate(
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text to continue, without a template.")],
    model: ModelOption = "demo",
    vector: VectorsOption = None,
    scope: ScopeOption = "all",
    offset: OffsetOption = 0,
    predict: PredictOption = 128,
    temp: TempOption = 0.7,
    repeat_penalty: Annotated[float, typer.Option("--repeat-penalty", help="1 is off.")] = 1.0,
    seed: SeedOption = 0,
    ctx: CtxOption = 2048,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    json: JsonOption = False,
) -> None:
    """Continue a plain text, steered by any number of vectors.

    Example: `personasteer generate -m demo -v pessimistic.gguf:0.3 -p "Tomorrow the weather"`
    """
    steering = load_steering(vector, scope, offset)
    with open_model(model, n_ctx=ctx, n_parallel=1, n_threads=threads, n_gpu_layers=gpu_layers, seed=seed) as m:
        text = m.generate(
            prompt,
            steer=steering,
            max_tokens=predict,
            temperature=temp,
            repeat_penalty=repeat_penalty,
            on_token=None if json else write_piece,
        )
        if json:
            print_json({"prompt": prompt, "text": text})
        else:
            typer.echo()
