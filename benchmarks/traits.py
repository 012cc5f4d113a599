"""Which of the library's traits can be derived on a model, and what their vectors do beside controls.

    python benchmarks/traits.py [MODEL.gguf] [--work DIR] [--traits A,B] [--questions 10] [--held-out 12] [--table]

Each trait is derived and evaluated; what the tool rejects is derived once more from the trait's continuation pairs. A
trait's result is one JSON file in the work folder, so that the command can be stopped and started again. --table prints
the Markdown tables of what is there. --judge MODEL.gguf has the free answers that are there read by another model
(log-odds under the trait's prompts), once.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from work_folder import claim

import personasteer as ps
from personasteer import traits
from personasteer.derive.judge import LogOddsJudge
from personasteer.evaluate import bootstrap_interval, evaluate
from personasteer.evaluate.generations import lexicon_rates
from personasteer.files import atomic_write

DERIVE = {"n_questions": 10, "max_tokens": 24}
EVALUATE = {"n_questions": 12, "n_pairs": 1, "n_random": 20, "n_coherence": 3, "n_items": 12}
READ_FREELY = ("evil", "formal", "pessimistic", "pirate", "poetic", "refusing", "warm")
N_ANSWERS = 10  # free answers at each of three strengths, for these


def one(
    model: ps.Model, name: str, file: Path, n_questions: int, n_held_out: int, *, continuations: bool
) -> dict[str, Any]:
    """Derive a trait, by answers or continuation pairs, and evaluate it; what is reported of it."""
    how = DERIVE | {"n_questions": n_questions}  # the length of answers is not read with continuations
    result: dict[str, Any] = {"trait": name, "model": model.name}
    start = time.perf_counter()
    try:
        vector = ps.derive(
            model, name, seed=0, continuations=continuations, work=file.parent / "parts" / file.stem, **how
        )
    except (ps.ElicitationError, ps.TemplateError) as e:
        return result | {"rejected": str(e), "seconds": time.perf_counter() - start}
    vector.save(file.with_suffix(".gguf"))
    derived = time.perf_counter() - start
    sizes = EVALUATE | {"n_questions": n_held_out}
    found = evaluate(model, [vector], seed=0, **sizes)[0]
    return result | {
        "elicitation": vector.provenance["elicitation"],
        "window": list(vector.window),
        "sweep": vector.provenance["calibration"]["sweep"],
        "evaluation": found.summary(),
        "seconds_derive": derived,
        "seconds": time.perf_counter() - start,
    }


def answer_freely(model: ps.Model, result: dict[str, Any], file: Path) -> dict[str, Any]:
    """The result with answers to held-out questions at -rho, 0 and +rho."""
    vector, found = ps.PersonaVector.load(file.with_suffix(".gguf")), result["evaluation"]
    strengths = (-found["strength"], 0.0, found["strength"])
    answers = asdict(lexicon_rates(model, traits.find(result["trait"]), vector, strengths, N_ANSWERS))
    return result | {"evaluation": found | {"generations": answers}}


def settings(model: ps.Model, n_questions: int, n_held_out: int) -> dict[str, Any]:
    """What results must share to stand in one table."""
    return {
        "fingerprint": model.fingerprint,
        "threads": model.n_threads,
        "derive": DERIVE | {"n_questions": n_questions},
        "evaluate": EVALUATE | {"n_questions": n_held_out},
    }


def _row(r: dict[str, Any]) -> str:
    if "rejected" in r:
        return f"| {r['trait']} |" + " |" * 15 + f" rejected: {_why(r['rejected'])} |"
    e, c = r["evaluation"], r["evaluation"]["controls"]
    low, high = e["dose"][0], e["dose"][-1]
    failed = [word for word, held in e["verdict"].items() if not held]
    base = high["log_odds"] - high["delta"]
    shuffled = "" if c["shuffled"] is None else f"{c['shuffled']:.2f}"
    prompt = "" if c["system_prompt"] is None else f"{c['system_prompt']:+.2f}"
    known = e["capability"]
    elicited = f"{r['elicitation']['rate']:.2f}" if r["elicitation"]["t"] else ""  # continuations are not
    cells = [
        r["trait"], elicited, f"{e['layers'][0]}-{e['layers'][-1]}", f"{e['strength']:.2f}",
        f"{r['window'][0]:.2f} … {r['window'][1]:.2f}", f"{low['delta']:+.2f}", f"{high['delta']:+.2f}",
        f"{high['ci_low'] - base:.2f} … {high['ci_high'] - base:.2f}",
        f"{c['random_p95']:.2f}", shuffled, f"{c['unrelated']:+.2f}", prompt, f"{e['spearman']:.2f}",
        f"{low['coherence']:.2f} / {high['coherence']:.2f}", f"{e['kl_neutral']:.2f}",
        f"{known['base']:.2f} / {known['steered']:.2f}", "passes" if e["passes"] else "not " + ", ".join(failed),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each trait, then counts."""
    head = (
        "| trait | elicited | blocks | ρ | window | Δ at -ρ | Δ at +ρ | 95 % interval | random p95 | shuffled | "
        "unrelated | system prompt | Spearman | coherence -ρ / +ρ | KL at +ρ | known: base / +ρ | verdict |"
    )
    rows = [head, "| --- " * 17 + "|"]
    rows += [_row(r) for r in results]
    passing = [r["trait"] for r in results if "evaluation" in r and r["evaluation"]["passes"]]
    rejected = [r["trait"] for r in results if "rejected" in r]
    failing = [r["trait"] for r in results if "evaluation" in r and not r["evaluation"]["passes"]]
    matched = [f"{r['trait']} ({what})" for r in results if r["trait"] in passing and (what := _matched(r))]
    rows.append("")
    rows.append(
        f"{len(results)} traits: {len(passing)} pass, {len(failing)} do not ({', '.join(failing) or 'none'}), "
        f"{len(rejected)} are rejected when deriving ({', '.join(rejected) or 'none'}). Passing beside a control that "
        f"moves as far as +ρ: {', '.join(matched) or 'none'}. "
        f"{sum(r['seconds'] for r in results) / 60:.0f} minutes."
    )
    return "\n".join(rows)


