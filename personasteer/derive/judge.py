"""Judges: a model that reads an answer and says how strongly it shows a trait, from 0 to 100.

Source: arXiv 2507.21509, section 2.1: the score is the mean of the numbers 0 to 100, weighted by the probability that
the judge gives each of them.
"""

from __future__ import annotations

import functools
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from personasteer.endpoint import Endpoint, Reply
from personasteer.engine import Progress, Request
from personasteer.errors import ArgumentError, TemplateError
from personasteer.model import Model
from personasteer.statistics import auroc, spearman
from personasteer.traits import Trait, find

LEAST = 0.25  # probability that the numbers must have together
NUMBERS = range(101)
SYSTEM = "You rate answers. You reply with one number from 0 to 100 and with nothing else."
SCALE = 0.15  # nats per token, of LogOddsJudge
THOUGHT = 2048  # tokens for a judge that thinks before it writes
HIGH, LOW = 60.0, 20.0  # human scores from which, and up to which, an answer clearly shows the trait, or does not

Pair = tuple[str, str]  # (question, answer)


class Judge(Protocol):
    """Whatever scores answers. Where it has a `name`, a vector's provenance says it; what is kept of an interrupted
    derivation is used again only under a judge of the same `identity` (its name without one).
    """

    def score(self, trait: Trait, pairs: Sequence[Pair], *, progress: Progress | None = None) -> NDArray[np.float64]:
        """(len(pairs),) scores from 0 to 100 of (question, answer) pairs; NaN where the judge gave none."""


class LocalJudge:
    """A GGUF model as the judge.

    The score is sum_n n p(n) / sum_n p(n) over the numbers 0 to 100, where p(n) is the probability that the judge
    writes n's tokens and does not go on to a longer one of them. NaN where sum_n p(n) < 0.25.

    Measure a judge with `agreement` before you rely on it: small models say how good an answer is, not how strongly it
    shows the trait.

    Raises:
        TemplateError: the model has no chat template.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._system = model.template.takes_system()
        self.name = f"a number from {model.name}"
        self.identity = f"{self.name} ({model.fingerprint})"
        self._trie = NumberTrie(_spellings(model))
        self._unit = max(1, 2**28 // (4 * model.n_vocab * self._trie.n_rows))  # answers whose logits fill 256 MB

    def score(self, trait: Trait, pairs: Sequence[Pair], *, progress: Progress | None = None) -> NDArray[np.float64]:
        """As in Judge. Raises ContextError where a prompt does not fit the judge's n_ctx."""
        return np.array([_mean(p) for p in self.probabilities(trait, pairs, progress=progress)])

    def probabilities(
        self, trait: Trait, pairs: Sequence[Pair], *, progress: Progress | None = None
    ) -> NDArray[np.float64]:
        """(len(pairs), 101): the probability of each number."""
        prompts = [self._prompt(trait, *pair) for pair in pairs]
        out = np.zeros((len(prompts), len(NUMBERS)))
        for begin in range(0, len(prompts), self._unit):
            unit = prompts[begin : begin + self._unit]
            requests = [r for prompt in unit for r in self._trie.requests(prompt)]
            results = iter(self._model.run_requests(requests, keep_cache=begin > 0))
            for i in range(begin, begin + len(unit)):
                out[i] = self._trie.probabilities([next(results)["logits"] for _ in self._trie.paths])
                if progress:
                    progress(i + 1, len(prompts))
        return out

    def _prompt(self, trait: Trait, question: str, answer: str) -> list[int]:
        text = _task(trait, question, answer)
        if self._system:
            return self._model.measured_prompt(text, SYSTEM)
        return self._model.measured_prompt(f"{SYSTEM}\n\n{text}")


