"""Difference of means, PCA, logistic probe, last prompt token: what each direction does at equal KL.

    python benchmarks/methods.py [MODEL.gguf] [--work DIR] [--traits A,B] [--questions 6] [--table]

The model answers a trait's questions once, and every method makes its direction of the same answers. All steer the
blocks that the sweep chooses for the difference of means, each as strongly as it takes for the same divergence from the
unsteered model on everyday answers, in either sign. Measured are the log-odds of held-out continuations, and free
answers: read by the unsteered model under the trait's system prompts and their opposites (LogOddsJudge, 0 to 100), and
searched for words of the trait's lexicon. Each trait's result is one JSON file in the work folder, so that the command
can be stopped and started again. --table prints the Markdown tables of what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from work_folder import claim

import personasteer as ps
from personasteer import traits
from personasteer.derive import Elicited, Selection, elicit, from_elicited, select
from personasteer.derive.calibration import selection_cells, sweep
from personasteer.derive.judge import LogOddsJudge
from personasteer.evaluate import bootstrap_interval, cell_log_odds, kl_on_neutral, make_cells, measure_coherence
from personasteer.evaluate.generations import in_lexicon
from personasteer.evaluate.log_odds import answer_cells
from personasteer.files import atomic_write
from personasteer.traits import Trait

TRAITS = ("pessimistic", "pirate", "formal", "evil", "warm", "poetic", "persona_vectors_layout.json")
METHODS = {  # the first is what the others are compared with
    "difference of means": {"method": "mean", "position": "response"},
    "PCA": {"method": "pca", "position": "response"},
    "probe": {"method": "probe", "position": "response"},
    "last prompt token": {"method": "mean", "position": "last-prompt"},
}
REFERENCE = next(iter(METHODS))
SIGNS = {"minus": -1.0, "plus": 1.0}
N_DERIVE, ANSWER_TOKENS = 6, 24  # questions under each system prompt, length of their answers
N_QUESTIONS, N_PAIRS = 6, 2  # held out
NEUTRAL = {"n_pairs": 6, "n_tokens": 12}  # everyday answers, tokens of each
TARGET_KL, TOLERANCE = 0.1, 0.1
MOST_RHO, LEAST_KL, MOST_CORRECTIONS = 2.0, 1e-6, 4


def equal_kl(
    measure: Callable[[Sequence[int], np.ndarray], np.ndarray], n: int, *, target: float = TARGET_KL, start: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """Doses at which n steerings have the same KL, and the KL that each has: within TOLERANCE after few measurements.

    The KL of a small edit grows with the square of the dose, which gives the second dose; from then on the exponent is
    that of the last two measurements (a secant in logarithms).

    Args:
        measure: called with (which of the n, their doses); their KLs.
    """
    rho, exponent = np.full(n, start), np.full(n, 2.0)
    kl = np.maximum(measure(np.arange(n), rho), LEAST_KL)
    for _ in range(MOST_CORRECTIONS):
        left = np.flatnonzero(np.abs(kl / target - 1) > TOLERANCE)
        if not len(left):
            break
        rho_before, kl_before = rho[left], kl[left]
        rho[left] = np.minimum(rho_before * (target / kl_before) ** (1 / exponent[left]), MOST_RHO)
        kl[left] = np.maximum(measure(left, rho[left]), LEAST_KL)
        step = np.log(rho[left] / rho_before)
        moved = np.abs(step) > 1e-3
        exponent[left[moved]] = np.clip(np.log(kl[left] / kl_before)[moved] / step[moved], 1.0, 4.0)
    return rho, kl


Made = Iterator[tuple[str, ps.PersonaVector]]


def by_method(model: ps.Model, trait: Trait, found: Elicited, selection: Selection, layers: tuple[int, ...]) -> Made:
    """A vector of the same answers for each of METHODS."""
    for name, options in METHODS.items():
        yield name, from_elicited(model, trait, found, selection, layers=layers, **options)


def compare(
    model: ps.Model, trait: Trait, n_questions: int = N_DERIVE, make: Callable[..., Made] = by_method
) -> dict[str, Any]:
    """Vectors for one trait at equal KL; what is reported of it.

    make: yields (name, vector) from what `by_method` takes; the others are compared with the first.
    """
    result: dict[str, Any] = {"trait": trait.name, "model": model.name, "target_kl": TARGET_KL}
    found = elicit(model, trait, n_questions=n_questions, max_tokens=ANSWER_TOKENS, seed=0)
    selection = select(found, trait)
    result["elicitation"] = selection.summary()
    systems = trait.system[0] if model.takes_system else None
    try:
        first, table = sweep(
            model,
            from_elicited(model, trait, found, selection),
            selection_cells(model, trait, found, selection.kept)[::2],
            systems=systems,
        )
        vectors = dict(make(model, trait, found, selection, first.layers))
    except ps.ElicitationError as e:
        return result | {"rejected": str(e)}
    result |= {"layers": list(first.layers), "sweep": table}
    reference = next(iter(vectors.values()))

    arms = [(name, sign) for name in vectors for sign in SIGNS]

    def steered(k: int, rho: float) -> Any:
        name, sign = arms[k]
        return replace(vectors[name] * (SIGNS[sign] * rho), scope="response")

    def kl(at: Sequence[int], doses: np.ndarray) -> np.ndarray:
        return kl_on_neutral(model, [steered(k, float(rho)) for k, rho in zip(at, doses, strict=True)], **NEUTRAL)

    doses, reached = equal_kl(kl, len(arms))
    steers = [steered(k, float(rho)) for k, rho in enumerate(doses)]
    questions = trait.evaluate_questions[:N_QUESTIONS]
    if trait.continuations:
        cells = make_cells(questions, trait.evaluation_pairs, N_PAIRS)
    else:
        cells = answer_cells(model, trait, questions)
    if not cells:
        return result | {"rejected": "the trait's prompts change no answer: nothing to measure an effect with"}
    n = len(dict.fromkeys(c.question for c in cells))
    odds = cell_log_odds(model, cells, [None, *steers]).reshape(1 + len(steers), n, -1).mean(2)
    given = [[systems[0 if sign == "plus" else 1]] for _, sign in arms] if systems else ()
    sound = measure_coherence(model, questions, steers, systems=given)
    judged = None
    if systems:
        read = LogOddsJudge(model).score(trait, [pair for s in sound for pair in zip(questions, s.texts, strict=True)])
        judged = read.reshape(len(arms), -1)
    result["methods"] = {}
    chosen = list(first.layers)
    for name, vector in vectors.items():
        row: dict[str, Any] = {"cosine": float(np.mean(vector.cosine(reference)[chosen]))}
        for figure, values in (("auroc", vector.aurocs), ("split_half", vector.reliability)):
            if values is not None:
                row[figure] = float(np.mean(values[chosen]))
        for sign in SIGNS:
            k = arms.index((name, sign))
            change = odds[1 + k] - odds[0]
            row[sign] = {
                "rho": float(doses[k]),
                "kl": float(reached[k]),
                "delta": float(change.mean()),
                "interval": bootstrap_interval(change),
                "by_question": change.tolist(),
                "coherence": sound[k].coherence,
                "lexicon": float(np.mean([in_lexicon(text, trait) for text in sound[k].texts])),
            }
            if judged is not None:
                known = judged[k][np.isfinite(judged[k])]
                row[sign]["judged"] = float(known.mean()) if len(known) else None
        result["methods"][name] = row
    return result


def settings(model: ps.Model, n_questions: int) -> dict[str, Any]:
    """What results must share to stand in one table."""
    return {
        "fingerprint": model.fingerprint,
        "threads": model.n_threads,
        "derive": [n_questions, ANSWER_TOKENS],
        "held_out": [N_QUESTIONS, N_PAIRS],
        "neutral": NEUTRAL,
        "target_kl": TARGET_KL,
    }


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each trait and method, then each method's means and its difference from the first."""
    out = [
        "| trait | method | blocks | cosine | AUROC | split-half | ρ - / + | KL at - / + | Δ at - | Δ at + | effect | "
        "coherence - / + | judged - / + | lexicon - / + |",
        "| --- " * 14 + "|",
    ]
    for r in results:
        if "rejected" in r:
            out.append(f"| {r['trait']} |" + " |" * 12 + f" rejected: {r['rejected'].split('. Seen:')[0]} |")
            continue
        for name, row in r["methods"].items():
            low, high = row["minus"], row["plus"]
            cells = [
                r["trait"],
                name,
                f"{r['layers'][0]}-{r['layers'][-1]}",
                *(f"{row[key]:.3f}" for key in ("cosine", "auroc", "split_half")),
                f"{low['rho']:.2f} / {high['rho']:.2f}",
                *(" / ".join(_kl(end["kl"], r["target_kl"]) for end in (low, high)),),
                *(_with_interval(end) for end in (low, high)),
                f"{effect(row).mean():.2f}",
                f"{low['coherence']:.2f} / {high['coherence']:.2f}",
                " / ".join("" if end.get("judged") is None else f"{end['judged']:.0f}" for end in (low, high)),
                f"{low['lexicon']:.2f} / {high['lexicon']:.2f}",
            ]
            out.append("| " + " | ".join(cells) + " |")
    measured = [r for r in results if "methods" in r]
    target = measured[0]["target_kl"] if measured else TARGET_KL
    out += [
        "",
        f"Over {len(measured)} traits, at a KL of {target:g} nats per token on everyday answers. The effect is half of "
        "Δ at + less Δ at -, in nats per token. Contrasts read, of those asked for: "
        + ", ".join(f"{r['elicitation']['kept']} of {r['elicitation']['n']} ({r['trait']})" for r in results)
        + ".",
        "",
        f"| method | effect, mean | less that of {REFERENCE} | 95 % interval | largest effect | cosine | AUROC | "
        "split-half | coherence, lower end | judged, + less - | lexicon, + less - |",
        "| --- " * 11 + "|",
    ]
    for name in METHODS if measured else ():
        rows = [r["methods"][name] for r in measured]
        mean, low, high = difference(rows, [r["methods"][REFERENCE] for r in measured])
        wins = sum(max(r["methods"], key=lambda m: float(effect(r["methods"][m]).mean())) == name for r in measured)
        out.append(
            f"| {name} | {np.mean([effect(row).mean() for row in rows]):.3f} | {mean:+.3f} | {low:+.3f} … {high:+.3f} "
            f"| {wins} of {len(measured)} | "
            + " | ".join(f"{np.mean([row[key] for row in rows]):.3f}" for key in ("cosine", "auroc", "split_half"))
            + f" | {np.mean([min(row[sign]['coherence'] for sign in SIGNS) for row in rows]):.2f}"
            + f" | {apart(rows, 'judged'):+.0f} | {apart(rows, 'lexicon'):+.2f} |"
        )
    off = [
        f"{r['trait']}, {name}"
        for r in measured
        for name, row in r["methods"].items()
        if any(abs(row[sign]["kl"] / r["target_kl"] - 1) > TOLERANCE for sign in SIGNS)
    ]
    out += [
        "",
        f"KL not within {TOLERANCE:.0%} of the target (marked *): {'; '.join(off) or 'none'}. Cosines are with the "
        f"{REFERENCE}; AUROC and split-half cosine are of the pooled activations that each method reads, held out. "
        f"{sum(r['seconds'] for r in results) / 60:.0f} minutes.",
    ]
    return "\n".join(out)


