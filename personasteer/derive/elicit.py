"""Make a model show a trait and its opposite, and record its activations while it does."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.derive.directions import Samples
from personasteer.engine import Progress, Request, Sampling, Taps
from personasteer.errors import ArgumentError, TemplateError, TraitError
from personasteer.model import Model, pooled_mean
from personasteer.progress import Meter
from personasteer.traits import Trait
from personasteer.work import Part, Work, digest

MIN_P = 0.02  # of sampling answers, the only cut
LEAST_CONTINUATIONS = 12  # a third is read: two for either half on which directions are tested
N_SCORED = 24  # first tokens of an answer that its log-odds are taken of: reading costs as much as writing


@dataclass(frozen=True)
class Rollout:
    """One answer.

    pair, question, draw: which system prompts, which question, which of several answers; both answers of a contrast
    share all three. log_p: mean log p per token under its own system prompt; log_odds: mean log p per token, of the
    first 24, under the prompt for its own side minus that under the opposite one, in nats, of another pair of prompts
    where there is one: nearly every answer is likely under the prompt that it was sampled from; contrasted: whether
    there are two such prompts. n_tokens: of the answer.
    """

    pair: int
    question: int
    draw: int
    positive: bool
    system: str | None
    prompt: str
    text: str
    n_tokens: int
    log_p: float
    log_odds: float
    contrasted: bool = True


@dataclass(frozen=True, eq=False)
class Elicited:
    """Answers under both kinds of system prompts, `rollouts`, with what they did inside.

    responses: mean block outputs over the answer's tokens, row i of rollout i, (n, n_layer, n_embd) float32;
    last_prompt: at token P - 1; options: how they were elicited.
    """

    rollouts: tuple[Rollout, ...]
    responses: NDArray[np.float32]
    last_prompt: NDArray[np.float32]
    options: Mapping[str, Any]

    @property
    def contrasts(self) -> list[tuple[int, int]]:
        """(positive, negative) row numbers of answers to the same question under the same pair of prompts."""
        places: dict[tuple[int, int, int], dict[bool, int]] = {}
        for i, r in enumerate(self.rollouts):
            places.setdefault((r.pair, r.question, r.draw), {})[r.positive] = i
        return [(both[True], both[False]) for both in places.values() if len(both) == 2]

    def samples(self, contrasts: Sequence[tuple[int, int]], *, last_prompt: bool = False) -> Samples:
        """The activations of these contrasts, pair by pair."""
        acts = self.last_prompt if last_prompt else self.responses
        positive, negative = (list(side) for side in zip(*contrasts, strict=True))
        groups = self._groups(positive)
        return Samples(acts[positive], acts[negative], groups, groups)

    def _groups(self, positive: Sequence[int]) -> NDArray[np.int64]:
        """What splits into halves keep together, of these positive answers: those to one question, or, where the same
        words are given to several questions without system prompts, those of the same words.
        """
        rows = self.rollouts
        places = {(r.text, r.question) for r in rows if r.positive}
        texts = list(dict.fromkeys(r.text for r in rows if r.positive))  # in order: the split is the same in each run
        if len(texts) == len(places) or any(r.system is not None for r in rows):
            return np.array([rows[i].question for i in positive])
        number = {text: k for k, text in enumerate(texts)}
        return np.array([number[rows[i].text] for i in positive])


def elicit(
    model: Model,
    trait: Trait,
    *,
    n_questions: int | None = None,
    max_tokens: int = 40,
    temperature: float = 0.1,
    n_rollouts: int = 1,
    skip_tokens: int = 0,
    seed: int = 0,
    work: Work | None = None,
    progress: Progress | None = None,
) -> Elicited:
    """Ask each question under every system prompt of the trait, sample answers, keep pooled activations.

    Activations are pooled inside the graph while the answers are generated: no second pass. Each answer is then read
    under the next pair of system prompts, for its log-odds. Questions under one system prompt share its computed text.

    Args:
        n_questions: how many of the trait's questions to ask, drawn by `seed`; all when None.
        max_tokens: length of an answer, at most.
        temperature: of sampling; 0 is greedy.
        n_rollouts: answers to each question under each prompt.
        skip_tokens: first tokens of the answer that are left out of its mean.
        work: where finished parts (one per pair of system prompts) are kept.

    Raises:
        TemplateError: no chat template, or one that takes no system message.
    """
    check_elicitation(model, trait, max_tokens, n_rollouts, skip_tokens)
    questions = chosen_questions(trait, n_questions, seed)
    sampling = Sampling(temperature, top_k=0, top_p=1.0, min_p=MIN_P, seed=seed)
    per_part = 2 * len(questions) * n_rollouts
    meter = Meter(progress, 3 * per_part * len(trait.system))
    parts = []
    for k in range(len(trait.system)):

        def compute(k: int = k) -> Part:
            plan = [(positive, q, draw) for positive in (True, False) for q in questions for draw in range(n_rollouts)]
            texts = [_asked(trait, k, q, draw, positive) for positive, q, draw in plan]
            prompts = [model.measured_prompt(t.prompt, t.system) for t in texts]
            requests = [
                Request(
                    tokens,
                    len(tokens),
                    max_tokens=max_tokens,
                    sampling=sampling,
                    pools=((len(tokens) + skip_tokens, -1), (len(tokens) - 1, len(tokens))),
                    share_prefix=True,
                    n_logprobs=0,
                )
                for tokens in prompts
            ]
            taps = Taps(pool_layers=tuple(range(model.n_layer)), n_pools=2)
            results = model.run_alone(requests, taps=taps, progress=meter.part(per_part), first=k * per_part)
            answers = [r["tokens"] for r in results]
            own = [np.asarray(r["logprobs"][: len(a)]) for r, a in zip(results, answers, strict=True)]
            odds = _contrasted(model, texts, answers, own, meter.part(2 * per_part))
            decoded = [r["text"].decode("utf-8", "replace") for r in results]
            return _part(texts, decoded, answers, own, odds, results)

        parts.append(_kept(work, f"answers-{k}", compute, meter, 3 * per_part))
    options = {
        "n_questions": len(questions),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "n_rollouts": n_rollouts,
        "seed": seed,
    }
    return _joined(parts, options | ({"skip_tokens": skip_tokens} if skip_tokens else {}))


@dataclass(frozen=True)
class Response:
    """A given answer, `text`, to a prompt: under which system prompt (None: none), and whether it shows the trait
    (`positive`). Answers of one prompt, pair and draw make a contrast: pair counts system prompts, draw the answers to
    the same ones.
    """

    prompt: str
    text: str
    positive: bool
    system: str | None = None
    pair: int = 0
    draw: int = 0


def replay(
    model: Model,
    responses: Sequence[Response],
    *,
    skip_tokens: int = 0,
    work: Work | None = None,
    progress: Progress | None = None,
) -> Elicited:
    """The activations of given answers, teacher-forced: the same text on any file, quantization or fine-tune.

    Answers to one question of the same `pair` and `draw` are a contrast, and need one on either side.

    Raises:
        TemplateError: answers have system prompts, and the template takes no system message.
        ArgumentError: no contrast, an answer without tokens.
    """
    if any(r.system is not None for r in responses):
        _check_system(model)
    questions = {prompt: i for i, prompt in enumerate(dict.fromkeys(r.prompt for r in responses))}
    systems: dict[tuple[str, int, int, bool], str | None] = {}
    for r in responses:
        key = (r.prompt, r.pair, r.draw, r.positive)
        if key in systems:
            raise ArgumentError(f"two answers to {r.prompt!r:.60} are the same side of the same pair and draw")
        systems[key] = r.system
    whole = _pairs_of(responses)
    texts = []
    for r in responses:
        opposite = systems.get((r.prompt, r.pair, r.draw, not r.positive), r.system)
        own = (r.system, opposite) if r.positive else (opposite, r.system)
        others = [whole[p] for p in sorted(whole, key=lambda p: (p <= r.pair, p)) if whole[p] != own]
        read = _sides(others[0] if others and None not in own else own, r.positive)
        of_prompt = (r.pair, questions[r.prompt], r.draw, r.positive, r.system, r.prompt)
        texts.append(_Given(*of_prompt, *read, answer=r.text))
    if not any((t.prompt, t.pair, t.draw, not t.positive) in systems for t in texts):
        raise ArgumentError("no question has an answer on either side: nothing to contrast")
    n_part = 64
    meter = Meter(progress, 3 * len(texts))
    parts = []
    for begin in range(0, len(texts), n_part):
        chunk = texts[begin : begin + n_part]

        def compute(chunk: list[_Given] = chunk) -> Part:
            answers = [_answer_tokens(model, t.answer) for t in chunk]
            requests = []
            for t, answer in zip(chunk, answers, strict=True):
                prompt = model.measured_prompt(t.prompt, t.system)
                if len(answer) <= skip_tokens:
                    raise ArgumentError(f"the answer {t.answer!r:.60} has no tokens to average over")
                n = len(prompt)
                requests.append(
                    Request(
                        [*prompt, *answer],
                        n,
                        outputs=(n - 1, n + len(answer)),  # the last one for the last block alone, which pools outputs
                        keep_scores=True,
                        pools=((n + skip_tokens, n + len(answer)), (n - 1, n)),
                        share_prefix=True,
                    )
                )
            taps = Taps(pool_layers=tuple(range(model.n_layer)), n_pools=2)
            results = model.run_alone(requests, taps=taps, progress=meter.part(len(chunk)))
            own = [r["scores"][: len(a)] for r, a in zip(results, answers, strict=True)]
            odds = _contrasted(model, chunk, answers, own, meter.part(2 * len(chunk)))
            return _part(chunk, [t.answer for t in chunk], answers, own, odds, results)

        parts.append(_kept(work, f"replayed-{begin // n_part}", compute, meter, 3 * len(chunk)))
    skipped = {"skip_tokens": skip_tokens} if skip_tokens else {}
    return _joined(parts, {"responses_sha256": digest([asdict(r) for r in responses])} | skipped)


def continuation_responses(trait: Trait, n_questions: int | None = None, seed: int = 0) -> list[Response]:
    """The trait's selection pairs of continuations as answers to each of its questions, without a system prompt.

    Raises ArgumentError for a trait of fewer than twelve continuation pairs: every third is read, and the vector is
    evaluated on the others.
    """
    if not _has_enough(trait):
        raise ArgumentError(
            f"trait {trait.name!r} has {len(trait.continuations)} continuation pairs: deriving from them takes "
            f"{LEAST_CONTINUATIONS}"
        )
    questions = [trait.derive_questions[q] for q in chosen_questions(trait, n_questions, seed)]
    return [
        Response(question, text, side == 0, pair=k)
        for k, pair in enumerate(trait.selection_pairs)
        for question in questions
        for side, text in enumerate(pair)
    ]


def load_responses(path: str | os.PathLike[str]) -> list[Response]:
    """Answers of a JSONL file, one object a line: "question" (or "prompt"), "answer" (or "response"), "positive"
    (true or false), and, where they are known, "system", "pair", "draw"; what responses_text gives.

    Raises TraitError with the number of the line that cannot be read.
    """
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise TraitError(f"{path}: cannot be read ({e})") from e
    out = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            prompt, text = data.get("question", data.get("prompt")), data.get("answer", data.get("response"))
            positive, system = data.get("positive"), data.get("system")
            if not (isinstance(prompt, str) and isinstance(text, str) and isinstance(positive, bool)):
                raise TypeError('"question" and "answer" must be texts and "positive" true or false')
            if not (system is None or isinstance(system, str)):
                raise TypeError('"system" must be a text')
            (prompt + text + (system or "")).encode()  # half a surrogate pair, which JSON can hold, is a ValueError
            pair, draw = data.get("pair", 0), data.get("draw", 0)
            if not (type(pair) is int and type(draw) is int):
                raise TypeError('"pair" and "draw" must be whole numbers')
            out.append(Response(prompt, text, positive, system, pair, draw))
        except (ValueError, TypeError, AttributeError, RecursionError) as e:
            raise TraitError(f"{path}, line {number}: {e}") from e
    if not out:
        raise TraitError(f"{path}: holds no answer")
    return out


def responses_text(found: Elicited, rows: Sequence[int] | None = None) -> str:
    """The JSONL that `load_responses` reads: the answers of these rows, all when None."""
    out = []
    for i in range(len(found.rollouts)) if rows is None else rows:
        r = found.rollouts[i]
        data = {"question": r.prompt, "system": r.system, "answer": r.text, "positive": r.positive}
        out.append(json.dumps({**data, "pair": r.pair, "draw": r.draw}, ensure_ascii=False))
    return "".join(line + "\n" for line in out)


def given_instead(trait: Trait) -> str:
    """What answers of another origin a vector of this trait may be derived from, with the options."""
    return "answers that are given (" + ("--continuations, " if _has_enough(trait) else "") + "--responses)"


def _has_enough(trait: Trait | None) -> bool:
    return trait is not None and len(trait.continuations) >= LEAST_CONTINUATIONS


def check_elicitation(model: Model, trait: Trait, max_tokens: int, n_rollouts: int, skip_tokens: int) -> None:
    """Raise what is wrong with the arguments, or the model's template, before the work."""
    for name, value, low in (
        ("max_tokens", max_tokens, 1),
        ("n_rollouts", n_rollouts, 1),
        ("skip_tokens", skip_tokens, 0),
    ):
        if value < low:
            raise ArgumentError(f"{name} must be at least {low}, not {value}")
    if skip_tokens >= max_tokens:
        raise ArgumentError(f"skip_tokens {skip_tokens} leaves nothing of answers of {max_tokens} tokens")
    _check_system(model, trait)


