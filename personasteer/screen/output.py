"""A screening as files: scores.parquet, summary.json, report.html, and the rows that are kept and that are not."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from personasteer import plots
from personasteer.conversations.data import Check, Data, parquet
from personasteer.engine import Progress
from personasteer.errors import ArgumentError, PersonasteerError
from personasteer.files import atomic_write, replacing
from personasteer.model import Model
from personasteer.pages import load_template
from personasteer.screen.journal import Journal
from personasteer.screen.readouts import Readouts
from personasteer.screen.results import Screening, TraitResult
from personasteer.screen.score import N_SPANS, SCORE
from personasteer.screen.texts import unpacked
from personasteer.text import printable

SCORES, SUMMARY, PAGE = "scores.parquet", "summary.json", "report.html"
SPLIT = ("kept", "quarantine")
CHUNK = 5000  # rows that are written together
WORST = 10  # rows of each trait on the page
NEAR, LONGEST_WORD = 16, 30  # tokens beside a span that are looked at, and characters of a word that it is cut from
LONGEST, SHOWN = 2000, 500  # characters of an answer, and of the end of a prompt, on the page


def check_inputs(folder: Path, inputs: Iterable[Path]) -> None:
    """Raise ArgumentError where an input is what would be written over."""
    for path in inputs:
        name = path.name.partition(".")[0].partition("-")[0]
        if path.resolve().parent == folder.resolve() and (path.name in (SCORES, SUMMARY, PAGE) or name in SPLIT):
            raise ArgumentError(f"{path}: would be written over; name another folder")


def check_outputs(folder: Path, plan: Mapping[str, Any], *, force: bool) -> None:
    """Raise ArgumentError where `folder` holds the outputs of another screening and `force` is not given."""
    if (folder / SUMMARY).exists() and not force and _earlier(folder).get("plan") != json.loads(json.dumps(plan)):
        raise ArgumentError(f"{folder / SUMMARY}: is of another screening; --force begins anew")


def _earlier(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / SUMMARY).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_outputs(
    folder: Path,
    result: Screening,
    journal: Journal,
    model: Model,
    data: Data,
    *,
    keep: str | None,
    plan: Mapping[str, Any],
    check: Check,
    progress: Progress,
) -> list[Path]:
    """Write all files, each under a temporary name and renamed, the summary last; their paths. Copies of rows that an
    earlier run made, and this one does not, are removed.

    check: raises where the data has changed; asked when the rows have been copied, and nothing is renamed then.
    """
    texts = _Texts(journal, model, result.readouts)
    before = [name for name in _earlier(folder).get("files", []) if str(name).startswith(SPLIT)]
    try:
        _remove_temporaries(folder)
        _write_scores(folder / SCORES, result, texts, progress)
        copies = []
        if keep is not None:
            take = result.flagged if keep == "above" else ~result.flagged
            kept = take & ~result.unscored
            copies = data.split(folder, SPLIT, lambda i: i < len(kept) and bool(kept[i]), check)
        for name in {str(name) for name in before} - {p.name for p in copies}:
            if Path(name).name == name:
                (folder / name).unlink(missing_ok=True)
        atomic_write(folder / PAGE, _page(result, texts).encode("utf-8", "backslashreplace"))
        paths = [folder / SCORES, *copies]
        summary = {**result.summary(), "files": [p.name for p in paths], "plan": plan}
        text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
        atomic_write(folder / SUMMARY, text.encode("utf-8", "backslashreplace"))
    except OSError as e:
        raise PersonasteerError(f"{folder}: cannot be written ({os.strerror(e.errno) if e.errno else e})") from e
    return [*paths, folder / PAGE, folder / SUMMARY]


def _remove_temporaries(folder: Path) -> None:
    """Of a run that was killed: nobody else works here."""
    names = "|".join(map(re.escape, (SCORES, SUMMARY, PAGE)))
    ours = re.compile(rf"\.({names}|({'|'.join(SPLIT)})(-\d+)?\.\w+)\.[a-z0-9_]{{8}}")
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


class _Texts:
    """The words of rows, and the spans that carry their scores."""

    def __init__(self, journal: Journal, model: Model, readouts: Readouts) -> None:
        self._journal, self._model, self._readouts = journal, model, readouts

    def of(self, row: int) -> list[tuple[str, str, str | None]]:
        """(prompt, answer, the model's own answer) of each answer."""
        found = []
        for data, n_prompt, _, own in self._journal.row_texts("data", row):
            tokens = unpacked(data)
            prompt = self._model.detokenize(tokens[:n_prompt], special=True)
            found.append((prompt, self._model.detokenize(tokens[n_prompt:]), own))
        return found

    def spans(self, row: int, k: int) -> list[tuple[str, float]]:
        """(text, mean reading) of the row's spans with the highest readings along trait k."""
        found: list[tuple[float, str]] = []
        for data, n_prompt, score, _ in self._journal.row_texts("data", row):
            own = np.frombuffer(score, SCORE)[self._readouts.score(k)]
            answer = unpacked(data)[n_prompt:]
            for (begin, end), mean in zip(own["spans"].tolist(), own["highest"].tolist(), strict=True):
                if end > begin:
                    beside = answer[max(0, begin - NEAR) : begin], answer[begin:end], answer[end : end + NEAR]
                    parts = (self._model.detokenize(t) for t in beside)
                    found.append((mean, whole_words(*parts)))
        found.sort(key=lambda f: -f[0])
        return [(text, mean) for mean, text in found[:N_SPANS]]


def whole_words(before: str, text: str, behind: str) -> str:
    """The text with the rest of the words that it begins and ends in."""
    words = before.split(), behind.split()
    head = words[0][-1] if words[0] and not before[-1].isspace() and not text[:1].isspace() else ""
    tail = words[1][0] if words[1] and not behind[0].isspace() and not text[-1:].isspace() else ""
    longest = LONGEST_WORD  # in scripts without spaces there is no word to complete
    whole = (head if len(head) <= longest else "") + text + (tail if len(tail) <= longest else "")
    return whole.replace("\ufffd", "").strip()


def _write_scores(path: Path, result: Screening, texts: _Texts, progress: Progress) -> None:
    pa, pq = parquet()
    span = pa.struct([("text", pa.string()), ("reading", pa.float32())])
    own = [("row", pa.int64()), ("id", pa.string()), ("hash", pa.string()), ("problem", pa.string())]
    fields = [*own, ("tokens", pa.int32())]
    for t in result.traits:
        numbers = ("score", "percentile", "projection", "fast", "full")
        fields += [(f"{t.name}.{name}", pa.float32()) for name in numbers]
        fields += [(f"{t.name}.flag", pa.bool_()), (f"{t.name}.spans", pa.list_(span))]
    schema = pa.schema(fields)
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for chunk in _chunks(len(result.rows)):
            writer.write_table(pa.table(_columns(result, texts, chunk, pa), schema=schema))
            progress(chunk.stop, len(result.rows))


def _chunks(n: int) -> Iterator[slice]:
    for first in range(0, n, CHUNK):
        yield slice(first, min(n, first + CHUNK))


def _columns(result: Screening, texts: _Texts, chunk: slice, pa: Any) -> list[Any]:
    """In the order of the schema; numbers that are none become null."""

    def numbers(values: np.ndarray) -> Any:
        x = values[chunk].astype(np.float32)
        return pa.array(x, mask=~np.isfinite(x))

    rows = result.rows[chunk]
    columns = [
        pa.array(range(chunk.start, chunk.stop), pa.int64()),
        pa.array([name for name, _, _ in rows], pa.string()),
        pa.array([digest or None for _, digest, _ in rows], pa.string()),
        pa.array([problem or None for *_, problem in rows], pa.string()),
        pa.array(result.scores.tokens[chunk].astype(np.int32), mask=np.array([bool(p) for *_, p in rows])),
    ]
    for k, t in enumerate(result.traits):
        s, at = result.scores, 2 * k
        columns += [numbers(x) for x in (t.score, t.percentile, s.projection[:, at], s.fast[:, at], s.full[:, at])]
        flags = t.flagged[chunk]
        columns.append(pa.array(flags, mask=~np.isfinite(t.score[chunk])))
        spans = [
            [{"text": text, "reading": x} for text, x in texts.spans(chunk.start + i, k)] if flag else None
            for i, flag in enumerate(flags)
        ]
        columns.append(spans)
    return columns


# ---- the page


def _page(result: Screening, texts: _Texts) -> str:
    traits = []
    for k, t in enumerate(result.traits):
        figure = plots.score_histogram(
            t.score[np.isfinite(t.score)],
            t.clean,
            t.threshold,
            title=f"“{t.name}” of each row",
            label=_label(result, t),
        )
        order = np.argsort(-np.where(np.isfinite(t.score), t.score, -np.inf), kind="stable")[:WORST]
        worst = [_worst(result, t, k, int(row), texts) for row in order if np.isfinite(t.score[row])]
        traits.append({"result": t, "figure": base64.b64encode(plots.png(figure)).decode(), "worst": worst})
    template = load_template(__package__, "screening.html.j2", _FILTERS)
    versions = {name: version(name) for name in ("personasteer", "llama-cpp-python")}
    return template.render(result=result, summary=result.summary(), traits=traits, versions=versions)


def _label(result: Screening, t: TraitResult) -> str:
    said = {"fast": ", less that before it", "full": ", less that of the model's own answer"}
    return f"score: mean reading of the answer at block {t.layer}{said.get(result.mode, '')}"


def _worst(result: Screening, t: TraitResult, k: int, row: int, texts: _Texts) -> dict[str, Any]:
    name, _, _ = result.rows[row]
    spans = [text for text, _ in texts.spans(row, k)]
    turns = []
    for prompt, answer, own in texts.of(row):
        marked = _marked(_cut(answer), spans)
        before = prompt if len(prompt) <= SHOWN else "…" + prompt[-SHOWN:]
        turns.append({"prompt": before, "answer": marked, "own": None if own is None else _cut(own)})
    return {
        "row": row,
        "id": name,
        "score": float(t.score[row]),
        "percentile": float(t.percentile[row]),
        "turns": turns,
    }


def _marked(text: str, spans: Sequence[str]) -> list[tuple[str, bool]]:
    """The text in pieces, those of the spans marked."""
    places = sorted((at, at + len(span)) for span in spans if span and (at := text.find(span)) >= 0)
    pieces, end = [], 0
    for begin, until in places:
        if begin >= end:
            pieces += [(text[end:begin], False), (text[begin:until], True)]
            end = until
    return [(piece, mark) for piece, mark in [*pieces, (text[end:], False)] if piece]


def _words(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _two(x: float | None) -> str:
    return "–" if x is None else f"{x:.2f}"


def _share(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.1f} %"


_FILTERS: dict[str, Callable[..., str]] = {
    "printable": printable, "words": _words, "two": _two, "share": _share,
}  # fmt: skip
