"""One screening from data to results: rows into texts, texts into packs, packs through the model, scores together."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from personasteer._native import build_id
from personasteer.conversations import (
    LOOKED_AT,
    Columns,
    Data,
    Layout,
    Row,
    RowError,
    benign_rows,
    find_layout,
    first_rows,
    open_data,
)
from personasteer.engine import Progress
from personasteer.errors import ArgumentError, ContextError
from personasteer.extras import arrow
from personasteer.files import check_folder, encodable
from personasteer.model import Model
from personasteer.screen.cluster import Cluster, check_address
from personasteer.screen.journal import PARTS, Journal, Packed
from personasteer.screen.output import check_inputs, check_outputs, write_outputs
from personasteer.screen.packs import plan_answers, plan_texts
from personasteer.screen.readouts import Readouts, fold_of, make_readouts
from personasteer.screen.results import MODES, MOST_GROUPS, Groups, Screening, collect, trait_result
from personasteer.screen.score import Axis, Scorer, axis_of
from personasteer.screen.texts import Text, Texts, row_hash
from personasteer.vectors import PersonaVector

log = logging.getLogger("personasteer")

Stages: TypeAlias = Callable[[str], Progress]  # names of stages to progress callbacks

METHOD = 1  # of scoring: work of another is not gone on with
JOURNAL = "work.sqlite"
ROWS_AT_ONCE = 500  # rows that are read in one transaction
FEWEST_CLEAN = 40  # rows of a reference
REFERENCE = ("cooking", "science", "history", "code", "travel", "work", "money", "home")  # its domains: facts, how-tos
FEWEST_TOKENS = 64  # of a text
KINDS = {"given": "scoring", "own": "answering"}  # of packs, and what computing them is called
MOST_KINDS, N_EXAMPLES = 50, 20  # of problems that are told apart, and of rows that are named for each
NOT_A_NUMBER = "what the model computes for it are no numbers"


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
) -> Screening:
    """Score the rows of a chat data set along persona vectors: which would shift the model that is trained on them.

    See `Scores` for the formulas. Work is kept in `out`/work.sqlite as it is done; the same call goes on with it, and
    what was interrupted at any point ends in the same bytes.

    Args:
        data: a file (JSONL, JSON, CSV, Parquet, also compressed), several, or rows from Python such as a
            `datasets.Dataset`. Rows are numbered from 0; blank lines are none. A JSON array is held in memory.
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
        force: begin anew where the folder holds another screening.

    Raises:
        ArgumentError: unusable data, columns, options or folder; the data changed since the work was begun.
        VectorError: a vector that does not fit the model.

    Example:
        >>> rows = [{"prompt": "How are you?", "response": text} for text in ("Fine, thank you.", "Don't ask.")]
        >>> found = ps.screen(model, [vector], rows, "screened", sample=0)
        >>> len(found.rows), found.traits[0].name == vector.name
        (2, True)
    """
    arrow("screening needs", "screen")
    vectors = [vectors] if isinstance(vectors, PersonaVector) else list(vectors)
    _check(vectors, mode, percentile, keep, sample, max_tokens)
    if workers is not None and (ray is None or workers < 1):
        raise ArgumentError("workers are those of a Ray cluster, at least 1: name its address, too")
    if ray is not None:
        check_address(ray)
    folder, stage = Path(out), progress or (lambda name: lambda done, total: None)
    check_folder(folder)
    named = columns or Columns()
    given = {"clean": benign_rows(REFERENCE) if clean is None else clean, "data": data, "baseline": baseline}
    parts = [_part(name, rows, named) for name, rows in given.items() if rows is not None]
    check_inputs(folder, [path for part in parts for path in part.data.paths])
    own = next(part for part in parts if part.name == "data")
    axes = [axis_of(model, v, layer) for v in vectors]
    if model.n_ctx < FEWEST_TOKENS:
        raise ContextError(f"n_ctx must be at least {FEWEST_TOKENS} to screen, not {model.n_ctx}")
    answered = {"sample": sample} if mode == "fast" else {}
    if mode == "full" or (mode == "fast" and sample):
        answered["max_tokens"] = max_tokens
    digests = {p.name: p.data.digest() for p in parts}
    plan = _plan(model, axes, parts, digests, mode=mode, plain=plain, **answered)
    check_outputs(folder, plan, force=force)

    def check_unchanged() -> None:
        if any(p.data.digest() != digests[p.name] for p in parts):
            raise ArgumentError("the data changed while it was screened: its scores are of what it was")

    with Journal(folder / JOURNAL, plan, force=force) as journal:
        texts = Texts(model)
        for part in parts:
            _read(journal, part, texts, digests[part.name], stage(f"reading {part.name}"))
            if part.name == "clean" and (n := len(journal.sampled("clean", FEWEST_CLEAN))) < FEWEST_CLEAN:
                raise ArgumentError(f"clean: {n} rows that can be scored are no reference: {FEWEST_CLEAN} at least")
        doing = stage("reading the reference")
        readouts = make_readouts(journal, model, axes, mode=mode, plain=plain, progress=doing)
        _plan_packs(journal, model, mode=mode, sample=sample, max_tokens=max_tokens)
        _compute(journal, lambda: _runner(model, readouts.axes, max_tokens, ray, workers), stage)
        check_unchanged()
        result = _result(journal, model, readouts, own, mode=mode, sample=sample, percentile=percentile)
        write_outputs(
            folder, result, journal, model, own.data,
            keep=keep, plan=plan, check=check_unchanged, progress=stage("writing"),
        )  # fmt: skip
    for column in named.by:
        if column not in result.traits[0].groups:
            log.warning("%r has one value, or more than %d: they are not compared", column, MOST_GROUPS)
    return result


def _check(
    vectors: Sequence[PersonaVector], mode: str, percentile: float, keep: str | None, sample: int, max_tokens: int
) -> None:
    for v in vectors:
        if not isinstance(v, PersonaVector):
            raise ArgumentError(f"screening needs PersonaVectors, not {type(v).__name__}: load files first")
    names = [v.name for v in vectors]
    if not names or len(set(names)) < len(names):
        raise ArgumentError(f"screening needs vectors of different names, not {names}")
    for name in names:
        if not name or name != encodable(name):
            raise ArgumentError(f"{name!r} is no name for the columns of a table")
    if mode not in MODES:
        raise ArgumentError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if not 0 < percentile < 100:
        raise ArgumentError(f"percentile must be between 0 and 100, not {percentile}")
    if keep not in (None, "below", "above"):
        raise ArgumentError(f'keep must be "below" or "above", not {keep!r}')
    for name, number, least in (("sample", sample, 0), ("max_tokens", max_tokens, 1)):
        if not isinstance(number, int) or number < least:
            raise ArgumentError(f"{name} must be a whole number of at least {least}, not {number!r}")


def layout_of(data: Any, columns: Columns | None = None) -> Layout:
    """Where the conversation of a data set is found, as `screen` will find it. Raises ArgumentError as it does."""
    return _part("data", data, columns or Columns()).layout


def _part(name: str, given: Any, named: Columns) -> _Part:
    """Columns that are named are the data's; those of other sets where they have them."""
    try:
        data = open_data(given)
        rows = first_rows(data, LOOKED_AT)
        if name != "data":
            named = named.those_of(column for row in rows if row.value for column in row.value)
        layout = find_layout(rows, named)
        for part in data.parts()[1:]:
            find_layout(first_rows(part, LOOKED_AT), layout.as_columns())
        data.only(layout.all_columns)
        return _Part(name, data, layout)
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
        "options": {k: x for k, x in model.options.items() if k not in ("n_parallel", "n_threads", "seed", "lora")},
        "vectors": directions,
        "rows": digests,
        "columns": {p.name: asdict(p.layout) for p in parts},
        **settings,
    }


