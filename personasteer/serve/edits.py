"""From names to edits: what a request may say of the vectors that the server holds."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from personasteer.monitor.guard import Rule
from personasteer.serve.protocol import MAX_NAME, ApiError, Edit, GuardRule
from personasteer.steering import Ablate, Add, AnyEdit, Cap, Floor, Steering
from personasteer.vectors import PersonaVector


def check_names(names: Sequence[str], known: Sequence[str], param: str) -> None:
    """Raises ApiError 400 with the known names for one that the server does not hold."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            have = ", ".join(known) if known else "no vectors: start it with -v NAME=FILE"
            raise ApiError(
                400, f"there is no vector {name[:80]!r}{hint} This server has {have}"
                if near else f"there is no vector {name[:80]!r}; this server has {have}", param=param,
                code="vector_not_found",
            )  # fmt: skip


def split_model(model: str, known: Sequence[str] = ()) -> tuple[str, list[Edit] | None]:
    """("NAME", edits) of "NAME+evil:-0.3+formal:0.2"; None where it names no vector. `known` names may have a +.

    Raises ApiError 400 for a strength that is no number.
    """
    whole = next((n for n in known if model == n or model.startswith(n + "+")), "")
    first, *parts = model[len(whole) :].split("+")
    name = whole + first
    edits = []
    for part in parts:
        vector, colon, strength = part.rpartition(":")
        try:
            number = float(strength) if colon else math.nan
        except ValueError:
            number = math.nan
        if not 0 < len(vector) <= MAX_NAME or not math.isfinite(number):
            raise ApiError(400, f"model: {part[:80]!r} is no VECTOR:STRENGTH, such as evil:-0.3", param="model")
        edits.append(Edit(vector=vector, strength=number))
    return name, edits or None


def steering_of(edits: Sequence[Edit], vectors: Mapping[str, PersonaVector]) -> Steering:
    """The edits of named vectors, in order. Raises as the edits do."""
    return Steering([_edit(e, vectors[e.vector]) for e in edits])


def _edit(e: Edit, vector: PersonaVector) -> AnyEdit:
    where: dict[str, Any] = {
        "scope": e.scope, "layers": None if e.layers is None else tuple(e.layers), "start": e.start, "stop": e.stop,
        "half_life": e.half_life,
    }  # fmt: skip
    if e.op == "add":
        return Add(vector, e.strength or 0.0, keep_norm=e.keep_norm, **where)
    if e.op == "ablate":
        return Ablate(vector, share=1.0 if e.strength is None else e.strength, **where)
    return (Cap if e.op == "cap" else Floor)(vector, e.tau, **where)


def rules_of(rules: Sequence[GuardRule], vectors: Mapping[str, PersonaVector]) -> list[Rule]:
    """The guard's rules for named vectors. Raises as Rule does."""
    return [
        Rule(
            vectors[r.vector], r.action, r.on, r.when, r.strength,
            None if r.edit is None else _edit(r.edit, vectors[r.edit.vector]), r.message, r.tries,
        )
        for r in rules
    ]  # fmt: skip