def chosen_questions(trait: Trait, n_questions: int | None, seed: int) -> list[int]:
    """Which of the trait's derive questions are asked. Raises ArgumentError for less than one."""
    if n_questions is not None and n_questions < 1:
        raise ArgumentError(f"n_questions must be at least 1, not {n_questions}")
    n = len(trait.derive_questions)
    if n_questions is None or n_questions >= n:
        return list(range(n))
    return sorted(int(q) for q in np.random.default_rng(seed).permutation(n)[:n_questions])


@dataclass(frozen=True)
class _Given:
    """An answer to come, or one that is there; same, opposite: the prompts that its log-odds are taken under."""

    pair: int
    question: int
    draw: int
    positive: bool
    system: str | None
    prompt: str
    same: str | None
    opposite: str | None
    answer: str = ""


def _asked(trait: Trait, pair: int, question: int, draw: int, positive: bool) -> _Given:
    own = trait.system[pair][0 if positive else 1]
    read = _sides(trait.system[(pair + 1) % len(trait.system)], positive)
    return _Given(pair, question, draw, positive, own, trait.derive_questions[question], *read)


def _sides(prompts: tuple[str | None, str | None], positive: bool) -> tuple[str | None, str | None]:
    """(same, opposite) of (for the trait, against it)."""
    return (prompts[0], prompts[1]) if positive else (prompts[1], prompts[0])


