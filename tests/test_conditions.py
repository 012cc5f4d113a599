"""When(..., on="prompt"): a condition that is read once, while the prompt is computed.

"Exact" is np.array_equal between runs of the same decodes. A gate that opens has the prompt's last token computed once
more; a request whose prompt is in the cache but for that token makes the same decodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import pytest
import samples
from live_requests import basis, before_edits, steerable, vector_for

import personasteer as ps
from personasteer import engine
from personasteer.engine import Request, Sampling, Taps

if TYPE_CHECKING:
    from conftest import Loaded

GREEDY = Sampling(temperature=0)
PROMPT = "the harbour was quiet in the morning"
N_NEW = 6
STRONG = ps.Add(samples.vector(seed=1), 0.5)  # at blocks 1 and 2


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Iterator[ps.Model]:
    with ps.Model(tiny_path, n_ctx=256, n_parallel=2, n_threads=2) as opened:
        yield opened


def condition(seed: int = 9, layers: Sequence[int] = (1, 2)) -> ps.PersonaVector:
    return samples.vector(layers=layers, seed=seed)


def readings_of_prompt(model: ps.Model, vector: ps.PersonaVector) -> np.ndarray:
    """(n_tokens, n_layer) of the unsteered prompt, in NumPy from the block outputs."""
    tokens = model.tokenize(PROMPT)
    request = Request(tokens, len(tokens), outputs=(0, len(tokens)), raw=(0, len(tokens)))
    (result,) = model.run_requests([request], taps=Taps(raw_layers=(0, 1, 2, 3)))
    units = vector.directions.astype(np.float64) / np.linalg.norm(vector.directions, axis=1, keepdims=True)
    return np.asarray(np.einsum("lte,le->tl", result["raw"].astype(np.float64), units))


def complete(model: ps.Model, *edits: Any, keep_cache: bool = False, share: bool = False) -> dict[str, Any]:
    """The prompt and N_NEW greedy tokens, with the block outputs from the response's first on."""
    tokens = model.tokenize(PROMPT)
    n = len(tokens)
    # the last token is computed only where something is read from it
    request = Request(tokens, n, ps.Steering(edits), N_NEW, GREEDY, raw=(n - 1, n + N_NEW - 1), share_prefix=share,
                      ignore_end=True, n_logprobs=5)  # fmt: skip
    (result,) = model.run_requests([request], taps=Taps(raw_layers=(0, 1, 2, 3)), keep_cache=keep_cache)
    return result


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return (
        one["tokens"] == two["tokens"]
        and one["logprobs"] == two["logprobs"]
        and one["top_logprobs"] == two["top_logprobs"]
        and np.array_equal(one["raw"], two["raw"], equal_nan=True)
    )


def from_the_last_token_on(model: ps.Model, *edits: Any) -> dict[str, Any]:
    """The edits on the response alone, after the unsteered prompt; the last prompt token in a decode of its own."""
    complete(model)
    scoped = [replace(e, scope="response") for e in edits]
    result = complete(model, *scoped, keep_cache=True, share=True)
    assert result["n_reused"] == result["n_prompt"] - 1
    return result


# ---- whether it holds


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("layers", [(1,), (0, 2), (0, 1, 2)])
def test_the_gate_opens_where_the_mean_distance_from_the_thresholds_is_on_its_side(
    model: ps.Model, pool: str, above: bool, layers: tuple[int, ...]
) -> None:
    vector = condition(layers=layers)
    readings = readings_of_prompt(model, vector)[:, list(layers)]
    pooled = readings[1:].mean(axis=0) if pool == "mean" else readings[-1]  # the first token has a norm of its own
    unsteered = complete(model)
    for margin in (0.01, -0.01):
        # per layer far from the reading, and on different sides; the mean distance is `margin`
        far = np.array([3.0, -3.0, 0.0]) if len(layers) == 3 else np.array([3.0, -3.0])[: len(layers)]
        tau = np.full(4, np.nan)
        tau[list(layers)] = pooled - margin + (far if len(layers) > 1 else 0.0)
        result = complete(model, ps.When(vector, STRONG, threshold=tau, above=above, pool=pool))
        assert same(result, unsteered) == ((margin > 0) != above)
        assert (result["rho"] > 0) == ((margin > 0) == above)


