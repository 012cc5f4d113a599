from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from rich.markup import escape
from rich.table import Table

from personasteer.cli._common import (
    CtxOption,
    GpuOption,
    JsonOption,
    ModelOption,
    OffsetOption,
    ThreadsOption,
    check_new,
    model_path,
    open_model,
    print_json,
    print_table,
    say,
    split_strength,
    stages,
)
from personasteer.errors import ArgumentError
from personasteer.files import check_folder
from personasteer.text import printable

if TYPE_CHECKING:
    from personasteer.monitor import Reading, Threshold, TurnDrift

MARKS = {"ok": "", "watch": " watch", "alarm": " ALARM"}
Drifts: TypeAlias = "list[dict[str, TurnDrift | None]]"  # of each conversation and trait


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
    clean: Annotated[
        Path | None,
        typer.Option("--clean", metavar="FILE.jsonl", help="Calibrate on these conversations, ordinary for you."),
    ] = None,
    thresholds: Annotated[
        Path | None, typer.Option("--thresholds", metavar="FILE.json", help="Use these instead of calibrating.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.json", help="Write the thresholds that are used.")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            "--tokens", metavar="FILE.jsonl|.parquet", help="Write the reading of every token at every block."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="DIR", help="Write index.html, text.png, drift.png and layers.png into this folder."
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline", metavar="FILE.jsonl", help="Conversations without drift, instead of the beginning of each."
        ),
    ] = None,
    running: Annotated[
        bool, typer.Option("--running", help="-o FILE.json also for running means, as chat --thresholds needs them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what exists.")] = False,
    ctx: CtxOption = 2048,
    offset: OffsetOption = 0,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    json: JsonOption = False,
) -> None:
    """Read prompts and conversations for traits, before and while they show.

    The reading at the last token before an answer is compared with what ordinary prompts read on this very model: an
    alarm exceeds 95 % of them. The thresholds are calibrated the first time and kept; those of --clean, at least 40
    conversations up to their last answer, are kept where -o FILE.json says. With --json a line a turn.

    A conversation of five answers and more also tells whether and from which turn on these readings drift; one in
    twenty is said to without a cause. --tokens and --report read every token at every block but the last; with
    --thresholds only at theirs.

    Example: `personasteer monitor -m demo -v pessimistic.gguf -p "Why even try?"`
    """
    from personasteer.monitor import (
        calibrate,
        check_readings_file,
        drift_of_turns,
        load_thresholds,
        read_baseline,
        read_clean,
        read_conversations,
        read_tokens,
        save_readings,
        save_thresholds,
        thresholds_for,
        watch_transcripts,
        watched,
    )
    from personasteer.monitor.page import report_files, write_report
    from personasteer.vectors import PersonaVector

    if not vectors and thresholds is None:
        raise ArgumentError("name at least one vector (-v FILE), or thresholds (--thresholds FILE)")
    if clean is not None and thresholds is not None:
        raise ArgumentError("--clean calibrates, and --thresholds brings what was calibrated: give one of the two")
    if vectors and thresholds is not None:
        raise ArgumentError("--thresholds brings its own directions: leave -v out")
    if prompt is not None and transcript is not None:
        raise ArgumentError("give -p or --transcript, not both")
    if prompt is None and transcript is None and out is None:
        raise ArgumentError("nothing to read: give -p TEXT, --transcript FILE.jsonl, or -o FILE.json for thresholds")
    if system is not None and prompt is None:
        raise ArgumentError("--system goes with -p")
    if baseline is not None and transcript is None:
        raise ArgumentError("--baseline goes with --transcript")
    if running and (out is None or thresholds is not None):
        raise ArgumentError("--running goes with -o FILE.json, and with thresholds that are calibrated here")
    if (tokens or report) and prompt is None and transcript is None:
        raise ArgumentError("nothing to read for --tokens and --report: give -p TEXT or --transcript FILE.jsonl")
    given_files = [path for path in (transcript, thresholds, baseline, clean) if path]
    inputs: list[str | Path] = [model_path(model), *(vectors or []), *given_files]
    if out is not None and tokens is not None and out.absolute() == tokens.absolute():
        raise ArgumentError(f"{out}: -o and --tokens must be two files")
    if tokens is not None:
        check_readings_file(tokens)
    for path in (out, tokens):
        if path is not None:
            check_new(path, inputs, force=force)
    for spec in vectors or []:
        if split_strength(spec)[1] is not None:
            raise ArgumentError(f"{spec}: reading takes no strength")
    loaded = [PersonaVector.load(file, offset=offset) for file in vectors or []]
    given = load_thresholds(thresholds) if thresholds else []
    names = [v.name for v in loaded] or [t.name for t in given]
    if len(set(names)) < len(names):
        raise ArgumentError(f"two have the same name: {', '.join(names)}")
    conversations = read_conversations(transcript) if transcript else []
    ordinary = read_clean(clean) if clean else []
    if prompt is not None:
        messages = [{"role": "user", "content": prompt}]
        conversations = [[*([{"role": "system", "content": system}] if system is not None else []), *messages]]
    compared = read_baseline(baseline) if baseline else []
    if report is not None:
        check_folder(report)
        for name in report_files(len(conversations), len(given or loaded)) if report.is_dir() else []:
            check_new(report / name, inputs, force=force)
    options = {"n_ctx": ctx, "n_parallel": max(1, min(4, len(conversations))), "n_threads": threads}
    with open_model(model, n_gpu_layers=gpu_layers, **options) as m, stages() as stage:
        used = given or (
            calibrate(m, loaded, clean=ordinary, running=running, progress=stage("calibrating"))
            if ordinary
            else thresholds_for(m, loaded, running=running, progress=stage("calibrating"))
        )
        if out is not None:
            save_thresholds(used, out)
        others = watch_transcripts(m, used, compared, progress=stage("reading the baseline")) if compared else []
        if tokens or report:
            last = any(t.layer == m.n_layer - 1 for t in used)
            read = read_tokens(
                m, given or loaded, conversations, thresholds=used, last_layer=last, progress=stage("reading")
            )
            found = [watched(r, used) for r in read]
        else:
            found = watch_transcripts(m, used, conversations, progress=stage("reading")) if conversations else []
    drifts = [{t.name: drift_of_turns(r, t.name, baseline=others) for t in used} for r in found]
    if tokens is not None:
        save_readings(read, tokens)
    if report is not None:
        write_report(report, read, thresholds=used, baseline=others)
    if json:
        _print_lines(used, found, drifts)
        return
    _print_tables(used, found, drifts)
    if tokens is not None:
        say(f"tokens: {tokens}")
    if report is not None:
        say(f"report: {report}/index.html and its figures")


