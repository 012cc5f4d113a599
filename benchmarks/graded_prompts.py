"""Does the reading before an answer predict how strongly the answer will show the trait?

    python benchmarks/graded_prompts.py MODEL VECTOR.gguf.. [--questions 8] [--answers 2] [--work DIR] [--threads N]
                                        [--table]

Each trait's held-out questions are asked under eight system prompts, from one that forbids it to one that asks for
nothing else (graded_prompts.toml). The model gives --answers answers (temperature 0.7), and each alone, without that
system prompt, is scored, not with the vector: y is the mean of their scores by LogOddsJudge (the same model's log-odds
of an answer under opposite system prompts), and besides the share of them with a word of the trait's lexicon. Answers
that decline have no score. Read, before any answer: the projection x at the last prompt token, at the block and along
the direction of the monitor's threshold, which is calibrated and kept as `personasteer monitor` does.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from work_folder import Folder, claim

import personasteer as ps
from personasteer import monitor, statistics
from personasteer.cli._common import model_path
from personasteer.derive.judge import LogOddsJudge
from personasteer.derive.refusals import refuses
from personasteer.engine import Request, Sampling
from personasteer.evaluate import trait_of
from personasteer.evaluate.coherence import repetition
from personasteer.evaluate.generations import in_lexicon
from personasteer.monitor import Threshold
from personasteer.monitor.thresholds import last_states

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
    return statistics.pearson(x[known], y[known]) if known.sum() >= 3 else float("nan")


def prompt_means(x: Numbers, known: NDArray[np.bool_]) -> Numbers:
    """(n,) means of the rows of (n, m) over what is known; NaN where nothing is."""
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


def answer(model: ps.Model, trait: ps.Trait, prompts: Sequence[str], sizes: tuple[int, int]) -> dict[str, Any]:
    """Texts [prompt][question][answer], and their mean scores [prompt][question].

    sizes: questions, and answers to each.
    """
    n_questions, n_answers = sizes
    questions = trait.evaluate_questions[:n_questions]
    shape = len(prompts), len(questions)
    given = [model.measured_prompt(q, system) for system in prompts for q in questions]
    requests = [
        Request(p, len(p), max_tokens=TOKENS, sampling=Sampling(0.7, seed=k), share_prefix=True)
        for p in given for k in range(n_answers)
    ]  # fmt: skip
    results = model.run_alone(requests)
    texts = np.array([r["text"].decode("utf-8", "replace") for r in results], object).reshape(*shape, n_answers)
    each = judge(LogOddsJudge(model), trait, questions, texts.swapaxes(1, 2)).swapaxes(1, 2).reshape(-1, n_answers)
    declined = np.array([refuses(text) for text in texts.ravel()]).reshape(each.shape)
    each[declined] = np.nan  # a prompt that makes refusing likely would score it as the trait
    return {
        "trait": trait.name,
        "model": model.name,
        "prompts": list(prompts),
        "questions": list(questions),
        "scores": prompt_means(each, np.isfinite(each)).reshape(shape).tolist(),
        "declined": declined.reshape(*shape, n_answers).tolist(),
        "lexicon": [[float(np.mean([in_lexicon(t, trait) for t in of_one])) for of_one in row] for row in texts],
        "texts": texts.tolist(),
    }


def read(model: ps.Model, threshold: Threshold, answered: Mapping[str, Any]) -> dict[str, Any]:
    """Readings [prompt][question] before the answers, and the Pearson figures of random directions."""
    scores = np.array(answered["scores"], np.float64)
    asked = [(q, system) for system in answered["prompts"] for q in answered["questions"]]
    states = last_states(model, asked)[:, threshold.layer].astype(np.float64)
    random = np.random.default_rng(0).standard_normal((N_RANDOM, model.n_embd))
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    others = [row.reshape(scores.shape) for row in random @ states.T]
    return {
        "layer": threshold.layer,
        "readings": (states @ threshold.direction).reshape(scores.shape).tolist(),
        "random": {
            "overall": [pearson(x.ravel(), scores.ravel()) for x in others],
            "within": [within(x, scores) for x in others],
        },
    }


def judge(by: LogOddsJudge, trait: ps.Trait, questions: Sequence[str], texts: NDArray[np.object_]) -> Numbers:
    """Scores of texts (.., questions): those of one question after the other, which share its prompt."""
    pairs = [(q, text) for q, column in zip(questions, texts.T, strict=True) for text in column.ravel()]
    return by.score(trait, pairs).reshape(texts.T.shape).T


def folders_of(
    model: ps.Model, vectors: Sequence[ps.PersonaVector], work: Path, settings: Mapping[str, Any]
) -> list[Folder]:
    """The folder of each vector's trait, all of the same settings."""
    names = [trait_of(v).name for v in vectors]
    if len(set(names)) < len(names):
        sys.exit(f"two vectors of one trait ({', '.join(names)}): give each a work folder of its own")
    work.mkdir(parents=True, exist_ok=True)
    claim(work, {"fingerprint": model.fingerprint, "threads": model.n_threads, **settings})
    return [Folder(work / name, {"vector": digest(v)}) for name, v in zip(names, vectors, strict=True)]


