"""A GGUF model in transformers: float32, its weights dequantized, its blocks within reach."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from personasteer.engine import Request
from personasteer.errors import ModelError
from personasteer.extras import need
from personasteer.model import Model
from personasteer.recalibrate.adapters import gguf_name, read_adapter
from personasteer.ship.rewrite import ModelFile
from personasteer.traits import neutral_pairs

N_CHECKED = 96  # tokens
LEAST_COSINE = 0.98  # of the two models' logits: quantized products round, another model is far off


def libraries(purpose: str = "fine-tuning needs") -> tuple[Any, Any, Any]:
    """(torch, transformers, peft). Raises ArgumentError where one is missing."""
    torch, transformers, peft = need(purpose, "train", "torch", "transformers", "peft")
    return torch, transformers, peft


def load_float32(path: str | os.PathLike[str], lora: Sequence[tuple[str | os.PathLike[str], float]] = ()) -> Any:
    """The model of a GGUF file, with the LoRA adapters merged in.

    Raises:
        ArgumentError: torch, transformers or peft is missing.
        ModelError: transformers does not read GGUF files of this architecture, or the adapter does not fit.
    """
    torch, transformers, _ = libraries()
    file = ModelFile(path)
    try:
        with _quiet(transformers):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(file.path.parent.resolve()), gguf_file=file.path.name, dtype=torch.float32, local_files_only=True
            )
    except (ValueError, KeyError, RuntimeError, OSError, NotImplementedError) as e:
        reason = str(e).split("\n")[0]
        raise ModelError(
            f"{file.path}: transformers cannot load it for training (architecture {file.architecture!r}: {reason})"
        ) from e
    if hasattr(model, "hf_quantizer"):  # it was dequantized: PEFT must not take it for a quantized one
        model.hf_quantizer = None
    model.config.quantization_config = None
    del model.config.quantization_config
    for adapter, scale in lora:
        _merge(model, file, Path(adapter), scale, torch)
    return model.eval()


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bars and no advice on stderr; the caller has its own."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # tqdm's own of the conversion
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _merge(model: Any, file: ModelFile, adapter: Path, scale: float, torch: Any) -> None:
    found = read_adapter(adapter, file)
    parameters = dict(model.named_parameters())
    names = {gguf_name(file, name.removesuffix(".weight")): name for name in parameters if name.endswith(".weight")}
    with torch.no_grad():
        for tensor, (a, b) in found.factors.items():
            parameter = parameters.get(names.get(tensor.removesuffix(".weight"), ""))
            if parameter is None:
                raise ModelError(f"{adapter}: edits {tensor}, which is no matrix of the model in transformers")
            change = scale * found.scale * (b @ a)
            if ".attn_q." in tensor or ".attn_k." in tensor:
                change = _in_halves(change, file, tensor)
            if change.shape != tuple(parameter.shape):
                raise ModelError(f"{adapter}: {tensor} is {change.shape}, the model's {tuple(parameter.shape)}")
            parameter += torch.from_numpy(np.ascontiguousarray(change, np.float32))


def _in_halves(change: np.ndarray, file: ModelFile, tensor: str) -> np.ndarray:
    """Rows as transformers orders them: llama.cpp rotates neighbours of a head, transformers its two halves."""
    if file.architecture != "llama":
        return change
    n_head = file.hyperparameter("attention.head_count" if ".attn_q." in tensor else "attention.head_count_kv")
    rows, columns = change.shape
    return change.reshape(n_head, rows // n_head // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def blocks_of(model: Any) -> Any:
    """The transformer blocks, in their order."""
    decoder = model.get_decoder()
    return decoder.layers


def check_same(model: Model, torch_model: Any) -> float:
    """The mean cosine of both models' logits (centred) on an everyday pair.

    Raises ModelError where they are not the same model: transformers reads files of some architectures wrongly.
    """
    torch, _, _ = libraries()
    question, answer = neutral_pairs()[0]
    tokens = model.pair_tokens(question, answer)[0][: min(N_CHECKED, model.n_ctx)]
    request = Request(tokens, len(tokens), outputs=(0, len(tokens)), keep_logits=True)
    expected = model.run_alone([request])[0]["logits"]
    device = next(torch_model.parameters()).device
    with torch.no_grad():
        got = torch_model(torch.tensor([tokens], device=device)).logits[0].float().cpu().numpy()
    cosine = float(np.mean(logit_cosines(expected, got)))
    if not cosine >= LEAST_COSINE:
        raise ModelError(
            f"{model.path}: transformers computes something else from it than llama.cpp does (cosine of the logits "
            f"{cosine:.3f}, at least {LEAST_COSINE} expected): a LoRA trained there would not fit"
        )
    return cosine


def logit_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) cosines of rows of logits (n, n_vocab), each less its mean: a constant changes no probability."""
    n = min(a.shape[1], b.shape[1])  # transformers may pad the vocabulary
    x, y = (m[:, :n].astype(np.float64) - m[:, :n].mean(axis=1, keepdims=True, dtype=np.float64) for m in (a, b))
    out: np.ndarray = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return out


def device_of(model: Model) -> Any:
    """Where to train: a GPU if there is one, and the model was not kept off it."""
    torch, _, _ = libraries()
    return torch.device("cuda" if model.options.get("n_gpu_layers", -1) != 0 and torch.cuda.is_available() else "cpu")
