"""Data sets as rows: JSONL, JSON, CSV, Parquet, compressed or not, and Python objects; read in order, twice."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Protocol

from personasteer.errors import ArgumentError
from personasteer.files import replacing

LONGEST_LINE = 64 * 2**20  # bytes: a line beyond it is a bad row and not a memory
BATCH = 256  # rows of a Parquet file that are in memory at once
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
SUFFIXES = {".gz", ".bz2", ".xz", ".zst", ".zstd"}


@dataclass(frozen=True)
class Row:
    """A row of a data set: its columns, or what is wrong with it; and its own bytes, where the file has lines."""

    value: Mapping[str, Any] | None
    problem: str = ""
    raw: bytes = b""


class Data(Protocol):
    """Rows that can be read again."""

    name: str

    def digest(self) -> str:
        """Changes with the rows."""

    def rows(self) -> Iterator[Row]:
        """All rows in their order. Raises ArgumentError where the file itself breaks off."""

    def split(self, folder: Path, names: tuple[str, str], keeps: Callable[[int], bool]) -> list[Path]:
        """Write the rows whose numbers `keeps` takes to one file, the others to another; their paths."""


def open_data(given: Any) -> Data:
    """A file's path, a list of paths, or an object of rows (a `datasets.Dataset`, a list of dicts).

    Raises ArgumentError for what is none of these, or cannot be opened.
    """
    if isinstance(given, (str, os.PathLike)):
        return _open_file(Path(given))
    if isinstance(given, Sequence) and given and all(isinstance(g, (str, os.PathLike)) for g in given):
        return Files([_open_file(Path(g)) for g in given]) if len(given) > 1 else _open_file(Path(given[0]))
    if isinstance(given, Iterable) and not isinstance(given, (bytes, Mapping)):
        return Objects(list(given) if isinstance(given, Iterator) else given)
    raise ArgumentError(f"data must be a file, or rows such as a datasets.Dataset, not {type(given).__name__}")


class Objects:
    """Rows from Python: each a mapping of columns."""

    name = "rows"

    def __init__(self, given: Iterable[Any]) -> None:
        self._given = given

    def rows(self) -> Iterator[Row]:
        for value in self._given:
            yield Row(value) if isinstance(value, Mapping) else Row(None, f"not a mapping but {type(value).__name__}")

    def digest(self) -> str:
        total = hashlib.sha256()
        for row in self.rows():
            total.update(_as_line(row.value))
        return total.hexdigest()

    def split(self, folder: Path, names: tuple[str, str], keeps: Callable[[int], bool]) -> list[Path]:
        paths = folder / f"{names[0]}.jsonl", folder / f"{names[1]}.jsonl"
        with _two_files(paths) as files:
            for i, row in enumerate(self.rows()):
                files[not keeps(i)].write(_as_line(row.value))
        return list(paths)


def _as_line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"


class Files:
    """Several files, one after the other."""

    def __init__(self, files: Sequence[_File]) -> None:
        self._files = files
        self.name = ", ".join(f.name for f in files)

    def digest(self) -> str:
        return hashlib.sha256("".join(f.digest() for f in self._files).encode()).hexdigest()

    def rows(self) -> Iterator[Row]:
        return chain.from_iterable(f.rows() for f in self._files)

    def split(self, folder: Path, names: tuple[str, str], keeps: Callable[[int], bool]) -> list[Path]:
        paths: list[Path] = []
        first = 0
        for k, f in enumerate(self._files):
            own = (f"{names[0]}-{k}", f"{names[1]}-{k}")
            paths += f.split(folder, own, lambda i, first=first: keeps(first + i))  # type: ignore[misc]
            first += f.n_rows
        return paths


class _File:
    suffix = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.n_rows = 0  # known once they have been read

    def digest(self) -> str:
        total = hashlib.sha256()
        with _readable(self.path), self.path.open("rb") as f:
            while block := f.read(2**20):
                total.update(block)
        return total.hexdigest()

    def rows(self) -> Iterator[Row]:
        n = 0
        with _readable(self.path):
            for row in self._rows():
                n += 1
                yield row
        self.n_rows = n

    def _rows(self) -> Iterator[Row]:
        raise NotImplementedError

    def split(self, folder: Path, names: tuple[str, str], keeps: Callable[[int], bool]) -> list[Path]:
        """Lines as they are, byte for byte, uncompressed."""
        paths = tuple(folder / f"{name}{self.suffix}" for name in names)
        with _two_files(paths) as files:
            for header in self._header():
                for f in files:
                    f.write(header)
            for i, row in enumerate(self.rows()):
                files[not keeps(i)].write(row.raw)
        return list(paths)

    def _header(self) -> list[bytes]:
        return []


class Lines(_File):
    """JSON, one object a line."""

    suffix = ".jsonl"

    def _rows(self) -> Iterator[Row]:
        with _decompressed(self.path) as f:
            while line := f.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    while (more := f.readline(LONGEST_LINE)) and not more.endswith(b"\n"):
                        pass
                    yield Row(None, f"a line of more than {LONGEST_LINE // 2**20} MiB", b"")
                elif line.strip(b" \t\r\n\xef\xbb\xbf"):
                    yield _parsed(line if line.endswith(b"\n") else line + b"\n")


def _parsed(line: bytes) -> Row:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Row(None, "not UTF-8", line)
    except (ValueError, RecursionError):
        return Row(None, "not valid JSON", line)
    if not isinstance(value, dict):
        return Row(None, "not a JSON object", line)
    return Row(value, raw=line)


class Array(_File):
    """One JSON array of objects."""

    suffix = ".jsonl"

    def _rows(self) -> Iterator[Row]:
        with _decompressed(self.path) as f:
            try:
                values = json.loads(f.read().decode("utf-8-sig"))
            except (ValueError, RecursionError) as e:
                raise ArgumentError(f"{self.path}: not valid JSON ({e})") from e
        for value in values:
            line = _as_line(value)
            yield Row(value, raw=line) if isinstance(value, dict) else Row(None, "not a JSON object", line)


class Table(_File):
    """CSV whose first line names the columns; separated by tabs, commas or semicolons, the first that is there."""

    suffix = ".csv"

    def _rows(self) -> Iterator[Row]:
        csv.field_size_limit(LONGEST_LINE)
        with _decompressed(self.path) as f:
            text = io.TextIOWrapper(f, "utf-8-sig", "surrogateescape", newline="")
            lines = _Remembering(text)
            first = next(lines, "")
            self._first = lines.taken()
            delimiter = next((c for c in "\t,;" if c in first), ",")
            names = next(csv.reader([first], delimiter=delimiter), [])
            if not any(names) or len(set(names)) < len(names):
                raise ArgumentError(f"{self.path}: the first line must name the columns, each once")
            reader = csv.reader(lines, delimiter=delimiter)
            while True:
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as e:
                    yield Row(None, f"not valid CSV ({e})", lines.taken())
                    continue
                raw = lines.taken()
                if not fields:
                    continue
                if len(fields) != len(names):
                    yield Row(None, f"{len(fields)} fields instead of {len(names)}", raw)
                elif any("\udc80" <= c <= "\udcff" for field in fields for c in field):
                    yield Row(None, "not UTF-8", raw)
                else:
                    yield Row(dict(zip(names, fields, strict=True)), raw=raw)

    def _header(self) -> list[bytes]:
        next(iter(self.rows()), None)
        return [self._first]


class _Remembering:
    """Lines of a text, and the bytes of those taken since one asked."""

    def __init__(self, text: IO[str]) -> None:
        self._text, self._seen = text, [""]
        self._seen.clear()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._text)
        self._seen.append(line)
        return line

    def taken(self) -> bytes:
        raw = "".join(self._seen).encode("utf-8", "surrogateescape")
        self._seen.clear()
        return raw if raw.endswith(b"\n") or not raw else raw + b"\n"


class Columns(_File):
    """Parquet."""

    suffix = ".parquet"

    def _rows(self) -> Iterator[Row]:
        for batch in self._batches():
            try:
                values = batch.to_pylist()
            except (UnicodeDecodeError, ValueError):
                for i in range(batch.num_rows):
                    yield _one_of(batch, i)
                continue
            for value in values:
                yield Row(value)

    def _batches(self) -> Iterator[Any]:
        pa, pq = arrow()
        try:
            with pq.ParquetFile(self.path) as file:
                yield from file.iter_batches(BATCH)
        except pa.ArrowException as e:
            raise ArgumentError(f"{self.path}: not a whole Parquet file ({str(e).splitlines()[0]:.120})") from e

    def split(self, folder: Path, names: tuple[str, str], keeps: Callable[[int], bool]) -> list[Path]:
        """With the file's own schema."""
        pa, pq = arrow()
        paths = [folder / f"{name}{self.suffix}" for name in names]
        with _readable(self.path), pq.ParquetFile(self.path) as file:
            schema = file.schema_arrow
        first = 0
        with (
            replacing(paths[0]) as a, replacing(paths[1]) as b,
            pq.ParquetWriter(a, schema) as kept, pq.ParquetWriter(b, schema) as others,
        ):  # fmt: skip
            for batch in self._batches():
                mask = pa.array([keeps(first + i) for i in range(batch.num_rows)])
                first += batch.num_rows
                kept.write_batch(batch.filter(mask))
                others.write_batch(batch.filter(pa.compute.invert(mask)))
        self.n_rows = first
        return paths


