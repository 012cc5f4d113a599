"""The log of an audit: audit.json, as typed data that is checked when it is read."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from personasteer.errors import ArgumentError
from personasteer.evaluate import Evaluation
from personasteer.monitor.profile import Profile
from personasteer.ship.persona import first_problem
from personasteer.text import printable

SCHEMA = 1
LARGEST = 2**53  # number: what a float holds exactly
LARGEST_SIZE = 2**16  # blocks, and their width
LONGEST = 600  # letters of a foreign text in the log
MOST = 40  # foreign texts in a list of the log


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TensorsEntry(_Entry):
    """The tensors of one type."""

    type: str
    count: int
    bytes: int


class FileEntry(_Entry):
    """What the file says of itself; foreign texts, cut and with hidden characters written out. texts: digest of the
    tokenizer and the chat template.
    """

    name: str
    fingerprint: str
    identity: dict[str, str]
    kind: str
    architecture: str
    quantization: str
    size: int
    parameters: int
    tensors: list[TensorsEntry]
    n_layer: int = Field(gt=0, le=LARGEST_SIZE)
    n_embd: int = Field(gt=0, le=LARGEST_SIZE)
    n_ctx: int | None
    tokenizer: str
    n_tokens: int
    license: str
    texts: str
    says: list[tuple[str, str]]


class TemplateEntry(_Entry):
    """The chat template: how it renders one message, and what it says that nobody asked for.

    own_words: lines of that rendering that are neither the user's words nor markup. sentences: longer texts that stand
    in its source. looks_for: what it looks for in the words of messages.
    """

    found: bool
    trouble: str = ""
    takes_system: bool = False
    dated: bool = False
    tools: bool = False
    thinking: list[str] = []
    alone: str = ""
    empty: str | None = None
    own_words: list[str] = []
    sentences: list[str] = []
    looks_for: list[str] = []
    others: list[str] = []


class TraitEntry(_Entry):
    """log_odds: of each question, in nats per token; mean, low, high: with a 95 % interval, resampling questions."""

    trait: str
    log_odds: list[float]
    mean: float
    low: float
    high: float


class ProfileEntry(_Entry):
    """states: base64 of (n_layer, n_embd) little-endian float32, the mean before the answer; norms: as many m_il. Both
    None where they cannot be read. texts: digests of what was asked.
    """

    traits: list[TraitEntry]
    states: str | None
    norms: str | None
    texts: dict[str, str]


class MonitorEntry(_Entry):
    """A threshold, and how many fresh ordinary prompts it alarms on; rate: with Wilson's 95 % interval."""

    layer: int
    watch: float
    alarm: float
    auroc: float
    n_clean: int
    n_trait: int
    n_fresh: int = Field(gt=0)
    n_alarms: int
    low: float
    high: float


class VectorEntry(_Entry):
    """A vector, and what it does. why_not: for each part that is missing, the reason."""

    name: str
    trait: str
    given: bool
    layers: list[int]
    strength: float | None
    evaluation: Evaluation | None
    monitor: MonitorEntry | None
    why_not: dict[str, str]

    @field_validator("evaluation")
    @classmethod
    def _has_doses(cls, value: Evaluation | None) -> Evaluation | None:
        if value is not None and not value.dose:
            raise ValueError("an evaluation without a dose")
        return value


class CrossTalkEntry(_Entry):
    """delta: change of each trait's log-odds (columns) by each vector (rows)."""

    vectors: list[str]
    traits: list[str]
    delta: list[list[float]]

    @model_validator(mode="after")
    def _fits(self) -> CrossTalkEntry:
        n, widths = len(self.traits), [len(row) for row in self.delta]
        if not (n and widths) or widths != [n] * len(self.vectors):
            raise ValueError(f"{len(self.vectors)} vectors and {n} traits, and another matrix")
        return self


