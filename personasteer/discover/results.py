"""What a comparison found, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.discover.features import Feature
from personasteer.monitor import Shift


@dataclass(frozen=True)
class Diff:
    """What a fine-tune changed.

    Args:
        base, tuned: names of the models; layer: the block whose features these are.
        n_texts, n_tokens: texts, and their answers' tokens, that features are looked for in; n_compared: texts of these
            on which all blocks and the predictions are compared.
        kl: mean KL(base || tuned) of the next token, in nats, with its interval.
        sizes: (n_layer,) ||mean change|| / m_il of each block's output; ranks: at each block (participation ratio,
            directions that hold 90 %) of the texts' changes.
        early_tokens: what the change on the first five tokens of answers makes likelier, through the unembedding.
        profile: the shift along every trait, the surest change of the words first; directions are of written answers.
        trait: whose behaviour the features were tried by, "" where no trait's words changed.
        shift: that trait's change of the log-odds, nats per token.
        features: the mean difference, then those of the dictionary by rank.
        unexplained, dead, n_features: of the dictionary.
        coherence: of the tuned model's answers beside the base's; capability: of both.
    """

    base: str
    tuned: str
    layer: int
    n_texts: int
    n_tokens: int
    n_compared: int
    kl: tuple[float, float, float]
    sizes: NDArray[np.float64]
    ranks: tuple[tuple[float, int], ...]
    early_tokens: tuple[tuple[str, float], ...]
    profile: tuple[Shift, ...]
    trait: str
    shift: float | None
    features: tuple[Feature, ...]
    unexplained: float
    dead: float
    n_features: int
    coherence: float
    capability: Mapping[str, float]
    mean: NDArray[np.float32]

    @property
    def survivors(self) -> list[Feature]:
        """Features whose subtraction takes the shift away and whose addition makes it, both models being coherent."""
        return [f for f in self.features if f.effect is not None and f.effect.survives]

    def summary(self) -> dict[str, Any]:
        """What diff.json holds and `diff --json` prints."""
        return {
            "base": self.base,
            "tuned": self.tuned,
            "layer": self.layer,
            "texts": self.n_texts,
            "tokens": self.n_tokens,
            "compared": self.n_compared,
            "kl": dict(zip(("mean", "low", "high"), self.kl, strict=True)),
            "sizes": [None if not np.isfinite(x) else float(x) for x in self.sizes],
            "ranks": [{"participation": p, "for_90_percent": n} for p, n in self.ranks],
            "early_tokens": [{"token": t, "cosine": c} for t, c in self.early_tokens],
            "profile": [s.as_dict() for s in self.profile],
            "trait": self.trait,
            "shift": self.shift,
            "dictionary": {
                "features": self.n_features,
                "unexplained": _finite(self.unexplained),
                "dead": _finite(self.dead),
            },
            "features": [f.as_dict() for f in self.features],
            "survivors": [f.name for f in self.survivors],
            "coherence": self.coherence,
            "capability": dict(self.capability),
        }


def _finite(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None
