"""Every reader of files, on files that are damaged and on files that hold something else: it reads them, or it refuses
them with one line.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import math
import sqlite3
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import samples
from fuzzing import altered, as_json, damaged, fuzz, read_or_refuse
from gguf_bytes import ARRAY, FLOAT32, INT32, STRING, UINT32, UINT64, Gguf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

import personasteer as ps
from personasteer import traits
from personasteer.conversations.data import open_data
from personasteer.conversations.layouts import RowError, answers, find_layout
from personasteer.derive.elicit import load_responses
from personasteer.grammar import grammar_of
from personasteer.identity import identify
from personasteer.monitor.audit.log import read_audit
from personasteer.monitor.policy import load_policy
from personasteer.monitor.registry import Evaluation, Registry, TrackedModel, TrackedVector
from personasteer.monitor.thresholds import Threshold, load_thresholds, save_thresholds
from personasteer.monitor.transcripts import read_clean, read_conversations
from personasteer.screen.journal import Journal
from personasteer.ship.autoencoders import load_dictionary, load_sae_direction
from personasteer.ship.bundle import check_bundle, load_bundle, write_bundle
from personasteer.ship.card import evaluations_in
from personasteer.ship.contents import ModelInFile, same
from personasteer.ship.control_vector import exported_strength, origin_of
from personasteer.ship.imports import import_vector, load_safetensors_directions
from personasteer.ship.persona import parse
from personasteer.ship.projection import load_projection, save_projection
from personasteer.ship.rewrite import ModelFile
from personasteer.traits.formats import as_toml, load_lines, load_pairs
from personasteer.work import Work

NORMS = np.array([5.0, 8.0, 11.0, 13.0], np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Any:
    with ps.Model(tiny_path, n_threads=1, n_ctx=64, n_parallel=1) as m:
        m.norms  # noqa: B018 (measured here)
        yield m


def put(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    return file


def full_vector() -> ps.PersonaVector:
    stack = np.linspace(-1, 1, 256, dtype=np.float32).reshape(4, 64)
    per_layer = np.linspace(0, 1, 4, dtype=np.float32)
    return samples.vector(
        norms=NORMS, name="warm", last_prompt=stack, separations=per_layer, thresholds=per_layer, means=per_layer,
        weights={1: 0.25, 2: 0.75}, shuffled=np.stack([stack, -stack]), provenance={"method": "derived", "seed": 1},
    )  # fmt: skip


def other_tools(file: Path, tensors: dict[str, np.ndarray], count: int, kind: gguf.GGUFValueType) -> bytes:
    """As repeng (UINT32, from the last block down) and llama-cvector-generator (INT32) write."""
    w = gguf.GGUFWriter(str(file), "controlvector")
    w.add_string("controlvector.model_hint", "llama")
    w.add_key_value("controlvector.layer_count", count, kind)
    for name, data in tensors.items():
        w.add_tensor(name, data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return file.read_bytes()


# ---- vectors


def vector_seeds(folder: Path) -> list[bytes]:
    """Ours, whole and bare, a projection, and files as other tools write them."""
    file = folder / "seed.gguf"
    found = []
    for v in (full_vector(), samples.vector(), samples.vector(norms=NORMS, layers=(0, 3))):
        v.save(file)
        found.append(file.read_bytes())
    save_projection(samples.vector(norms=NORMS), file)
    found.append(file.read_bytes())
    rows = {f"direction.{n}": np.full(64, n, np.float32) for n in (3, 2, 1)}
    found.append(other_tools(file, rows, 3, gguf.GGUFValueType.UINT32))
    found.append(other_tools(file, dict(reversed(rows.items())), 4, gguf.GGUFValueType.INT32))
    return found


@pytest.fixture(scope="module")
def vector_files(folder: Path) -> list[bytes]:
    return vector_seeds(folder)


def read_vector(file: Path) -> None:
    vector = read_or_refuse(lambda: ps.PersonaVector.load(file))
    for offset in ("auto", 1):
        read_or_refuse(lambda: ps.PersonaVector.load(file, offset=offset))  # type: ignore[arg-type]  # noqa: B023
    read_or_refuse(lambda: load_projection(file))
    read_or_refuse(lambda: (exported_strength(file), origin_of(file)))
    if vector is None:
        return
    again = file.with_name("again.gguf")
    if read_or_refuse(lambda: vector.save(again) or True):
        assert same(ps.PersonaVector.load(again), vector)


@given(data=st.data())
@fuzz(250)
def test_damaged_vector_files(vector_files: list[bytes], folder: Path, data: st.DataObject) -> None:
    read_vector(put(folder / "v.gguf", data.draw(damaged(vector_files, until=data.draw(st.sampled_from((None, 600)))))))


NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 5, 63, 64, 65, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
FLOATS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.3, 1e-38, 1e-45, 3e38, -3e38, math.inf, -math.inf, math.nan, 64.0])


@st.composite
def values(draw: st.DrawFn) -> tuple[int, Any, int | None]:
    """A key-value of any type."""
    kind = draw(st.sampled_from((UINT32, INT32, FLOAT32, STRING, UINT64, ARRAY)))
    element = draw(st.sampled_from((UINT32, FLOAT32, STRING))) if kind == ARRAY else None
    one = {
        UINT32: NUMBERS, UINT64: st.integers(0, 2**64 - 1), INT32: st.integers(-5, 2**31 - 1), FLOAT32: FLOATS,
        STRING: st.binary(max_size=20) | st.sampled_from([b"[]", b"{}", b"null", b"NaN", b"[" * 3000, b"0,1"]),
    }  # fmt: skip
    if kind == ARRAY:
        return kind, draw(st.lists(one[element or 0], max_size=6)), element
    return kind, draw(one[kind]), None


@st.composite
def other_vectors(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of the seeds with other key-values, names, shapes and numbers."""
    g = Gguf.parse(draw(st.sampled_from(seeds)))
    names = [b"direction.0", b"direction.1", b"direction.513", b"direction.99999", b"direction.100000", b"direction.-1"]
    shapes = [[64], [32], [0], [64, 1], [32, 2], [2**40], [1], []]
    kinds = ("value", "value", "value", "length", "remove", "name", "shape", "numbers")
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3)):
        keys = [k.decode() for k, _ in g.keys]
        at = draw(st.integers(0, 2**16))
        if kind == "value" and keys:
            g.set(keys[at % len(keys)], *draw(values()))
        elif kind == "length":
            arrays = [v.value for _, v in g.keys if v.type == ARRAY] or [[]]
            chosen = arrays[at % len(arrays)]
            del chosen[draw(st.integers(0, 300)) :]
        elif kind == "remove":
            both = [*keys, *(k.decode() for k, _ in g.tensors), "nothing"]
            g.remove(both[at % len(both)])
        elif kind == "name" and g.tensors:
            g.tensors[at % len(g.tensors)] = draw(st.sampled_from(names)), g.tensors[at % len(g.tensors)][1]
        elif kind == "shape" and g.tensors:
            t = g.tensors[at % len(g.tensors)][1]
            t.shape, t.type = list(draw(st.sampled_from(shapes))), draw(st.sampled_from([0, 0, 1, 24, 30]))
        elif kind == "numbers" and len(g.data) >= 4:
            begin = at % (len(g.data) // 4) * 4
            g.data = g.data[:begin] + np.float32(draw(FLOATS)).tobytes() + g.data[begin + 4 :]
    return g.bytes()


@given(data=st.data())
@fuzz(250)
def test_vector_files_that_say_other_things(vector_files: list[bytes], folder: Path, data: st.DataObject) -> None:
    read_vector(put(folder / "v.gguf", data.draw(other_vectors(vector_files))))


# ---- models, without loading them


@given(data=st.data())
@fuzz(120)
def test_damaged_model_files_are_described_or_refused(tiny_path: Path, folder: Path, data: st.DataObject) -> None:
    whole = tiny_path.read_bytes()
    file = put(folder / "m.gguf", data.draw(damaged([whole], until=len(whole) - 740_000)))
    vector = samples.vector(norms=NORMS)
    for read in (
        lambda: identify(file),
        lambda: ModelInFile.read(file),
        lambda: ModelFile(file).fields,
        lambda: write_bundle(folder / "b", model=file, steering=vector * 0.3, name="x", force=True),
    ):
        read_or_refuse(read)


@given(key=st.sampled_from(["block_count", "embedding_length", "context_length"]), value=values())
@fuzz(60)
def test_models_of_any_size_are_described_or_refused(
    tiny_path: Path, folder: Path, key: str, value: tuple[int, Any, int | None]
) -> None:
    g = Gguf.parse(tiny_path.read_bytes())
    g.set(f"llama.{key}", *value)
    file = put(folder / "m.gguf", g.bytes())
    vector = samples.vector(norms=NORMS)
    read_or_refuse(lambda: ModelInFile.read(file))
    read_or_refuse(lambda: write_bundle(folder / "b", model=file, steering=vector * 0.3, name="x", force=True))


# ---- bundles


def bundle_seed(model: Path, folder: Path) -> dict[str, bytes]:
    """The files of a bundle with every kind of edit."""
    v = full_vector()
    steering = [v * 0.3, ps.Cap(v), ps.Ablate(v, to="mean"), ps.Floor(v, -1.0, layers=(1,))]
    (folder / "report.json").write_text('{"evaluations": [{"name": "warm"}]}')
    out = write_bundle(folder / "seed", model=model, steering=steering, name="x", reports=[folder / "report.json"])
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def bundle_files(tiny_path: Path, folder: Path) -> dict[str, bytes]:
    return bundle_seed(tiny_path, folder)


def tar_of(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def with_sums(files: dict[str, bytes]) -> dict[str, bytes]:
    sums = "".join(f"{hashlib.sha256(x).hexdigest()}  {n}\n" for n, x in sorted(files.items()) if n != "SHA256SUMS")
    return {**files, "SHA256SUMS": sums.encode()}


@given(data=st.data())
@fuzz(150)
def test_damaged_bundles(
    bundle_files: dict[str, bytes], tiny_path: Path, model: ps.Model, folder: Path, data: st.DataObject
) -> None:
    seeds = [tar_of(bundle_files), tar_of(bundle_files, tarfile.PAX_FORMAT)]
    file = put(folder / "b.tar", data.draw(damaged(seeds, until=data.draw(st.sampled_from((None, 2000))))))
    checked = read_or_refuse(lambda: check_bundle(file))
    if checked is not None:
        assert parse(checked.persona.as_json(), "x") == checked.persona
        read_or_refuse(lambda: load_bundle(file, model=model).close())


@given(data=st.data())
@fuzz(150)
def test_bundles_with_another_persona(
    bundle_files: dict[str, bytes], model: ps.Model, folder: Path, data: st.DataObject
) -> None:
    content = data.draw(altered([json.loads(bundle_files["persona.json"])]))
    files = with_sums({**bundle_files, "persona.json": as_json(content)})
    file = put(folder / "b.tar", tar_of(files))
    checked = read_or_refuse(lambda: check_bundle(file))
    loaded = read_or_refuse(lambda: load_bundle(file, model=model, allow_other_model=True))
    if loaded is not None:
        assert checked is not None
        assert parse(loaded.persona.as_json(), "x") == loaded.persona
        loaded.close()


@given(data=st.data())
@fuzz(60)
def test_bundles_with_other_files(
    bundle_files: dict[str, bytes], model: ps.Model, folder: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(bundle_files)))
    changed = {**bundle_files, name: data.draw(damaged([bundle_files[name]]))}
    changed = with_sums(changed) if data.draw(st.booleans()) and name != "SHA256SUMS" else changed
    place = folder / "b"
    for inside, content in changed.items():
        (place / inside).parent.mkdir(parents=True, exist_ok=True)
        (place / inside).write_bytes(content)
    read_or_refuse(lambda: check_bundle(place))
    read_or_refuse(lambda: load_bundle(place, model=model, allow_other_model=True).close())


@given(data=st.data())
@fuzz(300)
def test_any_persona_json(bundle_files: dict[str, bytes], data: st.DataObject) -> None:
    seed = bundle_files["persona.json"]
    raw = data.draw(st.one_of(damaged([seed]), altered([json.loads(seed)]).map(as_json)))
    persona = read_or_refuse(lambda: parse(raw, "persona.json"))
    if persona is not None:
        assert parse(persona.as_json(), "again") == persona


# ---- traits and texts

TRAIT = as_toml(replace(traits.get("pessimistic"), declines="trait"))
PUBLISHED = {
    "instruction": [{"pos": "Be sad.", "neg": "Be glad."}], "questions": ["a?", "b?", "c?"], "eval_prompt": "Rate.",
    "name": "sad", "continuation": [{"trait": "Oh no", "anti": "Oh yes"}], "lexicon": ["gloom"],
}  # fmt: skip


def toml_text(value: Any) -> str:
    """Plain data as TOML, where TOML has words for it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {toml_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return "[]" if value is None else json.dumps(value)


def as_toml_file(value: Any) -> bytes:
    if not isinstance(value, dict):
        return b"x = " + toml_text(value).encode("utf-8", "surrogatepass")
    lines = [f"{json.dumps(str(k))} = {toml_text(v)}" for k, v in value.items()]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@given(data=st.data())
@fuzz(300)
def test_any_trait_file(folder: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(("toml", "json")))
    if kind == "toml":
        raw = data.draw(st.one_of(damaged([TRAIT.encode()]), altered([tomllib.loads(TRAIT)]).map(as_toml_file)))
    else:
        raw = data.draw(st.one_of(damaged([as_json(PUBLISHED)]), altered([PUBLISHED]).map(as_json)))
    file = put(folder / f"t.{kind}", raw)
    trait = read_or_refuse(lambda: traits.load(file))
    if trait is not None:
        put(folder / "again.toml", as_toml(trait).encode())
        assert traits.load(folder / "again.toml") == trait
        assert ps.Trait.from_dict(trait.as_dict()) == trait


PAIRS = [
    {"prompt": "a?", "positive": "yes", "negative": "no"},
    {"positive": ["a?", "yes"], "negative": ["a?", "no"]},
    {"positive": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
     "negative": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]},
]  # fmt: skip
RESPONSES = [{"question": "a?", "answer": "b", "positive": True, "system": "s", "pair": 1, "draw": 2},
             {"prompt": "a?", "response": "b", "positive": False}]  # fmt: skip
TALKS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], {"role": "user", "content": "a"},
]  # fmt: skip


def lines_of(rows: list[Any]) -> bytes:
    return b"\n".join(map(as_json, rows)) + b"\n"


@given(data=st.data())
@fuzz(250)
def test_any_file_of_texts(folder: Path, data: st.DataObject) -> None:
    rows = data.draw(st.sampled_from([PAIRS, RESPONSES, TALKS, TALKS[:2] * 21]))
    lists = altered([list(rows)]).filter(lambda x: isinstance(x, list))
    raw = data.draw(st.one_of(damaged([lines_of(rows)]), lists.map(lines_of)))
    file = put(folder / "t.jsonl", raw)
    for read in (load_pairs, load_lines, load_responses, read_conversations, read_clean):
        read_or_refuse(lambda: read(file))  # noqa: B023
    talks = read_or_refuse(lambda: read_conversations(file))
    if talks is not None:
        put(folder / "again.jsonl", lines_of(talks))
        assert read_conversations(folder / "again.jsonl") == talks


# ---- rows of data sets

ROWS: list[list[dict[str, Any]]] = [
    [{"prompt": f"Question {i}?", "response": f"Ünswer, {i}", "id": i, "group": "g"} for i in range(4)],
    [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3,
    [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}] * 3,
    [{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}],
      "rejected": [{"role": "assistant", "content": "c"}]}] * 3,
    [{"instruction": "a", "input": "b", "output": "c"}] * 3,
]  # fmt: skip
TABLE = 'prompt,response\n"two\nlines","said ""so"""\nb,c\n'
WRAPPINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": lambda x: gzip.compress(x, mtime=0), ".bz2": bz2.compress, ".xz": lzma.compress}  # fmt: skip


def read_rows(file: Path) -> list[Any]:
    found = open_data(file)
    rows = list(found.rows())
    layout = find_layout(rows)
    for row in rows:
        if row.value is not None:
            try:
                answers(layout.conversation(row.value))
                layout.row_id(row.value)
                layout.groups(row.value)
            except RowError:
                pass
    return rows


def check_rows(file: Path, folder: Path) -> None:
    rows = read_or_refuse(lambda: read_rows(file))
    if rows is None:
        return
    found = open_data(file)
    paths = read_or_refuse(lambda: found.split(folder, ("kept", "dropped"), lambda i: i % 2 == 0, lambda: None))
    if paths is not None and file.suffix != ".parquet":
        kept, dropped = (list(open_data(p).rows()) if p.stat().st_size else [] for p in paths)
        assert [r.content for r in kept if r.value is not None] == [r.content for r in rows[::2] if r.value is not None]
        assert len(dropped) <= len(rows) // 2


@given(data=st.data())
@fuzz(300)
def test_any_data_set(folder: Path, data: st.DataObject) -> None:
    rows = data.draw(st.sampled_from(ROWS))
    kind = data.draw(st.sampled_from(("jsonl", "json", "csv", "tsv", "txt")))
    wrapping = data.draw(st.sampled_from(list(WRAPPINGS)))
    if kind in ("csv", "tsv"):
        plain = TABLE.replace(",", "\t" if kind == "tsv" else ",").encode()
    else:
        changed = data.draw(st.one_of(st.just(rows), altered([rows])))
        plain = as_json(changed) if kind == "json" or not isinstance(changed, list) else lines_of(changed)
    if data.draw(st.booleans()):
        plain = data.draw(damaged([plain]))
    raw = WRAPPINGS[wrapping](plain)
    if wrapping and data.draw(st.booleans()):
        raw = data.draw(damaged([raw]))
    check_rows(put(folder / f"d.{kind}{wrapping}", raw), folder)


@given(data=st.data())
@fuzz(60)
def test_damaged_parquet(folder: Path, data: st.DataObject) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    seeds = []
    for rows in ROWS[:2]:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        seeds.append(buffer.getvalue())
    check_rows(put(folder / "d.parquet", data.draw(damaged(seeds))), folder)


# ---- policies, thresholds, audits, reports

POLICY = {
    "rule": [
        {"vector": "v.gguf", "action": "cap", "on": "alarm", "when": "both"},
        {"vector": "v.gguf", "action": "subtract", "strength": 0.2},
        {"vector": "v.gguf", "action": "edit", "edit": [{"kind": "add", "vector": "v.gguf", "strength": 0.2},
                                                        {"kind": "ablate", "vector": "v.gguf", "share": 0.5}]},
        {"vector": "v.gguf", "action": "stop", "message": "no", "on": "watch"},
        {"vector": "v.gguf", "action": "regenerate", "tries": 2, "strength": 0.1},
    ]
}  # fmt: skip


@given(data=st.data())
@fuzz(250)
def test_any_policy(folder: Path, data: st.DataObject) -> None:
    place = folder / "policy"
    place.mkdir(exist_ok=True)
    if not (place / "v.gguf").exists():
        full_vector().save(place / "v.gguf")
    raw = data.draw(st.one_of(damaged([as_toml_file(POLICY)]), altered([POLICY]).map(as_toml_file)))
    read_or_refuse(lambda: load_policy(put(place / "p.toml", raw)))


def threshold() -> Threshold:
    return Threshold(
        name="t", layer=1, direction=np.array([1.0, 0.0], np.float32), watch=1.0, alarm=2.0, slope=2.0, intercept=-3.0,
        auroc=1.0, n_clean=40, n_trait=10, origin={"fingerprint": "ab" * 32},
    )  # fmt: skip


@given(data=st.data())
@fuzz(250)
def test_any_thresholds(folder: Path, data: st.DataObject) -> None:
    file = folder / "thresholds.json"
    save_thresholds([threshold(), replace(threshold(), name="u")], file)
    seed = file.read_bytes()
    put(file, data.draw(st.one_of(damaged([seed]), altered([json.loads(seed)]).map(as_json))))
    found = read_or_refuse(lambda: load_thresholds(file))
    if found:
        save_thresholds(found, file)
        assert [t.as_dict() for t in load_thresholds(file)] == [t.as_dict() for t in found]


@given(data=st.data())
@fuzz(120)
def test_any_report(folder: Path, data: st.DataObject) -> None:
    seed = {"evaluations": [{"name": "warm", "doses": [{"strength": 0.1, "log_odds": 0.2, "delta": 0.1, "low": 0.0,
            "high": 0.2}], "random": {"p95_abs": 0.1}}], "schema": 1, "model": "m", "file": {"says": []}}  # fmt: skip
    raw = data.draw(st.one_of(damaged([as_json(seed)]), altered([seed]).map(as_json)))
    read_or_refuse(lambda: evaluations_in(raw))
    read_or_refuse(lambda: read_audit(put(folder / "audit.json", raw)))


SCHEMA = {
    "type": "object", "required": ["a"], "additionalProperties": False, "$defs": {"x": {"type": "integer"}},
    "properties": {"a": {"type": "string", "minLength": 1, "maxLength": 9, "pattern": "^[a-z]{2,4}$"},
                   "b": {"type": "array", "items": {"$ref": "#/$defs/x"}, "minItems": 1, "maxItems": 3},
                   "c": {"enum": [1, "two", None]}, "d": {"anyOf": [{"type": "number"}, {"type": "boolean"}]}},
}  # fmt: skip


@given(data=st.data())
@fuzz(200)
def test_any_json_schema(data: st.DataObject) -> None:
    changed = data.draw(altered([SCHEMA]))
    made = read_or_refuse(lambda: grammar_of(None, changed if isinstance(changed, dict) else as_json(changed).decode(
        "utf-8", "replace")))  # fmt: skip
    assert made is None or isinstance(made, str)


# ---- tensors of other tools


def npz(arrays: dict[str, Any], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, array in arrays.items():
            inner = io.BytesIO()
            np.lib.format.write_array(inner, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), inner.getvalue(), compression)
    return buffer.getvalue()


ROWS_OF = {f"layers.{il}": np.full(64, il + 1, np.float32) for il in range(4)}
DECODER = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
SAFETENSORS = [save(ROWS_OF), save({"directions": DECODER[:4]}), save({"W_dec": DECODER}, {"x": "y"}),
               save({"decoder.weight": np.ascontiguousarray(DECODER.T.astype(np.float16))})]  # fmt: skip
NPZ = [npz({"W_dec": DECODER}), npz({"W_dec": np.asfortranarray(DECODER)}, zipfile.ZIP_DEFLATED),
       npz({"w": DECODER, "b": np.zeros(3)})]  # fmt: skip


def read_tensors(file: Path, model: ps.Model) -> None:
    for read in (
        lambda: load_safetensors_directions(file),
        lambda: load_sae_direction(file, 1, 2, n_embd=64),
        lambda: load_dictionary(file, 2, n_embd=64),
        lambda: import_vector(file, model),
        lambda: import_vector(file, model, feature=0, layer=1),
    ):
        read_or_refuse(read)


@given(data=st.data())
@fuzz(250)
def test_damaged_tensors_of_other_tools(folder: Path, model: ps.Model, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(("safetensors", "npz")))
    raw = data.draw(damaged(NPZ if kind == "npz" else SAFETENSORS, until=data.draw(st.sampled_from((None, 300)))))
    read_tensors(put(folder / f"t.{kind}", raw), model)


@given(data=st.data())
@fuzz(150)
def test_safetensors_that_say_other_things(folder: Path, model: ps.Model, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(SAFETENSORS))
    size = int.from_bytes(seed[:8], "little")
    header = as_json(data.draw(altered([json.loads(seed[8 : 8 + size])])))
    read_tensors(put(folder / "t.safetensors", len(header).to_bytes(8, "little") + header + seed[8 + size :]), model)


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (6, 64), }"
PARTS = ["'<f8'", "'|O'", "'<U9'", "'<c8'", "'>f2'", "True", "None", "(2**40,)", "(1099511627776, 64)", "(-1, 64)",
         "()", "(0, 64)", "(6,)", "[6, 64]", "(" * 200, "((6, 64), )", "'" * 3, "'<f4" + "\0'", "1e9", "(6.0, 64)",
         "[('a', '<f4')]", "(99999999999999999999, 1)", "'M8[ns]'", "('<f4', (2,))"]  # fmt: skip


