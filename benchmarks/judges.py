"""How well the scorers of answers agree with human labels, on the labelled set that comes with the package.

    python benchmarks/judges.py [MODEL.gguf ...]

For each model: the log-odds of an answer under contrasting prompts, and the model asked for a number. Beside
them the trait's lexicon.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

import personasteer as ps
from personasteer.derive.judge import Judge, LocalJudge, LogOddsJudge, agreement, labelled_examples
from personasteer.evaluate.generations import in_lexicon
from personasteer.traits import Trait


class Lexicon:
    """100 where a word of the lexicon stands in the answer, 0 elsewhere."""

    def score(self, trait: Trait, pairs: Sequence[tuple[str, str]], **_: object) -> NDArray[np.float64]:
        return np.array([100.0 * in_lexicon(answer, trait) for _, answer in pairs])


def row(label: str, judge: Judge) -> str:
    start = time.perf_counter()
    found = agreement(judge, labelled_examples())
    seconds = (time.perf_counter() - start) / found.n
    return (
        f"| {label} | {found.spearman:.2f} | {found.auroc:.2f} | {found.mean_abs_error:.0f} | "
        f"{found.unscored} of {found.n} | {seconds:.2f} |"
    )


def main() -> None:
    print("| scorer | Spearman | AUROC | mean error, of 100 | not scored | seconds per answer |")
    print("| --- " * 6 + "|")
    print(row("lexicon", Lexicon()))
    for path in sys.argv[1:] or [str(ps.model.demo_model_path())]:
        with ps.Model(path, n_ctx=1024, n_parallel=16) as model:
            print(row(f"{model.name}: log-odds under three pairs of prompts", LogOddsJudge(model)), flush=True)
            print(row(f"{model.name}: asked for a number", LocalJudge(model)), flush=True)


if __name__ == "__main__":
    main()
