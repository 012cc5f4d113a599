"""safetensors and npz of other tools.

PYTHONPATH=.:tests python tests/fuzz/fuzz_tensors.py -max_total_time=300, see README.md.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import atheris_target
import test_fuzz_files as files

from personasteer.errors import PersonasteerError
from personasteer.ship.autoencoders import load_dictionary, load_sae_direction
from personasteer.ship.imports import load_safetensors_directions


def archive(path: Path) -> None:
    named = path.with_suffix(".npz")
    named.write_bytes(path.read_bytes())
    with suppress(PersonasteerError):
        load_dictionary(named, 2, n_embd=64)


if __name__ == "__main__":
    atheris_target.run(
        [*files.SAFETENSORS, *files.NPZ],
        ".safetensors",
        load_safetensors_directions,
        lambda p: load_sae_direction(p, 1, 2, n_embd=64),
        archive,
    )
