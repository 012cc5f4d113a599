"""persona.json: what a bundle says of its persona, and the rules that it keeps."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

import pydantic_core
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from personasteer.errors import ArgumentError, BundleError
from personasteer.steering import Ablate, Add, AnyEdit, Cap, Edit, Floor
from personasteer.vectors import PersonaVector

SCHEMA_VERSION = 1
MAX_BYTES = 4 * 2**20
MAX_TEXT = 4000
MOST_SCALE = 1e4  # of an adapter

_PART = "[A-Za-z0-9][A-Za-z0-9._+-]*"  # no leading dot, nothing that a shell, a pattern or a list of sums reads
_INSIDE = re.compile(f"{_PART}(/{_PART})*")


def inside(name: str) -> str:
    """The name, when it is one that a file of a bundle may have: relative, plain characters, no way out.

    Raises ValueError otherwise.
    """
    if len(name) > 240 or not _INSIDE.fullmatch(name):
        raise ValueError(f"{name!r:.80} is no name for a file of a bundle")
    return name


def clean(text: str, limit: int | None = None) -> str:
    """Foreign text as one line that persona.json takes: control characters are spaces, long texts are cut."""
    return " ".join("".join(" " if _forbidden(c) else c for c in text).split())[:limit].rstrip()


def _forbidden(character: str) -> bool:
    # what YAML and Markdown take for the end of a line, and what they refuse to read
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or ord(character) & 0xFFFE == 0xFFFE


def _line(text: str) -> str:
    if any(map(_forbidden, text)):
        raise ValueError("must be one line without control characters")
    return text


def _file_name(name: str) -> str:
    if not name or name in (".", "..") or len(name) > 255 or "/" in name or "\\" in name:
        raise ValueError(f"{name!r:.80} is no plain file name")
    return _line(name)


Inside: TypeAlias = Annotated[str, AfterValidator(inside)]
Line: TypeAlias = Annotated[str, StringConstraints(max_length=200), AfterValidator(_line)]
Text: TypeAlias = Annotated[str, StringConstraints(max_length=MAX_TEXT), AfterValidator(_line)]
FileName: TypeAlias = Annotated[str, AfterValidator(_file_name)]
Digest: TypeAlias = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
HubId: TypeAlias = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
]
Layer: TypeAlias = Annotated[int, Field(ge=0)]
PerLayer: TypeAlias = Annotated[tuple[float | None, ...], Field(min_length=1)]  # None: no number at that layer
Scope: TypeAlias = Literal["all", "prompt", "response", "system", "user", "assistant", "thinking"]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class IdentityEntry(_Entry):
    """The parts of a fingerprint, see personasteer.identity."""

    metadata: Line
    tensors: Line
    weights: Line


class BaseModelEntry(_Entry):
    """The model file that the persona is for. `file`: where it lies in the bundle; None where it is not included."""

    name: Line
    architecture: Line
    quantization: Line
    file_name: FileName
    size: Annotated[int, Field(gt=0)]
    sha256: Digest
    fingerprint: Digest
    identity: IdentityEntry
    n_layer: Annotated[int, Field(gt=0)]
    n_embd: Annotated[int, Field(gt=0)]
    file: Inside | None = None


class VectorEntry(_Entry):
    """A vector file and what it recommends.

    exported_strength: the total strength that llama.cpp's scale 1.0 stands for; None where the file holds raw data.
    thresholds: tau per layer for cap and floor without their own. model, fingerprint: what it was derived on.
    """

    file: Inside
    name: Line
    layers: tuple[Layer, ...]
    strength: float
    exported_strength: float | None
    window: tuple[float, float]
    calibrated: bool
    thresholds: PerLayer | None
    method: Line | None
    model: Line | None
    fingerprint: Digest | None


class _EditEntry(_Entry):
    vector: Inside
    scope: Scope | tuple[Layer, ...] = "all"
    layers: tuple[Layer, ...] | None = None
    start: int | None = None
    stop: int | None = None
    half_life: Annotated[float, Field(gt=0)] | None = None


class AddEntry(_EditEntry):
    op: Literal["add"]
    strength: float
    raw: bool = False
    keep_norm: bool = False


class CapEntry(_EditEntry):
    op: Literal["cap"]
    tau: float | PerLayer | None = None


class FloorEntry(_EditEntry):
    op: Literal["floor"]
    tau: float | PerLayer | None = None


class AblateEntry(_EditEntry):
    op: Literal["ablate"]
    to: Literal["mean"] | float | PerLayer = 0.0
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    sites: Annotated[tuple[Literal["embd", "mid", "block"], ...], Field(min_length=1)] = ("block",)


EditEntry: TypeAlias = Annotated[AddEntry | CapEntry | FloorEntry | AblateEntry, Field(discriminator="op")]


class ShippedEntry(_Entry):
    """The persona in another form: a control vector, a LoRA adapter, a model with the persona in its weights."""

    file: Inside
    kind: Literal["control-vector", "lora", "model"]
    what: Line = ""


class AdapterEntry(_Entry):
    """A LoRA adapter that the model is run with, under the edits: of a fine-tune that is a base with adapters."""

    file: Inside
    scale: Annotated[float, Field(ge=-MOST_SCALE, le=MOST_SCALE)]


class Persona(_Entry):
    """The whole of persona.json."""

    schema_version: Literal[1] = 1
    name: Annotated[Line, Field(min_length=1)]
    description: Text = ""
    license: Line | None = None
    base_model: HubId | None = None
    model: BaseModelEntry
    adapters: tuple[AdapterEntry, ...] = ()
    vectors: Annotated[tuple[VectorEntry, ...], Field(min_length=1)]
    edits: Annotated[tuple[EditEntry, ...], Field(min_length=1)]
    reports: tuple[Inside, ...] = ()
    files: tuple[ShippedEntry, ...] = ()

    @model_validator(mode="after")
    def _names_fit_together(self) -> Persona:
        names = self.named_files
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} is listed twice")
        known = {v.file for v in self.vectors}
        for edit in self.edits:
            if edit.vector not in known:
                raise ValueError(f"an edit uses {edit.vector}, which is not among the vectors")
        return self

    @property
    def named_files(self) -> list[str]:
        """Every file of the bundle that persona.json names."""
        included = [self.model.file] if self.model.file is not None else []
        loras, vectors = (a.file for a in self.adapters), (v.file for v in self.vectors)
        return [*included, *loras, *vectors, *self.reports, *(f.file for f in self.files)]

    def as_json(self) -> bytes:
        """The bytes of persona.json."""
        content = self.model_dump(mode="json")
        return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse(data: bytes, where: str) -> Persona:
    """The Persona of the bytes of a persona.json.

    Raises BundleError, one line that starts with `where`, for whatever is wrong with it; for a newer schema it names
    both versions.
    """
    try:
        content = pydantic_core.from_json(data, allow_inf_nan=True)
    except ValueError as e:
        raise BundleError(f"{where}: is not JSON ({_one_line(e)})") from e
    found = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(found, int) and found > SCHEMA_VERSION:
        raise BundleError(
            f"{where}: has schema version {found}, this personasteer reads up to {SCHEMA_VERSION}: update personasteer"
        )
    try:
        return Persona.model_validate_json(data)
    except ValidationError as e:
        raise BundleError(f"{where}: {first_problem(e)}") from e


def first_problem(error: ValidationError) -> str:
    """In one line where the first problem is and what it is, and how many more there are."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    place = clean(".".join(map(str, problems[0]["loc"])), 100)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place + ': ' if place else ''}{_one_line(problems[0]['msg'])}{more}"


