"""Runs lists of requests on the native session: one list in, results in the same order out."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from personasteer._native import load_core
from personasteer.errors import ArgumentError
from personasteer.steering import SteeredModel, Steering, compile_mixes

Progress: TypeAlias = Callable[[int, int], None]  # (done, total)
OnToken: TypeAlias = Callable[[int, str], None]  # (index of the request, text)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy; top_k <= 0, top_p >= 1, min_p <= 0 are off.

    Order: repetition penalty (over the last 64 tokens, prompt included), top-k, top-p, min-p, temperature, draw.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repeat_penalty"):
            if not np.isfinite(getattr(self, name)):
                raise ArgumentError(f"{name} must be finite, not {getattr(self, name)}")
        if self.temperature < 0:
            raise ArgumentError(f"temperature must not be negative, not {self.temperature}")
        if self.repeat_penalty <= 0:
            raise ArgumentError(f"repeat_penalty must be positive, not {self.repeat_penalty}")

    def arguments(self, index: int) -> dict[str, float | int]:
        """For the index-th request of a list: each draws from a stream of its own."""
        values = {k: getattr(self, k) for k in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")}
        return {**values, "seed": (self.seed * 1_000_003 + index) % 2**32}


@dataclass(frozen=True)
class Request:
    """One text to compute, and what to keep of it. Spans are [begin, end) token indices; end -1 is open.

    n_prompt is the P of the scopes (None: all given tokens are prompt).
    """

    tokens: Sequence[int]
    n_prompt: int | None = None
    steering: Steering = field(default_factory=Steering)
    max_tokens: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    outputs: tuple[int, int] = (0, 0)
    keep_logits: bool = False
    keep_scores: bool = False
    pools: tuple[tuple[int, int], ...] = ()
    raw: tuple[int, int] | None = None
    keep_readings: bool = False
    share_prefix: bool = False
    ignore_end: bool = False  # go on after an end-of-turn token


@dataclass(frozen=True)
class Taps:
    """What the graph keeps for every request of a run: blocks pooled, kept raw, projected."""

    pool_layers: tuple[int, ...] = ()
    n_pools: int = 1
    raw_layers: tuple[int, ...] = ()
    reading_layers: tuple[int, ...] = ()
    readouts: NDArray[np.float32] | None = None  # (reading_layers, n_readouts, n_embd)


class TextStream:
    """The text of one request as it grows: whole characters only, and nothing that a stop string may take back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [s.encode() for s in stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = b""
        self._n_sent = 0

    def push(self, piece: bytes) -> str:
        """The text that is certain now."""
        self._held += piece
        if any(s in self._held for s in self._stop):
            return ""
        starts = (n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n]))
        n_certain = len(self._held) - max(starts, default=0)
        certain, self._held = self._held[:n_certain], self._held[n_certain:]
        self._n_sent += n_certain
        return self._decoder.decode(certain)

    def finish(self, text: bytes) -> str:
        """The rest, up to the whole `text`."""
        return self._decoder.decode(text[self._n_sent :], final=True)


def run(
    session: Any,
    model: SteeredModel,
    requests: Sequence[Request],
    *,
    taps: Taps | None = None,
    keep_cache: bool = False,
    progress: Progress | None = None,
    on_token: OnToken | None = None,
) -> list[dict[str, Any]]:
    """Compute all requests; the native results in the order of `requests`.

    Starts from an empty cache unless `keep_cache`, so that the same list gives the same numbers whatever ran before.
    An interrupt or an error leaves the session empty and usable.
    """
    core = load_core()
    if not keep_cache:
        session.reset()
    taps = taps or Taps()
    session.set_taps(
        pool_layers=taps.pool_layers,
        n_pools_per_request=taps.n_pools,
        raw_layers=taps.raw_layers,
        reading_layers=taps.reading_layers,
        readouts=taps.readouts,
    )
    compiled = [compile_mixes(r.steering, model, len(r.tokens), r.n_prompt) for r in requests]
    order: dict[int, int] = {}
    results: list[dict[str, Any]] = [{} for _ in requests]
    streams = [TextStream(r.stop) for r in requests]
    try:
        for i, (r, (mixes, of_token, of_generated)) in enumerate(zip(requests, compiled, strict=True)):
            request_id = session.submit(
                tokens=r.tokens,
                mixes=[core.Mix(m.key, m.layers, m.data) for m in mixes],
                mix_of_token=of_token,
                mix_of_generated=of_generated,
                max_tokens=r.max_tokens,
                stop=[s.encode() for s in r.stop],
                outputs=r.outputs,
                keep_logits=r.keep_logits,
                keep_scores=r.keep_scores,
                pools=r.pools,
                raws=[r.raw] if r.raw else [],
                keep_readings=r.keep_readings,
                reuse_prefix=r.share_prefix,
                ignore_end=r.ignore_end,
                **r.sampling.arguments(i),
            )
            order[request_id] = i
        done = 0
        while session.busy:
            for request_id, _, piece in session.step():
                i = order[request_id]
                if on_token and (text := streams[i].push(piece)):
                    on_token(i, text)
            for result in session.take_results():
                i = order[result["id"]]
                results[i] = result
                done += 1
                if on_token and (text := streams[i].finish(result["text"])):
                    on_token(i, text)
                if progress:
                    progress(done, len(requests))
    except BaseException:
        session.reset()
        raise
    return results
