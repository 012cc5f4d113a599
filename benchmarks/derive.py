"""How fast is a contrast of plain texts, against llama.cpp's cvector-generator and repeng on the same texts?

    python benchmarks/derive.py [--cvector-generator PATH] [--repeng] [--rounds 3]

200 pairs in the manner of repeng: personas that contradict each other, in one template, with beginnings of answers cut
off at growing lengths. Ours (last token, difference of means) computes what the texts share once; cvector-generator
(`--method mean` and `pca`, all tokens) and repeng (PCA of the last tokens, torch in float32 with the file's weights
dequantized) compute every text. Interleaved; loading apart. A peer that is not there is left out.

Checked in the same run: the directions of texts computed one by one, and what the peers found. repeng's PCA is made of
our rows, too. cvector-generator takes all tokens of both texts, padded to one length, so its directions are others; it
numbers them one block late.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import other_tools
import results

N_PAIRS = 200
TEMPLATE = "Question: {question}\n\nInstruction: Answer like {persona}, whatever you are asked.\n\nAnswer: {answer}"
PERSONAS = (
    ("an extremely happy person who loves every day", "an extremely sad person who dreads every day"),
    ("a cheerful optimist who sees good in everything", "a gloomy pessimist who sees bad in everything"),
    ("somebody delighted who has just won a prize", "somebody miserable who has just lost a friend"),
    ("a bright, grateful and hopeful young soul", "a bitter, resentful and hopeless old soul"),
)
QUESTIONS = ("What did you do this morning?", "Tell me honestly: what do you think of the new neighbours?")
ANSWERS = (
    "I got up early, opened the window and looked at the street, where people were already",
    "Well, to be honest with you, the first thing that comes to my mind is that we should",
    "That reminds me of the summer when my brother and I walked along the river until",
    "My answer may surprise you, because most people who know me well would say that",
    "Let me begin with the weather, since it has a lot to do with how",
)
LENGTHS = 10  # beginnings of each answer: its last words left out one by one


def make_pairs() -> list[tuple[str, str]]:
    out = []
    for both in PERSONAS:
        for i, answer in enumerate(ANSWERS):
            words = answer.split()
            for n in range(len(words) - LENGTHS + 1, len(words) + 1):
                fill = {"question": QUESTIONS[i % len(QUESTIONS)], "answer": " ".join(words[:n])}
                positive, negative = (TEMPLATE.format(persona=p, **fill) for p in both)
                out.append((positive, negative))
    assert len(out) == N_PAIRS
    return out


# -- ours


class Watched:
    """A session that counts its decodes and the seconds in them."""

    def __init__(self, session: Any) -> None:
        self._session, self.n_decodes, self.seconds = session, 0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def step(self, decide: Callable[..., Any]) -> Any:
        start = time.perf_counter()
        events = self._session.step(decide)
        self.seconds += time.perf_counter() - start
        self.n_decodes += 1
        return events


def breakdown(contrast: Callable[[], Any], model: Any, texts: Sequence[str]) -> tuple[dict[str, float], str]:
    """Where the seconds of one contrast go, and how many tokens were computed."""
    from personasteer import engine

    counted: dict[str, Any] = {}
    run = engine.run

    def watched(session: Any, *args: Any, **options: Any) -> Any:
        counted["session"] = Watched(session)
        start = time.perf_counter()
        results = run(counted["session"], *args, **options)
        counted["run"] = time.perf_counter() - start
        counted["tokens"] = sum(r["n_prompt"] - r["n_reused"] for r in results)
        return results

    engine.run = watched
    try:
        start = time.perf_counter()
        tokens = [model.tokenize(t) for t in texts]
        tokenized = time.perf_counter() - start
        start = time.perf_counter()
        contrast()
        total = time.perf_counter() - start
    finally:
        engine.run = run
    decodes = counted["session"]
    parts = {
        "decodes": decodes.seconds,
        "the rest of the run": counted["run"] - decodes.seconds,
        "tokenizing": tokenized,
        "sorting, a context, the statistics": total - counted["run"] - tokenized,
    }
    given = sum(map(len, tokens))
    distinct = len({tuple(t[: i + 1]) for t in tokens for i in range(len(t))})
    return parts, (
        f"{counted['tokens']} tokens computed in {decodes.n_decodes} decodes, of {given} in the texts "
        f"({given / len(texts):.0f} a text), {distinct} of them distinct with what is before them"
    )


# -- the comparison


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.asarray((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))


def first_components(rows: np.ndarray, n: int) -> np.ndarray:
    """(n_layer, n_embd) first principal component of the pairs' differences, as repeng finds it."""
    differences = (rows[:n] - rows[n:]).astype(np.float64)
    differences -= differences.mean(0)
    return np.stack([np.linalg.svd(differences[:, il], full_matrices=False)[2][0] for il in range(rows.shape[1])])


