"""Tensors in files of other tools, of which only the part that is needed is read: safetensors and npz."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from personasteer.errors import VectorError

FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}  # safetensors' names; numpy has no bfloat16
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
BROKEN = (OSError, EOFError, MemoryError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)


class TensorFile(Protocol):
    """Tensors by name. `take` gives one, or what of it has `index` on side `axis`, as float32: beyond its range
    infinite. Both raise VectorError where the file is broken or holds no floating-point numbers there.
    """

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    def take(self, key: str, axis: int = 0, index: int | None = None) -> NDArray[np.float32]: ...


def kind_of(file: Path) -> str:
    """gguf, safetensors or npz, by the first bytes. Raises VectorError for anything else, pickles by their name."""
    if file.suffix.lower() in PICKLES:
        raise VectorError(
            f"{file}: is a pickle by its name, and reading one can run any code; save its tensors as safetensors"
        )
    try:
        with file.open("rb") as f:
            head = f.read(9)
    except OSError as e:
        raise VectorError(f"{file}: cannot be read ({e.strerror})") from e
    if head[:4] == b"GGUF":
        return "gguf"
    if head[:4] == b"PK\3\4" and file.suffix.lower() == ".npz":
        return "npz"
    if head[8:] == b"{":
        return "safetensors"
    raise VectorError(f"{file}: neither a GGUF file nor safetensors nor npz")


def open_tensors(file: Path, kind: str) -> TensorFile:
    return _Npz(file) if kind == "npz" else _Safetensors(file)


def listed(names: Iterable[str]) -> str:
    """For the end of a message."""
    names = list(names)
    return f"; it holds {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else "; it is empty"


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    start: int  # of the data, from the start of the file


class _Safetensors:
    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            with safe_open(file, "numpy") as f:  # checks the whole header
                self.metadata: Mapping[str, str] = dict(f.metadata() or {})
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(size))
        except (OSError, SafetensorError, ValueError) as e:
            raise VectorError(f"{file}: not readable as safetensors ({getattr(e, 'strerror', None) or e})") from e
        header.pop("__metadata__", None)
        self._entries = {
            key: _Entry(entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
            for key, entry in header.items()
        }
        self.shapes: Mapping[str, tuple[int, ...]] = {key: entry.shape for key, entry in self._entries.items()}

    def take(self, key: str, axis: int = 0, index: int | None = None) -> NDArray[np.float32]:
        entry = self._entries[key]
        if entry.dtype not in FLOATS:
            raise VectorError(f"{self._file}: {key} is {entry.dtype}, not one of {', '.join(FLOATS)}")
        if 0 in entry.shape:
            raise VectorError(f"{self._file}: {key} is empty, its shape is {entry.shape}")
        data = np.memmap(self._file, FLOATS[entry.dtype], "r", entry.start, entry.shape)
        part = _part(data, axis, index)
        if entry.dtype == "BF16":
            part = (part.astype("<u4") << 16).view("<f4")
        return _float32(part)


class _Member(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    start: int  # of the data, from the start of the member


class _Npz:
    def __init__(self, file: Path) -> None:
        self._file = file
        self.metadata: Mapping[str, str] = {}
        self._members: dict[str, _Member] = {}
        try:
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if info.filename.endswith(".npy"):
                        self._members[info.filename.removesuffix(".npy")] = self._header(archive, info)
        except Exception as e:  # numpy raises whatever a malformed header makes it run into
            raise self._unreadable(e) from e
        self.shapes: Mapping[str, tuple[int, ...]] = {key: member.shape for key, member in self._members.items()}

    @staticmethod
    def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
        with archive.open(info) as f:
            version = np.lib.format.read_magic(f)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
            elif version == (2, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(f)
            else:
                raise ValueError(f"version {version} of the npy format")
            if not dtype.hasobject and math.prod(shape) * dtype.itemsize > info.file_size - f.tell():
                raise ValueError(f"{info.filename} is not all there")
            return _Member(shape, fortran, dtype, f.tell())

    def take(self, key: str, axis: int = 0, index: int | None = None) -> NDArray[np.float32]:
        member = self._members[key]
        if member.dtype.kind != "f":
            raise VectorError(f"{self._file}: {key} is {member.dtype}, not floating-point numbers")
        try:
            with zipfile.ZipFile(self._file) as archive, archive.open(f"{key}.npy") as f:
                if index is None or len(member.shape) != 2 or member.fortran != (axis == 1):
                    return _float32(_part(np.lib.format.read_array(f, allow_pickle=False), axis, index))
                n_bytes = member.shape[1 - axis] * member.dtype.itemsize  # its numbers stand together
                f.seek(member.start + index * n_bytes)
                row = f.read(n_bytes)
            if len(row) < n_bytes:
                raise ValueError(f"{key} is not all there")
        except BROKEN as e:
            raise self._unreadable(e) from e
        return _float32(np.frombuffer(row, member.dtype))

    def _unreadable(self, e: Exception) -> VectorError:
        return VectorError(f"{self._file}: not readable as npz ({' '.join(str(e).split()) or type(e).__name__})")


def _part(data: NDArray[Any], axis: int, index: int | None) -> NDArray[Any]:
    return data if index is None else data[index] if axis == 0 else data[:, index]


def _float32(data: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return np.array(data, np.float32)
