"""From what the worker says to OpenAI's answers, whole or as events."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from personasteer.serve.tools import Calling

FINISH = {"stop": "stop", "length": "length", "cancelled": "stop", "stopped": "content_filter"}


@dataclass
class Choice:
    """One answer as it comes."""

    index: int
    calling: Calling | None = None
    prompt: int = 0  # of several
    text: str = ""
    n_told: int = 0  # characters that a stream has had
    tokens: list[list[Any]] = field(default_factory=list)  # [bytes, log p, [[bytes, log p], ...]]
    readings: dict[str, list[float | None]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    done: dict[str, Any] | None = None

    def hear(self, news: dict[str, Any]) -> None:
        self.text += news.get("text", "")
        self.tokens += news.get("tokens", ())
        for name, values in news.get("readings", {}).items():
            self.readings.setdefault(name, []).extend(values)
        self.events += news.get("events", ())
        self.done = news.get("done", self.done)

    def read(self) -> tuple[str, list[dict[str, Any]]]:
        """(what is said, the functions that are called) of a whole answer."""
        if self.calling is None or (self.done or {}).get("finish") == "stopped":  # a guard's own words
            return self.text, []
        return self.calling.read(self.text)

    def finish(self, *, calls: bool = False) -> str:
        assert self.done is not None
        finish = FINISH.get(self.done["finish"], "stop")
        return "tool_calls" if calls and finish != "length" else finish

    def own(self, applied: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What is personasteer's own: the edits, and what came of them."""
        done = self.done or {}
        found: dict[str, Any] = {"steering": list(applied), "rho": done.get("rho")}
        if self.readings:
            found["readings"] = self.readings
        if "states" in done:
            found["guard"] = {
                "before": done["before"], "states": done["states"], "attempts": done["attempts"],
                "events": self.events,
            }  # fmt: skip
        return found


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens, each prompt's counted once."""
    prompts = {c.prompt: c.done for c in reversed(choices) if c.done is not None}
    prompt = sum(d["n_prompt"] for d in prompts.values())
    said = sum(c.done["n_tokens"] for c in choices if c.done is not None)
    return {
        "prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": sum(d["n_reused"] for d in prompts.values())},
    }  # fmt: skip


def chat_logprobs(tokens: Sequence[list[Any]]) -> dict[str, Any]:
    """As chat completions have them."""

    def entry(data: Sequence[int], logprob: float | None) -> dict[str, Any]:
        return {"token": _text(data), "logprob": -9999.0 if logprob is None else logprob, "bytes": list(data)}

    return {
        "content": [{**entry(b, p), "top_logprobs": [entry(tb, tp) for tb, tp in top]} for b, p, top in tokens],
        "refusal": None,
    }


def plain_logprobs(tokens: Sequence[list[Any]], offset: int = 0) -> dict[str, Any]:
    """As completions have them."""
    texts = [_text(b) for b, _, _ in tokens]
    offsets = [offset]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [p for _, p, _ in tokens],
        "top_logprobs": [{_text(b): p for b, p in top} for _, _, top in tokens],
        "text_offset": offsets[:-1],
    }


def _text(data: Sequence[int]) -> str:
    return bytes(data).decode("utf-8", "replace")


class Events:
    """How a route words the parts of a stream."""

    def __init__(self, with_logprobs: bool) -> None:
        self.with_logprobs = with_logprobs

    def begin(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        return []

    def of(self, choice: Choice, news: dict[str, Any]) -> list[dict[str, Any]]:
        raise NotImplementedError

    def own(self, news: dict[str, Any]) -> dict[str, Any]:
        return {"readings": news["readings"]} if "readings" in news else {}


class ChatEvents(Events):
    def begin(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        return [
            {"index": c.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for c in choices
        ]

    def of(self, choice: Choice, news: dict[str, Any]) -> list[dict[str, Any]]:
        calling = choice.calling
        assert calling is not None
        found = []
        over = choice.done is not None
        said, calls = choice.read() if over else (choice.text, [])
        certain = len(said) if over else calling.begins_call(said)
        piece = said[choice.n_told : certain]
        choice.n_told = max(choice.n_told, certain)
        tokens = news.get("tokens", []) if self.with_logprobs else []
        if piece or tokens or "readings" in news:
            found.append({
                "index": choice.index, "delta": {"content": piece}, "finish_reason": None,
                "logprobs": chat_logprobs(tokens) if self.with_logprobs else None, **self.own(news),
            })  # fmt: skip
        if calls:
            deltas = [{"index": i, **call} for i, call in enumerate(calls)]
            found.append({"index": choice.index, "delta": {"tool_calls": deltas}, "logprobs": None,
                          "finish_reason": None})  # fmt: skip
        if over and "done" in news:
            found.append({"index": choice.index, "delta": {}, "logprobs": None,
                          "finish_reason": choice.finish(calls=bool(calls))})  # fmt: skip
        return found


class PlainEvents(Events):
    def of(self, choice: Choice, news: dict[str, Any]) -> list[dict[str, Any]]:
        found = []
        tokens = news.get("tokens", []) if self.with_logprobs else []
        if news.get("text") or tokens or "readings" in news:
            before = len(choice.text) - len(news.get("text", ""))
            found.append({
                "index": choice.index, "text": news.get("text", ""), "finish_reason": None,
                "logprobs": plain_logprobs(tokens, before) if self.with_logprobs else None, **self.own(news),
            })  # fmt: skip
        if "done" in news:
            found.append({"index": choice.index, "text": "", "logprobs": None, "finish_reason": choice.finish()})
        return found


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(data) + b"\n\n"


def comment(data: Any) -> bytes:
    """A line that clients skip."""
    return b": " + dumps(data) + b"\n\n"


def dumps(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()


def now() -> int:
    return int(time.time())