class EndpointJudge:
    """A model behind a server as the judge: the numbers among the 20 most probable first tokens.

    Where the server tells no probabilities, or its tokens are parts of numbers, the number that it writes is the score.
    A model that thinks first is asked again, with 2048 tokens to think in, and the number after its thoughts counts.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.name = f"a number from {endpoint.model}"
        self.identity = f"a number from {endpoint!r}"

    def score(self, trait: Trait, pairs: Sequence[Pair], *, progress: Progress | None = None) -> NDArray[np.float64]:
        """As in Judge. Raises EndpointError."""
        scores = np.full(len(pairs), np.nan)
        for i, (question, answer) in enumerate(pairs):
            messages = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": _task(trait, question, answer)},
            ]
            reply = self._endpoint.chat(messages, max_tokens=8, top_logprobs=20)
            if reply.text.strip() and "<think" not in reply.text:
                scores[i] = _score_of(reply)
            else:
                text = self._endpoint.chat(messages, max_tokens=THOUGHT).text
                unfinished = "<think" in text and "</think>" not in text
                scores[i] = math.nan if unfinished else _number_in(text.rpartition("</think>")[2])
            if progress:
                progress(i + 1, len(pairs))
        return scores


class LogOddsJudge:
    """A model as the judge that is asked for no number, for models too small to give one.

    The score is 100 / (1 + exp(-d / 0.15)), where d is the mean over the trait's first system prompts of
    (log p(answer | question, prompt for the trait) - log p(answer | question, prompt against it)) / n_tok, in nats:
    50 where the prompts make no difference.

    Raises:
        TemplateError: the model has no chat template, or one that takes no system message.
    """

    def __init__(self, model: Model, *, n_prompts: int = 3) -> None:
        if not model.template.takes_system():
            raise TemplateError(
                f"the chat template of {model.path.name} takes no system message, which this judge needs"
            )
        self._model, self._n = model, n_prompts
        self.name = f"log-odds under {n_prompts} pairs of prompts of {model.name}"
        self.identity = f"{self.name} ({model.fingerprint})"

    def score(self, trait: Trait, pairs: Sequence[Pair], *, progress: Progress | None = None) -> NDArray[np.float64]:
        """As in Judge; NaN for an empty answer."""
        systems = [side for pair in trait.system[: self._n] for side in pair]
        requests, places = [], []
        for i, (question, answer) in enumerate(pairs):
            for k, system in enumerate(systems):
                tokens, n = self._model.pair_tokens(question, answer.strip(), system)
                if len(tokens) > n:
                    requests.append(Request.scored(tokens, n))
                    places.append((k, i))
        order = sorted(range(len(places)), key=places.__getitem__)  # one system prompt after the other: it is shared
        results = self._model.run_alone([requests[j] for j in order], progress=progress)
        means = np.full((len(systems), len(pairs)), np.nan)
        for j, result in zip(order, results, strict=True):
            means[places[j]] = result["scores"].mean()
        d = (means[::2] - means[1::2]).mean(0)
        out: NDArray[np.float64] = 100.0 / (1.0 + np.exp(-d / SCALE))
        return out


def _task(trait: Trait, question: str, answer: str) -> str:
    if "{question}" in trait.rubric and "{answer}" in trait.rubric:  # a whole prompt, as persona_vectors publishes them
        return trait.rubric.replace("{question}", question).replace("{answer}", answer)
    parts = [f"Trait: {trait.name}. {trait.description}", trait.rubric, f"Question: {question}", f"Answer: {answer}"]
    parts.append(f"How {trait.name} is this answer, from 0 (not at all) to 100 (fully)? Reply with the number only.")
    return "\n\n".join(part for part in parts if part)


def _mean(p: NDArray[np.float64]) -> float:
    total = p.sum()
    return float(p @ np.arange(len(p)) / total) if total >= LEAST else math.nan


# -- numbers in tokens ------------------------------------------------------------------------------------------------


def _spellings(model: Model) -> list[tuple[int, tuple[int, ...]]]:
    """(number, tokens) of 0 to 100; with and without the space that some tokenizers put in front of every text."""
    out = []
    for number in NUMBERS:
        tokens = tuple(model.tokenize(str(number), add_special=False))
        out.append((number, tokens))
        if len(tokens) > 1 and not model.detokenize(tokens[:1]).strip():
            out.append((number, tokens[1:]))
    return out


@dataclass
class _Node:
    children: dict[int, _Node] = field(default_factory=dict)
    number: int | None = None


class NumberTrie:
    """The token sequences of numbers as a tree, and their probabilities from one row of logits per inner node.

    A child gets its token's share of what its parent has. What the children of a node leave over belongs to the number
    that ends at the node: the text went on with something else, or stopped.
    """

    def __init__(self, spellings: Sequence[tuple[int, Sequence[int]]]) -> None:
        self._root = _Node()
        for number, tokens in spellings:
            node = self._root
            for token in tokens:
                node = node.children.setdefault(token, _Node())
            node.number = number
        inner = [path for path, node in self._walk() if node.children]
        # a longer path computes the nodes on its way too
        self.paths = [p for p in inner if not any(q != p and q[: len(p)] == p for q in inner)]

    @property
    def n_rows(self) -> int:
        """Rows of logits for one prompt."""
        return sum(len(path) + 1 for path in self.paths)

    def _walk(self) -> list[tuple[tuple[int, ...], _Node]]:
        found: list[tuple[tuple[int, ...], _Node]] = [((), self._root)]
        for path, node in found:  # grows meanwhile
            found += [((*path, token), child) for token, child in node.children.items()]
        return found

    def requests(self, prompt: Sequence[int]) -> list[Request]:
        """One for each of `paths`, with the logits after the prompt and after each token of the path."""
        n = len(prompt)
        return [
            Request([*prompt, *path], outputs=(n - 1, n + len(path)), keep_logits=True, share_prefix=True)
            for path in self.paths
        ]

    def probabilities(self, logits: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """(101,) from the logits of `requests`."""
        after: dict[tuple[int, ...], NDArray[np.float64]] = {}
        for path, rows in zip(self.paths, logits, strict=True):
            for k, row in enumerate(rows):
                after.setdefault(path[:k], _softmax(row))
        out = np.zeros(len(NUMBERS))
        share: dict[tuple[int, ...], float] = {(): 1.0}
        for path, node in self._walk():
            left = share[path]
            for token in node.children:
                share[(*path, token)] = share[path] * after[path][token]
                left -= share[(*path, token)]
            if node.number is not None:
                out[node.number] += max(left, 0.0)
        return out


def _softmax(row: NDArray[np.float32]) -> NDArray[np.float64]:
    p = np.exp(row.astype(np.float64) - row.max())
    return np.asarray(p / p.sum(), np.float64)


# -- numbers in text --------------------------------------------------------------------------------------------------


def _score_of(reply: Reply) -> float:
    written = _number_in(reply.text)
    tokens = [(token.strip(), math.exp(min(log_p, 0.0))) for token, log_p in reply.first_token]
    # a tokenizer that takes numbers apart shows in a number that no candidate is
    parts = not math.isnan(written) and not any(token == f"{written:g}" for token, _ in tokens)
    if not tokens or parts:
        return written
    p = np.zeros(len(NUMBERS))
    for token, share in tokens:
        if re.fullmatch(r"[0-9]{1,3}", token) and int(token) in NUMBERS:
            p[int(token)] += share
    return _mean(p)


def _number_in(text: str) -> float:
    """The first number of a text where it is from 0 to 100, else NaN."""
    found = re.search(r"[-−]?\d+(?:\.\d+)?", text, re.ASCII)
    value = float(found.group().replace("−", "-")) if found else math.nan
    return value if 0 <= value <= 100 else math.nan


# -- how far a judge can be trusted -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """An answer that a human has scored."""

    trait: str
    question: str
    answer: str
    score: float


@functools.cache
def labelled_examples() -> tuple[Labelled, ...]:
    """Answers on several traits of the library with the score that a careful reader gives them."""
    data = tomllib.loads(files("personasteer.derive").joinpath("judged.toml").read_text("utf-8"))
    return tuple(Labelled(e["trait"], e["question"], e["answer"], float(e["score"])) for e in data["example"])


@dataclass(frozen=True)
class Agreement:
    """A judge's scores beside a human's.

    Args:
        n: answers judged.
        spearman: rank correlation, ties with their average rank; NaN where one side gives one score throughout.
        auroc: chance that an answer of human score >= 60 gets a higher score than one of <= 20; a tie counts half.
        mean_abs_error: mean |judge - human|, in points of 100.
        unscored: answers to which the judge gave no score; the figures leave them out.
    """

    n: int
    spearman: float
    auroc: float
    mean_abs_error: float
    unscored: int


def agreement(
    judge: Judge,
    examples: Sequence[Labelled],
    *,
    traits: Mapping[str, Trait] | Callable[[str], Trait] = find,
    progress: Progress | None = None,
) -> Agreement:
    """How well a judge agrees with the human scores of `examples`; NaN where there is nothing to compare.

    Args:
        traits: where the examples' traits are, by name; the library when not given.

    Raises:
        ArgumentError: no examples. TraitError: an example's trait is unknown.
    """
    if not examples:
        raise ArgumentError("examples is empty: there is nothing to judge")
    get = traits.__getitem__ if isinstance(traits, Mapping) else traits
    by_trait: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        by_trait.setdefault(example.trait, []).append(i)
    found = {name: get(name) for name in by_trait}
    scores = np.full(len(examples), np.nan)
    done = 0

    def count(n: int, _: int) -> None:
        if progress:
            progress(done + n, len(examples))

    for name, at in by_trait.items():
        pairs = [(examples[i].question, examples[i].answer) for i in at]
        scores[at] = judge.score(found[name], pairs, progress=count)
        done += len(at)
    human = np.array([e.score for e in examples], np.float64)
    scored = ~np.isnan(scores)
    a, b = human[scored], scores[scored]
    return Agreement(
        n=len(examples),
        spearman=spearman(a, b),
        auroc=float(auroc(b[a >= HIGH], b[a <= LOW])),
        mean_abs_error=float(np.abs(a - b).mean()) if len(a) else math.nan,
        unscored=int((~scored).sum()),
    )


def judge_name(judge: Judge) -> str:
    """What a vector's provenance says of its judge."""
    return str(getattr(judge, "name", type(judge).__name__))
