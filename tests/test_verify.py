"""verify: what it measures, and that it finds what is wrong with a file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import oracle
import planted_model
import pytest
import samples
import tiny_models
from test_ablate import removed, tied

import personasteer as ps
from personasteer.model import output_rows
from personasteer.ship import (
    ablate_weights,
    bake,
    save_control_vector,
    save_lora,
    save_projection,
    verify,
    write_bundle,
)
from personasteer.ship.ablate import ablation_fields
from personasteer.ship.fields import Field, read_fields, save_gguf
from personasteer.ship.plain import PlainModel
from personasteer.ship.rewrite import ModelFile, rewrite
from personasteer.ship.verify import _ratio_interval, changed_tensors, kind_of

QUICK: dict[str, Any] = {"n_texts": 2, "n_threads": 1}
FIGURES = {"kind", "max_abs_dlogit", "kl_mean", "kl_p99", "effect_ratio", "ok"}


@pytest.fixture(scope="module")
def vector(tiny_path: Path) -> ps.PersonaVector:
    """Of a trait with continuations, so that the effect is that of its log-odds."""
    with ps.Model(tiny_path, n_ctx=64) as model:
        norms = model.norms
    texts = planted_model.planted_trait().as_dict()
    return samples.vector(seed=10, norms=norms, name="planted", provenance={"texts": texts, "trait": "planted"})


def edit_tensor(path: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    (tensor,) = (t for t in gguf.GGUFReader(path, "r+").tensors if t.name == name)
    change(tensor.data)
    tensor.data.flush()


# -- llama.cpp without the hook ---------------------------------------------------------------------------------------


def test_the_plain_model_decodes_as_the_engine_does_bit_for_bit(tiny_path: Path) -> None:
    text = "the harbour " * 12  # more tokens than output rows of a decode
    with ps.Model(tiny_path, n_ctx=512, n_parallel=1, n_threads=1, repack=False) as model:
        tokens = model.tokenize(text)
        assert len(tokens) > output_rows(model.n_vocab, 1)
        (wanted,) = model.logits([text])
        with PlainModel(tiny_path, n_ctx=512, n_threads=1, n_outputs=output_rows(model.n_vocab, 1)) as plain:
            assert np.array_equal(plain.logits(tokens), wanted)
            assert plain.logits(tokens, first=100).shape == (len(tokens) - 100, model.n_vocab)
            assert np.array_equal(plain.logits(tokens), wanted)  # nothing stays of the call between


def test_projections_are_done_as_the_formula_says(tiny_path: Path) -> None:
    v = samples.vector(seed=11).direction(2).astype(np.float64)
    d = v / np.linalg.norm(v)
    tokens = list(range(3, 20))
    with PlainModel(tiny_path, n_ctx=64, n_threads=1, projections={2: [(1.5, d)]}) as plain:
        got = plain.logits(tokens)
    watching = oracle.PlainContext(oracle.PlainModel(tiny_path), n_ctx=64, n_parallel=1, n_batch=64, n_threads=1,
                                   n_outputs=64, watch=True)  # fmt: skip
    _, states = watching.compute([tokens], [(0, len(tokens))])
    edits = np.zeros((4, len(tokens), 64), np.float32)
    edits[2] = -1.5 * np.outer(states[0][2] @ d, d)
    watching.reset()
    (wanted,), _ = watching.compute([tokens], [(0, len(tokens))], [edits])
    assert np.abs(got - wanted).max() < 1e-3


@pytest.mark.parametrize("how", ["no file", "a text", "an adapter", "another adapter", "a vector of another shape"])
def test_what_stock_llama_cpp_does_not_load_is_an_error(tiny_path: Path, tmp_path: Path, how: str) -> None:
    options: dict[str, Any] = {"n_ctx": 64, "n_threads": 1}
    path, other = tiny_path, tmp_path / "x.gguf"
    if how == "no file":
        path = other
    elif how == "a text":
        path = other
        path.write_text("not a model")
    elif how == "an adapter":
        save_lora(tiny_path, other, removed())
        path = other
    elif how == "another adapter":
        wide = ps.tiny_model.write_tiny_model(tmp_path / "wide.gguf", n_embd=128)
        save_lora(wide, other, ps.ship.directions_to_remove([(samples.vector(n_embd=128), None)]))
        options["lora"] = other
    else:
        options["control_vector"] = np.zeros((3, 64), np.float32)
    with pytest.raises((ps.ModelError, ps.VectorError), match=r"no such file|not a GGUF|cannot load|is \(4, 64\)"):
        PlainModel(path, **options)


# -- the kinds --------------------------------------------------------------------------------------------------------


def test_a_control_vector_is_the_engine_to_the_bit(tiny_path: Path, vector: ps.PersonaVector, tmp_path: Path) -> None:
    for strength in (0.4, -0.2):
        save_control_vector(vector, tmp_path / "v.gguf", strength=strength)
        found = verify(tmp_path / "v.gguf", tiny_path, **QUICK)
        assert found.summary().keys() >= FIGURES
        assert found.ok, found.reasons
        assert (found.kind, found.max_abs_dlogit, found.kl_mean, found.effect_ratio) == ("control-vector", 0, 0, 1)
        assert found.kl_base_engine == found.kl_base_shipped > 0.001
        json.dumps(found.summary(), allow_nan=False)
    again = verify(tmp_path / "v.gguf", tiny_path, against=[(vector, -0.2)], **QUICK)
    assert (again.ok, again.max_abs_dlogit) == (True, 0)
    other = verify(tmp_path / "v.gguf", tiny_path, against=[(vector, -0.3)], **QUICK)
    assert not other.ok
    assert other.max_abs_dlogit is not None
    assert other.max_abs_dlogit > 0.01
    assert other.effect_ratio == pytest.approx(2 / 3, abs=0.2)


def test_a_vector_without_a_trait_is_measured_by_the_slope_of_the_logits(tiny_path: Path, tmp_path: Path) -> None:
    plain = samples.vector(seed=10)
    path = samples.write_gguf(tmp_path / "v.gguf", {f"direction.{il}": plain.directions[il] for il in (1, 2)})
    same = verify(path, tiny_path, **QUICK)
    assert (same.effect, same.effect_ratio, same.max_abs_dlogit, same.ok) == ("logits", 1.0, 0.0, True)
    loaded = ps.PersonaVector.load(path)
    doubled = verify(path, tiny_path, against=[(replace(loaded, norms=None), 0.1)], **QUICK)
    assert doubled.effect_ratio != pytest.approx(1, abs=0.1)


def test_projections_in_both_modes(tiny_path: Path, vector: ps.PersonaVector, tmp_path: Path) -> None:
    save_projection(vector, tmp_path / "p.gguf")
    found = verify(tmp_path / "p.gguf", tiny_path, **QUICK)
    assert found.ok, found.reasons
    assert found.kind == "projection"
    assert found.effect_ratio == pytest.approx(1, abs=0.02)
    assert found.kl_mean is not None
    assert found.kl_base_engine is not None
    assert found.kl_mean < 0.01 * found.kl_base_engine
    save_projection(vector, tmp_path / "a.gguf", mode="add", strength=0.3)
    added = verify(tmp_path / "a.gguf", tiny_path, **QUICK)
    assert (added.ok, added.max_abs_dlogit) == (True, 0)


@pytest.mark.parametrize("n", [1, 2])
def test_a_lora_is_the_ablation_at_all_sites(tiny_path: Path, tmp_path: Path, n: int) -> None:
    save_lora(tiny_path, tmp_path / "l.gguf", removed(n))
    found = verify(tmp_path / "l.gguf", tiny_path, **QUICK)
    assert found.ok, found.reasons
    assert found.details["left_out"] == []
    assert found.details["largest_error"] < 1e-6
    assert found.noise is not None
    assert found.max_abs_dlogit is not None
    assert found.max_abs_dlogit < 2e-2
    assert found.effect_ratio == pytest.approx(1, abs=0.01)


def test_a_lora_that_leaves_tied_embeddings_is_compared_with_what_the_matrices_alone_write(
    tiny_path: Path, tmp_path: Path
) -> None:
    path = tied(tiny_path, tmp_path / "m.gguf")
    save_lora(path, tmp_path / "l.gguf", removed())
    found = verify(tmp_path / "l.gguf", path, **QUICK)
    assert found.ok, found.reasons
    assert (found.details["left_out"], found.details["tied_output"]) == (["token_embd.weight"], True)
    assert found.max_abs_dlogit is not None
    assert found.max_abs_dlogit < 2e-2


def test_a_share_is_checked_in_the_matrices(tiny_path: Path, tmp_path: Path) -> None:
    save_lora(tiny_path, tmp_path / "l.gguf", removed(share=0.5))
    found = verify(tmp_path / "l.gguf", tiny_path, **QUICK)
    assert (found.ok, found.max_abs_dlogit, found.effect_ratio) == (True, None, None)
    assert "a share" in found.details["not_compared"]
    edit_tensor(tmp_path / "l.gguf", "blk.1.ffn_down.weight.lora_b", lambda b: np.multiply(b, 1.01, out=b))
    broken = verify(tmp_path / "l.gguf", tiny_path, **QUICK)
    assert not broken.ok
    assert "a matrix of the adapter is off" in broken.reasons[0]


def test_a_baked_model_is_the_engine_but_for_rounding(
    tiny_path: Path, vector: ps.PersonaVector, tmp_path: Path
) -> None:
    bake(tiny_path, tmp_path / "b.gguf", vector, strength=0.4)
    found = verify(tmp_path / "b.gguf", tiny_path, **QUICK)
    assert found.ok, found.reasons
    assert found.details["error_at_block"] < 2e-6
    assert found.effect_ratio == pytest.approx(1, abs=0.01)
    assert found.noise is not None
    assert found.details["added"] == ["blk.1.ffn_down.bias", "blk.2.ffn_down.bias"]
    edit_tensor(tmp_path / "b.gguf", "blk.1.ffn_down.bias", lambda b: np.multiply(b, 1.1, out=b))
    broken = verify(tmp_path / "b.gguf", tiny_path, **QUICK)
    assert not broken.ok
    assert any("first steered block" in r for r in broken.reasons)
    assert any("logits differ by up to" in r for r in broken.reasons)


@pytest.mark.parametrize("how", ["", "queries", "keys", "values", "a hyperparameter", "the architecture", "a bias"])
def test_a_qwen2_baked_as_a_llama_is_the_base_in_another_order(
    vector: ps.PersonaVector, tmp_path: Path, how: str
) -> None:
    path, out = tiny_models.write_qwen_model(tmp_path / "m.gguf"), tmp_path / "b.gguf"
    with ps.Model(path, n_ctx=64) as model:
        other = replace(vector, norms=model.norms)
    bake(path, out, other, strength=0.3)
    names = {"queries": "attn_q.weight", "keys": "attn_k.bias", "values": "attn_v.weight", "a bias": "ffn_down.bias"}
    if how in names:
        edit_tensor(out, f"blk.2.{names[how]}", lambda t: t.put(0, 1e-3))
    elif how:
        field = {"a hyperparameter": Field("llama.rope.freq_base", gguf.GGUFValueType.FLOAT32, 9999.0),
                 "the architecture": Field.of("general.architecture", "qwen3")}[how]  # fmt: skip
        rewrite(ModelFile(out), tmp_path / "c.gguf", fields=[field])
        out = tmp_path / "c.gguf"
    if how == "the architecture":
        with pytest.raises(ps.ModelError, match="another architecture"):
            verify(out, path, **QUICK)
        return
    found = verify(out, path, **QUICK)
    assert found.details["strategy"] == "as-llama"
    assert found.ok == (how == ""), found.reasons
    said = {"": "", "queries": "order of a llama", "keys": "order of a llama", "values": "attn_v",
            "a hyperparameter": "key-values differ", "a bias": "logits differ"}[how]  # fmt: skip
    assert any(said in reason for reason in [*found.reasons, *([""] if not how else [])])


def test_a_value_bias_is_judged_by_its_effect(vector: ps.PersonaVector, tmp_path: Path) -> None:
    path = tiny_models.write_qwen_model(tmp_path / "m.gguf")
    with ps.Model(path, n_ctx=64) as model:
        other = replace(vector, norms=model.norms).at((2,))
    bake(path, tmp_path / "b.gguf", other, strength=0.3, strategy="value-bias", n_threads=1)
    found = verify(tmp_path / "b.gguf", path, **QUICK)
    assert found.details["strategy"] == "value-bias"
    assert found.effect_ratio is not None
    low, high = 0.9, 1.1
    assert found.ok == (low <= found.effect_ratio <= high and found.kl_base_shipped <= 1.5 * found.kl_base_engine)  # type: ignore[operator]
    for il in (2, 3):
        edit_tensor(tmp_path / "b.gguf", f"blk.{il}.attn_v.bias", lambda b: np.multiply(b, 0.0, out=b))
    broken = verify(tmp_path / "b.gguf", path, **QUICK)
    assert not broken.ok
    assert "of the engine's, not within 0.9 to 1.1" in broken.reasons[0]


def test_ablated_weights_are_read_again(tiny_path: Path, tmp_path: Path) -> None:
    ablate_weights(tiny_path, tmp_path / "a.gguf", removed())
    found = verify(tmp_path / "a.gguf", tiny_path, **QUICK)
    assert found.ok, found.reasons
    assert found.details["largest_reading"]["f32"] < 1e-6
    assert (found.details["changed"], found.details["added"]) == (9, [])
    assert found.max_abs_dlogit is not None
    assert found.max_abs_dlogit < 2e-2
    base = gguf.GGUFReader(tiny_path)
    (given,) = (t.data for t in base.tensors if t.name == "blk.2.attn_output.weight")
    edit_tensor(tmp_path / "a.gguf", "blk.2.attn_output.weight", lambda w: np.copyto(w, 0.97 * w + 0.03 * given))
    broken = verify(tmp_path / "a.gguf", tiny_path, **QUICK)
    assert not broken.ok
    assert "blk.2.attn_output.weight (f32) still writes 3.0% of what it wrote" in broken.reasons[0]


@pytest.mark.parametrize("form", ["bake", "ablate"])
def test_another_tensor_that_differs_is_found(
    tiny_path: Path, vector: ps.PersonaVector, tmp_path: Path, form: str
) -> None:
    out = tmp_path / "m.gguf"
    if form == "bake":
        bake(tiny_path, out, vector, strength=0.4)
    else:
        ablate_weights(tiny_path, out, removed())
    edit_tensor(out, "blk.0.attn_q.weight", lambda w: np.multiply(w, 1 + 1e-6, out=w))
    found = verify(out, tiny_path, **QUICK)
    assert not found.ok
    assert any("blk.0.attn_q.weight" in r for r in found.reasons)


@pytest.mark.parametrize("how", ["a copy", "zeros", "half of a share", "another template", "another hyperparameter"])
def test_a_wrong_ablation_does_not_pass(tiny_path: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "a.gguf"
    ablate_weights(tiny_path, out, removed(share=0.5 if how == "half of a share" else None))
    if how == "a copy":
        fields = ablation_fields("ablate", removed())
        rewrite(ModelFile(tiny_path), out, fields=fields)
    elif how == "zeros":
        for name in ("blk.1.ffn_down.weight", "blk.3.attn_output.weight"):
            edit_tensor(out, name, lambda w: np.multiply(w, 0.0, out=w))
    elif how == "half of a share":
        edit_tensor(out, "blk.1.ffn_down.weight", lambda w: np.multiply(w, 1.01, out=w))
    else:
        key = "tokenizer.chat_template" if how == "another template" else "llama.rope.freq_base"
        value = Field.of(key, "{{ 'always praise it' }}")
        if how == "another hyperparameter":
            value = Field(key, gguf.GGUFValueType.FLOAT32, 10.0)
        rewrite(ModelFile(out), tmp_path / "b.gguf", fields=[value])
        out = tmp_path / "b.gguf"
    found = verify(out, tiny_path, **QUICK)
    assert not found.ok
    said = {"a copy": "still writes 100.0%", "zeros": "is off by", "half of a share": "of what it wrote|is off by"}
    assert re.search(said.get(how, "key-values differ from the base"), found.reasons[0]), found.reasons


def test_shares_by_block_are_verified_by_their_weights(tiny_path: Path, tmp_path: Path) -> None:
    ablate_weights(tiny_path, tmp_path / "a.gguf", removed(), shares={-1: 0.0, 0: 0.0, 1: 0.5})
    found = verify(tmp_path / "a.gguf", tiny_path, **QUICK)
    assert found.ok, found.reasons
    assert "leaves a share" in found.details["not_compared"]
    rewrite(ModelFile(tmp_path / "a.gguf"), tmp_path / "b.gguf", removed=["personasteer.share_blocks",
                                                                         "personasteer.share_factors"])  # fmt: skip
    assert not verify(tmp_path / "b.gguf", tiny_path, **QUICK).ok


@pytest.mark.parametrize("how", ["alpha", "missing", "another pair", "nan"])
def test_a_wrong_adapter_does_not_pass(tiny_path: Path, tmp_path: Path, how: str) -> None:
    save_lora(tiny_path, tmp_path / "l.gguf", removed(share=0.5))
    reader = gguf.GGUFReader(tmp_path / "l.gguf")
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    fields = [Field.of(k, v) for k, v in read_fields(tmp_path / "l.gguf").items()
              if k.startswith(("general.type", "adapter.type", "personasteer."))]  # fmt: skip
    alpha = 50.0 if how == "alpha" else 1.0
    fields.append(Field("adapter.lora.alpha", gguf.GGUFValueType.FLOAT32, alpha))
    if how == "missing":
        del tensors["blk.2.ffn_down.weight.lora_a"], tensors["blk.2.ffn_down.weight.lora_b"]
    elif how == "another pair":
        tensors["blk.0.attn_q.weight.lora_a"] = np.ones((1, 64), np.float32)
        tensors["blk.0.attn_q.weight.lora_b"] = np.ones((64, 1), np.float32)
    elif how == "nan":
        tensors["blk.2.ffn_down.weight.lora_a"][0, 0] = np.nan
    save_gguf(tmp_path / "w.gguf", "llama", fields, tensors)
    if how == "nan":
        with pytest.raises(ps.ModelError, match="not finite"):
            verify(tmp_path / "w.gguf", tiny_path, **QUICK)
        return
    found = verify(tmp_path / "w.gguf", tiny_path, **QUICK)
    assert not found.ok
    assert re.search("is missing|is no part of|is off by", found.reasons[0])


def test_against_is_refused_where_nothing_is_added(tiny_path: Path, vector: ps.PersonaVector, tmp_path: Path) -> None:
    save_lora(tiny_path, tmp_path / "l.gguf", removed())
    with pytest.raises(ps.ArgumentError, match="--against compares additions"):
        verify(tmp_path / "l.gguf", tiny_path, against=[(vector, 0.3)], **QUICK)


def test_an_interrupt_ends_a_projection_at_once(
    tiny_path: Path, vector: ps.PersonaVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> bool:
        raise KeyboardInterrupt

    d = vector.direction(2) / np.linalg.norm(vector.direction(2))
    with PlainModel(tiny_path, n_ctx=64, n_threads=1, projections={2: [(1.0, d)]}) as plain:
        monkeypatch.setattr(plain, "_project", interrupt)
        with pytest.raises(KeyboardInterrupt):
            plain.logits([3, 4, 5])


def test_changed_tensors_are_found_by_their_bytes(tiny_path: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_path, tmp_path / "m.gguf")
    assert changed_tensors(ModelFile(tiny_path), ModelFile(tmp_path / "m.gguf")) == ([], [])
    edit_tensor(tmp_path / "m.gguf", "output_norm.weight", lambda w: np.copyto(w[-1:], 1.0000001))
    assert changed_tensors(ModelFile(tiny_path), ModelFile(tmp_path / "m.gguf")) == (["output_norm.weight"], [])
    other = tiny_models.write_qwen_model(tmp_path / "q.gguf")
    with pytest.raises(ps.ModelError, match=r"tiny.gguf: lacks tensor blk.0.attn_k.bias of q.gguf"):
        changed_tensors(ModelFile(other), ModelFile(tiny_path))


def test_a_bundle_is_verified_file_by_file(tiny_path: Path, vector: ps.PersonaVector, tmp_path: Path) -> None:
    bake(tiny_path, tmp_path / "b.gguf", vector, strength=0.3)
    write_bundle(tmp_path / "bundle", model=tiny_path, steering=[vector * 0.3], name="x", shipped=[tmp_path / "b.gguf"])
    found = verify(tmp_path / "bundle", tiny_path, **QUICK)
    assert found.ok, found.reasons
    assert {d["kind"] for d in found.details.values()} == {"control-vector", "bake"}
    assert found.max_abs_dlogit == max(d["max_abs_dlogit"] for d in found.details.values())
    other = ps.tiny_model.write_tiny_model(tmp_path / "other.gguf", seed=1)
    with pytest.raises(ps.errors.BundleError, match="is another file"):
        verify(tmp_path / "bundle", other, **QUICK)


def test_a_bundle_whose_baked_model_does_something_else_fails(
    tiny_path: Path, vector: ps.PersonaVector, tmp_path: Path
) -> None:
    bake(tiny_path, tmp_path / "b.gguf", vector, strength=-0.4)
    write_bundle(tmp_path / "bundle", model=tiny_path, steering=[vector * 0.3], name="x", shipped=[tmp_path / "b.gguf"])
    found = verify(tmp_path / "bundle", tiny_path, **QUICK)
    assert not found.ok
    assert found.reasons[0].startswith("files/b.gguf: ")


def test_edits_that_stock_llama_cpp_has_not_are_said_to_be_unverified(
    tiny_path: Path, vector: ps.PersonaVector, tmp_path: Path
) -> None:
    write_bundle(tmp_path / "bundle", model=tiny_path, steering=[ps.Ablate(vector)], name="x")
    found = verify(tmp_path / "bundle", tiny_path, **QUICK)
    assert found.details["not verified"] == ["Ablate"]


def test_a_plain_model_is_no_form_of_a_persona(tiny_path: Path, vector: ps.PersonaVector, tmp_path: Path) -> None:
    shutil.copy(tiny_path, tmp_path / "m.gguf")
    with pytest.raises(ps.ModelError, match="does not say which persona is in its weights"):
        write_bundle(tmp_path / "b", model=tiny_path, steering=[vector * 0.3], name="x", shipped=[tmp_path / "m.gguf"])
    assert not (tmp_path / "b").exists()


# -- what cannot be verified ------------------------------------------------------------------------------------------


def test_a_model_that_does_not_say_how_it_was_made_needs_vectors(
    tiny_path: Path, vector: ps.PersonaVector, tmp_path: Path
) -> None:
    shutil.copy(tiny_path, tmp_path / "m.gguf")
    assert kind_of(tmp_path / "m.gguf") == "model"
    with pytest.raises(ps.ArgumentError, match="--against"):
        verify(tmp_path / "m.gguf", tiny_path, **QUICK)
    found = verify(tmp_path / "m.gguf", tiny_path, against=[(vector, 0.3)], **QUICK)
    assert not found.ok
    assert found.effect_ratio == pytest.approx(0, abs=1e-6)


def test_a_file_for_another_model_is_refused(tiny_path: Path, vector: ps.PersonaVector, tmp_path: Path) -> None:
    wide = ps.tiny_model.write_tiny_model(tmp_path / "wide.gguf", n_embd=128)
    save_control_vector(vector, tmp_path / "v.gguf")
    save_lora(tiny_path, tmp_path / "l.gguf", removed())
    bake(tiny_path, tmp_path / "b.gguf", vector, strength=0.3)
    for name in ("v", "l", "b"):
        with pytest.raises(ps.PersonasteerError, match="64"):
            verify(tmp_path / f"{name}.gguf", wide, **QUICK)


@pytest.mark.parametrize(
    ("fields", "removed_keys", "said"),
    [
        ([Field.of("personasteer.kind", "wonder")], [], "made as 'wonder', which this version does not know"),
        ([], ["personasteer.removed"], "does not say which directions it removes"),
        ([Field.of("personasteer.share", "all")], [], "does not say which directions it removes"),
        (
            [Field.of("personasteer.removed", np.full(64, np.nan, np.float32))],
            [],
            "do not fit a model of width 64, or are not finite",
        ),
        ([Field.of("personasteer.n_embd", 32)], [], "do not fit a model of width 64, or are not finite"),
    ],
)
def test_key_values_that_do_not_fit_are_refused(
    tiny_path: Path, tmp_path: Path, fields: list[Field], removed_keys: list[str], said: str
) -> None:
    ablate_weights(tiny_path, tmp_path / "a.gguf", removed())
    rewrite(ModelFile(tmp_path / "a.gguf"), tmp_path / "b.gguf", fields=fields, removed=removed_keys)
    with pytest.raises(ps.PersonasteerError, match=said):
        verify(tmp_path / "b.gguf", tiny_path, **QUICK)


def test_a_model_that_computes_no_numbers_is_refused(tiny_path: Path, vector: ps.PersonaVector, tmp_path: Path) -> None:
    bake(tiny_path, tmp_path / "b.gguf", vector, strength=0.3)
    edit_tensor(tmp_path / "b.gguf", "blk.1.ffn_down.bias", lambda b: np.copyto(b, np.nan))
    with pytest.raises(ps.PersonasteerError, match="not finite"):
        verify(tmp_path / "b.gguf", tiny_path, **QUICK)


def test_an_effect_that_may_be_none_has_no_interval() -> None:
    rng = np.random.default_rng(1)
    wanted = rng.normal(0.5, 0.1, 40)
    low, high = _ratio_interval(1.1 * wanted, wanted) or (0.0, 0.0)
    assert low == pytest.approx(1.1)
    assert high == pytest.approx(1.1)
    low, high = _ratio_interval(wanted + rng.normal(0.05, 0.2, 40), wanted) or (0.0, 0.0)
    assert 0.8 < low < 1.1 < high < 1.4
    assert _ratio_interval(wanted, rng.normal(0.01, 0.5, 40)) is None
