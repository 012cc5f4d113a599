"""The graph edit against plain llama.cpp.

"Exact" is np.array_equal: both sides run the same decodes (tokens, order, output rows) with the same kernels, and an
addition is one float32 add on either side, so not a single bit may differ. Tolerances stand only where our own
graph sums in another order than NumPy.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import personasteer
from personasteer import _core
from personasteer.errors import ContextError

if TYPE_CHECKING:
    from conftest import Loaded

Result = dict[str, Any]


def run(session: Any, *requests: dict[str, Any]) -> list[Result]:
    """All requests together, results in the order given."""
    ids = [session.submit(**r) for r in requests]
    while session.busy:
        session.step()
    results = {r["id"]: r for r in session.take_results()}
    return [results[i] for i in ids]


def mix_of(key: int, data: np.ndarray, layers: Sequence[int]) -> Any:
    return _core.Mix(key=key, layers=list(layers), data=data[list(layers)])


def text_request(tokens: list[int], outputs: tuple[int, int], mix: Any = None, **more: Any) -> dict[str, Any]:
    """A given text, logits kept at `outputs`, the mix on every token."""
    request: dict[str, Any] = {"tokens": tokens, "outputs": outputs, "keep_logits": True, **more}
    if mix is not None:
        request |= {"mixes": [mix], "mix_of_token": [0] * len(tokens), "generated": [(0, 0, 0)]}
    return request


def layer_range(name: str, n_layer: int) -> list[int]:
    middle = n_layer // 2
    return {
        "first": [1],
        "middle": [middle],
        "last": [n_layer - 1],
        "range": list(range(max(1, middle - 3), min(n_layer, middle + 4))),
        "all but 0": list(range(1, n_layer)),
    }[name]


@pytest.fixture(params=[False, True], ids=["fused", "native"])
def native(request: pytest.FixtureRequest) -> bool:
    """Both ways in which a block is edited. An addition is the same float32 add in either."""
    chosen: bool = request.param
    return chosen


# ---- additions


@pytest.mark.parametrize("where", ["first", "middle", "last", "range"])
def test_an_addition_equals_the_control_vector_of_llama_cpp_in_prefill_and_in_every_decode_step(
    loaded: Loaded, native: bool, where: str
) -> None:
    layers = layer_range(where, loaded.n_layer)
    data = loaded.directions()
    n_prompt, n_steps = 24, 6
    tokens, outputs = loaded.tokens(n_prompt + n_steps), (n_prompt - 1, n_prompt + n_steps)

    # one output row a decode: the prompt is one decode, and then each forced token is a decode of its own
    plain = loaded.plain_context(n_outputs=1)
    plain.set_cvec(data, layers[0], layers[-1])
    (expected,), _ = plain.compute([tokens], [outputs])
    session = loaded.session(n_outputs=1, native=native)
    session.submit(**text_request(tokens, outputs, mix_of(1, data, layers)))
    n_decodes = 0
    while session.busy:
        session.step()
        n_decodes += 1
    (steered,) = session.take_results()

    assert n_decodes == 1 + n_steps
    assert steered["logits"].shape == expected.shape == (1 + n_steps, loaded.core.n_vocab)
    assert np.array_equal(steered["logits"], expected)
    unsteered = run(loaded.session(n_outputs=1, native=native), text_request(tokens, outputs))[0]["logits"]
    assert (np.abs(unsteered - expected).max(axis=1) > 1e-3).all()  # the vector was really at work in each row


@pytest.mark.parametrize("name", ["recurrent", "hybrid", "sliding"])  # mamba adds to the block before directly
def test_an_addition_at_every_block_equals_the_control_vector_in_other_kinds_of_blocks(
    name: str, native: bool, request: pytest.FixtureRequest
) -> None:
    loaded: Loaded = request.getfixturevalue(name)
    tokens, v, layers = loaded.tokens(20), loaded.directions(), layer_range("all but 0", loaded.n_layer)
    plain = loaded.plain_context(watch=True)
    plain.set_cvec(v, layers[0], layers[-1])
    (expected,), (states,) = plain.compute([tokens], [(12, 20)])
    session = loaded.session(native=native)
    session.set_taps(raw_layers=layers)
    (result,) = run(session, text_request(tokens, (12, 20), mix_of(1, v, layers), raws=[(0, 20)]))

    assert np.array_equal(result["logits"], expected)
    assert np.array_equal(result["raw"], states[layers], equal_nan=True)


def test_greedy_generation_under_an_addition_is_what_llama_cpp_generates_under_the_control_vector(
    loaded: Loaded, native: bool
) -> None:
    layers, data = layer_range("range", loaded.n_layer), loaded.directions()
    prompt = loaded.tokens(20)
    (steered,) = run(
        loaded.session(native=native),
        {"tokens": prompt, "mixes": [mix_of(1, data, layers)], "mix_of_token": [0] * len(prompt),
         "generated": [(0, 0, 0)], "max_tokens": 8},
    )  # fmt: skip

    plain = loaded.plain_context()
    plain.set_cvec(data, layers[0], layers[-1])
    n = len(prompt)
    row = plain.decode(prompt, range(n), [0] * n, [False] * (n - 1) + [True])
    replayed = []
    for position in range(n, n + 8):
        token = int(row[0].argmax())
        if loaded.core.is_end(token):
            break
        replayed.append(token)
        row = plain.decode([token], [position], [0], [True])

    assert steered["tokens"] == replayed


def test_an_addition_at_block_0_and_on_some_tokens_equals_an_addition_in_place(loaded: Loaded, native: bool) -> None:
    # llama.cpp's control vectors reach neither block 0 nor single tokens: here cb_eval adds to the block output itself
    tokens, data = loaded.tokens(24), loaded.directions()
    scoped = np.zeros((loaded.n_layer, len(tokens), loaded.n_embd), np.float32)
    for il in (0, loaded.n_layer - 1):
        scoped[il, 10:] = data[il]
    (expected,), _ = loaded.plain_context(watch=True).compute([tokens], [(0, 24)], [scoped])

    request = text_request(tokens, (0, 24), mix_of(1, data, [0, loaded.n_layer - 1]))
    request["mix_of_token"] = [-1] * 10 + [0] * 14
    (steered,) = run(loaded.session(native=native), request)

    assert np.array_equal(steered["logits"], expected)
    (unsteered,) = run(loaded.session(native=native), text_request(tokens, (0, 24)))
    assert np.array_equal(steered["logits"][:10], unsteered["logits"][:10])
    assert (steered["logits"][10:] != unsteered["logits"][10:]).any(axis=1).all()


def test_a_continuation_reuses_a_prefix_only_under_the_same_steering_and_equals_the_control_vector(
    loaded: Loaded, native: bool
) -> None:
    layers, data = layer_range("range", loaded.n_layer), loaded.directions()
    tokens = loaded.tokens(21)
    session = loaded.session(native=native)
    run(session, text_request(tokens[:20], (19, 20), mix_of(1, data, layers)))
    (same,) = run(session, text_request(tokens, (20, 21), mix_of(1, data, layers), reuse_prefix=True))
    (other,) = run(session, text_request(tokens, (20, 21), mix_of(2, 2 * data, layers), reuse_prefix=True))
    (none,) = run(session, text_request(tokens, (20, 21), reuse_prefix=True))

    plain = loaded.plain_context()
    plain.set_cvec(data, layers[0], layers[-1])
    plain.decode(tokens[:20], range(20), [0] * 20, [False] * 19 + [True])
    expected = plain.decode(tokens[20:], [20], [0], [True])

    assert [same["n_reused"], other["n_reused"], none["n_reused"]] == [20, 0, 0]
    assert np.array_equal(same["logits"], expected)


@pytest.mark.larger_model
def test_a_prefix_that_a_sliding_window_cache_has_dropped_is_not_reused(gemma: Loaded) -> None:
    # a long text in one slot lets another write over the cells behind its window, the start of the text
    tokens = gemma.tokens(650)
    session = gemma.session(n_ctx=700, n_parallel=2, n_batch=350)
    first = {"tokens": gemma.tokens(200, 90), "max_tokens": 1}
    run(session, first, {"tokens": tokens, "max_tokens": 1})
    run(session, {"tokens": gemma.tokens(650, 30), "max_tokens": 1})
    continued = text_request(tokens[:101], (100, 101), reuse_prefix=True)
    (result,) = run(session, continued)
    session.reset()
    (fresh,) = run(session, continued)

    # other shapes round otherwise; a missing prefix changes the logits by more than 1
    assert np.abs(result["logits"] - fresh["logits"]).max() < 0.2


def test_an_edit_at_a_block_is_the_control_vector_of_that_block_and_of_no_neighbour(tiny: Loaded, native: bool) -> None:
    il, tokens, v = 2, tiny.tokens(16), tiny.directions(seed=3)[2]
    planted = np.zeros((tiny.n_layer, tiny.n_embd), np.float32)
    planted[il] = v
    everywhere = list(range(tiny.n_layer))
    session = tiny.session(native=native)
    session.set_taps(raw_layers=everywhere)
    request = {"tokens": tokens, "outputs": (0, 16), "keep_logits": True, "raws": [(0, 16)]}
    (unsteered,) = run(session, request)
    session.reset()
    (steered,) = run(session, text_request(tokens, (0, 16), mix_of(1, planted, [il]), raws=[(0, 16)]))

    for neighbour in (il - 1, il, il + 1):
        plain = tiny.plain_context()
        plain.set_cvec(np.roll(planted, neighbour - il, axis=0), neighbour, neighbour)
        (expected,), _ = plain.compute([tokens], [(0, 16)])
        assert np.array_equal(steered["logits"], expected) == (neighbour == il)
    change = steered["raw"] - unsteered["raw"]
    assert not change[:il].any()
    # (h + v) - h rounds twice in float32, each time by less than 6e-8 of the largest value
    assert np.abs(change[il] - v).max() < 1e-5 * np.abs(unsteered["raw"][il]).max()
    assert np.abs(change[il + 1] - v).max() > 0.01


def test_every_block_of_a_supported_model_answers_a_unit_edit(loaded: Loaded) -> None:
    change = _core.Session.self_test(loaded.core, 2)
    assert len(change) == loaded.n_layer
    assert min(change) > 0


# ---- capture


def test_raw_capture_equals_cb_eval_at_every_block_with_nan_where_a_block_has_no_row(loaded: Loaded) -> None:
    tokens = loaded.tokens(24)
    everything = list(range(loaded.n_layer))
    _, (states,) = loaded.plain_context(watch=True).compute([tokens], [(20, 24)])
    session = loaded.session()
    session.set_taps(raw_layers=everything)
    (captured,) = run(session, {"tokens": tokens, "outputs": (20, 24), "raws": [(0, 24)]})

    assert captured["raw"].shape == (loaded.n_layer, 24, loaded.n_embd)
    assert np.isfinite(captured["raw"][:-1]).all()
    assert np.isnan(captured["raw"][-1, :20]).all()
    assert np.isfinite(captured["raw"][-1, 20:]).all()
    assert np.array_equal(captured["raw"], states, equal_nan=True)


def test_raw_capture_of_a_steered_text_is_the_block_output_that_the_next_block_sees(
    loaded: Loaded, native: bool
) -> None:
    tokens, data, layers = loaded.tokens(24), loaded.directions(), layer_range("all but 0", loaded.n_layer)
    plain = loaded.plain_context(watch=True)
    plain.set_cvec(data, layers[0], layers[-1])
    _, (states,) = plain.compute([tokens], [(0, 24)])
    session = loaded.session(native=native)
    session.set_taps(raw_layers=[0, *layers])
    (captured,) = run(session, text_request(tokens, (0, 24), mix_of(1, data, layers), raws=[(0, 24)]))

    assert np.array_equal(captured["raw"], states)


def test_pooled_sums_over_several_decodes_are_the_sums_of_the_raw_rows(loaded: Loaded) -> None:
    # three texts in one batch, two pools each; n_batch 16 spreads 3 x 24 tokens over five decodes
    everything = list(range(loaded.n_layer))
    spans = [(1, 24), (10, 20)]
    session = loaded.session(n_parallel=3, n_batch=16)
    session.set_taps(raw_layers=everything, pool_layers=everything, n_pools_per_request=2)
    requests = [
        {"tokens": loaded.tokens(24, 7 * q), "outputs": (16, 24), "raws": [(0, 24)], "pools": spans} for q in range(3)
    ]
    results = run(session, *requests)
    again = loaded.session(n_parallel=3, n_batch=16)
    again.set_taps(raw_layers=everything)
    raw_only = run(again, *[{k: v for k, v in r.items() if k != "pools"} for r in requests])

    for result, raw in zip(results, raw_only, strict=True):
        assert np.array_equal(result["raw"], raw["raw"], equal_nan=True)  # pooling beside it changes nothing
        for (begin, end), sums, counts in zip(spans, result["pool_sums"], result["pool_counts"], strict=True):
            rows = result["raw"][:, begin:end].astype(np.float64)
            has_row = np.isfinite(rows[..., 0])
            assert counts.tolist() == has_row.sum(axis=1).tolist()
            assert counts.tolist() == [end - begin] * (loaded.n_layer - 1) + [end - 16]
            rows[~has_row] = 0
            # float32 sums of up to 16 terms per decode: error below 16 eps of the sum of magnitudes, 2e-6
            assert (np.abs(sums - rows.sum(axis=1)) <= 1e-5 * np.abs(rows).sum(axis=1)).all()
            mean, expected = sums / counts[:, None], rows.sum(axis=1) / has_row.sum(axis=1)[:, None]
            error = np.linalg.norm(mean - expected, axis=1) / np.linalg.norm(expected, axis=1)
            assert error.max() < 1e-5


def test_readings_are_the_projections_of_the_raw_rows(loaded: Loaded, native: bool) -> None:
    tokens = loaded.tokens(24)
    everything = list(range(loaded.n_layer))
    directions = np.stack([loaded.directions(seed) for seed in range(3)], axis=1)  # (n_layer, 3, n_embd)
    session = loaded.session(n_batch=16, native=native)
    session.set_taps(raw_layers=everything)
    reads = _core.Readout(everything, directions)
    (result,) = run(session, {"tokens": tokens, "outputs": (20, 24), "raws": [(0, 24)], "reads": reads})

    raw = result["raw"].astype(np.float64)
    expected = np.einsum("lte,lre->tlr", raw, directions.astype(np.float64))
    assert result["readings"].shape == expected.shape
    assert np.array_equal(np.isnan(result["readings"]), np.isnan(expected))
    # a float32 dot product is exact to a few eps of the sum of its magnitudes, whatever cancels in it
    magnitude = np.einsum("lte,lre->tlr", np.abs(raw), np.abs(directions).astype(np.float64))
    difference, has_row = np.abs(result["readings"] - expected), np.isfinite(expected)
    assert (difference[has_row] <= 1e-5 * magnitude[has_row]).all()


def test_a_reading_is_of_the_block_output_before_that_blocks_own_edit_and_after_the_earlier_ones(
    loaded: Loaded, native: bool
) -> None:
    tokens, data, il = loaded.tokens(24), loaded.directions(), loaded.n_layer // 2
    session = loaded.session(native=native)
    session.set_taps(raw_layers=[il, il + 1])
    reads = _core.Readout([il, il + 1], loaded.directions(5)[[il, il + 1], None])
    common = {"outputs": (0, 24), "raws": [(0, 24)], "reads": reads}
    (unsteered,) = run(session, text_request(tokens, **common))
    (steered,) = run(session, text_request(tokens, mix=mix_of(1, data, [il]), **common))

    assert steered["readings"].shape == (24, 2, 1)
    assert np.array_equal(steered["readings"][:, 0], unsteered["readings"][:, 0])
    assert (steered["raw"][0] != unsteered["raw"][0]).any(axis=1).all()
    u, raw = loaded.directions(5)[il + 1].astype(np.float64), steered["raw"][1].astype(np.float64)
    assert (np.abs(steered["readings"][:, 1, 0] - raw @ u) <= 1e-5 * (np.abs(raw) @ np.abs(u))).all()
    assert (steered["readings"][:, 1] != unsteered["readings"][:, 1]).all()


# ---- several requests in one batch


def test_steering_of_other_sequences_in_a_batch_never_changes_a_sequence(loaded: Loaded, native: bool) -> None:
    texts = [loaded.tokens(n, start) for n, start in ((20, 0), (27, 30), (14, 60))]
    outputs = [(len(t) - 4, len(t)) for t in texts]
    layers = layer_range("all but 0", loaded.n_layer)
    vectors = [loaded.directions(seed) for seed in (1, 2, 3)]
    session = loaded.session(n_parallel=3, native=native)

    def logits(choice: Sequence[int | None]) -> list[np.ndarray]:
        session.reset()
        mixes = [None if c is None else mix_of(c + 1, vectors[c], layers) for c in choice]
        return [r["logits"] for r in run(session, *map(text_request, texts, outputs, mixes))]

    unsteered, _ = loaded.plain_context(n_parallel=3).compute(texts, outputs)
    by_vector = []
    for v in vectors:  # what each sequence gives under each vector: all three under that control vector, same shapes
        plain = loaded.plain_context(n_parallel=3)
        plain.set_cvec(v, layers[0], layers[-1])
        by_vector.append(plain.compute(texts, outputs)[0])
    choices = [(0, 1, None), (0, None, 2), (None, 1, 0), (0, 1, 2), (2, 2, 2), (None, None, None), (0, 1, None)]
    for choice in choices:
        for q, got in enumerate(logits(choice)):
            expected = unsteered[q] if choice[q] is None else by_vector[choice[q]][q]
            assert np.array_equal(got, expected), (choice, q)


def test_alone_against_batch_differs_exactly_as_much_as_in_llama_cpp_itself(loaded: Loaded, native: bool) -> None:
    texts = [loaded.tokens(n, start) for n, start in ((20, 0), (27, 30), (14, 60))]
    outputs = [(len(t) - 4, len(t)) for t in texts]
    layers, v = layer_range("range", loaded.n_layer), loaded.directions()
    plain = loaded.plain_context(n_parallel=3)
    plain.set_cvec(v, layers[0], layers[-1])
    plain_batch, _ = plain.compute(texts, outputs)
    session = loaded.session(n_parallel=3, native=native)
    mix, other = mix_of(1, v, layers), mix_of(2, -v, layers)
    batch = run(session, *map(text_request, texts, outputs, (mix, other, None)))[0]["logits"]
    plain.reset()
    session.reset()
    (plain_alone,), _ = plain.compute(texts[:1], outputs[:1])
    alone = run(session, text_request(texts[0], outputs[0], mix))[0]["logits"]

    # Other shapes take other kernels in llama.cpp; the edit must add nothing to that, so the allowance is zero.
    own = np.abs(plain_alone - plain_batch[0]).max()
    assert np.abs(alone - batch).max() == own


def test_a_request_that_joins_never_changes_one_that_is_generating_whatever_its_steering(
    loaded: Loaded, native: bool
) -> None:
    everything = list(range(loaded.n_layer))
    first, second = loaded.tokens(20), loaded.tokens(30, 40)
    session = loaded.session(
        n_parallel=2, n_batch=24, n_outputs=2, native=native
    )  # the second prompt takes two decodes
    session.set_taps(raw_layers=everything)
    session.add_edit_layers(everything)
    mix = mix_of(1, loaded.directions(1), everything)
    others = [None, mix_of(2, loaded.directions(2), everything), mix_of(3, -loaded.directions(2), [0])]

    def both(other: Any) -> list[Result]:
        session.reset()
        one = session.submit(**text_request(first, (0, 0), mix, max_tokens=10, raws=[(0, 30)]))
        for _ in range(3):
            session.step()
        two = session.submit(**text_request(second, (0, 0), other, max_tokens=10, raws=[(0, 40)]))
        while session.busy:
            session.step()
        results = {r["id"]: r for r in session.take_results()}
        return [results[one], results[two]]

    runs = [both(other) for other in others]
    for one, two in runs[1:]:
        assert one["tokens"] == runs[0][0]["tokens"]
        assert np.array_equal(one["raw"], runs[0][0]["raw"], equal_nan=True)  # block outputs of every decode step
        assert not np.array_equal(two["raw"], runs[0][1]["raw"], equal_nan=True)
    assert np.isfinite(runs[0][0]["raw"][:, 20:22]).all()


# ---- zero


def test_a_zero_edit_an_unused_edit_and_a_detached_session_are_bit_identical_to_plain_llama_cpp(
    loaded: Loaded, native: bool
) -> None:
    texts, outputs = [loaded.tokens(24), loaded.tokens(17, 40)], [(20, 24), (13, 17)]
    everything = list(range(loaded.n_layer))
    zero = np.zeros((loaded.n_layer, loaded.n_embd), np.float32)
    expected, _ = loaded.plain_context(n_parallel=2).compute(texts, outputs)
    session = loaded.session(n_parallel=2, native=native)

    def logits(mix: Any = None) -> list[np.ndarray]:
        session.reset()
        return [r["logits"] for r in run(session, *[text_request(*a, mix) for a in zip(texts, outputs, strict=True)])]

    never_attached = logits()
    zeros = logits(mix_of(1, zero, everything))
    unused = logits()
    assert session.n_attachments == 1
    strong = logits(mix_of(2, loaded.directions(), everything))
    back_at_zero = logits(mix_of(1, zero, everything))
    session.set_taps(pool_layers=everything, raw_layers=everything)
    tapped = logits()
    session.detach()
    detached = logits()
    assert session.hook_bytes == 0

    for name, got in {"never attached": never_attached, "zeros": zeros, "unused": unused, "zeros again": back_at_zero,
                      "tapped": tapped, "detached": detached}.items():  # fmt: skip
        assert all(map(np.array_equal, got, expected)), name
    assert not any(map(np.array_equal, strong, expected))


def test_changing_strength_between_decodes_builds_no_new_graph(loaded: Loaded, native: bool) -> None:
    layers, v = layer_range("range", loaded.n_layer), loaded.directions()
    n_prompt, n_steps = 16, 10
    tokens = loaded.tokens(n_prompt + n_steps)
    session = loaded.session(n_outputs=1, native=native)
    request = text_request(tokens, (n_prompt - 1, n_prompt + n_steps))
    # three strengths in turn, two of them in the prompt; a slot has two rows at hand where there are tables
    request["mixes"] = [mix_of(k + 1, strength * v, layers) for k, strength in enumerate((0.5, 1.0, -1.0))]
    request["mix_of_token"] = [t % 3 - 1 if t < n_prompt else t % 3 for t in range(len(tokens))]
    session.submit(**request)
    builds = []
    while session.busy:
        session.step()
        builds.append(session.n_builds)
    assert len(builds) == 1 + n_steps
    assert len(set(builds[1:])) == 1  # the first single-token decode builds its graph, the others reuse it
    session.take_results()

    # a strength never seen before for each single-token decode: where there are tables, a row to upload
    rows = []
    run(session, text_request(tokens[:16], (0, 0)))
    for k in range(6):
        request = text_request(tokens[:17], (16, 17), mix_of(100 + k, 0.5 * k * v, layers), reuse_prefix=True)
        request["mix_of_token"] = [-1] * 16 + [0]
        (result,) = run(session, request)
        assert result["n_reused"] == 16
        rows.append(result["logits"][0])
        builds.append(session.n_builds)
    assert len(np.unique(rows, axis=0)) == 6
    assert len(set(builds[-6:])) == 1
    assert session.n_attachments == 1


def test_attach_detach_and_growing_edits_keep_giving_the_right_logits(loaded: Loaded, native: bool) -> None:
    tokens, data = loaded.tokens(20), loaded.directions()
    last = loaded.n_layer - 1
    session = loaded.session(n_parallel=2, native=native)
    (unsteered,), _ = loaded.plain_context(n_parallel=2).compute([tokens], [(16, 20)])
    expected = {}
    for il in (1, 2, last):
        plain = loaded.plain_context(n_parallel=2)
        plain.set_cvec(data, il, il)
        (expected[il],), _ = plain.compute([tokens], [(16, 20)])

    def check(il: int | None, key: int) -> None:
        session.reset()
        mix = None if il is None else mix_of(key, data, [il])
        (got,) = run(session, text_request(tokens, (16, 20), mix))
        assert np.array_equal(got["logits"], unsteered if il is None else expected[il]), (il, key)

    for turn in range(2):
        check(1, 1)  # attaches
        check(last, 2)  # another layer: attaches anew, the first row must come along
        check(1, 1)
        session.set_taps(raw_layers=[0, last], pool_layers=[1], n_pools_per_request=1 + turn)
        check(2, 3)
        check(None, 0)
        session.set_taps()
        for key in range(10, 22):  # three times as many mixes as tables have rows
            check((1, 2, last)[key % 3], key)
        check(last, 2)
        session.detach()
        check(None, 0)
        session.detach()
        check(None, 0)


@pytest.mark.parametrize(("n_parallel", "n_batch"), [(1, 512), (3, 512), (3, 40), (16, 64), (16, 512)])
def test_every_slot_count_and_batch_size_gives_the_control_vector_result(
    loaded: Loaded, n_parallel: int, n_batch: int
) -> None:
    # mixed lengths; with the small batches the texts go over several decodes
    texts = [loaded.tokens(8 + 5 * (q % 4), 11 * q) for q in range(n_parallel)]
    outputs = [(len(t) - 1, len(t)) for t in texts]
    layers, v = layer_range("range", loaded.n_layer), loaded.directions()
    size = {"n_ctx": 256 if n_parallel < 16 else 64, "n_parallel": n_parallel, "n_batch": n_batch, "n_outputs": 32}
    plain = loaded.plain_context(**size)
    unsteered, _ = plain.compute(texts, outputs)
    plain.reset()
    plain.set_cvec(v, layers[0], layers[-1])
    steered, _ = plain.compute(texts, outputs)
    mixes = [mix_of(1, v, layers) if q % 2 == 0 else None for q in range(n_parallel)]
    for native in (False, True):
        results = run(loaded.session(**size, native=native), *map(text_request, texts, outputs, mixes))
        for q, result in enumerate(results):
            assert np.array_equal(result["logits"], steered[q] if q % 2 == 0 else unsteered[q]), (native, q)


def test_a_text_longer_than_a_decode_gives_the_control_vector_result(loaded: Loaded, native: bool) -> None:
    tokens, v, layers = loaded.tokens(90), loaded.directions(), layer_range("range", loaded.n_layer)
    plain = loaded.plain_context(n_batch=32, n_outputs=8, watch=True)
    plain.set_cvec(v, layers[0], layers[-1])
    (expected,), (states,) = plain.compute([tokens], [(70, 90)])
    session = loaded.session(n_batch=32, n_outputs=8, native=native)
    session.set_taps(raw_layers=layers)
    (result,) = run(session, text_request(tokens, (70, 90), mix_of(1, v, layers), raws=[(0, 90)]))

    assert np.array_equal(result["logits"], expected)
    assert np.array_equal(result["raw"], states[layers], equal_nan=True)


@pytest.mark.parametrize(
    "name",
    ["tiny", pytest.param("gemma", marks=pytest.mark.larger_model)],  # full attention and sliding windows
)
@pytest.mark.parametrize("n_parallel", [1, 2])
def test_a_cache_filled_to_the_last_cell_gives_the_right_result_and_one_token_more_an_error(
    name: str, n_parallel: int, native: bool, request: pytest.FixtureRequest
) -> None:
    loaded: Loaded = request.getfixturevalue(name)
    v, layers = loaded.directions(), layer_range("range", loaded.n_layer)
    size = {"n_ctx": 256 // n_parallel, "n_parallel": n_parallel, "n_batch": 96, "n_outputs": 4}
    n = size["n_ctx"]
    texts = [loaded.tokens(n, 50 * q) for q in range(n_parallel)]
    plain = loaded.plain_context(**size)
    plain.set_cvec(v, layers[0], layers[-1])
    expected, _ = plain.compute(texts, [(n - 3, n)] * n_parallel)
    session = loaded.session(**size, native=native)
    requests = [text_request(t, (n - 3, n), mix_of(1, v, layers)) for t in texts]
    for _ in range(2):  # the second time over what the first left in the cache
        # plain llama.cpp has room for these decodes, so the session has no excuse for an error
        for result, logits in zip(run(session, *requests), expected, strict=True):
            assert np.array_equal(result["logits"], logits)

    with pytest.raises(ContextError):
        session.submit(tokens=texts[0], max_tokens=1)
    with pytest.raises(ContextError):
        session.submit(tokens=[*texts[0], texts[0][0]])
    session.set_taps(pool_layers=[0])  # a pool computes the last generated token as well
    generated = run(session, *[{"tokens": t[: n - 3], "max_tokens": 50, "pools": [(0, -1)]} for t in texts])
    for result in generated:
        assert result["finish"] in ("length", "stop")
        assert len(result["tokens"]) <= 3
        if result["finish"] == "length":
            assert len(result["tokens"]) == 3
            assert result["pool_counts"][0].tolist() == [n]


ALIGNMENT = 64  # of each tensor


def window_mix(key: int, loaded: Loaded, layers: Sequence[int], n: int, *, gated: bool = False) -> Any:
    """n caps at each block, on directions of their own."""
    vectors = np.random.default_rng(key).standard_normal((n, loaded.n_embd)) / np.sqrt(loaded.n_embd)
    terms = [(il, 2, k if gated else -1, k, k) for il in layers for k in range(n)]
    numbers = [(0.0, 1.0, -1e30, 0.5, 1.0, 0.0)] * len(terms)
    return _core.Mix(key=key, terms=terms, numbers=numbers, vectors=vectors)


def test_the_memory_of_an_attachment_on_the_cpu_is_an_entry_for_each_token_and_the_buffers_of_its_taps(
    loaded: Loaded,
) -> None:
    n_parallel, n_batch, n_pools = 2, 48, 3
    layers, tokens = [0, 1, loaded.n_layer - 1], loaded.tokens(10)
    everything = list(range(loaded.n_layer))
    session = loaded.session(n_parallel=n_parallel, n_batch=n_batch)
    run(session, text_request(tokens, (0, 1)))
    assert session.hook_bytes == 0
    session.add_edit_layers(layers)
    run(session, text_request(tokens, (0, 1)))
    entries = n_batch * 40  # three pointers and two numbers, on a machine of 64 bits
    assert session.hook_bytes == entries
    for mix in (mix_of(1, loaded.directions(), everything), window_mix(2, loaded, everything, 20, gated=True)):
        run(session, text_request(tokens, (0, 1), mix, reads=_core.Readout([1], np.ones((1, 9, loaded.n_embd)))))
        assert session.hook_bytes == entries  # more blocks, terms and directions, and not a byte more

    session.set_taps(pool_layers=layers, n_pools_per_request=n_pools, raw_layers=[0])
    run(session, text_request(tokens, (0, 1)))
    all_pools = n_pools * n_parallel
    taps = 4 * (all_pools * (n_batch + len(layers) * loaded.n_embd) + n_batch * loaded.n_embd)
    assert entries + taps <= session.hook_bytes <= entries + taps + 3 * ALIGNMENT


def test_tables_grow_with_what_a_mix_does_at_a_block_and_not_with_the_number_of_mixes(tiny: Loaded) -> None:
    n_parallel, n_batch = 2, 48
    layers, tokens = [0, 1, tiny.n_layer - 1], tiny.tokens(10)
    n_embd, n_layers, n_mixes = tiny.n_embd, len(layers), 2 * n_parallel  # two mixes of each request at a time
    session = tiny.session(n_parallel=n_parallel, n_batch=n_batch, native=True)
    session.add_edit_layers(layers)
    entries = n_batch * 40

    def grown_to(tables: int, n_tensors: int, **request: Any) -> None:
        run(session, text_request(tokens, (0, 1), **request))
        assert entries + tables <= session.hook_bytes <= entries + tables + n_tensors * ALIGNMENT
        assert session.hook_bytes >= before
        # what needs no more room finds the same tables
        n_attachments, n_bytes = session.n_attachments, session.hook_bytes
        for key in range(100, 108):
            run(session, text_request(tokens, (0, 1), mix_of(key, tiny.directions(key), layers)))
        assert (session.n_attachments, session.hook_bytes) == (n_attachments, n_bytes)

    before = 0
    additions = 4 * (n_batch + (1 + n_mixes) * n_layers * n_embd)  # the index, and a row a mix; one row does nothing
    grown_to(additions, 2, mix=mix_of(1, tiny.directions(), layers))
    before = session.hook_bytes
    numbers = 5 * (1 + n_mixes)  # of a column, for every row
    one_window = 4 * n_mixes * n_layers * (2 * n_embd + numbers)  # read, write
    grown_to(additions + one_window, 5, mix=window_mix(2, tiny, layers, 1))
    before = session.hook_bytes
    grown_to(additions + 4 * one_window, 5, mix=window_mix(3, tiny, layers, 3))  # capacities are powers of two
    before = session.hook_bytes
    gates = 4 * 4 * n_mixes * n_layers * n_embd
    grown_to(additions + 4 * one_window + gates, 6, mix=window_mix(4, tiny, layers, 2, gated=True))
    before = session.hook_bytes
    readings = 4 * 2 * n_parallel * n_layers * (n_embd + n_batch)  # two directions of each request, and what they give
    reads = _core.Readout([1], np.ones((1, 2, n_embd)))
    grown_to(additions + 4 * one_window + gates + readings, 8, reads=reads)


# ---- the process


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_the_process_maps_one_copy_of_each_llama_cpp_library(tiny: Loaded) -> None:
    run(tiny.session(), {"tokens": tiny.tokens(3)})
    files: dict[str, set[str]] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and ".so" in fields[5]:
            library = Path(fields[5]).name.split(".so")[0]
            files.setdefault(library, set()).add(f"{fields[3]} {fields[4]}")  # device and inode
    for library in ("libllama", "libggml", "libggml-base", "libggml-cpu"):
        assert len(files[library]) == 1, library


def step_from_two_threads(loaded: Loaded, n_requests: int, n_tokens: int) -> list[Result]:
    session = loaded.session(n_parallel=4, n_ctx=n_tokens + 8, n_batch=512)
    mix = mix_of(1, loaded.directions(), [1])
    results: list[Result] = []
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for k in range(first, n_requests, 2):
                session.submit(**text_request(loaded.tokens(n_tokens, k), (n_tokens - 1, n_tokens), mix, max_tokens=3))
                while session.busy:
                    session.step()
                    results.extend(session.take_results())
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    results.extend(session.take_results())
    return results


def test_two_threads_may_step_one_session(tiny: Loaded) -> None:
    results = step_from_two_threads(tiny, n_requests=16, n_tokens=20)
    assert sorted(r["id"] for r in results) == list(range(16))
    for r in results:
        assert r["logits"].shape == (1, tiny.core.n_vocab)
        assert np.isfinite(r["logits"]).all()
        assert r["finish"] == "stop" or len(r["tokens"]) == 3


def test_a_thread_may_ask_a_session_that_another_thread_is_stepping_for_long(smollm2: Loaded) -> None:
    # A child process, because the failure is a deadlock: a decode of over 100 ms looks at signals and so needs the
    # interpreter lock, which the other thread must not keep while it waits for the session.
    code = f"""