def _one_of(batch: Any, i: int) -> Row:
    try:
        return Row(batch.slice(i, 1).to_pylist()[0])
    except UnicodeDecodeError:
        return Row(None, "not UTF-8")
    except ValueError as e:
        return Row(None, f"not readable ({e})")


def arrow() -> tuple[Any, Any]:
    """(pyarrow, pyarrow.parquet). Raises ArgumentError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as e:
        raise ArgumentError("screening needs pyarrow: pip install 'personasteer[screen]'") from e
    return pyarrow, pyarrow.parquet


# ---- opening


def _open_file(path: Path) -> _File:
    with _readable(path), _decompressed(path) as f:
        head = f.read(2**16)
    if head[:4] == b"PAR1":
        return Columns(path)
    kind = next((s for s in reversed(path.suffixes) if s.lower() not in SUFFIXES), "").lower()
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        raise ArgumentError(f"{path}: holds no row")
    if kind in (".csv", ".tsv"):
        return Table(path)
    if kind in (".jsonl", ".ndjson"):
        return Lines(path)
    if text[:1] == b"[":
        return Array(path)
    if text[:1] == b"{":
        if kind == ".json" and b"\n" not in text.strip() and len(head) == 2**16:
            raise ArgumentError(f"{path}: one JSON object; data must be an array of rows, or a row a line")
        return Lines(path)
    raise ArgumentError(f"{path}: not JSONL, JSON, CSV or Parquet")


@contextmanager
def _decompressed(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as plain:
        start = plain.read(6)
    kind = next((name for magic, name in MAGIC.items() if start.startswith(magic)), "")
    openers: dict[str, Callable[[Path], Any]] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open, "zstd": _zstd}
    with openers[kind](path) if kind else path.open("rb") as f:
        yield f


def _zstd(path: Path) -> IO[bytes]:
    pa, _ = arrow()
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error) as e:
        raise ArgumentError(f"{path}: its compression breaks off: {e}") from e
    except OSError as e:
        raise ArgumentError(f"{path}: cannot be read ({e.strerror or e})") from e


@contextmanager
def _two_files(paths: Sequence[Path]) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    with replacing(paths[0]) as a, replacing(paths[1]) as b, a.open("wb") as f, b.open("wb") as g:
        yield f, g


def first_rows(data: Data, n: int) -> list[Row]:
    """The first n rows."""
    return list(islice(data.rows(), n))
