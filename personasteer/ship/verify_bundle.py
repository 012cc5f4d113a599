"""A bundle's proof: that it is whole, fits its model, and what each of its files does in stock llama.cpp."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from personasteer.ship.bundle import load_bundle
from personasteer.ship.rewrite import Progress
from personasteer.ship.verify import Against, Verification, verify


def verify_bundle(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    against: Against | None = None,
    n_texts: int = 8,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check the hashes of a bundle and of the model, then verify every vector and every exported file in it.

    The figures are those of the file that is farthest from the engine; `details` has each file's own.

    Raises BundleError where the bundle is damaged or for another model.
    """
    small: dict[str, Any] = {"n_ctx": 512, "n_parallel": 1, "n_threads": n_threads, "n_gpu_layers": 0, "repack": False}
    with load_bundle(path, model=base, **small) as bundle:
        out = Verification("bundle", Path(path).name, bundle.model.name)
        names = [v.file for v in bundle.persona.vectors if v.exported_strength is not None]
        names += [f.file for f in bundle.persona.files]
        found = {}
        for name in names:
            found[name] = verify(
                bundle.folder / name, base, against=against, n_texts=n_texts, n_threads=n_threads, progress=progress
            )
    figures = ("max_abs_dlogit", "kl_mean", "kl_p99", "kl_base_engine", "kl_base_shipped", "noise")
    for figure in figures:
        values = [getattr(v, figure) for v in found.values()]
        setattr(out, figure, max((v for v in values if v is not None), default=None))
    ratios = [v.effect_ratio for v in found.values() if v.effect_ratio is not None]
    out.effect_ratio = max(ratios, key=lambda r: abs(r - 1), default=None)
    out.n_texts = max((v.n_texts for v in found.values()), default=0)
    out.reasons = [f"{name}: {reason}" for name, v in found.items() for reason in v.reasons]
    out.ok = not out.reasons
    shown = ("kind", "ok", "max_abs_dlogit", "effect_ratio")
    out.details = {name: {key: getattr(v, key) for key in shown} for name, v in found.items()}
    return out
