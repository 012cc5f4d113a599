"""Grammars that the generated text has to follow."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from personasteer.errors import ArgumentError

log = logging.getLogger("personasteer")

# keywords of JSON Schema that the converter of llama-cpp-python leaves out
_UNENFORCED = {
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "uniqueItems", "minProperties",
    "maxProperties", "patternProperties", "propertyNames", "contains", "not", "if", "dependentRequired",
}  # fmt: skip
_NAMED = {"properties", "$defs", "definitions"}  # these hold schemas by names of the author's own

MAX_COUNT = 2000  # of repetitions; llama.cpp's own limit in a grammar
_COUNTS = {"minItems", "maxItems", "minLength", "maxLength"}
_NUMBER = re.compile(r"(?<=[{,])\s*(\d{1,18})")

# what braces mean nothing in: strings, character classes and comments of a grammar
_LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)
_REPETITION = re.compile(r"\{\s*(\d+)\s*,\s*(\d+)\s*\}")


def grammar_of(grammar: str | None, json_schema: Mapping[str, Any] | str | None) -> str:
    """GBNF for one of the two: a grammar as it is, or that of a JSON schema. "" for none.

    What a schema asks for and the grammar does not enforce (a minimum, ...) is named in a warning.

    Raises ArgumentError for both at once, for a schema that llama-cpp-python cannot turn into a grammar, and for a
    grammar that its parser would not survive.
    """
    if json_schema is None:
        return _checked("" if grammar is None else grammar)
    if grammar is not None:
        raise ArgumentError("grammar and json_schema exclude each other")
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise ValueError("it is no object")
        _check_counts(schema)
        made = _checked(json_schema_to_gbnf(text))
    except Exception as e:  # the converter raises whatever a malformed schema makes it run into
        raise ArgumentError(f"json_schema cannot be used ({type(e).__name__}: {e})") from e
    if missing := sorted(_unenforced(schema)):
        log.warning("json_schema: %s not enforced, the text may break it", ", ".join(missing))
    return made


def _check_counts(schema: Any) -> None:
    """The converter writes out what is repeated: a count of millions would fill the memory."""
    if isinstance(schema, list):
        for part in schema:
            _check_counts(part)
    elif isinstance(schema, dict):
        for key, part in schema.items():
            counts = [part] if key in _COUNTS and isinstance(part, (int, float)) else []
            if key == "pattern" and isinstance(part, str):
                counts = [int(n) for n in _NUMBER.findall(part)]
            if any(n > MAX_COUNT for n in counts):
                raise ValueError(f"{key} is beyond {MAX_COUNT}")
            _check_counts(part)


def _unenforced(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return set().union(*map(_unenforced, schema))
    if not isinstance(schema, dict):
        return set()
    found = _UNENFORCED & schema.keys()
    for key, part in schema.items():
        if key not in ("enum", "const", "default", "examples"):  # these hold data
            found |= _unenforced(list(part.values()) if key in _NAMED and isinstance(part, dict) else part)
    return found


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise ArgumentError(f"grammar must be a text, not {type(text).__name__}")
    if "\0" in text:
        raise ArgumentError("the grammar holds a null character, where llama.cpp would stop reading")
    for low, high in _REPETITION.findall(_LITERAL.sub(" ", text)):
        if int(low) > int(high):  # it would count down from there for ever
            raise ArgumentError(f"the grammar does not parse: {{{low},{high}}} is at least {low} and at most {high}")
    return text