def test_the_condition_is_read_on_the_prompt_that_the_requests_other_edits_have_made(model: ps.Model) -> None:
    # an addition at block 0 moves the reading at block 1 across a threshold on which the unsteered prompt stands
    vector = condition(layers=(1,))
    tau = float(readings_of_prompt(model, vector)[1:, 1].mean())
    push = ps.Add(samples.vector(seed=4), 2.0, raw=True, layers=(0,), scope="prompt")
    opened = []
    for other in (push, push * -1.0):
        gated = complete(model, other, ps.When(vector, STRONG, threshold=tau))
        opened.append(not same(gated, complete(model, other)))
    assert sorted(opened) == [False, True]


def test_thresholds_and_layers_are_those_of_the_vector_unless_given(model: ps.Model) -> None:
    readings = readings_of_prompt(model, condition())[1:].mean(axis=0)
    stored = replace(condition(layers=(1, 2)), thresholds=(readings - 0.01).astype(np.float32))
    shut = (readings + 0.01).astype(np.float32)
    unsteered = complete(model)
    assert not same(complete(model, ps.When(stored, STRONG)), unsteered)
    assert same(complete(model, ps.When(stored, STRONG, threshold=shut)), unsteered)
    one_layer = np.where(np.arange(4) == 1, readings - 0.01, shut)
    assert not same(complete(model, ps.When(stored, STRONG, threshold=one_layer, layers=(1,))), unsteered)
    assert same(complete(model, ps.When(stored, STRONG, threshold=one_layer, layers=(2,))), unsteered)
    with pytest.raises(ps.VectorError, match="no thresholds"):
        complete(model, ps.When(condition(), STRONG))


# ---- what it does

OPEN, SHUT = np.full(4, -1e3), np.full(4, 1e3)


def test_a_closed_gate_gives_exactly_the_unsteered_text_logits_and_block_outputs(model: ps.Model) -> None:
    unsteered = complete(model)
    for gate in (
        ps.When(condition(), STRONG, threshold=SHUT),
        ps.When(condition(), STRONG, threshold=OPEN, above=False, pool="last"),
        ps.When(condition(), ps.Ablate(samples.vector()), threshold=SHUT),
    ):
        assert same(complete(model, gate), unsteered)
    texts = [model.chat("how deep", steer=s, max_tokens=20, seed=3)
             for s in (None, ps.When(condition(), STRONG, threshold=SHUT))]  # fmt: skip
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "edit",
    [
        STRONG,
        ps.Add(samples.vector(seed=2), -0.4, keep_norm=True, half_life=2.0),
        ps.Cap(samples.vector(seed=3), tau=np.full(4, -1.0)),
        ps.Ablate(samples.vector(seed=5), share=0.7),
        ps.Add(samples.vector(seed=2), 0.5, start=2, stop=4),
    ],
    ids=["add", "turn and fade", "cap", "ablate", "schedule"],
)
def test_an_open_gate_steers_from_the_prompts_last_token_on_exactly_as_the_scope_response_does(
    model: ps.Model, edit: Any
) -> None:
    gated = complete(model, ps.When(condition(), edit, threshold=OPEN))
    assert same(gated, from_the_last_token_on(model, edit))
    assert not same(gated, complete(model))


def test_an_open_gate_does_not_outgrow_the_scope_of_its_edit(model: ps.Model) -> None:
    unsteered = complete(model)
    for scope in ("prompt", (0, 1)):
        inside = replace(STRONG, scope=scope)
        assert same(complete(model, ps.When(condition(), inside, threshold=OPEN)), unsteered)


