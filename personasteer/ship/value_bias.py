"""Steering as biases of the attention values, for files whose architecture has no bias at the block's output.

Attention weights sum to 1, so a bias b on the values of block j adds the same M_j b to the residual stream of every
token, M_j = W_o R: R repeats b for the query heads that share a key-value head. A block's M_j reaches few directions
(n_head_kv * head_dim of n_embd), so the rows c_j that an addition adds to the block outputs are spread over all blocks
from the first steered one on:

    minimize over b   sum_l ||sum_{j<=l} M_j b_j - y_l||^2 / m_l^2 + lambda ||b||^2

with y_l = sum_{j<=l} c_j: every block should see the shift that it would see under steering, within what is reachable.
(Asking for the last sum alone has a solution without error whose shifts before it have little to do with the trait. And
blocks before the first steered one could prepare its shift, which comes nearer to it, but what they add on their way
does more harm: benchmarks/README.md.)
Blocks answer to a shift, and to the error that is left, which the sums leave out. So what they do is measured, and the
sums asked for once or twice more:

    y_l <- sum_{j<=l} M_j b_j + E[h_l steered] - E[h_l with b]

over tokens of everyday and of the trait's texts. A last factor on all b_j brings the effect to that of the steering.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personasteer.errors import ArgumentError

RIDGE = 1e-2  # lambda, in units of the mean diagonal of the normal equations
CORRECTIONS = 2  # measured corrections of the sums; later ones change little
TOLERANCE = 0.03  # of the effect, of what is wanted
RESIDUAL = 1e-6  # of the normal equations, relative: far below what float32 files and measurements hold


def value_bias_map(w_o: NDArray[np.floating], n_head: int, n_head_kv: int) -> NDArray[np.float64]:
    """M = W_o R, (n_embd, n_head_kv * head_dim): what a bias of the values adds to the residual stream.

    Args:
        w_o: (n_embd, n_head * head_dim) `attn_output.weight`, dequantized; query head i reads the values of
            key-value head i // (n_head / n_head_kv).

    Raises:
        ArgumentError: heads that do not divide the columns, or one another.
    """
    if w_o.ndim != 2 or n_head < 1 or n_head_kv < 1 or w_o.shape[1] % n_head or n_head % n_head_kv:
        raise ArgumentError(f"attn_output.weight of {w_o.shape} does not fit {n_head} heads over {n_head_kv} of values")
    n_embd, width = w_o.shape
    by_group = w_o.astype(np.float64).reshape(n_embd, n_head_kv, n_head // n_head_kv, width // n_head)
    return np.asarray(by_group.sum(axis=2).reshape(n_embd, -1))


def wanted_sums(rows: Mapping[int, NDArray[np.floating]], n_layer: int) -> NDArray[np.float64]:
    """(n_layer, n_embd) y_l = sum_{j<=l} c_j of the rows {il: c_il} that steering adds.

    Raises ArgumentError where there is no row, or one of a block that the model does not have.
    """
    if not rows or not all(0 <= il < n_layer for il in rows):
        raise ArgumentError(f"rows must be of blocks 0 to {n_layer - 1}, not {sorted(rows)}")
    added = np.zeros((n_layer, len(next(iter(rows.values())))))
    for il, row in rows.items():
        added[il] = row
    return np.cumsum(added, axis=0)


def sums_of(
    maps: Mapping[int, NDArray[np.float64]], biases: Mapping[int, NDArray[np.floating]], n_layer: int
) -> NDArray[np.float64]:
    """(n_layer, n_embd) sum_{j<=l} M_j b_j."""
    return wanted_sums({il: maps[il] @ b for il, b in biases.items()}, n_layer)


def solve(
    maps: Mapping[int, NDArray[np.float64]],
    wanted: NDArray[np.float64],
    norms: NDArray[np.floating],
    *,
    ridge: float = RIDGE,
) -> dict[int, NDArray[np.float64]]:
    """Biases {il: (n_head_kv * head_dim,)} whose running sums are near `wanted`, by the module's formula.

    Solved by conjugate gradients on the normal equations, without forming them: memory is that of the maps, and 300
    steps over a model of 7B parameters take seconds.

    Args:
        maps: {il: M_il} of the blocks that get a bias; the sums count from the first of them on.
        wanted: (n_layer, n_embd) y_l; see wanted_sums.
        norms: (n_layer,) m_l, the norms of the block outputs.

    Raises:
        ArgumentError: no maps, or shapes that do not fit.
    """
    layers = sorted(maps)
    if not layers or wanted.ndim != 2 or not 0 <= layers[0] <= layers[-1] < len(wanted) or len(norms) != len(wanted):
        raise ArgumentError(f"maps of blocks {layers}, sums of {wanted.shape} and {len(norms)} norms do not fit")
    if any(maps[il].shape[0] != wanted.shape[1] for il in layers):
        raise ArgumentError(f"maps into {maps[layers[0]].shape[0]} numbers do not fit sums of {wanted.shape[1]}")
    counted = np.arange(layers[0], len(wanted))
    weights = 1.0 / np.asarray(norms, np.float64)[counted] ** 2
    at = np.array(layers) - layers[0]
    ends = np.cumsum([maps[il].shape[1] for il in layers])

    def parts(x: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        return np.split(x, ends[:-1])

    def sums(x: NDArray[np.float64]) -> NDArray[np.float64]:
        added = np.zeros((len(counted), wanted.shape[1]))
        added[at] = [maps[il] @ b for il, b in zip(layers, parts(x), strict=True)]
        return np.cumsum(added, axis=0)

    def transposed(shift: NDArray[np.float64]) -> NDArray[np.float64]:
        later = np.cumsum((weights[:, None] * shift)[::-1], axis=0)[::-1]  # sum over l >= j
        return np.concatenate([maps[il].T @ later[k] for k, il in zip(at, layers, strict=True)])

    tails = np.cumsum(weights[::-1])[::-1][at]  # each block's share of the normal equations' trace
    trace = sum(tail * np.square(maps[il]).sum() for tail, il in zip(tails, layers, strict=True))
    damping = ridge * float(trace) / int(ends[-1])
    x = _conjugate_gradients(lambda x: transposed(sums(x)) + damping * x, transposed(wanted[counted]))
    return dict(zip(layers, parts(x), strict=True))


@dataclass(frozen=True)
class Fit:
    """Biases {il: (n_head_kv * head_dim,)} and what is left of the shift with them; `errors`: of every set measured,
    in order, sqrt(sum_l ||D_l - D_l(b)||^2 / m_l^2 / sum_l ||D_l||^2 / m_l^2) from the first steered block on.
    """

    biases: dict[int, NDArray[np.float64]]
    error: float
    errors: tuple[float, ...]


def fit(
    maps: Mapping[int, NDArray[np.float64]],
    rows: Mapping[int, NDArray[np.floating]],
    norms: NDArray[np.floating],
    steered: NDArray[np.floating],
    measure: Callable[[dict[int, NDArray[np.float64]]], NDArray[np.floating]],
    *,
    corrections: int = CORRECTIONS,
) -> Fit:
    """Biases whose measured shift of the block outputs is near that of the steering.

    The first set is from the rows alone, each next one from what the best so far leaves; where a correction makes it
    worse, the next goes half as far. Measures corrections + 1 times.

    Args:
        maps: {il: M_il} of the blocks from the first steered one on: see value_bias_map.
        rows: {il: c_il} that steering adds, in the unsteered model's norms.
        norms: (n_layer,) m_l of the unsteered model.
        steered: (n_layer, n_embd) D_l = E[h_l steered] - E[h_l], over tokens of everyday and of the trait's texts that
            nothing is reported on, without the first of each text, where attention parks what it has no use for.
        measure: of biases, the same shift over the same tokens in the model with these biases.

    Raises:
        ArgumentError: as `solve`; a measured shift of another shape or that is not finite.
    """
    n_layer, first = len(norms), min(rows, default=0)
    asked, step = wanted_sums(rows, n_layer), 1.0
    goal = _shift(steered, asked.shape)
    best: tuple[float, dict[int, NDArray[np.float64]], NDArray[np.float64]] | None = None
    errors: list[float] = []
    for _ in range(corrections + 1):
        biases = solve(maps, asked, norms)
        left = goal - _shift(measure(biases), asked.shape)
        errors.append(_relative_size(left[first:], goal[first:], norms[first:]))
        if best is None or errors[-1] < best[0]:
            best = errors[-1], biases, left
        else:
            step /= 2
        asked = sums_of(maps, best[1], n_layer) + step * best[2]
    assert best is not None
    return Fit(best[1], best[0], tuple(errors))


def _shift(measured: NDArray[np.floating], shape: tuple[int, ...]) -> NDArray[np.float64]:
    shift = np.asarray(measured, np.float64)
    if shift.shape != shape:
        raise ArgumentError(f"a shift must have the shape {shape}, not {shift.shape}")
    if not np.isfinite(shift).all():
        raise ArgumentError("a measured shift is not finite: capture the last block too")
    return shift


def _relative_size(left: NDArray[np.float64], whole: NDArray[np.float64], norms: NDArray[np.floating]) -> float:
    relative = [np.square(shift / np.asarray(norms, np.float64)[:, None]).sum() for shift in (left, whole)]
    return math.sqrt(relative[0] / relative[1]) if relative[1] else math.inf


def naive_solve(
    maps: Mapping[int, NDArray[np.float64]], total: NDArray[np.float64], *, ridge: float = 1e-6
) -> dict[int, NDArray[np.float64]]:
    """The smallest biases with sum_j M_j b_j = total, the last sum alone: what `solve` is compared with.

    Args:
        total: (n_embd,) sum of all rows that steering adds.
        ridge: in units of the mean diagonal of sum_j M_j M_j^T, for maps that do not reach everything.
    """
    gram = np.sum([m @ m.T for m in maps.values()], axis=0)
    damped = gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    y = np.linalg.solve(damped, total)
    return {il: np.asarray(m.T @ y) for il, m in maps.items()}


def relative_errors(sums: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n_layer,) ||sums_l - wanted_l|| / ||wanted_l||; NaN where nothing is wanted."""
    sizes = np.linalg.norm(wanted, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        out = np.linalg.norm(sums - wanted, axis=1) / sizes
    return np.where(sizes > 0, out, np.nan)


def calibrate(
    effect: Callable[[float], float],
    wanted: float = 1.0,
    *,
    limits: tuple[float, float] = (0.25, 4.0),
    tolerance: float = TOLERANCE,
    most: int = 5,
) -> tuple[float, float]:
    """(scale, effect(scale)): the factor on all biases whose effect is nearest to the wanted one of those tried.

    Starts at 1, goes on as if the effect were proportional, then by the line through the nearest on both sides, or the
    two nearest: an effect that bends takes two or three evaluations. Stops within the tolerance, after `most`
    evaluations, or where a step leads nowhere new; whether the effect is then good enough is for the caller to judge.

    Args:
        effect: of a scale, such as the change of the log-odds over that of the steering; 0 at scale 0.
        limits: the smallest and the largest scale tried.
    """
    tried = {0.0: 0.0}
    scale = 1.0
    for _ in range(most):
        tried[scale] = float(effect(scale))
        if abs(tried[scale] - wanted) <= tolerance * abs(wanted):
            break
        nearest = sorted(tried, key=lambda s: (_miss(tried[s], wanted), s))
        a, b = nearest[:2]
        beyond = [s for s in nearest if (tried[s] - wanted) * (tried[a] - wanted) < 0]
        b = beyond[0] if beyond else b  # between two sides the line through them is safe
        rise = tried[b] - tried[a]
        step = (wanted - tried[a]) * (b - a) / rise if rise else math.nan
        # an effect that falls as the scale rises says nothing about where to go
        if not math.isfinite(step) or rise / (b - a) * wanted <= 0:
            break
        scale = float(np.clip(a + step, *limits))
        if scale in tried:
            break
    best = min((s for s in tried if s > 0), key=lambda s: _miss(tried[s], wanted))
    return best, tried[best]


def _miss(effect: float, wanted: float) -> float:
    """How far off an effect is; one that is not finite is farther than all others."""
    return abs(effect - wanted) if math.isfinite(effect) else math.inf


def _conjugate_gradients(
    apply: Callable[[NDArray[np.float64]], NDArray[np.float64]], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """x with apply(x) = y, for a symmetric positive definite linear `apply`."""
    x = np.zeros_like(y)
    residual, direction = y.copy(), y.copy()
    size = float(residual @ residual)
    enough = RESIDUAL**2 * size
    for _ in range(10 * len(y)):
        if size <= enough:
            break
        image = apply(direction)
        step = size / float(direction @ image)
        x += step * direction
        residual -= step * image
        before, size = size, float(residual @ residual)
        direction = residual + size / before * direction
    return x
