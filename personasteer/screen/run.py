"""One screening from data to results: rows into texts, texts into packs, packs through the model, scores together."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from personasteer._native import build_id
from personasteer.engine import Progress
from personasteer.errors import ArgumentError, ContextError
from personasteer.evaluate.report import check_folder
from personasteer.model import Model
from personasteer.screen.cluster import Cluster, check_address
from personasteer.screen.data import Data, arrow, first_rows, open_data
from personasteer.screen.journal import PARTS, Journal, Packed
from personasteer.screen.layouts import LOOKED_AT, Columns, Layout, RowError, find_layout
from personasteer.screen.output import check_outputs, write_outputs
from personasteer.screen.packs import plan_answers, plan_texts
from personasteer.screen.readouts import Readouts, fold_of, make_readouts
from personasteer.screen.results import MODES, Screening, collect, rows_of_groups, trait_result
from personasteer.screen.score import Axis, Scorer, axis_of
from personasteer.screen.texts import Text, Texts, row_hash
from personasteer.vectors import PersonaVector

log = logging.getLogger("personasteer")

Stages: TypeAlias = Callable[[str], Progress]  # names of stages to progress callbacks
Compute: TypeAlias = Callable[[Iterator[Packed]], Iterator[tuple[Packed, list[tuple[Any, ...]]]]]

METHOD = 1  # of scoring: work of another is not gone on with
JOURNAL = "work.sqlite"
ROWS_AT_ONCE = 500  # rows that are read in one transaction
FEWEST_CLEAN = 40  # rows of a reference


@dataclass(frozen=True)
class _Part:
    name: str
    data: Data
    layout: Layout


def screen(
    model: Model,
    vectors: Sequence[PersonaVector] | PersonaVector,
    data: Any,
    out: str | os.PathLike[str],
    *,
    mode: str = "fast",
    columns: Columns | None = None,
    clean: Any = None,
    baseline: Any = None,
    percentile: float = 95.0,
    keep: str | None = None,
    sample: int = 64,
    max_tokens: int = 128,
    layer: int | None = None,
    plain: bool = False,
    ray: str | None = None,
    workers: int | None = None,
    force: bool = False,
    progress: Stages | None = None,
    on_layout: Callable[[str], None] | None = None,
) -> Screening:
    """Score the rows of a chat data set along persona vectors: which would shift the model that is trained on them.

    See `Scores` for the formulas. Work is kept in `out`/work.sqlite as it is done; the same call goes on with it, and
    what was interrupted at any point ends in the same bytes.

    Args:
        data: a file (JSONL, JSON, CSV, Parquet, also compressed), several, or rows from Python such as a
            `datasets.Dataset`.
        out: the folder for scores.parquet, summary.json, report.html and the work.
        mode: "fast" compares with the prompt's last token, "full" with the model's own greedy answer of at most
            `max_tokens`, "projection" with nothing.
        columns: names of columns; those that are not named are found out.
        clean: rows that count as ordinary, instead of the 240 that are shipped: percentiles are among these.
        baseline: rows to compare with, such as what one trained on before.
        percentile: of the clean rows, from which a row is flagged.
        keep: "below" writes the rows that no trait flags to a file of their own, "above" those that one does; the
            others, and all rows with a problem, go to the quarantine file.
        sample: in mode "fast": so many rows are scored in full, too, and the correlation is reported.
        layer: the block to read, for all vectors; None: see `axis_of`.
        plain: score along the vectors themselves, as published; else along them against the grain of the clean rows,
            see `make_readouts`. The published figures are reported in either case.
        ray: the address of a Ray cluster that computes; "local" starts one here. workers: how many of its.
        force: overwrite outputs of other settings.

    Raises:
        ArgumentError: unusable data, columns, options or folder; the data changed since the work was begun.
        VectorError: a vector that does not fit the model.
    """
    arrow()
    vectors = [vectors] if isinstance(vectors, PersonaVector) else list(vectors)
    _check(vectors, mode, percentile, keep, sample, max_tokens)
    if ray is not None:
        check_address(ray)
    folder, stage = Path(out), progress or (lambda name: lambda done, total: None)
    check_folder(folder)
    parts = [_part("data", data, columns), _part("clean", _shipped() if clean is None else clean)]
    if baseline is not None:
        parts.append(_part("baseline", baseline))
    if on_layout:
        on_layout(str(parts[0].layout))
    axes = [axis_of(model, v, layer) for v in vectors]
    if model.n_ctx < 64:
        raise ContextError(f"n_ctx must be at least 64 to screen, not {model.n_ctx}")
    digests = {p.name: p.data.digest() for p in parts}
    plan = _plan(model, axes, parts, digests, mode=mode, sample=sample, max_tokens=max_tokens, plain=plain)
    check_outputs(folder, plan, force=force)
    with Journal(folder / JOURNAL, plan) as journal:
        texts = Texts(model, model.n_ctx)
        for part in parts:
            _read(journal, part, texts, stage(f"reading {part.name}"))
        n_clean = len(journal.sampled("clean", FEWEST_CLEAN))
        if n_clean < FEWEST_CLEAN:
            raise ArgumentError(f"clean: {n_clean} rows that can be scored are no reference: {FEWEST_CLEAN} at least")
        own = stage("reading the reference")
        readouts = make_readouts(journal, model, axes, mode=mode, plain=plain, progress=own)
        _plan_packs(journal, model, mode=mode, sample=sample, max_tokens=max_tokens)
        runner = _runner(model, readouts.axes, max_tokens, ray, workers)
        try:
            for kind, doing in (("given", "scoring"), ("own", "answering")):
                _compute(journal, kind, runner.compute, stage(doing))
        finally:
            runner.close()
        if any(p.data.digest() != digests[p.name] for p in parts):
            raise ArgumentError("the data changed while it was screened: its scores are of what it was")
        result = _result(journal, model, readouts, parts, mode=mode, sample=sample, percentile=percentile)
        write_outputs(folder, result, journal, model, parts[0].data, keep=keep, plan=plan, progress=stage("writing"))
    return result


def _check(
    vectors: Sequence[PersonaVector], mode: str, percentile: float, keep: str | None, sample: int, max_tokens: int
) -> None:
    names = [v.name for v in vectors]
    if not names or len(set(names)) < len(names):
        raise ArgumentError(f"screening needs vectors of different names, not {names}")
    if mode not in MODES:
        raise ArgumentError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if not 0 < percentile < 100:
        raise ArgumentError(f"percentile must be between 0 and 100, not {percentile}")
    if keep not in (None, "below", "above"):
        raise ArgumentError(f'keep must be "below" or "above", not {keep!r}')
    if sample < 0 or max_tokens < 1:
        raise ArgumentError("sample must not be negative, and max_tokens at least 1")


def _shipped() -> Path:
    return Path(str(files("personasteer.screen").joinpath("clean.jsonl")))


def _part(name: str, given: Any, columns: Columns | None = None) -> _Part:
    try:
        data = open_data(given)
        return _Part(name, data, find_layout(first_rows(data, LOOKED_AT), columns))
    except ArgumentError as e:
        raise ArgumentError(f"{name}: {e}") from e


def _plan(
    model: Model, axes: Sequence[Axis], parts: Sequence[_Part], digests: dict[str, str], **settings: Any
) -> dict[str, Any]:
    """All that the scores depend on."""
    directions = {a.name: [a.layer, hashlib.sha256(a.direction.tobytes()).hexdigest()] for a in axes}
    return {
        "method": METHOD,
        "model": model.fingerprint,
        "build": build_id(),
        "sizes": [model.n_ctx, model.n_batch],
        "vectors": directions,
        "rows": digests,
        "columns": {p.name: asdict(p.layout) for p in parts},
        **settings,
    }


def _read(journal: Journal, part: _Part, texts: Texts, progress: Progress) -> None:
    """All rows of a part into the journal, from where an earlier run left off."""
    if journal.meta(f"read {part.name}"):
        return
    rows = enumerate(part.data.rows())
    known = journal.n_rows(part.name)
    for _ in zip(range(known), rows, strict=False):
        pass
    done = False
    while not done:
        with journal.writing():
            done = True
            for i, row in rows:
                value, problem = row.value or {}, row.problem
                digest, found = "", list[Text]()
                try:
                    messages = part.layout.conversation(value)
                    digest = row_hash(messages)
                    found = texts.of(messages)
                except RowError as e:
                    problem = problem or str(e)
                name, groups = _clean(part.layout.row_id(value)), list(map(_clean, part.layout.groups(value)))
                journal.add_row(part.name, i, name, digest, _clean(problem) or "", groups, found)
                if (i + 1) % ROWS_AT_ONCE == 0:
                    progress(i + 1, i + 1)
                    done = False
                    break
            if done:
                journal.set_meta(f"read {part.name}", "1")


def _clean(text: str | None) -> str | None:
    """What a file of UTF-8 can hold."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def _plan_packs(journal: Journal, model: Model, *, mode: str, sample: int, max_tokens: int) -> None:
    if journal.meta("planned"):
        return
    with journal.writing():
        plan_texts(journal, n_batch=model.n_batch, n_ctx=model.n_ctx)
        if mode == "full":
            journal.add_prompts(PARTS, None)
        elif mode == "fast" and sample:
            journal.add_prompts(["data"], {"data": journal.sampled("data", sample)})
        plan_answers(journal, max_tokens=max_tokens)
        journal.set_meta("planned", "1")


