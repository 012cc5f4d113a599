"""What steering and capture cost against plain llama.cpp.

    python benchmarks/overhead.py [MODEL.gguf] [--pairs 30] [--save NAME]
    python benchmarks/overhead.py --table NAME

Interleaved pairs of runs on the same model and settings; ratios, never absolute claims. Without a model: the bundled
demo model. Nothing else should compute meanwhile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import results

import personasteer as ps
from personasteer.evaluate.overhead import OPERATORS, OverheadRow, as_json, as_markdown, measure_overhead, sentence
from personasteer.model import demo_model_path


def measure(args: argparse.Namespace) -> dict[str, Any]:
    n_ctx = args.prompt_tokens + args.decode_tokens + 8
    with ps.Model(args.model or str(demo_model_path()), n_ctx=n_ctx, n_parallel=1) as model:
        rows = measure_overhead(
            model,
            operators=args.operators.split(","),
            ks=[int(k) for k in args.ks.split(",")],
            pairs=args.pairs,
            prompt_tokens=args.prompt_tokens,
            decode_tokens=args.decode_tokens,
            progress=lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr),
        )
        return {
            "model": f"{model.name} ({model.description})",
            "threads": model.n_threads,
            "prompt_tokens": args.prompt_tokens,
            "decode_tokens": args.decode_tokens,
            **as_json(rows),
        }


def describe(content: dict[str, Any]) -> str:
    """What the table is of."""
    pairs = min(r["pairs"] for r in content["rows"])
    given = (content[k] for k in ("model", "prompt_tokens", "decode_tokens"))
    return sentence(*given, pairs, content["threads"], content["machine"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a GGUF file; the demo model without")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode-tokens", type=int, default=40)
    parser.add_argument("--ks", default="1,8,64", help="vectors in the steering")
    parser.add_argument("--operators", default=",".join(OPERATORS))
    results.options(parser)
    content = results.measured_or_saved(parser.parse_args(arguments), measure)
    print(f"{describe(content)}\n\n{as_markdown([OverheadRow(**row) for row in content['rows']])}")


if __name__ == "__main__":
    main()
