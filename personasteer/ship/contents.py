"""What goes into a bundle: its model as metadata, its vectors, reports and other forms of the persona, each named."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from personasteer._native import load_core
from personasteer.errors import ArgumentError, ModelError, VectorError
from personasteer.identity import PARTS, check_model_file, identify
from personasteer.ship.fields import read_fields, text_of
from personasteer.ship.persona import (
    AdapterEntry,
    BaseModelEntry,
    IdentityEntry,
    Persona,
    ShippedEntry,
    VectorEntry,
    clean,
    first_problem,
    per_layer,
)
from personasteer.steering import Ablate, Add, Cap
from personasteer.vectors import PersonaVector

_HUB = re.compile(r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)", re.ASCII)


@dataclass
class ModelInFile:
    """A model as its file describes it, without its weights: enough to see whether edits fit."""

    name: str
    architecture: str
    quantization: str
    n_layer: int
    n_embd: int
    fingerprint: str
    identity: Mapping[str, str]
    license: str = ""
    hub_id: str | None = None

    @property
    def norms(self) -> NDArray[np.float32]:
        return np.ones(self.n_layer, np.float32)  # not measured: what is computed with them is thrown away

    @classmethod
    def read(cls, path: Path) -> ModelInFile:
        """Raises ModelError where the file is no language model."""
        metadata = read_fields(path)
        architecture = text_of(metadata, "general.architecture", "unknown")
        n_layer, n_embd = (metadata.get(f"{architecture}.{key}") for key in ("block_count", "embedding_length"))
        if not (isinstance(n_layer, int) and isinstance(n_embd, int) and n_layer > 0 and n_embd > 0):
            raise ModelError(f"{path}: does not say how many blocks it has and how wide they are: not a language model")
        identity = identify(path)
        return cls(
            clean(text_of(metadata, "general.name") or path.stem, 200),
            clean(architecture, 200),
            _quantization(path, metadata),
            n_layer,
            n_embd,
            identity["fingerprint"],
            identity,
            clean(text_of(metadata, "general.license"), 200),
            hub_id(metadata),
        )

    @classmethod
    def of(cls, entry: BaseModelEntry) -> ModelInFile:
        """As persona.json describes it."""
        return cls(
            entry.name,
            entry.architecture,
            entry.quantization,
            entry.n_layer,
            entry.n_embd,
            entry.fingerprint,
            entry.identity.model_dump(),
        )

    def entry(self, path: Path, size: int, digest: str, inside: str | None) -> BaseModelEntry:
        """As persona.json has it."""
        return BaseModelEntry(
            name=self.name,
            architecture=self.architecture,
            quantization=self.quantization,
            file_name=path.name,
            size=size,
            sha256=digest,
            fingerprint=self.fingerprint,
            identity=IdentityEntry(**{part: self.identity[part] for part in PARTS}),
            n_layer=self.n_layer,
            n_embd=self.n_embd,
            file=inside,
        )


def _quantization(path: Path, metadata: Mapping[str, Any]) -> str:
    """As in file names (Q4_K_M); the type of most of the weights where the file does not say."""
    try:
        name: str = gguf.LlamaFileType(metadata["general.file_type"]).name
        return name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (KeyError, ValueError):
        bytes_of: Counter[str] = Counter()
        for _, kind, _, _, n_bytes in load_core().summarize_gguf(os.fsencode(path))[2]:
            bytes_of[kind.upper()] += n_bytes
        return bytes_of.most_common(1)[0][0] if bytes_of else "unknown"


def hub_id(metadata: Mapping[str, Any]) -> str | None:
    """USER/NAME on the Hub of the model that a GGUF was made from, as its metadata say; None where they do not.

    general.base_model.* is asked last: it names what that model was itself tuned from.
    """
    for key in ("general.repo_url", "general.source.repo_url", "general.base_model.0.repo_url"):
        found = _HUB.match(str(metadata.get(key, "")))
        if found:
            return found[1]
    return None


class VectorFiles:
    """The vectors of some edits, each once: {file: vector}, and the strength that each file's tensors steer by.

    llama.cpp's scale 1.0 is the total strength of the vector's additions here, its recommended one where it has none.
    """

    def __init__(self, edits: Sequence[Add | Cap | Ablate]) -> None:
        self.vectors: dict[str, PersonaVector] = {}
        total: dict[str, float] = {}
        for edit in edits:
            file = self.file_of(edit.vector)
            if file is None:
                file = slug(edit.vector.name, self.vectors, "vectors", ".gguf")
                self.vectors[file] = edit.vector
            if isinstance(edit, Add) and not edit.raw:
                total[file] = total.get(file, 0.0) + float(edit.strength)
        self.strengths: dict[str, float | None] = {
            file: None if v.norms is None else total.get(file) or v.strength or 1.0 for file, v in self.vectors.items()
        }

    def file_of(self, vector: PersonaVector) -> str | None:
        """The file of a vector, or of one like it."""
        return next((file for file, known in self.vectors.items() if same(vector, known)), None)

    def write(self, file: str, path: Path) -> VectorEntry:
        """Write one to `path`. Raises VectorError where its file could not give all of it back."""
        vector = self.vectors[file]
        vector.save(path, strength=self.strengths[file])
        back = PersonaVector.load(path)
        if not same(replace(back, provenance=vector.provenance), vector):  # weights outside its layers are not kept
            raise VectorError(f"vector {vector.name!r} cannot be written whole: give it weights for its layers only")
        return vector_entry(file, back, self.strengths[file])


def same(a: PersonaVector, b: PersonaVector) -> bool:
    """Whether two vectors hold the same."""
    if a is b:
        return True
    for field in fields(PersonaVector):
        x, y = getattr(a, field.name), getattr(b, field.name)
        arrays = isinstance(x, np.ndarray), isinstance(y, np.ndarray)
        if not (np.array_equal(x, y, equal_nan=True) if all(arrays) else not any(arrays) and x == y):
            return False
    return True


def vector_entry(file: str, vector: PersonaVector, exported: float | None) -> VectorEntry:
    """What persona.json says of a vector's file."""
    known = {key: vector.provenance.get(key) for key in ("method", "model", "fingerprint")}
    texts = {key: clean(value, 200) if isinstance(value, str) else None for key, value in known.items()}
    return VectorEntry(
        file=file,
        name=clean(vector.name, 200),
        layers=vector.layers,
        strength=float(vector.strength),
        exported_strength=exported,
        window=vector.window,
        calibrated="calibration" in vector.provenance,
        thresholds=None if vector.thresholds is None else per_layer(vector.thresholds.tolist()),
        method=texts["method"],
        model=texts["model"],
        fingerprint=texts["fingerprint"] if re.fullmatch("[0-9a-f]{64}", texts["fingerprint"] or "") else None,
    )


