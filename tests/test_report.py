"""Reports of evaluations as files: what stands in them, and that foreign words in them stay words."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
from markdown_it import MarkdownIt

import personasteer as ps
from personasteer import plots
from personasteer.evaluate import Controls, Dose, Evaluation
from personasteer.evaluate import report as reports
from personasteer.evaluate.generations import Generations
from personasteer.evaluate.report import (
    as_json,
    block_ranges,
    change_interval,
    layer_series,
    write_report,
)
from personasteer.files import check_folder

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = "<script>alert('x')</script> | \"q\" & $\\frac$ **b** [l](http://e.x) `c`\n| # _i_ ~~s~~ \\"


def evaluation(**more: Any) -> Evaluation:
    """A plausible one: three doses, all controls."""
    doses = tuple(
        Dose(s, 0.1 + d, d, 0.1 + d - w, 0.1 + d + w, 0.9, 0.05, abs(s) / 3)
        for s, d, w in ((-0.3, -0.52, 0.11), (0.0, 0.0, 0.0), (0.3, 0.44, 0.12))
    )
    own = {
        "vector": "dry", "trait": "dry", "model": "tiny", "layers": (1, 2), "strength": 0.3,
        "sizes": {"questions": 5, "cells": 10, "control_cells": 5, "items": 8}, "dose": doses,
        "controls": Controls(3, (0.01, -0.02, 0.03, 0.04, -0.01, 0.0), 0.07, 0.05, -0.02, "pirate", 0.31, (-0.4, 0.4)),
        "kl_neutral": 0.1, "capability": {"base": 0.75, "steered": 0.5, "steered_negative": 0.625},
        "spearman": 1.0, "verdict": {"monotone": True, "outside_random": True, "coherent": True},
        "generations": Generations((-0.3, 0.0, 0.3), (0.0, 0.5, 1.0), ("Why?", "How?"),
                                   (("a", "b"), ("c", "d"), ("e", "f"))),
    }  # fmt: skip
    return Evaluation(**(own | more))


def vector(**more: Any) -> ps.PersonaVector:
    own = {
        "norms": np.ones(4), "separations": np.arange(4.0), "aurocs": np.full(4, 0.8), "reliability": np.full(4, 0.6),
        "effects": np.array([np.nan, 0.2, 0.3, np.nan]),
    }  # fmt: skip
    return samples.vector(**(own | more))


class Page(HTMLParser):
    """The elements, attributes and visible words of a page; table rows as lists of their cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self._hidden = self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._hidden = tag == "style"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)
        if self._cell:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def rendered(markdown: str) -> Page:
    """As GitHub shows it: CommonMark with tables, raw HTML let through."""
    return Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


def write(folder: Path, *pairs: tuple[ps.PersonaVector, Evaluation], matrix: Any = None) -> dict[str, Path]:
    vectors, evaluations = zip(*(pairs or [(vector(), evaluation())]), strict=True)
    written = write_report(folder, vectors, evaluations, matrix)
    return {p.name: p for p in written}


TEXTS = ("report.md", "report.html", "report.json")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of one plausible evaluation."""
    return write(tmp_path_factory.mktemp("report"))


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time."""
    monkeypatch.setattr(plots, "png", lambda _: PNG)


def test_a_report_is_these_files_and_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    written = write(folder)
    assert sorted(written) == sorted([*TEXTS, "dose-dry.png", "layers-dry.png"])
    assert samples.no_leftovers(folder, *written)
    for name, path in written.items():
        if name.endswith(".png"):
            assert path.read_bytes().startswith(PNG)


def test_a_report_says_where_a_vector_is_made_of_the_same_trait_s_continuations(
    tmp_path: Path, plain: dict[str, Path], no_drawing: None
) -> None:
    told = write(tmp_path / "told", (vector(), evaluation(from_continuations=True)))
    for name in ("report.md", "report.html"):
        assert "made of other continuations of the same trait." in told[name].read_text("utf-8")
        assert "made of other" not in plain[name].read_text("utf-8")


def test_the_json_is_the_summary(plain: dict[str, Path]) -> None:
    assert json.loads(plain["report.json"].read_text("utf-8")) == json.loads(json.dumps(evaluation().summary()))


def test_the_same_evaluation_gives_the_same_bytes(plain: dict[str, Path], tmp_path: Path) -> None:
    again = write(tmp_path)
    assert {n: p.read_bytes() for n, p in plain.items()} == {n: p.read_bytes() for n, p in again.items()}


