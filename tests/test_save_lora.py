"""Ablation as a LoRA: the file's matrices against NumPy, and what llama.cpp computes with it against the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import oracle
import pytest
import samples
from test_ablate import TEXT, WRITERS, removed, tied, weights

import personasteer as ps
from personasteer.ship.ablate import ablate_weights
from personasteer.ship.directions import directions_to_remove, in_all_blocks
from personasteer.ship.lora import save_lora
from personasteer.steering import SITES
from personasteer.tiny_model import write_tiny_model

MATRICES = WRITERS - {"token_embd.weight"}


def lora_of(path: Path) -> dict[str, np.ndarray]:
    return {t.name: np.asarray(t.data, np.float64) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(("n", "share"), [(1, 1.0), (1, 0.3), (3, 1.0)])
def test_b_times_a_is_what_the_directions_have_of_each_matrix(
    tiny_path: Path, tmp_path: Path, n: int, share: float
) -> None:
    what = removed(n, share)
    made = save_lora(tiny_path, tmp_path / "l.gguf", what)
    tensors, base = lora_of(tmp_path / "l.gguf"), weights(tiny_path)
    assert {name.rpartition(".lora_")[0] for name in tensors} == WRITERS == set(made.matrices)
    v = what.basis
    for name in MATRICES:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert (a.shape, b.shape) == ((n, base[name].shape[1]), (64, n))
        np.testing.assert_allclose(b @ a, -share * v.T @ (v @ base[name]), atol=1e-6)
    a, b = (tensors[f"token_embd.weight.lora_{x}"] for x in "ab")  # looked up by token
    np.testing.assert_allclose(a @ b.T, -share * (base["token_embd.weight"] @ v.T) @ v, atol=1e-6)
    fields = gguf.GGUFReader(tmp_path / "l.gguf").fields
    found = {k: fields[k].contents() for k in ("general.type", "adapter.type", "general.architecture")}
    assert found == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    assert fields["adapter.lora.alpha"].contents() == n
    assert fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    assert (made.rank, made.share, made.left_out) == (n, share, {})


@pytest.mark.parametrize("n", [1, 2])
def test_stock_llama_cpp_with_the_adapter_computes_what_the_engine_does_without_it(
    tiny_path: Path, tmp_path: Path, n: int
) -> None:
    what = removed(n)
    save_lora(tiny_path, tmp_path / "l.gguf", what)
    edits = ps.Steering(ps.Ablate(in_all_blocks(v, 4), sites=SITES) for v in what.basis)
    with ps.Model(tiny_path, n_ctx=64, n_parallel=1) as model:
        tokens = model.tokenize(TEXT)
        (wanted,), (unsteered,) = model.logits([TEXT], steer=edits), model.logits([TEXT])
    plain = oracle.PlainContext(oracle.PlainModel(tiny_path), n_ctx=64, n_parallel=1, n_batch=64, n_threads=1,
                                n_outputs=64)  # fmt: skip
    plain.set_lora([(tmp_path / "l.gguf", 1.0)])
    (got,), _ = plain.compute([tokens], [(0, len(tokens))])
    assert np.abs(got - wanted).max() < 2e-2  # 16-bit keys and values
    assert np.abs(unsteered - wanted).max() > 0.5


def test_a_share_is_what_the_scale_of_the_adapter_makes_of_all_of_it(tiny_path: Path, tmp_path: Path) -> None:
    save_lora(tiny_path, tmp_path / "half.gguf", removed(share=0.5))
    save_lora(tiny_path, tmp_path / "all.gguf", removed())
    results = []
    for lora in ((tmp_path / "half.gguf", 1.0), (tmp_path / "all.gguf", 0.5)):
        with ps.Model(tiny_path, n_ctx=64, lora=[lora]) as model:
            results.append(model.logits([TEXT])[0])
    np.testing.assert_allclose(results[0], results[1], atol=2e-2)
    ablate_weights(tiny_path, tmp_path / "a.gguf", removed(share=0.5))
    with ps.Model(tmp_path / "a.gguf", n_ctx=64) as model:
        np.testing.assert_allclose(model.logits([TEXT])[0], results[0], atol=2e-2)


def test_tied_embeddings_are_left_out_because_llama_cpp_would_end_the_process(tiny_path: Path, tmp_path: Path) -> None:
    path = tied(tiny_path, tmp_path / "tied.gguf")
    made = save_lora(path, tmp_path / "l.gguf", removed())
    assert set(made.matrices) == MATRICES
    assert "the output matrix is the same tensor" in made.left_out["token_embd.weight"]
    with ps.Model(path, n_ctx=64, lora=[tmp_path / "l.gguf"]) as model:
        assert np.isfinite(model.logits([TEXT])[0]).all()


def test_experts_get_an_a_each_and_biases_and_other_tables_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    experts = rng.standard_normal((3, 64, 32)).astype(np.float32)
    w = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    w.add_block_count(1)
    w.add_embedding_length(64)
    for name, shape in (
        ("token_embd.weight", (9, 64)), ("output.weight", (9, 64)), ("position_embd.weight", (5, 64)),
        ("blk.0.attn_output.bias", (64,)),
    ):  # fmt: skip
        w.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    w.add_tensor("blk.0.ffn_down_exps.weight", experts)
    for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        step()
    what = removed(2)
    made = save_lora(tmp_path / "m.gguf", tmp_path / "l.gguf", what)
    tensors = lora_of(tmp_path / "l.gguf")
    a, b = (tensors[f"blk.0.ffn_down_exps.weight.lora_{x}"] for x in "ab")
    assert (a.shape, b.shape) == ((3, 2, 32), (3, 64, 2))
    for e in range(3):
        np.testing.assert_allclose(b[e] @ a[e], -what.basis.T @ (what.basis @ experts[e]), atol=1e-6)
    assert set(made.left_out) == {"position_embd.weight", "blk.0.attn_output.bias"}


def test_a_quantized_model_gets_the_adapter_of_its_dequantized_weights(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", quantization=gguf.GGMLQuantizationType.Q4_0)
    what = removed()
    save_lora(path, tmp_path / "l.gguf", what)
    name = "blk.2.ffn_down.weight"
    np.testing.assert_allclose(
        lora_of(tmp_path / "l.gguf")[f"{name}.lora_a"], what.basis @ weights(path)[name], atol=1e-6
    )


def test_the_same_arguments_give_the_same_bytes(tiny_path: Path, tmp_path: Path) -> None:
    for name in "ab":
        save_lora(tiny_path, tmp_path / name, removed(2))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_ctrl_c_a_full_disk_and_another_width_leave_no_file(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_lora(tiny_path, tmp_path / "l.gguf", removed(), progress=interrupt)
    with pytest.raises(ps.ArgumentError, match="32 wide, the model 64"):
        save_lora(tiny_path, tmp_path / "l.gguf", directions_to_remove([(samples.vector(n_embd=32), None)]))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_ti_data_to_file", full)
    with pytest.raises(ps.PersonasteerError, match="No space left on device"):
        save_lora(tiny_path, tmp_path / "l.gguf", removed())
    assert samples.no_leftovers(tmp_path)
