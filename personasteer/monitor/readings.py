"""Readings of every token at every block: what vectors see in given words, and the files that hold it."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from personasteer.chat import Message, as_messages
from personasteer.derive import check_position
from personasteer.engine import Progress, Request
from personasteer.errors import ArgumentError, PersonasteerError, VectorError
from personasteer.extras import arrow
from personasteer.files import encodable, replacing
from personasteer.model import Model
from personasteer.monitor.drift import FEWEST, Drift, find_drift
from personasteer.monitor.thresholds import Threshold
from personasteer.monitor.transcripts import (
    Reading,
    prompts_elsewhere,
    read_conversations,
    read_elsewhere,
    turns_of,
)
from personasteer.spans import tokens_in_spans
from personasteer.steering import check_fits
from personasteer.vectors import PersonaVector

Directions: TypeAlias = dict[int, NDArray[np.float32]]  # of one vector: block -> v-hat

SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True, eq=False)
class Readings:
    """One conversation, or one plain text, as vectors read it.

    Args:
        tokens: their ids.
        pieces: the text of each token; joined they are the whole text. A token that ends within a character has "", the
            one that completes the character has all of it. Bytes that are no character are written \\xNN.
        spans: (role, begin, end) of each turn's own tokens, ascending; what stands between them is the chat template's.
            An answer that is to come has no tokens. A plain text is one turn, of the role "text".
        layers: the blocks, ascending.
        names: of the vectors.
        readings: (n_tokens, n_layers, n_vectors) <h_il, v-hat_il>, float32, in the model's own units; NaN where a
            vector has no direction at a block.
        position: of the directions, "last-prompt" or "response".
        calibrated: {name: block} where the direction is that of a threshold.
        before: {turn: (n_layers, n_vectors)} the readings before those answers of which the conversation itself does
            not have the token: many models that think open an answer with an empty thought, and only the last.
    """

    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    spans: tuple[tuple[str, int, int], ...]
    layers: tuple[int, ...]
    names: tuple[str, ...]
    readings: NDArray[np.float32]
    position: str = "last-prompt"
    calibrated: Mapping[str, int] = field(default_factory=dict)
    before: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def turns(self) -> NDArray[np.int32]:
        """(n_tokens,) the turn of each token; -1 for the chat template's own."""
        found = np.full(len(self.tokens), -1, np.int32)
        for turn, (_, begin, end) in enumerate(self.spans):
            found[begin:end] = turn
        return found

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each token; "" for the chat template's own."""
        roles = [role for role, _, _ in self.spans]
        return tuple(roles[turn] if turn >= 0 else "" for turn in self.turns)

    def pooled(self, by: str = "turn") -> tuple[tuple[str, ...], NDArray[np.float32]]:
        """Mean readings over the tokens of each turn, or of each role.

        Args:
            by: "turn", or "role".

        Returns:
            (the role of each row, (n_rows, n_layers, n_vectors)); NaN for a turn without tokens. Turns and roles stand
            in the order in which they come.

        Raises:
            ArgumentError: another `by`.
        """
        if by not in ("turn", "role"):
            raise ArgumentError(f"by must be turn or role, not {by!r}")
        of = [role for role, _, _ in self.spans]
        groups = [[k] for k in range(len(of))]
        if by == "role":
            groups = [[k for k, role in enumerate(of) if role == one] for one in dict.fromkeys(of)]
        turns = self.turns
        rows = np.full((len(groups), len(self.layers), len(self.names)), np.nan, np.float32)
        for row, group in enumerate(groups):
            inside = np.isin(turns, group)
            if inside.any():
                rows[row] = self.readings[inside].mean(axis=0, dtype=np.float64)
        return tuple(of[group[0]] for group in groups), rows

    def at(self, name: str, layer: int) -> NDArray[np.float32]:
        """(n_tokens,) readings of one vector at one block. Raises ArgumentError where it was not read there."""
        if name not in self.names or layer not in self.layers:
            raise ArgumentError(f"{name!r} was not read at block {layer}, but {', '.join(self.names)} at {self.layers}")
        return self.readings[:, self.layers.index(layer), self.names.index(name)]