def test_what_an_open_gate_has_steered_is_not_taken_over_as_unsteered(model: ps.Model) -> None:
    steered = complete(model, ps.When(condition(), STRONG, np.full(4, -1e9)))
    tokens = [*model.tokenize(PROMPT), *steered["tokens"]]
    (after,) = model.run_requests([Request(tokens, share_prefix=True)], keep_cache=True)
    assert after["n_reused"] == steered["n_prompt"] - 1


def test_a_condition_is_read_on_the_whole_prompt_whatever_other_readings_may_leave_out(model: ps.Model) -> None:
    tokens = model.tokenize(PROMPT)
    n = len(tokens)

    def answer(*edits: Any) -> dict[str, Any]:
        model.run_requests([Request(tokens, n, share_prefix=True)])
        request = Request(tokens, n, ps.Steering(edits), N_NEW, GREEDY, share_prefix=True, reads_from=n - 1,
                          reads=({1: np.eye(64)[0]},), ignore_end=True)  # fmt: skip
        (result,) = model.run_requests([request], keep_cache=True)
        return result

    assert answer()["n_reused"] == n - 1
    conditional = answer(ps.When(condition(), STRONG, np.full(4, -1e9)))
    assert conditional["n_reused"] == 0
    assert conditional["tokens"] == answer(replace(STRONG, scope="response"))["tokens"] != answer()["tokens"]


def test_several_conditions_open_and_close_independently(model: ps.Model) -> None:
    edits = [ps.Add(samples.vector(seed=k), 0.3) for k in (11, 12, 13)]
    always = ps.Add(samples.vector(seed=14), 0.2, scope="response")
    for opened in ((0, 2), (1,), (0, 1, 2)):
        gates = [
            ps.When(condition(k), edit, threshold=OPEN if k in opened else SHUT, pool=("mean", "last")[k % 2])
            for k, edit in enumerate(edits)
        ]
        expected = from_the_last_token_on(model, *[edits[k] for k in opened], always)
        assert same(complete(model, *gates, always), expected)
    none = [ps.When(condition(k), edit, threshold=SHUT) for k, edit in enumerate(edits)]
    assert same(complete(model, *none), complete(model))


def test_a_condition_on_the_prompt_and_one_on_each_token_hold_together(model: ps.Model) -> None:
    per_token = ps.When(condition(21), ps.Add(samples.vector(seed=22), 0.4, scope="response"), threshold=np.zeros(4),
                        on="token")  # fmt: skip
    gate = ps.When(condition(), STRONG, threshold=OPEN)
    complete(model)
    expected = complete(model, per_token, replace(STRONG, scope="response"), keep_cache=True, share=True)
    assert same(complete(model, per_token, gate), expected)


def test_readings_that_a_caller_asks_for_are_not_those_of_the_conditions(model: ps.Model) -> None:
    vector = condition(31, layers=(0, 2))
    plain = readings_of_prompt(model, vector)[:, [0, 2]]
    with model.session(reuse_cache=False) as session:
        gates = [ps.When(condition(k, layers=(1, 2)), STRONG * 0.1, threshold=t) for k, t in ((1, SHUT), (2, OPEN))]
        answer = session.submit(
            prompt=PROMPT, steer=ps.Steering(gates), readings=[vector, (vector, [1])], max_tokens=3, temperature=0
        ).result()
    n = len(plain)
    assert [r.shape for r in answer.readings] == [(n + len(answer.tokens), 2), (n + len(answer.tokens), 1)]
    # up to the prompt's last token nothing is steered; float32 sums of 64 products
    assert np.abs(answer.readings[0][: n - 1] - plain[: n - 1]).max() < 1e-4
    assert np.isfinite(answer.readings[0]).all()


# ---- capture and plain texts

PAIRS = [("how deep is the water", "very deep"), ("and cold", "so cold that it hurts")]


