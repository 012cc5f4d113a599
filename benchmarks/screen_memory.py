"""Does the memory of screening grow with the number of rows?

    python benchmarks/screen_memory.py [--rows 100000]

Short rows (a few words each, all different) through a tiny random model, so that what is measured is the screening and
not the model. Peak memory of the process after each tenth of the rows, for each of its stages.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import personasteer as ps
from personasteer.tiny_model import write_tiny_model

WORDS = "sea boat fish net rope sail wind rain sun hill road tree leaf bird song bell door lamp".split()  # noqa: SIM905


def resident() -> float:
    """MiB that the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    args = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "rows.jsonl").open("w") as f:
            for i in range(args.rows):
                row = {
                    "id": i,
                    "prompt": " ".join(rng.choices(WORDS, k=2)),
                    "response": " ".join(rng.choices(WORDS, k=3)),
                }
                f.write(json.dumps(row) + "\n")
        model = ps.Model(write_tiny_model(folder / "tiny.gguf"), n_ctx=256)
        data = np.random.default_rng(0).standard_normal((model.n_layer, model.n_embd)).astype(np.float32)
        seen: dict[str, dict[int, float]] = {}

        def stage(name: str) -> Any:
            own = seen.setdefault(name, {})

            def progress(done: int, total: int) -> None:
                total = args.rows if name.startswith("reading") else total
                own.setdefault(10 * done // max(total, 1), resident())

            return progress

        begin, start = resident(), time.perf_counter()
        ps.screen(
            model, ps.PersonaVector(data, (1,), "t"), folder / "rows.jsonl", folder / "out", sample=0, progress=stage
        )
        seconds = time.perf_counter() - start
        print(f"{args.rows} rows in {seconds:.0f} s; {begin:.0f} MiB before, {resident():.0f} MiB after")
        print("| stage | " + " | ".join(f"{10 * k} %" for k in range(1, 11)) + " |\n| --- |" + " ---: |" * 10)
        for name, own in seen.items():
            if len(own) > 3:
                print(f"| {name} | " + " | ".join(f"{own[k]:.0f}" if k in own else "" for k in range(1, 11)) + " |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
