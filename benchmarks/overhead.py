"""What steering and capture cost against plain llama.cpp: the table of benchmarks/README.md.

    python benchmarks/overhead.py [MODEL.gguf ...]

Interleaved pairs of runs on the same model and settings; ratios, never absolute claims. Without arguments: the bundled
demo model. Nothing else should compute meanwhile.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib.metadata import version

import personasteer as ps
from personasteer.evaluate.overhead import OPERATORS, OverheadRow, measure_overhead
from personasteer.model import demo_model_path


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(rows: list[OverheadRow]) -> str:
    lines = [
        "| phase | mode | K | ratio | 95 % interval | expected | min ... max | tokens/s | MiB added | peak RSS MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.phase} | {r.mode} | {r.k or ''} | {r.ratio_median:.3f} | {r.ratio_low:.3f} ... {r.ratio_high:.3f} | "
        f"{f'{r.expected:.3f}' if r.expected > 1 else ''} | "
        f"{r.ratio_min:.3f} ... {r.ratio_max:.3f} | {r.tokens_per_second:.0f} | {r.hook_mib:.1f} | "
        f"{r.peak_rss_mib:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="GGUF files; the demo model without")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode-tokens", type=int, default=12)
    parser.add_argument("--ks", default="1,8,64", help="vectors in the steering")
    parser.add_argument("--operators", default=",".join(OPERATORS))
    args = parser.parse_args()
    print(f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}; ", end="")
    print(f"Python {platform.python_version()}, llama-cpp-python {version('llama-cpp-python')}, ", end="")
    print(f"personasteer {version('personasteer')}\n")
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
            print(f"\n{model.name} ({model.description}), prefill {args.prompt_tokens} tokens, ", end="")
            print(f"then {args.decode_tokens} one by one, {args.pairs} pairs, {model.n_threads} threads\n")
            print(table(rows), flush=True)


if __name__ == "__main__":
    main()
