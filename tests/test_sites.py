"""Ablation at other places than block outputs, against models whose weights write nothing along the direction."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import llama_cpp
import numpy as np
import pytest
import samples

import personasteer as ps
from personasteer import _core, engine
from personasteer.engine import Request
from personasteer.steering import SITES
from personasteer.tiny_model import write_tiny_model

if TYPE_CHECKING:
    from conftest import Loaded

TEXT = "the harbour was quiet in the morning"
TOLERANCE = 2e-2  # of a logit: keys and values are kept in 16 bits, so a rounding of the stream may move them by 1e-3
SEED = 10  # 0 is that of the model: its directions would be embeddings


def direction(seed: int = SEED, n: int = 64) -> np.ndarray:
    v = np.random.default_rng(seed).standard_normal(n)
    return v / np.linalg.norm(v)


def everywhere(v: np.ndarray, n_layer: int = 4) -> ps.PersonaVector:
    return ps.PersonaVector(np.tile(v.astype(np.float32), (n_layer, 1)), tuple(range(n_layer)))


def without(path: Path, out: Path, parts: Sequence[str], *directions: np.ndarray, share: float = 1.0) -> Path:
    """A copy whose named matrices write nothing of the directions (rows of embeddings, outputs of the others)."""
    shutil.copy(path, out)
    basis = np.linalg.qr(np.stack(directions).T)[0].T
    for t in gguf.GGUFReader(out, "r+").tensors:
        part = t.name.removesuffix(".weight")
        if part == "token_embd" and "token_embd" in parts:
            t.data[:] -= share * (t.data @ basis.T) @ basis
        elif part.split(".")[-1] in parts:
            t.data[:] -= share * basis.T @ (basis @ t.data)
        t.data.flush()
    return out


def opened(path: Path, **more: Any) -> ps.Model:
    return ps.Model(path, n_ctx=128, n_parallel=4, n_threads=2, **more)


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> ps.Model:
    return opened(tiny_path)


@pytest.mark.parametrize("n_directions", [1, 2])
def test_ablation_at_all_sites_is_what_weights_without_the_direction_compute(
    model: ps.Model, tiny_path: Path, tmp_path: Path, n_directions: int
) -> None:
    directions = [direction(SEED + k) for k in range(n_directions)]
    edited = without(tiny_path, tmp_path / "m.gguf", ("token_embd", "attn_output", "ffn_down"), *directions)
    edits = ps.Steering(ps.Ablate(everywhere(v), sites=SITES) for v in directions)
    base, steered = model.logits([TEXT, TEXT], steer=[None, edits])
    with opened(edited) as other:
        expected = other.logits([TEXT])[0]
    assert np.abs(steered - expected).max() < TOLERANCE
    assert np.abs(base - expected).max() > 0.5
    for left_out in range(len(SITES)):
        sites = SITES[:left_out] + SITES[left_out + 1 :]
        (fewer,) = model.logits([TEXT], steer=ps.Steering(ps.Ablate(everywhere(v), sites=sites) for v in directions))
        assert np.abs(fewer - expected).max() > 5 * TOLERANCE, sites


def test_at_the_embeddings_alone_it_is_the_table_without_the_direction(
    model: ps.Model, tiny_path: Path, tmp_path: Path
) -> None:
    v = direction()
    edited = without(tiny_path, tmp_path / "m.gguf", ("token_embd",), v)
    (steered,) = model.logits([TEXT], steer=ps.Ablate(everywhere(v), sites=("embd",)))
    with opened(edited) as other:
        assert np.abs(steered - other.logits([TEXT])[0]).max() < TOLERANCE


def test_in_the_middle_of_a_block_its_own_direction_is_read_and_removed(model: ps.Model) -> None:
    """At block 2 alone: what the feed-forward reads there has no share of it, what it adds may have again."""
    rows = samples.vector(layers=(2,), seed=SEED)
    (steered,) = model.logits([TEXT], steer=ps.Ablate(rows, sites=("mid",), layers=(2,)))
    (other,) = model.logits(
        [TEXT], steer=ps.Ablate(samples.vector(layers=(2,), seed=SEED + 1), sites="mid", layers=(2,))
    )
    (base,) = model.logits([TEXT])
    assert np.abs(steered - base).max() > 0.05
    assert np.abs(steered - other).max() > 0.05
    states = model.capture([TEXT], pool="raw", steer=ps.Ablate(rows, sites=("mid",), layers=(2,)))[0]
    before = model.capture([TEXT], pool="raw")[0]
    assert np.array_equal(states[:, :2], before[:, :2])
    v = rows.direction(2) / np.linalg.norm(rows.direction(2))
    assert np.abs(states[:, 2] @ v).max() > 0.01


def test_the_embeddings_take_the_direction_of_the_lowest_block(model: ps.Model) -> None:
    rows = samples.vector(seed=SEED)
    alone = everywhere(rows.direction(1) / np.linalg.norm(rows.direction(1)))
    pair = [ps.Ablate(rows, sites="embd", layers=(1, 3)), ps.Ablate(alone, sites=["embd"])]
    first, second = model.logits([TEXT, TEXT], steer=pair)
    assert np.abs(first - second).max() < TOLERANCE


@pytest.mark.parametrize("native", [False, True], ids=["fused", "generic"])
def test_a_share_of_0_and_a_neighbour_change_no_bit(tiny: Loaded, model: ps.Model, native: bool) -> None:
    session = tiny.session(native=native, n_parallel=4, n_batch=128)
    tokens = tiny.tokens(20)

    def run(*steers: Any) -> list[np.ndarray]:
        requests = [
            Request(tokens, 8, ps.Steering([s] if s else []), outputs=(0, len(tokens)), keep_logits=True)
            for s in steers
        ]
        return [r["logits"] for r in engine.run(session, model, requests)]

    full = ps.Ablate(everywhere(direction()), sites=SITES)
    unsteered = run(None, None, None)
    mixed = run(full * 0.0, full, None)
    assert np.array_equal(mixed[0], unsteered[0])
    assert np.array_equal(mixed[2], unsteered[2])
    assert np.abs(mixed[1] - unsteered[1]).max() > 0.5


def test_both_ways_to_compute_it_agree(tiny: Loaded, model: ps.Model) -> None:
    tokens = tiny.tokens(20)
    edit = ps.Ablate(everywhere(direction()), sites=SITES, to=0.3, layers=(2,))
    results = []
    for native in (False, True):
        request = Request(tokens, 8, ps.Steering([edit]), outputs=(0, 20), keep_logits=True)
        results.append(engine.run(tiny.session(native=native), model, [request])[0]["logits"])
    assert np.abs(results[0] - results[1]).max() < TOLERANCE


def test_scopes_and_conditions_hold_at_every_site(model: ps.Model) -> None:
    v = everywhere(direction())
    given = ps.Ablate(v, sites=SITES)
    (base,) = model.logits([TEXT])
    (at_end,) = model.logits([TEXT], steer=ps.Ablate(v, sites=SITES, scope=(20,)))
    assert np.array_equal(base[:20], at_end[:20])
    assert np.abs(base[20:] - at_end[20:]).max() > 0.05
    closed = ps.When(v, given, threshold=np.full(4, 1e9), on="token")
    assert np.array_equal(model.logits([TEXT], steer=closed)[0], base)
    open_ = ps.When(v, given, threshold=np.full(4, -1e9), on="token")
    assert np.array_equal(model.logits([TEXT], steer=open_)[0], model.logits([TEXT], steer=given)[0])


def test_an_attached_llama_takes_it_too(tiny_path: Path, model: ps.Model) -> None:
    llama = llama_cpp.Llama(str(tiny_path), n_ctx=128, verbose=False, logits_all=True, n_threads=2)
    tokens = model.tokenize(TEXT)
    ps.attach(llama, ps.Ablate(everywhere(direction()), sites=SITES))
    llama.eval(tokens)
    (expected,) = model.logits([TEXT], steer=ps.Ablate(everywhere(direction()), sites=SITES))
    assert np.abs(llama.scores[: len(tokens)] - expected).max() < TOLERANCE


@pytest.mark.parametrize("sites", [(), ("attention",), ("mid", "out"), ("",)])
def test_an_unknown_site_is_refused(sites: Any) -> None:
    with pytest.raises(ps.ArgumentError, match="sites must be some of embd, mid, block, not"):
        ps.Ablate(everywhere(direction()), sites=sites)


def test_an_architecture_without_a_site_is_refused_by_name(recurrent: Loaded) -> None:
    with (
        ps.Model(recurrent.path, n_ctx=64) as mamba,
        pytest.raises(ps.ModelError, match=r"after the attention of block"),
    ):
        mamba.logits(["a b"], steer=ps.Ablate(everywhere(direction()), sites=("mid",)))


def test_after_a_site_that_is_not_there_other_requests_go_on(recurrent: Loaded) -> None:
    with ps.Model(recurrent.path, n_ctx=64) as mamba:
        plain, steered = mamba.logits(["a b"]), mamba.logits(["a b"], steer=ps.Ablate(everywhere(direction())))
        with pytest.raises(ps.ModelError, match=r"after the attention of block"):
            mamba.logits(["a b"], steer=ps.Ablate(everywhere(direction()), sites=("mid",)))
        assert np.array_equal(mamba.logits(["a b"])[0], plain[0])
        again = mamba.logits(["a b"], steer=ps.Ablate(everywhere(direction())))
        assert np.array_equal(again[0], steered[0])
        assert not np.array_equal(steered[0], plain[0])


def test_a_site_that_no_model_has_is_refused(tiny: Loaded) -> None:
    session = tiny.session()
    terms, numbers = np.array([[9, 1, -1, -1, 0]], np.int32), np.array([[0, 1, 0, 0, 1, 0]], np.float32)
    mix = _core.Mix(key=5, terms=terms, numbers=numbers, vectors=np.ones((1, 64), np.float32))
    with pytest.raises(ps.VectorError, match=r"site 9 out of range 0\.\.8"):
        session.submit(tokens=tiny.tokens(4), mixes=[mix], mix_of_token=[0] * 4, generated=[])


def test_errors_of_a_site_name_it(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    v = everywhere(direction())
    alike = everywhere(direction() + 1e-4 * direction(SEED + 1))
    with opened(path) as model, pytest.raises(ps.VectorError, match=r"mid of block 0 are too much alike"):
        model.logits([TEXT], steer=[ps.Steering([ps.Ablate(v, sites="mid"), ps.Ablate(alike, sites="mid")])])