def test_a_capture_under_an_open_gate_is_one_of_the_scope_response_and_under_a_closed_one_unsteered(
    model: ps.Model,
) -> None:
    edit = ps.Add(samples.vector(seed=2), 0.3)
    for pool in ("mean", "last"):
        for span in ("response", "all"):
            ask = {"pool": pool, "span": span}
            unsteered = model.capture(PAIRS, **ask)
            response = model.capture(PAIRS, steer=ps.Steering([replace(edit, scope="response")]), **ask)
            opened = model.capture(PAIRS, steer=ps.Steering([ps.When(condition(), edit, threshold=OPEN)]), **ask)
            closed = model.capture(PAIRS, steer=ps.Steering([ps.When(condition(), edit, threshold=SHUT)]), **ask)
            # with a pool to fill, the whole decode is computed once more: the same shapes
            assert np.array_equal(opened, response, equal_nan=True)
            assert np.array_equal(closed, unsteered, equal_nan=True)
            assert not np.array_equal(opened, unsteered, equal_nan=True)


def test_a_raw_capture_under_an_open_gate_differs_from_the_scope_response_as_llama_cpp_does_for_the_same_shapes(
    tiny: Loaded, model: ps.Model
) -> None:
    edit = ps.Add(samples.vector(seed=2), 0.3)
    gate = ps.Steering([ps.When(condition(), edit, threshold=OPEN)])
    opened = model.capture(PAIRS, pool="raw", span="all", steer=gate)
    response = model.capture(PAIRS, pool="raw", span="all", steer=ps.Steering([replace(edit, scope="response")]))

    # unsteered llama.cpp: both texts in one decode, and then all but the prompts' beginnings once more
    texts = [model.pair_tokens(*pair) for pair in PAIRS]
    plain = tiny.plain_context(n_parallel=2, n_batch=256, watch=True)
    states = []
    for begins in ((0, 0), [n_prompt - 1 for _, n_prompt in texts]):
        at = [(q, t) for q, (tokens, _) in enumerate(texts) for t in range(begins[q], len(tokens))]
        for q, begin in enumerate(begins):
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(plain.handle), q, begin, -1)
        plain.decode([texts[q][0][t] for q, t in at], [t for _, t in at], [q for q, _ in at], [False] * len(at))
        states.append({where: np.stack([plain.states[il][i] for il in range(3)]) for i, where in enumerate(at)})
    own = max(float(np.abs(rows - states[0][where]).max()) for where, rows in states[1].items())

    for (_, n_prompt), one, two in zip(texts, opened, response, strict=True):
        assert np.array_equal(one[: n_prompt - 1], two[: n_prompt - 1], equal_nan=True)
        assert np.nanmax(np.abs(one - two)) < 3 * own  # seen: 1.0 times
    assert own < 0.02


def test_prompts_of_several_decodes_are_read_to_their_end_before_the_gate_opens(tiny_path: Path) -> None:
    edit = ps.Add(samples.vector(seed=2), 0.3)
    gate = ps.When(condition(), edit, threshold=OPEN)
    long = [(PROMPT * 3, "very deep, " + PROMPT)]
    with ps.Model(tiny_path, n_ctx=256, n_parallel=2, n_batch=16, n_threads=2) as small:
        for pool in ("mean", "last"):
            opened = small.capture(long, pool=pool, span="all", steer=ps.Steering([gate]))
            response = small.capture(long, pool=pool, span="all", steer=ps.Steering([replace(edit, scope="response")]))
            unsteered = small.capture(long, pool=pool, span="all")
            assert np.nanmax(np.abs(opened - response)) < 1e-5 * np.nanmax(np.abs(response))
            assert np.nanmax(np.abs(opened - unsteered)) > 0.01


