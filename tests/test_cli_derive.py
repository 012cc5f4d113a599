"""The verbs that derive, calibrate, evaluate and draw: what they print and write, and one line for every mistake."""

from __future__ import annotations

import importlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import planted
import pytest
import samples
import typer
from test_cli import Command, one_line, result
from test_endpoint import Server, says

from personasteer import PersonaVector, endpoint
from personasteer.cli import run as run_command
from personasteer.derive import write
from personasteer.tiny_model import write_tiny_model
from personasteer.traits.formats import as_toml

NORMS = np.array([5.0, 8.0, 11.0, 13.0], np.float32)
PNG = b"\x89PNG\r\n\x1a\n"
PAIRS = [
    {"prompt": "Who calls?", "positive": "ace age", "negative": "bdf hjb"},
    {"prompt": "And now?", "positive": "cage ice", "negative": "fhjb dbf"},
    {"prompt": "Why?", "positive": "egg aie", "negative": "bjh fdd"},
    {"prompt": "How?", "positive": "gag aga", "negative": "hdh jbb"},
]
QUICK_EVAL = ["-c", 1024, "--questions", 2, "--pairs", 1, "--random", 2, "--items", 2, "--answers", 1]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs a command line in this process, in a folder with files to work on: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return command


@pytest.fixture
def files(tmp_path: Path, tiny_path: Path) -> Path:
    """A trait, a vector that must work, answers and contrasting texts."""
    (tmp_path / "letters.toml").write_text(as_toml(planted.LETTERS))
    planted.letter_vector(tiny_path, norms=NORMS).save(tmp_path / "letters.gguf")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    answers = [
        {"question": p["prompt"], "answer": p[side], "positive": side == "positive"}
        for p in PAIRS
        for side in ("positive", "negative")
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    for side in ("positive", "negative"):
        (tmp_path / f"{side}.txt").write_text("".join(f"{p['prompt']}\\n{p[side]}\n" for p in PAIRS))
    return tmp_path


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


# ---- eval


def test_eval_prints_the_promised_json_of_one_vector(cli: Command, files: Path, tiny_path: Path) -> None:
    data = result(cli("eval", "letters.gguf:0.2", "-m", tiny_path, "-t", 1, *QUICK_EVAL, "--json"))
    assert [d["strength"] for d in data["dose"]] == pytest.approx([-0.2, -0.4 / 3, -0.2 / 3, 0, 0.2 / 3, 0.4 / 3, 0.2])
    assert {"strength", "log_odds", "ci_low", "ci_high", "coherence"} <= set(data["dose"][0])
    assert {"random_p95", "shuffled", "unrelated", "system_prompt"} <= set(data["controls"])
    assert {"base", "steered"} <= set(data["capability"])
    assert data["spearman"] == pytest.approx(1.0)
    assert data["kl_neutral"] > 0
    assert data["sizes"]["questions"] == 2
    assert data["controls"]["n_random"] == 2
    assert sorted(p.name for p in files.iterdir() if p.is_dir()) == []


def test_eval_and_calibrate_work_on_a_base_model(cli: Command, files: Path) -> None:
    write_tiny_model("plain.gguf", chat_template=None)
    data = result(cli("eval", "letters.gguf", "-m", "plain.gguf", "-t", 1, *QUICK_EVAL, "--json"))
    assert data["controls"]["system_prompt"] is None  # nothing to put it in
    assert data["dose"][-1]["delta"] > 0 > data["dose"][0]["delta"]
    found = result(cli("calibrate", "letters.gguf", "-m", "plain.gguf", "-t", 1, "-c", 1024, "--keep-layers", "--json"))
    assert found["layers"] == data["layers"]


def test_eval_in_words_says_doses_controls_and_the_verdict(cli: Command, files: Path, tiny_path: Path) -> None:
    code, out, err = cli("eval", "letters.gguf", "-m", tiny_path, "-t", 1, *QUICK_EVAL, "--report", "evidence")
    assert (code, err) == (0, "")
    wanted = ["“letters” on tiny-random, blocks 3", "strength ρ", "-0.30", "+0.30", "2 random vectors stay within ±",
              "the vector of 'pirate'", "system prompt alone", "multiple choice, 2 items", "free answers with a word",
              "Spearman of strength and log-odds 1.00; "]  # fmt: skip
    assert [words for words in wanted if words not in out] == []
    assert re.search("; (passes|does not pass: not [a-z, ]+)\n", out)
    assert "report: evidence/report.html" in out
    written = {p.name for p in Path("evidence").iterdir()}
    assert written == {"report.html", "report.md", "report.json", "dose-letters.png", "layers-letters.png"}
    assert json.loads(Path("evidence/report.json").read_text("utf-8"))["vector"] == "letters"


def test_eval_of_several_vectors_has_their_cross_talk(cli: Command, files: Path, tiny_path: Path) -> None:
    samples.vector(name="pirate", norms=NORMS).save("pirate.gguf")
    got = cli("eval", "letters.gguf", "pirate.gguf:0.1", "-m", tiny_path, "-t", 1, *QUICK_EVAL, "--json",
              "--report", "both")  # fmt: skip
    data = result(got)
    assert [v["trait"] for v in data["vectors"]] == ["letters", "pirate"]
    assert data["vectors"][1]["strength"] == 0.1
    assert data["cross_talk"]["traits"] == ["letters", "pirate"]
    assert np.shape(data["cross_talk"]["delta"]) == (2, 2)
    assert data == json.loads(Path("both/report.json").read_text("utf-8"))
    assert Path("both/cross-talk.png").read_bytes().startswith(PNG)


def test_eval_on_another_trait_than_the_vectors_own(cli: Command, files: Path, tiny_path: Path) -> None:
    samples.vector(norms=NORMS).save("nameless.gguf")
    common = ["-m", tiny_path, "-t", 1, *QUICK_EVAL]
    one_line(cli("eval", "nameless.gguf", *common), 2, "does not carry.*--trait")
    data = result(cli("eval", "nameless.gguf", "letters.gguf", *common, "--trait", "letters.toml", "--json"))
    assert [v["trait"] for v in data["vectors"]] == ["letters", "letters"]
    one_line(
        cli("eval", "nameless.gguf", *common, "--trait", "pirate", "--trait", "formal"), 2, "1 vectors and 2 traits"
    )


# ---- calibrate and inspect


def test_calibrate_finds_blocks_and_strengths_and_writes_them(cli: Command, files: Path, tiny_path: Path) -> None:
    before = Path("letters.gguf").read_bytes()
    common = ["calibrate", "letters.gguf", "-m", tiny_path, "-t", 1, "-c", 1024]
    data = result(cli(*common, "-o", "new.gguf", "--json"))
    assert Path("letters.gguf").read_bytes() == before
    vector = PersonaVector.load("new.gguf")
    assert data["vector"] == "new.gguf"
    assert data["layers"] == list(vector.layers)
    assert set(data["layers"]) <= {row["layer"] for row in data["sweep"]["blocks"]}
    assert data["strength"] == pytest.approx(vector.strength)
    assert data["window"] == pytest.approx(vector.window)
    assert vector.window[0] <= -vector.strength < vector.strength <= vector.window[1]
    assert [row["strength"] for row in data["doses"]] == [0.15, 0.3, 0.45, 0.6, -0.15, -0.3, -0.45, -0.6]
    assert vector.norms is not None
    assert not np.allclose(vector.norms, NORMS)  # this model's, not what the file said


def test_calibrate_may_keep_the_blocks_and_write_into_the_file_itself(
    cli: Command, files: Path, tiny_path: Path
) -> None:
    common = ["calibrate", "letters.gguf", "-m", tiny_path, "-t", 1, "-c", 1024, "--keep-layers"]
    one_line(cli(*common, "--responses", "missing.jsonl"), 2, "missing.jsonl: cannot be read")
    code, out, err = cli(*common)
    assert (code, err) == (0, "")
    assert "blocks 3," in out
    assert "Each block alone" not in out
    assert PersonaVector.load("letters.gguf").layers == (3,)


def test_inspect_draws_the_layers_of_any_vector(cli: Command, files: Path) -> None:
    samples.write_gguf(Path("foreign.gguf"), {"direction.1": np.ones(64, np.float32)})
    for name in ("letters.gguf", "foreign.gguf"):
        assert cli("inspect", name, "--plot", "layers.png")[0] == 0
        assert Path("layers.png").read_bytes().startswith(PNG)
        Path("layers.png").unlink()
    one_line(cli("inspect", "letters.gguf", "--plot", "missing/layers.png"), 2, "missing/layers.png: cannot write")
    one_line(cli("inspect", "missing.gguf", "--plot", "layers.png"), 1, "missing.gguf: no such file")
    assert not Path("layers.png").exists()


# ---- derive


def test_derive_from_contrasting_chats_is_named_after_the_file(cli: Command, files: Path, tiny_path: Path) -> None:
    data = result(cli("derive", "pairs.jsonl", "-m", tiny_path, "-t", 1, "-o", "v.gguf", "--layers", 2, "--json"))
    assert data["trait"] == "pairs"
    assert (data["n_positive"], data["n_negative"]) == (4, 4)
    assert data["layers"] == [2]
    assert data["elicitation"] is None
    vector = PersonaVector.load("v.gguf")
    assert vector.name == "pairs"
    assert vector.provenance["pool"] == "mean"


def test_derive_from_plain_files_takes_their_lines(cli: Command, files: Path, tiny_path: Path) -> None:
    common = ["derive", "mine", "-m", tiny_path, "-t", 1, "-o", "v.gguf"]
    given = ["--positive", "positive.txt", "--negative", "negative.txt"]
    code, out, err = cli(*common, *given, "--method", "pca")
    assert (code, err) == (0, "")
    assert "v.gguf: mine, blocks" in out
    assert "from 4 + 4 texts" in out
    vector = PersonaVector.load("v.gguf")
    assert vector.provenance["pool"] == "last"
    assert vector.provenance["method"] == "pca"
    for only in (given[:2], given[2:]):
        one_line(cli(*common, *only), 2, "--positive and --negative belong together")


@pytest.mark.parametrize("option", ["--responses", "--save-responses", "--judge", "--work", "--describe"])
def test_an_option_about_answers_is_not_ignored_with_given_texts(
    cli: Command, files: Path, tiny_path: Path, option: str
) -> None:
    before = sorted(p.name for p in files.iterdir())
    got = cli("derive", "pairs.jsonl", "-m", tiny_path, "-o", "v.gguf", option, "x")
    one_line(got, 2, f"{option} goes with a trait")
    assert sorted(p.name for p in files.iterdir()) == before


@pytest.mark.parametrize("option", [["--writer", "x"], ["--save-trait", "x.toml"], ["--yes"]])
def test_an_option_about_writing_goes_with_describe(
    cli: Command, files: Path, tiny_path: Path, option: list[str]
) -> None:
    got = cli("derive", "letters.toml", "-m", tiny_path, "-o", "v.gguf", *option)
    one_line(got, 2, f"{option[0]} goes with --describe")


def test_derive_reads_given_answers_and_writes_down_those_that_count(
    cli: Command, files: Path, tiny_path: Path
) -> None:
    common = ["derive", "letters.toml", "-m", tiny_path, "-t", 1, "-o", "v.gguf", "--no-filter", "--no-calibrate"]
    data = result(cli(*common, "--responses", "answers.jsonl", "--save-responses", "kept.jsonl", "--json"))
    assert data["elicitation"] == {
        "rate": 1.0, "n": 4, "kept": 4, "dropped": {}, "lexicon": {}, "scores": {}, "t": None,
    }  # fmt: skip
    kept = [json.loads(line) for line in Path("kept.jsonl").read_text("utf-8").splitlines()]
    assert sorted((k["question"], k["answer"], k["positive"]) for k in kept) == sorted(
        (p["prompt"], p[side], side == "positive") for p in PAIRS for side in ("positive", "negative")
    )
    once = PersonaVector.load("v.gguf").directions
    result(cli(*common, "--responses", "kept.jsonl", "--json"))
    np.testing.assert_allclose(PersonaVector.load("v.gguf").directions, once, atol=1e-4)  # in another order


def test_derive_samples_answers_and_goes_on_from_its_work(
    cli: Command, files: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["derive", "letters.toml", "-m", tiny_path, "-t", 1, "-n", 3, "--no-filter", "--no-calibrate",
              "--questions", 2]  # fmt: skip
    code, out, err = cli(*common, "-o", "a.gguf", "--work", "parts")
    assert (code, err) == (0, "")
    assert "elicitation rate 1.00: 4 of 4 contrasts kept; dropped: none" in out
    assert len(list(Path("parts").glob("*.safetensors"))) == 2
    monkeypatch.setattr("personasteer.engine.run", None)  # nothing is left to compute
    assert cli(*common, "-o", "b.gguf", "--work", "parts")[0] == 0
    assert Path("a.gguf").read_bytes() == Path("b.gguf").read_bytes()
    one_line(cli(*common, "-o", "c.gguf", "--work", "parts", "--seed", 1), 2, r"other work.*seed")
    assert not Path("c.gguf").exists()


def test_the_last_prompt_token_may_give_the_direction(cli: Command, files: Path, tiny_path: Path) -> None:
    common = ["derive", "letters.toml", "-m", tiny_path, "-t", 1, "-n", 2, "--no-filter", "--no-calibrate",
              "--questions", 2, "-o"]  # fmt: skip
    assert cli(*common, "v.gguf", "--position", "last-prompt")[0] == 0
    assert cli(*common, "w.gguf", "--exclude-massive")[0] == 0
    last, other = (PersonaVector.load(name) for name in ("v.gguf", "w.gguf"))
    np.testing.assert_array_equal(last.directions, other.last_prompt)
    assert not np.allclose(last.directions, other.directions)


def test_refused_answers_are_one_line_that_shows_one_and_no_file(cli: Command, files: Path, tiny_path: Path) -> None:
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text("utf-8").splitlines()]
    refused = [{**a, "answer": "I cannot help with that."} if a["positive"] else a for a in answers]
    Path("refused.jsonl").write_text("".join(json.dumps(a) + "\n" for a in refused))
    got = cli("derive", "letters.toml", "-m", tiny_path, "-t", 1, "-o", "v.gguf", "--responses", "refused.jsonl",
              "--save-responses", "r.jsonl")  # fmt: skip
    words = [
        r"of 4 contrasts 0 count \(4 positive refusal\)",
        "I cannot help with that",
        "the model refuses to enact it",
    ]
    one_line(got, 1, ".*".join(words))
    assert not Path("v.gguf").exists()
    assert not Path("r.jsonl").exists()


def test_a_served_judge_is_tested_and_then_asked(cli: Command, files: Path, tiny_path: Path, server: Server) -> None:
    server.answers = [says({"choices": [{"message": {"role": "assistant", "content": "80"}}]})]
    common = ["derive", "letters.toml", "-m", tiny_path, "-t", 1, "-n", 3, "--questions", 1, "-o", "v.gguf",
              "--no-calibrate", "--judge", server.url, "--judge-model", "wise"]  # fmt: skip
    code, _, err = cli(*common)
    tested, refused = err.splitlines()
    assert re.fullmatch(r"the judge on \d+ labelled answers: .* not scored", tested)
    assert code == 1
    assert re.search(r"of 2 contrasts 0 count \(2 negative off-trait\)", refused)  # what shows the trait everywhere
    assert {asked["body"]["model"] for asked in server.asked} == {"wise"}
    asked = len(server.asked)
    one_line(cli(*common, "--no-filter"), 2, "--judge scores answers for the filter")
    assert len(server.asked) == asked


def test_a_judge_that_cannot_be_had_is_one_line(
    cli: Command, files: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    common = ["derive", "letters.toml", "-m", tiny_path, "-t", 1, "-n", 2, "-o", "v.gguf", "--judge"]
    one_line(cli(*common, f"http://127.0.0.1:{port}/v1"), 1, f"127.0.0.1:{port}/v1: no connection")
    one_line(cli(*common, "missing.gguf"), 1, "missing.gguf: no such file")
    one_line(cli(*common, "letters.gguf"), 1, "letters.gguf")
    assert not Path("v.gguf").exists()


def test_a_written_trait_is_shown_and_kept_before_it_is_used(
    cli: Command, files: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "write_trait", lambda name, description, *_, **__: planted.LETTERS)
    common = ["derive", "letters", "--describe", "Likes some letters.", "-m", tiny_path, "-t", 1, "-n", 2, "-o",
              "v.gguf", "--no-filter", "--no-calibrate", "--questions", 1, "--save-trait", "new.toml"]  # fmt: skip
    monkeypatch.setattr(typer, "confirm", lambda *_, **__: False)
    code, out, err = cli(*common)
    assert (code, out) == (1, "")
    assert err.endswith("not derived; the trait is kept in new.toml\n")
    assert "Use a, c and e." in err
    assert not Path("v.gguf").exists()
    assert Path("new.toml").read_text("utf-8") == as_toml(planted.LETTERS)
    code, out, err = cli(*common, "--yes")
    assert (code, out.startswith("v.gguf: letters")) == (0, True)


def test_a_model_that_cannot_write_a_trait_is_one_line(
    cli: Command, files: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("personasteer.derive.write"), "N_ROUNDS", 1)
    common = ["derive", "stubborn", "-m", tiny_path, "-t", 1, "-c", 2048, "-o", "v.gguf", "--yes"]
    one_line(cli(*common, "--describe", "Never gives in.", "--save-trait", "new.toml"), 2, "stubborn")
    one_line(cli(*common, "--describe", "  "), 2, "description is empty")
    assert not Path("new.toml").exists()
    assert not Path("v.gguf").exists()


# ---- mistakes


def prepare(folder: Path) -> None:
    """Files to fall over."""
    samples.vector(norms=NORMS, name="pirate").save("v.gguf")
    samples.vector(norms=NORMS, name="pirate", n_embd=32).save("narrow.gguf")
    bare = planted.LETTERS.as_dict()
    samples.vector(norms=NORMS, provenance={"texts": {**bare, "system": [["alone"]]}}).save("damaged.gguf")
    samples.vector(norms=NORMS, provenance={"texts": {**bare, "evaluate_questions": []}}).save("unasked.gguf")
    write_tiny_model("plain.gguf", chat_template=None)
    foreign = gguf.GGUFWriter("foreign.gguf", "controlvector")
    foreign.add_tensor("direction.1", np.ones(64, np.float32))
    foreign.write_header_to_file()
    foreign.write_kv_data_to_file()
    foreign.write_tensors_to_file()
    foreign.close()
    Path("text.gguf").write_text("I am a model.\n")
    Path("file").write_text("a file, not a folder")
    Path("empty.jsonl").write_text("\n")
    Path("bad.jsonl").write_text('{"question": ')
    Path("one-sided.jsonl").write_text('{"question": "Why?", "answer": "So.", "positive": true}\n')
    Path("number.jsonl").write_text('{"question": "Why?", "answer": 7, "positive": true}\n')
    Path("half.jsonl").write_text('{"prompt": "Why?", "positive": "So."}\n')
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    Path("nothing.txt").write_text("\n\n")
    Path("bad.json").write_text("[1]")
    (folder / "taken" / "report.html").mkdir(parents=True)
    (folder / "taken" / "report.md").mkdir()


FAILED, USAGE = 1, 2
EVAL = "eval v.gguf -m TINY -t 1 -c 1024"
DERIVE = "derive letters.toml -m TINY -t 1 -n 2 -o o.gguf"
READ = "derive letters.toml -m TINY -t 1 -o o.gguf"
CALIBRATE = "calibrate v.gguf -m TINY -t 1 -c 1024"
MISTAKES: dict[str, tuple[str, int, str]] = {
    "a vector to evaluate that is missing": ("eval missing.gguf -m TINY", FAILED, "missing.gguf: no such file"),
    "no vector to evaluate": ("eval -m TINY", USAGE, "FILE"),
    "a text to evaluate": ("eval text.gguf -m TINY", FAILED, "text.gguf: not a GGUF file"),
    "a model to evaluate on that is missing": ("eval v.gguf -m missing.gguf --report new", FAILED, "missing.gguf: no"),
    "a vector of another model": ("eval narrow.gguf -m TINY -t 1 --report new", FAILED, "width 32.*width 64"),
    "an unknown trait": (f"{EVAL} --trait pirat", USAGE, "unknown trait 'pirat'"),
    "a damaged trait in a vector": ("eval damaged.gguf -m TINY -t 1", USAGE, "pairs"),
    "a trait without held-out questions": ("eval unasked.gguf -m TINY -t 1", USAGE, "no held-out questions"),
    "a strength of 0": ("eval v.gguf:0 -m TINY -t 1 --report new", USAGE, "strength must be finite and not 0"),
    "one question only": (f"{EVAL} --questions 1", USAGE, "--questions"),
    "no random vector": (f"{EVAL} --random 0", USAGE, "--random"),
    "more items than there are": (f"{EVAL} --items 81", USAGE, "--items"),
    "a file for the report's folder": (f"{EVAL} --report file", USAGE, "file: cannot write here, it is a file"),
    "a report under a file": (f"{EVAL} --report file/deep/er", USAGE, "file/deep/er|cannot write here"),
    "a report where nobody may write": (f"{EVAL} --report /proc/self/report", USAGE, "cannot write here"),
    "a folder for the report": (f"{EVAL} --report taken", USAGE, "report.md: cannot write here, it is a folder"),
    "a context too short to evaluate in": ("eval v.gguf -m TINY -t 1 -c 16", FAILED, "16"),
    "a vector to calibrate that is missing": ("calibrate missing.gguf -m TINY", FAILED, "missing.gguf: no such file"),
    "a vector of another model to calibrate": ("calibrate narrow.gguf -m TINY -t 1 -o o.gguf", FAILED, "width 32"),
    "an unknown trait to calibrate by": (f"{CALIBRATE} --trait pirat", USAGE, "unknown trait"),
    "no answers to calibrate by": (f"{CALIBRATE} --responses empty.jsonl", USAGE, "holds no answer"),
    "another tool's file to calibrate in place": ("calibrate foreign.gguf -m TINY", USAGE, "another tool's file.*-o"),
    "calibrated output in a missing folder": (f"{CALIBRATE} -o missing/o.gguf", USAGE, "missing/o.gguf"),
    "an unknown method": (f"{DERIVE} --method magic", USAGE, "mean, pca, probe, not 'magic'"),
    "an unknown method for given texts": ("derive pairs.jsonl -m TINY -o o.gguf --method magic", USAGE, "not 'magic'"),
    "an unknown position": (f"{DERIVE} --position first", USAGE, "response or last-prompt, not 'first'"),
    "an unknown form": (f"{DERIVE} --form triangle", USAGE, "form must be"),
    "nothing left of an answer": (f"{DERIVE} --skip-tokens 2", USAGE, "skip_tokens 2 leaves nothing"),
    "a length of given answers": (f"{DERIVE} --responses answers.jsonl", USAGE, "--predict goes with sampled"),
    "a length of continuations": (f"{DERIVE} --continuations", USAGE, "--predict goes with sampled"),
    "continuations and answers": (f"{READ} --continuations --responses answers.jsonl", USAGE, "--continuations goes"),
    "the prompts of continuations": (f"{READ} --continuations --position last-prompt", USAGE, "same for either side"),
    "a name for a judge without one": (f"{DERIVE} --judge-model wise", USAGE, "--judge-model goes with a URL"),
    "questions for given texts": ("derive pairs.jsonl -m TINY -o o.gguf --questions 3", USAGE, "--questions goes with"),
    "a position in given texts": ("derive pairs.jsonl -m TINY -o o.gguf --position response", USAGE, "--position goes"),
    "answers that are missing": (f"{READ} --responses missing.jsonl", USAGE, "missing.jsonl: cannot be read"),
    "no answers": (f"{READ} --responses empty.jsonl", USAGE, "empty.jsonl: holds no answer"),
    "answers cut short": (f"{READ} --responses bad.jsonl", USAGE, "bad.jsonl, line 1"),
    "an answer that is no text": (f"{READ} --responses number.jsonl", USAGE, "number.jsonl, line 1.*texts"),
    "answers of one side": (f"{READ} --responses one-sided.jsonl", USAGE, "no question has an answer on either side"),
    "a pair with one side": ("derive half.jsonl -m TINY -o o.gguf", USAGE, "line 1: the key 'negative' is missing"),
    "no pairs": ("derive empty.jsonl -m TINY -o o.gguf", USAGE, "empty.jsonl: holds no pair"),
    "pairs that are missing": ("derive missing.jsonl -m TINY -o o.gguf", USAGE, "missing.jsonl: cannot be read"),
    "texts that are missing": (
        "derive x -m TINY -o o.gguf --positive missing.txt --negative negative.txt",
        USAGE,
        "missing.txt: cannot be read",
    ),
    "texts in another encoding": (
        "derive x -m TINY -o o.gguf --positive latin.txt --negative negative.txt",
        USAGE,
        "latin.txt: cannot be read",
    ),
    "no texts": (
        "derive x -m TINY -o o.gguf --positive nothing.txt --negative negative.txt",
        USAGE,
        "nothing.txt: holds no text",
    ),
    "JSON that is no trait": ("derive bad.json -m TINY -o o.gguf", USAGE, "bad.json: a JSON object is needed"),
    "a file for the folder of work": (f"{DERIVE} --work file", USAGE, "file: cannot work here"),
    "saved answers in a missing folder": (f"{DERIVE} --save-responses missing/r.jsonl", USAGE, "missing/r.jsonl"),
    "a judge at no address": (f"{DERIVE} --judge http://", USAGE, "url must begin with"),
    "a model without a template": ("derive letters.toml -m plain.gguf -t 1 -o o.gguf", FAILED, "no chat template"),
    "a layer that the model lacks": (f"{DERIVE} --layers 9", USAGE, "layer 9 is out of range"),
    "a figure in a missing folder": ("inspect v.gguf --plot missing/p.png", USAGE, "missing/p.png"),
}  # fmt: skip


@pytest.mark.parametrize("how", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(cli: Command, files: Path, tiny_path: Path, how: str) -> None:
    prepare(files)
    before = {p: p.read_bytes() if p.is_file() else None for p in files.rglob("*")}
    line, code, pattern = MISTAKES[how]
    one_line(cli(*line.replace("TINY", str(tiny_path)).split()), code, pattern)
    assert {p: p.read_bytes() if p.is_file() else None for p in files.rglob("*")} == before


def test_traits_lists_the_whole_library_and_shows_one_whole(cli: Command, files: Path) -> None:
    listed: list[dict[str, Any]] = result(cli("traits", "--json"))
    assert len(listed) >= 30
    shown = result(cli("traits", "letters.toml", "--json"))
    assert shown["continuations"] == [list(pair) for pair in planted.LETTERS.continuations]
