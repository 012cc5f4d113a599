"""Readings as files that people read: the conversation on the colours of its readings, a page and its figures."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer import plots
from personasteer.errors import ArgumentError
from personasteer.files import atomic_write, check_folder
from personasteer.monitor.readings import Readings, TurnDrift, drift_of_turns, watched
from personasteer.monitor.thresholds import Threshold
from personasteer.monitor.transcripts import Reading, Turn
from personasteer.pages import load_template
from personasteer.text import printable

LEVELS = 8  # of colour, to each side
FIGURES = ("text", "drift", "layers")


def report_files(n_conversations: int, n_vectors: int) -> list[str]:
    """The names of the files that `write_report` writes: those of the figures have the numbers of conversation and
    vector where there are several.
    """
    several = n_conversations * n_vectors > 1
    numbers = [(i, k) for i in range(n_conversations) for k in range(n_vectors)]
    return ["index.html", *(f"{f}-{i}-{k}.png" if several else f"{f}.png" for i, k in numbers for f in FIGURES)]


def write_report(
    folder: Path,
    readings: Sequence[Readings],
    *,
    thresholds: Sequence[Threshold] = (),
    baseline: Sequence[Reading] = (),
    layers: Mapping[str, int] | None = None,
) -> list[Path]:
    """Write index.html, text.png, drift.png and layers.png into `folder`; the paths written.

    The page holds its figures, needs no network and runs no script; the same readings give the same bytes.

    Args:
        readings: of conversations, along the same vectors.
        thresholds: of some of the vectors: their states, probabilities and drift are shown, at their blocks.
        baseline: conversations that did not drift, for `drift_of_turns`.
        layers: {name: block} whose readings are shown of other vectors; the middle one of those read where not named.

    Raises:
        ArgumentError: no readings, different vectors, a block that was not read, or the folder cannot be written.
    """
    if not readings or any(r.names != readings[0].names for r in readings):
        raise ArgumentError("a report needs readings, all of the same vectors")
    check_folder(folder)
    known = {**(layers or {}), **{t.name: t.layer for t in thresholds}}
    at = [known[name] if name in known else _middle(readings[0], name) for name in readings[0].names]
    names = report_files(len(readings), len(at))
    figures = iter(names[1:])
    contents: dict[str, bytes] = {}
    talks = []
    for r in readings:
        reading = watched(r, thresholds) if thresholds else None
        drawn = []
        for name, layer in zip(r.names, at, strict=True):
            limits = next((t for t in thresholds if t.name == name), None)
            drift = drift_of_turns(reading, name, baseline=baseline) if reading and limits else None
            states = [s["state"] if (s := _state(t, name)) else "" for t in reading.turns] if reading else []
            images = {f: plots.png(figure) for f, figure in _figures(r, name, layer, limits, states, drift).items()}
            contents |= {next(figures): images[f] for f in FIGURES}
            drawn.append({f: base64.b64encode(images[f]).decode() for f in FIGURES[1:]} | {"drift_of": drift})
        talks.append(_talk(r, at, reading, drawn))
    context = {
        "names": readings[0].names,
        "blocks": at,
        "thresholds": {t.name: t for t in thresholds},
        "talks": talks,
        "levels": LEVELS,
        "colours": plots.STATE_COLOURS,
        "compared": bool(baseline),
        "versions": {name: version(name) for name in ("personasteer", "llama-cpp-python")},
    }
    filters: dict[str, Callable[..., str]] = {"printable": printable, "two": _two}
    page = load_template(__package__, "readings.html.j2", filters).render(context).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in {names[0]: page, **contents}.items():
        atomic_write(folder / name, data)
    return [folder / name for name in names]


def _middle(r: Readings, name: str) -> int:
    """The middle one of the blocks that the vector was read at."""
    known = np.flatnonzero(np.isfinite(r.readings[:, :, r.names.index(name)]).any(axis=0))
    return r.layers[int(known[len(known) // 2])] if len(known) else r.layers[0]


def _figures(
    r: Readings, name: str, layer: int, limits: Threshold | None, states: Sequence[str], drift: TurnDrift | None
) -> dict[str, Any]:
    values = r.at(name, layer)
    roles, pooled = r.pooled()
    own = pooled[:, r.layers.index(layer), r.names.index(name)]
    before = [(k, float(values[begin - 1])) for k, (role, begin, _) in enumerate(r.spans) if _answers(role, begin)]
    return {
        "text": plots.reading_heat_map(
            r.pieces, values, r.spans, states=states,
            label=f"reading ⟨h, v̂⟩ at block {layer}", title=f"“{name}”, token by token",
        ),
        "drift": plots.reading_drift(
            before,
            means=list(zip(roles, own.tolist(), strict=True)),
            thresholds=(limits.watch, limits.alarm) if limits else None,
            baseline=(drift.chart.mean, drift.chart.spread) if drift else None,
            change=drift.turn if drift else None,
            title=f"“{name}” over the conversation, at block {layer}",
        ),
        "layers": plots.reading_layers(
            r.pieces, r.readings[:, :, r.names.index(name)], r.layers, r.spans,
            marked=layer, title=f"“{name}” at every block",
        ),
    }  # fmt: skip


def _answers(role: str, begin: int) -> bool:
    return role == "assistant" and begin > 0


def _talk(r: Readings, at: Sequence[int], reading: Reading | None, drawn: list[dict[str, Any]]) -> dict[str, Any]:
    """A conversation as the template takes it."""
    columns = [r.at(name, layer) for name, layer in zip(r.names, at, strict=True)]
    ranges = [plots.colour_range(x, r.spans) for x in columns]
    marks = [_marks(x, *scale) for x, scale in zip(columns, ranges, strict=True)]
    turns = []
    for k, (role, begin, end) in enumerate(r.spans):
        own = reading.turns[k] if reading else None
        tokens = []
        first = begin
        for i in range(begin, end):
            if r.pieces[i]:
                tokens.append(_token(r, columns, marks, first, i))
                first = i + 1
        states = [_state(own, name) for name in r.names]
        lead = _token(r, columns, marks, begin - 1, begin - 1) if _answers(role, begin) else None
        if lead and any(states):  # the colour of a state, where there is one
            lead["css"] = " ".join(f"s{i}{s['state']}" for i, s in enumerate(states) if s)
        means = [float(x[begin:end].mean()) if end > begin else None for x in columns]
        own_words = {"n": end - begin, "lead": lead, "tokens": tokens}
        turns.append({"role": printable(role), "means": means, "states": states, **own_words})
    return {"turns": turns, "drawn": drawn, "ranges": ranges}


def _marks(values: NDArray[np.float32], centre: float, half: float) -> list[str]:
    """For each reading the name of its colour: p1 .. above the centre, n1 .. below, "" beside it."""
    with np.errstate(invalid="ignore"):
        levels = np.nan_to_num(np.round(LEVELS * np.clip((values - centre) / half, -1, 1))).astype(int)
    return [f"p{x}" if x > 0 else f"n{-x}" if x < 0 else "" for x in levels.tolist()]


def _token(
    r: Readings, columns: Sequence[NDArray[np.float32]], marks: Sequence[Sequence[str]], first: int, last: int
) -> dict[str, str]:
    """Tokens `first` to `last`, which make up the text of the last one."""
    numbers = zip(r.names, columns, strict=True)
    said = ", ".join(f"{printable(name)} {x[last]:.2f}" for name, x in numbers if np.isfinite(x[last]))
    return {
        "text": "↵\n".join(map(printable, r.pieces[last].split("\n"))),
        "css": " ".join(f"v{k}{mark[last]}" for k, mark in enumerate(marks) if mark[last]),
        "title": (f"token {last}: " if first == last else f"tokens {first}-{last}: ") + (said or "no reading"),
    }


def _state(turn: Turn | None, name: str) -> dict[str, Any] | None:
    """What stood before an answer, where a threshold tells."""
    if turn is None or turn.before is None or name not in turn.before:
        return None
    return {"before": turn.before[name], "p": turn.probabilities[name], "state": turn.states[name]}


def _two(x: float | None) -> str:
    return "" if x is None or np.isnan(x) else f"{x:.2f}"
