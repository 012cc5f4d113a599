"""Deriving persona vectors: elicit or replay, select, contrast, choose layers and strengths."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer._native import build_id
from personasteer.derive.calibration import (
    FORMS,
    N_BLOCKS,
    find_window,
    selection_cells,
    sweep,
    with_calibration,
)
from personasteer.derive.contrast import check_method, contrast, halfway, mean_reading, vector_from_samples
from personasteer.derive.directions import Samples, check_held_out, difference_of_means
from personasteer.derive.elicit import (
    Elicited,
    Response,
    check_elicitation,
    chosen_questions,
    continuation_responses,
    elicit,
    given_instead,
    load_responses,
    replay,
    responses_text,
)
from personasteer.derive.judge import Judge, judge_name
from personasteer.derive.selection import Selection, require_enough, select, select_all
from personasteer.engine import Progress
from personasteer.errors import ArgumentError, advising
from personasteer.evaluate.evaluation import NAME_ONE, trait_of
from personasteer.model import Model
from personasteer.progress import Meter
from personasteer.steering import check_fits
from personasteer.traits import Trait, find
from personasteer.vectors import PersonaVector
from personasteer.work import Work, digest

__all__ = [
    "Elicited",
    "Response",
    "Samples",
    "Selection",
    "calibrate",
    "continuation_responses",
    "contrast",
    "derive",
    "difference_of_means",
    "elicit",
    "from_elicited",
    "load_responses",
    "replay",
    "responses_text",
    "select",
]


def derive(
    model: Model,
    trait: str | Trait,
    *,
    n_questions: int | None = None,
    max_tokens: int = 40,
    temperature: float = 0.1,
    n_rollouts: int = 1,
    skip_tokens: int = 0,
    responses: Sequence[Response] | str | os.PathLike[str] | None = None,
    continuations: bool = False,
    method: str = "mean",
    position: str = "response",
    exclude_massive: bool = False,
    judge: Judge | None = None,
    filtered: bool = True,
    calibrated: bool = True,
    layers: Sequence[int] | None = None,
    form: str = "window",
    work: str | os.PathLike[str] | None = None,
    keep_responses: Callable[[str], object] | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> PersonaVector:
    """A trait's persona vector: v_il = mean response activation under prompts for the trait - under prompts against.

    The model answers the trait's questions under each of its contrastive system prompts; block outputs are averaged
    over the answer's tokens (t >= P). Answers that refuse, do not show their side of the trait or fall apart are
    dropped with their opposites. Then each of several blocks is steered by the direction, on the questions that it was
    derived from, and the blocks that move the trait most become the vector's; doses on either side give the window in
    which the text stays coherent, and the recommended strength. The direction at the last prompt token comes along, for
    monitoring, where the two sides follow different prompts. The same seed, file, build and number of threads give the
    same vector, byte for byte.

    Args:
        trait: a name of the library (`personasteer traits`), the path of a .toml or .json file, or a Trait.
        n_questions: questions per system prompt, drawn by the seed; all of the trait's when None.
        max_tokens: length of an answer, at most.
        temperature: of sampling the answers; low, so that few of them give a direction that another seed repeats.
        n_rollouts: answers to each question under each prompt.
        skip_tokens: first tokens of an answer that its mean leaves out.
        responses: given answers (or a JSONL file of them, see load_responses) to read instead of sampling any.
        continuations: read the trait's own continuation pairs as answers to its questions instead of sampling any,
            for a model that refuses the trait, cannot act it or takes no system prompt. Every third pair is read, the
            ones that layers and strengths are chosen on; `evaluate` uses the others.
        method: "mean" (difference of means), "pca" (of paired differences) or "probe" (logistic regression).
        position: "response", or "last-prompt": the direction at token P - 1 becomes the vector's own.
        exclude_massive: leave out dimensions whose activation is large whatever the text says.
        judge: scores answers instead of their log-odds under the contrasting prompts, see personasteer.derive.judge.
        filtered: drop refusals, off-trait and incoherent answers; False keeps all that are not empty.
        calibrated: sweep over blocks and doses; False takes layers by held-out separation, and a window of +-0.5.
        layers: recommended blocks to steer at, instead of the sweep's.
        form: "window", neighbouring blocks; "single", the one block that moves the trait most at equal KL;
            "incremental", every block with what the direction gains there (see PersonaVector.incremental).
        work: folder in which finished parts are kept; started again with it, an interrupted run goes on.
        keep_responses: called with the answers that count, as JSONL that `responses` takes.
        seed: of sampling; the model's when None.
        progress: called with (done, total) texts.

    Raises:
        TraitError: unknown trait, or a file that breaks the rules.
        TemplateError: no chat template or no system role, and nothing given to read.
        ElicitationError: too few answers show the trait, or as many as by chance; the direction does not tell held-out
            answers apart; the vector does not steer.

    Source: arXiv 2507.21509, section 2.2.

    Example:
        >>> vector = ps.derive(model, "pessimistic", continuations=True, n_questions=3, calibrated=False)
        >>> vector.directions.shape
        (30, 576)
    """
    trait = find(trait) if isinstance(trait, str) else trait
    if judge is not None and not filtered:
        raise ArgumentError("a judge scores answers for the filter: give one of judge and filtered=False")
    seed = model.seed if seed is None else seed
    check_method(method)
    check_position(position)
    check_form(form, chosen=layers is not None, calibrated=calibrated)
    if layers is not None:
        layers = model.check_layers(layers)  # before the work
    given = load_responses(responses) if isinstance(responses, (str, os.PathLike)) else responses
    if continuations:
        if given is not None:
            raise ArgumentError("give one of responses and continuations")
        if position != "response":
            raise ArgumentError("continuations follow the same prompt: its last token is the same for either side")
        given = continuation_responses(trait, n_questions, seed)
    if given is None:
        check_elicitation(model, trait, max_tokens, n_rollouts, skip_tokens)
        n_texts = 4 * n_rollouts * len(chosen_questions(trait, n_questions, seed)) * len(trait.system)
        options: dict[str, Any] = {
            "n_questions": n_questions,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "n_rollouts": n_rollouts,
            "skip_tokens": skip_tokens,
            "seed": seed,
        }
    else:
        n_texts = 2 * len(given)
        options = {"responses": digest([asdict(r) for r in given]), "skip_tokens": skip_tokens}
        if continuations:
            options["continuations"] = True
    parts = {"elicit": n_texts, "judge": n_texts // 2 if judge else 0}
    parts |= {"sweep": 36 * N_BLOCKS if calibrated and layers is None else 0, "window": 100 if calibrated else 0}
    meter = Meter(progress, sum(parts.values()))
    plan = {
        "model": model.fingerprint,
        "build": build_id(),
        "personasteer": version("personasteer"),
        "n_ctx": model.n_ctx,
        "threads": model.n_threads,
        "trait": digest(trait.as_dict()),
        **options,
        "judge": getattr(judge, "identity", judge_name(judge)) if judge else None,
        "method": method,
        "position": position,
        "exclude_massive": exclude_massive,
        "filtered": filtered,
        "form": form,
        "layers": list(layers) if layers is not None else None,
    }
    with Work(None if work is None else Path(work), plan) as kept:
        if given is None:
            found = elicit(
                model,
                trait,
                n_questions=n_questions,
                max_tokens=max_tokens,
                temperature=temperature,
                n_rollouts=n_rollouts,
                skip_tokens=skip_tokens,
                seed=seed,
                work=kept,
                progress=meter.part(parts["elicit"]),
            )
        else:
            read = meter.part(parts["elicit"])
            found = replay(model, given, skip_tokens=skip_tokens, work=kept, progress=read)
            if continuations:
                found = replace(found, options={**found.options, "answers": "continuations"})
        scores = None
        if judge is not None:
            scores = _judged(judge, trait, found, kept, meter.part(parts["judge"]))
        selection = select(found, trait, scores=scores) if filtered else select_all(found)
        require_enough(selection, trait, model.path.name)
        if keep_responses is not None:
            keep_responses(responses_text(found, sorted(i for contrast in selection.kept for i in contrast)))
        if continuations:
            what_helps = "derive it from more continuation pairs, or from other answers (--responses)"
        else:
            more = "questions" if given is None else "answers"
            what_helps = f"derive it from more {more}, or from {given_instead(trait)}"
        with advising(what_helps):
            vector = from_elicited(
                model,
                trait,
                found,
                selection,
                method=method,
                position=position,
                exclude_massive=exclude_massive,
                layers=layers,
                seed=seed,
            )
        if judge is not None:
            vector = replace(vector, provenance={**vector.provenance, "judge": judge_name(judge)})
        if not calibrated:
            return vector
        cells = selection_cells(model, trait, found, selection.kept)
        systems = trait.system[0] if model.takes_system else None
        if layers is None:
            swept = meter.part(parts["sweep"])
            with advising(what_helps):
                vector, table = sweep(model, vector, cells, systems=systems, form=form, work=kept, progress=swept)
                if vector.aurocs is not None:
                    check_held_out(vector.aurocs, vector.layers, len(selection.kept))
            vector = with_calibration(vector, sweep=table)
        questions = list(dict.fromkeys(c.question for c in cells))
        dosed = meter.part(parts["window"])
        vector, doses = find_window(model, vector, questions, systems=systems, work=kept, progress=dosed)
        return with_calibration(vector, doses=doses)


def _judged(judge: Judge, trait: Trait, found: Elicited, kept: Work, progress: Progress | None) -> NDArray[np.float64]:
    """The judge's scores of all answers, kept every 32."""
    pairs = [(r.prompt, r.text) for r in found.rollouts]
    meter = Meter(progress, len(pairs))
    scores = []
    for begin in range(0, len(pairs), 32):
        chunk = pairs[begin : begin + 32]
        asked = partial(judge.score, trait, chunk, progress=meter.part(len(chunk)))
        scores.append(kept.value(f"scores-{begin // 32}", asked))
    return np.concatenate(scores)


