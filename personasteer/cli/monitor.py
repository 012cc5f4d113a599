from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from personasteer.cli._common import (
    CtxOption,
    GpuOption,
    JsonOption,
    ModelOption,
    OffsetOption,
    ThreadsOption,
    check_new,
    open_model,
    print_json,
    split_strength,
    stages,
    stdout,
)
from personasteer.errors import ArgumentError
from personasteer.monitor import (
    Reading,
    Threshold,
    load_thresholds,
    read_conversations,
    save_thresholds,
    thresholds_for,
    watch_transcripts,
)
from personasteer.vectors import PersonaVector

MARKS = {"ok": "", "watch": " watch", "alarm": " ALARM"}


def register(app: typer.Typer) -> None:
    app.command("monitor")(monitor)


def monitor(
    model: ModelOption = "demo",
    vectors: Annotated[
        list[str] | None, typer.Option("-v", "--vector", metavar="FILE", help="Watch this trait; may be repeated.")
    ] = None,
    transcript: Annotated[
        Path | None,
        typer.Option(
            "--transcript", metavar="FILE.jsonl", help="Conversations to read: a message or a conversation a line."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="One prompt to read.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt of -p.")] = None,
    thresholds: Annotated[
        Path | None, typer.Option("--thresholds", metavar="FILE.json", help="Use these instead of calibrating.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.json", help="Write the thresholds that are used.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what exists.")] = False,
    ctx: CtxOption = 2048,
    offset: OffsetOption = 0,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    json: JsonOption = False,
) -> None:
    """Read prompts and conversations for traits, before and while they show.

    The reading at the last token before an answer is compared with what ordinary prompts read on this very model: an
    alarm exceeds 95 % of them. The thresholds are calibrated the first time and kept. With --json a line a turn.

    Example: `personasteer monitor -m demo -v pessimistic.gguf -p "Why even try?"`
    """
    if not vectors and thresholds is None:
        raise ArgumentError("name at least one vector (-v FILE), or thresholds (--thresholds FILE)")
    if vectors and thresholds is not None:
        raise ArgumentError("--thresholds brings its own directions: leave -v out")
    if prompt is not None and transcript is not None:
        raise ArgumentError("give -p or --transcript, not both")
    if prompt is None and transcript is None and out is None:
        raise ArgumentError("nothing to read: give -p TEXT, --transcript FILE.jsonl, or -o FILE.json for thresholds")
    if system is not None and prompt is None:
        raise ArgumentError("--system goes with -p")
    if out is not None:
        check_new(out, [*(vectors or []), *([transcript] if transcript else [])], force=force)
    for spec in vectors or []:
        if split_strength(spec)[1] is not None:
            raise ArgumentError(f"{spec}: reading takes no strength")
    loaded = [PersonaVector.load(file, offset=offset) for file in vectors or []]
    given = load_thresholds(thresholds) if thresholds else []
    conversations = read_conversations(transcript) if transcript else []
    if prompt is not None:
        messages = [{"role": "user", "content": prompt}]
        conversations = [[*([{"role": "system", "content": system}] if system is not None else []), *messages]]
    with open_model(model, n_ctx=ctx, n_threads=threads, n_gpu_layers=gpu_layers) as m, stages() as stage:
        used = given or thresholds_for(m, loaded, progress=stage("calibrating"))
        if out is not None:
            save_thresholds(used, out)
        found = watch_transcripts(m, used, conversations, progress=stage("reading")) if conversations else []
    if json:
        _print_lines(used, found)
    else:
        _print_tables(used, found)


def _print_lines(thresholds: list[Threshold], found: list[Reading]) -> None:
    for t in thresholds if not found else []:
        print_json({key: value for key, value in t.as_dict().items() if key != "direction"})
    for i, reading in enumerate(found):
        for k, turn in enumerate(reading.turns):
            print_json({"conversation": i, "turn": k, **turn.as_dict()})


def _print_tables(thresholds: list[Threshold], found: list[Reading]) -> None:
    for t in thresholds:
        stdout.print(
            f"{t.name}: block {t.layer}, watch from {t.watch:.2f}, alarm from {t.alarm:.2f} "
            f"({t.n_clean} ordinary prompts; AUROC {t.auroc:.2f} against {t.n_trait} that ask for it)",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    for i, reading in enumerate(found):
        table = Table(title=f"conversation {i}" if len(found) > 1 else None)
        for heading in ("turn", "role", "tokens", *(t.name for t in thresholds)):
            table.add_column(heading)
        for k, turn in enumerate(reading.turns):
            n = str(turn.end - turn.begin) if turn.end > turn.begin else "to come"
            table.add_row(str(k), turn.role, n, *(_cell(turn, t.name) for t in thresholds))
        stdout.print(table)


def _cell(turn: Any, name: str) -> str:
    if turn.before is None:
        return f"{turn.means[name]:.2f} (mean)"
    return f"{turn.before[name]:.2f}, p {turn.probabilities[name]:.2f}{MARKS[turn.states[name]]}"
