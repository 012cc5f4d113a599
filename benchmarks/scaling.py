"""How does the cost of steering grow with vectors, blocks, batch, context and model, beside what the work should cost?

    python benchmarks/scaling.py [MODEL.gguf ..] [--pairs 30] [--save NAME] [--plot FILE.png]
    python benchmarks/scaling.py --table NAME

Each point is a steering run right beside the same llama.cpp without the hook, in pairs; the ratio is the median of time
with over time without. The first four questions are asked of the first model (the demo model without), the last one of
all.

- vectors: K caps at all blocks, a prompt of 128 tokens and 40 decodes.
- blocks: 8 caps at some of the blocks.
- batch: so many sequences, each with an addition and a cap of its own at all blocks.
- context: 8 caps at all blocks, decodes after a prompt of so many tokens; 8 decodes a pair, both sides in turn.
- model: 8 caps at all blocks.

"Expected" is what the work adds if it ran at the model's own speed: for a prompt the multiply-adds of the edit over the
model's; for a decode the bytes that it reads over those that the model reads, weights and keys and values.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import results

import personasteer as ps
from personasteer.evaluate.overhead import (
    N_PERSONAS,
    PHASES,
    Mode,
    Runner,
    expected,
    interleave,
    random_vectors,
    ratio,
)
from personasteer.files import atomic_write
from personasteer.model import demo_model_path

SHAPE = (128, 40)
KS = (1, 2, 4, 8, 16, 32, 64)
SIZES = (1, 4, 16, 32)
CONTEXTS = (128, 1024, 4096)
STEPS = 8  # decodes of a pair in a long context
DEEPEST = 64  # pairs that fit into its context


class Deep:
    """Decodes of a runner that goes on and on: a prompt that is long to read is read once."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.begun = False

    def run(self) -> Mapping[str, float]:
        session = self.runner.session
        if not self.begun:
            self.runner.begin()
            while not session.step():
                pass
            self.begun = True
        start = time.perf_counter()
        for _ in range(STEPS):
            session.step()
        return {"decode": (time.perf_counter() - start) / STEPS}


