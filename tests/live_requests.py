"""Requests as the engine compiles them, on a native session: what several tests of the request side are built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import samples

import personasteer as ps
from personasteer.engine import Compiled, Request

if TYPE_CHECKING:
    from conftest import Loaded

NORM = 8.0  # about the length of a block output of the tiny models


@dataclass
class Steerable:
    """What the edits need to know of a model that is open as an extension model only."""

    n_layer: int
    n_embd: int
    fingerprint: str = ""
    identity: Mapping[str, str] = field(default_factory=dict)
    name: str = "model"

    @property
    def norms(self) -> np.ndarray:
        return np.full(self.n_layer, NORM, np.float32)


def steerable(loaded: Loaded) -> Steerable:
    return Steerable(loaded.n_layer, loaded.n_embd)


def vector_for(loaded: Loaded, seed: int, layers: Sequence[int] = (1,), **more: Any) -> ps.PersonaVector:
    return samples.vector(n_layer=loaded.n_layer, n_embd=loaded.n_embd, layers=layers, seed=seed, **more)


def submit(session: Any, loaded: Loaded, request: Request) -> int:
    return int(session.submit(**Compiled(request, steerable(loaded)).arguments(0)))


def basis(loaded: Loaded, il: int) -> tuple[Mapping[int, np.ndarray], ...]:
    """Read-outs that give the output of block il before its edits, number by number: <h, e_k> = h_k is exact."""
    return tuple({il: row} for row in np.eye(loaded.n_embd, dtype=np.float32))


def before_edits(result: Mapping[str, Any]) -> np.ndarray:
    """(n_tokens, n_embd) of a request that reads a `basis`."""
    return np.asarray(result["readings"][:, 0, :])
