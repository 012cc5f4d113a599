from __future__ import annotations

import json as jsons
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    check_new,
    harmless,
    load_adapters,
    load_steering,
    model_path,
    open_model,
    print_json,
    read_text,
    split_strength,
    stages,
    stderr,
    workers,
    write_piece,
)
from personasteer.errors import ArgumentError, PersonasteerError

if TYPE_CHECKING:
    from personasteer.model import Model
    from personasteer.monitor import Event, Guard, GuardedAnswer, Rule, Threshold

BARS = "▁▂▃▄▅▆▇█"


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
    rpc: RpcOption = None,
    lora: LoraOption = None,
    watch: Annotated[
        list[str] | None,
        typer.Option("--watch", metavar="FILE", help="Read this trait before and while it answers; may be repeated."),
    ] = None,
    guard: Annotated[
        Path | None, typer.Option("--guard", metavar="POLICY.toml", help="Act on alarms by the rules of this file.")
    ] = None,
    guard_log: Annotated[
        Path | None, typer.Option("--guard-log", metavar="FILE.jsonl", help="Append what happened, a line an event.")
    ] = None,
    thresholds: Annotated[
        Path | None,
        typer.Option("--thresholds", metavar="FILE.json", help="Of monitor --running -o, instead of calibrating."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Chat through the model's template, steered by any number of vectors, and watched or guarded for others.

    --watch prints to stderr what it reads before the first token, and when the running mean over the answer's tokens
    changes its state. It and --guard calibrate the model the first time, which takes some minutes, and keep what they
    found; they ask models that think for an answer without thinking, as they are calibrated.

    Example: `personasteer chat -m demo -v pessimistic.gguf:0.3 -p "How will my exam go?"`
    """
    from personasteer.monitor import load_thresholds

    steering = load_steering(vector, scope, offset, cap=cap, floor=floor, ablate=ablate)
    if prompt is None and json:
        raise typer.BadParameter("--json needs -p")
    steered = [split_strength(spec)[0] for spec in (*(vector or []), *(cap or []), *(floor or []), *(ablate or []))]
    inputs: list[str | Path] = [model_path(model), *steered, *([thresholds] if thresholds else [])]
    rules = _rules(watch, guard, guard_log, offset, inputs)
    if thresholds is not None and not rules:
        raise ArgumentError("--thresholds goes with --guard or --watch")
    given = None if thresholds is None else load_thresholds(thresholds)
    with (
        open_model(
            model, n_ctx=ctx, n_parallel=1, n_threads=threads, n_gpu_layers=gpu_layers, rpc=workers(rpc), seed=seed,
            lora=load_adapters(lora),
        ) as m,
        ExitStack() as stack,
    ):  # fmt: skip
        options: dict[str, Any] = {
            "max_tokens": predict,
            "temperature": temp,
            "repeat_penalty": repeat_penalty,
            "steer": steering,
            "stop": stop or (),
            "grammar": read_text(grammar),
            "json_schema": read_text(json_schema),
        }
        guarded = _guard(m, rules, given, guard_log, quiet=json, stack=stack) if rules else None
        if json:
            with m.session() as s:
                if guarded:
                    print_json(
                        _guarded_dict(prompt or "", guarded.submit(s, prompt, system=system, **options).result())
                    )
                else:
                    print_json(as_dict(prompt or "", s.submit(prompt or "", system=system, **options).result()))
            return
        live = stack.enter_context(m.session()) if guarded else None
        messages: list[dict[str, str]] = []
        earlier: dict[str, str] = {}
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
            if guarded and live:
                stream = guarded.submit(live, messages, system=system, earlier=earlier, **options)
                for piece in stream:
                    write_piece(0, piece)
                typer.echo()
                found = stream.result()
                answer, earlier = found.text, found.states_before
                _print_running(found, guarded)
            else:
                answer = m.chat(messages, system=system, reuse_cache=True, on_token=write_piece, **options)
                typer.echo()
            if prompt is not None:
                return
            messages.append({"role": "assistant", "content": answer})


def _rules(
    watch: list[str] | None, guard: Path | None, guard_log: Path | None, offset: int, inputs: list[str | Path]
) -> list[Rule]:
    import numpy as np

    from personasteer.monitor import Rule, load_policy
    from personasteer.vectors import PersonaVector

    if guard_log is not None and not (watch or guard):
        raise ArgumentError("--guard-log goes with --guard or --watch")
    for spec in watch or []:
        if split_strength(spec)[1] is not None:
            raise ArgumentError(f"{spec}: reading takes no strength")
    rules = load_policy(guard) if guard else []
    if guard_log is not None:
        check_new(guard_log, [*inputs, *(watch or []), *([guard] if guard else [])], force=True)
    named = {rule.vector.name: rule.vector for rule in rules}
    for file in watch or []:
        vector = PersonaVector.load(file, offset=offset)
        known = named.setdefault(vector.name, vector)
        if known is vector:
            rules.append(Rule(vector))
        elif not np.array_equal(known.directions, vector.directions, equal_nan=True):
            raise ArgumentError(f"{file}: another vector of the name {vector.name!r} is watched, too")
    return rules


def _guard(
    m: Model, rules: list[Rule], thresholds: list[Threshold] | None, log: Path | None, *, quiet: bool, stack: ExitStack
) -> Guard:
    from personasteer.monitor import Guard

    with stages() as stage:
        guard = Guard(m, rules, thresholds=thresholds, progress=stage("calibrating"))
    write: Callable[[str], object] | None = None
    if log is not None:
        try:
            write = stack.enter_context(log.open("a", encoding="utf-8", buffering=1)).write
        except OSError as e:
            raise ArgumentError(f"{log}: cannot write here ({e.strerror})") from e

    def on_event(event: Event) -> None:
        if write:
            try:
                write(jsons.dumps(event.as_dict(), ensure_ascii=False) + "\n")
            except OSError as e:
                raise PersonasteerError(f"{log}: cannot be written ({e.strerror})") from e
        if not quiet and event.action != "log":
            p = "" if event.probability is None else f", p {event.probability:.2f}"
            done = f": {event.action}" if event.action else ""
            when = "before the answer" if event.moment == "before" else f"at token {event.token}"
            text = harmless(f"[{event.name} {event.reading:.2f}{p}, {event.state} {when}{done}]")
            if event.moment == "during" and sys.stdout.isatty() and sys.stderr.isatty():
                stderr.print()  # the answer's line is not at its end
            stderr.print(text, markup=False, soft_wrap=True, style="bold red" if event.state == "alarm" else "dim")

    guard.on_event = on_event
    return guard


def _print_running(found: GuardedAnswer, guard: Guard) -> None:
    import numpy as np

    for t in guard.thresholds:
        means = found.running[t.name][np.isfinite(found.running[t.name])]
        if len(means) and t.running:
            low, high = float(means.min()), float(means.max())
            bars = "".join(
                BARS[round(7 * (x - low) / ((high - low) or 1.0))] for x in means[:: max(1, len(means) // 40)]
            )
            limits = f"watch from {t.running.watch:.2f}, alarm from {t.running.alarm:.2f}"
            text = f"[{t.name} while answering {low:.2f} {bars} {high:.2f}, {t.running.state(high)} ({limits})]"
            stderr.print(harmless(text), markup=False, soft_wrap=True, style="dim")


def _number(x: float) -> float | None:
    import numpy as np

    return float(x) if np.isfinite(x) else None


def _guarded_dict(prompt: str, found: GuardedAnswer) -> dict[str, Any]:
    import numpy as np

    return {
        **as_dict(prompt, found.answer),
        "before": {name: _number(reading) for name, reading in found.before.items()},
        "running": {name: [_number(x) for x in np.round(means, 4)] for name, means in found.running.items()},
        "attempts": found.attempts,
        "events": [e.as_dict() for e in found.events],
    }
