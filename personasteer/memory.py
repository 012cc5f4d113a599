"""How much memory is free, and whether something fits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from personasteer.errors import PersonasteerError


def free_memory(device: Any = None) -> int | None:
    """Bytes that this process may still take, or a CUDA device has; None where the system does not tell."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    free = _of_machine()
    limit = _of_container()
    return free if limit is None else limit if free is None else min(free, limit)


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # macOS has no such name
        return None


def _of_container() -> int | None:
    """What the limit of a control group leaves; cached files count as free."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (folder.joinpath(f"memory.{name}").read_text("ascii").strip() for name in ("max", "current"))
        rows = dict(line.split() for line in folder.joinpath("memory.stat").read_text("ascii").splitlines())
        return int(limit) - int(used) + int(rows.get("inactive_file", 0)) if limit.isdigit() else None
    except (OSError, ValueError):
        return None


def check_memory(needed: int, purpose: str, advice: str, device: Any = None) -> None:
    """Raise PersonasteerError where so many bytes are not free."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise PersonasteerError(
            f"{purpose} needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: {advice}"
        )
