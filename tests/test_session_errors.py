"""The native session: wrong calls raise one of the package's errors, and the session goes on as if nothing was."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import oracle
import pytest

from personasteer import _core
from personasteer.errors import ContextError, ModelError, VectorError

if TYPE_CHECKING:
    from conftest import Loaded

Result = dict[str, Any]


def session_of(loaded: Loaded, *, n_parallel: int = 1, n_batch: int = 64, hook: bool = True) -> Any:
    """One thread: nothing here is worth two, and two would wait for each other on a busy machine."""
    return _core.Session(
        model=loaded.core, n_ctx=256, n_parallel=n_parallel, n_batch=n_batch, n_threads=1, n_outputs=64, hook=hook
    )


def plain_context_of(loaded: Loaded, *, watch: bool = False) -> oracle.PlainContext:
    return oracle.PlainContext(
        loaded.plain, n_ctx=256, n_parallel=1, n_batch=64, n_threads=1, n_outputs=64, watch=watch
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
        request_id = session.submit(tokens=tokens, mixes=[mix], mix_of_token=[0] * 20, mix_of_generated=0,
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
@pytest.mark.parametrize("where", ["edits", "pool_layers", "raw_layers", "reading_layers", "a mix"])
def test_a_block_that_the_model_lacks_is_refused(tiny: Loaded, where: str, il: int) -> None:
    session = session_of(tiny)
    session.add_edit_layers([1])
    ones = np.ones((1, 1, tiny.n_embd), np.float32)
    calls: dict[str, Callable[[], Any]] = {
        "edits": lambda: session.add_edit_layers([1, il]),
        "a mix": lambda: session.submit(tokens=[3, 4], mixes=[_core.Mix(1, [il], ones[0])]),
        "reading_layers": lambda: session.set_taps(reading_layers=[il], readouts=ones),
    }
    with pytest.raises(VectorError, match=rf"{il}\b.*0\.\.3"):
        calls.get(where, lambda: session.set_taps(**{where: [il]}))()
    assert not session.busy
    assert session.n_attachments == 1
    assert_usable(session, tiny)


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
    ):
        with pytest.raises(VectorError):
            session.set_taps(reading_layers=layers, readouts=np.ones(shape, np.float32))
    assert_usable(session, tiny)


# ---- requests


BAD_REQUESTS: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "a mix index without a mix": ({"mix_of_token": [0, 7, 0, 0]}, VectorError),
    "a mix index below -1": ({"mix_of_token": [-2, 0, 0, 0]}, VectorError),
    "a generated mix out of range": ({"mix_of_generated": 1, "max_tokens": 2}, VectorError),
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
    for shape in ((1, tiny.n_embd - 1), (2, tiny.n_embd)):
        with pytest.raises(VectorError, match="width"):
            session.submit(tokens=[3, 4], mixes=[_core.Mix(1, [1], np.ones(shape, np.float32))], mix_of_token=[0, 0])
    assert_usable(session, tiny)


def test_a_mix_names_its_blocks_in_any_order(tiny: Loaded) -> None:
    data, tokens = tiny.directions(), tiny.tokens(10)
    backwards = run(session_of(tiny), **whole_text(tokens, _core.Mix(1, [3, 1], data[[3, 1]])))["logits"]
    forwards = run(session_of(tiny), **whole_text(tokens, _core.Mix(1, [1, 3], data[[1, 3]])))["logits"]
    assert np.array_equal(backwards, forwards)


def test_a_request_may_have_more_mixes_than_the_bank_had_rows(tiny: Loaded) -> None:
    # six mixes on six tokens where a slot has four rows: cb_eval adds the same numbers in plain llama.cpp
    tokens = tiny.tokens(7)
    rows = [tiny.directions(seed) for seed in range(6)]
    session = session_of(tiny)
    run(session, **whole_text(tokens, mix_of(50, rows[0], [1])))
    edits = np.zeros((tiny.n_layer, 7, tiny.n_embd), np.float32)
    for t in range(6):
        edits[1, t] = rows[t][1]
    got = run(
        session,
        tokens=tokens,
        outputs=(0, 7),
        keep_logits=True,
        mixes=[mix_of(1 + k, rows[k], [1]) for k in range(6)],
        mix_of_token=[*range(6), -1],
    )
    (expected,), _ = plain_context_of(tiny, watch=True).compute([tokens], [(0, 7)], [edits])
    assert np.array_equal(got["logits"], expected)
    assert_usable(session, tiny)


def test_hundreds_of_mixes_in_a_request_are_refused(tiny: Loaded) -> None:
    session = session_of(tiny)
    mixes = [mix_of(k + 1, tiny.directions(), [1]) for k in range(257)]
    with pytest.raises(VectorError, match="257"):
        session.submit(tokens=[3, 4], mixes=mixes, mix_of_token=[0, 1])
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
    ]
    for call in refused:
        with pytest.raises(ModelError, match="without the hook"):
            call()
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
    assert queued not in results or results[queued]["finish"] == "cancelled"
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
