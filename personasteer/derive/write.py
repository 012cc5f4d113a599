"""Writing a trait from its name and one sentence: a model writes the prompts, the questions and the continuations.

Source: arXiv 2507.21509, section 2.1, where a large model writes a trait's artefacts from its description.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from personasteer.endpoint import Endpoint
from personasteer.engine import Progress
from personasteer.errors import ArgumentError, TraitError
from personasteer.model import Model
from personasteer.traits import Trait

Pair: TypeAlias = tuple[str, str]  # (shows the trait, shows its opposite)
Writer: TypeAlias = Model | Endpoint

N_ROUNDS = 4
LEAST_PAIRS, LEAST_QUESTIONS = 2, 4  # system prompts, and questions to derive on
UNIT = 5  # pairs that one request asks for; questions come ten at a time
SUBJECTS = (
    "work and money", "family and friends", "hobbies and sport", "travel and places", "food and the home",
    "science and technology", "books, music and films", "health and habits", "school and learning", "town and garden",
)  # fmt: skip


def write_trait(
    name: str,
    description: str,
    writer: Writer,
    *,
    n_pairs: int = 5,
    n_questions: int = 40,
    n_continuations: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> Trait:
    """A trait whose texts `writer` has written. Read them before you rely on them: small models write weak ones.

    Half of the questions are to derive on, the rest is held out. What the writer gets wrong is dropped and asked for
    again, in up to four rounds; continuations may end up fewer than asked for, or none.

    Args:
        name: one word, such as "stubborn".
        description: one sentence on what an assistant with the trait does.
        writer: a Model with a chat template, or an Endpoint.
        n_pairs: pairs of system prompts.
        n_questions: questions in total.
        n_continuations: pairs of beginnings of an answer.
        seed: of the writer's sampling and of the split of the questions.
        progress: called with (done, total) texts.

    Raises:
        ArgumentError: a number that is too small, an empty description.
        TraitError: the name is no word; fewer than 2 usable pairs of system prompts or 4 questions to derive on.
        TemplateError, EndpointError: the writer cannot be asked.
    """
    for option, value, least in (
        ("n_pairs", n_pairs, LEAST_PAIRS),
        ("n_questions", n_questions, 2 * LEAST_QUESTIONS),
        ("n_continuations", n_continuations, 0),
    ):
        if value < least:
            raise ArgumentError(f"{option} must be at least {least}, not {value}")
    if not description.strip():
        raise ArgumentError("description is empty: say in one sentence what an assistant with the trait does")
    description = " ".join(description.split())
    Trait(name, description, (("a", "b"),), ("q",))  # a bad name shows before the work
    draft = _Draft(name, description, n_pairs, n_questions, n_continuations)
    for round_ in range(N_ROUNDS):
        for stage in (draft.system_requests, draft.other_requests):  # continuations need the system prompts' words
            asked = stage(round_)
            answers = _ask(
                writer, [r.prompt for r in asked], seed=seed + 7919 * round_, temperature=0.6 + 0.15 * round_
            )
            for request, answer in zip(asked, answers, strict=True):
                request.take(answer)
                if progress:
                    progress(draft.done, draft.total)
        if draft.done == draft.total:
            break
    return draft.trait(seed)


def _ask(writer: Writer, prompts: Sequence[str], *, seed: int, temperature: float) -> list[str]:
    if isinstance(writer, Model):
        return writer.chat_batch(prompts, seed=seed, temperature=temperature, max_tokens=400, repeat_penalty=1.1)
    return [
        writer.chat(prompt, max_tokens=800, temperature=temperature, seed=seed + i).text
        for i, prompt in enumerate(prompts)
    ]


# -- what is there, and what is to be asked for -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    prompt: str
    take: Callable[[str], None]


@dataclass
class _Draft:
    """The usable texts so far."""

    name: str
    description: str
    n_pairs: int
    n_questions: int
    n_continuations: int
    system: list[Pair] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    continuations: list[Pair] = field(default_factory=list)
    rubric: str = ""

    @property
    def total(self) -> int:
        return self.n_pairs + self.n_questions + self.n_continuations + 1

    @property
    def done(self) -> int:
        return len(self.system) + len(self.questions) + len(self.continuations) + bool(self.rubric)

    def system_requests(self, _: int) -> list[_Wanted]:
        missing = self.n_pairs - len(self.system)
        prompt = (
            f"{self._about()}\n\nWrite {min(missing, UNIT)} pairs of instructions to an AI assistant. In each pair, A "
            f"makes the assistant clearly {self.name} and B makes it clearly the opposite. Each is one or two blunt "
            'sentences of 15 to 35 words that begin with "You are". Vary the wording from pair to pair. Write two '
            "lines for each pair and nothing else:\nA: You are ...\nB: You are ..."
        )
        return [_Wanted(prompt, self._take_system)] * -(-missing // UNIT)

    def other_requests(self, round_: int) -> list[_Wanted]:
        wanted = []
        for k in range(-(-(self.n_questions - len(self.questions)) // 10)):
            subject = SUBJECTS[(k + 3 * round_) % len(SUBJECTS)]
            prompt = (
                "Write 10 short, everyday questions that people ask an AI assistant, on "
                f"{subject}. Each has 5 to 14 words, is about something particular, and asks for an opinion, advice "
                "or help. Write a numbered list and nothing else."
            )
            wanted.append(_Wanted(prompt, self._take_questions))
        told = sorted(self._told())
        for k in range(-(-(self.n_continuations - len(self.continuations)) // UNIT)):
            prompt = (
                f"{self._about()}\n\nWrite {UNIT} pairs of first sentences of an assistant's answer. In each pair, A "
                f"is clearly {self.name} and B is clearly the opposite; both have 6 to 12 words and the same length, "
                "and would fit any question. Name no topic. "
                + (f"Do not use these words: {', '.join(told[k::4][:20])}. " if told else "")
                + "Write two lines for each pair and nothing else:\nA: ...\nB: ..."
            )
            wanted.append(_Wanted(prompt, self._take_continuations))
        if not self.rubric:
            prompt = (
                f"{self._about()}\n\nWrite instructions, 40 to 70 words in one paragraph, to a rater who scores how "
                f"{self.name} an answer is from 0 to 100: which answers get 0, which about 50, and which 100."
            )
            wanted.append(_Wanted(prompt, self._take_rubric))
        return wanted

    def _about(self) -> str:
        return f"The trait is called {self.name}: {self.description}"

    def _told(self) -> set[str]:
        return {word for pair in self.system for text in pair for word in content_words(text)}

    def _take_system(self, text: str) -> None:
        for pair in pairs_in(text):
            if all(4 <= len(side.split()) <= 80 for side in pair):
                _add_pair(self.system, pair, self.n_pairs)

    def _take_questions(self, text: str) -> None:
        stem = stem_of(self.name)
        known = {_key(q) for q in self.questions}
        for question in questions_in(text):
            names_it = any(word.startswith(stem) for word in re.findall(r"[\w-]+", question.casefold()))
            if len(self.questions) < self.n_questions and not names_it and _key(question) not in known:
                known.add(_key(question))
                self.questions.append(question)

    def _take_continuations(self, text: str) -> None:
        told = self._told()
        for pair in pairs_in(text):
            a, b = map(len, pair)
            fits = abs(a - b) <= 0.2 * max(a, b) and all(3 <= len(side.split()) <= 25 for side in pair)
            if fits and not told & {w for side in pair for w in content_words(side)}:
                _add_pair(self.continuations, pair, self.n_continuations)

    def _take_rubric(self, text: str) -> None:
        paragraph = clean(" ".join(text.split()))
        if 10 <= len(paragraph.split()) <= 150 and {"0", "100"} <= set(re.findall(r"\d+", paragraph)):
            self.rubric = paragraph

    def trait(self, seed: int) -> Trait:
        questions = list(self.questions)
        random.Random(seed).shuffle(questions)  # both halves are on all subjects
        half = (len(questions) + 1) // 2
        missing = []
        if len(self.system) < LEAST_PAIRS:
            missing.append(f"{len(self.system)} usable pairs of system prompts ({LEAST_PAIRS} are needed)")
        if half < LEAST_QUESTIONS:
            missing.append(f"{half} usable questions to derive on ({LEAST_QUESTIONS} are needed)")
        if missing:
            raise TraitError(
                f"trait {self.name!r}: in {N_ROUNDS} rounds the writer gave only {' and '.join(missing)}: "
                "try a larger model, an endpoint, or another seed"
            )
        return Trait(
            name=self.name,
            description=self.description,
            system=tuple(self.system),
            derive_questions=tuple(questions[:half]),
            evaluate_questions=tuple(questions[half:]),
            continuations=tuple(self.continuations),
            rubric=self.rubric or self._plain_rubric(),
        )

    def _plain_rubric(self) -> str:
        return (
            f"Score how {self.name} the answer is, from 0 to 100. Give 0 to an answer that shows nothing of the trait "
            "or its opposite, about 50 to one that shows it in part, and 100 to one that shows it throughout."
        )


def _add_pair(pairs: list[Pair], pair: Pair, most: int) -> None:
    """Take a pair in, unless one of its sides is there already."""
    known = {_key(side) for p in pairs for side in p}
    a, b = map(_key, pair)
    if len(pairs) < most and a and b and a != b and not known & {a, b}:
        pairs.append(pair)


def _key(text: str) -> str:
    """What two texts that differ only in case, spaces and marks have in common."""
    return "".join(c for c in text.casefold() if c.isalnum())


# -- reading what a writer writes -------------------------------------------------------------------------------------

_NUMBERING = re.compile(r"^\s*(?:[-*•–>#]+\s+|\(?\d{1,3}[.):]\s*|Q\d*[.:]\s+|pair\s+\d+\s*[.:)]\s*)+", re.IGNORECASE)
_POSITIVE = "positive|pos|trait|shows|with|a|yes"
_NEGATIVE = "negative|neg|opposite|anti|without|b|no"
_LABEL = re.compile(
    rf"^[\s*_\"'(\[]*(?:(?P<a>{_POSITIVE})|(?P<b>{_NEGATIVE}))(?:[\s*_]*(?:\d{{1,2}}|prompt|side|version|sentence))*[\s*_\"')\]]*"
    r"(?::|\)|\s-\s|\.\s)[\s*_]*(?P<text>.*)$",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`"}
_COMMON = frozenset(
    {
        "about", "also", "been", "does", "from", "have", "here", "into", "just", "more", "most", "much", "only", "some",
        "such", "than", "that", "them", "then", "there", "these", "they", "this", "very", "what", "when", "which",
        "will", "with", "would", "your",
    }
)  # fmt: skip


def clean(text: str) -> str:
    """A text without numbering, list marks, bold marks, and quotes around it."""
    text = _NUMBERING.sub("", text.strip()).replace("**", "").strip().rstrip(",").strip()
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    return text


def content_words(text: str) -> set[str]:
    """The words of four letters and more that say something."""
    return {w for w in re.findall(r"[^\W\d_]+", text.casefold()) if len(w) >= 4} - _COMMON


def stem_of(name: str) -> str:
    """The part of a trait's name that its relatives share: "sarcas" of "sarcastic"."""
    name = name.casefold()
    for ending in (
        "istic",
        "tic",
        "ical",
        "ness",
        "ity",
        "ing",
        "ive",
        "ous",
        "ful",
        "ism",
        "ic",
        "ly",
        "ed",
        "y",
        "e",
    ):
        if name.endswith(ending) and len(name) - len(ending) >= 4:
            return name[: -len(ending)]
    return name


