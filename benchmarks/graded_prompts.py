"""Does the reading before an answer predict how strongly the answer will show the trait?

    python benchmarks/graded_prompts.py MODEL VECTOR.gguf.. [--questions 10] [--work DIR] [--threads N] [--table]

Each trait's held-out questions are asked under eight system prompts from "never" to "as strongly as you can"
(graded_prompts.toml). Read: the projection x at the last prompt token, at the block and along the direction of the
monitor's threshold. Then the model answers greedily, and the answer alone, without that system prompt, is scored, not
with the vector: y is the score of LogOddsJudge (the same model's log-odds of the answer under opposite system prompts),
and besides whether a word of the trait's lexicon turns up.

With x_pq and y_pq of prompt p and question q, and m_p their mean over the questions:

    r          Pearson over all pq; the 95 % interval is the percentile bootstrap over questions, prompts fixed
    r within   Pearson over all pq of x_pq - m_p(x) and y_pq - m_p(y)
    r between  Pearson over p of m_p(x) and m_p(y)

Beside r and r within: the 95th percentile of |r| of 100 random directions of the same block. r can be large because the
prompts differ alone: a reading that only recognises the prompt has r within 0.

A trait is one JSON file in the work folder, so that the command can be stopped and started again; --table prints the
Markdown tables of what is there. Source: arXiv 2507.21509, section 3.3.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quantizations import Folder
from work_folder import claim

import personasteer as ps
from personasteer import monitor
from personasteer.cli._common import model_path
from personasteer.derive.judge import LogOddsJudge
from personasteer.engine import Request, Sampling
from personasteer.evaluate import trait_of
from personasteer.evaluate.coherence import repetition
from personasteer.evaluate.generations import in_lexicon
from personasteer.monitor import Threshold
from personasteer.monitor.thresholds import last_states
from personasteer.statistics import spearman

TOKENS = 40
N_RANDOM = 100
N_DRAWS = 2000
TARGET = 0.75  # of r

Numbers = NDArray[np.float64]


def graded() -> dict[str, list[str]]:
    """{trait: its system prompts from weakest to strongest}."""
    text = Path(__file__).with_suffix(".toml").read_text("utf-8")
    return {name: table["prompts"] for name, table in tomllib.loads(text).items()}


# -- figures


def pearson(x: Numbers, y: Numbers) -> float:
    """Over the places where both are finite; NaN where a side is constant or fewer than three are left."""
    known = np.isfinite(x) & np.isfinite(y)
    a, b = x[known], y[known]
    if len(a) < 3:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 1e-12 else float("nan")


def prompt_means(x: Numbers, known: NDArray[np.bool_]) -> Numbers:
    """(prompts,) means of (prompts, questions) over what is known; NaN where nothing is."""
    count = known.sum(1)
    sums: Numbers = np.where(known, x, 0.0).sum(1)
    return np.where(count, sums / np.maximum(count, 1), np.nan)


def within(x: Numbers, y: Numbers) -> float:
    """Pearson of (prompts, questions) after each prompt's mean is taken off."""
    known = np.isfinite(x) & np.isfinite(y)
    a, b = (v - prompt_means(v, known)[:, None] for v in (x, y))
    return pearson(a, b)


def between(x: Numbers, y: Numbers) -> float:
    """Pearson of the prompts' means."""
    known = np.isfinite(x) & np.isfinite(y)
    return pearson(prompt_means(x, known), prompt_means(y, known))


def interval(figure: Callable[[Numbers, Numbers], float], x: Numbers, y: Numbers) -> tuple[float, float]:
    """95 % percentile bootstrap of a figure of (prompts, questions), over questions."""
    n = x.shape[1]
    draws = np.random.default_rng(0).integers(0, n, (N_DRAWS, n))
    found = np.array([figure(x[:, at], y[:, at]) for at in draws])
    found = found[np.isfinite(found)]
    if not len(found):
        return float("nan"), float("nan")
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def random_p95(result: Mapping[str, Any], figure: str) -> float:
    sizes = np.abs(np.array(result["random"][figure], np.float64))
    sizes = sizes[np.isfinite(sizes)]
    return float(np.quantile(sizes, 0.95)) if len(sizes) else float("nan")


