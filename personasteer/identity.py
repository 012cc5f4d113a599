"""Which model a file is: a fingerprint that changes with its weights, tokenizer or template."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from personasteer._native import load_core
from personasteer.errors import ArgumentError, ModelError
from personasteer.files import read_cache, write_cache

_EDGE = 64 * 1024


def check_model_file(path: str | os.PathLike[str]) -> Path:
    """The path, when it is a readable file that starts like a GGUF; else ModelError in one line."""
    p = Path(path)
    try:
        if p.is_dir():
            raise ModelError(f"{p}: is a folder, not a GGUF file")
        if not p.exists():
            raise ModelError(f"{p}: no such file")
        if not p.is_file():
            raise ModelError(f"{p}: is a pipe or a device, not a GGUF file")
        with p.open("rb") as f:
            magic = f.read(4)
    except OSError as e:
        raise ModelError(f"{p}: cannot be read ({e.strerror})") from e
    if magic != b"GGUF":
        what = "is empty" if not magic else f"starts with {magic!r}"
        raise ModelError(f"{p}: not a GGUF file ({what} instead of b'GGUF')")
    return p


PARTS = {  # of an identity: what another digest of it means
    "metadata": "another tokenizer, template or hyperparameters",
    "tensors": "other tensor shapes or types (quantization)",
    "weights": "other weights",
}


def identify(path: str | os.PathLike[str]) -> dict[str, str]:
    """What makes the model, as hex digests: "fingerprint", the SHA-256 of all of it, and a short one for each part.

    metadata: the architecture, its and the tokenizer's metadata with the chat template. tensors: their names, shapes
    and types. weights: the first and last 64 KiB of each tensor. The file's name, its general.* metadata and the order
    of key-values of other kinds do not count. Cached by path, size and time of change.
    """
    return {part: digest for part, digest in _examine(path).items() if part != "header"}


def header_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a model file's size and of all that stands before its tensors' data. Cached as `identify` is."""
    return _examine(path)["header"]


def _examine(path: str | os.PathLike[str]) -> dict[str, str]:
    p = check_model_file(path)
    stat = p.stat()
    name = "identities.json"
    key = f"{p.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    known = read_cache(name)
    found = known.get(key)
    if isinstance(found, dict) and found.keys() == {"fingerprint", *PARTS, "header"}:
        return found
    architecture, metadata, tensors = load_core().summarize_gguf(os.fsencode(p))
    digests = {part: hashlib.sha256() for part in PARTS}
    digests["metadata"].update(architecture + b"\0" + metadata)
    data = min((start for _, _, _, start, _ in tensors), default=stat.st_size)
    with p.open("rb") as f:
        header = hashlib.sha256(f"{stat.st_size} ".encode() + f.read(data))
        for tensor, kind, shape, offset, n_bytes in tensors:
            digests["tensors"].update(tensor + f"\0{kind}\0{shape}\0".encode())
            for start in (0, max(_EDGE, n_bytes - _EDGE)):
                wanted = min(_EDGE, n_bytes - start)
                if wanted <= 0:
                    continue
                f.seek(offset + start)
                edge = f.read(wanted)
                if len(edge) < wanted:
                    raise ModelError(f"{p}: truncated, tensor {tensor.decode(errors='replace')} is not all there")
                digests["weights"].update(edge)
    whole = hashlib.sha256(b"".join(d.digest() for d in digests.values()))
    result = {"fingerprint": whole.hexdigest()} | {part: d.hexdigest()[:16] for part, d in digests.items()}
    result["header"] = header.hexdigest()
    write_cache(name, {**known, key: result})
    return result


def with_adapters(found: Mapping[str, str], adapters: Sequence[tuple[Path, float]]) -> dict[str, str]:
    """The identity of a model with LoRA adapters applied: another fingerprint, and a part "adapters"."""
    if not adapters:
        return dict(found)
    digest = hashlib.sha256(repr([(identify(file)["fingerprint"], scale) for file, scale in adapters]).encode())
    whole = hashlib.sha256(found["fingerprint"].encode() + digest.digest())
    return {**found, "fingerprint": whole.hexdigest(), "adapters": digest.hexdigest()[:16]}


def differences(first: Mapping[str, str], second: Mapping[str, str]) -> str:
    """In words, what differs between two identities, as far as both say."""
    found = [what for part, what in PARTS.items() if part in first and first[part] != second[part]]
    if first.get("adapters") != second.get("adapters"):
        found.append("other LoRA adapters")
    return ", ".join(found) or "another fingerprint"


def check_alike(base: Any, tuned: Any) -> None:
    """Raise ArgumentError where an open model is no fine-tune of the other: another architecture, shape, vocabulary."""
    for what, a, b in (
        ("architectures", base.architecture, tuned.architecture),
        ("numbers of blocks", base.n_layer, tuned.n_layer),
        ("widths", base.n_embd, tuned.n_embd),
        ("vocabularies", base.n_vocab, tuned.n_vocab),
    ):
        if a != b:
            raise ArgumentError(f"the models have other {what}, {a} and {b}: one is no fine-tune of the other")
    probe = "The quick brown fox: 12 + 7 = 19, naïve café!\n\tdef f(x): return x**2  # Größe, 你好, Привет, مرحبا, 🦊"
    kinds = [{k: m.metadata.get(k) for k in ("tokenizer.ggml.model", "tokenizer.ggml.pre")} for m in (base, tuned)]
    if kinds[0] != kinds[1] or base.tokenize(probe) != tuned.tokenize(probe):
        raise ArgumentError("the models have other tokenizers: one is no fine-tune of the other")
