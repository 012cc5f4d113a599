"""Random models of other architectures than a llama: recurrent, hybrid, with sliding windows or value biases, with a
scaled residual, without block labels.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from personasteer.tiny_model import TEMPLATE

N_LAYER, N_EMBD, N_FF, N_HEAD = 4, 64, 128, 4
WINDOW = 8  # tokens that the sliding-window blocks look back on, the current one included


class _Writer(gguf.GGUFWriter):
    """A file with the sizes and the byte tokenizer that all of them share; the same seed gives the same bytes."""

    def __init__(self, path: str | Path, architecture: str, seed: int) -> None:
        super().__init__(str(path), architecture)
        self.file = Path(path)
        self.rng = np.random.default_rng(seed)
        self.add_name(f"tiny-random-{architecture}")
        self.add_context_length(4096)
        self.add_embedding_length(N_EMBD)
        self.add_block_count(N_LAYER)
        self.add_layer_norm_rms_eps(1e-5)
        tokens = [b"<unk>", b"<s>", b"</s>"]
        tokens += [f"<0x{b:02X}>".encode() for b in range(256)]
        tokens += ["▁".encode()] + [chr(c).encode() for c in range(ord("a"), ord("z") + 1)]
        types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
        types += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * 27
        self.n_vocab = len(tokens)
        self.add_vocab_size(self.n_vocab)
        self.add_tokenizer_model("llama")
        self.add_token_list(tokens)
        self.add_token_scores([-float(i) for i in range(self.n_vocab)])
        self.add_token_types(types)
        self.add_bos_token_id(1)
        self.add_eos_token_id(2)
        self.add_add_bos_token(True)

    def matrix(self, name: str, *shape: int) -> None:
        """Random weights that keep the size of their input, whose width is the last number of the shape."""
        weights = self.rng.standard_normal(shape) / np.sqrt(shape[-1])
        self.add_tensor(f"{name}.weight", weights.astype(np.float32))

    def constant(self, name: str, values: np.ndarray | float, *shape: int) -> None:
        """Chosen weights, repeated to the shape."""
        self.add_tensor(name, np.array(np.broadcast_to(values, shape), np.float32))

    def norm(self, name: str, n: int = N_EMBD) -> None:
        """A norm that scales nothing."""
        self.constant(f"{name}.weight", 1.0, n)

    def attention(self, block: str) -> None:
        """The four matrices of an attention with as many key as query heads."""
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            self.matrix(f"{block}.{name}", N_EMBD, N_EMBD)

    def feed_forward(self, block: str) -> None:
        """The three matrices of a gated feed-forward."""
        self.matrix(f"{block}.ffn_gate", N_FF, N_EMBD)
        self.matrix(f"{block}.ffn_up", N_FF, N_EMBD)
        self.matrix(f"{block}.ffn_down", N_EMBD, N_FF)

    def finish(self) -> Path:
        """Write everything."""
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()
        return self.file


def write_recurrent_model(path: str | Path, *, seed: int = 0) -> Path:
    """Write a mamba: no attention at all, a state of 16 numbers per channel."""
    w = _Writer(path, "mamba", seed)
    n_inner, n_state, n_conv, n_rank = 2 * N_EMBD, 16, 4, 4
    w.add_feed_forward_length(0)
    w.add_head_count(0)
    w.add_ssm_inner_size(n_inner)
    w.add_ssm_state_size(n_state)
    w.add_ssm_conv_kernel(n_conv)
    w.add_ssm_time_step_rank(n_rank)
    w.matrix("token_embd", w.n_vocab, N_EMBD)
    steps = np.geomspace(0.02, 0.5, n_inner)  # from channels that remember the whole text to some that forget fast
    for il in range(N_LAYER):
        block = f"blk.{il}"
        w.norm(f"{block}.attn_norm")
        w.matrix(f"{block}.ssm_in", 2 * n_inner, N_EMBD)
        w.matrix(f"{block}.ssm_conv1d", n_inner, n_conv)
        w.constant(f"{block}.ssm_conv1d.bias", 0.0, n_inner)
        w.matrix(f"{block}.ssm_x", n_rank + 2 * n_state, n_inner)
        w.matrix(f"{block}.ssm_dt", n_inner, n_rank)
        w.constant(f"{block}.ssm_dt.bias", np.log(np.expm1(steps)), n_inner)  # softplus gives the steps back
        w.constant(f"{block}.ssm_a", -np.arange(1.0, n_state + 1), n_inner, n_state)
        w.constant(f"{block}.ssm_d", 1.0, n_inner)
        w.matrix(f"{block}.ssm_out", N_EMBD, n_inner)
    w.norm("output_norm")
    w.matrix("output", w.n_vocab, N_EMBD)
    return w.finish()


def write_hybrid_model(path: str | Path, *, seed: int = 0) -> Path:
    """Write an lfm2: short convolutions in the even blocks, attention in the odd ones."""
    w = _Writer(path, "lfm2", seed)
    n_conv, head = 3, N_EMBD // N_HEAD
    w.add_feed_forward_length(N_FF)
    w.add_head_count(N_HEAD)
    w.add_head_count_kv([N_HEAD if il % 2 else 0 for il in range(N_LAYER)])  # 0 heads: a convolution
    w.add_shortconv_l_cache(n_conv)
    w.matrix("token_embd", w.n_vocab, N_EMBD)
    for il in range(N_LAYER):
        block = f"blk.{il}"
        w.norm(f"{block}.attn_norm")
        w.norm(f"{block}.ffn_norm")
        if il % 2:
            w.attention(block)
            w.norm(f"{block}.attn_q_norm", head)
            w.norm(f"{block}.attn_k_norm", head)
        else:
            w.matrix(f"{block}.shortconv.conv", N_EMBD, n_conv)
            w.matrix(f"{block}.shortconv.in_proj", 3 * N_EMBD, N_EMBD)
            w.matrix(f"{block}.shortconv.out_proj", N_EMBD, N_EMBD)
        w.feed_forward(block)
    w.norm("token_embd_norm")  # lfm2's name for the last norm
    w.matrix("output", w.n_vocab, N_EMBD)
    return w.finish()


def write_sliding_window_model(path: str | Path, *, seed: int = 0) -> Path:
    """Write a gemma2: the even blocks see the last 8 tokens, the odd ones all of them."""
    w = _Writer(path, "gemma2", seed)
    head = N_EMBD // N_HEAD
    w.add_feed_forward_length(N_FF)
    w.add_head_count(N_HEAD)
    w.add_head_count_kv(N_HEAD)
    w.add_key_length(head)
    w.add_value_length(head)
    w.add_sliding_window(WINDOW)
    w.matrix("token_embd", w.n_vocab, N_EMBD)  # the output matrix too
    for il in range(N_LAYER):
        block = f"blk.{il}"
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            w.norm(f"{block}.{norm}")
        w.attention(block)
        w.feed_forward(block)
    w.norm("output_norm")
    return w.finish()


def write_granite_model(path: str | Path, residual_scale: float = 0.5, *, seed: int = 0) -> Path:
    """Write a granite: a llama whose attention and feed-forward are scaled before they are added."""
    w = _Writer(path, "granite", seed)
    w.add_feed_forward_length(N_FF)
    w.add_head_count(N_HEAD)
    w.add_head_count_kv(N_HEAD)
    w.add_rope_dimension_count(N_EMBD // N_HEAD)
    w.add_logit_scale(1.0)
    w.add_residual_scale(residual_scale)
    w.add_embedding_scale(1.0)
    w.add_attention_scale(0.25)
    w.matrix("token_embd", w.n_vocab, N_EMBD)
    for il in range(N_LAYER):
        block = f"blk.{il}"
        w.norm(f"{block}.attn_norm")
        w.norm(f"{block}.ffn_norm")
        w.attention(block)
        w.feed_forward(block)
    w.norm("output_norm")
    w.matrix("output", w.n_vocab, N_EMBD)
    return w.finish()


def write_qwen_model(path: str | Path, architecture: str = "qwen2", *, seed: int = 0) -> Path:
    """Write a qwen2 (with value biases) or a qwen3 (without): no bias at a block's end, two key-value heads."""
    w = _Writer(path, architecture, seed)
    head, n_kv = N_EMBD // N_HEAD, 2
    w.add_feed_forward_length(N_FF)
    w.add_head_count(N_HEAD)
    w.add_head_count_kv(n_kv)
    w.add_rope_dimension_count(head)
    w.add_chat_template(TEMPLATE)
    if architecture == "qwen3":
        w.add_key_length(head)
        w.add_value_length(head)
    w.matrix("token_embd", w.n_vocab, N_EMBD)
    for il in range(N_LAYER):
        block = f"blk.{il}"
        w.norm(f"{block}.attn_norm")
        w.norm(f"{block}.ffn_norm")
        for name, rows in (("attn_q", N_EMBD), ("attn_k", n_kv * head), ("attn_v", n_kv * head)):
            w.matrix(f"{block}.{name}", rows, N_EMBD)
            if architecture == "qwen2":
                w.add_tensor(f"{block}.{name}.bias", (0.1 * w.rng.standard_normal(rows)).astype(np.float32))
        w.matrix(f"{block}.attn_output", N_EMBD, N_EMBD)
        if architecture == "qwen3":
            w.norm(f"{block}.attn_q_norm", head)
            w.norm(f"{block}.attn_k_norm", head)
        w.feed_forward(block)
    w.norm("output_norm")
    w.matrix("output", w.n_vocab, N_EMBD)
    return w.finish()


