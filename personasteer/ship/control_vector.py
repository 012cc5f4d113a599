"""Control-vector GGUF files: exactly what llama.cpp's loader takes, with the rest in key-values."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from personasteer._native import load_core
from personasteer.errors import ArgumentError, ModelError, PersonasteerError, VectorError
from personasteer.files import replacing
from personasteer.identity import check_model_file
from personasteer.vectors import WINDOW, PersonaVector

log = logging.getLogger("personasteer")

ARRAYS = (
    "last_prompt", "norms", "separations", "reliability", "thresholds", "means", "aurocs", "effects", "shuffled",
)  # fmt: skip


def scaled_directions(vector: PersonaVector, strength: float) -> dict[int, NDArray[np.float32]]:
    """{il: rho w_il m_il v_il / ||v_il||}, the rows that steering by `strength` adds on the vector's own model.

    Raises VectorError without the norms m_il of that model.
    """
    if vector.norms is None:
        raise VectorError(f"vector {vector.name!r} carries no norms of its model, so strength {strength} has no scale")
    weights = vector.weights_over(vector.layers)
    rows = {}
    for il in vector.layers:
        v = vector.direction(il).astype(np.float64)
        with np.errstate(over="ignore"):  # infinite is refused where it is used
            rows[il] = (strength * weights[il] * float(vector.norms[il]) / np.linalg.norm(v) * v).astype(np.float32)
    return rows


def save_control_vector(vector: PersonaVector, path: str | os.PathLike[str], *, strength: float | None = None) -> None:
    """Write a GGUF whose `direction.<il>` tensors, at llama.cpp's scale 1.0, steer by `strength`.

    Only the recommended layers are tensors (llama.cpp adds every one it finds); all directions, norms and provenance
    stand in key-values, so that loading gives the whole vector back. No time stamps, no paths: the same vector gives
    the same bytes. Written under a temporary name and renamed.

    Args:
        strength: signed rho to fold in; the vector's recommended strength when None. A vector without norms is
            written as it is, and then takes no strength.

    Raises:
        VectorError: no layer to write, or only layer 0, which llama.cpp's loader does not take.
        ArgumentError: the folder does not exist or cannot be written.
    """
    rho = vector.strength if strength is None else float(strength)
    if not np.isfinite(rho) or rho == 0.0:
        raise ArgumentError(f"the strength of a control-vector file must be finite and not zero, not {rho}")
    if vector.norms is None and strength is not None:
        scaled_directions(vector, rho)  # says that there is no scale
    tensors = _rows_to_write(vector, rho)
    if not tensors:
        raise VectorError("a control-vector file needs a layer >= 1: llama.cpp's loader rejects direction.0")
    if 0 in vector.layers:
        log.warning("layer 0 is left out of the control vector's tensors: llama.cpp's loader rejects direction.0")
    for il, row in tensors.items():
        if not np.isfinite(row).all():
            raise VectorError(f"the direction at layer {il}, scaled by {rho}, is not finite in float32")
    try:
        provenance = json.dumps(dict(vector.provenance), sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise VectorError(f"the provenance of {vector.name!r} cannot be written as JSON ({e})") from e
    target = Path(path)
    try:
        with replacing(target) as temporary:
            _write(vector, tensors, rho, provenance, temporary)
    except OSError as e:
        raise PersonasteerError(f"{target}: cannot be written ({e.strerror or e})") from e


def _rows_to_write(vector: PersonaVector, rho: float) -> dict[int, NDArray[np.float32]]:
    if vector.norms is None:
        rows = {il: vector.direction(il) for il in vector.layers}
    else:
        rows = scaled_directions(vector, rho)
    return {il: row for il, row in rows.items() if il >= 1}


def _write(
    vector: PersonaVector, tensors: dict[int, NDArray[np.float32]], rho: float, provenance: str, path: Path
) -> None:
    double, array = gguf.GGUFValueType.FLOAT64, gguf.GGUFValueType.ARRAY
    w = gguf.GGUFWriter(path, "controlvector")
    w.add_string("controlvector.model_hint", str(vector.provenance.get("architecture", "")))
    w.add_uint32("controlvector.layer_count", len(tensors))
    w.add_key_value("personasteer.name", vector.name, gguf.GGUFValueType.STRING)  # empty ones, too
    w.add_float64("personasteer.strength", vector.strength)
    w.add_float64("personasteer.exported_strength", rho)
    w.add_uint32("personasteer.n_layer", vector.n_layer)
    w.add_uint32("personasteer.n_embd", vector.n_embd)
    w.add_key_value("personasteer.window", list(vector.window), array, sub_type=double)
    if vector.layers:
        w.add_array("personasteer.layers", [int(il) for il in vector.layers])
    if vector.weights:
        weights = [float(vector.weights.get(il, 0.0)) for il in vector.layers]
        w.add_key_value("personasteer.weights", weights, array, sub_type=double)
    w.add_array("personasteer.directions", [float(x) for x in vector.directions.ravel()])
    for name in ARRAYS:
        value = getattr(vector, name)
        if value is not None:
            w.add_array(f"personasteer.{name}", [float(x) for x in value.ravel()])
    w.add_string("personasteer.provenance", provenance)
    for il in sorted(tensors):
        w.add_tensor(f"direction.{il}", tensors[il])
    try:
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
    finally:
        w.close()


def load_control_vector(path: str | os.PathLike[str], *, offset: int = 0) -> PersonaVector:
    """Read a control-vector GGUF, ours or another tool's.

    Args:
        offset: what a foreign file adds to the block index: its direction.N belongs to block N - offset. llama.cpp
            adds direction.N to the output of block N, and repeng writes it so (0, the default);
            llama-cvector-generator and control-vector-generator number one block late (1). Files of personasteer
            say what they are: the offset does not apply to them.

    Raises:
        VectorError: not a GGUF, truncated, or against the rules of llama.cpp's loader: a tensor of another name than
            direction.N with N >= 1, not F32, not 1-D, of another width; values that are not finite; only zeros.
    """
    try:
        file = check_model_file(path)
        _, _, tensors = load_core().summarize_gguf(os.fsencode(file))
    except ModelError as e:
        raise VectorError(str(e)) from e
    numbers: dict[int, int] = {}
    for label, kind, shape, _, _ in tensors:
        name = label.decode("utf-8", "replace")
        number = name.removeprefix("direction.")
        if number == name or not re.fullmatch("[1-9][0-9]{0,4}", number):
            raise VectorError(
                f"{file}: tensor {name!r} has no place in a control vector (only direction.N with N >= 1); "
                "llama.cpp would reject this file"
            )
        if kind != "f32" or list(shape[1:]) != [1, 1, 1]:
            raise VectorError(f"{file}: tensor {name!r} is {kind} of shape {shape}; llama.cpp takes 1-D f32 only")
        numbers[int(number)] = int(shape[0])
    if not numbers:
        raise VectorError(f"{file}: holds no direction.N tensor: not a control vector")
    if len(set(numbers.values())) != 1:
        raise VectorError(f"{file}: directions of different widths: {sorted(set(numbers.values()))}")
    try:
        reader = gguf.GGUFReader(file)
        rows = {int(t.name.removeprefix("direction.")): np.array(t.data, np.float32).ravel() for t in reader.tensors}
        fields = {k: f.contents() for k, f in reader.fields.items() if k.startswith("personasteer.")}
    except Exception as e:  # the reader raises whatever a malformed file makes it run into
        raise VectorError(f"{file}: cannot be read ({type(e).__name__}: {e})") from e
    for number, row in rows.items():
        if not np.isfinite(row).all():
            raise VectorError(f"{file}: direction.{number} holds values that are not finite")
    if not any(row.any() for row in rows.values()):
        raise VectorError(f"{file}: all directions are zero")
    if "personasteer.directions" in fields:
        return _ours(file, fields, rows)
    return _foreign(file, rows, offset)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def exported_strength(path: str | os.PathLike[str]) -> float | None:
    """The rho that llama.cpp's scale 1.0 stands for in a file of ours; None for a file of another tool."""
    field = gguf.GGUFReader(path).fields.get("personasteer.exported_strength")
    return None if field is None else float(field.contents())


