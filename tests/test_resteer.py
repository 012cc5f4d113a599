"""Other steering in the middle of a request, and which computed text a later request may take over.

As in test_scopes: a request that reads the output of its edited block number by number, and keeps it raw after the
edits, shows exactly what each token got.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import samples
from live_requests import basis, before_edits, steerable, submit, vector_for

import personasteer as ps
from personasteer import _core
from personasteer.engine import Compiled, Request, Sampling
from personasteer.live import Session, Stream

if TYPE_CHECKING:
    from conftest import Loaded

IL = 2
GREEDY = Sampling(temperature=0)
PROMPT = "the harbour was quiet in the morning"
OPEN = np.full(4, -1e3)


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Iterator[ps.Model]:
    with ps.Model(tiny_path, n_ctx=256, n_parallel=2, n_threads=2) as opened:
        yield opened


@pytest.fixture
def session(model: ps.Model) -> Iterator[Session]:
    with model.session() as opened:
        yield opened


# ---- what each token gets


def add(loaded: Loaded, strength: float, **where: Any) -> ps.Add:
    return ps.Add(vector_for(loaded, 0), strength, raw=True, layers=(IL,), **where)


class Play:
    """One request on a native session, stepped and steered by hand."""

    def __init__(self, loaded: Loaded, *edits: Any, n: int = 6, n_new: int = 8, n_batch: int = 64, **more: Any) -> None:
        self.loaded = loaded
        self.session = loaded.session(n_batch=n_batch, native=more.pop("native", False))
        self.session.set_taps(raw_layers=[IL])
        request = Request(loaded.tokens(n), n, ps.Steering(edits), n_new, GREEDY, raw=(0, n + n_new),
                          reads=basis(loaded, IL), ignore_end=True, **more)  # fmt: skip
        self.compiled = Compiled(request, steerable(loaded))
        self.id = self.session.submit(**self.compiled.arguments(0))

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            self.session.step()

    def steer(self, *edits: Any) -> bool:
        return bool(self.session.steer(id=self.id, **self.compiled.resteer(ps.Steering(edits))))

    def strengths(self) -> list[float]:
        """How often the vector was added to each token, and exactly so."""
        while self.session.busy:
            self.session.step()
        (result,) = self.session.take_results()
        h, v = before_edits(result), vector_for(self.loaded, 0).directions[IL]
        found = []
        for before, after in zip(h, result["raw"][0], strict=True):
            amount = float(np.round((after - before) @ v / (v @ v), 3))
            assert np.array_equal(after, before + np.float32(amount) * v)
            found.append(amount)
        return found


@pytest.mark.parametrize("native", [False, True], ids=["fused", "generic"])
def test_other_steering_counts_from_the_next_token_on_and_old_tokens_keep_theirs(tiny: Loaded, native: bool) -> None:
    play = Play(tiny, add(tiny, 1.0), native=native)
    play.step(3)  # the prompt's 6 tokens and two generated ones; a third is sampled
    assert play.steer(add(tiny, -2.0))
    play.step()
    assert play.steer()
    play.step(2)
    assert play.steer(add(tiny, 0.5))
    assert play.strengths() == [1.0] * 8 + [-2.0] + [0.0] * 2 + [0.5] * 3
    assert not play.steer(add(tiny, 1.0))  # it is over


@pytest.mark.parametrize("name", ["recurrent", "hybrid", "sliding", "smollm2"])
def test_other_steering_counts_from_the_next_token_on_on_any_kind_of_memory(
    name: str, request: pytest.FixtureRequest
) -> None:
    loaded: Loaded = request.getfixturevalue(name)
    play = Play(loaded, add(loaded, 1.0), n_new=4)
    play.step(2)
    assert play.steer(add(loaded, -2.0))
    assert play.strengths() == [1.0] * 7 + [-2.0] * 3


def test_a_prompt_that_is_half_read_is_steered_anew_from_its_next_token_on(tiny: Loaded) -> None:
    play = Play(tiny, add(tiny, 1.0), n=12, n_new=2, n_batch=5)
    play.step()
    play.steer(add(tiny, 2.0, scope="prompt"), add(tiny, -1.0, scope=(11,)))
    assert play.strengths() == [1.0] * 5 + [2.0] * 6 + [-1.0] + [0.0] * 2


def test_a_queued_request_is_steered_from_its_first_token_on(tiny: Loaded) -> None:
    play = Play(tiny, add(tiny, 1.0), n_new=2)
    assert play.steer(add(tiny, 2.0))
    assert play.strengths() == [2.0] * 8


def test_a_schedule_given_later_still_counts_from_the_response(tiny: Loaded) -> None:
    play = Play(tiny, n_new=6)  # the last of 6 given tokens is j = 0, the k-th generated one j = k
    play.step(2)
    play.steer(add(tiny, 1.0, start=4), add(tiny, 2.0, stop=3))
    assert play.strengths() == [0.0] * 7 + [2.0] + [0.0] + [1.0] * 3


def test_a_marker_that_closes_a_thinking_block_belongs_to_it_under_steering_given_right_after_it(tiny: Loaded) -> None:
    marked = {"think_marks": ("<t>", "</t>"), "thinking": True, "grammar": 'root ::= "ab</t>cd"'}
    roles = {"thinking": np.zeros(6, bool)}
    for when in range(1, 8):  # after each token
        play = Play(tiny, roles=roles, **marked)
        play.step(when)
        play.steer(add(tiny, 1.0, scope="thinking"))
        expected = [0.0] * 6 + [1.0] * 6 + [0.0] * 2
        expected[: 5 + when] = [0.0] * (5 + when)
        assert play.strengths() == expected, when


def test_changes_of_strength_build_no_graph(tiny: Loaded) -> None:
    for native in (False, True):
        play = Play(tiny, add(tiny, 1.0), n_new=20, native=native)
        play.step(2)  # the prompt, the first single token
        builds = []
        for k in range(12):
            play.steer(add(tiny, 0.25 * k), ps.Add(vector_for(tiny, k), 0.1, layers=(IL,)))
            play.step()
            builds.append((play.session.n_builds, play.session.n_attachments))
        assert len(set(builds)) == 1
        play.steer(add(tiny, 1.0), ps.Add(vector_for(tiny, 0), 0.1, layers=(1,)))  # another block is another graph
        play.step()
        assert play.session.n_attachments == builds[-1][1] + 1


# ---- through a session


def text_at(session: Session, stream: Stream, n: int) -> None:
    """Step until a stream has n tokens."""
    while len(stream._pieces) < n and not stream.done:
        session.step()


def stream_of(session: Session, **options: Any) -> Stream:
    grammar = "root ::= [a-z]*"  # a piece of text for each token, no end
    return session.submit(prompt=PROMPT, **{"max_tokens": 12, "temperature": 0, "grammar": grammar, **options})


def test_steering_a_stream_changes_its_next_tokens_only(model: ps.Model) -> None:
    strong = ps.Add(samples.vector(), 25.0, raw=True, layers=(0,))

    def logprobs(n_before: int, steer: Any) -> Any:
        with model.session(reuse_cache=False) as session:
            stream = stream_of(session, logprobs=3)
            text_at(session, stream, n_before)
            stream.steer(steer)
            answer = stream.result()
            assert answer.rho == pytest.approx(0.0 if steer is None else ps.Steering([strong]).rho(model))
            return answer.logprobs, answer.top_logprobs

    plain, _ = logprobs(0, None)
    for n_before in (1, 4, 8):
        steered, top = logprobs(n_before, strong)
        assert steered[:n_before] == plain[:n_before]
        assert all(a != b for a, b in zip(steered[n_before:], plain[n_before:], strict=True))
        assert logprobs(n_before, [strong])[1] == top
    assert logprobs(4, None)[0] == plain


def test_the_dose_of_an_answer_is_the_largest_that_a_token_got(model: ps.Model, session: Session) -> None:
    vector = samples.vector()
    stream = stream_of(session, steer=vector * 0.2)
    text_at(session, stream, 2)
    stream.steer(vector * -0.4)
    text_at(session, stream, 4)
    stream.steer(None)
    assert stream.rho == stream.result().rho == pytest.approx(0.4)
    stream.steer(vector * 0.1)  # without effect on a finished request
    assert stream.rho == pytest.approx(0.4)


def test_steering_given_before_the_prompt_is_read_stands_whatever_a_condition_would_have_said(model: ps.Model) -> None:
    vector = samples.vector(seed=5)
    gate = ps.When(samples.vector(), ps.Add(vector, 0.4), threshold=OPEN)

    def logprobs(steer: Any, later: Any = ()) -> Any:
        with model.session(reuse_cache=False) as session:
            stream = stream_of(session, steer=steer, logprobs=0)
            if later != ():
                stream.steer(later)
            return stream.result().logprobs

    assert logprobs(gate, None) == logprobs(None)
    assert logprobs(gate, vector * -0.2) == logprobs(vector * -0.2)
    assert logprobs(gate) != logprobs(None)


def test_a_condition_on_the_prompt_comes_too_late_for_a_running_request(session: Session) -> None:
    stream = stream_of(session)
    text_at(session, stream, 2)
    edit = samples.vector() * 0.2
    with pytest.raises(ps.ArgumentError, match="too late"):
        stream.steer(ps.When(samples.vector(), edit, threshold=OPEN))
    with pytest.raises(ps.ArgumentError, match="bare PersonaVector"):
        stream.steer(samples.vector())
    with pytest.raises(ps.IncompatibleVector):
        stream.steer(samples.vector(n_embd=32) * 0.1)
    stream.steer(ps.When(samples.vector(), edit, threshold=OPEN, on="token"))
    assert stream.result().rho > 0


def test_a_conversation_can_be_steered_by_role_and_thinking_later_and_a_plain_prompt_cannot(model: ps.Model) -> None:
    strong = ps.Add(samples.vector(), 25.0, raw=True, layers=(0,), scope="assistant")

    def logprobs(steer: Any) -> list[float]:
        with model.session(reuse_cache=False) as session:
            stream = session.submit("how deep", max_tokens=8, temperature=0, logprobs=0)
            session.step()
            stream.steer(steer)
            return stream.result().logprobs or []

    plain, steered = logprobs(None), logprobs(strong)
    assert steered[0] == plain[0]
    assert all(a != b for a, b in zip(steered[1:], plain[1:], strict=False))
    with model.session() as session, pytest.raises(ps.ArgumentError, match="needs messages"):
        stream_of(session).steer(strong)


# ---- what a later request takes over

EDIT = ps.Add(samples.vector(), 0.3)
KINDS: dict[str, Any] = {
    "unsteered": None,
    "all": EDIT,
    "all, weaker": EDIT * 0.5,
    "response": ps.Add(samples.vector(), 0.3, scope="response"),
    "response, weaker": ps.Add(samples.vector(), 0.15, scope="response"),
    "prompt": ps.Add(samples.vector(), 0.3, scope="prompt"),
    "all, fading": ps.Add(samples.vector(), 0.3, half_life=2.0),
    "closed gate": ps.When(samples.vector(), EDIT, threshold=-OPEN),
    "open gate": ps.When(samples.vector(), EDIT, threshold=OPEN),
}
SHARING = [{"unsteered", "response", "response, weaker", "closed gate", "open gate"}, {"all", "prompt"}]


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_a_prompt_is_taken_over_where_its_tokens_had_the_same_steering_and_never_else(
    session: Session, first: str, second: str
) -> None:
    n_prompt = stream_of(session, steer=KINDS[first]).result().n_prompt
    answer = stream_of(session, steer=KINDS[second], logprobs=0).result()
    same = first == second or any({first, second} <= kinds for kinds in SHARING)
    reads = "gate" in second  # a request that reads every token computes every token
    assert answer.n_reused == (n_prompt - 1 if same and not reads else 0)
    with session._model.session(reuse_cache=False) as fresh:
        expected = stream_of(fresh, steer=KINDS[second], logprobs=0).result()
    # other shapes round otherwise; a prompt under other steering changes the logits by more, see below
    assert np.abs(np.subtract(answer.logprobs, expected.logprobs)).max() < 0.02


def test_text_taken_over_from_under_other_steering_would_show(tiny: Loaded) -> None:
    # two additions under one key: what the cache must never take for the same
    tokens, data = tiny.tokens(20), vector_for(tiny, 0).directions
    mixes = [_core.Mix(key=7, layers=[1, 2], data=strength * data[[1, 2]]) for strength in (0.3, -0.3)]

    def last_logits(*run: Any) -> np.ndarray:
        session = tiny.session()
        for mix in run:
            session.submit(tokens=tokens, outputs=(19, 20), keep_logits=True, mixes=[mix], mix_of_token=[0] * 20,
                           reuse_prefix=True)  # fmt: skip
            while session.busy:
                session.step()
            (result,) = session.take_results()
        return np.asarray(result["logits"])

    right = last_logits(mixes[1])
    assert np.abs(last_logits(mixes[1], mixes[1]) - right).max() < 0.02
    assert np.abs(last_logits(*mixes) - right).max() > 0.5


def taken_over(loaded: Loaded, edits: Sequence[Any], then: Sequence[Any], **more: Any) -> tuple[int, list[int]]:
    """How many tokens a text takes over that continues prompt and answer of an earlier one; the lengths of both."""
    session = loaded.session()
    n, n_new = 10, 6
    first = Request(loaded.tokens(n), n, ps.Steering(edits), n_new, GREEDY, ignore_end=True)
    steered = Compiled(first, steerable(loaded))
    decided = steered._native(steered._compile(ps.Steering(more["decided"]))) if "decided" in more else None
    first_id = session.submit(**steered.arguments(0) | {"decides": decided is not None})
    n_steps = 0
    while session.busy:
        session.step(lambda *_: tuple(decided.values()) if decided else None)
        n_steps += 1
        if n_steps == more.get("resteer_after"):
            session.steer(id=first_id, **steered.resteer(ps.Steering(more["resteer"])))
    (result,) = session.take_results()
    whole = [*loaded.tokens(n), *result["tokens"], 5, 6]
    second = Request(whole, more.get("n_prompt", len(whole)), ps.Steering(then), 1, GREEDY, share_prefix=True)
    submit(session, loaded, second)
    while session.busy:
        session.step()
    (result,) = session.take_results()
    return result["n_reused"], [n, n + n_new]


def test_a_continuation_takes_over_prompt_and_answer_as_far_as_their_steering_agrees(tiny: Loaded) -> None:
    def edit(strength: float, **more: Any) -> list[Any]:
        return [ps.Add(vector_for(tiny, 0), strength, **more)]

    # of the first text all but its last token are in the cache: nothing was sampled from that
    all_but_one = 15
    assert taken_over(tiny, [], []) == (all_but_one, [10, 16])
    assert taken_over(tiny, edit(0.2), edit(0.2))[0] == all_but_one
    assert taken_over(tiny, edit(0.2), edit(0.3))[0] == 0
    assert taken_over(tiny, edit(0.2), [])[0] == 0
    assert taken_over(tiny, [], edit(0.2, scope="response"))[0] == all_but_one
    # the answer becomes prompt: what was steered as a response is not shared with an unsteered prompt
    assert taken_over(tiny, edit(0.2, scope="response"), edit(0.2, scope="response"))[0] == 9
    assert taken_over(tiny, edit(0.2, scope="response"), edit(0.2, scope="response"), n_prompt=10)[0] == all_but_one
    assert taken_over(tiny, edit(0.2, start=3), [])[0] == 12
    assert taken_over(tiny, edit(0.2), edit(0.2, stop=-4))[0] == 13


def test_a_fading_edit_has_a_key_for_each_token_of_the_response(tiny: Loaded) -> None:
    fading = [ps.Add(vector_for(tiny, 0), 0.2, half_life=3.0)]
    # as prompt, the answer's tokens have the whole strength; only the response's first token, j = 0, had that before
    assert taken_over(tiny, fading, fading)[0] == 10
    assert taken_over(tiny, fading, fading, n_prompt=10)[0] == 15  # each token has the same j again
    assert taken_over(tiny, fading, fading, n_prompt=9)[0] == 9
    slower = [ps.Add(vector_for(tiny, 0), 0.2, half_life=4.0)]
    assert taken_over(tiny, fading, slower, n_prompt=10)[0] == 0


def test_what_was_steered_midway_is_taken_over_up_to_there(tiny: Loaded) -> None:
    one, two = ([ps.Add(vector_for(tiny, 0), strength)] for strength in (0.2, 0.3))
    # after three decodes the prompt's 10 tokens and two generated ones are computed
    assert taken_over(tiny, one, one, resteer_after=3, resteer=two)[0] == 12
    assert taken_over(tiny, one, two, resteer_after=3, resteer=two)[0] == 0
    assert taken_over(tiny, one, one, resteer_after=3, resteer=one)[0] == 15


def test_what_a_decision_on_the_prompt_steered_is_taken_over_as_steered(tiny: Loaded) -> None:
    response = [ps.Add(vector_for(tiny, 0), 0.2, scope="response")]
    assert taken_over(tiny, [], [], decided=response)[0] == 9  # the prompt's last token begins the response
    assert taken_over(tiny, [], response, n_prompt=10, decided=response)[0] == 15


def test_a_request_under_the_steering_of_a_running_one_shares_its_prompt(session: Session) -> None:
    one = stream_of(session, steer=KINDS["response"])
    text_at(session, one, 2)
    two = stream_of(session, steer=KINDS["response, weaker"])
    other = stream_of(session, steer=KINDS["all"])
    n = one.result().n_prompt
    assert [s.result().n_reused for s in (one, two, other)] == [0, n - 1, 0]


def test_a_session_may_be_told_to_take_nothing_over(model: ps.Model) -> None:
    with model.session(reuse_cache=False) as session:
        assert [stream_of(session).result().n_reused for _ in range(2)] == [0, 0]
        assert stream_of(session, reuse_cache=True).result().n_reused > 0
    with model.session() as session:
        stream_of(session)
        assert stream_of(session, reuse_cache=False).result().n_reused == 0
