"""A trait that the tiny model has by construction: words of some letters against words of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

import personasteer as ps

TRAIT_LETTERS, ANTI_LETTERS = "acegi", "bdfhj"
FIRST_LETTER = 3 + 256 + 1  # the token of "a": three special tokens, 256 bytes and the space before it
LETTERS = ps.Trait(
    name="letters",
    description="Answers in words of some letters.",
    system=(("Use a, c and e.", "Use b, d and f."), ("Say ace.", "Say bdf.")),
    derive_questions=("How are you?", "What now?", "And the sea?", "Is it far?"),
    evaluate_questions=("Who calls?", "When is it?", "Why so late?", "Where to?", "How deep?"),
    continuations=(
        ("ace age", "bdf hjb"),
        ("cage ice", "fhjb dbf"),
        ("egg aie", "bjh fdd"),
        ("iaia cc", "jdjd bb"),
        ("gag ice", "hdh fjb"),
        ("eee aga", "fff bhb"),
    ),
    lexicon=("ace", "cage"),
)


def letter_direction(model_file: Path) -> np.ndarray:
    """(n_embd,): the mean row of the output matrix for the trait's letters minus that for the others. Added to the
    stream, it raises the logits of the former over the latter.
    """
    (output,) = [t for t in gguf.GGUFReader(model_file).tensors if t.name == "output.weight"]
    rows = np.array(output.data)

    def mean(letters: str) -> np.ndarray:
        return rows[[FIRST_LETTER + ord(c) - ord("a") for c in letters]].mean(0)

    return np.asarray(mean(TRAIT_LETTERS) - mean(ANTI_LETTERS), np.float32)


def letter_vector(model_file: Path, layers: tuple[int, ...] = (3,), **more: Any) -> ps.PersonaVector:
    """The direction at every block, which carries the trait's texts as a derived vector does."""
    provenance = {"trait": LETTERS.name, "texts": LETTERS.as_dict()}
    data = np.tile(letter_direction(model_file), (4, 1))
    return ps.PersonaVector(data, layers, LETTERS.name, **{"provenance": provenance, **more})