def questions_in(text: str) -> list[str]:
    """Questions, and requests that stand in a list, of 3 to 30 words."""
    found = [s for value in _json_values(text) for s in _strings(value)]
    lines = found or text.splitlines()
    out = []
    for line in lines:
        question = clean(line)
        listed = bool(found) or _NUMBERING.match(line) is not None
        if 3 <= len(question.split()) <= 30 and (question.endswith("?") or (listed and question.endswith((".", "!")))):
            out.append(question)
    return out


def pairs_in(text: str) -> list[Pair]:
    """(A, B) pairs of a text: JSON objects or lists of two, lines with labels, or two sides around a bar."""
    found = [pair for value in _json_values(text) for pair in _json_pairs(value)]
    pairs = found or _labelled_pairs(text) or _barred_pairs(text)
    return [(a, b) for a, b in ((clean(a), clean(b)) for a, b in pairs) if a and b]


def _labelled_pairs(text: str) -> list[Pair]:
    pairs: list[Pair] = []
    sides: dict[str, str] = {}
    label = ""
    for line in re.sub(r"\s\|\s|(?<=[.!?\"”])\s+(?=B:\s)", "\n", text).splitlines():
        plain = clean(line)
        if match := _LABEL.match(plain):
            label = "a" if match["a"] else "b"
            if label == "a":
                sides = {}
            plain = match["text"]
        if label and clean(plain):
            sides[label] = plain
            label = ""
        if len(sides) == 2:
            pairs.append((sides["a"], sides["b"]))
            sides = {}
    return pairs


