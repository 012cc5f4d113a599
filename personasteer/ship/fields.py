"""Key-values of GGUF files: what a vector is, written into any file that is made from it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGUFValueType as Type
from numpy.typing import NDArray

from personasteer._native import load_core
from personasteer.errors import PersonasteerError, VectorError
from personasteer.files import replacing
from personasteer.vectors import WINDOW, PersonaVector

ARRAYS = (
    "last_prompt", "norms", "separations", "reliability", "thresholds", "means", "aurocs", "effects", "shuffled",
)  # fmt: skip
NUMBERS: Mapping[Type, np.dtype[Any]] = {
    Type.UINT8: np.dtype("u1"), Type.INT8: np.dtype("i1"), Type.UINT16: np.dtype("u2"), Type.INT16: np.dtype("i2"),
    Type.UINT32: np.dtype("u4"), Type.INT32: np.dtype("i4"), Type.FLOAT32: np.dtype("f4"), Type.BOOL: np.dtype("?"),
    Type.UINT64: np.dtype("u8"), Type.INT64: np.dtype("i8"), Type.FLOAT64: np.dtype("f8"),
}  # fmt: skip


NO_TYPE = 13  # GGUF_TYPE_COUNT


class Field(NamedTuple):
    """A key-value. Arrays have the type ARRAY and the type of their elements."""

    key: str
    type: Type
    value: Any
    element: Type | None = None

    @classmethod
    def of(cls, key: str, value: Any) -> Field:
        """A text, a number (bool, UINT32, FLOAT64), a list of texts, or an array (INT32, FLOAT32)."""
        if isinstance(value, str):
            return cls(key, Type.STRING, value)
        if isinstance(value, bool):
            return cls(key, Type.BOOL, value)
        if isinstance(value, int):
            return cls(key, Type.UINT32, value)
        if isinstance(value, float):
            return cls(key, Type.FLOAT64, value)
        if not isinstance(value, np.ndarray) and all(isinstance(text, str) for text in value):
            return cls(key, Type.ARRAY, list(value), Type.STRING)
        array = np.asarray(value)
        return cls(key, Type.ARRAY, array.ravel().tolist(), Type.INT32 if array.dtype.kind in "iu" else Type.FLOAT32)

    @property
    def native(self) -> tuple[str, int, int, bytes | list[str]]:
        """As the extension takes it."""
        element = int(self.element) if self.element is not None else NO_TYPE
        if self.type is Type.STRING:
            return self.key, int(self.type), element, self.value.encode()
        if self.element is Type.STRING:
            return self.key, int(self.type), element, list(self.value)
        numbers = NUMBERS[self.element or self.type]
        return self.key, int(self.type), element, np.asarray(self.value, numbers).tobytes()


def add_fields(writer: Any, fields: Sequence[Field]) -> None:
    """Put fields into a gguf.GGUFWriter."""
    for f in fields:
        writer.add_key_value(f.key, f.value, f.type, sub_type=f.element)


def read_fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The key-values of a GGUF file: texts, numbers, lists of texts, 1-D arrays. Raises ModelError."""
    return {field.key: field.value for field in typed_fields(path)}


def typed_fields(path: str | os.PathLike[str]) -> list[Field]:
    """The key-values of a GGUF file with their types, in its order. Raises ModelError."""
    found = []
    for key, kind, element, data in load_core().read_gguf_fields(os.fsencode(path)):
        value: Any = None  # of an array of arrays
        if kind == Type.STRING:
            value = data.decode("utf-8", "replace")
        elif isinstance(data, list):
            value = [text.decode("utf-8", "replace") for text in data]
        elif kind != Type.ARRAY:
            value = np.frombuffer(data, NUMBERS[Type(kind)])[0].item()
        elif element != Type.ARRAY:
            value = np.frombuffer(data, NUMBERS[Type(element)])
        name = key.decode("utf-8", "replace")
        found.append(Field(name, Type(kind), value, Type(element) if kind == Type.ARRAY else None))
    return found


def text_of(fields: Mapping[str, Any], key: str, default: str = "") -> str:
    """A key-value that is a text; the default where it is missing or something else."""
    value = fields.get(key)
    return value if isinstance(value, str) else default