class _Local:
    """Packs computed here, one after the other."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def compute(self, packs: Iterator[Packed]) -> Iterator[tuple[Packed, list[tuple[Any, ...]]]]:
        for pack in packs:
            yield pack, self._scorer.compute(pack)

    def close(self) -> None:
        pass


def _runner(
    model: Model, axes: Sequence[Axis], max_tokens: int, ray: str | None, workers: int | None
) -> _Local | Cluster:
    if ray is None:
        return _Local(Scorer(model, axes, n_ctx=model.n_ctx, max_tokens=max_tokens))
    options = {"n_ctx": model.n_ctx, "n_batch": model.n_batch, "n_parallel": 1, "n_threads": model.n_threads}
    return Cluster(
        ray, str(model.path.resolve()), model.fingerprint, options, axes,
        n_ctx=model.n_ctx, max_tokens=max_tokens, workers=workers,
    )  # fmt: skip


def _compute(journal: Journal, kind: str, compute: Compute, progress: Progress) -> None:
    total, done = journal.cost(kind), journal.cost(kind, done=True)
    if done == total:
        return
    progress(done, total)
    for pack, results in compute(journal.pending(kind)):
        with journal.writing():
            journal.finish(pack, results)
        done += pack.cost
        progress(done, total)


def _result(
    journal: Journal, model: Model, readouts: Readouts, parts: Sequence[_Part], *, mode: str, percentile: float,
    sample: int,
) -> Screening:  # fmt: skip
    scores = {p.name: collect(journal, p.name, len(readouts.axes)) for p in parts}
    folds = np.array([fold_of(digest or "0") for _, _, digest, *_ in journal.rows("clean")], np.intp)
    rows, values = [], []
    problems: dict[str, dict[str, Any]] = {}
    for row, name, digest, problem, own in journal.rows("data"):
        rows.append((name, digest, problem))
        values.append(own)
        if problem:
            found = problems.setdefault(_kind(problem), {"n": 0, "rows": []})
            found["n"] += 1
            if len(found["rows"]) < 20:
                found["rows"].append(row)
    n_ids, ids = journal.repeated("data", "id")
    n_words, _ = journal.repeated("data", "hash")
    if mode != "fast":
        sampled = np.flatnonzero(np.isfinite(scores["data"].full).any(axis=1))
    else:
        sampled = np.asarray(journal.sampled("data", sample), np.intp)
    groups = rows_of_groups(parts[0].layout.by, values)
    traits = [
        trait_result(
            readouts, k, scores, folds=folds, norm=float(model.norms[axis.layer]), mode=mode, percentile=percentile,
            groups=groups, sampled=sampled,
        )
        for k, axis in enumerate(readouts.traits)
    ]  # fmt: skip
    asked = np.isfinite(scores["data"].projection).all(axis=1)
    without = int((asked & ~np.isfinite(scores["data"].full).all(axis=1)).sum()) if mode == "full" else 0
    return Screening(
        traits, scores["data"], readouts, rows, mode, str(parts[0].layout), percentile, dict(sorted(problems.items())),
        {"ids": n_ids, "some_ids": ids, "words": n_words}, model.name, without,
    )  # fmt: skip


def _kind(problem: str) -> str:
    """The problem without this row's own numbers."""
    return re.sub(r"(?<!-)\b\d+\b", "N", problem)
