"""Every operator of personasteer.steering against NumPy, on the block outputs of running models.

Both ways to compute an edit are tested: the fused node that blocks on the CPU take, and the chain of ggml's own
operations that other devices take, here on the CPU as well ("generic"). The formulas stand in tests/reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import reference
import samples
from hypothesis import given, settings
from hypothesis import strategies as st

import personasteer as ps
from personasteer import _core, engine
from personasteer.engine import Request, Sampling, Taps
from personasteer.tiny_model import write_tiny_model

if TYPE_CHECKING:
    from conftest import Loaded

N_TOKENS, N_PROMPT = 16, 7

# Of the largest number of a row. A row in float32 is 6e-8 away from what it stands for; sums of n_embd products and the
# few sums after them keep to some of these roundings.
OF_STATE = 2e-6
# Of the length of what an edit changes. Where this is far shorter than the row (the first token of SmolLM2 is a
# hundred times as long as the others), the row's own rounding counts: four times half a unit in the last place.
OF_CHANGE, ROUNDING = 1e-4, 4 * 2.0**-24


@dataclass
class Bench:
    """A model, native sessions of both kinds on it, and one text."""

    loaded: Loaded
    model: ps.Model
    _sessions: dict[tuple[int, ...], Any] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> list[int]:
        return self.loaded.tokens(N_TOKENS)

    @cached_property
    def blocks(self) -> tuple[int, int, int]:
        """The first, a middle and the last block."""
        return 0, self.loaded.n_layer // 2, self.loaded.n_layer - 1

    def session(self, native: bool, *, n_parallel: int = 1, n_batch: int = 64) -> Any:
        key = (native, n_parallel, n_batch)
        if key not in self._sessions:
            self._sessions[key] = self.loaded.session(native=native, n_parallel=n_parallel, n_batch=n_batch)
        return self._sessions[key]

    def run(self, native: bool, requests: Sequence[Request], *, n_batch: int = 64, raw: Sequence[int] = ()) -> Any:
        n_parallel = 1 if len(requests) == 1 else 4
        session = self.session(native, n_parallel=n_parallel, n_batch=n_batch)
        return engine.run(session, self.model, requests, taps=Taps(raw_layers=tuple(raw)))

    def states(self, native: bool, *edits: Any, n_batch: int = 64) -> dict[int, np.ndarray]:
        """{il: (N_TOKENS, n_embd)} after the edits, for the first, the middle and the last block."""
        request = Request(self.tokens, N_PROMPT, ps.Steering(edits), outputs=(0, N_TOKENS), raw=(0, N_TOKENS))
        (result,) = self.run(native, [request], n_batch=n_batch, raw=self.blocks)
        return dict(zip(self.blocks, result["raw"], strict=True))

    @cached_property
    def unsteered(self) -> dict[int, np.ndarray]:
        return self.states(False)

    def vector(self, seed: int, **more: Any) -> ps.PersonaVector:
        """Random directions with a share of the text's mean state at the three blocks: readings then are far from 0, as
        those of a derived vector are. Lengths differ from block to block and are not 1.
        """
        rng = np.random.default_rng(seed)
        data = rng.standard_normal((self.loaded.n_layer, self.loaded.n_embd))
        data /= np.linalg.norm(data, axis=1, keepdims=True)
        for il, h in self.unsteered.items():
            mean = h[1:].mean(axis=0)
            data[il] += 0.5 * mean / np.linalg.norm(mean)
        data *= rng.uniform(0.3, 3.0, (self.loaded.n_layer, 1))
        return ps.PersonaVector(data.astype(np.float32), (self.loaded.n_layer // 2,), f"vector {seed}", **more)

    def middle(self, vector: ps.PersonaVector) -> np.ndarray:
        """(n_layer,) thresholds that half of the unsteered text's tokens are above, at the three blocks."""
        out = np.full(self.loaded.n_layer, np.nan)
        for il, h in self.unsteered.items():
            readings = np.sort(h.astype(np.float64) @ reference.unit(vector, il))
            out[il] = readings[N_TOKENS // 2 - 1 : N_TOKENS // 2 + 1].mean()
        return out


@pytest.fixture(scope="module")
def small(tiny: Loaded) -> Iterator[Bench]:
    with ps.Model(tiny.path, n_ctx=256, n_threads=2) as model:
        yield Bench(tiny, model)


@pytest.fixture(scope="module")
def smollm2_bench(smollm2: Loaded) -> Iterator[Bench]:
    with ps.Model(smollm2.path, n_ctx=256, n_threads=2) as model:
        yield Bench(smollm2, model)


@pytest.fixture(scope="module", params=["small", "smollm2_bench"], ids=["tiny", "smollm2"])
def bench(request: pytest.FixtureRequest) -> Bench:
    loaded: Bench = request.getfixturevalue(request.param)
    return loaded


engines = pytest.mark.parametrize("native", [False, True], ids=["fused", "generic"])


def errors(got: np.ndarray, expected: np.ndarray, before: np.ndarray) -> tuple[float, float]:
    """The largest error of a token: of its row, as a share of the largest number; and of the row's change, as a share
    of the allowed one (at most 1).
    """
    off = got.astype(np.float64) - expected
    change = np.linalg.norm(expected - before.astype(np.float64), axis=1)
    allowed = OF_CHANGE * change + ROUNDING * np.linalg.norm(before.astype(np.float64), axis=1)
    of_state = np.abs(off).max(axis=1) / np.abs(expected).max(axis=1)
    return float(of_state.max()), float((np.linalg.norm(off, axis=1) / allowed).max())


# ---- one operator at one block


@dataclass
class Case:
    """What an operator is made from: vectors, with thresholds that half of the tokens are above, and the block."""

    bench: Bench
    at: list[int]

    @cached_property
    def v(self) -> ps.PersonaVector:
        vector = self.bench.vector(1)
        middle = self.bench.middle(vector)
        return replace(vector, thresholds=np.nan_to_num(middle), means=np.nan_to_num(0.8 * middle))

    @cached_property
    def w(self) -> ps.PersonaVector:
        return self.bench.vector(2)

    @cached_property
    def c(self) -> ps.PersonaVector:
        return self.bench.vector(3)

    def when(self, edit: Any, *, above: bool) -> ps.When:
        return ps.When(self.c, edit, threshold=self.bench.middle(self.c), above=above, on="token")


HALF, ALL = N_TOKENS // 2, N_TOKENS
# name: (how many tokens it changes, the edit)
OPERATORS: dict[str, tuple[int | None, Callable[[Case], Any]]] = {
    "add": (ALL, lambda c: ps.Add(c.v, -0.3, layers=c.at)),
    "add raw": (ALL, lambda c: ps.Add(c.v, 1.5, raw=True, layers=c.at)),
    "add and keep the norm": (ALL, lambda c: ps.Add(c.v, 0.4, keep_norm=True, layers=c.at)),
    "cap": (HALF, lambda c: ps.Cap(c.v, layers=c.at)),
    "cap at a number": (HALF, lambda c: ps.Cap(c.w, float(c.bench.middle(c.w)[c.at[0]]), layers=c.at)),
    "floor": (HALF, lambda c: ps.Floor(c.v, layers=c.at)),
    "ablate": (ALL, lambda c: ps.Ablate(c.v, layers=c.at)),
    "ablate to the mean": (ALL, lambda c: ps.Ablate(c.v, "mean", layers=c.at)),
    "ablate to readings": (ALL, lambda c: ps.Ablate(c.v, -3.0 * c.v.thresholds, layers=c.at)),
    "ablate a part": (ALL, lambda c: ps.Ablate(c.v, share=0.4, layers=c.at)),
    "redirect": (ALL, lambda c: ps.Redirect(c.v, c.w, layers=c.at)),
    "redirect a part": (ALL, lambda c: ps.Redirect(c.v, c.w, share=0.7, layers=c.at)),
    "add above": (HALF, lambda c: c.when(ps.Add(c.v, 0.3, layers=c.at), above=True)),
    "add below": (HALF, lambda c: c.when(ps.Add(c.v, 0.3, layers=c.at), above=False)),
    "add and keep the norm above": (HALF, lambda c: c.when(ps.Add(c.v, 0.3, keep_norm=True, layers=c.at), above=True)),
    "cap above": (None, lambda c: c.when(ps.Cap(c.v, layers=c.at), above=True)),
    "cap below": (None, lambda c: c.when(ps.Cap(c.v, layers=c.at), above=False)),
    "redirect above": (HALF, lambda c: c.when(ps.Redirect(c.v, c.w, layers=c.at), above=True)),
    "add with a half-life": (ALL, lambda c: ps.Add(c.v, 0.5, half_life=3.5, layers=c.at)),
    "cap with a half-life": (HALF, lambda c: ps.Cap(c.v, half_life=2.0, layers=c.at)),
}


@engines
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_alone_at_a_block_makes_of_each_token_what_its_formula_says(
    bench: Bench, name: str, native: bool
) -> None:
    n_changed, make = OPERATORS[name]
    fading = "half-life" in name
    # every token of a fading edit is steered in a way of its own, of which the generic engine holds two per decode
    n_batch = 2 if fading else 64
    before = bench.states(native, n_batch=n_batch) if fading else bench.unsteered
    for il in bench.blocks:
        edit = make(Case(bench, [il]))
        after = bench.states(native, edit, n_batch=n_batch)
        expected = reference.after(before[il], [edit], il, bench.model.norms, N_PROMPT)
        of_state, of_change = errors(after[il], expected, before[il])
        assert of_state < OF_STATE
        assert of_change < 1
        same = (expected == before[il]).all(axis=1)  # where the edit does nothing, not a bit may change
        assert np.array_equal(after[il][same], before[il][same])
        assert (after[il][~same] != before[il][~same]).any(axis=1).all()
        assert same.sum() == N_TOKENS - n_changed if n_changed is not None else 0 < same.sum() < N_TOKENS
        for earlier in bench.blocks[: bench.blocks.index(il)]:
            assert np.array_equal(after[earlier], before[earlier])


def assert_that_all_operators_act_together(bench: Bench, native: bool) -> None:
    vectors = [bench.vector(k) for k in range(10, 20)]
    at = [replace(v, thresholds=np.nan_to_num(bench.middle(v))) for v in vectors]
    for il in bench.blocks:
        here = {"layers": [il]}
        edits = [
            ps.Cap(at[0], **here),
            ps.Add(at[1], 0.3, **here),
            ps.When(at[2], ps.Add(at[0], -0.2, **here), on="token"),
            ps.Add(at[3], 0.4, keep_norm=True, **here),
            ps.When(at[4], ps.Add(at[5], 0.3, keep_norm=True, **here), above=False, on="token"),
            ps.Floor(at[1], **here),
            ps.When(at[0], ps.Cap(at[6], **here), on="token"),
            ps.Ablate(at[7], share=0.6, **here),
            ps.Redirect(at[8], at[9], **here),
            ps.Cap(at[9], **here),
        ]
        before = bench.unsteered[il]
        expected = reference.after(before, edits, il, bench.model.norms, N_PROMPT)
        for listed in (edits, edits[::-1]):  # the list's own order does not matter
            of_state, of_change = errors(bench.states(native, *listed)[il], expected, before)
            assert of_state < OF_STATE
            assert of_change < 1


@engines
def test_all_operators_together_at_a_block_act_in_the_order_turn_add_window(bench: Bench, native: bool) -> None:
    assert_that_all_operators_act_together(bench, native)


@engines
def test_rows_of_a_width_that_vector_registers_do_not_divide_are_edited_whole(
    tiny: Loaded, tmp_path: Path, native: bool
) -> None:
    path = write_tiny_model(tmp_path / "odd.gguf", n_embd=72)
    loaded = replace(tiny, name="odd", path=path, core=_core.Model(str(path)))
    with ps.Model(path, n_ctx=64, n_threads=2) as model:
        assert_that_all_operators_act_together(Bench(loaded, model), native)


@engines
@pytest.mark.parametrize("kind", [ps.Cap, ps.Floor])
def test_a_reading_ends_at_the_threshold_where_it_binds_and_elsewhere_the_row_is_untouched(
    bench: Bench, kind: type[ps.Cap], native: bool
) -> None:
    v = bench.vector(4)
    tau = bench.middle(v)
    for il in bench.blocks:
        h = bench.unsteered[il]
        u = reference.unit(v, il)
        after = bench.states(native, kind(v, tau, layers=[il]))[il]
        readings = h.astype(np.float64) @ u
        binds = readings > tau[il] if kind is ps.Cap else readings < tau[il]
        assert binds.sum() == N_TOKENS // 2
        np.testing.assert_allclose(after[binds].astype(np.float64) @ u, tau[il], rtol=1e-4)
        assert np.array_equal(after[~binds], h[~binds])
        # the published rule, h - v max(<h, v> - tau, 0), and its mirror
        excess = np.maximum(readings - tau[il], 0.0) if kind is ps.Cap else np.minimum(readings - tau[il], 0.0)
        of_state, of_change = errors(after, h - np.outer(excess, u), h)
        assert of_state < OF_STATE
        assert of_change < 1
        beyond = bench.states(native, kind(v, [1e6 if kind is ps.Cap else -1e6] * bench.loaded.n_layer, layers=[il]))
        assert all(np.array_equal(beyond[k], bench.unsteered[k]) for k in bench.blocks)


# ---- several operators at several blocks


N_SETS = 12  # random sets of edits
PAIRS = 2  # tokens per decode here: a prompt with several scopes and half-lives then takes the same decodes everywhere


def random_edits(bench: Bench, seed: int) -> list[Any]:
    """Up to 8 edits of all kinds with a vector each, at random blocks, scopes and strengths beyond the usual ones."""
    rng = np.random.default_rng(seed)
    n_layer = bench.loaded.n_layer
    out: list[Any] = []
    for k in range(int(rng.integers(3, 9))):
        v, w, c = (bench.vector(1000 * seed + 10 * k + i) for i in range(3))
        v = replace(v, weights=dict(enumerate(rng.uniform(0.2, 1.0, n_layer))))
        where: dict[str, Any] = {
            "layers": tuple(rng.choice(n_layer, int(rng.integers(1, n_layer + 1)), replace=False)),
            "scope": ("all", "all", "prompt", "response", (1, 4, 9, 12))[rng.integers(5)],
            "half_life": (None, None, 2.5)[rng.integers(3)],
        }
        strength = float(rng.uniform(-0.4, 0.4))
        share, target = abs(strength) / 0.4, rng.normal(0.0, 1.0, n_layer)
        tau = np.where(np.isnan(middle := bench.middle(v)), target, middle)
        edit = (
            ps.Add(v, strength, **where),
            ps.Add(v, strength, keep_norm=True, **where),
            ps.Cap(v, tau, **where),
            ps.Floor(v, tau, **where),
            ps.Ablate(v, target if strength > 0 else 0.0, share, **where),
            ps.Redirect(v, w, share, **where),
        )[rng.integers(6)]
        if rng.random() < 0.3:
            edit = ps.When(c, edit, np.nan_to_num(bench.middle(c)), above=bool(rng.integers(2)), on="token")
        out.append(edit)
    return out


def edited_blocks(edits: Sequence[Any]) -> list[int]:
    return sorted({il for e in edits for il in reference.layers_of(e)})


def steered(bench: Bench, native: bool, edits: Sequence[Any], n_batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N_TOKENS, n_vocab) and states (n_layer, N_TOKENS, n_embd)."""
    request = Request(bench.tokens, N_PROMPT, ps.Steering(edits), outputs=(0, N_TOKENS), raw=(0, N_TOKENS),
                      keep_logits=True)  # fmt: skip
    (result,) = bench.run(native, [request], n_batch=n_batch, raw=range(bench.loaded.n_layer))
    return result["logits"], result["raw"]


def assert_that_each_block_is_edited_and_the_next_reads_it(
    bench: Bench, native: bool, edits: Sequence[Any], n_batch: int
) -> None:
    """Each edited block against the reference, and everything else against llama.cpp alone, exactly.

    llama.cpp's callback on the block outputs puts the edited blocks' rows of the steered run in place of its own: what
    it has at an edited block before that is what the edit got, and all that follows from the rows must be the same.
    """
    logits, states = steered(bench, native, edits, n_batch)
    plain = bench.loaded.plain_context(watch=True, n_batch=n_batch)
    plain.replaces = True
    rows = np.full_like(states, np.nan)
    for il in edited_blocks(edits):
        plain.reset()
        _, (before,) = plain.compute([bench.tokens], [(0, N_TOKENS)], [rows])
        expected = reference.after(before[il], edits, il, bench.model.norms, N_PROMPT)
        assert (expected != before[il]).any()
        of_state, of_change = errors(states[il], expected, before[il])
        assert of_state < OF_STATE
        assert of_change < 1
        rows[il] = states[il]
    plain.reset()
    (following,), (others,) = plain.compute([bench.tokens], [(0, N_TOKENS)], [rows])
    assert np.array_equal(states, others)
    assert np.array_equal(logits, following)


@engines
@pytest.mark.parametrize("seed", range(N_SETS))
def test_random_edits_at_many_blocks_act_as_their_formulas_and_later_blocks_read_what_they_leave(
    small: Bench, seed: int, native: bool
) -> None:
    assert_that_each_block_is_edited_and_the_next_reads_it(small, native, random_edits(small, seed), PAIRS)


@engines
def test_random_edits_change_the_logits_as_llama_cpp_does_where_the_reference_adds_their_change(
    small: Bench, native: bool
) -> None:
    # Both add to the same states, with float32 roundings (6e-8) in another order. Where one of these tips the rounding
    # of a key or value to float16 in the cache (2^-11 of it), the logits, of about 4, differ by up to 1.9e-3 (the
    # largest of 120 sets); where none does, by 1e-6. The edits change them by 0.37 or more.
    plain = small.loaded.plain_context(watch=True, n_batch=PAIRS)
    (unsteered,), _ = plain.compute([small.tokens], [(0, N_TOKENS)])
    for seed in range(N_SETS):
        edits = random_edits(small, seed)
        changes = np.zeros((small.loaded.n_layer, N_TOKENS, small.loaded.n_embd), np.float32)
        for il in edited_blocks(edits):
            plain.reset()
            _, (states,) = plain.compute([small.tokens], [(0, N_TOKENS)], [changes])
            changes[il] = reference.after(states[il], edits, il, small.model.norms, N_PROMPT) - states[il]
        plain.reset()
        (expected,), _ = plain.compute([small.tokens], [(0, N_TOKENS)], [changes])
        logits, _ = steered(small, native, edits, PAIRS)
        assert np.abs(logits - expected).max() < 5e-3 < 0.3 < np.abs(expected - unsteered).max()


@engines
def test_sixty_four_windows_at_one_block_keep_to_their_formulas(smollm2_bench: Bench, native: bool) -> None:
    bench, il = smollm2_bench, 10
    rng = np.random.default_rng(64)
    h = steered(bench, False, [], 64)[1][il].astype(np.float64)
    edits: list[Any] = []
    for k in range(64):
        data = np.full((bench.loaded.n_layer, bench.loaded.n_embd), np.nan)
        data[il] = rng.standard_normal(bench.loaded.n_embd)
        v = ps.PersonaVector.from_array(data, [il])
        half = float(np.median(h @ reference.unit(v, il)))
        edits.append((ps.Cap(v, half), ps.Floor(v, half), ps.Ablate(v, share=0.5), ps.Cap(v, 1e6))[k % 4])
    assert_that_each_block_is_edited_and_the_next_reads_it(bench, native, edits, 64)
    after = steered(bench, native, edits, 64)[1][il].astype(np.float64)
    for k, edit in enumerate(edits):  # with the dual basis no edit spoils what another one set
        p, q = (x @ reference.unit(edit.vector, il) for x in (h, after))
        set_to = (np.minimum(p, edit.tau), np.maximum(p, edit.tau)) if k % 4 < 2 else (0.5 * p, p)
        np.testing.assert_allclose(q, set_to[k % 2], atol=ROUNDING * np.linalg.norm(h, axis=1).max())


# ---- one direction, several edits


@engines
def test_a_cap_of_the_opposite_vector_is_a_floor_to_the_bit(small: Bench, native: bool) -> None:
    v = small.vector(5)
    tau = small.middle(v)
    stored = replace(v, thresholds=np.nan_to_num(tau))
    for il in small.blocks:
        floored = small.states(native, ps.Floor(v, tau, layers=[il]))
        capped = small.states(native, ps.Cap(-v, -tau, layers=[il]))
        by_stored = small.states(native, ps.Cap(-stored, layers=[il]))
        assert (floored[il] != small.unsteered[il]).any()
        assert all(np.array_equal(floored[k], capped[k]) for k in small.blocks)
        assert all(np.array_equal(floored[k], by_stored[k]) for k in small.blocks)


@engines
def test_edits_of_one_direction_are_one_window_whatever_the_length_and_sign_of_the_data(
    small: Bench, native: bool
) -> None:
    il, v, w = 2, small.vector(6), small.vector(7)
    h = small.unsteered[il].astype(np.float64)
    low, middle, high = np.quantile(h @ reference.unit(v, il), [0.3, 0.5, 0.7])
    longer, opposite = replace(v, directions=3 * v.directions), -v

    def states(*edits: Any) -> np.ndarray:
        return small.states(native, *(replace(e, layers=(il,)) for e in edits))[il]

    edits = [ps.Cap(v, high, layers=[il]), ps.Floor(longer, low, layers=[il]), ps.Ablate(w, layers=[il])]
    between = states(*edits)
    of_state, of_change = errors(between, reference.after(h, edits, il, small.model.norms), h)
    assert of_state < OF_STATE
    assert of_change < 1
    readings = between.astype(np.float64) @ reference.unit(v, il)
    assert readings.min() == pytest.approx(low, rel=1e-4)
    assert readings.max() == pytest.approx(high, rel=1e-4)
    for one, same in (
        ([ps.Cap(v, middle)], [ps.Cap(v, high), ps.Cap(longer, middle)]),  # the lower cap is the cap
        ([ps.Ablate(v, middle)], [ps.Ablate(v, middle), ps.Cap(v, high), ps.Cap(opposite, -low)]),
        ([ps.Ablate(v, middle)], [ps.Cap(v, middle), ps.Floor(v, middle)]),
        ([ps.Cap(v, high), ps.Floor(v, low)], [ps.Floor(opposite, -high), ps.Cap(opposite, -low)]),
    ):
        np.testing.assert_allclose(states(*same), states(*one), rtol=0, atol=OF_STATE * np.abs(h).max())


@engines
def test_a_redirection_counts_both_directions_the_way_round_that_it_names_them(small: Bench, native: bool) -> None:
    v, w, x = (small.vector(k) for k in (6, 7, 8))
    tau = small.middle(w)
    for il in small.blocks:
        here = {"layers": [il]}
        for edits in (
            [ps.Redirect(-v, w, **here)],
            [ps.Redirect(v, -w, **here)],
            [ps.Cap(-w, -tau, **here), ps.Redirect(v, w, **here)],
            [ps.Redirect(x, -v, **here), ps.Redirect(v, w, share=0.5, **here)],
            [ps.Redirect(-v, w, **here), ps.Redirect(-w, v, **here)],  # the two change places
        ):
            h = small.unsteered[il]
            of_state, of_change = errors(
                small.states(native, *edits)[il], reference.after(h, edits, il, small.model.norms), h
            )
            assert of_state < OF_STATE
            assert of_change < 1


@engines
def test_directions_as_alike_as_the_limit_allows_are_still_set_one_by_one(small: Bench, native: bool) -> None:
    il, v = 2, small.vector(8)
    h = small.unsteered[il].astype(np.float64)
    u = reference.unit(v, il)
    other = np.random.default_rng(0).standard_normal(u.size)
    other -= (other @ u) * u
    for cosine, allowed in ((1 - 2.1e-4, True), (1 - 1.9e-4, False)):  # condition number (1 + cosine) / (1 - cosine)
        near = cosine * u + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other)
        w = ps.PersonaVector.from_array(np.tile(near, (4, 1)), [il])
        edits = [ps.Cap(v, -0.5, layers=[il]), ps.Floor(w, 0.5, layers=[il])]
        if not allowed:
            with pytest.raises(ps.VectorError, match=r"too much alike .*condition number 1\.05e\+04, limit 10000"):
                small.states(native, *edits)
            continue
        after = small.states(native, *edits)[il].astype(np.float64)
        # two readings of the same row, each with its roundings, end up this many times as long in the row
        grown = 1 / np.sqrt(1 - cosine)
        assert np.abs(after - reference.after(h, edits, il, small.model.norms)).max() < 4 * 2.0**-24 * 40 * grown


# ---- what is refused


V, W, C = (samples.vector(seed=s) for s in (1, 2, 3))
STORED = samples.vector(seed=4, thresholds=np.zeros(4, np.float32), means=np.ones(4, np.float32))
LIKE_V = ps.PersonaVector(V.directions + np.float32(1e-3) * W.directions, (1, 2))
NOT_AT_2 = ps.PersonaVector(np.where(np.arange(4)[:, None] == 2, np.nan, V.directions), (1,))
ZEROS, ONES, NAN_AT_1 = np.zeros(4), np.ones(4), np.array([0.0, np.nan, 0.0, 0.0])
HERE: dict[str, Any] = {"layers": [1]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ps.Add(V, float("nan")), "strength must be a finite number, not nan"),
        (lambda: ps.Add(V, float("inf")), "strength must be a finite number, not inf"),
        (lambda: V * 1e300 * 1e300, "strength must be a finite number, not inf"),
        (lambda: ps.Ablate(V, share=1.1), "share must be between 0 and 1, not 1.1"),
        (lambda: ps.Ablate(V, share=-0.1), "share must be between 0 and 1, not -0.1"),
        (lambda: ps.Ablate(V, share=float("nan")), "share must be between 0 and 1, not nan"),
        (lambda: ps.Ablate(V, share=0.6) * 2, "share must be between 0 and 1, not 1.2"),
        (lambda: ps.Ablate(V, "median"), "to must be a number, an array or \"mean\", not 'median'"),
        (lambda: ps.Redirect(V, W, 2.0), "share must be between 0 and 1, not 2.0"),
        (lambda: -1 * ps.Redirect(V, W), "share must be between 0 and 1, not -1.0"),
        (lambda: ps.Cap(V, np.zeros((4, 1))), "tau must have one number for each layer, not the shape \\(4, 1\\)"),
        (lambda: ps.Floor(V, "high"), "tau must be numbers, one for each layer, not 'high'"),
        (lambda: ps.Ablate(V, [[0.0], 1.0]), "to must be numbers, one for each layer"),
        (lambda: ps.When(C, V * 0.1, {}), "threshold must be numbers, one for each layer"),
        (lambda: ps.Cap(V, ZEROS) * 0.5, "Cap has no strength"),
        (lambda: ps.Steering([V * 0.3, ps.Floor(V)]) * 0.5, "Floor has no strength"),
        (lambda: ps.Add(V, 0.1, scope="answer"), "scope must be one of all, prompt, response, .* not 'answer'"),
        (lambda: ps.Cap(V, scope=(3, -1)), "token positions must be a list of integers from 0"),
        (lambda: ps.Cap(V, scope=(0.5,)), "token positions must be a list of integers from 0"),
        (lambda: ps.Add(V, 0.1, scope=3), "token positions must be a list of integers from 0, not 3"),
        (lambda: ps.Add(V, 0.1, start=4, stop=4), "the schedule is empty: start 4, stop 4"),
        (lambda: ps.Ablate(V, start=4, stop=-1), "the schedule is empty: start 4, stop -1"),
        (lambda: ps.Add(V, 0.1, half_life=0), "half_life must be a positive number of tokens, not 0"),
        (lambda: ps.Floor(V, half_life=-2.0), "half_life must be a positive number of tokens, not -2.0"),
        (lambda: ps.Cap(V, half_life=float("inf")), "half_life must be a positive number of tokens, not inf"),
        (lambda: ps.When(C, ps.When(C, V * 0.1)), "When needs one edit such as vector \\* 0.3, not When"),
        (lambda: ps.When(C, V), "When needs one edit .* not a bare PersonaVector"),
        (lambda: ps.When(C, [V * 0.1]), "When needs one edit .* not list"),
        (lambda: ps.When("anger", V * 0.1), "the condition must be a PersonaVector, not str"),
        (lambda: ps.When(C, V * 0.1, on="text"), "on must be prompt or token, not 'text'"),
        (lambda: ps.When(C, V * 0.1, pool="max"), "pool must be mean or last, not 'max'"),
    ],
)  # fmt: skip
def test_an_edit_outside_its_range_cannot_be_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ps.ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        ([ps.Cap(V)], ps.VectorError, "stores no thresholds: pass tau="),
        ([ps.Floor(V)], ps.VectorError, "stores no thresholds: pass tau="),
        ([ps.Ablate(V, "mean")], ps.VectorError, "stores no means: pass to="),
        ([ps.When(C, V * 0.1)], ps.VectorError, "stores no thresholds: pass threshold="),
        ([ps.When(C, V * 0.1, on="token")], ps.VectorError, "stores no thresholds: pass threshold="),
        ([ps.Cap(V, 0.5)], ps.ArgumentError, "tau=0.5 is one number for 2 layers"),
        ([ps.Ablate(V, 0.5)], ps.ArgumentError, "to=0.5 is one number for 4 layers"),
        ([ps.When(C, V * 0.1, 0.5, on="token")], ps.ArgumentError, "threshold=0.5 is one number for 2 layers"),
        ([ps.When(C, V * 0.1, 0.5)], ps.ArgumentError, "threshold=0.5 is one number for 2 layers"),
        ([ps.Cap(V, NAN_AT_1)], ps.VectorError, "tau is not finite at layer 1"),
        ([ps.Floor(V, [0.0, 0.0, np.inf, 0.0])], ps.VectorError, "tau is not finite at layer 2"),
        ([ps.Cap(V, np.nan, **HERE)], ps.VectorError, "tau is not finite at layer 1"),
        ([ps.Ablate(V, [0.0, 0.0, 0.0, np.nan])], ps.VectorError, "to is not finite at layer 3"),
        ([ps.When(C, V * 0.1, NAN_AT_1, on="token")], ps.VectorError, "threshold is not finite at layer 1"),
        ([ps.When(C, V * 0.1, NAN_AT_1)], ps.VectorError, "threshold is not finite at layer 1"),
        ([ps.Cap(V, np.zeros(3))], ps.ArgumentError, "tau must have one number for each of the 4 layers, not .*3"),
        ([ps.Cap(V, np.zeros(5))], ps.ArgumentError, "tau must have one number for each of the 4 layers, not .*5"),
        ([ps.Ablate(V, [])], ps.ArgumentError, "to must have one number for each of the 4 layers"),
        ([ps.Ablate(V), ps.Ablate(LIKE_V)], ps.VectorError, "layer 0 are too much alike .*condition number"),
        ([ps.Redirect(V, LIKE_V)], ps.VectorError, "too much alike"),
        ([ps.Redirect(V, -V)], ps.VectorError, "from a direction to itself"),
        ([ps.Cap(V, ZEROS), ps.Floor(V, ONES)], ps.VectorError, "contradict each other: at least 1, at most 0"),
        ([ps.Ablate(V), ps.Ablate(V, ONES)], ps.VectorError, "contradict each other: at least 1, at most 0"),
        ([ps.Cap(V, ZEROS), ps.Cap(-V, -ONES)], ps.VectorError, "contradict each other: at least 1, at most 0"),
        ([ps.Ablate(V), ps.Ablate(V, share=0.5)], ps.VectorError, "twice at layer 0, with different shares"),
        ([ps.Cap(V, ZEROS), ps.Cap(V, ZEROS, half_life=2)], ps.VectorError, "twice at layer 1, with different"),
        ([ps.Cap(V, ZEROS), ps.When(STORED, ps.Cap(V, ZEROS), on="token")], ps.VectorError, "twice at layer 1"),
        ([ps.Cap(V, ZEROS), ps.Redirect(V, W)], ps.VectorError, "twice at layer 1"),
        ([ps.When(STORED, V * 0.01, np.full(4, k / 10), on="token") for k in range(65)], ps.VectorError,
         "more than 64 terms at layer 1"),
        ([ps.Add(V, 0.1, layers=[4])], ps.VectorError, "layer 4 is out of range: the model has blocks 0 to 3"),
        ([ps.Cap(V, ZEROS, layers=[-1])], ps.VectorError, "layer -1 is out of range"),
        ([ps.Add(V, 0.1, layers=[])], ps.VectorError, "names no layer to steer at"),
        ([ps.Add(NOT_AT_2, 0.1, layers=[1, 2])], ps.VectorError, "no finite direction at layer 2"),
        ([ps.Redirect(V, NOT_AT_2, layers=[2])], ps.VectorError, "no finite direction at layer 2"),
        ([ps.When(NOT_AT_2, V * 0.1, ZEROS, on="token")], ps.VectorError, "no finite direction at layer 2"),
        ([ps.Add(samples.vector(n_embd=32), 0.1)], ps.IncompatibleVector, "4 blocks of width 32"),
        ([ps.Add(samples.vector(n_embd=32), 0.0)], ps.IncompatibleVector, "4 blocks of width 32"),
        ([ps.Redirect(V, samples.vector(n_layer=3))], ps.IncompatibleVector, "3 blocks of width 64"),
        ([ps.When(samples.vector(n_layer=3), V * 0.1, ZEROS, on="token")], ps.IncompatibleVector, "3 blocks"),
        ([ps.Add(V, 1e38), ps.Add(V, 1e39)], ps.VectorError, "not finite: the strength is too large"),
        ([ps.Add(V, 0.1, scope="user")], ps.ArgumentError, "scope 'user' needs messages in a chat template"),
        ([ps.When(C, V * 0.1, ZEROS, layers=[3])], ps.ArgumentError, 'block 3, the last one, .*pool="last"'),
    ],
)  # fmt: skip
def test_what_a_model_cannot_do_is_said_before_anything_is_computed(
    small: Bench, edits: list[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        small.model.logits(["A whale can be lonely."], steer=[ps.Steering(edits)])


def test_thresholds_count_where_the_edit_is_and_nowhere_else(small: Bench) -> None:
    tau = np.array([np.nan, 0.5, 0.5, np.inf])
    text = ["A whale can be lonely."]
    (several,) = small.model.logits(text, steer=ps.Cap(V, tau))
    (one_each,) = small.model.logits(text, steer=[ps.Cap(V, 0.5, layers=[1]) + ps.Cap(V, 0.5, layers=[2])])
    assert np.array_equal(several, one_each)
    assert not np.array_equal(several, small.model.logits(text)[0])


@engines
def test_sixty_four_conditions_at_one_block_fit_and_each_opens_for_its_own_tokens(small: Bench, native: bool) -> None:
    il = 2
    readings = np.sort(small.unsteered[il].astype(np.float64) @ reference.unit(C, il))
    between = np.linspace(readings[0], readings[-1], 64) + 1e-3
    edits = [ps.When(C, ps.Add(small.vector(k), 0.05, layers=[il]), float(between[k]), on="token") for k in range(64)]
    after = small.states(native, *edits)[il]
    of_state, of_change = errors(
        after, reference.after(small.unsteered[il], edits, il, small.model.norms), small.unsteered[il]
    )
    assert of_state < OF_STATE
    assert of_change < 1


IN_ANY_ORDER = sorted(name for name in OPERATORS if "half-life" not in name and "at a number" not in name)


@engines
@settings(deadline=None, max_examples=30)  # other processes may hold the machine
@given(names=st.lists(st.sampled_from(IN_ANY_ORDER), min_size=2, max_size=6), data=st.data())
def test_the_edits_of_a_request_do_the_same_in_any_order(
    small: Bench, native: bool, names: list[str], data: st.DataObject
) -> None:
    il = 2
    edits = []
    for k, name in enumerate(names):
        case = Case(small, [il])
        for i, of in enumerate("vwc"):  # directions of its own
            case.__dict__[of] = replace(small.vector(200 + 10 * k + i), thresholds=ZEROS, means=ONES)
        edits.append(OPERATORS[name][1](case))
    expected = reference.after(small.unsteered[il], edits, il, small.model.norms, N_PROMPT)
    for order in (edits, data.draw(st.permutations(edits))):
        of_state, of_change = errors(small.states(native, *order)[il], expected, small.unsteered[il])
        assert of_state < OF_STATE
        assert of_change < 1


@engines
def test_additions_above_and_below_one_threshold_each_keep_to_their_side(small: Bench, native: bool) -> None:
    case = Case(small, [2])
    for keep_norm in (False, True):
        edits = [case.when(ps.Add(v, 0.3, layers=[2], keep_norm=keep_norm), above=above)
                 for v, above in ((case.v, True), (case.w, False))]  # fmt: skip
        expected = reference.after(small.unsteered[2], edits, 2, small.model.norms)
        of_state, of_change = errors(small.states(native, *edits)[2], expected, small.unsteered[2])
        assert of_state < OF_STATE
        assert of_change < 1


@engines
def test_the_limit_of_terms_is_one_of_each_block(small: Bench, native: bool) -> None:
    units = [ps.PersonaVector.from_array(np.tile(np.eye(64)[k], (4, 1)), [1]) for k in range(40)]
    edits: list[Any] = [ps.Cap(unit, FAR, layers=(1, 2)) for unit in units]
    assert np.array_equal(small.states(native, *edits)[2], small.unsteered[2])
    more = [ps.When(C, ps.Add(V, 0.1, layers=[2]), 100.0 + k, on="token") for k in range(25)]
    assert np.array_equal(small.states(native, *edits, *more[1:])[2], small.unsteered[2])
    with pytest.raises(ps.VectorError, match="more than 64 terms at layer 2"):
        small.states(native, *edits, *more)


@engines
def test_a_redirection_is_at_the_blocks_where_both_have_a_direction(small: Bench, native: bool) -> None:
    v, w = small.vector(1), small.vector(2)
    data = w.directions.copy()
    data[[0, 3]] = np.nan
    some = ps.Redirect(v, ps.PersonaVector(data, (1,)))
    named = ps.Redirect(v, w, layers=(1, 2))
    assert sorted(some.terms(small.model)) == [1, 2]
    got, expected = small.states(native, some), small.states(native, named)
    assert all(np.array_equal(got[il], expected[il]) for il in small.blocks)


# ---- edits that do nothing, and edits of others

N_EACH, N_EACH_PROMPT, N_MORE = 12, 8, 3  # tokens of each request, of its prompt, and generated after them
POOL = [samples.vector(seed=100 + k, layers=((k % 4, 3), (0, 1, 2), (2,), (1, 3))[k // 4 % 4]) for k in range(48)]
FAR = np.full(4, 1e9)
INACTIVE: dict[str, Callable[[ps.PersonaVector, ps.PersonaVector], Any]] = {
    "strength 0": lambda v, w: v * 0.0,
    "strength 0, raw": lambda v, w: ps.Add(v, 0.0, raw=True),
    "strength 0, norm kept": lambda v, w: ps.Add(v, -0.0, keep_norm=True),
    "faded out": lambda v, w: ps.Add(v, 0.3, half_life=1e-3, start=3),
    "there and back": lambda v, w: v * 0.25 + v * -0.25,
    "share 0": lambda v, w: ps.Ablate(v, share=0.0),
    "nothing redirected": lambda v, w: ps.Redirect(v, w, share=0.0),
    "token gate above": lambda v, w: ps.When(w, v * 0.3, FAR, on="token"),
    "token gate below": lambda v, w: ps.When(w, v * 0.3, -FAR, above=False, on="token"),
    "token gate beyond float32": lambda v, w: ps.When(w, v * 0.3, 1e30 * FAR, on="token"),
    "token gate, norm kept": lambda v, w: ps.When(w, ps.Add(v, 0.4, keep_norm=True), FAR, on="token"),
    "token gate, cap": lambda v, w: ps.When(w, ps.Cap(v, ZEROS), FAR, on="token"),
    "token gate, ablation": lambda v, w: ps.When(w, ps.Ablate(v), FAR, on="token"),
    "token gate, redirection": lambda v, w: ps.When(w, ps.Redirect(v, w), FAR, on="token"),
    "prompt gate": lambda v, w: ps.When(w, v * 0.3, FAR, layers=(0, 2)),
    "prompt gate below": lambda v, w: ps.When(w, ps.Ablate(v), -FAR, above=False, pool="last"),
    "cap that does not bind": lambda v, w: ps.Cap(v, FAR),
    "floor that does not bind": lambda v, w: ps.Floor(v, -FAR, scope="response"),
    "cap beyond float32": lambda v, w: ps.Cap(v, 1e30 * FAR, scope="prompt"),
    "empty scope": lambda v, w: ps.Add(v, 0.3, scope=()),
    "positions outside": lambda v, w: ps.Ablate(v, scope=(N_EACH + N_MORE, 1000)),
    "schedule in the future": lambda v, w: ps.Add(v, 0.3, start=1000),
    "schedule in the past": lambda v, w: ps.Cap(v, ZEROS, start=-100, stop=-50),
}
ACTIVE: dict[str, Callable[[ps.PersonaVector, ps.PersonaVector], Any]] = {
    "add": lambda v, w: v * 0.3,
    "add to the response": lambda v, w: ps.Add(v, -0.3, scope="response"),
    "add, norm kept": lambda v, w: ps.Add(v, 0.4, keep_norm=True),
    "cap": lambda v, w: ps.Cap(v, -2.0 * ONES),
    "floor": lambda v, w: ps.Floor(v, 2.0 * ONES),
    "ablate": lambda v, w: ps.Ablate(v, share=0.9),
    "redirect": lambda v, w: ps.Redirect(v, w),
    "gated add": lambda v, w: ps.When(w, v * 0.5, ZEROS, on="token"),
    "gated cap": lambda v, w: ps.When(w, ps.Cap(v, -2.0 * ONES), ZEROS, above=False, on="token"),
    "gated turn": lambda v, w: ps.When(w, ps.Add(v, 0.5, keep_norm=True), ZEROS, on="token"),
}


def steering_of(kinds: Any, names: Sequence[str], first: int) -> ps.Steering:
    """Edits of these names, with vectors of their own from POOL[first] on."""
    edits = ps.Steering()
    for k, name in enumerate(names):
        edits += kinds[name](POOL[first + 2 * k], POOL[first + 2 * k + 1])
    return edits


def batch(bench: Bench, session: Any, steerings: Sequence[ps.Steering]) -> list[dict[str, Any]]:
    """Requests side by side: the logits of their given tokens, and three more tokens with their probabilities."""
    requests = [
        Request(bench.loaded.tokens(N_EACH, 11 * i), N_EACH_PROMPT, s, N_MORE, Sampling(temperature=0.0),
                outputs=(0, N_EACH), keep_logits=True, ignore_end=True, n_logprobs=2)
        for i, s in enumerate(steerings)
    ]  # fmt: skip
    return engine.run(session, bench.model, requests)


def alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (
        np.array_equal(a["logits"], b["logits"])
        and a["tokens"] == b["tokens"]
        and a["logprobs"] == b["logprobs"]
        and a["top_logprobs"] == b["top_logprobs"]
    )


# a fading edit beside others would make a third kind of token in a decode, which the generic engine splits in two
inactive_names = st.lists(st.sampled_from(sorted(set(INACTIVE) - {"faded out"})), max_size=5)
active_names = st.lists(st.sampled_from(sorted(ACTIVE)), min_size=1, max_size=4)
one_request = st.tuples(st.just(INACTIVE), inactive_names) | st.tuples(st.just(ACTIVE), active_names)


def assert_that_inactive_edits_change_nothing(
    bench: Bench, native: bool, requests: list[tuple[Any, list[str]]]
) -> None:
    unsteered = batch(bench, bench.loaded.session(n_parallel=4), [ps.Steering()] * len(requests))
    steerings = [steering_of(kinds, names, 12 * i) for i, (kinds, names) in enumerate(requests)]
    results = batch(bench, bench.session(native, n_parallel=4), steerings)
    for (kinds, names), got, plain in zip(requests, results, unsteered, strict=True):
        assert alike(got, plain) == (kinds is INACTIVE), names


@engines
@pytest.mark.parametrize("name", INACTIVE)
def test_each_way_to_do_nothing_leaves_the_unsteered_logits_to_the_bit(small: Bench, name: str, native: bool) -> None:
    requests = [(ACTIVE, ["add", "gated cap"]), (INACTIVE, [name]), (ACTIVE, ["cap", "add, norm kept"])]
    assert_that_inactive_edits_change_nothing(small, native, requests)


@engines
@settings(deadline=None, max_examples=40)  # other processes may hold the machine
@given(requests=st.lists(one_request, min_size=1, max_size=4))
def test_inactive_edits_of_any_kinds_beside_any_others_leave_the_unsteered_logits_to_the_bit(
    small: Bench, native: bool, requests: list[tuple[Any, list[str]]]
) -> None:
    assert_that_inactive_edits_change_nothing(small, native, requests)


@engines
def test_closed_conditions_and_edits_that_do_not_bind_change_no_bit_of_a_quantized_model(
    smollm2_bench: Bench, native: bool
) -> None:
    bench = smollm2_bench
    v, w = bench.vector(1), bench.vector(2)
    far = np.full(bench.loaded.n_layer, 1e9)
    at = {"layers": bench.blocks}
    idle = [
        ps.When(w, ps.Add(v, 0.3, **at), far, on="token"),
        ps.When(w, ps.Add(v, 0.3, keep_norm=True, **at), -far, above=False, on="token"),
        ps.When(w, ps.Add(v, 0.3, **at), far),
        ps.Cap(v, far, **at),
        ps.Floor(w, -far, scope="response", **at),
        ps.Ablate(bench.vector(3), share=0.0, **at),
        ps.Add(v, 0.3, start=1000, **at),
    ]
    busy = [
        ps.Add(w, 0.3, **at),
        ps.Ablate(v, **at),
        ps.When(w, ps.Add(v, 0.4, keep_norm=True, **at), 0 * far, on="token"),
    ]
    steerings = [ps.Steering(e) for e in (busy, idle, idle[::-1][:4], busy[:1])]
    unsteered = batch(bench, bench.loaded.session(n_parallel=4), [ps.Steering()] * 4)
    got = batch(bench, bench.session(native, n_parallel=4), steerings)
    assert [alike(a, b) for a, b in zip(got, unsteered, strict=True)] == [False, True, True, False]


@engines
def test_a_raw_text_without_a_response_is_untouched_by_what_is_for_one(small: Bench, native: bool) -> None:
    # conditions on the prompt that would hold, too
    v, w = POOL[0], POOL[4]
    tokens = small.tokens
    idle = [
        ps.Add(v, 0.3, scope="response"),
        ps.Cap(v, ZEROS, start=0),
        ps.When(w, v * 0.3, -FAR, pool="last"),
        ps.When(w, ps.Ablate(v), -FAR, layers=(1,)),
    ]

    def logits(*edits: Any) -> np.ndarray:
        request = Request(tokens, None, ps.Steering(edits), outputs=(0, N_TOKENS), keep_logits=True)
        return np.asarray(small.run(native, [request])[0]["logits"])

    assert np.array_equal(logits(*idle), logits())
    assert not np.array_equal(logits(*idle, w * 0.3), logits())


@engines
@settings(deadline=None, max_examples=30)  # other processes may hold the machine
@given(
    own=active_names,
    place=st.integers(0, 3),
    neighbours=st.lists(st.lists(one_request, min_size=3, max_size=3), min_size=2, max_size=3),
)
def test_a_request_gets_the_same_to_the_bit_whatever_edits_the_others_of_the_batch_have(
    small: Bench, native: bool, own: list[str], place: int, neighbours: list[list[tuple[Any, list[str]]]]
) -> None:
    session = small.session(native, n_parallel=4)
    # the tables of the generic engine only grow; sums over wider ones may round otherwise, so all that comes is here
    # before anything is compared
    everything = steering_of(ACTIVE, sorted(ACTIVE), 0)
    batch(small, session, [everything] * 4)
    mine = steering_of(ACTIVE, own, 36)
    alone = [ps.Steering()] * 4
    alone[place] = mine
    expected = batch(small, session, alone)[place]
    for others in neighbours:
        steerings = [steering_of(kinds, names, 12 * i) for i, (kinds, names) in enumerate(others)]
        steerings.insert(place, mine)
        results = batch(small, session, steerings)
        assert alike(results[place], expected)
        assert [r["finish"] for r in results] == ["length"] * 4


@engines
@settings(deadline=None, max_examples=20)  # other processes may hold the machine
@given(names=st.lists(active_names, min_size=4, max_size=4), order=st.permutations(range(4)))
def test_requests_in_another_order_in_the_batch_each_get_the_same(
    small: Bench, native: bool, names: list[list[str]], order: list[int]
) -> None:
    session = small.session(native, n_parallel=4)
    steerings = [steering_of(ACTIVE, own, 12 * i) for i, own in enumerate(names)]

    def logits(places: Sequence[int], steered: bool) -> list[np.ndarray]:
        """Of each request, the one at place i of the batch being places[i]."""
        requests = [
            Request(small.loaded.tokens(N_EACH, 11 * q), N_EACH_PROMPT, steerings[q] if steered else ps.Steering(),
                    outputs=(0, N_EACH), keep_logits=True)
            for q in places
        ]  # fmt: skip
        results = engine.run(session, small.model, requests)
        return [results[list(places).index(q)]["logits"] for q in range(4)]

    def moved(steered: bool) -> float:
        pairs = zip(logits(range(4), steered), logits(order, steered), strict=True)
        return max(float(np.abs(a - b).max()) for a, b in pairs)

    # at these shapes llama.cpp's own rows are the same to the bit wherever a request stands; on a CPU where they are
    # not, edits add little to that
    assert moved(True) <= 4 * moved(False)
    assert all(np.abs(a - b).max() > 0.02 for a, b in zip(logits(order, True), logits(order, False), strict=True))


# ---- doses


def test_rho_is_the_sum_over_blocks_of_the_added_length_in_units_of_the_norm(small: Bench) -> None:
    model, norms = small.model, small.model.norms
    a, b = samples.vector(seed=1, layers=(0, 1, 2)), samples.vector(seed=2, layers=(1, 3))
    weighted = replace(a, weights={0: 1.0, 2: 3.0})
    for edits in (
        [a * 0.3],
        [a * -0.3],
        [a * 0.3, b * 0.2],
        [a * 0.3, a * -0.1],
        [a * 0.3, a * -0.3],
        [weighted * 0.3, ps.Add(b, 0.2, layers=[2])],
        [ps.Add(a, 0.7, raw=True), ps.Add(b, 0.2, keep_norm=True)],
        [ps.When(b, a * 0.3, ZEROS, on="token"), ps.Cap(b, ZEROS), ps.Ablate(a, layers=[0]), a * 0.0],
    ):
        assert ps.Steering(edits).rho(model) == pytest.approx(reference.rho(edits, norms), rel=1e-6, abs=1e-12)
    assert ps.Steering([a * 0.3]).rho(model) == pytest.approx(0.3, rel=1e-6)
    assert ps.Steering([weighted * -0.3]).rho(model) == pytest.approx(0.3, rel=1e-6)
    assert ps.Steering([a * 0.3, a * -0.1]).rho(model) == pytest.approx(0.2, rel=1e-6)
    assert ps.Steering([ps.Cap(a, ZEROS)]).rho(model) == 0.0


def test_an_answer_has_the_largest_dose_of_its_tokens(small: Bench) -> None:
    model, norms = small.model, small.model.norms
    a, b, c = (samples.vector(seed=s, layers=(0, 1, 2)) for s in range(3))
    cases: list[tuple[list[Any], list[Any]]] = [  # edits, and those that act on one token together
        ([], []),
        ([a * 0.3, b * 0.2], [a * 0.3, b * 0.2]),
        ([ps.Cap(a, ZEROS), b * -0.2], [b * -0.2]),
        ([ps.Add(a, 0.3, scope="prompt"), ps.Add(b, 0.2, scope="response")], [a * 0.3]),
        ([ps.Add(a, 0.1, scope="prompt"), ps.Add(b, 0.2)], [a * 0.1, b * 0.2]),
        ([ps.Add(a, 0.1, scope=(0,)), ps.Add(b, 0.3, scope=(1, 2)), ps.Add(c, 0.2, scope=(2,))], [b * 0.3, c * 0.2]),
        ([ps.When(c, a * 0.3, -FAR), b * 0.1], [a * 0.3, b * 0.1]),
        ([ps.When(c, a * 0.3, FAR), b * 0.1], [b * 0.1]),
    ]
    with model.session() as session:
        for edits, together in cases:
            answer = session.submit(prompt="A whale", steer=edits, max_tokens=2).result()
            assert answer.rho == pytest.approx(reference.rho(together, norms), rel=1e-6, abs=1e-12)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.name == "personasteer"]
    caplog.clear()
    return found


def test_a_dose_outside_the_window_of_a_vector_is_said_once(small: Bench, caplog: pytest.LogCaptureFixture) -> None:
    text = ["A whale can be lonely."]
    v = samples.vector(seed=1, name="window-of-one", window=(-0.2, 0.4))
    for inside in (v * 0.4, v * -0.2, ps.Add(v, 0.3, scope="prompt")):
        small.model.logits(text, steer=inside)
    assert warnings_of(caplog) == []
    for _ in range(3):
        small.model.logits(text, steer=v * 0.41)
    assert warnings_of(caplog) == [
        "strength 0.41 of 'window-of-one' is outside its window -0.2 to 0.4: the model may lose coherence"
    ]
    for _ in range(2):
        small.model.logits(text, steer=[[ps.Add(v, -0.25), ps.Cap(samples.vector(seed=2), ZEROS)]])
    assert warnings_of(caplog) == [
        "strength -0.25 of 'window-of-one' is outside its window -0.2 to 0.4: the model may lose coherence"
    ]


def test_a_mix_whose_vectors_are_inside_their_windows_and_together_are_not_is_said_once(
    small: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    text = ["A whale can be lonely."]
    a, b = (samples.vector(seed=3, name=name, window=(-0.3, 0.3)) for name in ("one-of-two", "two-of-two"))
    small.model.logits(text, steer=[[a * 0.3, b * -0.3]])  # nothing in all
    assert warnings_of(caplog) == []
    for _ in range(3):
        small.model.logits(text, steer=[[a * 0.25, b * 0.25]])
    assert warnings_of(caplog) == [
        "the mix adds rho 0.5 in all, its vectors' windows end at 0.3: the model may lose coherence"
    ]
    for _ in range(2):  # both are outside their own windows: that says it
        small.model.logits(text, steer=[[a * 0.35, b * 0.36]])
    assert [w.split(" is ")[0] for w in warnings_of(caplog)] == ["strength 0.35 of 'one-of-two'",
                                                                "strength 0.36 of 'two-of-two'"]  # fmt: skip
