"""Sessions: requests that stream, end, fail, are cancelled and steered while others go on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
from hypothesis import given, settings
from hypothesis import strategies as st

import personasteer as ps
from personasteer.engine import TextStream
from personasteer.live import Session, Stream

GREEDY: dict[str, Any] = {"temperature": 0}
PROMPTS = ["the harbour was quiet", "two boats came back", "how deep is it", "a whale sang"]


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Iterator[ps.Model]:
    with ps.Model(tiny_path, n_ctx=256, n_parallel=4, n_threads=2) as opened:
        _ = opened.norms
        yield opened


@pytest.fixture
def session(model: ps.Model) -> Iterator[Session]:
    with model.session(reuse_cache=False) as opened:
        yield opened


def submit(session: Session, k: int = 0, **options: Any) -> Stream:
    return session.submit(prompt=PROMPTS[k], **{"max_tokens": 12, **GREEDY, **options})


def alike(one: ps.Answer, two: ps.Answer) -> bool:
    """Whether two requests computed the same numbers; log p of each token shows what the logits were."""
    return (one.text, one.tokens, one.finish, one.logprobs) == (two.text, two.tokens, two.finish, two.logprobs)


# ---- streaming


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.sampled_from([b"a", b"b", b"ab", b"\xc3", b"\xa4", "ä€".encode(), b"\xff", b""]), max_size=12),
    stops=st.lists(st.sampled_from(["a", "ab", "ba", "aab", "ä", "bä", "€a", "abab"]), max_size=3),
)
def test_streamed_text_is_the_text_up_to_the_first_stop_string_however_it_comes_in_pieces(
    pieces: list[bytes], stops: list[str]
) -> None:
    stream = TextStream(stops)
    text, streamed = b"", ""
    for piece in pieces:  # a request ends with the piece that completes a stop string
        text += piece
        streamed += stream.push(piece)
        ends = [at for s in stops if (at := text.find(s.encode())) >= 0]
        if ends:
            text = text[: min(ends)]
            break
        assert text.decode("utf-8", "replace").startswith(streamed)
        longest = max(map(len, stops), default=0)
        assert len(streamed) >= len(text.decode("utf-8", "ignore")) - longest  # no more is held back than needs be
    assert streamed + stream.finish(text) == text.decode("utf-8", "replace")


def test_the_pieces_of_every_stream_join_to_the_text_of_its_result(session: Session) -> None:
    streams = [submit(session, k, seed=k, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0) for k in range(4)]
    pieces = [list(s) for s in streams]
    for stream, got in zip(streams, pieces, strict=True):
        answer = stream.result()
        assert "".join(got) == answer.text
        assert len(got) > 1
        assert answer.n_prompt == len(session._model.tokenize(PROMPTS[streams.index(stream)]))


def test_a_stream_ends_before_its_stop_string_and_holds_back_what_might_become_one(model: ps.Model) -> None:
    with model.session() as session:
        whole = submit(session, grammar='root ::= "one, two, three"', max_tokens=40).result()
        assert whole.text == "one, two, three"
        for stop, expected in (
            (", th", "one, two"),
            (["zzz", ", t"], "one"),
            ("three", "one, two, "),
            ("one", ""),
            (["", "threes"], "one, two, three"),
            ("e, two, t", "on"),
        ):
            stream = submit(session, grammar='root ::= "one, two, three"', max_tokens=40, stop=stop)
            streamed = ""
            for piece in stream:
                streamed += piece
                assert expected.startswith(streamed)
            assert streamed == expected == stream.result().text
            assert stream.result().finish == "stop"


def test_streams_on_a_real_model_join_to_the_text_with_its_stop_string_cut_off(smollm2_path: Path) -> None:
    with ps.Model(smollm2_path, n_ctx=128, n_parallel=2, n_threads=2) as model, model.session() as session:
        streams = [
            session.submit("Name three colours.", max_tokens=24, temperature=0, stop=stop) for stop in ((), (".", "2"))
        ]
        pieces = [list(s) for s in streams]
        answers = [s.result() for s in streams]
    for got, answer in zip(pieces, answers, strict=True):
        assert "".join(got) == answer.text
    assert answers[1].finish == "stop"
    cut = min(at for stop in (".", "2") if (at := answers[0].text.find(stop)) >= 0)
    assert answers[1].text == answers[0].text[:cut]


def test_requests_join_and_leave_a_running_batch_and_no_more_run_than_fit(model: ps.Model) -> None:
    with model.session(n_parallel=2) as session:
        streams = [submit(session, k, max_tokens=3 + k) for k in range(4)]
        assert session.n_running == 4
        while session.step():
            started = [s for s in streams if s._pieces or s.done]
            assert sum(not s.done for s in started) <= 2
        assert session.n_running == 0
        assert [s.result().finish for s in streams] == ["length"] * 4
        assert [len(s.result().tokens) for s in streams] == [3, 4, 5, 6]
        assert not session.step()  # nothing is left, and that is no error
        again = submit(session, 1)
        session.run()
        assert again.done


# ---- cancel


def test_a_queued_a_running_and_a_finished_request_can_be_cancelled(model: ps.Model) -> None:
    with model.session(n_parallel=1) as session:
        running, queued = submit(session, 0), submit(session, 1)
        while len(running._pieces) < 2:
            session.step()
        queued.cancel()
        assert queued.done
        assert (queued.result().text, queued.result().tokens, queued.result().finish) == ("", [], "cancelled")
        running.cancel()
        answer = running.result()
        assert answer.finish == "cancelled"
        assert 2 <= len(answer.tokens) < 12
        assert "".join(running) == answer.text
        running.cancel()  # twice is once
        assert running.result() is answer
        finished = submit(session, 2)
        whole = finished.result()
        finished.cancel()
        assert finished.result() is whole
        assert whole.finish == "length"
        assert session.n_running == 0


def test_a_cancelled_request_gives_its_place_to_the_next_and_the_others_compute_the_same(model: ps.Model) -> None:
    def others(max_tokens: int) -> list[ps.Answer]:
        with model.session(n_parallel=2, reuse_cache=False) as session:
            stays = submit(session, 0, logprobs=0)
            leaves = submit(session, 1, max_tokens=max_tokens, grammar="root ::= [a-z]*", steer=samples.vector() * 0.2)
            queued = submit(session, 2, logprobs=0)
            while len(leaves._pieces) < 3:
                session.step()
            leaves.cancel()
            assert leaves.result().finish == ("length" if max_tokens == 3 else "cancelled")
            return [stays.result(), queued.result()]

    # the request that would have gone on leaves after the same token as the one that may have no more: the same decodes
    assert all(map(alike, others(3), others(12)))


# ---- errors

BROKEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a prompt that does not fit": ({"prompt": "x" * 300}, ps.ContextError, "room for 256"),
    "a broken grammar": ({"grammar": "root ::= ["}, ps.ArgumentError, "grammar does not parse"),
    "a grammar without a root": ({"grammar": 'top ::= "a"'}, ps.ArgumentError, "'root'"),
    "a grammar that calls itself first": ({"grammar": 'root ::= root "a"'}, ps.ArgumentError, "left recursion"),
    "a grammar that repeats downwards": ({"grammar": 'root ::= "a"{3,2}'}, ps.ArgumentError, r"\{3,2\}"),
    "a grammar with a null character": ({"grammar": '\0root ::= "a"'}, ps.ArgumentError, "null character"),
    "a grammar that is no text": ({"grammar": 5}, ps.ArgumentError, "must be a text"),
    "a grammar and a schema": ({"grammar": "root ::= [a]", "json_schema": {}}, ps.ArgumentError, "exclude"),
    "a schema that is no JSON": ({"json_schema": "{"}, ps.ArgumentError, "json_schema"),
    "a schema that is no object": ({"json_schema": "[]"}, ps.ArgumentError, "no object"),
    "a schema of an unknown type": ({"json_schema": {"type": "x"}}, ps.ArgumentError, "json_schema"),
    "a schema that JSON does not know": ({"json_schema": {"type": object()}}, ps.ArgumentError, "json_schema"),
    "no token": ({"max_tokens": 0}, ps.ArgumentError, "max_tokens"),
    "a negative temperature": ({"temperature": -0.1}, ps.ArgumentError, "temperature"),
    "a top_p that is no number": ({"top_p": float("nan")}, ps.ArgumentError, "top_p"),
    "no repetition penalty": ({"repeat_penalty": 0.0}, ps.ArgumentError, "repeat_penalty"),
    "too many log-probabilities": ({"logprobs": 101}, ps.ArgumentError, "logprobs"),
    "a stop string of bytes": ({"stop": [b"x"]}, ps.ArgumentError, "stop must be"),
    "a reading of nothing": ({"readings": ["x"]}, ps.ArgumentError, "readings takes"),
    "a reading without a layer": ({"readings": [samples.vector(layers=())]}, ps.ArgumentError, "no layer"),
    "a reading at a missing layer": ({"readings": [(samples.vector(), [9])]}, ps.VectorError, "9 is out of range"),
    "a direction at a missing block": ({"readings": [{9: [1.0] * 64}]}, ps.VectorError, "block 9 to read is out of"),
    "a direction at no block": ({"readings": [{"a": [1.0] * 64}]}, ps.VectorError, "block 'a' to read is out of"),
    "a direction of another width": ({"readings": [{1: [1.0] * 3}]}, ps.VectorError, "64 finite numbers"),
    "a direction that is not finite": ({"readings": [{1: [np.nan] * 64}]}, ps.VectorError, "64 finite numbers"),
    "a direction of words": ({"readings": [{1: "ab"}]}, ps.VectorError, "must be numbers, not str"),
    "a reading of another width": ({"readings": [samples.vector(n_embd=32)]}, ps.IncompatibleVector, "width 32"),
    "a bare vector": ({"steer": samples.vector()}, ps.ArgumentError, "bare PersonaVector"),
    "a vector of another model": ({"steer": samples.vector(n_embd=32) * 0.1}, ps.IncompatibleVector, "width 32"),
    "a cap without thresholds": ({"steer": ps.Cap(samples.vector())}, ps.VectorError, "thresholds"),
    "neither conversation nor prompt": ({"prompt": None}, ps.ArgumentError, "one of the two"),
    "both": ({"conversation": "hi"}, ps.ArgumentError, "one of the two"),
    "a prompt with a system message": ({"system": "be brief"}, ps.ArgumentError, "no system message"),
    "an unknown option": ({"temprature": 1.0}, TypeError, "temprature"),
}


def test_requests_that_are_refused_leave_the_running_ones_exactly_as_they_are(model: ps.Model) -> None:
    def answers(disturbances: list[tuple[dict[str, Any], type[Exception], str]]) -> list[ps.Answer]:
        with model.session(reuse_cache=False) as session:
            streams = [
                submit(session, k, max_tokens=40, logprobs=0, steer=samples.vector(seed=k) * 0.2) for k in range(2)
            ]
            for options, error, message in disturbances:
                session.step()
                with pytest.raises(error, match=message) as caught:
                    session.submit(**{"prompt": "hi", "max_tokens": 3, **options})
                assert "\n" not in str(caught.value)
                assert session.n_running == 2
            return [s.result() for s in streams]

    assert all(map(alike, answers(list(BROKEN.values())), answers([])))


def test_a_request_whose_grammar_has_no_way_on_fails_alone(model: ps.Model) -> None:
    def others(grammar: str) -> tuple[list[ps.Answer], Stream]:
        with model.session(reuse_cache=False) as session:
            streams = [submit(session, k, logprobs=0) for k in range(2)]
            third = submit(session, 2, grammar=grammar, max_tokens=3)
            return [s.result() for s in streams], third

    ends, whole = others('root ::= "aaa"')
    fails, dead = others('root ::= "aa" <[999]>')  # a token that the vocabulary lacks
    assert whole.result().text == "aaa"
    for read in (list, Stream.result, Stream.result):
        with pytest.raises(ps.ModelError, match="the grammar allows no token here"):
            read(dead)
    assert all(map(alike, ends, fails))  # the third left after the same decode, this way or that


def test_a_request_that_outgrows_the_context_ends_there_and_the_others_go_on(model: ps.Model) -> None:
    with model.session(n_ctx=32, n_parallel=2) as session:
        grammar = "root ::= [a-z]*"  # never an end-of-turn token
        long, short = submit(session, 0, max_tokens=500, grammar=grammar), submit(session, 1, max_tokens=4)
        queued = submit(session, 2, max_tokens=4)
        n_prompt = long.result().n_prompt
        assert long.result().finish == "length"
        assert len(long.result().tokens) == 32 - n_prompt
        assert [s.result().finish for s in (short, queued)] == ["length", "length"]


# ---- interrupts and the end


def assert_usable(session: Session) -> None:
    assert session.n_running == 0
    assert submit(session, 1).result().text == submit(session, 1).result().text != ""


def test_an_interrupt_right_after_a_decode_drops_all_requests_and_the_session_goes_on(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        """Python looks at signals when the decode has returned: that is where a handler of its own raises."""

        def __init__(self, native: Any) -> None:
            self.native = native

        def __getattr__(self, name: str) -> Any:
            return getattr(self.native, name)

        def step(self, decide: Any) -> Any:
            self.native.step(decide)
            raise KeyboardInterrupt

    streams = [submit(session, k) for k in range(2)]
    session.step()
    with monkeypatch.context() as patch:
        patch.setattr(session, "_native", Interrupted(session._native))
        with pytest.raises(KeyboardInterrupt):
            list(streams[0])
    for stream in streams:
        with pytest.raises(ps.ModelError, match="interrupted"):
            stream.result()
    assert_usable(session)


def test_ctrl_c_during_a_long_decode_stops_it_and_leaves_the_session_usable(smollm2_path: Path) -> None:
    def on_alarm(*_: object) -> None:
        raise KeyboardInterrupt

    with ps.Model(smollm2_path, n_ctx=1024, n_batch=1024, n_parallel=1, n_threads=2) as model:
        with model.session(reuse_cache=False) as session:
            assert session.submit(prompt="One two", max_tokens=2, temperature=0).result().finish == "length"
            stream = session.submit(prompt="The harbour was quiet in the morning. " * 110, max_tokens=2)
            before = signal.signal(signal.SIGALRM, on_alarm)
            try:
                begin = time.monotonic()
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                with pytest.raises(KeyboardInterrupt):
                    stream.result()
                interrupted_after = time.monotonic() - begin
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            with pytest.raises(ps.ModelError, match="interrupted"):
                stream.result()
            assert interrupted_after < 1.5  # the whole prompt takes longer
            assert session.n_running == 0
            assert session.submit(prompt="One two", max_tokens=2, temperature=0).result().finish == "length"
        assert model.generate("One two", max_tokens=1, temperature=0) is not None


def test_a_request_whose_own_decision_fails_fails_alone(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ps.VectorError("no such decision")

    gate = ps.When(samples.vector(), samples.vector() * 0.1, threshold=np.zeros(4))
    asks, other = submit(session, 0, steer=gate), submit(session, 1)
    monkeypatch.setattr(asks._compiled, "decide", fail)
    assert other.result().finish == "length"
    with pytest.raises(ps.VectorError, match="no such decision"):
        list(asks)
    with pytest.raises(ps.VectorError, match="no such decision"):
        asks.result()
    assert session.n_running == 0
    assert_usable(session)


def test_a_request_whose_observer_fails_fails_alone(session: Session) -> None:
    class Fails:
        def at_prompt(self, readings: list[np.ndarray], n_prompt: int) -> ps.Steering:
            return ps.Steering()

        def after_token(self, stream: Stream) -> None:
            if len(stream.tokens()) == 3:
                raise ps.VectorError("not with these edits")

    asks, other = submit(session, 0, observer=Fails()), submit(session, 1)
    assert other.result().finish == "length"
    with pytest.raises(ps.VectorError, match="not with these edits"):
        asks.result()
    assert len(asks.tokens()) == 3
    assert_usable(session)


def test_an_error_in_a_decode_reaches_every_stream_and_the_session_goes_on(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ps.ModelError("the device is gone")

    one, other = submit(session, 0), submit(session, 1)
    monkeypatch.setattr(session, "_collect", fail)
    with pytest.raises(ps.ModelError, match="the device is gone"):
        other.result()
    monkeypatch.undo()
    for stream in (one, other):
        with pytest.raises(ps.ModelError, match="the device is gone"):
            list(stream)
    assert_usable(session)


def test_a_closed_session_says_so_and_its_streams_end(model: ps.Model) -> None:
    session = model.session()
    done = submit(session, 0)
    assert done.result().finish == "length"
    running = submit(session, 1)
    session.step()
    session.close()
    session.close()
    assert "".join(done) == done.result().text
    with pytest.raises(ps.ModelError, match="session is closed"):
        running.result()
    for call in (session.step, session.run, lambda: submit(session), lambda: running.steer(None)):
        with pytest.raises(ps.ModelError, match="session is closed"):
            call()
    running.cancel()
    assert running.readings() == []
    with model.session() as another:
        assert_usable(another)


def test_closing_the_model_closes_its_sessions(tiny_path: Path) -> None:
    model = ps.Model(tiny_path, n_ctx=64, n_parallel=2, n_threads=2)
    sessions = [model.session(), model.session()]
    streams = [submit(s) for s in sessions]
    sessions[0].step()
    model.close()
    for session, stream in zip(sessions, streams, strict=True):
        assert session._native is None  # what holds the file's memory
        with pytest.raises(ps.ModelError, match="closed"):
            stream.result()
        with pytest.raises(ps.ModelError, match="the model is closed"):
            submit(session)
        stream.cancel()
        session.close()
    with pytest.raises(ps.ModelError, match="the model is closed"):
        model.session()


@pytest.mark.parametrize("option", [{"n_ctx": 7}, {"n_ctx": 0}, {"n_parallel": 0}, {"n_parallel": 257}])
def test_sizes_of_a_session_outside_their_range_are_refused(model: ps.Model, option: dict[str, int]) -> None:
    (name,) = option
    with pytest.raises(ps.ArgumentError, match=name):
        model.session(**option)


# ---- threads


def test_threads_iterate_over_their_own_streams_of_one_session(model: ps.Model) -> None:
    # which requests share a decode depends on the threads, and rounding on that: the texts are prescribed
    expected = [f"{word} " * 12 for word in ("whale", "harbour", "boat", "sea")]
    for _ in range(5):
        with model.session(n_parallel=2, reuse_cache=False) as session:
            texts: list[list[str]] = [[] for _ in expected]

            def read(k: int, session: Session = session, texts: list[list[str]] = texts) -> None:
                texts[k].extend(submit(session, k, max_tokens=200, grammar=f'root ::= "{expected[k]}"'))

            threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert ["".join(pieces) for pieces in texts] == expected
            assert session.n_running == 0


def test_a_session_and_a_call_of_the_model_in_another_thread_take_turns(model: ps.Model) -> None:
    expected = model.generate(PROMPTS[0], max_tokens=30, temperature=0)
    texts: list[str] = []
    with model.session(reuse_cache=False) as session:
        stream = submit(session, 1, max_tokens=100, grammar="root ::= [a-z]*")
        thread = threading.Thread(target=lambda: texts.append(model.generate(PROMPTS[0], max_tokens=30, temperature=0)))
        next(iter(stream))
        thread.start()
        assert len(stream.result().tokens) == 100
        thread.join(60)
    assert texts == [expected]


def test_a_callback_of_a_running_computation_cannot_step_a_session_of_the_same_model(model: ps.Model) -> None:
    with model.session() as session:
        stream = submit(session)
        failures: list[str] = []

        def step(_: str) -> None:
            try:
                session.step()
            except ps.ModelError as e:
                failures.append(str(e))

        assert model.generate(PROMPTS[1], max_tokens=3, temperature=0, on_token=lambda _, piece: step(piece)) != ""
        assert failures
        assert all("cannot start another" in f for f in failures)
        assert stream.result().finish == "length"


# ---- what is there before the end


def test_tokens_and_text_can_be_taken_while_others_compute(session: Session) -> None:
    one, other = submit(session, 0, logprobs=2), submit(session, 1)
    taken, seen = "", []
    while session.step():
        taken += one.take()
        seen += one.tokens(len(seen))
    taken += one.take()
    seen += one.tokens(len(seen))
    answer = one.result()
    assert taken == answer.text
    assert [t for t, _, _ in seen] == answer.tokens
    assert [p for _, p, _ in seen] == answer.logprobs
    assert [top for _, _, top in seen] == answer.top_logprobs
    assert one.take() == ""
    assert [top for _, _, top in other.tokens()] == [[]] * 12
    assert np.isnan([p for _, p, _ in other.tokens()]).all()


# ---- penalties and biases


@pytest.mark.parametrize(("frequency", "presence"), [(0.4, 0.0), (0.0, 1.5), (0.3, 0.7), (-0.5, 0.0)])
def test_penalties_are_off_the_logit_for_each_time_a_token_was_there(
    session: Session, model: ps.Model, frequency: float, presence: float
) -> None:
    prompt = model.tokenize(PROMPTS[0])
    answer = submit(
        session, max_tokens=30, logprobs=100, frequency_penalty=frequency, presence_penalty=presence
    ).result()
    said: list[int] = []
    for token, top in zip(answer.tokens, answer.top_logprobs or [], strict=True):
        last = (prompt + said)[-64:]
        scores = {t: p - frequency * last.count(t) - presence * (t in last) for t, p in top}
        assert scores[token] == pytest.approx(max(scores.values()), abs=1e-4)
        said.append(token)
    assert said != submit(session, max_tokens=30).result().tokens


def test_a_bias_is_added_to_the_logit(session: Session) -> None:
    plain = submit(session, logprobs=5).result()
    assert plain.top_logprobs
    first, second = (t for t, _ in plain.top_logprobs[0][:2])
    assert submit(session, logit_bias={first: -np.inf}).result().tokens[0] == second
    assert set(submit(session, logit_bias={second: 100.0}).result().tokens) == {second}
    for wrong in ({-1: 1.0}, {10**6: 1.0}, {first: float("nan")}, {first: np.inf}):
        with pytest.raises(ps.ArgumentError, match="logit_bias"):
            submit(session, logit_bias=wrong)


def test_a_prompt_may_be_tokens(session: Session, model: ps.Model) -> None:
    tokens = model.tokenize(PROMPTS[0])
    assert alike(session.submit(prompt=tokens, max_tokens=12, **GREEDY).result(), submit(session).result())
    with pytest.raises(ps.ArgumentError, match="no token 100000"):
        session.submit(prompt=[1, 100000])
