"""Sessions that compute only the blocks they read, and that keep a prefix: the same numbers, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import N_THREADS, Loaded

from personasteer import _core
from personasteer.errors import ContextError, ModelError, VectorError

N = 24  # tokens of the prefix


def session(loaded: Loaded, n_blocks: int = 0, *, n_ctx: int = 160, n_cells: int = 512) -> Any:
    return _core.Session(
        model=loaded.core, n_ctx=n_ctx, n_parallel=4, n_batch=64, n_threads=N_THREADS, n_outputs=64, n_cells=n_cells,
        n_blocks=n_blocks,
    )  # fmt: skip


def readout(loaded: Loaded, block: int) -> Any:
    return _core.Readout((block,), loaded.directions()[None, block : block + 1].reshape(1, 1, -1))


def readings(running: Any, texts: list[list[int]], reads: Any, **more: Any) -> list[np.ndarray]:
    ids = [running.submit(tokens=tokens, reads=reads, **more) for tokens in texts]
    while running.busy:
        running.step()
    found = {r["id"]: r for r in running.take_results()}
    return [found[i]["readings"] for i in ids]


def texts(loaded: Loaded) -> list[list[int]]:
    return [loaded.tokens(n, start) for n, start in ((9, 0), (100, 9), (30, 40), (17, 3), (64, 60))]


def test_the_blocks_that_are_left_out_change_no_reading(loaded: Loaded) -> None:
    for block in (0, loaded.n_layer // 2, loaded.n_layer - 2):
        reads = readout(loaded, block)
        whole = readings(session(loaded), texts(loaded), reads)
        part = readings(session(loaded, block + 1), texts(loaded), reads)
        for a, b in zip(whole, part, strict=True):
            assert np.isfinite(a).all()
            np.testing.assert_array_equal(a, b)


def test_captures_below_the_last_computed_block_are_the_same(loaded: Loaded) -> None:
    block = loaded.n_layer // 2
    sums = []
    for n_blocks in (0, block + 1):
        running = session(loaded, n_blocks)
        running.set_taps(pool_layers=[0, block], n_pools_per_request=1, raw_layers=[block])
        running.submit(tokens=loaded.tokens(50), pools=[(10, 50)], raws=[(0, 50)])
        while running.busy:
            running.step()
        result = running.take_results()[0]
        sums.append((result["pool_sums"][0], result["raw"]))
    np.testing.assert_array_equal(sums[0][0], sums[1][0])
    np.testing.assert_array_equal(sums[0][1], sums[1][1])


def test_what_a_part_of_the_blocks_cannot_give_is_refused(tiny: Loaded) -> None:
    running = session(tiny, 2)
    with pytest.raises(VectorError, match="block 2 is not computed here, only 2 blocks are"):
        running.submit(tokens=tiny.tokens(5), reads=readout(tiny, 2))
    mix = _core.Mix(1, (1,), tiny.directions()[:1])
    for more in ({"max_tokens": 1}, {"outputs": (0, 1)}, {"mixes": [mix], "mix_of_token": [0] * 5}):
        with pytest.raises(ContextError, match="computes 2 blocks, no outputs and no edits"):
            running.submit(tokens=tiny.tokens(5), **more)
    with pytest.raises(VectorError, match="block 3 is not computed here"):
        running.set_taps(pool_layers=[3], n_pools_per_request=1)
    with pytest.raises(ContextError, match="has no room for a request of 160"):
        session(tiny, n_cells=100)


def test_numbers_behind_a_kept_prefix_do_not_depend_on_what_was_computed_before(loaded: Loaded) -> None:
    block = loaded.n_layer // 2
    reads, prefix = readout(loaded, block), loaded.tokens(N, 7)
    packs = [[prefix + loaded.tokens(n, k) for n in (5, 40, 11)] for k in range(3)]

    def run(order: list[int]) -> dict[int, list[np.ndarray]]:
        running, found = session(loaded, block + 1), {}
        for k in order:
            if not running.keep_prefix(N):
                readings(running, [prefix], reads, reuse_prefix=True)
            found[k] = readings(running, packs[k], reads, reads_from=N, reuse_prefix=True)
        return found

    first, again, alone = run([0, 1, 2]), run([2, 2, 0, 1]), run([1])
    for k in range(3):
        for a, b in zip(first[k], again[k], strict=True):
            assert np.isnan(a[:N]).all()
            assert np.isfinite(a[N:]).all()
            np.testing.assert_array_equal(a, b)
    for a, b in zip(first[1], alone[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_prefix_that_is_not_there_is_not_kept(tiny: Loaded) -> None:
    running = session(tiny)
    assert not running.keep_prefix(4)
    readings(running, [tiny.tokens(10)], readout(tiny, 1), reuse_prefix=True)
    assert not running.keep_prefix(11)
    assert not running.keep_prefix(4)  # all is forgotten by then
    running.submit(tokens=tiny.tokens(10))
    with pytest.raises(ModelError, match="while requests are running"):
        running.keep_prefix(4)


def test_what_follows_a_kept_prefix_is_forgotten(tiny: Loaded) -> None:
    running = session(tiny)
    tokens = tiny.tokens(10)
    for n_kept in (0, 4):
        running.submit(tokens=tokens, outputs=(9, 10), keep_logits=True, reuse_prefix=True)
        while running.busy:
            running.step()
        (result,) = running.take_results()
        assert result["n_reused"] == n_kept
        if not n_kept:
            expected = result["logits"]
            assert running.keep_prefix(4)
    np.testing.assert_allclose(result["logits"], expected, rtol=0, atol=2e-3)


def test_a_recurrent_state_cannot_go_back_to_a_prefix(recurrent: Loaded) -> None:
    running = session(recurrent)
    readings(running, [recurrent.tokens(10)], readout(recurrent, 0))
    assert not running.keep_prefix(4)
