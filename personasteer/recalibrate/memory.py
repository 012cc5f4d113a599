"""What training will take, told before it starts."""

from __future__ import annotations

from personasteer.ship.rewrite import ModelFile

KEPT_PER_BLOCK = 14, 4  # float32 numbers a token keeps for the way back, in units of n_embd and of the feed-forward
FIXED = 600 * 2**20  # bytes of torch and transformers themselves


def estimate(file: ModelFile, n_trained: int, n_tokens: int, n_vocab: int) -> tuple[int, int]:
    """(bytes while loading, bytes while training), about: twice the float32 weights, while they are converted; and the
    weights, 16 bytes for each trained number (it, its gradient, two moments of Adam), and what each of the `n_tokens`
    of a batch keeps for the way back.
    """
    n = sum(t.n_per_row * t.n_rows for t in file.tensors.values())
    wide, ff = KEPT_PER_BLOCK
    per_token = file.n_layer * (wide * file.n_embd + ff * _feed_forward(file)) + 4 * n_vocab
    return FIXED + 2 * 4 * n, FIXED + 4 * n + 16 * n_trained + 4 * n_tokens * per_token


def _feed_forward(file: ModelFile) -> int:
    value = file.fields.get(f"{file.architecture}.feed_forward_length")
    return value if isinstance(value, int) else 4 * file.n_embd
