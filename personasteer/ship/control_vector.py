"""Control-vector GGUF files: exactly what llama.cpp's loader takes, with the rest in key-values."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from gguf import GGUFValueType as Type
from numpy.typing import NDArray

from personasteer._native import load_core
from personasteer.errors import ArgumentError, ModelError, VectorError
from personasteer.identity import check_model_file
from personasteer.ship.fields import Field, read_fields, save_gguf, vector_fields, vector_of_fields
from personasteer.ship.glp import read_glp
from personasteer.steering import Add, Steering
from personasteer.vectors import PersonaVector

log = logging.getLogger("personasteer")

MOST_BLOCKS = 512  # LLAMA_MAX_LAYERS
NAMED = re.compile(r"direction\.([1-9][0-9]{0,4})")
RANKED = re.compile(r"direction\.([1-9][0-9]{0,4})(?:\.([1-9][0-9]{0,2}))?")  # of a basis of several directions


def scaled_directions(vector: PersonaVector, strength: float) -> dict[int, NDArray[np.float32]]:
    """{il: rho w_il m_il v_il / ||v_il||}, the rows that steering by `strength` adds on the vector's own model.

    Raises VectorError without the norms m_il of that model.
    """
    if vector.norms is None:
        raise VectorError(f"vector {vector.name!r} carries no norms of its model, so strength {strength} has no scale")
    if not vector.layers:
        return {}
    with np.errstate(over="ignore"):  # infinite is refused where it is used
        rows = vector.scaled(strength, vector.norms, vector.layers).astype(np.float32)
    return dict(zip(vector.layers, rows, strict=True))


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
    rho, rows = rows_to_add(vector, strength)
    write_directions(path, [*describing(vector, len(rows)), *vector_fields(vector, rho)], rows)


def rows_to_add(vector: PersonaVector, strength: float | None) -> tuple[float, dict[int, NDArray[np.float32]]]:
    """(rho, {il: what `save_control_vector` writes as direction.<il>}). Raises as it does."""
    rho = vector.strength if strength is None else float(strength)
    if not np.isfinite(rho) or rho == 0.0:
        raise ArgumentError(f"the strength of a control-vector file must be finite and not zero, not {rho}")
    if vector.norms is None and strength is not None:
        scaled_directions(vector, rho)  # says that there is no scale
    rows = _rows_to_write(vector, rho)
    if not rows:
        raise VectorError("a control-vector file needs a layer >= 1: llama.cpp's loader rejects direction.0")
    if 0 in vector.layers:
        log.warning("layer 0 is left out of the control vector's tensors: llama.cpp's loader rejects direction.0")
    for il, row in rows.items():
        if not np.isfinite(row).all():
            raise VectorError(f"the direction at layer {il}, scaled by {rho}, is not finite in float32")
    return rho, rows


def describing(vector: PersonaVector, n_rows: int) -> list[Field]:
    """The key-values that every tool writes into a control vector."""
    return [
        Field("controlvector.model_hint", Type.STRING, str(vector.provenance.get("architecture", ""))),
        Field("controlvector.layer_count", Type.UINT32, n_rows),
    ]


def write_directions(
    path: str | os.PathLike[str], fields: Sequence[Field], rows: Mapping[int, NDArray[np.float32]]
) -> None:
    """Write a control-vector GGUF, under a temporary name and renamed. Raises as `save_control_vector` does."""
    save_gguf(path, "controlvector", fields, {f"direction.{il}": rows[il] for il in sorted(rows)})


def _rows_to_write(vector: PersonaVector, rho: float) -> dict[int, NDArray[np.float32]]:
    if vector.norms is None:
        rows = {il: vector.direction(il) for il in vector.layers}
    else:
        rows = scaled_directions(vector, rho)
    return {il: row for il, row in rows.items() if il >= 1}


def load_control_vector(path: str | os.PathLike[str], *, offset: int | Literal["auto"] = 0) -> PersonaVector:
    """Read a control-vector GGUF, ours or another tool's.

    Args:
        offset: what a foreign file adds to the block index: its direction.N belongs to block N - offset. llama.cpp
            adds direction.N to the output of block N, and repeng writes it so (0, the default);
            llama-cvector-generator and control-vector-generator number one block late (1). Never changed without
            being asked: where the file looks like one of another offset (see `origin_of`), a warning says so. "auto":
            what the file looks like. Files of personasteer say what they are: the offset does not apply to them.

    Raises:
        VectorError: not a GGUF, truncated, or against the rules of llama.cpp's loader: a tensor of another name than
            direction.N with N >= 1, not F32, not 1-D, of another width; values that are not finite; only zeros. Made
            for projection (glp.mode): see `load_projection`.
        ArgumentError: "auto" for a file that does not tell which tool wrote it.
    """
    if offset != "auto" and (isinstance(offset, bool) or not isinstance(offset, int)):
        raise ArgumentError(f'offset must be a whole number or "auto", not {offset!r}')
    file, fields, places = read_directions(path)
    metadata = read_glp(file, fields, places)
    if metadata is not None and metadata.mode == "project":
        raise VectorError(
            f"{file}: its directions are to be projected out (glp.mode project), adding them would do the opposite; "
            "read it with personasteer.ship.load_projection, or turn it into a vector: personasteer import"
        )
    rows = {number: row for (number, _), row in places.items()}
    if not any(row.any() for row in rows.values()):
        raise VectorError(f"{file}: all directions are zero")
    if "personasteer.directions" in fields:
        return whole_vector(file, fields, rows)
    origin = Origin("a GLP writer", 0) if metadata is not None else origin_of(file)
    return _foreign(file, rows, _chosen_offset(file, origin, offset), origin)


def read_directions(
    path: str | os.PathLike[str], *, ranked: bool = False
) -> tuple[Path, dict[str, Any], dict[tuple[int, int], NDArray[np.float32]]]:
    """(file, key-values, {(N, 0): direction.N}), in the file's order; `ranked`: direction.N.j as (N, j), too.

    Raises VectorError as `load_control_vector` does; zeros are taken.
    """
    try:
        file = check_model_file(path)
        _, _, tensors = load_core().summarize_gguf(os.fsencode(file))
        fields = read_fields(file)
    except ModelError as e:
        raise VectorError(str(e)) from e
    widths: set[int] = set()
    rows: dict[tuple[int, int], NDArray[np.float32]] = {}
    size = file.stat().st_size
    with file.open("rb") as f:
        for label, kind, shape, start, n_bytes in tensors:
            name = label.decode("utf-8", "replace")
            named = (RANKED if ranked else NAMED).fullmatch(name)
            if not named:
                raise VectorError(
                    f"{file}: tensor {name!r} has no place in a control vector (only direction.N with N >= 1); "
                    "llama.cpp would reject this file"
                )
            if kind != "f32" or list(shape[1:]) != [1, 1, 1]:
                raise VectorError(f"{file}: tensor {name!r} is {kind} of shape {shape}; llama.cpp takes 1-D f32 only")
            if start + n_bytes > size:
                raise VectorError(f"{file}: truncated, {name} is not all there")
            f.seek(start)
            row = np.frombuffer(f.read(n_bytes), "<f4")
            if not np.isfinite(row).all():
                raise VectorError(f"{file}: {name} holds values that are not finite")
            number, j = (int(part or 0) for part in (*named.groups(), 0)[:2])
            rows[number, j] = row
            widths.add(len(row))
    if not rows:
        raise VectorError(f"{file}: holds no direction.N tensor: not a control vector")
    if len(widths) != 1:
        raise VectorError(f"{file}: directions of different widths: {sorted(widths)}")
    return file, fields, rows


class Origin(NamedTuple):
    """The tool that a file looks like, and the offset of its numbers."""

    tool: str
    offset: int


def origin_of(path: str | os.PathLike[str]) -> Origin | None:
    """Which tool a foreign control vector looks like; None where nothing tells. Only a hint.

    All write the same three key-values. controlvector.layer_count is INT32 in files of llama-cvector-generator, and
    UINT32 in the others': the number of the model's blocks, more than there are tensors, in control-vector-generator's,
    the number of tensors, which stand from the last block to the first, in repeng's.

    Source: tools/cvector-generator of llama.cpp, model_handler.py of jukofyork/control-vectors, extract.py of repeng.
    """
    core = load_core()
    counts = [
        (Type(kind), value)
        for key, kind, _, value in core.read_gguf_fields(os.fsencode(path))
        if key == b"controlvector.layer_count"
    ]
    if not counts:
        return None
    kind, value = counts[0]
    if kind is Type.INT32:
        return Origin("llama-cvector-generator", 1)
    if kind is not Type.UINT32:
        return None
    count = int.from_bytes(value, "little")
    names = [NAMED.fullmatch(t[0].decode("utf-8", "replace")) for t in core.summarize_gguf(os.fsencode(path))[2]]
    numbers = [int(name[1]) for name in names if name]
    if count > len(numbers):
        return Origin("control-vector-generator", 1)
    if count == len(numbers) > 1 and numbers == sorted(numbers, reverse=True):
        return Origin("repeng", 0)
    return None


def _chosen_offset(file: Path, origin: Origin | None, offset: int | Literal["auto"]) -> int:
    if offset == "auto":
        if origin is None:
            raise ArgumentError(
                f"{file}: does not tell which tool wrote it: give the offset, 1 (--offset 1) where direction.N was "
                "measured at block N - 1, 0 (--offset 0) where at block N"
            )
        log.warning("%s looks like a file of %s: offset %d is used", file, origin.tool, origin.offset)
        return origin.offset
    if origin is not None and origin.offset != offset:
        log.warning(
            "%s looks like a file of %s, which numbers %s: offset %d (--offset %d) puts it where it was measured; "
            "offset %d%s is used",
            file, origin.tool, "one block late" if origin.offset else "as llama.cpp does", origin.offset, origin.offset,
            offset, "" if offset else ", as llama.cpp itself applies it,",
        )  # fmt: skip
    else:
        log.info("%s: of %s, offset %d is used", file, origin.tool if origin else "an unknown tool", offset)
    return offset


def exported_strength(path: str | os.PathLike[str]) -> float | None:
    """The rho that llama.cpp's scale 1.0 stands for in a file of ours; None for a file of another tool."""
    strength = read_fields(path).get("personasteer.exported_strength")
    return float(strength) if isinstance(strength, int | float) else None