def _barred_pairs(text: str) -> list[Pair]:
    rows = [[side for side in line.strip().strip("|").split("|") if side.strip()] for line in text.splitlines()]
    pairs = [(row[0], row[1]) for row in rows if len(row) == 2]
    return [(a, b) for a, b in pairs if re.search(r"\w", a) and re.search(r"\w", b)]


def _json_values(text: str) -> list[Any]:
    """The JSON lists and objects in a text, outermost ones only."""
    decoder, values, at = json.JSONDecoder(), [], 0
    while match := re.compile(r"[\[{]").search(text, at):
        try:
            value, at = decoder.raw_decode(text, match.start())
            values.append(value)
        except (ValueError, RecursionError):
            at = match.start() + 1
    return values


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _json_pairs(value: Any) -> Iterable[Pair]:
    if isinstance(value, dict):
        texts = {str(k): v for k, v in value.items() if isinstance(v, str)}
        sides = {"a" if m["a"] else "b": v for k, v in texts.items() if (m := _LABEL.match(f"{k}:"))}
        if len(sides) == 2:
            yield sides["a"], sides["b"]
        parts = [v for v in value.values() if not isinstance(v, str)]
    elif isinstance(value, list):
        if len(value) == 2 and all(isinstance(v, str) for v in value):
            yield value[0], value[1]
        parts = value
    else:
        parts = []
    for part in parts:
        yield from _json_pairs(part)
