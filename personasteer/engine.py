"""Runs lists of requests on the native session: one list in, results in the same order out."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from personasteer._native import load_core
from personasteer.errors import ArgumentError, ModelError
from personasteer.mixes import Conditions, Plan, Reads, compile_plan, make_reads
from personasteer.steering import Roles, SteeredModel, Steering

Progress: TypeAlias = Callable[[int, int], None]  # (done, total)
OnToken: TypeAlias = Callable[[int, str], None]  # (index of the request, text)
AtPrompt: TypeAlias = Callable[[list[NDArray[np.float32]], int], Steering]  # (readings, n_prompt): edits to add


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy; top_k <= 0, top_p >= 1, min_p <= 0 are off.

    Order: logit_bias (what is added to tokens' logits), penalties (over the last 64 tokens, prompt included: a repeated
    token's logit over repeat_penalty, times it where negative; less frequency_penalty for each time that it is there;
    less presence_penalty), top-k, top-p, min-p, temperature, draw.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repeat_penalty", "frequency_penalty", "presence_penalty"):
            if not np.isfinite(getattr(self, name)):
                raise ArgumentError(f"{name} must be finite, not {getattr(self, name)}")
        if self.temperature < 0:
            raise ArgumentError(f"temperature must not be negative, not {self.temperature}")
        if self.repeat_penalty <= 0:
            raise ArgumentError(f"repeat_penalty must be positive, not {self.repeat_penalty}")
        for token, bias in self.logit_bias.items():
            if np.isnan(bias) or bias == np.inf:
                raise ArgumentError(f"logit_bias of token {token} must be a number or -inf, not {bias}")

    def arguments(self, index: int) -> dict[str, Any]:
        """For the index-th request of a list: each draws from a stream of its own."""
        numbers = {k: v for k, v in vars(self).items() if k not in ("seed", "logit_bias")}
        return {**numbers, "logit_bias": list(self.logit_bias.items()), "seed": (self.seed * 1_000_003 + index) % 2**32}


@dataclass(frozen=True)
class Request:
    """One text to compute, and what to keep of it. Spans are [begin, end) token indices; end -1 is open.

    n_prompt is the P of the scopes (None: all given tokens are prompt); roles holds the role of each given token, where
    a chat template tells; think_marks opens and closes a thinking block, and `thinking` says that the text ends in one.
    reads: directions to project every token on, {il: (n_embd,)} each; tokens before reads_from may come from a computed
    prefix and have no reading then. at_prompt is asked once the prompt is read, for edits of the response beside those
    of `steering`. n_logprobs >= 0: log p of every generated token, and of so many most probable ones.
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
    reads: tuple[Mapping[int, NDArray[Any]], ...] = ()
    reads_from: int = 0
    at_prompt: AtPrompt | None = None
    share_prefix: bool = False
    ignore_end: bool = False  # go on after an end-of-turn token
    roles: Roles | None = None
    think_marks: tuple[str, str] = ("", "")
    thinking: bool = False
    grammar: str = ""
    n_logprobs: int = -1

    @classmethod
    def scored(cls, tokens: Sequence[int], n_prompt: int, steering: Steering | None = None) -> Request:
        """A given answer (tokens from n_prompt on) of which log p per token is wanted; the prompt may be shared."""
        outputs = (n_prompt - 1, len(tokens) - 1)
        return cls(tokens, n_prompt, steering or Steering(), outputs=outputs, keep_scores=True, share_prefix=True)


@dataclass(frozen=True)
class Taps:
    """What the graph keeps for every request of a run: blocks pooled, kept raw."""

    pool_layers: tuple[int, ...] = ()
    n_pools: int = 1
    raw_layers: tuple[int, ...] = ()


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
        most = len(self._held) + 1
        starts = (n for s in self._stop for n in range(1, min(len(s), most)) if self._held.endswith(s[:n]))
        n_certain = len(self._held) - max(starts, default=0)
        certain, self._held = self._held[:n_certain], self._held[n_certain:]
        self._n_sent += n_certain
        return self._decoder.decode(certain)

    def finish(self, text: bytes) -> str:
        """The rest, up to the whole `text`."""
        return self._decoder.decode(text[self._n_sent :], final=True)


