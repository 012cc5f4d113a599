"""Other quantizations of a model file, by llama.cpp's own quantizer, and what is in them really.

    python benchmarks/requantize.py SOURCE KIND OUT

KIND is a name of llama.cpp's: F32, Q8_0, Q5_1, IQ4_NL, Q4_K_M ... Prints the types of the tensors, the bits per weight
and the size. The weights of the source are taken as they are, so the result is quantized twice where the source is
quantized: good for comparing quantizations of the same weights, not for shipping.
"""

from __future__ import annotations

import argparse
import ctypes
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

# llama.cpp's numbers of file types; it has names for them only in the other direction, inside of descriptions
KINDS = {
    name.removeprefix("LLAMA_FTYPE_MOSTLY_").removeprefix("LLAMA_FTYPE_ALL_"): value
    for name, value in vars(llama_cpp).items()
    if name.startswith(("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")) and isinstance(value, int)
}


def requantize(source: str | os.PathLike[str], target: str | os.PathLike[str], kind: str) -> Path:
    """Write the source's weights as another quantization; an unknown kind or a bad source raises ValueError.

    llama.cpp dequantizes each tensor to float32 and quantizes it anew, so that a quantized source and its dequantized
    copy give the same bytes; but a tensor that has its type already is copied, with no loss, which is why the quantized
    file is the better source. Where a type does not divide a matrix's rows, llama.cpp takes another: see tensor_types.
    """
    source, target = Path(source), Path(target)
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(sorted(KINDS))}")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the source itself: it would be overwritten while it is read")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = KINDS[kind]
    params.allow_requantize = True
    partial = target.with_name(target.name + ".partial")  # a file that bears its name is whole
    try:
        with _messages() as messages:
            code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(params))
        if code != 0:
            last = "".join(messages).strip().rpartition("\n")[2]
            raise ValueError(f"llama.cpp cannot make {kind} of {source}: {last}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def dequantize(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write a copy whose tensors are all float32, by gguf's dequantization; llama.cpp's kind F32 agrees to rounding."""
    reader = gguf.GGUFReader(source)
    return _write_f32(reader, target, {t.name: weights_of(t) for t in reader.tensors}, {})


SUPERBLOCK = 256  # weights that share the scales of a K-quant


def widen(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write a float32 copy of a llama whose rows are multiples of 256 long, so that K-quants fit: the same function of
    the tokens up to rounding, with zeros for the new dimensions, heads and neurons.

    A norm over E numbers and E' - E zeros is sqrt(E / E') of the norm over E: its weights are scaled by that, and its
    epsilon by E / E'. New heads join the groups of the old key-value heads, which keep theirs.

    Raises ValueError for another architecture than llama, and for one with biases or rope factors.
    """
    reader = gguf.GGUFReader(source)
    odd = [t.name for t in reader.tensors if "bias" in t.name or t.name == "rope_freqs.weight"]
    if odd or reader.fields["general.architecture"].contents() != "llama":
        raise ValueError(f"{source}: only a llama without biases and rope factors can be widened")

    def number(key: str) -> int:
        return int(reader.fields[f"llama.{key}"].contents())

    n_embd, n_ff = number("embedding_length"), number("feed_forward_length")
    n_head, n_kv = number("attention.head_count"), number("attention.head_count_kv")
    head, group = n_embd // n_head, n_head // n_kv
    wide_embd, wide_ff = (-(-n // SUPERBLOCK) * SUPERBLOCK for n in (n_embd, n_ff))
    wide_group = next(g for g in range(group, SUPERBLOCK + group) if n_kv * g * head % SUPERBLOCK == 0)

    def heads(weights: np.ndarray) -> np.ndarray:
        """Rows by key-value head, query head and number in the head, with the new heads' zeros."""
        by_group = weights.reshape(n_kv, group, head, -1)
        return _padded(by_group, 1, wide_group).reshape(n_kv * wide_group * head, -1)

    tensors = {}
    for tensor in reader.tensors:
        weights = weights_of(tensor)
        if weights.ndim == 1:
            tensors[tensor.name] = _padded(weights * np.float32(np.sqrt(n_embd / wide_embd)), 0, wide_embd)
            continue
        part = tensor.name.split(".")[-2]
        if part == "attn_q":
            weights = heads(weights)
        elif part == "attn_output":
            weights = heads(weights.T).T
        elif part in ("ffn_gate", "ffn_up"):
            weights = _padded(weights, 0, wide_ff)
        elif part == "ffn_down":
            weights = _padded(weights, 1, wide_ff)
        writes = part in ("attn_output", "ffn_down")
        tensors[tensor.name] = np.ascontiguousarray(_padded(weights, 0 if writes else 1, wide_embd))
    epsilon = float(reader.fields["llama.attention.layer_norm_rms_epsilon"].contents())
    values = {
        "embedding_length": wide_embd,
        "feed_forward_length": wide_ff,
        "attention.head_count": n_kv * wide_group,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": epsilon * n_embd / wide_embd,
    }
    return _write_f32(reader, target, tensors, {f"llama.{key}": value for key, value in values.items()})


def _padded(weights: np.ndarray, axis: int, n: int) -> np.ndarray:
    widths = [(0, n - size if k == axis else 0) for k, size in enumerate(weights.shape)]
    return np.pad(weights, widths)


def _write_f32(
    reader: gguf.GGUFReader,
    target: str | os.PathLike[str],
    tensors: dict[str, np.ndarray],
    values: dict[str, int | float],
) -> Path:
    """A file of float32 tensors with the reader's key-values, but for `values`."""
    values = {"general.file_type": 0} | values  # 0: all float32
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    partial = f"{os.fspath(target)}.partial"
    writer = gguf.GGUFWriter(partial, fields["general.architecture"].contents())
    for name, field in fields.items():
        if name == "general.architecture":  # the writer has put it there
            continue
        kind, *inner = field.types
        writer.add_key_value(name, values.pop(name, field.contents()), kind, inner[-1] if inner else None)
    for name, value in values.items():
        if name != "general.file_type":
            writer.add_uint32(name, int(value))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(partial).replace(target)


def weights_of(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Float32 weights of a tensor, shaped (rows, columns) as NumPy and PyTorch have it."""
    shape = [int(n) for n in reversed(tensor.shape)]
    weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return np.ascontiguousarray(weights, np.float32).reshape(shape)


def tensor_types(path: str | os.PathLike[str]) -> Counter[str]:
    """How many matrices have which type. Norms and other vectors, which stay float32 everywhere, are left out."""
    return Counter(t.tensor_type.name for t in _matrices(path))


def bits_per_weight(path: str | os.PathLike[str]) -> float:
    """Bits of all tensors over their weights, the matrices in all their types and the vectors too."""
    tensors = gguf.GGUFReader(path).tensors
    return 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)


def _matrices(path: str | os.PathLike[str]) -> list[gguf.ReaderTensor]:
    return [t for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1]


@contextmanager
def _messages() -> Iterator[list[str]]:
    """llama.cpp's log, kept instead of printed: every tensor is a line."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, data: object) -> None:
        lines.append(text.decode("utf-8", "replace"))

    previous, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(previous), ctypes.byref(data))
    llama_cpp.llama_log_set(keep, None)
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(previous, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a GGUF file")
    parser.add_argument("kind", choices=sorted(KINDS), metavar="KIND", help=", ".join(sorted(KINDS)))
    parser.add_argument("out", help="the file to write")
    args = parser.parse_args()
    path = requantize(args.source, args.out, args.kind)
    types = ", ".join(f"{n} {name}" for name, n in tensor_types(path).most_common())
    print(f"{path}: {types}; {bits_per_weight(path):.2f} bits per weight, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
