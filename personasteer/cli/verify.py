from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from personasteer.cli._common import (
    JsonOption,
    OffsetOption,
    ThreadsOption,
    model_path,
    print_json,
    say,
    split_strength,
    stages,
)
from personasteer.cli._completion import complete_model


def register(app: typer.Typer) -> None:
    app.command("verify")(verify)


def verify(
    file: Annotated[Path, typer.Argument(help="What `export` wrote: a file, or a bundle.")],
    base: Annotated[
        str, typer.Option("-m", "--model", help="The model that it was made of.", autocompletion=complete_model)
    ],
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="FILE:STRENGTH", help="Compare with these vectors instead of its own."),
    ] = None,
    n_texts: Annotated[int, typer.Option("--texts", help="Everyday texts to compare on.", min=1, max=16)] = 8,
    offset: OffsetOption = 0,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Load a shipped file in stock llama.cpp, without the hook, and compare it with the steered engine.

    Exit code 1 where it does not do what it says.

    Example: `personasteer verify optimist.gguf -m demo`
    """
    from personasteer.ship.verify import verify as verify_file
    from personasteer.vectors import PersonaVector

    pairs = [(PersonaVector.load(f, offset=offset), s) for f, s in map(split_strength, against or [])]
    with stages() as stage:
        found = verify_file(
            file,
            model_path(base),
            against=pairs or None,
            n_texts=n_texts,
            n_threads=threads,
            progress=stage("comparing"),
        )
    if json:
        print_json(found.summary())
    else:
        for line in lines_of(found.summary()):
            say(line)
    if not found.ok:
        raise typer.Exit(1)


def lines_of(found: dict[str, Any]) -> list[str]:
    """A verification in words."""

    def number(key: str, unit: str = "") -> str:
        value = found[key]
        return "not compared" if value is None else f"{value:.3g}{unit}"

    lines = [f"{found['file']}: {found['kind']} for {found['model']}, {found['n_texts']} texts in stock llama.cpp"]
    if found["max_abs_dlogit"] is not None:
        rounding = "" if found["noise"] is None else f" (rounding alone makes {found['noise']:.3g})"
        lines.append(f"  largest difference of a logit from the engine's: {number('max_abs_dlogit')}{rounding}")
        lines.append(
            f"  KL(engine || file): mean {number('kl_mean')}, 99th percentile {number('kl_p99')} nats per token"
        )
        lines.append(
            f"  everyday text moves by {number('kl_base_shipped')} nats per token from the base; "
            f"by the engine {number('kl_base_engine')}"
        )
    if found["effect_ratio"] is not None:
        interval, shipped = found["effect_interval"], found["effect_shipped"]
        if shipped is not None and interval is None:
            engine = found["effect_engine"]
            lines.append(f"  effect: log-odds {shipped:+.3f}, the engine's {engine:+.3f}: too small for a ratio")
        else:
            within = "" if interval is None else " (95 % of resamples: {:.2f} to {:.2f})".format(*interval)
            own = "" if shipped is None else f", log-odds {shipped:+.3f}"
            lines.append(f"  effect: {found['effect_ratio']:.3f} of the engine's{within}{own}")
        if found["effect_slope"] is not None:
            lines.append(f"  comparison by comparison: {found['effect_slope']:.3f}")
    elif found["effect_shipped"] is not None:
        lines.append(f"  effect: log-odds {found['effect_shipped']:+.3f}")
    lines += [f"  {key.replace('_', ' ')}: {_said(value)}" for key, value in found["details"].items() if value != []]
    lines += [f"  not ok: {reason}" for reason in found["reasons"]]
    return [*lines, "  ok" if found["ok"] else "  failed"]


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(map(str, value[:4])) + (f" and {len(value) - 4} more" if len(value) > 4 else "")
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(v)}" for key, v in value.items())
    return str(value)