def blocks_of(n_layer: int) -> dict[int, tuple[int, ...]]:
    """{number: blocks} to steer at: one, a quarter, half, all; spread evenly."""
    counts = sorted({1, max(1, n_layer // 4), n_layer // 2, n_layer})
    return {n: tuple(int((i + 0.5) * n_layer / n) for i in range(n)) for n in counts}


def key_value_bytes(model: ps.Model, n_context: int) -> float:
    """Bytes of keys and values that a decode reads behind so many tokens, as 16-bit numbers."""
    of = {k.removeprefix(f"{model.architecture}."): v for k, v in model.metadata.items()}
    n_head = int(of["attention.head_count"])
    n_kv = int(of.get("attention.head_count_kv", n_head))
    width = int(of.get("attention.key_length", model.n_embd // n_head)) + int(
        of.get("attention.value_length", model.n_embd // n_head)
    )
    return 2.0 * model.n_layer * n_context * n_kv * width


def points_of(model: ps.Model) -> list[tuple[str, int, Mode, tuple[int, int]]]:
    """(question, x, mode, shape of a run) for one model."""
    eight = Mode("cap", 8)
    points = [("vectors", k, Mode("cap", k), SHAPE) for k in KS if 4 * k <= model.n_embd]
    points += [("blocks", n, Mode("cap", 8, layers=at), SHAPE) for n, at in blocks_of(model.n_layer).items()]
    points += [("batch", n, Mode(f"personas x{n}", 2, n_sequences=n), SHAPE) for n in SIZES]
    points += [("context", n, eight, (n, STEPS * DEEPEST)) for n in CONTEXTS]
    return points


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for number, path in enumerate(args.models or [str(demo_model_path())]):
        with ps.Model(path, n_ctx=SHAPE[0] + SHAPE[1] + 8) as model:
            vectors = random_vectors(model, 2 * max(*KS, *SIZES, N_PERSONAS))
            points = [("model", model._native.n_params, Mode("cap", 8), SHAPE)]
            if number == 0:
                points = points_of(model) + points
            for question, x, mode, shape in points:
                print(f"{model.name}: {question} {x}", file=sys.stderr, flush=True)
                plain = Mode("plain", hook=False, n_sequences=mode.n_sequences)
                runners = [Runner(model, m, vectors, shape, {}) for m in (plain, mode)]
                timed: list[Any] = [Deep(r) for r in runners] if question == "context" else list(runners)
                found = interleave([(timed[0], timed[1:])], pairs=min(args.pairs, DEEPEST - 3))[timed[1]]
                row: dict[str, Any] = {"question": question, "x": x, "model": f"{model.name} ({model.description})"}
                for phase in PHASES:
                    if phase in found[0][0]:
                        row[phase] = {
                            "ratio": ratio([(own[phase], other[phase]) for own, other in found]),
                            "expected": _expected(model, mode, phase, shape[0] if question == "context" else 0),
                        }
                rows.append(row)
    return {"pairs": args.pairs, "rows": rows}


def _expected(model: ps.Model, mode: Mode, phase: str, n_context: int) -> float:
    alone = expected(model, mode, phase)
    if phase == "prefill" or not n_context:
        return alone
    weights = float(model._native.n_bytes)
    return 1 + (alone - 1) * weights / (weights + key_value_bytes(model, n_context))


def _label(row: dict[str, Any]) -> str:
    return f"{row['x'] / 1e6:.0f}M" if row["question"] == "model" else str(row["x"])


def table(content: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| | | prefill | 95 % | expected | decode | 95 % | expected |",
        "| --- " + "| ---: " * 2 + "| --- | ---: | ---: | --- | ---: |",
    ]
    for r in content["rows"]:
        cells = [r["question"], _label(r)]
        for phase in PHASES:
            if phase not in r:
                cells += ["", "", ""]
                continue
            median, low, high = r[phase]["ratio"]
            cells += [f"{median:.3f}", f"{low:.3f} … {high:.3f}", f"{r[phase]['expected']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(content: dict[str, Any]) -> Any:
    """A panel for each question: measured with its interval, and the expected line."""
    from matplotlib.figure import Figure

    axis = {
        "vectors": "vectors at all blocks",
        "blocks": "blocks, 8 vectors each",
        "batch": "sequences, each its own persona",
        "context": "tokens before, 8 vectors",
        "model": "parameters, 8 vectors",
    }
    drawn = Figure(figsize=(13, 3.6), dpi=130, layout="constrained")
    panels = drawn.subplots(1, len(axis), sharey=True)
    for axes, (question, label) in zip(panels, axis.items(), strict=True):
        rows = [r for r in content["rows"] if r["question"] == question]
        for phase, colour in zip(PHASES, ("#2e86ab", "#d1495b"), strict=True):
            known = [r for r in rows if phase in r]
            if not known:
                continue
            x = [r["x"] for r in known]
            y, low, high = zip(*(r[phase]["ratio"] for r in known), strict=True)
            bars = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
            axes.errorbar(x, y, yerr=bars, fmt="o", markersize=4, capsize=3, color=colour, label=phase)
            axes.plot(x, [r[phase]["expected"] for r in known], color=colour, linewidth=1.2, label=f"{phase}, expected")
        axes.axhline(1, color="0.4", linewidth=0.8, zorder=0)
        axes.set_xscale("log", base=10 if question == "model" else 2)
        axes.set_xticks([r["x"] for r in rows], [_label(r) for r in rows])
        axes.minorticks_off()
        axes.set_xlabel(label, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time with over time without")
    panels[0].legend(frameon=False, fontsize=8)
    return drawn


def describe(content: dict[str, Any]) -> str:
    """What the table is of."""
    names = ", ".join(dict.fromkeys(r["model"] for r in content["rows"]))
    return f"{names}; {content['pairs']} pairs. {content['machine']}."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="GGUF files; the demo model without")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    results.options(parser)
    args = parser.parse_args(arguments)
    content = results.measured_or_saved(args, measure)
    if args.plot:
        from personasteer import plots

        atomic_write(args.plot, plots.png(figure(content)))
    print(f"{describe(content)}\n\n{table(content)}")


if __name__ == "__main__":
    main()