def test_the_page_needs_no_network_and_runs_nothing(plain: dict[str, Path]) -> None:
    text = plain["report.html"].read_text("utf-8")
    page = Page(text)
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert len(sources) == 2
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"https?:|@import|url\(", text)


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_both_texts_show_every_dose_and_control_in_tables(plain: dict[str, Path], name: str) -> None:
    text = plain[name].read_text("utf-8")
    page = Page(text) if name.endswith("html") else rendered(text)
    assert ["-0.30", "-0.42", "-0.52", "-0.63 … -0.41", "0.90", "0.05", "0.100"] in page.rows
    assert ["0.00", "+0.10", "0.00", "0.00 … 0.00", "0.90", "0.05", "0.000"] in page.rows
    assert ["+0.30", "+0.54", "+0.44", "+0.32 … +0.56", "0.90", "0.05", "0.100"] in page.rows
    values = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert [value for key, value in values.items() if "random" in key] == ["±0.07"]
    assert [value for key, value in values.items() if "shuffled" in key] == ["0.05"]
    assert [value for key, value in values.items() if "pirate" in key] == ["-0.02"]
    assert [value for key, value in values.items() if "system prompt" in key] == ["+0.31"]
    assert ["question", "ρ = -0.30", "ρ = 0.00", "ρ = +0.30"] in page.rows
    assert ["Why?", "a", "c", "e"] in page.rows
    assert ["How?", "b", "d", "f"] in page.rows
    assert "0.75 unsteered" in page.text
    assert "Passes" in page.text
    assert "blocks 1-2" in page.text
    assert "|" not in page.text  # no row fell out of its table


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_what_was_not_measured_is_left_out_or_named(tmp_path: Path, name: str) -> None:
    controls = replace(evaluation().controls, shuffled=None, system_prompt=None)
    e = evaluation(controls=controls, capability={}, generations=None, verdict={"monotone": True, "coherent": False})
    text = write(tmp_path, (samples.vector(), e))[name].read_text("utf-8")
    page = Page(text) if name.endswith("html") else rendered(text)
    values = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert [value for key, value in values.items() if "shuffled" in key or "system prompt" in key] == ["n/a", "n/a"]
    assert "Multiple choice" not in page.text
    assert "Free answers" not in page.text
    assert "Does not pass" in page.text
    assert re.search("no ?: the text stays coherent", page.text)


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_hostile_names_and_texts_are_shown_as_they_are_and_do_nothing(tmp_path: Path, name: str) -> None:
    generations = Generations((-0.3, 0.0, 0.3), (0.0, 0.0, 0.0), (HOSTILE,), ((HOSTILE,), ("</td></table>",), ("",)))
    e = evaluation(vector=HOSTILE, model=HOSTILE, generations=generations)
    written = write(tmp_path, (vector(name=HOSTILE), e), (vector(), evaluation()), matrix=np.eye(2))
    assert samples.no_leftovers(tmp_path, *written)
    text = written[name].read_text("utf-8")
    page = Page(text) if name.endswith("html") else rendered(text)
    assert not page.tags & {"script", "a", "em", "s", "code"}
    assert page.text.count(" ".join(HOSTILE.split())) >= 5  # headings, tables, title: every letter of it
    (answers,) = [row for row in page.rows if len(row) == 4 and row[0].startswith("<script>") and "</td>" in row[2]]
    assert " ".join(answers[1].split()) == " ".join(HOSTILE.split())
    assert answers[2] == "</td></table>"
    assert len([row for row in page.rows if row[:1] == ["dry"]]) == 2  # the tables after it still stand
    assert json.loads(written["report.json"].read_text("utf-8"))["vectors"][0]["vector"] == HOSTILE


@pytest.mark.filterwarnings("error")
def test_figures_take_names_in_any_script(tmp_path: Path) -> None:
    e = evaluation(vector="悲観的", trait="悲観的", model="$\\frac$ {y} 🐋")
    written = write(tmp_path, (vector(name="$\\frac$"), e), (vector(name="$\\frac$"), e), matrix=np.eye(2))
    assert written["dose-悲観的-1.png"].read_bytes().startswith(PNG)


