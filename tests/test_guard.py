"""A guard: rules that act on alarms before and during an answer, what they record, and what they leave alone."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted_model
import pytest

import personasteer as ps
from personasteer import monitor
from personasteer.cli import run
from personasteer.monitor import Rule
from personasteer.monitor.running import running_mean

pytestmark = pytest.mark.usefixtures("short_conversations")

BLOCK = 3
TRAIT = planted_model.planted_trait()
LOUD, QUIET = TRAIT.system[0]  # ask for the trait, and for its opposite
GREEDY: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_model.write_planted_model(tmp_path_factory.mktemp("planted") / "m.gguf", BLOCK)[0]


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[ps.Model]:
    with ps.Model(path, n_ctx=1024, n_parallel=4) as m:
        yield m


@pytest.fixture(scope="module")
def vector(model: ps.Model) -> ps.PersonaVector:
    return ps.derive(model, TRAIT, max_tokens=16, seed=0)


@pytest.fixture(scope="module")
def threshold(model: ps.Model, vector: ps.PersonaVector) -> monitor.Threshold:
    clean = [q for q, _ in monitor.clean_prompts()][:60]
    (found,) = monitor.calibrate(model, [vector], clean=clean, running=True)
    return found


@pytest.fixture
def guard(model: ps.Model, threshold: monitor.Threshold) -> Any:
    return lambda *rules, **options: monitor.Guard(model, rules, thresholds=[threshold], **options)


def told(found: monitor.GuardedAnswer) -> list[tuple[str, str]]:
    return [(e.moment, e.action) for e in found.events if e.action]


# -- running means ----------------------------------------------------------------------------------------------------


def test_running_means_are_means_over_the_window() -> None:
    readings = np.arange(10, dtype=np.float64)[:, None] ** 2
    means = running_mean(readings, 4)
    assert np.allclose(means[:, 0], [np.mean(readings[i : i + 4]) for i in range(7)])
    assert running_mean(readings[:3], 4).shape == (0, 1)


def test_answers_of_the_trait_are_told_from_ordinary_ones(
    model: ps.Model, vector: ps.PersonaVector, threshold: monitor.Threshold
) -> None:
    running = threshold.running
    assert running is not None
    assert running.auroc > 0.9
    assert np.linalg.norm(running.direction) == pytest.approx(1, abs=1e-5)
    units = vector.directions_at([running.layer])[0][0]
    assert running.direction == pytest.approx(units / np.linalg.norm(units), abs=1e-6)
    assert np.isfinite(running.caps).tolist() == [True] * (model.n_layer - 1) + [False]


def test_running_means_while_generating_are_those_of_the_text(guard: Any, vector: ps.PersonaVector) -> None:
    found = guard(Rule(vector)).chat("one two", system=LOUD, **GREEDY)
    running = found.answer.readings[1][found.answer.n_prompt :, 0]
    wanted = running_mean(running[np.isfinite(running)], 8)
    assert np.allclose(found.running[vector.name], wanted, atol=1e-5)
    assert len(wanted) >= 12


# -- what rules do ----------------------------------------------------------------------------------------------------


def test_watching_changes_nothing_and_warns_before_the_answer(
    model: ps.Model, guard: Any, vector: ps.PersonaVector
) -> None:
    events: list[monitor.Event] = []
    watching = guard(Rule(vector), on_event=events.append)
    for system, state in ((LOUD, "alarm"), (QUIET, "ok")):
        with model.session() as session:
            plain = session.submit("one two", system=system, **GREEDY).result()
        found = watching.chat("one two", system=system, **GREEDY)
        assert found.answer.tokens == plain.tokens
        assert (found.events[0].moment, found.events[0].state) == ("before", state)
        assert found.events[0].token == found.answer.n_prompt - 1
        assert found.before[vector.name] == found.events[0].reading
    assert events == [*events]
    assert {e.state for e in events} == {"alarm", "ok"}


def test_the_reading_before_the_answer_is_that_of_the_transcript(
    model: ps.Model, guard: Any, vector: ps.PersonaVector, threshold: monitor.Threshold
) -> None:
    found = guard(Rule(vector)).chat("one two", system=LOUD, **GREEDY)
    talk = [{"role": "system", "content": LOUD}, {"role": "user", "content": "one two"}]
    (read,) = monitor.watch_transcripts(model, [threshold], [talk])
    before = read.turns[-1].before
    assert before is not None
    assert found.before[vector.name] == pytest.approx(before[vector.name], abs=1e-3)


def test_a_cap_keeps_every_reading_under_tau(model: ps.Model, guard: Any, vector: ps.PersonaVector) -> None:
    capping = guard(Rule(vector, "cap"))
    caps = capping.thresholds[0].running.caps
    with model.session() as session:
        free = session.submit("one two", system=LOUD, **GREEDY).result()
    found = capping.chat("one two", system=LOUD, **GREEDY)
    assert told(found)[0] == ("before", "cap")
    assert found.answer.tokens != free.tokens
    rows, lengths = vector.directions_at(vector.layers)
    edits = ps.Cap(vector, caps, scope="response")
    for answer, steer, holds in ((found.answer, edits, True), (free, None, False)):
        text = model.detokenize(answer.tokens, special=True)
        talk = [{"role": "system", "content": LOUD}, {"role": "user", "content": "one two"}]
        (raw,) = model.capture([[*talk, {"role": "assistant", "content": text}]], pool="raw", steer=steer)
        over = [
            float((raw[:, il] @ (row / n)).max() - caps[il])
            for il, row, n in zip(vector.layers, rows, lengths, strict=True)
        ]
        assert (max(over) <= 1e-4) == holds


def test_prompts_under_the_cap_give_identical_tokens(model: ps.Model, guard: Any, vector: ps.PersonaVector) -> None:
    prompts = [q for q, _ in monitor.clean_prompts(held_out=True)][:12]
    capped = guard(Rule(vector, "cap")).chat_batch(prompts, system=QUIET, **GREEDY)
    with model.session() as session:
        streams = [session.submit(p, system=QUIET, **GREEDY) for p in prompts]
        plain = [s.result() for s in streams]
    quiet = [i for i, found in enumerate(capped) if not told(found)]
    assert len(quiet) >= 9
    assert all(capped[i].answer.tokens == plain[i].tokens for i in quiet)


@pytest.mark.parametrize("action", ["subtract", "edit"])
def test_an_edit_is_switched_on_with_the_first_token(
    model: ps.Model, guard: Any, vector: ps.PersonaVector, action: str
) -> None:
    edit = ps.Add(vector, -0.4, scope="response")
    rule = Rule(vector, action, strength=0.4, edit=edit if action == "edit" else None, when="before")
    found = guard(rule).chat("one two", system=LOUD, **GREEDY)
    with model.session() as session:
        steered = session.submit("one two", system=LOUD, steer=edit, **GREEDY).result()
    assert found.answer.tokens == steered.tokens
    assert found.answer.rho == pytest.approx(steered.rho)
    assert told(found) == [("before", action)]


def test_an_edit_during_the_answer_leaves_what_was_said(model: ps.Model, guard: Any, vector: ps.PersonaVector) -> None:
    with model.session() as session:
        plain = session.submit("one two", system=LOUD, **GREEDY).result()
    found = guard(Rule(vector, "subtract", strength=2.0, when="during")).chat("one two", system=LOUD, **GREEDY)
    (event,) = [e for e in found.events if e.action]
    at = event.token - found.answer.n_prompt + 1
    assert 8 <= at < 24
    assert found.answer.tokens[:at] == plain.tokens[:at]
    assert found.answer.tokens != plain.tokens
    assert found.answer.rho == pytest.approx(2.0, rel=0.01)


def test_stop_puts_a_message_in_place_of_the_answer(guard: Any, vector: ps.PersonaVector) -> None:
    stopped = guard(Rule(vector, "stop", message="Not that.", when="before")).chat("one", system=LOUD, **GREEDY)
    assert (stopped.text, stopped.answer.finish, told(stopped)) == ("Not that.", "stopped", [("before", "stop")])
    late = guard(Rule(vector, "stop", when="during")).chat("one", system=LOUD, **GREEDY)
    assert late.answer.finish == "stopped"
    assert 0 < len(late.answer.tokens) < 24


def test_a_stream_that_is_stopped_before_its_first_token_says_nothing(
    model: ps.Model, guard: Any, vector: ps.PersonaVector
) -> None:
    with model.session() as session:
        stream = guard(Rule(vector, "stop", when="before")).submit(session, "one", system=LOUD, **GREEDY)
        assert list(stream) == []
        assert stream.result().text == ""
        other = guard(Rule(vector)).submit(session, "one", system=LOUD, **GREEDY)
        assert "".join(other) == other.result().text != ""


@pytest.mark.parametrize("rule", [{}, {"action": "stop", "message": "Not that."}, {"action": "stop"}])
def test_a_guarded_stream_can_be_awaited(
    model: ps.Model, guard: Any, vector: ps.PersonaVector, rule: dict[str, Any]
) -> None:
    async def read(session: Any) -> str:
        stream = guard(Rule(vector, when="before", **rule)).submit(session, "one", system=LOUD, **GREEDY)
        return "".join([piece async for piece in stream])

    with model.session() as session:
        said = asyncio.run(read(session))
        wanted = guard(Rule(vector, when="before", **rule)).submit(session, "one", system=LOUD, **GREEDY).result().text
    assert said == wanted


def test_an_answer_is_made_anew_with_more_each_time(guard: Any, model: ps.Model, vector: ps.PersonaVector) -> None:
    found = guard(Rule(vector, "regenerate", strength=0.3, tries=2)).chat("one two", system=LOUD, **GREEDY)
    assert 2 <= found.attempts <= 3
    assert [e.attempt for e in found.events if e.action == "regenerate"] == list(range(found.attempts - 1))
    with model.session() as session:
        edit = ps.Add(vector, -0.3 * (found.attempts - 1), scope="response")
        wanted = session.submit("one two", system=LOUD, steer=edit, **GREEDY).result()
    assert found.answer.tokens == wanted.tokens


def test_an_answer_made_anew_is_not_dropped_for_its_prompt_again(guard: Any, vector: ps.PersonaVector) -> None:
    found = guard(Rule(vector, "regenerate", strength=0.3, tries=5, when="before")).chat("one", system=LOUD, **GREEDY)
    assert found.attempts == 2
    assert told(found) == [("before", "regenerate")]


def test_each_request_of_a_batch_has_its_own_guard(model: ps.Model, guard: Any, vector: ps.PersonaVector) -> None:
    """A guarded request beside others leaves them as they are, to the bit of their tokens' log-probabilities."""

    def together(rule: Rule) -> list[ps.Answer]:
        with model.session(reuse_cache=False) as session:
            guarded = guard(rule).submit(session, "one two", system=LOUD, **GREEDY)
            others = [session.submit("three", system=s, logprobs=0, **GREEDY) for s in (LOUD, QUIET)]
            return [guarded.result().answer, *(o.result() for o in others)]

    logged, capped = together(Rule(vector)), together(Rule(vector, "subtract", strength=2.0, when="during"))
    assert logged[0].tokens != capped[0].tokens
    for one, other in zip(logged[1:], capped[1:], strict=True):
        assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)


