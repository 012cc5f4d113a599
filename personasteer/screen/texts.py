"""Rows as what the model computes: one text for each answer, its prompt in front."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from personasteer.chat import Message
from personasteer.conversations.layouts import RowError, answers
from personasteer.errors import ArgumentError, TemplateError
from personasteer.model import Model

SHORTEST_PREFIX = 8  # tokens: fewer are not worth a decode of their own
BYTES_PER_TOKEN = 256  # of the longest tokens: a text of so many bytes per token of room cannot fit


@dataclass(frozen=True)
class Text:
    """A prompt and its answer, as tokens.

    Args:
        tokens: of both; n_prompt: how many are the prompt's.
        n_prefix: tokens at the beginning that other rows under the same system prompt have, too.
        family: of texts that go on from the same first prompt.
    """

    tokens: tuple[int, ...]
    n_prompt: int
    n_prefix: int
    family: bytes

    @property
    def key(self) -> bytes:
        return key_of(self.tokens, self.n_prompt)

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.tokens[: self.n_prompt]


def packed(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, "<i4").tobytes()


def unpacked(data: bytes) -> list[int]:
    return [int(t) for t in np.frombuffer(data, "<i4")]


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differ[0]) if len(differ) else n


def key_of(tokens: Sequence[int], n_prompt: int = 0) -> bytes:
    return hashlib.sha256(n_prompt.to_bytes(4, "little") + packed(tokens)).digest()[:16]


def row_hash(messages: Sequence[Message]) -> str:
    """Of the row's words, whatever the layout that they came in."""
    text = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Texts:
    """Makes texts of a model's conversations.

    Raises:
        ArgumentError: a model that cannot be read.
    """

    def __init__(self, model: Model) -> None:
        if model.unhooked:
            raise ArgumentError(f"{model.name} cannot be read: {model.unhooked}")
        self._model, self._n_ctx = model, model.n_ctx
        self._takes_system = model.takes_system
        self._prefix = lru_cache(4096)(self._prefix_of)

    def of(self, messages: Sequence[Message]) -> list[Text]:
        """One for each answer. Raises RowError."""
        n_bytes = sum(len(m["content"].encode("utf-8", "surrogatepass")) for m in messages)
        if n_bytes > self._n_ctx * BYTES_PER_TOKEN:
            raise RowError(f"too long: {n_bytes} bytes do not fit {self._n_ctx} tokens (-c)")
        found: list[Text] = []
        family = b""
        for i in answers(messages):
            before, answer = list(messages[:i]), messages[i]["content"]
            given = before if self._takes_system else _without_system(before)
            system = given[0]["content"] if given[0]["role"] == "system" else None
            try:
                tokens, n_prompt = self._pair(given, answer)
            except TemplateError as e:
                raise RowError(f"the chat template does not take it: {e}") from e
            if len(tokens) > self._n_ctx:
                raise RowError(f"too long: {len(tokens)} tokens of {self._n_ctx} (-c)")
            if n_prompt == len(tokens) or not n_prompt:
                raise RowError("a prompt or an answer without a token")
            prefix = self._prefix(system)
            n_prefix = n_common(prefix, tokens[: n_prompt - 1])
            family = family or key_of(tokens[:n_prompt])
            found.append(Text(tuple(tokens), n_prompt, n_prefix if n_prefix >= SHORTEST_PREFIX else 0, family))
        return found

    def _pair(self, given: Sequence[Message], answer: str) -> tuple[list[int], int]:
        if not self._model.has_template:
            if len(given) != 1:
                raise RowError("the model has no chat template for more than a prompt and its answer")
            return self._model.pair_tokens(given[0]["content"], answer)
        return self._model.pair_tokens(given, answer)

    def _prefix_of(self, system: str | None) -> tuple[int, ...]:
        """What the template puts before a user's words."""
        head = [] if system is None else [{"role": "system", "content": system}]
        try:
            both = [self._pair([*head, {"role": "user", "content": words}], "")[0] for words in ("Why", "3 of")]
        except (RowError, TemplateError):
            return ()
        return tuple(both[0][: n_common(*both)])


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """For a template without a system role: its words in front of the first of the user's."""
    if messages[0]["role"] != "system":
        return list(messages)
    words, rest = messages[0]["content"], list(messages[1:])
    at = next(i for i, m in enumerate(rest) if m["role"] == "user")
    rest[at] = {
        "role": "user",
        "content": f"{words}\n\n{rest[at]['content']}" if words.strip() else rest[at]["content"],
    }
    return rest
