"""Baked models: what is in the file, and what stock llama.cpp computes with it beside the steered engine."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import oracle
import pytest
import samples
import tiny_models

import personasteer as ps
from personasteer.ship.as_llama import why_not_llama
from personasteer.ship.bake import bake
from personasteer.ship.biases import accepts
from personasteer.ship.fields import read_fields, vector_of_fields
from personasteer.ship.rewrite import ModelFile
from personasteer.ship.value_bias import value_bias_map
from personasteer.ship.values import Constants, why_not_values
from personasteer.ship.verify import verify

if TYPE_CHECKING:
    from conftest import Loaded

TEXT = "the harbour was quiet in the morning"


def vector_for(path: Path, seed: int = 10, **more: Any) -> ps.PersonaVector:
    with ps.Model(path, n_ctx=64) as model:
        return samples.vector(seed=seed, norms=model.norms, **more)


def plain_logits(path: Path, tokens: list[int]) -> np.ndarray:
    context = oracle.PlainContext(oracle.PlainModel(path), n_ctx=64, n_parallel=1, n_batch=64, n_threads=1,
                                  n_outputs=64)  # fmt: skip
    return context.compute([tokens], [(0, len(tokens))])[0][0]


def tensors(path: Path) -> dict[str, bytes]:
    return {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def qwen2_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_qwen_model(tmp_path_factory.mktemp("tiny") / "qwen2.gguf")


@pytest.mark.parametrize("strength", [0.4, -0.4])
def test_a_llama_is_baked_exactly(tiny_path: Path, tmp_path: Path, strength: float) -> None:
    vector = vector_for(tiny_path)
    made = bake(tiny_path, tmp_path / "b.gguf", vector, strength=strength)
    assert (made.strategy, made.blocks) == ("block-bias", (1, 2))
    assert (made.added, made.changed) == (["blk.1.ffn_down.bias", "blk.2.ffn_down.bias"], [])
    before, after = tensors(tiny_path), tensors(tmp_path / "b.gguf")
    assert {name: after[name] for name in before} == before
    assert vector.norms is not None
    for il in (1, 2):
        v = vector.directions[il].astype(np.float64)
        row = strength * 0.5 * vector.norms[il] * v / np.linalg.norm(v)
        np.testing.assert_allclose(np.frombuffer(after[f"blk.{il}.ffn_down.bias"], "<f4"), row, rtol=1e-6)
    with ps.Model(tiny_path, n_ctx=64, n_parallel=1) as model:
        tokens = model.tokenize(TEXT)
        (wanted,), (unsteered,) = model.logits([TEXT], steer=vector * strength), model.logits([TEXT])
    got = plain_logits(tmp_path / "b.gguf", tokens)
    assert np.abs(got - wanted).max() < 2e-2  # a rounding of the stream moves 16-bit keys and values by 1e-3
    assert np.abs(unsteered - wanted).max() > 0.3


def test_the_steered_blocks_output_is_the_engines_but_for_one_rounding(tiny_path: Path, tmp_path: Path) -> None:
    vector = vector_for(tiny_path)
    bake(tiny_path, tmp_path / "b.gguf", vector, strength=0.4)
    with ps.Model(tiny_path, n_ctx=64) as model, ps.Model(tmp_path / "b.gguf", n_ctx=64) as baked:
        wanted = model.capture([TEXT], pool="raw", steer=vector * 0.4)[0][:, 1]
        got = baked.capture([TEXT], pool="raw")[0][:, 1]
    assert np.abs(got - wanted).max() / np.abs(wanted).max() < 2e-6


def test_a_bias_that_is_there_gets_the_row_added(tiny_path: Path, tmp_path: Path) -> None:
    vector = vector_for(tiny_path)
    bake(tiny_path, tmp_path / "one.gguf", vector, strength=0.2)
    made = bake(tmp_path / "one.gguf", tmp_path / "two.gguf", vector, strength=0.2)
    assert (made.added, made.changed) == ([], ["blk.1.ffn_down.bias", "blk.2.ffn_down.bias"])
    one, two = (np.frombuffer(tensors(tmp_path / f"{n}.gguf")["blk.1.ffn_down.bias"], "<f4") for n in ("one", "two"))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)


def test_the_file_carries_the_vector_and_its_strength(tiny_path: Path, tmp_path: Path) -> None:
    vector = vector_for(tiny_path, name="cheerful", provenance={"trait": "cheerful"})
    bake(tiny_path, tmp_path / "b.gguf", vector, strength=-0.2)
    fields = read_fields(tmp_path / "b.gguf")
    back, rho = vector_of_fields(tmp_path / "b.gguf", fields)
    assert rho == -0.2
    assert back.name == "cheerful"
    assert np.array_equal(back.directions, vector.directions)
    assert np.array_equal(back.norms, vector.norms)  # type: ignore[arg-type]
    assert (fields["personasteer.kind"], fields["personasteer.strategy"]) == ("bake", "block-bias")


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_an_architecture_without_that_bias_gets_value_biases_that_act_like_the_steering(
    tmp_path: Path, architecture: str
) -> None:
    """A random model has no trait: its logits are to move along with those of the steering."""
    path = tiny_models.write_qwen_model(tmp_path / "m.gguf", architecture)
    vector = vector_for(path, layers=(2,))
    made = bake(path, tmp_path / "b.gguf", vector, strength=0.3, strategy="value-bias", n_threads=1)
    assert made.strategy == "value-bias"
    names = [f"blk.{il}.attn_v.bias" for il in (2, 3)]
    assert (made.changed, made.added) == ((names, []) if architecture == "qwen2" else ([], names))
    before, after = tensors(path), tensors(tmp_path / "b.gguf")
    assert {n for n in before if before[n] != after[n]} | (after.keys() - before.keys()) == set(names)
    with ps.Model(path, n_ctx=64, n_parallel=1) as model:
        tokens = model.tokenize(TEXT)
        (wanted,), (unsteered,) = model.logits([TEXT], steer=vector * 0.3), model.logits([TEXT])
    change, got = wanted - unsteered, plain_logits(tmp_path / "b.gguf", tokens) - unsteered
    cosine = float(np.vdot(change, got) / np.linalg.norm(change) / np.linalg.norm(got))
    assert cosine > 0.6
    assert 0.7 < np.vdot(got, change) / np.vdot(change, change) < 1.4
    assert made.fit["effect"] == "logits"
    assert 0.9 < made.fit["effect_ratio"] < 1.1
    assert made.fit["shift_error"] == min(made.fit["shift_errors"]) < 0.9


def test_a_qwen2_is_baked_exactly_as_a_llama(qwen2_path: Path, tmp_path: Path) -> None:
    vector = vector_for(qwen2_path)
    made = bake(qwen2_path, tmp_path / "b.gguf", vector, strength=0.4)
    assert (made.strategy, made.blocks, made.fit) == ("as-llama", (1, 2), {})
    assert (made.added, made.changed) == (["blk.1.ffn_down.bias", "blk.2.ffn_down.bias"], [])
    file, other = ModelFile(qwen2_path), ModelFile(tmp_path / "b.gguf")
    given, found = file.fields, other.fields
    assert found["general.architecture"] == "llama"
    for key, value in given.items():
        if key != "general.architecture":
            assert np.array_equal(found[key.replace("qwen2.", "llama.")], value)
    assert not [key for key in found if key.startswith("qwen2.")]
    before, after = tensors(qwen2_path), tensors(tmp_path / "b.gguf")
    moved = {
        f"blk.{il}.{name}.{kind}" for il in range(4) for name in ("attn_q", "attn_k") for kind in ("weight", "bias")
    }
    assert {name for name in before if before[name] != after[name]} == moved
    rows, old = (f.rows(f.tensors["blk.2.attn_k.weight"]) for f in (other, file))
    assert np.array_equal(rows[16:20], old[[16, 24, 17, 25]])  # the second head: pairs (2j, 2j + 1) were (j, j + 8)
    with ps.Model(qwen2_path, n_ctx=64, n_parallel=1) as model:
        tokens = model.tokenize(TEXT)
        (wanted,), (base,) = model.logits([TEXT], steer=vector * 0.4), model.logits([TEXT])
    got = plain_logits(tmp_path / "b.gguf", tokens)
    assert np.abs(got - wanted).max() < 2e-3  # keys and values are kept in 16 bits
    assert np.abs(wanted - base).max() > 0.5
    with ps.Model(tmp_path / "b.gguf", n_ctx=64) as baked:
        assert isinstance(baked.chat("hi", max_tokens=4, temperature=0.0), str)


@pytest.mark.larger_model
def test_a_real_qwen_is_baked_as_exactly_as_rounding_lets(qwen_path: Path, tmp_path: Path) -> None:
    with ps.Model(qwen_path, n_ctx=64, repack=False) as model:
        vector = samples.vector(n_layer=model.n_layer, n_embd=model.n_embd, layers=(15, 16), norms=model.norms, seed=3)
    assert bake(qwen_path, tmp_path / "b.gguf", vector, strength=0.2).strategy == "as-llama"
    found = verify(tmp_path / "b.gguf", qwen_path, n_texts=2)
    assert found.ok, found.reasons
    assert found.kl_mean is not None
    assert found.kl_mean < 0.005


LIKE_NO_LLAMA = {
    "another tensor": (lambda f: f.tensors.update({"output.bias": f.tensors["output_norm.weight"]}), "output.bias"),
    "half a rotation": (lambda f: f.fields.update({"qwen2.rope.dimension_count": 8}), "turns 8 of 16"),
    "heads that do not divide": (lambda f: f.fields.update({"qwen2.attention.head_count": 5}), "do not divide"),
    "blocks without end": (lambda f: f.fields.update({"qwen2.block_count": 2**31}), "blk.4.attn_q.weight"),
    "fused queries": (lambda f: f.tensors.pop("blk.1.attn_q.weight"), "blk.1.attn_q.weight"),
    "another architecture": (lambda f: setattr(f, "architecture", "qwen3"), "'qwen3'"),
}


@pytest.mark.parametrize("how", LIKE_NO_LLAMA)
def test_what_is_no_llama_by_another_name_is_told(qwen2_path: Path, how: str) -> None:
    file = ModelFile(qwen2_path)
    assert why_not_llama(file) == ""
    change, said = LIKE_NO_LLAMA[how]
    change(file)
    assert said in why_not_llama(file)


def test_the_engine_that_fits_the_biases_adds_what_the_file_does(qwen2_path: Path, tmp_path: Path) -> None:
    """The fit never writes a file: constants are added after the attention. The file is to compute the same."""
    vector = vector_for(qwen2_path, layers=(2,))
    made = bake(qwen2_path, tmp_path / "b.gguf", vector, strength=0.3, strategy="value-bias", n_threads=1)
    file, other = ModelFile(qwen2_path), ModelFile(tmp_path / "b.gguf")
    rows = {}
    for il in (2, 3):
        name = f"blk.{il}.attn_v.bias"
        bias = other.rows(other.tensors[name]) - file.rows(file.tensors[name])
        rows[il] = value_bias_map(file.rows(file.tensors[f"blk.{il}.attn_output.weight"]), 4, 2) @ bias[0]
    with ps.Model(qwen2_path, n_ctx=64, n_parallel=1) as model:
        tokens = model.tokenize(TEXT)
        (wanted,), (base,) = model.logits([TEXT], steer=ps.Steering([Constants(rows=rows)])), model.logits([TEXT])
    got = plain_logits(tmp_path / "b.gguf", tokens)
    assert np.abs(got - wanted).max() < 3e-2  # values are kept in 16 bits
    assert np.abs(wanted - base).max() > 0.2
    assert made.fit["factor"] > 0


def test_what_a_loader_takes_is_found_out_by_loading(tiny_path: Path, qwen2_path: Path, sliding: Loaded) -> None:
    bias = ["blk.2.ffn_down.bias"]
    assert accepts(ModelFile(tiny_path), bias, 64)
    assert not accepts(ModelFile(qwen2_path), bias, 64)
    assert not accepts(ModelFile(sliding.path), bias, 64)
    assert accepts(ModelFile(qwen2_path), ["blk.2.attn_v.bias"], 32)
    assert not accepts(ModelFile(tiny_path), bias, 63)
    assert not accepts(ModelFile(tiny_path), ["blk.2.wonder.bias"], 64)


def test_nothing_stays_of_the_trial(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    accepts(ModelFile(tiny_path), ["blk.2.ffn_down.bias"], 64)
    assert samples.no_leftovers(tmp_path)


def test_a_norm_after_the_attention_is_refused_by_name_with_the_form_that_works(
    sliding: Loaded, tmp_path: Path
) -> None:
    with pytest.raises(ps.ModelError, match=r"'gemma2', and .* normalises what its blocks write.*control vector"):
        bake(sliding.path, tmp_path / "b.gguf", vector_for(sliding.path))
    assert samples.no_leftovers(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ("blk.1.attn_sinks.weight", "attention sinks"),
        ("blk.2.attn_sub_norm.weight", "normalises what its attention reads"),
        ("blk.3.attn_gate.weight", "gates what its attention reads"),
        ("", ""),
    ],
)
def test_an_attention_whose_values_are_no_constant_is_refused_by_name(qwen2_path: Path, tensor: str, said: str) -> None:
    file = ModelFile(qwen2_path)
    if tensor:
        file.tensors[tensor] = file.tensors["output_norm.weight"]
    assert said in why_not_values(file)
    assert bool(tensor) == bool(why_not_values(file))


@pytest.mark.parametrize("strategy", ["block-bias", "value-bias"])
def test_an_architecture_that_scales_what_its_blocks_write_is_refused(tmp_path: Path, strategy: str) -> None:
    plain = tiny_models.write_granite_model(tmp_path / "plain.gguf", 1.0)
    scaled = tiny_models.write_granite_model(tmp_path / "scaled.gguf", 0.5)
    made = bake(plain, tmp_path / "b.gguf", vector_for(plain), strength=0.3, strategy=strategy)
    assert made.strategy == strategy
    with pytest.raises(ps.ModelError, match=r"acts 0\.5\d times as strongly as it should at block"):
        bake(scaled, tmp_path / "s.gguf", vector_for(scaled), strength=0.3, strategy=strategy)
    assert samples.no_leftovers(tmp_path, "plain.gguf", "scaled.gguf", "b.gguf")


def test_recurrent_blocks_are_refused_by_name(recurrent: Loaded, hybrid: Loaded, tmp_path: Path) -> None:
    for loaded, what in ((recurrent, "mamba"), (hybrid, "lfm2")):
        with pytest.raises(ps.ModelError, match=f"'{what}' has no attention of the usual kind in block 0"):
            bake(loaded.path, tmp_path / "b.gguf", vector_for(loaded.path), strategy="value-bias")


def test_a_strategy_that_does_not_fit_or_exist_is_refused(tiny_path: Path, qwen2_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ps.ModelError, match=r"'qwen2', so it cannot be baked this way; export it as a control vector"):
        bake(qwen2_path, tmp_path / "b.gguf", vector_for(qwen2_path), strategy="block-bias")
    with pytest.raises(ps.ArgumentError, match="strategy must be auto, block-bias, as-llama, value-bias, not 'best'"):
        bake(tiny_path, tmp_path / "b.gguf", vector_for(tiny_path), strategy="best")


@pytest.mark.parametrize("strength", [0.0, float("nan"), float("inf")])
def test_strengths_that_make_no_sense_are_refused(tiny_path: Path, tmp_path: Path, strength: float) -> None:
    with pytest.raises(ps.ArgumentError, match="must be finite and not 0"):
        bake(tiny_path, tmp_path / "b.gguf", vector_for(tiny_path), strength=strength)


def test_vectors_that_do_not_fit_are_refused(tiny_path: Path, tmp_path: Path) -> None:
    out, good = tmp_path / "b.gguf", vector_for(tiny_path)
    with pytest.raises(ps.VectorError, match=r"is for 5 blocks of width 64, but .* has 4 of width 64"):
        bake(tiny_path, out, samples.vector(n_layer=5))
    with pytest.raises(ps.VectorError, match="of width 32"):
        bake(tiny_path, out, samples.vector(n_embd=32))
    with pytest.raises(ps.VectorError, match="carries no norms"):
        bake(tiny_path, out, samples.vector())
    with pytest.raises(ps.VectorError, match="names no layers"):
        bake(tiny_path, out, replace(good, layers=()))
    with pytest.raises(ps.VectorError, match="not finite in float32"):
        bake(tiny_path, out, good, strength=1e39)
    assert samples.no_leftovers(tmp_path)


CHILD = """
import sys, re, threading, time
import numpy as np
from pathlib import Path
import personasteer as ps
from personasteer.ship.as_llama import why_not_llama
from personasteer.ship.bake import bake

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