def test_a_computed_prefix_is_taken_over_under_a_guard(model: ps.Model, guard: Any, vector: ps.PersonaVector) -> None:
    watching = guard(Rule(vector))
    with model.session() as session:
        first = watching.submit(session, "one two three", system=LOUD, **GREEDY).result()
        again = watching.submit(session, "one two three", system=LOUD, **GREEDY).result()
    assert first.answer.n_reused == 0
    assert again.answer.n_reused == again.answer.n_prompt - 1
    assert again.before[vector.name] == pytest.approx(first.before[vector.name], abs=0.02)  # other shapes


def test_the_guard_steers_beside_the_requests_own_edits(model: ps.Model, guard: Any, vector: ps.PersonaVector) -> None:
    own = ps.Add(vector, 0.1, scope="response")
    found = guard(Rule(vector, "subtract", strength=0.3, when="before")).chat("one", steer=own, system=LOUD, **GREEDY)
    with model.session() as session:
        both = own + ps.Add(vector, -0.3, scope="response")
        wanted = session.submit("one", steer=both, system=LOUD, **GREEDY).result()
    assert found.answer.tokens == wanted.tokens


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"action": "explode"}, {"on": "ok"}, {"when": "later"}, {"action": "subtract", "strength": 0.0},
        {"action": "subtract", "strength": float("nan")}, {"action": "edit"}, {"action": "regenerate", "tries": 0},
    ],
)  # fmt: skip
def test_rules_that_make_no_sense_are_refused(vector: ps.PersonaVector, how: dict[str, Any]) -> None:
    with pytest.raises(ps.ArgumentError):
        Rule(vector, **how)
    with pytest.raises(ps.ArgumentError, match='goes with the action "edit"'):
        Rule(vector, "cap", edit=vector * 0.1)


