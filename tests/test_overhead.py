"""The overhead benchmark: its rows, not its times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import personasteer as ps
from personasteer.cli import run
from personasteer.evaluate.overhead import OPERATORS, _Mode, _row, measure_overhead


def test_every_mode_has_a_row_for_prefill_and_for_decode(tiny_path: Path) -> None:
    with ps.Model(tiny_path, n_ctx=64, n_parallel=1) as model:
        rows = measure_overhead(model, ks=(1, 8, 17), pairs=3, prompt_tokens=16, decode_tokens=4)
    modes = [("off", 0), ("add", 1), ("add", 8), ("cap", 1), ("cap", 8), ("readings", 1), ("readings", 8), ("live", 1),
             ("live", 8), ("capture", 0), ("capture_last", 0), ("capture_raw", 0), ("off x16", 0),
             ("personas x16", 2)]  # fmt: skip
    assert [(r.phase, r.mode, r.k) for r in rows] == [(p, m, k) for p in ("prefill", "decode") for m, k in modes]
    for r in rows:
        assert r.pairs == 3
        assert 0 < r.ratio_min <= r.ratio_low <= r.ratio_median <= r.ratio_high <= r.ratio_max
        assert (r.hook_mib > 0) == (not r.mode.startswith("off"))
        assert r.tokens_per_second > 0
        assert r.peak_rss_mib > 0


def test_every_operator_can_be_measured_and_an_unknown_one_is_refused(tiny_path: Path) -> None:
    with ps.Model(tiny_path, n_ctx=64, n_parallel=1) as model:
        rows = measure_overhead(model, operators=OPERATORS, ks=(2,), pairs=2, prompt_tokens=8, decode_tokens=2)
        measured = {r.mode for r in rows if r.k == 2}
        assert measured >= set(OPERATORS)
        with pytest.raises(ps.ArgumentError, match="unknown operators fly, sing; known: add, turn, cap"):
            measure_overhead(model, operators=("add", "sing", "fly"))
        for option in ({"pairs": 1}, {"prompt_tokens": 3}, {"decode_tokens": 1}, {"prompt_tokens": 60}):
            with pytest.raises(ps.ArgumentError):
                measure_overhead(model, **{"pairs": 2, "prompt_tokens": 8, "decode_tokens": 4, **option})


def test_ratios_are_mode_over_plain_and_the_interval_is_of_the_median() -> None:
    row = _row(_Mode("add", 8), "prefill", [(2.0, 1.0), (3.0, 1.0), (1.0, 1.0)], 100, 0.5)
    assert (row.ratio_median, row.ratio_min, row.ratio_max) == (2.0, 1.0, 3.0)
    assert row.tokens_per_second == pytest.approx(50.0)  # 100 tokens in the median 2 s
    assert 1.0 <= row.ratio_low <= 2.0 <= row.ratio_high <= 3.0


def test_the_command_prints_rows_as_json(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pairs", "2", "--prompt-tokens", "8", "--decode-tokens", "2", "--json"]
    assert run(["bench", "overhead", "-m", str(tiny_path), *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {"mode", "phase", "k", "ratio_median", "ratio_min", "ratio_max"} <= set(rows[0])


def test_an_unknown_benchmark_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "speed"]) == 2
    assert "unknown benchmark 'speed'; known: overhead" in capsys.readouterr().err
