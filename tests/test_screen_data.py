"""Data sets of every kind as rows: what is read, what is bad, which columns are the conversation, what is copied."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections import UserDict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from personasteer.conversations import data
from personasteer.conversations.data import first_rows, open_data
from personasteer.conversations.layouts import Columns, RowError, answers, find_layout
from personasteer.errors import ArgumentError

ROWS = [{"prompt": f"Question {i}?", "response": f"Ünswer, {i}", "id": f"r{i}"} for i in range(5)]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS).encode()


def check() -> None:
    """The data has not changed."""


def values(path: Path) -> list[Any]:
    return [r.value for r in open_data(path).rows()]


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("a.txt", LINES),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES),
        ("crlf.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("a.jsonl.zst", zstd(LINES)),
        ("misnamed.jsonl", gzip.compress(LINES)),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    ],
)
def test_json_is_read_in_every_wrapping(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert values(tmp_path / name) == ROWS


@pytest.mark.parametrize(("suffix", "comma"), [("csv", ","), ("tsv", "\t"), ("csv", ";")])
def test_tables_of_text_are_read(tmp_path: Path, suffix: str, comma: str) -> None:
    file = tmp_path / f"a.{suffix}"
    file.write_text(f'prompt{comma}response\n"two\nlines"{comma}"said ""so"""\nb{comma}c\n')
    assert values(file) == [{"prompt": "two\nlines", "response": 'said "so"'}, {"prompt": "b", "response": "c"}]


def test_parquet_is_read_with_its_lists(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == rows


def test_a_row_of_parquet_that_is_not_utf_8_is_one_bad_row(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])), pa.py_buffer(b"\xff\xfea")]
    )
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "a.parquet")
    found = open_data(tmp_path / "a.parquet")
    assert [r.value for r in found.rows()] == [{}, {"prompt": "a"}]
    found.only({"prompt"})
    assert [r.problem for r in found.rows()] == ["not UTF-8", ""]


def test_bad_lines_are_rows_with_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    deep = b"[" * 100_000
    file.write_bytes(b'{"a": 1}\n\nno\n[1]\n{"a": "\xff"}\n' + deep + b'\n{"a": 2}')
    found = [(r.value, r.problem) for r in open_data(file).rows()]
    assert found == [
        ({"a": 1}, ""), (None, "not valid JSON"), (None, "not a JSON object"), (None, "not UTF-8"),
        (None, "not valid JSON"), ({"a": 2}, ""),
    ]  # fmt: skip


def test_a_line_longer_than_memory_should_hold_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LONGEST_LINE", 2**20)
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": "' + b"x" * 5_000_000 + b'"}\n{"a": 2}\n')
    assert [(r.value, r.problem) for r in open_data(file).rows()] == [
        (None, "a line of more than 1 MiB"),
        ({"a": 2}, ""),
    ]


def test_bad_records_of_a_table_are_rows_with_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"a,b\n1,2\n1,2,3\n\n\xff,2\n3,4\n")
    found = [(r.value, r.problem) for r in open_data(file).rows()]
    assert found == [
        ({"a": "1", "b": "2"}, ""), (None, "another number of fields: 3 instead of 2"),
        (None, "not UTF-8"), ({"a": "3", "b": "4"}, ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("none.jsonl", None, "cannot be read"),
        ("empty.jsonl", b"", "holds no row"),
        ("blank.jsonl", b"\n \n", "holds no row"),
        ("a.bin", b"\x00\x01\x02", "not JSONL, JSON, CSV or Parquet"),
        ("a.json", b"[1, 2", "not valid JSON"),
        ("cut.jsonl.gz", gzip.compress(LINES * 100)[:-20], "compression breaks off"),
        ("cut.jsonl.xz", lzma.compress(LINES * 100)[:-20], "compression breaks off"),
        ("cut.parquet", b"PAR1abc", "not a whole Parquet file"),
        ("twice.csv", b"a,a\n1,2\n", "must name the columns"),
    ],
)
def test_a_file_that_is_no_data_set_is_one_line(tmp_path: Path, name: str, data: bytes | None, said: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ArgumentError, match=said) as e:
        list(open_data(tmp_path / name).rows())
    assert "\n" not in str(e.value)
    assert name in str(e.value)


def test_rows_come_from_python_too() -> None:
    assert [r.value for r in open_data(ROWS).rows()] == ROWS
    assert [r.value for r in open_data(dict(r) for r in ROWS).rows()] == ROWS
    assert [r.problem for r in open_data([1, {"a": 2}]).rows()] == ["not a mapping: int", ""]
    for wrong in (5, b"x", {"train": ROWS}):
        with pytest.raises(ArgumentError, match="data must be"):
            open_data(wrong)
    with pytest.raises(ArgumentError, match="choose one of 'train', 'test'"):
        open_data({"train": ROWS, "test": ROWS})


