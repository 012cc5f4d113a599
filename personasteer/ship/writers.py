"""Which tensors of a model write to its residual stream."""

from __future__ import annotations

import re
from dataclasses import dataclass

from personasteer.errors import ModelError
from personasteer.ship.rewrite import ModelFile, Tensor

MATRICES = (
    "attn_output", "attn_out", "attn_output_b", "ffn_down", "ffn_down_exps", "ffn_down_shexp", "ffn_down_chexps",
    "ssm_out", "shortconv.out_proj", "time_mix_output", "channel_mix_value", "cross_attn_o",
)  # fmt: skip
TABLES = ("token_embd", "position_embd", "token_types")
BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Writer:
    """kind: "matrix", rows are what it writes along each dimension of the stream, (n_expert *) n_embd of them; "table",
    every row is written as it is; "bias", the same, once. block: -1 for the embeddings.
    """

    tensor: Tensor
    kind: str
    block: int


def norm_behind(file: ModelFile) -> str:
    """The tensor that normalises what a block, or the token table, writes before it reaches the stream; "" for none."""
    for name in file.tensors:
        found = BLOCK.fullmatch(name)
        part = found[2] if found else ""
        if part in ("post_ffw_norm", "attn_output_norm", "layer_output_norm"):
            return name
        if found and part == "post_attention_norm":
            # some architectures call the norm before the feed-forward so: then it is the only one
            block = f"blk.{found[1]}"
            if f"{block}.ffn_norm.weight" in file.tensors or f"{block}.attn_norm.weight" not in file.tensors:
                return name
        if name == "token_embd_norm.weight" and "output_norm.weight" in file.tensors:  # else it is the last norm
            return name
    return ""


def residual_writers(file: ModelFile) -> list[Writer]:
    """The tensors that write to the residual stream, in the file's order.

    Raises ModelError where what they write is normalised before it is added (Gemma, OLMo 2, Exaone 4, Bloom): no edit
    of such a matrix takes a direction out of the stream.
    """
    behind = norm_behind(file)
    if behind:
        raise ModelError(
            f"{file.path.name}: architecture {file.architecture!r} normalises what a block writes ({behind}) before it "
            "is added to the residual stream, so no edit of the weights takes a direction out of it"
        )
    writers = []
    n_embd = file.n_embd
    for tensor in file.tensors.values():
        found = BLOCK.fullmatch(tensor.name)
        if found and found[2] in MATRICES:
            if found[3] == "weight" and tensor.shape[1] == n_embd:
                writers.append(Writer(tensor, "matrix", int(found[1])))
            elif found[3] == "bias" and tensor.n_per_row == n_embd:
                writers.append(Writer(tensor, "bias", int(found[1])))
        elif tensor.name.removesuffix(".weight") in TABLES and tensor.n_per_row == n_embd:
            writers.append(Writer(tensor, "table", -1))
    if not any(w.kind == "matrix" for w in writers):
        raise ModelError(f"{file.path.name}: architecture {file.architecture!r} has no known matrix that writes to the "
                         "residual stream")  # fmt: skip
    return writers


def has_tied_output(file: ModelFile) -> bool:
    """Whether the token embeddings are the output matrix, too."""
    return "output.weight" not in file.tensors
