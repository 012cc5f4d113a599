"""The block outputs that a model captures are those of `transformers`, which shares no code with llama.cpp.

Both compute from the same float32 weights: those of the file, dequantized by gguf.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import oracle
import pytest
from requantize import dequantize

import personasteer as ps
from personasteer._native import extra_buffers_work

torch = pytest.importorskip("torch", reason="torch is not installed (CPU is enough)", exc_type=ImportError)
transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)

from torch_llama import as_transformers  # noqa: E402 (needs both)

pytestmark = pytest.mark.torch

N_THREADS = 2
TEXTS = [
    "Where did I leave my keys?",
    "To make a simple tomato soup, fry an onion until it is soft, add six ripe tomatoes and half a litre of stock, and "
    "let it simmer for twenty minutes.",
    "My sister's train was late again. She called at 7:40, told me not to wait with dinner, and arrived at half past "
    "nine, tired, hungry and full of stories about a man who had tried to bring a ladder on board. We laughed until "
    "the neighbours knocked on the wall. Then we ate cold noodles from the pot, watched half of an old film that both "
    "of us know by heart, and agreed, as every year, that next time she would simply take the bus.",
]


def block_outputs(model: Any, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Block outputs (n_layer, n_tokens, n_embd), the last one before the final norm, and logits (n_tokens, n_vocab)."""
    rows: list[np.ndarray] = []

    def keep(module: Any, arguments: Any, output: Any) -> None:
        rows.append((output[0] if isinstance(output, tuple) else output).reshape(len(tokens), -1).numpy())

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    try:
        with torch.inference_mode():
            logits = model(torch.tensor([tokens]), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return np.stack(rows), logits[0].numpy()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines along the last axis, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def relative_errors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """||a - b|| / ||b|| along the last axis, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)


def with_eight_bits(layer: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a matrix of a quantized type multiplies: 32 numbers share a scale, each is rounded to one byte (Q8_1)."""
    blocks = arguments[0].unflatten(-1, (-1, 32))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((torch.round(blocks / scale) * scale).flatten(-2),)


@dataclass
class Reference:
    """What transformers makes of TEXTS, all tokens of all texts in a row."""

    model: Any
    tokens: list[list[int]]
    rows: np.ndarray  # (n_layer, n_tokens, n_embd)
    logits: np.ndarray  # (n_tokens, n_vocab)


def reference(path: Path) -> Reference:
    with ps.Model(path, n_ctx=64) as model:
        tokens = [model.tokenize(text) for text in TEXTS]
    theirs = as_transformers(path)
    rows, logits = zip(*[block_outputs(theirs, t) for t in tokens], strict=True)
    return Reference(theirs, tokens, np.concatenate(rows, axis=1), np.concatenate(logits))


def captured(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Our block outputs and logits of TEXTS, in the same order."""
    # 64 tokens a decode: texts share decodes, and the longest is spread over several
    with ps.Model(path, n_ctx=512, n_parallel=4, n_batch=64, n_threads=N_THREADS) as model:
        rows = model.capture(TEXTS, pool="raw", last_layer=True)
        logits = model.logits(TEXTS)
    return np.concatenate(rows).swapaxes(0, 1), np.concatenate(logits)


def by_plain_llama_cpp(path: Path, tokens: list[list[int]]) -> np.ndarray:
    """Block outputs by plain llama.cpp in the same decodes."""
    model = oracle.PlainModel(path, use_extra_bufts=extra_buffers_work())
    context = oracle.PlainContext(
        model, n_ctx=512, n_parallel=4, n_batch=64, n_threads=N_THREADS, n_outputs=64, watch=True
    )
    return np.concatenate(context.compute(tokens, [(0, len(t)) for t in tokens])[1], axis=1)


def keep_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values stay float32 in plain contexts; flash attention would round them again."""
    defaults = llama_cpp.llama_context_default_params

    def params() -> Any:
        p = defaults()
        p.type_k = p.type_v = llama_cpp.GGML_TYPE_F32
        return p

    monkeypatch.setattr(llama_cpp, "llama_context_default_params", params)
    monkeypatch.setattr(llama_cpp, "LLAMA_FLASH_ATTN_TYPE_AUTO", llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED)


def show(what: str, rows: np.ndarray, theirs: np.ndarray) -> None:
    """Figures per block, seen with `pytest -s`."""
    print(f"\n{what}: block, min and median cosine, median and max relative error")
    for il, (c, e) in enumerate(zip(cosines(rows, theirs), relative_errors(rows, theirs), strict=True)):
        print(f"{il:2} {c.min():.8f} {np.median(c):.8f} {np.median(e):.1e} {e.max():.1e}")


@pytest.fixture(scope="module")
def of_tiny(tiny_path: Path) -> Reference:
    return reference(tiny_path)


@pytest.fixture(scope="module")
def of_smollm2(smollm2_path: Path) -> Reference:
    return reference(smollm2_path)


@pytest.fixture(scope="module")
def smollm2_float32(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dequantize(smollm2_path, tmp_path_factory.mktemp("float32") / "smollm2.gguf")


def check(path: Path, theirs: Reference) -> None:
    """Every row of every block and the logits agree to what the 16-bit key-value cache allows, and no other block's."""
    rows, logits = captured(path)
    show(path.name, rows, theirs.rows)
    assert rows.shape == theirs.rows.shape
    # Seen: 0.99998 and 7e-3 at worst. llama.cpp rounds keys and values to 11 bits and, where a text has few tokens in
    # a decode, sums the values in 11 bits too; the next test shows that this is all.
    assert (cosines(rows, theirs.rows) >= 0.9999).all()
    assert (relative_errors(rows, theirs.rows) <= 2e-2).all()
    assert (cosines(logits, theirs.logits) >= 0.9999).all()
    # one block off must not pass
    assert (cosines(rows[:-1], theirs.rows[1:]).min(axis=1) < 0.99).all()
    assert (cosines(rows[1:], theirs.rows[:-1]).min(axis=1) < 0.99).all()


def test_a_tiny_llama_has_the_block_outputs_and_logits_of_transformers(tiny_path: Path, of_tiny: Reference) -> None:
    check(tiny_path, of_tiny)


def test_float32_smollm2_has_the_block_outputs_and_logits_of_transformers(
    smollm2_float32: Path, of_smollm2: Reference
) -> None:
    check(smollm2_float32, of_smollm2)


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_without_16_bit_keys_and_values_nothing_but_float32_rounding_is_left(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue({"tiny": "tiny_path", "smollm2": "smollm2_float32"}[name])
    theirs = request.getfixturevalue(f"of_{name}")
    assert np.array_equal(by_plain_llama_cpp(path, theirs.tokens), captured(path)[0])
    keep_32_bits(monkeypatch)
    exact = by_plain_llama_cpp(path, theirs.tokens)
    show(f"{name}, 32 bits", exact, theirs.rows)
    assert (relative_errors(exact, theirs.rows) <= 1e-4).all()  # seen: 1e-5, of 24-bit sums in another order


def test_quantized_smollm2_differs_as_much_as_activations_of_eight_bits_do(
    smollm2_path: Path, of_smollm2: Reference
) -> None:
    """llama.cpp rounds what a quantized matrix multiplies to one byte a number; transformers made to do so loses as
    much. The two do not agree any better with each other: which number rounds up, and which down, is chance.
    """
    theirs = of_smollm2.rows
    matrices = [m for m in of_smollm2.model.modules() if isinstance(m, torch.nn.Linear)]
    hooks = [m.register_forward_pre_hook(with_eight_bits) for m in matrices]
    try:
        rounded = np.concatenate([block_outputs(of_smollm2.model, t)[0] for t in of_smollm2.tokens], axis=1)
    finally:
        for hook in hooks:
            hook.remove()
    rows, _ = captured(smollm2_path)
    show("Q4_1", rows, theirs)
    show("transformers with 8-bit activations", rounded, theirs)
    ours, expected = (np.median(relative_errors(r, theirs), axis=1) for r in (rows, rounded))
    assert (ours <= 1.5 * expected).all(), ours / expected
    assert (ours >= expected / 1.5).all(), ours / expected
    assert (cosines(rows, theirs) >= 0.995).all()  # seen: 0.998; one block off is at 0.99 and below
