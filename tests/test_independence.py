"""Requests that share a batch do not feel each other's steering, whatever joins and leaves.

"Identical" is np.array_equal: both runs make the same decodes, in which only the steering of other requests differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from live_requests import basis, before_edits, submit, vector_for

import personasteer as ps
from personasteer import _core
from personasteer.engine import Request, Sampling

if TYPE_CHECKING:
    from conftest import Loaded

Result = dict[str, Any]
N_REQUESTS = 16
GREEDY = Sampling(temperature=0)
engines = pytest.mark.parametrize("native", [False, True], ids=["fused", "generic"])
OTHERS = ["recurrent", "hybrid", "sliding"]


@pytest.fixture(params=OTHERS)
def other(request: pytest.FixtureRequest) -> Loaded:
    """A recurrent, a hybrid and a sliding-window model."""
    loaded: Loaded = request.getfixturevalue(request.param)
    return loaded


@dataclass(frozen=True)
class Visit:
    """A request that joins before the decode `start` and, unless it is done, leaves before the decode `cancel`."""

    request: Request
    start: int
    cancel: int | None


def some_edits(loaded: Loaded, q: int, rng: np.random.Generator) -> ps.Steering:
    """The q-th of sixteen steerings: every operator, under different scopes and at different blocks."""
    n = loaded.n_layer
    seed = int(rng.integers(1 << 30))
    a = vector_for(loaded, seed, [int(rng.integers(n))])
    b = vector_for(loaded, seed + 1, sorted({int(il) for il in rng.integers(n, size=2)}))
    scope: Any = ("all", "response", "prompt", (1, 3, 5))[q % 4]
    zero, last = np.zeros(n), (n - 1,)
    edits: list[Any] = [
        [ps.Add(a, 0.4, scope=scope)],
        [ps.Add(b, -0.3, keep_norm=True, scope=scope), ps.Add(a, 0.15)],
        [ps.Cap(b, tau=zero, scope=scope)],
        [ps.Floor(b, tau=zero + 1, scope=scope), ps.Ablate(a, layers=(1,))],
        [ps.Ablate(a), ps.Add(b, 0.4, layers=last, half_life=3.0)],
        [ps.Redirect(a, b, layers=(0, n - 1), share=0.7, scope=scope)],
        [ps.When(a, ps.Add(b, 0.4, scope=scope), threshold=zero, on="token"), ps.Ablate(a, layers=last, share=0.5)],
        [
            ps.When(b, ps.Cap(a, tau=zero, layers=last), threshold=zero, on="token", above=False),
            ps.Add(a, 0.2, start=2, stop=5),
            ps.Add(a, 0.1, keep_norm=True),
        ],
    ][q % 8]
    return ps.Steering(edits)


def schedule(loaded: Loaded, seed: int, n_ctx: int, *, n_most: int = 1 << 30, full: bool = False) -> list[Visit]:
    """Sixteen requests with prompts and forced answers of random lengths, at most n_most tokens each. With `full`, most
    fill their share of the cache to the last cells.
    """
    rng = np.random.default_rng(seed)
    visits = []
    for q in range(N_REQUESTS):
        n = int(rng.integers(n_ctx // 3, n_ctx - 2)) if full else int(rng.integers(4, min(24, n_ctx - 12)))
        n = min(n, n_most)
        n_more = n_ctx - n - int(rng.integers(3)) if full and rng.random() < 0.8 else int(rng.integers(min(12, n_most)))
        edits = some_edits(loaded, q, rng)
        # devices hold two mixes of a request a decode: no steering here has more for given tokens
        n_prompt = n if any(getattr(e, "half_life", None) for e in edits) else int(rng.integers(1, n + 1))
        request = Request(
            loaded.tokens(n, int(rng.integers(100))), n_prompt, edits, n_more, GREEDY, outputs=(max(0, n - 3), n),
            keep_logits=True, raw=(0, n + n_more), ignore_end=True,
        )  # fmt: skip
        start = int(rng.integers(20))
        visits.append(Visit(request, start, start + int(rng.integers(1, 20)) if rng.random() < 0.3 else None))
    return visits


def play(session: Any, loaded: Loaded, visits: Sequence[Visit], steered: Sequence[int]) -> tuple[list[Result], int]:
    """The results, and the number of decodes, where only the requests `steered` are steered."""
    session.reset()
    ids: dict[int, int] = {}
    results: dict[int, Result] = {}
    step = 0
    while len(ids) < len(visits) or session.busy:
        for q, visit in enumerate(visits):
            if visit.start == step:
                request = visit.request if q in steered else replace(visit.request, steering=ps.Steering())
                ids[q] = submit(session, loaded, request)
            if visit.cancel == step:
                session.cancel(ids[q])
        session.step()
        step += 1
        results |= {r["id"]: r for r in session.take_results()}
    return [results[ids[q]] for q in range(len(visits))], step


def same(one: Result, two: Result) -> bool:
    return (
        one["tokens"] == two["tokens"]
        and one["finish"] == two["finish"]
        and np.array_equal(one["logits"], two["logits"])
        and np.array_equal(one["raw"], two["raw"], equal_nan=True)
    )


def assert_independent(
    loaded: Loaded, seeds: Sequence[int], sizes: Sequence[tuple[int, int]], *, native: bool = False, **options: Any
) -> None:
    """Schedule by schedule: one request that keeps its steering never feels that the others lost theirs."""
    n_felt = n_others = 0
    sessions: dict[tuple[int, int], Any] = {}
    for seed in seeds:
        n_parallel, n_ctx = sizes[seed % len(sizes)]
        if (n_parallel, n_ctx) not in sessions:
            session = loaded.session(n_ctx=n_ctx, n_parallel=n_parallel, n_outputs=16, native=native)
            session.set_taps(raw_layers=sorted({0, 1, loaded.n_layer // 2, loaded.n_layer - 1}))
            sessions[n_parallel, n_ctx] = session
        session = sessions[n_parallel, n_ctx]
        visits = schedule(loaded, seed, n_ctx, **options)
        kept = int(np.random.default_rng(seed).integers(N_REQUESTS))
        for visit in visits:  # tables only grow, and a sum over a longer one is another sum
            submit(session, loaded, visit.request)
        together, n_decodes = play(session, loaded, visits, range(N_REQUESTS))
        alone, n_decodes_alone = play(session, loaded, visits, [kept])
        unsteered, _ = play(session, loaded, visits, [])

        assert n_decodes == n_decodes_alone, seed
        assert [r["error"] for r in together] == [""] * N_REQUESTS, seed
        assert same(together[kept], alone[kept]), (seed, kept)
        n_felt += not same(alone[kept], unsteered[kept])
        n_others += sum(not same(one, two) for one, two in zip(together, alone, strict=True))
    assert n_felt >= len(seeds) // 2  # the steering was at work, except on requests that left at once
    assert n_others >= len(seeds) * N_REQUESTS // 2  # and so was that of the others


@engines
def test_fifty_random_schedules_of_sixteen_requests_never_let_one_feel_the_steering_of_another(
    tiny: Loaded, native: bool
) -> None:
    assert_independent(tiny, range(50), [(16, 40), (4, 48), (3, 36), (16, 96)], native=native)


@engines
def test_requests_that_fill_the_cache_of_any_kind_of_memory_never_feel_the_steering_of_another(
    other: Loaded, native: bool
) -> None:
    # llama.cpp rounds the cache up to 256 cells: these sizes leave none over
    assert_independent(other, range(4), [(2, 128), (4, 64), (8, 32)], native=native, full=True)


def test_requests_that_join_and_leave_at_random_never_feel_the_steering_of_another_on_any_kind_of_memory(
    other: Loaded,
) -> None:
    assert_independent(other, range(4), [(16, 40), (4, 48)])


def test_requests_on_a_real_model_never_feel_the_steering_of_another(smollm2: Loaded) -> None:
    assert_independent(smollm2, range(2), [(16, 64)], n_most=8)


@engines
@pytest.mark.parametrize("name", ["tiny", *OTHERS])
def test_every_token_of_sixteen_requests_gets_its_own_requests_row_and_nothing_else(
    name: str, native: bool, request: pytest.FixtureRequest
) -> None:
    loaded: Loaded = request.getfixturevalue(name)
    il = 2
    rows = [vector_for(loaded, q).directions[il] for q in range(N_REQUESTS)]
    visits = []
    for q, visit in enumerate(schedule(loaded, 7, 64, full=True)):
        add = ps.Add(vector_for(loaded, q), 1.0, raw=True, layers=(il,))
        wanted = replace(visit.request, steering=ps.Steering([add]), reads=basis(loaded, il))
        visits.append(replace(visit, request=wanted))
    session = loaded.session(n_ctx=64, n_parallel=4, n_outputs=16, native=native)
    session.set_taps(raw_layers=[il])
    results, _ = play(session, loaded, visits, range(N_REQUESTS))

    n_tokens = 0
    for q, result in enumerate(results):
        h = before_edits(result)
        if not len(h):  # cancelled in the queue
            continue
        # one addition of float32 numbers: not a bit off
        assert np.array_equal(result["raw"][0, : len(h)], h + rows[q]), q
        n_tokens += len(h)
    assert n_tokens > N_REQUESTS * 24


# ---- alone, against llama.cpp


def one_mix(loaded: Loaded, data: np.ndarray, layers: Sequence[int]) -> Any:
    return _core.Mix(key=1, layers=list(layers), data=data[list(layers)])


def test_a_steered_text_on_any_kind_of_memory_is_llama_cpps_own_result_under_the_control_vector(other: Loaded) -> None:
    layers, data = list(range(1, other.n_layer)), other.directions()
    for n, n_batch, outputs in ((128, 48, (100, 128)), (30, 64, (0, 30)), (65, 16, (60, 65))):
        tokens = other.tokens(n, n)
        size = {"n_ctx": 128, "n_parallel": 2, "n_batch": n_batch, "n_outputs": 4}
        plain = other.plain_context(**size)
        plain.set_cvec(data, 1, other.n_layer - 1)
        (expected,), _ = plain.compute([tokens], [outputs])
        (unsteered,), _ = other.plain_context(**size).compute([tokens], [outputs])
        session = other.session(**size)
        session.submit(tokens=tokens, outputs=outputs, keep_logits=True, mixes=[one_mix(other, data, layers)],
                       mix_of_token=[0] * n)  # fmt: skip
        while session.busy:
            session.step()
        (steered,) = session.take_results()
        assert np.array_equal(steered["logits"], expected), n
        assert np.abs(unsteered - expected).max(axis=1).min() > 1e-2


def test_greedy_text_on_any_kind_of_memory_up_to_a_full_cache_is_llama_cpps_own_under_the_control_vector(
    other: Loaded,
) -> None:
    layers, data = list(range(1, other.n_layer)), other.directions()
    n_prompt, n_ctx = 100, 256
    tokens = other.tokens(n_prompt)
    session = other.session(n_ctx=n_ctx, n_batch=64)
    session.submit(tokens=tokens, mixes=[one_mix(other, data, layers)], mix_of_token=[0] * n_prompt,
                   generated=[(0, 0, 0)], max_tokens=1000, ignore_end=True)  # fmt: skip
    while session.busy:
        session.step()
    (steered,) = session.take_results()

    plain = other.plain_context(n_ctx=n_ctx, n_batch=64)
    plain.set_cvec(data, 1, other.n_layer - 1)
    plain.decode(tokens[:64], range(64), [0] * 64, [False] * 64)
    (row,) = plain.decode(tokens[64:], range(64, n_prompt), [0] * 36, [False] * 35 + [True])
    replayed = [int(row.argmax())]
    for position in range(n_prompt, n_ctx - 1):
        (row,) = plain.decode(replayed[-1:], [position], [0], [True])
        replayed.append(int(row.argmax()))
    assert len(steered["tokens"]) == n_ctx - n_prompt
    assert steered["tokens"] == replayed