import sys
sys.path[:] = {sys.path!r}
from pathlib import Path
import conftest, test_contract
loaded = conftest.load("smollm2", Path(sys.argv[1]))
results = test_contract.step_from_two_threads(loaded, n_requests=2, n_tokens=200)
print(len(results))
"""
    try:
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", code, str(smollm2.path)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        pytest.fail("two threads with one session: deadlock")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "2"


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_edits_add_nothing_to_how_far_decode_sizes_differ_in_llama_cpp_itself(
    name: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(f"{name}_path")
    text = ["The old mill by the river had stood empty for years before the baker and his three sons bought it. " * 4]
    by_size: list[dict[str, np.ndarray]] = []
    for n_batch in (16, 64):
        with personasteer.Model(path, n_ctx=512, n_parallel=1, n_batch=n_batch) as model:
            rng = np.random.default_rng(0)
            data = rng.standard_normal((model.n_layer, model.n_embd)).astype(np.float32)
            middle = range(model.n_layer // 2, model.n_layer // 2 + 2)
            v = personasteer.PersonaVector(data, tuple(middle), thresholds=np.zeros(model.n_layer, np.float32))
            edits = {
                "none": None,
                "add": v * 0.3,
                "cap": personasteer.Cap(v),
                "ablate": personasteer.Ablate(v, layers=tuple(middle)),
                "some tokens": personasteer.Add(v, 0.4, scope=tuple(range(5, 90, 3))),
            }
            by_size.append({k: model.logits(text, steer=e)[0] for k, e in edits.items()})
    small, large = by_size
    # quantized activations make this large on SmolLM2: single logits differ by more than 1
    own = np.abs(small["none"] - large["none"]).mean()
    for k in small:
        # other states amplify rounding a little; a persona on a wrong token shows as what the persona does
        assert np.abs(small[k] - large[k]).mean() <= 2 * own + 1e-6, k
        if name == "tiny" and k != "none":
            assert np.abs(small[k] - small["none"]).mean() > 2 * (2 * own + 1e-6), k
