"""The metadata of GGUF Layer Projection (GLP): what is to be done with the directions of a file.

Specification: github.com/msuiche/weightless, spec/GLP.md.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from personasteer.errors import VectorError

log = logging.getLogger("personasteer")

MODES = ("project", "add")
HOOK_POINT = "residual_stream_post_layer"  # the outputs of blocks, where all our edits are made
NAMESPACES = ("glp.", "dspark.")  # the second is what the keys were called before 2026-08-22
PIN = ("name", "organization", "version", "repo_url")  # of general.base_model.0
ORTHONORMAL = 1e-3  # of |G - I|, the specification's tolerance
Rows: TypeAlias = Mapping[tuple[int, int], NDArray[np.float32]]  # {(N, j): direction.N.j}, j = 0 for direction.N


@dataclass(frozen=True)
class Glp:
    """The metadata of one file. `alpha` is without `dir_scales`: alpha_{L,j} = alpha[L] * dir_scales[j]."""

    mode: str
    alpha: Mapping[int, float]
    dir_scales: tuple[float, ...]
    derived_at: str
    pin: Mapping[str, str]


def content_sha256(rows: Rows) -> str:
    """SHA-256, in lowercase hex, over the directions as little-endian float32, ordered by (N, j) as numbers."""
    digest = hashlib.sha256()
    for place in sorted(rows):
        digest.update(np.ascontiguousarray(rows[place], "<f4").tobytes())
    return digest.hexdigest()


def read_glp(file: Path, fields: Mapping[str, Any], rows: Rows) -> Glp | None:
    """The metadata of a file with these key-values and directions; None where it has none.

    Raises VectorError where it is against the specification, and where it asks for what is not done here: another
    mode, version or hook point. Nothing is guessed: a projection that is added does the opposite of what it is for.
    """
    keys = _keys(file, fields)
    if not keys:
        return None
    mode = _text(file, keys, "mode", "add")
    if mode not in MODES:
        raise VectorError(f"{file}: glp.mode {mode!r} is not known; known: {', '.join(MODES)}")
    version = keys.get("spec_version", 1)
    if type(version) is not int or version not in (1, 2):
        raise VectorError(f"{file}: glp.spec_version {version!r} is not known; known: 1, 2")
    hook = _text(file, keys, "hook_point", HOOK_POINT)
    if hook != HOOK_POINT:
        raise VectorError(f"{file}: made for glp.hook_point {hook!r}; edits here are made at {HOOK_POINT}")
    derived_at = _text(file, keys, "derived_at", _text(file, keys, "derive_at", hook))
    if derived_at != hook:
        log.warning("%s: its directions were derived at %s and are applied at %s", file, derived_at, hook)
    layers = sorted({n for n, _ in rows})
    rank = _rank(file, keys, rows, version, mode)
    _check_layer_ids(file, keys, layers)
    _check_hash(file, keys, rows)
    if mode == "project":
        _check_basis(file, keys, rows, layers, rank)
    default = _alpha(file, keys.get("alpha_default", 1.0), "glp.alpha_default")
    scales = _layer_scales(file, keys, layers, version)
    alpha = {n: default * scales.get(n, 1.0) for n in layers}
    pin = {name: str(fields[key]) for name in PIN if (key := f"general.base_model.0.{name}") in fields}
    return Glp(mode, alpha, _dir_scales(file, keys, rank, version), derived_at, pin)


def _keys(file: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The GLP keys without their namespace."""
    current, old = ({k.removeprefix(n): v for k, v in fields.items() if k.startswith(n)} for n in NAMESPACES)
    for name in current.keys() & old.keys():
        if not np.array_equal(current[name], old[name]):
            raise VectorError(f"{file}: glp.{name} is {current[name]!r}, dspark.{name} is {old[name]!r}")
    if old:
        log.warning("%s: its keys are called dspark.*, as before 2026-08-22; read as glp.*", file)
    return old | current


def _text(file: Path, keys: Mapping[str, Any], name: str, default: str) -> str:
    value = keys.get(name, default)
    if not isinstance(value, str):
        raise VectorError(f"{file}: glp.{name} must be a text, not {value!r:.80}")
    return value


