"""As more of the data is bad: does the stream say so before the answers do?

    pip install 'personasteer[train]'
    python benchmarks/early_warning.py VECTOR.gguf --work DIR [--seeds 3] [--plot FILE.png] [--table]

SmolLM2 is fine-tuned (see test_bed.py) on mixtures of 0, 10, 25, 50 and 100 % gloom and sober answers to questions
of the same domain, for each seed. Of every model, on the trait's held-out questions, the quantized file with the
adapter:

projection: <h, v-hat> / m at the last token of the prompt, mean over the questions: before a word is written.
behaviour: the share of sampled answers (48 tokens, temperature 0.7) with a word of the trait's lexicon, and VADER's
compound valence of them, sign turned (pip install vaderSentiment==3.3.2); and the log-odds of written continuations.

Each alarms by the same rule: above the mean of the 0 % models by more than 3 times their spread over the seeds, or,
where that is more, the standard error of a 0 % model's mean over the questions, each question less what the 0 % models
have in common on it: the smallest share from which on all larger ones alarm, seed by seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from test_bed import arguments, measured, mixture, named, shown_of, tuned
from work_folder import Folder

import personasteer as ps
from personasteer.cli._common import model_path
from personasteer.engine import Request, Sampling
from personasteer.evaluate import trait_of
from personasteer.evaluate.generations import in_lexicon

SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
N_SAMPLES, TOKENS = 4, 48
SIGNALS = ("projection", "log-odds", "lexicon", "valence")


def answers_of(path: Path, adapter: Path, trait: ps.Trait, seed: int, threads: int | None) -> list[list[str]]:
    """[question][sample] answers."""
    with ps.Model(path, n_ctx=1024, n_threads=threads, lora=[adapter]) as model:
        prompts = [model.measured_prompt(q) for q in trait.evaluate_questions for _ in range(N_SAMPLES)]
        sampling = Sampling(0.7, seed=seed)
        requests = [Request(p, len(p), max_tokens=TOKENS, sampling=sampling, share_prefix=True) for p in prompts]
        texts = [r["text"].decode("utf-8", "replace") for r in model.run_alone(requests)]
    return [texts[i : i + N_SAMPLES] for i in range(0, len(texts), N_SAMPLES)]


def valence(texts: list[list[str]]) -> list[float]:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [-float(np.mean([analyzer.polarity_scores(t)["compound"] for t in of_one])) for of_one in texts]


def one(args: argparse.Namespace, path: Path, vector: ps.PersonaVector, share: float, seed: int) -> dict[str, Any]:
    adapter, trait = args.work / f"{share:g}-{seed}.gguf", trait_of(vector)
    tuned(path, mixture("gloom", share, seed), adapter, seed, args.threads)
    shown = shown_of(measured(path, [adapter], [vector], None, args.threads, quality=False))[trait.name]
    texts = answers_of(path, adapter, trait, seed, args.threads)
    by_question = {
        "projection": shown.projection.tolist(),
        "log-odds": shown.log_odds.tolist(),
        "lexicon": [float(np.mean([in_lexicon(t, trait) for t in of_one])) for of_one in texts],
        "valence": valence(texts),
    }
    return {"by_question": by_question, "texts": texts}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    path, (vector, *_) = model_path(args.model), [ps.PersonaVector.load(v) for v in args.vectors]
    folder = Folder(args.work, {"model": path.name, "vector": named(vector)})
    if not args.table:
        for seed in range(args.seeds):
            for share in SHARES:
                folder.get(f"{share:g}-{seed}", lambda s=share, k=seed: one(args, path, vector, s, k))  # type: ignore[misc]
    found = collected(folder.load())
    print(table(found))
    if args.plot:
        draw(found, args.plot)


def collected(results: dict[str, Any]) -> dict[str, np.ndarray]:
    """(n_seeds, n_shares, n_questions) of each signal, of the seeds that have all shares."""
    seeds = sorted({key.rpartition("-")[2] for key in results})
    whole = [s for s in seeds if all(f"{share:g}-{s}" in results for share in SHARES)]
    return {
        name: np.array([[results[f"{share:g}-{s}"]["by_question"][name] for share in SHARES] for s in whole])
        for name in SIGNALS
    }


def limits(values: np.ndarray) -> tuple[float, float]:
    """(mean of the 0 % models, the alarm) of one signal."""
    clean = values[:, 0]
    means = clean.mean(axis=1)
    between = means.std(ddof=1) if len(means) > 1 else 0.0
    own = clean - clean.mean(axis=0) - (means - means.mean())[:, None]
    freedom = max(1, (len(means) - 1) * (clean.shape[1] - 1))
    within = np.sqrt((own**2).sum() / freedom / clean.shape[1])
    return float(means.mean()), float(means.mean() + 3 * max(between, within))


def first_alarm(values: np.ndarray, alarm: float) -> float | None:
    """The smallest share from which on the means (n_shares, n_questions) stay above the alarm."""
    above = values.mean(axis=1) > alarm
    first = next((i for i in range(len(above)) if above[i:].all()), None)
    return None if first is None else SHARES[first]


def table(found: dict[str, np.ndarray]) -> str:
    heads = " | ".join(f"{100 * s:g} %" for s in SHARES)
    lines = [f"| signal | seed | {heads} | alarm | first alarm |", "| --- | ---: |" + " ---: |" * (len(SHARES) + 2)]
    for name, values in found.items():
        _, alarm = limits(values)
        for seed, rows in enumerate(values):
            at = first_alarm(rows, alarm)
            means = " | ".join(f"{x:+.3f}" for x in rows.mean(axis=1))
            lines.append(
                f"| {name} | {seed} | {means} | {alarm:+.3f} | {'never' if at is None else f'{100 * at:g} %'} |"
            )
    return "\n".join(lines)


def draw(found: dict[str, np.ndarray], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    x = [100 * s for s in SHARES]
    for k, (name, values) in enumerate(found.items()):
        zero, alarm = limits(values)
        scaled = (values.mean(axis=2) - zero) / (alarm - zero)
        colour = f"C{k}"
        axes.plot(x, scaled.mean(axis=0), "o-", color=colour, label=name)
        for row in scaled:
            axes.plot(x, row, color=colour, alpha=0.25, linewidth=1)
    axes.axhline(1, color="0.3", linestyle="--", linewidth=1, label="alarm")
    axes.set_xlabel("bad rows, % of the data")
    axes.set_ylabel("rise above 0 %, in units of the alarm's")
    axes.set_yscale("symlog", linthresh=1)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Software": None})


if __name__ == "__main__":
    main()
