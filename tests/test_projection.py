"""Projection files (GLP): exact values of the specification, what the edits do, and every way to be against it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import samples
from gguf import GGUFValueType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from personasteer import Ablate, Add, ArgumentError, Model, PersonaVector, VectorError
from personasteer.ship import projection
from personasteer.ship.control_vector import load_control_vector, save_control_vector
from personasteer.ship.glp import content_sha256
from personasteer.ship.projection import load_projection, save_projection

if TYPE_CHECKING:
    from conftest import Loaded

NORMS = np.array([5.0, 8.0, 11.0, 13.0], np.float32)
HASHES = [  # of the specification's writers: {direction.N: values}, SHA-256
    ({3: [1.0, 2.0], 11: [-3.0, 0.5]}, "7f7746b005589f4bc87ddec595c260984966fc8180a145533f7c955745aefbab"),
    (
        {1: [0.5, 0.5, 0.5, 0.5], 2: [1.0, 0.0, 0.0, 0.0]},
        "9e29a3887cf5a00f505f05f4e11ef98fe6b1f25203beb4c60b01b720e7544151",
    ),
]
UNIT = {"direction.1": [0.6, 0.8, 0.0], "direction.2": [0.0, 0.0, 1.0]}
PLANE = UNIT | {"direction.1.1": [-0.8, 0.6, 0.0], "direction.2.1": [1.0, 0.0, 0.0]}
GLP: dict[str, Any] = {"glp.mode": "project", "glp.spec_version": 1}
RANK_2 = GLP | {"glp.spec_version": 2, "glp.rank": 2, "glp.orthonormal": True}
BASE = {"base_model": "Qwen/Qwen2.5-1.5B-Instruct", "base_revision": "ab" * 20}


def write(path: Path, keys: Mapping[str, Any], tensors: Mapping[str, Any] = UNIT) -> Path:
    """A GLP file as another tool would write it."""
    w = gguf.GGUFWriter(str(path), "controlvector")
    for key, value in keys.items():
        kind = {str: Type.STRING, bool: Type.BOOL, int: Type.UINT32, float: Type.FLOAT32}[type(value)]
        w.add_key_value(key, value, kind)
    for name, row in tensors.items():
        w.add_tensor(name, np.asarray(row, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def fields_of(path: Path) -> dict[str, tuple[Type, Any]]:
    return {key: (f.types[0], f.contents()) for key, f in gguf.GGUFReader(path).fields.items()}


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


def full_vector() -> PersonaVector:
    data = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    data[0] = np.nan
    return PersonaVector(
        data, (1, 3), "pessimistic", strength=0.375, weights={1: 0.75, 3: 0.25}, norms=NORMS, last_prompt=data * 2,
        provenance={"method": "difference-of-means", "architecture": "llama", "fingerprint": "ab" * 32},
        shuffled=np.random.default_rng(2).standard_normal((3, 4, 64)),
    )  # fmt: skip


def same(a: PersonaVector, b: PersonaVector) -> bool:
    return (a.name, a.strength, a.layers, dict(a.weights), dict(a.provenance)) == (
        b.name, b.strength, b.layers, dict(b.weights), dict(b.provenance),
    ) and all(
        np.array_equal(getattr(a, part), getattr(b, part), equal_nan=True)
        for part in ("directions", "norms", "last_prompt", "shuffled")
    )  # fmt: skip


def applied(steering: Any, h: np.ndarray, il: int, n_layer: int = 4) -> np.ndarray:
    """What edits do at block il to h (n_tokens, n_embd), from their terms."""

    class Shape:
        fingerprint, identity, norms, name = "", {}, np.ones(n_layer), "m"  # type: ignore[var-annotated]

    Shape.n_layer, Shape.n_embd = n_layer, h.shape[1]  # type: ignore[attr-defined]
    out = h.astype(np.float64).copy()
    for edit in steering:
        term = edit.terms(Shape()).get(il)
        if term is None:
            continue
        if term.row is not None:
            out += term.row
        else:
            assert term.low == term.high == 0.0
            out -= term.share * (h @ term.read)[:, None] * term.read
    return out


# ---- the specification's own numbers


@pytest.mark.parametrize(("rows", "digest"), HASHES)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_content_hash_is_that_of_other_writers_in_any_order_of_the_file(
    tmp_path: Path, rows: dict[int, list[float]], digest: str, reverse: bool
) -> None:
    order = sorted(rows, reverse=reverse)
    path = write(tmp_path / "v.gguf", {"glp.content_sha256": digest}, {f"direction.{n}": rows[n] for n in order})
    assert load_projection(path).content_sha256 == digest
    assert content_sha256({(n, 0): np.array(rows[n], np.float32) for n in order}) == digest


def test_layers_are_ordered_as_numbers_and_a_basis_stands_together() -> None:
    rows = {(10, 0): [4.0], (2, 1): [2.0], (2, 0): [1.0], (9, 0): [3.0]}
    expected = hashlib.sha256(np.array([1.0, 2.0, 3.0, 4.0], "<f4").tobytes()).hexdigest()
    assert content_sha256({k: np.array(v, np.float32) for k, v in rows.items()}) == expected


@pytest.mark.parametrize(
    ("d", "h", "alpha", "expected"),
    [
        ([1.0, 0.0, 0.0], [3.0, 1.0, -2.0], 1.0, [0.0, 1.0, -2.0]),
        ([0.0, 1.0, 0.0], [0.0, 4.0, 1.0], 0.5, [0.0, 2.0, 1.0]),
    ],
)
def test_a_projection_takes_alpha_times_the_reading_out(
    tmp_path: Path, d: list[float], h: list[float], alpha: float, expected: list[float]
) -> None:
    path = write(tmp_path / "v.gguf", GLP | {"glp.alpha_default": alpha}, {"direction.1": d})
    assert applied(load_projection(path).steering(), np.array([h]), 1).tolist() == [expected]


def test_an_alpha_above_1_is_refused_with_the_scale_that_takes_the_direction_out(tmp_path: Path) -> None:
    loaded = load_projection(write(tmp_path / "v.gguf", GLP | {"glp.alpha_default": 4.0}))
    assert loaded.alpha == {1: 4.0, 2: 4.0}
    with pytest.raises(VectorError, match=r"alpha 4 at layer 1.*steering\(scale=0\.25\)"):
        loaded.steering()
    out = applied(loaded.steering(scale=0.25), np.array([[3.0, 1.0, -2.0]]), 2)
    assert out.tolist() == [[3.0, 1.0, 0.0]]
    for scale in (-1.0, np.nan, np.inf):
        with pytest.raises(ArgumentError, match="scale"):
            loaded.steering(scale=scale)


# ---- what is written


def test_a_projection_has_unit_directions_and_every_key_that_readers_ask_for(tmp_path: Path) -> None:
    v = full_vector()
    save_projection(v, tmp_path / "v.gguf", **BASE, contrast="yes against no", created="2026-09-04",
                    general={"author": "me", "license": "mit", "version": "3", "description": "d"})  # fmt: skip
    rows = tensors_of(tmp_path / "v.gguf")
    assert list(rows) == ["direction.1", "direction.3"]
    for il in (1, 3):
        d = v.directions[il].astype(np.float64)
        assert np.array_equal(rows[f"direction.{il}"], (d / np.linalg.norm(d)).astype(np.float32))
    fields = fields_of(tmp_path / "v.gguf")
    digest = hashlib.sha256(rows["direction.1"].tobytes() + rows["direction.3"].tobytes()).hexdigest()
    expected = {
        "general.architecture": (Type.STRING, "controlvector"),
        "general.name": (Type.STRING, "pessimistic"),
        "general.author": (Type.STRING, "me"),
        "general.license": (Type.STRING, "mit"),
        "general.version": (Type.STRING, "3"),
        "general.description": (Type.STRING, "d"),
        "general.base_model.count": (Type.UINT32, 1),
        "general.base_model.0.name": (Type.STRING, "Qwen2.5-1.5B-Instruct"),
        "general.base_model.0.organization": (Type.STRING, "Qwen"),
        "general.base_model.0.version": (Type.STRING, "ab" * 20),
        "general.base_model.0.repo_url": (Type.STRING, "https://huggingface.co/Qwen/Qwen2.5-1.5B-Instruct"),
        "controlvector.model_hint": (Type.STRING, "llama"),
        "controlvector.layer_count": (Type.UINT32, 2),
        "glp.mode": (Type.STRING, "project"),
        "glp.spec_version": (Type.UINT32, 1),
        "glp.alpha_default": (Type.FLOAT32, 1.0),
        "glp.rank": (Type.UINT32, 1),
        "glp.orthonormal": (Type.BOOL, True),
        "glp.hook_point": (Type.STRING, "residual_stream_post_layer"),
        "glp.derived_at": (Type.STRING, "residual_stream_post_layer"),
        "glp.layer_ids_zero_based": (Type.STRING, "1,3"),
        "glp.content_sha256": (Type.STRING, digest),
        "glp.generator": (Type.STRING, "personasteer"),
        "glp.method": (Type.STRING, "difference-of-means"),
        "glp.contrast": (Type.STRING, "yes against no"),
        "glp.created": (Type.STRING, "2026-09-04"),
        "glp.base_model": (Type.STRING, BASE["base_model"]),
        "glp.base_revision": (Type.STRING, BASE["base_revision"]),
    }
    found = {k: v for k, v in fields.items() if not k.startswith(("GGUF.", "personasteer."))}
    assert found == expected


def test_a_projection_comes_back_whole_and_the_same_vector_gives_the_same_bytes(tmp_path: Path) -> None:
    v = full_vector()
    for name in ("a.gguf", "b.gguf"):
        save_projection(v, tmp_path / name, strength=0.3, **BASE)
    back = load_projection(tmp_path / "a.gguf")
    assert same(back.vector, v)
    assert back.mode == "project"
    assert back.alpha == dict.fromkeys((1, 3), float(np.float32(0.3)))
    assert (back.hook_point, back.derived_at) == ("residual_stream_post_layer", "residual_stream_post_layer")
    assert back.pin == {"name": "Qwen2.5-1.5B-Instruct", "organization": "Qwen", "version": "ab" * 20,
                        "repo_url": "https://huggingface.co/Qwen/Qwen2.5-1.5B-Instruct"}  # fmt: skip
    save_projection(back.vector, tmp_path / "c.gguf", strength=0.3, **BASE)
    assert len({(tmp_path / name).read_bytes() for name in ("a.gguf", "b.gguf", "c.gguf")}) == 1
    with pytest.raises(FrozenInstanceError):
        back.mode = "add"  # type: ignore[misc]


def test_other_layers_are_projected_at_and_the_vector_keeps_its_own(tmp_path: Path) -> None:
    save_projection(full_vector(), tmp_path / "v.gguf", layers=(2, 3), **BASE)
    back = load_projection(tmp_path / "v.gguf")
    assert list(tensors_of(tmp_path / "v.gguf")) == ["direction.2", "direction.3"]
    assert same(back.vector, full_vector())
    assert [(type(e), e.share, e.layers) for e in back.steering()] == [(Ablate, 1.0, (2, 3))]


@pytest.mark.parametrize("strength", [None, -0.5])
def test_mode_add_writes_the_very_tensors_of_a_control_vector(tmp_path: Path, strength: float | None) -> None:
    v = full_vector()
    save_control_vector(v, tmp_path / "plain.gguf", strength=strength)
    save_projection(v, tmp_path / "glp.gguf", mode="add", strength=strength, **BASE)
    plain, rows = tensors_of(tmp_path / "plain.gguf"), tensors_of(tmp_path / "glp.gguf")
    assert list(plain) == list(rows)
    assert all(np.array_equal(plain[name], rows[name]) for name in plain)
    fields = fields_of(tmp_path / "glp.gguf")
    assert fields["glp.mode"][1] == "add"
    assert fields["glp.alpha_default"][1] == 1.0
    assert "glp.orthonormal" not in fields
    back = load_projection(tmp_path / "glp.gguf")
    assert same(back.vector, v)
    assert same(load_control_vector(tmp_path / "glp.gguf"), v)  # also for those who know no GLP
    h = np.random.default_rng(3).standard_normal((2, 64))
    assert np.allclose(applied(back.steering(), h, 3), h + rows["direction.3"], rtol=0, atol=1e-12)
    assert [(type(e), e.strength, e.raw) for e in back.steering()] == [(Add, 1.0, True)]


def test_mode_add_at_other_layers_is_the_vector_at_those_layers(tmp_path: Path) -> None:
    save_projection(full_vector(), tmp_path / "a.gguf", mode="add", layers=(2,), **BASE)
    save_control_vector(full_vector().at((2,)), tmp_path / "b.gguf")
    a, b = tensors_of(tmp_path / "a.gguf"), tensors_of(tmp_path / "b.gguf")
    assert list(a) == list(b) == ["direction.2"]
    assert np.array_equal(a["direction.2"], b["direction.2"])
    assert load_projection(tmp_path / "a.gguf").vector.layers == (2,)


def test_no_time_and_no_path_stands_in_a_file_that_was_not_given_one(tmp_path: Path) -> None:
    save_projection(full_vector(), tmp_path / "v.gguf", **BASE)
    content = (tmp_path / "v.gguf").read_bytes()
    assert str(tmp_path).encode() not in content
    assert not re.search(rb"20[0-9]{2}-[0-9]{2}-[0-9]{2}", content)


def test_writing_a_projection_warns_that_llama_cpp_would_add_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_projection(full_vector(), tmp_path / "v.gguf", mode="add", **BASE)
    assert caplog.text == ""
    save_projection(full_vector(), tmp_path / "v.gguf", **BASE)
    assert "--control-vector" in caplog.text
    caplog.clear()
    save_projection(full_vector(), tmp_path / "v.gguf")
    assert "base_model" in caplog.text
    assert not any(key.startswith("general.base_model") for key in fields_of(tmp_path / "v.gguf"))
    caplog.clear()
    save_projection(full_vector(), tmp_path / "v.gguf", base_model="a/b")
    assert "revision" in caplog.text
    assert load_projection(tmp_path / "v.gguf").pin == {
        "name": "b", "organization": "a", "repo_url": "https://huggingface.co/a/b",
    }  # fmt: skip


def test_what_readers_of_the_format_refuse_as_too_large_is_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    v = full_vector()
    monkeypatch.setattr(projection, "MAX_ELEMENTS", 4 * 64)  # shuffled has three times as many
    save_projection(v, tmp_path / "v.gguf", **BASE)
    assert "personasteer.shuffled" in caplog.text
    back = load_projection(tmp_path / "v.gguf").vector
    assert back.shuffled is None
    assert np.array_equal(back.directions, v.directions, equal_nan=True)
    monkeypatch.setattr(projection, "MAX_ELEMENTS", 4 * 64 - 1)  # not even the directions
    save_projection(v, tmp_path / "v.gguf", **BASE)
    assert not any(key.startswith("personasteer.") for key in fields_of(tmp_path / "v.gguf"))
    foreign = load_projection(tmp_path / "v.gguf")
    assert foreign.vector.layers == (1, 3)
    assert foreign.vector.provenance["method"] == "imported"
    monkeypatch.setattr(projection, "MAX_ELEMENTS", 4 * 64 * 3)
    monkeypatch.setattr(projection, "MAX_TEXT", 10)  # the provenance
    save_projection(v, tmp_path / "v.gguf", **BASE)
    assert not any(key.startswith("personasteer.") for key in fields_of(tmp_path / "v.gguf"))


BAD_ARGUMENTS: dict[str, dict[str, Any]] = {
    "an unknown mode": {"mode": "ablate"},
    "alpha 0": {"strength": 0.0},
    "a negative alpha": {"strength": -1.0},
    "NaN": {"strength": np.nan},
    "infinity": {"strength": np.inf},
    "an alpha beyond float32": {"strength": 1e39},
    "an alpha below float32": {"strength": 1e-60},
    "a strength 0 to add": {"mode": "add", "strength": 0.0},
    "a model without organization": {"base_model": "Qwen"},
    "a model with a link": {"base_model": "https://huggingface.co/a/b"},
    "a short commit": {"base_model": "a/b", "base_revision": "abc123"},
    "a branch": {"base_model": "a/b", "base_revision": "main"},
    "a commit of no model": {"base_revision": "ab" * 20},
    "an unknown general key": {"general": {"architecture": "llama"}},
}


@pytest.mark.parametrize("how", BAD_ARGUMENTS)
def test_arguments_that_would_write_a_file_against_the_rules_are_refused(tmp_path: Path, how: str) -> None:
    with pytest.raises(ArgumentError):
        save_projection(full_vector(), tmp_path / "v.gguf", **BAD_ARGUMENTS[how])
    assert samples.no_leftovers(tmp_path)


def test_layer_0_has_no_place_and_a_missing_direction_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    v = samples.vector(norms=NORMS)
    save_projection(v, tmp_path / "v.gguf", layers=(0, 2), **BASE)
    assert "layer 0 is left out" in caplog.text
    assert list(tensors_of(tmp_path / "v.gguf")) == ["direction.2"]
    for layers in ((0,), ()):
        with pytest.raises(VectorError, match=r"direction\.0"):
            save_projection(v, tmp_path / "w.gguf", layers=layers, **BASE)
    for layers in ((0, 1), (4,), (-1,)):  # NaN at 0, out of range
        with pytest.raises(VectorError):
            save_projection(full_vector(), tmp_path / "w.gguf", layers=layers, **BASE)
    assert samples.no_leftovers(tmp_path, "v.gguf")


# ---- what is read


def test_a_file_without_metadata_is_added_as_it_stands(tmp_path: Path) -> None:
    loaded = load_projection(write(tmp_path / "v.gguf", {}, {"direction.2": [1.0, 2.0], "direction.1": [0.0, 0.0]}))
    assert (loaded.mode, loaded.alpha, loaded.pin) == ("add", {1: 1.0, 2: 1.0}, {})
    h = np.array([[5.0, 5.0]])
    assert applied(loaded.steering(), h, 2).tolist() == [[6.0, 7.0]]
    assert applied(loaded.steering(), h, 1).tolist() == [[5.0, 5.0]]


def test_the_older_spelling_of_the_keys_means_the_same_and_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = {key.replace("glp.", "dspark."): value for key, value in GLP.items()} | {"dspark.alpha_default": 0.5}
    loaded = load_projection(write(tmp_path / "v.gguf", old))
    assert (loaded.mode, loaded.alpha) == ("project", {1: 0.5, 2: 0.5})
    assert [r.getMessage().count("dspark") for r in caplog.records] == [1]
    both = load_projection(write(tmp_path / "v.gguf", GLP | {"dspark.mode": "project"}))
    assert both.mode == "project"
    with pytest.raises(VectorError, match=r"dspark\.mode"):
        load_projection(write(tmp_path / "v.gguf", GLP | {"dspark.mode": "add"}))


@pytest.mark.parametrize("key", ["glp.derived_at", "glp.derive_at"])
def test_directions_from_another_place_are_a_warning_and_no_refusal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    assert load_projection(write(tmp_path / "v.gguf", GLP)).derived_at == "residual_stream_post_layer"
    assert caplog.text == ""
    loaded = load_projection(write(tmp_path / "v.gguf", GLP | {key: "ffn_out_pre_residual"}))
    assert loaded.derived_at == "ffn_out_pre_residual"
    assert "ffn_out_pre_residual" in caplog.text


def test_hashes_in_capitals_and_lists_of_layers_that_only_say_yes_are_taken(tmp_path: Path) -> None:
    digest = load_projection(write(tmp_path / "v.gguf", GLP)).content_sha256
    keys = GLP | {"glp.content_sha256": digest.upper(), "glp.layer_ids_zero_based": True}
    assert load_projection(write(tmp_path / "w.gguf", keys)).content_sha256 == digest
    assert load_projection(write(tmp_path / "w.gguf", GLP | {"glp.layer_ids_zero_based": "2, 1"})).alpha == {1: 1, 2: 1}


def test_alphas_multiply_and_each_distinct_one_is_an_edit_of_its_own(tmp_path: Path) -> None:
    keys = RANK_2 | {"glp.alpha_default": 0.5, "glp.dir_scales": "1,0.5", "glp.layer_scales": "2:1.5"}
    loaded = load_projection(write(tmp_path / "v.gguf", keys, PLANE))
    assert (loaded.alpha, loaded.dir_scales) == ({1: 0.5, 2: 0.75}, (1.0, 0.5))
    assert [(e.share, e.layers) for e in loaded.steering()] == [
        (0.5, (1,)), (0.75, (2,)), (0.25, (1,)), (0.375, (2,)),
    ]  # fmt: skip
    h = np.random.default_rng(0).standard_normal((5, 3))
    for il, alpha in ((1, 0.5), (2, 0.75)):
        d, e = (
            np.asarray(PLANE[name], np.float32).astype(np.float64) for name in (f"direction.{il}", f"direction.{il}.1")
        )
        expected = h - alpha * (h @ d)[:, None] * d - 0.5 * alpha * (h @ e)[:, None] * e
        assert np.allclose(applied(loaded.steering(), h, il), expected, rtol=0, atol=1e-6)  # d is of length 1 + 1e-8


def test_an_alpha_of_0_edits_nothing(tmp_path: Path) -> None:
    keys = GLP | {"glp.spec_version": 2, "glp.layer_scales": "1:0"}
    assert [e.layers for e in load_projection(write(tmp_path / "v.gguf", keys)).steering()] == [(2,)]
    assert load_projection(write(tmp_path / "v.gguf", GLP | {"glp.alpha_default": 0.0})).steering() == []


AGAINST: dict[str, tuple[dict[str, Any], Mapping[str, Any]]] = {
    "an unknown mode": (GLP | {"glp.mode": "rotate"}, UNIT),
    "a mode in capitals": (GLP | {"glp.mode": "Project"}, UNIT),
    "a number for the mode": (GLP | {"glp.mode": 1}, UNIT),
    "version 3": (GLP | {"glp.spec_version": 3}, UNIT),
    "version 0": (GLP | {"glp.spec_version": 0}, UNIT),
    "a text for the version": (GLP | {"glp.spec_version": "1"}, UNIT),
    "a yes for the version": (GLP | {"glp.spec_version": True}, UNIT),
    "another hook point": (GLP | {"glp.hook_point": "ffn_out_pre_residual"}, UNIT),
    "another hook point of what is added": ({"glp.mode": "add", "glp.hook_point": "attn_out_pre_residual"}, UNIT),
    "an unknown hook point": (GLP | {"glp.hook_point": "nowhere"}, UNIT),
    "the hash of others": (GLP | {"glp.content_sha256": "0" * 64}, UNIT),
    "a hash too short": (GLP | {"glp.content_sha256": "0" * 63}, UNIT),
    "a hash that is none": (GLP | {"glp.content_sha256": "g" * 64}, UNIT),
    "a number for the hash": (GLP | {"glp.content_sha256": 7}, UNIT),
    "a layer too many": (GLP | {"glp.layer_ids_zero_based": "1,2,3"}, UNIT),
    "a layer shifted": (GLP | {"glp.layer_ids_zero_based": "0,1"}, UNIT),
    "a layer twice": (GLP | {"glp.layer_ids_zero_based": "1,1,2"}, UNIT),
    "layers that are no numbers": (GLP | {"glp.layer_ids_zero_based": "one,two"}, UNIT),
    "layers not from zero": (GLP | {"glp.layer_ids_zero_based": False}, UNIT),
    "a number for the layers": (GLP | {"glp.layer_ids_zero_based": 2}, UNIT),
    "a negative alpha": (GLP | {"glp.alpha_default": -1.0}, UNIT),
    "an alpha that is not a number": (GLP | {"glp.alpha_default": float("nan")}, UNIT),
    "an infinite alpha": (GLP | {"glp.alpha_default": float("inf")}, UNIT),
    "a text for alpha": (GLP | {"glp.alpha_default": "1"}, UNIT),
    "a yes for alpha": (GLP | {"glp.alpha_default": True}, UNIT),
    "direction.0": (GLP, UNIT | {"direction.0": [1.0, 0.0, 0.0]}),
    "direction.0.1": (RANK_2, PLANE | {"direction.0.1": [1.0, 0.0, 0.0]}),
    "direction.1.0": (RANK_2, PLANE | {"direction.1.0": [1.0, 0.0, 0.0]}),
    "a direction that is too long": (GLP, UNIT | {"direction.1": [1.2, 0.0, 0.0]}),
    "a direction just too long": (GLP, UNIT | {"direction.1": [1.001, 0.0, 0.0]}),
    "a zero direction": (GLP, UNIT | {"direction.1": [0.0, 0.0, 0.0]}),
    "NaN": (GLP, UNIT | {"direction.1": [float("nan"), 0.0, 1.0]}),
    "another width": (GLP, UNIT | {"direction.1": [1.0, 0.0]}),
    "rank 0": (GLP | {"glp.rank": 0}, UNIT),
    "a text for the rank": (GLP | {"glp.rank": "1"}, UNIT),
    "rank 2 without the directions": (RANK_2, UNIT),
    "a rank not told": (GLP | {"glp.spec_version": 2, "glp.orthonormal": True}, PLANE),
    "rank 2 at one layer": (RANK_2, {k: v for k, v in PLANE.items() if k != "direction.2.1"}),
    "only the second direction": (RANK_2, {k: v for k, v in PLANE.items() if k != "direction.2"}),
    "the third direction": (RANK_2, {k.replace(".1.1", ".1.2"): v for k, v in PLANE.items()}),
    "rank 2 in version 1": (RANK_2 | {"glp.spec_version": 1}, PLANE),
    "rank 2 not said to be orthonormal": ({k: v for k, v in RANK_2.items() if k != "glp.orthonormal"}, PLANE),
    "rank 2 said not to be orthonormal": (RANK_2 | {"glp.orthonormal": False}, PLANE),
    "rank 2 that is not orthonormal": (RANK_2, PLANE | {"direction.1.1": [1.0, 0.0, 0.0]}),
    "rank 2 to add": (RANK_2 | {"glp.mode": "add"}, PLANE),
    "a basis and no mode": ({}, PLANE),
    "direction scales in version 1": (GLP | {"glp.dir_scales": "1"}, UNIT),
    "layer scales in version 1": (GLP | {"glp.layer_scales": "1:1"}, UNIT),
    "a direction scale too many": (RANK_2 | {"glp.dir_scales": "1,1,1"}, PLANE),
    "a negative direction scale": (RANK_2 | {"glp.dir_scales": "1,-1"}, PLANE),
    "direction scales that are no numbers": (RANK_2 | {"glp.dir_scales": "one,two"}, PLANE),
    "a direction scale that is not a number": (RANK_2 | {"glp.dir_scales": "1,nan"}, PLANE),
    "a number for the direction scales": (RANK_2 | {"glp.dir_scales": 1}, PLANE),
    "a scale of no layer": (RANK_2 | {"glp.layer_scales": "3:1"}, PLANE),
    "two scales of a layer": (RANK_2 | {"glp.layer_scales": "1:1,1:2"}, PLANE),
    "a negative layer scale": (RANK_2 | {"glp.layer_scales": "1:-1"}, PLANE),
    "layer scales without layers": (RANK_2 | {"glp.layer_scales": "1,1"}, PLANE),
    "only zeros to add": ({"glp.mode": "add"}, {"direction.1": [0.0, 0.0]}),
    "no direction": (GLP, {}),
    "another tensor": (GLP, UNIT | {"mean.1": [1.0, 0.0, 0.0]}),
}


@pytest.mark.parametrize("how", AGAINST)
def test_a_file_against_the_specification_is_refused_in_one_line(tmp_path: Path, how: str) -> None:
    keys, tensors = AGAINST[how]
    path = write(tmp_path / "v.gguf", keys, tensors)
    with pytest.raises(VectorError) as raised:
        load_projection(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_the_files_that_the_refused_ones_are_changed_from_are_taken(tmp_path: Path) -> None:
    assert load_projection(write(tmp_path / "v.gguf", GLP)).mode == "project"
    assert len(load_projection(write(tmp_path / "v.gguf", RANK_2, PLANE)).basis) == 2
    almost = UNIT | {"direction.1": [1.0004, 0.0, 0.0]}  # ||d||^2 - 1 = 8e-4
    assert load_projection(write(tmp_path / "v.gguf", GLP, almost)).mode == "project"


def test_a_projection_of_ours_whose_tensors_were_changed_is_refused(tmp_path: Path) -> None:
    save_projection(full_vector(), tmp_path / "v.gguf", **BASE)
    content = (tmp_path / "v.gguf").read_bytes()
    row = tensors_of(tmp_path / "v.gguf")["direction.3"]
    assert content.count(row.tobytes()) == 1
    (tmp_path / "v.gguf").write_bytes(content.replace(row.tobytes(), (-row).tobytes()))
    with pytest.raises(VectorError, match="content_sha256"):
        load_projection(tmp_path / "v.gguf")
    digest = load_projection_hash(content)
    changed = content.replace(row.tobytes(), (-row).tobytes())
    honest = content_sha256({(1, 0): tensors_of(tmp_path / "v.gguf")["direction.1"], (3, 0): -row})
    (tmp_path / "v.gguf").write_bytes(changed.replace(digest, honest.encode()))
    with pytest.raises(VectorError, match="personasteer key-values"):
        load_projection(tmp_path / "v.gguf")


def load_projection_hash(content: bytes) -> bytes:
    found = re.search(rb"glp\.content_sha256.{12}([0-9a-f]{64})", content, re.DOTALL)
    assert found
    return found[1]


@pytest.mark.parametrize("mode_key", ["glp.mode", "dspark.mode"])
def test_a_projection_is_never_loaded_as_something_to_add(tmp_path: Path, mode_key: str) -> None:
    path = write(tmp_path / "v.gguf", {mode_key: "project", "glp.spec_version": 1})
    for load in (PersonaVector.load, load_control_vector):
        with pytest.raises(VectorError, match="load_projection"):
            load(path)
    save_projection(full_vector(), tmp_path / "ours.gguf", **BASE)
    with pytest.raises(VectorError, match="load_projection"):
        PersonaVector.load(tmp_path / "ours.gguf")
    with pytest.raises(VectorError, match=r"direction\.1\.1"):  # also where only a part of it could be added
        PersonaVector.load(write(tmp_path / "w.gguf", RANK_2, PLANE))


@pytest.mark.parametrize("how", ["an unknown mode", "another hook point of what is added", "version 3"])
def test_metadata_that_is_not_understood_is_refused_by_the_plain_reader_too(tmp_path: Path, how: str) -> None:
    with pytest.raises(VectorError, match=r"glp\."):
        PersonaVector.load(write(tmp_path / "v.gguf", *AGAINST[how]))


def test_a_file_cut_anywhere_or_with_a_flipped_byte_is_refused_or_read_and_never_breaks_the_process(
    tmp_path: Path,
) -> None:
    content = write(tmp_path / "v.gguf", RANK_2 | {"glp.dir_scales": "1,0.5"}, PLANE).read_bytes()
    path = tmp_path / "cut.gguf"
    for n in (*range(0, len(content) - 32, 7), len(content) - 33):  # 32: padding behind the last tensor
        path.write_bytes(content[:n])
        with pytest.raises(VectorError):
            load_projection(path)
    outcomes = set()
    rng = np.random.default_rng(0)
    for position in rng.choice(len(content), 400, replace=False):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            outcomes.add(type(load_projection(path)))
        except VectorError:
            outcomes.add(VectorError)
    assert outcomes == {projection.Projection, VectorError}


@settings(max_examples=60, deadline=None)
@given(
    alphas=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=4),
    scales=st.lists(st.floats(0, 1, width=16), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_any_basis_and_alphas_project_as_the_formula_says(
    tmp_path_factory: pytest.TempPathFactory, alphas: list[float], scales: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tensors, bases = {}, {}
    for n in range(1, len(alphas) + 1):
        bases[n] = np.linalg.qr(rng.standard_normal((6, 6)))[0][: len(scales)].astype(np.float32)
        for j, d in enumerate(bases[n]):
            tensors[f"direction.{n}" + (f".{j}" if j else "")] = d
    keys = GLP | {
        "glp.spec_version": 2, "glp.rank": len(scales), "glp.orthonormal": True,
        "glp.dir_scales": ",".join(map(repr, scales)),
        "glp.layer_scales": ",".join(f"{n}:{a!r}" for n, a in enumerate(alphas, 1)),
    }  # fmt: skip
    path = write(tmp_path_factory.mktemp("h") / "v.gguf", keys, tensors)
    steering = load_projection(path).steering()
    h = rng.standard_normal((3, 6))
    for n, alpha in enumerate(alphas, 1):
        coefficients = alpha * np.array(scales) * (h @ bases[n].T.astype(np.float64))
        expected = h - coefficients @ bases[n]
        assert np.allclose(applied(steering, h, n, n_layer=6), expected, rtol=0, atol=1e-5)  # lengths off by 1e-7


# ---- in the model


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_a_loaded_projection_takes_the_reading_out_of_the_block_that_it_names(
    tiny: Loaded, tmp_path: Path, alpha: float
) -> None:
    texts = ["The harbour was quiet in the morning."]
    save_projection(samples.vector(layers=(2,)), tmp_path / "v.gguf", strength=alpha, **BASE)
    loaded = load_projection(tmp_path / "v.gguf")
    d = tensors_of(tmp_path / "v.gguf")["direction.2"].astype(np.float64)
    with Model(tiny.path, n_ctx=256, n_parallel=1, n_threads=1) as model:
        before = model.capture(texts, pool="raw")[0].astype(np.float64)
        after = model.capture(texts, pool="raw", steer=[loaded.steering()])[0].astype(np.float64)
    assert np.array_equal(after[:, 1], before[:, 1])
    h = before[:, 2]
    expected = h - alpha * (h @ d)[:, None] * d
    assert np.allclose(after[:, 2], expected, rtol=0, atol=1e-5 * np.abs(h).max())  # float32 sums over 64 numbers
    assert np.abs(h @ d).max() > 1e-2 * np.abs(h).max()


def test_a_plane_is_projected_out_as_the_formula_says_in_the_model(tiny: Loaded, tmp_path: Path) -> None:
    basis = np.linalg.qr(np.random.default_rng(5).standard_normal((64, 64)))[0][:2].astype(np.float32)
    keys = RANK_2 | {"glp.dir_scales": "1,0.5"}
    path = write(tmp_path / "v.gguf", keys, {"direction.1": basis[0], "direction.1.1": basis[1]})
    texts = ["Two boats came back"]
    with Model(tiny.path, n_ctx=256, n_parallel=1, n_threads=1) as model:
        h = model.capture(texts, pool="raw")[0][:, 1].astype(np.float64)
        after = model.capture(texts, pool="raw", steer=[load_projection(path).steering()])[0][:, 1]
    expected = h - (np.array([1.0, 0.5]) * (h @ basis.T)) @ basis
    assert np.allclose(after, expected, rtol=0, atol=1e-5 * np.abs(h).max())
