"""Vectors and files that several tests are built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from personasteer import PersonaVector


def vector(
    *, n_layer: int = 4, n_embd: int = 64, layers: Sequence[int] = (1, 2), seed: int = 0, **more: Any
) -> PersonaVector:
    """Random directions at every block; the shape fits the tiny model."""
    data = np.random.default_rng(seed).standard_normal((n_layer, n_embd)).astype(np.float32)
    return PersonaVector(data, tuple(layers), **more)


def write_gguf(path: Path, tensors: Mapping[str, np.ndarray], architecture: str = "controlvector") -> Path:
    """A control vector as another tool would write it."""
    w = gguf.GGUFWriter(str(path), architecture)
    for name, data in tensors.items():
        w.add_tensor(name, data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def no_leftovers(folder: Path, *expected: str) -> bool:
    """Whether the folder holds exactly these files: no temporary one stayed."""
    return sorted(p.name for p in folder.iterdir()) == sorted(expected)
