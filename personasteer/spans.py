"""Whose words are whose in a rendered chat: character spans of messages and thinking blocks, and their tokens."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from personasteer.errors import ArgumentError, TemplateError

# (opening, closing) markers of a thinking block; the first pair that a template names is the model's
THINKING_MARKERS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, SmolLM3, GLM, Nemotron, ...
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<mm:think>", "</mm:think>"),  # MiniMax-M3
    ("<thinking>", "</thinking>"),  # Apriel
    ("[THINK]", "[/THINK]"),  # Magistral, Ministral 3
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A and R7B
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss
    ("<|channel>thought", "<channel|>"),  # Gemma 4, whose "<|think|>" is a switch: before Solar Open
    ("<|think|>", "<|end|>"),  # Solar Open
)
END_OF_MESSAGE = "<|end|>"  # closes a thinking block as it closes any other message: no sign of thinking by itself

# what templates look for in a content (tags, switches like /no_think) and what they strip from it
_MARKUP = re.compile(r"(<[^<>\s]+>|\[/?[A-Z_]+\]|(?<!\S)/\w+|\s+)")


@dataclass(frozen=True)
class Span:
    """The characters [begin, end) of a rendered text that are one message's own content."""

    role: str
    begin: int
    end: int


def locate_contents(
    text: str, messages: Sequence[Mapping[str, str]], render: Callable[[Sequence[str]], str], *, foreign: str
) -> list[Span]:
    """Where each message's own content stands in `text`, which is what `render` makes of all their contents.

    foreign: the template's source, whose words the probes keep clear of. Raises TemplateError when a message's text
    cannot be located.
    """
    contents = [m["content"] for m in messages]
    taken = "\n".join([foreign, text, *contents])
    mark = next(mark for n in itertools.count() if (mark := f"XQ{n}J") not in taken)
    # markup may depend on a content being empty, or on tags in it: then those have to stay in the probe
    variants = list(itertools.product((False, True), (False, True)))
    probes = [_Probe(contents, mark, keep_blank=blank, keep_markup=markup) for blank, markup in variants]

    def locate(gap: _Gap) -> list[Span] | None:
        for probe in probes:
            try:
                found = probe.locate(text, render(probe.contents), gap)
            except TemplateError:  # this template does not take the probe's contents
                continue
            if found is not None:
                return [Span(messages[i]["role"], begin, end) for i, begin, end in found]
        return None

    spans = locate("none")
    if spans is None:
        spans = locate("part")
    if spans is None:
        try:
            spans = _search(text, messages)
        except TemplateError:  # after the search: where the order hangs on the contents, anything fits anywhere
            spans = locate("any")
            if spans is None:
                raise
    return spans


# ---- where a message stands in the text

_Gap: TypeAlias = Literal["none", "part", "any"]  # what may stand between markup: the content, a part of it, anything


class _Probe:
    """Messages' contents replaced by marks; their rendering shows the template's markup between the contents."""

    def __init__(self, contents: Sequence[str], mark: str, *, keep_blank: bool, keep_markup: bool) -> None:
        self._parts: list[list[str]] = []  # a message's content, cut: even places may become marks, odd ones stay
        self._slots: list[tuple[int, int]] = []  # mark k stands for part _slots[k][1] of message _slots[k][0]
        self._mark = re.compile(rf"{mark}(\d+)Z")
        self._words = keep_markup
        self.contents: list[str] = []
        for i, content in enumerate(contents):
            parts = _MARKUP.split(content) if keep_markup else [content]
            marked = [j for j in range(0, len(parts), 2) if parts[j]]
            if not marked or not content.strip():  # a single mark for what has no word
                parts, marked = [content], [] if keep_blank and not content.strip() else [0]
            probe = list(parts)
            for j in marked:
                probe[j] = f"{mark}{len(self._slots)}Z"
                self._slots.append((i, j))
            self._parts.append(parts)
            self.contents.append("".join(probe))

    def locate(self, text: str, rendered: str, gap: _Gap) -> list[tuple[int, int, int]] | None:
        """(message, begin, end) of each content in `text`, or None when the probe's markup is not the text's."""
        pieces = self._mark.split(rendered)  # markup, number of a mark, markup, ...
        slots = [self._slots[int(k)] for k in pieces[1::2]]
        if gap != "none" and self._words:
            return None  # a gap for each word would fit anything
        if gap == "any" and len(set(slots)) < len(self._slots):
            return None  # the gap could be the message that left no mark
        fit = _fit(text, pieces[::2], [self._parts[i][j] for i, j in slots], gap)
        if fit is None:
            return None
        found: list[tuple[int, int, int]] = []
        group: list[tuple[int, int]] = []
        for at, (i, j) in enumerate(slots):
            group.append(fit[at])
            if at + 1 < len(slots) and slots[at + 1][0] == i and slots[at + 1][1] > j:
                continue  # the next mark goes on in this message
            first = slots[at + 1 - len(group)][1]
            before = self._parts[i][:first][::-1]
            if any(before[1::2]):  # left out by the template, like earlier thinking; what closed it went with it
                before = list(itertools.takewhile(lambda part: not part.startswith(("</", "[/")), before))
            begin = self._grow(text, group[0][0], before, -1)
            end = self._grow(text, group[-1][1], self._parts[i][j + 1 :], 1)
            if found:
                begin = max(begin, found[-1][2])
            if at + 1 < len(slots):
                end = min(end, fit[at + 1][0])
            found.append((i, begin, end))
            group = []
        return found

    @staticmethod
    def _grow(text: str, at: int, parts: Sequence[str], step: int) -> int:
        """Where the content's own unmarked parts beside position `at` end, if they are there; not in whitespace."""
        edge = at
        for part in parts:
            begin = at if step > 0 else at - len(part)
            if begin < 0 or not text.startswith(part, begin):
                break
            at += step * len(part)
            if part.strip():
                edge = at
        return edge


