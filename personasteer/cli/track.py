from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from personasteer.cli._common import (
    CtxOption,
    GpuOption,
    JsonOption,
    OffsetOption,
    ThreadsOption,
    open_model,
    print_json,
    print_table,
    say,
    split_strength,
    stages,
)
from personasteer.cli._completion import complete_model
from personasteer.errors import ArgumentError
from personasteer.text import printable

if TYPE_CHECKING:
    from personasteer.monitor.profile import Shift
    from personasteer.monitor.registry import Registry, TrackedModel
    from personasteer.monitor.tracking import VectorComparison

N_SHIFTS, N_REASONS = 8, 3  # shown; --json has all

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="GGUF file, or `demo` for the bundled one.", autocompletion=complete_model),
]

verbs = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


def register(app: typer.Typer) -> None:
    app.add_typer(
        verbs,
        name="track",
        help="Keep what was measured of models and of vectors on them (`add`, `list`, `compare`), and find out what "
        "still holds on a new version of a model (`check`); all take `--json`. The registry is one file in the user's "
        "data folder; the environment variable PERSONASTEER_REGISTRY names another.\n\n"
        "Example: `personasteer track add demo -v pessimistic.gguf --name stable`",
        short_help="Track models, and check new versions of them.",
    )


@verbs.command("add")
def add(
    model: ModelArgument,
    vectors: Annotated[
        list[str] | None, typer.Option("-v", "--vector", metavar="FILE", help="Track this vector on it, too.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="LABEL", help="Your name for the model.")] = None,
    ctx: CtxOption = 2048,
    offset: OffsetOption = 0,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    json: JsonOption = False,
) -> None:
    """Store a model, vectors with their thresholds on it, and what fixed texts give: all of it, or nothing.

    Again with other vectors it adds these; measured anew, the newest figures count.

    Example: `personasteer track add demo -v pessimistic.gguf --name stable`
    """
    from personasteer.monitor.registry import Registry
    from personasteer.monitor.tracking import track_model
    from personasteer.vectors import PersonaVector

    for spec in vectors or []:
        if split_strength(spec)[1] is not None:
            raise ArgumentError(f"{spec}: tracking takes no strength, the vector's own is used")
    loaded = [PersonaVector.load(file, offset=offset) for file in vectors or []]
    with (
        Registry() as registry,
        open_model(model, n_ctx=ctx, n_threads=threads, n_gpu_layers=gpu_layers) as m,
        stages() as stage,
    ):
        tracked = track_model(m, loaded, registry, label=name, progress=stage("measuring"))
        entry = _entry(registry, tracked)
    if json:
        print_json(entry)
    else:
        _print_entry(entry)


@verbs.command("list")
def list_(json: JsonOption = False) -> None:
    """Show the tracked models in the order in which they were added, their vectors and the last verdicts.

    Example: `personasteer track list`
    """
    from personasteer.monitor.registry import Registry, registry_path

    entries = []
    if registry_path().exists():
        with Registry() as registry:
            entries = [_entry(registry, model) for model in registry.models()]
    if json:
        print_json({"registry": str(registry_path()), "models": entries})
        return
    if not entries:
        say("no model is tracked yet; begin with: personasteer track add MODEL")
    for entry in entries:
        _print_entry(entry)


@verbs.command("compare")
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="Label or fingerprint of a tracked model.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    json: JsonOption = False,
) -> None:
    """Show what two tracked models differ in, from what is stored of them.

    Example: `personasteer track compare stable tuned`
    """
    from personasteer.monitor.registry import Registry
    from personasteer.monitor.tracking import compare_models

    with Registry(create=False) as registry:
        found = compare_models(registry, first, second)
    if json:
        print_json(found.as_dict())
        return
    say(f"from {_named(found.first)} to {_named(found.second)}: {found.differs or 'the same file'}")
    for v in found.vectors:
        _print_comparison(v)
    for model, names in zip((found.first, found.second), found.only, strict=True):
        if names:
            say(f"only on {model.title}: {', '.join(names)}")
    _print_shifts(found.shifts)


@verbs.command("check")
def check(
    model: ModelArgument,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="LABEL|FINGERPRINT", help="A tracked model; if not given, the last one of this shape."
        ),
    ] = None,
    ctx: CtxOption = 2048,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    json: JsonOption = False,
) -> None:
    """Replay on a new version of a model what was measured on a tracked one, and say what still holds.

    **reuse**: vectors and thresholds hold. **recalibrate**: the directions hold, the thresholds do not. **re-derive**:
    the direction no longer agrees, or the vector has lost its effect. **suspicious**: the model itself has shifted
    along a trait; "marked" says whether its stream or its words did. Exit code 0 for reuse and recalibrate, 1 for
    re-derive and suspicious.

    Example: `personasteer track check new.gguf --against stable`
    """
    from personasteer.monitor.registry import Registry
    from personasteer.monitor.tracking import OUTCOMES, check_model

    with (
        Registry(create=False) as registry,
        open_model(model, n_ctx=ctx, n_threads=threads, n_gpu_layers=gpu_layers) as m,
        stages() as stage,
    ):
        found = check_model(m, registry, against=against, progress=stage("replaying"))
    if json:
        print_json(found.as_dict())
    else:
        same = found.differs or "the same fingerprint"
        say(f"{found.model.file} ({found.model.fingerprint[:12]}) against {_named(found.against)}: {same}")
        for v in found.vectors:
            say(f"{v.name}: {v.outcome}")
            for reason in v.reasons:
                say(f"  {reason}", prose=True)
        _print_shifts(found.shifts)
        more = f"; and {len(found.reasons) - N_REASONS} more" if len(found.reasons) > N_REASONS else ""
        say(f"{found.outcome}: {'; '.join(found.reasons[:N_REASONS])}{more}", prose=True)
    if OUTCOMES.index(found.outcome) >= OUTCOMES.index("re-derive"):
        raise typer.Exit(1)


