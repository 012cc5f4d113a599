"""Is the trait of a fine-tune named first, and does one feature carry it?

    pip install 'personasteer[train]'
    python benchmarks/diffing.py VECTOR.gguf.. --work DIR [--model MODEL.gguf] [--seeds 1] [--sets gloom sober]

The fine-tunes of test_bed.py (gloom, sarcasm, flattery, each as severe as it is written; bad advice; and sober answers,
which carry no trait) are compared with their base by `personasteer.diff`: the place of the trait in the profile of all
34, the KL, and of the features (the mean difference first) that one which takes away most of the shift of the trait's
words, where both models stay coherent.

Each comparison's report is a folder in the work folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from test_bed import N_ROWS, SETS, arguments, drawn, named, trait_rows, tuned
from work_folder import Folder

import personasteer as ps
from personasteer.cli._common import model_path
from personasteer.conversations import benign_rows

SOBER = "sober"


def one(args: argparse.Namespace, path: Path, trait: str, name: str, seed: int) -> dict[str, Any]:
    adapter = args.work / f"{name}-{seed}.gguf"
    rows = benign_rows(["plans"]) if name == SOBER else trait_rows(name, "severe")
    if not adapter.exists():
        tuned(path, drawn(rows, N_ROWS, seed), adapter, seed, args.threads)
    options: dict[str, Any] = {"n_ctx": 1024, "n_threads": args.threads}
    vectors = [v for v in (ps.PersonaVector.load(f) for f in args.vectors) if v.provenance.get("trait") == trait]
    with ps.Model(path, **options) as base, ps.Model(path, **options, lora=[adapter]) as model:
        found = ps.diff(base, model, args.work / f"diff-{name}-{seed}", vectors=vectors, force=True)
    return found.summary()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sets", nargs="+", choices=[*SETS.values(), SOBER], default=[*SETS.values(), SOBER])
    args = parser.parse_args()
    path = model_path(args.model)
    known = [named(ps.PersonaVector.load(v)) for v in args.vectors]
    folder = Folder(args.work, {"model": path.name, "vectors": known})
    if not args.table:
        for trait, name in {**SETS, "": SOBER}.items():
            for seed in range(args.seeds if name in args.sets else 0):
                folder.get(f"{name}-{seed}", lambda t=trait, n=name, s=seed: one(args, path, t, n, s))  # type: ignore[misc]
    print(table(folder.load()))


def table(results: dict[str, Any]) -> str:
    lines = [
        "| fine-tune | KL | coherence | capability | first in the profile | its words, nats | tried by "
        "| mean difference | best feature, by its rank | survivors |",
        "| --- | ---: | ---: | ---: | --- | ---: | --- | --- | --- | ---: |",
    ]
    for key, r in results.items():
        first = r["profile"][0]
        mean, best = _effects(r["features"])
        known = f"{r['capability']['base']:.2f} to {r['capability']['tuned']:.2f}"
        words = "" if first["delta"] is None else f"{first['delta']:+.2f} ({first['low']:+.2f} to {first['high']:+.2f})"
        named = first["trait"] if first["suspicious"] else "none"
        lines.append(
            f"| {key} | {r['kl']['mean']:.3f} | {r['coherence']:.2f} | {known} | {named} | {words} | {r['trait']} | "
            f"{mean} | {best} | {len(r['survivors'])} |"
        )
    return "\n".join(lines)


def _effects(features: list[dict[str, Any]]) -> tuple[str, str]:
    tried = [f for f in features if f["effect"]]
    mean = next((f for f in tried if f["rank"] == 0), None)

    def place(f: dict[str, Any]) -> tuple[bool, float]:
        return not f["effect"]["survives"], abs(1 - f["effect"]["removed"]["share"])

    rest = sorted((f for f in tried if f["rank"]), key=place)
    return (_effect(mean) if mean else "", _effect(rest[0]) if rest else "")


def _effect(f: dict[str, Any]) -> str:
    e = f["effect"]
    sides = []
    for name in ("removed", "induced"):
        t = e[name]
        said = [f"{100 * t['share']:.0f} % at {t['dose']:g}", f"chance {100 * t['chance']:.0f} %"]
        if t["coherence"] is not None:
            said += [f"coherence {t['coherence']:.2f}", f"KL {t['kl']:.3f}"]
        sides.append(f"{name} {', '.join(said)}")
    if e["capability"]:
        sides.append(f"capability {e['capability'][0]:.2f}, {e['capability'][1]:.2f}")
    head = f"{f['rank']}: " if f["rank"] else ""
    return f"{head}{'; '.join(sides)}{'' if e['survives'] else ' (does not survive)'}"


if __name__ == "__main__":
    main()
