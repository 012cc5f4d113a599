"""Directions of other tools: control vectors, safetensors, features of autoencoders, and every way to be broken."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import samples
import typer
from gguf import GGUFValueType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from personasteer import ArgumentError, IncompatibleVector, Model, PersonaVector, VectorError
from personasteer.cli import import_
from personasteer.ship import tensor_files
from personasteer.ship.autoencoders import load_sae_direction
from personasteer.ship.control_vector import load_control_vector, origin_of
from personasteer.ship.imports import import_vector, load_safetensors_directions
from personasteer.ship.projection import save_projection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Loaded

ROWS = {n: np.arange(8, dtype=np.float32) + n for n in (1, 2, 3)}
DECODER = np.random.default_rng(7).standard_normal((5, 8)).astype(np.float32)  # (d_sae, d_in)


def write_gguf(path: Path, count: tuple[Type, int] | None, order: tuple[int, ...] = (1, 2, 3), n_embd: int = 8) -> Path:
    """A control vector with the key-values that all tools write."""
    w = gguf.GGUFWriter(str(path), "controlvector")
    w.add_key_value("controlvector.model_hint", "llama", Type.STRING)
    if count is not None:
        w.add_key_value("controlvector.layer_count", count[1], count[0])
    for n in order:
        w.add_tensor(f"direction.{n}", np.arange(n_embd, dtype=np.float32) + n)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def raw_safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture(scope="module")
def model(tiny: Loaded) -> Iterator[Model]:
    with Model(tiny.path, n_ctx=512, n_parallel=1, n_threads=1) as m:
        yield m


# ---- control vectors of other tools

TOOLS: dict[str, tuple[tuple[Type, int] | None, tuple[int, ...], tuple[str, int] | None]] = {
    "INT32": ((Type.INT32, 3), (1, 2, 3), ("llama-cvector-generator", 1)),
    "INT32 of any count": ((Type.INT32, 32), (3, 2, 1), ("llama-cvector-generator", 1)),
    "more blocks than tensors": ((Type.UINT32, 4), (1, 2, 3), ("control-vector-generator", 1)),
    "as many, from the last": ((Type.UINT32, 3), (3, 2, 1), ("repeng", 0)),
    "as many, from the first": ((Type.UINT32, 3), (1, 2, 3), None),
    "one alone": ((Type.UINT32, 1), (2,), None),
    "fewer": ((Type.UINT32, 2), (3, 2, 1), None),
    "another type": ((Type.UINT64, 4), (1, 2, 3), None),
    "no count": (None, (3, 2, 1), None),
}


@pytest.mark.parametrize("how", TOOLS)
def test_a_file_tells_its_tool_by_the_type_and_size_of_its_count_and_its_order(tmp_path: Path, how: str) -> None:
    count, order, expected = TOOLS[how]
    assert origin_of(write_gguf(tmp_path / "v.gguf", count, order)) == expected


@pytest.mark.parametrize("how", TOOLS)
@pytest.mark.parametrize("offset", [0, 1])
def test_the_offset_is_what_was_asked_for_and_a_warning_names_the_other_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, offset: int
) -> None:
    count, order, expected = TOOLS[how]
    v = load_control_vector(write_gguf(tmp_path / "v.gguf", count, order), offset=offset)
    assert v.layers == tuple(sorted(n - offset for n in order))
    for n in order:
        assert v.directions[n - offset].tolist() == ROWS[n].tolist()
    assert v.provenance["offset"] == offset
    assert v.provenance.get("tool") == (expected[0] if expected else None)
    if expected is None or expected[1] == offset:
        assert caplog.text == ""
    else:
        (record,) = caplog.records
        assert expected[0] in record.getMessage()
        assert f"--offset {expected[1]}" in record.getMessage()
        assert f"offset {offset}" in record.getMessage().split("measured")[1]


@pytest.mark.parametrize("how", TOOLS)
def test_auto_follows_what_the_file_looks_like_aloud_and_guesses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    count, order, expected = TOOLS[how]
    path = write_gguf(tmp_path / "v.gguf", count, order)
    if expected is None:
        with pytest.raises(ArgumentError, match="--offset"):
            load_control_vector(path, offset="auto")
        return
    v = load_control_vector(path, offset="auto")
    assert v.layers == tuple(sorted(n - expected[1] for n in order))
    assert len(caplog.records) == 1
    assert f"offset {expected[1]} is used" in caplog.text


def test_our_own_file_has_no_offset_and_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples.vector(norms=np.ones(4, np.float32)).save(tmp_path / "v.gguf")
    assert load_control_vector(tmp_path / "v.gguf", offset="auto").layers == (1, 2)
    assert caplog.text == ""


@pytest.mark.parametrize("offset", [0.5, "1", None, True])
def test_an_offset_that_is_no_whole_number_is_refused(tmp_path: Path, offset: Any) -> None:
    with pytest.raises(ArgumentError, match="offset"):
        load_control_vector(write_gguf(tmp_path / "v.gguf", None), offset=offset)


# ---- safetensors

NAMES = ["direction.{}", "layers.{}", "layer_{}", "{}", "blk.{}", "model.layers.{}.direction", "steer/{}/v", "L{}"]


@pytest.mark.parametrize("names", NAMES)
def test_directions_are_found_by_the_number_in_their_names(tmp_path: Path, names: str) -> None:
    save_file({names.format(n): row for n, row in ROWS.items()}, tmp_path / "v.safetensors")
    v = load_safetensors_directions(tmp_path / "v.safetensors")
    assert (v.n_layer, v.n_embd, v.layers, v.name) == (4, 8, (1, 2, 3), "v")
    assert all(np.array_equal(v.directions[n], row) for n, row in ROWS.items())
    assert np.isnan(v.directions[0]).all()
    assert v.provenance == {"method": "imported", "kind": "safetensors", "source": "v.safetensors", "offset": 0}
    late = load_safetensors_directions(tmp_path / "v.safetensors", offset=1, name="x")
    assert (late.n_layer, late.layers, late.name) == (3, (0, 1, 2), "x")
    assert np.array_equal(late.directions[2], ROWS[3])


def test_a_matrix_has_a_direction_in_each_row_and_its_embeddings_are_left_out_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    matrix[2] = np.nan  # no direction
    matrix[3] = 0
    save_file({"vector": matrix}, tmp_path / "v.safetensors")
    v = load_safetensors_directions(tmp_path / "v.safetensors")
    assert np.array_equal(v.directions, matrix, equal_nan=True)
    assert v.layers == (0, 1, 4)
    assert caplog.text == ""
    late = load_safetensors_directions(tmp_path / "v.safetensors", offset=1)
    assert np.array_equal(late.directions, matrix[1:], equal_nan=True)
    assert "row 0 of vector" in caplog.text


EXACT = np.array([1.0, -2.5, 0.0, 0.09375, 256.0, -0.0078125], np.float64)  # exact in every dtype


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_every_floating_point_type_becomes_the_same_float32(tmp_path: Path, dtype: str) -> None:
    if dtype == "BF16":  # the upper half of a float32
        data = (EXACT.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    else:
        data = EXACT.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()
    header = {"layer_3": {"dtype": dtype, "shape": [6], "data_offsets": [0, len(data)]}}
    v = load_safetensors_directions(raw_safetensors(tmp_path / "v.safetensors", header, data))
    assert v.directions[3].dtype == np.float32
    assert v.directions[3].tolist() == EXACT.tolist()


@settings(max_examples=50, deadline=None)
@given(bits=st.lists(st.integers(0, 0x7F7F), min_size=1, max_size=20), sign=st.booleans())
def test_any_bfloat16_is_read_as_its_value(
    tmp_path_factory: pytest.TempPathFactory, bits: list[int], sign: bool
) -> None:
    halves = np.array([b | (0x8000 if sign else 0) for b in bits] + [0x3F80], "<u2")  # 1.0 behind: not all zero
    header = {"1": {"dtype": "BF16", "shape": [len(halves)], "data_offsets": [0, 2 * len(halves)]}}
    path = raw_safetensors(tmp_path_factory.mktemp("b") / "v.safetensors", header, halves.tobytes())
    expected = []
    for h in halves.tolist():
        exponent, mantissa = (h >> 7) & 0xFF, h & 0x7F
        value = (mantissa / 128 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 127)
        expected.append(-value if h >> 15 else value)
    assert load_safetensors_directions(path).directions[1].tolist() == expected


def test_a_key_chooses_among_several(tmp_path: Path) -> None:
    tensors = {f"a.{n}": row for n, row in ROWS.items()} | {f"v2.layers.{n}.x": 2 * row for n, row in ROWS.items()}
    save_file({**tensors, "m": DECODER, "norm": DECODER[0]}, tmp_path / "v.safetensors")
    with pytest.raises(VectorError, match="--key"):
        load_safetensors_directions(tmp_path / "v.safetensors")
    assert load_safetensors_directions(tmp_path / "v.safetensors", key="a.").directions[2].tolist() == ROWS[2].tolist()
    second = load_safetensors_directions(tmp_path / "v.safetensors", key="v2.layers.")
    assert second.directions[3].tolist() == (2 * ROWS[3]).tolist()
    assert np.array_equal(load_safetensors_directions(tmp_path / "v.safetensors", key="m").directions, DECODER)
    for key in ("nothing", "norm", "a.1.x"):
        with pytest.raises(VectorError):
            load_safetensors_directions(tmp_path / "v.safetensors", key=key)


def test_a_projection_in_safetensors_is_not_taken_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"direction.1": ROWS[1]}, tmp_path / "v.safetensors", {"glp.mode": "project"})
    load_safetensors_directions(tmp_path / "v.safetensors")
    assert "projected out" in caplog.text


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ONES = np.ones(2, "<f4").tobytes()
BROKEN: dict[str, tuple[Any, bytes]] = {
    "no tensor": ({}, b""),
    "no direction": ({"norm": F32}, ONES),
    "whole numbers": ({"1": F32 | {"dtype": "I32"}}, ONES),
    "a scalar": ({"1": F32 | {"shape": [], "data_offsets": [0, 4]}}, ONES[:4]),
    "three sides": ({"1": F32 | {"shape": [1, 1, 2]}}, ONES),
    "nothing in it": ({"1": F32 | {"shape": [0], "data_offsets": [0, 0]}}, b""),
    "an empty matrix": ({"m": F32 | {"shape": [3, 0], "data_offsets": [0, 0]}}, b""),
    "only zeros": ({"1": F32}, bytes(8)),
    "infinity": ({"1": F32}, np.array([1, np.inf], "<f4").tobytes()),
    "half NaN": ({"1": F32}, np.array([1, np.nan], "<f4").tobytes()),
    "only NaN": ({"1": F32}, np.array([np.nan, np.nan], "<f4").tobytes()),
    "too large for float32": ({"1": F32 | {"dtype": "F64", "shape": [1]}}, np.array([1e300]).tobytes()),
    "a layer twice": ({"l.1": F32, "l.01": F32 | {"data_offsets": [8, 16]}}, 2 * ONES),
    "a basis": ({"direction.1": F32, "direction.1.1": F32 | {"data_offsets": [8, 16]}}, 2 * ONES),
    "two numbers": ({"v2.layers.1": F32}, ONES),
    "a huge number": ({"direction.999999": F32}, ONES),
    "other widths": ({"1": F32, "2": F32 | {"shape": [1], "data_offsets": [8, 12]}}, ONES + ONES[:4]),
    "data missing": ({"1": F32}, ONES[:7]),
    "a huge shape": ({"1": F32 | {"shape": [2**62]}}, ONES),
    "a negative shape": ({"1": F32 | {"shape": [-2]}}, ONES),
    "overlapping data": ({"1": F32, "2": F32 | {"data_offsets": [4, 12]}}, 2 * ONES),
    "an unknown type": ({"1": F32 | {"dtype": "F3"}}, ONES),
    "no offsets": ({"1": {"dtype": "F32", "shape": [2]}}, ONES),
    "a list": ([1], ONES),
    "no JSON": (b"{nothing", ONES),
    "an autoencoder": ({"W_dec": F32 | {"shape": [2, 1]}}, ONES),
}


@pytest.mark.parametrize("how", BROKEN)
def test_safetensors_that_hold_no_usable_directions_are_refused_in_one_line(tmp_path: Path, how: str) -> None:
    path = raw_safetensors(tmp_path / "v.safetensors", *BROKEN[how])
    with pytest.raises(VectorError) as raised:
        load_safetensors_directions(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_safetensors_cut_anywhere_are_refused(tmp_path: Path) -> None:
    path = raw_safetensors(tmp_path / "v.safetensors", {"1": F32}, ONES)
    content = path.read_bytes()
    assert load_safetensors_directions(path).layers == (1,)
    for n in range(len(content)):
        path.write_bytes(content[:n])
        with pytest.raises(VectorError):
            load_safetensors_directions(path)
    path.write_bytes(struct.pack("<Q", 2**60) + content[8:])
    with pytest.raises(VectorError):
        load_safetensors_directions(path)


@pytest.mark.parametrize("offset", [2, -1, "auto", True, 0.5])
def test_blocks_of_safetensors_are_numbered_from_0_or_1(tmp_path: Path, offset: Any) -> None:
    save_file({"1": ROWS[1]}, tmp_path / "v.safetensors")
    with pytest.raises(ArgumentError, match="offset"):
        load_safetensors_directions(tmp_path / "v.safetensors", offset=offset)


# ---- features of autoencoders


def save_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_a_feature_is_a_row_of_w_dec_and_a_column_of_decoder_weight(tmp_path: Path) -> None:
    rows, columns = tmp_path / "r.safetensors", tmp_path / "c.safetensors"
    save_file({"W_dec": DECODER, "W_enc": DECODER.T.copy(), "b_dec": DECODER[0]}, rows)
    save_file({"decoder.weight": DECODER.T.copy(), "encoder.weight": DECODER}, columns)
    for path in (rows, columns):
        for width in (8, None):
            v = load_sae_direction(path, 3, 2, n_layer=6, n_embd=width)
            assert (v.n_layer, v.layers, v.name) == (6, (2,), f"{path.stem} 3")
            assert np.array_equal(v.directions[2], DECODER[3])
            assert np.isnan(np.delete(v.directions, 2, 0)).all()
    assert load_sae_direction(rows, 0, 2, name="x").name == "x"
    assert load_sae_direction(rows, 0, 2).n_layer == 3
    assert load_sae_direction(rows, 4, 2).provenance == {
        "method": "imported", "kind": "autoencoder", "source": "r.safetensors", "feature": 4, "layer": 2,
        "key": "W_dec",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["W_dec", "w_dec", "W_D", "sae.W_dec"])
@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_feature_is_read_from_npz_in_any_order_of_memory(
    tmp_path: Path, name: str, fortran: bool, compressed: bool
) -> None:
    decoder = np.asarray(DECODER, order="F" if fortran else "C")
    (np.savez_compressed if compressed else np.savez)(tmp_path / "params.npz", **{name: decoder, "b_dec": DECODER[0]})
    for feature in range(5):
        v = load_sae_direction(tmp_path / "params.npz", feature, 1, n_embd=8)
        assert np.array_equal(v.directions[1], DECODER[feature])


def test_the_side_of_the_models_width_is_not_the_features_side(tmp_path: Path) -> None:
    save_file({"W_dec": DECODER.T.copy(), "other": DECODER}, tmp_path / "t.safetensors")  # stored the other way round
    v = load_sae_direction(tmp_path / "t.safetensors", 3, 0, n_embd=8)
    assert np.array_equal(v.directions[0], DECODER[3])
    v = load_sae_direction(tmp_path / "t.safetensors", 3, 0, n_embd=8, key="other")
    assert np.array_equal(v.directions[0], DECODER[3])
    with pytest.raises(VectorError, match="side"):
        load_sae_direction(tmp_path / "t.safetensors", 3, 0, key="other")
    with pytest.raises(IncompatibleVector, match="width is 7"):
        load_sae_direction(tmp_path / "t.safetensors", 3, 0, n_embd=7)
    square = DECODER[:, :5].copy()
    save_file({"W_dec": square, "decoder.weight": square, "other": square}, tmp_path / "s.safetensors")
    row, column = (load_sae_direction(tmp_path / "s.safetensors", 3, 0, n_embd=5, key=key).directions[0]
                   for key in ("W_dec", "decoder.weight"))  # fmt: skip
    assert np.array_equal(row, square[3])
    assert np.array_equal(column, square[:, 3])
    with pytest.raises(VectorError, match="side"):
        load_sae_direction(tmp_path / "s.safetensors", 3, 0, n_embd=5, key="other")
    with pytest.raises(VectorError, match="several decoders"):
        load_sae_direction(tmp_path / "s.safetensors", 3, 0, n_embd=5)


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_only_the_feature_that_is_asked_for_is_read(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"big.{kind}"
    if kind == "npz":
        save_npz(path, W_dec=np.ones((1000, 8), np.float32))
        monkeypatch.setattr(np.lib.format, "read_array", None)  # the whole array
    else:
        save_file({"W_dec": np.ones((1000, 8), np.float32)}, path)
    sizes = []
    real = tensor_files._float32
    monkeypatch.setattr(tensor_files, "_float32", lambda data: sizes.append(data.shape) or real(data))
    assert load_sae_direction(path, 999, 0, n_embd=8).directions[0].tolist() == [1.0] * 8
    assert sizes == [(8,)]


@pytest.mark.parametrize(
    ("config", "name", "block"),
    [
        ({"hook_name": "blocks.7.hook_resid_post"}, "cfg.json", 7),
        ({"hook_name": "blocks.7.hook_resid_pre"}, "cfg.json", 6),
        ({"metadata": {"hook_name": "blocks.7.hook_resid_post"}, "d_in": 8}, "cfg.json", 7),
        ({"hf_hook_point_in": "model.layers.12.output"}, "config.json", 12),
        ({"hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post"},
         "hyperparams.json", 3),
    ],
)  # fmt: skip
def test_the_layer_is_what_stands_beside_the_file(tmp_path: Path, config: Any, name: str, block: int) -> None:
    save_file({"W_dec": DECODER}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ArgumentError, match="--layer"):
        load_sae_direction(tmp_path / "sae_weights.safetensors", 0)
    (tmp_path / name).write_text(json.dumps(config))
    v = load_sae_direction(tmp_path / "sae_weights.safetensors", 0)
    assert v.layers == (block,)
    assert v.provenance["hook"] in json.dumps(config)
    assert load_sae_direction(tmp_path / "sae_weights.safetensors", 0, block).layers == (block,)
    with pytest.raises(ArgumentError, match=f"block {block}, not {block + 1}"):
        load_sae_direction(tmp_path / "sae_weights.safetensors", 0, block + 1)


def test_the_layer_is_the_folders_where_that_names_a_block(tmp_path: Path) -> None:
    for folder in ("layers.4", "layers.4.mlp", "layer_4"):
        (tmp_path / folder).mkdir()
        save_file({"W_dec": DECODER}, tmp_path / folder / "sae.safetensors")
    (tmp_path / "layers.4" / "cfg.json").write_text('{"d_in": 8}')
    assert load_sae_direction(tmp_path / "layers.4" / "sae.safetensors", 0).layers == (4,)
    with pytest.raises(VectorError, match=r"layers\.4\.mlp"):
        load_sae_direction(tmp_path / "layers.4.mlp" / "sae.safetensors", 0, 4)
    with pytest.raises(ArgumentError, match="--layer"):
        load_sae_direction(tmp_path / "layer_4" / "sae.safetensors", 0)


def test_a_checkpoint_is_described_one_folder_up(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    save_file({"decoder.weight": DECODER.T.copy()}, tmp_path / "checkpoints" / "final.safetensors")
    (tmp_path / "hyperparams.json").write_text('{"hook_point_out": "blocks.15.hook_resid_post"}')
    assert load_sae_direction(tmp_path / "checkpoints" / "final.safetensors", 0).layers == (15,)


@pytest.mark.parametrize(
    "config",
    [
        {"hook_name": "blocks.7.hook_mlp_out"},
        {"hook_name": "blocks.7.attn.hook_z"},
        {"hook_name": "blocks.7.hook_resid_mid"},
        {"hook_name": "blocks.0.hook_resid_pre"},
        {"hook_name": "blocks.7.hook_resid_post", "hook_name_out": "blocks.8.hook_mlp_out"},
        {"hf_hook_point_in": "model.layers.12.self_attn.o_proj.input"},
        {"hook_name": "blocks.-1.hook_resid_post"},
        {"hook_name": "somewhere"},
        "{broken",
        "[" * 100_000,
    ],
)
def test_an_autoencoder_of_another_place_is_refused_also_where_a_layer_is_given(tmp_path: Path, config: Any) -> None:
    save_file({"W_dec": DECODER}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(VectorError) as raised:
        load_sae_direction(tmp_path / "sae.safetensors", 0, 7)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_a_feature_or_layer_that_does_not_exist_is_refused(tmp_path: Path, kind: str) -> None:
    decoder = DECODER.copy()
    decoder[1], decoder[2, 3], decoder[3, 0] = 0, np.nan, np.inf
    path = tmp_path / f"s.{kind}"
    if kind == "npz":
        save_npz(path, W_dec=decoder)
    else:
        save_file({"W_dec": decoder}, path)
    assert load_sae_direction(path, 4, 0).layers == (0,)
    for feature in (5, -1, 10**12):
        with pytest.raises(ArgumentError, match="features 0 to 4"):
            load_sae_direction(path, feature, 0)
    for feature, what in ((1, "zero"), (2, "not finite"), (3, "not finite")):
        with pytest.raises(VectorError, match=what):
            load_sae_direction(path, feature, 0)
    for layer in (-1, 6):
        with pytest.raises(ArgumentError, match="layer"):
            load_sae_direction(path, 4, layer, n_layer=6)
    with pytest.raises(VectorError, match="has no tensor"):
        load_sae_direction(path, 4, 0, key="nothing")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl", ".PT"])
def test_a_pickle_is_refused_by_its_name_and_never_opened(tmp_path: Path, suffix: str) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / f"sae{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(VectorError, match="pickle"):
        load_sae_direction(path, 0, 0)
    np.savez(tmp_path / "o.npz", W_dec=np.array([[Bomb(), Bomb()]], dtype=object), allow_pickle=True)
    with pytest.raises(VectorError):
        load_sae_direction(tmp_path / "o.npz", 0, 0, n_embd=2)
    assert not (tmp_path / "ran").exists()


def npz_of(path: Path, member: bytes, name: str = "W_dec.npy") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, member)
    return path


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2)}\n"
BAD_NPZ: dict[str, bytes] = {
    "no array": b"hello",
    "nothing": b"",
    "half a header": npy(GOOD)[:20],
    "version 9": npy(GOOD, ONES, b"\x09\x00"),
    "a header that is code": npy("__import__('os').abort()\n"),
    "a shape beyond the data": npy(GOOD.replace("1, 2", "1000000000, 2"), ONES),
    "a shape beyond all memory": npy(GOOD.replace("1, 2", f"{2**62}, {2**62}"), ONES),
    "data missing": npy(GOOD, ONES[:7]),
    "whole numbers": npy(GOOD.replace("f4", "i4"), ONES),
    "objects": npy(GOOD.replace("<f4", "|O"), ONES),
    "one side": npy(GOOD.replace("1, 2", "2,"), ONES),
    "nothing in it": npy(GOOD.replace("1, 2", "0, 2")),
}


@pytest.mark.parametrize("how", BAD_NPZ)
def test_an_npz_without_a_usable_decoder_is_refused_in_one_line(tmp_path: Path, how: str) -> None:
    assert load_sae_direction(npz_of(tmp_path / "g.npz", npy(GOOD, ONES)), 0, 0).layers == (0,)
    path = npz_of(tmp_path / "b.npz", BAD_NPZ[how])
    with pytest.raises(VectorError) as raised:
        load_sae_direction(path, 0, 0)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_an_npz_cut_anywhere_or_with_a_flipped_byte_is_refused_or_read(tmp_path: Path) -> None:
    content = save_npz(tmp_path / "g.npz", W_dec=DECODER).read_bytes()
    path = tmp_path / "c.npz"
    for n in range(0, len(content), 5):
        path.write_bytes(content[:n])
        with pytest.raises(VectorError):
            load_sae_direction(path, 0, 0)
    rng = np.random.default_rng(0)
    outcomes = set()
    for position in rng.choice(len(content), 200, replace=False):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            outcomes.add(type(load_sae_direction(path, 0, 0)))
        except (VectorError, ArgumentError):
            outcomes.add(VectorError)
    assert outcomes == {PersonaVector, VectorError}


# ---- for a model


def stream_rows(n_embd: int = 64) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(3)
    return {n: (n * rng.standard_normal(n_embd)).astype(np.float32) for n in (1, 2)}


def test_at_its_stored_strength_an_imported_vector_adds_what_the_file_adds(model: Model, tmp_path: Path) -> None:
    rows = stream_rows()
    path = samples.write_gguf(tmp_path / "f.gguf", {f"direction.{n}": row for n, row in rows.items()})
    v = import_vector(path, model)
    assert (v.n_layer, v.n_embd, v.layers, v.name, v.strength) == (4, 64, (1, 2), "f", 0.3)
    assert v.norms is not None
    assert np.array_equal(v.norms, model.norms)
    expected = sum(np.linalg.norm(row.astype(np.float64)) / float(model.norms[n]) for n, row in rows.items())
    stored = v.provenance["stored_strength"]
    assert stored == pytest.approx(expected, rel=1e-6)
    terms = (v * stored).terms(model)
    for n, row in rows.items():
        assert np.allclose(terms[n].row, row, rtol=1e-6, atol=0)
    assert v.provenance["method"] == "imported"
    assert v.provenance["source"] == "f.gguf"
    assert v.provenance["fingerprint"] == model.fingerprint
    v.save(tmp_path / "out.gguf", strength=stored)
    out = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert all(np.allclose(out[f"direction.{n}"], row, rtol=1e-6, atol=0) for n, row in rows.items())


def test_what_was_imported_once_is_a_vector_like_any_other(model: Model, tmp_path: Path) -> None:
    path = samples.write_gguf(tmp_path / "f.gguf", {f"direction.{n}": row for n, row in stream_rows().items()})
    first = import_vector(path, model)
    first.save(tmp_path / "v.gguf")
    again = import_vector(tmp_path / "v.gguf", model, name="b")
    assert (again.name, again.layers, dict(again.weights)) == ("b", first.layers, dict(first.weights))
    assert dict(again.provenance) == dict(first.provenance)
    assert np.array_equal(again.directions, first.directions, equal_nan=True)


def test_every_kind_of_file_is_imported_for_the_model(model: Model, tmp_path: Path) -> None:
    rows = stream_rows()
    save_file({f"layer_{n}": row for n, row in rows.items()}, tmp_path / "d.safetensors")
    v = import_vector(tmp_path / "d.safetensors", model, offset=1)
    assert (v.n_layer, v.layers) == (4, (0, 1))
    assert np.array_equal(v.directions[1], rows[2])
    decoder = np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32)
    save_file({"W_dec": decoder}, tmp_path / "sae.safetensors")
    save_npz(tmp_path / "params.npz", W_dec=decoder)
    for name in ("sae.safetensors", "params.npz"):
        v = import_vector(tmp_path / name, model, feature=42, layer=2, name="cats")
        assert (v.n_layer, v.layers, v.name, v.weights) == (4, (2,), "cats", {})
        assert np.array_equal(v.directions[2], decoder[42])
        assert v.norms is not None
        assert "stored_strength" not in v.provenance
        assert (v * 0.25).terms(model)[2].row == pytest.approx(
            0.25 * float(model.norms[2]) * decoder[42] / np.linalg.norm(decoder[42]), rel=1e-6
        )


def test_a_projection_becomes_a_vector_with_a_warning_not_to_add_it(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    v = samples.vector(norms=model.norms, layers=(1, 3), provenance={"method": "x", "fingerprint": model.fingerprint})
    save_projection(v, tmp_path / "p.gguf", base_model="a/b", base_revision="ab" * 20)
    caplog.clear()
    back = import_vector(tmp_path / "p.gguf", model)
    assert "--ablate" in caplog.text
    assert np.array_equal(back.directions, v.directions)
    assert (back.layers, dict(back.provenance)) == (v.layers, dict(v.provenance))


def test_numbers_behind_the_embeddings_are_told_from_a_larger_model(model: Model, tmp_path: Path) -> None:
    save_file({"h": np.ones((5, 64), np.float32)}, tmp_path / "h.safetensors")
    with pytest.raises(IncompatibleVector, match="--offset 1"):
        import_vector(tmp_path / "h.safetensors", model)
    assert import_vector(tmp_path / "h.safetensors", model, offset=1).layers == (0, 1, 2, 3)
    for shape in ((6, 64), (4, 63)):
        save_file({"h": np.ones(shape, np.float32)}, tmp_path / "h.safetensors")
        with pytest.raises(IncompatibleVector) as raised:
            import_vector(tmp_path / "h.safetensors", model)
        assert "--offset" not in str(raised.value)


def test_options_that_a_file_has_no_use_for_or_lacks_are_refused(model: Model, tmp_path: Path) -> None:
    path = samples.write_gguf(tmp_path / "f.gguf", {"direction.1": np.ones(64, np.float32)})
    save_file({"W_dec": np.ones((3, 64), np.float32)}, tmp_path / "sae.safetensors")
    save_npz(tmp_path / "params.npz", W_dec=np.ones((3, 64), np.float32))
    save_file({"1": np.ones(64, np.float32)}, tmp_path / "d.safetensors")
    for file, options, message in (
        (path, {"feature": 1, "layer": 1}, "GGUF"),
        (path, {"layer": 1}, "feature"),
        (path, {"key": "direction."}, "key"),
        (path, {"offset": "auto"}, "offset"),
        (tmp_path / "d.safetensors", {"offset": "auto"}, "offset"),
        (tmp_path / "sae.safetensors", {"feature": 1, "layer": 1, "offset": 1}, "layer"),
        (tmp_path / "params.npz", {}, "--feature"),
    ):
        with pytest.raises(ArgumentError, match=message):
            import_vector(file, model, **options)  # type: ignore[arg-type]
    with pytest.raises(VectorError, match="--feature"):
        import_vector(tmp_path / "sae.safetensors", model)


@pytest.mark.parametrize("name", ["missing.gguf", "folder.gguf", "text.txt", "empty.npz", "sae.pt"])
def test_what_is_none_of_these_files_is_refused_in_one_line(model: Model, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "text.txt").write_text("direction.1 = 3\n")
    (tmp_path / "empty.npz").touch()
    (tmp_path / "sae.pt").write_bytes(b"PK\3\4")
    with pytest.raises(VectorError) as raised:
        import_vector(tmp_path / name, model)
    assert str(raised.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(raised.value)


# ---- the verb


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    app = typer.Typer()
    app.callback()(lambda: None)
    import_.register(app)
    app(args=["import", *map(str, arguments)], standalone_mode=False)
    return capsys.readouterr().out


def test_the_verb_writes_a_vector_and_says_what_it_took_for_what(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = write_gguf(tmp_path / "late.gguf", (Type.INT32, 3), n_embd=64)
    common = [source, "-m", tiny_path, "-t", 1, "-o", tmp_path / "out.gguf"]
    result = json.loads(run(capsys, *common, "--offset", "auto", "--json"))
    assert result["stored_strength"] > 0
    assert {k: v for k, v in result.items() if k not in ("file", "stored_strength")} == {
        "name": "late", "kind": "control vector", "tool": "llama-cvector-generator", "offset": 1,
        "layers": [0, 1, 2], "n_layer": 4, "n_embd": 64,
    }  # fmt: skip
    v = PersonaVector.load(tmp_path / "out.gguf")
    assert v.layers == (0, 1, 2)
    assert v.norms is not None
    with pytest.raises(ArgumentError, match="--force"):
        run(capsys, *common)
    caplog.clear()
    out = run(capsys, *common, "--force", "--name", "happy")
    assert "a control vector of llama-cvector-generator, offset 0" in out
    assert "'happy', blocks [1, 2, 3]" in out
    assert "--offset 1" in caplog.text
    assert PersonaVector.load(tmp_path / "out.gguf").layers == (1, 2, 3)


def test_the_verb_takes_a_feature_and_refuses_an_offset_that_is_none(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = np.random.default_rng(0).standard_normal((10, 64)).astype(np.float32)
    save_file({"W_dec": decoder}, tmp_path / "sae.safetensors")
    common = [tmp_path / "sae.safetensors", "-m", tiny_path, "-t", 1, "-o", tmp_path / "out.gguf"]
    assert "a feature of an autoencoder" in run(capsys, *common, "--feature", 3, "--layer", 2)
    assert np.array_equal(PersonaVector.load(tmp_path / "out.gguf").directions[2], decoder[3])
    with pytest.raises(ArgumentError, match="--offset"):
        run(capsys, *common, "--force", "--feature", 3, "--layer", 2, "--offset", 2)


def test_nothing_is_written_where_the_import_fails(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(VectorError):
        run(capsys, tmp_path / "x.gguf", "-m", tiny_path, "-t", 1, "-o", tmp_path / "out.gguf")
    assert samples.no_leftovers(tmp_path, "x.gguf")


def described(values: Mapping[str, Any]) -> str:
    return import_._described({"tool": None, "offset": None, **values})


def test_every_kind_has_words() -> None:
    assert {kind: described({"kind": kind}) for kind in import_.KINDS} == {
        "personasteer": "a vector of personasteer",
        "control vector": "a control vector of an unknown tool",
        "projection": "a projection",
        "safetensors": "directions in safetensors",
        "autoencoder": "a feature of an autoencoder",
    }
