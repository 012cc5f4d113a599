"""The trait library: contrastive prompts, questions and continuations, one TOML file a trait."""

from __future__ import annotations

import functools
import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from personasteer.errors import TraitError


@dataclass(frozen=True)
class Trait:
    """What is needed to derive a trait's vector and to test it.

    Args:
        name: one word.
        description: one sentence.
        system: pairs of opposite system prompts (showing the trait, showing its opposite).
        derive_questions: asked under both prompts to derive the vector.
        evaluate_questions: held out; effects are reported on these.
        continuations: pairs of beginnings of an answer (trait, anti-trait) of like length, for log-odds.
        rubric: how a rater scores an answer from 0 to 100.
        lexicon: words that hint at the trait.

    Raises:
        TraitError: a name that is no word, no system pair, no question to derive on, an empty text, or a question
            on both sides.
    """

    name: str
    description: str
    system: tuple[tuple[str, str], ...]
    derive_questions: tuple[str, ...]
    evaluate_questions: tuple[str, ...] = ()
    continuations: tuple[tuple[str, str], ...] = ()
    rubric: str = ""
    lexicon: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w-]*", self.name):
            raise TraitError(f"a trait's name must be one word (letters, digits, - and _), not {self.name!r}")
        if not self.system:
            raise TraitError(f"trait {self.name!r} has no pair of system prompts")
        if not self.derive_questions:
            raise TraitError(f"trait {self.name!r} has no question to derive on")
        pairs = (*self.system, *self.continuations)
        for text in (*self.derive_questions, *self.evaluate_questions, *(t for pair in pairs for t in pair)):
            if not text.strip():
                raise TraitError(f"trait {self.name!r} has an empty text")
        shared = {q.casefold() for q in self.derive_questions} & {q.casefold() for q in self.evaluate_questions}
        if shared:
            raise TraitError(f"trait {self.name!r} evaluates on a question it derives on: {sorted(shared)[0]!r}")


def _parse(text: str, source: str) -> Trait:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise TraitError(f"{source}: not valid TOML: {e}") from e

    def pairs(key: str, a: str, b: str) -> tuple[tuple[str, str], ...]:
        return tuple((_text(p[a]), _text(p[b])) for p in data.get(key, []))

    try:
        return Trait(
            name=_text(data["name"]),
            description=_text(data["description"]),
            system=pairs("system", "positive", "negative"),
            derive_questions=_texts(data["questions"]["derive"]),
            evaluate_questions=_texts(data["questions"].get("evaluate", [])),
            continuations=pairs("continuation", "trait", "anti"),
            rubric=_text(data.get("rubric", "")),
            lexicon=_texts(data.get("lexicon", [])),
        )
    except KeyError as e:
        raise TraitError(f"{source}: the key {e} is missing") from e
    except (TypeError, AttributeError) as e:
        raise TraitError(f"{source}: {e}") from e


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text is needed where {value!r} stands")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError(f"a list of texts is needed where {value!r} stands")
    return tuple(map(_text, value))


def names() -> list[str]:
    """The traits that ship with the package."""
    found = (Path(f.name) for f in files(__name__).iterdir())
    return sorted(p.stem for p in found if p.suffix == ".toml" and p.stem != "neutral_pairs")


@functools.cache
def get(name: str) -> Trait:
    """A trait of the library. Raises TraitError with the known names when there is none of that name."""
    if name not in names():
        raise TraitError(f"unknown trait {name!r}; known: {', '.join(names())}, or the path of a .toml file")
    return _parse(files(__name__).joinpath(f"{name}.toml").read_text("utf-8"), name)


def load(path: str | Path) -> Trait:
    """A trait from a TOML file of the library's layout."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise TraitError(f"{path}: cannot be read ({e})") from e
    return _parse(text, str(path))


def find(name_or_path: str) -> Trait:
    """A trait by name, or from a file when the argument ends in .toml."""
    return load(name_or_path) if name_or_path.endswith(".toml") else get(name_or_path)


@functools.cache
def neutral_pairs() -> tuple[tuple[str, str], ...]:
    """16 everyday question-answer pairs, on which the norms of a model's stream are measured."""
    data = tomllib.loads(files(__name__).joinpath("neutral_pairs.toml").read_text("utf-8"))
    return tuple((p["question"], p["answer"]) for p in data["pair"])
