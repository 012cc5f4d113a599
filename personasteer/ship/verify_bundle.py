"""A bundle's proof: that it is whole, fits its model, and what each of its files does in stock llama.cpp."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from personasteer.errors import PersonasteerError
from personasteer.ship.bundle import load_bundle
from personasteer.ship.rewrite import Progress
from personasteer.ship.verify import Against, Verification, verify
from personasteer.steering import Add


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
        edits = bundle.steering
        # a shipped form of additions is to do what the bundle's edits do
        sums = [(e.vector, e.strength) for e in edits if isinstance(e, Add) and e.scope == "all" and not e.raw]
        own: Against | None = against or (sums if len(sums) == len(edits) else None)
        files: list[tuple[str, Against | None]] = []
        for v in bundle.persona.vectors:
            if v.exported_strength is not None:
                files.append((v.file, None))
        for f in bundle.persona.files:
            files.append((f.file, own if f.what == "bake" or f.kind == "control-vector" else None))
        found: dict[str, Verification] = {}
        for name, wanted in files:
            try:
                found[name] = verify(
                    bundle.folder / name, base, against=wanted, n_texts=n_texts, n_threads=n_threads, progress=progress
                )
            except PersonasteerError as e:
                found[name] = Verification("unknown", name, bundle.model.name, reasons=[str(e)])
        unseen = [type(e).__name__ for e in edits if not isinstance(e, Add)]
        unseen += [f"with {a.file}" for a in bundle.persona.adapters]
    figures = ("max_abs_dlogit", "kl_mean", "kl_p99", "kl_base_engine", "kl_base_shipped", "noise")
    for figure in figures:
        values = [getattr(v, figure) for v in found.values()]
        setattr(out, figure, max((v for v in values if v is not None), default=None))
    ratios = [v.effect_ratio for v in found.values() if v.effect_ratio is not None]
    out.effect_ratio = max(ratios, key=lambda r: abs(r - 1), default=None)
    out.n_texts = max((v.n_texts for v in found.values()), default=0)
    out.reasons = [f"{name}: {reason}" for name, v in found.items() for reason in v.reasons]
    if not found:
        out.reasons.append("nothing in it runs in stock llama.cpp, so nothing is verified but its hashes")
    out.ok = not out.reasons
    shown = ("kind", "ok", "max_abs_dlogit", "effect_ratio")
    out.details = {name: {key: getattr(v, key) for key in shown} for name, v in found.items()}
    if unseen:  # stock llama.cpp has no such edit
        out.details["not verified"] = unseen
    return out
