"""Function calling: what the chat template is told of tools, and what is read from the answer."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from personasteer.serve.protocol import ApiError, ChatRequest, Message, Tool, ToolChoice

OPEN, CLOSE = "<tool_call>", "</tool_call>"  # Hermes, Qwen, and the text that we add for other templates
_CALL = re.compile(rf"{OPEN}\s*(.*?)\s*(?:{CLOSE}|\Z)", re.DOTALL)


def messages_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As chat templates know them. Raises ApiError 400 for content that is no text."""
    found = []
    for m in messages:
        content = m.content
        if isinstance(content, list):
            for part in content:
                if part.type not in ("text", "input_text", "output_text") or part.text is None:
                    raise ApiError(400, f"content of the type {part.type[:40]!r} is not supported: only text is",
                                   param="messages")  # fmt: skip
            content = "\n".join(part.text or "" for part in content)
        if content is None and not m.tool_calls:
            raise ApiError(400, f"a message of the role {m.role} needs content", param="messages")
        entry: dict[str, Any] = {"role": "system" if m.role == "developer" else m.role, "content": content or ""}
        if m.tool_calls:
            entry["tool_calls"] = [
                {
                    "id": c.id or "", "type": "function",
                    "function": {"name": c.function.name, "arguments": _as_object(c.function.arguments)},
                }
                for c in m.tool_calls
            ]  # fmt: skip
        for key in ("name", "tool_call_id"):
            if (value := getattr(m, key)) is not None:
                entry[key] = value
        found.append(entry)
    return found


def _as_object(arguments: str | dict[str, Any]) -> Any:
    """Templates write arguments as JSON themselves."""
    if isinstance(arguments, str):
        try:
            return json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError):
            return arguments
    return arguments


class Calling:
    """How one request's tools are used: "none", "auto", "required", or the name of the one to call."""

    def __init__(self, request: ChatRequest) -> None:
        self.tools = request.tools or []
        choice = request.tool_choice if request.tool_choice is not None else ("auto" if self.tools else "none")
        self.choice = choice.function.name if isinstance(choice, ToolChoice) else choice
        self.named = isinstance(choice, ToolChoice)
        known = [t.function.name for t in self.tools]
        if self.named and self.choice not in known:
            raise ApiError(400, f"tool_choice names {self.choice!r}, which is not among the tools", param="tool_choice")
        if self.choice == "required" and not self.tools:
            raise ApiError(400, "tool_choice is required, and there are no tools", param="tool_choice")
        if self.choice == "none":
            self.tools = []

    @property
    def active(self) -> bool:
        return bool(self.tools)

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.active and (self.named or self.choice == "required")

    def schema(self) -> dict[str, Any] | None:
        """What the whole answer must be where it is a call: the arguments of the named function, or name and arguments
        of any.
        """
        if not self.forced:
            return None
        if self.named:
            return _parameters(next(t for t in self.tools if t.function.name == self.choice))
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": t.function.name}, "arguments": _parameters(t)},
                "required": ["name", "arguments"],
            }
            for t in self.tools
        ]
        return calls[0] if len(calls) == 1 else {"anyOf": calls}

    def in_messages(self, messages: list[dict[str, Any]], *, template_knows: bool) -> dict[str, Any]:
        """More variables of the template; or, where it knows no tools, words in the system message."""
        if not self.active:
            return {}
        described = [t.model_dump(exclude_none=True) for t in self.tools]
        if template_knows:
            return {"tools": described}
        text = (
            "These functions can be called:\n"
            + "\n".join(json.dumps(d["function"], ensure_ascii=False) for d in described)
            + f'\nTo call one, answer with {OPEN}{{"name": ..., "arguments": {{...}}}}{CLOSE}.'
        )
        if messages and messages[0]["role"] == "system":
            messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        else:
            messages.insert(0, {"role": "system", "content": text})
        return {}

    def read(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """(what is said, the calls) of a whole answer."""
        if not self.active:
            return text, []
        if self.named:
            return "", [_call(self.choice, text)]
        if self.choice == "required":
            found = _loaded(text)
            return ("", [found]) if found else (text, [])
        calls = [found for body in _CALL.findall(text) if (found := _loaded(body))]
        return (_CALL.sub("", text).strip(), calls) if calls else (text, [])

    def begins_call(self, text: str) -> int:
        """How much of a growing answer is certain to be said and no call."""
        if not self.active:
            return len(text)
        if self.forced:
            return 0
        at = text.find(OPEN)
        if at >= 0:
            return at
        held = next((n for n in range(min(len(OPEN), len(text)), 0, -1) if OPEN.startswith(text[-n:])), 0)
        return len(text) - held


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}}


def _loaded(body: str) -> dict[str, Any] | None:
    try:
        data = json.loads(body)
        return _call(data["name"], json.dumps(data.get("arguments", data.get("parameters", {}))))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}", "type": "function",
        "function": {"name": name, "arguments": arguments},
    }  # fmt: skip
