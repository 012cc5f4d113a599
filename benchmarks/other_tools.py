"""The vectors that llama.cpp's cvector-generator and repeng make of pairs of texts."""

from __future__ import annotations

import argparse
import json
import os
import pty
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Pairs = Sequence[tuple[str, str]]  # (positive, negative)


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


def repeng(model: str, pairs: Pairs, n_threads: int) -> dict[str, Any]:
    """Seconds to load and to compute, token ids of the texts in turn, and directions by block; in a process of its own,
    with the file's weights dequantized to float32.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "pairs.json", Path(folder) / "out.json"
        given.write_text(json.dumps(list(pairs)))
        command = [sys.executable, __file__, model, str(given), str(out), str(n_threads)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(out.read_text())
    found["directions"] = {int(il): np.array(d) for il, d in found["directions"].items()}
    return found


def _repeng(path: Path, given: Path, out: Path, n_threads: int) -> None:
    start = time.perf_counter()
    import torch

    torch.set_num_threads(n_threads)
    if not hasattr(np, "float_"):  # repeng 0.4 names a type that NumPy 2 no longer has
        np.float_ = np.float64  # type: ignore[attr-defined]
    import repeng
    from torch_llama import as_transformers, tokenizer_of

    model, tokenizer = as_transformers(path), tokenizer_of(path)
    pairs = json.loads(given.read_text())
    loaded = time.perf_counter()
    dataset = [repeng.DatasetEntry(positive, negative) for positive, negative in pairs]
    vector = repeng.ControlVector.train(model, tokenizer, dataset)
    end = time.perf_counter()
    out.write_text(
        json.dumps(
            {
                "load": loaded - start,
                "seconds": end - loaded,
                "tokens": [tokenizer(t)["input_ids"] for pair in pairs for t in pair],
                "directions": {il: d.tolist() for il, d in vector.directions.items()},
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("model", "pairs", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("threads", type=int)
    args = parser.parse_args()
    _repeng(args.model, args.pairs, args.out, args.threads)
