"""A random llama of under a megabyte, written in a few milliseconds: for probing a build and for tests."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tiny_model(
    path: str | Path,
    *,
    n_layer: int = 4,
    n_embd: int = 64,
    n_ctx: int = 4096,
    seed: int = 0,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    chat_template: str | None = TEMPLATE,
    tokenizer: bool = True,
) -> Path:
    """Write a llama with random weights: a byte tokenizer of 286 tokens, 4 heads, a feed-forward twice as wide.

    The same arguments give the same bytes.
    """
    rng = np.random.default_rng(seed)
    tokens = [b"<unk>", b"<s>", b"</s>"]
    tokens += [f"<0x{b:02X}>".encode() for b in range(256)]
    tokens += ["▁".encode()] + [chr(c).encode() for c in range(ord("a"), ord("z") + 1)]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    types += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * 27
    n_ff, n_head, n_vocab = 2 * n_embd, 4, len(tokens)

    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name("tiny-random")
    w.add_context_length(n_ctx)
    w.add_embedding_length(n_embd)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(n_head)
    w.add_head_count_kv(n_head)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(n_embd // n_head)
    w.add_vocab_size(n_vocab)
    if tokenizer:
        w.add_tokenizer_model("llama")
        w.add_token_list(tokens)
        w.add_token_scores([-float(i) for i in range(n_vocab)])
        w.add_token_types(types)
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
        w.add_add_bos_token(True)
    if chat_template is not None:
        w.add_chat_template(chat_template)

    def matrix(name: str, rows: int, columns: int) -> None:
        data = (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        if quantization != gguf.GGMLQuantizationType.F32:
            w.add_tensor(name, gguf.quants.quantize(data, quantization), raw_dtype=quantization)
        else:
            w.add_tensor(name, data)

    matrix("token_embd.weight", n_vocab, n_embd)
    for il in range(n_layer):
        for norm in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{il}.{norm}.weight", np.ones(n_embd, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{il}.{name}.weight", n_embd, n_embd)
        matrix(f"blk.{il}.ffn_gate.weight", n_ff, n_embd)
        matrix(f"blk.{il}.ffn_up.weight", n_ff, n_embd)
        matrix(f"blk.{il}.ffn_down.weight", n_embd, n_ff)
    w.add_tensor("output_norm.weight", np.ones(n_embd, np.float32))
    matrix("output.weight", n_vocab, n_embd)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return Path(path)
