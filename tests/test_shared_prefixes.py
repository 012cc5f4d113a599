"""What texts have in common is computed once, and every text's rows are those that it has alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

import personasteer as ps
from personasteer import engine, shared_prefixes
from personasteer.engine import Request
from personasteer.shared_prefixes import fold_last_rows

HEAD = "Talk like a sad person. What is new? "
OTHER = "Talk like a merry person. What is new? "
# beginnings of one answer, far apart and next to each other, the same text twice, and branches late and early
TEXTS = [
    HEAD + "Well, no",
    OTHER + "Well, nothing",
    "Talk",
    HEAD + "Well",
    HEAD + "Well, nothing",
    OTHER + "Well",
    HEAD + "Well, no",
    HEAD + "All of it",
    "Nothing in common",
    HEAD + "Well, not now",
]
PAIRS = [("What is new today?", "Nothing at all."), ("What is new today?", "A lot."), ("Why?", "Because.")]


@pytest.fixture(scope="module", params=["tiny_path", "smollm2_path"])
def model(request: pytest.FixtureRequest) -> Iterator[ps.Model]:
    path: Path = request.getfixturevalue(request.param)
    with ps.Model(path, n_ctx=128, n_threads=1) as m:
        yield m


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> Iterator[ps.Model]:
    with ps.Model(tiny_path, n_ctx=128, n_threads=1) as m:
        yield m


def one_token(model: ps.Model) -> str:
    """A text of one token: the tiny model begins texts with one of its own."""
    text = "" if model.n_vocab < 1000 else "The"
    assert len(model.tokenize(text)) == 1
    return text


def alone(model: ps.Model, items: list[Any], steer: list[Any] | None = None, **options: Any) -> np.ndarray:
    steer = steer or [None] * len(items)
    return np.concatenate([model.capture([x], steer=[s], **options) for x, s in zip(items, steer, strict=True)])


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.asarray((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))


def request(tokens: list[int], steering: Any = None, outputs: bool = True) -> Request:
    span = (len(tokens) - 1, len(tokens))
    return Request(tokens, None, steering or ps.Steering(), raw=span, outputs=span if outputs else (0, 0))


def test_texts_that_share_beginnings_have_the_rows_and_the_direction_that_they_have_alone(model: ps.Model) -> None:
    texts = [*TEXTS, one_token(model), one_token(model)]
    got, expected = model.capture(texts, pool="last", share_prefix=True), alone(model, texts, pool="last")
    assert got.shape == (len(texts), model.n_layer, model.n_embd)
    # another place in the batch and in the cache: the rounding of 16-bit keys and values, and of 8-bit activations
    assert cosines(got, expected).min() > 0.999
    directions = [x[[0, 3, 4, 6, 7, 9]].mean(0) - x[[1, 5]].mean(0) for x in (got, expected)]
    assert cosines(*directions).min() > 0.999
    # the order is the given one: at half the depth each text is nearer to itself than to any other one
    middle = model.n_layer // 2
    near = cosines(got[:10, None, middle], expected[None, :10, middle])
    assert near.argmax(axis=1).tolist() == [0, 1, 2, 3, 4, 5, 0, 7, 8, 9]  # 6 is 0's text


def test_each_distinct_beginning_is_computed_once(tiny: ps.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    run = engine.run

    def counted(*args: Any, **options: Any) -> list[dict[str, Any]]:
        results = run(*args, **options)
        computed.append(sum(r["n_prompt"] - r["n_reused"] for r in results))
        return results

    monkeypatch.setattr(engine, "run", counted)
    tiny.capture(TEXTS, pool="last", share_prefix=True)
    tokens = [tiny.tokenize(t) for t in TEXTS]
    distinct = len({tuple(t[: i + 1]) for t in tokens for i in range(len(t))})
    # a branch that shares less than 8 tokens more than what is ready is computed at once instead of waiting
    assert distinct <= sum(computed) < distinct + 8 * len(TEXTS) < sum(map(len, tokens)) / 1.5


def test_more_texts_than_are_computed_at_once_have_the_same_rows(
    tiny: ps.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tiny.capture(TEXTS, pool="last", share_prefix=True)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(shared_prefixes, "N_PARALLEL", 2)
    got = tiny.capture(TEXTS, pool="last", share_prefix=True, progress=lambda done, total: seen.append((done, total)))
    assert cosines(got, expected).min() > 0.9999
    assert seen[-1] == (len(TEXTS), len(TEXTS))
    assert seen == sorted(seen)


def test_blocks_that_are_not_asked_for_are_nan_and_the_others_as_before(tiny: ps.Model) -> None:
    some = tiny.capture(TEXTS, pool="last", share_prefix=True, layers=[0, 2])
    every = tiny.capture(TEXTS, pool="last", share_prefix=True)
    assert cosines(some[:, [0, 2]], every[:, [0, 2]]).min() > 0.9999
    assert np.isnan(some[:, [1, 3]]).all()
    assert np.isfinite(every).all()


few_tokens = st.lists(st.integers(1, 2), min_size=1, max_size=7)


@settings(deadline=None)  # other processes may hold the machine
@drawn(st.lists(st.tuples(few_tokens, st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_a_row_is_kept_of_the_text_and_the_steering_that_it_was_asked_of(
    texts: list[tuple[list[int], bool, bool]],
) -> None:
    steering = ps.Steering([samples.vector() * 0.2])
    given = [request(tokens, steering if steered else None, outputs) for tokens, steered, outputs in texts]
    folded, where = fold_last_rows(given)
    for (tokens, steered, outputs), (i, row) in zip(texts, where, strict=True):
        computed = folded[i]
        assert computed.raw is not None
        at = computed.raw[0] + row
        assert list(computed.tokens[: at + 1]) == tokens
        assert bool(computed.steering) == steered
        assert at < computed.raw[1]
        assert not outputs or computed.outputs[0] <= at < computed.outputs[1]
    computed_tokens = sum(len(r.tokens) for r in folded)
    assert computed_tokens <= sum(len(tokens) for tokens, _, _ in texts)


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_pairs_that_share_a_prompt_have_the_rows_that_they_have_alone(tiny: ps.Model, pool: str) -> None:
    options: dict[str, Any] = {"pool": pool, "last_layer": True}
    got, expected = tiny.capture(PAIRS, share_prefix=True, **options), alone(tiny, PAIRS, **options)
    assert cosines(got, expected).min() > 0.9999
    raw = tiny.capture(PAIRS, pool="raw", share_prefix=True)
    assert [len(r) for r in raw] == [len(tiny.tokenize(a, add_special=False)) for _, a in PAIRS]
    summary = [r[-1] if pool == "last" else r.mean(0) for r in raw]
    assert cosines(np.stack(summary)[:, :3], expected[:, :3]).min() > 0.9999


def test_equal_texts_with_different_steering_never_share_a_row(tiny: ps.Model) -> None:
    v, u = samples.vector(), samples.vector(seed=1)
    texts = [TEXTS[0]] * 4 + [TEXTS[4]] * 4
    steer = [None, v * 0.4, u * 0.4, ps.Add(v, 0.4, scope=tuple(range(20, 40)))] * 2
    got = tiny.capture(texts, pool="last", share_prefix=True, steer=steer)
    expected = alone(tiny, texts, steer, pool="last")
    assert cosines(got, expected).min() > 0.9999
    for i in range(4):
        for j in range(i):
            assert cosines(got[i, 2:], got[j, 2:]).max() < 0.9999, (i, j)  # the edits are at blocks 1 and 2


def test_a_text_that_another_one_goes_on_from_is_computed_with_it() -> None:
    lists = [[1, 2, 3], [5], [1, 2], [1, 2, 3, 4], [1, 2, 9], [1, 2, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    given = [request(t) for t in lists]
    folded, where = fold_last_rows(given)
    # an output row per token lies between the rows of one request: a gap of five is too many
    assert [list(r.tokens) for r in folded] == [[1, 2, 3, 4], lists[6], [1, 2, 9], [5]]
    assert [r.raw for r in folded] == [r.outputs for r in folded] == [(1, 4), (8, 9), (2, 3), (0, 1)]
    assert all(r.share_prefix for r in folded)
    assert where == [(0, 1), (3, 0), (0, 0), (0, 2), (2, 0), (0, 1), (1, 0)]
    without, _ = fold_last_rows([request(t, outputs=False) for t in lists])
    assert [list(r.tokens) for r in without] == [lists[6], [1, 2, 9], [5]]


def test_a_steered_text_is_a_request_of_its_own() -> None:
    steering = ps.Steering([samples.vector() * 0.1])
    folded, where = fold_last_rows([request([1, 2], steering), request([1, 2, 3]), request([1, 2, 3], steering)])
    assert len(folded) == 3
    assert [(list(folded[i].tokens), bool(folded[i].steering), row) for i, row in where] == [
        ([1, 2], True, 0), ([1, 2, 3], False, 0), ([1, 2, 3], True, 0)
    ]  # fmt: skip


@pytest.mark.parametrize(("n_parallel", "kept"), [(3, 40), (1, 20)])
def test_a_text_that_goes_on_otherwise_leaves_the_other_one_where_an_empty_sequence_is(
    tiny_path: Path, n_parallel: int, kept: int
) -> None:
    first = [1, *range(40, 79)]
    with ps.Model(tiny_path, n_ctx=128, n_threads=1, n_parallel=n_parallel) as m:

        def reused(tokens: list[int]) -> int:
            return int(m.run_requests([Request(tokens, share_prefix=True)], keep_cache=True)[0]["n_reused"])

        assert reused(first) == 0
        assert reused([*first[:20], *range(100, 130)]) == 20
        assert reused([*first, 99]) == kept
