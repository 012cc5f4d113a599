"""What steering and capture cost: interleaved runs against the same llama.cpp without the hook."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from personasteer import engine
from personasteer._native import load_core
from personasteer.engine import Progress, Request, Sampling, Taps
from personasteer.errors import ArgumentError
from personasteer.model import Model
from personasteer.steering import Steering
from personasteer.vectors import PersonaVector


@dataclass(frozen=True)
class OverheadRow:
    """Time of a mode over the time of the unhooked context, from interleaved pairs.

    ratio_low and ratio_high bound the 95 % bootstrap interval of the median; hook_mib is the memory of the mode's edit
    bank and taps, peak_rss_mib the peak of the process, in which all modes' contexts live side by side.
    """

    mode: str
    phase: str
    k: int
    ratio_median: float
    ratio_low: float
    ratio_high: float
    ratio_min: float
    ratio_max: float
    tokens_per_second: float
    hook_mib: float
    peak_rss_mib: float
    pairs: int


@dataclass(frozen=True)
class _Mode:
    name: str
    k: int = 0
    hook: bool = True
    taps: Taps | None = None
    last_layer: bool = False


def measure_overhead(
    model: Model,
    *,
    ks: Sequence[int] = (1, 8, 32),
    pairs: int = 30,
    prompt_tokens: int = 128,
    decode_tokens: int = 12,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[OverheadRow]:
    """Prefill and decode time of each mode, as ratios to plain llama.cpp with the same settings.

    Modes: "off" (a second plain context: the noise), "add" of K random vectors at all layers, "capture" (mean over
    the text of all blocks but the last, pooled in the graph), "capture_last" (of all blocks: an output row per
    token), "capture_raw" (every row of all blocks but the last). Each mode has a context of its own and is run right
    next to a run of the plain one, before it in one round and after it in the next.

    Args:
        ks: numbers of vectors in the steering.
        pairs: rounds, at least 2.
        prompt_tokens: length of the prefill; decode_tokens: generated one by one after it.
    """
    if pairs < 2:
        raise ArgumentError(f"pairs must be at least 2, not {pairs}")
    if prompt_tokens < 2 or decode_tokens < 2 or prompt_tokens + decode_tokens + 1 > model.n_ctx:
        raise ArgumentError(f"{prompt_tokens} + {decode_tokens} tokens do not fit n_ctx {model.n_ctx}")
    rng = np.random.default_rng(seed)
    tokens = [int(t) for t in rng.integers(0, model.n_vocab, prompt_tokens)]
    all_layers = tuple(range(model.n_layer))
    modes = [_Mode("off", hook=False)]
    modes += [_Mode("add", k) for k in ks]
    modes += [
        _Mode("capture", taps=Taps(pool_layers=all_layers[:-1])),
        _Mode("capture_last", taps=Taps(pool_layers=all_layers), last_layer=True),
        _Mode("capture_raw", taps=Taps(raw_layers=all_layers[:-1])),
    ]
    plain = _Runner(model, _Mode("plain", hook=False), tokens, decode_tokens, rng)
    runners = [_Runner(model, m, tokens, decode_tokens, rng) for m in modes]
    for runner in [plain, *runners]:
        runner.run()
        runner.run()
    times: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for i in range(pairs):
        # plain, two modes, plain, two modes, ...: each mode next to a plain run; every other round backwards
        order: list[tuple[int, _Runner]] = [(-1, plain)]
        for j, runner in enumerate(runners):
            order.append((j, runner))
            if j % 2 or j == len(runners) - 1:
                order.append((-1, plain))
        order = order[:: 1 if i % 2 else -1]
        seconds = [runner.run() for _, runner in order]
        for at, (j, _) in enumerate(order):
            if j < 0:
                continue
            beside = at - 1 if order[at - 1][0] < 0 else at + 1
            for phase in ("prefill", "decode"):
                times.setdefault((j, phase), []).append((seconds[at][phase], seconds[beside][phase]))
        if progress:
            progress(i + 1, pairs)
    return [
        _row(mode, phase, times[j, phase], prompt_tokens if phase == "prefill" else decode_tokens, runners[j].hook_mib)
        for phase in ("prefill", "decode")
        for j, mode in enumerate(modes)
    ]


class _Runner:
    def __init__(self, model: Model, mode: _Mode, tokens: list[int], n_decode: int, rng: np.random.Generator) -> None:
        self.model, self.mode = model, mode
        n_ctx = len(tokens) + n_decode + 1
        self.session: Any = load_core().Session(
            model=model._native,
            n_ctx=n_ctx,
            n_parallel=1,
            n_batch=max(512, len(tokens)),
            n_threads=model.n_threads,
            n_outputs=64,
            hook=mode.hook,
        )
        steering = Steering()
        shape = (model.n_layer, model.n_embd)
        for _ in range(mode.k):  # small doses: the text stays text, and the work does not depend on the values
            data = rng.standard_normal(shape).astype(np.float32)
            steering.append(PersonaVector(data, tuple(range(model.n_layer))) * (0.05 / mode.k))
        span = (0, len(tokens) - 1) if mode.taps else (0, 0)
        self.request = Request(
            tokens,
            len(tokens),
            steering,
            max_tokens=n_decode,
            sampling=Sampling(temperature=0),
            ignore_end=True,  # always so many tokens
            outputs=span if mode.last_layer else (0, 0),
            pools=(span,) if mode.taps and mode.taps.pool_layers else (),
            raw=span if mode.taps and mode.taps.raw_layers else None,
        )

    @property
    def hook_mib(self) -> float:
        return float(self.session.hook_bytes) / 2**20

    def run(self) -> dict[str, float]:
        """Seconds of the prefill, up to the first token, and of one decoded token, steering set-up included."""
        watched = _Stopwatch(self.session)
        start = time.perf_counter()
        if self.mode.hook:
            engine.run(watched, self.model, [self.request], taps=self.mode.taps)
        else:
            self._run_plain(watched)
        first, *later = watched.marks
        return {"prefill": first - start, "decode": (later[-1] - first) / len(later)}

    def _run_plain(self, session: Any) -> None:
        session.reset()
        session.submit(
            tokens=self.request.tokens,
            max_tokens=self.request.max_tokens,
            ignore_end=True,
            **self.request.sampling.arguments(0),
        )
        while session.busy:
            session.step()
        session.take_results()


class _Stopwatch:
    """A session that notes when each step that gave a token was over."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.marks: list[float] = []

    def step(self) -> Any:
        tokens = self._session.step()
        if tokens:
            self.marks.append(time.perf_counter())
        return tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def _row(mode: _Mode, phase: str, pairs: list[tuple[float, float]], n_tokens: int, hook_mib: float) -> OverheadRow:
    seconds = np.array(pairs)
    ratios = seconds[:, 0] / seconds[:, 1]
    draws = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    per_run = float(np.median(seconds[:, 0]))
    return OverheadRow(
        mode=mode.name,
        phase=phase,
        k=mode.k,
        ratio_median=float(np.median(ratios)),
        ratio_low=float(low),
        ratio_high=float(high),
        ratio_min=float(ratios.min()),
        ratio_max=float(ratios.max()),
        tokens_per_second=(n_tokens if phase == "prefill" else 1) / per_run,
        hook_mib=hook_mib,
        peak_rss_mib=_peak_rss_mib(),
        pairs=len(ratios),
    )


def _peak_rss_mib() -> float:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20


def as_json(rows: Sequence[OverheadRow]) -> dict[str, Any]:
    """{"rows": [...]}, as the command line prints it."""
    return {"rows": [asdict(r) for r in rows]}