def check_position(position: str) -> str:
    if position not in ("response", "last-prompt"):
        raise ArgumentError(f"position must be response or last-prompt, not {position!r}")
    return position


def check_form(form: str, *, chosen: bool, calibrated: bool) -> str:
    """Raise ArgumentError for an unknown form, and for one that the sweep must choose where there is none."""
    if form not in FORMS:
        raise ArgumentError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
    if form != "window" and (chosen or not calibrated):
        raise ArgumentError(f"form {form!r} is the sweep's choice: it goes with no given layers, and with calibration")
    return form


def from_elicited(
    model: Model,
    trait: Trait,
    found: Elicited,
    selection: Selection | None = None,
    *,
    method: str = "mean",
    position: str = "response",
    exclude_massive: bool = False,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> PersonaVector:
    """The vector of answers that `elicit` or `replay` has gathered, not calibrated; of all that are not empty without a
    selection. It has a direction at the last prompt token where the two sides follow different prompts.

    Raises ArgumentError for position="last-prompt" where they do not.
    """
    selection = selection or select_all(found)
    require_enough(selection, trait, model.path.name)
    responses, last_prompt = (found.samples(selection.kept, last_prompt=at) for at in (False, True))
    rows = found.rollouts
    prompts_differ = any(rows[a].system != rows[b].system for a, b in selection.kept)
    if position == "last-prompt" and not prompts_differ:
        raise ArgumentError("both sides follow the same prompts: their last tokens are the same")
    return vector_from_samples(
        model,
        responses if position == "response" else last_prompt,
        name=trait.name,
        layers=layers,
        last_prompt=difference_of_means(last_prompt) if prompts_differ else None,
        method=method,
        exclude_massive=exclude_massive,
        seed=seed,
        provenance={
            "trait": trait.name,
            "texts": trait.as_dict(),
            "pool": "response mean" if position == "response" else "last prompt token",
            "prompts_sha256": digest(trait.system, trait.derive_questions),
            "elicitation": selection.summary(),
            **found.options,
        },
    )


def calibrate(
    model: Model,
    vector: PersonaVector,
    *,
    trait: Trait | None = None,
    sweep_layers: bool = True,
    responses: Sequence[Response] | None = None,
    progress: Progress | None = None,
) -> PersonaVector:
    """A vector of any origin with blocks, window, strength and norms found on this model, as `derive` finds them.

    Args:
        trait: what it is measured on; the vector's own (see personasteer.evaluate.trait_of) when None.
        sweep_layers: choose the blocks anew; the vector's stay when False.
        responses: answers that show the trait and its opposite, read again to set thresholds halfway between their
            mean readings; the vector's thresholds stay when None.

    Raises:
        TraitError: a vector without a trait. IncompatibleVector: a model of another shape.
        ElicitationError: no block moves the trait the right way; too few of the given answers show it; for a trait
            without continuations, answers of either side that begin alike.
        TemplateError: a trait without continuations, on a model without a system role.
    """
    check_fits(vector, model)
    trait = trait_of(vector, trait, hint=NAME_ONE)
    systems = trait.system[0] if model.takes_system else None
    n_replay = 2 * len(responses) if responses else 0
    n_sweep = 36 * N_BLOCKS if sweep_layers else 0
    meter = Meter(progress, n_replay + n_sweep + 100)
    vector = replace(
        vector, norms=model.norms, means=mean_reading(model.means[None], vector.directions), window=(-0.5, 0.5)
    )
    found: Elicited | None = None
    kept: tuple[tuple[int, int], ...] = ()
    if responses:
        found = replay(model, responses, progress=meter.part(n_replay))
        selection = select(found, trait)
        require_enough(selection, trait, model.path.name)
        samples, kept = found.samples(selection.kept), selection.kept
        vector = replace(vector, thresholds=halfway(samples, vector.directions))
    cells = selection_cells(model, trait, found, kept)
    if sweep_layers:
        vector, table = sweep(model, vector, cells, systems=systems, progress=meter.part(n_sweep))
        vector = with_calibration(vector, sweep=table)
    questions = list(dict.fromkeys(c.question for c in cells))
    vector, doses = find_window(model, vector, questions, systems=systems, progress=meter.part(100))
    return with_calibration(vector, doses=doses, model=model.fingerprint)
