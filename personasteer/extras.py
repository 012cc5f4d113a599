"""Packages that only some capabilities need."""

from __future__ import annotations

import importlib
from typing import Any

from personasteer.errors import ArgumentError


def arrow(purpose: str, extra: str) -> tuple[Any, Any]:
    """(pyarrow, pyarrow.parquet). Raises ArgumentError as `need` does."""
    pa, pq = need(purpose, extra, "pyarrow", "pyarrow.parquet")
    return pa, pq


def need(purpose: str, extra: str, *modules: str) -> tuple[Any, ...]:
    """The modules. Raises ArgumentError, which begins with what needs them and ends with what installs them."""
    found = []
    for name in modules:
        try:
            found.append(importlib.import_module(name))
        except ImportError as e:
            missing = ", ".join(dict.fromkeys(m.partition(".")[0] for m in modules))
            raise ArgumentError(f"{purpose} {missing}: pip install 'personasteer[{extra}]'") from e
    return tuple(found)
