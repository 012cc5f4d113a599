"""Does a model split over two RPC workers steer and capture as one that lies here, and what does that cost?

    CMAKE_ARGS=-DGGML_RPC=on pip install --no-cache-dir --force-reinstall llama-cpp-python==0.3.36
    python benchmarks/rpc.py ggml-rpc-server [MODEL.gguf] [--pairs 30] [--save NAME]
    python benchmarks/rpc.py --table NAME

Two workers of llama.cpp on this machine, one thread each, hold half of the blocks each; beside them the same file in
this process on the CPU. Texts in one batch: unsteered, with an addition at all blocks, a cap at all blocks, an addition
of strength 0. Compared: logits and captured states of the split model with those of the one here, and of the unsteered
text beside steered ones with the same batch unsteered, which has to be equal to the bit. Cost: decodes and prefills of
the split model with eight additions and eight caps at all blocks, each right beside the split model without the hook.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import results
from derive import cosines
from rpc_workers import workers

import personasteer as ps
from personasteer.evaluate.overhead import PHASES, Mode, Runner, interleave, random_vectors, ratio
from personasteer.model import demo_model_path
from personasteer.statistics import divergence, log_softmax

TEXTS = (
    "The weather report for tomorrow says that",
    "My brother told me about his new job, and",
    "In the spring the river rises until",
    "Nobody who saw the film would",
)
SHAPE = (64, 8)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    path = args.model or str(demo_model_path())
    with workers(Path(args.program), 2) as addresses:  # outlive every context: llama.cpp aborts without them
        return _compare(path, addresses, args.pairs)


def _compare(path: str, addresses: list[str], pairs: int) -> dict[str, Any]:
    options: dict[str, Any] = {"n_ctx": SHAPE[0] + SHAPE[1] + 8}
    with ps.Model(path, rpc=addresses, **options) as split, ps.Model(path, n_gpu_layers=0, **options) as here:
        vectors = random_vectors(split, 16)
        here.mixes = split.mixes
        caps = ps.Cap(vectors[1], np.zeros(here.n_layer))
        steers = [None, vectors[0] * 0.3, caps, vectors[0] * 0.0]
        plain = {m: m.logits(TEXTS) for m in (split, here)}
        steered = {m: m.logits(TEXTS, steer=steers) for m in (split, here)}
        states = {m: m.capture(TEXTS, pool="mean", last_layer=True) for m in (split, here)}
        content: dict[str, Any] = {
            "model": f"{here.name} ({here.description})",
            "pairs": pairs,
            "to_the_bit": [bool(np.array_equal(steered[split][k], plain[split][k])) for k in (0, 3)],
            "largest_difference": max(
                float(np.abs(a - b).max())
                for one in (plain, steered)
                for a, b in zip(one[split], one[here], strict=True)
            ),
            "states_cosine": float(cosines(states[split], states[here]).min()),
            "kl": {
                what: [_kl(a, b) for a, b in zip(one[here], one[split], strict=True)]
                for what, one in (("unsteered", plain), ("steered", steered))
            },
            "kl_of_steering": [_kl(a, b) for a, b in zip(plain[here], steered[here], strict=True)],
            "cost": [],
        }
        contexts: dict[Any, Any] = {}
        runners = {
            "off": Runner(split, Mode("off", hook=False), vectors, SHAPE, {}),
            "8 additions": Runner(split, Mode("add", 8), vectors, SHAPE, contexts),
            "8 caps": Runner(split, Mode("cap", 8), vectors, SHAPE, contexts),
        }
        base = Runner(split, Mode("plain", hook=False), vectors, SHAPE, {})
        found = interleave([(base, list(runners.values()))], pairs=pairs)
        for name, runner in runners.items():
            row: dict[str, Any] = {"what": name}
            for phase in PHASES:
                times = [(own[phase], other[phase]) for own, other in found[runner]]
                speed = runner.n_tokens[phase] / float(np.median([own for own, _ in times]))
                row[phase] = {"tokens_per_second": speed, "ratio": ratio(times)}
            content["cost"].append(row)
    return content


def _kl(a: np.ndarray, b: np.ndarray) -> float:
    """Mean KL of the next token, in nats."""
    return float(divergence(log_softmax(a), log_softmax(b)).mean())


def table(content: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| text | KL(here, unsteered ∥ split, unsteered) | KL(here, steered ∥ split, steered) | "
        "KL(unsteered ∥ steered), here |",
        "| --- | ---: | ---: | ---: |",
    ]
    kl = content["kl"]
    for name, *row in zip(
        ("unsteered", "an addition", "a cap", "strength 0"),
        kl["unsteered"],
        kl["steered"],
        content["kl_of_steering"],
        strict=True,
    ):
        lines.append(f"| {name} | " + " | ".join(f"{x:.2g}" for x in row) + " |")
    lines += [
        "",
        "| | prefill, of unsteered | 95 % | decode, of unsteered | 95 % |",
        "| --- | ---: | --- | ---: | --- |",
    ]
    for row in content["cost"]:
        cells = [row["what"]]
        for phase in PHASES:
            median, low, high = row[phase]["ratio"]
            cells += [f"{median:.3f}", f"{low:.3f} … {high:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    equal = "equal to the bit" if all(content["to_the_bit"]) else "NOT equal to the bit"
    lines += [
        "",
        f"Largest difference of a logit from the same file in this process, steered and unsteered: "
        f"{content['largest_difference']:.2g}. Unsteered and strength 0 beside steered texts: {equal} to the same "
        f"batch unsteered. States captured at all blocks: cosine with those captured here at least "
        f"{content['states_cosine']:.6f}.",
    ]
    return "\n".join(lines)


def describe(content: dict[str, Any]) -> str:
    """What the table is of."""
    return f"{content['model']}, {content['pairs']} pairs. {content['machine']}."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?", help="llama.cpp's ggml-rpc-server")
    parser.add_argument("model", nargs="?", help="a GGUF file; the demo model without")
    parser.add_argument("--pairs", type=int, default=30)
    results.options(parser)
    args = parser.parse_args(arguments)
    if not (args.program or args.table):
        parser.error("name the program ggml-rpc-server, or a saved result (--table)")
    content = results.measured_or_saved(args, measure)
    print(f"{describe(content)}\n\n{table(content)}")


if __name__ == "__main__":
    main()
