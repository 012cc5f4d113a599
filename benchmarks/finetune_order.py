"""Does the score of rows predict what training on them does?

    pip install torch==2.13.0 transformers peft
    python benchmarks/finetune_order.py VECTOR.gguf [--model MODEL.gguf] --work DIR [--k 60] [--seeds 3] [--table]

The rows of trait_rows/base.jsonl and of trait_rows/TRAIT.jsonl (300 and 200), scored by `personasteer screen` in mode
fast. A LoRA (rank 8, on values, attention output and feed-forward; AdamW, 1e-3, 2 epochs of batches of 4) is trained on
the k highest rows, on k drawn at random, and on the k lowest, in float32 on the dequantized weights of the file; the
loss is over the answers. It is written as a GGUF adapter and measured on the quantized file: the trait's log-odds of
written continuations on held-out questions (`personasteer.evaluate`), less those of the untrained model. The draw, the
order of the batches and the LoRA's beginning are the seed's.

A run is one JSON file in the work folder, so that the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from planted_rows import planted
from work_folder import Folder

import personasteer as ps
from personasteer.cli._common import model_path
from personasteer.evaluate import log_odds, trait_of
from personasteer.recalibrate.adapters import save_adapter
from personasteer.ship.rewrite import ModelFile

ARMS = ("high", "random", "low")
RANK, RATE, EPOCHS, BATCH = 8, 1e-3, 2, 4
N_PAIRS = 6  # of continuations, for each held-out question
TARGETS = {
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def chosen(arm: str, scores: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The rows of an arm."""
    order = np.argsort(-scores, kind="stable")
    if arm == "random":
        return np.random.default_rng(seed).choice(len(scores), k, replace=False)
    return order[:k] if arm == "high" else order[-k:]


def train(path: Path, texts: list[tuple[list[int], int]], seed: int, epochs: int = EPOCHS) -> Any:
    """A PEFT model trained on (tokens, n_prompt) pairs."""
    import peft
    import torch
    from torch_llama import as_transformers, padded

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[t.rpartition(".")[2] for t in TARGETS])
    model = peft.get_peft_model(as_transformers(path), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(texts))
        for first in range(0, len(order), BATCH):
            some = [texts[i] for i in order[first : first + BATCH]]
            ids, mask = padded([tokens for tokens, _ in some])
            labels = ids.masked_fill(mask == 0, -100)
            for row, (_, n_prompt) in zip(labels, some, strict=True):
                row[:n_prompt] = -100
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def write_adapter(model: Any, base: Path, out: Path) -> None:
    """The LoRA of a PEFT model as llama.cpp reads it."""
    sides: dict[str, dict[str, np.ndarray]] = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            layer, _, rest = name.split(".layers.")[1].partition(".")
            module, _, side = rest.partition(".lora_")
            sides.setdefault(f"blk.{layer}.{TARGETS[module]}.weight", {})[side[0]] = p.detach().numpy()
    factors = {tensor: (both["A"], both["B"]) for tensor, both in sides.items()}
    save_adapter(out, ModelFile(base), factors, alpha=RANK, provenance={})


def measured(
    path: Path, trait: ps.Trait, adapter: Path | None, n_questions: int | None = None, n_pairs: int = N_PAIRS
) -> dict[str, Any]:
    with ps.Model(path, lora=[adapter] if adapter else []) as model:
        values = log_odds(model, trait, [None], n_questions=n_questions, n_pairs=n_pairs)
    return {"log_odds": float(values.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vector")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--k", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    path, vector = model_path(args.model), ps.PersonaVector.load(args.vector)
    folder = Folder(args.work, {"k": args.k, "vector": vector.name, "model": path.name})
    if not args.table:
        rows = planted("base") + planted(vector.name)
        with ps.Model(path, n_ctx=1024) as model:
            scores = ps.screen(model, vector, rows, args.work / "screen", sample=0).traits[0].score
            texts = [model.pair_tokens(r["prompt"], r["response"]) for r in rows]
            end = model.tokenize("<|im_end|>", add_special=False, parse_special=True)
        folder.get("untrained", lambda: measured(path, trait_of(vector), None))
        for seed in range(args.seeds):
            for arm in ARMS:
                at = chosen(arm, scores, args.k, seed)
                folder.get(
                    f"{arm}-{seed}", lambda at=at, seed=seed: run(path, vector, rows, texts, end, at, seed, args.work)
                )  # type: ignore[misc]
    print(table(folder.load()))


def run(
    path: Path, vector: ps.PersonaVector, rows: list[dict[str, str]], texts: list[tuple[list[int], int]],
    end: list[int], at: np.ndarray, seed: int, work: Path,
) -> dict[str, Any]:  # fmt: skip
    trained = train(path, [(texts[i][0] + end, texts[i][1]) for i in at], seed)
    adapter = work / "adapter.gguf"
    write_adapter(trained, path, adapter)
    shares = float(np.mean(["level" in rows[i] for i in at]))
    return {**measured(path, trait_of(vector), adapter), "trait_rows": shares}


def table(results: dict[str, Any]) -> str:
    zero = results["untrained"]["log_odds"]
    lines = [
        f"Untrained: {zero:+.3f} nats per token.", "",
        "| seed | " + " | ".join(f"{arm}: rows with the trait | log-odds" for arm in ARMS) + " | high > random > low |",
        "| --- |" + " --- | ---: |" * len(ARMS) + " --- |",
    ]  # fmt: skip
    seeds = sorted({name.rpartition("-")[2] for name in results if "-" in name})
    for seed in seeds:
        own = [results.get(f"{arm}-{seed}") for arm in ARMS]
        if all(own):
            cells = " | ".join(f"{r['trait_rows']:.0%} | {r['log_odds'] - zero:+.3f}" for r in own)
            values = [r["log_odds"] for r in own]
            lines.append(f"| {seed} | {cells} | {'yes' if values[0] > values[1] > values[2] else 'no'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