def write_unlabelled_model(path: str | Path, *, seed: int = 0) -> Path:
    """Write a deepseek4: four residual streams, no `l_out-<il>` in the graph, control vectors work."""
    w = _Writer(path, "deepseek4", seed)
    head, n_rank, n_expert, n_group, n_stream = N_EMBD // N_HEAD, 32, 2, 2, 4
    ratios = [0] * (N_LAYER - 1) + [4]  # 0: plain attention; llama.cpp divides by zero without any 4
    n_index = 64  # the smallest width that the indexer's rotation takes
    n_mix = (2 + n_stream) * n_stream
    n_wide = n_stream * N_EMBD
    w.add_head_count(N_HEAD)
    w.add_head_count_kv(1)
    w.add_key_length(head)
    w.add_value_length(head)
    w.add_rope_dimension_count(head // 2)
    w.add_q_lora_rank(n_rank)
    w.add_sliding_window(128)
    w.add_expert_count(n_expert)
    w.add_expert_used_count(n_expert)
    w.add_expert_feed_forward_length(N_FF // 2)
    w.add_expert_shared_count(1)
    w.add_expert_weights_scale(1.0)
    w.add_expert_weights_norm(True)
    for key, value in {
        "expert_gating_func": 4,  # the root of a softplus, the only one it takes
        "attention.indexer.head_count": 1,
        "attention.indexer.key_length": n_index,
        "attention.indexer.top_k": 8,
        "attention.output_group_count": n_group,
        "attention.output_lora_rank": n_rank // n_group,
        "hyper_connection.count": n_stream,
        "hyper_connection.sinkhorn_iterations": 4,
        "hash_layer_count": 0,
    }.items():
        w.add_uint32(f"deepseek4.{key}", value)
    w.add_float32("deepseek4.hyper_connection.epsilon", 1e-6)
    w.add_float32("deepseek4.attention.compress_rope_freq_base", 10000.0)
    w.add_array("deepseek4.attention.compress_ratios", ratios)
    w.add_array("deepseek4.swiglu_clamp_exp", [0.0] * N_LAYER)  # 0: no clamp
    w.matrix("token_embd", w.n_vocab, N_EMBD)
    for il in range(N_LAYER):
        block = f"blk.{il}"
        w.norm(f"{block}.attn_norm")
        w.constant(f"{block}.attn_sinks.weight", 0.0, N_HEAD)
        w.matrix(f"{block}.attn_q_a", n_rank, N_EMBD)
        w.norm(f"{block}.attn_q_a_norm", n_rank)
        w.matrix(f"{block}.attn_q_b", N_EMBD, n_rank)
        w.matrix(f"{block}.attn_kv", head, N_EMBD)
        w.norm(f"{block}.attn_kv_a_norm", head)
        w.matrix(f"{block}.attn_output_a", n_rank, N_EMBD // n_group)
        w.matrix(f"{block}.attn_output_b", N_EMBD, n_rank)
        if ratios[il]:
            for prefix, width in (("attn", head), ("indexer", n_index)):
                w.matrix(f"{block}.{prefix}_compressor_kv", 2 * width, N_EMBD)
                w.matrix(f"{block}.{prefix}_compressor_gate", 2 * width, N_EMBD)
                w.matrix(f"{block}.{prefix}_compressor_ape", ratios[il], 2 * width)
                w.norm(f"{block}.{prefix}_compressor_norm", width)
            w.matrix(f"{block}.indexer.proj", 1, N_EMBD)
            w.matrix(f"{block}.indexer.attn_q_b", n_index, n_rank)
        for part in ("attn", "ffn"):
            w.matrix(f"{block}.hc_{part}_fn", n_mix, n_wide)
            w.constant(f"{block}.hc_{part}_base.weight", 0.0, n_mix)
            w.constant(f"{block}.hc_{part}_scale.weight", 1.0, 3)
        w.norm(f"{block}.ffn_norm")
        w.matrix(f"{block}.ffn_gate_inp", n_expert, N_EMBD)
        w.constant(f"{block}.exp_probs_b.bias", 0.0, n_expert)
        for name, *shape in (("gate", N_FF // 2, N_EMBD), ("up", N_FF // 2, N_EMBD), ("down", N_EMBD, N_FF // 2)):
            w.matrix(f"{block}.ffn_{name}_exps", n_expert, *shape)
            w.matrix(f"{block}.ffn_{name}_shexp", *shape)
    w.norm("output_norm")
    w.matrix("output_hc_fn", n_stream, n_wide)
    w.constant("output_hc_base.weight", 0.0, n_stream)
    w.constant("output_hc_scale.weight", 1.0, 1)
    w.matrix("output", w.n_vocab, N_EMBD)
    return w.finish()