def read_tokens(
    model: Model,
    vectors: Sequence[PersonaVector | Threshold],
    conversations: Iterable[str | Sequence[Message]],
    *,
    position: str = "last-prompt",
    thresholds: Sequence[Threshold] = (),
    last_layer: bool = False,
    progress: Progress | None = None,
) -> list[Readings]:
    """Read every token of given words at every block, in one pass each, teacher-forced, without generating.

    Computed in a context of its own, no longer than the longest of them; nothing but the readings is kept.

    Args:
        vectors: what is read; a Threshold has one block and one direction.
        thresholds: of some of the vectors, by name: at a threshold's block its own direction is read.
        conversations: messages, which the chat template renders as `watch_transcripts` has it; or plain texts, without
            a template.
        position: "last-prompt", along `vector.last_prompt`; or "response", along `vector.directions`.
        last_layer: also the last block, which costs an output row per token: decodes are then shorter, and the other
            blocks' readings rounded otherwise. A Threshold at the last block is always read there.

    Raises:
        ArgumentError: no vector, two of one name, no words, another position.
        VectorError: a vector without directions at this position, or for a model of another shape.
        TemplateError: a model whose template does not take these messages. ContextError: more tokens than n_ctx.
    """
    names = tuple(v.name for v in vectors)
    if not names or len(set(names)) < len(names):
        raise ArgumentError(f"readings must be of vectors of different names, not {list(names)}")
    check_position(position)
    columns = [_directions(model, v, position, model.n_layer - (not last_layer)) for v in vectors]
    limits = {t.name: t for t in (*thresholds, *(v for v in vectors if isinstance(v, Threshold))) if t.name in names}
    for column, name in zip(columns, names, strict=True):
        column |= _directions(model, limits[name], position, 0) if name in limits else {}
    calibrated = {name: t.layer for name, t in limits.items()}
    blocks = tuple(sorted(set().union(*columns)))
    requests, placed, elsewhere = [], [], []
    for conversation in conversations:
        tokens, pieces, spans = _words(model, conversation)
        words = isinstance(conversation, str)
        elsewhere.append({} if words else prompts_elsewhere(model, as_messages(conversation), tokens, spans))
        outputs = (0, len(tokens)) if model.n_layer - 1 in blocks else (0, 0)  # its rows are those with outputs
        requests.append(Request(tokens, None, outputs=outputs, reads=tuple(columns)))
        placed.append((pieces, spans))
    if not requests:
        raise ArgumentError("there is no conversation to read")
    results = model.run_alone(requests, n_parallel=min(model.n_parallel, len(requests)), progress=progress)
    missing = np.array([[il not in column for column in columns] for il in blocks])
    before = read_elsewhere(model, elsewhere, tuple(columns))
    found = []
    for request, (pieces, spans), result, others in zip(requests, placed, results, before, strict=True):
        readings = np.asarray(result["readings"])
        for values in (readings, *others.values()):
            values[..., missing] = np.nan
        text = tuple(request.tokens), pieces
        found.append(Readings(*text, spans, blocks, names, readings, position, calibrated, others))
    return found


def _directions(model: Model, vector: PersonaVector | Threshold, position: str, end: int) -> Directions:
    if isinstance(vector, Threshold):
        if position != "last-prompt":
            raise ArgumentError("thresholds are of last-prompt directions: read them at this position")
        vector.check(model)
        return {vector.layer: vector.direction}
    check_fits(vector, model)
    data = vector.directions if position == "response" else vector.last_prompt
    if data is None:
        raise VectorError(
            f"vector {vector.name!r} has no last-prompt-token directions: derive it from answers, not continuations, "
            'or read the response directions (position="response")'
        )
    lengths = np.linalg.norm(data[:end].astype(np.float64), axis=1)
    usable = np.flatnonzero(np.isfinite(lengths) & (lengths > 0))
    if not len(usable):
        raise VectorError(f"vector {vector.name!r} has no usable {position} direction below the last block")
    return {int(il): (data[il] / lengths[il]).astype(np.float32) for il in usable}


