"""Evaluations as files that people read: report.md, report.html, report.json and their figures."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer import plots
from personasteer.evaluate.coherence import LEAST
from personasteer.evaluate.evaluation import LEAST_SPEARMAN, Dose, Evaluation
from personasteer.files import atomic_write, check_folder
from personasteer.pages import load_template
from personasteer.vectors import PersonaVector, block_ranges

CRITERIA = {
    "monotone": f"the log-odds rise with the strength (Spearman at least {LEAST_SPEARMAN:g})",
    "outside_random": "both ends change them more than 95 % of random vectors, each in its direction",
    "coherent": f"the text stays coherent at both ends (at least {LEAST:g} of unsteered)",
}


def as_json(evaluations: Sequence[Evaluation], matrix: NDArray[np.float64] | None = None) -> dict[str, Any]:
    """One evaluation's summary; for several {"vectors": [summaries], "cross_talk": {"vectors", "traits", "delta"}}."""
    if len(evaluations) == 1:
        return evaluations[0].summary()
    out: dict[str, Any] = {"vectors": [e.summary() for e in evaluations]}
    if matrix is not None:
        names = {"vectors": [e.vector for e in evaluations], "traits": [e.trait for e in evaluations]}
        out["cross_talk"] = names | {"delta": [[round(float(x), 6) for x in row] for row in matrix]}
    return out


def write_report(
    folder: Path,
    vectors: Sequence[PersonaVector],
    evaluations: Sequence[Evaluation],
    matrix: NDArray[np.float64] | None = None,
) -> list[Path]:
    """Write the report into `folder`; the paths written. The HTML holds its figures and needs no network."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, bytes] = {}
    labels = _labels(evaluations)
    for k, (vector, e) in enumerate(zip(vectors, evaluations, strict=True)):
        zero = next(d for d in e.dose if d.strength == 0)
        baselines = (
            [("system prompt alone", zero.log_odds + e.controls.system_prompt)]
            if e.controls.system_prompt is not None
            else []
        )
        label = labels[k]
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
        "labels": labels,
        "figures": {name: base64.b64encode(data).decode() for name, data in figures.items()},
        "matrix": None if matrix is None else matrix.tolist(),
        "versions": {name: version(name) for name in ("personasteer", "llama-cpp-python")},
    }
    text = {
        "report.md": load_template(__package__, "report.md.j2", _FILTERS, autoescape=False).render(context),
        "report.html": load_template(__package__, "report.html.j2", _FILTERS).render(context),
        "report.json": json.dumps(as_json(evaluations, matrix), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    contents = {**figures, **{name: t.encode() for name, t in text.items()}}
    for name, data in contents.items():
        atomic_write(folder / name, data)
    return [folder / name for name in contents]


def layer_series(vector: PersonaVector) -> list[tuple[str, NDArray[np.float32], float]]:
    """What is known of a vector per block, for the figure of layers: (label, (n_layer,) values, what 'nothing' is)."""
    lengths = np.linalg.norm(vector.directions, axis=1)
    candidates = [
        ("‖v‖", lengths, 0.0) if vector.norms is None else ("‖v‖ / m", lengths / vector.norms, 0.0),
        ("separation d′", vector.separations, 0.0),
        ("AUROC", vector.aurocs, 0.5),
        ("split-half\ncosine", vector.reliability, 0.0),
        ("effect of the\nblock alone", vector.effects, 0.0),
    ]
    return [(name, values, at) for name, values, at in candidates if values is not None and np.isfinite(values).any()]


def change_interval(d: Dose) -> tuple[float, float]:
    """The 95 % interval of a dose's change of the log-odds."""
    zero = d.log_odds - d.delta
    return d.ci_low - zero, d.ci_high - zero


def heading(e: Evaluation) -> str:
    """Of one vector's part of the report."""
    return f"“{e.trait}” on {e.model}" if e.vector == e.trait else f"{e.vector}, tested for “{e.trait}”, on {e.model}"


def verdict(e: Evaluation) -> str:
    """ "passes", or what it fails at."""
    failed = [name.replace("_", " ") for name, held in e.verdict.items() if not held]
    return "does not pass: not " + ", not ".join(failed) if failed else "passes"


def _labels(evaluations: Sequence[Evaluation]) -> list[str]:
    names = [e.trait for e in evaluations]
    return names if len({n.casefold() for n in names}) == len(names) else [f"{n}-{k}" for k, n in enumerate(names, 1)]


def _signed(x: float | None) -> str:
    return "n/a" if x is None else "0.00" if abs(x) < 0.005 else f"{x:+.2f}"


def _two(x: float | None) -> str:
    return "n/a" if x is None else f"{x:.2f}"


def _interval(d: Dose) -> str:
    return " … ".join(map(_signed, change_interval(d)))


def _markdown(text: object) -> str:
    """Foreign text as part of a line or a table's cell, shown as it is."""
    line = " ".join(html.escape(str(text), quote=False).split())
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", line)


_FILTERS: dict[str, Callable[..., Any]] = {
    "signed": _signed,
    "two": _two,
    "rho": lambda strength: f"ρ = {_signed(strength)}",
    "interval": _interval,
    "blocks": block_ranges,
    "heading": heading,
    "verdict": verdict,
    "criterion": lambda name: CRITERIA.get(name, name),
    "md": _markdown,
    "rule": lambda _: "---",
    "number_rule": lambda _: "---:",
}
