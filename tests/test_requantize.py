"""Other quantizations of a file: what they are called is not always what is in them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
import requantize as rq
from requantize import bits_per_weight, dequantize, requantize, tensor_types, weights_of

import personasteer as ps
from personasteer.tiny_model import write_tiny_model

# 30 matrices: embedding, output, and in each of 4 blocks q, k, v, o, gate, up (64 wide) and down (128 wide). No row is
# a multiple of 256, so that a K-quant is never possible.
NARROW = {
    "F16": {"F16": 30},
    "Q8_0": {"Q8_0": 30},
    "Q5_1": {"Q5_1": 29, "Q8_0": 1},
    "Q5_0": {"Q5_0": 29, "Q8_0": 1},
    "Q4_1": {"Q4_1": 29, "Q8_0": 1},
    "Q4_0": {"Q4_0": 29, "Q8_0": 1},
    "IQ4_NL": {"IQ4_NL": 29, "Q8_0": 1},
    "Q6_K": {"Q8_0": 30},
    "Q5_K_M": {"Q5_1": 25, "Q8_0": 5},
    "Q4_K_M": {"Q5_0": 25, "Q8_0": 5},
    "Q3_K_M": {"Q4_0": 17, "Q5_0": 10, "Q5_1": 2, "Q8_0": 1},
    "Q2_K": {"Q4_0": 29, "Q8_0": 1},
}
WIDE = {  # 16 matrices in 2 blocks
    "Q8_0": {"Q8_0": 16},
    "Q4_1": {"Q4_1": 15, "Q6_K": 1},
    "Q6_K": {"Q6_K": 16},
    "Q4_K_M": {"Q4_K": 13, "Q6_K": 3},
    "Q3_K_M": {"Q3_K": 9, "Q4_K": 4, "Q5_K": 2, "Q6_K": 1},
    "Q2_K": {"Q2_K": 9, "Q3_K": 6, "Q6_K": 1},
}


@pytest.fixture(scope="module")
def wide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 and 512, which every type divides; 2 blocks."""
    return write_tiny_model(tmp_path_factory.mktemp("wide") / "wide.gguf", n_layer=2, n_embd=256)


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", NARROW)
def test_rows_that_a_type_does_not_divide_get_another(kind: str, tiny_path: Path, tmp_path: Path) -> None:
    assert tensor_types(requantize(tiny_path, tmp_path / "out.gguf", kind)) == Counter(NARROW[kind])


@pytest.mark.parametrize("kind", WIDE)
def test_rows_of_whole_superblocks_get_what_was_asked_for(kind: str, wide_path: Path, tmp_path: Path) -> None:
    assert tensor_types(requantize(wide_path, tmp_path / "out.gguf", kind)) == Counter(WIDE[kind])


def test_bits_per_weight_count_every_tensor_with_its_own_type(tiny_path: Path, tmp_path: Path) -> None:
    in_matrices = 2 * 286 * 64 + 4 * (4 * 64 * 64 + 3 * 64 * 128)
    in_vectors = (2 * 4 + 1) * 64
    both = in_matrices + in_vectors
    for kind, bits in (("F32", 32), ("F16", 16), ("Q8_0", 8.5)):  # Q8_0: 32 numbers of a byte and a 16-bit scale
        expected = (bits * in_matrices + 32 * in_vectors) / both
        assert bits_per_weight(requantize(tiny_path, tmp_path / f"{kind}.gguf", kind)) == expected
    # the output matrix becomes a Q8_0 in place of the Q6_K that llama.cpp would choose for it; 5.0 bits is a Q4_1
    output = 286 * 64
    expected = (5.0 * (in_matrices - output) + 8.5 * output + 32 * in_vectors) / both
    assert bits_per_weight(requantize(tiny_path, tmp_path / "Q4_1.gguf", "Q4_1")) == expected


def test_a_ladder_of_quantizations_loses_more_from_step_to_step(wide_path: Path, tmp_path: Path) -> None:
    given = {name: weights_of(t) for name, t in tensors(wide_path).items() if "ffn_up" in name}
    errors, bits = [], []
    for kind in ("F16", "Q8_0", "Q6_K", "Q5_K_S", "Q4_K_S", "Q3_K_S", "Q2_K"):
        path = requantize(wide_path, tmp_path / f"{kind}.gguf", kind)
        made = tensors(path)
        errors.append(max(np.abs(weights_of(made[name]) - w).max() for name, w in given.items()))
        bits.append(bits_per_weight(path))
        with ps.Model(path, n_ctx=64) as model:
            assert np.isfinite(model.logits(["a b c"])[0]).all()
    assert errors == sorted(errors)
    assert bits == sorted(bits, reverse=True)


def test_a_tensor_that_has_the_type_already_is_copied(tmp_path: Path) -> None:
    q8 = gguf.GGMLQuantizationType.Q8_0
    source = write_tiny_model(tmp_path / "source.gguf", quantization=q8)
    copies = tensors(requantize(source, tmp_path / "again.gguf", "Q8_0"))
    for name, tensor in tensors(source).items():
        assert copies[name].tensor_type == tensor.tensor_type
        assert np.array_equal(copies[name].data, tensor.data), name


