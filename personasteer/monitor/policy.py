"""A guard's rules in a small TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personasteer.errors import ArgumentError
from personasteer.monitor.guard import Rule
from personasteer.steering import Ablate, Add, Cap, Edit, Floor, Steering
from personasteer.vectors import PersonaVector

EDITS: dict[str, Any] = {"add": Add, "cap": Cap, "floor": Floor, "ablate": Ablate}
RULE = {"action": str, "on": str, "when": str, "strength": float, "message": str, "tries": int}
EDIT = {"strength": float, "share": float, "scope": str}


def load_policy(path: Path) -> list[Rule]:
    """The rules of a file such as

        [[rule]]
        vector = "evil.gguf"     # relative to the file
        action = "cap"           # log, cap, subtract, edit, stop or regenerate
        on = "alarm"             # or "watch"
        when = "both"            # "before", "during"

        [[rule]]
        vector = "sad.gguf"
        action = "edit"
        edit = [{kind = "add", vector = "warm.gguf", strength = 0.2}]

    with the keys of `Rule`. An edit's kind is add (with a strength), cap, floor or ablate (share = 0.5: half).

    Raises:
        ArgumentError: a file that cannot be read, another key, a value of another kind, or what `Rule` refuses.
        VectorError: a vector that cannot be read.
    """
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ArgumentError(f"{path}: cannot be read as a policy ({getattr(e, 'strerror', None) or e})") from e
    rules = data.pop("rule", None)
    if data or not isinstance(rules, list) or not rules:
        raise ArgumentError(f"{path}: a policy is a list of [[rule]] tables, and nothing else")
    vectors: dict[Path, PersonaVector] = {}

    def vector_of(table: Mapping[str, Any]) -> PersonaVector:
        name = table.get("vector")
        if not isinstance(name, str) or not name or "\0" in name:
            raise ArgumentError('"vector" must name a file')
        file = (path.parent / name).resolve()
        if file not in vectors:
            vectors[file] = PersonaVector.load(path.parent / name)
        return vectors[file]

    found = []
    for i, table in enumerate(rules, 1):
        try:
            if not isinstance(table, dict):
                raise ArgumentError("it is no table")
            edit = Steering(_edit(e, vector_of) for e in _edits(table))
            found.append(Rule(vector_of(table), edit=edit, **_options(table, RULE, {"vector", "edit"})))
        except ArgumentError as e:
            raise ArgumentError(f"{path}, rule {i}: {e}") from e
    return found


def _edits(table: Mapping[str, Any]) -> list[Any]:
    given = table.get("edit", [])
    return given if isinstance(given, list) else [given]


def _edit(table: Any, vector_of: Any) -> Edit:
    kind = table.get("kind") if isinstance(table, dict) else None
    if not isinstance(kind, str) or kind not in EDITS:
        raise ArgumentError(f"the kind of an edit must be one of {', '.join(EDITS)}, not {kind!r}")
    options = _options(table, EDIT, {"vector", "kind"})
    try:
        made: Edit = EDITS[kind](vector_of(table), **options)
        return made
    except TypeError as e:
        raise ArgumentError(
            f"an edit of the kind {kind!r} does not go with {', '.join(options) or 'no strength'}"
        ) from e


def _options(table: Mapping[str, Any], known: Mapping[str, type], others: set[str]) -> dict[str, Any]:
    options = {}
    for key, value in table.items():
        if key in others:
            continue
        if key not in known:
            raise ArgumentError(f"it has the key {key!r}; known are {', '.join(sorted({*known, *others}))}")
        wanted = known[key]
        if isinstance(value, bool) or not isinstance(value, (int, float) if wanted is float else wanted):
            raise ArgumentError(f"{key} must be a {'text' if wanted is str else 'number'}, not {value!r}")
        try:
            options[key] = wanted(value)
        except OverflowError as e:
            raise ArgumentError(f"{key} is too large") from e
    return options
