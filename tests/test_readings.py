"""Readings of every token: their numbers, their texts, files, figures and pages."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import planted_model
import pyarrow.parquet as pq
import pytest
import samples
from test_chat import QWEN_3

import personasteer as ps
from personasteer import monitor, plots
from personasteer.cli import run
from personasteer.monitor.page import report_files, write_report
from personasteer.monitor.readings import Readings, read_tokens, save_readings, watched
from personasteer.monitor.thresholds import last_states
from personasteer.tiny_model import write_tiny_model

N_LAYER, BLOCK = 4, 2
pytestmark = pytest.mark.usefixtures("short_conversations")

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = "<script>alert('x')</script> \"q\" & $\\frac$ a_b </span></p> \u202eevil \x00\x1b[31m $"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "m.gguf", n_layer=N_LAYER)


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[ps.Model]:
    with ps.Model(path, n_ctx=512, n_parallel=4, n_threads=1) as m:
        yield m


def vector(**more: Any) -> ps.PersonaVector:
    """Directions of no trait; none at block 0 for the response, and none at block 1 for the last prompt token."""
    own = samples.vector(n_layer=N_LAYER, layers=(1, 2), name="dry", seed=1)
    directions, last = own.directions.copy(), samples.vector(n_layer=N_LAYER, seed=2).directions.copy()
    directions[0], last[1] = np.nan, 0
    return replace(own, directions=directions, last_prompt=last, **more)


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def threshold(model: ps.Model, **more: Any) -> monitor.Threshold:
    own = vector().last_prompt
    assert own is not None
    given: dict[str, Any] = {
        "name": "dry", "layer": BLOCK, "direction": unit(own[BLOCK]), "watch": 0.0, "alarm": 0.5, "slope": 2.0,
        "intercept": -1.0, "auroc": 0.9, "n_clean": 40, "n_trait": 10, "origin": dict(model.origin),
    }  # fmt: skip
    return monitor.Threshold(**{**given, **more})


def said(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(contents)]


TALK = [{"role": "system", "content": "be kind"}, *said("one two", "three", "four five", "six")]


@pytest.fixture(scope="module")
def talk(model: ps.Model) -> Readings:
    (found,) = read_tokens(model, [vector(), replace(vector(), name="other")], [TALK], thresholds=[threshold(model)])
    return found


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["last-prompt", "response"])
def test_readings_are_projections_on_the_unit_directions(model: ps.Model, position: str) -> None:
    text = "a plain text of some length"
    v = vector()
    data = v.directions if position == "response" else v.last_prompt
    assert data is not None
    with np.errstate(invalid="ignore"):
        directions = unit(data)
    (found,) = read_tokens(model, [v], [text], position=position, last_layer=True)
    (raw,) = model.capture([text], pool="raw", last_layer=True)
    missing = 0 if position == "response" else 1
    assert found.layers == tuple(il for il in range(N_LAYER) if il != missing)
    assert found.readings.dtype == np.float32
    wanted = np.einsum("tle,le->tl", raw, np.nan_to_num(directions))[:, list(found.layers)]
    assert found.readings[:, :, 0] == pytest.approx(wanted, abs=1e-4)  # float32 sums in another order
    (same,) = model.readings([text], np.nan_to_num(directions))
    assert found.readings[:, :, 0] == pytest.approx(same[:, list(found.layers), 0], abs=1e-4)


def test_a_vector_has_no_reading_where_it_has_no_direction(model: ps.Model) -> None:
    (found,) = read_tokens(model, [vector(), samples_with(BLOCK)], [TALK], thresholds=[threshold(model)])
    assert found.layers == (0, 2)  # the last block only on request
    assert np.isfinite(found.readings[:, :, 0]).all()
    assert np.isnan(found.readings[:, 0, 1]).all()
    assert np.isfinite(found.readings[:, 1, 1]).all()


def samples_with(layer: int) -> ps.PersonaVector:
    """A vector with a direction at one block only."""
    own = vector()
    assert own.last_prompt is not None
    last = np.zeros_like(own.last_prompt)
    last[layer] = own.last_prompt[layer]
    return replace(own, name="single", last_prompt=last)


def test_a_planted_direction_reads_highest_at_its_block(tmp_path: Path) -> None:
    """The marks in a system prompt are written along u at block 3 and hardly before."""
    path, u = planted_model.write_planted_model(tmp_path / "m.gguf", 3)
    own = samples.vector(n_layer=8, layers=(3,), name="planted")
    v = replace(own, last_prompt=np.tile(u, (8, 1)))
    with ps.Model(path, n_ctx=256, n_threads=1) as model:
        loud, quiet = read_tokens(
            model,
            [v],
            [
                [{"role": "system", "content": planted_model.FOR * 16}, *said("one two")],
                [{"role": "system", "content": planted_model.AGAINST * 16}, *said("one two")],
            ],
        )
    gap = loud.readings[-1, :, 0] - quiet.readings[-1, :, 0]
    assert gap[3] > 10 * np.abs(gap[:3]).max()


def test_tokens_turns_and_roles_are_the_transcript_s(model: ps.Model, talk: Readings) -> None:
    tokens, placed = model.transcript_tokens(TALK)
    assert list(talk.tokens) == tokens
    assert list(talk.spans) == placed
    assert talk.readings.shape == (len(tokens), len(talk.layers), 2)
    for k, (role, begin, end) in enumerate(placed):
        assert (talk.turns[begin:end] == k).all()
        assert set(talk.roles[begin:end]) == {role}
        assert "".join(talk.pieces[begin:end]) == TALK[k]["content"]
    assert (talk.turns == -1).sum() == sum(role == "" for role in talk.roles) == len(tokens) - sum(
        end - begin for _, begin, end in placed
    )  # fmt: skip


def test_pooled_readings_are_means_over_turns_and_roles(talk: Readings) -> None:
    roles, turns = talk.pooled()
    assert roles == ("system", "user", "assistant", "user", "assistant")
    for k, (_, begin, end) in enumerate(talk.spans):
        assert turns[k] == pytest.approx(talk.readings[begin:end].astype(np.float64).mean(axis=0), abs=1e-6)
    roles, pooled = talk.pooled("role")
    assert roles == ("system", "user", "assistant")
    whose = np.array(talk.roles)
    for role, row in zip(roles, pooled, strict=True):
        assert row == pytest.approx(talk.readings[whose == role].astype(np.float64).mean(axis=0), abs=1e-6)
    with pytest.raises(ps.ArgumentError, match="by must be turn or role"):
        talk.pooled("token")


def test_a_turn_without_tokens_has_no_mean(model: ps.Model) -> None:
    (found,) = read_tokens(model, [vector()], [said("one")])
    roles, pooled = found.pooled()
    assert roles == ("user", "assistant")
    assert np.isfinite(pooled[0]).all()
    assert np.isnan(pooled[1]).all()


@pytest.mark.parametrize("text", ["a €uro 😀 naïve 你好", "x\n\ty", "e\u0301"])
def test_the_bytes_of_a_character_stand_with_the_token_that_completes_it(model: ps.Model, text: str) -> None:
    (found,) = read_tokens(model, [vector()], [said(text)])
    ((_, begin, end), _) = found.spans
    pieces = found.pieces[begin:end]
    assert "".join(pieces) == text
    assert len(pieces) >= len(text.encode()) - 1  # byte tokens
    assert all(len(p) <= 1 for p in pieces)  # the tokenizer has no longer ones
    emoji = [i for i, p in enumerate(pieces) if p == "😀"]
    assert all(pieces[i - 3 : i] == ("", "", "") for i in emoji)


def test_bytes_that_are_no_text_are_written_out(model: ps.Model) -> None:
    (found,) = read_tokens(model, [vector()], ["a\udcffb"])  # an undecodable byte of a file name, say
    assert "".join(found.pieces).endswith("a\\xed\\xb3\\xbfb")


def test_a_plain_text_is_one_turn_without_the_token_that_begins_it(model: ps.Model) -> None:
    (found,) = read_tokens(model, [vector()], ["two words"])
    ((role, begin, end),) = found.spans
    assert (role, end) == ("text", len(found.tokens))
    assert found.tokens[0] == 1
    assert begin >= 1
    assert "".join(found.pieces[begin:]).strip() == "two words"


@pytest.mark.parametrize("layer", [BLOCK, N_LAYER - 1])
def test_thresholds_are_read_as_by_watch_transcripts(model: ps.Model, layer: int) -> None:
    own = vector().last_prompt
    assert own is not None
    t = threshold(model, layer=layer, direction=unit(own[layer][::-1].copy()))  # a direction of its own
    talks = [TALK, said("one")]
    found = read_tokens(model, [vector()], talks, thresholds=[t], last_layer=layer == N_LAYER - 1)
    alone = read_tokens(model, [t], talks)
    for ours, single, wanted in zip(found, alone, monitor.watch_transcripts(model, [t], talks), strict=True):
        for r in (watched(ours, [t]), watched(single, [t])):
            assert r.tokens == wanted.tokens
            assert r.readings == pytest.approx(wanted.readings, abs=1e-4)
            assert [turn.states for turn in r.turns] == [turn.states for turn in wanted.turns]
            assert [turn.role for turn in r.turns] == [turn.role for turn in wanted.turns]


def test_a_long_transcript_is_read_in_one_pass(path: Path) -> None:
    talk = said(*["abcd efg hijk lmno " * 10] * 20)
    with ps.Model(path, n_ctx=8192, n_parallel=4, n_threads=1) as model:
        (found,) = read_tokens(model, [vector()], [talk])
    assert len(found.tokens) > 3500
    assert np.isfinite(found.readings).all()


def test_what_cannot_be_read_is_refused(model: ps.Model, talk: Readings) -> None:
    v = vector()
    for vectors, talks in (([], ["a"]), ([v, v], ["a"]), ([v], []), ([v], [""])):
        with pytest.raises(ps.ArgumentError):
            read_tokens(model, vectors, talks)
    with pytest.raises(ps.ArgumentError, match="position must be"):
        read_tokens(model, [v], ["a"], position="first")
    with pytest.raises(ps.ArgumentError, match="thresholds are of last-prompt"):
        read_tokens(model, [threshold(model)], ["a"], position="response")
    with pytest.raises(ps.VectorError, match="no last-prompt-token directions"):
        read_tokens(model, [replace(v, last_prompt=None)], ["a"])
    with pytest.raises(ps.VectorError, match="no usable last-prompt direction below the last block"):
        read_tokens(model, [samples_with(N_LAYER - 1)], ["a"])
    with pytest.raises(ps.IncompatibleVector):
        read_tokens(model, [samples.vector(n_layer=9, last_prompt=np.ones((9, 64)))], ["a"])
    with pytest.raises(ps.ContextError):
        read_tokens(model, [v], ["a" * 600])
    with pytest.raises(ps.ArgumentError, match="was not read at block 3"):
        talk.at("dry", 3)
    with pytest.raises(ps.ArgumentError, match="not read with the threshold of 'dry'"):
        watched(replace(talk, calibrated={}), [threshold(model)])


# -- drift ------------------------------------------------------------------------------------------------------------


def reading_of(*before: float) -> monitor.Reading:
    """A conversation whose answers, at turns 1, 3, .., read so before them."""
    turns = []
    for x in before:
        turns.append(monitor.Turn("user", 0, 1, None, {}, {}, {"dry": 0.0}))
        turns.append(monitor.Turn("assistant", 1, 2, {"dry": x}, {"dry": "ok"}, {"dry": 0.5}, {"dry": x}))
    return monitor.Reading(turns, [], np.zeros((0, 1), np.float32))


def test_drift_is_told_in_turns() -> None:
    calm = [0.0, 1.0, -1.0, 0.5]
    found = monitor.drift_of_turns(reading_of(*calm, 0.0, 4.0, 5.0, 5.0), "dry")
    assert found is not None
    wanted = monitor.find_drift([*calm, 0.0, 4.0, 5.0, 5.0])
    assert (found.chart.change, found.turn) == (wanted.change, 11)
    assert found.as_dict() == {"turn": 11, "direction": 1, "mean": wanted.mean, "spread": wanted.spread}
    steady = monitor.drift_of_turns(reading_of(*calm, 0.0), "dry")
    assert steady is not None
    assert steady.turn is None


def test_few_answers_need_a_baseline_and_a_baseline_needs_some() -> None:
    calm = [reading_of(0.0, 1.0), reading_of(-1.0, 0.5)]
    assert monitor.drift_of_turns(reading_of(9.0, 9.0, 9.0, 9.0), "dry") is None
    assert monitor.drift_of_turns(reading_of(), "dry", baseline=calm) is None
    found = monitor.drift_of_turns(reading_of(9.0, 9.0), "dry", baseline=calm)
    assert found is not None
    assert (found.turn, found.chart.direction) == (1, 1)
    assert found.chart.mean == pytest.approx(0.125)
    with pytest.raises(ps.ArgumentError, match="a baseline with 2 answers is too small: 4 at least"):
        monitor.drift_of_turns(reading_of(9.0), "dry", baseline=calm[:1])


# -- files ------------------------------------------------------------------------------------------------------------


def test_lines_hold_every_number(talk: Readings, model: ps.Model, tmp_path: Path) -> None:
    short = read_tokens(model, [vector(), samples_with(BLOCK)], [said("h€")])[0]
    save_readings([talk, short], tmp_path / "r.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text("utf-8").splitlines()]
    assert [line["conversation"] for line in lines] == [0] * len(talk.tokens) + [1] * len(short.tokens)
    for r, own in ((talk, lines[: len(talk.tokens)]), (short, lines[len(talk.tokens) :])):
        assert [line["token"] for line in own] == list(range(len(r.tokens)))
        assert tuple(line["id"] for line in own) == r.tokens
        assert tuple(line["text"] for line in own) == r.pieces
        assert [-1 if line["turn"] is None else line["turn"] for line in own] == r.turns.tolist()
        assert tuple(line["role"] or "" for line in own) == r.roles
        back = [[[line["readings"][name][str(il)] for name in r.names] for il in r.layers] for line in own]
        assert np.array_equal(np.array(back, np.float32), r.readings, equal_nan=True)  # null becomes nan
    assert lines[-1]["readings"]["single"]["0"] is None


def test_the_table_holds_every_number(talk: Readings, model: ps.Model, tmp_path: Path) -> None:
    short = read_tokens(model, [vector(), samples_with(BLOCK)], [said("h€")])[0]
    save_readings([talk, short], tmp_path / "r.parquet")
    table = pq.read_table(tmp_path / "r.parquet")
    assert table.column_names == ["conversation", "vector", "layer", "token", "id", "turn", "role", "text", "reading"]
    assert str(table.schema.field("reading").type) == "float"
    rows = table.to_pylist()
    assert len(rows) == talk.readings.size + short.readings.size
    for i, r in enumerate((talk, short)):
        back = np.full(r.readings.shape, 7, np.float32)
        for row in rows:
            if row["conversation"] == i:
                k, at = row["token"], (r.layers.index(row["layer"]), r.names.index(row["vector"]))
                back[k, *at] = np.nan if row["reading"] is None else row["reading"]
                assert (row["id"], row["text"]) == (r.tokens[k], r.pieces[k])
                assert (row["turn"], row["role"]) == ((None, None) if r.turns[k] < 0 else (r.turns[k], r.roles[k]))
        assert np.array_equal(back, r.readings, equal_nan=True)
    assert not [row for row in rows if row["reading"] is not None and math.isnan(row["reading"])]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_same_readings_give_the_same_bytes(talk: Readings, tmp_path: Path, suffix: str) -> None:
    save_readings(talk, tmp_path / f"a.{suffix}")
    save_readings([talk], tmp_path / f"b.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert samples.no_leftovers(tmp_path, f"a.{suffix}", f"b.{suffix}")


def test_files_of_other_kinds_and_places_are_refused(talk: Readings, tmp_path: Path) -> None:
    for name, message in (("r.csv", "written as .jsonl or .parquet"), ("none/r.jsonl", "cannot write here")):
        with pytest.raises(ps.ArgumentError, match=message):
            save_readings(talk, tmp_path / name)
    assert samples.no_leftovers(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_full_disk_ends_in_one_line(
    talk: Readings, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("personasteer.files._temporary_beside", lambda path: _link(path.with_name("full")))
    with pytest.raises(ps.PersonasteerError, match=r"cannot be written \(No space left") as caught:
        save_readings(talk, tmp_path / f"r.{suffix}")
    assert "\n" not in str(caught.value)
    assert samples.no_leftovers(tmp_path)


def _link(path: Path) -> Path:
    path.symlink_to("/dev/full")
    return path


def test_parquet_without_pyarrow_names_the_extra(
    talk: Readings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ps.ArgumentError, match=r"pip install 'personasteer\[parquet\]'"):
        save_readings(talk, tmp_path / "r.parquet")
    save_readings(talk, tmp_path / "r.jsonl")


# -- figures ----------------------------------------------------------------------------------------------------------

ODD = [
    "$", "_", "$a_b$", "\n", "\t", "\x00", "\x1b", "\u202e", "<|im_end|>", "你好", "😀", "", "ا", "e\u0301", "\\", " ",
    "x" * 300,
]  # fmt: skip


def drawn(figure: Any) -> list[str]:
    """All texts of a figure, which is drawn whole."""
    assert plots.png(figure).startswith(PNG)
    return [t.get_text() for t in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))]


def test_a_heat_map_shows_the_text_by_turns(talk: Readings) -> None:
    figure = plots.reading_heat_map(talk.pieces, talk.at("dry", BLOCK), talk.spans, title="dry")
    texts = drawn(figure)
    for k, m in enumerate(TALK):
        assert f"{k} {m['role']}" in texts
        assert m["content"] in texts
    boxes = figure.axes[0].collections[0]
    n_words = sum(end - begin for _, begin, end in talk.spans)
    assert len(boxes.get_paths()) == n_words
    marks = [p for p in figure.axes[0].patches if p.get_width() == 1.6]
    assert len(marks) == 2  # before each answer


def test_a_heat_map_is_red_above_and_blue_below_what_it_is_centred_at() -> None:
    readings = np.array([-1.0, 0.0, 0.5, 3.0])
    for threshold, signs in ((None, (-1, -1, 1, 1)), (1.0, (-1, -1, -1, 1))):
        figure = plots.reading_heat_map(["a", "b", "c", "d"], readings, [], threshold=threshold, title="t")
        red, _, blue, _ = figure.axes[0].collections[0].get_facecolor().T
        assert tuple(np.sign(red - blue)) == signs


def test_a_heat_map_marks_the_states_of_answers(talk: Readings) -> None:
    states = ["", "", "watch", "", "alarm"]
    figure = plots.reading_heat_map(talk.pieces, talk.at("dry", BLOCK), talk.spans, states=states, title="dry")
    colours = [p.get_facecolor()[:3] for p in figure.axes[0].patches if p.get_width() == 1.6]
    assert [tuple(round(255 * x) for x in c) for c in colours] == [(0xFF, 0xD5, 0x4A), (0xFF, 0x5A, 0x4A)]


def test_words_stay_whole_and_long_ones_are_cut() -> None:
    pieces = [*[" abc", "def"] * 40, " " + "y" * 250]
    texts = drawn(plots.reading_heat_map(pieces, np.arange(len(pieces), dtype=float), [], title="t"))
    lines = [t for t in texts if re.fullmatch("(abcdef ?)+", t)]
    assert len(lines) > 2
    assert all(len(line) <= plots.LINE for line in lines)
    assert sum(line.count("abcdef") for line in lines) == 40
    assert sum(t.count("y") for t in texts if re.fullmatch("y+", t)) == 250


def test_thousands_of_tokens_are_cropped_and_thinned_with_a_note() -> None:
    n = 20_000
    readings = np.sin(np.arange(n) / 100)
    spans = [("user", 0, n // 2), ("assistant", n // 2, n)]
    texts = drawn(plots.reading_heat_map([" word"] * n, readings, spans, title="t"))
    assert any(re.fullmatch(r"… \d+ lines, \d+ tokens left out …", t) for t in texts)
    figure = plots.reading_layers([" word"] * n, np.stack([readings, -readings], 1), (3, 5), spans, title="t")
    assert any(re.fullmatch(r"tokens, 20 a column, one of \d+ with its text", t) for t in drawn(figure))
    assert 40 < len(figure.axes[0].get_xticklabels()) <= plots.TOKEN_LABELS
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (2, 1000)
    assert np.allclose(np.asarray(image[0]), -np.asarray(image[1]))
    drift = plots.reading_drift([(k, float(x)) for k, x in enumerate(readings[:5000])], title="t")
    drawn(drift)


@pytest.mark.parametrize("turns", ["none", "one", "each"])
def test_odd_texts_are_drawn(turns: str) -> None:
    n = len(ODD)
    spans = {"none": [], "one": [("assistant", 1, n)], "each": [("$ro_le$\n", i, i + 1) for i in range(n)]}[turns]
    readings = np.linspace(-1, 1, n)
    readings[3] = np.nan
    texts = "".join(drawn(plots.reading_heat_map(ODD, readings, spans, label="$l", title="$t_\n$" * 40)))
    for shown in ("$a_b$", "\\x1b", "\\u202e", "<|im_end|>", "你好", "↵", "→"):
        assert shown in texts
    drawn(plots.reading_layers(ODD, readings[:, None], (1,), spans, marked=1, title="$t_\n$" * 40))
    drawn(
        plots.reading_drift(
            [(0, 1.0)], means=[("$ro_le$\n", 1.0), (r"$\foo$", 1.0), ("x", np.nan)], title="$t_\n$" * 40
        )
    )


def test_one_token_without_a_finite_reading_is_drawn() -> None:
    nothing = np.array([np.nan])
    drawn(plots.reading_heat_map(["a"], nothing, [("assistant", 0, 1)], title="t"))
    drawn(plots.reading_layers(["a"], nothing[:, None], (0,), [("user", 0, 1)], title="t"))
    drawn(plots.reading_layers(["a"], np.array([[2.0]]), (0,), title="t"))
    drawn(plots.reading_drift([], title="t"))


def test_a_drift_figure_has_lines_band_and_change() -> None:
    figure = plots.reading_drift(
        [(1, 0.0), (3, 5.0)], means=[("user", 1.0), ("assistant", 2.0)], thresholds=(2.0, 4.0), baseline=(0.0, 1.0),
        change=3, title="t",
    )  # fmt: skip
    texts = drawn(figure)
    for label in ("watch from 2.00", "alarm from 4.00", "baseline, mean ± 2 sd", "drifts from turn 3 on"):
        assert label in texts
    (line,) = [ln for ln in figure.axes[0].lines if ln.get_label() == "before an answer"]
    assert line.get_xydata().tolist() == [[1, 0], [3, 5]]


def test_layers_are_each_on_their_own_scale() -> None:
    x = np.random.default_rng(0).standard_normal(200)
    figure = plots.reading_layers(["a"] * 200, np.stack([x, 100 * x + 7], 1), (0, 1), title="t")
    image = np.asarray(figure.axes[0].images[0].get_array())
    assert image[0] == pytest.approx(image[1])
    assert np.median(np.abs(image[0])) * 1.4826 == pytest.approx(1)


# -- pages ------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements, attributes and visible words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time."""
    monkeypatch.setattr(plots, "png", lambda _: PNG)