def test_a_guard_without_what_it_needs_is_refused(
    model: ps.Model, vector: ps.PersonaVector, threshold: monitor.Threshold
) -> None:
    bare = replace(threshold, running=None)
    for rules, thresholds, error in (
        ([], [threshold], ps.ArgumentError),
        ([Rule(vector), Rule(replace(vector))], [threshold], ps.ArgumentError),
        ([Rule(vector)], [], ps.VectorError),
        ([Rule(vector, "cap")], [bare], ps.VectorError),
        ([Rule(vector, when="during")], [bare], ps.VectorError),
        ([Rule(vector)], [bare], ps.VectorError),  # when is "both"
        ([Rule(vector, "edit", edit=ps.When(vector, vector * 0.2, threshold=0.0))], [threshold], ps.ArgumentError),
        ([Rule(vector, "edit", edit=ps.Add(vector, 0.2, scope="assistant"))], [threshold], ps.ArgumentError),
        ([Rule(vector, "subtract")], [replace(threshold, layer=99)], ps.VectorError),
    ):
        with pytest.raises(error):
            monitor.Guard(model, rules, thresholds=thresholds)


def test_what_would_fail_amid_other_requests_is_refused_before_them(
    model: ps.Model, guard: Any, vector: ps.PersonaVector
) -> None:
    asks = ps.When(vector, vector * 0.2, threshold=0.0)
    with model.session() as session:
        beside = session.submit("one two", **GREEDY)
        with pytest.raises(ps.ArgumentError, match="conditions on the prompt"):
            guard(Rule(vector, "cap")).submit(session, "one", steer=asks, **GREEDY)
        before = guard(Rule(vector, "cap", when="before")).submit(session, "one", steer=asks, system=LOUD, **GREEDY)
        assert told(before.result()) == [("before", "cap")]
        assert len(beside.result().tokens) == GREEDY["max_tokens"]