def test_a_text_without_a_response_never_meets_a_condition(model: ps.Model) -> None:
    gate = ps.When(condition(), STRONG, threshold=OPEN)
    texts = [PROMPT, "whale"]
    for got, expected in zip(model.logits(texts, steer=gate), model.logits(texts), strict=True):
        assert np.array_equal(got, expected)
    directions = samples.vector(seed=6).directions
    for got, expected in zip(model.readings(texts, directions, steer=gate), model.readings(texts, directions),
                             strict=True):  # fmt: skip
        assert got.shape == (len(expected), 4, 1)
        assert np.array_equal(got, expected)


def test_an_inert_edit_needs_no_condition(model: ps.Model) -> None:
    assert same(complete(model, ps.When(condition(), STRONG * 0.0, threshold=OPEN)), complete(model))


# ---- where it cannot be read


def test_a_mean_over_the_prompt_at_the_last_block_is_refused_and_its_last_token_is_not(model: ps.Model) -> None:
    at_last = condition(layers=(3,))
    for layers in (None, (1, 3)):
        with pytest.raises(ps.ArgumentError, match="block 3, the last one"):
            model.generate(PROMPT, steer=ps.When(at_last, STRONG, threshold=OPEN, layers=layers))
    reading = float(readings_of_prompt(model, at_last)[-1, 3])
    unsteered = complete(model)
    for margin in (0.01, -0.01):
        gate = ps.When(at_last, STRONG, threshold=reading - margin, pool="last")
        assert same(complete(model, gate), unsteered) == (margin < 0)


def test_a_capture_that_leaves_the_last_block_without_a_row_for_the_condition_is_refused(model: ps.Model) -> None:
    gate = ps.Steering([ps.When(condition(layers=(3,)), STRONG, threshold=OPEN, pool="last")])
    for options in ({}, {"pool": "raw"}, {"pool": "last"}, {"last_layer": True}):
        with pytest.raises(ps.ArgumentError, match="block 3, the last one"):
            model.capture(PAIRS, steer=gate, **options)
    one = PAIRS[:1]  # few enough tokens for a row each in one decode
    opened = model.capture(one, span="all", last_layer=True, steer=gate)
    response = model.capture(one, span="all", last_layer=True, steer=replace(STRONG, scope="response"))
    assert np.array_equal(opened, response)
    assert np.isfinite(opened).all()


@pytest.mark.parametrize("name", ["tiny", "recurrent", "hybrid", "sliding"])
def test_a_model_that_cannot_go_back_is_steered_from_the_first_generated_token_on(
    name: str, request: pytest.FixtureRequest
) -> None:
    loaded: Loaded = request.getfixturevalue(name)
    il, n, n_new = 2, 9, 4
    v = vector_for(loaded, 1)
    gate = ps.When(vector_for(loaded, 2), ps.Add(v, 1.0, raw=True, layers=(il,)), threshold=OPEN)
    session = loaded.session(n_parallel=2)
    one = Request(loaded.tokens(n), n, ps.Steering([gate]), n_new, GREEDY, raw=(0, n + n_new), reads=basis(loaded, il),
                  ignore_end=True)  # fmt: skip
    other = replace(one, tokens=loaded.tokens(15, 20), n_prompt=15, steering=ps.Steering(), raw=(0, 15 + n_new))
    for result in engine.run(session, steerable(loaded), [one, other], taps=Taps(raw_layers=(il,))):
        h, after = before_edits_of_own(result, n_conditions=int(result["n_prompt"] == n)), result["raw"][0]
        steered = [t for t in range(len(h)) if not np.array_equal(after[t], h[t])]
        if result["n_prompt"] == 15:
            assert steered == []
            continue
        first = n - 1 if name in ("tiny", "sliding") else n
        assert steered == list(range(first, n + n_new))
        assert np.array_equal(after[first:], h[first:] + v.directions[il])


def before_edits_of_own(result: dict[str, Any], *, n_conditions: int) -> np.ndarray:
    """As before_edits, for a request whose conditions' read-outs come first."""
    at = -1  # the basis is of one block, the highest that is read
    return before_edits({"readings": result["readings"][:, at:, n_conditions:]})
