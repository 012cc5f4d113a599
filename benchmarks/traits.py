"""Which of the library's traits can be derived on a model, and what their vectors do beside controls.

    python benchmarks/traits.py [MODEL.gguf] [--work DIR] [--traits A,B] [--questions 10] [--table]

Each trait is derived and evaluated; its result is one JSON file in the work folder, so that the command can be stopped
and started again. --table prints the Markdown table of what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from work_folder import claim

import personasteer as ps
from personasteer import traits
from personasteer.evaluate import evaluate
from personasteer.files import atomic_write

DERIVE = {"n_questions": 10, "max_tokens": 24}
EVALUATE = {"n_questions": 12, "n_pairs": 1, "n_random": 20, "n_coherence": 3, "n_items": 12}
READ_FREELY = ("evil", "formal", "pessimistic", "pirate", "poetic", "refusing", "warm")
N_ANSWERS = 10  # free answers at each of three strengths, for these


def one(model: ps.Model, name: str, folder: Path, n_questions: int) -> dict[str, Any]:
    """Derive and evaluate a trait; what is reported of it."""
    start = time.perf_counter()
    result: dict[str, Any] = {"trait": name, "model": model.name}
    try:
        vector = ps.derive(model, name, seed=0, work=folder / "parts" / name, **DERIVE | {"n_questions": n_questions})
    except ps.ElicitationError as e:
        return result | {"rejected": str(e), "seconds": time.perf_counter() - start}
    vector.save(folder / f"{name}.gguf")
    derived = time.perf_counter() - start
    answers = N_ANSWERS if name in READ_FREELY else 0
    found = evaluate(model, [vector], seed=0, n_generations=answers, **EVALUATE)[0]
    elicitation = vector.provenance["elicitation"]
    return result | {
        "elicitation": elicitation,
        "window": list(vector.window),
        "sweep": vector.provenance["calibration"]["sweep"],
        "evaluation": found.summary(),
        "seconds_derive": derived,
        "seconds": time.perf_counter() - start,
    }


def settings(model: ps.Model, n_questions: int) -> dict[str, Any]:
    """What results must share to stand in one table."""
    return {
        "fingerprint": model.fingerprint,
        "threads": model.n_threads,
        "derive": DERIVE | {"n_questions": n_questions},
        "evaluate": EVALUATE,
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each trait, then counts."""
    head = (
        "| trait | elicited | blocks | ρ | window | Δ at -ρ | Δ at +ρ | 95 % interval | random p95 | shuffled | "
        "unrelated | system prompt | Spearman | coherence -ρ / +ρ | KL at +ρ | known: base / +ρ | verdict |"
    )
    rows = [head, "| --- " * 17 + "|"]
    for r in results:
        if "rejected" in r:
            rows.append(f"| {r['trait']} |" + " |" * 15 + f" rejected: {_why(r['rejected'])} |")
            continue
        e, c = r["evaluation"], r["evaluation"]["controls"]
        low, high = e["dose"][0], e["dose"][-1]
        failed = [word for word, held in e["verdict"].items() if not held]
        base = high["log_odds"] - high["delta"]
        interval = f"{high['ci_low'] - base:.2f} … {high['ci_high'] - base:.2f}"
        shuffled = "" if c["shuffled"] is None else f"{c['shuffled']:.2f}"
        prompt = "" if c["system_prompt"] is None else f"{c['system_prompt']:+.2f}"
        known = e["capability"]
        cells = [
            r["trait"], f"{r['elicitation']['rate']:.2f}", f"{e['layers'][0]}-{e['layers'][-1]}",
            f"{e['strength']:.2f}",
            f"{r['window'][0]:.2f} … {r['window'][1]:.2f}", f"{low['delta']:+.2f}", f"{high['delta']:+.2f}", interval,
            f"{c['random_p95']:.2f}", shuffled, f"{c['unrelated']:+.2f}", prompt, f"{e['spearman']:.2f}",
            f"{low['coherence']:.2f} / {high['coherence']:.2f}", f"{e['kl_neutral']:.2f}",
            f"{known['base']:.2f} / {known['steered']:.2f}", "passes" if e["passes"] else "not " + ", ".join(failed),
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    passing = [r["trait"] for r in results if "evaluation" in r and r["evaluation"]["passes"]]
    rejected = [r["trait"] for r in results if "rejected" in r]
    failing = [r["trait"] for r in results if "evaluation" in r and not r["evaluation"]["passes"]]
    rows.append("")
    rows.append(
        f"{len(results)} traits: {len(passing)} pass, {len(failing)} do not ({', '.join(failing) or 'none'}), "
        f"{len(rejected)} are rejected when deriving ({', '.join(rejected) or 'none'}). "
        f"{sum(r['seconds'] for r in results) / 60:.0f} minutes."
    )
    return "\n".join(rows)


def free_answers(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: the second scorers on free answers."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        valence = SentimentIntensityAnalyzer().polarity_scores
    except ImportError:
        valence = None
    rows = [
        "| trait | answers with a word of the lexicon at -ρ, 0, +ρ | VADER valence at -ρ, 0, +ρ |",
        "| --- " * 3 + "|",
    ]
    for r in results:
        found = r.get("evaluation", {}).get("generations")
        if not found:
            continue
        tone = (
            [float(np.mean([valence(t)["compound"] for t in of_one])) for of_one in found["texts"]] if valence else []
        )
        rates = ", ".join(f"{x:.2f}" for x in found["rates"])
        rows.append(f"| {r['trait']} | {rates} | {', '.join(f'{x:+.2f}' for x in tone)} |")
    return "\n".join(rows)


def _why(message: str) -> str:
    return message.split(". Seen:")[0].split("count ")[-1] if ". Seen:" in message else message.split(";")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--work", type=Path, default=Path("traits-work"))
    parser.add_argument("--traits", default="")
    parser.add_argument("--questions", type=int, default=DERIVE["n_questions"], help="derived from, of each prompt")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    wanted = options.traits.split(",") if options.traits else traits.names()
    options.work.mkdir(parents=True, exist_ok=True)
    files = {name: options.work / f"{name}.json" for name in wanted}
    missing = [name for name in wanted if not files[name].exists()]
    if missing and not options.table:
        path = ps.model.demo_model_path() if options.model == "demo" else options.model
        with ps.Model(path, n_ctx=512, n_threads=options.threads) as model:
            claim(options.work, settings(model, options.questions))
            for k, name in enumerate(missing):
                print(f"{name} ({k + 1} of {len(missing)})", file=sys.stderr, flush=True)
                result = one(model, name, options.work, options.questions)
                atomic_write(files[name], json.dumps(result, indent=1, ensure_ascii=False).encode())
    results = [json.loads(file.read_text("utf-8")) for file in files.values() if file.exists()]
    print(table(results), "\n\n", free_answers(results), sep="")


if __name__ == "__main__":
    main()
