"""Chat templates: from messages to the text that the model was trained on."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn, TypeAlias

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from personasteer.errors import ArgumentError, TemplateError
from personasteer.spans import END_OF_MESSAGE, THINKING_MARKERS, Span, locate_contents

Message: TypeAlias = Mapping[str, str]
Conversation: TypeAlias = str | Sequence[Message]


PATIENCE = 20.0  # seconds that one rendering may take: templates come with foreign files, and may never end


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """A model's own Jinja template, rendered in a sandbox as Hugging Face transformers does.

    Raises TemplateError when the source does not parse, and when rendering fails.
    """

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.bounded(source)
        except (jinja2.TemplateError, RecursionError) as e:
            raise TemplateError(f"the model's chat template does not parse: {e}") from e
        self._source = source
        self._names: dict[str, Any] = {"bos_token": bos, "eos_token": eos}

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        today: datetime | None = None,
        thinking: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text for `messages`; with `add_generation_prompt` it ends where the assistant starts to write.

        today: the date for templates that name it; the clock's when None. thinking: False asks templates that know
        `enable_thinking` for an answer without thinking. variables: more that a template may know, such as `tools`.
        """
        names = {**(variables or {}), **self._names, **({} if thinking else {"enable_thinking": False})}
        _deadline.set(time.monotonic() + PATIENCE)
        _left.set(LARGEST)
        try:
            return self._template.render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                strftime_now=(today or datetime.now()).strftime,
                **names,
            )
        except Exception as e:  # a template is foreign code: TypeError, RecursionError, ... all mean the same here
            why = str(e) or type(e).__name__
            raise TemplateError(f"the model's chat template cannot render these messages: {why}") from e

    def spans(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        today: datetime | None = None,
        thinking: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """`render`'s text, and where in it each message's own content stands, without the template's markup.

        The spans come in the order of the text. Whitespace, or thinking, that the template strips is in no span; a
        message that it leaves out has none.

        messages, add_generation_prompt, today, thinking, variables: as in `render`.

        Raises ArgumentError when a message lacks a role or a content, TemplateError when rendering fails and when a
        message's text cannot be located.
        """
        messages = as_messages(messages)
        now = today or datetime.now()

        def render(contents: Sequence[str]) -> str:
            return self.render(
                [{**m, "content": c} for m, c in zip(messages, contents, strict=True)],
                add_generation_prompt=add_generation_prompt,
                today=now,
                thinking=thinking,
                variables=variables,
            )

        text = render([m["content"] for m in messages])
        return text, locate_contents(text, messages, render, foreign=self._source)

    def thinking_markers(self) -> tuple[str, str] | None:
        """The markers that open and close the model's thinking, where the template names one; None where none."""
        for opening, closing in THINKING_MARKERS:
            if opening in self._source or (closing != END_OF_MESSAGE and closing in self._source):
                return opening, closing
        return None

    def names(self, word: str) -> bool:
        """Whether the template's source has a word, such as the variable tools."""
        return word in self._source

    def takes_system(self) -> bool:
        """Whether a system message reaches the model: it must show up in the text, and before the user's."""
        try:
            text = self.render([{"role": "system", "content": "xSYSx"}, {"role": "user", "content": "xUSRx"}])
        except TemplateError:
            return False
        return 0 <= text.find("xSYSx") < text.find("xUSRx")


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox that templates cannot stay in: the clock and the size of the text are looked at in every pass of a
    loop, every call of a macro and every output; what one operation would spend all memory on is refused.
    """

    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, finalize=_counted)
        for name in ("center", "indent", "replace", "join", "format", "wordwrap", "batch", "slice", "tojson"):
            self.filters[name] = _checked_filter(name, self.filters[name])
        self.filters.update(in_time=_in_time, in_size=_in_size)
        self.globals["lipsum"] = _no_lipsum

    def bounded(self, source: str) -> jinja2.Template:
        tree = self.parse(source)
        repeated: list[nodes.For | nodes.Macro | nodes.CallBlock] = []
        for kind in (nodes.For, nodes.Macro, nodes.CallBlock):
            repeated += tree.find_all(kind)
        for node in repeated:
            literal = nodes.Const(sum(len(part.data) for part in node.find_all(nodes.TemplateData)))
            check = nodes.Output([nodes.Filter(nodes.Const(""), "in_time", [literal], [], None, None)])
            node.body.insert(0, check.set_lineno(1).set_environment(self))
        tree = _Joins().visit(tree).set_environment(self)
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_widths(left, right)
        elif operator != "%":
            sized = hasattr(left, "__len__") or hasattr(right, "__len__")
            a, b = (len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right))
            if operator == "**":
                large = a > 10**6 or b > 64
            elif operator == "*":
                large = a * b > (10**7 if sized else 10**18)
            else:
                large = sized and a + b > LARGEST
            if large:
                raise OverflowError(f"{operator} of numbers or texts that large")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as jinja2 has it)
        own = getattr(__obj, "__self__", None)
        if isinstance(own, (str, bytes, int)):
            _check_method(str(getattr(__obj, "__name__", "")), own, [*args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            _check_widths(value.__self__, [*args, *kwargs.values()])
            return str(wrapped(*args, **kwargs))

        return formatted


class _Joins(NodeTransformer):
    """The texts that ~ joins have a size, too."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 (jinja2 looks for this name)
        self.generic_visit(node)
        return nodes.Filter(node, "in_size", [], [], None, None).set_lineno(node.lineno)


LARGEST = 10**8  # characters or elements that one operation makes
WIDEST = 10**6  # characters that a text is padded to
_deadline: ContextVar[float] = ContextVar("_deadline")
_left: ContextVar[int] = ContextVar("_left", default=LARGEST)  # characters that a rendering may still put out


def _check_method(name: str, own: Any, args: Sequence[Any]) -> None:
    """Raise OverflowError where a method of a text or a number, or a filter of that name, would make too much."""
    numbers = [abs(x) for x in args if isinstance(x, int)]
    texts = [x for x in args if isinstance(x, (str, bytes))]
    n = len(own) if hasattr(own, "__len__") else 1
    made = n
    if name == "replace" and len(texts) == 2:
        made = n * (1 + len(texts[1])) // max(1, len(texts[0]))
    elif name == "join":
        made = n * (1 + max([len(x) for x in args if hasattr(x, "__len__")], default=0))
    elif name == "translate":
        made = n * (1 + max([len(str(x)) for x in args if hasattr(x, "__len__")], default=0))
    elif name in ("expandtabs", "indent", "wordwrap", "batch"):
        made = n * max([1, *numbers, *map(len, texts)])
    if any(number > WIDEST for number in numbers) or made > LARGEST:
        raise OverflowError(f"{name} of numbers or texts that large")


def _check_widths(text: str, values: Any) -> None:
    """Raise OverflowError where formatting pads to more than is needed anywhere."""
    given = values if isinstance(values, (list, tuple)) else [values]
    large = any(isinstance(x, int) and abs(x) > WIDEST for x in given)
    widths = _WIDTH_GIVEN.search(text) is not None and large
    if _WIDE.search(text) or widths:
        raise OverflowError("formatting to a width that large")


_WIDE = re.compile(r"[%{][^%{}]*\d{7}")
_WIDTH_GIVEN = re.compile(r"%[^%a-zA-Z]*\*|\{[^{}]*\{")


def _checked_filter(name: str, plain: Any) -> Any:
    @functools.wraps(plain)  # with what tells jinja2 what to pass
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if hasattr(plain, "jinja_pass_arg") else args
        if name == "format":
            _check_widths(str(given[0]), [*given[1:], *kwargs.values()])
        elif given:
            _check_method(name, given[0], [*given[1:], *kwargs.values()])
        return plain(*args, **kwargs)

    return checked


def _no_lipsum(*_: Any, **__: Any) -> NoReturn:
    raise jinja2.TemplateError("lipsum is no part of a chat template")


def _spend(n: int) -> None:
    left = _left.get() - n
    _left.set(left)
    if left < 0:
        raise OverflowError(f"it is longer than {LARGEST:,} characters")


def _counted(value: Any) -> Any:
    if isinstance(value, str):
        _spend(len(value))
    return value


@jinja2.pass_context  # else it is computed once, when the template is compiled
def _in_time(context: jinja2.runtime.Context, text: str, literal: int) -> str:
    if time.monotonic() > _deadline.get():
        raise TimeoutError(f"it does not end within {PATIENCE:g} s")
    _spend(literal)
    return text


@jinja2.pass_context
def _in_size(context: jinja2.runtime.Context, text: str) -> str:
    if len(text) > LARGEST:
        raise OverflowError("~ of texts that large")
    return text


def as_messages(conversation: Conversation, system: str | None = None) -> list[dict[str, str]]:
    """A user's string or a list of messages, as a list of messages; `system` goes in front.

    Raises ArgumentError when a message lacks a role or a content.
    """
    if isinstance(conversation, str):
        messages: list[dict[str, Any]] = [{"role": "user", "content": conversation}]
    elif isinstance(conversation, Sequence) and all(isinstance(m, Mapping) for m in conversation):
        messages = [dict(m) for m in conversation if isinstance(m, Mapping)]
    else:
        raise ArgumentError(
            f'a conversation is a text, or a list of messages with "role" and "content", not {conversation!r:.80}'
        )
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    if not messages:
        raise ArgumentError("the conversation has no message")
    for m in messages:
        if not (isinstance(m.get("role"), str) and isinstance(m.get("content"), str)):
            raise ArgumentError(f'a message needs a "role" and a "content", both text; seen: {m!r}')
    return messages