# -- measuring


def measure(
    model: ps.Model, vector: ps.PersonaVector, threshold: Threshold, prompts: Sequence[str], n_questions: int
) -> dict[str, Any]:
    """Readings, answers and their scores, each [prompt][question]."""
    trait = trait_of(vector)
    questions = trait.evaluate_questions[:n_questions]
    shape = len(prompts), len(questions)
    asked = [(q, system) for system in prompts for q in questions]
    states = last_states(model, asked)[:, threshold.layer].astype(np.float64)
    readings = (states @ threshold.direction).reshape(shape)
    given = [model.measured_prompt(q, system) for q, system in asked]
    requests = [Request(p, len(p), max_tokens=TOKENS, sampling=Sampling(0.0), share_prefix=True) for p in given]
    texts = np.array([r["text"].decode("utf-8", "replace") for r in model.run_alone(requests)], object).reshape(shape)
    scores = judge(LogOddsJudge(model), trait, questions, texts)
    random = np.random.default_rng(0).standard_normal((N_RANDOM, model.n_embd))
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    others = [row.reshape(shape) for row in random @ states.T]
    return {
        "trait": trait.name,
        "model": model.name,
        "layer": threshold.layer,
        "prompts": list(prompts),
        "questions": list(questions),
        "readings": readings.tolist(),
        "scores": scores.tolist(),
        "lexicon": [[in_lexicon(t, trait) for t in row] for row in texts],
        "texts": texts.tolist(),
        "random": {
            "overall": [pearson(x.ravel(), scores.ravel()) for x in others],
            "within": [within(x, scores) for x in others],
        },
    }


def judge(by: LogOddsJudge, trait: ps.Trait, questions: Sequence[str], texts: NDArray[np.object_]) -> Numbers:
    """Scores of texts (.., questions): those of one question after the other, which share its prompt."""
    pairs = [(q, text) for q, column in zip(questions, texts.T, strict=True) for text in column]
    return by.score(trait, pairs).reshape(texts.T.shape).T


def thresholds(
    model: ps.Model, vectors: Sequence[ps.PersonaVector], work: Path, settings: Mapping[str, Any]
) -> list[tuple[Threshold, Folder]]:
    """Each vector's threshold, calibrated once for all that lack one, and the folder of its trait."""
    names = [trait_of(v).name for v in vectors]
    if len(set(names)) < len(names):
        sys.exit(f"two vectors of one trait ({', '.join(names)}): give each a work folder of its own")
    work.mkdir(parents=True, exist_ok=True)
    claim(work, {"fingerprint": model.fingerprint, "threads": model.n_threads, **settings})
    folders = [Folder(work / name, {"vector": digest(v)}) for name, v in zip(names, vectors, strict=True)]
    missing = [(folder, v) for folder, v in zip(folders, vectors, strict=True) if not folder.has("threshold")]
    if missing:
        print(f"calibrating {len(missing)} thresholds", file=sys.stderr, flush=True)
        made = monitor.calibrate(model, [v for _, v in missing])
        for (folder, _), threshold in zip(missing, made, strict=True):
            folder.get("threshold", threshold.as_dict)
    return [(Threshold.from_dict(folder.load()["threshold"]), folder) for folder in folders]


def digest(vector: ps.PersonaVector) -> str:
    """Of what is read, and of the texts that it is tried on."""
    directions = b"" if vector.last_prompt is None else vector.last_prompt.tobytes()
    texts = json.dumps(trait_of(vector).as_dict(), sort_keys=True).encode()
    return hashlib.sha256(directions + texts).hexdigest()


