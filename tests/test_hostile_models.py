"""Model files that are broken, or lie: each is refused in one line, and the process that opens it goes on."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np
import pytest
import samples
from gguf_bytes import ARRAY, BOOL, F32, FLOAT32, INT32, INT64, STRING, UINT8, UINT32, UINT64, Gguf, Tensor, Value

import personasteer as ps
from personasteer import trial
from personasteer.ship.bundle import write_bundle
from personasteer.ship.plain import PlainModel

Change = Callable[[Gguf], bytes | None]
NAN = math.nan


@pytest.fixture
def bounded() -> Iterator[None]:
    with fuzzing.bounds():
        yield


@pytest.fixture(scope="module")
def tiny_bytes(tiny_path: Path) -> bytes:
    return tiny_path.read_bytes()


def made(data: bytes, change: Change) -> bytes:
    """The file after a change, which changes what it is given or returns other bytes."""
    g = Gguf.parse(data)
    found = change(g)
    return g.bytes() if found is None else found


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ps.ModelError) as e:
        ps.Model(path, n_threads=1, n_ctx=64, n_parallel=1, **options).close()
    text = str(e.value)
    assert len(text.splitlines()) == 1, text
    assert path.name in text
    return text


def with_key(key: str, kind: int, value: Any, element: int | None = None) -> Change:
    return lambda g: g.set(key, kind, value, element)


def with_tensor(name: str, **parts: Any) -> Change:
    def change(g: Gguf) -> None:
        for part, value in parts.items():
            setattr(g.tensor(name), part, value)

    return change


def with_part(**parts: Any) -> Change:
    def change(g: Gguf) -> None:
        for part, value in parts.items():
            setattr(g, part, value)

    return change


def without(name: str) -> Change:
    return lambda g: g.remove(name)


def cut(section: str, by: int = 1) -> Change:
    def change(g: Gguf) -> bytes:
        whole = g.bytes()
        return whole[: g.ends[section] - by]

    return change


def put(find: bytes, behind: int, form: str, value: int) -> Change:
    """A number written over what stands so many bytes behind a text of the header."""

    def change(g: Gguf) -> bytes:
        out = bytearray(g.bytes())
        struct.pack_into("<" + form, out, out.index(find) + len(find) + behind, value)
        return bytes(out)

    return change


def doubled(name: str) -> Change:
    def change(g: Gguf) -> None:
        g.keys += [(k, v) for k, v in g.keys if k == name.encode()]
        g.tensors += [(k, t) for k, t in g.tensors if k == name.encode()]

    return change


def filled(name: str, value: float) -> Change:
    """A matrix of one value."""

    def change(g: Gguf) -> None:
        t = g.tensor(name)
        numbers = np.full(math.prod(t.shape), value, "<f4").tobytes()
        g.data = g.data[: t.offset] + numbers + g.data[t.offset + len(numbers) :]

    return change


def tokens(change: Callable[[list[bytes]], Any]) -> Change:
    return lambda g: change(g["tokenizer.ggml.tokens"].value)


def as_architecture(name: str, rotated: int = 16) -> Change:
    """The same file as one of another architecture, which its tensors may not fit."""

    def change(g: Gguf) -> None:
        g.set("llama.rope.dimension_count", UINT32, rotated)
        g.keys = [
            (k.replace(b"llama.", name.encode() + b".", 1) if k.startswith(b"llama.") else k, v) for k, v in g.keys
        ]
        g.set("general.architecture", STRING, name.encode())

    return change


def no_vocabulary(g: Gguf) -> None:
    for part in ("tokens", "scores", "token_type"):
        g[f"tokenizer.ggml.{part}"].value.clear()


# the header is broken: nothing beyond it is looked at
HEADERS: dict[str, Change] = {
    "an empty file": lambda g: b"",
    "four bytes": lambda g: b"GGUF",
    "another magic": with_part(magic=b"GGML"),
    "version 0": with_part(version=0),
    "version 1": with_part(version=1),
    "version 99": with_part(version=99),
    "big-endian": with_part(order=">"),
    "big-endian version": with_part(version=3 << 24),
    "ends in the counts": cut("counts", 5),
    "ends in the key-values": cut("key-values", 7),
    "ends in the first key": lambda g: g.bytes()[:40],
    "ends in the tensors": cut("tensors", 3),
    "ends behind the header": cut("tensors", 0),
    "ends in the data": lambda g: g.bytes()[:-1000],
    "2^64 - 1 tensors": with_part(n_tensors=2**64 - 1),
    "2^40 tensors": with_part(n_tensors=2**40),
    "2^64 - 1 key-values": with_part(n_keys=2**64 - 1),
    "2^62 key-values": with_part(n_keys=2**62),
    "one key-value more than there are": lambda g: setattr(g, "n_keys", len(g.keys) + 1),
    "a key of 2^63 bytes": put(b"GGUF", 20, "Q", 2**63),
    "a key of 2^30 bytes": put(b"GGUF", 20, "Q", 2**30),
    "a text of 2^64 - 1 bytes": put(b"general.name", 4, "Q", 2**64 - 1),
    "a text of 2^31 bytes": put(b"general.name", 4, "Q", 2**31),
    "an array of 2^61 numbers": put(b"tokenizer.ggml.scores", 8, "Q", 2**61),
    "an array of 2^64 - 1 texts": put(b"tokenizer.ggml.tokens", 8, "Q", 2**64 - 1),
    "an array of 2^30 numbers": put(b"tokenizer.ggml.scores", 8, "Q", 2**30),
    "an array of arrays": put(b"tokenizer.ggml.scores", 4, "I", ARRAY),
    "an unknown type of a value": put(b"general.name", 0, "I", 13),
    "a type of a value of 2^32 - 1": put(b"general.name", 0, "I", 2**32 - 1),
    "an empty key": lambda g: g.keys.append((b"", Value(UINT32, 1))),
    "a key twice": doubled("llama.block_count"),
    "a tensor twice": doubled("blk.0.attn_q.weight"),
    "a name of 64 bytes": lambda g: g.tensors.append((b"x" * 64, Tensor([32], F32, len(g.data)))),
    "5 dimensions": with_tensor("output_norm.weight", shape=[64, 1, 1, 1, 1]),
    "2^32 - 1 dimensions": put(b"output_norm.weight", 0, "I", 2**32 - 1),
    "dimensions whose product overflows": with_tensor("output.weight", shape=[2**32, 2**32]),
    "dimensions whose product is 2^64": with_tensor("output.weight", shape=[2**16] * 4),
    "a negative dimension": with_tensor("output.weight", shape=[2**64 - 64, 286]),
    "bytes that overflow": with_tensor("output.weight", shape=[2**61, 2]),
    "an unknown type of a tensor": with_tensor("output.weight", type=200),
    "a type of a tensor of 2^31": with_tensor("output.weight", type=2**31),
    "a removed type of a tensor": with_tensor("output.weight", type=4),
    "a quantized row that is no whole blocks": lambda g: with_tensor("output_norm.weight", type=8, shape=[63])(
        g
    ),  # Q8_0, blocks of 32
    "an offset beyond the file": with_tensor("output.weight", offset=2**40),
    "an offset that overflows": with_tensor("output.weight", offset=2**64 - 32),
    "an offset that is not aligned": with_tensor("output.weight", offset=1),
    "offsets that overlap": with_tensor("output.weight", offset=0),
    "alignment 0": with_key("general.alignment", UINT32, 0),
    "alignment 48": with_key("general.alignment", UINT32, 48),
    "alignment 2^31": with_key("general.alignment", UINT32, 2**31),
    "an alignment that is a text": with_key("general.alignment", STRING, b"32"),
}

# the header is whole, and says what cannot be
CONTENTS: dict[str, Change] = {
    "no architecture": without("general.architecture"),
    "an unknown architecture": with_key("general.architecture", STRING, b"nonsense"),
    "an architecture that is not UTF-8": with_key("general.architecture", STRING, b"\xff\xfe\n"),
    "an architecture that is a number": with_key("general.architecture", UINT32, 1),
    "an architecture of other keys": with_key("general.architecture", STRING, b"gpt2"),
    "a vision projector": with_key("general.architecture", STRING, b"clip"),
    "an encoder": with_key("general.architecture", STRING, b"bert"),
    **{f"no {key}": without(f"llama.{key}") for key in (
        "block_count", "embedding_length", "context_length", "attention.layer_norm_rms_epsilon",
    )},
    **{f"{key} of {name}": with_key(f"llama.{key}", *value) for key in (
        "block_count", "embedding_length", "feed_forward_length", "attention.head_count",
    ) for name, value in {
        "a text": (STRING, b"4"), "a float": (FLOAT32, 4.0), "a negative number": (INT32, -4), "0": (UINT32, 0),
        "2^31": (UINT32, 2**31), "2^32 - 1": (UINT32, 2**32 - 1), "2^63": (UINT64, 2**63), "a flag": (BOOL, 1),
        "an array": (ARRAY, [4] * 4, FLOAT32),
    }.items()},
    **{f"a matrix of whole numbers, {name}": with_tensor(name, type=26) for name in (
        "blk.2.ffn_gate.weight", "blk.3.ffn_up.weight", "token_embd.weight",
    )},
    "another architecture of its keys": as_architecture("olmo2"),
    "an architecture of experts": as_architecture("smallthinker"),
    "heads that rotate too much": as_architecture("internlm2", rotated=7),
    "513 blocks": with_key("llama.block_count", UINT32, 513),
    "one block more": with_key("llama.block_count", UINT32, 5),
    "heads that do not divide": with_key("llama.attention.head_count", UINT32, 3),
    "more heads than numbers": with_key("llama.attention.head_count", UINT32, 2**20),
    "head counts of too few blocks": with_key("llama.attention.head_count", ARRAY, [4, 4], INT32),
    "no key-value heads": with_key("llama.attention.head_count_kv", UINT32, 0),
    "three key-value heads for four": with_key("llama.attention.head_count_kv", UINT32, 3),
    "keys of no width": with_key("llama.attention.key_length", UINT32, 0),
    "values of width 7": with_key("llama.attention.value_length", UINT32, 7),
    "another number of rotated dimensions": with_key("llama.rope.dimension_count", UINT32, 6),
    "more blocks to predict with than there are": with_key("llama.nextn_predict_layers", UINT32, 9),
    "all blocks to predict with": with_key("llama.nextn_predict_layers", UINT32, 4),
    "2^32 - 1 experts": with_key("llama.expert_count", UINT32, 2**32 - 1),
    "8 experts of which none is used": with_key("llama.expert_count", UINT32, 8),
    "2 experts used of none": with_key("llama.expert_used_count", UINT32, 2),
    "an expert group of none": with_key("llama.expert_group_count", UINT32, 3),
    "an epsilon that is not a number": with_key("llama.attention.layer_norm_rms_epsilon", FLOAT32, NAN),
    "a negative epsilon": with_key("llama.attention.layer_norm_rms_epsilon", FLOAT32, -1e-5),
    "an unknown rope scaling": with_key("llama.rope.scaling.type", STRING, b"sideways"),
    "a part of a split model": with_key("split.count", UINT8, 2),
    "a context that is a text": with_key("llama.context_length", STRING, b"\n"),
    "a name with line ends in a key": lambda g: g.keys.append((b"a\nb\rc", Value(UINT32, 1))) or no_vocabulary(g),
    # the vocabulary
    "no vocabulary": no_vocabulary,
    "no tokens": without("tokenizer.ggml.tokens"),
    "no tokenizer": without("tokenizer.ggml.model"),
    "a tokenizer called none": with_key("tokenizer.ggml.model", STRING, b"none"),
    "an unknown tokenizer": with_key("tokenizer.ggml.model", STRING, b"\xff"),
    "a tokenizer that is a number": with_key("tokenizer.ggml.model", UINT32, 1),
    "a tokenizer of pairs without pairs": with_key("tokenizer.ggml.model", STRING, b"gpt2"),
    "a token more than rows": tokens(lambda t: t.append(b"one more")),
    "a token less than rows": tokens(lambda t: t.pop()),
    "3 tokens": tokens(lambda t: t.__delitem__(slice(3, None))),
    "tokens that are all the same": tokens(lambda t: t.__setitem__(slice(None), [b"a"] * len(t))),
    "tokens that are numbers": with_key("tokenizer.ggml.tokens", ARRAY, list(range(286)), UINT32),
    "no scores": lambda g: g["tokenizer.ggml.scores"].value.clear(),
    "fewer types than tokens": lambda g: g["tokenizer.ggml.token_type"].value.__delitem__(-1),
    "scores that are whole numbers": with_key("tokenizer.ggml.scores", ARRAY, [1] * 286, INT64),
    "types that are floats": with_key("tokenizer.ggml.token_type", ARRAY, [1.0] * 286, FLOAT32),
    # the tensors
    **{f"no {name}": without(name) for name in (
        "token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight", "blk.3.ffn_down.weight",
    )},
    "no tensors": lambda g: g.tensors.clear(),
    "a tensor that nobody asks for": lambda g: g.tensors.append((b"extra", Tensor([32], F32, len(g.data)))) or (
        setattr(g, "data", g.data + bytes(128))),
    "embeddings of another width": with_tensor("token_embd.weight", shape=[32, 572]),
    "embeddings that are turned": with_tensor("token_embd.weight", shape=[286, 64]),
    "embeddings of three dimensions": with_tensor("token_embd.weight", shape=[64, 143, 2]),
    "an output of fewer rows": with_tensor("output.weight", shape=[64, 285]),
    "a norm of whole numbers": with_tensor("output_norm.weight", type=26),
    "a matrix of whole numbers": with_tensor("blk.0.attn_q.weight", type=26),
    "a tensor of no numbers": with_tensor("output_norm.weight", shape=[0]),
    "embeddings that are not numbers": filled("token_embd.weight", NAN),
    "a matrix of infinities": filled("blk.1.ffn_down.weight", math.inf),
}  # fmt: skip

# odd, and yet a model: what is said goes, and nothing else happens
HARMLESS: dict[str, Change] = {
    "the end of a text far behind the vocabulary": with_key("tokenizer.ggml.eos_token_id", UINT32, 2**32 - 1),
    "a beginning behind the vocabulary": with_key("tokenizer.ggml.bos_token_id", UINT32, 286),
    "an unknown token behind the vocabulary": with_key("tokenizer.ggml.unknown_token_id", UINT32, 2**31),
    "a block without heads": with_key("llama.attention.head_count", ARRAY, [4, 0, 4, 4], INT32),
    "tokens that are all empty": tokens(lambda t: t.__setitem__(slice(None), [b""] * len(t))),
    "a token that is not UTF-8": tokens(lambda t: t.__setitem__(-1, b"\xff\xfe")),
    "a token of a megabyte": tokens(lambda t: t.__setitem__(-1, b"x" * 2**20)),
    "scores that are not numbers": lambda g: g["tokenizer.ggml.scores"].value.__setitem__(slice(None), [NAN] * 286),
    "unknown types of tokens": lambda g: g["tokenizer.ggml.token_type"].value.__setitem__(slice(259, None), [99] * 27),
    "a name that is not UTF-8": with_key("general.name", STRING, b"\xff\x00\n"),
    "a name that is a number": with_key("general.name", FLOAT32, 1.0),
    "a template that does not parse": with_key("tokenizer.chat_template", STRING, b"{% for"),
    "a template as deep as it is long": with_key("tokenizer.chat_template", STRING, b"{{" + b"(" * 20_000 + b"}}"),
    "a template that is a number": with_key("tokenizer.chat_template", UINT32, 1),
    "an array of no elements": with_key("some.key", ARRAY, [], INT32),
    "a context of 0": with_key("llama.context_length", UINT32, 0),
    "a context of 2^32 - 1": with_key("llama.context_length", UINT32, 2**32 - 1),
    "an infinite rope base": with_key("llama.rope.freq_base", FLOAT32, math.inf),
    "bytes behind the data": lambda g: g.bytes() + b"more",
}


@pytest.mark.parametrize("change", [pytest.param(c, id=name) for name, c in (HEADERS | CONTENTS).items()])
def test_a_broken_model_is_refused_in_one_line(tiny_bytes: bytes, tmp_path: Path, change: Change) -> None:
    (tmp_path / "m.gguf").write_bytes(made(tiny_bytes, change))
    refusal(tmp_path / "m.gguf")


@pytest.mark.parametrize("change", [pytest.param(c, id=name) for name, c in HARMLESS.items()])
def test_an_odd_model_answers_or_is_refused(tiny_bytes: bytes, tmp_path: Path, change: Change) -> None:
    (tmp_path / "m.gguf").write_bytes(made(tiny_bytes, change))

    def use() -> None:
        with ps.Model(tmp_path / "m.gguf", n_threads=1, n_ctx=64, n_parallel=1) as m:
            assert m.generate("ab", max_tokens=2) is not None
            assert len(m.token_bytes(range(m.n_vocab))) == m.n_vocab

    fuzzing.read_or_refuse(use)


def test_the_file_that_all_are_made_from_is_a_model(tiny_bytes: bytes, tmp_path: Path) -> None:
    assert made(tiny_bytes, lambda g: None) == tiny_bytes
    (tmp_path / "m.gguf").write_bytes(tiny_bytes)
    with ps.Model(tmp_path / "m.gguf", n_threads=1, n_ctx=64, n_parallel=1) as m:
        assert m.n_layer == 4


# ---- what llama.cpp ends the process over

ENDS: dict[str, tuple[Change, str]] = {
    "an assertion": (with_key("llama.nextn_predict_layers", UINT32, 9), "GGML_ASSERT(hparams.n_layer_nextn <="),
    "tokens that are the same": (tokens(lambda t: t.__setitem__(-1, t[-2])), "id_to_token.size()"),
}


@pytest.mark.parametrize(("change", "said"), [pytest.param(*c, id=name) for name, c in ENDS.items()])
def test_what_llama_cpp_ends_the_process_over_is_said(
    tiny_bytes: bytes, tmp_path: Path, change: Change, said: str
) -> None:
    (tmp_path / "m.gguf").write_bytes(made(tiny_bytes, change))
    text = refusal(tmp_path / "m.gguf")
    assert "llama.cpp ends the process that opens this file" in text
    assert said in text
    with pytest.raises(ps.ModelError, match="ends the process that opens"):
        PlainModel(tmp_path / "m.gguf", n_ctx=64, n_threads=1)


# ---- the trial


def test_a_file_is_tried_once_and_again_when_its_header_changes(
    tiny_bytes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSONASTEER_CACHE_DIR", str(tmp_path / "cache"))
    tried = []
    real = trial._try
    monkeypatch.setattr(trial, "_try", lambda files, what: tried.append(files) or real(files, what))
    file = tmp_path / "m.gguf"
    file.write_bytes(tiny_bytes)
    first = trial.check_opens(file)
    assert trial.check_opens(file) == first
    (tmp_path / "copy.gguf").write_bytes(tiny_bytes)
    assert trial.check_opens(tmp_path / "copy.gguf") == first
    assert tried == [[file]]
    file.write_bytes(made(tiny_bytes, with_key("general.name", STRING, b"other words")))
    assert trial.check_opens(file) == first  # the same weights, tokenizer and template
    assert tried == [[file]] * 2
    with ps.Model(file, n_threads=1) as m:
        assert m.identity == first
    assert tried == [[file]] * 2


def test_a_refused_file_is_tried_each_time(tiny_bytes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(made(tiny_bytes, ENDS["an assertion"][0]))
    assert refusal(tmp_path / "m.gguf") == refusal(tmp_path / "m.gguf")


def test_where_no_process_can_be_started_a_warning_says_so(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PERSONASTEER_CACHE_DIR", str(tmp_path / "cache"))
    for program, why in (("/nonexistent/python", "No such file"), ("/bin/false", "it ended with 1")):
        monkeypatch.setattr(trial.sys, "executable", program)
        caplog.clear()
        with ps.Model(tiny_path, n_threads=1) as m:
            assert m.generate("ab", max_tokens=1) is not None
        (said,) = [r.getMessage() for r in caplog.records]
        assert "could not be tried out in a process of its own" in said
        assert why in said


def test_a_file_that_does_not_come_to_an_end_is_refused(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSONASTEER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "PATIENCE", 0.0)
    monkeypatch.setattr(trial, "SLOWEST_DISK", 1e12)
    with pytest.raises(ps.ModelError, match=r"does not open this file within 0 s"):
        trial.check_opens(tiny_path)


# ---- the other ways to a model


def test_a_hostile_adapter_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    tensors = {f"blk.0.attn_q.weight.lora_{side}": np.zeros(shape, np.float32) for side, shape in (
        ("a", (2, 64)), ("b", (64, 2)))}  # fmt: skip
    samples.write_gguf(tmp_path / "good.gguf", tensors, "llama")
    g = Gguf.parse((tmp_path / "good.gguf").read_bytes())
    g.set("general.type", STRING, b"adapter")
    g.set("adapter.type", STRING, b"lora")
    g.set("adapter.lora.alpha", FLOAT32, 2.0)
    (tmp_path / "good.gguf").write_bytes(g.bytes())
    options: dict[str, Any] = {"n_threads": 1, "n_ctx": 64, "n_parallel": 1}
    with ps.Model(tiny_path, lora=[tmp_path / "good.gguf"], **options) as m:
        assert m.generate("ab", max_tokens=1) is not None
    changes: dict[str, Change] = {
        "no alpha": without("adapter.lora.alpha"),
        "alpha is a text": with_key("adapter.lora.alpha", STRING, b"2"),
        "one side": without("blk.0.attn_q.weight.lora_b"),
        "turned": with_tensor("blk.0.attn_q.weight.lora_a", shape=[2, 64]),
        "of other ranks": with_tensor("blk.0.attn_q.weight.lora_b", shape=[1, 128]),
        "another architecture": with_key("general.architecture", STRING, b"qwen2"),
        "of whole numbers": with_tensor("blk.0.attn_q.weight.lora_a", type=26),
        "cut": cut("tensors"),
    }
    for name, change in changes.items():
        (tmp_path / "bad.gguf").write_bytes(made(g.bytes(), change))
        if name == "no alpha":  # the ranks alone scale it
            ps.Model(tiny_path, lora=[tmp_path / "bad.gguf"], **options).close()
            continue
        with pytest.raises(ps.ModelError, match=r"bad\.gguf"):
            ps.Model(tiny_path, lora=[tmp_path / "bad.gguf"], **options)


def test_a_bundle_with_a_hostile_model_is_refused(tiny_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(made(tiny_bytes, ENDS["an assertion"][0]))
    vector = samples.vector(norms=np.ones(4, np.float32))
    out = write_bundle(tmp_path / "b", model=tmp_path / "m.gguf", steering=vector * 0.3, name="x", include_model=True)
    with pytest.raises(ps.ModelError, match="ends the process that opens"):
        ps.load_bundle(out, n_threads=1)


@pytest.mark.parametrize(
    "words",
    [
        "chat -m {m} -p hello -n 2",
        "generate -m {m} -p hello -n 2",
        "capture -m {m} -f {text} -o {out}",
        "inspect {vector} -m {m}",
        "export control-vector {vector}:0.3 -m {m} -o {out}",
        "export bake {vector}:0.3 -m {m} -o {out}",
        "verify {m} -m {m} --against {vector}:0.3",
        "audit -m {m} --out {out}",
        "serve -m {m} --port 0 --no-page",
    ],
)
def test_a_command_with_a_hostile_model_ends_with_one_line(
    tiny_bytes: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    from personasteer.cli import run

    (tmp_path / "m.gguf").write_bytes(made(tiny_bytes, ENDS["an assertion"][0]))
    (tmp_path / "text").write_text("one\n")
    samples.vector(norms=np.ones(4, np.float32)).save(tmp_path / "v.gguf")
    places = {"m": tmp_path / "m.gguf", "vector": tmp_path / "v.gguf", "text": tmp_path / "text", "out": tmp_path / "o"}
    assert run(words.format(**places).split()) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert "llama.cpp ends the process" in said[-1]
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "o").exists() or not any((tmp_path / "o").iterdir())


# ---- templates

TEMPLATES = {
    "a loop without end": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "text without end": "{{ 'x' * 999999999999 }}",
    "a number without end": "{{ 9 ** 9 ** 9 ** 9 }}",
    "text that doubles": "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a way out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "another way out": "{{ self.__init__.__globals__ }}",
    "a way through format": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "padding without end": "{{ '%999999999999d' % 1 }}",
    "a width without end": "{{ '{:999999999999}'.format(1) }}",
    "centred text": "{{ 'x' | center(999999999999) }}",
    "joined text": "{{ ('x' | batch(999999999999)) | list }}",
    "a list of ranges": "{{ range(99999) | list * 99999 }}",
    "bytes of an int": "{{ (1).to_bytes(999999999999) }}",
    "zeros": "{{ '1'.zfill(999999999999) }}",
    "justified": "{{ '1'.ljust(999999999999) }}",
    "tabs": "{{ '\t'.expandtabs(999999999) }}",
    "replaced text": "{{ ('x' * 9999).replace('x', 'x' * 9999).replace('x', 'x' * 9999) }}",
    "random words": "{{ lipsum(n=99999999) }}",
    "an error in a filter": "{{ messages | sum }}",
    "attributes of messages": "{{ messages.append(1) }}",
    "a block that doubles": (
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set x %}{{ n.x }}{{ n.x }}{% endset %}"
        "{% set n.x = x %}{% endfor %}"
    ),
    "a sum that doubles": "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a list that doubles": (
        "{% set n = namespace(x=[]) %}{% for i in [1] * 99 %}{% set n.x = n.x + n.x + [1] %}{% endfor %}"
    ),
    "much text many times": "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "a width from outside": "{{ '%*d' % (999999999999, 1) }}",
    "a width from inside": "{{ '{:{}}'.format(1, 999999999999) }}",
    "a formatted filter": "{{ '%999999999999d' | format(1) }}",
    "replaced by a filter": "{% set x = 'x' * 99999 %}{{ x | replace('x', x) | replace('x', x) }}",
    "joined by a method": "{% set x = 'x' * 999999 %}{{ x.join(x) }}",
    "joined by a filter": "{% set x = 'x' * 999999 %}{{ x | list | join(x) }}",
    "translated": "{% set x = 'x' * 999999 %}{{ x.translate({120: x}) }}",
    "indented": "{{ ('\\n' * 999999) | indent(999999, true) }}",
    "shifts": "{{ 1 * (2 ** 63) ** 63 }}",
}


@pytest.mark.parametrize("template", [pytest.param(t, id=name) for name, t in TEMPLATES.items()])
def test_a_hostile_template_takes_neither_memory_nor_time(
    template: str, monkeypatch: pytest.MonkeyPatch, bounded: None
) -> None:
    monkeypatch.setattr("personasteer.chat.PATIENCE", 1.0)
    source = template + "{% for m in messages %}{{ m.content }}{% endfor %}"
    try:
        assert len(ps.ChatTemplate(source).render([{"role": "user", "content": "hi"}])) < 10**6
    except ps.TemplateError as e:
        refused = e
    else:
        return
    assert len(str(refused).splitlines()) == 1
    assert not isinstance(refused.__cause__, MemoryError)
