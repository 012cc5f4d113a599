"""qwen2 written as a llama, which llama.cpp computes alike, and whose loader takes a bias at a block's end.

Both have the same blocks, with biases of queries, keys and values. They differ in the rotary embedding: in heads of d
dimensions qwen2 turns the pairs (j, j + d/2), a llama (2j, 2j + 1). So the rows of W_q and W_k and their biases are put
in another order within each head, whole rows of quantized numbers as they are; scores are the same sums of products in
another order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from personasteer.ship.fields import Field, typed_fields
from personasteer.ship.rewrite import EditRows, ModelFile, Tensor

FROM, TO = "qwen2", "llama"
ARCHITECTURE = "general.architecture"
TURNED = ("attn_q", "attn_k")
TABLES = ("token_embd.weight", "output_norm.weight", "output.weight")
PARTS = (
    *(f"{name}.{kind}" for name in ("attn_q", "attn_k", "attn_v") for kind in ("weight", "bias")),
    "attn_norm.weight", "attn_output.weight", "ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight",
)  # fmt: skip


def why_not_llama(file: ModelFile) -> str:
    """Why this file cannot be written as a llama; "" where it can."""
    if file.architecture != FROM:
        return f"architecture {file.architecture!r} is no llama by another name"
    head = _head(file)
    if not head or head % 2:
        return "its heads do not divide its width"
    for name in file.tensors:
        if name not in TABLES and re.sub(r"^blk\.\d+\.", "", name) not in PARTS:
            return f"a llama has no tensor {name}"
    for il in range(file.n_layer):
        for name in TURNED:
            tensor = file.tensors.get(f"blk.{il}.{name}.weight")
            if tensor is None or tensor.n_rows % head:
                return f"its heads do not divide the rows of blk.{il}.{name}.weight"
    dimensions = file.fields.get(f"{FROM}.rope.dimension_count", head)
    return "" if dimensions == head else f"its rotary embedding turns {dimensions} of {head} dimensions"


def as_llama(file: ModelFile) -> tuple[list[Field], list[str], dict[str, EditRows]]:
    """(key-values to set, key-values to remove, edits of tensors) that make a llama of the file."""
    prefix = f"{FROM}."
    given = [f for f in typed_fields(file.path) if f.key.startswith(prefix)]
    renamed = [f._replace(key=f"{TO}.{f.key.removeprefix(prefix)}") for f in given]

    def edit(tensor: Tensor) -> Iterator[bytes]:
        yield reordered(file, tensor)

    edits: dict[str, EditRows] = dict.fromkeys(turned(file), edit)
    return [Field.of(ARCHITECTURE, TO), *renamed], [f.key for f in given], edits


def turned(file: ModelFile) -> list[str]:
    """The tensors whose rows are put in another order."""
    names = (f"blk.{il}.{part}.{kind}" for il in range(file.n_layer) for part in TURNED for kind in ("weight", "bias"))
    return [name for name in names if name in file.tensors]


def reordered(file: ModelFile, tensor: Tensor) -> bytes:
    """The tensor's bytes with row h d + 2 j + k taken from row h d + j + k d/2, k = 0 or 1, of head h."""
    n = tensor.n_rows if tensor.n_rows > 1 else tensor.n_per_row
    head = _head(file)
    order = np.arange(n).reshape(-1, 2, head // 2).swapaxes(1, 2).ravel()
    rows = np.frombuffer(file.raw(tensor), np.uint8).reshape(n, -1)
    return rows[order].tobytes()


def _head(file: ModelFile) -> int:
    n_head = file.hyperparameter("attention.head_count")
    return 0 if n_head < 1 or file.n_embd % n_head else file.n_embd // n_head
