"""Model on the tiny random llama: what the user calls, end to end. One thread, so that a busy machine does no harm."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import oracle
import pytest
import samples

import personasteer as ps
from personasteer.derive import elicit
from personasteer.derive.directions import choose_layers
from personasteer.engine import Request, Sampling, Taps
from personasteer.identity import differences, identify
from personasteer.tiny_model import TEMPLATE, write_tiny_model
from personasteer.traits import neutral_pairs

if TYPE_CHECKING:
    from conftest import Loaded

PAIR = ("How deep is the water?", "Nine metres, he said.")
TEXTS = ["The harbour was quiet in the morning.", "Two boats came back", "A whale can be lonely; it sang."]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 16}


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Iterator[ps.Model]:
    with ps.Model(tiny_path, n_ctx=512, n_threads=1) as m:
        yield m


def opened(path: Path, **options: Any) -> ps.Model:
    return ps.Model(path, **{"n_ctx": 512, "n_threads": 1, **options})


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(map(np.array_equal, a, b))


# ---- logits


def test_logits_have_a_row_per_token_and_are_bit_identical_unsteered_at_strength_0_and_after_steering(
    model: ps.Model,
) -> None:
    v = samples.vector()
    model.detach()
    unsteered = model.logits(TEXTS)
    zero = model.logits(TEXTS, steer=v * 0.0)
    steered = model.logits(TEXTS, steer=v * 0.4)
    back = model.logits(TEXTS)
    back_at_zero = model.logits(TEXTS, steer=[v * 0.0, None, v * 0.4 + v * -0.4])
    model.detach()
    assert model.hook_bytes == 0
    detached = model.logits(TEXTS)
    assert [x.shape for x in unsteered] == [(len(model.tokenize(t)), 286) for t in TEXTS]
    assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in unsteered)
    for other in (zero, back, back_at_zero, detached):
        assert same(other, unsteered)
    for a, b in zip(steered, unsteered, strict=True):
        assert (np.abs(a - b).max(axis=1) > 1e-3).all()


def test_each_request_of_a_call_has_its_own_steering_and_never_feels_that_of_the_others(model: ps.Model) -> None:
    a, b, c = (samples.vector(seed=s) * 0.4 for s in range(3))
    alike = {x: model.logits(TEXTS, steer=y) for x, y in (("a", a), ("b", b), ("c", c), ("-", None))}
    for choice in ("abc", "-bc", "a-a", "cba", "bb-"):
        steer = [{"a": a, "b": b, "c": c, "-": None}[x] for x in choice]
        for q, got in enumerate(model.logits(TEXTS, steer=steer)):
            assert np.array_equal(got, alike[choice[q]][q]), (choice, q)
    assert not np.array_equal(alike["a"][0], alike["b"][0])


def test_one_steering_of_two_edits_is_the_sum_of_both(model: ps.Model) -> None:
    u, v = samples.vector(seed=1), samples.vector(seed=2)
    rows = {il: 0.15 * float(model.norms[il]) * sum(
        x.directions[il].astype(np.float64) / np.linalg.norm(x.directions[il].astype(np.float64)) for x in (u, v)
    ) for il in (1, 2)}  # fmt: skip
    data = np.zeros((4, 64), np.float32)
    for il, row in rows.items():
        data[il] = row
    by_hand = ps.Add(ps.PersonaVector(data, (1, 2)), 1.0, raw=True)
    got, expected = model.logits(TEXTS, steer=u * 0.3 + v * 0.3), model.logits(TEXTS, steer=by_hand)
    for x, y in zip(got, expected, strict=True):  # the rows may differ in their last float32 bit
        np.testing.assert_allclose(x, y, atol=1e-4)
    assert same(model.logits(TEXTS, steer=[u * 0.3 + v * 0.3] * 3), got)


def test_a_raw_text_is_all_prompt_and_positions_steer_from_there_on(model: ps.Model) -> None:
    v = samples.vector()
    text = TEXTS[:1]
    (unsteered,), (everywhere,) = model.logits(text), model.logits(text, steer=v * 0.4)
    for scope, expected in (("response", unsteered), ("prompt", everywhere), ("all", everywhere)):
        assert np.array_equal(model.logits(text, steer=ps.Add(v, 0.4, scope=scope))[0], expected), scope
    (at_5,) = model.logits(text, steer=ps.Add(v, 0.4, scope=(5,)))
    assert np.array_equal(at_5[:5], unsteered[:5])
    assert (np.abs(at_5[5:] - unsteered[5:]).max(axis=1) > 1e-6).all()
    assert not np.array_equal(at_5[5:], everywhere[5:])


def test_a_call_without_texts_is_an_empty_list(model: ps.Model) -> None:
    assert model.logits([]) == []
    assert model.chat_batch([]) == []
    assert model.capture([]).shape == (0, 4, 64)
    assert model.capture([], pool="raw") == []


@pytest.mark.parametrize("bad", ["one string", [1], [None]])
def test_texts_are_a_list_of_strings(model: ps.Model, bad: Any) -> None:
    with pytest.raises(ps.ArgumentError, match="list of strings"):
        model.logits(bad)


# ---- capture


def test_capture_means_last_tokens_and_raw_rows_agree(model: ps.Model) -> None:
    items = [PAIR, ("And how cold?", "Cold.")]
    raw = model.capture(items, pool="raw", last_layer=True)
    mean = model.capture(items, last_layer=True)
    last = model.capture(items, pool="last")
    assert mean.shape == last.shape == (2, 4, 64)
    assert [r.shape for r in raw] == [(len(model.tokenize(a, add_special=False)), 4, 64) for _, a in items]
    for i, r in enumerate(raw):
        # float32 sums of about twenty rows in another order: below 20 eps of the sum of magnitudes
        bound = 20 * 6e-8 * np.abs(r).mean(0)
        assert (np.abs(mean[i] - r.mean(0, dtype=np.float64)) <= bound).all()
        assert np.array_equal(last[i, :3], r[-1, :3])
        np.testing.assert_allclose(last[i, 3], r[-1, 3], atol=1e-5)  # another number of output rows: other kernels


def test_the_last_block_is_nan_unless_it_is_asked_for_and_free_for_the_last_token(model: ps.Model) -> None:
    for pool in ("mean", "raw"):
        without, with_it = (model.capture([PAIR], pool=pool, last_layer=x)[0] for x in (False, True))
        assert np.isnan(without[..., 3, :]).all()
        assert np.isfinite(with_it).all()
        assert np.array_equal(without[..., :3, :], with_it[..., :3, :])
    assert np.isfinite(model.capture([PAIR], pool="last")).all()


def test_layers_that_are_not_asked_for_are_nan_and_the_others_unchanged(model: ps.Model) -> None:
    full, some = model.capture(TEXTS), model.capture(TEXTS, layers=[2, 0])
    assert np.isnan(some[:, [1, 3]]).all()
    assert np.array_equal(some[:, [0, 2]], full[:, [0, 2]])
    for il in (-1, 4):
        with pytest.raises(ps.ArgumentError, match=f"layer {il} is out of range"):
            model.capture(TEXTS, layers=[0, il])


def test_spans_split_a_pair_at_its_answer_and_messages_are_the_same_text(model: ps.Model) -> None:
    tokens, n_prompt = model.pair_tokens(*PAIR)
    rendered = model.template.render([{"role": "user", "content": PAIR[0]}])
    assert tokens[:n_prompt] == model.tokenize(rendered, parse_special=True)
    assert tokens[n_prompt:] == model.tokenize(PAIR[1], add_special=False)  # no end-of-turn token
    captured = {s: model.capture([PAIR], pool="raw", span=s)[0][:, :3] for s in ("all", "prompt", "response", None)}
    assert len(captured["prompt"]) == n_prompt
    assert len(captured["response"]) == len(tokens) - n_prompt
    assert np.array_equal(np.concatenate([captured["prompt"], captured["response"]]), captured["all"])
    assert np.array_equal(captured[None], captured["response"])
    messages = [{"role": "user", "content": PAIR[0]}, {"role": "assistant", "content": PAIR[1]}]
    assert np.array_equal(model.capture([messages], pool="raw")[0][:, :3], captured["response"])
    for span, at in (("prompt", n_prompt - 1), ("response", len(tokens) - 1)):
        last = model.capture([PAIR], pool="last", span=span)[0]
        assert np.array_equal(last[:3], captured["all"][at])


def test_a_plain_text_is_captured_whole_and_has_no_response(model: ps.Model) -> None:
    (whole,) = model.capture(TEXTS[:1], pool="raw")
    assert len(whole) == len(model.tokenize(TEXTS[0]))
    with pytest.raises(ps.ArgumentError, match="no response"):
        model.capture(TEXTS, span="response")


BAD_ITEMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "an unknown pool": ([PAIR], {"pool": "median"}),
    "an unknown span": ([PAIR], {"span": "answer"}),
    "one string": ("text", {}),
    "an empty answer": ([("question", "")], {}),
    "a triple": ([("a", "b", "c")], {}),
    "an answer that is no text": ([("a", 3)], {}),
    "messages without an answer": ([[{"role": "user", "content": "hi"}]], {}),
    "only an answer": ([[{"role": "assistant", "content": "hi"}]], {}),
    "no message": ([[]], {}),
    "a message without a role": ([[{"content": "hi"}, {"role": "assistant", "content": "ho"}]], {}),
    "a list of two strings": ([["question", "answer"]], {}),
    "a number": ([3], {}),
    "nothing": ([None], {}),
}


@pytest.mark.parametrize("how", BAD_ITEMS)
def test_what_cannot_be_captured_is_an_argument_error(model: ps.Model, how: str) -> None:
    items, options = BAD_ITEMS[how]
    with pytest.raises(ps.ArgumentError) as raised:
        model.capture(items, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("conversation", [["hi"], [3], [None], 3, None, [{"role": "user"}], []])
def test_what_is_no_conversation_is_an_argument_error(model: ps.Model, conversation: Any) -> None:
    with pytest.raises(ps.ArgumentError):
        model.chat(conversation)


@pytest.mark.parametrize("scope", ["all", "prompt", "response"])
def test_an_edit_adds_its_row_to_exactly_the_tokens_of_its_scope(model: ps.Model, scope: str) -> None:
    il, v = 1, samples.vector(layers=(1,))
    _, n_prompt = model.pair_tokens(*PAIR)
    unsteered, steered = (
        model.capture([PAIR], pool="raw", span="all", steer=s)[0][:, il] for s in (None, ps.Add(v, 0.5, scope=scope))
    )
    unit = v.directions[il].astype(np.float64) / np.linalg.norm(v.directions[il].astype(np.float64))
    row = 0.5 * float(model.norms[il]) * unit
    t = np.arange(len(unsteered))
    inside = {"all": t >= 0, "prompt": t <= n_prompt - 2, "response": t >= n_prompt - 1}[scope]
    assert np.array_equal(steered[~inside], unsteered[~inside])
    # (h + row) - h in float32: two roundings of numbers of about 10
    np.testing.assert_allclose((steered - unsteered)[inside], np.tile(row, (inside.sum(), 1)), atol=5e-6)


def test_readings_are_the_projections_of_the_captured_rows(model: ps.Model) -> None:
    directions = np.random.default_rng(0).standard_normal((4, 2, 64)).astype(np.float32)
    readings = model.readings(TEXTS, directions)
    for text, got, raw in zip(TEXTS, readings, model.capture(TEXTS, pool="raw", last_layer=True), strict=True):
        expected = np.einsum("tle,lke->tlk", raw.astype(np.float64), directions.astype(np.float64))
        magnitude = np.einsum("tle,lke->tlk", np.abs(raw).astype(np.float64), np.abs(directions).astype(np.float64))
        assert got.shape == (len(model.tokenize(text)), 4, 2)
        assert (np.abs(got - expected) <= 64 * 6e-8 * magnitude).all()  # a float32 sum of 64 products
    (one,) = model.readings(TEXTS[:1], directions[:, 0])
    assert one.shape == (len(model.tokenize(TEXTS[0])), 4, 1)
    with pytest.raises(ps.ArgumentError, match="directions must be"):
        model.readings(TEXTS, directions[:3])


def test_norms_are_the_medians_and_means_the_means_over_sixteen_pairs_without_first_tokens_and_are_kept(
    model: ps.Model, tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [model.pair_tokens(question, answer)[0] for question, answer in neutral_pairs()]
    plain = oracle.PlainContext(
        tiny.plain, n_ctx=max(map(len, texts)), n_parallel=1, n_batch=512, n_threads=1, n_outputs=64, watch=True
    )  # the context that Model makes for this
    rows = []
    for tokens in texts:
        plain.reset()
        _, (states,) = plain.compute([tokens], [(1, len(tokens))])
        rows.append(states[:, 1:].astype(np.float64))
    states = np.concatenate(rows, axis=1)
    lengths = np.sqrt((states**2).sum(axis=2))
    np.testing.assert_allclose(model.norms, np.median(lengths, axis=1), rtol=1e-7)  # rounded to float32 once
    # rounded to float32 once; the order of a float64 sum of hundreds of numbers of about 1 does not show in it
    np.testing.assert_allclose(model.means, states.mean(axis=1), rtol=1e-7, atol=1e-12)
    assert model.norms.dtype == model.means.dtype == np.float32
    monkeypatch.setattr(ps.Model, "_everyday_states", lambda self: pytest.fail("measured twice"))
    with opened(model.path) as again:
        assert np.array_equal(again.norms, model.norms)
        assert np.array_equal(again.means, model.means)


def test_norms_and_means_depend_on_none_of_the_models_options(model: ps.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    norms, means = model.norms, model.means
    monkeypatch.setattr(ps.Model, "_measured", lambda self: {})  # nothing is known: each measures for itself
    monkeypatch.setattr(ps.Model, "_remember", lambda self, **values: None)
    for options in ({"n_parallel": 1, "n_batch": 7}, {"n_ctx": 64, "seed": 5}, {"use_mmap": False}):
        with opened(model.path, **options) as m:
            assert np.array_equal(m.norms, norms), options
            assert np.array_equal(m.means, means), options


def test_a_model_makes_no_context_before_one_is_needed_and_then_one(
    tiny_path: Path, model: ps.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ = model.norms  # measured and remembered, and the self-test passed
    made: list[Any] = []
    new_session = ps.Model._new_session

    def counted(self: ps.Model, *sizes: int, **more: int) -> Any:
        made.append(sizes)
        return new_session(self, *sizes, **more)

    monkeypatch.setattr(ps.Model, "_new_session", counted)
    with opened(tiny_path) as m:
        m.prompt_tokens("hello")
        assert m.norms.shape == (4,)
        m.detach()
        assert m.hook_bytes == 0
        assert made == []
        m.logits(TEXTS, steer=samples.vector() * 0.2)
        m.chat("hello", **GREEDY)
        assert m.hook_bytes > 0
        assert made == [(512, 4, 512)]


def test_a_model_with_a_small_context_can_be_steered(tmp_path: Path) -> None:
    with opened(write_tiny_model(tmp_path / "unmeasured.gguf", seed=11), n_ctx=64) as m:
        assert len(m.logits(["short"], steer=samples.vector() * 0.2)[0]) == len(m.tokenize("short"))


def test_a_text_of_three_tokens_a_byte_is_tokenized(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "spaceless.gguf"
    path.write_bytes(tiny_path.read_bytes().replace("▁".encode(), "€".encode()))  # a space is its three bytes now
    with opened(path) as m:
        assert m.tokenize(" " * 40, add_special=False)[-120:] == [0xE2 + 3, 0x96 + 3, 0x81 + 3] * 40


# ---- chat and generate


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model: ps.Model) -> None:
    warm = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 24}
    for call in (model.chat, model.generate):
        texts = [call("hello", seed=seed, **warm) for seed in (1, 1, 2)]
        assert texts[0] == texts[1]
        assert texts[0] != texts[2]
    alike = model.generate_batch(["hello"] * 3, seed=1, **warm)
    assert len(set(alike)) == 3  # each request of a list draws from a stream of its own


def test_greedy_text_is_the_argmax_of_the_logits_and_does_not_depend_on_the_seed(model: ps.Model) -> None:
    (r,) = model.run_requests([Request(model.tokenize("hello"), 6, max_tokens=6, sampling=Sampling(temperature=0))])
    tokens = model.tokenize("hello")
    for token in r["tokens"]:
        (row,) = model.run_requests([Request(tokens, None, outputs=(len(tokens) - 1, len(tokens)), keep_logits=True)])
        assert int(row["logits"][-1].argmax()) == token
        tokens.append(token)
    assert len(r["tokens"]) > 0
    assert model.generate("hello", seed=1, **GREEDY) == model.generate("hello", seed=2, **GREEDY)


def test_no_more_tokens_are_generated_than_asked_for(model: ps.Model) -> None:
    for n in (1, 3, 7):
        request = Request(model.tokenize("hello"), 6, max_tokens=n, sampling=Sampling(temperature=0))
        (r,) = model.run_requests([request])
        assert len(r["tokens"]) == n or r["finish"] == "stop"
        assert r["text"].decode("utf-8", "replace") == model.generate("hello", temperature=0, max_tokens=n)
    with pytest.raises(ps.ArgumentError, match="max_tokens"):
        model.generate("hello", max_tokens=0)


def test_an_end_of_turn_token_ends_a_text_unless_it_is_ignored(model: ps.Model) -> None:
    end = model._native.eos
    tokens = model.tokenize("hello")
    u = model.logits(["hello"])[0][-1]
    # steered towards the end token at the last block, the model says it at once
    row = next(
        d
        for d in 400 * np.random.default_rng(0).standard_normal((2000, 1, 64)).astype(np.float32)
        if model.logits(["hello"], steer=ps.Add(planted(d), 1.0, raw=True))[0][-1].argmax() == end
    )
    assert u.argmax() != end
    steer = ps.Steering([ps.Add(planted(row), 1.0, raw=True)])
    stopped, going = model.run_requests(
        [
            Request(tokens, len(tokens), steer, max_tokens=5, sampling=Sampling(temperature=0), ignore_end=ignore)
            for ignore in (False, True)
        ]
    )
    assert (stopped["finish"], len(stopped["tokens"])) == ("stop", 0)
    assert (going["finish"], len(going["tokens"]), going["tokens"][0]) == ("length", 5, end)


def planted(row: np.ndarray) -> ps.PersonaVector:
    data = np.full((4, 64), np.nan, np.float32)
    data[3] = row
    return ps.PersonaVector(data, (3,))


def test_generation_ends_at_the_last_token_of_the_context(tiny_path: Path) -> None:
    with opened(tiny_path, n_ctx=16) as m:
        tokens = m.tokenize("hello you")
        (r,) = m.run_requests([Request(tokens, len(tokens), max_tokens=100, sampling=Sampling(temperature=0))])
        assert r["finish"] == "length"
        assert len(r["tokens"]) == 16 - len(tokens)


def test_a_text_ends_before_the_first_stop_string(model: ps.Model) -> None:
    text = model.generate("hello", temperature=0, max_tokens=60)
    found = re.search(r"(?<=.)[!-~]{2}", text)  # two printable characters: more than one token
    assert found is not None
    stop = found.group()
    for stops in (stop, [stop], ["never seen", stop, ""]):
        assert model.generate("hello", temperature=0, max_tokens=60, stop=stops) == text[: text.index(stop)]


def test_the_pieces_that_a_callback_gets_join_to_the_text(model: ps.Model) -> None:
    for n in range(1, 25):  # some of these cut a UTF-8 sequence in the middle
        streamed = io.StringIO()
        text = model.generate("hello", temperature=0, max_tokens=n, on_token=lambda _, x, out=streamed: out.write(x))
        assert streamed.getvalue() == text, n
    joined = ["", "", ""]

    def collect(i: int, piece: str) -> None:
        joined[i] += piece

    texts = model.generate_batch(TEXTS, steer=[None, samples.vector() * 0.3, None], on_token=collect, **GREEDY)
    assert joined == texts


def test_the_pieces_end_where_the_text_ends_at_a_stop_string(model: ps.Model) -> None:
    text = model.generate("hello", temperature=0, max_tokens=60)
    found = re.search(r"(?<=.)[!-~]{2}", text)
    assert found is not None
    pieces: list[str] = []
    stopped = model.generate("hello", temperature=0, max_tokens=60, stop=found.group(),
                             on_token=lambda _, piece: pieces.append(piece))  # fmt: skip
    assert "".join(pieces) == stopped


@pytest.mark.parametrize(
    "option",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": float("nan")}, {"min_p": float("inf")},
     {"repeat_penalty": 0.0}, {"repeat_penalty": -1.0}],
)  # fmt: skip
def test_sampling_options_outside_their_range_are_refused(model: ps.Model, option: dict[str, float]) -> None:
    with pytest.raises(ps.ArgumentError, match=next(iter(option))):
        model.generate("hello", **option)


def test_steered_text_differs_and_the_system_message_counts(model: ps.Model) -> None:
    v = samples.vector()
    plain = model.chat("hello", **GREEDY)
    assert model.chat("hello", steer=v * 0.5, **GREEDY) != plain
    assert model.chat("hello", steer=v * 0.0, **GREEDY) == plain
    as_messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert model.chat("hello", system="Be brief.", **GREEDY) == model.chat(as_messages, **GREEDY)
    assert model.prompt_tokens("hello", "Be brief.") == model.prompt_tokens(as_messages)
    assert model.prompt_tokens("hello", "Be brief.") != model.prompt_tokens("hello")


def test_a_conversation_with_kept_cache_gives_the_text_of_fresh_runs_and_reuses_what_was_computed(
    model: ps.Model,
) -> None:
    v = samples.vector()
    for steer in (None, v * 0.3, ps.Add(v, 0.3, scope="response")):
        messages = [{"role": "user", "content": "How deep is the water?"}]
        for question in ("And how cold?", "Is it far?"):
            kept = model.chat(messages, steer=steer, reuse_cache=True, **GREEDY)
            assert kept == model.chat(messages, steer=steer, **GREEDY)
            messages += [{"role": "assistant", "content": "Nine."}, {"role": "user", "content": question}]


def test_a_kept_cache_is_used_again_under_the_same_steering_alone(model: ps.Model) -> None:
    v = samples.vector()
    tokens = model.tokenize(TEXTS[0])

    def reused(steering: ps.Steering) -> int:
        model.run_requests([Request(tokens, None, ps.Steering([v * 0.3]), share_prefix=True)])
        request = Request([*tokens, 65], None, steering, share_prefix=True)
        return int(model.run_requests([request], keep_cache=True)[0]["n_reused"])

    assert reused(ps.Steering([v * 0.2])) == 0
    assert reused(ps.Steering([v * 0.3])) == len(tokens)
    assert reused(ps.Steering()) == 0
    assert model.run_requests([Request(tokens, None, share_prefix=True)])[0]["n_reused"] == 0  # empty without keeping


# ---- the steering context


def test_within_a_steering_block_calls_that_name_no_steering_use_its_edits(model: ps.Model) -> None:
    a, b = samples.vector(seed=1) * 0.4, samples.vector(seed=2) * 0.4
    by_a, by_b, by_both, unsteered = (model.logits(TEXTS, steer=s) for s in (a, b, a + b, ps.Steering()))
    with model.steering(a):
        assert same(model.logits(TEXTS), by_a)
        with model.steering(b):
            assert same(model.logits(TEXTS), by_b)
            assert same(model.logits(TEXTS, steer=a), by_a)
        assert same(model.logits(TEXTS), by_a)
        assert same(model.logits(TEXTS, steer=ps.Steering()), unsteered)
        assert same(model.logits(TEXTS, steer=[None, b, None])[1:2], by_b[1:2])
        with model.steering(a, b):
            assert same(model.logits(TEXTS), by_both)
        text = model.chat("hello", **GREEDY)
    assert text == model.chat("hello", steer=a, **GREEDY)
    assert same(model.logits(TEXTS), unsteered)
    with pytest.raises(ZeroDivisionError), model.steering(a):
        raise ZeroDivisionError
    assert same(model.logits(TEXTS), unsteered)


def test_an_entry_none_of_a_list_of_steerings_is_unsteered_also_within_a_block(model: ps.Model) -> None:
    unsteered = model.logits(TEXTS)
    with model.steering(samples.vector() * 0.4):
        assert same(model.logits(TEXTS, steer=[None] * 3), unsteered)


def in_thread(call: Callable[[], Any]) -> Any:
    results: list[Any] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as e:
            failures.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if failures:
        raise failures[0]
    return results[0]


def test_a_steering_block_is_not_felt_by_another_thread(model: ps.Model) -> None:
    unsteered = model.logits(TEXTS)
    with model.steering(samples.vector() * 0.4):
        assert same(in_thread(lambda: model.logits(TEXTS)), unsteered)
        assert not same(model.logits(TEXTS), unsteered)


def test_a_steering_block_is_not_felt_by_another_model(model: ps.Model, tiny_path: Path) -> None:
    with opened(tiny_path) as other:
        unsteered = other.logits(TEXTS)
        with model.steering(samples.vector() * 0.4):
            assert same(other.logits(TEXTS), unsteered)


# ---- threads, callbacks, closing


def test_two_threads_on_one_model_get_the_texts_that_they_get_alone(model: ps.Model) -> None:
    steers = {"one": samples.vector(seed=1) * 0.4, "two": samples.vector(seed=2) * -0.4}
    alone = {k: [model.chat(t, steer=s, **GREEDY) for t in TEXTS] for k, s in steers.items()}
    found: dict[str, list[str]] = {"one": [], "two": []}
    barrier = threading.Barrier(2)

    def talk(name: str) -> None:
        barrier.wait(10)
        with model.steering(steers[name]):
            found[name] = [model.chat(t, **GREEDY) for t in TEXTS]

    threads = [threading.Thread(target=talk, args=(name,)) for name in steers]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert found == alone
    assert alone["one"] != alone["two"]


def test_a_callback_cannot_start_another_computation_and_the_model_goes_on(model: ps.Model) -> None:
    text = model.chat("hello", **GREEDY)
    calls: list[Callable[..., Any]] = [
        lambda *_: model.chat("again"),
        lambda *_: model.generate("again"),
        lambda *_: model.logits(["again"]),
        lambda *_: model.capture(["again"]),
        lambda *_: model.detach(),
    ]
    for call in calls:
        with pytest.raises(ps.ModelError):
            model.chat("hello", steer=samples.vector() * 0.2, on_token=call, **GREEDY)
        assert model.chat("hello", **GREEDY) == text


def test_an_error_in_a_callback_comes_out_and_leaves_the_model_usable(model: ps.Model) -> None:
    text = model.chat("hello", **GREEDY)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.chat("hello", on_token=stop, **GREEDY)
    with pytest.raises(KeyboardInterrupt):
        model.capture(TEXTS, progress=stop)
    assert model.chat("hello", **GREEDY) == text
    with pytest.raises(KeyboardInterrupt):
        model.chat("hello", on_token=stop, **GREEDY)
    (result,) = model.run_requests([Request(model.tokenize("on"), share_prefix=True)], keep_cache=True)
    assert result["finish"] == "given"  # nothing of the interrupted ones is left to go on with


def test_a_capture_after_detaching_is_the_one_before(model: ps.Model) -> None:
    before = model.capture(TEXTS)
    model.detach()
    assert np.array_equal(model.capture(TEXTS), before, equal_nan=True)


def test_progress_counts_the_finished_requests(model: ps.Model) -> None:
    seen: list[tuple[int, int]] = []
    model.capture(TEXTS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


CALLS: dict[str, Callable[[ps.Model], Any]] = {
    "tokenize": lambda m: m.tokenize("a"),
    "detokenize": lambda m: m.detokenize([65]),
    "prompt_tokens": lambda m: m.prompt_tokens("a"),
    "pair_tokens": lambda m: m.pair_tokens("a", "b"),
    "measured_prompt": lambda m: m.measured_prompt("a"),
    "chat": lambda m: m.chat("a"),
    "chat_batch": lambda m: m.chat_batch(["a"]),
    "generate": lambda m: m.generate("a"),
    "generate_batch": lambda m: m.generate_batch(["a"]),
    "logits": lambda m: m.logits(["a"]),
    "logits of nothing": lambda m: m.logits([]),
    "capture": lambda m: m.capture(["a"]),
    "readings": lambda m: m.readings(["a"], np.ones((4, 64))),
    "run_requests": lambda m: m.run_requests([Request([3])]),
    "run_alone": lambda m: m.run_alone([Request([3])], n_parallel=1),
    "session": lambda m: m.session(),
    "detach": lambda m: m.detach(),
    "hook_bytes": lambda m: m.hook_bytes,
    "derive": lambda m: ps.derive(m, "pirate"),
    "contrast": lambda m: ps.contrast(m, ["a"], ["b"]),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_closed_model_says_so(tiny_path: Path, call: str) -> None:
    m = opened(tiny_path)
    assert not m.closed
    m.close()
    m.close()
    assert m.closed
    with pytest.raises(ps.ModelError, match="closed"):
        CALLS[call](m)


# ---- requests that do not fit


def test_a_prompt_longer_than_the_context_is_an_error_and_the_model_goes_on(tiny_path: Path) -> None:
    with opened(tiny_path, n_ctx=32) as m:
        text = m.generate("hello", **GREEDY)
        for call in (m.generate, m.chat, lambda t: m.logits(["short", t]), lambda t: m.capture([t])):
            with pytest.raises(ps.ContextError, match="32"):
                call("x" * 40)
        assert m.generate("hello", **GREEDY) == text


def test_an_empty_prompt_is_the_start_token(model: ps.Model) -> None:
    assert model.tokenize("") == [1]
    (row,) = model.logits([""])
    assert row.shape == (1, 286)
    assert isinstance(model.generate("", **GREEDY), str)


def test_a_batch_smaller_than_the_prompt_gives_the_same_text_and_the_logits_of_llama_cpp(
    tiny_path: Path, model: ps.Model, tiny: Loaded
) -> None:
    v = samples.vector()
    with opened(tiny_path, n_batch=5) as m:
        assert m.chat("How deep is the water?", steer=v * 0.3, **GREEDY) == model.chat(
            "How deep is the water?", steer=v * 0.3, **GREEDY
        )
        tokens, logits = [m.tokenize(t) for t in TEXTS], m.logits(TEXTS)
    plain = oracle.PlainContext(tiny.plain, n_ctx=512, n_parallel=4, n_batch=5, n_threads=1, n_outputs=64)
    expected, _ = plain.compute(tokens, [(0, len(t)) for t in tokens])
    assert same(logits, expected)


@pytest.mark.parametrize(
    "option", [{"n_ctx": 7}, {"n_parallel": 0}, {"n_parallel": 257}, {"n_batch": 0}, {"n_threads": 0}]
)
def test_options_outside_their_range_are_refused(tiny_path: Path, option: dict[str, int]) -> None:
    with pytest.raises(ps.ArgumentError, match=next(iter(option))):
        ps.Model(tiny_path, **option)  # type: ignore[arg-type]


# ---- files


def fingerprint(path: Path) -> str:
    return identify(path)["fingerprint"]


def test_the_differences_between_two_files_are_named(tmp_path: Path, tiny_path: Path) -> None:
    original = identify(tiny_path)
    other = {
        "weights": identify(write_tiny_model(tmp_path / "seed.gguf", seed=1)),
        "template": identify(write_tiny_model(tmp_path / "plain.gguf", chat_template=None)),
        "quantization": identify(write_tiny_model(tmp_path / "q8.gguf", quantization=gguf.GGMLQuantizationType.Q8_0)),
    }
    for word, found in other.items():
        named = differences(original, found)
        assert word in named
        assert not any(w in named for w in other if w not in (word, "weights"))
    assert "weights" not in differences(original, other["template"])


def test_a_fingerprint_changes_with_weights_tokenizer_and_template_and_not_with_names(
    tiny_path: Path, tmp_path: Path
) -> None:
    content = tiny_path.read_bytes()
    original = fingerprint(tiny_path)
    assert re.fullmatch("[0-9a-f]{64}", original)

    def of(name: str, changed: bytes) -> str:
        (tmp_path / name).write_bytes(changed)
        return fingerprint(tmp_path / name)

    def swapped(old: bytes, new: bytes) -> bytes:
        assert content.count(old) == 1
        assert len(old) == len(new)
        return content.replace(old, new)

    assert of("another name.gguf", content) == original
    assert of("named.gguf", swapped(b"tiny-random", b"tiny-rndam!")) == original
    different = {
        original,
        of("token.gguf", swapped(b"<unk>", b"<umk>")),
        of("template.gguf", swapped(b"<|{{ m.role }}|>", b"<!{{ m.role }}!>")),
        of("first weight.gguf", content[:-70000] + bytes([content[-70000] ^ 1]) + content[-69999:]),
        of("last weight.gguf", content[:-1] + bytes([content[-1] ^ 1])),
        fingerprint(write_tiny_model(tmp_path / "seed.gguf", seed=1)),
        fingerprint(write_tiny_model(tmp_path / "context.gguf", n_ctx=2048)),
        fingerprint(write_tiny_model(tmp_path / "no template.gguf", chat_template=None)),
    }
    assert len(different) == 8


def test_a_fingerprint_is_taken_again_when_the_file_has_changed(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", seed=1)
    first = fingerprint(path)
    assert fingerprint(path) == first
    write_tiny_model(path, seed=2)
    assert fingerprint(path) != first


def assert_refused(path: Path) -> None:
    with pytest.raises(ps.ModelError) as raised:
        opened(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "\n" not in message


def test_a_model_file_cut_anywhere_is_refused_in_one_line(tiny_path: Path, tmp_path: Path) -> None:
    content = tiny_path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for n in (1, 4, 20, 300, 3000, 9000, 30_000, 100_000, len(content) // 2, len(content) - 40_000, len(content) - 1):
        cut.write_bytes(content[:n])
        assert_refused(cut)


def test_what_is_not_a_model_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("I am a model.\n")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "folder.gguf").mkdir()
    write_tiny_model(tmp_path / "mute.gguf", tokenizer=False)
    samples.vector(norms=np.ones(4)).save(tmp_path / "vector.gguf")
    for name in ("text.gguf", "empty.gguf", "folder.gguf", "missing.gguf", "mute.gguf", "vector.gguf"):
        assert_refused(tmp_path / name)


# ---- templates


def test_a_model_without_a_template_completes_text_and_joins_pairs_by_a_newline(tmp_path: Path) -> None:
    with opened(write_tiny_model(tmp_path / "base.gguf", chat_template=None)) as m:
        assert not m.has_template
        for call in (lambda: m.chat("hello"), lambda: m.prompt_tokens("hello"), lambda: ps.derive(m, "pirate")):
            with pytest.raises(ps.TemplateError, match=r"base\.gguf has no chat template"):
                call()
        tokens, n_prompt = m.pair_tokens("question", "answer")
        assert tokens == m.tokenize("question\n") + m.tokenize("answer", add_special=False)
        assert n_prompt == len(m.tokenize("question\n"))
        assert np.isfinite(m.norms).all()
        assert len(m.generate("hello", **GREEDY)) > 0
        assert np.isfinite(m.capture([("question", "answer")])[0, :3]).all()


IGNORES_SYSTEM = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
SYSTEM_LAST = "{% for m in messages|reverse %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>"


@pytest.mark.parametrize("template", [IGNORES_SYSTEM, REFUSES_SYSTEM, SYSTEM_LAST])
def test_a_template_that_takes_no_system_message_cannot_be_derived_on(tmp_path: Path, template: str) -> None:
    with opened(write_tiny_model(tmp_path / "m.gguf", chat_template=template)) as m:
        with pytest.raises(ps.TemplateError, match="takes no system message"):
            ps.derive(m, "pirate", n_questions=1)
        assert m.chat("hello", **GREEDY)


BROKEN_AT_LOAD = {
    "an open tag": "{% for m in messages %}",
    "an unknown tag": "{% fox %}",
    "an expression that ends early": "{{ 1 + }}",
    "brackets too deep": "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
}
BROKEN_IN_USE = {
    "an exception": "{{ raise_exception('never') }}",
    "an exception of two lines": "{{ raise_exception('one\ntwo') }}",
    "an endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a missing name": "{{ missing.attribute }}",
    "a division by zero": "{{ 1 // (messages|length - messages|length) }}",
    "a wrong type": "{{ messages + 1 }}",
    "an include": "{% include 'other' %}",
    "a way out of the sandbox": "{{ messages.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a huge range": "{% for i in range(10000000000) %}{% endfor %}",
}


@pytest.mark.parametrize("how", BROKEN_AT_LOAD)
def test_a_template_that_does_not_parse_is_a_template_error(tmp_path: Path, how: str) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", chat_template=BROKEN_AT_LOAD[how])
    with pytest.raises(ps.TemplateError, match="does not parse"):
        opened(path).close()


@pytest.mark.parametrize("how", BROKEN_IN_USE)
def test_a_template_that_fails_is_a_template_error_and_text_still_works(tmp_path: Path, how: str) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", chat_template=BROKEN_IN_USE[how])
    with opened(path) as m:
        with pytest.raises(ps.TemplateError, match="cannot render"):
            m.chat("hello")
        assert not m.template.takes_system()
        assert m.generate("hello", **GREEDY)


def test_a_start_token_in_the_template_is_not_doubled(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", chat_template="{{ bos_token }}" + TEMPLATE)
    with opened(path) as m, opened(write_tiny_model(tmp_path / "n.gguf")) as plain:
        assert m.prompt_tokens("hello") == plain.prompt_tokens("hello")
        assert m.prompt_tokens("hello").count(1) == 1


# ---- derive and contrast


def test_contrast_is_the_difference_of_the_captured_means(model: ps.Model) -> None:
    positive = [("How was it?", "Terrible, all of it."), ("And now?", "Worse."), ("So?", "It is over.")]
    negative = [("How was it?", "Lovely, all of it."), ("And now?", "Better.")]
    v = ps.contrast(model, positive, negative, name="mood")
    # the shapes of contrast's own run
    both = model.capture(positive + negative, last_layer=True, share_prefix=True)
    expected = both[:3].mean(0, dtype=np.float64) - both[3:].mean(0, dtype=np.float64)
    assert np.array_equal(v.directions, expected.astype(np.float32))
    assert v.name == "mood"
    assert all(1 <= il < 4 for il in v.layers)
    assert v.provenance["fingerprint"] == model.fingerprint
    assert np.array_equal(v.norms, model.norms)
    # readings <h, v-hat>: thresholds halfway between the two groups', means over everyday texts; rounded once
    units = expected.astype(np.float32) / np.linalg.norm(expected, axis=1, keepdims=True)
    halfway = (both[:3].mean(0, dtype=np.float64) + both[3:].mean(0, dtype=np.float64)) / 2
    np.testing.assert_allclose(v.thresholds, (halfway * units).sum(1), atol=1e-5)
    np.testing.assert_allclose(v.means, (model.means * units).sum(1), atol=1e-5)
    assert v.window == (-0.5, 0.5)
    swapped = ps.contrast(model, negative, positive)
    # the texts come in another order, so in other shapes: rounding of the 16-bit cache
    assert (swapped.cosine(-v) > 0.999).all()
    last = ps.contrast(model, ["It is bad", "No"], ["It is good", "Yes"])
    acts = model.capture(["It is bad", "No", "It is good", "Yes"], pool="last", share_prefix=True)
    expected = acts[:2].mean(0, dtype=np.float64) - acts[2:].mean(0, dtype=np.float64)
    assert np.array_equal(last.directions, expected.astype(np.float32))


def test_contrast_needs_two_lists_of_different_texts(model: ps.Model) -> None:
    for positive, negative in (([], ["a"]), (["a"], []), ("text", ["a"])):
        with pytest.raises(ps.ArgumentError):
            ps.contrast(model, positive, negative)
    with pytest.raises(ps.ElicitationError, match="equal"):
        ps.contrast(model, ["same"], ["same"])
    with pytest.raises(ps.ArgumentError, match="pool"):
        ps.contrast(model, ["a"], ["b"], pool="raw")
    with pytest.raises(ps.ArgumentError, match="layer 4"):
        ps.contrast(model, ["a"], ["b"], layers=[4])


def test_a_derived_direction_is_the_difference_of_answers_captured_again(model: ps.Model) -> None:
    trait = ps.Trait("t", "d", (("Be dark.", "Be bright."),), ("How are you?", "And the sea?", "So?", "Then?"))
    found = elicit(model, trait, max_tokens=8, seed=3)
    # random weights show no trait: there is nothing to filter by, and nothing to calibrate
    v = ps.derive(model, trait, max_tokens=8, seed=3, filtered=False, calibrated=False)
    assert [(r.positive, r.question) for r in found.rollouts] == [(s, q) for s in (True, False) for q in range(4)]
    assert all(r.n_tokens for r in found.rollouts)
    positive, negative = (found.responses[rows].mean(0, dtype=np.float64) for rows in (slice(0, 4), slice(4, 8)))
    assert np.array_equal(v.directions, (positive - negative).astype(np.float32))
    prompts = [
        model.prompt_tokens(q, s) for s in ("Be dark.", "Be bright.") for q in trait.derive_questions
    ]  # P - 1 of each prompt, in another run
    requests = [Request(p, None, outputs=(len(p) - 1, len(p)), raw=(len(p) - 1, len(p))) for p in prompts]
    raw = [r["raw"][:, 0] for r in model.run_requests(requests, taps=Taps(raw_layers=(0, 1, 2, 3)))]
    expected = np.mean(raw[:4], axis=0) - np.mean(raw[4:], axis=0)
    assert v.last_prompt is not None
    # other shapes than in derive's run; one token off would have a cosine far below
    assert (ps.PersonaVector(v.last_prompt).cosine(ps.PersonaVector(expected)) > 0.999).all()


def test_the_same_seed_derives_the_same_bytes_whatever_ran_before_and_another_seed_others(
    model: ps.Model, tmp_path: Path
) -> None:
    trait = ps.Trait("t", "d", (("Be dark.", "Be bright."),), ("How are you?", "And the sea?", "So?", "Then?"))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ps.derive(model, trait, max_tokens=6, seed=seed, filtered=False, calibrated=False).save(tmp_path / name)
        model.chat_batch(TEXTS, steer=samples.vector() * 0.3, max_tokens=5, reuse_cache=True)
        model.capture(TEXTS, last_layer=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_a_vector_depends_on_none_of_the_models_sizes(tiny_path: Path) -> None:
    trait = ps.Trait("t", "d", (("Be dark.", "Be bright."),), ("How are you?", "And the sea?", "So?", "Then?"))
    found = []
    for sizes in ({"n_parallel": 1}, {"n_parallel": 4, "n_batch": 32}, {"n_ctx": 1024}):
        with opened(tiny_path, **sizes) as m:
            found.append(ps.derive(m, trait, max_tokens=6, seed=1, filtered=False, calibrated=False))
    for other in found[1:]:
        assert np.array_equal(found[0].directions, other.directions)
        assert np.array_equal(found[0].norms, other.norms)


def test_a_template_that_names_the_date_gives_the_same_vector_every_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", chat_template="{{ strftime_now('%Y-%m-%d') }}\n" + TEMPLATE)

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2077, 7, 7)

    with opened(path) as m:
        dated, undated = m.prompt_tokens("hello"), m.pair_tokens("hello", "hi")[0]
        monkeypatch.setattr("personasteer.model.datetime", Tomorrow)
        monkeypatch.setattr("personasteer.chat.datetime", Tomorrow)
        assert m.prompt_tokens("hello") != dated
        assert m.detokenize(m.prompt_tokens("hello")).lstrip().startswith("2077-07-07")
        assert m.pair_tokens("hello", "hi")[0] == undated


def test_the_middle_blocks_are_chosen_where_the_samples_are_too_few_to_tell(model: ps.Model) -> None:
    v = ps.contrast(model, ["It is bad.", "No."], ["It is good.", "Yes."])
    assert v.separations is not None
    assert np.isnan(v.separations).all()
    assert v.layers == (1,)
    assert choose_layers(*np.full((2, 30), np.nan, np.float32), np.ones((30, 4), np.float32)) == (14, 15, 16, 17, 18)


@pytest.mark.parametrize("option", [{"max_tokens": 0}, {"n_questions": 0}, {"temperature": -1.0}, {"layers": [4]}])
def test_derive_refuses_options_outside_their_range(model: ps.Model, option: dict[str, Any]) -> None:
    with pytest.raises(ps.ArgumentError):
        ps.derive(model, "pirate", **{"n_questions": 1, "max_tokens": 2, **option})
