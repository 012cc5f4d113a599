"""A folder of results that share a table."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from personasteer.files import atomic_write


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Exit where a folder's results are of other settings, or of unknown ones; note the settings where it has none."""
    known = folder / "settings.json"
    text = json.dumps(settings, indent=1, sort_keys=True)
    if any(folder.glob("*.json")) and (not known.exists() or known.read_text("utf-8") != text):
        sys.exit(f"{folder} holds results of another model or other settings: name another --work folder")
    atomic_write(known, text.encode())


class Folder:
    """Results in a folder, one file each, computed where they are missing; all of the same settings."""

    def __init__(self, path: Path, settings: dict[str, Any] | None = None) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        if settings is not None:
            claim(path, settings)

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.json").exists()

    def get(self, name: str, compute: Callable[[], dict[str, Any]]) -> None:
        if self.has(name):
            return
        print(name, file=sys.stderr, flush=True)
        start = time.perf_counter()
        result = compute() | {"seconds": time.perf_counter() - start}
        atomic_write(self.path / f"{name}.json", json.dumps(result, indent=1, ensure_ascii=False).encode())

    def load(self) -> dict[str, dict[str, Any]]:
        """{name: result} of what is there, as the tables take it."""
        files = [file for file in sorted(self.path.glob("*.json")) if file.stem != "settings"]
        return {file.stem: json.loads(file.read_text("utf-8")) for file in files}
