"""Trying a model file out in a process of its own, once, before it is opened in this one.

llama.cpp ends the process over much of what it does not expect in a file: a failed assertion, a division by a number
of heads that is zero, a read beyond a tensor. What may stand in a file depends on its architecture, of which there are
more than a hundred; so a file is tried rather than checked.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from personasteer._native import CRASHES, build_id, llama_library, load_core
from personasteer.errors import ModelError
from personasteer.files import read_cache, write_cache
from personasteer.identity import header_digest, identify, with_adapters

log = logging.getLogger("personasteer")

ENDS = CRASHES | {-signal.SIGKILL}  # which is how the kernel ends what takes too much memory
PATIENCE, SLOWEST_DISK = 300.0, 20e6  # seconds for any file, and bytes per second
_FAILED = re.compile(r"([^/\s]+:\d+): (.+)")  # of GGML_ASSERT and GGML_ABORT


def check_opens(
    path: Path,
    adapters: Sequence[tuple[Path, float]] = (),
    *,
    n_gpu_layers: int = 0,
    n_threads: int = 1,
    rpc: Sequence[str] = (),
) -> Mapping[str, str]:
    """Try a model file with its adapters out in a child process: load it, tokenize, decode, test the hook.

    A file that went well is not tried again, as long as its header, its fingerprint and the build stay the same. Where
    no process can be started, a warning is logged.

    Returns:
        The model's identity, adapters included.

    Raises:
        ModelError: llama.cpp ends the child over the file, does not load it, or does not come to an end.
    """
    files = [path, *(file for file, _ in adapters)]
    identity = with_adapters(identify(path), adapters)
    name = f"model-{identity['fingerprint'][:32]}-{build_id()}.json"
    headers = [header_digest(file) for file in files]
    known = read_cache(name)
    if known.get("opens") == headers:
        return identity
    found = _try(files, {
        "path": str(path), "adapters": [(str(file), scale) for file, scale in adapters],
        "n_gpu_layers": n_gpu_layers, "n_threads": n_threads, "rpc": list(rpc),
    })  # fmt: skip
    if found is not None:
        steerable = {"steerable": True} if found and not rpc and all(change > 0 for change in found) else {}
        write_cache(name, {**known, **steerable, "opens": headers})
    return identity


def _try(files: Sequence[Path], what: Mapping[str, object]) -> list[float] | None:
    """What the self-test of the child found; None where nothing was shown. Raises as `check_opens` does."""
    patience = PATIENCE + sum(file.stat().st_size for file in files) / SLOWEST_DISK
    program = Path(__file__).with_name("_trial.py")
    command = [sys.executable, "-I", "-S", str(program), llama_library(), str(load_core().__file__), json.dumps(what)]
    where = ", ".join(map(str, files))
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=patience,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ModelError(f"{where}: llama.cpp does not open this file within {patience:.0f} s") from None
    except OSError as e:
        log.warning("%s: could not be tried out in a process of its own (%s)", where, e.strerror or e)
        return None
    said = done.stderr.decode("utf-8", "replace")
    if done.returncode in ENDS:
        failed = _FAILED.search(said)
        why = f"{failed[1]}: {failed[2]}" if failed else signal.Signals(-done.returncode).name
        raise ModelError(f"{where}: llama.cpp ends the process that opens this file ({why.strip()[:300]})")
    try:
        found = json.loads(done.stdout)
        refused, changes = found.get("refused"), found.get("change")
    except (ValueError, AttributeError):
        log.warning("%s: could not be tried out in a process of its own (it ended with %s)", where, done.returncode)
        return None
    if refused is not None:
        raise ModelError(str(refused))
    return list(changes)
