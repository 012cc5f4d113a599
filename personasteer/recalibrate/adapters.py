"""LoRA adapters as GGUF files that llama.cpp applies to the unchanged, quantized model."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from personasteer.errors import ModelError
from personasteer.files import check_output
from personasteer.ship.fields import Field, read_fields, save_gguf
from personasteer.ship.rewrite import ModelFile

TARGETS = ("attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")  # queries and keys: files order their rows anew


@dataclass(frozen=True)
class Factors:
    """What an adapter adds: scale * B A to each named tensor, A (rank, n_in) and B (n_out, rank)."""

    factors: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
    scale: float
    rank: int


@functools.cache
def _names(architecture: str, n_layer: int) -> Any:
    arch = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    return gguf.get_tensor_name_map(arch, n_layer) if arch is not None else None


def gguf_name(file: ModelFile, module: str) -> str | None:
    """What a GGUF file calls a module of transformers, without ".weight": "blk.0.attn_v"; None where it has none."""
    table = _names(file.architecture, file.n_layer)
    name = table.get_name(module) if table is not None else None
    return None if name is None else str(name)


def trained_modules(file: ModelFile, model: Any) -> dict[str, str]:
    """{name in transformers: name of the tensor} of the matrices that a LoRA trains.

    Raises ModelError where the model has none of them.
    """
    found = {}
    for module, layer in model.named_modules():
        name = gguf_name(file, module)
        if name and name.rpartition(".")[2] in TARGETS and getattr(layer, "weight", None) is not None:
            found[module] = f"{name}.weight"
    missing = [name for name in found.values() if name not in file.tensors]
    if missing or not found:
        raise ModelError(
            f"{file.path}: {file.architecture!r} keeps its matrices in another form than LoRAs are trained "
            f"for (none of {', '.join(TARGETS)}{'; ' + missing[0] + ' is not in the file' if missing else ''})"
        )
    return found


def save_adapter(
    out: str | os.PathLike[str],
    file: ModelFile,
    factors: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
    *,
    alpha: float,
    provenance: Mapping[str, Any],
) -> None:
    """Write {tensor: (A, B)} as a LoRA GGUF: llama.cpp adds alpha / rank * B A to the tensor.

    Raises ArgumentError for a path that cannot be written, PersonasteerError where the disk is full.

    Source: arXiv 2106.09685 (LoRA); llama.cpp's convert_lora_to_gguf.py for the names.
    """
    check_output(Path(out))
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = a, b
    fields = [
        Field.of("general.type", "adapter"),
        Field.of("general.name", str(provenance.get("name", "fine-tuned"))),
        Field.of("adapter.type", "lora"),
        Field("adapter.lora.alpha", gguf.GGUFValueType.FLOAT32, float(alpha)),
        Field.of("personasteer.training", json.dumps(provenance, sort_keys=True, ensure_ascii=False)),
    ]
    save_gguf(out, file.architecture, fields, tensors)


def read_adapter(path: str | os.PathLike[str], file: ModelFile) -> Factors:
    """The factors of a LoRA GGUF for a model.

    Raises ModelError where it is none, is for another architecture, or does not fit the model's tensors.
    """
    adapter = ModelFile(path)
    fields = read_fields(path)
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        raise ModelError(f"{path}: is no LoRA adapter")
    if adapter.architecture != file.architecture:
        raise ModelError(f"{path}: is for {adapter.architecture!r}, the model is {file.architecture!r}")
    names = [name.removesuffix(".lora_a") for name in adapter.tensors if name.endswith(".lora_a")]
    found = {}
    ranks = set()
    for name in names:
        if f"{name}.lora_b" not in adapter.tensors or name not in file.tensors:
            raise ModelError(f"{path}: edits {name}, which it has no second factor for, or the model does not have")
        a, b = (adapter.rows(adapter.tensors[f"{name}.lora_{side}"]) for side in "ab")
        n_in, n_out = file.tensors[name].shape[:2]
        if a.shape[1] != n_in or b.shape != (n_out, len(a)) or not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ModelError(f"{path}: {name} is {b.shape} times {a.shape}, the model's tensor ({n_out}, {n_in})")
        found[name] = (a, b)
        ranks.add(len(a))
    if len(ranks) != 1:
        raise ModelError(f"{path}: holds no LoRA factors, or factors of several ranks")
    rank = ranks.pop()
    alpha = float(fields.get("adapter.lora.alpha", 0.0) or rank)
    return Factors(found, alpha / rank, rank)
