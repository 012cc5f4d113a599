"""The registry of models: what was measured of them and of their vectors, in one SQLite file of the user's."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_data_dir

from personasteer.errors import ArgumentError, RegistryError, VectorError
from personasteer.monitor.thresholds import Threshold
from personasteer.vectors import PersonaVector

APPLICATION = int.from_bytes(b"psrg", "big")  # SQLite's application_id of our files
SCHEMA = 1  # user_version
PATIENCE = 10.0  # seconds that a write waits for another process
LEAST_PREFIX = 4  # digits of a fingerprint that name a model
NUMBERS = ("<f2", "<f4", "<f8")

TABLES = """
CREATE TABLE models (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    fingerprint TEXT NOT NULL UNIQUE,
    label TEXT UNIQUE,
    name TEXT NOT NULL,
    file TEXT NOT NULL,
    architecture TEXT NOT NULL,
    n_layer INTEGER NOT NULL,
    n_embd INTEGER NOT NULL,
    identity TEXT NOT NULL,
    seal TEXT NOT NULL
);
CREATE TABLE vectors (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    digest TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    file BLOB NOT NULL
);
CREATE TABLE thresholds (
    model INTEGER NOT NULL REFERENCES models (id),
    vector INTEGER NOT NULL REFERENCES vectors (id),
    content TEXT,
    seal TEXT NOT NULL,
    PRIMARY KEY (model, vector)
);
CREATE TABLE evaluations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    model INTEGER NOT NULL REFERENCES models (id),
    vector INTEGER REFERENCES vectors (id),
    content TEXT NOT NULL,
    seal TEXT NOT NULL
);
CREATE INDEX evaluations_of ON evaluations (model, kind, vector);
CREATE TABLE arrays (
    evaluation INTEGER NOT NULL REFERENCES evaluations (id),
    name TEXT NOT NULL,
    dtype TEXT NOT NULL,
    shape TEXT NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (evaluation, name)
);
"""


def registry_path() -> Path:
    """Where the registry is: PERSONASTEER_REGISTRY names the file, else it is in the user's data folder."""
    named = os.environ.get("PERSONASTEER_REGISTRY")
    return Path(named) if named else Path(user_data_dir("personasteer"), "registry.sqlite")


@dataclass(frozen=True)
class TrackedModel:
    """A model as the registry knows it.

    Args:
        fingerprint, identity: see personasteer.identity.identify; identity without the fingerprint.
        name: the one in the file. file: its name, without its folder. label: the user's name for it.
    """

    fingerprint: str
    name: str
    file: str
    architecture: str
    n_layer: int
    n_embd: int
    identity: Mapping[str, str] = field(default_factory=dict)
    label: str | None = None

    @property
    def title(self) -> str:
        """The user's name for it, or the file's."""
        return self.label or self.file


