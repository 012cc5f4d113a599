"""The native session: wrong calls raise one of the package's errors, and the session goes on as if nothing was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import oracle
import pytest

from personasteer import _core
from personasteer._native import extra_buffers_work
from personasteer.errors import ContextError, ModelError, VectorError
from personasteer.tiny_model import write_tiny_model

if TYPE_CHECKING:
    from conftest import Loaded

Result = dict[str, Any]


def session_of(loaded: Loaded, *, n_parallel: int = 1, n_batch: int = 64, **more: bool) -> Any:
    """One thread: nothing here is worth two, and two would wait for each other on a busy machine."""
    return _core.Session(
        model=loaded.core, n_ctx=256, n_parallel=n_parallel, n_batch=n_batch, n_threads=1, n_outputs=64, **more
    )


def plain_context_of(loaded: Loaded, *, n_batch: int = 64, watch: bool = False) -> oracle.PlainContext:
    return oracle.PlainContext(
        loaded.plain, n_ctx=256, n_parallel=1, n_batch=n_batch, n_threads=1, n_outputs=64, watch=watch
    )


def finish(session: Any) -> dict[int, Result]:
    while session.busy:
        session.step()
    return {r["id"]: r for r in session.take_results()}


def run(session: Any, **request: Any) -> Result:
    request_id = session.submit(**request)
    return finish(session)[request_id]


def mix_of(key: int, data: np.ndarray, layers: list[int]) -> Any:
    return _core.Mix(key=key, layers=layers, data=data[layers])


def whole_text(tokens: list[int], mix: Any = None) -> dict[str, Any]:
    request: dict[str, Any] = {"tokens": tokens, "outputs": (0, len(tokens)), "keep_logits": True}
    if mix is not None:
        request |= {"mixes": [mix], "mix_of_token": [0] * len(tokens)}
    return request


def assert_usable(session: Any, loaded: Loaded) -> None:
    """The session still computes what a fresh one computes, steered and unsteered."""
    tokens = loaded.tokens(12)
    for mix in (mix_of(77, loaded.directions(seed=7), [1, 2]), None):
        session.reset()
        got = run(session, **whole_text(tokens, mix))["logits"]
        expected = run(session_of(loaded), **whole_text(tokens, mix))["logits"]
        assert np.array_equal(got, expected)


# ---- changes of the graph


CHANGES: dict[str, Callable[[Any], None]] = {
    "detach": lambda s: s.detach(),
    "set_taps": lambda s: s.set_taps(pool_layers=[0, 1, 2, 3], raw_layers=[0]),
    "set_taps to nothing": lambda s: s.set_taps(),
    "add_edit_layers": lambda s: s.add_edit_layers([3]),
}


@pytest.mark.parametrize("state", ["queued", "running"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_graph_cannot_be_changed_under_a_request_which_then_goes_on(tiny: Loaded, change: str, state: str) -> None:
    tokens = tiny.tokens(20)

    def compute(disturbed: bool) -> Result:
        session = session_of(tiny, n_batch=8)  # a prompt of three decodes
        session.set_taps(pool_layers=[0], raw_layers=[1])
        mix = mix_of(1, tiny.directions(), [1])
        request_id = session.submit(tokens=tokens, mixes=[mix], mix_of_token=[0] * 20, generated=[(0, 0, 0)],
                                    max_tokens=8, pools=[(0, 20)], raws=[(0, 20)])  # fmt: skip
        if state == "running":
            session.step()
        if disturbed:
            with pytest.raises(ModelError, match="while requests are running"):
                CHANGES[change](session)
        return finish(session)[request_id]

    disturbed, quiet = compute(True), compute(False)
    assert disturbed["tokens"] == quiet["tokens"]
    assert len(quiet["tokens"]) > 0
    assert disturbed["pool_counts"][0].tolist() == [20]
    assert np.array_equal(disturbed["pool_sums"][0], quiet["pool_sums"][0])
    assert np.array_equal(disturbed["raw"], quiet["raw"])


def test_results_taken_after_a_change_of_taps_keep_the_shapes_and_values_of_their_own(tiny: Loaded) -> None:
    tokens = tiny.tokens(30)

    def pooled(session: Any) -> Any:
        session.set_taps(pool_layers=[1], raw_layers=[0, 2])
        session.submit(tokens=tokens, pools=[(0, 30)], raws=[(3, 8)])
        while session.busy:
            session.step()
        return session

    changed = pooled(session_of(tiny))
    changed.set_taps(pool_layers=list(range(tiny.n_layer)))
    (late,) = changed.take_results()
    (early,) = pooled(session_of(tiny)).take_results()
    assert late["pool_sums"][0].shape == (1, tiny.n_embd)
    assert late["raw"].shape == (2, 5, tiny.n_embd)
    assert np.array_equal(late["pool_sums"][0], early["pool_sums"][0])
    assert np.array_equal(late["raw"], early["raw"])


@pytest.mark.parametrize("il", [-1, 4, 99])
@pytest.mark.parametrize("where", ["edits", "pool_layers", "raw_layers", "a read-out"])
def test_a_block_that_the_model_lacks_is_refused(tiny: Loaded, where: str, il: int) -> None:
    session = session_of(tiny)
    session.add_edit_layers([1])
    ones = np.ones((1, 1, tiny.n_embd), np.float32)
    calls: dict[str, Callable[[], Any]] = {
        "edits": lambda: session.add_edit_layers([1, il]),
        "a read-out": lambda: session.submit(tokens=[3, 4], reads=_core.Readout([il], ones)),
    }
    with pytest.raises(VectorError, match=rf"{il}\b.*0\.\.3"):
        calls.get(where, lambda: session.set_taps(**{where: [il]}))()
    assert not session.busy
    assert session.n_attachments == 1
    assert_usable(session, tiny)


def test_a_mix_for_a_site_that_the_model_lacks_is_refused(tiny: Loaded) -> None:
    session = session_of(tiny)
    session.add_edit_layers([1])
    ones = np.ones((1, tiny.n_embd), np.float32)
    mix, outside = _core.Mix(1, [1], ones), _core.Mix(2, [9], ones)
    submits: list[dict[str, Any]] = [
        {"mixes": [outside]},  # also where no token takes it
        {"mixes": [mix, outside], "mix_of_token": [0, 0]},
        {"mixes": [outside], "mix_of_token": [0, 0]},
    ]
    for request in submits:
        with pytest.raises(VectorError, match=r"site 9\b.*0\.\.8"):
            session.submit(tokens=[3, 4], **request)
    running = session.submit(tokens=[3, 4], max_tokens=4)
    with pytest.raises(VectorError, match=r"site 9\b.*0\.\.8"):
        session.steer(running, [outside], [], [(0, 0, 0)])
    with pytest.raises(VectorError, match="ascending blocks"):
        _core.Mix(1, [-1], ones)
    finish(session)
    assert session.n_attachments == 1
    assert_usable(session, tiny)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_mix_has_up_to_256_terms_at_a_block(tiny: Loaded, stage: int) -> None:
    def of(n: int) -> Any:
        rows = [(1, stage, -1, 0 if stage == 2 else -1, 0)] * n
        return _core.Mix(9, rows, [(0.0, 1.0, 0.25, 0.25, 1.0 / n, 0.0)] * n, tiny.directions()[:1])

    with pytest.raises(VectorError, match="257 terms, 256 fit"):
        of(257)
    tokens = tiny.tokens(12)
    alone, together = (run(session_of(tiny), **whole_text(tokens, of(n)))["logits"] for n in (1, 256))
    np.testing.assert_allclose(together, alone, rtol=0, atol=2e-3)  # the rounding of 16-bit keys and values
    plain = run(session_of(tiny), **whole_text(tokens))["logits"]
    assert np.abs(together - plain).max() > 0.02


def test_tap_layers_given_unsorted_and_twice_are_taken_in_ascending_order(tiny: Loaded) -> None:
    tokens = tiny.tokens(10)
    request = {"tokens": tokens, "outputs": (0, 10), "raws": [(0, 10)], "pools": [(0, 10)]}
    session = session_of(tiny)
    session.set_taps(raw_layers=[3, 1, 1], pool_layers=[2, 0, 2])
    odd = run(session, **request)
    ordered = session_of(tiny)
    ordered.set_taps(raw_layers=[1, 3], pool_layers=[0, 2])
    expected = run(ordered, **request)
    assert odd["raw"].shape == (2, 10, tiny.n_embd)
    assert np.array_equal(odd["raw"], expected["raw"])
    assert np.array_equal(odd["pool_sums"][0], expected["pool_sums"][0])
    assert not np.array_equal(odd["raw"][0], odd["raw"][1])


def test_read_outs_of_another_width_out_of_order_or_of_a_block_twice_are_refused(tiny: Loaded) -> None:
    session = session_of(tiny)
    for layers, shape in (
        ([2, 1], (2, 1, 64)),
        ([1], (1, 1, 3)),
        ([1], (2, 1, 64)),
        ([1], (1, 64)),
        ([1, 1], (2, 1, 64)),
        ([1], (1, 0, 64)),
    ):
        with pytest.raises(VectorError):
            session.submit(tokens=[3, 4], reads=_core.Readout(layers, np.ones(shape, np.float32)))
        assert not session.busy
    assert_usable(session, tiny)


@pytest.mark.parametrize("native", [False, True], ids=["fused", "generic"])
def test_a_request_reads_its_own_directions_where_another_one_read_before(tiny: Loaded, native: bool) -> None:
    session, tokens = session_of(tiny, native_on_cpu=native), tiny.tokens(6)
    found = []
    for seed in (1, 2):
        reads = _core.Readout([1], tiny.directions(seed=seed)[None, 1:2].reshape(1, 1, -1))
        found.append(run(session, tokens=tokens, reads=reads)["readings"])
        np.testing.assert_array_equal(
            found[-1], run(session_of(tiny, native_on_cpu=native), tokens=tokens, reads=reads)["readings"]
        )
    assert not np.array_equal(*found)


@pytest.mark.parametrize("native", [False, True], ids=["fused", "generic"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_gate_is_closed_at_its_threshold(tiny: Loaded, sign: float, native: bool) -> None:
    tokens, vectors = tiny.tokens(6), np.stack([np.zeros(64, np.float32), np.ones(64, np.float32)])
    session, logits = session_of(tiny, native_on_cpu=native), []
    for key, gate_at in (1, 0.0), (2, -sign):  # each token reads 0
        mix = _core.Mix(key, [(1, 1, 0, -1, 1)], [(gate_at, sign, 0.0, 0.0, 1.0, 0.0)], vectors)
        session.reset()
        logits.append(run(session, **whole_text(tokens, mix))["logits"])
    session.reset()
    plain = run(session, **whole_text(tokens))["logits"]
    np.testing.assert_array_equal(logits[0], plain)
    assert np.abs(logits[1] - plain).max() > 0.02


def test_a_response_begins_at_the_last_given_token_where_nothing_else_is_said(tiny: Loaded) -> None:
    tokens, mix = tiny.tokens(6), mix_of(3, 20 * tiny.directions(), [1, 2])
    found = {}
    for begin in (1, 2, 3):
        for said in (-1, 5):
            result = run(session_of(tiny), tokens=tokens, mixes=[mix], mix_of_token=[-1] * 6, generated=[(begin, 0, 0)],
                         max_tokens=6, n_logprobs=0, ignore_end=True, response_begin=said)  # fmt: skip
            found[begin, said] = tuple(result["logprobs"])
    assert all(found[begin, -1] == found[begin, 5] for begin in (1, 2, 3))
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("wanted", ["pools", "raws", "outputs"])
def test_a_text_that_was_computed_before_is_taken_over_up_to_what_is_wanted_of_it(tiny: Loaded, wanted: str) -> None:
    session, tokens = session_of(tiny), tiny.tokens(8)
    session.set_taps(pool_layers=[1], n_pools_per_request=1, raw_layers=[1])
    request: dict[str, Any] = {"tokens": tokens, "reuse_prefix": True, "keep_logits": wanted == "outputs"}
    request[wanted] = (3, 6) if wanted == "outputs" else [(3, 6)]
    first, again = run(session, **request), run(session, **request)
    assert (first["n_reused"], again["n_reused"]) == (0, 3)
    assert again["pool_counts"] == first["pool_counts"]
    for what in ("pool_sums", "raw", "logits"):
        np.testing.assert_allclose(again[what], first[what], rtol=0, atol=5e-3)  # 16-bit keys and values of before


def test_the_same_is_captured_again_after_detaching(tiny: Loaded) -> None:
    session, tokens = session_of(tiny), tiny.tokens(8)
    found = []
    for _ in range(2):
        session.set_taps(raw_layers=[1])
        found.append(run(session, tokens=tokens, raws=[(0, 8)])["raw"])
        session.detach()
        session.reset()
    np.testing.assert_array_equal(*found)
    assert np.isfinite(found[0]).all()


def test_a_score_is_the_log_probability_of_the_token_that_follows(tiny: Loaded) -> None:
    tokens = tiny.tokens(8)
    result = run(session_of(tiny), **whole_text(tokens), keep_scores=True)
    logits = result["logits"].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    expected -= logits.max(1, keepdims=True)
    np.testing.assert_allclose(result["scores"][:-1], expected[range(7), tokens[1:]], rtol=0, atol=1e-4)
    assert np.isnan(result["scores"][-1])


def test_where_the_cache_is_full_the_longest_request_ends_and_the_others_go_on(tiny: Loaded) -> None:
    session = _core.Session(model=tiny.core, n_ctx=240, n_parallel=2, n_batch=64, n_threads=1, n_outputs=2, n_cells=256)
    long, short = (session.submit(tokens=tiny.tokens(n), max_tokens=80, ignore_end=True) for n in (150, 60))
    results = finish(session)
    assert (results[long]["finish"], results[long]["error"]) == ("error", "the KV cache is full")
    assert (results[short]["finish"], len(results[short]["tokens"])) == ("length", 80)
    assert len(results[long]["tokens"]) < 80


def test_the_first_token_to_read_is_not_negative(tiny: Loaded) -> None:
    with pytest.raises(ContextError, match="first token to read is negative"):
        session_of(tiny).submit(tokens=[3, 4], reads_from=-1)


# ---- requests


BAD_REQUESTS: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "a mix index without a mix": ({"mix_of_token": [0, 7, 0, 0]}, VectorError),
    "a mix index below -1": ({"mix_of_token": [-2, 0, 0, 0]}, VectorError),
    "a generated mix out of range": ({"generated": [(0, 1, 0)], "max_tokens": 2}, VectorError),
    "a mix of thinking out of range": ({"generated": [(0, 0, 1)], "max_tokens": 2}, VectorError),
    "a generated mix below -1": ({"generated": [(0, -2, 0)], "max_tokens": 2}, VectorError),
    "a later generated mix out of range": ({"generated": [(0, 0, 0), (3, 1, 0)], "max_tokens": 2}, VectorError),
    "phases that do not ascend": ({"generated": [(2, 0, 0), (2, -1, 0)], "max_tokens": 2}, VectorError),
    "a response behind the given tokens": ({"response_begin": 4}, ContextError),
    "a negative number of tokens to generate": ({"max_tokens": -1}, ContextError),
    "fewer mix indices than tokens": ({"mix_of_token": [0, 0]}, VectorError),
    "an open raw span": ({"raws": [(0, -1)]}, ContextError),
    "a reversed raw span": ({"raws": [(3, 1)]}, ContextError),
    "a raw span from below zero": ({"raws": [(-3, 2)]}, ContextError),
    "a raw span past the end": ({"raws": [(0, 5)]}, ContextError),
    "two raw spans": ({"raws": [(0, 1), (2, 3)]}, ContextError),
    "a reversed pool": ({"pools": [(3, 1)]}, ContextError),
    "a pool from below zero": ({"pools": [(-1, 2)]}, ContextError),
    "a pool past the end": ({"pools": [(0, 9)]}, ContextError),
    "outputs past the end": ({"outputs": (0, 5)}, ContextError),
    "outputs from below zero": ({"outputs": (-1, 2)}, ContextError),
    "no token": ({"tokens": [], "mix_of_token": []}, ContextError),
    "more tokens than the context": ({"tokens": [5] * 300, "mix_of_token": []}, ContextError),
    "no room to generate": ({"tokens": [5] * 256, "mix_of_token": [], "max_tokens": 1}, ContextError),
    "a token id below zero": ({"tokens": [3, -1, 3, 3]}, ModelError),
    "a token id past the vocabulary": ({"tokens": [3, 286, 3, 3]}, ModelError),
}


@pytest.mark.parametrize("bad", BAD_REQUESTS)
def test_a_request_that_can_never_run_is_refused_at_once(tiny: Loaded, bad: str) -> None:
    more, error = BAD_REQUESTS[bad]
    session = session_of(tiny)
    session.set_taps(raw_layers=[0], pool_layers=[0])
    request = {"tokens": [3, 4, 5, 6], "mixes": [mix_of(1, tiny.directions(), [1])], "mix_of_token": [0] * 4}
    with pytest.raises(error):
        session.submit(**(request | more))
    assert not session.busy
    assert session.take_results() == []
    assert_usable(session, tiny)


def test_a_mix_of_another_width_is_refused(tiny: Loaded) -> None:
    session = session_of(tiny)
    narrow = _core.Mix(1, [1], np.ones((1, tiny.n_embd - 1), np.float32))
    with pytest.raises(VectorError, match="width"):
        session.submit(tokens=[3, 4], mixes=[narrow], mix_of_token=[0, 0])
    for shape in ((2, tiny.n_embd), (0, tiny.n_embd), (tiny.n_embd,)):
        with pytest.raises(VectorError, match="one row for each"):
            _core.Mix(1, [1], np.ones(shape, np.float32))
    assert_usable(session, tiny)


BAD_MIXES: dict[str, dict[str, Any]] = {
    "no key": {"key": 0},
    "no term": {"terms": np.zeros((0, 5)), "numbers": np.zeros((0, 6))},
    "a block below zero": {"terms": [(-1, 1, -1, -1, 0)]},
    "an unknown stage": {"terms": [(1, 3, -1, 0, 0)]},
    "a stage below zero": {"terms": [(1, -1, -1, 0, 0)]},
    "nothing to write": {"terms": [(1, 1, -1, -1, -1)]},
    "a write behind the vectors": {"terms": [(1, 1, -1, -1, 2)]},
    "a window without a reading": {"terms": [(1, 2, -1, -1, 0)]},
    "a reading behind the vectors": {"terms": [(1, 2, -1, 2, 0)]},
    "a gate behind the vectors": {"terms": [(1, 1, 2, -1, 0)]},
    "a gate below -1": {"terms": [(1, 1, -2, -1, 0)]},
    "terms of four columns": {"terms": [(1, 1, -1, -1)]},
    "numbers of five columns": {"numbers": [(0.0, 1.0, 0.0, 0.0, 1.0)]},
    "more numbers than terms": {"numbers": [(0.0, 1.0, 0.0, 0.0, 1.0, 0.0)] * 2},
    "vectors without rows": {"vectors": np.ones(64, np.float32)},
    "more terms at a block than fit": {
        "terms": [(1, 1, -1, -1, 0)] * 257,
        "numbers": [(0.0, 1.0, 0.0, 0.0, 1.0, 0.0)] * 257,
    },
}


@pytest.mark.parametrize("bad", BAD_MIXES)
def test_a_mix_whose_terms_point_nowhere_is_refused(bad: str) -> None:
    good = {
        "key": 1,
        "terms": [(1, 1, -1, -1, 0)],
        "numbers": [(0.0, 1.0, 0.0, 0.0, 1.0, 0.0)],
        "vectors": np.ones((2, 64), np.float32),
    }
    assert _core.Mix(**good).layers == [1]
    with pytest.raises(VectorError):
        _core.Mix(**(good | BAD_MIXES[bad]))


def test_a_mix_of_rows_names_its_blocks_in_ascending_order_and_once(tiny: Loaded) -> None:
    data = tiny.directions()
    for layers in ([3, 1], [1, 1], []):
        with pytest.raises(VectorError, match="ascending blocks"):
            mix_of(1, data, layers)


def test_the_terms_of_a_mix_stand_in_any_order_of_blocks(tiny: Loaded) -> None:
    data, tokens = tiny.directions()[[1, 3]], tiny.tokens(10)
    numbers = [(0.0, 1.0, 0.0, 0.0, 1.0, 0.0)] * 2
    expected = run(session_of(tiny), **whole_text(tokens, _core.Mix(1, [1, 3], data)))["logits"]
    for terms in ([(1, 1, -1, -1, 0), (3, 1, -1, -1, 1)], [(3, 1, -1, -1, 1), (1, 1, -1, -1, 0)]):
        mix = _core.Mix(key=1, terms=terms, numbers=numbers, vectors=data)
        assert mix.layers == [1, 3]
        assert np.array_equal(run(session_of(tiny), **whole_text(tokens, mix))["logits"], expected)


@pytest.mark.parametrize(("native", "n_batch"), [(False, 64), (True, 2)])
def test_a_request_may_have_more_mixes_than_its_slot_has_rows(tiny: Loaded, native: bool, n_batch: int) -> None:
    # six mixes on six tokens; tables hold two of a request at a time, so that a decode ends where a third would come.
    # cb_eval adds the same numbers in plain llama.cpp, in decodes of the same shapes
    tokens = tiny.tokens(6)
    rows = [tiny.directions(seed) for seed in range(6)]
    session = session_of(tiny, native_on_cpu=native)
    run(session, **whole_text(tokens, mix_of(50, rows[0], [1])))
    session.reset()
    edits = np.zeros((tiny.n_layer, 6, tiny.n_embd), np.float32)
    for t in range(6):
        edits[1, t] = rows[t][1]
    got = run(
        session,
        tokens=tokens,
        outputs=(0, 6),
        keep_logits=True,
        mixes=[mix_of(1 + k, rows[k], [1]) for k in range(6)],
        mix_of_token=[*range(6)],
    )
    (expected,), _ = plain_context_of(tiny, n_batch=n_batch, watch=True).compute([tokens], [(0, 6)], [edits])
    assert np.array_equal(got["logits"], expected)
    assert_usable(session, tiny)


def test_hundreds_of_mixes_in_a_request_each_reach_their_token(tiny: Loaded) -> None:
    n = 255
    tokens = tiny.tokens(n)
    rows = np.random.default_rng(0).standard_normal((n, tiny.n_embd)).astype(np.float32)
    session = session_of(tiny)
    session.set_taps(raw_layers=[1])

    def raw(**steering: Any) -> np.ndarray:
        session.reset()
        return np.asarray(run(session, tokens=tokens, raws=[(0, n)], **steering)["raw"][0])

    mixes = [_core.Mix(k + 1, [1], rows[k : k + 1]) for k in range(n)]
    unsteered, steered = raw(), raw(mixes=mixes, mix_of_token=list(range(n)))
    assert np.array_equal(steered, unsteered + rows)  # one float32 add
    assert_usable(session, tiny)


# ---- without the hook


def test_a_session_without_the_hook_refuses_steering_and_capture_and_computes(tiny: Loaded) -> None:
    session = session_of(tiny, hook=False)
    mix = mix_of(1, tiny.directions(), [1])
    refused: list[Callable[[], Any]] = [
        lambda: session.add_edit_layers([1]),
        lambda: session.set_taps(raw_layers=[0]),
        lambda: session.set_taps(pool_layers=[0]),
        lambda: session.submit(tokens=[3, 4], mixes=[mix], mix_of_token=[0, 0]),
        lambda: session.submit(tokens=[3, 4], pools=[(0, 2)]),
        lambda: session.submit(tokens=[3, 4], raws=[(0, 2)]),
        lambda: session.submit(tokens=[3, 4], reads=_core.Readout([1], np.ones((1, 1, tiny.n_embd)))),
        lambda: session.submit(tokens=[3, 4], decides=True, max_tokens=1),
    ]
    for call in refused:
        with pytest.raises(ModelError, match="without the hook"):
            call()
    assert not session.busy
    assert session.n_attachments == 0
    assert session.hook_bytes == 0
    tokens = tiny.tokens(12)
    (expected,), _ = plain_context_of(tiny).compute([tokens], [(0, 12)])
    assert np.array_equal(run(session, **whole_text(tokens))["logits"], expected)


# ---- cancelling


def test_cancelled_requests_end_and_the_others_get_what_they_get_alone(tiny: Loaded) -> None:
    mix = mix_of(1, tiny.directions(), [1])
    session = session_of(tiny, n_parallel=1)
    requests = [
        {"tokens": tiny.tokens(10 + q, 9 * q), "max_tokens": 6, "mixes": [mix], "mix_of_token": [0] * (10 + q)}
        for q in range(3)
    ]
    running, queued, last = [session.submit(**r) for r in requests]
    session.step()
    assert session.cancel(queued)
    assert session.cancel(running)
    assert not session.cancel(running)
    assert not session.cancel(queued)
    assert not session.cancel(12345)
    results = finish(session)
    assert results[running]["finish"] == "cancelled"
    assert len(results[running]["tokens"]) == 1
    assert (results[queued]["finish"], results[queued]["tokens"], results[queued]["text"]) == ("cancelled", [], b"")
    assert results[queued]["n_prompt"] == 11
    assert results[queued]["error"] == ""
    assert results[last]["tokens"] == run(session_of(tiny, n_parallel=1), **requests[2])["tokens"]
    assert results[last]["finish"] in ("length", "stop")
    assert_usable(session, tiny)


def test_reset_drops_queued_and_running_requests_and_their_results(tiny: Loaded) -> None:
    session = session_of(tiny, n_parallel=1)
    for q in range(3):
        session.submit(tokens=tiny.tokens(10, q), max_tokens=1 if q == 0 else 5)
    session.step()
    session.step()
    session.reset()
    assert not session.busy
    assert session.take_results() == []
    assert_usable(session, tiny)


# ---- what would end the process


def everything(sites: range) -> Any:
    """Every kind of term at each site: a gated turn, a gated addition and a gated window."""
    terms = [[site, stage, 0, 1 if stage == 2 else -1, 2] for site in sites for stage in (0, 1, 2)]
    numbers = np.tile(np.float32([0.0, 1.0, -0.1, 0.1, 0.5, 0.0]), (len(terms), 1))
    vectors = np.random.default_rng(3).standard_normal((3, 64)).astype(np.float32)
    return _core.Mix(key=5, terms=np.array(terms, np.int32), numbers=numbers, vectors=vectors)


def test_more_edits_than_a_graph_has_room_for_are_refused_and_the_session_goes_on(tmp_path: Path) -> None:
    core = _core.Model(str(write_tiny_model(tmp_path / "deep.gguf", n_layer=60)), use_extra_bufts=extra_buffers_work())
    session = _core.Session(
        model=core, n_ctx=64, n_parallel=1, n_batch=64, n_threads=1, n_outputs=64, native_on_cpu=True
    )
    given = {"tokens": [1, 70, 80], "mix_of_token": [0, 0, 0], "outputs": (0, 3), "keep_logits": True}
    with pytest.raises(ModelError, match="graph has no room"):
        run(session, mixes=[everything(range(121))], **given)
    steered = run(session, mixes=[everything(range(4))], **given)["logits"]
    plain = run(session, **{**given, "mix_of_token": []})["logits"]
    assert np.isfinite(steered).all()
    assert not np.array_equal(steered, plain)


def test_what_is_missing_is_refused(tiny: Loaded) -> None:
    session = session_of(tiny)
    with pytest.raises(VectorError, match="a mix of a steering is missing"):
        session.submit(tokens=[1], mixes=[None], mix_of_token=[0])
    with pytest.raises(TypeError):
        _core.Session(model=None, n_ctx=64, n_parallel=1, n_batch=64, n_threads=1, n_outputs=64)
    with pytest.raises(TypeError):
        _core.Session.self_test(None, 1)
    with pytest.raises(ModelError, match="no model to borrow"):
        _core.Model.borrow(0)
    assert_usable(session, tiny)


def test_sizes_beyond_all_bounds_are_refused(tiny: Loaded) -> None:
    session = session_of(tiny, n_parallel=2)
    with pytest.raises(VectorError, match="pools of a request are too many, 524288 fit"):
        session.set_taps(pool_layers=[0], n_pools_per_request=2**31 - 1)
    with pytest.raises(VectorError, match="pools come together"):
        session.set_taps(pool_layers=[0], n_pools_per_request=-(2**31))
    with pytest.raises(VectorError, match="block 2147483647 is beyond"):
        _core.Mix(key=1, layers=[2**31 - 1], data=np.ones((1, 64), np.float32))
    with pytest.raises(ModelError, match=r"llama\.cpp cannot make a context"):
        _core.Session(model=tiny.core, n_ctx=70, n_parallel=20_000_000, n_batch=2**31 - 1, n_threads=1, n_outputs=1)
    assert_usable(session, tiny)


def test_a_call_from_within_a_step_is_an_error_instead_of_waiting_for_itself(tiny: Loaded) -> None:
    session = session_of(tiny)
    reads = _core.Readout([0], np.ones((1, 1, 64), np.float32))
    request = session.submit(tokens=tiny.tokens(5), max_tokens=3, response_begin=4, decides=True, reads=reads)
    raised: list[Exception] = []

    def step() -> None:
        try:
            session.step(lambda *_: session.cancel(request))
        except ModelError as e:
            raised.append(e)

    stepping = threading.Thread(target=step, daemon=True)
    stepping.start()
    stepping.join(60)
    assert [str(e) for e in raised] == ["a session cannot be used from within its own step"]
    assert_usable(session, tiny)


def test_states_that_are_not_finite_score_as_nan_and_spoil_nothing_else(tiny: Loaded) -> None:
    session = session_of(tiny)
    huge = mix_of(9, np.full((4, 64), 3e38, np.float32), [1, 2])  # the second one makes infinities
    result = run(session, tokens=tiny.tokens(6), mixes=[huge], mix_of_token=[0] * 6, generated=[(0, 0, 0)],
                 outputs=(0, 6), keep_scores=True, max_tokens=2, n_logprobs=3)  # fmt: skip
    assert np.isnan(result["scores"]).all()
    assert np.isnan(result["logprobs"]).all()
    assert_usable(session, tiny)


def test_a_log_capture_entered_twice_leaves_nothing_behind(tmp_path: Path) -> None:
    lines: list[str] = []
    log = _core.LogCapture()
    log.__enter__()
    log.__enter__()
    missing = str(tmp_path / "missing.gguf").encode()
    llama_cpp.llama_model_load_from_file(missing, llama_cpp.llama_model_default_params())
    lines.append(log.errors().decode())
    log.__exit__(None, None, None)
    with _core.LogCapture() as other:  # the next one begins where nothing is kept
        llama_cpp.llama_model_load_from_file(missing, llama_cpp.llama_model_default_params())
        lines.append(other.errors().decode())
    assert "missing.gguf" in lines[0]
    assert lines[1] == lines[0]
