"""Steering without the hook: llama.cpp's own control vector, where the hook cannot go into the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer import engine
from personasteer.engine import Progress, Request, Taps
from personasteer.errors import ModelError
from personasteer.steering import Add, SteeredModel, Steering


def run_by_control_vector(
    session: Any,
    model: SteeredModel,
    requests: Sequence[Request],
    *,
    taps: Taps | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """As engine.run, requests of the same steering together and one steering after the other.

    Raises ModelError for what a control vector cannot do: anything but plain additions to all tokens, block 0, capture
    and readings. Less is never done in silence.
    """
    if (taps and (taps.pool_layers or taps.raw_layers)) or any(r.reads for r in requests):
        raise ModelError(f"{model.name} runs without the hook: nothing can be captured or read")
    rows = [_rows(r.steering, model) for r in requests]
    results: list[dict[str, Any]] = []
    for _, group in groupby(range(len(requests)), lambda i: rows[i].tobytes()):
        at = list(group)
        session.set_control_vector(rows[at[0]][1:] if rows[at[0]].any() else np.zeros((0,), np.float32))
        unsteered = [replace(requests[i], steering=Steering()) for i in at]
        count = _shifted(progress, at[0], len(requests)) if progress else None
        results += engine.run(session, model, unsteered, first=at[0], progress=count, **options)
    return results


def _shifted(progress: Progress, n_before: int, n_all: int) -> Progress:
    """Counts a group's requests among all."""
    return lambda done, _: progress(n_before + done, n_all)


def _rows(steering: Steering, model: SteeredModel) -> NDArray[np.float32]:
    total = np.zeros((model.n_layer, model.n_embd))
    for edit in steering:
        plain = isinstance(edit, Add) and edit.scope == "all" and not edit.keep_norm
        if not (plain and edit.start is edit.stop is edit.half_life is None):  # type: ignore[union-attr]
            raise ModelError(
                f"{model.name} runs without the hook: it takes additions to all tokens only, not {edit!r:.80}"
            )
        for il, term in ({} if edit.inert else edit.terms(model)).items():
            if il == 0:
                raise ModelError(f"{model.name} runs without the hook: a control vector does not reach block 0")
            assert term.row is not None
            total[il] += term.row
    return total.astype(np.float32)
