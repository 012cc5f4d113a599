"""What steering and capture cost: interleaved runs against the same llama.cpp without the hook."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, Protocol

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
BESIDE = ("readings", "live", "capture", "capture_last", "capture_raw", "personas x16")  # what is no edit of one text
DOSE = 0.05  # the text stays text, and the work does not depend on the values
N_PERSONAS = 16
LEAST_PAIRS = 5


@dataclass(frozen=True)
class Mode:
    """What a row measures. k: vectors, or read-outs, at each block; layers: the blocks, all without; n_sequences:
    computed in one batch.
    """

    name: str
    k: int = 0
    hook: bool = True
    taps: Taps | None = None
    last_layer: bool = False
    n_sequences: int = 1
    layers: tuple[int, ...] | None = None


class Timed(Protocol):
    """Something that can be run again and again: seconds of a prefill, and of one decode after it."""

    def run(self) -> Mapping[str, float]: ...


def modes_of(
    model: Model, operators: Sequence[str] = OPERATORS, ks: Sequence[int] = (1, 8, 64), beside: Sequence[str] = BESIDE
) -> list[Mode]:
    """The modes of measure_overhead, in the order of its rows."""
    all_layers = tuple(range(model.n_layer))
    ks = [k for k in ks if 4 * k <= model.n_embd]
    modes = [Mode("off", hook=False)]
    modes += [Mode(name, k) for name in operators for k in ks]
    modes += [Mode(name, k) for name in ("readings", "live") if name in beside for k in ks if k <= 8]
    taps = {
        "capture": Mode("capture", taps=Taps(pool_layers=all_layers[:-1])),
        "capture_last": Mode("capture_last", taps=Taps(pool_layers=all_layers), last_layer=True),
        "capture_raw": Mode("capture_raw", taps=Taps(raw_layers=all_layers[:-1])),
    }
    modes += [mode for name, mode in taps.items() if name in beside]
    if "personas x16" in beside:
        modes += [Mode("off x16", hook=False, n_sequences=N_PERSONAS), Mode("personas x16", 2, n_sequences=N_PERSONAS)]
    return modes


def measure_overhead(
    model: Model,
    *,
    operators: Sequence[str] = ("add", "cap"),
    ks: Sequence[int] = (1, 8, 64),
    beside: Sequence[str] = BESIDE,
    pairs: int = 30,
    seconds: float | None = None,
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
        operators: of OPERATORS; beside: of BESIDE.
        ks: numbers of vectors in the steering, of which those up to a quarter of the model's width are measured (more
            random directions are too much alike); readings take those up to 8.
        pairs: rounds, at least 2.
        seconds: begin no round that would end later than this, once LEAST_PAIRS are done. Warming up counts.
        prompt_tokens: length of the prefill; decode_tokens: generated one by one after it.
    """
    for given, known, what in ((operators, OPERATORS, "operators"), (beside, BESIDE, "modes")):
        if unknown := set(given) - set(known):
            raise ArgumentError(f"unknown {what} {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if pairs < 2:
        raise ArgumentError(f"pairs must be at least 2, not {pairs}")
    if prompt_tokens < 4 or decode_tokens < 2 or prompt_tokens + decode_tokens + 1 > model.n_ctx:
        raise ArgumentError(f"{prompt_tokens} + {decode_tokens} tokens do not fit n_ctx {model.n_ctx}")
    deadline = None if seconds is None else time.monotonic() + seconds
    modes = modes_of(model, operators, ks, beside)
    vectors = random_vectors(model, 2 * max([*ks, N_PERSONAS]), seed=seed)
    shape = (prompt_tokens, decode_tokens)
    contexts: dict[Any, Any] = {}
    runners = [Runner(model, m, vectors, shape, {} if m.name.startswith("off") else contexts) for m in modes]
    groups = [
        (Runner(model, Mode("plain", hook=False, n_sequences=n), vectors, shape, {}), of_size)
        for n in (1, N_PERSONAS)
        if (of_size := [r for r in runners if r.mode.n_sequences == n])
    ]
    found = interleave(groups, pairs=pairs, deadline=deadline, progress=progress)
    return [_row(r, phase, found[r]) for phase in PHASES for r in runners]


PHASES = ("prefill", "decode")
SHAPES = ((128, 12), (64, 8), (32, 6), (16, 4))  # tokens of the prompt, decodes after it
WANTED_PAIRS = 10


def shape_within(model: Model, seconds: float, modes: Sequence[Mode]) -> tuple[int, int]:
    """The largest of SHAPES at which WANTED_PAIRS rounds of these modes take at most so many seconds, judged by a short
    run; the smallest where none does.
    """
    n_prompt, n_decode = SHAPES[-1]
    speed: dict[int, tuple[float, float]] = {}  # seconds of a token of a prompt, of a decode
    for n in {m.n_sequences for m in modes}:
        runner = Runner(model, Mode("plain", hook=False, n_sequences=n), [], SHAPES[-1], {})
        runner.run()
        took = runner.run()
        speed[n] = took["prefill"] / runner.n_tokens["prefill"], took["decode"]
    for n_prompt, n_decode in SHAPES:
        longest = 0.0
        for n, (token, decode) in speed.items():
            n_runs = 1.5 * sum(m.n_sequences == n for m in modes) + 1  # a plain run beside every two, and first
            longest += n_runs * (token * tokens_of(n, n_prompt) * n + decode * n_decode)
        if longest * (WANTED_PAIRS + 2) <= seconds:  # two rounds to warm up
            break
    return n_prompt, n_decode


def tokens_of(n_sequences: int, prompt_tokens: int) -> int:
    """Prompt tokens of each sequence."""
    return prompt_tokens if n_sequences == 1 else max(2, prompt_tokens // 4)


def interleave(
    groups: Sequence[tuple[Timed, Sequence[Any]]],
    *,
    pairs: int,
    deadline: float | None = None,
    progress: Progress | None = None,
) -> dict[Any, list[tuple[Mapping[str, float], Mapping[str, float]]]]:
    """For each runner of a group, `pairs` of (its seconds, those of the group's first right beside it).

    Plain, two runners, plain, two runners, ...: each has a plain run as its neighbour, before it in one round, after it
    in the next. All are run twice before. deadline: of time.monotonic(), after which no round begins that would not be
    over by then; LEAST_PAIRS are done in any case.
    """
    order: list[tuple[Any, Timed]] = []  # (the runner, or None for a plain run; what is run)
    for plain, runners in groups:
        order.append((None, plain))
        for at, runner in enumerate(runners):
            order.append((runner, runner))
            if at % 2 or at == len(runners) - 1:
                order.append((None, plain))
    for runner in dict.fromkeys(r for _, r in order):
        runner.run()
        runner.run()
    found: dict[Any, list[tuple[Mapping[str, float], Mapping[str, float]]]] = {r: [] for r, _ in order if r is not None}
    longest = 0.0
    for i in range(pairs):
        began = time.monotonic()
        if deadline is not None and i >= min(LEAST_PAIRS, pairs) and began + longest > deadline:
            break
        turn = order[:: 1 if i % 2 else -1]
        seconds = [r.run() for _, r in turn]
        for at, (runner, _) in enumerate(turn):
            if runner is not None:
                next_to = at - 1 if turn[at - 1][0] is None else at + 1
                found[runner].append((seconds[at], seconds[next_to]))
        longest = max(longest, time.monotonic() - began)
        if progress:
            progress(i + 1, pairs)
    return found


def random_vectors(model: Model, n: int, *, seed: int = 0) -> list[PersonaVector]:
    """n vectors with a random direction and the threshold 0 at every block. The model keeps all their mixes compiled,
    as those in use are.
    """
    model.mixes = MixCache(max_bytes=2**30)
    rng = np.random.default_rng(seed)
    shape = (model.n_layer, model.n_embd)
    return [
        PersonaVector(
            rng.standard_normal(shape).astype(np.float32),
            tuple(range(model.n_layer)),
            thresholds=np.zeros(model.n_layer, np.float32),
        )
        for _ in range(n)
    ]


def _steering(mode: Mode, vectors: Sequence[PersonaVector]) -> Steering:
    """K edits of one operator."""
    k = mode.k
    if mode.layers is not None:
        vectors = [replace(v, layers=mode.layers) for v in vectors]
    make: dict[str, Any] = {
        "add": lambda i: vectors[i] * (DOSE / k),
        "turn": lambda i: Add(vectors[i], DOSE / k, keep_norm=True),
        "cap": lambda i: Cap(vectors[i]),
        "floor": lambda i: Floor(vectors[i]),
        "ablate": lambda i: Ablate(vectors[i], share=0.5, layers=mode.layers),
        "redirect": lambda i: Redirect(vectors[i], vectors[k + i], share=0.1, layers=mode.layers),
        "when": lambda i: When(vectors[k + i], vectors[i] * (DOSE / k), on="token"),
    }
    return Steering([make[mode.name](i) for i in range(k)]) if mode.name in make else Steering()


class Runner:
    """A mode on a model: random tokens in, as many tokens out, greedily.

    shape: tokens of the prompt (a quarter of them each where there are several sequences) and decodes after it.
    contexts: kept between runners, so that edits and readings of one batch size share a context, as they do in use.
    """

    def __init__(
        self,
        model: Model,
        mode: Mode,
        vectors: Sequence[PersonaVector],
        shape: tuple[int, int],
        contexts: dict[Any, Any],
    ) -> None:
        self.model, self.mode = model, mode
        n_each = tokens_of(mode.n_sequences, shape[0])
        self.n_tokens = {"prefill": n_each * mode.n_sequences, "decode": mode.n_sequences}
        key = (mode.n_sequences, mode.taps and (mode.taps.pool_layers, mode.taps.raw_layers))
        if key not in contexts:
            contexts[key] = load_core().Session(
                model=model._native,
                n_ctx=n_each + shape[1] + 1,
                n_parallel=mode.n_sequences,
                n_batch=max(512, self.n_tokens["prefill"] if mode.n_sequences > 1 else 0),
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
                Steering([vectors[i] * DOSE, Cap(vectors[len(vectors) // 2 + i])])
                if mode.name.startswith("personas")
                else _steering(mode, vectors),
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

    def begin(self) -> tuple[int, Compiled | None]:
        """Submit the first request to the emptied session: its number, and what it was compiled to with the hook."""
        self.session.reset()
        r = self.requests[0]
        if not self.mode.hook:
            plain = {"tokens": r.tokens, "max_tokens": r.max_tokens, "ignore_end": True}
            return int(self.session.submit(**plain, **r.sampling.arguments(0))), None
        self.session.set_taps()
        compiled = Compiled(r, self.model)
        return int(self.session.submit(**compiled.arguments(0))), compiled

    def _run_live(self, session: Any) -> None:
        """As engine.run, with a look at the readings after each decode, as an observer of a session takes it."""
        request_id, compiled = self.begin()
        assert compiled is not None
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


def expected(model: Model, mode: Mode, phase: str) -> float:
    """1 + what a mode adds over what the model does, at the model's own speed: bytes of vectors over bytes of weights
    for a decode, multiply-adds over multiply-adds for a prompt.
    """
    rows = {"add": 1, "turn": 1, "readings": mode.k, "live": mode.k, "personas": 3}.get(
        mode.name.split()[0], 2 * mode.k
    )  # vectors a block
    floats = rows * len(range(model.n_layer) if mode.layers is None else mode.layers) * model.n_embd
    if phase == "prefill":
        return 1 + floats / float(model._native.n_params)
    return 1 + 4 * floats * mode.n_sequences / float(model._native.n_bytes)


def ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Median of the ratios of pairs, and the 95 % bootstrap interval of that median."""
    seconds = np.array(pairs)
    ratios = seconds[:, 0] / seconds[:, 1]
    draws = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def _row(runner: Runner, phase: str, found: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> OverheadRow:
    mode = runner.mode
    pairs = [(own[phase], plain[phase]) for own, plain in found]
    ratios = [own / plain for own, plain in pairs]
    median, low, high = ratio(pairs)
    return OverheadRow(
        mode=mode.name,
        phase=phase,
        k=mode.k,
        ratio_median=median,
        ratio_low=low,
        ratio_high=high,
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        expected=expected(runner.model, mode, phase),
        tokens_per_second=runner.n_tokens[phase] / float(np.median([own for own, _ in pairs])),
        hook_mib=runner.hook_mib,
        peak_rss_mib=_peak_rss_mib(),
        pairs=len(pairs),
    )


def _peak_rss_mib() -> float:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20


def machine() -> str:
    """CPU, system and versions, in a line: what a figure is of."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            cpu = next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return (
        f"{cpu}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}, llama-cpp-python "
        f"{version('llama-cpp-python')}, personasteer {version('personasteer')}"
    )


def about(model: Model, rows: Sequence[OverheadRow], prompt_tokens: int, decode_tokens: int) -> str:
    """What the rows are of: a sentence for below or above their table."""
    pairs = min(r.pairs for r in rows)
    return sentence(
        f"{model.name} ({model.description})", prompt_tokens, decode_tokens, pairs, model.n_threads, machine()
    )


def sentence(model: str, prompt_tokens: int, decode_tokens: int, pairs: int, threads: int, where: str) -> str:
    """What runs were of: the model, their shape, how many, and on which machine."""
    return (
        f"{model}, a prompt of {prompt_tokens} tokens, then {decode_tokens} one by one, {pairs} pairs, {threads} "
        f"threads. {where}."
    )


def as_json(rows: Sequence[OverheadRow]) -> dict[str, Any]:
    """{"rows": [...]}, as the command line prints it."""
    return {"rows": [asdict(r) for r in rows]}


def as_markdown(rows: Sequence[OverheadRow]) -> str:
    """A table of the rows."""
    lines = [
        "| phase | mode | K | ratio | 95 % interval | expected | min … max | tokens/s | MiB added | peak RSS MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.phase} | {r.mode} | {r.k or ''} | {r.ratio_median:.3f} | {r.ratio_low:.3f} … {r.ratio_high:.3f} | "
        f"{f'{r.expected:.3f}' if r.expected > 1 else ''} | "
        f"{r.ratio_min:.3f} … {r.ratio_max:.3f} | {r.tokens_per_second:.0f} | {r.hook_mib:.1f} | "
        f"{r.peak_rss_mib:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)
