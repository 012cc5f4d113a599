"""Which columns of a data set hold the conversation: found out, shown, or told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from personasteer.chat import Message
from personasteer.conversations.data import Row
from personasteer.errors import ArgumentError
from personasteer.files import encodable

MESSAGES = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog", "turns")
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("prompt", "chosen"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("instruction", "response"),
    ("instruction", "answer"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("input", "output"),
    ("input", "response"),
    ("context", "response"),
)
SYSTEM = ("system", "system_prompt", "system_message")
IDS = ("id", "_id", "uuid", "row_id", "idx", "prompt_id", "conversation_id")
GROUPS = ("source", "cluster", "dataset", "subset", "category", "domain")
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker", "author"), ("content", "value", "text")
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user", "instruction": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "ai": "assistant", "bing": "assistant", "bard": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
LOOKED_AT = 1000  # rows that a mapping is tried on before the work starts
LONGEST_NAME = 120  # characters of an id or the name of a group


class RowError(Exception):
    """What is wrong with a row, in few words; what is this row's own comes behind ": "."""


@dataclass(frozen=True)
class Layout:
    """Where a row's conversation stands.

    Args:
        messages: the column of a list of messages; or
        prompt, response: the columns of one question and its answer, each a text or a list of messages;
        extra: a column that is put behind the prompt where it is not empty (Alpaca's `input`).
        system: the column of a system prompt.
        id: the column that names the row.
        by: columns whose values are groups of rows.
    """

    messages: str = ""
    prompt: str = ""
    response: str = ""
    extra: str = ""
    system: str = ""
    id: str = ""
    by: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that a row must have."""
        return (self.messages,) if self.messages else (self.prompt, self.response)

    def as_columns(self) -> Columns:
        """What must be there of it."""
        return Columns(self.messages, self.prompt, self.response)

    @property
    def all_columns(self) -> frozenset[str]:
        """Those that are read."""
        return frozenset({*self.columns, self.extra, self.system, self.id, *self.by} - {""})

    def __str__(self) -> str:
        if self.messages:
            said = f"messages in {self.messages!r}"
        else:
            extra = f" and {self.extra!r}" if self.extra else ""
            said = f"prompt in {self.prompt!r}{extra}, response in {self.response!r}"
        named = (("system prompt", self.system), ("id", self.id), ("groups", ", ".join(self.by)))
        return said + "".join(f", {what} in {column!r}" for what, column in named if column)

    def conversation(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """The row's messages. Raises RowError."""
        for column in self.columns:
            if column not in row:
                raise RowError(f"no column {column!r}")
            if row[column] is None:
                raise RowError(f"{column!r} is null")
        if self.messages:
            found = _messages(row[self.messages], self.messages)
        else:
            found = self._question(row) + _side(row[self.response], self.response, "assistant")
        given = _optional(row, self.system)
        if given and found[0]["role"] != "system":
            found.insert(0, {"role": "system", "content": given})
        return found

    def _question(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        side = _side(row[self.prompt], self.prompt, "user")
        extra = _optional(row, self.extra)
        if extra.strip():
            side[-1] = {**side[-1], "content": f"{side[-1]['content']}\n\n{extra}"}
        return side

    def row_id(self, row: Mapping[str, Any]) -> str | None:
        """The row's own name, if it has one."""
        value = row.get(self.id) if self.id else None
        return None if value is None else _shown(value)

    def groups(self, row: Mapping[str, Any]) -> tuple[str | None, ...]:
        """The row's values of the columns `by`."""
        return tuple(None if (value := row.get(column)) is None else _shown(value) for column in self.by)


def answers(messages: Sequence[Message]) -> list[int]:
    """Which messages are answers of the assistant to something. Raises RowError."""
    asked, found = False, []
    for i, m in enumerate(messages):
        if m["content"].strip():
            asked = asked or m["role"] == "user"
            if asked and m["role"] == "assistant":
                found.append(i)
    if not found:
        said = [m["role"] for m in messages if m["content"].strip()]
        raise RowError("no answer" if "assistant" not in said else "no prompt before the answer")
    return found


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    if isinstance(value, str) and value.lstrip()[:1] == "[":  # a list within a CSV
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(f"{column!r} is not valid JSON") from None
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise RowError(f"{column!r} is {_kind(value)}, not a list of messages")
    if not value:
        raise RowError(f"{column!r} is empty")
    return [_message(m, column) for m in value]


def _message(m: Any, column: str) -> dict[str, str]:
    if not isinstance(m, Mapping):
        raise RowError(f"a message in {column!r} is {_kind(m)}, not a role and a content")
    role = next((m[k] for k in ROLE_KEYS if isinstance(m.get(k), str)), None)
    keys = [k for k in CONTENT_KEYS if k in m]
    if role is None or not keys:
        raise RowError(f"a message in {column!r} has no role and content: {', '.join(map(_shown, m)):.60}")
    known = ROLES.get(role.strip().lower())
    if known is None:
        raise RowError(f"unknown role: {role!r:.40}")
    content = next((m[k] for k in keys if m[k] is not None), None)
    if content is None and known == "assistant" and (m.get("tool_calls") or m.get("function_call")):
        content = ""
    return {"role": known, "content": _text(content, column)}


def _text(content: Any, column: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        parts = [p.get("text") if isinstance(p, Mapping) and p.get("type", "text") == "text" else None for p in content]
        if parts and all(isinstance(p, str) for p in parts):
            return "".join(map(str, parts))
    raise RowError(f"{column!r} holds {_kind(content)} instead of a text")


def _side(value: Any, column: str, role: str) -> list[dict[str, str]]:
    """One side of a pair: a text, or messages."""
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"{column!r} is empty")
        return [{"role": role, "content": value}]
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return _messages(value, column)
    raise RowError(f"{column!r} is {_kind(value)}, not a text")


def _optional(row: Mapping[str, Any], column: str) -> str:
    """The text of a column that a row may lack."""
    value = row.get(column) if column else None
    if value is not None and not isinstance(value, str):
        raise RowError(f"{column!r} is {_kind(value)}, not a text")
    return value or ""


def _shown(value: Any) -> str:
    """A value as a name, at most LONGEST_NAME characters."""
    try:
        text = str(value)
    except ValueError:  # a number of thousands of digits
        text = type(value).__name__
    return encodable(text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…")


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        dict: "an object",
        list: "a list",
    }
    return names.get(type(value), type(value).__name__)


# ---- finding out


@dataclass(frozen=True)
class Columns:
    """Columns that the user names; "" is found out.

    messages: lists of {"role", "content"}; prompt, response, system: texts; id: names rows; by: columns whose values
    are compared.
    """

    messages: str = ""
    prompt: str = ""
    response: str = ""
    system: str = ""
    id: str = ""
    by: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.by, str):
            object.__setattr__(self, "by", (self.by,))

    def those_of(self, seen: Iterable[str]) -> Columns:
        """The same for other rows: names that these do not have are left out."""
        known = set(seen)
        kept = {key: x if x in known else "" for key, x in vars(self).items() if key != "by"}
        if not (kept["prompt"] and kept["response"]):
            kept["prompt"] = kept["response"] = ""
        return Columns(**kept, by=tuple(x for x in self.by if x in known))