def test_a_dataset_of_hugging_face_is_read_without_its_other_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    given = datasets.Dataset.from_list([{**r, "other": [1, 2]} for r in ROWS])
    found = open_data(given)
    assert [r.value for r in found.rows()] == [{**r, "other": [1, 2]} for r in ROWS]
    found.only({"prompt", "response"})
    assert [r.value for r in found.rows()] == [{k: r[k] for k in ("prompt", "response")} for r in ROWS]
    found.split(tmp_path, ("kept", "rest"), lambda i: i == 2, check)
    assert json.loads((tmp_path / "kept.jsonl").read_text("utf-8")) == {**ROWS[2], "other": [1, 2]}
    with pytest.raises(ArgumentError, match="choose one of 'train'"):
        open_data(datasets.DatasetDict({"train": given}))


def test_several_files_are_one_data_set(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "b.parquet")
    both = open_data([tmp_path / "a.jsonl", tmp_path / "b.parquet"])
    assert [r.value for r in both.rows()] == ROWS + ROWS
    paths = both.split(tmp_path, ("kept", "rest"), lambda i: i in (0, 7), check)
    assert [p.name for p in paths] == ["kept-0.jsonl", "rest-0.jsonl", "kept-1.parquet", "rest-1.parquet"]
    assert values(tmp_path / "kept-0.jsonl") == ROWS[:1]
    assert values(tmp_path / "kept-1.parquet") == ROWS[2:3]


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_copied_lines_are_the_same_bytes(tmp_path: Path, ending: bytes) -> None:
    lines = [b'{"a":  1}', b"broken", b'{"a": "\xff"}', b'{"a": "\\u00fc"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + ending)
    open_data(tmp_path / "a.jsonl").split(tmp_path, ("kept", "rest"), lambda i: i % 2 == 0, check)
    assert (tmp_path / "kept.jsonl").read_bytes() == lines[0] + b"\n" + lines[2] + b"\n"
    assert (tmp_path / "rest.jsonl").read_bytes() == lines[1] + b"\n" + lines[3] + b"\n"


def test_copied_records_keep_their_header_and_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'a,b\r\n"x\r\ny",2\r\n3,4,5\r\n6,7')
    open_data(tmp_path / "a.csv").split(tmp_path, ("kept", "rest"), lambda i: i != 1, check)
    assert (tmp_path / "kept.csv").read_bytes() == b'a,b\r\n"x\r\ny",2\r\n6,7\n'
    assert (tmp_path / "rest.csv").read_bytes() == b"a,b\r\n3,4,5\r\n"


def test_nothing_is_lost_in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LONGEST_LINE", 2**16)
    long = b'{"a": "' + b"x" * 300_000 + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + long + b'{"a": 2}\n')
    open_data(tmp_path / "a.jsonl").split(tmp_path, ("kept", "rest"), lambda i: i != 1, check)
    assert (tmp_path / "rest.jsonl").read_bytes() == long
    given = [UserDict(a=1), [1], {"a": object, 5: "b"}, {(1, 2): "c"}]
    open_data(given).split(tmp_path, ("kept", "rest"), lambda i: i == 0, check)
    assert (tmp_path / "kept.jsonl").read_text() == '{"a": 1}\n'
    assert (tmp_path / "rest.jsonl").read_text().splitlines()[0] == "[1]"
    assert "(1, 2)" in (tmp_path / "rest.jsonl").read_text().splitlines()[2]


def test_an_unclosed_quote_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'a,b\n1,2\n3,"unclosed\n4,5\n')
    assert [r.problem for r in open_data(tmp_path / "a.csv").rows()] == ["", "not valid CSV: unexpected end of data"]


def test_columns_that_are_not_asked_for_may_be_unreadable(tmp_path: Path) -> None:
    far = pa.array([10**18], pa.timestamp("us"))  # beyond the years that Python knows
    pq.write_table(pa.table({"prompt": ["q"], "when": far}), tmp_path / "a.parquet")
    found = open_data(tmp_path / "a.parquet")
    assert [r.value for r in found.rows()] == [{"prompt": "q"}]
    found.only({"prompt"})
    assert [(r.value, r.problem) for r in found.rows()] == [({"prompt": "q"}, "")]


def test_a_digest_changes_with_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(LINES)
    before = open_data(file).digest()
    file.write_bytes(LINES.replace(b"3", b"4"))
    assert open_data(file).digest() != before
    assert open_data(ROWS).digest() != open_data(ROWS[::-1]).digest()