@dataclass(frozen=True)
class TrackedVector:
    """A vector as the registry keeps it: the bytes of its own file, which are the same for the same vector."""

    digest: str
    name: str
    file: bytes = field(repr=False)

    @classmethod
    def of(cls, vector: PersonaVector) -> TrackedVector:
        """Raises VectorError for a vector that cannot be written: see save_control_vector."""
        with tempfile.TemporaryDirectory() as folder:
            vector.save(Path(folder, "vector.gguf"))
            content = Path(folder, "vector.gguf").read_bytes()
        return cls(hashlib.sha256(content).hexdigest(), vector.name, content)

    def load(self) -> PersonaVector:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "vector.gguf")
            file.write_bytes(self.file)
            return PersonaVector.load(file)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured of a model, or of a vector on it: plain data, and arrays of 16- to 64-bit floats."""

    kind: str
    model: str  # fingerprint
    content: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    vector: str | None = None  # digest
    number: int = 0  # in the order of insertion; the registry gives it


class Registry:
    """The file, opened; a context manager. Every row carries a digest of its values, which is checked when it is read.

    Writes are transactions: they happen as a whole or, in a process that is killed, not at all; other processes wait
    for each other. A file that is damaged, of another program or of a newer version is left as it is.

    Args:
        path: the file; `registry_path()` when None.
        create: make the file, and its folder, where there is none.
        patience: seconds that a write waits for another process.

    Raises:
        RegistryError: it cannot be opened, read or written. From every method.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, create: bool = True, patience: float = PATIENCE
    ) -> None:
        self.path = Path(path) if path is not None else registry_path()
        self._patience = patience
        self._check_place(create)
        with self._reporting():
            self._db = sqlite3.connect(self.path.absolute(), timeout=patience, isolation_level=None)
            try:
                self._db.execute("PRAGMA foreign_keys = ON")
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def _check_place(self, create: bool) -> None:
        p = self.path
        try:
            if p.is_dir():
                raise RegistryError(f"{p}: is a folder, not a registry of models")
            if p.exists():
                if not p.is_file():
                    raise RegistryError(f"{p}: is a pipe or a device, not a registry of models")
                return
            if not create:
                raise RegistryError(f"{p}: no model is tracked yet; begin with: personasteer track add MODEL")
            p.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise RegistryError(f"{p}: the registry cannot be made here ({e.strerror})") from e

    def _prepare(self) -> None:
        """Check whose file it is; make the tables of an empty one."""
        if not self._known():
            with self.transaction():
                if not self._known():  # another process may have been first
                    for statement in TABLES.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA application_id = {APPLICATION}")
                    self._db.execute(f"PRAGMA user_version = {SCHEMA}")

    def _known(self) -> bool:
        """Whether the file is a registry; False for an empty one. Raises RegistryError for anything else."""
        program, schema, tables = self._db.execute(
            "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master) "
            "FROM pragma_application_id, pragma_user_version"
        ).fetchone()
        if (program, schema, tables) == (0, 0, 0):
            return False
        if program != APPLICATION:
            raise RegistryError(f"{self.path}: is a database of another program, not a registry of models")
        if schema != SCHEMA:
            raise RegistryError(
                f"{self.path}: the registry has schema {schema}, and this version of personasteer reads {SCHEMA}: "
                "use the version that wrote it"
            )
        return True

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a registry is also a context manager."""
        self._db.close()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """SQLite's errors as one RegistryError line."""
        try:
            yield
        except sqlite3.Error as e:
            raise RegistryError(f"{self.path}: {self._reason(e)}") from e
        except UnicodeDecodeError as e:  # in a text, or in SQLite's own words about it
            raise RegistryError(f"{self.path}: {_damaged('a text that is not UTF-8')}") from e

    def _reason(self, e: sqlite3.Error) -> str:
        code = getattr(e, "sqlite_errorcode", 0) & 0xFF  # extended codes add to the primary one
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return _damaged("database" if code == sqlite3.SQLITE_CORRUPT else "not a database")
        return {
            sqlite3.SQLITE_BUSY: f"another process has held the registry for {self._patience:g} s: try again later",
            sqlite3.SQLITE_READONLY: "the registry cannot be written (read-only)",
            sqlite3.SQLITE_FULL: "the registry cannot be written (the disk is full)",
            sqlite3.SQLITE_IOERR: "the registry cannot be read or written (the disk is full, or fails)",
            sqlite3.SQLITE_CANTOPEN: "the registry cannot be opened here (no permission, or read-only)",
        }.get(code, f"the registry cannot be used ({e})")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes of the block, or none. One inside another belongs to the outer one."""
        if self._db.in_transaction:
            yield
            return
        with self._reporting():
            self._db.execute("BEGIN IMMEDIATE")  # waits here, and never for one that waits for this
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """The writes of the block are made and taken back: what would fail later, fails now."""
        with self._reporting():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            finally:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")

    # -- models and vectors -------------------------------------------------------------------------------------------

    def add_model(self, model: TrackedModel) -> None:
        """Add a model, or give a known one its file's name and its label; without a label the old one stays.

        Raises ArgumentError for an empty label, or one that another model has.
        """
        label = model.label
        if label is not None and not label.strip():
            raise ArgumentError("a model's label must not be empty")
        if label is not None and not label.isprintable():
            raise ArgumentError(f"a model's label must be of characters that show, not {label!r}")
        with self.transaction():
            before = self._model_row("fingerprint = ?", model.fingerprint)
            label = label if label is not None else before[1].label if before else None
            owner = self._model_row("label = ?", label) if label is not None else None
            if owner and owner[1].fingerprint != model.fingerprint:
                raise ArgumentError(f"the label {label!r} belongs to another tracked model ({owner[1].file})")
            identity = json.dumps(dict(model.identity), sort_keys=True)
            row = (
                model.fingerprint, label, model.name, model.file, model.architecture, model.n_layer, model.n_embd,
                identity,
            )  # fmt: skip
            self._db.execute(
                "INSERT INTO models (fingerprint, label, name, file, architecture, n_layer, n_embd, identity, seal) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (fingerprint) DO UPDATE SET label = excluded.label, "
                "name = excluded.name, file = excluded.file, seal = excluded.seal",
                (*row, _seal(*row)),
            )

    def models(self) -> list[TrackedModel]:
        """All of them, in the order in which they were added first."""
        return [model for _, model in self._model_rows("TRUE")]

    def model(self, key: str) -> TrackedModel:
        """The model of a label, or whose fingerprint begins like this (four digits or more)."""
        found = self._model_rows("label = ?", key)
        prefix = key.lower()
        if not found and len(prefix) >= LEAST_PREFIX:
            found = self._model_rows("substr(fingerprint, 1, ?) = ?", len(prefix), prefix)
        if len(found) == 1:
            return found[0][1]
        if found:
            raise RegistryError(f"{key!r} is how {len(found)} fingerprints begin: give more of its digits")
        known = ", ".join(f"{m.title!r} ({m.fingerprint[:12]})" for m in self.models()) or "none"
        raise RegistryError(f"no tracked model has the label or fingerprint {key!r}; tracked: {known}")

    def _model_row(self, where: str, *values: Any) -> tuple[int, TrackedModel] | None:
        found = self._model_rows(where, *values)
        return found[0] if found else None

    def _model_rows(self, where: str, *values: Any) -> list[tuple[int, TrackedModel]]:
        rows = self._read(
            "SELECT id, seal, fingerprint, label, name, file, architecture, n_layer, n_embd, identity FROM models "
            f"WHERE {where} ORDER BY id",
            *values,
        )
        out = []
        for number, seal, *row in rows:
            self._check(seal, *row)
            fingerprint, label, name, file, architecture, n_layer, n_embd, identity = row
            known = json.loads(identity)
            out.append((number, TrackedModel(fingerprint, name, file, architecture, n_layer, n_embd, known, label)))
        return out

    def add_vector(self, vector: TrackedVector) -> None:
        """Keep a vector; once, however often it is added."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO vectors (digest, name, file) VALUES (?, ?, ?) ON CONFLICT (digest) DO NOTHING",
                (vector.digest, vector.name, vector.file),
            )

    def set_threshold(self, model: str, vector: str, threshold: Threshold | None) -> None:
        """Track a vector (a digest) on a model (a fingerprint), with its threshold there, if it has one."""
        content = None if threshold is None else json.dumps(threshold.as_dict(), sort_keys=True)
        with self.transaction():
            self._db.execute(
                "INSERT INTO thresholds (model, vector, content, seal) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (model, vector) DO UPDATE SET content = excluded.content, seal = excluded.seal",
                (self._id_of_model(model), self._id_of_vector(vector), content, _seal(model, vector, content)),
            )

    def vectors(self, model: str) -> list[tuple[TrackedVector, Threshold | None]]:
        """The vectors that are tracked on a model (a fingerprint), in the order in which the registry met them."""
        rows = self._read(
            "SELECT v.digest, v.name, v.file, t.content, t.seal FROM thresholds t JOIN vectors v ON v.id = t.vector "
            "JOIN models m ON m.id = t.model WHERE m.fingerprint = ? ORDER BY v.id",
            model,
        )
        out = []
        for digest, name, file, content, seal in rows:
            self._check(seal, model, digest, content)
            if not isinstance(file, bytes) or hashlib.sha256(file).hexdigest() != digest:
                raise RegistryError(f"{self.path}: {_damaged(f'the vector {name!r}')}")
            try:
                threshold = None if content is None else Threshold.from_dict(json.loads(content))
            except VectorError as e:
                raise RegistryError(f"{self.path}: {_damaged('a threshold')} ({e})") from e
            out.append((TrackedVector(digest, str(name), file), threshold))
        return out

    # -- evaluations --------------------------------------------------------------------------------------------------

    def add_evaluation(self, evaluation: Evaluation) -> int:
        """Append an evaluation; its number. Raises RegistryError where its model or vector is not in the registry."""
        content = json.dumps(evaluation.content, sort_keys=True, ensure_ascii=False, allow_nan=False)
        arrays = [_array_row(name, values) for name, values in sorted(evaluation.arrays.items())]
        seal = _seal(evaluation.kind, evaluation.model, evaluation.vector, content, *arrays)
        with self.transaction():
            vector = None if evaluation.vector is None else self._id_of_vector(evaluation.vector)
            cursor = self._db.execute(
                "INSERT INTO evaluations (kind, model, vector, content, seal) VALUES (?, ?, ?, ?, ?)",
                (evaluation.kind, self._id_of_model(evaluation.model), vector, content, seal),
            )
            number = int(cursor.lastrowid or 0)
            self._db.executemany(
                "INSERT INTO arrays (evaluation, name, dtype, shape, data) VALUES (?, ?, ?, ?, ?)",
                [(number, *row) for row in arrays],
            )
        return number

    def evaluations(self, *, model: str, kind: str, vector: str | None = None) -> list[Evaluation]:
        """All evaluations of a kind, of a model (a fingerprint) and a vector (a digest) or none, in their order."""
        return [self._evaluation(*row) for row in self._evaluation_rows(model, kind, vector, "ASC LIMIT -1")]

    def latest(self, *, model: str, kind: str, vector: str | None = None) -> Evaluation | None:
        """The last of `evaluations`."""
        rows = self._evaluation_rows(model, kind, vector, "DESC LIMIT 1")
        return self._evaluation(*rows[0]) if rows else None

    def _evaluation_rows(self, model: str, kind: str, vector: str | None, order: str) -> list[Any]:
        return self._read(
            "SELECT e.id, e.kind, m.fingerprint, v.digest, e.content, e.seal FROM evaluations e "
            "JOIN models m ON m.id = e.model LEFT JOIN vectors v ON v.id = e.vector "
            f"WHERE m.fingerprint = ? AND e.kind = ? AND v.digest IS ? ORDER BY e.id {order}",
            model, kind, vector,
        )  # fmt: skip

    def _evaluation(
        self, number: int, kind: str, model: str, vector: str | None, content: str, seal: str
    ) -> Evaluation:
        rows = self._read("SELECT name, dtype, shape, data FROM arrays WHERE evaluation = ? ORDER BY name", number)
        self._check(seal, kind, model, vector, content, *map(tuple, rows))
        arrays = {name: _array(dtype, shape, data) for name, dtype, shape, data in rows}
        return Evaluation(kind, model, json.loads(content), arrays, vector, number)

    # -- internals ----------------------------------------------------------------------------------------------------

    def _read(self, query: str, *values: Any) -> list[Any]:
        with self._reporting():
            return self._db.execute(query, values).fetchall()

    def _check(self, seal: object, *values: Any) -> None:
        if seal != _seal(*values):
            raise RegistryError(f"{self.path}: {_damaged('a row')}")

    def _id_of_model(self, fingerprint: str) -> int:
        return self._id("models", "fingerprint", fingerprint)

    def _id_of_vector(self, digest: str) -> int:
        return self._id("vectors", "digest", digest)

    def _id(self, table: str, key: str, value: str) -> int:
        rows = self._read(f"SELECT id FROM {table} WHERE {key} = ?", value)
        if not rows:
            raise RegistryError(f"{self.path}: {value[:12]} is not among the {table} of the registry")
        return int(rows[0][0])


def _damaged(what: str) -> str:
    return (
        f"the registry is damaged ({what}); it was left as it is: bring back a copy of it, or move it away and add the "
        "models again"
    )


def _seal(*values: Any) -> str:
    """SHA-256 of a row's values, in which nothing runs together."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, tuple):
            value = _seal(*value)
        data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
        digest.update(f"{type(value).__name__} {len(data)} ".encode() + data)
    return digest.hexdigest()


def _array_row(name: str, values: NDArray[Any]) -> tuple[str, str, str, bytes]:
    """(name, dtype, shape, data), little-endian."""
    data = np.ascontiguousarray(values)
    dtype = data.dtype.newbyteorder("<").str
    if dtype not in NUMBERS:
        raise ArgumentError(f"array {name!r} holds {data.dtype}, not 16- to 64-bit floats")
    return name, dtype, json.dumps(list(data.shape)), data.astype(dtype).tobytes()


def _array(dtype: str, shape: str, data: bytes) -> NDArray[Any]:
    native = np.dtype(dtype).newbyteorder("=")
    return np.frombuffer(data, dtype).reshape(json.loads(shape)).astype(native)
