"""What is read of each trait: its direction, and that direction against the grain of ordinary rows."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from personasteer.discriminant import FOLDS, fisher_units
from personasteer.engine import Progress, Request, Taps
from personasteer.model import Model, pooled_mean
from personasteer.screen.journal import Journal
from personasteer.screen.score import Axis
from personasteer.screen.texts import unpacked

AT_ONCE = 16  # texts of the reference that are captured together
MOST_CLEAN = 2000  # rows of the reference that the covariance is of


@dataclass(frozen=True)
class Readouts:
    """The axes of all traits, one after the other.

    Args:
        traits: v-hat of each.
        axes: v-hat alone; or v-hat, then u, then u without each fold of the clean rows, which these are read with:
            those that u was fitted to would read too little.
    """

    traits: tuple[Axis, ...]
    axes: tuple[Axis, ...]

    @property
    def _each(self) -> int:
        return len(self.axes) // len(self.traits)

    @property
    def shown(self) -> NDArray[np.intp]:
        """The columns of each trait's v-hat and of what its rows are scored with, one after the other."""
        return np.array([at for k in range(len(self.traits)) for at in (self.plain(k), self.score(k))], np.intp)

    def plain(self, k: int) -> int:
        """The column of trait k's v-hat."""
        return k * self._each

    def score(self, k: int) -> int:
        """The column that trait k's rows are scored with."""
        return k * self._each + (self._each > 1)

    def clean(self, k: int, fold: int) -> int:
        """The column that the clean rows of a fold are scored with."""
        return k * self._each + 2 + fold if self._each > 1 else k


def fold_of(digest: str) -> int:
    """Of a clean row, by its words."""
    return int(digest, 16) % FOLDS


def make_readouts(
    journal: Journal, model: Model, traits: Sequence[Axis], *, mode: str, plain: bool, progress: Progress
) -> Readouts:
    """The read-outs of traits: with `plain` v-hat, else u ~ (S + c I)^-1 v-hat beside it, see `discriminants`.

    S is the covariance of what clean rows score: the mean block output over the answer, in mode "fast" less that at the
    prompt's last token. An ordinary row scores high on v-hat where v-hat has a part along what ordinary rows differ in
    anyway; u takes these parts down.
    """
    if plain:
        return Readouts(tuple(traits), tuple(traits))
    known = journal.meta("directions")
    if known is None:
        layers = sorted({a.layer for a in traits})
        states, folds = _clean_states(journal, model, layers, difference=mode == "fast", progress=progress)
        found = []
        for axis in traits:
            x = states[:, layers.index(axis.layer)]
            v = axis.direction[None].astype(np.float64)
            found += [fisher_units(some, v)[0] for some in [x, *(x[folds != f] for f in range(FOLDS))]]
        known = json.dumps([base64.b64encode(u.astype("<f4").tobytes()).decode() for u in found])
        with journal.writing():
            journal.set_meta("directions", known)
    units = iter(np.frombuffer(base64.b64decode(u), "<f4") for u in json.loads(known))
    return Readouts(tuple(traits), tuple(axis for trait in traits for axis in _axes(trait, units)))


def _axes(trait: Axis, units: Iterator[NDArray[np.float32]]) -> Iterator[Axis]:
    yield replace(trait, spans=False)
    for k in range(1 + FOLDS):
        yield replace(trait, direction=next(units), spans=k == 0)


def _clean_states(
    journal: Journal, model: Model, layers: Sequence[int], *, difference: bool, progress: Progress
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """((n_rows, n_layers, n_embd) states of the clean rows, (n_rows,) their folds)."""
    texts = sorted(journal.clean_texts(MOST_CLEAN))
    rows: dict[str, list[tuple[int, NDArray[np.float64]]]] = {}
    groups = [texts[first : first + AT_ONCE] for first in range(0, len(texts), AT_ONCE)]
    most = max(sum(len(tokens) // 4 for _, tokens, _ in group) for group in groups)
    n_ctx, cells = model.n_ctx, max(model.n_ctx, most)
    session = model._new_session(n_ctx, AT_ONCE, model.n_batch, n_cells=cells, n_blocks=layers[-1] + 1)
    for done, group in enumerate(groups, 1):
        some = [(digest, unpacked(tokens), n) for digest, tokens, n in group]
        requests = [Request(tokens, pools=((n, len(tokens)), (n - 1, n))) for _, tokens, n in some]
        taps = Taps(pool_layers=tuple(layers), n_pools=2)
        results = model.run_requests(requests, session=session, taps=taps)
        for (digest, tokens, n), result in zip(some, results, strict=True):
            mean, last = (pooled_mean(result, k).astype(np.float64) for k in (0, 1))
            rows.setdefault(digest, []).append((len(tokens) - n, mean - last if difference else mean))
        progress(done, len(groups))
    states = [
        np.average([state for _, state in turns], axis=0, weights=[count for count, _ in turns])
        for _, turns in sorted(rows.items())
    ]
    return np.stack(states), np.array([fold_of(digest) for digest in sorted(rows)], np.intp)