def _read(journal: Journal, part: _Part, texts: Texts, digest: str, progress: Progress) -> None:
    """All rows of a part into the journal, from where an earlier run left off: if they are still the same."""
    if journal.meta(f"read {part.name}"):
        return
    rows, seen = enumerate(part.data.rows()), hashlib.sha256()
    for _, (_, row) in zip(range(journal.n_rows(part.name)), rows, strict=False):
        seen.update(row.content)
    if journal.meta(f"reading {part.name}") not in (None, seen.hexdigest()):
        _forget(journal, part.name)
    done = False
    while not done:
        with journal.writing():
            done = True
            for i, row in rows:
                seen.update(row.content)
                _add(journal, part, texts, i, row)
                if (i + 1) % ROWS_AT_ONCE == 0:
                    progress(i + 1, i + 1)
                    done = False
                    break
            journal.set_meta(f"reading {part.name}", seen.hexdigest())
            if done:
                journal.set_meta(f"read {part.name}", "1")
    if part.data.digest() != digest:
        _forget(journal, part.name)


def _forget(journal: Journal, name: str) -> None:
    with journal.writing():
        journal.clear()
    raise ArgumentError(f"{name}: the rows changed while they were read: start again")


def _add(journal: Journal, part: _Part, texts: Texts, i: int, row: Row) -> None:
    value, problem = row.value or {}, row.problem
    digest, found = "", list[Text]()
    try:
        messages = part.layout.conversation(value)
        digest = row_hash(messages)
        found = texts.of(messages)
    except RowError as e:
        problem = problem or str(e)
    journal.add_row(
        part.name, i, part.layout.row_id(value), digest, encodable(problem), part.layout.groups(value), found
    )