def test_a_report_is_a_page_and_its_figures(talk: Readings, model: ps.Model, tmp_path: Path) -> None:
    single = replace(talk, names=("dry",), readings=talk.readings[:, :, :1])
    written = write_report(tmp_path / "a" / "b", [single], thresholds=[threshold(model)])
    assert [p.name for p in written] == ["index.html", "text.png", "drift.png", "layers.png"] == report_files(1, 1)
    assert samples.no_leftovers(tmp_path / "a" / "b", *report_files(1, 1))
    assert all(p.read_bytes().startswith(PNG) for p in written[1:])
    write_report(tmp_path / "again", [single], thresholds=[threshold(model)])
    for name in report_files(1, 1):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "a" / "b" / name).read_bytes()


@pytest.mark.usefixtures("no_drawing")
def test_the_page_shows_the_words_numbers_and_states(talk: Readings, model: ps.Model, tmp_path: Path) -> None:
    t = threshold(model)
    write_report(tmp_path, [talk, talk], thresholds=[t])
    assert samples.no_leftovers(tmp_path, *report_files(2, 2))
    page = Page((tmp_path / "index.html").read_text("utf-8"))
    assert page.tags.count("input") == 2  # a switch between the vectors
    for m in TALK:
        assert page.text.count(m["content"]) == 2
    titles = [value for tag, name, value in page.attributes if (tag, name) == ("span", "title")]
    begin = talk.spans[1][1]
    numbers = f"dry {talk.at('dry', BLOCK)[begin]:.2f}, other {talk.at('other', 2)[begin]:.2f}"
    assert titles.count(f"token {begin}: {numbers}") == 2
    for turn in watched(talk, [t]).turns:
        if turn.before is not None:
            said = f"{turn.before['dry']:.2f} before, p {turn.probabilities['dry']:.2f}, {turn.states['dry']}"
            assert page.text.count(said) >= 2


