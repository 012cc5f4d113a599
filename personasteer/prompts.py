"""Prompts as tokens, with what the scopes need to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from personasteer.chat import ChatTemplate, Message
from personasteer.errors import TemplateError
from personasteer.spans import thinking_spans, tokens_in_spans
from personasteer.steering import ROLES, Roles


@dataclass(frozen=True)
class Prompt:
    """Given tokens, of which the first n_prompt are the prompt; the role of each where a template tells.

    think_marks opens and closes a thinking block ("" where the template has none); thinking: the text ends in one.
    """

    tokens: list[int]
    n_prompt: int | None
    roles: Roles | None = None
    think_marks: tuple[str, str] = ("", "")
    thinking: bool = False


def rendered_tokens(
    template: ChatTemplate,
    messages: Sequence[Message],
    native: Any,
    control: frozenset[int],
    text: str,
    *,
    add_special: bool,
    **render: Any,
) -> list[int]:
    """The tokens of messages whose rendered text is `text`. Names of control tokens stand for these tokens in the
    template's own words; in a message they are words like others, thinking markers of the assistant excepted.

    Raises TemplateError where a message holds such names and cannot be found in the text.
    """
    marks = template.thinking_markers() or ()

    def imitations(content: str, role: str) -> list[int]:
        """Where names of control tokens begin in a message."""
        found, at, data = [], 0, content.encode("utf-8", "surrogatepass")
        for token in native.tokenize(data, False, True):
            if token in control:
                name = native.piece(token, True)
                if not name or (at := data.find(name, at)) < 0:  # the text that the tokenizer puts in front
                    at = max(at, 0)
                    continue
                if role != "assistant" or name.decode() not in marks:
                    found.append(len(data[:at].decode("utf-8", "surrogatepass")))
                at += len(name)
        return found

    cuts = [0]
    if any(imitations(m["content"], m["role"]) for m in messages):
        rendered, spans = template.spans(messages, **render)
        if rendered != text:
            raise TemplateError("the chat template renders the same messages differently each time")
        cuts += [s.begin + at + 1 for s in spans for at in imitations(text[s.begin : s.end], s.role)]
    tokens: list[int] = []
    for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True):  # a name that is cut is none
        part = text[begin:end].encode("utf-8", "surrogatepass")
        tokens += native.tokenize(part, add_special and begin == 0, True)
    return tokens


def with_roles(
    template: ChatTemplate,
    messages: Sequence[Message],
    native: Any,
    tokens: list[int],
    n_prompt: int,
    text: str,
    answer: str = "",
    **render: Any,
) -> Prompt:
    """The Prompt of messages whose rendered `text` and `answer` became `tokens`.

    "system", "user" and "assistant" are the contents of these roles' messages, the answer included; "thinking" is what
    stands in a thinking block outside system and user messages, its closing marker included.

    Raises TemplateError where a message cannot be found in the text.
    """
    rendered, spans = template.spans(messages, **render)
    if rendered != text:
        raise TemplateError("the chat template renders the same messages differently each time")
    whole = text + answer
    pieces = [native.piece(t, True) for t in tokens]
    own = whole
    places: dict[str, list[tuple[int, int]]] = {role: [] for role in ROLES}
    for span in spans:
        places.setdefault(span.role, []).append((span.begin, span.end))
        if span.role != "assistant":  # a marker that somebody else writes opens no block
            own = own[: span.begin] + " " * (span.end - span.begin) + own[span.end :]
    if answer:
        places["assistant"].append((len(text), len(whole)))
    marks = template.thinking_markers()
    thinking = thinking_spans(own, marks) if marks else []
    roles = {role: tokens_in_spans(pieces, whole, places[role]) for role in ROLES}
    if marks:
        roles["thinking"] = tokens_in_spans(pieces, whole, thinking)
    still = bool(marks and thinking and thinking[-1][1] == len(own) and not own.endswith(marks[1]))
    return Prompt(tokens, n_prompt, _Roles(roles), marks or ("", ""), still)


class _Roles(dict[str, np.ndarray]):
    def __missing__(self, role: str) -> np.ndarray:
        raise TemplateError(f"the model's chat template has no {role} block")
