"""Rows of a chat data set as examples to train on: tokens, and which of them the model learns to write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from personasteer.chat import Message
from personasteer.conversations import LOOKED_AT, Columns, RowError, answers, find_layout, first_rows, open_data
from personasteer.engine import Request
from personasteer.errors import ArgumentError, TemplateError
from personasteer.model import Model

END_WITHIN = 4  # tokens behind an answer in which its end-of-turn token stands
FEWEST = 4


@dataclass(frozen=True)
class Example:
    """A conversation as tokens, and [begin, end) spans of what is learned: answers with their end-of-turn tokens."""

    tokens: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def n_learned(self) -> int:
        """Tokens of the answers, their ends included."""
        return sum(end - begin for begin, end in self.spans)


@dataclass(frozen=True)
class Examples:
    """The examples of a data set. skipped: {what is wrong: how many rows}."""

    examples: tuple[Example, ...]
    skipped: dict[str, int]

    @property
    def digest(self) -> str:
        """Changes with the tokens and spans."""
        plain = json.dumps([[e.tokens, e.spans] for e in self.examples])
        return hashlib.sha256(plain.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, at: Sequence[int]) -> list[Example]:
        return [self.examples[i] for i in at]


def read_examples(
    model: Model,
    data: Any,
    *,
    columns: Columns | None = None,
    system: str | None = None,
    longest: int = 512,
    fewest: int = FEWEST,
) -> Examples:
    """The conversations of a data set through the model's chat template; without one, prompt, newline, answer, end.

    Args:
        data: as of `personasteer.screen`: files, or rows of Python.
        columns: those that are not named are found out.
        system: a system prompt before each conversation, in front of its own: what is trained under it is learned as
            its doing, and less of it without (inoculation prompting).
        longest: tokens; longer conversations are left out.

    Raises:
        ArgumentError: no such file, columns that cannot be found, fewer than `fewest` rows that can be used.
        TemplateError: a system prompt for a template without a system role.

    Source of inoculation prompting: arXiv 2510.04340, 2510.05024.
    """
    if system and not model.takes_system:
        raise TemplateError(f"{model.name} takes no system prompt, so none can be trained under")
    source = open_data(data)
    layout = find_layout(first_rows(source, LOOKED_AT), columns)
    source.only(layout.all_columns)
    found: list[Example] = []
    skipped: dict[str, int] = {}

    def skip(why: str) -> None:
        skipped[why] = skipped.get(why, 0) + 1

    for row in source.rows():
        if row.value is None:
            skip(row.problem.partition(":")[0])
            continue
        try:
            example = _example(model, layout.conversation(row.value), system)
        except RowError as e:
            skip(str(e).partition(":")[0])
            continue
        except TemplateError:
            skip("the chat template does not take it")
            continue
        if len(example.tokens) > longest:
            skip(f"longer than {longest} tokens")
        elif not example.n_learned:
            skip("nothing to learn from")
        else:
            found.append(example)
    if len(found) < fewest:
        why = "; ".join(f"{n} of them: {reason}" for reason, n in skipped.items())
        said = f" ({why})" if why else ""
        raise ArgumentError(f"{len(found)} rows to train on, at least {fewest} are needed{said}")
    return Examples(tuple(found), skipped)


def _example(model: Model, messages: Sequence[Message], system: str | None) -> Example:
    at = answers(messages)
    if not model.has_template:
        if len(messages) != 2:
            raise RowError("the model has no chat template for more than a prompt and its answer")
        tokens, n_prompt = model.pair_tokens(messages[0]["content"], messages[1]["content"])
        whole = (*tokens, model.end_token) if model.end_token >= 0 else tuple(tokens)
        return Example(whole, ((n_prompt, len(whole)),))
    given = list(messages[: at[-1] + 1])
    if system and given[0]["role"] == "system":
        given[0] = {"role": "system", "content": f"{system}\n\n{given[0]['content']}"}
    elif system:
        given.insert(0, {"role": "system", "content": system})
    tokens, spans = model.transcript_tokens(given)
    learned = []
    for role, begin, end in spans:
        if role != "assistant":
            continue
        stops = (i for i in range(end, min(end + END_WITHIN, len(tokens))) if tokens[i] in model.control_tokens)
        learned.append((begin, next(stops, end - 1) + 1))
    return Example(tuple(tokens), tuple(learned))


def task_loss(model: Model, examples: Iterable[Example]) -> float:
    """Mean -log p of what the examples teach, in nats per token, on the quantized file."""
    total, count = 0.0, 0
    given = list(examples)
    requests = [Request.scored(e.tokens, e.spans[0][0]) for e in given]
    for e, result in zip(given, model.run_alone(requests), strict=True):
        scores = np.asarray(result["scores"], np.float64)
        first = e.spans[0][0]
        for begin, end in e.spans:
            total -= float(scores[begin - first : end - first].sum())
            count += end - begin
    return total / max(count, 1)