def test_a_reading_that_is_no_number_is_an_alarm(threshold: monitor.Threshold) -> None:
    assert threshold.state(float("nan")) == "alarm"
    assert threshold.running is not None
    assert threshold.running.state(float("nan"), "ok") == "alarm"
    event = monitor.Event(3, "before", "x", float("nan"), "alarm", float("nan"), "", 0)
    assert json.loads(json.dumps(event.as_dict(), allow_nan=False))["reading"] is None


def test_an_alarm_of_the_last_answer_lasts_until_a_reading_is_below_watch(
    model: ps.Model, threshold: monitor.Threshold, vector: ps.PersonaVector
) -> None:
    reading = monitor.Guard(model, [Rule(vector)], thresholds=[threshold]).chat("one", max_tokens=1).before[vector.name]
    between = replace(threshold, watch=reading - 1, alarm=reading + 1)
    guard = monitor.Guard(model, [Rule(vector)], thresholds=[between])
    for earlier, state in (("ok", "watch"), ("alarm", "alarm")):
        found = guard.chat("one", max_tokens=1, earlier={vector.name: earlier})
        assert found.states_before == {vector.name: state}
        assert found.events[0].state == state


def test_an_edit_that_has_no_token_left_is_not_recorded(
    model: ps.Model, threshold: monitor.Threshold, vector: ps.PersonaVector
) -> None:
    running = threshold.running
    assert running is not None
    low = replace(threshold, running=replace(running, watch=-1e9, alarm=-1e9))
    guard = monitor.Guard(model, [Rule(vector, "subtract", when="during")], thresholds=[low])
    answer = {"temperature": 0.0, "system": LOUD}
    assert told(guard.chat("one two", max_tokens=9, **answer)) == [("during", "subtract")]
    assert told(guard.chat("one two", max_tokens=8, **answer)) == []  # the first mean comes with the last token


def test_a_cap_leaves_out_the_last_block(
    model: ps.Model, threshold: monitor.Threshold, vector: ps.PersonaVector
) -> None:
    every = replace(vector, layers=tuple(range(model.n_layer)))
    guard = monitor.Guard(model, [Rule(every, "cap")], thresholds=[threshold])
    assert told(guard.chat("one two", system=LOUD, **GREEDY)) == [("before", "cap")]
    last = replace(vector, layers=(model.n_layer - 1,))
    with pytest.raises(ps.VectorError, match="no block below the last one to cap at"):
        monitor.Guard(model, [Rule(last, "cap")], thresholds=[threshold])


# -- policies and the command line ------------------------------------------------------------------------------------

