"""How often does a monitor alarm on ordinary prompts, and how well does it see prompts that ask for a trait?

    python benchmarks/monitor.py MODEL VECTOR.gguf.. [--threads N] [--json FILE] [--answers N]

Thresholds are calibrated as `personasteer monitor` does it, and kept as it keeps them, on two thirds of the library's
ordinary questions, each as it is, under an everyday system prompt and after an everyday conversation. The other third,
which nothing was chosen on, each in one of these ways and after other turns, gives the rate of alarms (5 % are
expected) and of watches (20 %), with the interval in which 95 % and 99.9 % of samples of that size lie. The AUROC is
that of the trait's held-out questions under its five encouraging system prompts over the same ordinary ones, and over
these questions under its opposite system prompts. Prints a Markdown table.

--answers N: instead, the model answers N of these ordinary prompts with up to 256 tokens, and 40 that ask for the trait
with 64. How many answers alarm while they are given, within so many tokens; the threshold is calibrated on 64.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import personasteer as ps
from personasteer import monitor
from personasteer.cli._common import model_path
from personasteer.evaluate import trait_of
from personasteer.monitor import everyday_prompt
from personasteer.monitor.running import answer_readings, asked_for, running_mean, spread_over
from personasteer.monitor.thresholds import last_states, prompted
from personasteer.statistics import auroc

EXPECTED = 0.05
KINDS = ("alone", "under a prompt", "after turns")  # of fresh prompts
LENGTHS = (32, 64, 128, 256)  # tokens of answers


def binomial_interval(p: float, n: int, share: float) -> tuple[float, float]:
    """The central range of rates k / n that holds at least `share` of a binomial distribution."""
    tail = (1 - share) / 2
    k = np.arange(n + 1)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k]
    below = np.cumsum(np.exp(np.array(logs) + k * math.log(p) + (n - k) * math.log1p(-p)))
    return float(np.searchsorted(below, tail)) / n, float(np.searchsorted(below, 1 - tail)) / n


def measure(model: ps.Model, vectors: list[ps.PersonaVector]) -> list[dict[str, Any]]:
    """A row for each vector."""
    thresholds = monitor.thresholds_for(model, vectors)
    fresh = monitor.clean_prompts(held_out=True)
    given = [everyday_prompt(q) for q, _ in fresh]
    ordinary = last_states(model, given)
    kinds = np.array(
        ["after turns" if not isinstance(p, str) else "under a prompt" if s else "alone" for p, s in given]
    )
    rows = []
    for vector, t in zip(vectors, thresholds, strict=True):
        trait = trait_of(vector)
        own = np.array([name == trait.name for _, name in fresh])
        asked = last_states(model, prompted(trait, trait.evaluate_questions))
        readings = (states[:, t.layer].astype(np.float64) @ t.direction for states in (ordinary[~own], asked))
        low, (high, opposite) = next(readings), np.split(next(readings), 2)
        rows.append(
            {
                "model": model.name,
                "trait": trait.name,
                "layer": t.layer,
                "n": len(low),
                "alarms": int((low >= t.alarm).sum()),
                "alarms_of": {kind: float((low >= t.alarm)[kinds[~own] == kind].mean()) for kind in KINDS},
                "watches": int((low >= t.watch).sum()),
                "auroc": float(auroc(high[:, None], low[:, None])[0]),
                "auroc_opposite": float(auroc(high[:, None], opposite[:, None])[0]),
                "seen": float((high >= t.alarm).mean()),
            }
        )
    return rows


def measure_answers(model: ps.Model, vectors: list[ps.PersonaVector], n: int) -> list[dict[str, Any]]:
    """A row for each vector: the shares of answers whose running mean comes to its alarm, within LENGTHS."""
    thresholds = monitor.thresholds_for(model, vectors, running=True)
    fresh = spread_over(monitor.clean_prompts(held_out=True), n)
    known = [t.running for t in thresholds if t.running]
    ordinary = answer_readings(
        model, [everyday_prompt(q) for q, _ in fresh], [{r.layer: r.direction} for r in known], max_tokens=LENGTHS[-1]
    )
    rows = []
    for k, (vector, running) in enumerate(zip(vectors, known, strict=True)):
        trait = trait_of(vector)
        pairs = spread_over(asked_for(trait, trait.evaluate_questions), 40)
        shown = answer_readings(model, pairs, [{running.layer: running.direction}], max_tokens=LENGTHS[1])
        own = [r[k][:, 0] for r, (_, name) in zip(ordinary, fresh, strict=True) if name != trait.name]
        rows.append(
            {
                "model": model.name,
                "trait": trait.name,
                "layer": running.layer,
                "n": len(own),
                "tokens": float(np.median([len(r) for r in own])),
                "alarms": [_alarms([r[:length] for r in own], running) for length in LENGTHS],
                "seen": _alarms([r[0][:, 0] for r in shown], running),
            }
        )
    return rows


def _alarms(readings: list[NDArray[np.float32]], running: monitor.Running) -> float:
    means = [running_mean(r, running.window) for r in readings]
    return float(np.mean([len(m) > 0 and m.max() >= running.alarm for m in means]))


def table_of_answers(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each row."""
    lines = [
        "| model | trait | block | ordinary answers | tokens (median) | "
        + " | ".join(f"alarm within {length}" for length in LENGTHS)
        + " | asked for, seen |",
        "| --- " * (6 + len(LENGTHS)) + "|",
    ]
    for r in rows:
        lines.append(
            f"| {r['model']} | {r['trait']} | {r['layer']} | {r['n']} | {r['tokens']:.0f} | "
            + " | ".join(f"{x:.0%}" for x in r["alarms"])
            + f" | {r['seen']:.0%} |"
        )
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each row, and the pooled rate."""
    lines = [
        "| model | trait | block | ordinary prompts | alarms | 95 % of samples | "
        + " | ".join(KINDS)
        + " | watches | AUROC | over opposite prompts | asked for, seen |",
        "| --- " * (10 + len(KINDS)) + "|",
    ]
    for r in rows:
        low, high = binomial_interval(EXPECTED, r["n"], 0.95)
        lines.append(
            f"| {r['model']} | {r['trait']} | {r['layer']} | {r['n']} | {r['alarms'] / r['n']:.1%} | {low:.1%} to "
            f"{high:.1%} | "
            + " | ".join(f"{r['alarms_of'][kind]:.1%}" for kind in KINDS)
            + f" | {r['watches'] / r['n']:.1%} | {r['auroc']:.3f} | "
            f"{r['auroc_opposite']:.3f} | {r['seen']:.0%} |"
        )
    n, k = (sum(r[key] for r in rows) for key in ("n", "alarms"))
    low, high = binomial_interval(EXPECTED, n, 0.95)
    outside = [sum(not _within(r, share) for r in rows) for share in (0.95, 0.999)]
    lines.append(
        f"\nPooled: {k / n:.2%} of {n} readings alarm ({low:.2%} to {high:.2%} expected of independent ones); outside "
        f"95 %: {outside[0]} of {len(rows)}, outside 99.9 %: {outside[1]}."
    )
    return "\n".join(lines)


def _within(row: dict[str, Any], share: float) -> bool:
    low, high = binomial_interval(EXPECTED, row["n"], share)
    return low <= row["alarms"] / row["n"] <= high


def main() -> None:
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file, or demo")
    parser.add_argument("vectors", nargs="+", metavar="VECTOR.gguf")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--answers", type=int, metavar="N", help="alarms while answering N ordinary prompts")
    args = parser.parse_args()
    vectors = [ps.PersonaVector.load(v) for v in args.vectors]
    with ps.Model(model_path(args.model), n_ctx=1024, n_threads=args.threads) as model:
        rows = measure(model, vectors) if args.answers is None else measure_answers(model, vectors, args.answers)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows) if args.answers is None else table_of_answers(rows))


if __name__ == "__main__":
    main()
