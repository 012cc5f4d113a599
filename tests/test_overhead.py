"""The overhead benchmark: its rows, not its times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import personasteer as ps
from personasteer.cli import run
from personasteer.evaluate.overhead import (
    BESIDE,
    OPERATORS,
    SHAPES,
    Mode,
    expected,
    interleave,
    measure_overhead,
    modes_of,
    ratio,
    shape_within,
)


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


class Clock:
    """Something timed whose runs take the numbers that it is given, again and again."""

    def __init__(self, log: list[str], name: str, *seconds: float) -> None:
        self.log, self.name, self.seconds, self.n_runs = log, name, seconds, 0

    def run(self) -> dict[str, float]:
        self.log.append(self.name)
        self.n_runs += 1
        return {"decode": self.seconds[(self.n_runs - 1) % len(self.seconds)]}


def test_each_mode_is_paired_with_the_plain_run_beside_it_before_and_after_in_turn() -> None:
    log: list[str] = []
    plain = Clock(log, "plain", *range(100, 200))
    a, b, c = (Clock(log, name, 1.0) for name in "abc")
    found = interleave([(plain, [a, b, c])], pairs=2)
    warm = ["plain", "plain", "a", "a", "b", "b", "c", "c"]
    assert log[8:] == ["plain", "c", "plain", "b", "a", "plain", "plain", "a", "b", "plain", "c", "plain"]
    assert log[:8] == warm
    # the plain runs of the rounds take 102, 103, ...: a and b have the one beside them, on another side each round
    assert [p["decode"] for _, p in found[a]] == [104, 105]
    assert [p["decode"] for _, p in found[b]] == [103, 106]
    assert [p["decode"] for _, p in found[c]] == [102, 106]


def test_a_deadline_that_has_passed_leaves_the_least_number_of_pairs() -> None:
    a = Clock([], "a", 1.0)
    found = interleave([(Clock([], "plain", 1.0), [a])], pairs=30, deadline=0.0)
    assert len(found[a]) == 5
    found = interleave([(Clock([], "plain", 1.0), [a])], pairs=3, deadline=0.0)
    assert len(found[a]) == 3


def test_ratios_are_mode_over_plain_and_the_interval_is_of_the_median() -> None:
    median, low, high = ratio([(2.0, 1.0), (6.0, 2.0), (1.0, 1.0)])
    assert median == 2.0
    assert 1.0 <= low <= 2.0 <= high <= 3.0
    assert ratio([(3.0, 2.0)] * 5) == (1.5, 1.5, 1.5)


def test_a_shape_is_chosen_that_fits_the_time(tiny_path: Path) -> None:
    with ps.Model(tiny_path, n_ctx=160, n_parallel=1) as model:
        modes = modes_of(model, ("add",), (1,))
        assert {m.name for m in modes} == {"off", "add", "off x16", *BESIDE}
        assert shape_within(model, 1e6, modes) == SHAPES[0]
        assert shape_within(model, 1e-9, modes) == SHAPES[-1]


def test_a_steering_at_some_blocks_is_expected_to_cost_their_share(tiny_path: Path) -> None:
    with ps.Model(tiny_path, n_ctx=64, n_parallel=1) as model:
        everywhere, somewhere = (expected(model, Mode("cap", 8, layers=at), "decode") for at in (None, (2,)))
        assert somewhere - 1 == pytest.approx((everywhere - 1) / model.n_layer)
        # two vectors of 64 floats for each of eight caps, at four blocks, over the bytes of the weights
        assert everywhere - 1 == pytest.approx(4 * 16 * 4 * model.n_embd / model._native.n_bytes)


def test_the_command_prints_rows_as_json(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pairs", "2", "--prompt-tokens", "8", "--decode-tokens", "2", "--json"]
    assert run(["bench", "overhead", "-m", str(tiny_path), *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"mode", "phase", "k", "ratio_median", "ratio_min", "ratio_max"} <= set(printed["rows"][0])
    assert "2 pairs" in printed["about"]
    assert "llama-cpp-python" in printed["about"]


def test_the_command_takes_the_time_that_it_is_given_and_draws_and_prints_what_it_found(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "overhead.png"
    assert run(["bench", "-m", str(tiny_path), "--seconds", "1", "--markdown", "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("| phase"))
    rows = [line for line in lines if line.startswith(("| prefill", "| decode"))]
    assert len(rows) == 2 * 10  # add, cap and readings with one vector and with eight
    assert all(row.count("|") == header.count("|") for row in rows)
    assert {"off", "add", "cap", "readings", "capture", "off x16", "personas x16"} == modes_named(rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


def modes_named(rows: list[str]) -> set[str]:
    return {row.split("|")[2].strip() for row in rows}


def test_an_unknown_benchmark_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "speed"]) == 2
    assert "unknown benchmark 'speed'; known: overhead" in capsys.readouterr().err