def _print_lines(thresholds: list[Threshold], found: list[Reading], drifts: Drifts) -> None:
    for t in thresholds if not found else []:
        print_json({key: value for key, value in t.as_dict().items() if key != "direction"})
    for i, reading in enumerate(found):
        for k, turn in enumerate(reading.turns):
            print_json({"conversation": i, "turn": k, **turn.as_dict()})
        if known := {name: drift.as_dict() for name, drift in drifts[i].items() if drift}:
            print_json({"conversation": i, "drift": known})


def _print_tables(thresholds: list[Threshold], found: list[Reading], drifts: Drifts) -> None:
    for t in thresholds:
        say(
            f"{t.name}: block {t.layer}, watch from {t.watch:.2f}, alarm from {t.alarm:.2f} ({t.n_clean} ordinary "
            f"prompts and {t.n_trait} that ask for it; AUROC {t.auroc:.2f} on others)"
        )
    for i, reading in enumerate(found):
        table = Table(title=f"conversation {i}" if len(found) > 1 else None)
        for heading in ("turn", "role", "tokens", *(t.name for t in thresholds)):
            table.add_column(escape(printable(heading)))
        for k, turn in enumerate(reading.turns):
            n = str(turn.end - turn.begin) if turn.end > turn.begin else "to come"
            table.add_row(str(k), escape(printable(turn.role)), n, *(_cell(turn, t.name) for t in thresholds))
        print_table(table)
        for name, drift in drifts[i].items():
            if drift:
                say(f"{name}: {_drift(drift)}")


def _drift(drift: TurnDrift) -> str:
    said = "does not drift"
    if drift.turn is not None:
        said = f"drifts {'up' if drift.chart.direction > 0 else 'down'} from turn {drift.turn} on"
    return f"{said} (readings before answers without drift: {drift.chart.mean:.2f} ± {drift.chart.spread:.2f})"


def _cell(turn: Any, name: str) -> str:
    if turn.before is None:
        return f"{turn.means[name]:.2f} (mean)"
    return f"{turn.before[name]:.2f}, p {turn.probabilities[name]:.2f}{MARKS[turn.states[name]]}"
