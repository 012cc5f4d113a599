"""What steering and capture cost against plain llama.cpp: the table of benchmarks/README.md.

    python benchmarks/overhead.py [MODEL.gguf ...]

Interleaved pairs of runs on the same model and settings; ratios, never absolute claims. Without arguments: the bundled
demo model. Nothing else should compute meanwhile.
"""

from __future__ import annotations

import argparse
import sys

import personasteer as ps
from personasteer.evaluate.overhead import OPERATORS, about, as_markdown, measure_overhead
from personasteer.model import demo_model_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="GGUF files; the demo model without")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode-tokens", type=int, default=12)
    parser.add_argument("--ks", default="1,8,64", help="vectors in the steering")
    parser.add_argument("--operators", default=",".join(OPERATORS))
    args = parser.parse_args()
    for path in args.models or [demo_model_path()]:
        n_ctx = args.prompt_tokens + args.decode_tokens + 8
        with ps.Model(path, n_ctx=n_ctx, n_parallel=1) as model:
            rows = measure_overhead(
                model,
                operators=args.operators.split(","),
                ks=[int(k) for k in args.ks.split(",")],
                pairs=args.pairs,
                prompt_tokens=args.prompt_tokens,
                decode_tokens=args.decode_tokens,
                progress=lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr),
            )
            what = about(model, rows, args.prompt_tokens, args.decode_tokens)
            print(f"\n{what}\n\n{as_markdown(rows)}", flush=True)


if __name__ == "__main__":
    main()
