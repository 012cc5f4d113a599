"""Control-vector GGUF files: ours, and those of other tools.

PYTHONPATH=.:tests python tests/fuzz/fuzz_vector.py -max_total_time=300, see README.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import atheris_target
import test_fuzz_files as files

import personasteer as ps
from personasteer.ship.control_vector import exported_strength, origin_of
from personasteer.ship.projection import load_projection

SEEDS = files.vector_seeds(Path(tempfile.mkdtemp()))

if __name__ == "__main__":
    atheris_target.run(SEEDS, ".gguf", ps.PersonaVector.load, load_projection, origin_of, exported_strength)
