"""Plain llama.cpp through llama-cpp-python's ctypes API: what the extension's results are compared with.

Nothing of personasteer is used here. The context parameters repeat those of csrc/session.cpp, and `batches` repeats
its batch layout, so that both sides compute the same shapes in the same order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

# libllama's handle also finds the symbols of the libraries that it needs. Loading libggml-base by its path could map
# a second copy: the wheel holds each library three times, as files and not as links.
ggml = llama_cpp.llama_cpp._lib
ggml.ggml_get_name.restype = ctypes.c_char_p
ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
ggml.ggml_nbytes.restype = ctypes.c_size_t
ggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
ggml.ggml_backend_tensor_get.restype = None
ggml.ggml_backend_tensor_set.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
ggml.ggml_backend_tensor_set.restype = None

Span = tuple[int, int]


def batches(requests: Sequence[tuple[int, Span]], n_batch: int, n_outputs: int) -> list[list[tuple[int, int, bool]]]:
    """The decodes that a session makes of texts (n_tokens, outputs): lists of (sequence, index, has an output row).

    Contiguous by sequence, ascending; at most n_batch tokens and n_outputs output rows a decode.
    """
    done = [0] * len(requests)
    out = []
    while any(done[q] < n for q, (n, _) in enumerate(requests)):
        batch = []
        rows = n_outputs
        for q, (n, (begin, end)) in enumerate(requests):
            while done[q] < n and len(batch) < n_batch:
                output = begin <= done[q] < end
                if output and rows == 0:
                    break
                rows -= output
                batch.append((q, done[q], output))
                done[q] += 1
        out.append(batch)
    return out


class PlainModel:
    """A llama_model loaded with the parameters of csrc/model.cpp."""

    def __init__(self, path: str | Path, *, use_extra_bufts: bool = True) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        params.use_extra_bufts = use_extra_bufts
        self.handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.n_layer = llama_cpp.llama_model_n_layer(self.handle)
        self.n_embd = llama_cpp.llama_model_n_embd(self.handle)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.handle))

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            llama_cpp.llama_model_free(self.handle)


class PlainContext:
    """A llama_context without any hook. With `watch`, a cb_eval callback copies (and may edit) the block outputs."""

    def __init__(
        self, model: PlainModel, *, n_ctx: int, n_parallel: int, n_batch: int, n_threads: int, n_outputs: int,
        watch: bool = False,
    ) -> None:  # fmt: skip
        self.model = model
        self.n_batch = min(n_batch, n_ctx * n_parallel)
        self.n_outputs = max(n_outputs, n_parallel)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx * n_parallel
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_seq_max = n_parallel
        params.n_outputs_max = self.n_outputs
        params.n_outputs_max_per_seq = 1
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        params.kv_unified = True
        params.swa_full = True
        params.no_perf = True
        if watch:
            self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)  # kept alive with the context
            params.cb_eval = self._callback
        self.states: dict[int, np.ndarray] = {}  # of the last decode: block -> (rows, n_embd)
        self.edits: dict[int, np.ndarray] = {}  # of the next decode: block -> (rows, n_embd), added in place
        self.replaces = False  # the edits are put in the rows' place instead; NaN leaves a number as it is
        self.handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise RuntimeError("llama.cpp cannot make a context")

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            llama_cpp.llama_free(self.handle)
            self.handle = None

    def _on_node(self, tensor: int, ask: bool, _: int) -> bool:
        name = ggml.ggml_get_name(tensor).decode()
        block = name.removeprefix("l_out-")
        if name == block or not block.isdigit():
            return not ask
        if not ask:
            rows = np.empty((ggml.ggml_nbytes(tensor) // (4 * self.model.n_embd), self.model.n_embd), np.float32)
            ggml.ggml_backend_tensor_get(tensor, rows.ctypes.data, 0, rows.nbytes)
            if int(block) in self.edits:
                edit = self.edits[int(block)]
                rows = np.where(np.isnan(edit), rows, edit) if self.replaces else rows + edit
                ggml.ggml_backend_tensor_set(tensor, rows.ctypes.data, 0, rows.nbytes)
            self.states[int(block)] = rows
        return True

    def reset(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.handle), False)

    def set_cvec(self, data: np.ndarray, il_start: int, il_end: int) -> None:
        """data (n_layer, n_embd): row il is added to l_out-il for il_start <= il <= il_end; row 0 cannot be used."""
        assert data.shape == (self.model.n_layer, self.model.n_embd)
        assert il_start >= 1
        rows = np.ascontiguousarray(data[1:], np.float32)  # all of them: llama.cpp keeps what a short buffer omits
        pointer = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        code = llama_cpp.llama_set_adapter_cvec(self.handle, pointer, rows.size, self.model.n_embd, il_start, il_end)
        assert code == 0

    def set_lora(self, adapters: Sequence[tuple[Path, float]]) -> None:
        """LoRA adapters, (file, scale) each."""
        handles = [llama_cpp.llama_adapter_lora_init(self.model.handle, str(file).encode()) for file, _ in adapters]
        assert all(handles)
        n = len(adapters)
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * n)(*handles)
        scales = (ctypes.c_float * n)(*[scale for _, scale in adapters])
        assert llama_cpp.llama_set_adapters_lora(self.handle, pointers, n, scales) == 0

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], seq_ids: Sequence[int], outputs: Sequence[bool]
    ) -> np.ndarray:
        """One llama_decode; the logits of the tokens with outputs, (n_outputs, n_vocab)."""
        n = len(tokens)
        seqs = (ctypes.c_int32 * n)(*seq_ids)
        pointers = (ctypes.POINTER(ctypes.c_int32) * n)()
        for i in range(n):
            pointers[i] = ctypes.cast(ctypes.byref(seqs, 4 * i), ctypes.POINTER(ctypes.c_int32))
        batch = llama_cpp.llama_batch()
        batch.n_tokens = n
        batch.token = (ctypes.c_int32 * n)(*tokens)
        batch.pos = (ctypes.c_int32 * n)(*positions)
        batch.n_seq_id = (ctypes.c_int32 * n)(*[1] * n)
        batch.seq_id = pointers
        batch.logits = (ctypes.c_int8 * n)(*map(int, outputs))
        self.states = {}
        code = llama_cpp.llama_decode(self.handle, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode: {code}")
        llama_cpp.llama_synchronize(self.handle)
        rows = [llama_cpp.llama_get_logits_ith(self.handle, i) for i in range(n) if outputs[i]]
        out = np.empty((len(rows), self.model.n_vocab), np.float32)
        for i, row in enumerate(rows):
            out[i] = np.ctypeslib.as_array(row, (self.model.n_vocab,))
        return out

    def compute(
        self, texts: Sequence[Sequence[int]], outputs: Sequence[Span], edits: Sequence[np.ndarray] | None = None
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Whole texts, each a sequence, in the decodes that a session makes of them.

        edits: per text (n_layer, n_tokens, n_embd), for the block outputs. Returns per text the logits of its
        output rows and the block outputs (n_layer, n_tokens, n_embd), NaN where a block has no row.
        """
        n_layer, n_embd = self.model.n_layer, self.model.n_embd
        logits: list[list[np.ndarray]] = [[] for _ in texts]
        states = [np.full((n_layer, len(t), n_embd), np.nan, np.float32) for t in texts]
        for batch in batches([(len(t), o) for t, o in zip(texts, outputs, strict=True)], self.n_batch, self.n_outputs):
            with_output = [item for item in batch if item[2]]
            if edits is not None:
                for il in range(n_layer):
                    items = with_output if il == n_layer - 1 else batch
                    rows = [edits[q][il, index] for q, index, _ in items]
                    self.edits[il] = np.array(rows, np.float32).reshape(-1, n_embd)
            rows = self.decode([texts[q][i] for q, i, _ in batch], [i for _, i, _ in batch], [q for q, _, _ in batch],
                               [output for _, _, output in batch])  # fmt: skip
            self.edits = {}
            for (q, _, _), row in zip(with_output, rows, strict=True):
                logits[q].append(row)
            for il, state in self.states.items():
                for (q, index, _), row in zip(with_output if il == n_layer - 1 else batch, state, strict=True):
                    states[q][il, index] = row
        return [np.array(rows, np.float32).reshape(-1, self.model.n_vocab) for rows in logits], states
