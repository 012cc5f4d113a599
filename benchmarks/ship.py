"""Does a shipped file do in stock llama.cpp what the engine does? Every form, exported and verified.

    python benchmarks/ship.py MODEL VECTOR[:STRENGTH].. --work DIR [--forms control-vector,bake] [--threads N]

Each form is exported for each vector and verified as `personasteer verify` does it; finished ones are kept in DIR as
JSON and not repeated, so the command can be stopped and started again. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import personasteer as ps
from personasteer.cli._common import model_path, split_strength
from personasteer.cli.export import fold
from personasteer.files import atomic_write
from personasteer.ship import (
    ablate_weights,
    bake,
    directions_to_remove,
    save_control_vector,
    save_lora,
    save_projection,
    verify,
)

Export = Callable[[Path, ps.PersonaVector, float, Path, int], dict[str, Any]]


def _folded(model: Path, vector: ps.PersonaVector, strength: float, n_threads: int) -> ps.PersonaVector:
    with ps.Model(model, n_ctx=512, n_parallel=1, n_threads=n_threads, repack=False) as m:
        return fold(m, [(vector, strength)])


def _control_vector(model: Path, v: ps.PersonaVector, s: float, out: Path, n_threads: int) -> dict[str, Any]:
    save_control_vector(_folded(model, v, s, n_threads), out)
    return {}


def _projection(model: Path, v: ps.PersonaVector, s: float, out: Path, n_threads: int) -> dict[str, Any]:
    save_projection(v, out)
    return {}


def _lora(model: Path, v: ps.PersonaVector, s: float, out: Path, n_threads: int) -> dict[str, Any]:
    return save_lora(model, out, directions_to_remove([(v, None)])).summary()


def _bake(model: Path, v: ps.PersonaVector, s: float, out: Path, n_threads: int) -> dict[str, Any]:
    return bake(model, out, _folded(model, v, s, n_threads), n_threads=n_threads).summary()


def _value_bias(model: Path, v: ps.PersonaVector, s: float, out: Path, n_threads: int) -> dict[str, Any]:
    folded = _folded(model, v, s, n_threads)
    return bake(model, out, folded, strategy="value-bias", n_threads=n_threads).summary()


def _ablate(model: Path, v: ps.PersonaVector, s: float, out: Path, n_threads: int) -> dict[str, Any]:
    summary = ablate_weights(model, out, directions_to_remove([(v, None)]), n_threads=n_threads).summary()
    return {key: summary[key] for key in ("largest_reading", "largest_requantization", "tied_output")}


def _untied(model: Path, v: ps.PersonaVector, s: float, out: Path, n_threads: int) -> dict[str, Any]:
    done = ablate_weights(model, out, directions_to_remove([(v, None)]), untie=True, n_threads=n_threads)
    return {"largest_reading": done.summary()["largest_reading"]}


FORMS: dict[str, Export] = {
    "control-vector": _control_vector,
    "projection": _projection,
    "lora": _lora,
    "bake": _bake,
    "bake --strategy value-bias": _value_bias,
    "ablate": _ablate,
    "ablate --untie": _untied,
}
SIGNED = ("control-vector", "bake", "bake --strategy value-bias")  # the others take a share: all of it


def measure(model: Path, spec: str, form: str, work: Path, n_threads: int) -> dict[str, Any]:
    """Export and verify one form of one vector; what is reported of it."""
    file, strength = split_strength(spec)
    vector = ps.PersonaVector.load(file)
    rho = vector.strength if strength is None else strength
    name = f"{model.stem}-{Path(file).stem}-{rho:g}-{form}".replace(" --", "-").replace(" ", "-")
    kept = work / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text("utf-8"))  # type: ignore[no-any-return]
    out = work / f"{name}.gguf"
    start = time.perf_counter()
    try:
        made = FORMS[form](model, vector, rho, out, n_threads)
        exported = time.perf_counter() - start
        found = verify(out, model, n_threads=n_threads).summary()
        result = {"made": made, "found": found, "seconds": exported, "bytes": out.stat().st_size}
    except ps.ModelError as e:
        result = {"refused": str(e)}
    out.unlink(missing_ok=True)
    result |= {
        "model": model.name,
        "vector": Path(file).stem,
        "strength": rho if form in SIGNED else None,
        "form": form,
    }
    atomic_write(kept, json.dumps(result).encode())
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line for each."""
    head = ["model", "form", "vector", "max Δlogit", "rounding alone", "KL(engine ∥ file)", "p99",
            "effect ratio (95 %)", "KL(base ∥ engine)", "KL(base ∥ file)", "ok", "note"]  # fmt: skip
    rows = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for r in results:
        name = r["vector"] + ("" if r["strength"] is None else f" {r['strength']:+g}")
        if "refused" in r:
            rows.append(f"| {r['model']} | {r['form']} | {name} |" + " |" * 8 + f" refused: {r['refused']} |")
            continue
        f = r["found"]
        keys = ("max_abs_dlogit", "noise", "kl_mean", "kl_p99", "effect_ratio", "kl_base_engine", "kl_base_shipped")
        cells = ["" if f[key] is None else f"{f[key]:.3g}" for key in keys]
        if f["effect_interval"]:
            cells[keys.index("effect_ratio")] += " ({:.2f} to {:.2f})".format(*f["effect_interval"])
        elif f["effect"] == "log-odds":
            cells[keys.index("effect_ratio")] = "too small"
        rows.append(
            "| " + " | ".join([r["model"], r["form"], name, *cells, "yes" if f["ok"] else "no", _note(r)]) + " |"
        )
    return "\n".join(rows)


def _note(r: dict[str, Any]) -> str:
    made, details = r["made"], r["found"]["details"]
    notes = list(r["found"]["reasons"])
    if made.get("strategy") == "value-bias":
        fit = made["fit"]
        notes.append(
            f"factor {fit['factor']:.2f}, comparison by comparison {r['found']['effect_slope']:.2f}; naive solve: "
            f"{fit['naive_effect_ratio']:.2f}, KL(base ∥ naive) {fit['naive_kl_base']:.3g}"
        )
    elif "strategy" in made:
        notes.append(f"{made['strategy']}, off by {details['error_at_block']:.1g} at the first steered block")
    if "largest_reading" in details:
        notes.append(", ".join(f"{k} {v:.2%} left" for k, v in sorted(details["largest_reading"].items())))
    if details.get("left_out"):
        notes.append("left out: " + ", ".join(details["left_out"]))
    return "; ".join(notes)


def main() -> None:
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file, or demo")
    parser.add_argument("vectors", nargs="+", metavar="VECTOR[:STRENGTH]")
    parser.add_argument("--work", type=Path, required=True, help="folder for results")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    results = []
    for spec in args.vectors:
        for form in args.forms.split(","):
            print(f"{spec} as {form}", file=sys.stderr)
            results.append(measure(model_path(args.model), spec, form, args.work, args.threads))
    print(table(results))


if __name__ == "__main__":
    main()
