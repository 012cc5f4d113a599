"""The demo: derive a persona on the bundled model, show it, and prove it against controls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from personasteer import plots, traits
from personasteer.derive import elicit, from_elicited, select
from personasteer.errors import ArgumentError
from personasteer.evaluate import bootstrap_interval, log_odds, random_vectors
from personasteer.files import atomic_write, check_output
from personasteer.model import Model, demo_model_path
from personasteer.vectors import PersonaVector

STRENGTHS = (-0.3, -0.15, 0.0, 0.15, 0.3)
SHOWN = (-0.3, 0.0, 0.3)
Stage = Callable[[str], Callable[[int, int], None]]  # names a stage, gives its progress callback


@dataclass(frozen=True)
class DemoReport:
    """All that the demo found out; `summary()` is what `demo --json` prints."""

    model: str
    trait: str
    vector: PersonaVector
    layer_rows: tuple[dict[str, float], ...]  # layer, norm_ratio, separation, split_half_cosine
    dose: tuple[dict[str, float], ...]  # strength, log_odds, delta, low, high
    random: dict[str, float]  # n, mean, p95_abs of |delta| at the largest strength, both signs
    shuffled: dict[str, float]  # vectors from permuted labels, at the largest strength: n, mean_abs of delta
    system_prompt_delta: float  # no vector, the trait's first system prompt instead
    answers: tuple[tuple[str, tuple[str, ...]], ...]  # held-out question, its answers at SHOWN
    vector_path: Path
    plot_path: Path
    picture_path: Path
    seconds: dict[str, float]

    def summary(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "trait": self.trait,
            "layers": list(self.vector.layers),
            "dose": [dict(d) for d in self.dose],
            "random": dict(self.random),
            "shuffled": dict(self.shuffled),
            "system_prompt": {"delta": self.system_prompt_delta},
            "answers": [{"question": q, "strengths": list(SHOWN), "texts": list(a)} for q, a in self.answers],
            "per_layer": [{k: x if np.isfinite(x) else None for k, x in r.items()} for r in self.layer_rows],
            "vector": str(self.vector_path),
            "plot": str(self.plot_path),
            "picture": str(self.picture_path),
            "seconds": dict(self.seconds),
        }


def run_demo(
    out: Path,
    *,
    trait_name: str = "pessimistic",
    n_questions: int = 8,
    n_eval_questions: int = 5,
    n_eval_pairs: int = 3,
    n_random: int = 20,
    seed: int = 0,
    n_threads: int | None = None,
    stage: Stage = lambda _: lambda done, total: None,
) -> DemoReport:
    """Derive, answer, measure, save. Everything reported is on questions that were not used to derive.

    Files in `out`: <trait>.gguf (the control vector), <trait>.png (the dose-response) and <trait>-answers.png (the
    answers, each token on the colour of what the unsteered model reads there).
    """
    start = time.perf_counter()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ArgumentError(f"{out}: cannot write here ({e.strerror})") from e
    trait = traits.find(trait_name)
    if not trait.evaluate_questions or not trait.continuations:
        raise ArgumentError(f"trait {trait.name!r} has no held-out questions or no continuation pairs to measure with")
    vector_path, plot_path = out / f"{trait.name}.gguf", out / f"{trait.name}.png"
    picture_path = out / f"{trait.name}-answers.png"
    for path in (vector_path, plot_path, picture_path):
        check_output(path)
    with Model(demo_model_path(), n_ctx=512, n_parallel=16, n_threads=n_threads, seed=seed) as model:
        model.norms  # noqa: B018 (measured here, once, so that the derive time below is derive's own)
        derive_start = time.perf_counter()
        found = elicit(model, trait, n_questions=n_questions, seed=seed, progress=stage("deriving"))
        vector = from_elicited(model, trait, found, select(found, trait))
        derive_seconds = time.perf_counter() - derive_start

        questions = trait.evaluate_questions[-3:]
        texts = model.chat_batch(
            [q for q in questions for _ in SHOWN],
            steer=[vector * s for _ in questions for s in SHOWN],
            max_tokens=48,
            temperature=0.0,
            repeat_penalty=1.15,
            progress=stage("answering held-out questions"),
        )
        answers = tuple(
            (q, tuple(" ".join(t.split()) for t in texts[i * len(SHOWN) : (i + 1) * len(SHOWN)]))
            for i, q in enumerate(questions)
        )
        picture = plots.png(_picture(model, vector, answers))

        largest = max(STRENGTHS)
        controls = random_vectors(vector, n_random, seed=seed)
        steers = [replace(vector * s, scope="response") for s in STRENGTHS]
        steers += [replace(c * s, scope="response") for c in controls for s in (-largest, largest)]
        assert vector.shuffled is not None
        for directions in vector.shuffled:
            steers.append(replace(replace(vector, directions=directions) * largest, scope="response"))
        odds = log_odds(
            model,
            trait,
            steers,
            n_questions=n_eval_questions,
            n_pairs=n_eval_pairs,
            progress=stage("measuring dose-response and controls"),
        )
        prompted = log_odds(
            model, trait, [None], n_questions=n_eval_questions, n_pairs=n_eval_pairs, system=trait.system[0][0]
        )[0]
        name = model.name
    base = odds[STRENGTHS.index(0.0)]
    points = []
    for s, values in zip(STRENGTHS, odds, strict=False):
        low, high = bootstrap_interval(values - base, seed=seed)
        points.append(
            {
                "strength": s,
                "log_odds": float(values.mean()),
                "delta": float((values - base).mean()),
                "low": low,
                "high": high,
            }
        )
    deltas = (odds - base).mean((1, 2))[len(STRENGTHS) :]
    random_deltas, shuffled_deltas = deltas[: 2 * n_random], deltas[2 * n_random :]
    vector.save(vector_path)
    report = DemoReport(
        model=name,
        trait=trait.name,
        vector=vector,
        layer_rows=_layer_rows(vector),
        dose=tuple(points),
        random={
            "n": n_random,
            "mean": float(random_deltas.mean()),
            "p95_abs": float(np.quantile(np.abs(random_deltas), 0.95)),
        },
        shuffled={"n": len(shuffled_deltas), "mean_abs": float(np.abs(shuffled_deltas).mean())},
        system_prompt_delta=float((prompted - base).mean()),
        answers=answers,
        vector_path=vector_path,
        plot_path=plot_path,
        picture_path=picture_path,
        seconds={},
    )
    _save_plot(report, plot_path)
    atomic_write(picture_path, picture)
    seconds = {"derive": round(derive_seconds, 2), "total": round(time.perf_counter() - start, 2)}
    return replace(report, seconds=seconds)


def _layer_rows(vector: PersonaVector) -> tuple[dict[str, float], ...]:
    assert vector.norms is not None
    assert vector.separations is not None
    assert vector.reliability is not None
    lengths = np.linalg.norm(vector.directions, axis=1)
    return tuple(
        {
            "layer": il,
            "norm_ratio": float(lengths[il] / vector.norms[il]),
            "separation": float(vector.separations[il]),
            "split_half_cosine": float(vector.reliability[il]),
        }
        for il in range(vector.n_layer)
    )


def _picture(model: Model, vector: PersonaVector, answers: tuple[tuple[str, tuple[str, ...]], ...]) -> Figure:
    """The answers on the colours of their readings: <h, v-hat> / m, mean over the blocks, of the unsteered model
    that reads the same words, so that what is coloured is the text and not the vector that was added.
    """
    pieces: list[str] = []
    readings: list[NDArray[np.float64]] = []
    turns: list[tuple[str, int, int]] = []

    def add(name: str, tokens: list[int], values: NDArray[np.float64]) -> None:
        words = [b.decode("utf-8", "replace") for b in model.token_bytes(tokens)]
        turns.append((name, len(pieces), len(pieces) + len(words)))
        pieces.extend(words)
        readings.append(values)

    layers = list(vector.layers)
    axes = vector.directions[layers] / np.linalg.norm(vector.directions[layers], axis=1, keepdims=True)
    for question, texts in answers:
        tokens = model.tokenize(question, add_special=False)
        add("asked", tokens, np.full(len(tokens), np.nan))
        for strength, text in zip(SHOWN, texts, strict=True):
            if not text:
                continue
            all_tokens, n_prompt = model.pair_tokens(question, text)
            (states,) = model.capture([(question, text)], pool="raw", span="response")
            values = np.einsum("tle,le->tl", states[:, layers], axes) / model.norms[layers]
            tokens = all_tokens[n_prompt : n_prompt + len(values)]
            add(f"ρ = {strength:+.1f}" if strength else "unsteered", tokens, values.mean(axis=1))
    return plots.reading_heat_map(
        pieces,
        np.concatenate(readings),
        turns,
        numbered=False,
        label=f"{vector.name}, as the unsteered model reads the text",
        title=f"“{vector.name}” on {model.name}, added at strength ρ",
    )


def _save_plot(report: DemoReport, path: Path) -> None:
    zero = next(d["log_odds"] for d in report.dose if d["strength"] == 0)
    figure = plots.dose_response(
        [d["strength"] for d in report.dose],
        [d["log_odds"] for d in report.dose],
        [(zero + d["low"], zero + d["high"]) for d in report.dose],
        (zero - report.random["p95_abs"], zero + report.random["p95_abs"]),
        baselines=[("system prompt alone", zero + report.system_prompt_delta)],
        title=f"“{report.trait}” on {report.model}, held-out questions",
    )
    atomic_write(path, plots.png(figure))
