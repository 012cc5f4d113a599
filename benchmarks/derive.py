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
import importlib.util
import json
import os
import pty
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np

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


# -- peers


def cvector_generator(binary: str, model: str, pairs: Sequence[tuple[str, str]], method: str, n_threads: int) -> Any:
    """(seconds to load, seconds after, directions by block)."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("positive.txt", "negative.txt", "out.gguf")]
        for file, texts in zip(files, zip(*pairs, strict=True), strict=False):
            file.write_text("".join(t.replace("\n", "\\n") + "\n" for t in texts))
        master, slave = pty.openpty()  # lines come as they are printed
        command = [
            binary, "-m", model, "--positive-file", files[0], "--negative-file", files[1], "-o", files[2],
            "--method", method, "-t", str(n_threads), "-ngl", "0",
        ]  # fmt: skip
        start = time.perf_counter()
        process = subprocess.Popen([str(c) for c in command], stdout=slave, stderr=subprocess.DEVNULL)
        os.close(slave)
        loaded = None
        seen = b""
        while True:
            try:
                some = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            if not some:
                break
            seen = (seen + some)[-70000:]
            if loaded is None and b"n_total_tokens" in seen:
                loaded = time.perf_counter()
        code = process.wait()
        end = time.perf_counter()
        os.close(master)
        if code != 0 or loaded is None:
            raise SystemExit(f"{binary} ended with {code}:\n{seen[-2000:].decode(errors='replace')}")
        tensors = gguf.GGUFReader(files[2]).tensors
        directions = {int(t.name.split(".")[1]) - 1: np.array(t.data) for t in tensors if "direction" in t.name}
    return loaded - start, end - loaded, directions


def transformers_model(path: str) -> tuple[Any, Any]:
    """The llama of a GGUF file as a float32 LlamaForCausalLM, and its tokenizer."""
    import torch
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    reader = gguf.GGUFReader(path)
    values = {k.removeprefix("llama."): f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF")}
    heads = {"attn_q": values["attention.head_count"], "attn_k": values["attention.head_count_kv"]}
    config = transformers.LlamaConfig(
        vocab_size=len(values["tokenizer.ggml.tokens"]),
        hidden_size=values["embedding_length"],
        intermediate_size=values["feed_forward_length"],
        num_hidden_layers=values["block_count"],
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        max_position_embeddings=values["context_length"],
        rms_norm_eps=values["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": values.get("rope.freq_base", 10000.0)},
        tie_word_embeddings=all(t.name != "output.weight" for t in reader.tensors),
    )
    theirs = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for t in reader.tensors:
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", t.name)
        name = block[2] if block else t.name.removesuffix(".weight")
        weights = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        if name in heads:  # llama.cpp rotates neighbouring numbers of a head, transformers the two halves
            rows, columns = weights.shape
            n = heads[name]
            weights = weights.reshape(n, rows // n // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        where = f"model.layers.{block[1]}.{theirs[name]}" if block else theirs[name]
        state[f"{where}.weight"] = torch.tensor(weights)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = transformers.LlamaForCausalLM(config).to(torch.float32).eval()
    model.load_state_dict(state, strict=True)

    tokens = values["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = values["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, k in zip(tokens, kinds, strict=True) if k == 3])
    pad = tokens[values["tokenizer.ggml.padding_token_id"]]
    return model, transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def repeng_child(path: str, out: str, n_threads: int) -> None:
    """In a process of its own: times as JSON, directions and token ids into files beside it."""
    start = time.perf_counter()
    import torch

    torch.set_num_threads(n_threads)
    if not hasattr(np, "float_"):  # repeng 0.4 names a type that NumPy 2 no longer has
        np.float_ = np.float64  # type: ignore[attr-defined]
    import repeng

    model, tokenizer = transformers_model(path)
    pairs = make_pairs()
    loaded = time.perf_counter()
    dataset = [repeng.DatasetEntry(positive, negative) for positive, negative in pairs]
    vector = repeng.ControlVector.train(model, tokenizer, dataset)
    end = time.perf_counter()
    Path(out).write_text(
        json.dumps(
            {
                "load": loaded - start,
                "seconds": end - loaded,
                "tokens": [tokenizer(t)["input_ids"] for pair in pairs for t in pair],
                "directions": {il: d.tolist() for il, d in vector.directions.items()},
            }
        )
    )


def run_repeng(path: str, n_threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, __file__, path, "--repeng-child", str(out), "--threads", str(n_threads)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(out.read_text())
    return found


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file; the demo model without")
    parser.add_argument("--cvector-generator", metavar="PATH", help="llama.cpp's llama-cvector-generator")
    parser.add_argument("--repeng", action="store_true", help="needs repeng, torch and transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of all; the physical cores without")
    parser.add_argument("--repeng-child", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeng_child:
        repeng_child(args.model, args.repeng_child, args.threads)
        return
    import personasteer as ps
    from personasteer.evaluate.overhead import machine
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
                *times, directions[method] = cvector_generator(
                    args.cvector_generator, path, pairs, method, model.n_threads
                )
                seconds.setdefault(f"cvector-generator, {method}", []).append((times[0], times[1]))
        if args.repeng:
            found = run_repeng(path, model.n_threads)
            seconds.setdefault("repeng, PCA", []).append((found["load"], found["seconds"]))
            directions["repeng"] = {int(il): np.array(d) for il, d in found["directions"].items()}
            repeng_tokens = found["tokens"]
    assert vector is not None

    rows = model.capture(texts, pool="last", share_prefix=True)
    start = time.perf_counter()
    apart = np.concatenate([model.capture([t], pool="last") for t in texts])
    unshared = time.perf_counter() - start
    expected = apart[:N_PAIRS].mean(0, dtype=np.float64) - apart[N_PAIRS:].mean(0, dtype=np.float64)

    peers = [f"{p} {version(p)}" for p in ("torch", "transformers", "repeng") if importlib.util.find_spec(p)]
    print(
        f"{model.name} ({model.description}), {N_PAIRS} pairs, {args.rounds} rounds, {model.n_threads} threads. ",
        end="",
    )
    print(", ".join([machine(), *peers]))
    print("\n| what | loading, s | computing, s (median, min ... max) | times ours |\n| --- | --- | --- | --- |")
    ours = float(np.median([s for _, s in seconds["personasteer"]]))
    for name, times in seconds.items():
        loads, values = np.array(times).T
        middle = float(np.median(values))
        print(
            f"| {name} | {np.median(loads):.2f} | {middle:.2f}, {values.min():.2f} ... {values.max():.2f} | "
            f"{middle / ours:.1f} |"
        )
    print(f"| personasteer, one text after the other | {load:.2f} | {unshared:.2f} | {unshared / ours:.1f} |")
    for name, given in (("cvector-generator", args.cvector_generator), ("repeng", args.repeng)):
        if not given:
            print(f"\n{name} was not asked for.")

    parts, tokens = breakdown(lambda: ps.contrast(model, positive, negative), model, texts)
    print(f"\n{tokens}. Ours: " + ", ".join(f"{name} {s:.2f} s" for name, s in parts.items()) + ".")
    print(f"The everyday norms took {norms:.2f} s (once per model file, then cached).")
    print(
        f"\nCosines with the directions of texts computed one by one: {spread(cosines(vector.directions, expected))}."
    )
    if "repeng" in directions:
        mine = first_components(rows, N_PAIRS)
        blocks = sorted(directions["repeng"])
        same = [model.tokenize(t) for pair in pairs for t in pair] == repeng_tokens
        found = np.abs([cosines(mine[il], directions["repeng"][il]) for il in blocks])
        print(
            f"repeng read {'the same' if same else 'OTHER'} tokens. "
            "|cosine| of its direction with the PCA of our rows, ",
            end="",
        )
        print(f"{len(blocks)} blocks: min {found.min():.4f}, median {np.median(found):.4f}.")
        means = [cosines(vector.directions[il], directions["repeng"][il]) for il in blocks]
        print(f"Cosine with our difference of means: median {np.median(means):.2f} (another statistic).")
    for method in ("mean", "pca"):
        if method in directions:
            found = [cosines(vector.directions[il], d) for il, d in directions[method].items()]
            print(
                f"Cosine of cvector-generator's {method} with ours: median {np.median(found):.2f} "
                "(all tokens, not the last)."
            )
    model.close()


if __name__ == "__main__":
    main()
