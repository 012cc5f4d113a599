"""Directional ablation as a LoRA adapter that llama.cpp applies to the unchanged model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from personasteer.errors import ArgumentError
from personasteer.ship.ablate import ablation_fields, products
from personasteer.ship.directions import Removed
from personasteer.ship.fields import Field, save_gguf
from personasteer.ship.rewrite import ModelFile, Progress, Rows
from personasteer.ship.writers import has_tied_output, residual_writers


@dataclass(frozen=True)
class Adapter:
    """What a LoRA edits, and what of the model's writers it cannot: {tensor: why}."""

    file: str
    names: list[str]
    share: float
    rank: int
    matrices: list[str]
    left_out: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """As plain data."""
        return dict(vars(self))


def save_lora(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    removed: Removed,
    *,
    progress: Progress | None = None,
) -> Adapter:
    """Write a LoRA GGUF that takes directions V (k, n_embd) out of all that the model's matrices write.

    For W (n_embd, n_in): W + B A = (I - share V^T V) W with A = V W, (k, n_in), and B = -share V^T, (n_embd, k): rank
    k, exact up to float32 and what the quantized W itself rounds. At scale 1.0 the whole share is removed. Mixtures of
    experts get an A for each expert. Embeddings are edited where the model has an output matrix of its own; where they
    are tied, llama.cpp would take the same adapter for the output, which does not fit, so they are left out, as biases
    are.

    Raises:
        ModelError: an architecture that normalises what its blocks write, or whose writers are not known.
        ArgumentError: directions of another width, a folder that cannot be written to.

    Source: arXiv 2406.11717, appendix on weight orthogonalisation; 2106.09685 (LoRA).
    """
    file = ModelFile(base)
    n_embd = file.n_embd
    if removed.basis.shape[1] != n_embd:
        raise ArgumentError(f"the directions are {removed.basis.shape[1]} wide, the model {n_embd}")
    writers = residual_writers(file)
    tensors: dict[str, Rows] = {}
    left_out: dict[str, str] = {}
    basis, share = removed.basis, removed.share
    for done, writer in enumerate(writers):
        name = writer.tensor.name
        if progress:
            progress(done, len(writers))
        if writer.kind == "bias":
            left_out[name] = "an adapter edits no biases"
        elif writer.kind == "matrix":
            a = np.stack(products(file, writer, basis))
            b = np.broadcast_to(-share * basis.T, (len(a), n_embd, len(basis)))
            experts = len(writer.tensor.shape) > 2 and writer.tensor.shape[2] > 1
            tensors[f"{name}.lora_a"] = _float32(a if experts else a[0])
            tensors[f"{name}.lora_b"] = _float32(b if experts else b[0])
        elif name != "token_embd.weight":
            left_out[name] = "llama.cpp adapts no other table than token_embd.weight"
        elif has_tied_output(file):
            left_out[name] = "the output matrix is the same tensor, and llama.cpp would adapt it in the wrong shape"
        else:
            rows = [-share * (rows @ basis.T) for _, rows in file.chunks(writer.tensor)]
            tensors[f"{name}.lora_a"] = _float32(np.concatenate(rows))  # looked up by token: not transposed
            tensors[f"{name}.lora_b"] = _float32(basis.T)
    if progress:
        progress(len(writers), len(writers))
    fields = [
        Field.of("general.type", "adapter"),
        Field.of("general.name", "without " + ", ".join(removed.names)),
        Field.of("adapter.type", "lora"),
        Field("adapter.lora.alpha", gguf.GGUFValueType.FLOAT32, float(len(basis))),  # alpha / rank = 1
        *ablation_fields("lora", removed),
    ]
    save_gguf(out, file.architecture, fields, tensors)
    matrices = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    return Adapter(Path(out).name, removed.names, share, len(basis), matrices, left_out)


def _float32(data: Any) -> Rows:
    return np.ascontiguousarray(data, np.float32)
