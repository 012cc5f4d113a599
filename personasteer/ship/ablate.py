"""Directional ablation written into the weights of a new model file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.errors import ArgumentError, ModelError
from personasteer.ship.directions import Removed
from personasteer.ship.fields import Field, text_of
from personasteer.ship.rewrite import (
    Added,
    ModelFile,
    Progress,
    Rows,
    Tensor,
    dequantized,
    in_parallel,
    quantized,
    rewrite,
)
from personasteer.ship.writers import Writer, has_tied_output, residual_writers

ROWS = 512  # of a matrix at a time
TRIES = 8  # quantizations of a row of a table
GROUPS = 64  # of the rows with most weight, quantized one after the other


@dataclass
class TensorChange:
    """What became of one tensor. norm_change: (||W'|| - ||W||) / ||W|| in the file. requantization: ||W' - E|| / ||E||,
    E the edited weights before they were quantized. reading: ||V W' - (1 - share) V W|| / ||V W||, what it still writes
    along the directions beyond what was to stay.
    """

    name: str
    type: str
    block: int
    share: float
    norm_change: float = 0.0
    requantization: float = 0.0
    reading: float = 0.0


@dataclass
class Ablation:
    """What was done to the weights. tied_output: the embeddings are the output matrix, which is thus edited, too,
    unless it was `untied`.
    """

    file: str
    names: list[str]
    blocks: tuple[int, ...]  # that the directions are from
    share: float
    tensors: list[TensorChange] = field(default_factory=list)
    tied_output: bool = False
    untied: bool = False

    def summary(self) -> dict[str, Any]:
        """As plain data, with the extremes first."""
        return {
            "largest_reading": max((t.reading for t in self.tensors), default=0.0),
            "largest_requantization": max((t.requantization for t in self.tensors), default=0.0),
            **asdict(self),
        }


def ablate_weights(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    removed: Removed,
    *,
    shares: Mapping[int, float] | None = None,
    importance: str | os.PathLike[str] | None = None,
    untie: bool = False,
    n_threads: int = 2,
    progress: Progress | None = None,
) -> Ablation:
    """Write a model that no longer writes along the directions V: W <- (I - share V^T V) W for each matrix that writes
    to the residual stream, e <- e - share V^T (V e) for its embeddings and biases.

    Each tensor is dequantized, edited and quantized to its own type; all others keep their bytes.

    Args:
        shares: factors of the share by block, -1 the embeddings; 1 where it names none, 0 leaves a block as it is.
        importance: an importance matrix (GGUF of llama-imatrix) for the quantizers.
        untie: where the embeddings are the output matrix, too, keep a copy of them as they were as the output matrix:
            the file grows by it, and only what is written to the stream changes.

    Raises:
        ModelError: an architecture that normalises what its blocks write, or whose writers are not known.
        ArgumentError: a type that ggml cannot write without importances, or a share outside 0..1.

    Source: arXiv 2406.11717, appendix on weight orthogonalisation.
    """
    file = ModelFile(base)
    if removed.basis.shape[1] != file.n_embd:
        raise ArgumentError(f"the directions are {removed.basis.shape[1]} wide, the model {file.n_embd}")
    for il, factor in (shares or {}).items():
        if not (-1 <= il < file.n_layer and np.isfinite(factor) and 0 <= factor * removed.share <= 1):
            raise ArgumentError(
                f"{factor:g} at block {il} is no share of a block from -1 (embeddings) to {file.n_layer - 1}"
            )
    weights = read_importance(importance) if importance is not None else {}
    edits: dict[str, Any] = {}
    tied = has_tied_output(file)
    added = {"output.weight": Added.copy_of(file, file.tensors["token_embd.weight"])} if tied and untie else {}
    result = Ablation(
        Path(out).name, removed.names, removed.blocks, removed.share, tied_output=tied, untied=bool(added)
    )
    for writer in residual_writers(file):
        share = removed.share * (shares or {}).get(writer.block, 1.0)
        if share == 0:
            continue
        change = TensorChange(writer.tensor.name, writer.tensor.type, writer.block, share)
        result.tensors.append(change)
        columns = weights.get(writer.tensor.name)
        quantized(writer.tensor, np.zeros((1, writer.tensor.n_per_row), np.float32), _columns(columns, 0))  # can it be?
        edits[writer.tensor.name] = partial(_edited, file, writer, removed.basis, change, columns, n_threads)
    if not edits:
        raise ArgumentError("all shares are 0: nothing would change")
    fields = ablation_fields("ablate", removed, shares)
    rewrite(file, Path(out), fields=fields, edits=edits, added=added, progress=progress)
    return result


def ablation_fields(kind: str, removed: Removed, shares: Mapping[int, float] | None = None) -> list[Field]:
    """What a file needs to be compared with the engine's Ablate, and its weights with those of the base."""
    factors = dict(sorted((shares or {}).items()))
    own = [
        Field.of("personasteer.share_blocks", np.array(list(factors), np.int32)),
        Field.of("personasteer.share_factors", np.array(list(factors.values()), np.float32)),
    ]
    provenance = [dict(v.provenance) for v in removed.vectors]
    return [
        Field.of("personasteer.kind", kind),
        Field.of("personasteer.removed", removed.basis.astype(np.float32)),
        Field.of("personasteer.n_embd", int(removed.basis.shape[1])),
        Field.of("personasteer.share", float(removed.share)),
        Field.of("personasteer.names", removed.names),
        Field.of("personasteer.blocks", np.array(removed.blocks, np.int32)),
        Field.of("personasteer.provenance", json.dumps(provenance, sort_keys=True, ensure_ascii=False)),
        *(own if factors else []),
    ]


def products(file: ModelFile, writer: Writer, basis: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """V W of a matrix, (k, n_in) for each of its experts."""
    n_embd = basis.shape[1]
    out = []
    for first in range(0, writer.tensor.n_rows, n_embd):
        total = np.zeros((len(basis), writer.tensor.n_per_row))
        for start, rows in file.chunks(writer.tensor, first, n_embd):
            total += basis[:, start - first : start - first + len(rows)] @ rows
        out.append(total)
    return out


def _columns(importance: Rows | None, expert: int) -> Rows | None:
    return None if importance is None else importance[expert if len(importance) > 1 else 0]


def _edited(
    file: ModelFile,
    writer: Writer,
    basis: NDArray[np.float64],
    change: TensorChange,
    importance: Rows | None,
    n_threads: int,
    tensor: Tensor,
) -> Iterator[bytes]:
    """The new bytes of a tensor, in order; `change` is filled when all are made."""
    sums = np.zeros(6)
    if writer.kind == "matrix":
        n_embd = basis.shape[1]
        how = (basis, change.share)
        parts: Iterator[tuple[bytes, NDArray[np.float64]]] = (
            _matrix_without(tensor, file.raw(tensor, first, n_embd), *how, _columns(importance, expert), n_threads)
            for expert, first in enumerate(range(0, tensor.n_rows, n_embd))
        )
    else:
        table_rows = partial(_rows_without, tensor, basis, change.share, _columns(importance, 0))
        parts = in_parallel((rows for _, rows in file.chunks(tensor)), table_rows, n_threads)
    for data, squares in parts:
        sums += squares
        yield data
    before, after, edited, error, read_before, read_after = np.maximum(sums, np.finfo(float).tiny)
    change.norm_change = float(np.sqrt(after / before) - 1.0)
    change.requantization = float(np.sqrt(error / edited))
    change.reading = float(np.sqrt(read_after / read_before))


def _squares(given: Rows, wanted: Rows, got: Rows) -> list[float]:
    return [float(np.einsum("ij,ij->", x, x, dtype=np.float64)) for x in (given, got, wanted, got - wanted)]


def _rows_without(
    tensor: Tensor, basis: NDArray[np.float64], share: float, importance: Rows | None, rows: Rows
) -> tuple[bytes, NDArray[np.float64]]:
    """(bytes, squared sums) of rows e - share V^T (V e), each quantized so that its rounding writes little along V.

    What a row writes too much is taken from what is quantized next, so that some of its numbers are rounded the other
    way: twice as much each time where that changes little, half as much where it changes too much. The best of some
    tries is kept, row by row.
    """
    reading = rows @ basis.T
    wanted = (rows - share * (reading @ basis)).astype(np.float32)
    target = wanted.astype(np.float64)
    packed = np.zeros((len(rows), tensor.row_bytes), np.uint8)
    got, left = np.zeros_like(wanted), np.full_like(reading, np.inf)
    gain, before = np.ones(len(rows)), np.zeros_like(reading)
    for _ in range(TRIES):
        data = quantized(tensor, target.astype(np.float32), importance)
        values = dequantized(tensor, data)
        over = values @ basis.T - (1.0 - share) * reading
        better = np.square(over).sum(axis=1) < np.square(left).sum(axis=1)
        packed[better] = np.frombuffer(data, np.uint8).reshape(len(rows), -1)[better]
        got[better], left[better] = values[better], over[better]
        turned = (over * before).sum(axis=1) < 0
        slow = np.square(over).sum(axis=1) > np.square(before).sum(axis=1) / 4
        gain *= np.where(turned, 0.5, np.where(slow & before.any(axis=1), 2.0, 1.0))
        target -= gain[:, None] * (over @ basis)
        before = over
    squares = [float(np.square(x).sum()) for x in (reading, left)]
    return packed.tobytes(), np.array([*_squares(rows, wanted, got), *squares])


def _matrix_without(
    tensor: Tensor, data: bytes, basis: NDArray[np.float64], share: float, importance: Rows | None, n_threads: int
) -> tuple[bytes, NDArray[np.float64]]:
    """(bytes, squared sums) of W - share V^T V W, quantized so that the rounding, too, writes nothing along V.

    Rows with little weight in V come first; one that quantizing again would change more than the edit keeps its bytes.
    The few rows with half of the weight follow in groups, the heaviest first: what was written along V so far beyond
    what is wanted is taken from the rows to come, each of which moves by a fraction of its own rounding.
    """
    rows = dequantized(tensor, data)
    parts = [slice(start, start + ROWS) for start in range(0, len(rows), ROWS)]  # float64 a part at a time
    product = np.sum([basis[:, part] @ rows[part] for part in parts], axis=0)
    wanted = np.concatenate([(rows[part] - share * (basis[:, part].T @ product)).astype(np.float32) for part in parts])
    weight = np.square(basis).sum(axis=0)
    order = np.argsort(-weight, kind="stable")
    n_heavy = int(np.searchsorted(np.cumsum(weight[order]), weight.sum() / 2)) + 1
    packed = np.frombuffer(data, np.uint8).reshape(len(rows), -1).copy()
    got = rows.copy()
    with ThreadPoolExecutor(n_threads) as pool:

        def put(at: NDArray[np.intp], target: Rows, *, may_keep: bool) -> None:
            pieces = [piece for piece in np.array_split(target, n_threads) if len(piece)]
            new = b"".join(pool.map(lambda piece: quantized(tensor, piece, importance), pieces))
            values = dequantized(tensor, new)
            errors = [np.square(x - wanted[at], dtype=np.float64).sum(axis=1) for x in (values, rows[at])]
            better = errors[0] < errors[1] if may_keep else np.ones(len(at), bool)
            packed[at[better]] = np.frombuffer(new, np.uint8).reshape(len(at), -1)[better]
            got[at[better]] = values[better]

        light, heavy = order[n_heavy:], order[:n_heavy]
        owed = np.zeros_like(product)  # V (W' - W) of the rows that are done
        for start in range(0, len(light), ROWS):
            part = light[start : start + ROWS]
            put(part, wanted[part], may_keep=True)
            owed += basis[:, part] @ (got[part] - wanted[part])
        groups = np.array_split(heavy, min(GROUPS, len(heavy)))
        for i, group in enumerate(groups):
            rest = np.concatenate(groups[i:])
            correction = np.linalg.lstsq(basis[:, rest] @ basis[:, rest].T, owed, rcond=1e-9)[0]
            put(group, (wanted[group] - basis[:, group].T @ correction).astype(np.float32), may_keep=False)
            owed += basis[:, group] @ (got[group] - wanted[group])
    left = [float(np.square(x).sum()) for x in (product, owed)]
    return packed.tobytes(), np.array([*_squares(rows, wanted, got), *left])


def read_importance(path: str | os.PathLike[str]) -> dict[str, Rows]:
    """{tensor: (experts, columns)} mean squares of the inputs, of a GGUF that llama-imatrix wrote.

    Raises ArgumentError for any other file.
    """
    try:
        file = ModelFile(path)
        if text_of(file.fields, "general.type") != "imatrix":
            raise ArgumentError(f"{path}: is a GGUF file, but no importance matrix")
        found = {}
        for name, tensor in file.tensors.items():
            if name.endswith(".in_sum2"):
                counts = file.rows(file.tensors[name.removesuffix("in_sum2") + "counts"]).reshape(-1, 1)
                sums = file.rows(tensor)
                if len(counts) != len(sums) or not (
                    np.isfinite(sums).all() and (sums >= 0).all() and (counts >= 0).all()
                ):
                    raise ArgumentError(f"{path}: {name} holds no mean squares")
                means = sums / np.maximum(counts, 1.0)
                means[~means.any(axis=1)] = 1.0  # an expert that no text has reached: every column alike
                found[name.removesuffix(".in_sum2")] = means.astype(np.float32)
        return found
    except KeyError as e:
        raise ArgumentError(f"{path}: an importance matrix without {e}") from e
    except ModelError as e:
        raise ArgumentError(f"{e} (an importance matrix is the GGUF that llama-imatrix writes)") from e
