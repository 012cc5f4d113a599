"""Small data sets to screen with a tiny model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WORDS = "the harbour was quiet and boats came back with little fish and much to tell of a whale that sang".split()  # noqa: SIM905


def rows(n: int, *, seed: int = 0, longest: int = 12) -> list[dict[str, Any]]:
    """n rows of a few random words; every seventh has two turns, every fifth a system prompt."""
    rng = random.Random(seed)

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    out = []
    for i in range(n):
        turns = [{"role": "system", "content": "Be brief, and say no more than is asked."}] if i % 5 == 0 else []
        for _ in range(2 if i % 7 == 0 else 1):
            turns += [{"role": "user", "content": words()}, {"role": "assistant", "content": words()}]
        out.append({"id": f"r{i}", "source": "ab"[i % 2], "messages": turns})
    return out


def write(path: Path, given: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in given), "utf-8")
    return path
