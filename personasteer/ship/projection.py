"""Projection files: control vectors that say what is to be done with their directions (GLP).

Source: github.com/msuiche/weightless, spec/GLP.md (GGUF Layer Projection).
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType as Type
from numpy.typing import NDArray

from personasteer.errors import ArgumentError, VectorError
from personasteer.ship.control_vector import (
    check_rows,
    describing,
    read_directions,
    rows_to_add,
    vector_of_rows,
    whole_vector,
    write_directions,
)
from personasteer.ship.fields import Field, vector_fields, vector_of_fields
from personasteer.ship.glp import HOOK_POINT, MODES, content_sha256, read_glp
from personasteer.steering import Ablate, Add, Edit, Scope, Steering
from personasteer.vectors import PersonaVector

log = logging.getLogger("personasteer")

MAX_ELEMENTS, MAX_TEXT = 2_000_000, 16 * 2**20  # of a key-value that every reader of the format takes
OPTIONAL = ("personasteer.shuffled", "personasteer.last_prompt")
GENERAL = ("author", "description", "license", "version")
SLACK = 1e-6  # of an alpha, for the rounding of its float32 factors


@dataclass(frozen=True, eq=False)
class Projection:
    """The directions of a file and what is to be done with them.

    Args:
        vector: the whole vector where personasteer wrote the file; else the file's (first) directions.
        mode: "project": h <- h - sum_j alpha_{L,j} (h . d_j) d_j at layer L, d_j of unit length; "add": h <- h + v.
        alpha: {il: alpha_il}, with alpha_{L,j} = alpha_L * dir_scales[j]; 1 takes the direction out exactly.
        hook_point: where, always "residual_stream_post_layer", the output of a block.
        derived_at: where the directions were measured.
        pin: of the base model, what the file says of "name", "organization", "version" (a commit) and "repo_url".
        content_sha256: of the directions, as the specification defines it.
        basis: the tensors as they are, the j-th directions of all layers in the j-th vector.
        dir_scales: one factor for each vector of the basis.
    """

    vector: PersonaVector
    mode: str
    alpha: Mapping[int, float]
    hook_point: str
    derived_at: str
    pin: Mapping[str, str]
    content_sha256: str
    basis: tuple[PersonaVector, ...]
    dir_scales: tuple[float, ...] = (1.0,)

    def steering(self, *, scale: float = 1.0, scope: Scope = "all") -> Steering:
        """The edits that do it: one Ablate (mode "add": one raw Add) for each direction and distinct alpha.

        Args:
            scale: factor of every alpha.
            scope: the tokens that are edited; see Edit.

        Raises:
            VectorError: an alpha above 1 in mode "project": more than taking the direction out.
            ArgumentError: a scale that is negative or not finite.
        """
        if not (math.isfinite(scale) and scale >= 0):
            raise ArgumentError(f"scale must be a finite number that is not negative, not {scale}")
        edits: list[Edit] = []
        for vector, factor in zip(self.basis, self.dir_scales, strict=True):
            at: dict[float, list[int]] = {}
            for il in vector.layers:
                at.setdefault(self.alpha[il] * factor * scale, []).append(il)
            for alpha, layers in at.items():
                if alpha == 0:
                    continue
                if self.mode == "add":
                    edits.append(Add(vector, alpha, raw=True, layers=tuple(layers), scope=scope))
                elif alpha <= 1 + SLACK:
                    edits.append(Ablate(vector, share=min(alpha, 1.0), layers=tuple(layers), scope=scope))
                else:
                    raise VectorError(
                        f"the projection {vector.name!r} has alpha {alpha:g} at layer {layers[0]}; Ablate takes out a "
                        f"share of at most 1: steering(scale={1 / max(self._alphas()):.4g}) takes the direction out"
                    )
        return Steering(edits)

    def _alphas(self) -> list[float]:
        return [alpha * factor for alpha in self.alpha.values() for factor in self.dir_scales]


def save_projection(
    vector: PersonaVector,
    path: str | os.PathLike[str],
    *,
    mode: str = "project",
    strength: float | None = None,
    layers: Iterable[int] | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    contrast: str | None = None,
    created: str | None = None,
    general: Mapping[str, str] | None = None,
) -> None:
    """Write a control-vector GGUF with GLP metadata: whether its directions are projected out or added, and where.

    Mode "project": direction.<il> = v_il / ||v_il||, for h <- h - alpha (h . d) d with alpha = strength. Mode "add":
    the tensors of `save_control_vector`, to the byte. llama.cpp itself reads none of the metadata and adds the
    directions of every control vector: a projection must not be given to its --control-vector.

    The whole vector stands in key-values besides, and `load_projection` gives it back bit for bit; what readers of the
    format would refuse (arrays above 2 million numbers) is left out with a warning. No time stamp unless `created`.

    Args:
        strength: mode "project": alpha, above 0; 1, the default, takes the direction out exactly, and readers other
            than personasteer take more. Mode "add": as in `save_control_vector`.
        layers: blocks to write; the vector's recommended layers when None. Block 0 has no place in such a file.
        base_model: the base model as "organization/name" on Hugging Face. Some readers need it and base_revision.
        base_revision: its commit, 40 hexadecimal digits.
        contrast, created: what was contrasted, and an ISO date, as texts.
        general: author, description, license and version, of the file.

    Raises:
        VectorError: no layer to write, a direction that is missing or zero, provenance that is no JSON.
        ArgumentError: an unknown mode, a strength that is not finite or (mode "project") not above 0, a name or commit
            of another form; the folder does not exist or cannot be written.
    """
    if mode not in MODES:
        raise ArgumentError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if unknown := sorted(set(general or {}) - set(GENERAL)):
        raise ArgumentError(f"general takes {', '.join(GENERAL)}, not {unknown[0]!r}")
    pin = _pin(base_model, base_revision)
    if mode == "add":
        if layers is not None:
            vector = vector.at(layers)
        rho, rows = rows_to_add(vector, strength)
        alpha = 1.0
    else:
        rho = alpha = 1.0 if strength is None else float(strength)
        with np.errstate(over="ignore"):
            stored = np.float32(alpha)
        if not (np.isfinite(stored) and stored > 0):
            raise ArgumentError(f"the strength of a projection must be finite and above 0, not {strength}")
        rows = unit_rows(vector, vector.layers if layers is None else layers)
    texts = {
        "glp.hook_point": HOOK_POINT,
        "glp.derived_at": HOOK_POINT,
        "glp.layer_ids_zero_based": ",".join(map(str, sorted(rows))),
        "glp.content_sha256": content_sha256({(il, 0): row for il, row in rows.items()}),
        "glp.generator": "personasteer",
    }
    optional = {
        "glp.method": vector.provenance.get("method"),
        "glp.contrast": contrast,
        "glp.created": created,
        "glp.base_model": base_model,
        "glp.base_revision": base_revision,
        "general.name": vector.name,
    } | {f"general.{name}": text for name, text in (general or {}).items()}
    texts |= {key: str(value) for key, value in optional.items() if value}
    fields = [
        *describing(vector, len(rows)),
        Field("glp.mode", Type.STRING, mode),
        Field("glp.spec_version", Type.UINT32, 1),
        Field("glp.alpha_default", Type.FLOAT32, alpha),
        Field("glp.rank", Type.UINT32, 1),
        *([Field("glp.orthonormal", Type.BOOL, True)] if mode == "project" else []),
        *(Field(key, Type.STRING, text) for key, text in texts.items()),
        *pin,
        *_small_enough(vector, vector_fields(vector, rho)),
    ]
    write_directions(path, fields, rows)
    if mode == "project":
        log.warning(
            "%s is a projection, for readers of glp.mode; llama.cpp itself does not read that, and would add the "
            "directions if the file were given to its --control-vector",
            path,
        )


def unit_rows(vector: PersonaVector, layers: Iterable[int]) -> dict[int, NDArray[np.float32]]:
    """{il: v_il / ||v_il||} from block 1 on, rounded to float32 once. Raises VectorError where there is none."""
    chosen = sorted({int(il) for il in layers})
    data, lengths = vector.directions_at(chosen)
    units = (data / lengths[:, None]).astype(np.float32)
    rows = {il: row for il, row in zip(chosen, units, strict=True) if il >= 1}
    if not rows:
        raise VectorError("a projection file needs a layer >= 1: readers of control vectors reject direction.0")
    if 0 in chosen:
        log.warning("layer 0 is left out of the projection: readers of control vectors reject direction.0")
    return rows


def _pin(base_model: str | None, base_revision: str | None) -> list[Field]:
    """The base model, as GGUF's own metadata names it."""
    if base_revision is not None and not re.fullmatch("[0-9a-f]{40}", base_revision):
        raise ArgumentError(f"base_revision must be a commit of 40 hexadecimal digits, not {base_revision!r:.80}")
    if base_model is None:
        if base_revision is not None:
            raise ArgumentError("base_revision needs base_model, the model that it is a commit of")
        log.warning("the file does not say which base model it is for, and some readers refuse it so: see base_model")
        return []
    parts = re.fullmatch(r"([\w.-]+)/([\w.-]+)", base_model, re.ASCII)
    if not parts:
        raise ArgumentError(f'base_model must be "organization/name", not {base_model!r:.80}')
    texts = {"name": parts[2], "organization": parts[1]}
    if base_revision is None:
        log.warning("the file does not say which revision of %s it is for, and some readers refuse it so", base_model)
    else:
        texts["version"] = base_revision
    texts["repo_url"] = f"https://huggingface.co/{base_model}"
    return [
        Field("general.base_model.count", Type.UINT32, 1),
        *(Field(f"general.base_model.0.{name}", Type.STRING, text) for name, text in texts.items()),
    ]


