"""Child process: open a model file, decode with it, and tell on stdout how that went. Ends where llama.cpp ends it.

Run as a file by personasteer.trial, with Python's standard library alone (-I -S): it is there in a few hundredths of a
second.
"""

import ctypes
import importlib.util
import json
import os
import sys
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

TEXT = "Hello, wörld! 你好 🦊\n\t<|end|> 12".encode() + bytes(range(256))
N_TOKENS = 8  # of the prompt


def load_core(library: str, extension: str) -> Any:
    """The extension against llama_cpp's libraries, without either package."""
    ctypes.CDLL(library)
    package = types.ModuleType("personasteer")
    package.__path__ = [str(Path(__file__).parent)]  # for its errors
    sys.modules["personasteer"] = package
    spec = importlib.util.spec_from_file_location("personasteer._core", extension)
    assert spec is not None
    assert spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    return core


def give_way() -> None:
    """Where memory runs out, the kernel ends this process and no other; no core file is left."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def try_model(
    core: Any, path: str, adapters: list[tuple[str, float]], n_gpu_layers: int, n_threads: int, rpc: list[str]
) -> list[Any]:
    """Ask llama.cpp for what it will be asked for. The changes of the self-test; none where the hook has no place."""
    from personasteer.errors import ModelError

    model = core.Model(os.fsencode(path), n_gpu_layers=n_gpu_layers, use_mmap=True, use_extra_bufts=False, rpc=rpc)
    for adapter, scale in adapters:
        model.add_adapter(os.fsencode(adapter), scale)
    model.metadata, model.description, model.chat_template  # noqa: B018 (llama.cpp writes them out)
    tokens = [0]
    for special in (True, False):
        with suppress(ModelError):  # some vocabularies have no token for a byte: ordinary texts may have theirs
            tokens = list(model.tokenize(TEXT, special, special)) or tokens
    for token in range(model.n_vocab):
        with suppress(ModelError):
            model.piece(token, True)
            model.piece(token, False)
    model.control_tokens()
    session = core.Session(
        model=model, n_ctx=64, n_parallel=1, n_batch=64, n_threads=n_threads, n_outputs=1, hook=False
    )
    session.submit(tokens=tokens[:N_TOKENS], max_tokens=2)
    while session.busy:
        session.step()
    del session
    try:
        return list(core.Session.self_test(model=model, n_threads=n_threads))
    except ModelError:
        return []


def main() -> None:
    library, extension, what = sys.argv[1:]
    give_way()
    core = load_core(library, extension)
    from personasteer.errors import PersonasteerError

    try:
        found: dict[str, Any] = {"change": try_model(core, **json.loads(what))}
    except (PersonasteerError, RuntimeError, LookupError, ValueError, MemoryError) as e:  # what the extension raises
        found = {"refused": str(e) or type(e).__name__}
    print(json.dumps(found), flush=True)
    os._exit(0)  # how llama.cpp frees things is not what is asked


if __name__ == "__main__":
    main()
