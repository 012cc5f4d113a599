"""The demo on the bundled model, with fewer questions and controls than a user gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from personasteer import PersonaVector
from personasteer.demo import STRENGTHS, DemoReport, run_demo


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> DemoReport:
    out = tmp_path_factory.mktemp("demo") / "new-folder"
    return run_demo(out, n_questions=2, n_eval_questions=2, n_eval_pairs=2, n_random=2)


def test_the_summary_has_the_promised_keys_and_is_json(report: DemoReport) -> None:
    found = json.loads(json.dumps(report.summary(), allow_nan=False))
    assert {"model", "trait", "layers", "dose", "random", "vector", "plot", "seconds"} <= set(found)
    assert [d["strength"] for d in found["dose"]] == list(STRENGTHS)
    assert {"strength", "log_odds", "delta"} <= set(found["dose"][0])
    assert {"n", "mean", "p95_abs"} <= set(found["random"])
    assert found["random"]["n"] == 2
    assert report.vector.shuffled is not None
    assert set(found["shuffled"]) == {"n", "mean_abs"}
    assert found["shuffled"]["n"] == len(report.vector.shuffled) == 3
    assert set(found["seconds"]) == {"derive", "total"}
    assert 0 < found["seconds"]["derive"] < found["seconds"]["total"]


def test_delta_is_measured_from_strength_zero(report: DemoReport) -> None:
    zero = next(d for d in report.dose if d["strength"] == 0)
    assert zero["delta"] == 0
    for d in report.dose:
        assert d["delta"] == pytest.approx(d["log_odds"] - zero["log_odds"], abs=1e-12)
        assert d["low"] <= d["delta"] + 1e-12
        assert d["delta"] <= d["high"] + 1e-12


def test_the_vector_and_the_plot_are_on_disk(report: DemoReport) -> None:
    assert PersonaVector.load(report.vector_path).layers == report.vector.layers
    assert report.plot_path.read_bytes().startswith(b"\x89PNG")
    assert report.picture_path.read_bytes().startswith(b"\x89PNG")
    files = ["pessimistic-answers.png", "pessimistic.gguf", "pessimistic.png"]
    assert sorted(p.name for p in report.vector_path.parent.iterdir()) == files


def test_steering_up_and_down_changes_the_answers_both_ways(report: DemoReport) -> None:
    for _, (down, plain, up) in report.answers:
        assert len({down, plain, up}) == 3
    assert report.dose[0]["delta"] < 0 < report.dose[-1]["delta"]