def _pairs_of(responses: Sequence[Response]) -> dict[int, tuple[str, str]]:
    """The system prompts of each pair whose answers share one on either side, by pair."""
    found: dict[int, tuple[set[str | None], set[str | None]]] = {}
    for r in responses:
        found.setdefault(r.pair, (set(), set()))[0 if r.positive else 1].add(r.system)
    out = {}
    for pair, (positive, negative) in sorted(found.items()):
        both = (*positive, *negative)
        if len(positive) == len(negative) == 1 and both[0] is not None and both[1] is not None:
            out[pair] = (both[0], both[1])
    return out


def _contrasted(
    model: Model,
    texts: Sequence[_Given],
    answers: Sequence[Sequence[int]],
    own: Sequence[NDArray[np.float64]],
    progress: Progress | None,
) -> list[float]:
    """Mean log p per token of the answers' first 24 tokens under `same` minus that under `opposite`; 0 for an empty
    one.

    own: log p of the tokens under the prompt that they were given under, which are not computed again.
    """
    means = {(i, t.system): _mean(p[:N_SCORED]) for i, (t, p) in enumerate(zip(texts, own, strict=True))}
    sides = [(i, t.same) for i, t in enumerate(texts)] + [(i, t.opposite) for i, t in enumerate(texts)]
    at = [(i, system) for i, system in dict.fromkeys(sides) if answers[i] and (i, system) not in means]
    requests = []
    for i, system in at:
        prompt = model.measured_prompt(texts[i].prompt, system)
        requests.append(Request.scored([*prompt, *answers[i][:N_SCORED]], len(prompt)))
    results = model.run_alone(requests, progress=progress)
    means |= {place: float(r["scores"].mean()) for place, r in zip(at, results, strict=True)}
    return [means[i, t.same] - means[i, t.opposite] if answers[i] else 0.0 for i, t in enumerate(texts)]