def _plan_packs(journal: Journal, model: Model, *, mode: str, sample: int, max_tokens: int) -> None:
    if journal.meta("planned"):
        return
    with journal.writing():
        plan_texts(journal, n_batch=model.n_batch, n_ctx=model.n_ctx)
        if mode == "full":
            journal.add_prompts()
        elif mode == "fast" and sample:
            journal.add_prompts(journal.sampled("data", sample))
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
        return _Local(Scorer(model, axes, max_tokens=max_tokens))
    return Cluster(ray, model, axes, max_tokens=max_tokens, workers=workers)


def _compute(journal: Journal, start: Callable[[], _Local | Cluster], stage: Stages) -> None:
    if not any(journal.cost(kind) > journal.cost(kind, done=True) for kind in KINDS):
        return
    runner = start()
    try:
        for kind, name in KINDS.items():
            total, done = journal.cost(kind), journal.cost(kind, done=True)
            progress = stage(name)
            for pack, results in runner.compute(journal.pending(kind)):
                with journal.writing():
                    journal.finish(pack, results)
                done += pack.cost
                progress(done, total)
    finally:
        runner.close()


def _result(
    journal: Journal, model: Model, readouts: Readouts, part: _Part, *, mode: str, percentile: float, sample: int
) -> Screening:
    scores = {name: collect(journal, name, readouts) for name in PARTS if journal.n_rows(name)}
    folds = np.array([fold_of(digest or "0") for _, _, digest, *_ in journal.rows("clean")], np.intp)
    rows, values = [], Groups(part.layout.by)
    problems: dict[str, dict[str, Any]] = {}
    known = np.asarray(np.isfinite(scores["data"].projection).all(axis=1))
    for row, name, digest, problem, groups in journal.rows("data"):
        problem = problem or ("" if known[row] else NOT_A_NUMBER)
        rows.append((name, digest, problem))
        values.add(row, groups)
        if problem:
            kind = problem.split(": ")[0]
            kind = kind if kind in problems or len(problems) < MOST_KINDS else "others"
            found = problems.setdefault(kind, {"n": 0, "rows": []})
            found["n"] += 1
            if len(found["rows"]) < N_EXAMPLES:
                found["rows"].append(row)
    n_ids, ids = journal.repeated("data", "id")
    n_words, _ = journal.repeated("data", "hash")
    answered = np.asarray(journal.sampled("data", sample if mode == "fast" else len(rows)), np.intp)
    groups_of = values.rows()
    traits = [
        trait_result(
            readouts, k, scores, folds=folds, norm=float(model.norms[axis.layer]), mode=mode, percentile=percentile,
            groups=groups_of, answered=answered,
        )
        for k, axis in enumerate(readouts.traits)
    ]  # fmt: skip
    without = np.asarray(known & ~np.isfinite(scores["data"].full).all(axis=1))
    return Screening(
        traits, scores["data"], readouts, rows, mode, str(part.layout), percentile, dict(sorted(problems.items())),
        {"ids": n_ids, "some_ids": ids, "words": n_words}, model.name, int(without.sum()) if mode == "full" else 0,
    )  # fmt: skip