class ShiftEntry(_Entry):
    """See personasteer.monitor.Shift; before, after: mean log-odds."""

    trait: str
    before: float | None
    after: float | None
    delta: float | None
    low: float | None
    high: float | None
    drift: float | None
    cosine: float | None
    random_p99: float | None
    suspicious: Literal["stream", "words", ""]

    @model_validator(mode="after")
    def _whole(self) -> ShiftEntry:
        if any(len({x is None for x in part}) > 1 for part in (
            (self.delta, self.low, self.high), (self.drift, self.cosine, self.random_p99)
        )):  # fmt: skip
            raise ValueError("a change without its interval, or a movement without its control")
        return self


class VectorChange(_Entry):
    """What a vector of one name did then and does now: change of the log-odds at the positive strength, AUROC."""

    vector: str
    effect: tuple[float | None, float | None]
    auroc: tuple[float | None, float | None]


class ComparisonEntry(_Entry):
    """note: what the comparison leaves out."""

    against: Literal["base", "previous"]
    name: str
    fingerprint: str
    differs: str
    shifts: list[ShiftEntry]
    vectors: list[VectorChange]
    note: str


class Finding(_Entry):
    about: str
    level: Literal["good", "note", "bad"]
    text: str


class NotTested(_Entry):
    what: str
    why: str


class AuditLog(_Entry):
    """audit.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    schema_: Literal[1] = Field(alias="schema")
    versions: dict[str, str]
    build: str
    seed: int
    sizes: dict[str, int]
    findings: list[Finding]
    file: FileEntry
    template: TemplateEntry
    profile: ProfileEntry | None
    vectors: list[VectorEntry]
    cross_talk: CrossTalkEntry | None
    comparisons: list[ComparisonEntry]
    not_tested: list[NotTested]


def read_audit(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The log of an audit: audit.json, or the folder that holds it. Raises ArgumentError where it is something else."""
    file = Path(path) / "audit.json" if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(
            file.read_text("utf-8"), parse_constant=_number, parse_float=_number, parse_int=lambda s: int(_number(s))
        )
    except (OSError, ValueError, RecursionError) as e:
        raise ArgumentError(f"{file}: cannot be read as an audit ({getattr(e, 'strerror', None) or e})") from e
    if not isinstance(content, dict) or "schema" not in content:
        raise ArgumentError(f"{file}: holds no audit")
    if content["schema"] != SCHEMA:
        raise ArgumentError(f"{file}: has schema {content['schema']!r:.20}; this version reads {SCHEMA}")
    try:
        parse_log(content)
    except ArgumentError as e:
        raise ArgumentError(f"{file}: {e}") from e
    return content


def _number(text: str) -> float:
    if not abs(float(text)) <= LARGEST:
        raise ValueError(f"{text[:20]} is no number of an audit")
    return float(text)


def parse_log(content: Mapping[str, Any]) -> AuditLog:
    try:
        log = AuditLog.model_validate(content)
    except ValidationError as e:
        raise ArgumentError(f"not the log of an audit: {first_problem(e)}") from e
    if log.profile is not None and log.profile.states is not None:
        logged_profile(log)
    return log


def encode(values: NDArray[np.floating]) -> str:
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def decode(text: str, *shape: int) -> NDArray[np.float32]:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<f4").reshape(shape).astype(np.float32)
    except ValueError as e:
        raise ArgumentError(f"not the log of an audit: numbers that are not {shape} ({e})") from e


def logged_profile(log: AuditLog) -> Profile:
    """What an audit measured, to compare another model with; without directions."""
    assert log.profile is not None
    file = log.file
    log_odds = {t.trait: np.asarray(t.log_odds, np.float64) for t in log.profile.traits}
    if log.profile.states is None or log.profile.norms is None:
        return Profile(log_odds, np.full((1, file.n_layer, file.n_embd), np.nan, np.float32),
                       np.full(file.n_layer, np.nan, np.float32), {})  # fmt: skip
    states = decode(log.profile.states, 1, file.n_layer, file.n_embd)
    return Profile(log_odds, states, decode(log.profile.norms, file.n_layer), {})


def shown(text: str, limit: int = LONGEST) -> str:
    """Foreign text of one line, hidden characters written out."""
    text = printable(text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def shown_lines(text: str, limit: int = 4 * LONGEST) -> str:
    """Foreign text that keeps its lines."""
    return "\n".join(shown(line, limit) for line in text[:limit].split("\n"))
