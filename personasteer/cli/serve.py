"""personasteer serve: an OpenAI-compatible server, a persona per request."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from personasteer.cli._common import (
    CtxOption,
    GpuOption,
    JsonOption,
    LoraOption,
    OffsetOption,
    RpcOption,
    ThreadsOption,
    load_adapters,
    model_path,
    read_text,
    split_strength,
    stderr,
    workers,
)
from personasteer.cli._completion import complete_model
from personasteer.errors import ArgumentError

KEY = "PERSONASTEER_API_KEY"


def register(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    model: Annotated[
        str | None,
        typer.Option(
            "-m", "--model", help="GGUF file, or `demo`; a bundle may have its own.", autocompletion=complete_model
        ),
    ] = None,
    vector: Annotated[
        list[str] | None,
        typer.Option(
            "-v",
            "--vector",
            metavar="NAME=FILE[:STRENGTH]",
            help="A vector that requests may name; with a strength, what they get by default.",
        ),
    ] = None,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="Serve a persona; requests may change it.")] = None,
    guard: Annotated[Path | None, typer.Option("--guard", help="Rules that watch every request, a TOML file.")] = None,
    watch: Annotated[
        list[str] | None, typer.Option("--watch", metavar="NAME", help="A vector that requests may guard.")
    ] = None,
    thresholds: Annotated[
        Path | None, typer.Option("--thresholds", help="Thresholds of `monitor`, instead of calibrating.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: any that is free.", min=0, max=65535)] = 8080,
    alias: Annotated[str | None, typer.Option("--alias", help="The model's name for clients.")] = None,
    parallel: Annotated[int, typer.Option("--parallel", help="Requests in a batch.", min=1, max=256)] = 4,
    queue: Annotated[int, typer.Option("--queue", help="Requests that may wait; more get 429.", min=0)] = 128,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that a request may take.", min=1)] = 600,
    grace: Annotated[float, typer.Option("--grace", help="Seconds that requests have when it stops.", min=0)] = 30,
    predict: Annotated[int | None, typer.Option("-n", "--predict", help="Tokens of an answer, at most.", min=1)] = None,
    max_body: Annotated[int, typer.Option("--max-body", help="MiB of a request.", min=1, max=1024)] = 8,
    api_key: Annotated[
        Path | None,
        typer.Option("--api-key-file", help=f"The key that requests must carry; without it what {KEY} says."),
    ] = None,
    origin: Annotated[
        list[str] | None, typer.Option("--origin", help="A web page's origin that may call it (CORS).")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="A host name that it answers to, beside its address.")
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="The page with sliders at /.")] = True,
    allow_upload: Annotated[bool, typer.Option("--allow-upload", help="Let the page take vector files.")] = False,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="Write requests to the log, in full.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="A line for every request.")] = False,
    lora: LoraOption = None,
    offset: OffsetOption = 0,
    ctx: CtxOption = 2048,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    rpc: RpcOption = None,
    json: JsonOption = False,
) -> None:
    """Serve a model to OpenAI clients; every request has its own mix of vectors.

    Example: `personasteer serve -m demo -v pessimistic=pessimistic.gguf`, then

        curl http://127.0.0.1:8080/v1/chat/completions -H "Content-Type: application/json" -d '{"messages":
        [{"role": "user", "content": "How will my exam go?"}],
        "steering": [{"vector": "pessimistic", "strength": 0.3}]}'
    """
    try:
        from personasteer.serve.app import create_app
        from personasteer.serve.run import bind, run
        from personasteer.serve.server import ServerOptions
        from personasteer.serve.worker import WorkerOptions
    except ImportError as e:
        raise ArgumentError(f'serve needs more packages ({e.name}): pip install "personasteer[serve]"') from e
    if model is None and bundle is None:
        raise ArgumentError("serve needs a model (-m) or a bundle (--bundle)")
    files, strengths = _vectors(vector or [])
    unknown = [name for name in watch or [] if name not in files]
    if unknown:
        raise ArgumentError(f"--watch {unknown[0]}: there is no -v {unknown[0]}=FILE")
    if "*" in (origin or ()):
        raise ArgumentError("--origin *: name the pages that may call the server")
    key = _key(api_key)
    worker = WorkerOptions(
        model=str(model_path(model).resolve()) if model is not None else None,
        vectors=files,
        bundle=str(bundle.resolve()) if bundle else None,
        policy=str(guard.resolve()) if guard else None,
        thresholds=str(thresholds.resolve()) if thresholds else None,
        watched=tuple(watch or ()),
        offset=offset, n_ctx=ctx, n_parallel=parallel, n_threads=threads, n_gpu_layers=gpu_layers, rpc=workers(rpc),
        lora=tuple(load_adapters(lora)),
    )  # fmt: skip
    local = host in ("127.0.0.1", "localhost", "::1")
    options = ServerOptions(
        alias=alias, strengths=strengths, api_key=key, max_waiting=queue, max_body=max_body * 2**20, timeout=timeout,
        max_tokens=predict, origins=tuple(origin or ()), log_bodies=log_requests,
        hosts=("localhost", "127.0.0.1", "[::1]", *(allow_host or ())) if local else tuple(allow_host or ()) or None,
    )  # fmt: skip
    sock = bind(host, port)
    if not local and key is None:
        stderr.print(f"personasteer: anybody who reaches {host} can use this server: set ${KEY}", style="yellow")
    application = create_app(worker, options)
    if page:
        from personasteer.serve.page import add_page

        add_page(application, application.state.server, upload=allow_upload)
    run(application, sock, grace=grace, verbose=verbose or log_requests, as_json=json)


def _vectors(given: list[str]) -> tuple[dict[str, str], dict[str, float]]:
    files, strengths = {}, {}
    for spec in given:
        name, equals, rest = spec.partition("=")
        if not equals or not name or not rest or "+" in name or ":" in name:
            raise ArgumentError(f"-v {spec}: must be NAME=FILE or NAME=FILE:STRENGTH, with no + or : in the name")
        file, strength = split_strength(rest)
        if name in files:
            raise ArgumentError(f"-v {spec}: there are two vectors of the name {name!r}")
        files[name] = str(Path(file).resolve())
        if strength is not None:
            strengths[name] = strength
    return files, strengths


def _key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(KEY) or None
    key = (read_text(file) or "").strip()
    if not key:
        raise ArgumentError(f"{file}: holds no key")
    return key