class Compiled:
    """A request as the native session takes it, and its conditions on the prompt."""

    def __init__(self, request: Request, model: SteeredModel, like: Compiled | None = None) -> None:
        """like: another one; where its directions are the same objects, both are one read-out to the session."""
        self.request, self._model = request, model
        conditions = Conditions(request.steering, model)
        # a text that is all prompt has no response to decide on
        self._conditions = conditions if request.n_prompt is not None else Conditions(Steering(), model)
        self._check_last_block()
        self._reads: Reads | None = None
        self._readout: Any = None
        if like and like.request.reads is request.reads and not (self._conditions or like._conditions):
            self._reads, self._readout = like._reads, like._readout
        elif reads := make_reads([*self._conditions.directions, *map(dict, request.reads)], model.n_embd):
            self._reads, self._readout = reads, load_core().Readout(reads.layers, reads.directions)
        self._own = [
            (first, [self._reads.layers.index(il) for il in sorted(column)])
            for first, column in enumerate(request.reads, len(self._conditions.directions))
            if self._reads
        ]
        self._resteered = False
        self._rho = 0.0  # of the plans before this one
        if self._conditions:  # what is wrong with an edit shows now, not when its condition holds
            self._compile(request.steering, [True] * len(request.steering))
        self.plan = self._compile(request.steering)

    def _check_last_block(self) -> None:
        r, last = self.request, self._model.n_layer - 1
        if r.n_prompt is None or not any(last in column for column in self._conditions.directions):
            return
        generates = r.max_tokens > 0 and r.n_prompt == len(r.tokens)
        if not (generates or r.outputs[0] < r.n_prompt <= r.outputs[1]):
            raise ArgumentError(
                f"the condition reads block {last}, the last one, of which nothing is computed for the prompt's last "
                "token here: use other layers"
            )

    def _compile(self, steering: Steering, decided: Sequence[bool] = ()) -> Plan:
        r = self.request
        return compile_plan(steering, self._model, len(r.tokens), r.n_prompt, r.roles, decided)

    def arguments(self, index: int) -> dict[str, Any]:
        """Keyword arguments of the native submit; `index` gives the request a random stream of its own."""
        r = self.request
        return {
            "tokens": r.tokens,
            **self._native(self.plan),
            "response_begin": -1 if r.n_prompt is None or r.n_prompt > len(r.tokens) else r.n_prompt - 1,
            "reads": self._readout,
            "reads_from": 0 if self._conditions else r.reads_from,
            "decides": bool(self._conditions) or r.at_prompt is not None,
            "max_tokens": r.max_tokens,
            "stop": [s.encode() for s in r.stop],
            "think_marks": r.think_marks,
            "thinking": r.thinking,
            "grammar": r.grammar,
            "n_logprobs": r.n_logprobs,
            "outputs": r.outputs,
            "keep_logits": r.keep_logits,
            "keep_scores": r.keep_scores,
            "pools": r.pools,
            "raws": [r.raw] if r.raw else [],
            "reuse_prefix": r.share_prefix,
            "ignore_end": r.ignore_end,
            **r.sampling.arguments(index),
        }

    def _native(self, plan: Plan) -> dict[str, Any]:
        return {
            "mixes": [m.native for m in plan.mixes],
            "mix_of_token": plan.of_token if plan.mixes else [],
            "generated": plan.generated if plan.mixes else [],
        }

    def decide(self, readings: NDArray[np.float32]) -> tuple[Any, ...] | None:
        """The response's steering, now that the prompt is read; None where no condition holds and nothing is added, or
        where other edits have been given meanwhile.
        """
        r = self.request
        if self._resteered or self._reads is None or r.n_prompt is None:
            return None
        verdicts = self._conditions.decide(readings, self._reads.layers, r.n_prompt) if self._conditions else []
        added = r.at_prompt(self.own_readings(readings), r.n_prompt) if r.at_prompt else Steering()
        self._check_no_conditions(added)
        if not (any(verdicts) or added):
            return None
        before, self.plan = self.plan, self._compile(r.steering + added, verdicts)
        return None if self.plan.same_as(before) else tuple(self._native(self.plan).values())

    def _check_no_conditions(self, steering: Steering) -> None:
        if Conditions(steering, self._model):
            raise ArgumentError('a condition on the prompt comes too late: use When(..., on="token")')

    def resteer(self, steering: Steering) -> dict[str, Any]:
        """The arguments of the native steer for other edits from here on. Raises ArgumentError for a condition on the
        prompt, which has been read.
        """
        self._check_no_conditions(steering)
        plan = self._compile(steering)
        self._rho, self.plan, self._resteered = self.rho, plan, True
        return self._native(plan)

    @property
    def rho(self) -> float:
        """The largest dose that a token gets, or got under an earlier steering."""
        return max(self._rho, self.plan.rho)

    def shaped(self, readings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Flat readings as (tokens, layers, directions)."""
        layers, n = self._reads.directions.shape[:2] if self._reads else (0, 0)
        return readings.reshape(-1, layers, n) if layers * n else readings.reshape(0, layers, n)

    def own_readings(self, readings: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """(tokens, layers of the read-out) for each of the request's own read-outs, its layers ascending."""
        return [np.asarray(readings[:, at, k]) for k, at in self._own]


def run(
    session: Any,
    model: SteeredModel,
    requests: Sequence[Request],
    *,
    taps: Taps | None = None,
    keep_cache: bool = False,
    progress: Progress | None = None,
    on_token: OnToken | None = None,
    first: int = 0,
) -> list[dict[str, Any]]:
    """Compute all requests; the native results in the order of `requests`, with "rho", the largest dose of a token.
    `first` is the number of the first one, for its random stream and for on_token.

    Starts from an empty cache unless `keep_cache`, so that the same list gives the same numbers whatever ran before.
    An interrupt or an error leaves the session empty and usable.
    """
    if not keep_cache:
        session.reset()
    taps = taps or Taps()
    session.set_taps(pool_layers=taps.pool_layers, n_pools_per_request=taps.n_pools, raw_layers=taps.raw_layers)
    compiled: list[Compiled] = []
    for r in requests:
        compiled.append(Compiled(r, model, compiled[-1] if compiled else None))
    order: dict[int, int] = {}
    results: list[dict[str, Any]] = [{} for _ in requests]
    streams = [TextStream(r.stop) for r in requests]

    def decide(request_id: int, readings: NDArray[np.float32]) -> tuple[Any, ...] | None:
        return compiled[order[request_id]].decide(readings)

    try:
        for i, c in enumerate(compiled):
            order[session.submit(**c.arguments(first + i))] = i
        done = 0
        while session.busy:
            for request_id, _, piece, *_ in session.step(decide):
                i = order[request_id]
                if on_token and (text := streams[i].push(piece)):
                    on_token(first + i, text)
            for result in session.take_results():
                i = order[result["id"]]
                if result["error"]:
                    raise ModelError(result["error"])
                results[i] = {**result, "rho": compiled[i].plan.rho}
                done += 1
                if on_token and (text := streams[i].finish(result["text"])):
                    on_token(first + i, text)
                if progress:
                    progress(done, len(requests))
    except BaseException:
        session.reset()
        raise
    return results
