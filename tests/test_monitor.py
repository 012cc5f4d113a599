"""Thresholds on readings: what counts as ordinary, states, whole conversations, files of thresholds."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted_model
import pytest
import samples
from test_chat import CHATML

import personasteer as ps
from personasteer import monitor, traits
from personasteer.cli import run
from personasteer.monitor.thresholds import last_states
from personasteer.ship.fields import Field
from personasteer.ship.rewrite import ModelFile, rewrite
from personasteer.statistics import auroc
from personasteer.tiny_model import write_tiny_model

pytestmark = pytest.mark.usefixtures("short_conversations")

BLOCK = 3
SYSTEM = planted_model.planted_trait().system[0][0]  # asks for the trait


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_model.write_planted_model(tmp_path_factory.mktemp("planted") / "m.gguf", BLOCK)[0]


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[ps.Model]:
    with ps.Model(path, n_ctx=1024, n_parallel=4) as m:
        yield m


@pytest.fixture(scope="module")
def vector(model: ps.Model) -> ps.PersonaVector:
    return ps.derive(model, planted_model.planted_trait(), max_tokens=16, seed=0)


FEW = [q for q, _ in monitor.clean_prompts()][:60]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Thresholds from few prompts, kept in a place of their own."""
    monkeypatch.setenv("PERSONASTEER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("personasteer.monitor.everyday.clean_prompts", lambda: tuple((q, "") for q in FEW))


@pytest.fixture(scope="module")
def threshold(model: ps.Model, vector: ps.PersonaVector) -> monitor.Threshold:
    (found,) = monitor.calibrate(model, [vector])
    return found


def test_a_threshold_tells_prompts_of_the_trait_from_ordinary_ones(
    model: ps.Model, vector: ps.PersonaVector, threshold: monitor.Threshold
) -> None:
    assert np.linalg.norm(threshold.direction) == pytest.approx(1, abs=1e-5)
    assert (threshold.auroc, threshold.name) == (1.0, vector.name)
    trait = planted_model.planted_trait()
    assert threshold.n_trait == len(trait.derive_questions) * len(trait.system)
    states = last_states(model, [(q, trait.system[0][0]) for q in trait.evaluate_questions])
    readings = states[:, threshold.layer] @ threshold.direction
    assert all(threshold.state(x) == "alarm" for x in readings)
    assert all(threshold.probability(x) > 0.5 for x in readings)


def test_one_in_twenty_of_fresh_ordinary_prompts_alarms(model: ps.Model, threshold: monitor.Threshold) -> None:
    fresh = [q for q, _ in monitor.clean_prompts(held_out=True)]
    assert not {q for q, _ in monitor.clean_prompts()} & set(fresh)
    states = last_states(model, [monitor.everyday_prompt(q) for q in fresh])
    readings = states[:, threshold.layer] @ threshold.direction
    n = len(fresh)
    assert n >= 400
    rate, watched = (float((readings >= limit).mean()) for limit in (threshold.alarm, threshold.watch))
    assert abs(rate - 0.05) < 3.3 * np.sqrt(0.05 * 0.95 / n)  # 99.9 % of samples
    assert abs(watched - 0.2) < 3.3 * np.sqrt(0.2 * 0.8 / n)


def test_the_prompts_of_a_trait_itself_do_not_count_as_ordinary_for_it(model: ps.Model) -> None:
    given = dict(monitor.clean_prompts())
    trait = traits.get("pirate")
    asked = {q for q in given if given[q] == "pirate"}
    assert asked
    named = replace(planted_model.planted_trait(), name="pirate")
    vector = samples.vector(
        n_layer=8, layers=(3,), name="pirate", provenance={"texts": named.as_dict(), "trait": "pirate"}
    )
    vector = replace(vector, last_prompt=vector.directions)
    (found,) = monitor.calibrate(model, [vector])
    assert found.n_clean == 3 * (len(given) - len(asked))  # as they are, under a system prompt, after turns
    assert asked <= {*trait.derive_questions, *trait.evaluate_questions}


def test_the_unsteered_model_is_read_whatever_block_is_around_it(model: ps.Model, vector: ps.PersonaVector) -> None:
    prompts = [("one two", None), ("three", SYSTEM)]
    states = last_states(model, prompts)
    with model.steering(vector * 2.0):
        assert np.array_equal(last_states(model, prompts), states)


def test_states_are_of_their_prompts_in_whatever_order_they_are_computed(
    model: ps.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("personasteer.monitor.thresholds.AT_ONCE", 2)
    prompts = [("two", None), (said("a", "b", "three"), None), ("one", SYSTEM), ("four", None), ("three", SYSTEM)]
    found = last_states(model, prompts)
    for prompt, states in zip(prompts, found, strict=True):
        assert np.allclose(last_states(model, [prompt])[0], states, atol=0.02)  # other shapes, other roundings
    assert len({states.tobytes() for states in found}) == len(prompts)


def test_own_clean_prompts_are_taken_and_too_few_are_refused(model: ps.Model, vector: ps.PersonaVector) -> None:
    own = [f"{planted_model.FOR} number {i}" for i in range(60)]  # a user whose ordinary prompts carry the mark
    (found,) = monitor.calibrate(model, [vector], clean=own)
    assert found.n_clean == 60
    assert found.alarm > monitor.calibrate(model, [vector], clean=FEW)[0].alarm
    with pytest.raises(ps.ArgumentError, match="39 clean prompts are too few"):
        monitor.calibrate(model, [vector], clean=own[:39])


def test_a_long_conversation_as_such_is_no_trait(model: ps.Model, vector: ps.PersonaVector) -> None:
    """Turns that carry the mark are ordinary to who has had them in every ordinary conversation."""
    turns = said(*[planted_model.FOR, "yes"] * 3)
    plain = [[{"role": "user", "content": q}] for q in FEW]
    usual, used_to_it = (
        monitor.calibrate(model, [vector], clean=clean)[0]
        for clean in (plain, [*plain, *([*turns, *p] for p in plain)])
    )
    fresh = [q for q, _ in monitor.clean_prompts(held_out=True)[:60]]
    states = last_states(model, [([*turns, {"role": "user", "content": q}], None) for q in fresh])
    seen = [(t.readings(states) >= t.alarm).mean() for t in (usual, used_to_it)]
    assert seen[0] > 0.9
    assert seen[1] < 0.3


def test_a_system_prompt_as_such_is_no_trait(model: ps.Model, vector: ps.PersonaVector) -> None:
    """Own ordinary prompts may be conversations: with the trait's prompt in them they are ordinary, too."""
    plain = [[{"role": "user", "content": q}] for q in FEW]
    loud = [[{"role": "system", "content": SYSTEM}, *talk] for talk in plain]
    usual, used_to_it = (monitor.calibrate(model, [vector], clean=clean)[0] for clean in (plain, loud))
    states = last_states(model, [(q, SYSTEM) for q, _ in monitor.clean_prompts(held_out=True)[:60]])
    seen = [(states[:, t.layer] @ t.direction >= t.alarm).mean() for t in (usual, used_to_it)]
    assert seen[0] > 0.9
    assert seen[1] < 0.3
    with pytest.raises(ps.ArgumentError, match="must end with the user's message"):
        monitor.calibrate(model, [vector], clean=[*plain, said("a", "b")])


@pytest.mark.parametrize("percentiles", [(95.0, 80.0), (0.0, 95.0), (80.0, 100.0)])
def test_percentiles_out_of_order_are_refused(
    model: ps.Model, vector: ps.PersonaVector, percentiles: tuple[float, float]
) -> None:
    with pytest.raises(ps.ArgumentError, match="percentiles"):
        monitor.calibrate(model, [vector], percentiles=percentiles)


def test_a_vector_that_cannot_be_watched_is_refused(model: ps.Model, vector: ps.PersonaVector) -> None:
    with pytest.raises(ps.VectorError, match="no last-prompt-token directions"):
        monitor.calibrate(model, [replace(vector, last_prompt=None)])
    with pytest.raises(ps.VectorError, match="no usable last-prompt-token direction"):
        monitor.calibrate(model, [replace(vector, last_prompt=0 * vector.directions)], clean=FEW)
    with pytest.raises(ps.TraitError):
        monitor.calibrate(model, [replace(vector, provenance={}, name="of nothing")])


def test_a_model_that_leaves_system_messages_out_is_not_calibrated(vector: ps.PersonaVector, tmp_path: Path) -> None:
    deaf = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
    file = write_tiny_model(tmp_path / "deaf.gguf", chat_template=deaf)
    with (
        ps.Model(file, n_ctx=512) as model,
        pytest.raises(ps.TemplateError, match="no system message reaches the model"),
    ):
        monitor.calibrate(model, [vector], clean=FEW)


def test_a_trait_without_held_out_questions_is_tried_on_a_third_of_the_others(
    model: ps.Model, vector: ps.PersonaVector
) -> None:
    trait = planted_model.planted_trait()
    bare = replace(trait, evaluate_questions=())
    provenance = {**vector.provenance, "texts": bare.as_dict()}
    (found,) = monitor.calibrate(model, [replace(vector, provenance=provenance)], clean=FEW)
    n = len(trait.derive_questions)
    assert found.n_trait == (n - n // 3) * len(trait.system)
    assert found.auroc == 1.0


def test_a_threshold_that_tells_little_is_warned_of(
    model: ps.Model, vector: ps.PersonaVector, few: None, caplog: pytest.LogCaptureFixture
) -> None:
    monitor.thresholds_for(model, [vector])
    assert not caplog.messages
    monitor.thresholds_for(model, [replace(vector, last_prompt=-vector.directions)])
    assert "its alarms say little" in caplog.messages[-1]


def simple(**more: Any) -> monitor.Threshold:
    given: dict[str, Any] = {
        "name": "t", "layer": 1, "direction": np.array([1.0, 0.0], np.float32), "watch": 1.0, "alarm": 2.0,
        "slope": 2.0, "intercept": -3.0, "auroc": 1.0, "n_clean": 40, "n_trait": 10, "origin": {"fingerprint": "x"},
    }  # fmt: skip
    return monitor.Threshold(**{**given, **more})


def test_an_alarm_lasts_until_the_reading_is_below_watch() -> None:
    states, state = [], "ok"
    for reading in (0.5, 1.5, 2.0, 1.2, 0.9, 1.1):
        state = simple().state(reading, state)
        states.append(state)
    assert states == ["ok", "watch", "alarm", "alarm", "ok", "watch"]
    assert simple().state(float("nan")) == "alarm"


def test_the_probability_is_the_logistic_of_the_reading() -> None:
    assert simple().probability(1.5) == pytest.approx(0.5)
    assert simple().probability(2.5) == pytest.approx(1 / (1 + np.exp(-2)))
    assert simple().probability(1e6) == pytest.approx(1)


@pytest.mark.parametrize(
    "bad",
    [{"watch": 3.0}, {"alarm": float("nan")}, {"auroc": float("nan")}, {"direction": np.array([np.inf], np.float32)}],
)
def test_numbers_that_make_no_threshold_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ps.VectorError, match="not finite, or watch is above alarm"):
        simple(**bad)


# -- conversations ----------------------------------------------------------------------------------------------------


def said(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(contents)]


def test_a_conversation_is_read_before_each_answer(model: ps.Model, threshold: monitor.Threshold) -> None:
    talk = [{"role": "system", "content": SYSTEM}, *said("one two", "three", "four", "five")]
    (found,) = monitor.watch_transcripts(model, [threshold], [talk])
    assert [t.role for t in found.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [t.before is None for t in found.turns] == [True, True, False, True, False]
    for i, turn in enumerate(found.turns):
        if turn.before is None:
            continue
        prompt = model.prompt_tokens(talk[:i])
        assert prompt == found.tokens[: turn.begin]
        (raw,) = model.capture([[*talk[:i], {"role": "assistant", "content": "x"}]], pool="raw", span="prompt")
        wanted = float(raw[-1, threshold.layer] @ threshold.direction)
        assert turn.before[threshold.name] == pytest.approx(wanted, abs=0.02)  # other shapes, other roundings
        assert model.detokenize(found.tokens[turn.begin : turn.end]).strip() == talk[i]["content"]
    assert found.turns[2].states == {threshold.name: "alarm"}
    assert found.worst == {threshold.name: "alarm"}


def test_an_answer_that_is_to_come_is_warned_of(model: ps.Model, threshold: monitor.Threshold) -> None:
    loud, quiet = monitor.watch_transcripts(
        model, [threshold], [[{"role": "system", "content": SYSTEM}, *said("one two")], said("one two")]
    )
    for found, state in ((loud, "alarm"), (quiet, "ok")):
        last = found.turns[-1]
        assert (last.role, last.begin, last.end, last.means) == ("assistant", len(found.tokens), len(found.tokens), {})
        assert last.states[threshold.name] == state
    assert loud.turns[-1].probabilities[threshold.name] > 0.9 > quiet.turns[-1].probabilities[threshold.name]


def test_a_long_transcript_is_read_in_one_pass(path: Path, threshold: monitor.Threshold) -> None:
    talk = said(*["abcd efg hijk lmno " * 10] * 60)
    with ps.Model(path, n_ctx=16384, n_parallel=1) as model:
        (found,) = monitor.watch_transcripts(model, [threshold], [talk])
    assert len(found.tokens) > 10_000
    assert sum(t.before is not None for t in found.turns) == 30
    assert np.isfinite(found.readings).all()


def test_no_threshold_no_conversation_and_two_of_a_name_are_refused(
    model: ps.Model, threshold: monitor.Threshold
) -> None:
    for thresholds, talks in (([], [said("a")]), ([threshold], []), ([threshold, threshold], [said("a")])):
        with pytest.raises(ps.ArgumentError):
            monitor.watch_transcripts(model, thresholds, talks)


@pytest.mark.parametrize("layer", [BLOCK, planted_model.N_LAYER - 1])
def test_the_last_block_is_read_like_the_others(
    model: ps.Model, vector: ps.PersonaVector, threshold: monitor.Threshold, layer: int
) -> None:
    there = replace(threshold, layer=layer, name="there")
    (found,) = monitor.watch_transcripts(model, [threshold, there], [said("one two", "three")])
    assert np.isfinite(found.readings).all()
    if layer == BLOCK == threshold.layer:
        assert np.array_equal(found.readings[:, 0], found.readings[:, 1])


# -- files ------------------------------------------------------------------------------------------------------------


def test_thresholds_come_back_as_they_were(threshold: monitor.Threshold, tmp_path: Path) -> None:
    monitor.save_thresholds([threshold, replace(threshold, name="other")], tmp_path / "t.json")
    one, other = monitor.load_thresholds(tmp_path / "t.json")
    assert np.array_equal(one.direction, threshold.direction)
    assert one.as_dict() == threshold.as_dict()
    assert other.name == "other"


BAD_FILES = {
    "not JSON": "{",
    "no thresholds": "{}",
    "a newer schema": '{"schema": 99, "thresholds": []}',
    "a threshold without a direction": '{"schema": 1, "thresholds": [{"name": "x"}]}',
    "a running mean of another kind": '{"schema": 1, "thresholds": [%s]}',
    "numbers that are none": '{"schema": 1, "thresholds": [5]}',
    "deep": "[" * 100_000,
    "an identity that is none": '{"schema": 1, "thresholds": [%o]}',
}


@pytest.mark.parametrize("how", BAD_FILES)
def test_a_file_that_holds_no_thresholds_is_refused_in_one_line(tmp_path: Path, how: str) -> None:
    file = tmp_path / "t.json"
    broken = {**simple().as_dict(), "running": {"layer": 1, "window": 0}}
    foreign = {**simple().as_dict(), "origin": {"identity": None}}
    file.write_text(BAD_FILES[how].replace("%s", json.dumps(broken)).replace("%o", json.dumps(foreign)))
    with pytest.raises(ps.VectorError) as caught:
        monitor.load_thresholds(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_calibrated_thresholds_are_kept_for_the_model_and_vector(
    model: ps.Model, vector: ps.PersonaVector, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = monitor.thresholds_for(model, [vector])
    monkeypatch.setattr("personasteer.monitor.thresholds.calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    assert monitor.thresholds_for(model, [vector])[0].as_dict() == first.as_dict()


def test_running_means_are_added_to_what_is_kept(
    model: ps.Model, vector: ps.PersonaVector, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bare,) = monitor.thresholds_for(model, [vector])
    assert bare.running is None
    monkeypatch.setattr("personasteer.monitor.thresholds.calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    (whole,) = monitor.thresholds_for(model, [vector], running=True)
    assert whole.running is not None
    assert {**whole.as_dict(), "running": None} == bare.as_dict()
    kept = monitor.thresholds_for(model, [vector])[0].as_dict()
    assert kept == whole.as_dict() == monitor.Threshold.from_dict(json.loads(json.dumps(kept))).as_dict()


def test_an_interrupt_among_the_answers_keeps_what_the_prompts_gave(
    model: ps.Model, vector: ps.PersonaVector, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr("personasteer.monitor.thresholds.calibrate_running", interrupt)
        with pytest.raises(KeyboardInterrupt):
            monitor.thresholds_for(model, [vector], running=True)
    monkeypatch.setattr("personasteer.monitor.thresholds.calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    assert monitor.thresholds_for(model, [vector], running=True)[0].running is not None


def test_other_weights_are_warned_of_and_another_template_is_refused(
    path: Path, threshold: monitor.Threshold, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heavier = tmp_path / "heavier.gguf"
    heavier.write_bytes(path.read_bytes())
    with heavier.open("r+b") as f:
        f.seek(ModelFile(path).tensors["output.weight"].offset)
        f.write(np.float32(0.5).tobytes())
    with ps.Model(heavier, n_ctx=1024) as model, caplog.at_level(logging.WARNING):
        monitor.watch_transcripts(model, [threshold], [said("one")])
    assert "other weights" in caplog.text
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    rewrite(ModelFile(path), tmp_path / "other.gguf", fields=[Field.of("tokenizer.chat_template", template)])
    with (
        ps.Model(tmp_path / "other.gguf", n_ctx=1024) as model,
        pytest.raises(ps.ModelError, match=r"another tokenizer, template.*calibrate again"),
    ):
        monitor.watch_transcripts(model, [threshold], [said("one")])


CONVERSATIONS: dict[str, tuple[str, int]] = {
    "a message a line": ('{"role": "user", "content": "a"}\n\n{"role": "assistant", "content": "b"}\n', 1),
    "a conversation a line": (
        '{"messages": [{"role": "user", "content": "a"}]}\n[{"role": "user", "content": "b"}]',
        2,
    ),
}
BAD_CONVERSATIONS = {
    "nothing": "\n",
    "not JSON": '{"role": "user"',
    "no content": '{"role": "user"}',
    "a number": "5",
    "an empty list": "[]",
    "both kinds": '{"role": "user", "content": "a"}\n{"messages": [{"role": "user", "content": "a"}]}',
}


@pytest.mark.parametrize("how", CONVERSATIONS)
def test_transcripts_come_in_two_forms(tmp_path: Path, how: str) -> None:
    text, n = CONVERSATIONS[how]
    (tmp_path / "t.jsonl").write_text(text)
    assert len(monitor.read_conversations(tmp_path / "t.jsonl")) == n


@pytest.mark.parametrize("how", BAD_CONVERSATIONS)
def test_a_file_without_conversations_is_refused_with_its_line(tmp_path: Path, how: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(BAD_CONVERSATIONS[how])
    with pytest.raises(ps.ArgumentError, match=r"t\.jsonl"):
        monitor.read_conversations(file)


def test_clean_conversations_end_before_their_last_answer(tmp_path: Path) -> None:
    file = tmp_path / "clean.jsonl"
    talks = [said("one", "two"), said("one", "two", "three")] * 20
    file.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    assert monitor.read_clean(file) == [talk[: len(talk) // 2 * 2 - 1] if len(talk) == 2 else talk for talk in talks]
    file.write_text("\n".join(json.dumps(m) for talk in talks for m in talk))
    with pytest.raises(ps.ArgumentError, match="1 conversations are too few to calibrate: 40 at least, one a line"):
        monitor.read_clean(file)
    file.write_text("\n".join([json.dumps(said("one", "two"))] * 40 + [json.dumps(said("one", "two")[1:])]))
    with pytest.raises(ps.ArgumentError, match="more than an answer"):
        monitor.read_clean(file)


# -- the command line -------------------------------------------------------------------------------------------------


def test_monitor_reads_a_prompt_and_a_transcript(
    path: Path,
    vector: ps.PersonaVector,
    few: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    vector.save("v.gguf")
    talk = [{"role": "system", "content": SYSTEM}, *said("one two", "three", "four")]
    Path("t.jsonl").write_text("\n".join(map(json.dumps, talk)))
    assert run(["monitor", "-m", str(path), "-v", "v.gguf", "--transcript", "t.jsonl", "--json", "-o", "th.json"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["role"] for line in lines] == ["system", "user", "assistant", "user", "assistant"]
    assert lines[2]["states"] == {vector.name: "alarm"}
    assert run(["monitor", "-m", str(path), "--thresholds", "th.json", "-p", FEW[0]]) == 0
    shown = capfd.readouterr().out
    assert "to come" in shown
    assert "ALARM" not in shown
    assert run(["monitor", "-m", str(path), "--thresholds", "th.json", "-p", FEW[0], "--system", SYSTEM]) == 0
    assert "ALARM" in capfd.readouterr().out


def test_thresholds_of_own_prompts_serve_chat(
    path: Path,
    vector: ps.PersonaVector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERSONASTEER_CACHE_DIR", str(tmp_path / "cache"))
    vector.save("v.gguf")
    Path("clean.jsonl").write_text("\n".join(json.dumps(said(q, "yes")) for q in FEW))
    common = ["-m", str(path), "--clean", "clean.jsonl", "-v", "v.gguf", "-o", "th.json"]
    assert run(["monitor", *common]) == 0
    watched = ["chat", "-m", str(path), "-p", "one", "-n", "4", "--watch", "v.gguf", "--thresholds", "th.json"]
    assert run(watched) == 1
    assert "calibrate with running=True (monitor --running)" in capfd.readouterr().err
    assert run(["monitor", *common, "--running", "--force"]) == 0
    (kept,) = monitor.load_thresholds("th.json")
    assert kept.n_clean == len(FEW)
    assert kept.running is not None
    monkeypatch.setattr("personasteer.monitor.guard.thresholds_for", lambda *_, **__: pytest.fail("calibrated"))
    assert run(watched) == 0
    assert "before the answer" in capfd.readouterr().err


def test_names_and_roles_are_shown_as_they_are(
    path: Path, threshold: monitor.Threshold, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monitor.save_thresholds(
        [replace(threshold, name="mood[v2]"), replace(threshold, name="\ud800"), replace(threshold, name="\x1b[2J")],
        tmp_path / "t.json",
    )
    talk = [{"role": "[/b]", "content": "one"}, *said("one two", "three")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, talk)))
    common = ["monitor", "-m", str(path), "--thresholds", str(tmp_path / "t.json")]
    tokens = ["--tokens", str(tmp_path / "x.parquet")]
    assert run([*common, *tokens, "--transcript", str(tmp_path / "t.jsonl"), "--report", str(tmp_path / "r")]) == 0
    shown = capfd.readouterr().out
    assert "mood[v2]" in shown
    assert "[/b]" in shown
    assert "\x1b[2J" not in shown
    assert "\\x1b[2J: block" in shown
    assert run([*common, "--transcript", str(tmp_path / "t.jsonl"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[0])["role"] == "[/b]"


MISTAKES = {
    "nothing to watch": (["-p", "a"], "name at least one vector"),
    "nothing to read": (["-v", "v.gguf"], "nothing to read"),
    "a strength": (["-v", "v.gguf:0.3", "-p", "a"], "takes no strength"),
    "two sources": (["-v", "v.gguf", "-p", "a", "--transcript", "t.jsonl"], "not both"),
    "two kinds of thresholds": (["-v", "v.gguf", "--thresholds", "t.json", "-p", "a"], "leave -v out"),
    "a system prompt of nothing": (["-v", "v.gguf", "--transcript", "t.jsonl", "--system", "a"], "goes with -p"),
    "no such transcript": (["-v", "v.gguf", "--transcript", "none.jsonl"], "none.jsonl: cannot be read"),
    "the model": (["-v", "v.gguf", "-p", "a", "-o", "{model}", "--force"], "is what this is made from"),
    "one file for two": (["-v", "v.gguf", "-p", "a", "-o", "x.jsonl", "--tokens", "./x.jsonl"], "must be two files"),
    "two of a name": (["-v", "v.gguf", "-v", "v.gguf", "-p", "a"], "the same name"),
    "what exists": (["-v", "v.gguf", "-p", "a", "-o", "v.gguf"], "is what this is made from"),
    "answers of no file": (["-v", "v.gguf", "-p", "a", "--running"], "--running goes with -o"),
}


@pytest.mark.parametrize("how", MISTAKES)
def test_mistakes_end_in_one_line(
    path: Path,
    vector: ps.PersonaVector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    how: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    vector.save("v.gguf")
    arguments, message = MISTAKES[how]
    assert run(["monitor", "-m", str(path), *(a.format(model=path) for a in arguments)]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize("trait", ["pessimistic"])
def test_the_bundled_model_is_watched(smollm2_path: Path, trait: str) -> None:
    """Readings of a real model: fresh ordinary prompts seldom alarm, prompts that ask for the trait nearly always."""
    with ps.Model(smollm2_path, n_ctx=512) as model:
        asked = traits.get(trait)
        shown = [(q, s) for q in asked.derive_questions[:6] for s, _ in asked.system]
        other = [(q, s) for q in asked.derive_questions[:6] for _, s in asked.system]
        directions = last_states(model, shown).mean(axis=0) - last_states(model, other).mean(axis=0)
        vector = ps.PersonaVector(
            directions, (15,), trait, last_prompt=directions, provenance={"trait": trait, **model.origin}
        )
        (found,) = monitor.calibrate(model, [vector])
        fresh = [(q, None) for q, name in monitor.clean_prompts(held_out=True) if name != trait][:160]
        held_out = [(q, s) for q in asked.evaluate_questions[:8] for s, _ in asked.system]
        ordinary, encouraged = (
            last_states(model, prompts)[:, found.layer] @ found.direction for prompts in (fresh, held_out)
        )
    assert found.auroc > 0.9
    assert auroc(encouraged[:, None], ordinary[:, None])[0] > 0.9
    assert (ordinary >= found.alarm).mean() < 0.12
