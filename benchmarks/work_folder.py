"""A folder of results that share a table."""

from __future__ import annotations

import json
import sys
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
