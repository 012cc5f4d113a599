"""Directions taken out of the weights, against NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import samples

import personasteer as ps
from personasteer.ship import ablate as module
from personasteer.ship.ablate import ablate_weights, read_importance
from personasteer.ship.directions import best_block, directions_to_remove, in_all_blocks
from personasteer.ship.fields import Field, read_fields
from personasteer.ship.rewrite import Added, ModelFile, dequantized, quantized, rewrite
from personasteer.ship.writers import residual_writers
from personasteer.steering import SITES
from personasteer.tiny_model import write_tiny_model

Quantization = gguf.GGMLQuantizationType
TEXT = "the harbour was quiet in the morning"
WRITERS = {"token_embd.weight"} | {f"blk.{il}.{m}.weight" for il in range(4) for m in ("attn_output", "ffn_down")}


def weights(path: Path) -> dict[str, np.ndarray]:
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in gguf.GGUFReader(path).tensors
    }


def raw(path: Path) -> dict[str, bytes]:
    return {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}


def removed(n: int = 1, share: float | None = None, layer: int | None = 2) -> Any:
    return directions_to_remove([(samples.vector(seed=10 + k), share) for k in range(n)], layer=layer)


def expected(name: str, w: np.ndarray, basis: np.ndarray, share: float) -> np.ndarray:
    if name == "token_embd.weight":
        return w - share * (w @ basis.T) @ basis
    return w - share * basis.T @ (basis @ w)


@pytest.mark.parametrize(("n", "share"), [(1, 1.0), (1, 0.5), (2, 1.0)])
def test_of_float32_weights_exactly_the_direction_leaves(tiny_path: Path, tmp_path: Path, n: int, share: float) -> None:
    what = removed(n, share)
    np.testing.assert_allclose(what.basis @ what.basis.T, np.eye(n), atol=1e-12)
    done = ablate_weights(tiny_path, tmp_path / "a.gguf", what)
    before, after = weights(tiny_path), weights(tmp_path / "a.gguf")
    for name, w in before.items():
        if name in WRITERS:
            np.testing.assert_allclose(after[name], expected(name, w, what.basis, share), atol=2e-7)
        else:
            assert np.array_equal(after[name], w), name
    assert {t.name for t in done.tensors} == WRITERS
    assert all(t.reading < 1e-6 and t.requantization < 1e-6 and t.norm_change < 0 for t in done.tensors)
    fields = read_fields(tmp_path / "a.gguf")
    assert fields["personasteer.kind"] == "ablate"
    np.testing.assert_allclose(fields["personasteer.removed"].reshape(n, 64), what.basis, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "left", "rounding"), [("F16", 1e-3, 1e-3), ("Q8_0", 0.01, 0.01), ("Q4_0", 0.04, 0.12)]
)
def test_quantized_weights_write_nothing_along_it_and_the_report_is_what_numpy_finds(
    tmp_path: Path, kind: str, left: float, rounding: float
) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", quantization=Quantization[kind])
    what = removed()
    done = ablate_weights(path, tmp_path / "a.gguf", what)
    before, after = weights(path), weights(tmp_path / "a.gguf")
    for t in done.tensors:
        w, got, wanted = before[t.name], after[t.name], expected(t.name, before[t.name], what.basis, 1.0)
        sides = [x @ what.basis.T if t.name == "token_embd.weight" else what.basis @ x for x in (w, got)]
        reading = np.linalg.norm(sides[1]) / np.linalg.norm(sides[0])
        assert t.reading == pytest.approx(reading, rel=1e-3, abs=1e-6)
        assert t.requantization == pytest.approx(np.linalg.norm(got - wanted) / np.linalg.norm(wanted), rel=1e-3)
        assert t.norm_change == pytest.approx(np.linalg.norm(got) / np.linalg.norm(w) - 1, abs=1e-5)
        if t.name != "token_embd.weight":  # a table's rows are rounded each for itself
            assert t.reading < left, t
        assert t.requantization < rounding, t
    untouched = raw(path).keys() - WRITERS
    assert {n: raw(path)[n] for n in untouched} == {n: raw(tmp_path / "a.gguf")[n] for n in untouched}


def test_rounding_is_kept_from_writing_along_the_direction_where_plain_rounding_does(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", quantization=Quantization.Q4_0)
    what = removed()
    done = ablate_weights(path, tmp_path / "a.gguf", what)
    name = "blk.1.ffn_down.weight"
    wanted = expected(name, weights(path)[name], what.basis, 1.0).astype(np.float32)
    plain = gguf.quants.dequantize(gguf.quants.quantize(wanted, Quantization.Q4_0), Quantization.Q4_0)
    of_plain = np.linalg.norm(what.basis @ plain) / np.linalg.norm(what.basis @ weights(path)[name])
    (ours,) = (t for t in done.tensors if t.name == name)
    assert ours.reading < 0.3 * of_plain
    error = np.linalg.norm(plain - wanted) / np.linalg.norm(wanted)
    assert ours.requantization < 1.2 * error


def test_the_model_computes_what_the_engine_does_at_all_sites(tiny_path: Path, tmp_path: Path) -> None:
    what = removed(2)
    ablate_weights(tiny_path, tmp_path / "a.gguf", what)
    edits = ps.Steering(ps.Ablate(in_all_blocks(v, 4), sites=SITES) for v in what.basis)
    with ps.Model(tiny_path, n_ctx=64) as base, ps.Model(tmp_path / "a.gguf", n_ctx=64) as model:
        (wanted,), (unsteered,), (got,) = base.logits([TEXT], steer=edits), base.logits([TEXT]), model.logits([TEXT])
    assert np.abs(got - wanted).max() < 2e-2  # 16-bit keys and values
    assert np.abs(unsteered - wanted).max() > 0.5


def test_shares_by_block_leave_blocks_alone(tiny_path: Path, tmp_path: Path) -> None:
    what = removed()
    done = ablate_weights(tiny_path, tmp_path / "a.gguf", what, shares={-1: 0.0, 0: 0.0, 1: 0.5})
    assert {t.name: t.share for t in done.tensors} == {
        f"blk.{il}.{m}.weight": s for il, s in ((1, 0.5), (2, 1.0), (3, 1.0)) for m in ("attn_output", "ffn_down")
    }
    before, after = weights(tiny_path), weights(tmp_path / "a.gguf")
    name = "blk.1.ffn_down.weight"
    np.testing.assert_allclose(after[name], expected(name, before[name], what.basis, 0.5), atol=2e-7)
    assert np.array_equal(after["token_embd.weight"], before["token_embd.weight"])


def tied(path: Path, out: Path) -> Path:
    """The model whose embeddings are the output matrix."""
    w = gguf.GGUFWriter(str(out), "llama")
    reader = gguf.GGUFReader(path)
    for f in reader.fields.values():
        if not f.name.startswith("GGUF.") and f.name != "general.architecture":
            element = f.types[-1] if f.types[0] == gguf.GGUFValueType.ARRAY else None
            w.add_key_value(f.name, f.contents(), f.types[0], sub_type=element)
    for t in reader.tensors:
        if t.name == "output_norm.weight":  # with equal weights the output would not see the direction anyway
            w.add_tensor(t.name, np.linspace(0.5, 2.0, 64, dtype=np.float32))
        elif t.name != "output.weight":
            w.add_tensor(t.name, t.data)
    for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        step()
    return out


def test_tied_embeddings_are_said_and_can_be_untied(tiny_path: Path, tmp_path: Path) -> None:
    path = tied(tiny_path, tmp_path / "tied.gguf")
    what = removed()
    done = ablate_weights(path, tmp_path / "a.gguf", what)
    assert (done.tied_output, done.untied) == (True, False)
    done = ablate_weights(path, tmp_path / "b.gguf", what, untie=True)
    assert (done.tied_output, done.untied) == (True, True)
    assert raw(tmp_path / "b.gguf")["output.weight"] == raw(path)["token_embd.weight"]
    edits = ps.Ablate(in_all_blocks(what.basis[0], 4), sites=SITES)
    with ps.Model(path, n_ctx=64) as base:
        (wanted,) = base.logits([TEXT], steer=edits)
    differences = []
    for name in ("a", "b"):
        with ps.Model(tmp_path / f"{name}.gguf", n_ctx=64) as model:
            differences.append(float(np.abs(model.logits([TEXT])[0] - wanted).max()))
    assert differences[1] < 2e-2 < differences[0]
    assert not ablate_weights(tiny_path, tmp_path / "c.gguf", what, untie=True).untied


def test_biases_and_each_expert_are_edited(tiny_path: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    w = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    w.add_block_count(1)
    w.add_embedding_length(64)
    bias, experts, expert_bias = (rng.standard_normal(s).astype(np.float32) for s in ((64,), (3, 64, 32), (3, 64)))
    w.add_tensor("blk.0.attn_output.bias", bias)
    w.add_tensor("blk.0.ffn_down_exps.weight", experts)
    w.add_tensor("blk.0.ffn_down_exps.bias", expert_bias)
    w.add_tensor("blk.0.ffn_up_exps.weight", rng.standard_normal((3, 32, 64)).astype(np.float32))
    for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        step()
    what = removed()
    done = ablate_weights(tmp_path / "m.gguf", tmp_path / "a.gguf", what)
    after = weights(tmp_path / "a.gguf")
    v = what.basis[0]
    np.testing.assert_allclose(after["blk.0.attn_output.bias"], bias - v * (v @ bias), atol=1e-6)
    for e in range(3):
        np.testing.assert_allclose(
            after["blk.0.ffn_down_exps.weight"][e], experts[e] - np.outer(v, v @ experts[e]), atol=1e-6
        )
        np.testing.assert_allclose(
            after["blk.0.ffn_down_exps.bias"][e], expert_bias[e] - v * (v @ expert_bias[e]), atol=1e-6
        )
    assert {t.name for t in done.tensors} == {
        "blk.0.attn_output.bias", "blk.0.ffn_down_exps.weight", "blk.0.ffn_down_exps.bias",
    }  # fmt: skip


def write_importance(path: Path, tensors: dict[str, np.ndarray], kind: str = "imatrix") -> Path:
    w = gguf.GGUFWriter(str(path), "imatrix")
    w.add_type(kind)
    for name, data in tensors.items():
        w.add_tensor(name, data)
    for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        step()
    return path


def test_an_importance_matrix_is_mean_squares_and_reaches_the_quantizer(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "blk.2.ffn_down.weight"
    sums = np.arange(1, 129, dtype=np.float32)[None]
    path = write_importance(
        tmp_path / "i.gguf", {f"{name}.in_sum2": sums, f"{name}.counts": np.array([[4.0]], np.float32)}
    )
    assert list(read_importance(path)) == [name]
    np.testing.assert_array_equal(read_importance(path)[name], sums / 4)
    seen: dict[str, list[Any]] = {}
    real = module.quantized
    monkeypatch.setattr(
        module, "quantized", lambda t, rows, w=None: seen.setdefault(t.name, []).append(w) or real(t, rows, w)
    )
    ablate_weights(tiny_path, tmp_path / "a.gguf", removed(), importance=path)
    assert all(w is None for n, given in seen.items() for w in given if n != name)
    assert all(np.array_equal(w, sums[0] / 4) for w in seen[name])


@pytest.mark.parametrize("how", ["another file", "a model", "no counts"])
def test_what_is_no_importance_matrix_is_refused(tiny_path: Path, tmp_path: Path, how: str) -> None:
    path = tmp_path / "i.gguf"
    if how == "another file":
        path.write_text("importances")
    elif how == "a model":
        path = tiny_path
    else:
        write_importance(path, {"x.in_sum2": np.ones((1, 4), np.float32)})
    with pytest.raises(ps.ArgumentError, match="importance matrix"):
        ablate_weights(tiny_path, tmp_path / "a.gguf", removed(), importance=path)
    assert not (tmp_path / "a.gguf").exists()


def test_an_expert_that_no_text_reached_counts_every_column_alike(tmp_path: Path) -> None:
    path = write_importance(
        tmp_path / "i.gguf",
        {"x.in_sum2": np.array([[8, 0], [0, 0]], np.float32), "x.counts": np.array([[4], [0]], np.float32)},
    )
    np.testing.assert_array_equal(read_importance(path)["x"], [[2, 0], [1, 1]])


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_importances_that_are_no_mean_squares_are_refused(tmp_path: Path, bad: float) -> None:
    sums = np.array([[1, bad]], np.float32)
    path = write_importance(tmp_path / "i.gguf", {"x.in_sum2": sums, "x.counts": np.ones((1, 1), np.float32)})
    with pytest.raises(ps.ArgumentError, match="holds no mean squares"):
        read_importance(path)


def test_a_type_that_needs_importances_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    w = gguf.GGUFWriter(str(tmp_path / "iq.gguf"), "llama")
    w.add_block_count(1)
    w.add_embedding_length(256)
    block = np.zeros((256, 66), np.uint8)  # one block of iq2_xxs a row
    w.add_tensor("blk.0.ffn_down.weight", block, raw_dtype=Quantization.IQ2_XXS)
    for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        step()
    what = directions_to_remove([(samples.vector(n_embd=256), None)], layer=1)
    with pytest.raises(ps.ArgumentError, match=r"blk.0.ffn_down.weight: iq2_xxs can be written with an importance"):
        ablate_weights(tmp_path / "iq.gguf", tmp_path / "a.gguf", what)
    assert samples.no_leftovers(tmp_path, "iq.gguf")


def test_a_norm_behind_a_writer_is_refused_by_name(sliding: Any, tmp_path: Path) -> None:
    for make in (ablate_weights, ps.ship.lora.save_lora):
        with pytest.raises(ps.ModelError, match=r"architecture 'gemma2' normalises what a block writes \(blk.0.post_"):
            make(sliding.path, tmp_path / "a.gguf", removed())
    assert samples.no_leftovers(tmp_path)


def test_a_norm_before_the_feed_forward_that_has_the_other_name_is_none(tiny_path: Path, tmp_path: Path) -> None:
    w = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "qwen3next")
    w.add_block_count(1)
    w.add_embedding_length(64)
    w.add_tensor("blk.0.attn_norm.weight", np.ones(64, np.float32))
    w.add_tensor("blk.0.post_attention_norm.weight", np.ones(64, np.float32))
    w.add_tensor("blk.0.ffn_down.weight", np.ones((64, 32), np.float32))
    for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        step()
    assert [x.tensor.name for x in residual_writers(ModelFile(tmp_path / "m.gguf"))] == ["blk.0.ffn_down.weight"]


@pytest.mark.parametrize(
    ("parts", "error", "said"),
    [
        ([], ps.ArgumentError, "at least one"),
        ([(1, 0.0)], ps.ArgumentError, "above 0 and at most 1, not 0"),
        ([(1, -0.3)], ps.ArgumentError, "not -0.3"),
        ([(1, 1.5)], ps.ArgumentError, "not 1.5"),
        ([(1, float("nan"))], ps.ArgumentError, "not nan"),
        ([(1, 0.5), (2, 1.0)], ps.ArgumentError, r"not by \[0.5, 1.0\]"),
        ([(1, None), (1, None)], ps.VectorError, "is that of the vectors before it"),
    ],
)
def test_shares_and_directions_that_make_no_sense_are_refused(parts: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        directions_to_remove([(samples.vector(seed=s), share) for s, share in parts], layer=1)


def test_the_direction_is_that_of_the_block_that_moves_the_trait_most() -> None:
    effects = np.array([np.nan, 0.2, -0.9, 0.4], np.float32)
    assert best_block(samples.vector(layers=(1, 3), effects=effects)) == 3
    assert best_block(samples.vector(layers=(1, 2, 3), effects=effects)) == 2
    assert best_block(samples.vector(layers=(0, 3), aurocs=np.array([0.9, 1, 1, 0.7], np.float32))) == 0
    assert best_block(samples.vector(layers=(0, 1, 3))) == 1
    assert best_block(samples.vector(layers=())) == 2
    assert directions_to_remove([(samples.vector(), None)], layer=3).blocks == (3,)
    with pytest.raises(ps.VectorError, match="layer 9 is out of range"):
        directions_to_remove([(samples.vector(), None)], layer=9)


def test_directions_of_another_width_and_shares_of_no_block_are_refused(tiny_path: Path, tmp_path: Path) -> None:
    wide = directions_to_remove([(samples.vector(n_embd=32), None)])
    with pytest.raises(ps.ArgumentError, match="32 wide, the model 64"):
        ablate_weights(tiny_path, tmp_path / "a.gguf", wide)
    for shares in ({4: 1.0}, {-2: 0.0}, {0: 1.5}, {0: float("nan")}):
        with pytest.raises(ps.ArgumentError, match="is no share of a block from -1"):
            ablate_weights(tiny_path, tmp_path / "a.gguf", removed(), shares=shares)
    with pytest.raises(ps.ArgumentError, match="nothing would change"):
        ablate_weights(tiny_path, tmp_path / "a.gguf", removed(), shares=dict.fromkeys(range(-1, 4), 0.0))
    assert samples.no_leftovers(tmp_path)


def test_a_weight_that_is_not_finite_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    file = ModelFile(tiny_path)
    bad = np.full(file.tensors["blk.0.ffn_down.weight"].n_bytes // 4, np.nan, "<f4").tobytes()
    rewrite(file, tmp_path / "m.gguf", edits={"blk.0.ffn_down.weight": lambda _: iter([bad])})
    with pytest.raises(ps.ArgumentError, match=r"blk.0.ffn_down.weight: a weight to quantize is not finite"):
        ablate_weights(tmp_path / "m.gguf", tmp_path / "a.gguf", removed())
    assert samples.no_leftovers(tmp_path, "m.gguf")


def test_an_architecture_without_known_writers_is_refused(tmp_path: Path) -> None:
    w = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "unheard-of")
    w.add_block_count(1)
    w.add_embedding_length(64)
    w.add_tensor("blk.0.out.weight", np.ones((64, 32), np.float32))
    for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        step()
    with pytest.raises(ps.ModelError, match="architecture 'unheard-of' has no known matrix"):
        ablate_weights(tmp_path / "m.gguf", tmp_path / "a.gguf", removed())
    rewrite(ModelFile(tmp_path / "m.gguf"), tmp_path / "n.gguf", removed=["unheard-of.embedding_length"],
            fields=[Field.of("x", 1)], added={"y": Added.of(np.ones(1))})  # fmt: skip
    with pytest.raises(ps.ModelError, match=r"does not say unheard-of.embedding_length"):
        ablate_weights(tmp_path / "n.gguf", tmp_path / "a.gguf", removed())


@pytest.mark.parametrize(("kind", "most"), [("Q8_0", 0.03), ("Q5_0", 0.25), ("Q4_0", 0.4)])
def test_a_table_that_hardly_writes_along_a_direction_is_not_rounded_along_it_again(
    tmp_path: Path, kind: str, most: float
) -> None:
    """Rows that read a tenth of what rows of their length read by chance: rounding each for itself leaves more."""
    path = write_tiny_model(tmp_path / "m.gguf", n_embd=512, quantization=gguf.GGMLQuantizationType[kind])
    what = directions_to_remove([(samples.vector(n_embd=512), None)], layer=2)
    file = ModelFile(path)
    table = file.tensors["token_embd.weight"]
    rows = file.rows(table).astype(np.float64)
    rows -= 0.9 * (rows @ what.basis.T) @ what.basis
    made = quantized(table, rows.astype(np.float32))
    with path.open("r+b") as f:
        f.seek(table.offset)
        f.write(made)
    done = ablate_weights(path, tmp_path / "a.gguf", what)
    (found,) = (t for t in done.tensors if t.name == "token_embd.weight")
    rounded = dequantized(table, quantized(table, (rows - (rows @ what.basis.T) @ what.basis).astype(np.float32)))
    before = np.linalg.norm(file.rows(table) @ what.basis.T)
    alone = float(np.linalg.norm(rounded @ what.basis.T) / before)
    assert found.reading < min(most, alone / 2)