def _answer_tokens(model: Model, text: str) -> list[int]:
    """The tokens whose text this is: without the space that some tokenizers put before every text."""
    tokens = model.tokenize(text, add_special=False)
    return tokens[1:] if model.detokenize(tokens[1:]) == text else tokens


def _check_system(model: Model, trait: Trait | None = None) -> None:
    if not model.takes_system:
        has = "a chat template that takes no system message" if model.has_template else "no chat template"
        instead = "derive from the trait's continuations (--continuations), or " if _has_enough(trait) else ""
        raise TemplateError(
            f"{model.path.name} has {has}, which eliciting needs; {instead}contrast prompts that carry the instruction "
            "themselves"
        )


def _part(
    texts: Sequence[_Given],
    decoded: Sequence[str],
    answers: Sequence[Sequence[int]],
    own: Sequence[NDArray[np.float64]],
    odds: Sequence[float],
    results: Sequence[dict[str, Any]],
) -> Part:
    rollouts = []
    for t, text, a, p, o in zip(texts, decoded, answers, own, odds, strict=True):
        numbers = (len(a), _mean(p), o, t.same != t.opposite)
        rollouts.append(asdict(Rollout(t.pair, t.question, t.draw, t.positive, t.system, t.prompt, text, *numbers)))
    pools = {
        name: np.stack([pooled_mean(r, k) for r in results]) for k, name in enumerate(("responses", "last_prompt"))
    }
    return pools, rollouts


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _kept(work: Work | None, name: str, compute: Any, meter: Meter, n: int) -> Part:
    if work is None:
        part: Part = compute()
        return part
    computed = False

    def noted() -> Part:
        nonlocal computed
        computed = True
        part: Part = compute()
        return part

    found = work.part(name, noted)
    if not computed:
        skipped = meter.part(n)
        if skipped:
            skipped(1, 1)
    return found


def _joined(parts: Sequence[Part], options: Mapping[str, Any]) -> Elicited:
    arrays = {key: np.concatenate([p[0][key] for p in parts]) for key in ("responses", "last_prompt")}
    rollouts = tuple(Rollout(**r) for p in parts for r in p[1])
    return Elicited(rollouts, arrays["responses"], arrays["last_prompt"], options)
