"""What training will take, told before it starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from personasteer.errors import PersonasteerError
from personasteer.ship.rewrite import ModelFile

KEPT_PER_BLOCK = 14, 4  # float32 numbers a token keeps for the way back, in units of n_embd and of the feed-forward
FIXED = 600 * 2**20  # bytes of torch and transformers themselves


def estimate(file: ModelFile, n_trained: int, n_tokens: int, n_vocab: int) -> int:
    """Bytes that training takes at most: twice the float32 weights (while they are converted), or once the weights,
    with 16 bytes for each trained number (it, its gradient, two moments of Adam) and what each of the `n_tokens` of a
    batch keeps for the way back.
    """
    n = sum(t.n_per_row * t.n_rows for t in file.tensors.values())
    wide, ff = KEPT_PER_BLOCK
    n_ff = _feed_forward(file)
    per_token = file.n_layer * (wide * file.n_embd + ff * n_ff) + 4 * n_vocab
    training = 4 * n + 16 * n_trained + 4 * n_tokens * per_token
    return FIXED + max(2 * 4 * n, training)


def _feed_forward(file: ModelFile) -> int:
    value = file.fields.get(f"{file.architecture}.feed_forward_length")
    return value if isinstance(value, int) else 4 * file.n_embd


def free_memory(device: Any = None) -> int:
    """Bytes that this process may still take."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text("ascii").strip() for name in ("max", "current"))
        if limit.isdigit():
            free = min(free, int(limit) - int(used))
    except (OSError, StopIteration, ValueError):
        pass
    return free


def check_memory(needed: int, device: Any = None) -> None:
    """Raise PersonasteerError where training does not fit."""
    free = free_memory(device)
    if needed > free:
        raise PersonasteerError(
            f"training needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: take smaller batches "
            "(--batch), shorter rows (--longest), or a smaller model"
        )