def _entry(registry: Registry, model: TrackedModel) -> dict[str, Any]:
    """A tracked model for `add` and `list`."""
    from personasteer.monitor.tracking import CHECK

    last = registry.latest(model=model.fingerprint, kind=CHECK)
    vectors = [
        {
            "name": vector.name,
            "digest": vector.digest,
            "threshold": None
            if threshold is None
            else {"layer": threshold.layer, "watch": threshold.watch, "alarm": threshold.alarm},
        }
        for vector, threshold in registry.vectors(model.fingerprint)
    ]
    keys = ("label", "fingerprint", "name", "file", "architecture", "n_layer", "n_embd")
    verdict = None
    if last is not None:
        verdict = {
            "model": last.content["model"]["file"],
            "fingerprint": last.content["model"]["fingerprint"],
            "outcome": last.content["outcome"],
            "reasons": last.content["reasons"],
        }
    return {**{key: getattr(model, key) for key in keys}, "vectors": vectors, "last_check": verdict}


def _print_entry(entry: dict[str, Any]) -> None:
    label = f"{entry['label']}: " if entry["label"] else ""
    say(
        f"{label}{entry['file']} ({entry['name']}, {entry['architecture']}, {entry['n_layer']} blocks of width "
        f"{entry['n_embd']}), fingerprint {entry['fingerprint'][:12]}"
    )
    for v in entry["vectors"]:
        t = v["threshold"]
        limits = "no threshold" if t is None else f"block {t['layer']}, alarm from {t['alarm']:.2f}"
        say(f"  {v['name']} ({v['digest'][:12]}): {limits}")
    if entry["last_check"]:
        say(f"  last check, {entry['last_check']['model']}: {entry['last_check']['outcome']}")


def _print_comparison(v: VectorComparison) -> None:
    say(f"{v.name}: {'one vector' if v.same_vector else 'two vectors'}")
    if v.files_cosine is not None:
        say(f"  cosine of the two vectors {v.files_cosine:.2f}")
    if v.cosine is not None:
        say(f"  cosine of the replayed directions {v.cosine:.2f}")
    for k in (0, 1):
        alarms, ordinary, shown = v.alarms[k], v.ordinary[k], v.shown[k]
        if alarms is not None and ordinary is not None and shown is not None:
            say(
                f"  {('first', 'second')[k]}: block {v.blocks[k]}, ordinary prompts read {ordinary:.2f} on average, "
                f"{alarms[0]:.0%} alarm; those that ask for it {shown:.2f}, {alarms[1]:.0%} alarm"
            )
    if v.effect[0] is not None and v.effect[1] is not None:
        say(f"  effect {v.effect[0]:+.2f} and {v.effect[1]:+.2f} nats per token")


def _print_shifts(shifts: tuple[Shift, ...]) -> None:
    if not shifts:
        return
    table = Table("trait", "words", "interval", "stream", "cosine", "random", "marked", title_justify="left")
    for s in shifts[:N_SHIFTS]:
        words = ["", ""] if s.delta is None else [f"{s.delta:+.2f}", f"{s.low:+.2f} … {s.high:+.2f}"]
        stream = ["", "", ""] if s.cosine is None else [f"{s.drift:+.3f}", f"{s.cosine:+.2f}", f"{s.random_p99:.2f}"]
        table.add_row(escape(printable(s.trait)), *words, *stream, s.suspicious)
    print_table(table)
    if len(shifts) > N_SHIFTS:
        say(f"and {len(shifts) - N_SHIFTS} more traits with less (--json)")


def _named(model: TrackedModel) -> str:
    label = f"{model.label}, " if model.label else ""
    return f"{label}{model.file} ({model.fingerprint[:12]})"
