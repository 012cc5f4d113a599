"""What is printed where it is narrow, piped, or not Unicode: no value is cut, nothing crashes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import planted
import pytest
from rich.console import Console
from rich.table import Table

from personasteer.cli import VERBS, _common, run

NAMES = ("pessimistic", "a-very-long-trait-name", "–1.84 … –1.51", "‖v‖ / m")
PATH = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@pytest.fixture
def vector(tiny_path: Path, tmp_path: Path) -> Path:
    v = replace(planted.letter_vector(tiny_path), name="“dry” [/b]\x1b[2J")
    v.save(tmp_path / "v.gguf")
    return tmp_path / "v.gguf"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_keeps_its_values_whole_at_any_width(
    monkeypatch: pytest.MonkeyPatch, width: int, terminal: bool
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(
        _common, "stdout", Console(file=out, width=width, force_terminal=terminal, color_system=None, highlight=False)
    )
    table = Table(
        "a heading of several words", *(f"column {i}" for i in range(6)), title="[b]A title[/b] of some words"
    )
    for i, name in enumerate(NAMES):
        table.add_row(name, *(f"{331.123 * (i + 1):+.3f}" for _ in range(6)))
    _common.print_table(table)
    text = out.getvalue()
    for i, name in enumerate(NAMES):
        (line,) = (line for line in text.splitlines() if name in line)
        assert line.count(f"{331.123 * (i + 1):+.3f}") == 6
    assert all(f"{i}" in text for i in range(6))
    if width >= 80:
        assert max(map(len, text.splitlines())) <= max(width, 85)


def test_long_cells_wrap_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(_common, "stdout", Console(file=out, width=40))
    table = Table("question", "answer")
    table.add_row("Will it rain tomorrow in the harbour town?", "Perhaps it will, and perhaps it will not rain.")
    _common.print_table(table)
    assert max(map(len, out.getvalue().splitlines())) <= 40
    assert {"tomorrow", "harbour", "Perhaps", "perhaps"} <= set(out.getvalue().split())


def test_prose_wraps_in_a_terminal_and_a_command_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "personasteer chat -m demo --lora tuned.gguf -p TEXT " * 3
    shown = []
    for terminal, prose in ((True, True), (True, False), (False, True)):
        out = io.StringIO()
        monkeypatch.setattr(_common, "stdout", Console(file=out, width=60, force_terminal=terminal, color_system=None))
        _common.say(line, prose=prose)
        shown.append(out.getvalue().strip().count("\n"))
    assert shown == [2, 0, 0]


def test_foreign_names_are_neither_markup_nor_orders_to_the_terminal(
    vector: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(vector.parent)
    sizes = ["--questions", "2", "--pairs", "2", "--random", "2", "--items", "0", "--answers", "0", "-t", "1"]
    for line in (["inspect", "v.gguf"], ["eval", "v.gguf", "v.gguf", "-m", str(tiny_path), *sizes]):
        assert run(line) == 0
        shown = capsys.readouterr().out
        assert "“dry” [/b]\\x1b[2J" in shown
        assert "\x1b[2J" not in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_without_unicode_gets_plain_letters_and_the_same_json(vector: Path, encoding: str) -> None:
    def shown(encoding: str, *words: str) -> str:
        code = "from personasteer.cli import main; main()"
        known = {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0", "TERM": "dumb", "COLUMNS": "80"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *words], capture_output=True, env={**os.environ, **PATH, **known}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.decode(encoding)

    text = shown(encoding, "inspect", str(vector))
    assert '"dry" [/b]' in text
    assert "|v| / m" in text
    assert json.loads(shown(encoding, "inspect", str(vector), "--json")) == json.loads(
        shown("utf-8", "inspect", str(vector), "--json")
    )
    assert "+" in shown(encoding, "chat", "--help")


def test_help_of_every_verb_is_written_in_plain_letters_and_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for verb in VERBS:
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
        assert run([verb, "--help"]) == 0
        sys.stdout.flush()
        lines = raw.getvalue().decode("ascii").splitlines()
        assert max(map(len, lines)) <= 80, verb  # also where a word was cut: its ellipsis is two points


def test_what_has_no_plain_letters_is_written_out() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="personasteer")
    stream.write("ρ = ±0.2 … 漢 \U0001f600")
    stream.flush()
    assert raw.getvalue() == rb"rho = +-0.2 .. \u6f22 \u1f600"


def test_help_in_a_narrow_terminal_cuts_no_names() -> None:
    code = "from personasteer.cli import main; main()"
    env = {**os.environ, **PATH, "COLUMNS": "60"}
    for verb in ("derive", "serve"):
        command = [sys.executable, "-P", "-c", code, verb, "--help"]
        text = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
        assert max(map(len, text.splitlines())) <= 60
        assert "…" not in text