def load(work: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """{trait: {unit: result}} of what is in a work folder."""
    return {folder.name: Folder(folder).load() for folder in sorted(work.iterdir()) if folder.is_dir()}


# -- tables


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each trait, counts, and what each prompt did."""
    out = [
        "| trait | block | r | 95 % interval | random p95 | r within | 95 % interval | random p95 | r between | "
        "Spearman of grade and score | of grade and reading | lexicon: r | within | between | answers with a word | "
        "repetition |",
        "| --- " * 16 + "|",
    ]
    found = [(r, *(np.array(r[key], np.float64) for key in ("readings", "scores", "lexicon"))) for r in results]
    reached, above, above_within = [], [], []
    for r, x, y, words in found:
        grade = np.arange(len(x))
        overall, inside = pearson(x.ravel(), y.ravel()), within(x, y)
        low, high = interval(lambda a, b: pearson(a.ravel(), b.ravel()), x, y)
        low_in, high_in = interval(within, x, y)
        limits = [random_p95(r, key) for key in ("overall", "within")]
        cells = [
            r["trait"],
            f"{r['layer']}",
            *(f"{overall:+.2f}", f"{low:+.2f} … {high:+.2f}", f"{limits[0]:.2f}"),
            *(f"{inside:+.2f}", f"{low_in:+.2f} … {high_in:+.2f}", f"{limits[1]:.2f}"),
            f"{between(x, y):+.2f}",
            *(f"{spearman(grade, prompt_means(v, np.isfinite(v))):+.2f}" for v in (y, x)),
            *(_or_none(f) for f in (pearson(x.ravel(), words.ravel()), within(x, words), between(x, words))),
            f"{words.mean():.0%}",
            f"{np.mean([repetition(t) for row in r['texts'] for t in row]):.2f}",
        ]
        out.append("| " + " | ".join(cells) + " |")
        for names, holds in (
            (reached, overall >= TARGET),
            (above, overall > limits[0]),
            (above_within, inside > limits[1]),
        ):
            if holds:
                names.append(r["trait"])
    n = len(results)
    out += ["", f"r of {TARGET} or more: {_count(reached, n)}. Above the random directions' 95th percentile: r in "
            f"{_count(above, n)}; r within in {_count(above_within, n)}."]  # fmt: skip
    unscored = sum(int((~np.isfinite(y)).sum()) for _, _, y, _ in found)
    out[-1] += f" {unscored} empty answers. {sum(r['seconds'] for r in results) / 60:.0f} minutes."
    n_prompts = max((len(x) for _, x, _, _ in found), default=0)
    out += ["", "| trait | mean of | " + " | ".join(f"prompt {k + 1}" for k in range(n_prompts)) + " |"]
    out += ["| --- " * (2 + n_prompts) + "|"]
    for r, x, y, _ in found:
        for what, values, digits in (("reading", x, 2), ("score", y, 0)):
            means = prompt_means(values, np.isfinite(values))
            out.append(f"| {r['trait']} | {what} | " + " | ".join(f"{m:.{digits}f}" for m in means) + " |")
    return "\n".join(out)


def _or_none(figure: float) -> str:
    return f"{figure:+.2f}" if np.isfinite(figure) else "n/a"


def _count(names: Sequence[str], n: int) -> str:
    return f"{len(names)} of {n}" + (f" ({', '.join(names)})" if names else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file, or demo")
    parser.add_argument("vectors", nargs="+", metavar="VECTOR.gguf")
    parser.add_argument("--questions", type=int, default=10, help="held out, of each trait")
    parser.add_argument("--work", type=Path, default=Path("graded-prompts-work"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if not options.table:
        vectors = [ps.PersonaVector.load(v) for v in options.vectors]
        prompts = graded()
        without = ", ".join(name for v in vectors if (name := trait_of(v).name) not in prompts)
        if without:
            parser.error(f"graded_prompts.toml has no prompts for: {without}")
        if options.questions < 2:
            parser.error("--questions must be at least 2")
        with ps.Model(model_path(options.model), n_ctx=1024, n_threads=options.threads) as model:
            settings = {"questions": options.questions, "tokens": TOKENS, "random": N_RANDOM}
            for v, (threshold, folder) in zip(vectors, thresholds(model, vectors, options.work, settings), strict=True):
                own = prompts[trait_of(v).name]
                folder.get("answers", lambda: measure(model, v, threshold, own, options.questions))  # noqa: B023 (at once)
    print(tables([units["answers"] for units in load(options.work).values() if "answers" in units]))


if __name__ == "__main__":
    main()
