"""Model files' headers, as they are read without llama.cpp's loader.

PYTHONPATH=.:tests python tests/fuzz/fuzz_header.py -max_total_time=300, see README.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import atheris_target

from personasteer.identity import identify
from personasteer.ship.contents import ModelInFile
from personasteer.ship.rewrite import ModelFile
from personasteer.tiny_model import write_tiny_model

SEED = write_tiny_model(Path(tempfile.mkdtemp()) / "m.gguf", n_layer=1, n_embd=32).read_bytes()

if __name__ == "__main__":
    atheris_target.run([SEED], ".gguf", identify, ModelInFile.read, lambda p: ModelFile(p).fields)