def _small_enough(vector: PersonaVector, fields: Sequence[Field]) -> list[Field]:
    """The key-values that all readers of the format take; none of them where the vector would not be whole."""
    large = [
        f.key
        for f in fields
        if (f.type is Type.ARRAY and len(f.value) > MAX_ELEMENTS)
        or (f.type is Type.STRING and len(f.value.encode()) > MAX_TEXT)
    ]
    if large:
        log.warning("%r: left out of the file, too large for readers of the format: %s", vector.name, ", ".join(large))
    if not set(large) <= set(OPTIONAL):
        return []
    return [f for f in fields if f.key not in large]


def load_projection(path: str | os.PathLike[str]) -> Projection:
    """Read a control-vector GGUF with GLP metadata (glp.*, or dspark.* as it was called), or without: mode "add".

    Raises:
        VectorError: not a control vector (see `load_control_vector`); an unknown mode or version, another hook point
            than the output of a block, directions that are not of unit length and orthogonal to each other, a hash or
            list of layers that is not that of the tensors, an alpha that is negative or not finite.
    """
    file, fields, rows = read_directions(path, ranked=True)
    metadata = read_glp(file, fields, rows)
    firsts = {n: row for (n, j), row in rows.items() if j == 0}
    if len(firsts) < len({n for n, _ in rows}):
        raise VectorError(f"{file}: a layer has direction.N.j without direction.N")
    if metadata is None and len(firsts) < len(rows):
        raise VectorError(f"{file}: has several directions at a layer, and no glp.mode that says what to do with them")
    mode = "add" if metadata is None else metadata.mode
    if mode == "add" and not any(row.any() for row in firsts.values()):
        raise VectorError(f"{file}: all directions are zero")
    vector: PersonaVector | None = None
    provenance: Mapping[str, Any] = {"method": "imported", "file": file.name}
    if "personasteer.directions" in fields:
        vector = (whole_vector if mode == "add" else _whole_projection)(file, fields, firsts)
        provenance = vector.provenance
    n_basis = 1 + max(j for _, j in rows)
    basis = []
    for j in range(n_basis):
        part = {n: row for (n, k), row in rows.items() if k == j}
        name = file.stem if n_basis == 1 else f"{file.stem}.{j}"
        basis.append(vector_of_rows(part, name, provenance, None if vector is None else vector.n_layer))
    return Projection(
        basis[0] if vector is None else vector,
        mode,
        dict.fromkeys(sorted(firsts), 1.0) if metadata is None else metadata.alpha,
        HOOK_POINT,
        HOOK_POINT if metadata is None else metadata.derived_at,
        {} if metadata is None else metadata.pin,
        content_sha256(rows),
        tuple(basis),
        (1.0,) if metadata is None else metadata.dir_scales,
    )


def _whole_projection(file: Path, fields: Mapping[str, Any], rows: Mapping[int, NDArray[np.float32]]) -> PersonaVector:
    vector, _ = vector_of_fields(file, fields)
    try:
        expected = unit_rows(vector, rows)
    except VectorError as e:
        raise VectorError(f"{file}: {e}") from e
    check_rows(file, rows, expected)
    return vector
