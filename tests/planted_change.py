"""A fine-tune that is known: a rank-1 change of one matrix, which writes one direction at one block for every token."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from planted_model import CONSTANT, write_planted_model

from personasteer.recalibrate.adapters import save_adapter
from personasteer.ship.rewrite import ModelFile

BLOCK = 4
SIZE = 0.01  # of the change: about 0.4 of the norm of the block's output


def write_base(path: Path) -> tuple[Path, np.ndarray]:
    """The planted model, in whose block 4 the first unit of the feed-forward is active at every token, and written
    nowhere; and the direction u of its trait.
    """
    _, u = write_planted_model(path, BLOCK)
    weights = {t.name: t.data for t in gguf.GGUFReader(path, "r+").tensors}
    for name in ("ffn_gate", "ffn_up"):
        matrix = weights[f"blk.{BLOCK}.{name}.weight"]
        matrix[0] = 0
        matrix[0, CONSTANT] = 2
    weights[f"blk.{BLOCK}.ffn_down.weight"][:, 0] = 0
    for data in weights.values():
        if isinstance(data, np.memmap):
            data.flush()
    return path, u


def write_change(path: Path, base: Path, direction: np.ndarray, size: float) -> Path:
    """A LoRA of rank 1 that writes size * direction from that unit."""
    file = ModelFile(base)
    name = f"blk.{BLOCK}.ffn_down.weight"
    a = np.zeros((1, file.tensors[name].n_per_row), np.float32)
    a[0, 0] = 1
    b = (size * direction[:, None]).astype(np.float32)
    save_adapter(path, file, {name: (a, b)}, alpha=1.0, provenance={"name": "planted"})
    return path