def _matched(result: dict[str, Any]) -> str:
    """The controls that change the log-odds as much as the vector at +rho."""
    controls, own = result["evaluation"]["controls"], abs(result["evaluation"]["dose"][-1]["delta"])
    sizes = {"shuffled": controls["shuffled"] or 0.0, "unrelated": abs(controls["unrelated"])}
    return ", ".join(name for name, size in sizes.items() if size >= own)


def judge_answers(judge: LogOddsJudge, result: dict[str, Any]) -> dict[str, Any]:
    """The result with scores of its free answers, 0 to 100, by strength and question."""
    found = result["evaluation"]["generations"]
    pairs = [pair for texts in found["texts"] for pair in zip(found["questions"], texts, strict=True)]
    scores = judge.score(traits.find(result["trait"]), pairs).reshape(len(found["texts"]), -1)
    return result | {"judged": {"by": judge.name, "scores": scores.tolist()}}


def free_answers(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: the second scorers on free answers, each at -ρ, 0 and +ρ."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        valence = SentimentIntensityAnalyzer().polarity_scores
    except ImportError:
        valence = None
    rows = [
        "| trait | words of the lexicon | VADER valence | judge | judge, +ρ less -ρ |",
        "| --- " * 5 + "|",
    ]
    judges = set()
    for r in results:
        found = r.get("evaluation", {}).get("generations")
        if not found:
            continue
        tone = (
            [float(np.mean([valence(t)["compound"] for t in of_one])) for of_one in found["texts"]] if valence else []
        )
        cells = [
            r["trait"] + ("" if r["elicitation"]["t"] else " (continuations)"),
            " / ".join(f"{x:.2f}" for x in found["rates"]),
            " / ".join(f"{x:+.2f}" for x in tone),
            "",
            "",
        ]
        if "judged" in r:
            judges.add(r["judged"]["by"])
            scores = np.array(r["judged"]["scores"])
            cells[3] = " / ".join(f"{np.nanmean(of_one):.0f}" for of_one in scores)
            apart = scores[-1] - scores[0]
            apart = apart[np.isfinite(apart)]
            low, high = bootstrap_interval(apart)
            cells[4] = f"{apart.mean():+.0f} ({low:+.0f} … {high:+.0f})"
        rows.append("| " + " | ".join(cells) + " |")
    if judges:
        rows += ["", f"Judge: {', '.join(sorted(judges))}."]
    return "\n".join(rows)


def _path(model: str) -> str | Path:
    return ps.model.demo_model_path() if model == "demo" else model


def _why(message: str) -> str:
    if ". Seen:" in message:
        return message.split(". Seen:")[0].split("count ")[-1].strip("()")
    return re.split("[:;]", message)[0].split("' ")[-1]  # "vector 'evil' does not steer: ..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--work", type=Path, default=Path("traits-work"))
    parser.add_argument("--traits", default="")
    parser.add_argument("--questions", type=int, default=DERIVE["n_questions"], help="derived from, of each prompt")
    parser.add_argument("--held-out", type=int, default=EVALUATE["n_questions"], help="questions evaluated on")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--judge", default=None, help="a GGUF file that reads the free answers")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    wanted = options.traits.split(",") if options.traits else traits.names()
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.table and not options.judge:
        _measure(options, wanted)
    files = [_files(options.work, name) for name in wanted]
    own, again = ({f: _read(f) for f in column if f.exists()} for column in zip(*files, strict=True))
    again = {f: r for (first, f) in files if (r := again.get(f)) and "rejected" in own.get(first, {})}
    if options.judge:
        with ps.Model(_path(options.judge), n_ctx=512, n_threads=options.threads) as model:
            judge = LogOddsJudge(model)
            for of in (own, again):
                for file, r in of.items():
                    is_read = r.get("judged", {}).get("by") == judge.name
                    if r.get("evaluation", {}).get("generations") and not is_read:
                        of[file] = judge_answers(judge, r)
                        _write(file, of[file])
    print(table(list(own.values())))
    if again:
        print("\nThe rejected ones, derived from their continuation pairs:\n")
        print(table(list(again.values())))
    print("\nFree answers:\n")
    print(free_answers([*own.values(), *again.values()]))


def _measure(options: argparse.Namespace, wanted: Sequence[str]) -> None:
    """Write what is missing: every trait's result, then that of its continuations where it was rejected."""
    ways = (False, True)
    missing = [name for name in wanted if not all(_is_done(options.work, name, way) for way in ways)]
    if not missing:
        return
    with ps.Model(_path(options.model), n_ctx=512, n_threads=options.threads) as model:
        claim(options.work, settings(model, options.questions, options.held_out))
        for k, name in enumerate(missing):
            print(f"{name} ({k + 1} of {len(missing)})", file=sys.stderr, flush=True)
            for file, way in zip(_files(options.work, name), ways, strict=True):
                if not file.exists() and not _is_done(options.work, name, way):
                    _write(file, one(model, name, file, options.questions, options.held_out, continuations=way))
                if not _is_done(options.work, name, way):
                    _write(file, answer_freely(model, _read(file), file))


def _is_done(work: Path, name: str, continuations: bool) -> bool:
    """Whether a trait has been derived this way, by its continuations only if it was rejected, and read freely."""
    own, again = _files(work, name)
    if continuations and own.exists() and "rejected" not in _read(own):
        return True
    file = again if continuations else own
    if not file.exists():
        return False
    result = _read(file)
    is_read = continuations or name in READ_FREELY
    return "rejected" in result or not is_read or bool(result["evaluation"]["generations"])


def _files(work: Path, name: str) -> tuple[Path, Path]:
    return work / f"{name}.json", work / f"{name}-continuations.json"


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def _write(file: Path, result: dict[str, Any]) -> None:
    atomic_write(file, json.dumps(result, indent=1, ensure_ascii=False).encode())


if __name__ == "__main__":
    main()
