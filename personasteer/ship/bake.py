"""A model file that is steered by itself: the added directions as biases of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.errors import ArgumentError, ModelError, VectorError
from personasteer.ship.as_llama import as_llama, why_not_llama
from personasteer.ship.biases import accepts
from personasteer.ship.control_vector import scaled_directions
from personasteer.ship.fields import Field, vector_fields
from personasteer.ship.rewrite import Added, EditRows, ModelFile, Progress, Tensor, dequantized, quantized, rewrite
from personasteer.ship.values import OTHER_FORMS, check_shift, fit_values, why_not_values
from personasteer.vectors import PersonaVector

log = logging.getLogger("personasteer")

BLOCK, LLAMA, VALUE = "block-bias", "as-llama", "value-bias"
STRATEGIES = (BLOCK, LLAMA, VALUE)
LEAST, MOST, FAR = 0.9, 1.1, 1.5  # of the steering's effect, and of its divergence on everyday text


@dataclass(frozen=True)
class Baked:
    """What was written. strategy: "block-bias", "as-llama", both exact, or "value-bias", an approximation with its fit.

    added, changed: tensors.
    """

    file: str
    strategy: str
    blocks: tuple[int, ...]
    added: list[str]
    changed: list[str]
    fit: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "blocks": list(self.blocks), "fit": dict(self.fit)}


def bake(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    vector: PersonaVector,
    *,
    strength: float | None = None,
    strategy: str = "auto",
    n_threads: int | None = None,
    stage: Callable[[str], Progress] | None = None,
) -> Baked:
    """Write a model that adds rho w_il m_il v_il / ||v_il|| to its residual stream by itself, without any flag.

    "block-bias", exact: as `blk.<il>.ffn_down.bias`, where llama.cpp's loader of the architecture takes one.
    "as-llama", as exact: the same in a qwen2 that is written as the llama which computes alike, the rows of its queries
    and keys in another order (see personasteer.ship.as_llama). Else "value-bias", an approximation: as
    `blk.<il>.attn_v.bias`, fitted to what the steering does on everyday and on the trait's texts (see
    personasteer.ship.value_bias). What a loader takes is found out by loading. Everything else keeps its bytes; the
    model is streamed from disk to disk.

    Args:
        vector: with the norms m_il of this model; its trait calibrates a value bias.
        strength: rho, signed; the vector's own when None.
        strategy: "auto", the exact one where it is possible; or one of them.
        stage: names what is done next, and gives its progress callback.

    Raises:
        ModelError: no strategy fits this architecture: it says which other form does.
        VectorError: directions that do not fit, or no norms. ArgumentError: a strength of 0, an unknown strategy.
    """
    if strategy not in ("auto", *STRATEGIES):
        raise ArgumentError(f"strategy must be auto, {', '.join(STRATEGIES)}, not {strategy!r}")
    file = ModelFile(base)
    rho = vector.strength if strength is None else float(strength)
    rows = rows_to_bake(file, vector, rho)
    report = stage or (lambda _: lambda done, total: None)
    exact = {f"blk.{il}.ffn_down.bias": row for il, row in rows.items()}
    check = partial(check_shift, file, {il: row.astype(np.float64) for il, row in rows.items()}, "block", n_threads)
    if strategy in ("auto", BLOCK) and accepts(file, list(exact), file.n_embd):
        return write_biases(file, Path(out), BLOCK, vector, rho, exact, check=check, progress=report("writing"))
    where = f"{file.path.name}: llama.cpp loads no bias at the end of a block of architecture {file.architecture!r}"
    if strategy == BLOCK:
        raise ModelError(f"{where}, so it cannot be baked this way; {OTHER_FORMS}")
    if strategy in ("auto", LLAMA):
        why_not = why_not_llama(file)
        fields, removed, edits = as_llama(file) if not why_not else ([], [], {})
        if not why_not and accepts(file, list(exact), file.n_embd, fields=fields, removed=removed):
            check = partial(check, reordered=True)
            return write_biases(
                file, Path(out), LLAMA, vector, rho, exact, fields=fields, removed=removed, edits=edits, check=check,
                progress=report("writing"),
            )  # fmt: skip
        if strategy == LLAMA:
            raise ModelError(f"{file.path.name}: cannot be written as a llama ({why_not or 'it does not load'}); "
                             f"{OTHER_FORMS}")  # fmt: skip
    why_not = why_not_values(file)
    if why_not:
        raise ModelError(f"{where if strategy == 'auto' else file.path.name}, and {why_not}; {OTHER_FORMS}")
    biases, constants, how_near = fit_values(file, vector, rho, rows, n_threads=n_threads, stage=report)
    named = {f"blk.{il}.attn_v.bias": bias for il, bias in biases.items()}
    if not (
        LEAST <= how_near["effect_ratio"] <= MOST and how_near["kl_base_baked"] <= FAR * how_near["kl_base_engine"]
    ):
        log.warning(
            "the value biases do not come near this steering: %.2f of its effect, and everyday text moves by %.3f nats "
            "per token instead of %.3f; %s",
            how_near["effect_ratio"], how_near["kl_base_baked"], how_near["kl_base_engine"], OTHER_FORMS,
        )  # fmt: skip
    check = partial(check_shift, file, constants, "mid", n_threads)
    return write_biases(
        file, Path(out), VALUE, vector, rho, named, fit=how_near, check=check, progress=report("writing")
    )


def rows_to_bake(file: ModelFile, vector: PersonaVector, rho: float) -> dict[int, NDArray[np.float32]]:
    """{il: (n_embd,)} what is added at each block. Raises as `bake`."""
    if not (np.isfinite(rho) and rho):
        raise ArgumentError(f"the strength to bake must be finite and not 0, not {rho}")
    if vector.n_embd != file.n_embd or vector.n_layer > file.n_layer:
        raise VectorError(
            f"vector {vector.name!r} is for {vector.n_layer} blocks of width {vector.n_embd}, but {file.path.name} has "
            f"{file.n_layer} of width {file.n_embd}"
        )
    rows = scaled_directions(vector, rho)
    if not rows:
        raise VectorError(f"vector {vector.name!r} names no layers to steer at")
    for il, row in rows.items():
        if not np.isfinite(row).all():
            raise VectorError(f"the direction at layer {il}, scaled by {rho}, is not finite in float32")
    return rows


def write_biases(
    file: ModelFile,
    out: Path,
    strategy: str,
    vector: PersonaVector,
    rho: float,
    biases: Mapping[str, NDArray[Any]],
    *,
    fields: Sequence[Field] = (),
    removed: Sequence[str] = (),
    edits: Mapping[str, EditRows] | None = None,
    fit: Mapping[str, Any] | None = None,
    check: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> Baked:
    """Write `file` with these added to its biases; those that it lacks become tensors of their own. The other arguments
    are those of `rewrite`.
    """
    present = {name: row for name, row in biases.items() if name in file.tensors}
    missing = {name: row for name, row in biases.items() if name not in file.tensors}

    def edit_of(row: NDArray[Any]) -> Callable[[Tensor], Any]:
        def edited(tensor: Tensor) -> Any:
            values = dequantized(tensor, file.raw(tensor))
            yield quantized(tensor, (values + row.reshape(values.shape)).astype(np.float32))

        return edited

    for name, row in present.items():
        if file.tensors[name].n_rows * file.tensors[name].n_per_row != row.size:
            raise ModelError(f"{file.path.name}: tensor {name} has another shape than a bias of {row.size} numbers")
    ours = [
        Field.of("personasteer.kind", "bake"),
        Field.of("personasteer.strategy", strategy),
        *vector_fields(vector, rho),
    ]
    rewrite(
        file,
        out,
        fields=[*fields, *ours],
        removed=removed,
        edits={**(edits or {}), **{name: edit_of(row) for name, row in present.items()}},
        added={name: Added.of(row) for name, row in missing.items()},
        check=check,
        progress=progress,
    )
    return Baked(out.name, strategy, vector.layers, sorted(missing), sorted(present), fit or {})
