"""Model files written anew: what is named changes, everything else keeps its bytes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import personasteer as ps
from personasteer import _core
from personasteer.ship import rewrite as rw
from personasteer.ship.fields import Field, read_fields
from personasteer.ship.rewrite import Added, ModelFile, Tensor, rewrite
from personasteer.tiny_model import write_tiny_model

Q4_0, Q8_0, F16 = (getattr(gguf.GGMLQuantizationType, name) for name in ("Q4_0", "Q8_0", "F16"))


@pytest.fixture(scope="module")
def q8_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("q8") / "q8.gguf", quantization=Q8_0)


def digests(path: Path) -> dict[str, str]:
    return {t.name: hashlib.sha256(t.data.tobytes()).hexdigest() for t in gguf.GGUFReader(path).tensors}


def test_a_copy_without_changes_has_the_same_tensors_and_key_values(q8_path: Path, tmp_path: Path) -> None:
    rewrite(ModelFile(q8_path), tmp_path / "copy.gguf")
    assert digests(tmp_path / "copy.gguf") == digests(q8_path)
    before, after = (gguf.GGUFReader(p).fields for p in (q8_path, tmp_path / "copy.gguf"))
    names = {name for name in before if not name.startswith("GGUF.")}
    assert {name for name in after if not name.startswith("GGUF.")} == names
    for name in names:
        assert after[name].types == before[name].types
        assert after[name].contents() == before[name].contents()


def test_added_edited_and_described_is_what_was_named_and_nothing_else(q8_path: Path, tmp_path: Path) -> None:
    file = ModelFile(q8_path)
    edited = file.tensors["blk.1.ffn_down.weight"]
    row = np.arange(64, dtype=np.float32)
    steps: list[tuple[int, int]] = []
    rewrite(
        file,
        tmp_path / "new.gguf",
        fields=[Field.of("general.name", "other"), Field.of("mine.numbers", np.array([1.5, -2.0], np.float32)),
                Field.of("mine.texts", ["a", "ü"]), Field.of("mine.count", 7), Field.of("mine.flag", True),
                Field.of("mine.share", 0.1), Field.of("mine.blocks", np.array([3, 1]))],
        removed=["general.type"],
        edits={edited.name: lambda t: iter([bytes(t.n_bytes // 2)] * 2)},
        added={"blk.3.ffn_down.bias": Added.of(row), "blk.0.ffn_down.bias": Added.of(row[:3])},
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    new = gguf.GGUFReader(tmp_path / "new.gguf")
    tensors = {t.name: t for t in new.tensors}
    assert np.array_equal(tensors["blk.3.ffn_down.bias"].data, row)
    assert np.array_equal(tensors["blk.0.ffn_down.bias"].data, row[:3])
    assert not tensors[edited.name].data.any()
    assert tensors[edited.name].tensor_type == Q8_0
    before, after = digests(q8_path), digests(tmp_path / "new.gguf")
    assert {name for name in before if after[name] != before[name]} == {edited.name}
    assert list(after)[: len(before)] == list(before)
    found = read_fields(tmp_path / "new.gguf")
    assert found["general.name"] == new.fields["general.name"].contents() == "other"
    assert found["mine.numbers"].tolist() == [1.5, -2.0]
    assert found["mine.texts"] == ["a", "ü"]
    assert (found["mine.count"], found["mine.flag"], found["mine.share"]) == (7, True, 0.1)
    assert found["mine.blocks"].tolist() == [3, 1]
    assert "general.type" not in found
    size = (tmp_path / "new.gguf").stat().st_size
    assert steps[-1] == (size, size)
    assert [d for d, _ in steps] == sorted(d for d, _ in steps)


def test_rows_are_read_as_gguf_reads_them(tmp_path: Path) -> None:
    for kind in (Q4_0, Q8_0, F16, gguf.GGMLQuantizationType.F32):
        path = write_tiny_model(tmp_path / f"{kind.name}.gguf", quantization=kind)
        file = ModelFile(path)
        for t in gguf.GGUFReader(path).tensors:
            expected = gguf.quants.dequantize(t.data, t.tensor_type).reshape(-1, t.shape[0])
            np.testing.assert_array_equal(file.rows(file.tensors[t.name]), expected)
            if len(expected) > 3:
                np.testing.assert_array_equal(file.rows(file.tensors[t.name], 1, 2), expected[1:3])


def test_chunks_are_the_whole_tensor_in_order(q8_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rw, "CHUNK", 4 * 64 * 7)  # seven rows
    file = ModelFile(q8_path)
    tensor = file.tensors["token_embd.weight"]
    chunks = list(file.chunks(tensor))
    assert [start for start, _ in chunks] == list(range(0, 286, 7))
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in chunks]), file.rows(tensor))


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "bf16", "f32", "iq4_nl"])
def test_quantizing_loses_no_more_than_the_type_does(kind: str) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    tensor = Tensor("t", kind, (64, 5), 0, 0)
    back = rw.dequantized(tensor, rw.quantized(tensor, rows))
    bits = {"q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5, "q8_0": 8, "f16": 10, "bf16": 8, "f32": 23, "iq4_nl": 4}[kind]
    assert np.abs(back - rows).max() <= np.abs(rows).max() * 2.0 ** (2 - bits)
    if kind in ("q4_0", "q8_0", "f16", "f32"):  # gguf writes the same
        name = gguf.GGMLQuantizationType[kind.upper()]
        expected = gguf.quants.dequantize(gguf.quants.quantize(rows, name), name)
        np.testing.assert_allclose(back, expected, atol=1e-6 if kind != "q4_0" else 0.3)


def test_importances_move_the_error_to_where_it_matters_little() -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((8, 256)).astype(np.float32)
    tensor = Tensor("t", "q4_K", (256, 8), 0, 0)
    weights = np.where(np.arange(256) % 2, 100.0, 0.01).astype(np.float32)
    plain, weighted = (rw.dequantized(tensor, rw.quantized(tensor, rows, w)) for w in (None, weights))
    error = [np.square(x - rows)[:, 1::2].sum() for x in (plain, weighted)]
    assert error[1] < 0.9 * error[0]


@pytest.mark.parametrize(
    ("kind", "rows", "weights", "said"),
    [
        ("q8_0", np.full((1, 32), np.nan), np.zeros(0), "not finite"),
        ("q8_0", np.full((1, 32), np.inf), np.zeros(0), "not finite"),
        ("q8_0", np.zeros((1, 33)), np.zeros(0), "no blocks of q8_0"),
        ("q8_1", np.zeros((1, 32)), np.zeros(0), "cannot write q8_1"),
        ("iq2_xxs", np.zeros((1, 256)), np.zeros(0), "with an importance matrix only"),
        ("q4_K", np.zeros((1, 256)), np.zeros(3), "an importance for each of 256"),
        ("q9_0", np.zeros((1, 32)), np.zeros(0), "unknown tensor type q9_0"),
        ("q4_K", np.ones((1, 256)), np.zeros(256), "all importances are 0"),
        ("iq2_xxs", np.ones((1, 256)), np.zeros(256), "all importances are 0"),
        ("iq3_s", np.ones((1, 256)), np.full(256, np.nan), "is negative, not finite or above"),
        ("iq3_xxs", np.ones((1, 256)), np.full(256, 3e38), "is negative, not finite or above"),
        ("q4_K", np.full((1, 256), 1e30), np.zeros(0), "too large for q4_K"),
    ],
)
def test_what_ggml_cannot_write_is_an_error_and_no_crash(kind: str, rows: Any, weights: Any, said: str) -> None:
    with pytest.raises(ps.ArgumentError, match=said):
        _core.quantize(kind, rows.astype(np.float32), weights.astype(np.float32))


@pytest.mark.parametrize(
    ("kind", "n_bytes", "width"),
    [("q8_0", 33, 32), ("q8_0", 34, 31), ("f32", 7, 1), ("f32", 4, 0), ("f32", 4, -1), ("f32", 8, 2**62 + 1)],
)
def test_bytes_that_are_no_rows_are_an_error(kind: str, n_bytes: int, width: int) -> None:
    with pytest.raises(ps.ArgumentError, match="are no rows"):
        _core.dequantize(kind, bytes(n_bytes), width)


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1, 1), (-5, 3), (0,), (32, 2**62), (33,)])
def test_a_new_tensor_of_an_impossible_shape_is_an_error_and_no_crash(q8_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ps.ArgumentError, match="tensor new has a shape that is none of q8_0"):
        _core.change_gguf_header(str(q8_path), [], [], [("new", "q8_0", shape)])


def test_key_values_that_would_spoil_a_file_are_errors(q8_path: Path) -> None:
    array, uint32 = int(gguf.GGUFValueType.ARRAY), int(gguf.GGUFValueType.UINT32)
    with pytest.raises(ps.ArgumentError, match="key-value odd is of a type that is not written"):
        _core.change_gguf_header(str(q8_path), [], [("odd", array, uint32, bytes(7))], [])
    with pytest.raises(ps.ArgumentError, match="alignment of a file cannot change"):
        _core.change_gguf_header(str(q8_path), ["general.alignment"], [], [])


def test_a_full_disk_leaves_no_file(q8_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ps.PersonasteerError, match=r"needs [\d,]+ bytes, [\d,]+ are free"):
        rewrite(ModelFile(q8_path), tmp_path / "out.gguf")
    monkeypatch.undo()

    def full(_: Tensor) -> Iterator[bytes]:
        raise OSError(28, "No space left on device")
        yield b""

    with pytest.raises(ps.PersonasteerError, match="No space left on device"):
        rewrite(ModelFile(q8_path), tmp_path / "out.gguf", edits={"blk.0.ffn_down.weight": full})
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_and_a_failed_check_leave_the_old_file(q8_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewrite(ModelFile(q8_path), out, progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        rewrite(ModelFile(q8_path), out, check=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    assert out.read_bytes() == b"old"


def test_edits_of_another_size_are_refused(q8_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ps.ModelError, match=r"blk.0.ffn_down.weight: 3 bytes were made of \d+"):
        rewrite(ModelFile(q8_path), tmp_path / "o.gguf", edits={"blk.0.ffn_down.weight": lambda _: iter([b"abc"])})
    assert list(tmp_path.iterdir()) == []


def test_the_model_itself_is_never_overwritten(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    (tmp_path / "link.gguf").symlink_to(path)
    before = path.read_bytes()
    for target in (path, tmp_path / "link.gguf"):
        with pytest.raises(ps.ArgumentError, match="is the model itself"):
            rewrite(ModelFile(path), target)
    assert path.read_bytes() == before


def test_a_tensor_that_is_there_cannot_be_added(q8_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ps.ArgumentError, match="is there already"):
        rewrite(ModelFile(q8_path), tmp_path / "o.gguf", added={"output_norm.weight": Added.of(np.zeros(64))})
    with pytest.raises(ps.ArgumentError, match="too long"):
        rewrite(ModelFile(q8_path), tmp_path / "o.gguf", added={"x" * 64: Added.of(np.zeros(64))})


def test_a_part_of_a_split_model_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    rewrite(ModelFile(path), tmp_path / "part.gguf", fields=[Field.of("split.count", 3)])
    with pytest.raises(ps.ModelError, match=r"one of 3 parts .* llama-gguf-split --merge"):
        ModelFile(tmp_path / "part.gguf")


def test_a_truncated_model_is_refused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 5000])
    with pytest.raises(ps.ModelError, match="truncated"):
        ModelFile(path)


def test_a_source_without_its_last_padding_is_copied(tmp_path: Path) -> None:
    w = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    w.add_tensor("odd", np.arange(5, dtype=np.float32))
    for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        step()
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:-12])
    rewrite(ModelFile(tmp_path / "m.gguf"), tmp_path / "o.gguf", added={"new": Added.of(np.ones(2))})
    tensors = {t.name: t.data.tolist() for t in gguf.GGUFReader(tmp_path / "o.gguf").tensors}
    assert tensors == {"odd": [0, 1, 2, 3, 4], "new": [1, 1]}


def test_another_alignment_is_kept(tmp_path: Path) -> None:
    w = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    w.add_custom_alignment(256)
    w.add_tensor("a", np.arange(5, dtype=np.float32))
    w.add_tensor("b", np.arange(70, dtype=np.float32))
    for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        step()
    rewrite(
        ModelFile(tmp_path / "m.gguf"), tmp_path / "o.gguf", added={"c": Added.of(np.ones(2)), "d": Added.of([3.0])}
    )
    reader = gguf.GGUFReader(tmp_path / "o.gguf")
    assert {t.name: t.data.tolist()[:3] for t in reader.tensors} == {
        "a": [0, 1, 2], "b": [0, 1, 2], "c": [1, 1], "d": [3],
    }  # fmt: skip
    assert all(t.data_offset % 256 == 0 for t in reader.tensors)
