"""A tiny model with a trait planted by hand: which block writes it, and what its words are, is known."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from personasteer import Trait
from personasteer.tiny_model import write_tiny_model

N_LAYER, N_EMBD = 8, 64
PLUS, MINUS = "acegikmoqsuwy", "bdfhjlnprtvxz"  # letters that the planted direction makes likelier, and unlikelier
FOR, AGAINST = "P", "N"  # marks in a system prompt: for the trait, against it
MARK, CONSTANT = 0, 1  # dimensions of the stream that no block writes: the marks, and 1 for every token
FIRST_BYTE, FIRST_LETTER = 3, 260  # token numbers


def write_planted_model(path: Path, block: int) -> tuple[Path, np.ndarray]:
    """The file, and the planted direction u, (64,).

    Every block attends to all tokens alike and sees how many of them are marks. At `block` that number is written
    along u, before it hardly at all; each later block writes it, three times as large, along a random direction of its
    own, so that u stands out at `block` only. The output makes PLUS letters likelier along u. All else is random and
    small: a language of random letters.
    """
    write_tiny_model(path, n_layer=N_LAYER, n_embd=N_EMBD)
    rng = np.random.default_rng(7)
    weights = {t.name.removesuffix(".weight"): t.data for t in gguf.GGUFReader(path, "r+").tensors}
    written = rng.standard_normal((N_LAYER, N_EMBD))
    written[:, [MARK, CONSTANT]] = 0
    written /= np.linalg.norm(written, axis=1, keepdims=True)
    u = written[block]
    later = written[block + 1 :]
    later -= np.outer(later @ u, u)

    words = weights["token_embd"]
    words[:, MARK], words[:, CONSTANT] = 0, 1
    for mark, value in ((FOR, 3.0), (AGAINST, -3.0)):
        words[FIRST_BYTE + ord(mark)] = 0
        words[FIRST_BYTE + ord(mark), [MARK, CONSTANT]] = value, 1
    for il in range(N_LAYER):
        one = {name.removeprefix(f"blk.{il}."): data for name, data in weights.items() if f"blk.{il}." in name}
        one["attn_q"][:] = one["attn_k"][:] = 0  # the same attention everywhere
        one["attn_v"][:, [MARK, CONSTANT]] = 0
        one["attn_v"][0] = 0
        one["attn_v"][0, MARK] = 1
        one["attn_output"][:] *= 0.1
        one["attn_output"][:, 0] = written[il] * (2.0 if il == block else 0.05 if il < block else 6.0)
        one["ffn_gate"][:, MARK] = one["ffn_up"][:, MARK] = 0
        one["ffn_down"][:] *= 0.1
        for name in ("attn_output", "ffn_down"):
            one[name][[MARK, CONSTANT]] = 0
    sign = np.zeros(len(words))
    for letters, s in ((PLUS, 1.0), (MINUS, -1.0)):
        sign[[FIRST_LETTER + ord(c) - ord("a") for c in letters]] = s
    sign[FIRST_LETTER - 1] = 0.0  # the space
    out = weights["output"]
    out[:] *= 0.5
    out[:, MARK] = 0
    out[:, CONSTANT] = np.where(sign == 0, -2.0, 2.0)
    out += np.outer(sign, 0.5 * u)
    for data in weights.values():
        if isinstance(data, np.memmap):
            data.flush()
    return path, u.astype(np.float32)


def planted_trait(*, continuations: bool = True) -> Trait:
    """The trait of such a model: two pairs of system prompts, and six questions of one length to derive on."""
    rng = np.random.default_rng(1)

    def text(letters: str, *lengths: int) -> str:
        return " ".join("".join(rng.choice(list(letters), n)) for n in lengths)

    def some(n: int) -> tuple[str, ...]:
        return tuple(text(PLUS[:6] + MINUS[:6], 4, 3) for _ in range(n))

    pairs = tuple((text(PLUS, 4, 3), text(MINUS, 4, 3)) for _ in range(9))
    return Trait(
        "planted",
        "Letters of one kind.",
        tuple((FOR * 16 + word, AGAINST * 16 + word) for word in ("ab", "cd")),
        some(6),
        some(4),
        pairs if continuations else (),
        lexicon=("a",),
    )
