"""What the targets share: seeds written into a corpus, a file for each input, findings that are told from refusals."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import atheris

os.environ.setdefault("PERSONASTEER_CACHE_DIR", tempfile.mkdtemp(prefix="personasteer-fuzz-"))
with atheris.instrument_imports(include=["personasteer"]):
    import personasteer  # noqa: F401
from fuzzing import read_or_refuse


def run(seeds: Sequence[bytes], ending: str, *readers: Callable[[Path], Any]) -> None:
    """Fuzz readers of a file that ends in `ending`."""
    logging.disable(logging.CRITICAL)
    scratch = Path(tempfile.mkdtemp(prefix="personasteer-fuzz-"))
    file = scratch / f"input{ending}"
    corpus = scratch / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(seeds):
        (corpus / f"seed-{i}").write_bytes(seed)

    def one(data: bytes) -> None:
        file.write_bytes(data)
        for reader in readers:
            read_or_refuse(lambda: reader(file))  # noqa: B023

    options = [] if any(not arg.startswith("-") for arg in sys.argv[1:]) else [str(corpus)]
    atheris.Setup([*sys.argv, "-max_len=200000", "-timeout=30", "-rss_limit_mb=4096", *options], one)
    atheris.Fuzz()
