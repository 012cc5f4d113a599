"""What edits do, in NumPy: the published formulas, token by token in float64, from the values that the user gave.

Per token, h0 being the block's output and j the token's number in the response:

    1.  h = (h0 + b) ||h0|| / ||h0 + b||      b the sum of the additions that keep the norm
    2.  h = h + a                             a the sum of the others; c v, c = rho w m / ||v||, or alpha v
    3.  h = h + U (U^T U)^-1 delta            U the unit directions of the caps, floors, ablations and redirections,
                                              delta how far each reading U^T h has to move

A half-life scales what an edit does by 2^(-max(j, 0) / half_life); a condition on the token by whether h0 meets it.
Nothing of personasteer.mixes is used here, nor what the edits make of themselves (`terms`, `covers`, `rho`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

import personasteer as ps


def layers_of(edit: Any) -> tuple[int, ...]:
    """The blocks that an edit is at."""
    if isinstance(edit, ps.When):
        return layers_of(edit.edit)
    if edit.layers is not None:
        return tuple(edit.layers)
    if isinstance(edit, (ps.Ablate, ps.Redirect)):
        both = [edit.vector, *([edit.target] if isinstance(edit, ps.Redirect) else [])]
        return tuple(il for il in range(edit.vector.n_layer) if all(np.abs(v.directions[il]).sum() > 0 for v in both))
    return tuple(edit.vector.layers)


def unit(vector: ps.PersonaVector, il: int) -> np.ndarray:
    v = vector.directions[il].astype(np.float64)
    return v / np.sqrt((v * v).sum())


def threshold(given: Any, stored: Any, il: int) -> float:
    values = stored if given is None else given
    return float(values) if np.ndim(values) == 0 else float(values[il])


def added(edit: ps.Add, il: int, norms: np.ndarray) -> np.ndarray:
    """c v at a block, without half-life and condition."""
    v = edit.vector.directions[il].astype(np.float64)
    if edit.raw:
        return edit.strength * v
    share = edit.vector.weights_over(layers_of(edit))[il]
    return edit.strength * share * float(norms[il]) * v / np.sqrt((v * v).sum())


def rho(edits: Iterable[Any], norms: np.ndarray) -> float:
    """sum over blocks of ||sum of the added vectors|| / m."""
    rows: dict[int, Any] = {}
    for edit in edits:
        inner = edit.edit if isinstance(edit, ps.When) else edit
        if isinstance(inner, ps.Add):
            for il in layers_of(inner):
                rows[il] = rows.get(il, 0.0) + added(inner, il, norms)
    return float(sum(np.sqrt((row * row).sum()) / float(norms[il]) for il, row in rows.items()))


def covers(edit: Any, t: int, j: int) -> bool:
    inside = {"all": True, "prompt": j < 0, "response": j >= 0}.get(edit.scope) if isinstance(edit.scope, str) else None
    if inside is None:
        inside = t in edit.scope
    return inside and (edit.start is None or edit.start <= j) and (edit.stop is None or j < edit.stop)


def after(h: np.ndarray, edits: Iterable[Any], il: int, norms: np.ndarray, n_prompt: int | None = None) -> np.ndarray:
    """The output of block il after its edits, (n_tokens, n_embd) float64, from `h`, the one before them.

    n_prompt: P of the scopes; None where all is prompt. Conditions are those on="token".
    """
    out = h.astype(np.float64)
    here = [(e, e.edit if isinstance(e, ps.When) else e) for e in edits if il in layers_of(e)]
    for t in range(len(out)):
        j = t - (len(out) if n_prompt is None else n_prompt - 1)
        out[t] = _token(out[t], [edit for edit, inner in here if covers(inner, t, j)], il, norms, j)
    return out


def _token(h0: np.ndarray, edits: list[Any], il: int, norms: np.ndarray, j: int) -> np.ndarray:
    turned, plain = np.zeros_like(h0), np.zeros_like(h0)
    windows = []
    for edit in edits:
        strength = 1.0
        if isinstance(edit, ps.When):
            reading = h0 @ unit(edit.condition, il)
            limit = threshold(edit.threshold, edit.condition.thresholds, il)
            strength = float(reading > limit if edit.above else reading < limit)
            edit = edit.edit
        if edit.half_life:
            strength *= 2.0 ** (-max(j, 0) / edit.half_life)
        if not isinstance(edit, ps.Add):
            windows.append((edit, strength))
        elif edit.keep_norm:
            turned += strength * added(edit, il, norms)
        else:
            plain += strength * added(edit, il, norms)
    h = h0
    if turned.any():
        h = (h + turned) * np.linalg.norm(h0) / np.linalg.norm(h0 + turned)
    h = h + plain
    return _moved(h, [w for w in windows if getattr(w[0], "share", 1.0) > 0.0], il)


def _moved(h: np.ndarray, windows: list[tuple[Any, float]], il: int) -> np.ndarray:
    columns: list[np.ndarray] = []

    def column(vector: ps.PersonaVector) -> tuple[int, float]:
        """Where a direction stands in U, and -1 where it does so the other way round. The same one, but for rounding in
        float32, is not put in twice.
        """
        u = unit(vector, il)
        for k, known in enumerate(columns):
            if np.allclose(known, u, rtol=0, atol=1e-7) or np.allclose(known, -u, rtol=0, atol=1e-7):
                return k, float(np.sign(known @ u))
        columns.append(u)
        return len(columns) - 1, 1.0

    placed = [(e, strength, column(e.vector), column(e.target) if isinstance(e, ps.Redirect) else (0, 0.0))
              for e, strength in windows]  # fmt: skip
    if not columns:
        return h
    u = np.stack(columns, axis=1)
    readings = u.T @ h
    delta = np.zeros(len(columns))
    for edit, strength, (k, sign), (to, to_sign) in placed:
        p = sign * readings[k]
        if isinstance(edit, ps.Floor):  # a kind of Cap, so first
            move = max(threshold(edit.tau, edit.vector.thresholds, il) - p, 0.0)
        elif isinstance(edit, ps.Cap):
            move = -max(p - threshold(edit.tau, edit.vector.thresholds, il), 0.0)
        elif isinstance(edit, ps.Ablate):
            given = None if isinstance(edit.to, str) else edit.to
            move = edit.share * (threshold(given, edit.vector.means, il) - p)
        else:
            move = -edit.share * p
            delta[to] += to_sign * strength * edit.share * p
        delta[k] += sign * strength * move
    return h + u @ np.linalg.solve(u.T @ u, delta)
