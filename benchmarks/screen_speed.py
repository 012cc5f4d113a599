"""How fast is screening, against plain prefill of llama.cpp, and against a hook script in transformers?

    python benchmarks/screen_speed.py prefill VECTOR.gguf [--model MODEL.gguf] [--pairs N]
    pip install torch==2.13.0 transformers
    python benchmarks/screen_speed.py hooks VECTOR.gguf [--model MODEL.gguf]

`prefill`: packs of the rows of trait_rows/base.jsonl (512 new tokens at most) as `personasteer screen` computes them in
mode fast, each right next to one decode of as many tokens by llama.cpp without the hook, logits of the last one alone.
The ratio is tokens per second of ours over llama.cpp's; the prefix that rows share counts in neither. Once with the
blocks up to the one that is read, as it is used, and once with all of them. The control: llama.cpp's decode twice.

`hooks`: the same 300 rows. Ours: `personasteer screen` as a process of its own, from reading the file to the written
results (without the sample that is answered; the 240 rows of the clean reference, which it scores too, are left out of
both by --clean with 40 rows of the set). The script: transformers in float32 on the dequantized weights, rows sorted by
length in batches of 8, a forward hook on the same block, the mean over the answer and the reading before it. Wall clock
and peak memory of each process; the scores of both are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from plain import PlainContext

import personasteer as ps
from personasteer.cli._common import model_path
from personasteer.evaluate.overhead import ratio
from personasteer.screen.journal import Packed
from personasteer.screen.packs import best_fit
from personasteer.screen.score import Scorer, axis_of
from personasteer.screen.texts import Texts, packed

ROWS = Path(__file__).with_name("trait_rows") / "base.jsonl"
BATCH = 8


def packs_of(model: ps.Model) -> list[Packed]:
    """As `personasteer screen` packs the rows."""
    texts = Texts(model)
    own = [t for line in ROWS.read_text("utf-8").splitlines() for t in texts.of(_messages(json.loads(line)))]
    families = [(len(t.tokens) - t.n_prefix, [i.to_bytes(4, "big")]) for i, t in enumerate(own)]
    packs = []
    for number, (cost, keys) in enumerate(best_fit(families, model.n_batch)):
        some = [own[int.from_bytes(k, "big")] for k in keys]
        given = [(packed(t.tokens), t.n_prompt) for t in some]
        packs.append(Packed("given", number, some[0].n_prefix, cost, given))
    return packs


def _messages(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]


def prefill(args: argparse.Namespace) -> None:
    vector = ps.PersonaVector.load(args.vector)
    with ps.Model(model_path(args.model), n_ctx=1024, n_threads=args.threads) as model:
        axis = axis_of(model, vector)
        last = axis_of(model, vector, model.n_layer - 2)
        packs = [p for p in packs_of(model) if p.cost > 256][: args.pairs]
        bare = PlainContext(str(model.path), n_ctx=1024, n_parallel=1, n_threads=model.n_threads)
        again = PlainContext(str(model.path), n_ctx=1024, n_parallel=1, n_threads=model.n_threads)
        scorers = {
            f"screen, {axis.layer + 1} of {model.n_layer} blocks": Scorer(model, [axis], max_tokens=8),
            f"screen, {model.n_layer - 1} of {model.n_layer} blocks": Scorer(model, [last], max_tokens=8),
        }

        def plain(context: PlainContext, n: int) -> float:
            context.clear()
            tokens = [int(t) for t in np.random.default_rng(0).integers(0, model.n_vocab, n)]
            start = time.perf_counter()
            context.decode(tokens, range(n), [0] * n, 1)
            return time.perf_counter() - start

        def ours(scorer: Scorer, pack: Packed) -> float:
            start = time.perf_counter()
            scorer.compute(pack)
            return time.perf_counter() - start

        plain(bare, 512), plain(again, 512), *(ours(s, packs[0]) for s in scorers.values())
        seconds: dict[str, list[float]] = {name: [] for name in ("llama.cpp", "llama.cpp again", *scorers)}
        for i, pack in enumerate(packs):
            runs: list[tuple[str, Any]] = [
                ("llama.cpp", lambda n=pack.cost: plain(bare, n)),
                ("llama.cpp again", lambda n=pack.cost: plain(again, n)),
                *((name, lambda s=s, pack=pack: ours(s, pack)) for name, s in scorers.items()),
            ]  # fmt: skip
            for name, work in runs[:: 1 if i % 2 else -1]:
                seconds[name].append(work())
        total = sum(p.cost for p in packs)
        given = sum(len(tokens) // 4 for p in packs for tokens, _ in p.texts)
        print(
            f"{model.name} ({model.description}), {len(packs)} packs of {total / len(packs):.0f} new tokens on average"
        )
        print("| | new tokens/s | rows' tokens/s | of llama.cpp | 95 % |\n| --- | ---: | ---: | ---: | --- |")
        for name, values in seconds.items():
            median, low, high = ratio(list(zip(seconds["llama.cpp"], values, strict=True)))
            rows = f"{given / sum(values):.0f}" if name in scorers else ""
            print(f"| {name} | {total / sum(values):.0f} | {rows} | {median:.3f} | {low:.3f} … {high:.3f} |")
        bare.close()
        again.close()


def hooks(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "clean.jsonl"
        few.write_text("".join(ROWS.read_text("utf-8").splitlines(keepends=True)[:40]), "utf-8")
        threads = [] if args.threads is None else ["-t", str(args.threads)]
        ours = [
            sys.executable, "-P", "-c", "from personasteer.cli import main; main()", "screen", str(ROWS), "-m",
            args.model, "-v", args.vector, "--out", f"{folder}/out", "--sample", "0", "--clean", str(few), "-c", "1024",
            "--plain", *threads,
        ]  # fmt: skip
        theirs = [
            sys.executable,
            __file__,
            "script",
            args.vector,
            "--model",
            args.model,
            "--out",
            f"{folder}/script.npy",
        ]
        theirs += [] if args.threads is None else ["--threads", str(args.threads)]
        found = {name: measure(command) for name, command in (("personasteer screen", ours), ("transformers", theirs))}
        import pyarrow.parquet as pq

        name = ps.PersonaVector.load(args.vector).name
        a = pq.read_table(f"{folder}/out/scores.parquet")[f"{name}.fast"].to_numpy()
        b = np.load(f"{folder}/script.npy")
        print("| | wall clock s | peak memory MiB |\n| --- | ---: | ---: |")
        for which, (seconds, peak) in found.items():
            print(f"| {which} | {seconds:.1f} | {peak:.0f} |")
        print(f"\nscores correlate at r = {np.corrcoef(a, b)[0, 1]:.4f}")


def measure(command: list[str]) -> tuple[float, float]:
    """(seconds, MiB at the peak) of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[3:5]} failed")
    return time.perf_counter() - start, usage.ru_maxrss / (1 if sys.platform == "darwin" else 1024) / (
        2**20 if sys.platform == "darwin" else 1
    )


