"""llama.cpp as everybody runs it: through llama-cpp-python, without the hook of this package."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from personasteer._native import load_core
from personasteer.errors import ModelError, VectorError
from personasteer.identity import check_model_file
from personasteer.trial import check_opens

N_BATCH, N_OUTPUTS = 512, 64


class PlainModel:
    """A model and a context of one sequence, decoding as the engine does (see csrc/session.cpp): the same shapes.

    Args:
        n_outputs: output rows of a decode, at most.
        projections: {il: [(alpha, unit direction d)]}: h <- h - sum alpha <h, d> d at the output of block il, done by
            a callback between the nodes of the graph (cb_eval), as readers of projection metadata do it.
        repack: let llama.cpp repack weights for the CPU, a copy of them in memory.

    Raises:
        ModelError: llama.cpp does not load the file, or the adapter.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_ctx: int,
        n_threads: int,
        n_outputs: int = N_OUTPUTS,
        lora: str | os.PathLike[str] | None = None,
        control_vector: NDArray[np.float32] | None = None,
        projections: Mapping[int, Sequence[tuple[float, NDArray[np.float64]]]] | None = None,
        n_gpu_layers: int = 0,
        repack: bool = False,
    ) -> None:
        self.path = check_model_file(path)
        self._handle: Any = None
        self._model: Any = None
        load_core().check_model_metadata(os.fsencode(self.path))
        check_opens(self.path, [(Path(lora), 1.0)] if lora is not None else [], n_threads=n_threads)
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        params.use_extra_bufts = repack
        with _quiet() as log:
            self._model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), params)
            if not self._model:
                raise ModelError(f"{self.path}: stock llama.cpp does not load this file{_why(log)}")
        self.n_layer = int(llama_cpp.llama_model_n_layer(self._model))
        self.n_embd = int(llama_cpp.llama_model_n_embd(self._model))
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model)))
        self.n_outputs = n_outputs
        self._projections = dict(projections or {})
        self._failed: BaseException | None = None
        self._open(n_ctx, n_threads)
        if lora is not None:
            self._apply_adapter(Path(lora))
        if control_vector is not None:
            self._apply_control_vector(control_vector)

    def _open(self, n_ctx: int, n_threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = self.n_batch = min(N_BATCH, n_ctx)
        params.n_seq_max = 1
        params.n_outputs_max = self.n_outputs
        params.n_outputs_max_per_seq = 1
        params.n_threads = params.n_threads_batch = n_threads
        params.kv_unified = params.swa_full = params.no_perf = True
        if self._projections:
            self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)  # lives as long as the context
            params.cb_eval = self._callback
        with _quiet():
            self._handle = llama_cpp.llama_init_from_model(self._model, params)
        if not self._handle:
            raise ModelError(f"{self.path}: llama.cpp cannot make a context of {n_ctx} tokens")

    def _apply_adapter(self, file: Path) -> None:
        load_core().check_adapter_metadata(os.fsencode(file))
        with _quiet() as log:
            adapter = llama_cpp.llama_adapter_lora_init(self._model, os.fsencode(file))
            if not adapter:
                raise ModelError(f"{file}: stock llama.cpp does not load this adapter on {self.path.name}{_why(log)}")
            pointers = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
            if llama_cpp.llama_set_adapters_lora(self._handle, pointers, 1, (ctypes.c_float * 1)(1.0)) != 0:
                raise ModelError(f"{file}: stock llama.cpp does not apply this adapter")

    def _apply_control_vector(self, rows: NDArray[np.float32]) -> None:
        """rows (n_layer, n_embd), of which row 0 cannot act, as `--control-vector` does at scale 1."""
        if rows.shape != (self.n_layer, self.n_embd):
            raise VectorError(f"a control vector for this model is {(self.n_layer, self.n_embd)}, not {rows.shape}")
        data = np.ascontiguousarray(rows[1:], np.float32)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        last = self.n_layer - 1
        with _quiet():
            if llama_cpp.llama_set_adapter_cvec(self._handle, pointer, data.size, self.n_embd, 1, last) != 0:
                raise VectorError("stock llama.cpp does not take this control vector")

    def _on_node(self, node: int, asks: bool, _: Any) -> bool:
        if self._failed is not None:
            return not asks
        try:
            return self._project(node, asks)
        except BaseException as e:  # none may cross llama.cpp's frames: raised again behind the decode
            self._failed = e
            return False

    def _project(self, node: int, asks: bool) -> bool:
        name = _ggml().ggml_get_name(node).decode("utf-8", "replace")
        block = name.removeprefix("l_out-")
        if block == name or not block.isdigit() or int(block) not in self._projections:
            return not asks
        if not asks:
            rows = np.empty((_ggml().ggml_nbytes(node) // (4 * self.n_embd), self.n_embd), np.float32)
            _ggml().ggml_backend_tensor_get(node, rows.ctypes.data, 0, rows.nbytes)
            parts = [alpha * np.outer(rows @ d, d) for alpha, d in self._projections[int(block)]]
            rows -= np.sum(parts, axis=0).astype(np.float32)
            _ggml().ggml_backend_tensor_set(node, rows.ctypes.data, 0, rows.nbytes)
        return True

    def logits(self, tokens: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        """(len(tokens) - first, n_vocab) of a text from its first-th token on, in the decodes that the engine makes."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._handle), False)
        out = np.empty((len(tokens) - first, self.n_vocab), np.float32)
        done = 0
        while done < len(tokens):
            end = min(len(tokens), done + self.n_batch)
            end = min(end, max(done, first) + self.n_outputs)
            self._decode(tokens, done, end, first, out)
            done = end
        return out

    def _decode(self, tokens: Sequence[int], begin: int, end: int, first: int, out: NDArray[np.float32]) -> None:
        n = end - begin
        sequence = ctypes.c_int32(0)
        batch = llama_cpp.llama_batch()
        batch.n_tokens = n
        batch.token = (ctypes.c_int32 * n)(*tokens[begin:end])
        batch.pos = (ctypes.c_int32 * n)(*range(begin, end))
        batch.n_seq_id = (ctypes.c_int32 * n)(*[1] * n)
        batch.seq_id = (ctypes.POINTER(ctypes.c_int32) * n)(*[ctypes.pointer(sequence)] * n)
        batch.logits = (ctypes.c_int8 * n)(*[int(i >= first) for i in range(begin, end)])
        with _quiet() as log:
            code = llama_cpp.llama_decode(self._handle, batch)
            if self._failed is not None:
                raise self._failed
            if code != 0:
                raise ModelError(f"{self.path}: llama.cpp does not compute {end} tokens{_why(log)}")
            llama_cpp.llama_synchronize(self._handle)
        for i in range(max(begin, first), end):
            row = llama_cpp.llama_get_logits_ith(self._handle, i - begin)
            out[i - first] = np.ctypeslib.as_array(row, (self.n_vocab,))

    def close(self) -> None:
        """Free the context and the model."""
        with _quiet():
            if self._handle:
                llama_cpp.llama_free(self._handle)
            if self._model:
                llama_cpp.llama_model_free(self._model)
        self._handle = self._model = None

    def __enter__(self) -> PlainModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self.close()


@functools.cache
def _ggml() -> Any:
    """The functions of ggml that llama-cpp-python does not name; libllama's handle finds them."""
    lib = llama_cpp.llama_cpp._lib
    lib.ggml_get_name.restype, lib.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    lib.ggml_nbytes.restype, lib.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    for copy in (lib.ggml_backend_tensor_get, lib.ggml_backend_tensor_set):
        copy.restype, copy.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    return lib


def _quiet() -> Any:
    return load_core().LogCapture()


def _why(log: Any) -> str:
    said = log.errors().decode("utf-8", "replace")
    return f" ({said})" if said else ""