def whole_vector(file: Path, fields: Mapping[str, Any], rows: Mapping[int, NDArray[np.float32]]) -> PersonaVector:
    """The vector of a file of ours. Raises VectorError where the tensors are not what it adds."""
    vector, rho = vector_of_fields(file, fields)
    try:
        expected = _rows_to_write(vector, rho)
    except VectorError as e:
        raise VectorError(f"{file}: {e}") from e
    check_rows(file, rows, expected)
    return vector


def check_rows(
    file: Path, rows: Mapping[int, NDArray[np.float32]], expected: Mapping[int, NDArray[np.float32]]
) -> None:
    """Raise VectorError where the tensors of a file of ours are not those that its key-values give."""
    if expected.keys() != rows.keys() or any(
        rows[il].shape != row.shape or not np.allclose(rows[il], row, rtol=1e-4, atol=1e-6 * float(np.abs(row).max()))
        for il, row in expected.items()
    ):
        raise VectorError(f"{file}: its tensors, which llama.cpp adds, are not those of its personasteer key-values")


def _foreign(file: Path, rows: dict[int, NDArray[np.float32]], offset: int, origin: Origin | None) -> PersonaVector:
    blocks = {number - offset: row for number, row in rows.items()}
    if min(blocks) < 0:
        raise VectorError(f"{file}: offset {offset} puts direction.{min(rows)} at block {min(blocks)}")
    provenance = {"method": "imported", "offset": offset, "file": file.name}
    if origin is not None:
        provenance["tool"] = origin.tool
    return vector_of_rows(blocks, file.stem, provenance)


def adding(
    rows: Mapping[int, NDArray[np.float32]], n_layer: int, name: str, provenance: Mapping[str, Any] | None = None
) -> Steering:
    """What adds exactly these {il: row}; no dose of it is warned of: it is given, and only measured."""
    vector = replace(vector_of_rows(rows, name, provenance or {}, n_layer), window=(-10.0, 10.0))
    return Steering([Add(vector, 1.0, raw=True)])


def vector_of_rows(
    rows: Mapping[int, NDArray[np.float32]], name: str, provenance: Mapping[str, Any], n_layer: int | None = None
) -> PersonaVector:
    """{il: direction} of a model with n_layer blocks, or an unknown number, to steer at those that are not zero.

    Raises VectorError for a block that no model has.
    """
    if max(rows) >= MOST_BLOCKS:
        raise VectorError(f"{name!r:.80} has a direction at block {max(rows)}; no model has over {MOST_BLOCKS} blocks")
    n_embd = len(next(iter(rows.values())))
    directions = np.full((n_layer or max(rows) + 1, n_embd), np.nan, np.float32)
    for il, row in rows.items():
        directions[il] = row
    layers = tuple(il for il, row in rows.items() if row.any())
    return PersonaVector(directions, layers, name, provenance=provenance)
