"""Data sets as rows: JSONL, JSON, CSV, Parquet, compressed or not, and Python objects; read in order, several times."""

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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Protocol

from personasteer.errors import ArgumentError
from personasteer.extras import arrow
from personasteer.files import replacing

LONGEST_LINE = 64 * 2**20  # bytes: a line beyond it is a bad row and not a memory
BATCH = 256  # rows of a Parquet file that are in memory at once
GROUP = 20_000  # rows of a group that is written
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
SUFFIXES = {".gz", ".bz2", ".xz", ".zst", ".zstd"}

Keeps = Callable[[int], bool]
Check = Callable[[], None]


@dataclass(frozen=True)
class Row:
    """A row of a data set.

    value: its columns, or None, and `problem` says what is wrong; raw: its own bytes, where the file has lines; given:
    what it was, where it is no row.
    """

    value: Mapping[str, Any] | None
    problem: str = ""
    raw: bytes = b""
    given: Any = None

    @property
    def content(self) -> bytes:
        """All that it is."""
        return self.raw or _as_line(self.given if self.value is None else dict(self.value))


class Data(Protocol):
    """Rows that can be read again."""

    @property
    def paths(self) -> list[Path]:
        """The files that they come from."""

    def only(self, columns: Collection[str]) -> None:
        """Read no other columns from now on."""

    def parts(self) -> Sequence[Data]:
        """The data sets that this one is put together from."""

    def digest(self) -> str:
        """Changes with the rows."""

    def rows(self) -> Iterator[Row]:
        """All rows in their order. Raises ArgumentError where the file itself breaks off."""

    def split(self, folder: Path, names: tuple[str, str], keeps: Keeps, check: Check) -> list[Path]:
        """Write the rows whose numbers `keeps` takes to one file, the others to another; their paths. What `check`
        raises at the end leaves nothing written.
        """


def open_data(given: Any) -> Data:
    """A file's path, a list of paths, or an object of rows (a `datasets.Dataset`, a list of dicts).

    Raises ArgumentError for what is none of these, or cannot be opened.
    """
    if isinstance(given, (str, os.PathLike)):
        return _open_file(Path(given))
    if isinstance(given, Sequence) and given and all(isinstance(g, (str, os.PathLike)) for g in given):
        return Files([_open_file(Path(g)) for g in given]) if len(given) > 1 else _open_file(Path(given[0]))
    if isinstance(given, Mapping) and given and not isinstance(given, bytes):
        raise ArgumentError(f"data must be rows, not a mapping: choose one of {', '.join(map(repr, given))!s:.100}")
    if hasattr(given, "to_dict") and hasattr(given, "columns"):
        raise ArgumentError('data must be rows, not a table: pass its .to_dict("records")')
    if isinstance(given, Iterable) and not isinstance(given, (bytes, Mapping)):
        return Objects(list(given) if isinstance(given, Iterator) else given)
    raise ArgumentError(f"data must be a file, or rows such as a datasets.Dataset, not {type(given).__name__}")


class Objects:
    """Rows from Python: each a mapping of columns."""

    def __init__(self, given: Iterable[Any]) -> None:
        self._given = self._read = given
        self._columns: Collection[str] | None = None

    @property
    def paths(self) -> list[Path]:
        return []

    def parts(self) -> Sequence[Data]:
        return [self]

    def only(self, columns: Collection[str]) -> None:
        self._columns = columns
        known = getattr(self._given, "column_names", None)
        if known and hasattr(self._given, "select_columns"):  # others, such as images, are not even decoded
            self._read = self._given.select_columns([c for c in known if c in columns])

    def rows(self) -> Iterator[Row]:
        for value in self._read:
            if not isinstance(value, Mapping):
                yield Row(None, f"not a mapping: {type(value).__name__}", given=value)
            elif self._columns is None:
                yield Row(value)
            else:
                yield Row({column: value[column] for column in self._columns if column in value})

    def digest(self) -> str:
        total = hashlib.sha256()
        for row in self.rows():
            total.update(row.content)
        return total.hexdigest()

    def split(self, folder: Path, names: tuple[str, str], keeps: Keeps, check: Check) -> list[Path]:
        paths = folder / f"{names[0]}.jsonl", folder / f"{names[1]}.jsonl"
        with _two_files(paths, check) as files:
            for i, value in enumerate(self._given):
                files[not keeps(i)].write(_as_line(dict(value) if isinstance(value, Mapping) else value))
        return list(paths)