@pytest.mark.usefixtures("no_drawing")
def test_the_page_needs_no_network_and_runs_nothing(model: ps.Model, tmp_path: Path) -> None:
    roles = [{"role": "<img src=x onerror=alert(1)>", "content": HOSTILE}, *said(HOSTILE, HOSTILE)]
    hostile = replace(vector(), name=HOSTILE[:60])
    (found,) = read_tokens(model, [hostile], [roles])
    write_report(tmp_path, [found])
    text = (tmp_path / "index.html").read_text("utf-8")
    page = Page(text)
    assert not set(page.tags) & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert {value[:22] for _, name, value in page.attributes if name in ("src", "href")} == {"data:image/png;base64,"}
    assert page.tags.count("img") == 2
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"https?:|@import|url\(", text)
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)
    assert page.text.count(HOSTILE.replace("\u202e", "\\u202e").replace("\x00", "\\x00").replace("\x1b", "\\x1b")) == 3


@pytest.mark.usefixtures("no_drawing")
def test_a_character_of_several_tokens_is_one_word_of_the_page(model: ps.Model, tmp_path: Path) -> None:
    (found,) = read_tokens(model, [vector()], [said("a😀\nb")])
    write_report(tmp_path, [found])
    page = Page((tmp_path / "index.html").read_text("utf-8"))
    assert "a😀↵\nb" in page.text
    begin = found.pieces.index("😀") - 3
    assert any(v.startswith(f"tokens {begin}-{begin + 3}: dry ") for _, n, v in page.attributes if n == "title")


