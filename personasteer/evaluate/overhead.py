"""What steering and capture cost: interleaved runs against the same llama.cpp without the hook."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from personasteer import engine
from personasteer._native import load_core
from personasteer.engine import Compiled, Progress, Request, Sampling, Taps
from personasteer.errors import ArgumentError
from personasteer.mixes import MixCache
from personasteer.model import Model
from personasteer.steering import Ablate, Add, Cap, Floor, Redirect, Steering, When
from personasteer.vectors import PersonaVector


@dataclass(frozen=True)
class OverheadRow:
    """Time of a mode over the time of the unhooked context, from interleaved pairs.

    expected: 1 + what the edit adds over what the model does, at the model's own speed: bytes of vectors over bytes of
    weights for a decoded token, multiply-adds over multiply-adds for a prompt; 1 where nothing is counted.
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
    expected: float
    tokens_per_second: float
    hook_mib: float
    peak_rss_mib: float
    pairs: int


OPERATORS = ("add", "turn", "cap", "floor", "ablate", "redirect", "when")
DOSE = 0.05  # the text stays text, and the work does not depend on the values
N_PERSONAS = 16


@dataclass(frozen=True)
class _Mode:
    """What a row measures. k: vectors, or read-outs, at each block; n_sequences: computed in one batch."""

    name: str
    k: int = 0
    hook: bool = True
    taps: Taps | None = None
    last_layer: bool = False
    n_sequences: int = 1