@pytest.mark.parametrize("kind", ["Q5_0", "Q4_K_M", "IQ4_NL"])
def test_a_quantized_file_and_its_dequantized_copy_give_the_same_bytes(kind: str, tmp_path: Path) -> None:
    q4 = gguf.GGMLQuantizationType.Q4_1
    source = write_tiny_model(tmp_path / "source.gguf", n_layer=2, n_embd=256, quantization=q4)
    plain = dequantize(source, tmp_path / "plain.gguf")
    direct = tensors(requantize(source, tmp_path / "direct.gguf", kind))
    for name, tensor in tensors(requantize(plain, tmp_path / "detour.gguf", kind)).items():
        assert tensor.tensor_type == direct[name].tensor_type
        assert np.array_equal(tensor.data, direct[name].data), name


def test_a_dequantized_copy_has_the_same_key_values_and_weights(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source.gguf", quantization=gguf.GGMLQuantizationType.Q8_0)
    copy = dequantize(source, tmp_path / "copy.gguf")
    old, new = gguf.GGUFReader(source), gguf.GGUFReader(copy)
    names = {name for name in old.fields if not name.startswith("GGUF.")}
    assert {name for name in new.fields if not name.startswith("GGUF.")} == names
    for name in names:
        assert new.fields[name].types == old.fields[name].types, name
        assert new.fields[name].contents() == old.fields[name].contents(), name
    for before, after in zip(old.tensors, new.tensors, strict=True):
        assert (after.name, list(after.shape)) == (before.name, list(before.shape))
        assert after.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(weights_of(after), weights_of(before))


def test_a_dequantized_copy_says_that_it_is_float32(wide_path: Path, tmp_path: Path) -> None:
    source = requantize(wide_path, tmp_path / "source.gguf", "Q4_K_M")
    assert gguf.GGUFReader(source).fields["general.file_type"].contents() == rq.KINDS["Q4_K_M"]
    copy = dequantize(source, tmp_path / "copy.gguf")
    assert gguf.GGUFReader(copy).fields["general.file_type"].contents() == rq.KINDS["F32"]
    assert tensor_types(copy) == Counter(F32=16)
    with ps.Model(copy, n_ctx=64) as model:
        assert np.isfinite(model.logits(["a b c"])[0]).all()


def two_key_value_heads(source: Path, target: Path) -> Path:
    """The model with four query heads and the first two of its key-value heads."""
    reader = gguf.GGUFReader(source)
    rows = {t.name: weights_of(t) for t in reader.tensors}
    rows |= {n: w[: len(w) // 2] for n, w in rows.items() if n.endswith(("attn_k.weight", "attn_v.weight"))}
    return rq._write_f32(reader, target, rows, {"llama.attention.head_count_kv": 2})


@pytest.mark.parametrize("grouped", [False, True], ids=["a key for each query", "grouped queries"])
def test_a_widened_model_computes_the_same_and_takes_k_quants(tiny_path: Path, tmp_path: Path, grouped: bool) -> None:
    if grouped:
        tiny_path = two_key_value_heads(tiny_path, tmp_path / "grouped.gguf")
    wide = rq.widen(tiny_path, tmp_path / "wide.gguf")
    assert tensor_types(requantize(wide, tmp_path / "k.gguf", "Q4_K_M"))["Q4_K"] > 20
    assert all(t.shape[0] % 256 == 0 for t in tensors(wide).values())
    texts = ["a b c", "the quick brown fox jumps over it"]
    with ps.Model(tiny_path, n_ctx=64) as narrow, ps.Model(wide, n_ctx=64) as model:
        for before, after in zip(narrow.logits(texts), model.logits(texts), strict=True):
            np.testing.assert_allclose(after, before, atol=2e-3)  # the cache is 16-bit
        inside = [m.capture(texts, pool="last") for m in (narrow, model)]
    assert not inside[1][:, :-1, 64:].any()  # nothing ever stands in the new dimensions
    np.testing.assert_allclose(inside[1][:, :-1, :64], inside[0][:, :-1], atol=2e-3)


def test_what_cannot_be_made_is_refused_and_leaves_no_file(tiny_path: Path, wide_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(ValueError, match=r"unknown kind 'Q9_0'; known: .*Q4_K_M.*Q8_0"):
        requantize(tiny_path, out, "Q9_0")
    with pytest.raises(ValueError, match=r"llama.cpp cannot make IQ2_XXS of .*wide.gguf: .*requires an imatrix"):
        requantize(wide_path, out, "IQ2_XXS")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(ValueError, match=r"llama.cpp cannot make Q8_0 of .*text.gguf"):
        requantize(tmp_path / "text.gguf", out, "Q8_0")
    with pytest.raises(ValueError, match="is the source itself"):
        requantize(tiny_path, tiny_path, "Q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["text.gguf"]
    assert tensor_types(tiny_path) == Counter(F32=30)


def test_llama_cpp_prints_nothing_meanwhile(tiny_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    requantize(tiny_path, tmp_path / "out.gguf", "Q4_K_M")
    assert capfd.readouterr() == ("", "")


def test_the_command_prints_what_is_in_the_file(tiny_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, rq.__file__, str(tiny_path)]
    done = subprocess.run([*command, "Q8_0", str(tmp_path / "out.gguf")], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'out.gguf'}: 30 Q8_0; 8.57 bits per weight, 0.2 MB\n"
    done = subprocess.run([*command, "Q9_0", str(tmp_path / "no.gguf")], capture_output=True, text=True)
    assert done.returncode == 2
