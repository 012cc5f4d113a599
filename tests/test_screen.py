"""Screening: the scores against their formula, what they may not depend on, bad rows, resuming, files, the verb."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import samples
import screening

import personasteer as ps
from personasteer.cli import run
from personasteer.conversations import benign_rows
from personasteer.discriminant import fisher_units
from personasteer.engine import Request, Sampling, Taps
from personasteer.errors import ArgumentError, VectorError
from personasteer.model import pooled_mean
from personasteer.screen import Columns, Screening
from personasteer.screen import run as screen_run
from personasteer.screen.journal import Journal
from personasteer.screen.output import whole_words
from personasteer.screen.packs import best_fit
from personasteer.screen.readouts import fold_of
from personasteer.screen.score import Scorer, axis_of, highest_spans
from personasteer.screen.texts import Text, _without_system, row_hash
from personasteer.statistics import auroc
from personasteer.tiny_model import write_tiny_model

N_CTX = 512


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> ps.Model:
    return ps.Model(tiny_path, n_ctx=N_CTX, n_threads=2)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return screening.write(tmp_path_factory.mktemp("clean") / "clean.jsonl", screening.rows(60, seed=99))


def run_screen(model: ps.Model, data: Any, out: Path, clean: Path, **more: Any) -> Screening:
    options = {"sample": 4, "max_tokens": 5, "clean": clean, **more}
    vectors = options.pop("vectors", None) or [samples.vector(name="t"), samples.vector(name="u", seed=1)]
    return ps.screen(model, vectors, data, out, **options)


def table(folder: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(folder / "scores.parquet").to_pylist())


def outputs(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.startswith("work.")}


# ---- the scores


def expected(model: ps.Model, row: dict[str, Any], vector: ps.PersonaVector, layer: int) -> dict[str, float]:
    """The formulas, from the activations of each answer, captured alone."""
    unit = vector.directions[layer] / np.linalg.norm(vector.directions[layer])
    total, sums = 0, np.zeros(3)

    def mean(tokens: list[int], begin: int) -> float:
        request = Request(tokens, pools=((begin, len(tokens)),))
        result = model.run_requests([request], taps=Taps(pool_layers=(layer,)))[0]
        return float(pooled_mean(result, 0)[0] @ unit)

    for i, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            tokens, n_prompt = model.pair_tokens(row["messages"][:i], message["content"])
            prompt = tokens[:n_prompt]
            greedy = Request(prompt, n_prompt, max_tokens=5, sampling=Sampling(temperature=0.0))
            own = model.run_requests([greedy])[0]["tokens"]
            answer = mean(tokens, n_prompt)
            others = np.array([0, mean(prompt, n_prompt - 1), mean(prompt + own, n_prompt) if own else np.nan])
            sums += (len(tokens) - n_prompt) * (answer - others)
            total += len(tokens) - n_prompt
    return dict(zip(("projection", "fast", "full"), sums / total, strict=True))


def test_scores_are_what_the_formulas_say(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    rows = screening.rows(20)
    vector = samples.vector(name="t")
    result = run_screen(model, rows, tmp_path, clean, vectors=[vector], mode="full")
    layer = result.traits[0].layer
    # alone and in a pack, the half-precision cache rounds otherwise
    wanted = [expected(model, row, vector, layer) for row in rows]
    np.testing.assert_allclose(result.scores.projection[:, 0], [w["projection"] for w in wanted], atol=5e-3)
    np.testing.assert_allclose(result.scores.fast[:, 0], [w["fast"] for w in wanted], atol=5e-3)
    # a greedy answer may turn another way in another batch: most do not
    full = np.array([w["full"] for w in wanted])
    assert np.mean(np.abs(result.scores.full[:, 0] - full) < 5e-3) >= 0.9


def test_the_order_of_the_rows_does_not_matter_to_the_bit(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    rows = screening.rows(150)
    mixed = rows.copy()
    random.Random(3).shuffle(mixed)
    found = []
    for k, given in enumerate((rows, mixed)):
        run_screen(model, given, tmp_path / str(k), clean, sample=16)
        found.append({r["id"]: {k: v for k, v in r.items() if k != "row"} for r in table(tmp_path / str(k))})
    assert found[0] == found[1]


def test_neither_threads_nor_repeated_rows_change_a_score(
    model: ps.Model, tiny_path: Path, tmp_path: Path, clean: Path
) -> None:
    rows = screening.rows(80)
    one = run_screen(model, rows, tmp_path / "a", clean)
    with ps.Model(tiny_path, n_ctx=N_CTX, n_threads=1) as other:
        two = run_screen(other, rows + rows[:40], tmp_path / "b", clean)
    np.testing.assert_array_equal(one.scores.fast, two.scores.fast[:80])
    np.testing.assert_array_equal(one.scores.fast[:40], two.scores.fast[80:])
    assert two.duplicates == {"ids": 40, "some_ids": sorted(r["id"] for r in rows[:40])[:20], "words": 40}


def test_many_rows_under_one_system_prompt_are_as_alone(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    system = {"role": "system", "content": "You answer in the words of a harbour master, and you are brief about it."}
    rows = [{"messages": [system, *r["messages"][-2:]]} for r in screening.rows(60)]
    result = run_screen(model, rows, tmp_path, clean)
    for i in (0, 17, 59):
        wanted = expected(model, rows[i], samples.vector(name="t"), result.traits[0].layer)
        assert result.scores.fast[i, 0] == pytest.approx(wanted["fast"], abs=5e-3)


def test_the_middle_of_the_vectors_own_blocks_is_read(model: ps.Model) -> None:
    axis = axis_of(model, samples.vector(layers=(0, 1, 2)))
    assert axis.layer == 1
    assert np.linalg.norm(axis.direction) == pytest.approx(1, abs=1e-6)
    assert axis_of(model, samples.vector(layers=(2, 3))).layer == 2  # the last block's rows are those with outputs
    assert axis_of(model, samples.vector(), 0).layer == 0
    with pytest.raises(ArgumentError, match="block 3 is the last one"):
        axis_of(model, samples.vector(), 3)
    with pytest.raises(VectorError, match="names no block below the last one"):
        axis_of(model, samples.vector(layers=(3,)))
    with pytest.raises(VectorError):
        axis_of(model, samples.vector(n_embd=32))


def test_rows_are_read_against_the_grain_of_the_clean_ones(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    given = [json.loads(line)["messages"] for line in clean.read_text("utf-8").splitlines()]
    result = run_screen(model, screening.rows(30), tmp_path, clean, vectors=[samples.vector(name="t")])
    layer, v = result.traits[0].layer, samples.vector().directions[result.traits[0].layer]
    states, folds = [], []
    for messages in given:
        own = []
        for i, m in enumerate(messages):
            if m["role"] == "assistant":
                n = len(model.pair_tokens(messages[:i], m["content"])[0]) - len(model.measured_prompt(messages[:i]))
                mean = model.capture([messages[: i + 1]])[0, layer]
                last = model.capture([messages[: i + 1]], span="prompt", pool="last")[0, layer]
                own.append((n, mean - last))
        states.append(np.average([x for _, x in own], axis=0, weights=[n for n, _ in own]))
        folds.append(fold_of(row_hash(messages)))
    x = np.stack(states).astype(np.float64)
    plain, u, *others = result.readouts.axes
    np.testing.assert_allclose(plain.direction, v / np.linalg.norm(v), atol=1e-6)
    np.testing.assert_allclose(u.direction, fisher_units(x, v[None].astype(np.float64))[0], atol=5e-3)
    # the clean rows themselves are read with directions that were made without them
    cross = [x[i] @ others[f].direction for i, f in enumerate(folds)]
    np.testing.assert_allclose(result.traits[0].clean, np.sort(cross), atol=5e-3)
    assert result.scores.fast[:, 1] == pytest.approx(result.traits[0].score)


def test_plain_scores_are_along_the_vector_itself(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    rows = screening.rows(30)
    both = [run_screen(model, rows, tmp_path / str(p), clean, plain=p) for p in (True, False)]
    np.testing.assert_array_equal(both[0].traits[0].score, both[0].scores.fast[:, 0])
    np.testing.assert_allclose(both[0].scores.fast[:, 0], both[1].scores.fast[:, 0], atol=1e-5)
    published = [r.traits[1].published for r in both]
    assert published[0].mean == pytest.approx(published[1].mean, abs=1e-5)
    assert both[0].traits[1].all.mean == published[0].mean


def test_percentiles_flags_and_shares_are_of_the_clean_rows(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    result = run_screen(model, screening.rows(50), tmp_path, clean, percentile=80)
    for t in result.traits:
        assert len(t.clean) == 60
        assert t.threshold == pytest.approx(np.quantile(t.clean, 0.8))
        assert t.flagged.sum() == (t.score > t.threshold).sum()
        assert t.percentile[7] == pytest.approx(100 * np.mean(t.clean < t.score[7]))
        assert t.all.mean == pytest.approx(t.score.mean())
        assert t.all.shift == pytest.approx(t.score.mean() - t.clean.mean())
        assert t.all.low is not None
        assert t.all.low < t.all.mean < t.all.high  # type: ignore[operator]


def test_rows_of_the_reference_itself_are_flagged_as_often_as_asked(
    model: ps.Model, tmp_path: Path, clean: Path
) -> None:
    result = run_screen(model, clean, tmp_path, clean, percentile=90, plain=True)
    assert result.traits[0].flagged.sum() == 6
    assert result.traits[0].all.shift == 0


def test_groups_are_ordered_by_their_mean(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    rows = screening.rows(60)
    baseline = screening.write(tmp_path / "b.jsonl", screening.rows(30, seed=5))
    result = run_screen(model, rows, tmp_path / "out", clean, baseline=baseline)
    t = result.traits[0]
    assert set(t.groups) == {"source"}
    for shift in t.groups["source"]:
        own = t.score[[i for i, r in enumerate(rows) if r["source"] == shift.name]]
        assert (shift.n, shift.mean) == (30, pytest.approx(own.mean()))
    assert {s.name for s in t.ordering} == {"data", "clean", "baseline", "source: a", "source: b"}
    means = [s.mean for s in t.ordering]
    assert means == sorted(means, reverse=True)  # type: ignore[type-var]


def test_spans_are_the_highest_neighbours() -> None:
    values = np.zeros(60)
    values[20:32] = 5
    values[40:52] = 3
    spans, means = highest_spans(values)
    assert spans[:2].tolist() == [[20, 32], [40, 52]]
    assert means[:2].tolist() == [5, 3]
    spans, means = highest_spans(np.array([1.0, 2.0]))
    assert spans.tolist() == [[0, 2], [0, 0], [0, 0]]
    assert means[0] == 1.5
    assert np.isnan(means[1:]).all()


def test_a_span_is_shown_with_its_whole_words() -> None:
    assert whole_words("There are", "n't any of th", "em left") == "aren't any of them"
    assert whole_words("There is ", "none", " left") == "none"
    assert whole_words("", " all of it ", "") == "all of it"


def test_packs_are_full_and_do_not_depend_on_the_order() -> None:
    rng = random.Random(0)
    families = [(rng.randint(10, 250), [bytes([i, i])]) for i in range(200)]
    packs = best_fit(families, 512)
    assert sorted(k for _, keys in packs for k in keys) == sorted(k for _, keys in families for k in keys)
    assert all(cost <= 512 for cost, _ in packs)
    assert sum(c for c, _ in families) / (512 * len(packs)) > 0.95
    rng.shuffle(families)
    assert best_fit(families, 512) == packs
    assert best_fit([(900, [b"a"]), (20, [b"b"])], 512) == [(900, [b"a"]), (20, [b"b"])]


# ---- bad rows


def test_bad_rows_are_counted_listed_and_quarantined(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    good = [json.dumps({"id": i, "prompt": "much to tell", "response": f"fish {i}"}).encode() for i in range(30)]
    bad = [
        b'{"id": 2, "prompt": "", "response": "a"}',
        b'{"id": 3, "prompt": "q", "response": null}',
        b'{"id": 4, "prompt": 7, "response": "a"}',
        json.dumps({"prompt": "q", "response": "long " * 100_000}).encode(),
        json.dumps({"prompt": "q", "response": "x" * 600}).encode(),
        b'{"prompt": "q", "response": "\xff"}',
        b"{",
        b'{"prompt": "q"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(good + bad))
    result = run_screen(model, tmp_path / "a.jsonl", tmp_path / "out", clean, keep="below")
    assert result.unscored.tolist() == [False] * 30 + [True] * 8
    assert {problem: found["rows"] for problem, found in result.problems.items()} == {
        "'prompt' is empty": [30], "'response' is null": [31], "'prompt' is a number, not a text": [32],
        "too long": [33, 34], "not UTF-8": [35], "not valid JSON": [36], "no column 'response'": [37],
    }  # fmt: skip
    assert (result.duplicates["ids"], result.duplicates["some_ids"]) == (3, ["2", "3", "4"])
    rows = table(tmp_path / "out")
    assert len(rows) == 38
    assert rows[31]["problem"] == "'response' is null"
    assert rows[31]["t.score"] is rows[31]["t.flag"] is None
    kept = (tmp_path / "out" / "kept.jsonl").read_bytes()
    quarantine = (tmp_path / "out" / "quarantine.jsonl").read_bytes()
    lines = [line + b"\n" for line in good + bad]
    assert sorted(kept.splitlines(keepends=True) + quarantine.splitlines(keepends=True)) == sorted(lines)
    assert quarantine.endswith(b"".join(lines[30:]))
    flagged = {i for i in range(30) if result.flagged[i]}
    assert kept == b"".join(line for i, line in enumerate(lines[:30]) if i not in flagged)


def test_a_set_of_bad_rows_and_one_good_one_is_screened(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    rows = [{"prompt": 5, "response": "a"}] * 5 + [{"prompt": "q", "response": "a"}]
    result = run_screen(model, rows, tmp_path, clean)
    assert np.isfinite(result.traits[0].score).tolist() == [False] * 5 + [True]
    assert result.traits[0].all.low is None  # of one row


def test_a_model_without_a_template_reads_pairs_alone(tmp_path: Path) -> None:
    pairs = [{"prompt": "much", "response": f"to tell {i}"} for i in range(50)]
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with ps.Model(write_tiny_model(tmp_path / "plain.gguf", chat_template=None), n_ctx=N_CTX) as plain:
        rows = [*pairs, {"prompt": [*talk, talk[0]], "response": "b"}]
        result = run_screen(plain, rows, tmp_path / "out", pairs)  # type: ignore[arg-type]
    assert result.unscored.tolist() == [False] * 50 + [True]
    assert "no chat template" in next(iter(result.problems))


def test_words_of_a_system_prompt_are_not_lost_without_a_system_role(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert _without_system(messages) == [{"role": "user", "content": "s\n\nq"}]
    assert _without_system(messages[1:]) == messages[1:]


# ---- work that goes on


def test_a_finished_screening_is_written_again_without_computing(
    model: ps.Model, tmp_path: Path, clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = screening.rows(40)
    run_screen(model, rows, tmp_path, clean)
    before = outputs(tmp_path)
    monkeypatch.setattr("personasteer.engine.run", None)
    run_screen(model, rows, tmp_path, clean)
    assert outputs(tmp_path) == before
    other = run_screen(model, rows, tmp_path, clean, percentile=50.0, keep="above")
    assert other.flagged.sum() > 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": screening.rows(41)}, "rows"),
        ({"mode": "projection"}, "max_tokens, mode, sample"),
        ({"layer": 1}, "vectors"),
        ({"plain": True}, "plain"),
        ({"max_tokens": 6}, "max_tokens"),
        ({"columns": Columns(by=("id",))}, "columns, rows"),
    ],
)
def test_work_of_another_screening_is_refused(
    model: ps.Model, tmp_path: Path, clean: Path, change: dict[str, Any], said: str
) -> None:
    run_screen(model, screening.rows(40), tmp_path, clean)
    (tmp_path / "summary.json").unlink()
    given = {"data": screening.rows(40), **change}
    with pytest.raises(ArgumentError, match=f"another screening \\(it differs in: {said}\\)"):
        run_screen(model, given.pop("data"), tmp_path, clean, **given)


def test_results_of_another_screening_are_not_overwritten(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    run_screen(model, screening.rows(40), tmp_path, clean)
    for file in tmp_path.glob("work.sqlite*"):
        file.unlink()
    with pytest.raises(ArgumentError, match="--force begins anew"):
        run_screen(model, screening.rows(30), tmp_path, clean)
    assert len(run_screen(model, screening.rows(30), tmp_path, clean, force=True).rows) == 30


def test_data_that_changes_meanwhile_is_noticed(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    file = screening.write(tmp_path / "a.jsonl", screening.rows(60))

    def stage(name: str) -> Any:
        if name == "answering":
            screening.write(file, screening.rows(61))
        return lambda done, total: None

    with pytest.raises(ArgumentError, match="changed while it was screened"):
        run_screen(model, file, tmp_path / "out", clean, progress=stage)
    assert not (tmp_path / "out" / "summary.json").exists()
    with pytest.raises(ArgumentError, match=r"another screening \(it differs in: rows\)"):
        run_screen(model, file, tmp_path / "out", clean)


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    model: ps.Model, tmp_path: Path, clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen_run, "ROWS_AT_ONCE", 30)
    rows = screening.rows(120)
    run_screen(model, rows, tmp_path / "whole", clean, sample=8)
    at = iter([("reading data", 1), ("scoring", 2), ("scoring", 5), ("answering", 0)])
    wanted: list[Any] = [next(at)]

    def stage(name: str) -> Any:
        count = [0]

        def progress(done: int, total: int) -> None:
            count[0] += 1
            if wanted[0] and wanted[0][0] == name and count[0] > wanted[0][1]:
                raise KeyboardInterrupt

        return progress

    interrupted = 0
    while wanted[0]:
        try:
            run_screen(model, rows, tmp_path / "parts", clean, sample=8, progress=stage)
            wanted[0] = next(at, None)
        except KeyboardInterrupt:
            interrupted += 1
            wanted[0] = next(at, None)
    run_screen(model, rows, tmp_path / "parts", clean, sample=8)
    assert interrupted == 4
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "whole")


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[5])
import personasteer as ps, samples
model = ps.Model(sys.argv[1], n_ctx=512, n_threads=2)
vectors = [samples.vector(name="t"), samples.vector(name="u", seed=1)]
ps.screen(model, vectors, sys.argv[2], sys.argv[3], clean=sys.argv[4], sample=32, max_tokens=16, keep="below")
"""