def difference(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """Effect less that of another method, mean over traits, with a 95 % interval: questions are drawn for each trait,
    the same for both methods.
    """
    rng = np.random.default_rng(0)
    changes = [effect(row) - effect(other) for row, other in zip(rows, others, strict=True)]
    draws = [c[rng.integers(0, len(c), (2000, len(c)))].mean(1) for c in changes]
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    return float(np.mean([c.mean() for c in changes])), float(low), float(high)


def effect(row: dict[str, Any]) -> np.ndarray:
    """By question."""
    return (np.array(row["plus"]["by_question"]) - np.array(row["minus"]["by_question"])) / 2


def apart(rows: Sequence[dict[str, Any]], figure: str) -> float:
    """Mean difference of a figure of free answers between the two signs."""
    known = [(row["minus"].get(figure), row["plus"].get(figure)) for row in rows]
    return float(np.mean([b - a for a, b in known if a is not None and b is not None] or [np.nan]))


def _kl(kl: float, target: float) -> str:
    return f"{kl:.3f}" + ("*" if abs(kl / target - 1) > TOLERANCE else "")


def _with_interval(end: dict[str, Any]) -> str:
    low, high = end["interval"]
    return f"{end['delta']:+.2f} ({low:+.2f} … {high:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="a GGUF file; the demo model without")
    parser.add_argument("--work", type=Path, default=Path("methods-work"))
    parser.add_argument("--traits", default=",".join(TRAITS), help="names, or paths of .toml or .json files")
    parser.add_argument("--questions", type=int, default=N_DERIVE, help="asked under each system prompt")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = [traits.find(_beside(name)) for name in options.traits.split(",")]
    files = {trait.name: options.work / f"{trait.name}.json" for trait in wanted}
    missing = [trait for trait in wanted if not files[trait.name].exists()]
    if missing and not options.table:
        path = ps.model.demo_model_path() if options.model == "demo" else options.model
        with ps.Model(path, n_ctx=512, n_threads=options.threads) as model:
            claim(options.work, settings(model, options.questions))
            for k, trait in enumerate(missing):
                print(f"{trait.name} ({k + 1} of {len(missing)})", file=sys.stderr, flush=True)
                start = time.perf_counter()
                result = compare(model, trait, options.questions) | {"seconds": time.perf_counter() - start}
                atomic_write(files[trait.name], json.dumps(result, indent=1, ensure_ascii=False).encode())
    print(tables([json.loads(file.read_text("utf-8")) for file in files.values() if file.exists()]))


def _beside(name: str) -> str:
    """The file of that name beside this one, where there is one."""
    here = Path(__file__).with_name(name)
    return str(here) if here.exists() and not Path(name).exists() else name


if __name__ == "__main__":
    main()
