"""Which model a file is: a fingerprint that changes with its weights, tokenizer or template."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from personasteer._native import load_core
from personasteer.errors import ModelError
from personasteer.files import read_cache, write_cache

_EDGE = 64 * 1024


def check_model_file(path: str | os.PathLike[str]) -> Path:
    """The path, when it is a readable file that starts like a GGUF; else ModelError in one line."""
    p = Path(path)
    if p.is_dir():
        raise ModelError(f"{p}: is a folder, not a GGUF file")
    if not p.exists():
        raise ModelError(f"{p}: no such file")
    try:
        with p.open("rb") as f:
            magic = f.read(4)
    except OSError as e:
        raise ModelError(f"{p}: cannot be read ({e.strerror})") from e
    if magic != b"GGUF":
        what = "is empty" if not magic else f"starts with {magic!r}"
        raise ModelError(f"{p}: not a GGUF file ({what} instead of b'GGUF')")
    return p


def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of what makes the model: architecture, its and the tokenizer's metadata with the chat template,
    and of each tensor the name, shape, type and the first and last 64 KiB.

    The file's name, its general.* metadata and the order of key-values of other kinds do not count. Cached by path,
    size and time of change.
    """
    p = check_model_file(path)
    stat = p.stat()
    name = "fingerprints.json"
    key = f"{p.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    known = read_cache(name)
    if isinstance(found := known.get(key), str):
        return found
    architecture, metadata, tensors = load_core().summarize_gguf(os.fsencode(p))
    digest = hashlib.sha256(b"personasteer fingerprint 1\0")
    digest.update(architecture + b"\0" + metadata)
    with p.open("rb") as f:
        for tensor, kind, shape, offset, n_bytes in tensors:
            digest.update(b"\0" + tensor + f"\0{kind}\0{shape}\0".encode())
            f.seek(offset)
            head = f.read(min(_EDGE, n_bytes))
            if len(head) < min(_EDGE, n_bytes):
                raise ModelError(f"{p}: truncated, tensor {tensor.decode(errors='replace')} is not all there")
            digest.update(head)
            if n_bytes > _EDGE:
                f.seek(offset + max(_EDGE, n_bytes - _EDGE))
                tail = f.read(n_bytes - max(_EDGE, n_bytes - _EDGE))
                if len(tail) < n_bytes - max(_EDGE, n_bytes - _EDGE):
                    raise ModelError(f"{p}: truncated, tensor {tensor.decode(errors='replace')} is not all there")
                digest.update(tail)
    result = digest.hexdigest()
    write_cache(name, {**known, key: result})
    return result
