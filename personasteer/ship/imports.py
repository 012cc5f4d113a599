"""Directions that other tools have written, for one model: control vectors, safetensors, sparse autoencoders."""

from __future__ import annotations

import logging
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from personasteer.errors import ArgumentError, IncompatibleVector, VectorError
from personasteer.ship.autoencoders import is_decoder, load_sae_direction
from personasteer.ship.control_vector import load_control_vector, read_directions, vector_of_rows
from personasteer.ship.fields import text_of
from personasteer.ship.projection import load_projection
from personasteer.ship.tensor_files import TensorFile, kind_of, listed, open_tensors
from personasteer.steering import check_fits
from personasteer.vectors import PersonaVector

if TYPE_CHECKING:
    from personasteer.model import Model

log = logging.getLogger("personasteer")

NUMBERED = re.compile(r"(\D*)(\d{1,5})((?:[._/]\D*)?)")  # prefix, layer, suffix


def import_vector(
    path: str | os.PathLike[str],
    model: Model,
    *,
    offset: int | Literal["auto"] = 0,
    feature: int | None = None,
    layer: int | None = None,
    key: str | None = None,
    name: str | None = None,
) -> PersonaVector:
    """Read directions of any known form for `model`: with its number of blocks and its norms, so that a relative
    strength has a scale.

    The layers' shares of the strength follow the data, w_il ~ ||v_il|| / m_il, and provenance["stored_strength"] is
    sum_il ||v_il|| / m_il: at that strength the vector adds what the file, added as it stands, adds. Directions of a
    projection and of an autoencoder have no such scale.

    Args:
        path: a control-vector GGUF of any tool, with GLP metadata or without; safetensors with one direction for each
            layer (see `load_safetensors_directions`); with `feature`, an autoencoder (see `load_sae_direction`).
        offset: of files that do not number blocks as il does, block = N - offset; "auto" for a control vector: what
            the file looks like.
        layer: block of the feature, where nothing beside the file tells.
        key: the tensor to take, where there are several.
        name: of the vector; the file's when None.

    Raises:
        VectorError: a file that is none of these, is broken, or holds no usable direction.
        IncompatibleVector: directions of another width, or for more blocks than the model has.
        ArgumentError: an option that the file has no use for, or lacks.
    """
    file = Path(path)
    kind = kind_of(file)
    if feature is None and layer is not None:
        raise ArgumentError("a layer is for a feature of an autoencoder (feature=, --feature)")
    if feature is not None and kind == "gguf":
        raise ArgumentError(f"{file}: a feature is for an autoencoder, this is a GGUF file")
    if key is not None and kind == "gguf":
        raise ArgumentError(f"{file}: a key is for safetensors and npz files, this is a GGUF file")
    if feature is not None:
        if offset != 0:
            raise ArgumentError("an offset is for numbered directions, not for a feature: give its layer")
        vector = load_sae_direction(
            file, feature, layer, n_layer=model.n_layer, n_embd=model.n_embd, key=key, name=name
        )
    elif kind == "npz":
        raise ArgumentError(f"{file}: an npz file is read as an autoencoder: name a feature (feature=, --feature)")
    elif kind == "safetensors":
        if offset == "auto":
            raise ArgumentError(f"{file}: safetensors do not tell how blocks are numbered: give the offset, 0 or 1")
        vector = load_safetensors_directions(file, offset=offset, key=key, name=name)
    else:
        vector = _load_gguf(file, offset)
        if name is not None:
            vector = replace(vector, name=name)
    return _fitted(file, vector, model)


def _load_gguf(file: Path, offset: int | Literal["auto"]) -> PersonaVector:
    _, fields, _ = read_directions(file, ranked=True)
    if "project" not in (text_of(fields, "glp.mode"), text_of(fields, "dspark.mode")):
        vector = load_control_vector(file, offset=offset)
        kind = "control vector"
    else:
        projection = load_projection(file)
        if len(projection.basis) > 1:
            raise VectorError(
                f"{file}: projects {len(projection.basis)} directions out of each layer, and a vector has one; "
                "personasteer.ship.load_projection reads it"
            )
        vector = projection.vector
        kind = "projection"
        log.warning("%s: its directions are to be projected out: ablate them (--ablate), do not add them", file)
    if "personasteer.directions" in fields:
        return vector
    return replace(vector, provenance={**vector.provenance, "kind": kind, "source": file.name})