def test_several_vectors_come_with_their_cross_talk(tmp_path: Path) -> None:
    second = evaluation(vector="wet", trait="wet", dose=tuple(replace(d, delta=-d.delta) for d in evaluation().dose))
    matrix = np.array([[0.44, -0.123456789], [0.05, 0.6]])
    written = write(tmp_path, (vector(), evaluation()), (vector(), second), matrix=matrix)
    figures = ["cross-talk.png", "dose-dry.png", "dose-wet.png", "layers-dry.png", "layers-wet.png"]
    assert sorted(written) == sorted([*TEXTS, *figures])
    data = json.loads(written["report.json"].read_text("utf-8"))
    assert [v["vector"] for v in data["vectors"]] == ["dry", "wet"]
    assert data["cross_talk"] == {
        "vectors": ["dry", "wet"], "traits": ["dry", "wet"], "delta": [[0.44, -0.123457], [0.05, 0.6]],
    }  # fmt: skip
    for page in (Page(written["report.html"].read_text("utf-8")), rendered(written["report.md"].read_text("utf-8"))):
        assert ["dry", "+0.44", "-0.12"] in page.rows
        assert ["wet", "+0.05", "+0.60"] in page.rows
        assert ["dry", "0.30", "-0.52", "+0.44", "±0.07", "1.00", "passes"] in page.rows  # the overview


@pytest.mark.usefixtures("no_drawing")
def test_vectors_of_one_trait_do_not_write_over_each_other(tmp_path: Path) -> None:
    pairs = [(vector(), evaluation(trait=t)) for t in ("dry", "dry", "Dry", "dry-2")]
    written = write(tmp_path, *pairs)
    assert len([n for n in written if n.startswith("dose-")]) == 4
    assert len({n.casefold() for n in written}) == len(written)


@pytest.mark.usefixtures("no_drawing")
def test_an_old_report_is_replaced_file_by_file_and_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write_bytes = Path.write_bytes

    def full_disk(path: Path, data: bytes) -> int:
        if "report.html" in path.name:
            write_bytes(path, data[:100])
            raise OSError(28, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, (vector(), evaluation(spearman=0.5)))
    assert samples.no_leftovers(tmp_path, *old)
    assert (tmp_path / "report.html").read_bytes() == old["report.html"]
    json.loads((tmp_path / "report.json").read_text("utf-8"))


def test_a_folder_that_cannot_be_written_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(ps.ArgumentError, match=r"file.*: cannot write here(, it is a file| \(Not a directory)"):
            check_folder(folder)
    with pytest.raises(ps.ArgumentError, match="cannot write here"):
        check_folder(Path("/proc/self"))  # nobody may write there, not even root
    (tmp_path / "taken" / "report.md").mkdir(parents=True)
    with pytest.raises(ps.ArgumentError, match=r"report\.md: cannot write here, it is a folder"):
        check_folder(tmp_path / "taken")


def test_one_evaluation_is_its_summary_and_several_are_a_list() -> None:
    e = evaluation()
    assert as_json([e]) == e.summary()
    assert as_json([e, e])["vectors"] == [e.summary(), e.summary()]
    assert "cross_talk" not in as_json([e, e])


def test_the_interval_of_the_change_stands_around_the_change() -> None:
    for d, width in zip(evaluation().dose, (0.11, 0.0, 0.12), strict=True):
        assert change_interval(d) == pytest.approx((d.delta - width, d.delta + width))


@pytest.mark.parametrize(("layers", "text"), [((3,), "3"), ((1, 2, 3), "1-3"), ((0, 2, 3, 9), "0, 2-3, 9"), ((), "")])
def test_blocks_are_told_in_ranges(layers: tuple[int, ...], text: str) -> None:
    assert block_ranges(layers) == text


def test_a_vector_of_another_tool_has_a_figure_too() -> None:
    foreign = samples.vector()
    assert [label for label, *_ in layer_series(foreign)] == ["‖v‖"]
    assert len(layer_series(vector())) == 5
    for v in (foreign, vector()):
        assert plots.png(plots.layers(layer_series(v), v.layers, title="$")).startswith(PNG)


def test_every_criterion_of_a_verdict_is_explained() -> None:
    assert set(evaluation().verdict) == set(reports.CRITERIA)


def test_a_matrix_of_zeros_can_be_drawn() -> None:
    assert plots.png(plots.cross_talk(np.zeros((1, 1)), ["a" * 300], ["b"])).startswith(PNG)