def _ours(file: Path, fields: dict[str, Any], rows: dict[int, NDArray[np.float32]]) -> PersonaVector:
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
        expected = _rows_to_write(vector, float(fields["personasteer.exported_strength"]))
    except VectorError as e:
        raise VectorError(f"{file}: {e}") from e
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as e:
        raise VectorError(f"{file}: its personasteer key-values do not fit together ({type(e).__name__}: {e})") from e
    if expected.keys() != rows.keys() or any(
        not np.allclose(rows[il], row, rtol=1e-4, atol=1e-6 * float(np.abs(row).max())) for il, row in expected.items()
    ):
        raise VectorError(f"{file}: its tensors, which llama.cpp adds, are not those of its personasteer key-values")
    return vector


def _foreign(file: Path, rows: dict[int, NDArray[np.float32]], offset: int) -> PersonaVector:
    blocks = {number - offset: row for number, row in rows.items()}
    if min(blocks) < 0:
        raise VectorError(f"{file}: offset {offset} puts direction.{min(rows)} at block {min(blocks)}")
    n_embd = len(next(iter(blocks.values())))
    directions = np.full((max(blocks) + 1, n_embd), np.nan, np.float32)
    for il, row in blocks.items():
        directions[il] = row
    layers = tuple(il for il, row in blocks.items() if row.any())
    return PersonaVector(
        directions, layers, file.stem, provenance={"method": "imported", "offset": offset, "file": file.name}
    )
