"""Readings of whole conversations: before each answer, and over every turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.chat import Message, as_messages
from personasteer.engine import Progress, Request
from personasteer.errors import ArgumentError, ModelError, TemplateError
from personasteer.files import parse_line, read_lines
from personasteer.model import Model
from personasteer.monitor.running import FEWEST
from personasteer.monitor.thresholds import STATES, Threshold


@dataclass(frozen=True)
class Turn:
    """One message of a conversation as it was read.

    Args:
        role: of the message.
        begin, end: its tokens.
        before: for each threshold the reading at the token before the message, where an answer is about to begin; only
            of the assistant's messages, None of others.
        states: for each threshold ok, watch or alarm; empty where `before` is None.
        probabilities: for each threshold P(trait), as `Threshold.probability`.
        means: for each threshold the mean reading over the message's tokens; empty for an answer that is to come.
    """

    role: str
    begin: int
    end: int
    before: dict[str, float] | None
    states: dict[str, str]
    probabilities: dict[str, float]
    means: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dict(vars(self))


@dataclass(frozen=True)
class Reading:
    """A conversation: its turns, its tokens, and (n_tokens, n_thresholds) readings of them."""

    turns: list[Turn]
    tokens: list[int]
    readings: NDArray[np.float32]

    @property
    def worst(self) -> dict[str, str]:
        """For each threshold the worst state of any turn."""
        found: dict[str, str] = {}
        for turn in self.turns:
            for name, state in turn.states.items():
                found[name] = max(found.get(name, "ok"), state, key=STATES.index)
        return found


def watch_transcripts(
    model: Model,
    thresholds: Sequence[Threshold],
    conversations: Iterable[Sequence[Message]],
    *,
    progress: Progress | None = None,
) -> list[Reading]:
    """Read given conversations in one pass each, teacher-forced, without generating.

    What the model is about to do stands at the last token before an answer, and is compared with the threshold there;
    an alarm lasts into the next answers until a reading is below `watch`. Where a conversation does not end with an
    answer, the one that is to come is its last turn: an early warning.

    Raises:
        VectorError: a threshold for a model of another shape. ArgumentError: no threshold, two of one name, no message.
        TemplateError: a template that does not take these messages.
    """
    _check(model, thresholds)
    spans, requests, elsewhere = [], [], []
    reads = tuple({t.layer: t.direction} for t in thresholds)
    last = any(t.layer == model.n_layer - 1 for t in thresholds)  # its rows are those with outputs
    for conversation in conversations:
        messages = as_messages(conversation)
        tokens, placed = model.transcript_tokens(messages)
        if not placed:
            raise ArgumentError("a conversation has no words to read")
        spans.append(placed)
        elsewhere.append(prompts_elsewhere(model, messages, tokens, placed))
        requests.append(Request(tokens, None, outputs=(0, len(tokens)) if last else (0, 0), reads=reads))
    if not requests:
        raise ArgumentError("there is no conversation to read")
    layers = sorted({t.layer for t in thresholds})
    at = [layers.index(t.layer) for t in thresholds]
    results = model.run_requests(requests, progress=progress)
    before = read_elsewhere(model, elsewhere, reads)
    found = []
    for request, placed, result, others in zip(requests, spans, results, before, strict=True):
        readings = np.asarray(result["readings"])[:, at, range(len(thresholds))]
        own = {turn: x[at, range(len(thresholds))] for turn, x in others.items()}
        if not (np.isfinite(readings).all() and all(np.isfinite(x).all() for x in own.values())):
            raise ModelError("what the model computes for this conversation are no numbers")
        found.append(Reading(turns_of(thresholds, placed, readings, own), list(request.tokens), readings))
    return found


def prompts_elsewhere(
    model: Model, messages: Sequence[Message], tokens: Sequence[int], placed: Sequence[tuple[str, int, int]]
) -> dict[int, list[int]]:
    """{turn: tokens} of the prompts of answers before which something else stands within the conversation: many models
    that think open an answer with an empty thought, which their templates leave out of earlier turns.
    """
    if [role for role, _, _ in placed][: len(messages)] != [m["role"] for m in messages]:
        return {}  # the template leaves a message out, or has them in another order
    found = {}
    for turn, (role, begin, _) in enumerate(placed[: len(messages)]):
        if role == "assistant" and turn > 0:
            with suppress(TemplateError):
                prompt = model.measured_prompt(messages[:turn])
                if prompt != list(tokens[:begin]):
                    found[turn] = prompt
    return found


def read_elsewhere(
    model: Model, prompts: Sequence[Mapping[int, list[int]]], reads: tuple[Mapping[int, NDArray[Any]], ...]
) -> list[dict[int, NDArray[np.float32]]]:
    """For each conversation {turn: (n_layers, n_reads)} readings at the last tokens of `prompts_elsewhere`."""
    found: list[dict[int, NDArray[np.float32]]] = [{} for _ in prompts]
    places = [(i, turn) for i, own in enumerate(prompts) for turn in own]
    requests = []
    for i, turn in places:
        tokens = prompts[i][turn]
        n = len(tokens)
        requests.append(
            Request(tokens, n, outputs=(n - 1, n), reads=reads, reads_from=n - 1, share_prefix=True)
        )  # the last block's rows are those with outputs
    for (i, turn), result in zip(places, model.run_alone(requests, n_parallel=1), strict=True):
        found[i][turn] = np.asarray(result["readings"])[-1]
    return found


def _check(model: Model, thresholds: Sequence[Threshold]) -> None:
    names = [t.name for t in thresholds]
    if not names or len(set(names)) < len(names):
        raise ArgumentError(f"thresholds must be of vectors of different names, not {names}")
    for threshold in thresholds:
        threshold.check(model)


def turns_of(
    thresholds: Sequence[Threshold],
    placed: Sequence[tuple[str, int, int]],
    readings: NDArray[np.float32],
    elsewhere: Mapping[int, NDArray[np.float32]],
) -> list[Turn]:
    """Turns of (role, begin, end), from (n_tokens, n_thresholds) readings, and those before some answers of which the
    conversation itself has no token: {turn: (n_thresholds,)}.
    """
    states = {t.name: "ok" for t in thresholds}
    turns: list[Turn] = []
    for role, begin, end in placed:
        means = {t.name: float(readings[begin:end, k].mean()) for k, t in enumerate(thresholds) if end > begin}
        before = None
        if role == "assistant" and begin > 0:
            last = elsewhere.get(len(turns), readings[begin - 1])
            before = {t.name: float(last[k]) for k, t in enumerate(thresholds)}
            states = {t.name: t.state(before[t.name], states[t.name]) for t in thresholds}
        probabilities = {t.name: t.probability(before[t.name]) for t in thresholds} if before else {}
        turns.append(Turn(role, begin, end, before, dict(states) if before else {}, probabilities, means))
    return turns


def read_clean(path: Path) -> list[list[dict[str, str]]]:
    """The conversations of a .jsonl file to calibrate on, as `read_conversations`, without an answer at the end.

    Raises ArgumentError for fewer than 40, or an answer alone.
    """
    found = read_conversations(path)
    if len(found) < FEWEST:
        raise ArgumentError(
            f"{path}: {len(found)} conversations are too few to calibrate: {FEWEST} at least, one a line"
        )
    prompts = [talk[:-1] if talk[-1]["role"] == "assistant" else talk for talk in found]
    if not all(prompts):
        raise ArgumentError(f"{path}: a conversation must be more than an answer")
    return prompts


def read_conversations(path: Path) -> list[list[dict[str, str]]]:
    """The conversations of a .jsonl file: one a line as {"messages": [..]} or a list of messages; or a message a line,
    {"role": .., "content": ..}, which together are one conversation.

    Raises ArgumentError where it is missing, empty or something else.
    """
    whole: list[list[dict[str, str]]] = []
    single: list[dict[str, str]] = []
    for where, line in read_lines(path):
        value = parse_line(line, where)
        if isinstance(value, Mapping) and "messages" in value:
            value = value["messages"]
        try:
            if isinstance(value, Mapping):
                single += as_messages([value])
            elif isinstance(value, list) and value:
                whole.append(as_messages(value))
            else:
                raise ArgumentError('neither {"messages": [..]} nor a message with "role" and "content"')
        except ArgumentError as e:
            raise ArgumentError(f"{where}: {e}") from e
    if single and whole:
        raise ArgumentError(f"{path}: has messages and whole conversations on its lines; it must be one kind")
    if not single and not whole:
        raise ArgumentError(f"{path}: holds no conversation")
    return whole or [single]
