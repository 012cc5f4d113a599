from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from personasteer.cli._common import (
    GpuOption,
    JsonOption,
    OffsetOption,
    SeedOption,
    ThreadsOption,
    model_path,
    print_json,
    say,
    split_strength,
    stages,
)
from personasteer.cli._completion import complete_model, trait_names
from personasteer.errors import ArgumentError


def register(app: typer.Typer) -> None:
    app.command("audit")(audit_)


def audit_(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for audit.html and audit.json.")],
    model: Annotated[
        str | None,
        typer.Option(
            "-m", "--model", help="GGUF file to audit, or `demo` for the bundled one.", autocompletion=complete_model
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="The model that it is a version of: what changed?",
            autocompletion=complete_model,
        ),
    ] = None,
    previous: Annotated[
        str | None,
        typer.Option(
            "--previous",
            metavar="DIR|FILE.json|LABEL",
            help="An earlier audit, or a model of `track add`, to compare with.",
        ),
    ] = None,
    vectors: Annotated[
        list[str] | None, typer.Option("-v", "--vector", metavar="FILE", help="Test this vector; may be repeated.")
    ] = None,
    traits: Annotated[
        str | None,
        typer.Option(
            "--traits",
            metavar="A,B,..",
            autocompletion=trait_names,
            help="Derive and test vectors of these traits, from their written continuations. Without this and -v: "
            "sycophantic, hallucinating, toxic, pessimistic, formal. Each costs about a tenth of the audit.",
        ),
    ] = None,
    render: Annotated[
        Path | None,
        typer.Option("--render", metavar="FILE.json", help="Only write the page of this log; measures nothing."),
    ] = None,
    questions: Annotated[int, typer.Option("--questions", help="Held-out questions per vector, at most.", min=2)] = 8,
    random: Annotated[int, typer.Option("--random", help="Random vectors to compare each with.", min=1)] = 12,
    work: Annotated[
        Path | None,
        typer.Option("--work", metavar="DIR", help="Keep finished parts here; the same command then goes on."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what exists.")] = False,
    seed: SeedOption = 0,
    ctx: Annotated[int, typer.Option("-c", "--ctx-size", help="Tokens of prompt and answer.", min=64, max=2**24)] = 512,
    offset: OffsetOption = 0,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    json: JsonOption = False,
) -> None:
    """Examine a model and write one page: what is in the file, its character, whether it can be steered and watched,
    what changed against its base, and what was not tested.

    The log of all figures, audit.json, stands beside the page, which is made of it alone. On two cores it takes about a
    quarter of an hour for 135M parameters, and in proportion for more; --base adds a quarter. --work DIR lets it be
    interrupted.

    Example: `personasteer audit -m demo --out audit`
    """
    from personasteer.monitor.audit.log import read_audit
    from personasteer.monitor.audit.measure import audit_model, load_earlier
    from personasteer.monitor.audit.page import check_new_folder, write_audit
    from personasteer.vectors import PersonaVector

    if render is not None:
        if model is not None or base or previous or vectors or traits or work is not None:
            raise ArgumentError("--render shows a log that exists: it goes with --out and --force only")
        log = read_audit(render)
        check_new_folder(out, force=force)
    else:
        if model is None:
            raise ArgumentError("name a model (-m), or a log (--render FILE.json)")
        for spec in vectors or []:
            if split_strength(spec)[1] is not None:
                raise ArgumentError(f"{spec}: an audit takes no strength, the vector's own is used")
        names = [t.strip() for t in traits.split(",")] if traits is not None else None
        if names is not None and (not all(names) or len(set(names)) < len(names)):
            raise ArgumentError(f"--traits must be different names separated by commas, not {traits!r}")
        check_new_folder(out, force=force)
        before = load_earlier(previous) if previous is not None else None
        loaded = [PersonaVector.load(file, offset=offset) for file in vectors or []]
        with stages() as stage:
            log = audit_model(
                model_path(model),
                base=None if base is None else model_path(base),
                previous=before,
                vectors=loaded,
                traits=names,
                n_questions=questions,
                n_random=random,
                seed=seed,
                n_ctx=ctx,
                n_threads=threads,
                n_gpu_layers=gpu_layers,
                work=work,
                stage=lambda name: stage(escape(name)),  # names of vectors are foreign
            )
    written = write_audit(out, log)
    if json:
        print_json(log)
        return
    for finding in log["findings"]:
        say(f"{finding['about']}: {finding['text']}", prose=True)
    say(f"report: {written[0]}; log: {written[1].name}")
