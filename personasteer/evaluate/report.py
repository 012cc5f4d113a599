"""Evaluations as files that people read: report.md, report.html, report.json and their figures."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from personasteer import plots
from personasteer.errors import ArgumentError
from personasteer.evaluate.evaluation import Evaluation
from personasteer.files import atomic_write, check_output
from personasteer.vectors import PersonaVector


def as_json(evaluations: Sequence[Evaluation], matrix: NDArray[np.float64] | None = None) -> dict[str, Any]:
    """One evaluation's summary; for several {"vectors": [summaries], "cross_talk": {"vectors", "traits", "delta"}}."""
    if len(evaluations) == 1:
        return evaluations[0].summary()
    out: dict[str, Any] = {"vectors": [e.summary() for e in evaluations]}
    if matrix is not None:
        names = {"vectors": [e.vector for e in evaluations], "traits": [e.trait for e in evaluations]}
        out["cross_talk"] = names | {"delta": [[round(float(x), 6) for x in row] for row in matrix]}
    return out


def check_folder(folder: Path) -> None:
    """Raise ArgumentError where the report cannot be written, before the work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ArgumentError(f"{folder}: cannot write here ({e.strerror})") from e
    check_output(folder / "report.md")


def write_report(
    folder: Path,
    vectors: Sequence[PersonaVector],
    evaluations: Sequence[Evaluation],
    matrix: NDArray[np.float64] | None = None,
) -> list[Path]:
    """Write the report into `folder`; the paths written. The HTML holds its figures and needs no network."""
    check_folder(folder)
    figures: dict[str, bytes] = {}
    for k, (vector, e) in enumerate(zip(vectors, evaluations, strict=True)):
        zero = next(d for d in e.dose if d.strength == 0)
        baselines = (
            [("system prompt alone", zero.log_odds + e.controls.system_prompt)]
            if e.controls.system_prompt is not None
            else []
        )
        label = _label(e, k, evaluations)
        figures[f"dose-{label}.png"] = plots.png(
            plots.dose_response(
                [d.strength for d in e.dose],
                [d.log_odds for d in e.dose],
                [(d.ci_low, d.ci_high) for d in e.dose],
                (zero.log_odds - e.controls.random_p95, zero.log_odds + e.controls.random_p95),
                baselines=baselines,
                title=f"“{e.trait}” on {e.model}, held-out questions",
            )
        )
        series = layer_series(vector)
        if series:
            figures[f"layers-{label}.png"] = plots.png(
                plots.layers(series, vector.layers, title=f"“{vector.name}” by block")
            )
    if matrix is not None:
        names = [e.vector for e in evaluations], [e.trait for e in evaluations]
        figures["cross-talk.png"] = plots.png(plots.cross_talk(matrix, *names))
    context = {
        "evaluations": evaluations,
        "labels": [_label(e, k, evaluations) for k, e in enumerate(evaluations)],
        "figures": {name: base64.b64encode(data).decode() for name, data in figures.items()},
        "matrix": matrix,
        "versions": {name: version(name) for name in ("personasteer", "llama-cpp-python")},
    }
    text = {
        "report.md": _environment(autoescape=False).get_template("report.md.j2").render(context),
        "report.html": _environment(autoescape=True).get_template("report.html.j2").render(context),
        "report.json": json.dumps(as_json(evaluations, matrix), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    contents = {**figures, **{name: t.encode() for name, t in text.items()}}
    for name, data in contents.items():
        atomic_write(folder / name, data)
    return [folder / name for name in contents]


def layer_series(vector: PersonaVector) -> list[tuple[str, NDArray[np.float32]]]:
    """What is known of a vector per block, for the figure of layers."""
    lengths = np.linalg.norm(vector.directions, axis=1)
    candidates = [
        ("‖v‖ / m", lengths / vector.norms if vector.norms is not None else None),
        ("separation d′", vector.separations),
        ("AUROC", vector.aurocs),
        ("split-half\ncosine", vector.reliability),
        ("effect of the\nblock alone", vector.effects),
    ]
    return [(name, values) for name, values in candidates if values is not None and np.isfinite(values).any()]


def _label(e: Evaluation, k: int, evaluations: Sequence[Evaluation]) -> str:
    same = [other for other in evaluations if other.trait == e.trait]
    return e.trait if len(same) == 1 else f"{e.trait}-{k + 1}"


def _environment(*, autoescape: bool) -> jinja2.Environment:
    templates = {
        name: files(__package__).joinpath(name).read_text("utf-8") for name in ("report.md.j2", "report.html.j2")
    }
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(templates), autoescape=autoescape, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["signed"] = lambda x: "n/a" if x is None else f"{x:+.2f}"
    environment.filters["two"] = lambda x: "n/a" if x is None else f"{x:.2f}"
    environment.filters["cell"] = lambda x: str(x).replace("|", "\\|").replace("\n", " ")
    return environment
