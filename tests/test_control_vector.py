"""Control-vector files: exact bytes, what llama.cpp makes of them, and every way to be broken."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import oracle
import pytest
import samples

from personasteer import ArgumentError, Model, PersonasteerError, PersonaVector, VectorError

if TYPE_CHECKING:
    from conftest import Loaded

NORMS = np.array([5.0, 8.0, 11.0, 13.0], np.float32)


def full_vector() -> PersonaVector:
    """A vector that has everything a vector can have."""
    data = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    data[0] = np.nan  # a block without a direction
    return PersonaVector(
        data,
        (1, 3),
        "pessimistic",
        strength=0.375,
        weights={1: 0.75, 3: 0.25},
        last_prompt=data[::-1] * 2,
        norms=NORMS,
        provenance={"method": "difference-of-means", "fingerprint": "ab" * 32, "seed": 3, "architecture": "llama",
                    "text": "naïve ☂", "none": None, "list": [1, 2.5, "x"]},
        separations=np.array([np.nan, 1.5, 2.5, 3.1], np.float32),
        reliability=np.array([np.nan, 0.5, 0.6, 0.7], np.float32),
        thresholds=np.array([np.nan, 1.25, -2.5, 3.0], np.float32),
        means=np.array([np.nan, -0.5, 0.25, 0.125], np.float32),
        window=(-0.3, 0.45),
        aurocs=np.array([np.nan, 0.5, 0.75, 1.0], np.float32),
        effects=np.array([np.nan, np.nan, 0.125, -0.25], np.float32),
        shuffled=np.random.default_rng(2).standard_normal((3, 4, 64)),
    )  # fmt: skip


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


def expected_rows(v: PersonaVector, rho: float) -> dict[int, np.ndarray]:
    """rho * w * m / ||v|| * v, rounded to float32 once."""
    rows = {}
    for il in v.layers:
        row = v.directions[il].astype(np.float64)
        w = v.weights[il] / sum(v.weights[k] for k in v.layers) if v.weights else 1 / len(v.layers)
        assert v.norms is not None
        rows[il] = (rho * w * float(v.norms[il]) / np.sqrt((row**2).sum()) * row).astype(np.float32)
    return rows


# ---- what is written


def test_loading_a_saved_vector_gives_everything_back(tmp_path: Path) -> None:
    v = full_vector()
    v.save(tmp_path / "v.gguf")
    back = PersonaVector.load(tmp_path / "v.gguf")
    assert (back.name, back.strength, back.layers) == (v.name, v.strength, v.layers)
    assert dict(back.weights) == dict(v.weights)
    assert dict(back.provenance) == dict(v.provenance)
    assert back.window == v.window
    for attribute in ("directions", "last_prompt", "norms", "separations", "reliability", "thresholds", "means",
                      "aurocs", "effects", "shuffled"):  # fmt: skip
        assert np.array_equal(getattr(back, attribute), getattr(v, attribute), equal_nan=True), attribute
        assert getattr(back, attribute).dtype == np.float32


def test_numbers_that_float32_does_not_hold_come_back_exactly(tmp_path: Path) -> None:
    v = samples.vector(norms=NORMS, strength=0.3, weights={1: 0.7, 2: 0.3}, window=(-0.1, 0.7))
    v.save(tmp_path / "a.gguf")
    back = PersonaVector.load(tmp_path / "a.gguf")
    assert (back.strength, dict(back.weights), back.window) == (0.3, {1: 0.7, 2: 0.3}, (-0.1, 0.7))
    back.save(tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_bare_vector_comes_back_without_what_it_never_had(tmp_path: Path) -> None:
    v = samples.vector(norms=NORMS, strength=0.5)
    v.save(tmp_path / "v.gguf")
    back = PersonaVector.load(tmp_path / "v.gguf")
    assert np.array_equal(back.directions, v.directions)
    assert (back.last_prompt, back.separations, back.reliability) == (None, None, None)
    assert (back.thresholds, back.means, back.window) == (None, None, (-0.5, 0.5))
    assert (back.aurocs, back.effects, back.shuffled) == (None, None, None)
    assert (back.weights, back.provenance, back.strength) == ({}, {}, 0.5)


def test_a_file_from_before_there_were_windows_and_thresholds_loads_with_the_usual_window(tmp_path: Path) -> None:
    full_vector().save(tmp_path / "v.gguf")
    later = ("window", "thresholds", "means", "aurocs", "effects", "shuffled")
    old = rewrite(tmp_path / "v.gguf", tmp_path / "old.gguf", dict.fromkeys(later))
    back = PersonaVector.load(old)
    assert (back.thresholds, back.means, back.window) == (None, None, (-0.5, 0.5))
    assert (back.aurocs, back.effects, back.shuffled) == (None, None, None)
    assert np.array_equal(back.directions, full_vector().directions, equal_nan=True)


def test_a_vector_without_a_name_comes_back(tmp_path: Path) -> None:
    samples.vector(norms=NORMS, name="").save(tmp_path / "v.gguf")
    assert PersonaVector.load(tmp_path / "v.gguf").name == ""


def test_the_same_vector_gives_the_same_bytes_also_after_a_round_trip(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        full_vector().save(tmp_path / name)
    PersonaVector.load(tmp_path / "a.gguf").save(tmp_path / "c.gguf")
    first = (tmp_path / "a.gguf").read_bytes()
    assert (tmp_path / "b.gguf").read_bytes() == first
    assert (tmp_path / "c.gguf").read_bytes() == first


def test_tensors_are_the_chosen_layers_scaled_to_the_strength_and_nothing_else(tmp_path: Path) -> None:
    v = full_vector()
    for strength in (None, -0.5):
        v.save(tmp_path / "v.gguf", strength=strength)
        reader = gguf.GGUFReader(tmp_path / "v.gguf")
        assert [t.name for t in reader.tensors] == ["direction.1", "direction.3"]
        for t in reader.tensors:
            assert t.tensor_type == gguf.GGMLQuantizationType.F32
            assert t.shape.tolist() == [64]
        for il, row in expected_rows(v, 0.375 if strength is None else strength).items():
            assert np.array_equal(tensors_of(tmp_path / "v.gguf")[f"direction.{il}"], row)
        assert PersonaVector.load(tmp_path / "v.gguf").strength == 0.375  # the recommendation stays


def test_the_architecture_is_the_one_that_llama_cpp_looks_for(tmp_path: Path) -> None:
    full_vector().save(tmp_path / "v.gguf")
    fields = gguf.GGUFReader(tmp_path / "v.gguf").fields
    assert fields["general.architecture"].contents() == "controlvector"
    assert fields["controlvector.model_hint"].contents() == "llama"
    assert fields["controlvector.layer_count"].contents() == 2


def test_no_time_no_path_and_no_user_stands_in_a_file(tmp_path: Path) -> None:
    full_vector().save(tmp_path / "v.gguf")
    fields = gguf.GGUFReader(tmp_path / "v.gguf").fields
    names = [k for k in fields if not k.startswith("GGUF.")]
    assert all(k.startswith(("general.architecture", "controlvector.", "personasteer.")) for k in names)
    content = (tmp_path / "v.gguf").read_bytes()
    assert str(tmp_path).encode() not in content
    assert not re.search(rb"20[0-9]{2}-[0-9]{2}-[0-9]{2}", content)


def test_a_vector_without_norms_is_written_as_it_is_and_takes_no_strength(tmp_path: Path) -> None:
    v = samples.vector()
    v.save(tmp_path / "v.gguf")
    written = tensors_of(tmp_path / "v.gguf")
    assert all(np.array_equal(written[f"direction.{il}"], v.directions[il]) for il in (1, 2))
    with pytest.raises(VectorError, match="norms"):
        v.save(tmp_path / "w.gguf", strength=0.2)
    assert samples.no_leftovers(tmp_path, "v.gguf")


def test_layer_0_alone_cannot_be_written_and_beside_others_it_stays_in_the_key_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(VectorError, match=r"direction\.0"):
        samples.vector(layers=(0,), norms=NORMS).save(tmp_path / "v.gguf")
    with pytest.raises(VectorError):
        samples.vector(layers=(), norms=NORMS).save(tmp_path / "v.gguf")
    assert samples.no_leftovers(tmp_path)
    v = samples.vector(layers=(0, 2), norms=NORMS)
    v.save(tmp_path / "v.gguf")
    assert "layer 0 is left out" in caplog.text
    assert list(tensors_of(tmp_path / "v.gguf")) == ["direction.2"]
    assert PersonaVector.load(tmp_path / "v.gguf").layers == (0, 2)


@pytest.mark.parametrize("strength", [0.0, np.nan, np.inf])
def test_a_file_needs_a_strength_that_does_something(tmp_path: Path, strength: float) -> None:
    with pytest.raises(ArgumentError, match="strength"):
        full_vector().save(tmp_path / "v.gguf", strength=strength)
    assert samples.no_leftovers(tmp_path)


def test_numbers_beyond_float32_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="not finite"):
        full_vector().save(tmp_path / "v.gguf", strength=1e39)
    assert samples.no_leftovers(tmp_path)


# ---- where it is written


def test_a_missing_folder_and_a_folder_in_the_files_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot write"):
        full_vector().save(tmp_path / "missing" / "v.gguf")
    with pytest.raises(ArgumentError, match="cannot write"):
        full_vector().save(tmp_path)
    assert samples.no_leftovers(tmp_path)


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["write_kv_data_to_file", "write_ti_data_to_file", "replace"])
@pytest.mark.parametrize("failure", [disk_full, interrupted])
def test_an_existing_file_survives_a_write_that_fails_and_no_temporary_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, failure: Callable[..., None]
) -> None:
    target = tmp_path / "v.gguf"
    samples.vector(norms=NORMS).save(target)
    before = target.read_bytes()
    owner, name = (os, place) if place == "replace" else (gguf.GGUFWriter, place)
    monkeypatch.setattr(owner, name, failure)
    with pytest.raises(PersonasteerError if failure is disk_full else KeyboardInterrupt) as raised:
        full_vector().save(target)
    if failure is disk_full:
        assert "No space left" in str(raised.value)
    assert target.read_bytes() == before
    assert samples.no_leftovers(tmp_path, "v.gguf")


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    # `-o /dev/null` as root must leave /dev/null a device
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArgumentError):
        full_vector().save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert samples.no_leftovers(tmp_path, "pipe")


def test_provenance_that_json_does_not_hold_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="provenance"):
        samples.vector(norms=NORMS, provenance={"path": Path("x")}).save(tmp_path / "v.gguf")
    assert samples.no_leftovers(tmp_path)


# ---- files of other tools


def test_a_foreign_file_counts_blocks_by_the_offset_that_is_given(tmp_path: Path) -> None:
    rows = {f"direction.{n}": np.full(8, n, np.float32) for n in (3, 1)}
    path = samples.write_gguf(tmp_path / "foreign.gguf", rows)
    v = PersonaVector.load(path)
    assert (v.n_layer, v.n_embd, v.layers, v.name) == (4, 8, (1, 3), "foreign")
    assert v.directions[1].tolist() == [1.0] * 8
    assert v.directions[3].tolist() == [3.0] * 8
    assert np.isnan(v.directions[[0, 2]]).all()
    assert v.provenance["method"] == "imported"
    late = PersonaVector.load(path, offset=1)
    assert (late.n_layer, late.layers) == (3, (0, 2))
    assert late.directions[0].tolist() == [1.0] * 8
    assert late.directions[2].tolist() == [3.0] * 8
    assert np.isnan(late.directions[1]).all()
    with pytest.raises(VectorError, match="offset 2"):
        PersonaVector.load(path, offset=2)


def test_a_zero_direction_of_a_foreign_file_is_not_steered_at(tmp_path: Path) -> None:
    rows = {"direction.1": np.zeros(8, np.float32), "direction.2": np.ones(8, np.float32)}
    assert PersonaVector.load(samples.write_gguf(tmp_path / "f.gguf", rows)).layers == (2,)


def test_an_offset_does_not_move_our_own_file_which_says_where_it_belongs(tmp_path: Path) -> None:
    full_vector().save(tmp_path / "v.gguf")
    assert PersonaVector.load(tmp_path / "v.gguf", offset=1).layers == full_vector().layers


# ---- broken files


ONES = np.ones(8, np.float32)
BROKEN: dict[str, dict[str, np.ndarray]] = {
    "another tensor": {"direction.1": ONES, "mean.1": ONES},
    "a tensor of a model": {"blk.0.attn_norm.weight": ONES},
    "direction.0": {"direction.0": ONES, "direction.1": ONES},
    "a negative number": {"direction.-1": ONES},
    "no number": {"direction.": ONES},
    "a number with a tail": {"direction.1.weight": ONES},
    "a huge number": {"direction.99999999999999999999": ONES},
    "half precision": {"direction.1": ONES.astype(np.float16)},
    "double precision": {"direction.1": ONES.astype(np.float64)},
    "whole numbers": {"direction.1": ONES.astype(np.int32)},
    "a matrix": {"direction.1": np.ones((2, 8), np.float32)},
    "other widths": {"direction.1": ONES, "direction.2": np.ones(9, np.float32)},
    "NaN": {"direction.1": ONES, "direction.2": np.array([1, np.nan] * 4, np.float32)},
    "infinity": {"direction.1": np.array([1, np.inf] * 4, np.float32)},
    "only zeros": {"direction.1": 0 * ONES, "direction.2": 0 * ONES},
    "no tensor": {},
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_llama_cpp_would_reject_or_that_steers_nowhere_is_refused(tmp_path: Path, how: str) -> None:
    path = samples.write_gguf(tmp_path / "broken.gguf", BROKEN[how])
    with pytest.raises(VectorError) as raised:
        PersonaVector.load(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_a_leading_zero_does_not_make_two_directions_of_one_block(tmp_path: Path) -> None:
    # int("01") is 1: one of the two tensors would silently win
    path = samples.write_gguf(tmp_path / "twice.gguf", {"direction.1": ONES, "direction.01": 2 * ONES})
    with pytest.raises(VectorError):
        PersonaVector.load(path)


def test_what_is_not_a_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("direction.1 = 3\n")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "folder.gguf").mkdir()
    for name in ("text.gguf", "empty.gguf", "folder.gguf", "missing.gguf"):
        with pytest.raises(VectorError) as raised:
            PersonaVector.load(tmp_path / name)
        assert str(raised.value).startswith(f"{tmp_path / name}: ")
        assert "\n" not in str(raised.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    full_vector().save(tmp_path / "v.gguf")
    samples.write_gguf(tmp_path / "foreign.gguf", {"direction.1": np.ones(64, np.float32)})
    cut = tmp_path / "cut.gguf"
    for name in ("v.gguf", "foreign.gguf"):
        content = (tmp_path / name).read_bytes()
        positions = [*range(0, len(content), max(1, len(content) // 80)), len(content) - 4, len(content) - 1]
        for n in positions:
            cut.write_bytes(content[:n])
            with pytest.raises(VectorError):
                PersonaVector.load(cut)


def test_a_file_with_a_flipped_byte_loads_or_is_refused_and_never_breaks_the_process(tmp_path: Path) -> None:
    samples.vector(n_embd=4, norms=NORMS).save(tmp_path / "v.gguf")
    content = (tmp_path / "v.gguf").read_bytes()
    path = tmp_path / "flipped.gguf"
    rng = np.random.default_rng(0)
    outcomes = set()
    for position in rng.choice(len(content), 300, replace=False):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            outcomes.add(type(PersonaVector.load(path)))
        except VectorError:
            outcomes.add(VectorError)
    assert outcomes == {PersonaVector, VectorError}


def rewrite(source: Path, target: Path, change: dict[str, Any], rows: dict[str, np.ndarray] | None = None) -> Path:
    """A copy with other key-values; None leaves one out."""
    reader = gguf.GGUFReader(source)
    w = gguf.GGUFWriter(str(target), "controlvector")
    for key, f in reader.fields.items():
        if key.startswith("personasteer."):
            value = change.get(key.removeprefix("personasteer."), f.contents())
            if value is not None:
                w.add_key_value(key, value, *value_types(value, f))
    for t in reader.tensors:
        w.add_tensor(t.name, (rows or {}).get(t.name, np.array(t.data)))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return target


def value_types(value: Any, f: Any) -> Iterator[Any]:
    if isinstance(value, str):
        yield gguf.GGUFValueType.STRING
    elif isinstance(value, list):
        yield gguf.GGUFValueType.ARRAY
        yield gguf.GGUFValueType.FLOAT32 if any(isinstance(x, float) for x in value) else gguf.GGUFValueType.INT32
    elif isinstance(value, float):
        yield gguf.GGUFValueType.FLOAT64
    else:
        kind = f.types[0]
        yield kind if kind != gguf.GGUFValueType.STRING else gguf.GGUFValueType.UINT32


INCONSISTENT: dict[str, dict[str, Any]] = {
    "too few directions": {"directions": [1.0] * 255},
    "another number of blocks": {"n_layer": 5},
    "another width": {"n_embd": 32},
    "more blocks and less width": {"n_layer": 8, "n_embd": 32},
    "norms of three blocks": {"norms": [1.0, 2.0, 3.0]},
    "thresholds of three blocks": {"thresholds": [1.0, 2.0, 3.0]},
    "means of five blocks": {"means": [1.0] * 5},
    "AUROCs of three blocks": {"aurocs": [0.5] * 3},
    "a text for the effects": {"effects": "strong"},
    "a shuffled direction and a half": {"shuffled": [1.0] * (4 * 64 + 128)},
    "a text for the shuffled directions": {"shuffled": "many"},
    "a window of three numbers": {"window": [-0.5, 0.0, 0.5]},
    "a window without 0": {"window": [0.1, 0.5]},
    "a window that is not a number": {"window": [float("nan"), 0.5]},
    "a number for the window": {"window": 0.5},
    "a text for the window": {"window": "wide"},
    "a layer out of range": {"layers": [1, 7]},
    "a layer without a direction": {"layers": [0, 1]},
    "a weight too many": {"weights": [0.2, 0.3, 0.5]},
    "a negative weight": {"weights": [-0.7, 0.3]},
    "an infinite direction": {"directions": [float("inf")] + [1.0] * 255},
    "a strength that is not a number": {"strength": float("nan")},
    "no name": {"name": None},
    "no strength": {"strength": None},
    "no provenance": {"provenance": None},
    "provenance that is no JSON": {"provenance": "{"},
    "provenance that is a list": {"provenance": "[1]"},
    "provenance that is not a number": {"provenance": '{"a": NaN}'},
    "provenance too deep": {"provenance": '{"a":' * 100_000 + "1" + "}" * 100_000},
    "a text for a number": {"n_layer": "four"},
    "a number for the directions": {"directions": "1.0"},
}


@pytest.mark.parametrize("how", INCONSISTENT)
def test_a_file_of_ours_whose_key_values_do_not_fit_together_is_refused(tmp_path: Path, how: str) -> None:
    full_vector().save(tmp_path / "v.gguf")
    unchanged = rewrite(tmp_path / "v.gguf", tmp_path / "same.gguf", {})
    assert PersonaVector.load(unchanged).layers == (1, 3)
    path = rewrite(tmp_path / "v.gguf", tmp_path / "broken.gguf", INCONSISTENT[how])
    with pytest.raises(VectorError) as raised:
        PersonaVector.load(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_tensors_that_are_not_the_ones_of_the_key_values_are_refused(tmp_path: Path) -> None:
    # llama.cpp would steer by the tensors, we by the key-values: not the same persona
    full_vector().save(tmp_path / "v.gguf")
    other = rewrite(tmp_path / "v.gguf", tmp_path / "o.gguf", {}, {"direction.1": np.ones(64, np.float32)})
    with pytest.raises(VectorError):
        PersonaVector.load(other)


def test_provenance_is_text_that_any_reader_takes(tmp_path: Path) -> None:
    full_vector().save(tmp_path / "v.gguf")
    text = gguf.GGUFReader(tmp_path / "v.gguf").fields["personasteer.provenance"].contents()
    assert json.loads(text)["text"] == "naïve ☂"


# ---- in llama.cpp


@pytest.mark.parametrize("layers", [(2,), (1, 3), (1, 2, 3)])
def test_the_file_does_in_plain_llama_cpp_exactly_what_the_edit_does_here(
    tiny: Loaded, tmp_path: Path, layers: tuple[int, ...]
) -> None:
    texts = ["The harbour was quiet in the morning.", "Two boats came back"]
    with Model(tiny.path, n_ctx=512, n_parallel=2, n_threads=1) as model:
        v = samples.vector(layers=layers, norms=model.norms)
        steered = model.logits(texts, steer=v * 0.4)
        unsteered = model.logits(texts)
        tokens = [model.tokenize(t) for t in texts]
        v.save(tmp_path / "v.gguf", strength=0.4)
    rows = {int(name.removeprefix("direction.")): row for name, row in tensors_of(tmp_path / "v.gguf").items()}
    assert sorted(rows) == list(layers)

    for shift in (0, 1, -1):  # a file read one block off must give something else
        planted = np.zeros((tiny.n_layer, tiny.n_embd), np.float32)
        for il, row in rows.items():
            if 1 <= il + shift < tiny.n_layer:
                planted[il + shift] = row
        plain = oracle.PlainContext(tiny.plain, n_ctx=512, n_parallel=2, n_batch=512, n_threads=1, n_outputs=64)
        plain.set_cvec(planted, 1, tiny.n_layer - 1)
        expected, _ = plain.compute(tokens, [(0, len(t)) for t in tokens])
        assert all(map(np.array_equal, steered, expected)) == (shift == 0)
    assert not any(map(np.array_equal, steered, unsteered))