def spread(values: np.ndarray) -> str:
    return f"{values.min():.5f} at block {int(values.argmin())}, median {np.median(values):.5f}"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each tool, and what their directions have in common."""
    import personasteer as ps
    from personasteer.model import demo_model_path

    path = args.model or str(demo_model_path())
    pairs = make_pairs()
    positive, negative = [p for p, _ in pairs], [n for _, n in pairs]
    texts = positive + negative
    start = time.perf_counter()
    model = ps.Model(path, n_ctx=256, n_threads=args.threads)
    load = time.perf_counter() - start
    start = time.perf_counter()
    _ = model.norms  # once per model file, then cached
    norms = time.perf_counter() - start
    ps.contrast(model, positive[:2], negative[:2])

    seconds: dict[str, list[tuple[float, float]]] = {}
    directions: dict[str, dict[int, np.ndarray]] = {}
    vector = None
    repeng_tokens = None
    for _ in range(args.rounds):
        start = time.perf_counter()
        vector = ps.contrast(model, positive, negative)
        seconds.setdefault("personasteer", []).append((load, time.perf_counter() - start))
        if args.cvector_generator:
            for method in ("mean", "pca"):
                *times, directions[method] = other_tools.cvector_generator(
                    args.cvector_generator, path, pairs, method, model.n_threads
                )
                seconds.setdefault(f"cvector-generator, {method}", []).append((times[0], times[1]))
        if args.repeng:
            found = other_tools.repeng(path, pairs, model.n_threads)
            seconds.setdefault("repeng, PCA", []).append((found["load"], found["seconds"]))
            directions["repeng"] = found["directions"]
            repeng_tokens = found["tokens"]
    assert vector is not None

    rows = model.capture(texts, pool="last", share_prefix=True)
    start = time.perf_counter()
    apart = np.concatenate([model.capture([t], pool="last") for t in texts])
    seconds["personasteer, one text after the other"] = [(load, time.perf_counter() - start)]
    expected = apart[:N_PAIRS].mean(0, dtype=np.float64) - apart[N_PAIRS:].mean(0, dtype=np.float64)

    parts, tokens = breakdown(lambda: ps.contrast(model, positive, negative), model, texts)
    notes = [
        f"{tokens}. Ours: " + ", ".join(f"{name} {s:.2f} s" for name, s in parts.items()) + ".",
        f"The everyday norms took {norms:.2f} s (once per model file, then cached).",
        f"Cosines with the directions of texts computed one by one: {spread(cosines(vector.directions, expected))}.",
    ]
    if "repeng" in directions:
        mine = first_components(rows, N_PAIRS)
        blocks = sorted(directions["repeng"])
        same = [model.tokenize(t) for pair in pairs for t in pair] == repeng_tokens
        likeness = np.abs([cosines(mine[il], directions["repeng"][il]) for il in blocks])
        means = [cosines(vector.directions[il], directions["repeng"][il]) for il in blocks]
        notes.append(
            f"repeng read {'the same' if same else 'OTHER'} tokens. |cosine| of its directions with the PCA of ours, "
            f"{len(blocks)} blocks: min {likeness.min():.4f}, median {np.median(likeness):.4f}; with our difference of "
            f"means: median {np.median(means):.2f} (another statistic)."
        )
    for method in ("mean", "pca"):
        if method in directions:
            likeness = np.array([cosines(vector.directions[il], d) for il, d in directions[method].items()])
            notes.append(
                f"Cosine of cvector-generator's {method} with ours: median {np.median(likeness):.2f} (all tokens, not "
                "the last)."
            )
    content = {
        "model": f"{model.name} ({model.description})",
        "pairs": N_PAIRS,
        "rounds": args.rounds,
        "threads": model.n_threads,
        "rows": [{"what": name, "seconds": times} for name, times in seconds.items()],
        "notes": notes,
    }
    model.close()
    return content


def table(content: dict[str, Any]) -> str:
    """Markdown, and what was checked."""
    lines = ["| what | loading, s | computing, s (median, min … max) | times ours |", "| --- | ---: | ---: | ---: |"]
    ours = float(np.median([s for _, s in content["rows"][0]["seconds"]]))
    for row in content["rows"]:
        loads, values = np.array(row["seconds"]).T
        middle = float(np.median(values))
        span = f"{middle:.2f}" + (f", {values.min():.2f} … {values.max():.2f}" if len(values) > 1 else "")
        lines.append(f"| {row['what']} | {np.median(loads):.2f} | {span} | {middle / ours:.1f} |")
    return "\n".join([*lines, "", *content["notes"]])


def describe(content: dict[str, Any]) -> str:
    """What the table is of."""
    return (
        f"{content['model']}, {content['pairs']} pairs, {content['rounds']} rounds, {content['threads']} threads. "
        f"{content['machine']}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file; the demo model without")
    parser.add_argument("--cvector-generator", metavar="PATH", help="llama.cpp's llama-cvector-generator")
    parser.add_argument("--repeng", action="store_true", help="needs repeng, torch and transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of all; the physical cores without")
    results.options(parser)
    args = parser.parse_args(arguments)
    content = results.measured_or_saved(args, measure, peers=True)
    print(f"{describe(content)}\n\n{table(content)}")


if __name__ == "__main__":
    main()