def _one_line(problem: object) -> str:
    return clean(str(problem).removeprefix("Value error, "), 300)


def edit_entry(edit: AnyEdit, file: str) -> AddEntry | CapEntry | FloorEntry | AblateEntry:
    """An edit as persona.json has it. Raises ArgumentError for a kind that it has no word for."""
    kind = type(edit)
    if not isinstance(edit, (Add, Cap, Ablate)) or kind not in (Add, Cap, Floor, Ablate):
        raise ArgumentError(f"a bundle holds Add, Cap, Floor and Ablate, not {kind.__name__}")
    common: dict[str, Any] = {
        "vector": file, "scope": edit.scope, "layers": edit.layers, "start": edit.start, "stop": edit.stop,
        "half_life": edit.half_life,
    }  # fmt: skip
    if isinstance(edit, Add):
        own: dict[str, Any] = {"strength": float(edit.strength), "raw": edit.raw, "keep_norm": edit.keep_norm}
        return AddEntry(op="add", **common, **own)
    if isinstance(edit, Ablate):
        own = {"to": _to_json(edit.to), "share": float(edit.share), "sites": edit.sites}
        return AblateEntry(op="ablate", **common, **own)
    tau = _to_json(edit.tau)
    return FloorEntry(op="floor", tau=tau, **common) if kind is Floor else CapEntry(op="cap", tau=tau, **common)


def edit_of(entry: AddEntry | CapEntry | FloorEntry | AblateEntry, vector: PersonaVector) -> Edit:
    """The edit that an entry stands for. Raises ArgumentError where the numbers make none."""
    common: dict[str, Any] = {
        "scope": entry.scope, "layers": entry.layers, "start": entry.start, "stop": entry.stop,
        "half_life": entry.half_life,
    }  # fmt: skip
    match entry:
        case AddEntry():
            return Add(vector, entry.strength, raw=entry.raw, keep_norm=entry.keep_norm, **common)
        case CapEntry():
            return Cap(vector, _from_json(entry.tau), **common)
        case FloorEntry():
            return Floor(vector, _from_json(entry.tau), **common)
        case AblateEntry():
            return Ablate(vector, _from_json(entry.to), entry.share, sites=entry.sites, **common)


def _to_json(value: Any) -> Any:
    """Numbers per layer; NaN, which JSON has no word for, as None."""
    return per_layer(value) if isinstance(value, tuple) else value


def _from_json(value: Any) -> Any:
    return tuple(math.nan if x is None else x for x in value) if isinstance(value, tuple) else value


def per_layer(values: Sequence[float]) -> tuple[float | None, ...]:
    """Numbers per layer as persona.json has them."""
    return tuple(float(x) if math.isfinite(x) else None for x in values)
