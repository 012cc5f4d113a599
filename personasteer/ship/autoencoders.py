"""A feature of a sparse autoencoder as a direction."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.errors import ArgumentError, IncompatibleVector, VectorError
from personasteer.ship.control_vector import vector_of_rows
from personasteer.ship.tensor_files import kind_of, listed, open_tensors
from personasteer.vectors import PersonaVector

FEATURE_ROWS = ("W_dec", "w_dec", "W_D")  # (d_sae, d_in)
FEATURE_COLUMNS = ("decoder.weight",)  # (d_in, d_sae)
CONFIGS = ("cfg.json", "config.json", "hyperparams.json", "hyperparameters.json")
HOOKS = (  # where a decoder writes to, before where its encoder reads
    "hook_name_out", "hook_point_out", "hf_hook_point_out", "hook_name", "hook_point", "hook_point_in",
    "hf_hook_point_in",
)  # fmt: skip


def load_sae_direction(
    path: str | os.PathLike[str],
    feature: int,
    layer: int | None = None,
    *,
    n_layer: int | None = None,
    n_embd: int | None = None,
    key: str | None = None,
    name: str | None = None,
) -> PersonaVector:
    """Read what a feature of a sparse autoencoder writes into the stream: its row of the decoder (d_sae, d_in).

    Known by name: W_dec, w_dec, W_D (d_sae, d_in), as in SAELens, Gemma Scope and sparsify; decoder.weight (d_in,
    d_sae), as in Llama Scope. Where n_embd is known, the side of that length is d_in. Only the row is read.

    Args:
        path: safetensors or npz.
        layer: block il whose output the autoencoder reads; where None, what a cfg.json, config.json or
            hyperparams.json beside the file says, or its folder "layers.<il>": blocks.L.hook_resid_post is block L,
            blocks.L.hook_resid_pre block L - 1, model.layers.L.output and layers.L block L.
        n_layer: blocks of the model; layer + 1 when None.
        n_embd: its width.
        key: the decoder's name, where it is another.
        name: of the vector; the file's with the feature's number when None.

    Raises:
        VectorError: a pickle, a broken file, no decoder in it, a feature that is zero or not finite; made for another
            place than the stream at a block's end: MLP and attention outputs are other spaces.
        IncompatibleVector: another width than n_embd.
        ArgumentError: a feature or layer that does not exist, no layer where nothing tells, another layer than what
            stands beside the file.
    """
    file = Path(path)
    kind = kind_of(file)
    if kind == "gguf":
        raise VectorError(f"{file}: is a GGUF file, autoencoders are safetensors or npz")
    source: dict[str, Any] = {"method": "imported", "kind": "autoencoder", "source": file.name, "feature": feature}
    hook = _hook_of(file)
    il = _block_of(file, hook, layer)
    if hook is not None:
        source["hook"] = hook
    if n_layer is not None and not il < n_layer:
        raise ArgumentError(f"layer {il} is out of range: the model has blocks 0 to {n_layer - 1}")
    tensors = open_tensors(file, kind)
    shapes = tensors.shapes
    key = _decoder(file, shapes, key)
    axis = _feature_axis(file, key, shapes[key], n_embd)
    if isinstance(feature, bool) or not 0 <= feature < shapes[key][axis]:
        raise ArgumentError(f"feature {feature} is out of range: {key} has features 0 to {shapes[key][axis] - 1}")
    row = tensors.take(key, axis, feature)
    if not np.isfinite(row).all():
        raise VectorError(f"{file}: feature {feature} of {key} is not finite (in float32)")
    if not row.any():
        raise VectorError(f"{file}: feature {feature} of {key} is zero")
    source |= {"key": key, "layer": il}
    return vector_of_rows({il: row}, f"{file.stem} {feature}" if name is None else name, source, n_layer)


def is_decoder(label: str) -> bool:
    """Whether a tensor of this name is an autoencoder's decoder."""
    return any(label == known or label.endswith(f".{known}") for known in FEATURE_ROWS + FEATURE_COLUMNS)


