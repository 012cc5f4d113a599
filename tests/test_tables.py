"""The documents' tables are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tables

import personasteer.evaluate.overhead

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_a_document_s_tables_are_what_their_commands_print(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    begun, ended = (len(re.findall(f"^<!-- {what} ?.*-->$", text, re.MULTILINE)) for what in ("python", "end"))
    assert begun == ended == len(tables.MARKED.findall(text)) > 0
    assert tables.filled(text) == text


def test_a_table_that_was_changed_by_hand_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "printed", lambda name, arguments: f"{name} {arguments}")
    text = "a\n\n<!-- python benchmarks/peers.py --table x -->\n\nby hand\n\n<!-- end -->\nb"
    assert tables.filled(text) == text.replace("by hand", "peers --table x")


def test_a_result_says_what_it_was_made_by_and_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import results

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["/a/peers.py", "--llama-bench", "/opt/llama.cpp/llama-bench", "--pairs", "3"])
    results.save("r", {"rows": [1]})
    found = results.load("r")
    assert found["command"] == "python benchmarks/peers.py --llama-bench llama-bench --pairs 3"
    assert found["machine"] == personasteer.evaluate.overhead.machine()
    assert found["rows"] == [1]