def script(args: argparse.Namespace) -> None:
    """What one writes with transformers."""
    import torch
    from torch_llama import as_transformers, padded

    if args.threads:
        torch.set_num_threads(args.threads)
    path = model_path(args.model)
    with ps.Model(path) as model:
        axis = axis_of(model, ps.PersonaVector.load(args.vector))
        rows = [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()]
        texts = [model.pair_tokens(r["prompt"], r["response"]) for r in rows]
    direction = torch.tensor(axis.direction)
    network = as_transformers(path)
    kept: list[Any] = []
    network.model.layers[axis.layer].register_forward_hook(
        lambda module, given, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    scores = np.empty(len(texts))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
    with torch.inference_mode():
        for first in range(0, len(order), BATCH):
            some = [texts[i] for i in order[first : first + BATCH]]
            ids, mask = padded([tokens for tokens, _ in some])
            kept.clear()
            network(input_ids=ids, attention_mask=mask, use_cache=False)
            readings = kept[0] @ direction
            for k, (tokens, n) in enumerate(some):
                scores[order[first + k]] = float(readings[k, n : len(tokens)].mean() - readings[k, n - 1])
    np.save(args.out, scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("prefill", "hooks", "script"))
    parser.add_argument("vector")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    {"prefill": prefill, "hooks": hooks, "script": script}[args.what](args)


if __name__ == "__main__":
    main()