def _words(
    model: Model, words: str | Sequence[Message]
) -> tuple[list[int], tuple[str, ...], tuple[tuple[str, int, int], ...]]:
    """(tokens, their pieces, spans) of a plain text or a conversation."""
    if isinstance(words, str):
        tokens = model.tokenize(words)
        data = model.token_bytes(tokens)
        own = np.flatnonzero(tokens_in_spans(data, words, [(0, len(words))]))  # not a token for its beginning
        placed = [("text", int(own[0]), int(own[-1]) + 1)] if len(own) else []
    else:
        tokens, placed = model.transcript_tokens(as_messages(words))
        data = model.token_bytes(tokens)
    if not placed:
        raise ArgumentError("a conversation has no words to read")
    spans = tuple((encodable(role), begin, end) for role, begin, end in placed)
    return tokens, tuple(_characters(data)), spans


def _characters(data: Sequence[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    for i, piece in enumerate(data):
        yield decoder.decode(piece, final=i == len(data) - 1)


# ---- turns


def watched(readings: Readings, thresholds: Sequence[Threshold]) -> Reading:
    """What `watch_transcripts` says of the same conversation, without another pass.

    Args:
        readings: of a conversation, read with these thresholds.

    Raises:
        ArgumentError: a threshold that it was not read with.
    """
    for t in thresholds:
        if readings.calibrated.get(t.name) != t.layer:
            raise ArgumentError(f"the conversation was not read with the threshold of {t.name!r}")
    values = np.stack([readings.at(t.name, t.layer) for t in thresholds], axis=1)
    at = [readings.layers.index(t.layer) for t in thresholds], [readings.names.index(t.name) for t in thresholds]
    before = {turn: x[at] for turn, x in readings.before.items()}
    return Reading(turns_of(thresholds, readings.spans, values, before), list(readings.tokens), values)


@dataclass(frozen=True)
class TurnDrift:
    """Whether the readings before the answers of a conversation drift.

    Args:
        turns: of the answers.
        readings: before them.
        chart: of these readings; its `change` counts answers.
    """

    turns: tuple[int, ...]
    readings: tuple[float, ...]
    chart: Drift

    @property
    def turn(self) -> int | None:
        """The first turn that has drifted."""
        return None if self.chart.change is None else self.turns[self.chart.change]

    def as_dict(self) -> dict[str, Any]:
        """As plain data: the turn (None without drift), the direction, mean and spread of readings without drift."""
        c = self.chart
        return {"turn": self.turn, "direction": c.direction, "mean": c.mean, "spread": c.spread}


def drift_of_turns(reading: Reading, name: str, *, baseline: Sequence[Reading] = ()) -> TurnDrift | None:
    """`find_drift` of the readings of one threshold before each answer of a conversation.

    Args:
        baseline: conversations that did not drift; their readings before answers are the baseline. Without them it is
            the beginning of the conversation itself.

    Returns:
        None for a conversation with too few answers: of 4 and less nothing is left beside a beginning; with a baseline,
        of none.

    Raises:
        ArgumentError: a baseline of fewer than 4 answers.
    """
    turns, values = _before(reading, name)
    others = [x for other in baseline for x in _before(other, name)[1]]
    if baseline and len(others) < FEWEST:
        raise ArgumentError(f"a baseline with {len(others)} answers is too small: {FEWEST} at least")
    if not turns or (not baseline and len(turns) <= FEWEST):
        return None
    return TurnDrift(turns, values, find_drift(values, baseline=others or None))


def read_baseline(path: Path) -> list[list[dict[str, str]]]:
    """The conversations of a .jsonl file, as `read_conversations`. Raises ArgumentError for fewer than 4 answers, the
    ones to come included.
    """
    found = read_conversations(path)
    n = sum([m["role"] for m in talk].count("assistant") + (talk[-1]["role"] != "assistant") for talk in found)
    if n < FEWEST:
        raise ArgumentError(f"{path}: a baseline with {n} answers is too small: {FEWEST} at least")
    return found


def _before(reading: Reading, name: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    found = [(k, t.before[name]) for k, t in enumerate(reading.turns) if t.before is not None]
    return tuple(k for k, _ in found), tuple(x for _, x in found)


# ---- files


def check_readings_file(path: Path) -> None:
    """Raises ArgumentError for a suffix that `save_readings` does not write, or where pyarrow is needed and missing."""
    if path.suffix not in SUFFIXES:
        raise ArgumentError(f"{path}: readings are written as .jsonl or .parquet")
    if path.suffix == ".parquet":
        _arrow()


def save_readings(readings: Readings | Sequence[Readings], path: str | os.PathLike[str]) -> None:
    """Write readings, under a temporary name and renamed; numbers that are not finite become null.

    .jsonl: a line per token, {"conversation", "token": its number, "id", "turn", "role", "text", "readings": {name:
    {block: reading}}}; turn and role are null for the chat template's own tokens.

    .parquet: the same as a long table, a row per conversation, vector, block and token in this order, with the columns
    conversation, vector, layer, token, id, turn, role, text, reading (float32). Needs pyarrow.

    Raises:
        ArgumentError: another suffix, pyarrow is not installed, or `path` cannot be a file.
        PersonasteerError: the disk does not take it.
    """
    file = Path(path)
    check_readings_file(file)
    given = [readings] if isinstance(readings, Readings) else list(readings)
    try:
        with replacing(file) as temporary:
            if file.suffix == ".jsonl":
                _write_lines(given, temporary)
            else:
                _write_table(given, temporary)
    except OSError as e:
        reason = os.strerror(e.errno) if e.errno else e  # pyarrow has words of its own
        raise PersonasteerError(f"{file}: cannot be written ({reason})") from e


def _write_lines(given: Sequence[Readings], path: Path) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as f:
        for i, r in enumerate(given):
            blocks = [str(il) for il in r.layers]
            for k, (turn, role) in enumerate(zip(r.turns.tolist(), r.roles, strict=True)):
                numbers = [_shortest(column) for column in r.readings[k].T]
                line = {
                    "conversation": i,
                    "token": k,
                    "id": r.tokens[k],
                    "turn": turn if turn >= 0 else None,
                    "role": role or None,
                    "text": r.pieces[k],
                    "readings": {n: dict(zip(blocks, x, strict=True)) for n, x in zip(r.names, numbers, strict=True)},
                }
                f.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def _shortest(values: NDArray[np.float32]) -> list[float | None]:
    """The decimals that are the same float32 when read back."""
    return [float(str(x)) if np.isfinite(x) else None for x in values]


def _write_table(given: Sequence[Readings], path: Path) -> None:
    pa, pq = _arrow()
    word = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema(
        [
            ("conversation", pa.int32()),
            ("vector", word),
            ("layer", pa.int32()),
            ("token", pa.int32()),
            ("id", pa.int32()),
            ("turn", pa.int32()),
            ("role", word),
            ("text", word),
            ("reading", pa.float32()),
        ]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for i, r in enumerate(given):
            writer.write_table(pa.table(_columns(pa, i, r), schema=schema))


def _columns(pa: Any, conversation: int, r: Readings) -> dict[str, Any]:
    n, n_layers, n_vectors = r.readings.shape
    repeats = n_layers * n_vectors
    turns = np.tile(r.turns, repeats)
    values = r.readings.transpose(2, 1, 0).ravel()

    def words(of: Sequence[str], index: NDArray[Any], mask: NDArray[Any] | None = None) -> Any:
        known = {text: k for k, text in enumerate(dict.fromkeys(of))}
        codes = np.array([known[text] for text in of], np.int32)[index]
        return pa.DictionaryArray.from_arrays(pa.array(codes, mask=mask), pa.array(list(known), pa.string()))

    every = np.tile(np.arange(n), repeats)
    return {
        "conversation": np.full(len(values), conversation, np.int32),
        "vector": words([encodable(name) for name in r.names], np.repeat(np.arange(n_vectors), n_layers * n)),
        "layer": np.tile(np.repeat(np.array(r.layers, np.int32), n), n_vectors),
        "token": every.astype(np.int32),
        "id": np.tile(np.array(r.tokens, np.int32), repeats),
        "turn": pa.array(turns, mask=turns < 0),
        "role": words(r.roles, every, turns < 0),
        "text": words(r.pieces, every),
        "reading": pa.array(values, mask=~np.isfinite(values)),
    }


def _arrow() -> tuple[Any, Any]:
    return arrow("readings as .parquet need", "parquet")
