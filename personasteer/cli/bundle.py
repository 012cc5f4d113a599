from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from personasteer.cli._common import (
    CtxOption,
    GpuOption,
    GrammarOption,
    JsonOption,
    PredictOption,
    SchemaOption,
    SeedOption,
    StopOption,
    TempOption,
    ThreadsOption,
    as_dict,
    print_json,
    print_table,
    read_text,
    say,
    stages,
    write_piece,
)
from personasteer.cli._completion import complete_model

if TYPE_CHECKING:
    from personasteer.ship.bundle import CheckedBundle

PathArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle: a folder or a .tar file.")]

verbs = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


def register(app: typer.Typer) -> None:
    app.add_typer(
        verbs,
        name="bundle",
        help="Check a bundle and show what is in it (`show`), or talk to its persona (`chat`); both take `--json`.\n\n"
        'Example: `personasteer bundle chat optimist -p "How will my exam go?"`',
        short_help="Show a bundle, or talk to its persona.",
    )


@verbs.command("show")
def show(bundle: PathArgument, json: JsonOption = False) -> None:
    """Check every file of a bundle and show what the persona is.

    Example: `personasteer bundle show optimist`
    """
    from personasteer.ship.bundle import check_bundle

    with stages() as stage:
        found = check_bundle(bundle, progress=stage("checking"))
    if json:
        files = [{"path": name, "size": size} for name, size in found.sizes.items()]
        print_json({"bundle": str(bundle), **found.persona.model_dump(mode="json"), "contents": files})
    else:
        _print(bundle, found)


def _print(bundle: Path, found: CheckedBundle) -> None:
    from personasteer.ship.card import describe

    persona = found.persona
    model = persona.model
    lines = [f"{bundle}: {persona.name}, {len(found.sizes)} files, {sum(found.sizes.values()):,} bytes, all as listed"]
    if persona.description:
        lines.append(persona.description)
    lines += [
        f"for {model.file_name} ({model.name}, {model.architecture}, {model.quantization}, {model.size:,} bytes), "
        + ("included" if model.file else "not included"),
        f"SHA-256 {model.sha256}",
        *(f"run with {a.file}, scale {a.scale:g}" for a in persona.adapters),
    ]
    for line in lines:
        say(line)
    table = Table("edit", "vector", "amount", "blocks", "tokens")
    for edit in persona.edits:
        words = describe(edit, persona.vectors)
        table.add_row(*(_plain(words[key]) for key in ("op", "vector", "amount", "blocks", "tokens")))
    print_table(table)
    for v in persona.vectors:
        window = f"usable from {v.window[0]:g} to {v.window[1]:g}" if v.calibrated else "not calibrated"
        line = f"{v.file}: {v.name}, strength {v.strength:g}, {window}"
        say(line)
    for file in (*persona.reports, *(f"{f.file} ({f.what or f.kind})" for f in persona.files)):
        say(file)
    if persona.license:
        say(f"license: {persona.license}")


def _plain(text: str) -> str:
    """Foreign text in a table, whose cells read markup."""
    return text.replace("[", r"\[")


@verbs.command("chat")
def chat(
    bundle: PathArgument,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The message.")],
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="The GGUF file that it is for, or `demo`; found by itself if not given.",
            autocompletion=complete_model,
        ),
    ] = None,
    allow_other_model: Annotated[
        bool, typer.Option("--allow-other-model", help="Warn where the model is another one, instead of refusing.")
    ] = False,
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
    json: JsonOption = False,
) -> None:
    """One answer of a bundle's persona.

    Example: `personasteer bundle chat optimist -p "How will my exam go?"`
    """
    from personasteer.model import demo_model_path
    from personasteer.ship.bundle import load_bundle

    options: dict[str, Any] = {
        "max_tokens": predict,
        "temperature": temp,
        "repeat_penalty": repeat_penalty,
        "stop": stop or (),
        "grammar": read_text(grammar),
        "json_schema": read_text(json_schema),
    }
    with stages() as stage:
        opened = load_bundle(
            bundle,
            model=demo_model_path() if model == "demo" else model,
            allow_other_model=allow_other_model,
            progress=stage("checking"),
            n_ctx=ctx,
            n_parallel=1,
            n_threads=threads,
            n_gpu_layers=gpu_layers,
            seed=seed,
        )
    with opened as b:
        if json:
            with b.model.session() as s:
                print_json(as_dict(prompt, s.submit(prompt, steer=b.steering, system=system, **options).result()))
        else:
            b.chat(prompt, system=system, on_token=write_piece, **options)
            typer.echo()
