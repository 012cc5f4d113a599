"""The command line: what it prints, its exit codes, and one line for every mistake."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
import typer
from safetensors.numpy import load_file

import personasteer
from personasteer import PersonaVector
from personasteer.cli import VERBS
from personasteer.cli import run as run_command
from personasteer.cli._common import need_strength, split_strength
from personasteer.cli.derive import parse_layers
from personasteer.errors import ArgumentError
from personasteer.tiny_model import write_tiny_model

Command = Callable[..., tuple[int, str, str]]
NORMS = np.array([5.0, 8.0, 11.0, 13.0], np.float32)
TRAIT = """
name = "dry"
description = "Dry."
[[system]]
positive = "Be dry."
negative = "Be wet."
[questions]
derive = ["How are you?", "And the sea?", "What now?", "Is it far?"]
"""


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs a command line in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def result(got: tuple[int, str, str]) -> Any:
    """The one JSON value of a --json run."""
    code, out, err = got
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    return json.loads(out)


def one_line(got: tuple[int, str, str], code: int, pattern: str) -> None:
    assert got[2].startswith("personasteer: "), got
    assert got[2].count("\n") == 1, got
    assert got[2].endswith("\n")
    assert "Traceback" not in got[2]
    assert re.search(pattern, got[2]), got
    assert got[1] == ""
    assert got[0] == code, got


# ---- the surface


def test_every_verb_explains_itself_with_an_example(cli: Command) -> None:
    for verb in VERBS:
        code, out, err = cli(verb, "--help")
        assert (code, err) == (0, ""), verb
        assert "Example" in out
        assert "personasteer " + verb in out
        assert "--json" in out
    code, out, _ = cli("--help")
    assert code == 0
    assert all(verb in out for verb in VERBS)


def test_the_version_is_the_packages(cli: Command) -> None:
    assert cli("--version") == (0, f"personasteer {personasteer.__version__}\n", "")


def test_no_verb_at_all_is_bad_usage_and_shows_the_help(cli: Command) -> None:
    code, out, _ = cli()
    assert code == 2
    assert "derive" in out


def test_the_public_names_are_sorted_and_there() -> None:
    assert personasteer.__all__ == sorted(set(personasteer.__all__))
    assert all(hasattr(personasteer, name) for name in personasteer.__all__)
    assert {"Ablate", "Add", "Cap", "Floor", "Redirect", "Steering", "When", "PersonaVector", "Trait"} <= set(
        personasteer.__all__
    )
    assert {"Model", "demo_model", "Session", "Stream", "Answer", "attach", "detach", "contrast", "derive"} <= set(
        personasteer.__all__
    )
    errors = {
        name
        for name, value in vars(personasteer.errors).items()
        if isinstance(value, type) and issubclass(value, personasteer.PersonasteerError)
    }
    assert errors <= set(personasteer.__all__)
    for module in ("traits", "ship", "evaluate", "derive", "errors", "plots"):
        importlib.import_module(f"personasteer.{module}")


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [
        ("v.gguf:0.3", "v.gguf", 0.3),
        ("v.gguf:-0.3", "v.gguf", -0.3),
        ("a:b.gguf:0.3", "a:b.gguf", 0.3),
        (r"C:\x.gguf:-1e-1", r"C:\x.gguf", -0.1),
        ("v.gguf:+2", "v.gguf", 2.0),
        ("v.gguf:.5", "v.gguf", 0.5),
        ("v.gguf:5.", "v.gguf", 5.0),
        ("1:2", "1", 2.0),
        (r"C:\x.gguf", r"C:\x.gguf", None),
        ("v.gguf", "v.gguf", None),
        ("v.gguf:", "v.gguf:", None),
        (":0.3", ":0.3", None),
        ("v.gguf:nan", "v.gguf:nan", None),
        ("v.gguf:inf", "v.gguf:inf", None),
        ("v.gguf:0x1", "v.gguf:0x1", None),
        ("v.gguf: 1", "v.gguf: 1", None),
        ("v.gguf:1_0", "v.gguf:1_0", None),
        ("v.gguf:٣", "v.gguf:٣", None),
    ],
)
def test_a_vector_argument_splits_at_the_last_colon_when_a_number_follows(
    text: str, file: str, strength: float | None
) -> None:
    assert split_strength(text) == (file, strength)
    if strength is None:
        with pytest.raises(ArgumentError, match="strength is needed"):
            need_strength(text)
    else:
        assert need_strength(text) == (file, strength)


def test_layers_are_ranges_and_lists_and_absurd_ones_are_refused_before_they_fill_the_memory() -> None:
    assert parse_layers("12-14") == [12, 13, 14]
    assert parse_layers("3,5") == [3, 5]
    assert parse_layers("1-2,9") == [1, 2, 9]
    tracemalloc.start()
    for bad in ("0-3000000", "", "x", "5-", "-5", "1,,2", "3-1", "1-2-3", "0-9999999"):
        with pytest.raises(typer.BadParameter):
            parse_layers(bad)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


# ---- results


def test_traits_lists_the_library_and_shows_one(cli: Command) -> None:
    listed = result(cli("traits", "--json"))
    assert [t["name"] for t in listed] == personasteer.traits.names()
    assert {"pessimistic", "pirate", "power-seeking"} <= {t["name"] for t in listed}
    assert all(t["description"] for t in listed)
    one = result(cli("traits", "pirate", "--json"))
    assert one["name"] == "pirate"
    assert {"description", "system", "derive_questions", "evaluate_questions", "continuations"} <= set(one)
    code, out, err = cli("traits", "pirate")
    assert (code, err) == (0, "")
    assert one["system"][0][0] in out.replace("\n", " ")


def test_derive_inspect_export_chat_generate_and_capture_work_together(
    cli: Command, tiny_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "dry.toml").write_text(TRAIT)
    # random weights show no trait: nothing to filter by, nothing to calibrate
    raw = ["--no-filter", "--no-calibrate"]
    derived = result(cli("derive", "dry.toml", "-m", tiny_path, "-o", "dry.gguf", "-n", 4, "-t", 1, *raw, "--json"))
    assert set(derived) == {
        "vector", "trait", "layers", "strength", "window", "separation", "auroc", "split_half_cosine", "elicitation",
        "massive_dimensions", "n_positive", "n_negative", "calibrated", "answers",
    }  # fmt: skip
    assert (derived["vector"], derived["trait"]) == ("dry.gguf", "dry")
    v = PersonaVector.load("dry.gguf")
    assert derived["layers"] == list(v.layers)
    assert (derived["strength"], derived["window"]) == (v.strength, list(v.window))
    assert v.aurocs is not None
    assert derived["auroc"] == pytest.approx(float(v.aurocs[list(v.layers)].mean()), abs=1e-4)
    assert derived["elicitation"] == v.provenance["elicitation"]
    assert derived["elicitation"]["kept"] == derived["n_positive"] == derived["n_negative"] == 4
    assert v.provenance["seed"] == 0
    assert samples.no_leftovers(tmp_path, "dry.toml", "dry.gguf")

    shown = result(cli("inspect", "dry.gguf", "-m", tiny_path, "--json"))
    assert set(shown) == {
        "file", "name", "n_layer", "n_embd", "layers", "strength", "recommended", "window", "provenance", "per_layer",
        "same_model",
    }  # fmt: skip
    assert (shown["recommended"], shown["window"]) == (v.strength, None)  # not calibrated
    assert (shown["n_layer"], shown["n_embd"], shown["same_model"]) == (4, 64, True)
    assert [row["layer"] for row in shown["per_layer"]] == [0, 1, 2, 3]
    assert [row["layer"] for row in shown["per_layer"] if row["steered"]] == list(v.layers)
    lengths = np.linalg.norm(v.directions, axis=1)
    assert [row["norm"] for row in shown["per_layer"]] == pytest.approx(lengths.tolist(), abs=1e-6)

    exported = result(
        cli("export", "control-vector", "dry.gguf:-0.4", "-m", tiny_path, "-o", "wet.gguf", "-t", 1, "--json")
    )
    assert set(exported) == {"file", "kind", "layers", "vectors"}
    assert exported["vectors"] == [{"file": "dry.gguf", "strength": -0.4}]

    common = ["-m", tiny_path, "-t", 1, "-c", 512, "-n", 8, "--temp", 0]
    texts = {}
    for verb in ("chat", "generate"):
        for vectors in ([], ["dry.gguf:0.5"], ["dry.gguf:0"], ["dry.gguf:0.5", "wet.gguf:0.1"]):
            options = [x for v in vectors for x in ("-v", v)]
            found = result(cli(verb, *common, *options, "-p", "hello", "--json"))
            assert set(found) == {"prompt", "text", "finish", "n_prompt", "n_tokens", "rho"}
            assert found["prompt"] == "hello"
            assert found["finish"] in ("length", "stop")
            assert found["n_tokens"] == 8 or found["finish"] == "stop"
            assert found["n_prompt"] >= len("hello")  # the tokenizer has letters and bytes
            if len(vectors) < 2:
                assert found["rho"] == pytest.approx(0.5 if vectors == ["dry.gguf:0.5"] else 0.0, rel=1e-6)
            texts[verb, tuple(vectors)] = found["text"]
        assert texts[verb, ()] == texts[verb, ("dry.gguf:0",)]
        assert texts[verb, ()] != texts[verb, ("dry.gguf:0.5",)]
        code, out, err = cli(verb, *common, "-p", "hello")
        assert (code, out, err) == (0, texts[verb, ()] + "\n", "")

    (tmp_path / "texts.txt").write_text("One text.\n\nAnother, longer text.\n")
    captured = result(cli("capture", "-m", tiny_path, "-f", "texts.txt", "-o", "a.safetensors", "-t", 1, "--json"))
    assert captured["n"] == 2
    assert captured["shapes"] == {"activations": [2, 4, 64]}
    assert {"file", "model", "fingerprint", "pool", "span"} <= set(captured)
    with personasteer.Model(tiny_path, n_threads=1) as m:
        expected = m.capture(["One text.", "Another, longer text."])
    assert np.array_equal(load_file("a.safetensors")["activations"], expected, equal_nan=True)


def test_capture_takes_pairs_and_messages_from_json_lines(cli: Command, tiny_path: Path, tmp_path: Path) -> None:
    lines: list[Any] = [
        ["question", "answer"],
        {"prompt": "question", "answer": "answer"},
        {"messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    got = cli("capture", "-m", tiny_path, "-f", "t.jsonl", "-o", "a.st", "--pool", "raw", "-t", 1, "--json")
    shapes = result(got)["shapes"]
    assert list(shapes) == ["activations.0", "activations.1", "activations.2"]
    assert len({tuple(s) for s in shapes.values()}) == 1
    first, *others = load_file("a.st").values()
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-2)  # their places in the batch differ


def test_a_line_separator_inside_json_does_not_end_the_line(cli: Command, tiny_path: Path) -> None:
    Path("t.jsonl").write_text('"one\u2028text"\n"another"\n', "utf-8")
    assert result(cli("capture", "-m", tiny_path, "-f", "t.jsonl", "-o", "a.st", "-t", 1, "--json"))["n"] == 2


def test_inspect_says_what_scale_1_stands_for_and_nothing_where_the_file_does_not(
    cli: Command, tiny_path: Path
) -> None:
    samples.vector(norms=NORMS).save("ours.gguf", strength=-0.25)
    samples.write_gguf(Path("foreign.gguf"), {"direction.1": np.ones(64, np.float32)})
    assert "scale 1.0 in llama.cpp is strength -0.25" in cli("inspect", "ours.gguf")[1]
    code, out, err = cli("inspect", "foreign.gguf", "-m", tiny_path)
    assert (code, err) == (0, "")
    assert "scale" not in out
    assert "does not say where it was derived" in out


def test_the_offset_moves_a_file_that_numbers_one_block_late(cli: Command, tiny_path: Path) -> None:
    row = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    samples.write_gguf(Path("late.gguf"), {"direction.3": row})
    samples.write_gguf(Path("right.gguf"), {"direction.2": row})
    common = ["-m", tiny_path, "-t", 1, "-c", 64, "-n", 8, "--temp", 0, "-p", "hello", "--json"]
    expected = result(cli("generate", *common, "-v", "right.gguf:0.6"))
    assert result(cli("generate", *common, "-v", "late.gguf:0.6", "--offset", 1)) == expected
    assert result(cli("generate", *common, "-v", "late.gguf:0.6")) != expected


def test_the_sum_of_two_vectors_exported_steers_as_both_do(cli: Command, tiny_path: Path) -> None:
    with personasteer.Model(tiny_path, n_ctx=512, n_threads=1) as m:
        a, b = (samples.vector(seed=s, layers=(1, s), norms=m.norms) for s in (2, 3))
        a.save("a.gguf")
        b.save("b.gguf")
        assert result(cli("export", "control-vector", "a.gguf:0.3", "b.gguf:-0.2", "-m", tiny_path, "-o", "ab.gguf",
                          "-t", 1, "--json"))["layers"] == [1, 2, 3]  # fmt: skip
        both = PersonaVector.load("ab.gguf")
        one, two, got = (
            {il: term.row for il, term in edit.terms(m).items()} for edit in (a * 0.3, b * -0.2, both * both.strength)
        )
    assert sorted(got) == [1, 2, 3]
    for il in (1, 2, 3):
        expected = one.get(il, np.zeros(64)) + two.get(il, np.zeros(64))
        np.testing.assert_allclose(got[il], expected, rtol=1e-5, atol=1e-6)  # float32 file


def test_an_existing_file_is_overwritten_by_export_only_with_force(cli: Command, tiny_path: Path) -> None:
    samples.vector(norms=NORMS).save("v.gguf")
    Path("out.gguf").write_text("precious")
    arguments = ["export", "control-vector", "v.gguf:0.2", "-m", tiny_path, "-o", "out.gguf", "-t", 1]
    one_line(cli(*arguments), 2, "exists already")
    assert Path("out.gguf").read_text() == "precious"
    assert cli(*arguments, "--force")[0] == 0
    assert PersonaVector.load("out.gguf").strength == pytest.approx(0.2, abs=1e-7)


# ---- mistakes


def prepare(tiny_path: Path) -> None:
    """Files to fall over, in the working folder."""
    content = tiny_path.read_bytes()
    Path("cut.gguf").write_bytes(content[: len(content) // 2])
    Path("text.gguf").write_text("I am a model.\n")
    Path("empty.gguf").touch()
    Path("folder.gguf").mkdir()
    write_tiny_model("mute.gguf", tokenizer=False)
    samples.vector(norms=NORMS).save("v.gguf")
    samples.vector(n_embd=32, norms=NORMS).save("narrow.gguf")
    samples.vector(n_layer=5, norms=np.ones(5)).save("deep.gguf")
    row = np.ones(64, np.float32)
    samples.write_gguf(Path("nan.gguf"), {"direction.1": row * np.nan})
    samples.write_gguf(Path("zero.gguf"), {"direction.1": row * 0})
    samples.write_gguf(Path("late.gguf"), {"direction.4": row})
    Path("nothing.txt").write_text("\n  \n")
    Path("t.txt").write_text("A text.\n")
    Path("long.txt").write_text("word " * 600)
    Path("bad.jsonl").write_text('{"prompt": ')
    Path("deep.jsonl").write_text("\n" + "[" * 100_000)
    Path("name.toml").write_text(TRAIT.replace('"dry"', '"../dry"'))
    Path("empty.toml").write_text(TRAIT + '[[continuation]]\ntrait = " "\nanti = "Yes."\n')
    Path("number.jsonl").write_text("3\n")
    Path("strings.jsonl").write_text('{"messages": ["hi", "ho"]}\n')
    Path("numbers.jsonl").write_text('{"messages": [1, 2]}\n')
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    Path("dry.toml").write_text(TRAIT)
    Path("bad.toml").write_text("name = ")
    Path("file").write_text("a file, not a folder")


FAILED, USAGE = 1, 2
GENERATE = "generate -m TINY -t 1 -c 512 -n 4 -p hello"
DERIVE = "derive dry.toml -m TINY -t 1 -n 2 --no-filter --no-calibrate"
READ = "derive dry.toml -m TINY -t 1 -o o.gguf"
CAPTURE = "capture -m TINY -t 1 -f t.txt"
EXPORT = "export control-vector -m TINY -t 1 -o o.gguf"
MISTAKES: dict[str, tuple[str, int, str]] = {
    "a model that is missing": ("generate -m missing.gguf -p x", FAILED, "missing.gguf: no such file"),
    "a folder for a model": ("generate -m folder.gguf -p x", FAILED, "folder.gguf: is a folder"),
    "a model cut short": ("generate -m cut.gguf -p x", FAILED, "cut.gguf"),
    "a text for a model": ("generate -m text.gguf -p x", FAILED, "text.gguf: not a GGUF file"),
    "an empty model": ("generate -m empty.gguf -p x", FAILED, "empty.gguf: not a GGUF file"),
    "a model without a tokenizer": ("generate -m mute.gguf -p x", FAILED, "mute.gguf.*token"),
    "a vector for a model": ("generate -m v.gguf -p x", FAILED, "v.gguf"),
    "a vector that is missing": (f"{GENERATE} -v missing.gguf:0.2", FAILED, "missing.gguf: no such file"),
    "a folder for a vector": (f"{GENERATE} -v folder.gguf:0.2", FAILED, "folder.gguf: is a folder"),
    "a text for a vector": (f"{GENERATE} -v text.gguf:0.2", FAILED, "text.gguf: not a GGUF file"),
    "a model for a vector": (f"{GENERATE} -v TINY:0.2", FAILED, "llama.cpp would reject"),
    "a vector of another width": (f"{GENERATE} -v narrow.gguf:0.2", FAILED, "width 32.*width 64"),
    "a vector of another depth": (f"{GENERATE} -v deep.gguf:0.2", FAILED, "5 blocks.* 4 of"),
    "a foreign vector past the last block": (f"{GENERATE} -v late.gguf:0.2", FAILED, "5 blocks.* 4 of"),
    "a vector of another width to inspect": ("inspect narrow.gguf -m TINY", FAILED, "width 32"),
    "a vector with NaN": (f"{GENERATE} -v nan.gguf:0.2", FAILED, "not finite"),
    "a vector with NaN to inspect": ("inspect nan.gguf", FAILED, "not finite"),
    "a zero vector": (f"{GENERATE} -v zero.gguf:0.2", FAILED, "zero"),
    "a vector without a strength": (f"{GENERATE} -v v.gguf", USAGE, "strength is needed"),
    "a strength of no number": (f"{GENERATE} -v v.gguf:strong", USAGE, "strength is needed"),
    "a strength beyond all numbers": (f"{GENERATE} -v v.gguf:1e999", USAGE, "finite"),
    "a strength beyond float32": (f"{GENERATE} -v v.gguf:1e39", FAILED, "too large"),
    "an unknown scope": (f"{GENERATE} -v v.gguf:0.2 --scope answer", USAGE, "scope"),
    "an unknown trait": ("derive pesimistic -m TINY -o o.gguf", USAGE, "known: .*, pessimistic, "),
    "an unknown trait to show": ("traits pesimistic", USAGE, "known: .*, pessimistic, "),
    "a trait file that is missing": ("derive missing.toml -m TINY -o o.gguf", USAGE, "missing.toml"),
    "a trait file that is no TOML": ("derive bad.toml -m TINY -o o.gguf", USAGE, "bad.toml"),
    "a text file without text": ("capture -m TINY -f nothing.txt -o o.st", USAGE, "holds no text"),
    "a text file that is missing": ("capture -m TINY -f missing.txt -o o.st", USAGE, "missing.txt"),
    "a text file that is a folder": ("capture -m TINY -f folder.gguf -o o.st", USAGE, "folder.gguf"),
    "a text file in another encoding": ("capture -m TINY -f latin.txt -o o.st", USAGE, "not UTF-8"),
    "JSON cut short": ("capture -m TINY -f bad.jsonl -o o.st", USAGE, "line 1"),
    "JSON too deep": ("capture -m TINY -f deep.jsonl -o o.st", USAGE, "line 2"),
    "a context beyond all counts": ("generate -m TINY -p x -c 99999999999", USAGE, "-c"),
    "more layers on the GPU than a number holds": ("generate -m TINY -p x -ngl 99999999999", USAGE, "-ngl"),
    "a trait without a word for a name": ("derive name.toml -m TINY -o o.gguf", USAGE, "one word"),
    "an empty continuation": ("derive empty.toml -m TINY -o o.gguf", USAGE, "empty text"),
    "JSON of another kind": ("capture -m TINY -f number.jsonl -o o.st", USAGE, "line 1"),
    "messages that are strings": ("capture -m TINY -t 1 -f strings.jsonl -o o.st", USAGE, "role"),
    "messages that are numbers": ("capture -m TINY -t 1 -f numbers.jsonl -o o.st", USAGE, "role"),
    "an unknown pool": (f"{CAPTURE} -o o.st --pool median", USAGE, "mean, last, raw"),
    "the response of a plain text": (f"{CAPTURE} -o o.st --span response", USAGE, "no response"),
    "a prompt longer than the context": ("generate -m TINY -t 1 -c 8 -p hellohello", FAILED, "10|11|12"),
    "a text longer than the context": ("capture -m TINY -t 1 -c 64 -f long.txt -o o.st", FAILED, "64"),
    "a layer out of range": (f"{DERIVE} -o o.gguf --layers 4", USAGE, "layer 4 is out of range"),
    "a layer of no number": (f"{DERIVE} -o o.gguf --layers x", USAGE, "--layers|layers must look"),
    "a trait that the model does not show": (
        "derive dry.toml -m TINY -t 1 -n 2 -o o.gguf",
        FAILED,
        "does not steer|not be elicited",
    ),
    "given answers that are none": (f"{READ} --responses number.jsonl", USAGE, "number.jsonl, line 1"),
    "positive texts alone": (f"{DERIVE} -o o.gguf --positive t.txt", USAGE, "belong together"),
    "chat pairs that are none": ("derive number.jsonl -m TINY -t 1 -o o.gguf", USAGE, "number.jsonl, line 1"),
    "texts that are alike": ("derive n -m TINY -t 1 -o o.gguf --positive t.txt --negative t.txt", FAILED, "equal"),
    "an output in a missing folder": (f"{DERIVE} -o missing/o.gguf", USAGE, "missing/o.gguf"),
    "a folder for an output": (f"{DERIVE} -o folder.gguf", USAGE, "folder.gguf"),
    "a file for the output's folder": (f"{DERIVE} -o file/o.gguf", USAGE, "file/o.gguf"),
    "captured output in a missing folder": (f"{CAPTURE} -o missing/o.st", USAGE, "missing/o.st"),
    "exported output in a missing folder": (
        "export control-vector v.gguf:1 -m TINY -o missing/o.gguf",
        USAGE,
        "missing",
    ),
    "an unknown kind of export": (
        "export loar v.gguf:1 -m TINY -o o.gguf",
        USAGE,
        "known: control-vector, projection, lora, bake",
    ),
    "an export of strength 0": (f"{EXPORT} v.gguf:0", USAGE, "strength of 0"),
    "an export of nothing": (f"{EXPORT} v.gguf:0.2 v.gguf:-0.2", USAGE, "cancel"),
    "an unknown verb": ("sing", USAGE, "sing"),
    "an unknown option": ("traits --loud", USAGE, "--loud"),
    "an option without its value": ("generate -m TINY -p", USAGE, "-p"),
    "a missing argument": ("derive -m TINY -o o.gguf", USAGE, "trait"),
    "a number that is none": ("generate -m TINY -p x -n many", USAGE, "-n.*integer"),
    "a number out of range": ("generate -m TINY -p x -n 0", USAGE, "-n.*1"),
    "a negative temperature": ("generate -m TINY -p x --temp -1", USAGE, "--temp.*0"),
    "a temperature that is no number": ("generate -m TINY -t 1 -p x --temp nan", USAGE, "--temp"),
    "an unknown benchmark": ("bench speed -m TINY", USAGE, "overhead"),
    "a dialogue as JSON": ("chat -m TINY --json", USAGE, "-p"),
}


@pytest.mark.parametrize("how", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_file(cli: Command, tiny_path: Path, how: str) -> None:
    prepare(tiny_path)
    before = sorted(p.name for p in Path().iterdir())
    line, code, pattern = MISTAKES[how]
    one_line(cli(*line.replace("TINY", str(tiny_path)).split()), code, pattern)
    assert sorted(p.name for p in Path().iterdir()) == before


def test_an_empty_prompt_is_one_line(cli: Command, smollm2_path: Path) -> None:
    # SmolLM2 has no start token: an empty text has no token at all
    one_line(cli("generate", "-m", smollm2_path, "-p", "", "-c", 64), 1, "empty")


@pytest.mark.parametrize(
    "line", [f"{DERIVE} -o pipe", "capture -m TINY -t 1 -f t.txt -o pipe",
             "export control-vector v.gguf:0.2 -m TINY -t 1 -o pipe --force"]
)  # fmt: skip
def test_a_pipe_or_device_as_output_is_refused_and_stays_what_it_is(cli: Command, tiny_path: Path, line: str) -> None:
    # as root, `-o /dev/full` would replace the device by a file
    prepare(tiny_path)
    os.mkfifo("pipe")
    one_line(cli(*line.replace("TINY", str(tiny_path)).split()), 2, "pipe")
    assert Path("pipe").is_fifo()


def test_a_full_disk_is_one_line_and_the_old_file_stays(
    cli: Command, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tiny_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    Path("o").write_text("old")
    for line in (f"{DERIVE} -o o", f"{CAPTURE} -o o", "export control-vector v.gguf:1 -m TINY -o o -t 1 --force"):
        code, _, err = cli(*line.replace("TINY", str(tiny_path)).split())
        assert code in (1, 2)
        assert err.count("\n") == 1, err
        assert "No space left" in err
        assert Path("o").read_text() == "old"
    assert not [p for p in Path().iterdir() if p.name.startswith(".")]


def test_an_error_with_debug_shows_its_traceback() -> None:
    code = "from personasteer.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "--debug", "traits", "nope"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "TraitError" in done.stderr


def test_ctrl_c_while_the_command_line_is_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")  # what the first import of the command line meets
    root = Path(personasteer.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    command = [sys.executable, "-P", "-m", "personasteer", "traits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr, done.stdout) == (1, "personasteer: interrupted\n", "")


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    code = "from personasteer.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, "traits", "pirate"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        process.wait(60)
    assert err == b""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc to see the model loaded")
def test_ctrl_c_during_derive_is_one_line_and_leaves_nothing(smollm2_path: Path, tmp_path: Path) -> None:
    # a shell that starts the tests in the background lets its children ignore Ctrl-C
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [sys.executable, "-P", "-c", code + "from personasteer.cli import main; main()", "derive", "pessimistic",
               "-m", str(smollm2_path), "-o", str(tmp_path / "o.gguf"), "-t", "1"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while smollm2_path.name not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        out, err = process.communicate(timeout=30)
    assert time.monotonic() - start < 5
    assert process.returncode == 1
    assert out == ""
    assert [line for line in err.splitlines() if line] == ["personasteer: interrupted"]
    assert samples.no_leftovers(tmp_path)


# ---- edits, grammars and adapters of chat and generate


def saved_vector(path: Path, threshold: float = 0.0) -> Path:
    v = samples.vector(
        layers=(1, 2), norms=NORMS, thresholds=np.full(4, threshold, np.float32), means=np.zeros(4, np.float32)
    )
    v.save(path)
    return path


@pytest.mark.parametrize("option", ["--cap", "--floor", "--ablate"])
def test_caps_floors_and_ablations_act_and_say_when_they_cannot(
    cli: Command, tiny_path: Path, tmp_path: Path, option: str
) -> None:
    file = saved_vector(tmp_path / "v.gguf", threshold={"--cap": -9.0, "--floor": 9.0}.get(option, 0.0))
    verb = ["generate", "-m", tiny_path, "-p", "the cat sat", "-n", 12, "--temp", 0, "--json"]
    plain = result(cli(*verb))
    edited = result(cli(*verb, option, file))
    assert edited["text"] != plain["text"]
    assert edited["rho"] == plain["rho"] == 0.0  # nothing is added
    assert {"prompt", "text", "finish", "n_prompt", "n_tokens", "rho"} == set(edited)
    bare = tmp_path / "bare.gguf"
    samples.vector(layers=(1, 2), norms=NORMS).save(bare)
    code, _, err = cli(*verb, option, bare)
    if option == "--ablate":
        assert code == 0
    else:
        assert (code, "stores no thresholds" in err) == (1, True)


def test_a_share_of_an_ablation_is_split_off_and_checked(cli: Command, tiny_path: Path, tmp_path: Path) -> None:
    file = saved_vector(tmp_path / "v.gguf")
    verb = ["generate", "-m", tiny_path, "-p", "the cat sat", "-n", 12, "--temp", 0, "--json"]
    assert result(cli(*verb, "--ablate", f"{file}:0"))["text"] == result(cli(*verb))["text"]
    code, _, err = cli(*verb, "--ablate", f"{file}:1.5")
    assert (code, err.strip()) == (2, "personasteer: share must be between 0 and 1, not 1.5")


def test_a_role_scope_acts_in_chat_and_is_refused_for_plain_text(cli: Command, tiny_path: Path, tmp_path: Path) -> None:
    file = saved_vector(tmp_path / "v.gguf")
    tail = ["-m", tiny_path, "-p", "the cat sat", "-n", 12, "--temp", 0, "--json", "-v", f"{file}:0.9"]
    user, everything = (result(cli("chat", *tail, "--scope", scope))["text"] for scope in ("user", "all"))
    plain = result(cli("chat", *tail[:-2]))["text"]
    assert len({user, everything, plain}) == 3
    code, _, err = cli("generate", *tail, "--scope", "user")
    assert (code, "a plain text has no roles" in err) == (2, True)
    code, _, err = cli("chat", *tail, "--scope", "thinking")
    assert (code, "no thinking block" in err) == (1, True)


def test_an_answer_follows_a_grammar_or_a_schema_and_ends_before_a_stop_text(
    cli: Command, tiny_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "g.gbnf").write_text('root ::= "yes" | "no"')
    (tmp_path / "s.json").write_text('{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}')
    verb = ["generate", "-m", tiny_path, "-p", "the cat", "-n", 60, "--json"]
    answer = result(cli(*verb, "--grammar-file", "g.gbnf"))
    assert answer["text"] in ("yes", "no")
    assert answer["finish"] == "stop"
    assert json.loads(result(cli(*verb, "--json-schema-file", "s.json"))["text"])["a"] in (1, 2)
    (tmp_path / "g.gbnf").write_text('root ::= "one two three"')
    stopped = result(cli(*verb, "--grammar-file", "g.gbnf", "--stop", "three", "--stop", "two"))
    assert (stopped["text"], stopped["finish"]) == ("one ", "stop")


@pytest.mark.parametrize(
    ("content", "option", "message"),
    [
        ("root ::= [", "--grammar-file", "the grammar does not parse"),
        ("[1, 2]", "--json-schema-file", "json_schema cannot be used"),
        ("{", "--json-schema-file", "json_schema cannot be used"),
        (None, "--grammar-file", "cannot be read"),
        ("no adapter", "--lora", "not a GGUF file"),
    ],
)
def test_a_broken_grammar_schema_or_adapter_is_one_line(
    cli: Command, tiny_path: Path, tmp_path: Path, content: str | None, option: str, message: str
) -> None:
    if content is not None:
        (tmp_path / "file").write_text(content)
    code, out, err = cli("generate", "-m", tiny_path, "-p", "the cat", option, tmp_path / "file")
    assert code in (1, 2)
    assert (out, len(err.strip().splitlines())) == ("", 1)
    assert message in err
