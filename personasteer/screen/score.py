"""What the model says of texts: the reading of every answer along each trait, and of the model's own answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.engine import Request, Sampling
from personasteer.errors import ArgumentError, VectorError
from personasteer.model import Model
from personasteer.screen.journal import Packed
from personasteer.screen.packs import AT_ONCE, CELLS, MOST
from personasteer.screen.texts import unpacked
from personasteer.steering import check_fits
from personasteer.vectors import PersonaVector

SPAN = 12  # tokens of the spans that are shown
N_SPANS = 3

# of one text along one trait: the mean reading over its answer, the reading at the prompt's last token, where in the
# answer the spans of the highest mean readings begin and end, and these
SCORE = np.dtype([("mean", "<f4"), ("last", "<f4"), ("spans", "<i4", (N_SPANS, 2)), ("highest", "<f4", N_SPANS)])


@dataclass(frozen=True)
class Axis:
    """A unit direction at the block that is read.

    Args:
        name: of the vector.
        layer: the block; readings are <h_layer, direction>.
        direction: (n_embd,).
        spans: whether the spans of the highest readings are wanted.
    """

    name: str
    layer: int
    direction: NDArray[np.float32]
    spans: bool = True


def axis_of(model: Model, vector: PersonaVector, layer: int | None = None) -> Axis:
    """v-hat of a vector at one block: the given one, or the middle one of those that the vector steers at.

    Raises:
        VectorError: a vector for a model of another shape, or no usable direction there. ArgumentError: no such block,
            or the last, whose rows are those with outputs.
    """
    check_fits(vector, model)
    if layer is not None:
        at = model.check_layers([layer])[0]
        if at == model.n_layer - 1:
            raise ArgumentError(f"block {at} is the last one, of which nothing is computed here: read an earlier one")
    else:
        own = [il for il in vector.layers if il < model.n_layer - 1]
        if not own:
            raise VectorError(f"vector {vector.name!r} names no block below the last one: name one to read (layer)")
        at = own[len(own) // 2]
    direction = vector.direction(at).astype(np.float64)
    return Axis(vector.name, at, (direction / np.linalg.norm(direction)).astype(np.float32))


class Scorer:
    """Computes packs; the same pack gives the same bytes wherever it is computed with the same build.

    Args:
        axes: what is read.
        max_tokens: of an own answer.
    """

    def __init__(self, model: Model, axes: Sequence[Axis], *, max_tokens: int) -> None:
        self._model, self._axes, self._max_tokens = model, axes, max_tokens
        self._reads: tuple[Mapping[int, NDArray[Any]], ...] = tuple({a.layer: a.direction} for a in axes)
        layers = sorted({a.layer for a in axes})
        self._at = [layers.index(a.layer) for a in axes], list(range(len(axes)))
        self._n_ctx, self._n_blocks = model.n_ctx, layers[-1] + 1
        self._prefix: list[int] = []
        self._given: Any = None
        self._own: Any = None

    def compute(self, pack: Packed) -> list[tuple[Any, ...]]:
        """(scores,) of each text, or (means, answer) of each prompt; NaN where the model computes no numbers."""
        if pack.kind == "own":
            return self._answers([unpacked(tokens) for tokens, _ in pack.texts])
        return self._scores([(unpacked(tokens), n_prompt) for tokens, n_prompt in pack.texts], pack.n_prefix)

    def _scores(self, texts: Sequence[tuple[list[int], int]], n_prefix: int) -> list[tuple[bytes]]:
        if self._given is None:
            n_batch = self._model.n_batch
            cells = self._n_ctx + n_batch + 256
            self._given = self._model._new_session(
                self._n_ctx, min(MOST, n_batch), n_batch, n_cells=cells, n_blocks=self._n_blocks
            )
        session, prefix = self._given, texts[0][0][:n_prefix]
        if not session.keep_prefix(n_prefix if prefix == self._prefix else 0) and prefix:
            self._run(session, [Request(prefix, None, reads=self._reads, share_prefix=True)])
        self._prefix = prefix
        requests = [
            Request(tokens, None, reads=self._reads, reads_from=n_prompt - 1, share_prefix=True)
            for tokens, n_prompt in texts
        ]
        results = self._run(session, requests)
        return [(self._score(r, n_prompt),) for r, (_, n_prompt) in zip(results, texts, strict=True)]

    def _run(self, session: Any, requests: Sequence[Request], *, keep: bool = True) -> list[dict[str, Any]]:
        return self._model.run_requests(requests, session=session, keep_cache=keep)

    def _score(self, result: dict[str, Any], n_prompt: int) -> bytes:
        readings = np.asarray(result["readings"])[n_prompt - 1 :, *self._at].astype(np.float64)
        out = np.zeros(len(self._axes), SCORE)
        if not np.isfinite(readings).all():
            out["mean"] = out["last"] = np.nan
            return out.tobytes()
        answer = readings[1:]
        out["last"], out["mean"] = readings[0], answer.mean(axis=0)
        for k, axis in enumerate(self._axes):
            if axis.spans:
                out["spans"][k], out["highest"][k] = highest_spans(answer[:, k])
        return out.tobytes()

    def _answers(self, prompts: Sequence[list[int]]) -> list[tuple[bytes, str]]:
        if self._own is None:
            cells = max(CELLS, self._n_ctx + self._max_tokens)
            self._own = self._model._new_session(
                self._n_ctx + self._max_tokens, AT_ONCE, self._model.n_batch, n_cells=cells
            )
        greedy = Sampling(temperature=0.0)
        requests = [
            Request(
                tokens, len(tokens), max_tokens=self._max_tokens, sampling=greedy, reads=self._reads,
                reads_from=len(tokens) - 1, share_prefix=True,
            )
            for tokens in prompts
        ]  # fmt: skip
        found = []
        for tokens, result in zip(prompts, self._run(self._own, requests, keep=False), strict=True):
            readings = np.asarray(result["readings"])[len(tokens) :, *self._at].astype(np.float64)
            mean = readings.mean(axis=0) if len(readings) else np.full(len(self._axes), np.nan)
            found.append((mean.astype("<f4").tobytes(), result["text"].decode("utf-8", "replace")))
        return found


def highest_spans(values: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """((N_SPANS, 2) begin and end, (N_SPANS,) mean) of the spans of SPAN neighbours with the highest means that do not
    overlap; (0, 0) and NaN where there are no more. Fewer values are one span.
    """
    spans, means = np.zeros((N_SPANS, 2), np.int32), np.full(N_SPANS, np.nan, np.float32)
    width = min(SPAN, len(values))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    running = (sums[width:] - sums[:-width]) / width
    for i in range(N_SPANS):
        best = int(np.argmax(running))
        if not np.isfinite(running[best]):
            break
        spans[i], means[i] = (best, best + width), running[best]
        running[max(0, best - width + 1) : best + width] = -np.inf
    return spans, means
