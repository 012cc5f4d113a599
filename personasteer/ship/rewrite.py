"""Model files read tensor by tensor and written anew: what is not named stays as it is, byte for byte."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from personasteer._native import load_core
from personasteer.errors import ArgumentError, ModelError, PersonasteerError
from personasteer.files import check_output, replacing
from personasteer.identity import check_model_file
from personasteer.ship.fields import Field, read_fields

CHUNK = 8 * 2**20  # bytes read, or rows of so many float32 numbers held, at a time

Progress: TypeAlias = Callable[[int, int], None]
Rows: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Tensor:
    """Where a tensor stands in its file. type: ggml's name; shape: ggml's order, the row length first."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def n_per_row(self) -> int:
        return self.shape[0]

    @property
    def n_rows(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64))

    @property
    def row_bytes(self) -> int:
        return self.n_bytes // max(self.n_rows, 1)

    @property
    def rows_at_once(self) -> int:
        return max(1, CHUNK // (4 * self.n_per_row))


class ModelFile:
    """The tensors and key-values of a GGUF file, read where they are asked for.

    Raises:
        ModelError: no such file, not a GGUF, truncated, or one part of a split model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = check_model_file(path)
        architecture, _, tensors = load_core().summarize_gguf(os.fsencode(self.path))
        self.architecture: str = architecture.decode("utf-8", "replace")
        self.tensors: dict[str, Tensor] = {}
        size = self.path.stat().st_size
        for label, kind, shape, offset, n_bytes in tensors:
            name = label.decode("utf-8", "replace")
            if offset + n_bytes > size:
                raise ModelError(f"{self.path}: truncated, tensor {name} is not all there")
            if n_bytes <= 0:
                raise ModelError(f"{self.path}: tensor {name} is empty")
            self.tensors[name] = Tensor(name, kind, tuple(shape), offset, n_bytes)
        parts = self.fields.get("split.count", 1)
        if parts not in (0, 1):
            raise ModelError(
                f"{self.path}: is one of {parts} parts of a split model; join them first: "
                "llama-gguf-split --merge FIRST_PART JOINED.gguf"
            )

    @cached_property
    def fields(self) -> dict[str, Any]:
        """All key-values."""
        return read_fields(self.path)

    def hyperparameter(self, name: str) -> int:
        """A number of the architecture, as "block_count". Raises ModelError where the file has none."""
        value = self.fields.get(f"{self.architecture}.{name}")
        if not isinstance(value, int):
            raise ModelError(f"{self.path}: does not say {self.architecture}.{name} as one number")
        return value

    @property
    def n_layer(self) -> int:
        return self.hyperparameter("block_count")

    @property
    def n_embd(self) -> int:
        return self.hyperparameter("embedding_length")

    def raw(self, tensor: Tensor, first: int = 0, count: int | None = None) -> bytes:
        """The bytes of some rows."""
        count = tensor.n_rows - first if count is None else count
        with self.path.open("rb") as f:
            f.seek(tensor.offset + first * tensor.row_bytes)
            data = f.read(count * tensor.row_bytes)
        if len(data) < count * tensor.row_bytes:
            raise ModelError(f"{self.path}: truncated, tensor {tensor.name} is not all there")
        return data

    def rows(self, tensor: Tensor, first: int = 0, count: int | None = None) -> Rows:
        """Some rows as float32, (count, n_per_row)."""
        return dequantized(tensor, self.raw(tensor, first, count))

    def chunks(self, tensor: Tensor, first: int = 0, n_rows: int | None = None) -> Iterator[tuple[int, Rows]]:
        """(index of its first row, rows) of a tensor, or of n_rows of it, a few megabytes at a time."""
        last = tensor.n_rows if n_rows is None else first + n_rows
        for start in range(first, last, tensor.rows_at_once):
            yield start, self.rows(tensor, start, min(tensor.rows_at_once, last - start))


def dequantized(tensor: Tensor, data: bytes) -> Rows:
    """Bytes of whole rows as float32, (rows, n_per_row)."""
    return np.asarray(load_core().dequantize(tensor.type, data, tensor.n_per_row))


def quantized(tensor: Tensor, rows: Rows, importance: Rows | None = None) -> bytes:
    """Rows in the tensor's own type, by ggml's quantizer. Raises ArgumentError where ggml cannot write it so."""
    weights = np.zeros(0, np.float32) if importance is None else importance
    try:
        return bytes(load_core().quantize(tensor.type, rows, weights))
    except ArgumentError as e:
        raise ArgumentError(f"tensor {tensor.name}: {e}") from e


@dataclass(frozen=True)
class Added:
    """A new tensor: ggml's name of its type, its shape in ggml's order, and what yields its bytes."""

    type: str
    shape: tuple[int, ...]
    n_bytes: int
    chunks: Callable[[], Iterator[bytes]]

    @classmethod
    def of(cls, values: NDArray[Any]) -> Added:
        """A float32 vector."""
        data = np.ascontiguousarray(values, "<f4").tobytes()
        return cls("f32", (len(data) // 4,), len(data), lambda: iter([data]))

    @classmethod
    def copy_of(cls, file: ModelFile, tensor: Tensor) -> Added:
        """The bytes of a tensor of a file, once more."""

        def chunks() -> Iterator[bytes]:
            step = max(1, CHUNK // tensor.row_bytes)
            for first in range(0, tensor.n_rows, step):
                yield file.raw(tensor, first, min(step, tensor.n_rows - first))

        return cls(tensor.type, tensor.shape, tensor.n_bytes, chunks)


EditRows: TypeAlias = Callable[[Tensor], Iterator[bytes]]


Piece = TypeVar("Piece")
Made = TypeVar("Made")


def in_parallel(pieces: Iterator[Piece], work: Callable[[Piece], Made], n_threads: int) -> Iterator[Made]:
    """work of each piece, in order, a few pieces at a time: ggml's quantizers leave Python alone meanwhile."""
    with ThreadPoolExecutor(n_threads) as pool:
        waiting = []
        for piece in pieces:
            waiting.append(pool.submit(work, piece))
            if len(waiting) > n_threads:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def rewrite(
    source: ModelFile,
    target: Path,
    *,
    fields: Sequence[Field] = (),
    removed: Sequence[str] = (),
    edits: Mapping[str, EditRows] | None = None,
    added: Mapping[str, Added] | None = None,
    check: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write `source` to `target` with other key-values, some tensors edited and others added behind them.

    Every other tensor keeps its bytes and its place. Streamed, under a temporary name, and renamed when all is there.

    Args:
        fields, removed: key-values set and taken out.
        edits: for a tensor's name, what yields its new bytes, as many as it has.
        added: new tensors.
        check: called with the finished temporary file; what it raises leaves no file.
        progress: called with (bytes written, bytes in all).

    Raises:
        ArgumentError: the target is the source, or cannot be written. PersonasteerError: the disk is full.
    """
    edits, added = edits or {}, added or {}
    new = [(name, tensor.type, list(tensor.shape)) for name, tensor in added.items()]
    core = load_core()
    header, data_offset, n_data, offsets, alignment = core.change_gguf_header(
        os.fsencode(source.path), list(removed), [f.native for f in fields], new
    )
    total = len(header) + n_data + sum(-(-tensor.n_bytes // alignment) * alignment for tensor in added.values())
    check_output(target)
    if target.exists() and target.samefile(source.path):
        raise ArgumentError(f"{target}: is the model itself; write to another file")
    free = shutil.disk_usage(target.resolve().parent).free
    if free < total:
        raise PersonasteerError(f"{target}: needs {total:,} bytes, {free:,} are free")
    done = 0

    def write(out: BinaryIO, data: bytes) -> None:
        nonlocal done
        out.write(data)
        done += len(data)
        if progress:
            progress(done, total)

    def copy(out: BinaryIO, given: BinaryIO, start: int, end: int) -> None:
        given.seek(start)
        while start < end:
            data = given.read(min(CHUNK, end - start))
            if not data:  # the last padding may be missing in the source
                data = bytes(min(CHUNK, end - start))
            write(out, data)
            start += len(data)

    try:
        with replacing(target) as temporary:
            with temporary.open("wb") as out, source.path.open("rb") as given:
                write(out, header)
                at = data_offset
                for tensor in sorted(source.tensors.values(), key=lambda t: t.offset):
                    if tensor.name not in edits:
                        continue
                    copy(out, given, at, tensor.offset)
                    size = 0
                    for data in edits[tensor.name](tensor):
                        write(out, data)
                        size += len(data)
                    if size != tensor.n_bytes:
                        raise ModelError(f"tensor {tensor.name}: {size} bytes were made of {tensor.n_bytes}")
                    at = tensor.offset + size
                copy(out, given, at, data_offset + n_data)
                for offset, new_tensor in zip(offsets, added.values(), strict=True):
                    write(out, bytes(len(header) + offset - done))
                    for data in new_tensor.chunks():
                        write(out, data)
                write(out, bytes((len(header) - done) % alignment))
            if check:
                check(temporary)
    except OSError as e:
        raise PersonasteerError(f"{target}: cannot be written ({e.strerror or e})") from e