def _as_line(value: Any) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # what JSON has no words for
        with suppress(ValueError, RecursionError):
            value = repr(value)
        text = json.dumps(value if isinstance(value, str) else type(value).__name__, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


class Files:
    """Several files, one after the other."""

    def __init__(self, files: Sequence[_File]) -> None:
        self._files = files

    @property
    def paths(self) -> list[Path]:
        return [f.path for f in self._files]

    def parts(self) -> Sequence[Data]:
        return self._files

    def only(self, columns: Collection[str]) -> None:
        for f in self._files:
            f.only(columns)

    def digest(self) -> str:
        return hashlib.sha256("".join(f.digest() for f in self._files).encode()).hexdigest()

    def rows(self) -> Iterator[Row]:
        return chain.from_iterable(f.rows() for f in self._files)

    def split(self, folder: Path, names: tuple[str, str], keeps: Keeps, check: Check) -> list[Path]:
        paths: list[Path] = []
        first = 0
        for k, f in enumerate(self._files):
            own = (f"{names[0]}-{k}", f"{names[1]}-{k}")
            paths += f.split(folder, own, lambda i, first=first: keeps(first + i), check)  # type: ignore[misc]
            first += f.n_rows
        return paths


class _File:
    suffix = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_rows = 0  # known once they have been read

    @property
    def paths(self) -> list[Path]:
        return [self.path]

    def parts(self) -> Sequence[Data]:
        return [self]

    def only(self, columns: Collection[str]) -> None:
        pass

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

    def split(self, folder: Path, names: tuple[str, str], keeps: Keeps, check: Check) -> list[Path]:
        """Lines as they are, byte for byte, uncompressed."""
        paths = tuple(folder / f"{name}{self.suffix}" for name in names)
        with _two_files(paths, check) as files:
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
        for line, rest in self._lines():
            if rest is None:
                yield _parsed(line)
                continue
            total = hashlib.sha256(line)
            for piece in rest:
                total.update(piece)
            yield Row(None, f"a line of more than {LONGEST_LINE // 2**20} MiB", given=total.hexdigest())

    def _lines(self) -> Iterator[tuple[bytes, Iterator[bytes] | None]]:
        """Each line that is not blank; of a longer one than LONGEST_LINE the beginning, and its other pieces."""
        with _readable(self.path), _decompressed(self.path) as f:
            while line := f.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    rest = _rest_of_line(f)
                    yield line, rest
                    for _ in rest:
                        pass
                elif line.strip(b" \t\r\n\xef\xbb\xbf"):
                    yield line if line.endswith(b"\n") else line + b"\n", None

    def split(self, folder: Path, names: tuple[str, str], keeps: Keeps, check: Check) -> list[Path]:
        paths = tuple(folder / f"{name}{self.suffix}" for name in names)
        with _two_files(paths, check) as files:
            self.n_rows = 0
            for line, rest in self._lines():
                f = files[not keeps(self.n_rows)]
                f.write(line)
                for piece in rest or ():
                    f.write(piece)
                self.n_rows += 1
        return list(paths)


def _rest_of_line(f: IO[bytes]) -> Iterator[bytes]:
    while piece := f.readline(LONGEST_LINE):
        yield piece
        if piece.endswith(b"\n"):
            return


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
    """One JSON array of objects, which is held in memory as a whole."""

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
    _first = b""

    def _rows(self) -> Iterator[Row]:
        before = csv.field_size_limit(LONGEST_LINE)
        try:
            with (
                _decompressed(self.path) as f,
                io.TextIOWrapper(f, "utf-8-sig", "surrogateescape", newline="") as text,
            ):
                yield from self._records(text)
        finally:
            csv.field_size_limit(before)

    def _records(self, text: IO[str]) -> Iterator[Row]:
        lines = _Remembering(text)
        first = next((line for line in lines if line.strip()), "")
        self._first = lines.taken()
        delimiter = next((c for c in "\t,;" if c in first), ",")
        names = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
        if not any(names) or len(set(names)) < len(names):
            raise ArgumentError(f"{self.path}: the first line must name the columns, each once")
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as e:
                yield Row(None, f"not valid CSV: {e}", lines.taken())
                continue
            raw = lines.taken()
            if not fields:
                continue
            if len(fields) != len(names):
                yield Row(None, f"another number of fields: {len(fields)} instead of {len(names)}", raw)
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
        self._text = text
        self._seen: list[str] = []

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


class _BadCell(str):
    """What is wrong with a cell."""


class Columns(_File):
    """Parquet."""

    suffix = ".parquet"
    _columns: Collection[str] | None = None

    def only(self, columns: Collection[str]) -> None:
        self._columns = columns

    def _rows(self) -> Iterator[Row]:
        for batch in self._batches(self._columns):
            columns = {name: _cells(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
            for i in range(batch.num_rows):
                value = {name: cells[i] for name, cells in columns.items()}
                bad = [cell for cell in value.values() if isinstance(cell, _BadCell)]
                if bad and self._columns is not None:
                    yield Row(None, str(bad[0]), given=repr(value))
                else:
                    yield Row({name: cell for name, cell in value.items() if not isinstance(cell, _BadCell)})

    def _batches(self, columns: Collection[str] | None = None) -> Iterator[Any]:
        pa, pq = parquet()
        try:
            with pq.ParquetFile(self.path) as file:
                names = file.schema_arrow.names
                if len(set(names)) < len(names):
                    raise ArgumentError(f"{self.path}: two columns have the same name")
                chosen = None if columns is None else [name for name in names if name in columns]
                yield from file.iter_batches(BATCH, columns=chosen)
        except pa.ArrowException as e:
            raise ArgumentError(f"{self.path}: not a whole Parquet file ({str(e).splitlines()[0]:.120})") from e

    def split(self, folder: Path, names: tuple[str, str], keeps: Keeps, check: Check) -> list[Path]:
        """With the file's own schema."""
        pa, pq = parquet()
        import pyarrow.compute

        paths = [folder / f"{name}{self.suffix}" for name in names]
        with _readable(self.path), pq.ParquetFile(self.path) as file:
            schema = file.schema_arrow
        self.n_rows = 0
        with (
            replacing(paths[0]) as a, replacing(paths[1]) as b,
            pq.ParquetWriter(a, schema) as kept, pq.ParquetWriter(b, schema) as others,
        ):  # fmt: skip
            sides = _Buffered(pa, kept), _Buffered(pa, others)
            try:
                for batch in self._batches():
                    mask = pa.array([keeps(self.n_rows + i) for i in range(batch.num_rows)])
                    self.n_rows += batch.num_rows
                    sides[0].add(batch.filter(mask))
                    sides[1].add(batch.filter(pyarrow.compute.invert(mask)))
                for side in sides:
                    side.flush()
            except pa.ArrowException as e:
                reason = str(e).splitlines()[0]
                raise ArgumentError(f"{self.path}: pyarrow cannot copy its rows ({reason:.120}); leave out keep") from e
            check()
        return paths


class _Buffered:
    """Writes batches in groups of GROUP rows."""

    def __init__(self, pa: Any, writer: Any) -> None:
        self._pa, self._writer, self._some = pa, writer, list[Any]()

    def add(self, batch: Any) -> None:
        if batch.num_rows:
            self._some.append(batch)
        if sum(b.num_rows for b in self._some) >= GROUP:
            self.flush()

    def flush(self) -> None:
        if self._some:
            self._writer.write_table(self._pa.Table.from_batches(self._some))
            self._some.clear()


def _cells(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except Exception:  # pyarrow raises what the cell's type likes: found out cell by cell
        return [_cell(column[i]) for i in range(len(column))]


def _cell(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return _BadCell("not UTF-8")
    except Exception as e:
        return _BadCell(f"not readable: {type(e).__name__}")


def parquet() -> tuple[Any, Any]:
    """(pyarrow, pyarrow.parquet). Raises ArgumentError where it is not installed."""
    return arrow("data sets in Parquet need", "parquet")


# ---- opening


def _open_file(path: Path) -> _File:
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or a device, which cannot be read twice"
        raise ArgumentError(f"{path}: is {what}; data must be a file")
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
    pa, _ = parquet()
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
def _two_files(paths: Sequence[Path], check: Check) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    with replacing(paths[0]) as a, replacing(paths[1]) as b:
        with a.open("wb") as f, b.open("wb") as g:
            yield f, g
        check()


def first_rows(data: Data, n: int) -> list[Row]:
    """The first n rows."""
    return list(islice(data.rows(), n))