def _fitted(file: Path, vector: PersonaVector, model: Model) -> PersonaVector:
    """The vector with the model's number of blocks, norms and origin."""
    if vector.provenance.get("method") != "imported" or "fingerprint" in vector.provenance:
        check_fits(vector, model)
        return replace(vector, norms=model.norms)
    if vector.n_embd != model.n_embd or vector.n_layer > model.n_layer:
        late = vector.n_embd == model.n_embd and vector.n_layer == model.n_layer + 1
        raise IncompatibleVector(
            f"{file}: has directions of width {vector.n_embd} up to block {vector.n_layer - 1}, the model has blocks 0 "
            f"to {model.n_layer - 1} of width {model.n_embd}"
            + ("; numbers that start behind the embeddings need offset 1 (--offset 1)" if late else "")
        )
    norms = model.norms
    directions = np.full((model.n_layer, model.n_embd), np.nan, np.float32)
    directions[: vector.n_layer] = vector.directions
    provenance = {**vector.provenance, **model.origin}
    weights: dict[int, float] = {}
    if provenance["kind"] in ("control vector", "safetensors"):
        _, lengths = vector.directions_at(vector.layers)
        doses = {il: float(length / norms[il]) for il, length in zip(vector.layers, lengths, strict=True)}
        total = math.fsum(doses.values())
        if not math.isfinite(total):
            raise VectorError(f"the norms of {model.name} are not known, so the directions of {file} have no scale")
        provenance["stored_strength"] = total
        weights = {il: dose / total for il, dose in doses.items()}
    return replace(vector, directions=directions, norms=norms, weights=weights, provenance=provenance)


# ---- safetensors with a direction for each layer


def load_safetensors_directions(
    path: str | os.PathLike[str], *, offset: int = 0, key: str | None = None, name: str | None = None
) -> PersonaVector:
    """Read one direction for each layer from safetensors.

    Either 1-D tensors whose names differ in one number, the layer ("direction.12", "layers.12", "layer_12", "blk.12.v",
    "12"), or one 2-D tensor (layers, n_embd). F16, BF16, F32 and F64 become float32. A row of NaN is a layer without a
    direction.

    Args:
        offset: 0 where the number is the block's index il; 1 where il + 1, as in hidden_states[L]: its layer 0, the
            embeddings, is no block's output and is left out with a warning.
        key: where there are several: the 2-D tensor's name, or what the names of the 1-D tensors start with.
        name: of the vector; the file's when None.

    Raises:
        VectorError: not safetensors, broken, without such tensors or with several kinds of them; of another dtype, of
            different widths, not finite, or all zero.
        ArgumentError: an offset that is not 0 or 1.
    """
    if isinstance(offset, bool) or offset not in (0, 1):
        raise ArgumentError(f"offset must be 0 or 1, not {offset!r}")
    file = Path(path)
    tensors = open_tensors(file, "safetensors")
    found = _numbered(file, tensors, key)
    if tensors.metadata.get("glp.mode") == "project":
        log.warning("%s: its directions are to be projected out (glp.mode): ablate them, do not add them", file)
    blocks: dict[int, NDArray[np.float32]] = {}
    for number, (label, row) in found.items():
        if np.isnan(row).all():
            continue
        if not np.isfinite(row).all():
            raise VectorError(f"{file}: {label} holds values that are not finite (in float32)")
        if number - offset < 0:
            log.warning("%s: %s, the embeddings at offset %d, is left out", file, label, offset)
            continue
        blocks[number - offset] = row
    if not any(row.any() for row in blocks.values()):
        raise VectorError(f"{file}: no direction that is not zero")
    if len({len(row) for row in blocks.values()}) > 1:
        raise VectorError(f"{file}: directions of different widths: {sorted({len(row) for row in blocks.values()})}")
    provenance = {"method": "imported", "kind": "safetensors", "source": file.name, "offset": offset}
    return vector_of_rows(blocks, file.stem if name is None else name, provenance)


def _numbered(file: Path, tensors: TensorFile, key: str | None) -> dict[int, tuple[str, NDArray[np.float32]]]:
    """{number: (name, direction)} of the one group of tensors, or the rows of the one matrix, that is meant."""
    matrices = [label for label, shape in tensors.shapes.items() if len(shape) == 2]
    if key in matrices:
        return _rows_of(tensors, key)
    if key is not None:
        matrices = []
    elif any(is_decoder(label) for label in matrices):
        raise VectorError(f"{file}: is a sparse autoencoder: name one of its features (feature=, --feature)")
    groups: dict[str, dict[int, str]] = {}
    for label, shape in tensors.shapes.items():
        rest = label.removeprefix(key or "")
        if len(shape) != 1 or (key and rest == label) or not re.search(r"\d", rest):
            continue
        named = NUMBERED.fullmatch(rest)
        group = groups.setdefault(f"{named[1]}N{named[3]}" if named else rest, {})
        number = int(named[2]) if named else -1
        if group.setdefault(number, label) != label:
            raise VectorError(f"{file}: {label} and {group[number]} are for the same layer")
    kinds = [*groups, *matrices]
    if len(kinds) != 1 or -1 in next(iter(groups.values()), {}):
        what = "which tensors are the directions?" if kinds else "holds no directions" + (f" {key}" if key else "")
        raise VectorError(
            f"{file}: {what} They are 1-D tensors that differ in one number, or one 2-D tensor; "
            f"a key (--key) names it, or what the names start with{listed(tensors.shapes)}"
        )
    if matrices:
        return _rows_of(tensors, matrices[0])
    return {number: (label, tensors.take(label)) for number, label in groups[kinds[0]].items()}


def _rows_of(tensors: TensorFile, key: str) -> dict[int, tuple[str, NDArray[np.float32]]]:
    return {n: (f"row {n} of {key}", row) for n, row in enumerate(tensors.take(key))}