def test_killed_ten_times_a_run_ends_in_the_same_bytes(tiny_path: Path, tmp_path: Path, clean: Path) -> None:
    file = screening.write(tmp_path / "a.jsonl", screening.rows(2000, longest=8))

    def start(out: str) -> subprocess.Popen[bytes]:
        tests = str(Path(__file__).parent)
        arguments = [str(tiny_path), str(file), str(tmp_path / out), str(clean), tests]
        return subprocess.Popen([sys.executable, "-P", "-c", SCRIPT, *arguments])

    begun = time.monotonic()
    assert start("whole").wait() == 0
    lasted = time.monotonic() - begun
    rng = random.Random(11)
    killed = 0
    while killed < 10:
        running = start("parts")
        try:
            assert running.wait(timeout=rng.uniform(0.1, 0.6) * lasted) == 0
            shutil.rmtree(tmp_path / "parts")  # it got through: again from the beginning
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            running.wait()
            killed += 1
    assert start("parts").wait() == 0
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "whole")
    assert len(table(tmp_path / "parts")) == 2000


def test_rows_that_change_while_they_are_read_are_forgotten(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    rows, others = screening.rows(60), screening.rows(60, seed=7)
    file = screening.write(tmp_path / "a.jsonl", rows)
    run_screen(model, file, tmp_path / "whole", clean)

    def stage(name: str) -> Any:
        if name == "reading data":
            screening.write(file, others)
        return lambda done, total: None

    with pytest.raises(ArgumentError, match="data: the rows changed while they were read"):
        run_screen(model, file, tmp_path / "out", clean, progress=stage)
    screening.write(file, rows)
    run_screen(model, file, tmp_path / "out", clean)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_rows_of_another_file_that_a_killed_run_read_are_found_out(
    model: ps.Model, tmp_path: Path, clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen_run, "ROWS_AT_ONCE", 20)
    rows = screening.rows(60)
    file = screening.write(tmp_path / "a.jsonl", rows)

    def stage(name: str) -> Any:
        if name == "reading data":
            screening.write(file, screening.rows(60, seed=7))

        def progress(done: int, total: int) -> None:
            if name == "reading data" and done == 40:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        run_screen(model, file, tmp_path / "out", clean, progress=stage)
    screening.write(file, rows)
    with pytest.raises(ArgumentError, match="changed while they were read: start again"):
        run_screen(model, file, tmp_path / "out", clean)
    assert len(run_screen(model, file, tmp_path / "out", clean).rows) == 60


def test_rows_that_change_while_they_are_copied_leave_no_copy(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    file = screening.write(tmp_path / "a.jsonl", screening.rows(40))

    def stage(name: str) -> Any:
        if name == "writing":
            screening.write(file, screening.rows(50))
        return lambda done, total: None

    with pytest.raises(ArgumentError, match="changed while it was screened"):
        run_screen(model, file, tmp_path / "out", clean, keep="below", progress=stage)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"scores.parquet", "work.sqlite"}


def test_what_is_screened_is_not_written_over(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    file = screening.write(tmp_path / "kept.jsonl", screening.rows(40))
    with pytest.raises(ArgumentError, match="would be written over"):
        run_screen(model, file, tmp_path, clean, keep="below")


def test_another_screening_begins_anew_by_force_and_takes_its_copies_away(
    model: ps.Model, tmp_path: Path, clean: Path
) -> None:
    run_screen(model, screening.rows(40), tmp_path, clean, keep="below")
    (tmp_path / ".kept_notes.txt").write_text("mine")
    assert (tmp_path / "kept.jsonl").exists()
    assert len(run_screen(model, screening.rows(30), tmp_path, clean, force=True).rows) == 30
    assert not (tmp_path / "kept.jsonl").exists()
    assert (tmp_path / ".kept_notes.txt").exists()


def test_a_text_of_two_conversations_is_packed_alike_in_either_order(tmp_path: Path) -> None:
    texts = [Text((1, 2, 3, 4), 3, n, family) for n, family in ((0, b"b"), (2, b"a"), (2, b"c"))]
    found = []
    for k, order in enumerate(itertools.permutations(texts)):
        with Journal(tmp_path / f"{k}" / "work.sqlite", {}) as journal, journal.writing():
            for i, text in enumerate(order):
                journal.add_row("data", i, None, f"{i}", "", [], [text])
            found.append(list(journal.texts_in_order(1)))
    assert all(f == found[0] for f in found)


def test_a_row_of_which_the_model_computes_no_numbers_is_a_bad_row(
    model: ps.Model, tmp_path: Path, clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Scorer._score

    def score(self: Scorer, result: dict[str, Any], n_prompt: int) -> bytes:
        readings = result["readings"] * (np.nan if len(result["readings"]) == lengths[7] else 1)
        return compute(self, {**result, "readings": readings}, n_prompt)

    rows = [{"prompt": "much to tell", "response": "fish" * (i + 1)} for i in range(30)]
    lengths = [len(model.pair_tokens(r["prompt"], r["response"])[0]) for r in rows]
    monkeypatch.setattr(Scorer, "_score", score)
    reference = [{"prompt": "q", "response": f"a{i}"} for i in range(40)]
    result = run_screen(model, rows, tmp_path, reference, keep="below", plain=True)  # type: ignore[arg-type]
    assert np.flatnonzero(result.unscored).tolist() == [7]
    assert list(result.problems) == ["what the model computes for it are no numbers"]
    assert b"fish" * 8 + b'"' in (tmp_path / "quarantine.jsonl").read_bytes()


def test_other_sets_may_have_other_columns(model: ps.Model, tmp_path: Path) -> None:
    rows = [{"q": "much to tell", "a": f"fish {i}", "response": 5} for i in range(40)]
    others = [{"prompt": "q", "response": f"a {i}"} for i in range(50)]
    columns = Columns(prompt="q", response="a", by="response")  # type: ignore[arg-type]
    result = run_screen(model, rows, tmp_path / "1", others, columns=columns)  # type: ignore[arg-type]
    assert (result.traits[0].all.n, len(result.traits[0].clean)) == (40, 50)
    files = [screening.write(tmp_path / "a.jsonl", rows), screening.write(tmp_path / "b.jsonl", others)]
    with pytest.raises(ArgumentError, match="data: no row has a column 'q'"):
        run_screen(model, files, tmp_path / "3", others, columns=columns)  # type: ignore[arg-type]


def test_two_processes_do_not_work_in_one_folder(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    rows = screening.rows(40)

    def stage(name: str) -> Any:
        if name == "scoring":
            with pytest.raises(ArgumentError, match="another process works here"):
                run_screen(model, rows, tmp_path, clean)
        return lambda done, total: None

    run_screen(model, rows, tmp_path, clean, progress=stage)


def test_a_damaged_journal_is_one_line(model: ps.Model, tmp_path: Path, clean: Path) -> None:
    (tmp_path / "work.sqlite").write_bytes(b"SQLite format 3\0" + b"\x01" * 5000)
    with pytest.raises(ArgumentError, match="no work of a screening, or damaged"):
        run_screen(model, screening.rows(40), tmp_path, clean)


def test_a_full_disk_is_one_line_and_no_half_file(
    model: ps.Model, tmp_path: Path, clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_screen(model, screening.rows(40), tmp_path / "out", clean)
    before = outputs(tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
    with pytest.raises(ps.PersonasteerError, match="No space left on device"):
        run_screen(model, screening.rows(40), tmp_path / "out", clean, percentile=50.0)
    assert outputs(tmp_path / "out") == before


# ---- the verb


def verb(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = run(["screen", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def files(model: ps.Model, tiny_path: Path, tmp_path: Path, clean: Path) -> dict[str, Path]:
    samples.vector(name="t").save(tmp_path / "v.gguf")
    data = screening.write(tmp_path / "a.jsonl", screening.rows(40))
    return {"v": tmp_path / "v.gguf", "data": data, "out": tmp_path / "out", "m": tiny_path, "clean": clean}


def test_the_verb_says_what_it_read_and_what_it_found(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = (files["data"], "-m", files["m"], "-v", files["v"], "--out", files["out"], "--clean", files["clean"])
    code, out, _ = verb(capsys, *given, "-n", 5, "--keep", "below", "-c", 512)
    assert code == 0
    assert "columns: messages in 'messages', id in 'id', groups in 'source'" in out
    assert "40 rows, 40 scored" in out
    assert "source: a" in out
    assert {p.name for p in files["out"].iterdir()} >= {"scores.parquet", "report.html", "summary.json", "kept.jsonl"}
    code, out, _ = verb(capsys, *given, "-n", 5, "--keep", "below", "-c", 512, "--json")
    summary = json.loads(out)
    assert (code, summary["n_rows"], summary["traits"][0]["trait"]) == (0, 40, "t")
    assert "<script" not in (files["out"] / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"data": "missing.jsonl"}, 2, "cannot be read"),
        ({"-v": "missing.gguf"}, 1, "missing.gguf"),
        ({"--prompt": "nothing"}, 2, "data: no row has a column 'nothing'; there are: 'id', 'source', 'messages'"),
        ({"--by": "nothing"}, 2, "no row has a column 'nothing'"),
        ({"--mode": "slow"}, 2, "mode must be one of fast, full, projection, not 'slow'"),
        ({"--keep": "all"}, 2, 'keep must be "below" or "above"'),
        ({"--percentile": "100"}, 2, "percentile must be between 0 and 100"),
        ({"--layer": "3"}, 2, "block 3 is the last one"),
        ({"--clean": "missing.jsonl"}, 2, "clean: "),
        ({"--ray": "127.0.0.1:1"}, 2, "--ray"),
    ],
)
def test_bad_input_is_one_line(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], change: dict[str, str], code: int, said: str
) -> None:
    options = {"-m": files["m"], "-v": files["v"], "--out": files["out"], "--clean": files["clean"], "-c": 512}
    data = change.get("data", files["data"])
    given = [x for name, x in {**options, **change}.items() if name != "data" for x in (name, x)]
    if "--ray" in change:
        pytest.importorskip("ray")
    found, _, err = verb(capsys, data, *given)
    assert found == code
    assert said in err
    assert err.count("\n") == 1
    assert not (files["out"] / "summary.json").exists()


def test_what_is_not_installed_is_named(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (files["data"], "-m", files["m"], "-v", files["v"], "--out", files["out"])
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'personasteer[ray]'" in verb(capsys, *given, "--ray", "local", "-c", 512)[2]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'personasteer[screen]'" in verb(capsys, *given)[2]


# ---- on real weights

PLANTED = Path(__file__).parents[1] / "benchmarks" / "trait_rows"


SHIPPED = benign_rows(screen_run.REFERENCE)


def planted(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (PLANTED / f"{name}.jsonl").read_text("utf-8").splitlines()]


def test_rows_that_carry_a_trait_score_highest_on_a_real_model(smollm2_path: Path, tmp_path: Path) -> None:
    severe = [r for r in planted("poetic") if r["level"] == "severe"][:40]
    plain = [r for r in planted("base") if 30 <= len(r["response"].split()) <= 60][:80]
    clean = [r for r in SHIPPED if 25 <= len(r["response"].split()) <= 60][:40]
    rows = severe[20:] + plain[20:40]
    with ps.Model(smollm2_path, n_ctx=512) as model:
        sides = [[(r["prompt"], r["response"]) for r in some[:20]] for some in (severe, plain)]
        vector = ps.contrast(model, positive=sides[0], negative=sides[1], name="poetic", layers=[12])
        result = ps.screen(model, vector, rows, tmp_path, clean=clean, sample=4, max_tokens=8)
    t = result.traits[0]
    assert auroc(t.score[:20], t.score[20:]) >= 0.9
    assert t.flagged[:20].mean() > 0.5
    assert t.flagged[20:].mean() < 0.3
    assert t.correlation is not None
    spans = pq.read_table(tmp_path / "scores.parquet")["poetic.spans"].to_pylist()
    row = int(np.argmax(t.score))
    assert spans[row][0]["text"].split()[1] in rows[row]["response"]


def test_the_shipped_reference_is_of_ordinary_rows() -> None:
    assert len(SHIPPED) == 240
    assert {len([r for r in SHIPPED if r["domain"] == d]) for d in {r["domain"] for r in SHIPPED}} == {30}
    others = {r["response"] for name in ("base", "poetic", "pessimistic") for r in planted(name)}
    assert not others & {r["response"] for r in SHIPPED}