def _fit(text: str, pieces: Sequence[str], contents: Sequence[str], gap: _Gap) -> list[tuple[int, int]] | None:
    """(begin, end) of each content so that piece, content, piece, ..., piece is the whole text; the best fit of all."""
    if not text.startswith(pieces[0]):
        return None
    costs = {len(pieces[0]): 0}  # of the best way to each place where the next content may begin
    steps: list[dict[int, tuple[int, int, int]]] = []
    for content, piece in zip(contents, pieces[1:], strict=True):
        ways: dict[int, tuple[int, int, int]] = {}
        for begin, cost in costs.items():
            for end, extra in _ends(text, begin, content, piece, gap):
                to = end + len(piece)
                if to not in ways or cost + extra < ways[to][0]:
                    ways[to] = (cost + extra, begin, end)
        costs = {to: way[0] for to, way in ways.items()}
        steps.append(ways)
    if len(text) not in costs:
        return None
    found = []
    to = len(text)
    for i in range(len(steps) - 1, -1, -1):
        _, begin, end = steps[i][to]
        found.append((begin, end))
        to = begin
    return found[::-1]


def _ends(text: str, begin: int, content: str, piece: str, gap: _Gap) -> Iterator[tuple[int, int]]:
    """(end, cost) of each way in which `content` can stand at `begin` with `piece` behind it."""
    stripped = (f(c) for c in (None, "\n") for f in (content.strip, content.lstrip, content.rstrip))
    exact = False
    for cost, own in enumerate(dict.fromkeys((content, *stripped))):
        end = begin + len(own)
        if text.startswith(own, begin) and text.startswith(piece, end):
            exact = exact or bool(own)
            yield end, cost
    if exact or gap == "none":
        return
    end = text.find(piece, begin) if piece else len(text)
    while end >= 0:
        if end - begin <= len(content) and text[begin:end] in content:
            yield end, 100
        elif gap == "any":
            yield end, 10_000
        end = text.find(piece, end + 1) if piece else -1


def _search(text: str, messages: Sequence[Mapping[str, str]]) -> list[Span]:
    """Spans from the contents alone: in the order of the messages, or anywhere when each stands there just once."""
    try:
        return _search_in_order(text, messages)
    except TemplateError:
        spans = []
        for m in messages:
            if own := m["content"].strip():
                at = _occurrences(text, own)
                if len(at) != 1:
                    raise
                spans.append(Span(m["role"], at[0], at[0] + len(own)))
        spans.sort(key=lambda s: s.begin)
        if any(a.end > b.begin for a, b in itertools.pairwise(spans)):
            raise
        return spans