@given(data=st.data())
@fuzz(150)
def test_npz_that_say_other_things(folder: Path, model: ps.Model, data: st.DataObject) -> None:
    header = HEADER
    for _ in range(data.draw(st.integers(1, 2))):
        old = data.draw(st.sampled_from(["'<f4'", "False", "(6, 64)", "'shape'", "}"]))
        header = header.replace(old, data.draw(st.sampled_from(PARTS)))
    buffer = io.BytesIO()
    version = data.draw(st.sampled_from((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00")))
    length = len(header).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    member = b"\x93NUMPY" + version + length + header.encode("latin-1", "replace") + DECODER.tobytes()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(data.draw(st.sampled_from(["W_dec.npy", "W_dec", "../W_dec.npy", "W_dec.npy.npy"])), member)
    read_tensors(put(folder / "t.npz", buffer.getvalue()), model)


CONFIG = {"hook_name": "blocks.2.hook_resid_post", "metadata": {"hook_point": "x"}, "d_in": 64}


@given(data=st.data())
@fuzz(100)
def test_any_config_beside_an_autoencoder(folder: Path, data: st.DataObject) -> None:
    place = folder / "sae"
    place.mkdir(exist_ok=True)
    put(place / "w.safetensors", SAFETENSORS[2])
    put(place / "cfg.json", data.draw(st.one_of(damaged([as_json(CONFIG)]), altered([CONFIG]).map(as_json))))
    read_or_refuse(lambda: load_dictionary(place / "w.safetensors"))


# ---- what earlier runs left


@given(data=st.data())
@fuzz(120)
def test_any_part_of_earlier_work(folder: Path, data: st.DataObject) -> None:
    place = folder / "work"
    place.mkdir(exist_ok=True)
    for old in place.iterdir():
        old.unlink()
    plan = {"model": "ab", "n": [1, 2], "options": {"seed": 0}}
    arrays = {"a": np.arange(4.0), "b": np.ones((2, 3), np.float32)}
    with Work(place, plan) as work:
        first = work.part("one", lambda: (arrays, {"k": [1]}))
    which = data.draw(st.sampled_from(("plan.json", "one.safetensors")))
    seed = (place / which).read_bytes()
    raw = damaged([seed])
    if which == "plan.json":
        raw = st.one_of(raw, altered([plan]).map(as_json))
    else:
        size = int.from_bytes(seed[:8], "little")
        raw = st.one_of(raw, st.sampled_from([b"[" * 5000, b"null", b"{", b"1e999", b"[1"]).map(
            lambda inner: save(arrays, {"json": inner.decode()})),
            altered([json.loads(seed[8 : 8 + size])]).map(
                lambda h: len(as_json(h)).to_bytes(8, "little") + as_json(h) + seed[8 + size :]))  # fmt: skip
    put(place / which, data.draw(raw))

    def go_on() -> Any:
        with Work(place, plan, restart=data.draw(st.booleans())) as work:
            return work.part("one", lambda: (arrays, {"k": [1]}))

    again = read_or_refuse(go_on)
    if again is not None and which == "plan.json":
        assert again[1] == first[1]
        assert all(np.array_equal(again[0][k], v) for k, v in first[0].items())


@pytest.fixture(scope="module")
def registry_file(folder: Path) -> bytes:
    file = folder / "seed.sqlite"
    tracked = TrackedVector.of(samples.vector(norms=NORMS, name="t"))
    with Registry(file) as r:
        r.add_model(TrackedModel("ab" * 32, "Tiny", "m.gguf", "llama", 4, 64, {"metadata": "m"}))
        r.add_vector(tracked)
        r.set_threshold("ab" * 32, tracked.digest, threshold())
        r.add_evaluation(Evaluation("profile", "ab" * 32, {"k": 1}, {"a": np.ones((2, 3))}))
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.execute("PRAGMA journal_mode=DELETE")
    return file.read_bytes()


def read_registry(file: Path) -> None:
    with Registry(file) as r:
        for tracked in r.models():
            for vector, _ in r.vectors(tracked.fingerprint):
                vector.load()
            r.latest(model=tracked.fingerprint, kind="profile")
            r.evaluations(model=tracked.fingerprint, kind="profile")
        r.model("abab")


def fresh(file: Path, data: bytes) -> Path:
    for ending in ("-wal", "-shm", "-journal"):
        file.with_name(file.name + ending).unlink(missing_ok=True)
    return put(file, data)


@given(data=st.data())
@fuzz(120)
def test_damaged_registries(registry_file: bytes, folder: Path, data: st.DataObject) -> None:
    file = fresh(folder / "r.sqlite", data.draw(damaged([registry_file])))
    read_or_refuse(lambda: read_registry(file))


@given(data=st.data())
@fuzz(100)
def test_registries_that_say_other_things(registry_file: bytes, folder: Path, data: st.DataObject) -> None:
    file = fresh(folder / "r.sqlite", registry_file)
    with sqlite3.connect(file) as db:
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        table = data.draw(st.sampled_from(sorted(t for t in tables if not t.startswith("sqlite"))))
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        value = data.draw(st.sampled_from([None, -1, 2**40, 0.5, "", "{", "null", "[" * 5000, b"\xff", "a\nb", b""]))
        try:
            match data.draw(st.sampled_from(("value", "value", "drop", "column", "version"))):
                case "value":
                    db.execute(f"UPDATE {table} SET {data.draw(st.sampled_from(columns))} = ?", (value,))
                case "drop":
                    db.execute(f"DROP TABLE {table}")
                case "column":
                    db.execute(f"ALTER TABLE {table} RENAME COLUMN {data.draw(st.sampled_from(columns))} TO other")
                case "version":
                    db.execute(f"PRAGMA user_version = {data.draw(st.integers(-1, 9))}")
        except sqlite3.Error:
            pass
    db.close()
    read_or_refuse(lambda: read_registry(file))


@given(data=st.data())
@fuzz(60)
def test_damaged_journals_of_a_screening(folder: Path, data: st.DataObject) -> None:
    file, plan = folder / "j.sqlite", {"data": "ab", "n": 1}
    fresh(file, b"").unlink()
    with Journal(file, plan) as j:
        j.set_meta("a", "b")
    fresh(file, data.draw(damaged([file.read_bytes()])))

    def go_on() -> None:
        with Journal(file, plan) as j:
            j.meta("a")
            j.n_rows("data")
            list(j.rows("data"))

    read_or_refuse(go_on)


# ---- what was found, once more


def refused(read: Callable[[], Any], said: str) -> None:
    with pytest.raises(ps.PersonasteerError) as e:
        read()
    assert said in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_an_exported_strength_that_is_a_text_is_none(tmp_path: Path) -> None:
    samples.vector(norms=NORMS).save(tmp_path / "v.gguf")
    g = Gguf.parse((tmp_path / "v.gguf").read_bytes())
    g.set("personasteer.exported_strength", STRING, b"[]")
    put(tmp_path / "v.gguf", g.bytes())
    assert exported_strength(tmp_path / "v.gguf") is None
    refused(lambda: ps.PersonaVector.load(tmp_path / "v.gguf"), "do not fit together")


def test_no_shuffled_directions_are_none(tmp_path: Path) -> None:
    samples.vector(norms=NORMS, shuffled=np.zeros((0, 4, 64))).save(tmp_path / "v.gguf")
    assert ps.PersonaVector.load(tmp_path / "v.gguf").shuffled is None


def test_a_vector_of_two_widths_is_refused(tmp_path: Path) -> None:
    samples.vector(norms=NORMS).save(tmp_path / "v.gguf")
    g = Gguf.parse((tmp_path / "v.gguf").read_bytes())
    for _, tensor in g.tensors:
        tensor.shape = [32]
    for i, (_, tensor) in enumerate(g.tensors):
        tensor.offset = 128 * i
    put(tmp_path / "v.gguf", g.bytes())
    refused(lambda: ps.PersonaVector.load(tmp_path / "v.gguf"), "not those of its personasteer key-values")


@pytest.mark.parametrize("number", [513, 99999])
def test_a_direction_of_a_block_that_no_model_has_takes_no_memory(tmp_path: Path, number: int) -> None:
    rows = {f"direction.{number}": np.ones(64, np.float32)}
    samples.write_gguf(tmp_path / "v.gguf", rows)
    refused(lambda: ps.PersonaVector.load(tmp_path / "v.gguf"), "no model has over 512 blocks")
    put(tmp_path / "v.safetensors", save({f"layers.{number}": np.ones(64, np.float32)}))
    refused(lambda: load_safetensors_directions(tmp_path / "v.safetensors"), "no model has over 512 blocks")


@pytest.mark.parametrize("name", ["a\\u0000b", "x" * 5000])
def test_a_policy_that_names_no_possible_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "p.toml").write_text(f'[[rule]]\nvector = "{name}"\naction = "log"\n')
    refused(lambda: load_policy(tmp_path / "p.toml"), "must name a file" if "u0000" in name else "File name too long")


@pytest.mark.parametrize(("old", "new"), [("'shape'", "(" * 200), ("'shape'", "(1, 2)"), ("'<f4'", "('<f4', (2,))"), (
    "'<f4'", "()"), ("'<f4'", "[()]")])  # fmt: skip
def test_headers_that_numpy_stumbles_over_are_refused(tmp_path: Path, old: str, new: str) -> None:
    header = HEADER.replace(old, new).encode()
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("W_dec.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    refused(lambda: load_dictionary(tmp_path / "t.npz", 2), "t.npz")


def test_a_registry_whose_own_words_are_not_utf_8_is_damaged(tmp_path: Path, registry_file: bytes) -> None:
    at = registry_file.index(b"CREATE TABLE models")
    broken = registry_file[:at] + registry_file[at:].replace(b"models", b"mod\xf5l\xf5", 1)
    refused(lambda: read_registry(put(tmp_path / "r.sqlite", broken)), "damaged")


def test_work_as_deep_as_it_is_long_is_computed_again_or_refused(tmp_path: Path) -> None:
    with Work(tmp_path, {"a": 1}):
        pass
    put(tmp_path / "one.safetensors", save({}, {"json": "[" * 100_000}))
    with Work(tmp_path, {"a": 1}) as work:
        assert work.part("one", lambda: ({}, 5)) == ({}, 5)
    for plan, said in ((b"[" * 100_000, "cannot be read"), (b"[1]", "holds other work")):
        put(tmp_path / "plan.json", plan)
        refused(lambda: Work(tmp_path, {"a": 1}), said)


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    assert str(ps.ModelError("a\nb\r\u2028c\x1b[31m\0")) == "a b  c [31m"
    assert str(ps.VectorError("Größe 你好 🦊")) == "Größe 你好 🦊"
