"""Loads llama.cpp exactly once, checks that the extension fits it, and keeps clear of broken CPU kernels."""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
import signal
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from personasteer.files import read_cache, write_cache

log = logging.getLogger("personasteer")

is_command = False  # set by the command line, whose process is our own to end


@functools.cache
def load_core() -> ModuleType:
    """Import llama_cpp, then the extension against the very libraries that it loaded.

    In the other order a second copy of libllama would be mapped. Raises ImportError that says how to rebuild when the
    installed llama-cpp-python is not the one that the extension was built against: the graph hook's interface is
    experimental and changes between versions.
    """
    try:
        installed = version("llama-cpp-python")
    except PackageNotFoundError as e:
        raise ImportError(
            "personasteer needs llama-cpp-python, which is not installed: install personasteer with pip"
        ) from e
    import_module("llama_cpp")
    try:
        core = import_module("personasteer._core")
    except ImportError as e:
        if Path(__file__).resolve().parent.parent.joinpath("CMakeLists.txt").exists():
            hint = "this is the source folder; build it with `pip install -e .`, or start Python from another folder"
        else:
            hint = "build it again: `pip install --force-reinstall --no-deps .` in a clone of personasteer"
        raise ImportError(f"personasteer._core cannot be loaded ({e}); {hint}") from e
    if installed != core.LLAMA_CPP_PYTHON:
        raise ImportError(
            f"personasteer was built against llama-cpp-python {core.LLAMA_CPP_PYTHON}, but {installed} is installed; "
            f"run `pip install llama-cpp-python=={core.LLAMA_CPP_PYTHON}`; a personasteer for another version is to be "
            "built against it: `pip install --force-reinstall --no-deps .` in a clone that names that version"
        )
    if is_command:
        core.end_in_one_line()
    return core


@functools.cache
def build_id() -> str:
    """Names the installed build of llama.cpp: version, size and time of its libraries."""
    import llama_cpp

    digest = hashlib.sha256(version("llama-cpp-python").encode())
    for lib in sorted(Path(llama_cpp.__file__).parent.joinpath("lib").iterdir()):
        stat = lib.stat()
        digest.update(f"{lib.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def llama_library() -> str:
    """The file of libllama that is loaded."""
    load_core()
    return str(import_module("llama_cpp.llama_cpp")._lib._name)


def cpu_has_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        return "amx_tile" in cpuinfo.read_text("utf-8", "replace")
    except OSError:
        return False


CRASHES = {-s for s in (signal.SIGSEGV, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS)}
PROBE = [sys.executable, "-P", "-m", "personasteer._probe"]  # -P: not from the folder that we stand in


def survives(command: list[str], timeout: float = 120.0) -> bool | None:
    """True when a child process ends well, False when it crashes, None when it could not show either."""
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return True if done.returncode == 0 else False if done.returncode in CRASHES else None


@functools.cache
def extra_buffers_work() -> bool:
    """Whether ggml's repacked CPU weights can be used: found out once per build, in a child process.

    llama.cpp built by GCC older than 13 drops the stores that configure the AMX tiles and crashes at the first token
    (ggml_backend_amx_mul_mat). Only CPUs with AMX are probed.
    """
    if not cpu_has_amx():
        return True
    name = f"build-{build_id()}.json"
    known = read_cache(name).get("extra_buffers_work")
    if not isinstance(known, bool):
        known = survives(PROBE)
        if known is not None:
            write_cache(name, {"extra_buffers_work": known})
    if known is None:
        log.warning("could not try out llama.cpp's AMX kernels; running without them, which is slower but safe")
    elif not known:
        log.warning(
            "this build of llama.cpp crashes in its AMX kernels (compiled by GCC < 13); running without them, "
            "see the README for a faster build"
        )
    return bool(known)