def _alpha(file: Path, value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
        raise VectorError(f"{file}: {name} must be a finite number that is not negative, not {value!r:.80}")
    return float(value)


def _rank(file: Path, keys: Mapping[str, Any], rows: Rows, version: int, mode: str) -> int:
    rank = keys.get("rank", 1)
    if type(rank) is not int or rank < 1:
        raise VectorError(f"{file}: glp.rank must be a whole number from 1, not {rank!r:.80}")
    if rank != 1 + max(j for _, j in rows) or set(rows) != {(n, j) for n, _ in rows for j in range(rank)}:
        raise VectorError(f"{file}: glp.rank is {rank}, but not every layer has its {rank} directions")
    if rank > 1 and version < 2:
        raise VectorError(f"{file}: glp.rank {rank} needs glp.spec_version 2, not {version}")
    if rank > 1 and mode != "project":
        raise VectorError(f"{file}: glp.rank {rank} has no meaning in mode {mode!r}")
    return rank


def _check_layer_ids(file: Path, keys: Mapping[str, Any], layers: list[int]) -> None:
    ids = keys.get("layer_ids_zero_based")
    if ids is None or ids is True:  # some writers only say that it is so
        return
    if ids is False:
        raise VectorError(f"{file}: glp.layer_ids_zero_based is false: its blocks are not counted from 0")
    try:
        listed = sorted(_numbers(ids, int))
    except ValueError:
        raise VectorError(f"{file}: glp.layer_ids_zero_based must be a list such as 10,11, not {ids!r:.80}") from None
    if listed != layers:
        raise VectorError(f"{file}: glp.layer_ids_zero_based says layers {listed}, its tensors are for {layers}")


def _numbers(text: Any, kind: type) -> list[Any]:
    if not isinstance(text, str):
        raise ValueError(text)
    return [kind(part) for part in text.split(",")]


def _check_hash(file: Path, keys: Mapping[str, Any], rows: Rows) -> None:
    said = keys.get("content_sha256")
    if said is None:
        return
    if not isinstance(said, str) or not re.fullmatch("[0-9a-fA-F]{64}", said):
        raise VectorError(f"{file}: glp.content_sha256 must be 64 hexadecimal digits, not {said!r:.80}")
    if said.lower() != (found := content_sha256(rows)):
        raise VectorError(f"{file}: its directions have the SHA-256 {found}, glp.content_sha256 says {said.lower()}")


def _check_basis(file: Path, keys: Mapping[str, Any], rows: Rows, layers: Iterable[int], rank: int) -> None:
    if rank > 1 and keys.get("orthonormal") is not True:
        raise VectorError(f"{file}: glp.rank {rank} needs glp.orthonormal true, not {keys.get('orthonormal')!r:.80}")
    for n in layers:
        basis = np.stack([rows[n, j] for j in range(rank)]).astype(np.float64)
        error = float(np.abs(basis @ basis.T - np.eye(rank)).max())
        if not error <= ORTHONORMAL:
            what = f"direction.{n} has the length {np.linalg.norm(basis[0]):.4g}, not 1" if rank == 1 else (
                f"the {rank} directions of layer {n} are not orthonormal (|G - I| is {error:.3g})"
            )  # fmt: skip
            raise VectorError(f"{file}: {what}: a projection removes another amount along such directions")


def _dir_scales(file: Path, keys: Mapping[str, Any], rank: int, version: int) -> tuple[float, ...]:
    text = keys.get("dir_scales")
    if text is None:
        return (1.0,) * rank
    _needs_version_2(file, "dir_scales", version)
    try:
        scales = tuple(_alpha(file, scale, "glp.dir_scales") for scale in _numbers(text, float))
    except ValueError:
        scales = ()
    if len(scales) != rank:
        raise VectorError(f"{file}: glp.dir_scales must be {rank} numbers with commas between, not {text!r:.80}")
    return scales


def _layer_scales(file: Path, keys: Mapping[str, Any], layers: list[int], version: int) -> dict[int, float]:
    text = keys.get("layer_scales")
    if text is None:
        return {}
    _needs_version_2(file, "layer_scales", version)
    try:
        pairs = [pair.split(":") for pair in _numbers(text, str)]
        scales = {int(n): _alpha(file, float(scale), "glp.layer_scales") for n, scale in pairs}
    except ValueError:
        raise VectorError(f"{file}: glp.layer_scales must be pairs such as 10:0.5,11:1, not {text!r:.80}") from None
    if len(scales) != len(pairs) or not scales.keys() <= set(layers):
        raise VectorError(f"{file}: glp.layer_scales names a layer twice, or one without a direction: {text!r:.80}")
    return scales


def _needs_version_2(file: Path, name: str, version: int) -> None:
    if version < 2:
        raise VectorError(f"{file}: glp.{name} needs glp.spec_version 2, not {version}")