def _search_in_order(text: str, messages: Sequence[Mapping[str, str]]) -> list[Span]:
    contents = [m["content"] for m in messages]
    spans = []
    cursor = 0
    for i, m in enumerate(messages):
        if not contents[i].strip():
            continue
        for own in (contents[i], contents[i].strip()):
            at = [a for a in _occurrences(text, own) if a >= cursor]
            if at and len(at) == sum(len(_occurrences(c, own)) for c in contents[i:]):  # none is the template's
                break
        else:
            raise TemplateError(
                f"the {m['role']}'s text {contents[i]!r:.60} could not be located in what the model's chat template "
                "makes of the messages"
            )
        cursor = at[0] + len(own)
        spans.append(Span(m["role"], at[0], cursor))
    return spans


def _occurrences(text: str, part: str) -> list[int]:
    """Where `part` begins in `text`, overlaps included."""
    return [m.start() for m in re.finditer(f"(?={re.escape(part)})", text)]


# ---- from characters to tokens


def thinking_spans(text: str, markers: tuple[str, str]) -> list[tuple[int, int]]:
    """Characters [begin, end) of each thinking block: from behind its opening marker through its closing marker.

    A block that is still open runs to the end of the text.

    markers: the opening and the closing one, see `ChatTemplate.thinking_markers`.
    """
    opening, closing = markers
    spans = []
    at = text.find(opening)
    while at >= 0:
        begin = at + len(opening)
        close = text.find(closing, begin)
        end = close + len(closing) if close >= 0 else len(text)
        spans.append((begin, end))
        at = text.find(opening, end)
    return spans


def tokens_in_spans(pieces: Sequence[bytes], text: str, spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which tokens overlap a span of the text they were made of: (n_tokens,).

    The tokens may begin with a beginning-of-sequence token that the text lacks, carry spaces that the tokenizer
    added, and lack whitespace that it dropped.

    pieces: the tokens' bytes, control tokens written out.
    spans: characters [begin, end) of the text.

    Raises ArgumentError when a span leaves the text, TemplateError when the tokens are not this text's.
    """
    for begin, end in spans:
        if not 0 <= begin <= end <= len(text):
            raise ArgumentError(f"the span ({begin}, {end}) leaves the text, which has {len(text)} characters")
    best, failure = -1, ""
    # SentencePiece writes spaces as "\u2581", so that one in the text comes back as a space
    for written in dict.fromkeys((text, text.replace("\u2581", " "))):
        data = written.encode("utf-8", "surrogatepass")
        for first in (0, 1):  # 1: the first token is not in the text
            places, problem = _align(pieces[first:], data)
            if not problem:
                outside = [False] * (len(pieces) - len(places))
                return np.array(outside + _overlaps(places, written, spans), bool)
            if len(places) > best:
                best, failure = len(places), problem
    raise TemplateError(f"the tokens cannot be aligned with the text they should be made of: {failure}")


def _align(pieces: Sequence[bytes], data: bytes) -> tuple[list[tuple[int, int]], str]:
    """Bytes [begin, end) in `data` of each piece, up to the first that does not fit, and what is wrong with that."""
    places: list[tuple[int, int]] = []
    cursor = 0
    for piece in pieces:
        place = _place(piece, data, cursor)
        if place is None:
            return places, f"a token is {piece!r:.60} where the text goes on with {data[cursor : cursor + 20]!r}"
        places.append(place)
        cursor = place[1]
    if data[cursor:].strip():
        return places, f"they end before {data[cursor : cursor + 20]!r}"
    return places, ""


def _place(piece: bytes, data: bytes, cursor: int) -> tuple[int, int] | None:
    begin = cursor
    while True:
        if data.startswith(piece, begin):
            return begin, begin + len(piece)
        # SentencePiece adds a space at the start and after special tokens
        if piece.startswith(b" ") and data.startswith(piece[1:], begin):
            return begin, begin + len(piece) - 1
        if not data[begin : begin + 1].isspace():
            return None
        begin += 1  # some special tokens (Phi-3) swallow the whitespace behind them


def _overlaps(places: Sequence[tuple[int, int]], text: str, spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each of `places` (bytes) shares a byte with one of `spans` (characters)."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    offsets = np.concatenate([[0], np.cumsum(widths)])  # character -> byte
    edges = np.zeros(offsets[-1] + 1, np.int64)
    for begin, end in spans:
        edges[offsets[begin]] += 1
        edges[offsets[end]] -= 1
    covered = np.concatenate([[0], np.cumsum(np.cumsum(edges[:-1]) > 0)])  # bytes in a span before each byte
    return [bool(covered[end] > covered[begin]) for begin, end in places]
