"""What a training came to, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from personasteer.recalibrate.measures import Change, Shown, change, removed


@dataclass(frozen=True)
class Point:
    """A model along its training: after `step` steps, what it shows of each trait (`shown`)."""

    step: int
    shown: Mapping[str, Shown]


@dataclass(frozen=True)
class Finetuned:
    """A fine-tune and what it changed.

    Args:
        n_examples, n_steps: rows trained on, steps taken.
        losses: of each step, nats per learned token, steered as it was trained.
        skipped: {what was wrong: rows}.
        task_loss: (before, after), nats per token of held-out rows, unsteered, on the quantized file with the adapter;
            None without held-out rows.
        before: what the untrained model shows of each trait; points: what it showed while it was trained.
        changes: from before to the end.
    """

    n_examples: int
    n_steps: int
    losses: tuple[float, ...]
    skipped: Mapping[str, int]
    task_loss: tuple[float, float] | None
    before: Mapping[str, Shown]
    points: tuple[Point, ...]

    @property
    def changes(self) -> dict[str, Change]:
        """Of each trait; empty where nothing was measured while it was trained."""
        if not self.points:
            return {}
        return {name: change(shown, self.points[-1].shown[name]) for name, shown in self.before.items()}

    def summary(self) -> dict[str, Any]:
        """What `finetune --json` prints."""
        return {
            "n_examples": self.n_examples,
            "n_steps": self.n_steps,
            "losses": list(self.losses),
            "skipped": dict(self.skipped),
            "task_loss": None if self.task_loss is None else list(self.task_loss),
            "traits": {
                name: {
                    "before": _means(shown),
                    "points": [{"step": p.step, **_means(p.shown[name])} for p in self.points],
                    "change": self.changes[name].as_dict() if self.points else None,
                }
                for name, shown in self.before.items()
            },
        }


@dataclass(frozen=True)
class Realigned:
    """A re-alignment.

    Args:
        n_samples, n_steps: samples seen, steps taken; losses: of each step, nats per learned token.
        target: share of a shift that counts as recovered.
        base, tuned: what both models show of each trait; points: what the re-aligned one showed after some steps.
        recovered: whether of every trait that had shifted `target` of the shift is gone, in what the model says.
        coherence: of the sampled answers of "tuned" and "realigned", judged by the base; 1 is as sound as its own.
        capability: share of multiple-choice items right, of "base", "tuned" and "realigned".
    """

    n_samples: int
    n_steps: int
    target: float
    base: Mapping[str, Shown]
    tuned: Mapping[str, Shown]
    points: tuple[Point, ...]
    coherence: Mapping[str, float]
    capability: Mapping[str, float]
    losses: tuple[float, ...]

    def removed(self, trait: str, point: Point) -> tuple[float, float]:
        """Shares of the trait's shift that are gone, in what it says and in the stream: 1 is all of it."""
        return removed(self.base[trait], self.tuned[trait], point.shown[trait])

    def _removed(self, name: str, point: Point) -> dict[str, float | None]:
        shares = zip(("removed_log_odds", "removed_projection"), self.removed(name, point), strict=True)
        return {what: x if math.isfinite(x) else None for what, x in shares}

    @property
    def recovered(self) -> bool:
        """Whether, at the last point, `target` of each shift is gone."""
        return bool(self.points) and recovered(self.base, self.tuned, self.points[-1].shown, self.target)

    def summary(self) -> dict[str, Any]:
        """What `realign --json` prints."""
        return {
            "n_samples": self.n_samples,
            "n_steps": self.n_steps,
            "recovered": self.recovered,
            "target": self.target,
            "coherence": dict(self.coherence),
            "capability": dict(self.capability),
            "losses": list(self.losses),
            "traits": {
                name: {
                    "base": _means(self.base[name]),
                    "tuned": _means(self.tuned[name]),
                    "shift": change(self.base[name], self.tuned[name]).as_dict(),
                    "points": [
                        {
                            "step": p.step,
                            **_means(p.shown[name]),
                            **self._removed(name, p),
                        }
                        for p in self.points
                    ],
                }
                for name in self.base
            },
        }


def _means(shown: Shown) -> dict[str, float]:
    return {"log_odds": float(shown.log_odds.mean()), "projection": float(shown.projection.mean())}


def shifted(base: Mapping[str, Shown], tuned: Mapping[str, Shown]) -> list[str]:
    """Vectors along which what both models say differs by more than chance: the 95 % interval leaves out 0."""
    changes = {name: change(base[name], tuned[name]) for name in base}
    return [name for name, c in changes.items() if c.log_odds_low > 0 or c.log_odds_high < 0]


def recovered(base: Mapping[str, Shown], tuned: Mapping[str, Shown], now: Mapping[str, Shown], target: float) -> bool:
    """Whether `target` of every shift is gone, in what the model says."""
    return all(removed(base[name], tuned[name], now[name])[0] >= target for name in shifted(base, tuned))