@pytest.mark.usefixtures("no_drawing")
def test_reports_that_cannot_be_are_refused(talk: Readings, tmp_path: Path) -> None:
    for readings, more in (([], {}), ([talk, replace(talk, names=("a", "b"))], {}), ([talk], {"layers": {"dry": 3}})):
        with pytest.raises(ps.ArgumentError):
            write_report(tmp_path / "r", readings, **more)
    (tmp_path / "file").write_text("")
    with pytest.raises(ps.ArgumentError, match="it is a file and not a folder"):
        write_report(tmp_path / "file", [talk])
    assert samples.no_leftovers(tmp_path, "file")


# -- the command line -------------------------------------------------------------------------------------------------

LONG = said(*[f"{letter * 3} and so on" for letter in "abcdefghijk"])


@pytest.fixture
def folder(model: ps.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a vector, thresholds and transcripts lie."""
    monkeypatch.chdir(tmp_path)
    monitor.save_thresholds([threshold(model)], "th.json")
    vector().save("v.gguf")
    for name, talks in (("t.jsonl", [LONG, said("a")]), ("calm.jsonl", [LONG]), ("few.jsonl", [said("a", "b", "c")])):
        Path(name).write_text("".join(json.dumps(t) + "\n" for t in talks))
    return tmp_path


def lines_of(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def test_monitor_writes_tokens_and_a_report(
    folder: Path, path: Path, model: ps.Model, capfd: pytest.CaptureFixture[str]
) -> None:
    base = ["monitor", "-m", str(path), "-t", "1", "--thresholds", "th.json"]
    assert run([*base, "--transcript", "t.jsonl", "--json"]) == 0
    plain = lines_of(capfd)
    assert run([*base, "--transcript", "t.jsonl", "--json", "--tokens", "r.jsonl", "--report", "out"]) == 0
    assert lines_of(capfd) == plain
    assert sorted(p.name for p in Path("out").iterdir()) == sorted(report_files(2, 1))
    tokens = [json.loads(line) for line in Path("r.jsonl").read_text("utf-8").splitlines()]
    before = {(x["conversation"], x["turn"]): x["before"]["dry"] for x in plain if x.get("before")}
    spans = model.transcript_tokens(LONG)[1]
    for (i, turn), value in before.items():
        if i == 0 and turn < len(spans):
            own = [x for x in tokens if x["conversation"] == 0][spans[turn][1] - 1]
            assert own["readings"]["dry"][str(BLOCK)] == pytest.approx(value, abs=1e-6)
    assert run([*base, "-p", "one two", "--report", "one", "--tokens", "r.parquet"]) == 0
    assert "report: one/index.html" in capfd.readouterr().out
    assert sorted(p.name for p in Path("one").iterdir()) == sorted(report_files(1, 1))
    assert pq.read_table("r.parquet").num_rows > 10


def test_monitor_tells_drift(folder: Path, path: Path, model: ps.Model, capfd: pytest.CaptureFixture[str]) -> None:
    base = ["monitor", "-m", str(path), "-t", "1", "--thresholds", "th.json", "--transcript", "t.jsonl"]
    assert run([*base, "--json"]) == 0
    found = [line for line in lines_of(capfd) if "drift" in line]
    (reading,) = monitor.watch_transcripts(model, [threshold(model)], [LONG])
    own = monitor.drift_of_turns(reading, "dry")
    assert own is not None
    assert [line["conversation"] for line in found] == [0]  # the other has one answer
    assert found[0]["drift"]["dry"]["mean"] == pytest.approx(own.chart.mean, abs=1e-3)
    assert found[0]["drift"]["dry"]["turn"] == own.turn
    assert run([*base, "--json", "--baseline", "calm.jsonl"]) == 0
    compared = [line["drift"]["dry"] for line in lines_of(capfd) if "drift" in line]
    assert len(compared) == 2
    values = [t.before["dry"] for t in reading.turns if t.before]
    assert compared[0]["mean"] == pytest.approx(np.mean(values), abs=1e-3)
    assert compared[0]["spread"] == pytest.approx(np.std(values, ddof=1), abs=1e-3)
    assert compared[0]["turn"] is None
    assert run(base) == 0
    assert re.search(r"^dry: (does not drift|drifts (up|down) from turn \d+ on) \(", capfd.readouterr().out, re.M)


def test_with_a_vector_every_block_but_the_last_is_written(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERSONASTEER_CACHE_DIR", str(tmp_path / "cache"))
    few = tuple((q, "") for q, _ in monitor.clean_prompts()[:40])
    monkeypatch.setattr("personasteer.monitor.everyday.clean_prompts", lambda: few)
    texts = planted_model.planted_trait().as_dict()
    vector(provenance={"texts": texts, "trait": "planted"}).save("v.gguf")
    arguments = ["-t", "1", "-v", "v.gguf", "-p", "one", "--tokens", "r.jsonl", "--report", "out", "-o", "th.json"]
    assert run(["monitor", "-m", str(path), *arguments]) == 0
    (used,) = monitor.load_thresholds("th.json")
    line = json.loads(Path("r.jsonl").read_text("utf-8").splitlines()[-1])
    wanted = ["0", "2"] + (["3"] if used.layer == N_LAYER - 1 else [])
    assert list(line["readings"]["dry"]) == wanted
    assert f"at block {used.layer}" in Path("out/index.html").read_text("utf-8")


MISTAKES = {
    "a suffix": (["-p", "a", "--tokens", "r.csv"], "written as .jsonl or .parquet"),
    "no such folder": (["-p", "a", "--tokens", "none/r.jsonl"], "cannot write here"),
    "tokens of nothing": (["--tokens", "r.jsonl", "-o", "new.json"], "nothing to read for --tokens"),
    "a report of nothing": (["--report", "out", "-o", "new.json"], "nothing to read for --tokens"),
    "tokens over the transcript": (
        ["--transcript", "t.jsonl", "--tokens", "t.jsonl"],
        "is what this is made from",
    ),
    "tokens that exist": (["-p", "a", "--tokens", "calm.jsonl"], "--force overwrites it"),
    "a report that exists": (["-p", "a", "--report", "full"], "full/index.html: exists already; --force overwrites it"),
    "a figure that exists": (["-p", "a", "--report", "figures"], "figures/text.png: exists already"),
    "a report into a file": (["-p", "a", "--report", "th.json"], "it is a file and not a folder"),
    "a baseline of a prompt": (["-p", "a", "--baseline", "calm.jsonl"], "--baseline goes with --transcript"),
    "a baseline with few answers": (
        ["--transcript", "t.jsonl", "--baseline", "few.jsonl"],
        "few.jsonl: a baseline with 2 answers is too small: 4 at least",
    ),
    "no baseline": (["--transcript", "t.jsonl", "--baseline", "none.jsonl"], "none.jsonl: cannot be read"),
}


@pytest.mark.parametrize("how", MISTAKES)
def test_mistakes_end_in_one_line_and_write_nothing(
    folder: Path, path: Path, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    for name in ("full/index.html", "figures/text.png"):
        Path(name).parent.mkdir()
        Path(name).write_text("mine")
    before = sorted(folder.rglob("*"))
    arguments, message = MISTAKES[how]
    assert run(["monitor", "-m", str(path), "--thresholds", "th.json", *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert sorted(folder.rglob("*")) == before


def test_force_overwrites_a_report(folder: Path, path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    Path("full/index.html").write_text("mine")
    Path("full/notes.txt").write_text("mine")
    arguments = ["--thresholds", "th.json", "-p", "a", "--report", "full", "--force"]
    assert run(["monitor", "-m", str(path), "-t", "1", *arguments]) == 0
    assert "mine" not in Path("full/index.html").read_text("utf-8")
    assert Path("full/notes.txt").read_text() == "mine"


# -- a real model -----------------------------------------------------------------------------------------------------


def test_words_of_the_bundled_model_are_read_as_captured(smollm2_path: Path) -> None:
    with ps.Model(smollm2_path, n_ctx=256, n_threads=1) as model:
        own = samples.vector(n_layer=model.n_layer, n_embd=model.n_embd, layers=(15,), name="dry")
        talk = said("Why did the café close? 😀", "Nobody came.")
        (found,) = read_tokens(model, [own], [talk], position="response")
        (raw,) = model.capture([talk], pool="raw", span="all", layers=range(model.n_layer - 1))
    for (_, begin, end), m in zip(found.spans, talk, strict=True):
        assert "".join(found.pieces[begin:end]).strip() == m["content"]
    n = min(len(found.tokens), len(raw))
    states = raw[:n, : model.n_layer - 1].astype(np.float64)
    wanted = np.einsum("tle,le->tl", states, unit(own.directions[: model.n_layer - 1]))
    sizes = np.linalg.norm(states, axis=2)
    assert np.abs(found.readings[:n, :, 0] - wanted).max(initial=0, where=sizes > 0) < 1e-3 * sizes.max()
    assert np.median(np.abs(found.readings[:n, :, 0] - wanted) / sizes) < 1e-3


# -- templates that put other words before an answer than later turns keep --------------------------------------------


def test_answers_are_read_where_they_were_asked_for(tmp_path: Path) -> None:
    with ps.Model(write_tiny_model(tmp_path / "m.gguf", chat_template=QWEN_3), n_ctx=1024) as model:
        directions = np.random.default_rng(5).standard_normal((2, model.n_embd)).astype(np.float32)
        thresholds = [
            threshold(model, name=f"t{il}", layer=il, direction=unit(directions[k]))
            for k, il in enumerate((1, model.n_layer - 1))
        ]
        talk = said("Q 0", "A 0", "Q 1", "A 1", "Q 2", "A 2")
        talks = [talk, [*talk, *said("Q 3")]]
        found = monitor.watch_transcripts(model, thresholds, talks)
        read = monitor.read_tokens(model, thresholds, talks)
        for messages, one, again in zip(talks, found, read, strict=True):
            asked = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            states = last_states(model, [(messages[:i], None) for i in asked])
            assert len(again.before) == len(asked) - (messages is talk)  # the last answer is as it was asked for
            for i, state in zip(asked, states, strict=True):
                for turn in (one.turns[i], monitor.watched(again, thresholds).turns[i]):
                    wanted = {t.name: float(t.readings(state[None])[0]) for t in thresholds}
                    assert turn.before == pytest.approx(wanted, abs=0.02)  # other shapes, other roundings


def test_a_guarded_request_is_read_where_thresholds_are_calibrated(tmp_path: Path) -> None:
    with ps.Model(write_tiny_model(tmp_path / "m.gguf", chat_template=QWEN_3), n_ctx=256) as model:
        v = samples.vector(n_layer=model.n_layer, n_embd=model.n_embd, layers=(1,))
        t = threshold(model, name=v.name, layer=1, direction=unit(v.directions[1]))
        guard = monitor.Guard(model, [monitor.Rule(v, when="before")], thresholds=[t])
        (wanted,) = t.readings(last_states(model, [("Hi", None)]))
        found = guard.chat("Hi", max_tokens=2)
        assert found.before[v.name] == pytest.approx(wanted, abs=0.02)  # other shapes, other roundings
        assert found.answer.n_prompt == len(model.measured_prompt("Hi")) > len(model.prompt_tokens("Hi"))
        thought = guard.chat("Hi", max_tokens=2, thinking=True)
        assert thought.answer.n_prompt == len(model.prompt_tokens("Hi"))
