"""Fitting a value bias on the running model: what the steering does, what a bias does, how near it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.engine import Request
from personasteer.errors import ModelError
from personasteer.evaluate.evaluation import trait_behind
from personasteer.evaluate.log_odds import Cell, cell_log_odds, make_cells
from personasteer.model import Model
from personasteer.progress import Meter
from personasteer.ship.biases import accepts
from personasteer.ship.control_vector import adding
from personasteer.ship.rewrite import ModelFile, Progress
from personasteer.ship.value_bias import (
    CORRECTIONS,
    calibrate,
    fit,
    naive_solve,
    value_bias_map,
    wanted_sums,
)
from personasteer.ship.writers import norm_behind
from personasteer.statistics import divergence, log_softmax, slope
from personasteer.steering import Edit, SteeredModel, Steering, Term, site_at
from personasteer.traits import neutral_pairs
from personasteer.vectors import PersonaVector

N_QUESTIONS, N_PAIRS = 20, 4  # comparisons of continuations that the effect is calibrated on: pairs differ widely
HELD_OUT = 8  # everyday texts, the first ones, that nothing is fitted to: `verify` compares on them
OTHER_FORMS = "export it as a control vector instead"
TRIAL = "A day."
MOST_OFF = 0.05  # of a shift, and of a state, for the rounding of quantized products


def why_not_values(file: ModelFile) -> str:
    """Why a value bias is no constant in the residual stream of this architecture, or cannot be loaded; "" where it is
    one: softmax weights sum to one, so W_o (repeat b) is added at every token.
    """
    what = f"architecture {file.architecture!r}"
    behind = norm_behind(file)
    if behind:
        return f"{what} normalises what its blocks write ({behind}), so a bias of the values is no constant there"
    for il in range(file.n_layer):
        block = f"blk.{il}"
        for tensor, why in (
            (f"{block}.attn_sinks.weight", "has attention sinks, so its attention weights do not sum to one"),
            (f"{block}.attn_sinks", "has attention sinks, so its attention weights do not sum to one"),
            (f"{block}.attn_sub_norm.weight", "normalises what its attention reads"),
            (f"{block}.attn_gate.weight", "gates what its attention reads"),
        ):
            if tensor in file.tensors:
                return f"{what} {why}"
        if f"{block}.attn_output.weight" not in file.tensors:
            return f"{what} has no attention of the usual kind in block {il}"
        if f"{block}.attn_v.weight" not in file.tensors:
            return f"{what} keeps no values of their own (attn_v) in block {il}"
    for key in ("attention.head_count", "attention.head_count_kv"):
        value = file.fields.get(
            f"{file.architecture}.{key}", file.fields.get(f"{file.architecture}.attention.head_count")
        )
        if not isinstance(value, int):
            return f"{what} has another number of attention heads in each block"
    n_values = file.tensors["blk.0.attn_v.weight"].shape[1]
    if not accepts(file, [f"blk.{il}.attn_v.bias" for il in range(file.n_layer)], n_values):
        return f"llama.cpp loads no value bias for {what}"
    return ""


@dataclass(frozen=True)
class Constants(Edit):
    """Adds rows {il: (n_embd,)} after the attention of blocks, as value biases do."""

    rows: Mapping[int, NDArray[np.float64]] = field(default_factory=dict)

    def terms(self, model: SteeredModel) -> dict[int, Term]:
        return {site_at("mid", il, model): Term(row=row) for il, row in self.rows.items()}

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def check_shift(
    file: ModelFile,
    rows: Mapping[int, NDArray[np.float64]],
    site: str,
    n_threads: int | None,
    path: Path,
    *,
    reordered: bool = False,
) -> None:
    """Raise ModelError where the baked file at `path` does not shift the first biased block's output as the rows that
    its biases stand for do in the engine: some architectures scale what a block writes. `reordered`: with sums that
    were made in another order before it.
    """
    il = min(rows)
    how: dict[str, Any] = {"pool": "raw", "layers": [il], "last_layer": True}
    small: dict[str, Any] = {"n_ctx": 64, "n_parallel": 1, "n_threads": n_threads, "n_gpu_layers": 0, "repack": False}

    def output(model: Model, *edits: Edit) -> NDArray[np.float64]:
        states: NDArray[np.float32] = model.capture([TRIAL], steer=[Steering(edits)], **how)[0][:, il]
        return states.astype(np.float64)

    with Model(file.path, **small) as model:
        before = output(model)
        if site == "block":
            wanted = np.broadcast_to(rows[il], before.shape)
        else:
            wanted = output(model, Constants(rows={il: rows[il]})) - before
    with Model(path, **small) as model:
        made = output(model) - before
    gain = float(np.vdot(made, wanted) / np.vdot(wanted, wanted))
    # rounding before the bias, or by reading it from 16-bit values, may be as large as a small shift, not as a state
    whole = wanted if site == "block" and not reordered else before
    left = float(np.linalg.norm(made - gain * wanted) / np.linalg.norm(whole))
    if not (abs(gain - 1) <= (2 if reordered else 1) * MOST_OFF and left <= MOST_OFF):
        raise ModelError(
            f"{file.path.name}: the bias acts {gain:.2f} times as strongly as it should at block {il}: architecture "
            f"{file.architecture!r} scales what its blocks write, or does something else with it; {OTHER_FORMS}"
        )


def fit_values(
    file: ModelFile,
    vector: PersonaVector,
    rho: float,
    rows: Mapping[int, NDArray[np.float32]],
    *,
    n_threads: int | None,
    stage: Callable[[str], Progress],
) -> tuple[dict[int, NDArray[np.float32]], dict[int, NDArray[np.float64]], dict[str, Any]]:
    """({il: (n_head_kv * head_dim,)}, the constants {il: (n_embd,)} that these add after the attention, how near it
    comes) of the biases that do most nearly what the rows do.

    In the figures: relative errors of the measured shift of the block outputs; the factor that brings the trait's
    log-odds (without a trait, the logits) to those of the steering; KL to the steered and from the unsteered model on
    texts that were not fitted; and what the smallest biases with the right last sum would do ("naive").
    """
    n_head = file.hyperparameter("attention.head_count")
    n_head_kv = int(file.fields.get(f"{file.architecture}.attention.head_count_kv", n_head))
    layers = range(min(rows), file.n_layer)
    maps = {}
    reading = stage("reading attention")
    for done, il in enumerate(layers):
        w_o = file.rows(file.tensors[f"blk.{il}.attn_output.weight"])
        maps[il] = value_bias_map(w_o, n_head, n_head_kv)
        reading(done + 1, len(layers))
    with Model(file.path, n_ctx=512, n_parallel=1, n_threads=n_threads, n_gpu_layers=0, repack=False) as model:
        steered = adding(rows, file.n_layer, vector.name)
        trait = trait_behind(vector)
        cells: tuple[Cell, ...] = ()
        if trait is not None and trait.continuations:
            cells = make_cells(trait.derive_questions[:N_QUESTIONS], trait.selection_pairs, N_PAIRS)
        texts = [*neutral_pairs()[HELD_OUT:]]
        for i, cell in enumerate(cells[::N_PAIRS]):  # another question each, the two sides in turn
            texts.append((cell.question, cell.anti if i % 2 else cell.trait))
        meter = Meter(stage("measuring shifts"), len(texts) * (CORRECTIONS + 3))

        def mean_states(steering: Steering) -> NDArray[np.float64]:
            """(n_layer, n_embd) over the tokens of the answers, each text alike."""
            steers = [steering] * len(texts)
            states = model.capture(texts, last_layer=True, steer=steers, progress=meter.part(len(texts)))
            return np.asarray(states.mean(axis=0, dtype=np.float64))

        def edit(biases: Mapping[int, NDArray[Any]], factor: float = 1.0) -> Steering:
            return Steering([Constants(rows={il: factor * (maps[il] @ b) for il, b in biases.items()})])

        unsteered = mean_states(Steering())
        wanted = mean_states(steered) - unsteered
        norms = model.norms.astype(np.float64)
        found = fit(maps, rows, norms, wanted, lambda b: mean_states(edit(b)) - unsteered)
        effect = _effect(model, cells, texts, steered)
        trying = stage("calibrating")
        tried = 0

        def effect_of(factor: float) -> float:
            nonlocal tried
            tried += 1
            trying(tried, max(tried, 5))
            return effect(edit(found.biases, factor))

        factor, ratio = calibrate(effect_of)
        naive = naive_solve(maps, wanted_sums(rows, file.n_layer)[-1])
        held_out = neutral_pairs()[:HELD_OUT]
        scaled = edit(found.biases, factor)
        kl_steered, kl_baked, kl_naive = _divergences(model, held_out, [steered, scaled, edit(naive)])
        near = _divergences(model, held_out, [scaled], against=steered)[0]
        biases = {il: np.asarray(factor * b, np.float32) for il, b in found.biases.items()}
        constants = {il: np.asarray(maps[il] @ b, np.float64) for il, b in biases.items()}
        return (
            biases,
            constants,
            {
                "factor": factor,
                "effect_ratio": ratio,
                "effect": "log-odds" if cells else "logits",
                "shift_error": found.error,
                "shift_errors": list(found.errors),
                "kl_engine_baked": near,
                "kl_base_engine": kl_steered,
                "kl_base_baked": kl_baked,
                "naive_effect_ratio": effect(edit(naive)),
                "naive_kl_base": kl_naive,
            },
        )


def _effect(
    model: Model, cells: tuple[Cell, ...], texts: list[tuple[str, str]], steered: Steering
) -> Callable[[Steering], float]:
    """How much of the effect of `steered` another steering has: the slope of its changes of the comparisons' log-odds,
    or of the logits, on those of `steered`. The ratio of their means says little where most comparisons hardly change.
    """
    if cells:
        base, full = cell_log_odds(model, cells, [None, steered])

        def of_log_odds(steering: Steering) -> float:
            return slope(cell_log_odds(model, cells, [steering])[0] - base, full - base)

        return of_log_odds
    given = [_logits(model, text, None) for text in texts]
    wanted = [_logits(model, text, steered) - before for text, before in zip(texts, given, strict=True)]
    square = sum(float(np.square(w, dtype=np.float64).sum()) for w in wanted)

    def of_logits(steering: Steering) -> float:
        changes = (_logits(model, text, steering) - before for text, before in zip(texts, given, strict=True))
        return sum(float(np.vdot(c, w)) for c, w in zip(changes, wanted, strict=True)) / square

    return of_logits


def _logits(model: Model, text: tuple[str, str], steering: Steering | None) -> NDArray[np.float32]:
    """(tokens of the answer, n_vocab), each before its token."""
    tokens, n_prompt = model.pair_tokens(*text)
    request = Request(tokens, None, steering or Steering(), outputs=(n_prompt - 1, len(tokens)), keep_logits=True)
    logits: NDArray[np.float32] = model.run_requests([request])[0]["logits"][:-1]
    return logits


def _divergences(model: Model, texts: Any, steerings: list[Steering], against: Steering | None = None) -> list[float]:
    """Mean KL per token from the unsteered model, or from `against`, to each steering, over the answers."""
    out: list[list[NDArray[np.float64]]] = [[] for _ in steerings]
    for text in texts:
        p = log_softmax(_logits(model, text, against))
        for k, steering in enumerate(steerings):
            out[k].append(divergence(p, log_softmax(_logits(model, text, steering))))
    return [float(np.concatenate(kls).mean()) for kls in out]