def _decoder(file: Path, shapes: Mapping[str, tuple[int, ...]], key: str | None) -> str:
    if key is None:
        known = [label for label in shapes if is_decoder(label)]
        if len(known) != 1:
            raise VectorError(
                f"{file}: {'several decoders' if known else 'no decoder'} of a known name (W_dec, decoder.weight, "
                f"...): name one by key (--key){listed(known or shapes)}"
            )
        key = known[0]
    if key not in shapes:
        raise VectorError(f"{file}: has no tensor {key!r}{listed(shapes)}")
    if len(shapes[key]) != 2 or 0 in shapes[key]:
        raise VectorError(f"{file}: {key} must have the shape (d_sae, d_in), not {shapes[key]}")
    return key


def _feature_axis(file: Path, key: str, shape: tuple[int, ...], n_embd: int | None) -> int:
    """The side of a decoder that counts the features."""
    named: int | None = None
    if is_decoder(key):
        named = 1 if key.endswith(FEATURE_COLUMNS) else 0
    sides = [axis for axis in (0, 1) if n_embd in (None, shape[1 - axis])]
    if not sides:
        raise IncompatibleVector(f"{file}: {key} is {shape}, the model's width is {n_embd}: made for another model")
    if len(sides) == 1:
        return sides[0]
    if named is None:
        raise VectorError(
            f"{file}: which side of {key}, {shape}, counts the features? neither its name nor a width tells"
        )
    return named


def _hook_of(file: Path) -> str | None:
    """What stands beside a file about where its autoencoder writes to."""
    folders = [file.parent] + ([file.parent.parent] if file.parent.name == "checkpoints" else [])
    for config in (folder / name for folder in folders for name in CONFIGS):
        if not config.is_file():
            continue
        try:
            content = json.loads(config.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            raise VectorError(f"{config}: cannot be read ({type(e).__name__}: {e})") from e
        if not isinstance(content, dict):
            continue
        inner = content.get("metadata")
        for part in (content, inner if isinstance(inner, dict) else {}):
            for name in HOOKS:
                if isinstance(part.get(name), str):
                    return str(part[name])
    folder = file.absolute().parent.name
    return folder if re.fullmatch(r"layers\.\d+(\..*)?", folder) else None


def _block_of(file: Path, hook: str | None, layer: int | None) -> int:
    if layer is not None and (isinstance(layer, bool) or layer < 0):
        raise ArgumentError(f"layer must be a block's index from 0, not {layer}")
    if hook is None:
        if layer is None:
            raise ArgumentError(f"{file}: nothing beside it tells its layer: give it (layer=, --layer)")
        return layer
    if at := re.fullmatch(r"blocks\.(\d{1,5})\.hook_resid_(post|pre)", hook):
        il = int(at[1]) - (at[2] == "pre")
    elif at := re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.(\d{1,5})(?:\.output)?", hook):
        il = int(at[1])
    else:
        raise VectorError(f"{file}: made for {hook}, which is not the residual stream at a block's end")
    if il < 0:
        raise VectorError(f"{file}: made for {hook}, the embeddings, which are no block's output")
    if layer not in (None, il):
        raise ArgumentError(f"{file}: made for {hook}, the output of block {il}, not {layer}")
    return il


def load_dictionary(
    path: str | os.PathLike[str], layer: int | None = None, *, n_embd: int | None = None, key: str | None = None
) -> tuple[NDArray[np.float32], int]:
    """Read the whole decoder of a sparse autoencoder, (d_sae, d_in), and the block il whose output it reads.

    Raises as `load_sae_direction` does.
    """
    file = Path(path)
    kind = kind_of(file)
    if kind == "gguf":
        raise VectorError(f"{file}: is a GGUF file, autoencoders are safetensors or npz")
    il = _block_of(file, _hook_of(file), layer)
    tensors = open_tensors(file, kind)
    shapes = tensors.shapes
    key = _decoder(file, shapes, key)
    decoder = tensors.take(key)
    if _feature_axis(file, key, shapes[key], n_embd) == 1:
        decoder = np.ascontiguousarray(decoder.T)
    if not np.isfinite(decoder).all():
        raise VectorError(f"{file}: {key} is not finite (in float32)")
    if not decoder.any(axis=1).all():
        raise VectorError(f"{file}: {key} has features that are zero")
    return decoder, il
