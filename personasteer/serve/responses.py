"""OpenAI's Responses API, as far as one text answer goes: no state, no tools."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from personasteer.serve.answers import Choice, comment, dumps, now, usage
from personasteer.serve.protocol import MAX_MESSAGES, ApiError, ChatRequest, Open, Own, TextPart


class InputItem(Open):
    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] = "user"
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)] = ""


class TextFormat(Open):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextOptions(Open):
    format: TextFormat = TextFormat()


class ResponsesRequest(Own):
    """POST /v1/responses."""

    model: str | None = Field(None, max_length=1000)
    input: str | Annotated[list[InputItem], Field(max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    stream: bool | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    previous_response_id: str | None = None

    def as_chat(self) -> ChatRequest:
        """The chat request that it comes down to. Raises ApiError 400 for what is not supported."""
        if self.previous_response_id is not None:
            raise ApiError(400, "nothing is stored here: send the whole conversation as input",
                           param="previous_response_id")  # fmt: skip
        if self.tools:
            raise ApiError(400, "tools are supported by /v1/chat/completions", param="tools")
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            for item in self.input:
                if item.type != "message":
                    raise ApiError(400, f"input of the type {item.type[:40]!r} is not supported", param="input")
                messages.append(item.model_dump(include={"role", "content"}))
        if not messages:
            raise ApiError(400, "input is empty", param="input")
        asked: dict[str, Any] = {
            "model": self.model, "messages": messages, "max_tokens": self.max_output_tokens,
            "temperature": self.temperature, "top_p": self.top_p, "steering": self.steering, "guard": self.guard,
            "readings": self.readings, "cache_prompt": self.cache_prompt,
        }  # fmt: skip
        form = self.text.format if self.text is not None else TextFormat()
        if form.type == "json_schema":
            asked["response_format"] = {"type": form.type, "json_schema": {"schema": form.schema_ or {}}}
        elif form.type == "json_object":
            asked["response_format"] = {"type": form.type}
        return ChatRequest.model_validate(asked)


class Response:
    """One answer in the API's words, whole or as events."""

    def __init__(self, model: str, choice: Choice, applied: Sequence[dict[str, Any]]) -> None:
        self.choice, self.applied = choice, applied
        self.head = {"id": f"resp_{secrets.token_hex(12)}", "object": "response", "created_at": now(), "model": model}
        self.item_id = f"msg_{secrets.token_hex(12)}"

    def item(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [self.part(text)]
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def whole(self, status: str) -> dict[str, Any]:
        """The response object."""
        found: dict[str, Any] = {
            **self.head, "status": status, "output": [], "parallel_tool_calls": False, "tool_choice": "none",
            "tools": [], "error": None, "incomplete_details": None,
        }  # fmt: skip
        if self.choice.done is None:
            return found
        full = self.choice.done["finish"] == "length"
        counted = usage([self.choice])
        found |= {
            "status": "incomplete" if full else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if full else None,
            "output": [self.item("incomplete" if full else "completed", self.choice.text)],
            "usage": {
                "input_tokens": counted["prompt_tokens"], "output_tokens": counted["completion_tokens"],
                "total_tokens": counted["total_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
                "input_tokens_details": counted["prompt_tokens_details"],
            },
            "personasteer": self.choice.own(self.applied),
        }  # fmt: skip
        return found

    async def events(
        self, heard: AsyncGenerator[tuple[Choice, dict[str, Any]], None], first: Any
    ) -> AsyncIterator[bytes]:
        """Server-sent events from what the worker says."""
        n = 0

        def event(kind: str, **data: Any) -> bytes:
            nonlocal n
            n += 1
            return f"event: {kind}\ndata: ".encode() + dumps({"type": kind, "sequence_number": n - 1, **data}) + b"\n\n"

        at = {"item_id": self.item_id, "output_index": 0, "content_index": 0}
        yield event("response.created", response=self.whole("in_progress"))
        yield event("response.in_progress", response=self.whole("in_progress"))
        yield event("response.output_item.added", output_index=0, item=self.item("in_progress", None))
        yield event("response.content_part.added", **at, part=self.part(""))
        try:
            async with contextlib.aclosing(heard):
                news: dict[str, Any] | None = first[1]
                while news is not None:
                    if not news:
                        yield comment({"waiting": True})
                    for e in news.get("events", ()):
                        yield comment({"personasteer": {"event": e}})
                    if news.get("text"):
                        yield event("response.output_text.delta", **at, delta=news["text"], logprobs=[])
                    following = await anext(heard, None)
                    news = None if following is None else following[1]
        except ApiError as e:
            yield event("error", code=e.code, message=e.message, param=e.param)
            return
        text = self.choice.text
        done = self.whole("completed")
        yield event("response.output_text.done", **at, text=text, logprobs=[])
        yield event("response.content_part.done", **at, part=self.part(text))
        yield event("response.output_item.done", output_index=0, item=done["output"][0])
        kind = "response.incomplete" if done["status"] == "incomplete" else "response.completed"
        yield event(kind, response=done)