def digest(vector: ps.PersonaVector) -> str:
    """Of what is read, and of the texts that it is tried on."""
    directions = b"" if vector.last_prompt is None else vector.last_prompt.tobytes()
    texts = json.dumps(trait_of(vector).as_dict(), sort_keys=True).encode()
    return hashlib.sha256(directions + texts).hexdigest()


def load(work: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """{trait: {unit: result}} of what is in a work folder."""
    return {folder.name: Folder(folder).load() for folder in sorted(work.iterdir()) if folder.is_dir()}


def finished(work: Path) -> Iterator[dict[str, Any]]:
    """Traits with answers and readings."""
    for units in load(work).values():
        if "readings" in units:
            parts = units["answers"], units["readings"]
            yield {**parts[0], **parts[1], "seconds": sum(p["seconds"] for p in parts)}


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
            *(f"{statistics.spearman(grade, prompt_means(v, np.isfinite(v))):+.2f}" for v in (y, x)),
            *(_or_none(f) for f in (pearson(x.ravel(), words.ravel()), within(x, words), between(x, words))),
            f"{words.mean():.0%}",
            f"{np.mean([repetition(t) for t in np.ravel(r['texts'])]):.2f}",
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
    refused = np.mean([x for r in results for x in np.ravel(r["declined"])]) if results else 0.0
    out[-1] += f" {refused:.1%} of the answers decline; {unscored} questions have no other."
    out[-1] += f" {sum(r['seconds'] for r in results) / 60:.0f} minutes."
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
    parser.add_argument("--questions", type=int, default=8, help="held out, of each trait")
    parser.add_argument("--answers", type=int, default=2, help="to each question under each prompt")
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
        if options.questions < 2 or options.answers < 1:
            parser.error("--questions must be at least 2, --answers at least 1")
        with ps.Model(model_path(options.model), n_ctx=1024, n_threads=options.threads) as model:
            sizes = options.questions, options.answers
            settings = {"questions": sizes[0], "answers": sizes[1], "tokens": TOKENS, "random": N_RANDOM}
            folders = folders_of(model, vectors, options.work, settings)
            for v, folder in zip(vectors, folders, strict=True):
                trait = trait_of(v)
                folder.get("answers", lambda: answer(model, trait, prompts[trait.name], sizes))  # noqa: B023 (at once)
            for threshold, folder in zip(monitor.thresholds_for(model, vectors), folders, strict=True):
                answered = folder.load()["answers"]
                folder.get("readings", lambda: read(model, threshold, answered))  # noqa: B023
    print(tables(list(finished(options.work))))


if __name__ == "__main__":
    main()