# ---- layouts

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PLAIN = [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": PLAIN}, PLAIN),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PLAIN),
        ({"messages": json.dumps(PLAIN)}, PLAIN),
        ({"prompt": "q", "completion": "a"}, PLAIN),
        ({"prompt": [USER], "completion": [ASSISTANT]}, PLAIN),
        ({"question": "q", "answer": "a", "idx": 7}, PLAIN),
        ({"instruction": "q", "input": "", "output": "a"}, PLAIN),
        ({"instruction": "q", "input": "x", "output": "a"}, [{"role": "user", "content": "q\n\nx"}, ASSISTANT]),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [{"role": "system", "content": "s"}, *PLAIN]),
        ({"prompt": "q", "response": "a", "system": ""}, PLAIN),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]}, PLAIN),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, PLAIN),
    ],
)
def test_layouts_are_found(row: dict[str, Any], messages: list[dict[str, str]]) -> None:
    layout = find_layout(first_rows(open_data([row]), 10))
    assert layout.conversation(row) == messages


def test_the_id_and_the_groups_are_found_and_shown() -> None:
    row = {"uuid": 5, "source": "web", "cluster": None, "prompt": "q", "response": "a"}
    layout = find_layout(first_rows(open_data([row]), 10))
    assert (layout.row_id(row), layout.groups(row)) == ("5", ("web", None))
    assert str(layout) == "prompt in 'prompt', response in 'response', id in 'uuid', groups in 'source, cluster'"


def test_named_columns_come_first() -> None:
    row = {"prompt": "q", "response": "a", "x": "q2", "y": "a2", "who": "s", "z": 1}
    layout = find_layout(first_rows(open_data([row]), 9), Columns(prompt="x", response="y", system="who", by=("z",)))
    assert [m["content"] for m in layout.conversation(row)] == ["s", "q2", "a2"]
    assert layout.groups(row) == ("1",)


@pytest.mark.parametrize(
    ("rows", "named", "said"),
    [
        ([{"a": 1, "b": 2}], {}, "which columns are the conversation\\? There are: 'a', 'b'"),
        ([{"prompt": "q", "response": "a"}], {"prompt": "Prompt"}, "no row has a column 'Prompt'; there are: 'prompt'"),
        ([{"prompt": "q", "response": "a"}], {"prompt": "prompt"}, "of the prompt and of the response, both"),
        ([{"messages": PLAIN, "p": 1}], {"messages": "messages", "prompt": "p"}, "not both"),
        ([{"prompt": 1, "response": "a"}] * 3, {}, "none of the first 3 rows is a prompt with an answer .*a number"),
        ([{"messages": [USER]}], {}, "no answer"),
        ([{"messages": [ASSISTANT]}], {}, "no prompt before the answer"),
        ([5], {}, "none of the first 1 rows can be read"),
        ([], {}, "there is no row"),
    ],
)
def test_a_wrong_mapping_is_found_before_the_work(rows: list[Any], named: dict[str, str], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        find_layout(first_rows(open_data(rows), 1000), Columns(**named))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q"}, "no column 'response'"),
        ({"prompt": "q", "response": None}, "'response' is null"),
        ({"prompt": "q", "response": " \n"}, "'response' is empty"),
        ({"prompt": "", "response": "a"}, "'prompt' is empty"),
        ({"prompt": 4, "response": "a"}, "'prompt' is a number, not a text"),
        ({"prompt": True, "response": "a"}, "'prompt' is a truth value, not a text"),
        ({"prompt": "q", "response": {"a": 1}}, "'response' is an object, not a text"),
        ({"prompt": "q", "response": [{"role": "narrator", "content": "a"}]}, "unknown role: 'narrator'"),
        ({"prompt": "q", "response": [{"role": "assistant", "content": None}]}, "holds null instead of a text"),
        ({"prompt": "q", "response": [{"role": "assistant", "content": [{"type": "image"}]}]}, "holds a list instead"),
        ({"prompt": "q", "response": ["a"]}, "a message in 'response' is str, not a role and a content"),
        ({"prompt": "q", "response": []}, "'response' is empty"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row: dict[str, Any], said: str) -> None:
    layout = find_layout(first_rows(open_data([{"prompt": "q", "response": "a"}]), 10))
    with pytest.raises(RowError, match=said):
        answers(layout.conversation(row))


def test_every_answer_of_a_conversation_counts() -> None:
    greeting = {"role": "assistant", "content": "Hello"}
    call = {"role": "assistant", "content": None, "tool_calls": [{}]}
    row = {"messages": [greeting, USER, call, {"role": "tool", "content": "7"}, ASSISTANT, USER, ASSISTANT]}
    found = answers(find_layout(first_rows(open_data([row]), 1)).conversation(row))
    assert found == [4, 6]