def find_layout(rows: Iterable[Row], named: Columns | None = None) -> Layout:
    """The layout of a data set's first rows.

    Raises ArgumentError where a named column is not there, none fits, or no row can be read with it.
    """
    named = named or Columns()
    given = list(rows)
    values = [r.value for r in given if r.value is not None]
    if not values:
        said = f" ({given[0].problem})" if given else ""
        raise ArgumentError(f"none of the first {len(given)} rows can be read{said}" if given else "there is no row")
    seen = dict.fromkeys(str(column) for value in values for column in value)
    for column in (named.messages, named.prompt, named.response, named.system, named.id, *named.by):
        if column and column not in seen:
            raise ArgumentError(f"no row has a column {column!r}; there are: {_some(seen)}")
    layout = _layout(named, seen)
    problems = []
    for value in values:
        try:
            answers(layout.conversation(value))
            return layout
        except RowError as e:
            problems.append(str(e))
    raise ArgumentError(
        f"with {layout} none of the first {len(given)} rows is a prompt with an answer (the first: {problems[0]}); "
        f"there are the columns {_some(seen)}"
    )


def _layout(named: Columns, seen: Mapping[str, Any]) -> Layout:
    if named.messages and (named.prompt or named.response):
        raise ArgumentError("name a column of messages, or of prompt and response, not both")
    return Layout(
        **_sides(named, seen),
        system=named.system or next((c for c in SYSTEM if c in seen), ""),
        id=named.id or next((c for c in IDS if c in seen), ""),
        by=named.by or tuple(c for c in GROUPS if c in seen),
    )


def _sides(named: Columns, seen: Mapping[str, Any]) -> dict[str, str]:
    """Where a layout's messages, or its prompt and response, are."""
    if named.messages:
        return {"messages": named.messages}
    if named.prompt or named.response:
        if not (named.prompt and named.response):
            raise ArgumentError("name the columns of the prompt and of the response, both")
        return {"prompt": named.prompt, "response": named.response}
    for column in MESSAGES:
        if column in seen:
            return {"messages": column}
    if "instruction" in seen and "output" in seen:
        return {"prompt": "instruction", "response": "output", "extra": "input" if "input" in seen else ""}
    for prompt, response in PAIRS:
        if prompt in seen and response in seen:
            return {"prompt": prompt, "response": response}
    raise ArgumentError(
        f"which columns are the conversation? There are: {_some(seen)}; name them with --messages, or --prompt and "
        "--response"
    )


def _some(seen: Iterable[str]) -> str:
    names = list(seen)
    return ", ".join(repr(n)[:40] for n in names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
