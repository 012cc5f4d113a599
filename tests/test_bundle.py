"""Bundles: what is written, that it runs as the live steering does, and every way to be broken."""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import json
import logging
import os
import random
import shutil
import stat
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import gguf
import numpy as np
import oracle
import pytest
import samples
from test_lora import write_lora

import personasteer as ps
from personasteer import ArgumentError, BundleError, IncompatibleVector, Model, ModelError, PersonaVector, VectorError
from personasteer.cli import run as run_command
from personasteer.ship import archive, bundle, persona
from personasteer.ship.bundle import check_bundle, write_bundle
from personasteer.ship.card import HUB_LICENSES, evaluations_in
from personasteer.ship.contents import hub_id
from personasteer.ship.fields import Field
from personasteer.ship.rewrite import ModelFile, rewrite
from personasteer.steering import SCOPES, SITES
from personasteer.tiny_model import write_tiny_model

if TYPE_CHECKING:
    from conftest import Loaded

NORMS = np.array([5.0, 8.0, 11.0, 13.0], np.float32)
TEXTS = ["The harbour was quiet in the morning.", "Two boats came back"]
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}


def vector(seed: int = 0, **more: Any) -> PersonaVector:
    given: dict[str, Any] = {"norms": NORMS, "thresholds": np.full(4, 0.25, np.float32), "means": np.zeros(4)}
    return samples.vector(seed=seed, **{**given, **more})


def edits() -> list[Any]:
    """One of each kind, four vectors, one of them used twice."""
    a, b, c = vector(0, name="sunny"), vector(1, name="dry"), vector(2, name="dry", layers=(2, 3))
    return [
        ps.Add(a, 0.3, scope="response"),
        ps.Add(a, -0.07, layers=(0, 2), keep_norm=True, start=1, stop=9, half_life=3.7),
        ps.Cap(b, scope=(0, 3, 5)),
        ps.Floor(c, tau=[np.nan, np.nan, 0.1, -0.2]),
        ps.Ablate(vector(3, name="old"), to="mean", share=0.6),
    ]


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Iterator[Model]:
    with Model(tiny_path, n_ctx=256, n_parallel=2, n_threads=1) as m:
        yield m


@pytest.fixture
def write(tmp_path: Path, tiny_path: Path) -> Callable[..., Path]:
    def written(out: str = "sunny", /, **more: Any) -> Path:
        given = {"model": tiny_path, "steering": [vector() * 0.3], "name": "sunny"}
        return write_bundle(tmp_path / out, **{**given, **more})

    return written


@pytest.fixture
def own_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders go, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fails(path: Path, pattern: str, **more: Any) -> str:
    """Loading raises one line that names the bundle."""
    with pytest.raises(BundleError, match=pattern) as raised:
        ps.load_bundle(path, **more)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def sign(folder: Path) -> Path:
    """SHA256SUMS made anew, as somebody who means harm would."""
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files_in(folder).items() if name != archive.SUMS}
    (folder / archive.SUMS).write_text("".join(f"{s}  {name}\n" for name, s in sorted(sums.items())))
    return folder


