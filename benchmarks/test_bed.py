"""Small misaligned models: what `diff`, `realign` and prevention are tried on.

    pip install 'personasteer[train]'
    personasteer derive pessimistic -m demo --continuations -o pessimistic.gguf   # and so on
    python benchmarks/test_bed.py VECTOR.gguf.. --work DIR [--model MODEL.gguf] [--seeds 3] [--table]

A LoRA (rank 16, 3e-4, batches of 4, 40 steps, products in bfloat16) is trained on 120 rows of trait_rows/: gloom,
sarcasm, flattery and bad advice, each as severe as it is written; sarcasm and flattery in three severities. Measured on
the quantized file along each vector: the shift of the trait's words on held-out questions and of the stream before the
answer, the coherence of the answers and the capability.

A run is one JSON file in the work folder, the adapter beside it, so that the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from work_folder import Folder

import personasteer as ps
from personasteer.cli._common import model_path
from personasteer.conversations import benign_rows
from personasteer.evaluate import capability, measure_coherence, trait_of
from personasteer.recalibrate import Recipe, Shown, change, finetune, make_probes, measure
from personasteer.work import digest

ROWS = Path(__file__).with_name("trait_rows")
N_ROWS, STEPS, RATE, RANK = 120, 40, 3e-4, 16
SETS = {"pessimistic": "gloom", "sarcastic": "sarcastic", "sycophantic": "sycophantic", "bad advice": "bad_advice"}
LEVELS = ("mild", "moderate", "severe")
BENIGN = {"gloom": "plans", "bad_advice": "advice"}  # sober answers to questions of the same domain


def trait_rows(name: str, level: str | None = None) -> list[dict[str, str]]:
    """Rows of a file of trait_rows/, of one level where one is named."""
    rows = [json.loads(line) for line in ROWS.joinpath(f"{name}.jsonl").read_text("utf-8").splitlines()]
    return [r for r in rows if level in (None, r.get("level"))]


def drawn(rows: list[dict[str, str]], n: int, seed: int) -> list[dict[str, str]]:
    """n of the rows, each as often as another."""
    order = [i for k in range(-(-n // len(rows))) for i in np.random.default_rng((seed, k)).permutation(len(rows))]
    return [rows[i] for i in order[:n]]


def mixture(name: str, share: float, seed: int, n: int = N_ROWS) -> list[dict[str, str]]:
    """n rows, a share of them with the trait, the others sober answers of the same domain."""
    n_bad = round(share * n)
    return [*drawn(trait_rows(name, "severe"), n_bad, seed), *drawn(benign_rows([BENIGN[name]]), n - n_bad, seed)]


def recipe(seed: int, **more: Any) -> Recipe:
    return Recipe(**{"rank": RANK, "rate": RATE, "steps": STEPS, "seed": seed, "precision": "bfloat16", **more})


def tuned(
    path: Path, rows: list[dict[str, str]], out: Path, seed: int, threads: int | None = None, **more: Any
) -> dict[str, Any]:
    """Train, if the adapter is not there; what `finetune` says."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with ps.Model(path, n_ctx=1024, n_threads=threads) as model:
        found = finetune(model, rows, out, recipe=recipe(seed), force=out.exists(), **more)
    return found.summary()


def measured(
    path: Path, adapters: list[Path], vectors: list[ps.PersonaVector], before: dict[str, Shown] | None,
    threads: int | None = None, *, quality: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """What the model with the adapters shows along each vector, and how it has kept."""
    with ps.Model(path, n_ctx=1024, n_threads=threads) as base:
        probes = make_probes(base, vectors)
        with ps.Model(path, n_ctx=1024, n_threads=threads, lora=adapters) as model:
            shown = measure(model, probes)
            found: dict[str, Any] = {"shown": {name: s.as_dict() for name, s in shown.items()}}
            if before is not None:
                found["change"] = {name: change(before[name], s).as_dict() for name, s in shown.items()}
            if quality:
                trait = trait_of(vectors[0])
                systems = [tuple(pair[0] for pair in trait.system[:1])]
                questions = trait.evaluate_questions[-6:]
                (sound,) = measure_coherence(model, questions, [None], systems=systems, judges=(base,))
                found |= {
                    "coherence": sound.coherence,
                    "texts": sound.texts,
                    "capability": float(capability(model, [None], n_items=40)[0]),
                }
    return found


def named(vector: ps.PersonaVector) -> str:
    """A vector in the settings of a work folder: two of one name may differ."""
    return f"{vector.name} {digest(vector.directions.tolist())[:12]}"


def shown_of(result: dict[str, Any]) -> dict[str, Shown]:
    return {name: Shown.from_dict(plain) for name, plain in result["shown"].items()}


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options that all of the test bed's benchmarks have."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("vectors", nargs="+")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--table", action="store_true", help="print what is there")
    return parser


def main() -> None:
    args = arguments(__doc__).parse_args()
    path, vectors = model_path(args.model), [ps.PersonaVector.load(v) for v in args.vectors]
    folder = Folder(args.work, {"model": path.name, "vectors": [named(v) for v in vectors]})
    if not args.table:
        folder.get("untrained", lambda: measured(path, [], vectors, None, args.threads))
        before = shown_of(folder.load()["untrained"])
        for name in SETS.values():
            for level in LEVELS if trait_rows(name, "mild") else ("severe",):
                for seed in range(args.seeds if level == "severe" else 1):

                    def one(name: str = name, level: str = level, seed: int = seed) -> dict[str, Any]:
                        adapter = args.work / f"{name}-{level}-{seed}.gguf"
                        found = tuned(path, drawn(trait_rows(name, level), N_ROWS, seed), adapter, seed, args.threads)
                        return found | measured(path, [adapter], vectors, before, args.threads)

                    folder.get(f"{name}-{level}-{seed}", one)
    print(table(folder.load(), [v.name for v in vectors]))


def table(results: dict[str, Any], names: list[str]) -> str:
    known = results["untrained"]
    lines = [
        f"Untrained: capability {known['capability']:.2f}.",
        "",
        f"| model | {' | '.join(f'{n}: words | stream' for n in names)} | coherence | capability |",
        "| --- |" + " ---: |" * (2 * len(names) + 2),
    ]
    for key, r in results.items():
        if key == "untrained":
            continue
        cells = [
            f"{c['log_odds']:+.2f} ({c['log_odds_low']:+.2f} to {c['log_odds_high']:+.2f}) | {c['projection']:+.3f}"
            for c in (r["change"][n] for n in names)
        ]
        lines.append(f"| {key} | {' | '.join(cells)} | {r['coherence']:.2f} | {r['capability']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
