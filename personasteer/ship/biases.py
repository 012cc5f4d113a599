"""Which biases llama.cpp's loader of an architecture takes."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence

from personasteer._native import load_core
from personasteer.errors import ModelError
from personasteer.ship.fields import Field
from personasteer.ship.rewrite import ModelFile
from personasteer.trial import check_opens


def accepts(
    file: ModelFile, biases: Sequence[str], size: int, *, fields: Sequence[Field] = (), removed: Sequence[str] = ()
) -> bool:
    """Whether llama.cpp loads the model with these biases of `size` numbers, and with other key-values: tried with a
    file of the same tensors, all zero, that takes no room on the disk.
    """
    new = [(name, "f32", [size]) for name in biases if name not in file.tensors]
    if not new and not fields:
        return True
    check_opens(file.path)
    core = load_core()
    values = [f.native for f in fields]
    header, _, n_data, _, alignment = core.change_gguf_header(os.fsencode(file.path), list(removed), values, new)
    handle, name = tempfile.mkstemp(prefix="personasteer-", suffix=".gguf")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(header)
            f.truncate(len(header) + n_data + len(new) * (4 * size + alignment))  # a hole
        core.Model(os.fsencode(name), n_gpu_layers=0, use_mmap=True, use_extra_bufts=False)
    except ModelError:
        return False
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)
    return True