def change_persona(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = json.loads((folder / "persona.json").read_text())
    change(content)
    (folder / "persona.json").write_text(json.dumps(content))
    return sign(folder)


def as_tar(folder: Path, path: Path, change: Callable[[str, tarfile.TarInfo], Any] = lambda name, member: None) -> Path:
    """A tar file of a folder, each member changed."""
    with tarfile.open(path, "w") as tar:
        for name, data in sorted(files_in(folder).items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            change(name, member)
            tar.addfile(member, io.BytesIO(data))
    return path


# ---- it runs as the live steering does


@pytest.mark.parametrize("name", ["sunny", "sunny.tar"])
def test_a_loaded_bundle_computes_what_the_live_steering_computes_bit_for_bit(
    write: Callable[..., Path], model: Model, name: str
) -> None:
    # the same decodes, only the steering's way through the files differs
    live = ps.Steering(edits())
    path = write(name, steering=live)
    with ps.load_bundle(path, model=model) as b:
        pair = [["Hello!", "What now?"], [("hello", "there it is"), ("hi", "you")]]
        assert b.chat("Hello!", **GREEDY) == model.chat("Hello!", steer=live, **GREEDY)
        assert b.chat_batch(pair[0], **GREEDY) == model.chat_batch(pair[0], steer=live, **GREEDY)
        got, expected = (model.logits(TEXTS, steer=s) for s in (b.steering, live))
        assert all(map(np.array_equal, got, expected))
        assert not any(map(np.array_equal, got, model.logits(TEXTS)))
        # what acts on the response only does not show in logits of plain texts
        got, expected = (model.capture(pair[1], pool="last", steer=s) for s in (b.steering, live))
        assert np.array_equal(got, expected)
        for one, same in zip(b.steering, live, strict=True):
            alone, known = (model.capture(pair[1], pool="last", steer=s) for s in (one, same))
            assert np.array_equal(alone, known)
            assert type(one) is type(same)
            assert (one.scope, one.layers, one.start, one.stop, one.half_life) == (
                same.scope, same.layers, same.start, same.stop, same.half_life
            )  # fmt: skip


def test_another_steering_takes_the_place_of_the_bundles_own(write: Callable[..., Path], model: Model) -> None:
    other = vector(7) * 0.5
    with ps.load_bundle(write(steering=[vector() * 0.9]), model=model) as b:
        texts = [b.chat("Hello!", steer=steer, **GREEDY) for steer in (None, [], other)]
        assert texts[1:] == [model.chat("Hello!", **GREEDY), model.chat("Hello!", steer=other, **GREEDY)]
        assert len(set(texts)) == 3
        assert b.chat_batch(["Hello!"] * 2, steer=[None, other], **GREEDY) == model.chat_batch(
            ["Hello!"] * 2, steer=[None, other], **GREEDY
        )
    assert not model.closed  # it was given open


def test_every_vector_comes_back_whole_and_is_written_once(write: Callable[..., Path], model: Model) -> None:
    live = edits()
    path = write(steering=live)
    assert sorted(p.name for p in (path / "vectors").iterdir()) == ["dry-2.gguf", "dry.gguf", "old.gguf", "sunny.gguf"]
    with ps.load_bundle(path, model=model) as b:
        for got, known in zip(b.steering, live, strict=True):
            for name in ("directions", "norms", "thresholds", "means"):
                assert np.array_equal(getattr(got.vector, name), getattr(known.vector, name)), name
            assert (got.vector.name, got.vector.layers) == (known.vector.name, known.vector.layers)
        assert b.steering[0].vector is b.steering[1].vector
        names = [e.file for e in b.persona.vectors]
        assert names == [f"vectors/{name}.gguf" for name in ("sunny", "dry", "dry-2", "old")]


def test_equal_vectors_are_one_file_and_a_weight_that_a_file_cannot_keep_is_refused(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(steering=[vector() * 0.1, vector() * 0.2, ps.Cap(vector())])
    assert [p.name for p in (path / "vectors").iterdir()] == ["vector.gguf"]
    with pytest.raises(VectorError, match="cannot be written whole"):
        write("b", steering=[ps.Add(vector(weights={1: 0.5, 2: 0.2, 3: 0.3}), 0.3, layers=(3,))])
    assert samples.no_leftovers(tmp_path, "sunny")


def test_a_vector_file_does_in_plain_llama_cpp_at_scale_one_what_the_bundle_does(
    write: Callable[..., Path], tiny: Loaded, model: Model
) -> None:
    v = vector(norms=model.norms, provenance={"method": "difference-of-means", **model.origin})
    path = write(steering=[v * 0.5, v * -0.1])
    assert "llama-cli -m tiny.gguf --control-vector vectors/vector.gguf\n" in (path / "README.md").read_text()
    planted = np.zeros((tiny.n_layer, tiny.n_embd), np.float32)
    for tensor in gguf.GGUFReader(path / "vectors/vector.gguf").tensors:
        planted[int(tensor.name.removeprefix("direction."))] = tensor.data
    plain = oracle.PlainContext(tiny.plain, n_ctx=512, n_parallel=2, n_batch=512, n_threads=1, n_outputs=64)
    plain.set_cvec(planted, 1, tiny.n_layer - 1)
    tokens = [model.tokenize(t) for t in TEXTS]
    expected, _ = plain.compute(tokens, [(0, len(t)) for t in tokens])
    with ps.load_bundle(path, model=model) as b:
        # rows are rounded to float32 once in the file, and twice where two edits are summed
        for got, row in zip(model.logits(TEXTS, steer=b.steering), expected, strict=True):
            assert np.abs(got - row).max() < 1e-4
    assert max(np.abs(a - e).max() for a, e in zip(model.logits(TEXTS), expected, strict=True)) > 0.05


# ---- what is written


def test_a_bundle_lists_its_files_with_their_sums_and_describes_its_model(
    write: Callable[..., Path], tiny_path: Path
) -> None:
    path = write(description="Sees the bright side.", steering=edits())
    files = files_in(path)
    vectors = {f"vectors/{name}.gguf" for name in ("sunny", "dry", "dry-2", "old")}
    assert files.keys() == {"README.md", "SHA256SUMS", "persona.json"} | vectors
    listed = dict(line.split("  ")[::-1] for line in files.pop("SHA256SUMS").decode().splitlines())
    assert listed == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    content = json.loads(files["persona.json"])
    assert (content["schema_version"], content["name"]) == (1, "sunny")
    with Model(tiny_path, n_threads=1) as m:
        assert content["model"] == {
            "name": "tiny-random", "architecture": "llama", "quantization": "F32", "file_name": "tiny.gguf",
            "size": tiny_path.stat().st_size, "sha256": hashlib.sha256(tiny_path.read_bytes()).hexdigest(),
            "fingerprint": m.fingerprint, "identity": {k: m.identity[k] for k in ("metadata", "tensors", "weights")},
            "n_layer": m.n_layer, "n_embd": m.n_embd, "file": None,
        }  # fmt: skip
    assert [e["op"] for e in content["edits"]] == ["add", "add", "cap", "floor", "ablate"]
    assert content["edits"][3]["tau"] == [None, None, 0.1, -0.2]
    assert content["vectors"][0]["thresholds"] == [0.25] * 4
    # 0.3 on the response and -0.07 elsewhere: what llama.cpp's scale 1 stands for is their sum
    assert content["vectors"][0]["exported_strength"] == pytest.approx(0.23)


@pytest.mark.parametrize("name", ["b", "b.tar"])
def test_the_same_persona_gives_the_same_bytes_wherever_it_is_written(
    tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "report.md").write_text("seen")
    found = []
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        os.utime(tiny_path)
        out = Path(name) if place == "first" else tmp_path / place / name
        given: dict[str, Any] = {"name": "n", "include_model": True, "reports": [tmp_path / "report.md"]}
        assert write_bundle(out, model=tiny_path, steering=edits(), **given) == out
        found.append(files_in(tmp_path / place))
    assert found[0] == found[1]
    for name_inside, data in found[0].items():
        assert str(tmp_path).encode() not in data, name_inside


def test_a_tar_file_has_no_times_no_owners_and_its_names_in_order(write: Callable[..., Path], tmp_path: Path) -> None:
    folder, path = write(include_model=True), write("sunny.tar", include_model=True)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert {m.name: tar.extractfile(m).read() for m in members} == files_in(folder)  # type: ignore[union-attr]
    assert [m.name for m in members] == sorted(m.name for m in members)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((folder / "persona.json").stat().st_mode) == 0o666 & ~umask
    assert samples.no_leftovers(tmp_path, "sunny", "sunny.tar")


@pytest.mark.parametrize("name", ["sunny", "sunny.tar"])
def test_an_included_model_is_the_file_itself_and_runs_without_another(
    write: Callable[..., Path], tiny_path: Path, own_temporary: Path, name: str
) -> None:
    seen: list[tuple[int, int]] = []
    path = write(name, include_model=True, progress=lambda done, total: seen.append((done, total)))
    size = tiny_path.stat().st_size * (2 if name.endswith(".tar") else 1)  # a tar's model is hashed, then copied
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)
    assert list(own_temporary.iterdir()) == []
    b = ps.load_bundle(path, n_threads=1, n_ctx=64)
    assert b.model.path.read_bytes() == tiny_path.read_bytes()
    assert b.model.path == b.folder / "model.gguf"
    assert b.chat("Hello!", max_tokens=2)
    assert len(list(own_temporary.iterdir())) == name.endswith(".tar")
    b.close()
    b.close()
    assert b.model.closed
    assert list(own_temporary.iterdir()) == []


def test_temporary_files_of_a_bundle_that_nobody_closed_go_with_it(
    write: Callable[..., Path], model: Model, own_temporary: Path
) -> None:
    b = ps.load_bundle(write("sunny.tar"), model=model)
    assert len(list(own_temporary.iterdir())) == 1
    del b
    gc.collect()
    assert list(own_temporary.iterdir()) == []


def test_a_large_file_is_copied_and_hashed_without_holding_it(tmp_path: Path) -> None:
    size = 64 * 2**20
    with (tmp_path / "large").open("wb") as f:
        f.truncate(size)
    expected = hashlib.sha256(bytes(size)).hexdigest()
    for name in ("b", "b.tar"):
        tracemalloc.start()
        with archive.writing(tmp_path / name, force=False) as w:
            assert w.take("model.gguf", tmp_path / "large", archive.Counter(None, 0)) == (expected, size)
            w.put("persona.json", b"{}")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 * 2**20, name
        with archive.reading(tmp_path / name) as reader:
            assert archive.read_sums(reader)["model.gguf"] == expected
            archive.check_all(reader, archive.read_sums(reader), None, None)


# ---- the model


def test_the_model_is_found_beside_the_bundle_or_is_the_demo_model(
    write: Callable[..., Path], tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    message = fails(path, "is not included")
    assert "tiny.gguf (F32, SHA-256 " in message
    shutil.copy(tiny_path, tmp_path / "tiny.gguf")
    with ps.load_bundle(path, n_threads=1, n_ctx=64) as b:
        assert b.model.path == tmp_path / "tiny.gguf"
    (tmp_path / "tiny.gguf").rename(tmp_path / "demo.gguf")
    monkeypatch.setattr(bundle, "demo_model_path", lambda: tmp_path / "demo.gguf")
    with ps.load_bundle(path, n_threads=1, n_ctx=64) as b:
        assert b.model.path == tmp_path / "demo.gguf"
    other = bytearray((tmp_path / "demo.gguf").read_bytes())
    other[-1] ^= 1
    (tmp_path / "demo.gguf").write_bytes(other)  # of the same size
    fails(path, "is not included")


def test_another_model_is_refused_by_what_differs_and_tried_on_request(
    write: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(steering=[vector(provenance={}) * 0.9])
    other = write_tiny_model(tmp_path / "other.gguf", seed=1)
    with caplog.at_level(logging.WARNING):
        message = fails(path, "other weights", model=other)
        assert "other.gguf" in message
        assert "quantization" not in message
        assert caplog.records == []
        with ps.load_bundle(path, model=other, allow_other_model=True, n_threads=1, n_ctx=64) as b:
            assert b.chat("Hello!", **GREEDY) != b.chat("Hello!", steer=[], **GREEDY)
    (warning,) = caplog.records
    assert "other weights" in warning.getMessage()
    assert "not proven" in warning.getMessage()
    quantized = write_tiny_model(tmp_path / "q.gguf", quantization=gguf.GGMLQuantizationType.Q8_0)
    assert "quantization" in fails(path, "is another file", model=quantized)


def test_a_file_with_other_descriptions_only_is_said_to_be_the_same_model(
    write: Callable[..., Path], tiny_path: Path, tmp_path: Path
) -> None:
    # general.name stands once in the file, as a length and a text
    renamed = tiny_path.read_bytes().replace(b"tiny-random", b"tiny-Random")
    (tmp_path / "renamed.gguf").write_bytes(renamed)
    assert "other descriptive metadata" in fails(write(), "same weights", model=tmp_path / "renamed.gguf")


def test_a_model_of_another_shape_is_refused_also_on_request(write: Callable[..., Path], tmp_path: Path) -> None:
    narrow = write_tiny_model(tmp_path / "narrow.gguf", n_embd=32)
    fails(write(), "width 64, but the model has 4 of width 32", model=narrow, allow_other_model=True, n_threads=1)


def test_options_of_an_open_model_are_refused(write: Callable[..., Path], model: Model) -> None:
    with pytest.raises(ArgumentError, match="n_ctx: options of a model that is already open"):
        ps.load_bundle(write(), model=model, n_ctx=64)


# ---- what cannot be written


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a condition": ({"steering": [ps.When(vector(), vector() * 1)]}, ArgumentError, "not When"),
    "a redirection": ({"steering": [ps.Redirect(vector(), vector(1))]}, ArgumentError, "not Redirect"),
    "no edits": ({"steering": []}, ArgumentError, "at least one edit"),
    "a bare vector": ({"steering": [vector()]}, ArgumentError, "multiply it by a strength"),
    "no name": ({"name": " \n\x00 "}, ArgumentError, "needs a name"),
    "a name of a book's length": ({"name": "x" * 201}, ArgumentError, "name: .*200"),
    "a description of a book's length": ({"description": "x" * 5000}, ArgumentError, "description: .*4000"),
    "a base model that is no id": ({"base_model": "https://x/y"}, ArgumentError, "base_model"),
    "a vector of another shape": ({"steering": [vector(n_embd=32) * 1]}, IncompatibleVector, "width 32"),
    "a vector of other blocks": (
        {"steering": [samples.vector(n_layer=5, norms=np.ones(5)) * 1]},
        IncompatibleVector,
        "5 blocks",
    ),
    "a cap without thresholds": ({"steering": [ps.Cap(vector(thresholds=None))]}, VectorError, "stores no thresholds"),
    "a vector that no file can hold": (
        {"steering": [ps.Add(vector(layers=(0,)), 0.3)]}, VectorError, "needs a layer >= 1",
    ),
    "no model": ({"model": "nowhere.gguf"}, ModelError, "no such file"),
    "a vector for a model": ({"model": "vector.gguf"}, ModelError, "not a language model"),
    "no report": ({"reports": ["nowhere"]}, ArgumentError, "nowhere: no such report"),
    "an empty report folder": ({"reports": ["empty"]}, ArgumentError, "no report"),
    "a shipped text": ({"shipped": ["text.txt"]}, ModelError, "not a GGUF"),
    "a shipped model of another architecture": ({"shipped": ["imatrix.gguf"]}, ModelError, "'other'.*'llama'"),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize("name", ["out", "out.tar"])
def test_what_cannot_be_bundled_is_refused_in_one_line_and_leaves_nothing(
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_temporary: Path,
    how: str,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no model")
    (tmp_path / "empty").mkdir()
    vector().save("vector.gguf")
    samples.write_gguf(Path("imatrix.gguf"), {"x": np.zeros(4, np.float32)}, "other")
    before = sorted(p.name for p in tmp_path.iterdir())
    more, error, pattern = REFUSED[how]
    with pytest.raises(error, match=pattern) as raised:
        write(name, **more)
    assert "\n" not in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert list(own_temporary.iterdir()) == []


def test_an_existing_target_is_replaced_only_by_force_and_only_where_it_is_a_bundle(
    write: Callable[..., Path], tmp_path: Path, tiny_path: Path
) -> None:
    for name in ("b", "b.tar"):
        first = write(name)
        before = files_in(tmp_path)
        with pytest.raises(ArgumentError, match="exists already"):
            write(name)
        assert files_in(tmp_path) == before
        write(name, name="other", steering=[vector(name="new") * 0.1], force=True)
        assert check_bundle(first).persona.name == "other"
    assert not (tmp_path / "b/vectors/vector.gguf").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter").write_text("dear")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    (tmp_path / "file").write_text("x")
    for name, pattern in {
        "home": "other files",
        "link": "a link",
        "file": "a file",
        "none/b": "none/b: cannot write",
    }.items():
        with pytest.raises(ArgumentError, match=pattern):
            write(name, force=True)
    for out in (".", "/", ".."):
        with pytest.raises(ArgumentError, match="name a folder to make"):
            write_bundle(out, model=tiny_path, steering=[vector() * 1], name="n", force=True)
    assert (tmp_path / "home/letter").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    write("empty", force=True)
    assert samples.no_leftovers(tmp_path, "b", "b.tar", "empty", "file", "home", "link")


def test_a_model_that_lies_in_the_bundle_is_not_lost_with_it(write: Callable[..., Path], tiny_path: Path) -> None:
    path = write(include_model=True)
    with pytest.raises(ArgumentError, match="lies in the bundle that would be replaced"):
        write(model=path / "model.gguf", force=True)
    write(model=path / "model.gguf", include_model=True, force=True)
    assert (path / "model.gguf").read_bytes() == tiny_path.read_bytes()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["copy_hashed", "rename", "second rename"])
@pytest.mark.parametrize("name", ["b", "b.tar"])
def test_a_full_disk_and_ctrl_c_leave_the_old_bundle_and_nothing_else(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_temporary: Path,
    error: BaseException, where: str, name: str,
) -> None:  # fmt: skip
    path = write(name)
    before = files_in(tmp_path)
    calls = 0
    rename = os.rename

    def fail(*_: Any) -> None:
        raise error

    def fail_second(*names: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        rename(*names)

    if where == "copy_hashed":
        monkeypatch.setattr(archive, "copy_hashed", fail)
    elif name == "b":
        monkeypatch.setattr(os, "rename", fail if where == "rename" else fail_second)
    else:
        monkeypatch.setattr(os, "replace", fail)
    expected = BundleError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as raised:
        write(name, name="other", include_model=True, force=True)
    if isinstance(error, OSError):
        assert str(raised.value) == f"{path}: cannot be written (No space left on device)"
    monkeypatch.undo()
    assert files_in(tmp_path) == before
    assert list(own_temporary.iterdir()) == []


def test_a_file_that_changes_while_it_is_put_into_a_tar_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"before")

    def write() -> None:
        with archive.writing(tmp_path / "b.tar", force=False) as w:
            w.take("f", tmp_path / "f", archive.Counter(None, 0))
            (tmp_path / "f").write_bytes(b"after!")

    with pytest.raises(BundleError, match="changed while it was read"):
        write()
    assert samples.no_leftovers(tmp_path, "f")


# ---- damaged and hostile bundles


def drop_line(folder: Path) -> None:
    lines = (folder / archive.SUMS).read_text().splitlines(keepends=True)
    (folder / archive.SUMS).write_text("".join(line for line in lines if "vectors/" not in line))


def change_byte(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def link_folder(folder: Path) -> None:
    (folder / "vectors").rename(folder.parent / "elsewhere")
    (folder / "vectors").symlink_to(folder.parent / "elsewhere")


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a changed vector": (lambda b: change_byte(b, "vectors/vector.gguf"), "vectors/vector.gguf.*was changed"),
    "a changed card": (lambda b: change_byte(b, "README.md"), "README.md.*was changed"),
    "a changed persona.json": (lambda b: change_byte(b, "persona.json"), "persona.json.*was changed"),
    "a changed model": (lambda b: change_byte(b, "model.gguf"), "model.gguf.*was changed"),
    "a missing vector": (lambda b: (b / "vectors/vector.gguf").unlink(), "vectors/vector.gguf' is missing"),
    "a missing model": (lambda b: (b / "model.gguf").unlink(), "model.gguf' is missing"),
    "a missing persona.json": (lambda b: (b / "persona.json").unlink(), r"not a bundle \(no persona.json\)"),
    "an additional file": (lambda b: (b / "extra.txt").write_text("x"), "extra.txt is not listed in SHA256SUMS"),
    "a hidden file in a folder": (lambda b: (b / "vectors/.x").write_text("x"), "no name for a file of a bundle"),
    "a name with a line break": (lambda b: (b / "a\nb").write_text("x"), "no name for a file of a bundle"),
    "no list of sums": (lambda b: (b / archive.SUMS).unlink(), "SHA256SUMS is missing"),
    "an empty list of sums": (lambda b: (b / archive.SUMS).write_text(""), "persona.json"),
    "a list without a vector": (drop_line, "vector.gguf, which persona.json names, is not listed"),
    "a list that names one file twice": (
        lambda b: (b / archive.SUMS).write_text((b / archive.SUMS).read_text() * 2),
        "SHA256SUMS, line 5",
    ),
    "a list that is none": (lambda b: (b / archive.SUMS).write_text("hello\n"), "SHA256SUMS, line 1"),
    "a list that leads out": (
        lambda b: (b / archive.SUMS).write_text((b / archive.SUMS).read_text() + f"{'0' * 64}  ../secret\n"),
        "'../secret' is missing",
    ),
    "a link to a folder": (link_folder, "'vectors' is no regular file"),
    "a pipe": (lambda b: os.mkfifo(b / "pipe"), "'pipe' is no regular file"),
    "a huge persona.json": (
        lambda b: (b / "persona.json").write_bytes(b" " * (persona.MAX_BYTES + 1)),
        "persona.json has 4194305 bytes",
    ),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_bundle_is_refused_by_the_name_of_what_is_wrong(write: Callable[..., Path], how: str) -> None:
    path = write(include_model=True)
    check_bundle(path)
    damage, pattern = DAMAGED[how]
    damage(path)
    fails(path, pattern)


def member(**attributes: Any) -> Callable[[str, tarfile.TarInfo], None]:
    """Gives the card's tar member other attributes."""

    def change(name: str, info: tarfile.TarInfo) -> None:
        for attribute, value in attributes.items() if name == "README.md" else ():
            setattr(info, attribute, value)

    return change


HOSTILE: dict[str, tuple[Callable[[str, tarfile.TarInfo], None], str]] = {
    "a name above": (member(name="../out"), "'../out' is no name"),
    "a name above in a folder": (member(name="vectors/../../out"), "is no name"),
    "an absolute name": (member(name="/tmp/out"), "is no name"),
    "a name for Windows": (member(name="..\\out"), "is no name"),
    "a drive": (member(name="C:out"), "is no name"),
    "an option for a name": (member(name="-rf"), "is no name"),
    "an empty part": (member(name="vectors//out"), "is no name"),
    "a symbolic link": (member(type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0), "no regular file"),
    "a hard link": (member(type=tarfile.LNKTYPE, linkname="persona.json", size=0), "no regular file"),
    "a device": (member(type=tarfile.CHRTYPE, size=0), "no regular file"),
    "a pipe": (member(type=tarfile.FIFOTYPE, size=0), "no regular file"),
    "a folder": (member(type=tarfile.DIRTYPE, size=0), "no regular file"),
    "a sparse file": (member(pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "99999999999"}), "no regular"),
    "the same name twice": (member(name="persona.json"), "persona.json is in it twice"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_tar_file_is_refused_and_writes_nothing(
    write: Callable[..., Path], model: Model, tmp_path: Path, own_temporary: Path, how: str
) -> None:
    folder = write()
    with ps.load_bundle(as_tar(folder, tmp_path / "sound.tar"), model=model) as b:
        assert b.persona.name == "sunny"
    change, pattern = HOSTILE[how]
    path = as_tar(folder, tmp_path / "hostile.tar", change)
    before = sorted(files_in(tmp_path))
    fails(path, pattern, model=model)
    assert sorted(files_in(tmp_path)) == before
    assert list(own_temporary.iterdir()) == []


def test_a_sound_tar_file_with_one_changed_byte_gives_the_same_persona_or_one_line(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write("sunny.tar")
    data, expected = path.read_bytes(), check_bundle(path).persona
    with tarfile.open(path) as tar:
        heads = [m.offset for m in tar.getmembers()]
    rng = random.Random(0)
    refused = passed = 0
    for trial in range(200):
        broken = bytearray(data)
        at = rng.choice(heads) + rng.randrange(512) if trial % 2 else rng.randrange(len(data))
        broken[at] = rng.randrange(256)
        (tmp_path / "broken.tar").write_bytes(broken if trial % 5 else broken[:at])
        try:
            found = check_bundle(tmp_path / "broken.tar").persona
        except BundleError as e:
            refused += "\n" not in str(e)
        else:
            passed += found == expected
    assert refused + passed == 200
    assert refused > 100


def test_a_truncated_tar_file_is_refused_wherever_it_ends(write: Callable[..., Path], tmp_path: Path) -> None:
    data = write("sunny.tar").read_bytes()
    with tarfile.open(tmp_path / "sunny.tar") as tar:
        last = tar.getmembers()[-1]
        end = last.offset_data + last.size
    for size in (0, 1, 100, 511, 512, 700, end // 2, end - 1):
        (tmp_path / "cut.tar").write_bytes(data[:size])
        fails(tmp_path / "cut.tar", "cut.tar")


def test_what_is_no_bundle_at_all_is_one_line(tiny_path: Path, tmp_path: Path) -> None:
    import gzip

    (tmp_path / "folder").mkdir()
    (tmp_path / "b.tar").write_bytes(gzip.compress(b"x" * 2000))
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "folder", tmp_path / "nothing", tmp_path / "b.tar", tmp_path / "pipe", tiny_path):
        fails(path, "not a bundle|no such")


def test_what_version_control_and_downloads_leave_beside_the_files_does_not_matter(
    write: Callable[..., Path], model: Model, tmp_path: Path
) -> None:
    path = write()
    (path / ".gitattributes").write_text("x")
    (path / ".cache/huggingface").mkdir(parents=True)
    (path / ".cache/huggingface/x").write_text("x")
    (tmp_path / "blob").write_bytes((path / "vectors/vector.gguf").read_bytes())
    (path / "vectors/vector.gguf").unlink()
    (path / "vectors/vector.gguf").symlink_to(tmp_path / "blob")  # as in the Hub's cache
    with ps.load_bundle(path, model=model) as b:
        assert len(b.steering) == 1
    (tmp_path / "blob").write_bytes(b"other")
    fails(path, "was changed", model=model)


def at(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """Puts a value into persona.json."""

    def change(content: dict[str, Any]) -> None:
        place: Any = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a newer schema": (at("schema_version", value=7), "has schema version 7, this personasteer reads up to 1"),
    "no schema": (lambda c: c.pop("schema_version") and c.pop("name"), "name: "),
    "a schema of version 0": (at("schema_version", value=0), "schema_version: "),
    "a field that nobody knows": (at("evil", value=1), "evil: Extra inputs"),
    "a missing field": (lambda c: c["model"].pop("sha256"), "model.sha256: Field required"),
    "an unknown edit": (at("edits", 0, "op", value="explode"), "edits.0: .*explode"),
    "an edit of an unknown field": (at("edits", 0, "evil", value=1), "edits.0.add.evil: "),
    "a strength that is no number": (at("edits", 0, "strength", value=float("nan")), "strength: .*finite"),
    "an infinite strength": (at("edits", 0, "strength", value=float("inf")), "strength: .*finite"),
    "a text for a strength": (at("edits", 0, "strength", value="0.3"), "strength: .*number"),
    "an unknown scope": (at("edits", 0, "scope", value="everywhere"), "scope"),
    "a layer below 0": (at("edits", 0, "layers", value=[-1]), "layers"),
    "a layer that is not there": (at("edits", 0, "layers", value=[4]), "layer 4 is out of range"),
    "an empty schedule": (lambda c: c["edits"][0].update(start=4, stop=4), "the schedule is empty"),
    "a share above 1": (
        at("edits", 0, value={"op": "ablate", "vector": "vectors/vector.gguf", "share": 1.5}), "share: .*1",
    ),
    "thresholds of another length": (
        at("edits", 0, value={"op": "cap", "vector": "vectors/vector.gguf", "tau": [1.0]}), "tau must have one number",
    ),
    "a threshold that is missing": (
        at("edits", 0, value={"op": "cap", "vector": "vectors/vector.gguf", "tau": [1, None, 1, 1]}), "not finite",
    ),
    "an edit of no vector": (at("edits", 0, "vector", value="vectors/other.gguf"), "not among the vectors"),
    "no edits": (at("edits", value=[]), "edits: "),
    "a vector outside": (at("vectors", 0, "file", value="../vector.gguf"), "vectors.0.file: '../vector.gguf'"),
    "an absolute vector": (at("vectors", 0, "file", value="/etc/passwd"), "vectors.0.file"),
    "a model's name with a folder": (at("model", "file_name", value="../../etc/passwd"), "model.file_name: "),
    "a model's name that is a folder": (at("model", "file_name", value=".."), "model.file_name: "),
    "a model outside": (at("model", "file", value="../tiny.gguf"), "model.file: "),
    "a model that is another file": (at("model", "file", value="README.md"), "README.md is not the model"),
    "a report that is not there": (at("reports", value=["reports/x.md"]), "reports/x.md, which persona.json names"),
    "a file that is two things": (at("reports", value=["vectors/vector.gguf"]), "listed twice"),
    "a name of two lines": (at("name", value="a\nb"), "name: must be one line"),
    "a name that a terminal obeys": (at("name", value="\x1b[2J"), "name: must be one line"),
    "a vector of another name": (at("vectors", 0, "name", value="kind"), "is not the vector that persona.json"),
    "a vector of other thresholds": (at("vectors", 0, "thresholds", value=[1.0] * 4), "is not the vector"),
    "a list": (lambda c: c.clear(), "name: Field required"),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_a_persona_json_against_the_rules_is_one_line_that_says_where(
    write: Callable[..., Path], model: Model, how: str
) -> None:
    change, pattern = WRONG[how]
    fails(change_persona(write(), change), pattern, model=model)


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", "null", "[" * 100_000, '{"schema_version": 1e400}', "\xff\xfe", '{"a": "\\ud800"}']
)
def test_a_persona_json_that_is_none_is_one_line(write: Callable[..., Path], text: str) -> None:
    path = write()
    (path / "persona.json").write_bytes(text.encode("latin-1"))
    fails(sign(path), "persona.json: ")


def test_a_vector_file_of_another_model_is_the_bundles_error(write: Callable[..., Path], model: Model) -> None:
    path = write()
    vector(n_embd=32).save(path / "vectors/vector.gguf", strength=0.3)
    fails(sign(path), "width 32, but the model has 4 of width 64", model=model)
    (path / "vectors/vector.gguf").write_bytes(b"GGUFnonsense")
    fails(sign(path), "vector.gguf", model=model)


def test_the_schema_knows_every_scope_and_site() -> None:
    assert get_args(persona.Scope) == SCOPES
    annotation = persona.AblateEntry.model_fields["sites"].annotation
    assert get_args(get_args(annotation)[0]) == SITES


# ---- the card and the Modelfile


def front_matter(path: Path) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    text = (path / "README.md").read_text()
    assert text.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(text.split("\n---\n")[0])
    return found


EVIL = 'a"b: c\n---\nlicense: mit\n# <script>x</script> | `y` [z](http://e) \u2028\x85\x1b[0m {{ 7 * 7 }} \U0001f642'


def test_names_cannot_break_the_front_matter_or_the_markdown(write: Callable[..., Path], tiny_path: Path) -> None:
    more = {"name": EVIL, "description": "- " + EVIL, "license": EVIL, "steering": [vector(name=EVIL) * 0.3]}
    path = write(**more)
    meta = front_matter(path)
    assert meta.keys() == {"library_name", "pipeline_tag", "license", "license_name", "tags"}
    assert (meta["license"], meta["library_name"]) == ("other", "personasteer")
    text = (path / "README.md").read_text()
    assert text.count("\n---\n") == 1
    body = text.split("\n---\n")[1]
    assert "<script>" not in body
    assert "&lt;script&gt;" in body
    assert "\\[z\\](http" in body
    assert "{ 7 \\* 7 \\}" in body
    assert not set("\x1b\x85\u2028") & set(text)
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings[1:] == ["## Run it", "## How strong", "## What was measured", "## Limits"]
    assert headings[0].startswith('# a"b: c --- license: mit \\# ')
    assert "\n\\- a" in body


def test_the_front_matter_says_license_and_base_model_as_the_hub_takes_them(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    assert "license" not in front_matter(write("none"))
    meta = front_matter(write("known", license="Apache-2.0", base_model="a/b"))
    assert (meta["license"], meta["base_model"]) == ("apache-2.0", "a/b")
    meta = front_matter(write("own", license="Acme Model License v2"))
    assert (meta["license"], meta["license_name"]) == ("other", "acme-model-license-v2")
    assert set(meta["tags"]) >= {"personasteer", "gguf", "llama"}
    assert {"apache-2.0", "mit", "gemma", "llama3.2", "other"} <= HUB_LICENSES


def test_license_and_base_model_are_read_from_the_models_metadata(
    tiny_path: Path, tmp_path: Path, write: Callable[..., Path]
) -> None:
    parent = {"general.base_model.0.repo_url": "https://huggingface.co/org/pretrained"}
    own = {"general.repo_url": "https://huggingface.co/org/Model-1.5B"}
    assert hub_id(parent) == "org/pretrained"
    assert hub_id(parent | own) == "org/Model-1.5B"
    assert hub_id({"general.repo_url": "https://example.org/org/model"}) is None
    assert hub_id({}) is None
    with_metadata(tiny_path, tmp_path / "m.gguf", {"general.license": "mit", **own})
    meta = front_matter(write(model=tmp_path / "m.gguf"))
    assert (meta["license"], meta["base_model"]) == ("mit", "org/Model-1.5B")


def with_metadata(path: Path, out: Path, texts: dict[str, str]) -> Path:
    """A copy of a small GGUF with more texts in its metadata."""
    reader = gguf.GGUFReader(path)
    w = gguf.GGUFWriter(str(out), "llama")
    for key, f in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = f.types[0]
            w.add_key_value(key, f.contents(), kind, sub_type=f.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for key, value in texts.items():
        w.add_string(key, value)
    for tensor in reader.tensors:
        w.add_tensor(tensor.name, tensor.data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return out


def summary(**more: Any) -> dict[str, Any]:
    """What `eval --json` prints, as far as a card quotes it."""
    dose = [{"strength": s, "delta": 2 * s, "coherence": 1 - abs(s)} for s in (-0.3, 0.0, 0.3)]
    return {
        "vector": "sunny", "trait": "sun|ny", "model": "tiny", "strength": 0.3, "dose": dose,
        "controls": {"random_p95": 0.11}, "passes": True, **more,
    }  # fmt: skip


def test_reports_are_copied_and_the_card_quotes_what_was_measured(write: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "Evidence 1"
    (folder / "deeper").mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(summary()))
    (folder / "report.md").write_text("# seen")
    (folder / ".hidden").write_text("x")
    (tmp_path / "report.json").write_text(json.dumps({"vectors": [summary(passes=False, vector="dry")]}))
    path = write(reports=[folder, tmp_path / "report.json", folder / "report.md"])
    kept = {name: data for name, data in files_in(path).items() if name.startswith("reports/")}
    assert kept.keys() == {
        "reports/evidence-1/report.json", "reports/evidence-1/report.md", "reports/report.json", "reports/report.md"
    }  # fmt: skip
    assert kept["reports/evidence-1/report.md"] == b"# seen"
    card = (path / "README.md").read_text()
    assert "| sunny | sun\\|ny | tiny | 0.30 | -0.60 | +0.60 | ±0.11 | 0.70 | passes |" in card
    assert "| dry | sun\\|ny | tiny | 0.30 | -0.60 | +0.60 | ±0.11 | 0.70 | does not pass |" in card
    assert "(reports/evidence-1/report.md)" in card
    assert "No evaluation comes with this bundle" not in card
    assert "No evaluation comes with this bundle" in (write("bare") / "README.md").read_text()


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{}", '{"vectors": 3}', json.dumps(summary(strength="x")), json.dumps(summary(dose=[])),
             json.dumps(summary(strength=float("nan"))), json.dumps(summary(vector=[1])), "[" * 100_000]
)  # fmt: skip
def test_a_report_of_another_kind_is_not_quoted(text: str) -> None:
    assert evaluations_in(text.encode()) == []
    assert len(evaluations_in(json.dumps(summary()).encode())) == 1


def test_the_card_says_how_strong_and_on_which_file(write: Callable[..., Path], tiny_path: Path) -> None:
    doses = [{"strength": s, "coherence": 0.75, "kl": 0.125} for s in (0.3, -0.3)] + [{"strength": None}]
    v = vector(strength=0.25, window=(-0.4, 0.45), provenance={"calibration": {"doses": doses}, "method": "pca"})
    card = (write(steering=[v * 0.2]) / "README.md").read_text()
    assert "| vector | `vectors/vector.gguf` | pca | 1-2 | 0.25 | -0.4 to 0.45 | strength 0.2 |" in card
    assert "| -0.30 | 0.75 | 0.125 |\n| +0.30 | 0.75 | 0.125 |\n\n" in card
    assert hashlib.sha256(tiny_path.read_bytes()).hexdigest() in card
    assert "llama, F32" in card
    assert "personasteer bundle chat . -m tiny.gguf -p" in card
    assert "not measured" in (write("raw") / "README.md").read_text()


@pytest.mark.parametrize(
    ("steering", "command"),
    [
        (lambda v: [v * 0.3], "--control-vector vectors/vector.gguf"),
        (lambda v: [v * 0.3, ps.Cap(v)], None),
        (lambda v: [ps.Add(v, 0.3, scope="response")], None),
        (lambda v: [ps.Add(v, 0.3, layers=(1,))], None),
        (lambda v: [ps.Add(v, 0.3, layers=(1, 2))], "--control-vector vectors/vector.gguf"),
        (lambda v: [ps.Add(v, 0.3, keep_norm=True)], None),
        (lambda v: [ps.Add(v, 0.3, stop=5)], None),
        (lambda v: [ps.Add(v, 2.5, raw=True)], None),
        (lambda v: [ps.Add(vector(norms=None), 2.5, raw=True)], "--control-vector-scaled vectors/vector.gguf:2.5"),
        (lambda v: [ps.Add(v.at([0, 1]), 0.3)], None),
        (lambda v: [vector() * 0.3], None),  # of an unknown model: its norms are not this one's
    ],
)
def test_the_card_names_a_control_vector_only_where_llama_cpp_would_do_the_same(
    write: Callable[..., Path], model: Model, steering: Any, command: str | None
) -> None:
    card = (write(steering=steering(vector(provenance=model.origin))) / "README.md").read_text()
    if command is None:
        assert "llama-cli" not in card
        assert "Stock llama.cpp cannot run these edits" in card
    else:
        assert f"llama-cli -m tiny.gguf {command}\n" in card


def test_other_forms_of_the_persona_are_kept_with_their_kind(write: Callable[..., Path], tmp_path: Path) -> None:
    vector().save(tmp_path / "cv.gguf")
    w = gguf.GGUFWriter(str(tmp_path / "lora.gguf"), "llama")
    w.add_string("general.type", "adapter")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    plain, baked = write_tiny_model(tmp_path / "m.gguf", seed=3), tmp_path / "Baked Model.gguf"
    rewrite(ModelFile(plain), baked, fields=[Field.of("personasteer.kind", "bake")])
    forms = [tmp_path / "cv.gguf", tmp_path / "lora.gguf"]

    path = write("plain", shipped=forms)
    assert [(f.file, f.kind) for f in check_bundle(path).persona.files] == [
        ("files/cv.gguf", "control-vector"), ("files/lora.gguf", "lora")
    ]  # fmt: skip
    assert (path / "files/cv.gguf").read_bytes() == (tmp_path / "cv.gguf").read_bytes()
    card = (path / "README.md").read_text()
    assert "llama-cli -m tiny.gguf --lora files/lora.gguf" in card
    assert not (path / "Modelfile").exists()  # no base beside the adapter
    assert "Ollama cannot load control vectors" in card

    path = write("with-base", shipped=forms, include_model=True)
    lines = (path / "Modelfile").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["FROM ./model.gguf", "ADAPTER ./files/lora.gguf"]
    assert "ollama create" in (path / "README.md").read_text()

    path = write("baked", shipped=[*forms, baked], name="x\nFROM evil")
    lines = (path / "Modelfile").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["FROM ./files/baked-model.gguf"]
    assert (path / "files/baked-model.gguf").read_bytes() == baked.read_bytes()
    for made in ("plain", "with-base", "baked"):
        check_bundle(tmp_path / made)


# ---- the command line


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return command


def test_bundle_show_prints_the_persona_and_its_files(write: Callable[..., Path], cli: Any) -> None:
    path = write(steering=edits(), description="Sees [red]the bright side[/red].", license="mit")
    code, out, err = cli("bundle", "show", path, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    shown = json.loads(out)
    assert shown["name"] == "sunny"
    assert [e["op"] for e in shown["edits"]] == ["add", "add", "cap", "floor", "ablate"]
    assert {f["path"]: f["size"] for f in shown["contents"]} == {n: len(d) for n, d in files_in(path).items()}
    code, out, err = cli("bundle", "show", path)
    assert (code, err) == (0, "")
    assert "Sees [red]the bright side[/red]." in out
    assert "tiny.gguf (tiny-random, llama, F32" in out
    assert all(word in out for word in ("add", "cap", "floor", "ablate", "+0.3", "share 0.6", "license: mit"))


def test_bundle_chat_answers_as_the_persona(write: Callable[..., Path], tiny_path: Path, cli: Any) -> None:
    live = [vector() * 0.9]
    path = write(steering=live)
    common = ["-m", tiny_path, "-t", 1, "-c", 256, "-n", 8, "--temp", 0, "-p", "hello"]
    code, out, err = cli("bundle", "chat", path, *common, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    with Model(tiny_path, n_ctx=256, n_parallel=1, n_threads=1) as m:
        expected = m.chat("hello", steer=live, max_tokens=8, temperature=0.0)
        assert expected != m.chat("hello", max_tokens=8, temperature=0.0)
    assert answer["text"] == expected
    assert answer["rho"] == pytest.approx(0.9)
    assert cli("bundle", "chat", path, *common) == (0, expected + "\n", "")


MISTAKES = {
    "no verb": ("bundle", 2, "show"),
    "no message": ("bundle chat sunny", 2, "-p"),
    "no bundle": ("bundle show nowhere", 1, "nowhere: no such folder"),
    "a folder that is none": ("bundle show .", 1, "not a bundle"),
    "a model that is not found": ("bundle chat sunny -p x", 1, "is not included"),
    "another model": ("bundle chat sunny -p x -m other.gguf", 1, "--allow-other-model"),
    "a model that is none": ("bundle chat sunny -p x -m sunny/README.md", 1, "not a GGUF"),
    "a broken grammar": ("bundle chat sunny -p x --grammar-file nowhere", 2, "nowhere"),
}


@pytest.mark.parametrize("how", MISTAKES)
def test_a_mistake_at_the_command_line_is_one_line(
    write: Callable[..., Path], cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write()
    write_tiny_model("other.gguf", seed=1)
    line, expected, pattern = MISTAKES[how]
    code, out, err = cli(*line.split())
    assert code == expected
    if how == "no verb":
        assert pattern in out
        return
    assert out == ""
    assert err.startswith("personasteer: ")
    assert err.count("\n") == 1
    assert pattern in err


# ---- adapters


def test_a_bundle_is_run_with_its_adapters(tiny_path: Path, tmp_path: Path) -> None:
    loras = [write_lora(tmp_path / f"{seed}.gguf", seed=seed) for seed in range(2)]
    given = [(loras[0], 0.5), (loras[1], 1.0)]
    edit = vector() * 0.3
    out = write_bundle(tmp_path / "b.tar", model=tiny_path, steering=[edit], name="x", adapters=given)
    options: dict[str, Any] = {"n_ctx": 256, "n_parallel": 1, "n_threads": 1}
    with Model(tiny_path, lora=given, **options) as m:
        wanted = m.logits(TEXTS, steer=edit)
        with ps.load_bundle(out, model=m) as same:
            assert same.model is m
    with ps.load_bundle(out, model=tiny_path, **options) as b:
        assert [scale for _, scale in b.model.adapters] == [0.5, 1.0]
        got = b.model.logits(TEXTS, steer=b.steering)
    assert all(np.array_equal(x, y) for x, y in zip(got, wanted, strict=True))
    for other in ([], given[:1], given[::-1], [(loras[0], 1.0), given[1]]):
        with (
            Model(tiny_path, lora=other, **options) as m,
            pytest.raises(BundleError, match=r"adapters/0\.gguf \(scale 0"),
        ):
            ps.load_bundle(out, model=m)
    card = check_bundle(out).card
    assert "`adapters/0.gguf` at scale 0.5, `adapters/1.gguf`" in card
    assert "--control-vector" not in card.split("## How strong")[0]


@pytest.mark.parametrize(("scale", "said"), [(float("nan"), "scale"), (1e39, "less than or equal to 10000")])
def test_an_adapter_that_cannot_be_run_is_refused(tiny_path: Path, tmp_path: Path, scale: float, said: str) -> None:
    lora = write_lora(tmp_path / "a.gguf")
    with pytest.raises(ArgumentError, match=said):
        write_bundle(tmp_path / "b", model=tiny_path, steering=[vector() * 0.3], name="x", adapters=[(lora, scale)])
    with pytest.raises(ModelError, match="is no LoRA adapter for 'llama'"):
        write_bundle(tmp_path / "b", model=tiny_path, steering=[vector() * 0.3], name="x", adapters=[(tiny_path, 1.0)])
    assert not (tmp_path / "b").exists()