peak, base, going = 0.0, anonymous(), True
def watch():
    global peak
    while going:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
path, out = sys.argv[1:]
with ps.Model(path, n_ctx=64, n_parallel=1, n_threads=1, repack=False) as model:
    rows = np.random.default_rng(0).standard_normal((model.n_layer, model.n_embd))
bake(path, out, ps.PersonaVector(rows, (1,), norms=np.ones(len(rows))), strength=0.2, n_threads=1)
going = False
thread.join()
print(peak - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell anonymous memory")
def test_a_gigabyte_is_baked_in_little_memory(tmp_path: Path) -> None:
    """Mapped and streamed: neither the weights nor the new file are ever in memory as a whole."""
    path = tmp_path / "big.gguf"
    w = gguf.GGUFWriter(str(path), "llama")
    n_embd, n_ff, n_vocab, n_layer = 2048, 26624, 259, 3
    w.add_name("big")
    for add, value in (
        (w.add_context_length, 128), (w.add_embedding_length, n_embd), (w.add_block_count, n_layer),
        (w.add_feed_forward_length, n_ff), (w.add_head_count, 16), (w.add_head_count_kv, 2),
        (w.add_rope_dimension_count, 128), (w.add_vocab_size, n_vocab), (w.add_layer_norm_rms_eps, 1e-5),
    ):  # fmt: skip
        add(value)
    w.add_tokenizer_model("llama")
    w.add_token_list([b"<unk>", b"<s>", b"</s>"] + [f"<0x{b:02X}>".encode() for b in range(256)])
    w.add_token_scores([0.0] * n_vocab)
    w.add_token_types([2, 3, 3] + [6] * 256)
    shapes = {"token_embd": (n_vocab, n_embd), "output": (n_vocab, n_embd), "output_norm": (n_embd,)}
    for il in range(n_layer):
        block = {"attn_norm": (n_embd,), "ffn_norm": (n_embd,), "attn_q": (n_embd, n_embd), "attn_k": (256, n_embd),
                 "attn_v": (256, n_embd), "attn_output": (n_embd, n_embd), "ffn_gate": (n_ff, n_embd),
                 "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff)}  # fmt: skip
        shapes |= {f"blk.{il}.{name}": shape for name, shape in block.items()}
    half = {name: np.float16 if len(shape) == 2 else np.float32 for name, shape in shapes.items()}
    for name, shape in shapes.items():
        w.add_tensor_info(f"{name}.weight", shape, np.dtype(half[name]), int(np.prod(shape)) * half[name]().itemsize)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(2**20) / 64).astype(np.float16)
    for name, shape in shapes.items():
        n = int(np.prod(shape))
        data = np.ones(n, np.float32) if len(shape) == 1 else np.resize(noise, n)
        w.write_tensor_data(data.astype(half[name]))
    w.close()
    assert path.stat().st_size > 1e9
    done = subprocess.run([sys.executable, "-P", "-c", CHILD, str(path), str(tmp_path / "out.gguf")],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 300
    assert (tmp_path / "out.gguf").stat().st_size > path.stat().st_size
    made = ModelFile(tmp_path / "out.gguf")
    assert list(made.tensors)[-1] == "blk.1.ffn_down.bias"
    path.unlink()
    (tmp_path / "out.gguf").unlink()