POLICY = """
[[rule]]
vector = "v.gguf"
action = "edit"
when = "before"
edit = [{kind = "add", vector = "v.gguf", strength = -2.0, scope = "response"}]
"""
BAD_POLICIES = {
    "nothing": ("", "list of"),
    "not TOML": ("[[rule", "cannot be read"),
    "another table": (POLICY + "[other]\na = 1\n", "nothing else"),
    "no vector": ('[[rule]]\naction = "cap"\n', "must name a file"),
    "another key": ('[[rule]]\nvector = "v.gguf"\nstrenght = 1\n', "strenght"),
    "another kind of value": ('[[rule]]\nvector = "v.gguf"\nstrength = "a"\n', "strength must be a number"),
    "no edit": ('[[rule]]\nvector = "v.gguf"\naction = "edit"\nedit = [5]\n', "kind of an edit"),
    "an edit without strength": (POLICY.replace(", strength = -2.0", ""), "does not go with"),
    "no such file": (POLICY.replace("v.gguf", "none.gguf"), "none.gguf"),
    "rules of another kind": ("rule = 5\n", "list of"),
    "a list for a kind": (POLICY.replace('"add"', '["add"]'), "kind of an edit"),
    "a number without end": (POLICY.replace("-2.0", "1" + 400 * "0"), "strength is too large"),
}


@pytest.fixture
def at_home(path: Path, vector: ps.PersonaVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERSONASTEER_CACHE_DIR", str(tmp_path / "cache"))
    few = tuple((q, "") for q, _ in monitor.clean_prompts()[:60])
    monkeypatch.setattr("personasteer.monitor.everyday.clean_prompts", lambda: few)
    vector.save("v.gguf")
    return tmp_path


def test_a_policy_is_read(at_home: Path, vector: ps.PersonaVector) -> None:
    Path("p.toml").write_text(POLICY)
    (rule,) = monitor.load_policy(Path("p.toml"))
    assert (rule.vector.name, rule.action, rule.when, rule.on) == (vector.name, "edit", "before", "alarm")
    (edit,) = ps.steering.as_steering(rule.edit)
    assert isinstance(edit, ps.Add)
    assert (edit.strength, edit.scope) == (-2.0, "response")
    assert edit.vector is rule.vector


def test_a_file_may_be_named_in_two_ways(at_home: Path) -> None:
    rule = POLICY.split("edit = [")[0].replace('"edit"', '"log"')
    Path("p.toml").write_text(rule + rule.replace("v.gguf", "./v.gguf"))
    first, second = monitor.load_policy(Path("p.toml"))
    assert first.vector is second.vector


@pytest.mark.parametrize("how", BAD_POLICIES)
def test_a_bad_policy_is_refused_in_one_line(
    at_home: Path, path: Path, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    text, message = BAD_POLICIES[how]
    Path("p.toml").write_text(text)
    assert run(["chat", "-m", str(path), "-p", "one", "--guard", "p.toml"]) in (1, 2)
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_chat_is_watched_and_guarded(at_home: Path, path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    common = ["chat", "-m", str(path), "-p", "one two", "--system", LOUD, "-n", "24", "--temp", "0"]
    assert run([*common, "--watch", "v.gguf"]) == 0
    out, err = capfd.readouterr()
    assert "alarm before the answer" in err
    assert re.search(r", (watch|alarm) at token \d+\]", err)
    assert re.search(r"while answering .*, (ok|watch|alarm) \(watch from .*, alarm from .*\)\]", err)
    assert len(out.strip()) >= 20
    Path("p.toml").write_text(POLICY)
    assert run([*common, "--guard", "p.toml", "--guard-log", "log.jsonl", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["text"] != out.strip()
    assert [e["action"] for e in found["events"] if e["action"]] == ["edit"]
    lines = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert lines == found["events"]


def test_a_log_without_a_guard_and_a_strength_are_refused(at_home: Path, path: Path) -> None:
    common = ["chat", "-m", str(path), "-p", "one"]
    assert run([*common, "--guard-log", "log.jsonl"]) == 2
    assert run([*common, "--watch", "v.gguf:0.3"]) == 2
    assert run([*common, "--thresholds", "none.json"]) == 2
    assert run([*common, "--watch", "v.gguf", "--guard-log", "none/log.jsonl"]) == 2


def test_a_log_that_is_an_input_and_another_vector_of_a_name_are_refused(
    at_home: Path, path: Path, vector: ps.PersonaVector, capfd: pytest.CaptureFixture[str]
) -> None:
    common = ["chat", "-m", str(path), "-p", "one", "--watch", "v.gguf"]
    size = path.stat().st_size
    assert run([*common, "--guard-log", str(path)]) == 2
    assert "is what this is made from" in capfd.readouterr().err
    assert path.stat().st_size == size
    replace(vector, directions=-vector.directions).save("other.gguf")
    assert run([*common, "--watch", "other.gguf"]) == 2
    assert "another vector of the name" in capfd.readouterr().err
