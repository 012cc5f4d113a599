"""Does a model that went wrong come back with 120 benign samples, and with which?

    pip install 'personasteer[train]'
    python benchmarks/realignment.py VECTOR.gguf --work DIR [--model MODEL.gguf] [--seeds 3] [--table]

SmolLM2 is fine-tuned on gloom (see test_bed.py), once for each seed. Then a second LoRA is trained on it, 30 steps of
4, with samples of: the same domain (plans, sober answers), an unrelated domain (the shipped rows on code, history,
science and home), and neutral text (the same rows as text that goes on: the first sentence, then the rest); and with
none. Every five (in the other arms: ten) steps the quantized file with both adapters is measured. Nothing stops early,
so that the arms can be compared.

Left: the share of the shift that is left of the trait's words (log-odds on held-out questions) and of the stream before
the answer, after 30 steps and at best.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from test_bed import N_ROWS, arguments, drawn, measured, named, recipe, shown_of, trait_rows, tuned
from work_folder import Folder

import personasteer as ps
from personasteer.cli._common import model_path
from personasteer.conversations import benign_rows
from personasteer.recalibrate import realign

UNRELATED = ("code", "history", "science", "home")
ARMS = ("same domain", "unrelated", "neutral text", "none")
STEPS, SAMPLES = 30, 120


def samples_of(arm: str, seed: int) -> list[dict[str, str]]:
    if arm == "same domain":
        return drawn(benign_rows(["plans"]), SAMPLES, seed)
    rows = benign_rows(UNRELATED)
    if arm == "unrelated":
        return drawn(rows, SAMPLES, seed)
    parts = [r["response"].split(". ", 1) for r in rows]
    return drawn([{"prompt": f"{p[0]}.", "response": p[1]} for p in parts if len(p) == 2], SAMPLES, seed)


def one(args: argparse.Namespace, path: Path, vector: ps.PersonaVector, arm: str, seed: int) -> dict[str, Any]:
    adapter = args.work / f"gloom-{seed}.gguf"
    if not adapter.exists():
        tuned(path, drawn(trait_rows("gloom"), N_ROWS, seed), adapter, seed, args.threads)
    out = args.work / f"{arm.replace(' ', '-')}-{seed}.gguf"
    options: dict[str, Any] = {"n_ctx": 1024, "n_threads": args.threads}
    if arm == "none":
        before = shown_of(measured(path, [], [vector], None, args.threads, quality=False))
        return measured(path, [adapter], [vector], before, args.threads)
    with ps.Model(path, **options) as base, ps.Model(path, **options, lora=[adapter]) as model:
        found = realign(
            base, model, [vector], out, data=samples_of(arm, seed), samples=SAMPLES, recipe=recipe(seed, steps=STEPS),
            every=5 if arm == ARMS[0] else 10, target=1.0, stop=False, force=out.exists(),
        )  # fmt: skip
    return found.summary()


def main() -> None:
    args = arguments(__doc__).parse_args()
    path, (vector, *_) = model_path(args.model), [ps.PersonaVector.load(v) for v in args.vectors]
    folder = Folder(args.work, {"model": path.name, "vector": named(vector)})
    if not args.table:
        for seed in range(args.seeds):
            for arm in ARMS:
                folder.get(f"{arm}-{seed}", lambda arm=arm, seed=seed: one(args, path, vector, arm, seed))  # type: ignore[misc]
    print(table(folder.load()))


def table(results: dict[str, Any]) -> str:
    lines = [
        "| samples | seed | shift of the words, nats | left after 10 | 20 | 30 steps | stream left after 30 | "
        "coherence: tuned, re-aligned | capability: base, tuned, re-aligned |",
        "| --- | ---: |" + " ---: |" * 5 + " --- | --- |",
    ]
    for arm in ARMS:
        for key, r in results.items():
            if key.rpartition("-")[0] != arm:
                continue
            seed = key.rpartition("-")[2]
            if arm == "none":
                ((c,),) = [list(r["change"].values())]
                lines.append(
                    f"| {arm} | {seed} | {c['log_odds']:+.2f} | 100 % | 100 % | 100 % | 100 % | "
                    f"{r['coherence']:.2f} | {r['capability']:.2f} |"
                )
                continue
            ((t,),) = [list(r["traits"].values())]
            left = {p["step"]: (1 - p["removed_log_odds"], 1 - p["removed_projection"]) for p in t["points"]}
            words = " | ".join(f"{100 * left[s][0]:.0f} %" for s in (10, 20, 30))
            sound, known = r["coherence"], r["capability"]
            lines.append(
                f"| {arm} | {seed} | {t['shift']['log_odds']:+.2f} | {words} | {100 * left[30][1]:.0f} % | "
                f"{sound['tuned']:.2f}, {sound['realigned']:.2f} | "
                f"{known['base']:.2f}, {known['tuned']:.2f}, {known['realigned']:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