def measure_overhead(
    model: Model,
    *,
    operators: Sequence[str] = ("add", "cap"),
    ks: Sequence[int] = (1, 8, 64),
    pairs: int = 30,
    prompt_tokens: int = 128,
    decode_tokens: int = 12,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[OverheadRow]:
    """Prefill and decode time of each mode, as ratios to plain llama.cpp with the same settings.

    Modes: "off" (a second plain context: the noise); every operator with K random vectors at all layers, the windows
    binding for about half of the tokens ("turn" is a norm-preserving addition, "when" an addition with a condition on
    each token); "readings" on K directions at all layers; "live", the same, looked at after each decode; "capture"
    (mean over the text of all blocks but the last, pooled in the graph), "capture_last" (of all blocks: an output row
    per token), "capture_raw" (every row of all blocks but the last); "off x16" and "personas x16": sixteen sequences of
    prompt_tokens / 4 tokens in one batch, unsteered, and each with an addition and a cap of its own at all layers. Each
    is run right next to a run of the plain one of its batch size, before it in one round and after it in the next.

    Args:
        operators: of OPERATORS.
        ks: numbers of vectors in the steering, of which those up to a quarter of the model's width are measured (more
            random directions are too much alike); readings take those up to 8.
        pairs: rounds, at least 2.
        prompt_tokens: length of the prefill; decode_tokens: generated one by one after it.
    """
    if unknown := set(operators) - set(OPERATORS):
        raise ArgumentError(f"unknown operators {', '.join(sorted(unknown))}; known: {', '.join(OPERATORS)}")
    if pairs < 2:
        raise ArgumentError(f"pairs must be at least 2, not {pairs}")
    if prompt_tokens < 4 or decode_tokens < 2 or prompt_tokens + decode_tokens + 1 > model.n_ctx:
        raise ArgumentError(f"{prompt_tokens} + {decode_tokens} tokens do not fit n_ctx {model.n_ctx}")
    ks = [k for k in ks if 4 * k <= model.n_embd]
    model.mixes = MixCache(max_bytes=2**30)  # all modes' mixes stay compiled, as those in use do
    rng = np.random.default_rng(seed)
    all_layers = tuple(range(model.n_layer))
    modes = [_Mode("off", hook=False)]
    modes += [_Mode(name, k) for name in operators for k in ks]
    modes += [_Mode(name, k) for name in ("readings", "live") for k in ks if k <= 8]
    modes += [
        _Mode("capture", taps=Taps(pool_layers=all_layers[:-1])),
        _Mode("capture_last", taps=Taps(pool_layers=all_layers), last_layer=True),
        _Mode("capture_raw", taps=Taps(raw_layers=all_layers[:-1])),
        _Mode("off x16", hook=False, n_sequences=N_PERSONAS),
        _Mode("personas x16", 2, n_sequences=N_PERSONAS),
    ]
    vectors = [
        PersonaVector(
            rng.standard_normal((model.n_layer, model.n_embd)).astype(np.float32),
            all_layers,
            thresholds=np.zeros(model.n_layer, np.float32),
        )
        for _ in range(2 * max([*ks, N_PERSONAS]))
    ]
    shape = (prompt_tokens, decode_tokens)
    contexts: dict[Any, Any] = {}
    plain = {n: _Runner(model, _Mode("plain", hook=False, n_sequences=n), vectors, shape, {}) for n in (1, N_PERSONAS)}
    runners = [_Runner(model, m, vectors, shape, {} if m.name.startswith("off") else contexts) for m in modes]
    for runner in [*plain.values(), *runners]:
        runner.run()
        runner.run()
    times: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for i in range(pairs):
        order: list[tuple[int, _Runner]] = []
        for n, beside in plain.items():
            # plain, two modes, plain, two modes, ...: each mode next to a plain run; every other round backwards
            order.append((-1, beside))
            chosen = [j for j, m in enumerate(modes) if m.n_sequences == n]
            for at, j in enumerate(chosen):
                order.append((j, runners[j]))
                if at % 2 or at == len(chosen) - 1:
                    order.append((-1, beside))
        order = order[:: 1 if i % 2 else -1]
        seconds = [runner.run() for _, runner in order]
        for at, (j, _) in enumerate(order):
            if j < 0:
                continue
            next_to = at - 1 if order[at - 1][0] < 0 else at + 1
            for phase in ("prefill", "decode"):
                times.setdefault((j, phase), []).append((seconds[at][phase], seconds[next_to][phase]))
        if progress:
            progress(i + 1, pairs)
    return [
        _row(
            mode, phase, times[j, phase], runners[j].n_tokens[phase], runners[j].hook_mib, _expected(model, mode, phase)
        )
        for phase in ("prefill", "decode")
        for j, mode in enumerate(modes)
    ]


def _steering(name: str, vectors: Sequence[PersonaVector], k: int) -> Steering:
    """K edits of one operator."""
    make: dict[str, Any] = {
        "add": lambda i: vectors[i] * (DOSE / k),
        "turn": lambda i: Add(vectors[i], DOSE / k, keep_norm=True),
        "cap": lambda i: Cap(vectors[i]),
        "floor": lambda i: Floor(vectors[i]),
        "ablate": lambda i: Ablate(vectors[i], share=0.5),
        "redirect": lambda i: Redirect(vectors[i], vectors[k + i], share=0.1),
        "when": lambda i: When(vectors[k + i], vectors[i] * (DOSE / k), on="token"),
    }
    return Steering([make[name](i) for i in range(k)]) if name in make else Steering()


class _Runner:
    def __init__(
        self,
        model: Model,
        mode: _Mode,
        vectors: Sequence[PersonaVector],
        shape: tuple[int, int],
        contexts: dict[Any, Any],
    ) -> None:
        self.model, self.mode = model, mode
        n_each = shape[0] if mode.n_sequences == 1 else max(2, shape[0] // 4)
        self.n_tokens = {"prefill": n_each * mode.n_sequences, "decode": mode.n_sequences}
        key = (mode.n_sequences, mode.taps and (mode.taps.pool_layers, mode.taps.raw_layers))
        if key not in contexts:  # edits and readings of one batch size share a context, as they do in use
            contexts[key] = load_core().Session(
                model=model._native,
                n_ctx=n_each + shape[1] + 1,
                n_parallel=mode.n_sequences,
                n_batch=max(512, self.n_tokens["prefill"]),
                n_threads=model.n_threads,
                n_outputs=64,
                hook=mode.hook,
            )
        self.session: Any = contexts[key]
        rng = np.random.default_rng(1)
        span = (0, n_each - 1) if mode.taps else (0, 0)
        self.requests = [
            Request(
                [int(t) for t in rng.integers(0, model.n_vocab, n_each)],
                n_each,
                Steering([vectors[i] * DOSE, Cap(vectors[N_PERSONAS + i])])
                if mode.name == "personas x16"
                else _steering(mode.name, vectors, mode.k),
                max_tokens=shape[1],
                sampling=Sampling(temperature=0),
                ignore_end=True,  # always so many tokens
                outputs=span if mode.last_layer else (0, 0),
                pools=(span,) if mode.taps and mode.taps.pool_layers else (),
                raw=span if mode.taps and mode.taps.raw_layers else None,
                reads=tuple(dict(enumerate(v.directions)) for v in vectors[: mode.k])
                if mode.name in ("readings", "live")
                else (),
            )
            for i in range(mode.n_sequences)
        ]

    @property
    def hook_mib(self) -> float:
        return float(self.session.hook_bytes) / 2**20

    def run(self) -> dict[str, float]:
        """Seconds of the prefill, up to the first token, and of one decode after it, steering's set-up included."""
        watched = _Stopwatch(self.session)
        start = time.perf_counter()
        if self.mode.name == "live":
            self._run_live(watched)
        elif self.mode.hook:
            engine.run(watched, self.model, self.requests, taps=self.mode.taps)
        else:
            self._run_plain(watched)
        first, *later = watched.marks
        return {"prefill": first - start, "decode": (later[-1] - first) / len(later)}

    def _run_live(self, session: Any) -> None:
        """As engine.run, with a look at the readings after each decode, as an observer of a session takes it."""
        session.reset()
        session.set_taps()
        compiled = Compiled(self.requests[0], self.model)
        request_id = session.submit(**compiled.arguments(0))
        n_seen = 0

        def look() -> None:
            nonlocal n_seen
            fresh = compiled.own_readings(compiled.shaped(session.readings_of(request_id, n_seen)))
            n_seen += len(fresh[0])

        session.look = look
        while session.busy:
            session.step()
        session.take_results()

    def _run_plain(self, session: Any) -> None:
        session.reset()
        for r in self.requests:
            session.submit(tokens=r.tokens, max_tokens=r.max_tokens, ignore_end=True, **r.sampling.arguments(0))
        while session.busy:
            session.step()
        session.take_results()


class _Stopwatch:
    """A session that notes when each step that gave a token was over, and the look at it."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.look: Callable[[], None] | None = None
        self.marks: list[float] = []

    def step(self, *decide: Any) -> Any:
        tokens = self._session.step(*decide)
        if self.look:
            self.look()
        if tokens:
            self.marks.append(time.perf_counter())
        return tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def _expected(model: Model, mode: _Mode, phase: str) -> float:
    rows = {"add": 1, "turn": 1, "readings": mode.k, "live": mode.k, "personas x16": 3}.get(
        mode.name, 2 * mode.k
    )  # vectors a block
    floats = rows * model.n_layer * model.n_embd
    if phase == "prefill":
        return 1 + floats / float(model._native.n_params)
    return 1 + 4 * floats * mode.n_sequences / float(model._native.n_bytes)


def _row(
    mode: _Mode, phase: str, pairs: list[tuple[float, float]], n_tokens: int, hook_mib: float, expected: float = 1.0
) -> OverheadRow:
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
        expected=expected,
        tokens_per_second=n_tokens / per_run,
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