REPORTS = (".json", ".md", ".html", ".png", ".svg", ".csv", ".jsonl")


def report_files(reports: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """{name in the bundle: file} of report files, and of what lies in folders of them.

    Raises ArgumentError where there is none.
    """
    out: dict[str, Path] = {}
    for report in map(Path, reports):
        if report.is_dir():
            found = sorted(p for p in report.iterdir() if p.is_file() and p.suffix.lower() in REPORTS)
            if not found:
                raise ArgumentError(f"{report}: no report in this folder")
            folder = slug(report.resolve().name, {str(Path(name).parent): 0 for name in out}, "reports", "")
            for file in found:
                out[slug(file.stem, out, folder, _suffix(file))] = file
        elif report.is_file() and report.suffix.lower() not in REPORTS:
            raise ArgumentError(f"{report}: a report is one of {', '.join(REPORTS)}, as `eval --report` writes them")
        elif report.is_file():
            out[slug(report.stem, out, "reports", _suffix(report))] = report
        else:
            raise ArgumentError(f"{report}: no such report")
    return out


def _suffix(file: Path) -> str:
    return file.suffix.lower() if re.fullmatch(r"\.[A-Za-z0-9]{1,10}", file.suffix) else ""


def shipped_files(shipped: Sequence[str | os.PathLike[str]], base: ModelInFile) -> dict[str, tuple[Path, ShippedEntry]]:
    """{name in the bundle: (file, what it is)} of other forms of the persona.

    Raises ModelError where one is no GGUF, or for another architecture.
    """
    out: dict[str, tuple[Path, ShippedEntry]] = {}
    for path in map(check_model_file, shipped):
        found = read_fields(path)
        own = found.get("general.architecture")
        kind = "lora" if found.get("general.type") == "adapter" else "model"
        if own == "controlvector":
            kind = "control-vector"
        elif own != base.architecture:
            raise ModelError(f"{path}: is for architecture {own!r}, the bundle's model is {base.architecture!r}")
        name = slug(path.stem, out, "files", ".gguf")
        what = clean(str(found.get("personasteer.kind") or ""), 200)
        if kind == "model" and not what:
            raise ModelError(f"{path}: a model that does not say which persona is in its weights (export bake, ablate)")
        out[name] = path, ShippedEntry.model_validate({"file": name, "kind": kind, "what": what})
    return out


def adapter_files(
    adapters: Sequence[tuple[str | os.PathLike[str], float]], base: ModelInFile
) -> dict[str, tuple[Path, AdapterEntry]]:
    """{name in the bundle: (file, how it is run)} of LoRA adapters that the model is run with.

    Raises ModelError where one is no LoRA, or for another architecture; ArgumentError for a scale beyond all use.
    """
    out: dict[str, tuple[Path, AdapterEntry]] = {}
    for given, scale in adapters:
        path = check_model_file(given)
        found = read_fields(path)
        if found.get("general.type") != "adapter" or found.get("general.architecture") != base.architecture:
            raise ModelError(f"{path}: is no LoRA adapter for {base.architecture!r}")
        name = slug(path.stem, out, "adapters", ".gguf")
        try:
            out[name] = path, AdapterEntry(file=name, scale=float(scale))
        except ValidationError as e:
            raise ArgumentError(f"{path}: {first_problem(e)}") from e
    return out


def slug(name: str, taken: Mapping[str, object], folder: str, suffix: str) -> str:
    """A name for a file of the bundle, unlike those taken, also where upper and lower case are the same."""
    stem = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:60].rstrip("-._") or "unnamed"
    number, file = 1, f"{folder}/{stem}{suffix}"
    while file in taken:
        number += 1
        file = f"{folder}/{stem}-{number}{suffix}"
    return file


def checked(content: Mapping[str, Any]) -> Persona:
    """The Persona of what a caller asked for. Raises ArgumentError where it breaks the rules."""
    try:
        return Persona(**content)
    except ValidationError as e:
        raise ArgumentError(first_problem(e)) from e
