"""Does steering while training keep a trait out, without keeping the task out?

    pip install 'personasteer[train]'
    python benchmarks/prevention.py VECTOR.gguf --work DIR [--seeds 3] [--strength 0.3] [--arms plain preventative]

SmolLM2 is fine-tuned on gloom (see test_bed.py), for each seed with the same rows, order and beginning: plainly; with
+rho v at all positions while it trains (preventative steering), at the vector's blocks, or as increments at all blocks;
with a random vector of the same norms and rho; under a system prompt that asks for the trait (inoculation, no hook);
and with v taken out of the stream (concept ablation). Measured without any of it on the quantized file with the
adapter.

Task loss: of ten per cent of the rows, which were held out. Its share of the plain training's is what must stay within
10 %.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from test_bed import N_ROWS, arguments, drawn, measured, named, shown_of, trait_rows, tuned
from work_folder import Folder

import personasteer as ps
from personasteer.cli._common import model_path
from personasteer.evaluate import random_vectors, trait_of

ARMS = ("plain", "preventative", "increments", "random", "inoculation", "ablation")


def one(args: argparse.Namespace, path: Path, vector: ps.PersonaVector, arm: str, seed: int) -> dict[str, Any]:
    rows = drawn(trait_rows(args.rows), N_ROWS, seed)
    how: dict[str, Any] = {
        "plain": {},
        "preventative": {"steer": vector * args.strength},
        "increments": {"steer": vector.incremental() * args.strength},
        "random": {"steer": random_vectors(vector, 1, seed=seed)[0] * args.strength},
        "inoculation": {"system": trait_of(vector).system[0][0]},
        "ablation": {"steer": ps.Ablate(vector)},
    }[arm]
    adapter = args.work / f"{arm}-{seed}.gguf"
    found = tuned(path, rows, adapter, seed, args.threads, **how)
    before = shown_of(measured(path, [], [vector], None, args.threads, quality=False))
    return found | measured(path, [adapter], [vector], before, args.threads)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--strength", type=float, default=0.3)
    parser.add_argument("--rows", default="gloom")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    args = parser.parse_args()
    path, (vector, *_) = model_path(args.model), [ps.PersonaVector.load(v) for v in args.vectors]
    settings = {"model": path.name, "vector": named(vector), "strength": args.strength, "rows": args.rows}
    folder = Folder(args.work, settings)
    if not args.table:
        for seed in range(args.seeds):
            for arm in args.arms:
                folder.get(f"{arm}-{seed}", lambda arm=arm, seed=seed: one(args, path, vector, arm, seed))  # type: ignore[misc]
    print(table(folder.load()))


def table(results: dict[str, Any]) -> str:
    lines = [
        "| arm | seed | shift of the words, nats | of plain | shift of the stream | of plain | task loss | of plain | "
        "coherence | capability |",
        "| --- | ---: |" + " ---: |" * 8,
    ]
    for arm in ARMS:
        for key, r in results.items():
            if key.rpartition("-")[0] != arm:
                continue
            seed = key.rpartition("-")[2]
            plain = results.get(f"plain-{seed}")
            ((c,),) = [list(r["change"].values())]
            numbers = [c["log_odds"], c["projection"], r["task_loss"][1]]
            of_plain = ["", "", ""]
            if plain is not None:
                ((p,),) = [list(plain["change"].values())]
                beside = (p["log_odds"], p["projection"], plain["task_loss"][1])
                of_plain = [f"{100 * x / y:.0f} %" for x, y in zip(numbers, beside, strict=True)]
            said = [
                f"{numbers[0]:+.3f}",
                of_plain[0],
                f"{numbers[1]:+.3f}",
                of_plain[1],
                f"{numbers[2]:.3f}",
                of_plain[2],
            ]
            lines.append(f"| {arm} | {seed} | {' | '.join(said)} | {r['coherence']:.2f} | {r['capability']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
