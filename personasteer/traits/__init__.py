"""The trait library: contrastive prompts, questions and continuations, one TOML file a trait in library/."""

from __future__ import annotations

import functools
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from importlib.resources.abc import Traversable
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
        declines: "trait" or "anti" where declining a request belongs to that side; elsewhere refusals are dropped.

    Raises:
        TraitError: a name that is no word, no system pair, no question to derive on, an empty text, something else
            than text, a question on both sides, or a continuation pair twice.
    """

    name: str
    description: str
    system: tuple[tuple[str, str], ...]
    derive_questions: tuple[str, ...]
    evaluate_questions: tuple[str, ...] = ()
    continuations: tuple[tuple[str, str], ...] = ()
    rubric: str = ""
    lexicon: tuple[str, ...] = ()
    declines: str = ""

    def __post_init__(self) -> None:
        self._check_types()
        if not re.fullmatch(r"\w[\w-]*", self.name):
            raise TraitError(f"a trait's name must be one word (letters, digits, - and _), not {self.name!r}")
        if not self.system:
            raise TraitError(f"trait {self.name!r} has no pair of system prompts")
        if self.declines not in ("", "trait", "anti"):
            raise TraitError(f'trait {self.name!r}: declines must be "trait", "anti" or "", not {self.declines!r}')
        if not self.derive_questions:
            raise TraitError(f"trait {self.name!r} has no question to derive on")
        pairs = (*self.system, *self.continuations)
        for text in (*self.derive_questions, *self.evaluate_questions, *(t for pair in pairs for t in pair)):
            if not text.strip():
                raise TraitError(f"trait {self.name!r} has an empty text")
        shared = {q.casefold() for q in self.derive_questions} & {q.casefold() for q in self.evaluate_questions}
        if shared:
            raise TraitError(f"trait {self.name!r} evaluates on a question it derives on: {sorted(shared)[0]!r}")
        repeated = next((pair for i, pair in enumerate(self.continuations) if pair in self.continuations[:i]), None)
        if repeated:
            raise TraitError(f"trait {self.name!r} has a continuation pair twice: {repeated[0]!r}")

    def _check_types(self) -> None:
        wanted = {
            "a text": (_is_text, ("name", "description", "rubric", "declines")),
            "a list of texts": (_are_texts, ("derive_questions", "evaluate_questions", "lexicon")),
            "a list of pairs of texts": (_are_pairs, ("system", "continuations")),
        }
        for what, (fits, keys) in wanted.items():
            for key in keys:
                if not fits(getattr(self, key)):
                    raise TraitError(f"trait {str(self.name)[:60]!r}: {key} must be {what}")

    @property
    def selection_pairs(self) -> tuple[tuple[str, str], ...]:
        """Every third continuation pair: layers and strengths are chosen on these."""
        return self.continuations[::3]

    @property
    def evaluation_pairs(self) -> tuple[tuple[str, str], ...]:
        """The other continuation pairs: effects are reported on these. A single one serves for both."""
        others = tuple(pair for i, pair in enumerate(self.continuations) if i % 3)
        return others or self.continuations

    def as_dict(self) -> dict[str, Any]:
        """The trait as plain data, which `from_dict` takes back."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trait:
        """Raises TraitError where the data is not a trait's."""
        known = {f.name for f in fields(cls)}
        try:
            given = {key: _frozen(value) for key, value in data.items() if key in known}
            return cls(**given)
        except (TypeError, AttributeError, ValueError) as e:
            raise TraitError(f"not the data of a trait: {e}") from e


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_text, value))


def _are_pairs(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_are_texts(pair) and len(pair) == 2 for pair in value)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def names() -> list[str]:
    """The traits that ship with the package."""
    found = (Path(f.name) for f in _library().iterdir())
    return sorted(p.stem for p in found if p.suffix == ".toml")


def _library() -> Traversable:
    return files(__name__).joinpath("library")


@functools.cache
def get(name: str) -> Trait:
    """A trait of the library. Raises TraitError with the known names when there is none of that name."""
    if name not in names():
        raise TraitError(f"unknown trait {name!r}; known: {', '.join(names())}, or the path of a .toml or .json file")
    return parse_toml(_library().joinpath(f"{name}.toml").read_text("utf-8"), name)


def load(path: str | Path) -> Trait:
    """A trait from a file: .toml in the library's layout, .json in that of the published persona_vectors artefacts.

    Raises TraitError where the file cannot be read or breaks the rules.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise TraitError(f"{path}: cannot be read ({e})") from e
    if str(path).endswith(".json"):
        return parse_json(text, str(path), Path(path).stem)
    return parse_toml(text, str(path))


def find(name_or_path: str) -> Trait:
    """A trait by name, or from a file when the argument ends in .toml or .json."""
    return load(name_or_path) if name_or_path.endswith((".toml", ".json")) else get(name_or_path)


@functools.cache
def neutral_pairs() -> tuple[tuple[str, str], ...]:
    """16 everyday question-answer pairs, on which the norms of a model's stream are measured."""
    data = tomllib.loads(files(__name__).joinpath("neutral_pairs.toml").read_text("utf-8"))
    return tuple((p["question"], p["answer"]) for p in data["pair"])


from personasteer.traits.formats import parse_json, parse_toml  # noqa: E402 (they make Traits)
