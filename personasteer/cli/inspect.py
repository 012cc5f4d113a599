from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from personasteer.cli._common import JsonOption, OffsetOption, open_model, print_json, print_table, say
from personasteer.cli._completion import complete_model
from personasteer.files import atomic_write, check_output


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect)


def inspect(
    file: Annotated[Path, typer.Argument(help="Control-vector GGUF, of any tool.")],
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", help="Check that it belongs to this GGUF.", autocompletion=complete_model),
    ] = None,
    offset: OffsetOption = 0,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw a figure of the layers.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what a control-vector file holds, and whether it fits a model.

    Example: `personasteer inspect pessimistic.gguf -m demo`
    """
    import numpy as np

    from personasteer import plots
    from personasteer.evaluate.report import layer_series
    from personasteer.ship.control_vector import exported_strength
    from personasteer.ship.projection import load_projection
    from personasteer.ship.verify import kind_of
    from personasteer.steering import check_fits
    from personasteer.vectors import PersonaVector

    if plot is not None:
        check_output(plot)
    is_projection = kind_of(file) == "projection"
    vector = load_projection(file).vector if is_projection else PersonaVector.load(file, offset=offset)
    lengths = np.linalg.norm(vector.directions, axis=1)
    rows = [
        {
            "layer": il,
            "steered": il in vector.layers,
            "norm": _number(lengths[il]),
            "norm_ratio": _number(lengths[il] / vector.norms[il]) if vector.norms is not None else None,
            "separation": _number(vector.separations[il]) if vector.separations is not None else None,
            "auroc": _number(vector.aurocs[il]) if vector.aurocs is not None else None,
            "split_half_cosine": _number(vector.reliability[il]) if vector.reliability is not None else None,
            "threshold": _number(vector.thresholds[il]) if vector.thresholds is not None else None,
            "effect": _number(vector.effects[il]) if vector.effects is not None else None,
        }
        for il in range(vector.n_layer)
    ]
    result: dict[str, Any] = {
        "file": str(file),
        "name": vector.name,
        "n_layer": vector.n_layer,
        "n_embd": vector.n_embd,
        "layers": list(vector.layers),
        "strength": exported_strength(file),
        "recommended": vector.strength,
        "window": list(vector.window) if "calibration" in vector.provenance else None,
        "provenance": dict(vector.provenance),
        "per_layer": rows,
    }
    if model is not None:
        with open_model(model, n_ctx=64, n_parallel=1) as m:
            check_fits(vector, m)
            origin = vector.provenance.get("fingerprint")
            result["same_model"] = origin == m.fingerprint if origin else None
    if plot is not None:
        series = layer_series(vector)
        atomic_write(plot, plots.png(plots.layers(series, vector.layers, title=f"“{vector.name}” by block")))
    if json:
        print_json(result)
        return
    scale = result["strength"]
    say(
        f"{vector.name}: {vector.n_layer} blocks of width {vector.n_embd}, steers at {list(vector.layers)}"
        + ("" if scale is None else f", scale 1.0 in llama.cpp is strength {scale:g}")
    )
    if result["window"]:
        low, high = result["window"]
        say(f"calibrated: strength {vector.strength:g}, usable from {low:g} to {high:g}")
    table = Table("block", "‖v‖", "‖v‖ / m", "separation d", "AUROC", "split-half cosine", "effect alone")
    for row in rows:
        cells = [row[key] for key in ("norm", "norm_ratio", "separation", "auroc", "split_half_cosine", "effect")]
        label = f"▸ {row['layer']}" if row["steered"] else str(row["layer"])
        table.add_row(label, *("" if c is None else f"{c:.3f}" for c in cells))
    print_table(table)
    for key, value in vector.provenance.items():
        if key in ("texts", "calibration"):  # whole in --json
            continue
        say(f"{key}: {_words(value)}")
    if "same_model" in result:
        verdicts = {
            True: "derived on this very model",
            False: "fits this model's shape, derived on another",
            None: "fits this model's shape; the file does not say where it was derived",
        }
        say(verdicts[result["same_model"]])


def _words(value: Any) -> str:
    """A value of the provenance, which may be a mapping."""
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(
        f"{k} ({_words(v)})" if isinstance(v, Mapping) else f"{k} {v}" for k, v in value.items() if v != {}
    )


def _number(value: float) -> float | None:
    import numpy as np

    return round(float(value), 6) if np.isfinite(value) else None