def vector_fields(vector: PersonaVector, rho: float) -> list[Field]:
    """All of a vector, as key-values "personasteer.*"; rho is the strength that the file was made for.

    Raises VectorError where the provenance is no JSON.
    """
    try:
        provenance = json.dumps(dict(vector.provenance), sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise VectorError(f"the provenance of {vector.name!r} cannot be written as JSON ({e})") from e
    fields = [
        Field("personasteer.name", Type.STRING, vector.name),
        Field("personasteer.strength", Type.FLOAT64, vector.strength),
        Field("personasteer.exported_strength", Type.FLOAT64, rho),
        Field("personasteer.n_layer", Type.UINT32, vector.n_layer),
        Field("personasteer.n_embd", Type.UINT32, vector.n_embd),
        Field("personasteer.window", Type.ARRAY, list(vector.window), Type.FLOAT64),
    ]
    if vector.layers:
        fields.append(Field("personasteer.layers", Type.ARRAY, [int(il) for il in vector.layers], Type.INT32))
    if vector.weights:
        weights = [float(vector.weights.get(il, 0.0)) for il in vector.layers]
        fields.append(Field("personasteer.weights", Type.ARRAY, weights, Type.FLOAT64))
    fields.append(Field.of("personasteer.directions", vector.directions))
    for name in ARRAYS:
        value = getattr(vector, name)
        if value is not None:
            fields.append(Field.of(f"personasteer.{name}", value))
    fields.append(Field("personasteer.provenance", Type.STRING, provenance))
    return fields


def vector_of_fields(file: Path, fields: Mapping[str, Any]) -> tuple[PersonaVector, float]:
    """The vector and the strength that `vector_fields` wrote. Raises VectorError where they do not fit together."""
    try:
        n_layer, n_embd = int(fields["personasteer.n_layer"]), int(fields["personasteer.n_embd"])
        layers = [int(il) for il in fields.get("personasteer.layers", [])]
        weights = fields.get("personasteer.weights")

        def array(name: str, *shape: int) -> NDArray[np.float32] | None:
            value = fields.get(f"personasteer.{name}")
            return None if value is None else np.asarray(value, np.float32).reshape(shape)

        directions = array("directions", n_layer, n_embd)
        assert directions is not None
        vector = PersonaVector(
            directions,
            tuple(layers),
            str(fields["personasteer.name"]),
            float(fields["personasteer.strength"]),
            dict(zip(layers, map(float, weights), strict=True)) if weights is not None else {},
            array("last_prompt", n_layer, n_embd),
            array("norms", n_layer),
            json.loads(fields["personasteer.provenance"], parse_constant=_no_constant),
            array("separations", n_layer),
            array("reliability", n_layer),
            array("thresholds", n_layer),
            array("means", n_layer),
            tuple(map(float, fields.get("personasteer.window", WINDOW))),  # type: ignore[arg-type]
            array("aurocs", n_layer),
            array("effects", n_layer),
            array("shuffled", -1, n_layer, n_embd),
        )
        return vector, float(fields["personasteer.exported_strength"])
    except VectorError as e:
        raise VectorError(f"{file}: {e}") from e
    except (AssertionError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as e:
        raise VectorError(f"{file}: its personasteer key-values do not fit together ({type(e).__name__}: {e})") from e


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def save_gguf(
    path: str | os.PathLike[str],
    architecture: str,
    fields: Sequence[Field],
    tensors: Mapping[str, NDArray[np.float32]],
) -> None:
    """Write a small GGUF of float32 tensors, in the order given, under a temporary name and renamed.

    Raises ArgumentError for a path that cannot be written, PersonasteerError where the disk is full.
    """
    try:
        with replacing(Path(path)) as temporary:
            w = gguf.GGUFWriter(temporary, architecture)
            add_fields(w, fields)
            arrays = [np.ascontiguousarray(data, np.float32) for data in tensors.values()]
            for name, data in zip(tensors, arrays, strict=True):
                w.add_tensor(name, data)
            try:
                w.write_header_to_file()
                w.write_kv_data_to_file()
                w.write_ti_data_to_file()
                (out,) = w.fout
                for data in arrays:
                    w.write_padding(out, out.tell())
                    out.write(data)  # by the writer's own way, ndarray.tofile, a full disk goes unnoticed
                w.write_padding(out, out.tell())
            finally:
                w.close()
    except OSError as e:
        raise PersonasteerError(f"{path}: cannot be written ({e.strerror or e})") from e
