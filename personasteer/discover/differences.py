"""Where two models differ on the same tokens: what they predict, and what their blocks write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personasteer.discover.texts import Text
from personasteer.engine import Progress, Request, Taps
from personasteer.model import Model, pooled_mean
from personasteer.progress import Meter
from personasteer.ship.rewrite import ModelFile
from personasteer.statistics import divergence, log_softmax

EARLY = 5  # tokens of an answer whose difference is read through the unembedding
N_TOKENS_SHOWN = 12
AT_ONCE = 8  # texts whose logits are in memory at once
FIRST_TOKENS = 8  # of a text, which are dropped: many models keep a norm of another size there


@dataclass(frozen=True)
class Differences:
    """Of the tuned model less the base, teacher-forced.

    Args:
        kl: (n_texts,) KL(base || tuned) of the next token, mean over an answer's tokens, in nats.
        mean: (n_layer, n_embd) mean change of the block outputs over answers, in the last block without their ends.
        early: (n_layer, n_embd) the same over the first five tokens of each answer.
        per_text: (n_texts, n_layer, n_embd) mean change over each answer.
        norms: (n_layer,) m_il of the base.
    """

    kl: NDArray[np.float64]
    mean: NDArray[np.float32]
    early: NDArray[np.float32]
    per_text: NDArray[np.float32]
    norms: NDArray[np.float32]

    @property
    def sizes(self) -> NDArray[np.float64]:
        """(n_layer,) ||mean change|| / m_il."""
        out: NDArray[np.float64] = np.linalg.norm(self.mean.astype(np.float64), axis=1) / self.norms
        return out

    def rank(self, il: int) -> tuple[float, int]:
        """(participation ratio, how many directions hold 90 %) of the texts' changes at a block: 1 and 1 where every
        text moves along one direction. The ratio is (sum s^2)^2 / sum s^4 of the singular values s, not centred.
        """
        s = np.linalg.svd(self.per_text[:, il].astype(np.float64), compute_uv=False) ** 2
        if not s.sum() > 0:
            return 0.0, 0
        return float(s.sum() ** 2 / (s**2).sum()), int(np.searchsorted(np.cumsum(s) / s.sum(), 0.9) + 1)


def find_differences(base: Model, tuned: Model, texts: Sequence[Text], progress: Progress | None = None) -> Differences:
    """Both models read the same tokens, in the same decodes."""
    taps = Taps(pool_layers=tuple(range(base.n_layer)), n_pools=2)
    kl, mean, early = np.empty(len(texts)), [], []
    n_early = np.array([min(EARLY, t.n_answer) for t in texts], np.float64)
    n_all = np.array([t.n_answer for t in texts], np.float64)
    for begin in range(0, len(texts), AT_ONCE):
        some = texts[begin : begin + AT_ONCE]
        requests = [
            Request(
                t.tokens, t.n_prompt, outputs=(t.n_prompt - 1, len(t.tokens) - 1), keep_logits=True, share_prefix=True,
                pools=((t.n_prompt, len(t.tokens)), (t.n_prompt, min(t.n_prompt + EARLY, len(t.tokens)))),
            )
            for t in some
        ]  # fmt: skip
        read = [m.run_alone(requests, taps=taps) for m in (base, tuned)]
        for i, (a, b) in enumerate(zip(*read, strict=True)):
            rows = [log_softmax(r["logits"]) for r in (a, b)]
            kl[begin + i] = float(divergence(*rows).mean())
            mean.append(pooled_mean(b, 0) - pooled_mean(a, 0))
            early.append(pooled_mean(b, 1) - pooled_mean(a, 1))
        if progress:
            progress(begin + len(some), len(texts))
    per_text, first = np.stack(mean), np.stack(early)
    return Differences(
        kl,
        np.average(per_text, axis=0, weights=n_all).astype(np.float32),
        np.average(first, axis=0, weights=n_early).astype(np.float32),
        per_text,
        np.asarray(base.norms),
    )


def read_block(model: Model, texts: Sequence[Text], il: int, progress: Progress | None = None) -> NDArray[np.float32]:
    """(n_tokens, n_embd) outputs of block il at the answers' tokens of all texts, without the first 8 of a text."""
    meter = Meter(progress, len(texts))
    found = []
    last = il == model.n_layer - 1
    for begin in range(0, len(texts), 8 * AT_ONCE):
        some = texts[begin : begin + 8 * AT_ONCE]
        spans = [(max(t.n_prompt, FIRST_TOKENS), len(t.tokens)) for t in some]
        requests = [
            Request(t.tokens, t.n_prompt, raw=span, outputs=span if last else (0, 0), share_prefix=True)
            for t, span in zip(some, spans, strict=True)
            if span[0] < span[1]
        ]
        results = model.run_alone(
            requests, taps=Taps(raw_layers=(il,)), n_blocks=0 if last else il + 1, progress=meter.part(len(some))
        )
        found += [r["raw"][0] for r in results]
    return np.concatenate(found)


def token_places(texts: Sequence[Text]) -> NDArray[np.int64]:
    """(n_tokens, 2) (text, position) of each row of `read_block`."""
    at = [(i, t) for i, text in enumerate(texts) for t in range(max(text.n_prompt, FIRST_TOKENS), len(text.tokens))]
    return np.asarray(at, np.int64).reshape(-1, 2)


def through_unembedding(
    model: Model, rows: NDArray[np.float32], n: int = N_TOKENS_SHOWN
) -> list[list[tuple[str, float]]]:
    """For each direction (k, n_embd) the tokens whose logits it raises most: (text, cosine with the token's row of the
    output matrix, norm weights applied).

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020); arXiv 2510.13900 (differences on early tokens).
    """
    file = ModelFile(model.path)
    scale = file.rows(file.tensors["output_norm.weight"])[0] if "output_norm.weight" in file.tensors else 1.0
    directions = np.nan_to_num(rows.astype(np.float64)) * scale
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    directions /= np.where(lengths > 0, lengths, 1.0)
    tensor = file.tensors.get("output.weight") or file.tensors["token_embd.weight"]
    best: list[list[tuple[float, int]]] = [[] for _ in rows]
    for first, chunk in file.chunks(tensor):
        c = chunk.astype(np.float64)
        norms = np.linalg.norm(c, axis=1, keepdims=True)
        cosines = directions @ (c / np.where(norms > 0, norms, 1.0)).T
        for k, values in enumerate(cosines):
            at = np.argsort(-values)[:n]
            best[k] = sorted([*best[k], *((float(values[i]), first + int(i)) for i in at)], reverse=True)[:n]
    return [[(model.detokenize([token], special=True), value) for value, token in found if value > 0] for found in best]
