"""llama.cpp through llama-cpp-python's ctypes API alone, for the benchmarks that need a bare loop beside ours."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from personasteer._native import extra_buffers_work


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    pass


class PlainContext:
    """A model and a context without any hook."""

    def __init__(self, path: str, *, n_ctx: int, n_parallel: int, n_threads: int, callback: Any = None) -> None:
        """callback: cb_eval, a function of ctypes (tensor, ask, user data) -> bool."""
        llama_cpp.llama_log_set(_quiet, None)
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts = extra_buffers_work()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx * n_parallel
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = n_parallel
        params.n_outputs_max = max(64, n_parallel)
        params.n_threads = params.n_threads_batch = n_threads
        params.kv_unified = params.swa_full = params.no_perf = True
        self._callback = callback  # lives as long as the context
        if callback is not None:
            params.cb_eval = ctypes.cast(callback, llama_cpp.ggml_backend_sched_eval_callback)
        self.handle = llama_cpp.llama_init_from_model(self.model, params)
        self.n_embd = llama_cpp.llama_model_n_embd(self.model)
        self.n_layer = llama_cpp.llama_model_n_layer(self.model)

    def close(self) -> None:
        llama_cpp.llama_free(self.handle)
        llama_cpp.llama_model_free(self.model)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.handle), False)

    def set_control_vector(self, rows: np.ndarray) -> None:
        """rows (n_layer - 1, n_embd) from block 1 on."""
        pointer = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        llama_cpp.llama_set_adapter_cvec(self.handle, pointer, rows.size, self.n_embd, 1, self.n_layer - 1)

    def decode(self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], n_out: int) -> None:
        """One decode; the last token of each of n_out sequences has an output row."""
        n = len(tokens)
        seqs = (ctypes.c_int32 * n)(*sequences)
        pointers = (ctypes.POINTER(ctypes.c_int32) * n)()
        for i in range(n):
            pointers[i] = ctypes.cast(ctypes.byref(seqs, 4 * i), ctypes.POINTER(ctypes.c_int32))
        batch = llama_cpp.llama_batch()
        batch.n_tokens = n
        batch.token = (ctypes.c_int32 * n)(*tokens)
        batch.pos = (ctypes.c_int32 * n)(*positions)
        batch.n_seq_id = (ctypes.c_int32 * n)(*[1] * n)
        batch.seq_id = pointers
        each = n // n_out
        batch.logits = (ctypes.c_int8 * n)(*[int(i % each == each - 1) for i in range(n)])
        if llama_cpp.llama_decode(self.handle, batch) != 0:
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(self.handle)
