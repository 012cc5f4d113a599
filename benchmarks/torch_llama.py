"""The llama of a GGUF file in transformers: float32, its weights dequantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from requantize import weights_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def unpermute(weights: np.ndarray, n_head: int) -> np.ndarray:
    """llama.cpp rotates neighbouring numbers of a head, transformers the two halves: its files reorder q and k."""
    rows, columns = weights.shape
    return weights.reshape(n_head, rows // n_head // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def as_transformers(path: Path, *, attention: str = "eager") -> Any:
    """The llama of a GGUF file as a float32 LlamaForCausalLM, with its weights dequantized."""
    reader = gguf.GGUFReader(path)
    values = {name.removeprefix("llama."): f.contents() for name, f in reader.fields.items() if "llama." in name}
    weights = {t.name: weights_of(t) for t in reader.tensors}
    n_head, n_head_kv = values["attention.head_count"], values["attention.head_count_kv"]
    config = transformers.LlamaConfig(
        vocab_size=len(weights["token_embd.weight"]),
        hidden_size=values["embedding_length"],
        intermediate_size=values["feed_forward_length"],
        num_hidden_layers=values["block_count"],
        num_attention_heads=n_head,
        num_key_value_heads=n_head_kv,
        max_position_embeddings=values["context_length"],
        rms_norm_eps=values["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": values.get("rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in weights,
        attn_implementation=attention,
    )
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output" if "output.weight" in weights else "token_embd",
    }
    for il in range(values["block_count"]):
        for theirs, ours in {
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }.items():
            names[f"model.layers.{il}.{theirs}"] = f"blk.{il}.{ours}"
        for name, n in (("attn_q", n_head), ("attn_k", n_head_kv)):
            weights[f"blk.{il}.{name}.weight"] = unpermute(weights[f"blk.{il}.{name}.weight"], n)
    state = {f"{theirs}.weight": torch.tensor(weights[f"{ours}.weight"]) for theirs, ours in names.items()}
    model = transformers.LlamaForCausalLM(config).to(torch.float32).eval()
    model.load_state_dict(state, strict=True)
    return model


def tokenizer_of(path: Path) -> Any:
    """The byte-pair tokenizer of a GGUF file, as transformers has it."""
    reader = gguf.GGUFReader(path)
    values = {key: reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type")}
    tokens = values["tokens"]
    merges = [tuple(m.split(" ")) for m in values["merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, values["token_type"], strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in control])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=tokens[reader.fields["tokenizer.ggml.padding_token_id"].contents()],
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def padded(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of texts of different lengths, side by side."""
    longest = max(map(len, texts))
    ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in texts])
    return ids, torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in texts])
