"""A comparison as files: report.html, diff.json and the surviving features as vectors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from personasteer import plots
from personasteer.discover.features import blocks_around
from personasteer.discover.results import Diff
from personasteer.files import atomic_write
from personasteer.pages import load_template
from personasteer.text import printable
from personasteer.vectors import PersonaVector

VECTORS = "vectors"
MEAN = "mean-difference.gguf"
SHOWN_TRAITS = 16


def file_name(feature: str) -> str:
    """Of a feature's vector."""
    return feature.replace(" ", "-") + ".gguf"


def write_diff(
    folder: Path, found: Diff, vectors: Mapping[str, PersonaVector], mean: PersonaVector | None = None
) -> list[Path]:
    """Write the report into the folder; the paths written. The HTML needs no network.

    vectors: the survivors, which go into the folder `vectors`; mean: the mean difference of all blocks.
    """
    (folder / VECTORS).mkdir(parents=True, exist_ok=True)
    for old in (MEAN, *(f"{VECTORS}/{file_name(name)}" for name in _earlier(folder))):
        (folder / old).unlink(missing_ok=True)
    paths = []
    if mean is not None:
        mean.save(folder / MEAN)
        paths.append(folder / MEAN)
    for feature, vector in vectors.items():
        path = folder / VECTORS / file_name(feature)
        vector.save(path)
        paths.append(path)
    for name, data in (
        ("diff.json", json.dumps(found.summary(), indent=1, ensure_ascii=False, allow_nan=False).encode()),
        ("report.html", render(found, list(vectors)).encode()),
    ):
        atomic_write(folder / name, data)
        paths.append(folder / name)
    return paths


def _earlier(folder: Path) -> list[str]:
    """The survivors of the report that is replaced."""
    try:
        known = json.loads((folder / "diff.json").read_text("utf-8"))["survivors"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in known if isinstance(name, str) and re.fullmatch(r"feature \d+|mean difference", name)]


def render(found: Diff, files: list[str]) -> str:
    """The page."""
    shown = [s for s in found.profile if s.delta is not None][:SHOWN_TRAITS]
    words = [(float(s.delta or 0), float(s.low or 0), float(s.high or 0)) for s in shown]
    figure = partial(
        plots.intervals,
        [s.trait for s in shown],
        [("change of the words' log-odds", words)],
        marked=[i for i, s in enumerate(shown) if s.suspicious],
        xlabel="nats per token",
    )
    sizes = partial(
        plots.layers,
        [("size of the mean change, of m", np.asarray(found.sizes), 0.0)],
        [found.layer],
        title="Where the stream moved",
    )
    filters = {
        "printable": printable,
        "signed": lambda x: "–" if x is None else f"{x:+.3f}",
        "two": lambda x: "–" if x is None or not np.isfinite(x) else f"{x:.2f}",
        "three": lambda x: "–" if x is None or not np.isfinite(x) else f"{x:.3f}",
        "percent": lambda x: "–" if x is None or not np.isfinite(x) else f"{100 * x:.0f} %",
        "file": file_name,
    }
    versions = {name: version(name) for name in ("personasteer", "llama-cpp-python")}
    return load_template(__package__, "diff.html.j2", filters).render(
        found=found,
        files=files,
        steered=blocks_around(found.layer, len(found.sizes)),
        versions=versions,
        profile=plots.svg(figure, "profile") if shown else "",
        sizes=plots.svg(sizes, "sizes"),
    )
