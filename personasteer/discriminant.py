"""A trait's direction against the grain of ordinary prompts: Fisher's linear discriminant, and readings on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHRINKAGE = 0.3  # of the mean variance
FOLDS = 5


@dataclass(frozen=True)
class Discriminants:
    """u ~ (S + c I)^-1 v for directions v, with S the covariance of ordinary states and c = 0.3 trace(S) / n_embd.

    Args:
        units: (n_directions, n_layer, n_embd), of length 1; 0 where v is 0 or not finite.
        offsets: (n_directions, n_layer) <mean ordinary state, u>.
        readings: (n_directions, n_states, n_layer) <state, u> - offset of the ordinary states, each with a u and a mean
            that were made without it and the other states of its fold: those which u was fitted to would read too
            little.
    """

    units: NDArray[np.float64]
    offsets: NDArray[np.float64]
    readings: NDArray[np.float64]


def discriminants(
    states: NDArray[np.float32], directions: NDArray[np.float32], groups: NDArray[np.int64] | None = None
) -> Discriminants:
    """Of (n_states, n_layer, n_embd) ordinary states and (n_directions, n_layer, n_embd) directions.

    An ordinary prompt reads high on v itself where v has a part along what prompts differ in anyway; (S + c I)^-1 takes
    these parts down by their variance.

    Args:
        groups: (n_states,) numbers; states of one number, such as those of one question, are of the same fold. Each on
            its own when None.

    Source: R. A. Fisher, Annals of Eugenics 7 (1936); shrinkage after O. Ledoit and M. Wolf, Journal of Multivariate
    Analysis 88 (2004).
    """
    n, n_layer, n_embd = states.shape
    k = len(directions)
    found = Discriminants(np.zeros((k, n_layer, n_embd)), np.zeros((k, n_layer)), np.zeros((k, n, n_layer)))
    fold = (np.arange(n) if groups is None else groups) % FOLDS
    for il in range(n_layer):
        x, v = states[:, il].astype(np.float64), directions[:, il].astype(np.float64)
        v = np.where(np.isfinite(v).all(axis=1, keepdims=True), v, 0.0)
        if not v.any():
            continue
        found.units[:, il] = fisher_units(x, v)
        found.offsets[:, il] = found.units[:, il] @ x.mean(axis=0)
        for f in range(FOLDS):
            own, others = x[fold == f], x[fold != f]
            if len(own) and len(others):
                found.readings[:, fold == f, il] = fisher_units(others, v) @ (own - others.mean(axis=0)).T
    return found


def fisher_units(x: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    """(k, n_embd) u of `Discriminants` for directions v (k, n_embd), from states x (n, n_embd): solved in n_embd
    dimensions or, by Woodbury's identity, in n, whichever are fewer.
    """
    n, n_embd = x.shape
    x = x - x.mean(axis=0)
    nc = SHRINKAGE * float((x * x).sum()) / n_embd
    if nc > 0 and n_embd <= n:
        v = np.linalg.solve(x.T @ x + nc * np.eye(n_embd), v.T).T
    elif nc > 0:
        v = v - np.linalg.solve(x @ x.T + nc * np.eye(n), x @ v.T).T @ x
    lengths = np.linalg.norm(v, axis=1, keepdims=True)
    out: NDArray[np.float64] = v / np.where(lengths > 0, lengths, 1.0)
    return out
