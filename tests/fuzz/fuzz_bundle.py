"""Bundles as tar files, and persona.json by itself.

PYTHONPATH=.:tests python tests/fuzz/fuzz_bundle.py -max_total_time=300, see README.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import atheris_target
import test_fuzz_files as files

from personasteer.ship.bundle import check_bundle
from personasteer.ship.persona import parse
from personasteer.tiny_model import write_tiny_model

FOLDER = Path(tempfile.mkdtemp())
FILES = files.bundle_seed(write_tiny_model(FOLDER / "m.gguf"), FOLDER)

if __name__ == "__main__":
    atheris_target.run(
        [files.tar_of(FILES), FILES["persona.json"]],
        ".tar",
        check_bundle,
        lambda p: parse(p.read_bytes(), str(p)),
    )
