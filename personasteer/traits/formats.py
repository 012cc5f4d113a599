"""Files that hold traits or contrasting texts, the library's own and other tools'."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from personasteer.errors import TraitError
from personasteer.traits import Trait

Text = str | tuple[str, str] | list[dict[str, str]]  # what Model.capture takes


@contextmanager
def _named(source: str) -> Iterator[None]:
    """What is wrong with the data, as a TraitError that begins with where they are from."""
    try:
        yield
    except KeyError as e:
        raise TraitError(f"{source}: the key {e} is missing") from e
    except (TypeError, AttributeError, ValueError) as e:
        raise TraitError(f"{source}: {e}") from e


def parse_toml(text: str, source: str) -> Trait:
    """A trait in the library's layout. Raises TraitError that begins with `source`."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise TraitError(f"{source}: not valid TOML: {e}") from e
    with _named(source):
        return Trait(
            name=_text(data["name"]),
            description=_text(data["description"]),
            system=_pairs(data.get("system", []), "positive", "negative"),
            derive_questions=_texts(data["questions"]["derive"]),
            evaluate_questions=_texts(data["questions"].get("evaluate", [])),
            continuations=_pairs(data.get("continuation", []), "trait", "anti"),
            rubric=_text(data.get("rubric", "")),
            lexicon=_texts(data.get("lexicon", [])),
            declines=_text(data.get("declines", "")),
        )


def as_toml(trait: Trait) -> str:
    """The trait in the library's file layout: `personasteer.traits.load` gives it back."""
    lines = [f"{key} = {_quoted(getattr(trait, key))}" for key in ("name", "description", "rubric")]
    lines.append(f"lexicon = [{', '.join(map(_quoted, trait.lexicon))}]")
    if trait.declines:
        lines.append(f"declines = {_quoted(trait.declines)}")
    for positive, negative in trait.system:
        lines += ["", "[[system]]", f"positive = {_quoted(positive)}", f"negative = {_quoted(negative)}"]
    lines += ["", "[questions]"]
    for key, questions in (("derive", trait.derive_questions), ("evaluate", trait.evaluate_questions)):
        lines += [f"{key} = [", *(f"  {_quoted(q)}," for q in questions), "]"]
    for shows, anti in trait.continuations:
        lines += ["", "[[continuation]]", f"trait = {_quoted(shows)}", f"anti = {_quoted(anti)}"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's, but for the one control character that JSON leaves alone
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def parse_json(text: str, source: str, name: str) -> Trait:
    """A trait in the layout of the published persona_vectors artefacts: "instruction", a list of {"pos", "neg"};
    "questions"; "eval_prompt", kept as the rubric.

    The layout holds one list of questions: those at even places derive, the others evaluate. It holds no
    continuations, so effects are measured on the model's own answers. Keys of the library's layout ("name",
    "description", "continuation", "lexicon", "declines") are taken where they are there. Raises TraitError.
    """
    data = _json(text, source)
    if not isinstance(data, dict):
        raise TraitError(f"{source}: a JSON object is needed, not {type(data).__name__}")
    with _named(source):
        questions = _texts(data["questions"])
        return Trait(
            name=_text(data.get("name", re.sub(r"[^\w-]+", "-", name).strip("-") or "trait")),
            description=_text(data.get("description", f"The trait of {Path(source).name}.")),
            system=_pairs(data["instruction"], "pos", "neg"),
            derive_questions=questions[::2],
            evaluate_questions=questions[1::2],
            continuations=_pairs(data.get("continuation", []), "trait", "anti"),
            rubric=_text(data.get("eval_prompt", "")),
            lexicon=_texts(data.get("lexicon", [])),
            declines=_text(data.get("declines", "")),
        )


def load_pairs(path: str | Path) -> tuple[list[Text], list[Text]]:
    """(positive, negative) of a JSONL file of contrasting chats, entry i of both being one pair.

    Each line is an object with "positive" and "negative": answers, where "prompt" is the question of both; otherwise
    [question, answer], or a list of messages that ends with the assistant's. Raises TraitError with the line's number.
    """
    positive: list[Text] = []
    negative: list[Text] = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        data = _json(line, where)
        with _named(where):
            prompt = data.get("prompt", data.get("question"))
            positive.append(_chat(data["positive"], prompt))
            negative.append(_chat(data["negative"], prompt))
    if not positive:
        raise TraitError(f"{path}: holds no pair")
    return positive, negative


def load_lines(path: str | Path) -> list[str]:
    r"""The prompts of a positive or negative file of llama-cvector-generator: one a line, template text included, in
    which the escapes \n, \t, \r, \", \', \\ and \xHH stand for the characters, as that tool reads them.

    Raises TraitError where the file cannot be read or is empty.
    """
    lines = [_unescape(line) for line in _read(path).split("\n") if line]
    if not lines:
        raise TraitError(f"{path}: holds no text")
    return lines


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "'": "'", "\\": "\\"}


def _unescape(line: str) -> str:
    pattern = r"\\(?:([ntr\"'\\])|x([0-9a-fA-F]{2}))"
    return re.sub(pattern, lambda m: _ESCAPES[m[1]] if m[1] else chr(int(m[2], 16)), line)


def _chat(value: Any, prompt: Any) -> Text:
    if isinstance(value, str):
        if not isinstance(prompt, str):
            raise TypeError('an answer needs the "prompt" that it answers')
        return prompt, _filled(value)
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value):
        return value[0], _filled(value[1])
    if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
        messages = [{"role": _text(m.get("role")), "content": _text(m.get("content"))} for m in value]
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError("a chat must end with the assistant's answer to something")
        return messages
    raise TypeError(f"an answer, [question, answer] or messages are needed where {str(value)[:60]!r} stands")


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("an answer is empty")
    return text


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise TraitError(f"{where}: not valid JSON: {e}") from e


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise TraitError(f"{path}: cannot be read ({e})") from e


def _text(value: Any) -> str:
    if isinstance(value, str) and not value.isascii():
        value.encode()  # half a surrogate pair, which JSON can hold, is a ValueError
    if not isinstance(value, str):
        raise TypeError(f"text is needed where {str(value)[:60]!r} stands")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError(f"a list of texts is needed where {str(value)[:60]!r} stands")
    return tuple(map(_text, value))


def _pairs(value: Any, a: str, b: str) -> tuple[tuple[str, str], ...]:
    if not (isinstance(value, list) and all(isinstance(v, Mapping) for v in value)):
        raise TypeError(f'a list of pairs with "{a}" and "{b}" is needed where {str(value)[:60]!r} stands')
    return tuple((_text(v[a]), _text(v[b])) for v in value)
