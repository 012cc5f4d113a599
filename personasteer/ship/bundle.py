"""Bundles: a folder or a tar file with all that a persona is, and the evidence for it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from personasteer.chat import Conversation
from personasteer.engine import Progress
from personasteer.errors import ArgumentError, BundleError, ModelError, PersonasteerError, VectorError
from personasteer.identity import check_model_file, differences, identify
from personasteer.mixes import check_steering
from personasteer.model import Model, demo_model_path
from personasteer.ship import archive
from personasteer.ship.card import Row, evaluations_in, render_card, render_modelfile
from personasteer.ship.contents import (
    ModelInFile,
    VectorFiles,
    adapter_files,
    checked,
    report_files,
    shipped_files,
    vector_entry,
)
from personasteer.ship.persona import Persona, clean, edit_entry, edit_of, parse
from personasteer.steering import Ablate, Add, AnyEdit, Cap, Steer, Steering, as_steering, check_fits
from personasteer.vectors import PersonaVector

log = logging.getLogger("personasteer")

MODEL, CARD, MODELFILE = "model.gguf", "README.md", "Modelfile"
MAX_REPORT = 16 * 2**20  # of a report.json that the card quotes


def write_bundle(
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    steering: Sequence[AnyEdit],
    name: str,
    description: str = "",
    include_model: bool = False,
    license: str | None = None,  # noqa: A002 (the word that model cards use)
    base_model: str | None = None,
    reports: Sequence[str | os.PathLike[str]] = (),
    shipped: Sequence[str | os.PathLike[str]] = (),
    adapters: Sequence[tuple[str | os.PathLike[str], float]] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a persona with all that belongs to it: a folder, or a tar file where `out` ends in .tar.

    The same arguments give the same bytes: no times, no owners, no paths. Nothing stays of a bundle that could not be
    finished; an old one is replaced only by a whole new one.

    Args:
        model: the GGUF file that the persona is for. Its SHA-256 and what its metadata say are recorded.
        steering: Add, Cap, Floor and Ablate edits. A vector that several of them use is written once.
        name, description: of the persona, one line each.
        include_model: put a copy of the model in.
        license, base_model: of the model card; what the file's metadata say when None. base_model is "USER/NAME" on the
            Hugging Face Hub.
        reports: report files, or folders of `personasteer eval --report`.
        shipped: GGUF files of the same persona: control vectors, LoRA adapters, models with it in their weights.
        adapters: LoRA adapters with their scales that the model is run with, the edits on top; `load_bundle` opens the
            model with them.
        force: replace an existing bundle. A folder that is none is never replaced.
        progress: called with (bytes done, bytes in all).

    Returns:
        `out`.

    Raises:
        ArgumentError: no edits, edits of other kinds, a target that exists or cannot be written, no such report.
        IncompatibleVector, VectorError: a vector that does not fit the model, or cannot be used.
        ModelError: the model file, or a shipped one, is no GGUF or for another architecture.
        BundleError: the disk is full, or a file cannot be read.
    """
    target, base = Path(out), check_model_file(model)
    edits = [_storable(edit) for edit in as_steering(steering)]
    if not edits:
        raise ArgumentError("a bundle needs at least one edit, such as vector * 0.3")
    if not clean(name):
        raise ArgumentError("a bundle needs a name")
    archive.check_target(target, force=force)
    if not include_model and target.is_dir() and target.resolve() in base.resolve().parents:
        raise ArgumentError(f"{base}: lies in the bundle that would be replaced; include the model, or move it")
    described = ModelInFile.read(base)
    check_steering(Steering(edits), described)  # that they can be together
    vectors = VectorFiles(edits)
    evidence, forms, loras = (
        report_files(reports),
        shipped_files(shipped, described),
        adapter_files(adapters, described),
    )
    content: dict[str, Any] = {
        "name": clean(name),
        "description": clean(description),
        "license": (described.license if license is None else clean(license)) or None,
        "base_model": base_model or described.hub_id,
        "adapters": tuple(entry for _, entry in loras.values()),
        "edits": tuple(edit_entry(e, str(vectors.file_of(e.vector))) for e in edits),
        "reports": tuple(evidence),
        "files": tuple(entry for _, entry in forms.values()),
    }
    others = [*evidence.values(), *(path for path, _ in (*forms.values(), *loras.values()))]
    copied = [*([base] if include_model else []), *others]
    passes = 2 if target.suffix == ".tar" else 1
    total = passes * sum(p.stat().st_size for p in copied) + (0 if include_model else base.stat().st_size)
    counter = archive.Counter(progress, total)
    try:
        with tempfile.TemporaryDirectory() as scratch, archive.writing(target, force=force) as w:
            entries = []
            for file in vectors.vectors:
                written = Path(scratch) / "vector.gguf"
                entries.append(vectors.write(file, written))
                w.put(file, written.read_bytes())
            if include_model:
                digest, size = w.take(MODEL, base, counter)
            else:
                with base.open("rb") as f:
                    digest, size = archive.copy_hashed(f, None, counter)
            rows: list[Row] = []
            for file, source in evidence.items():
                w.take(file, source, counter)
                if source.suffix == ".json" and source.stat().st_size <= MAX_REPORT:
                    rows += evaluations_in(source.read_bytes())
            for file, (source, _) in (*forms.items(), *loras.items()):
                w.take(file, source, counter)
            entry = described.entry(base, size, digest, MODEL if include_model else None)
            persona = checked({**content, "model": entry, "vectors": tuple(entries)})
            w.put(archive.PERSONA, persona.as_json())
            w.put(CARD, render_card(persona, vectors.vectors, rows).encode())
            modelfile = render_modelfile(persona)
            if modelfile is not None:
                w.put(MODELFILE, modelfile.encode())
    except (OSError, PersonasteerError) as e:
        cause = e.__cause__ if type(e) is PersonasteerError else e  # of a vector's temporary file
        if not isinstance(cause, OSError):
            raise
        raise BundleError(f"{target}: cannot be written ({cause.strerror or cause})") from e
    return target


def _storable(edit: AnyEdit) -> Add | Cap | Ablate:
    """The edit, where persona.json has a word for it: ArgumentError where not."""
    edit_entry(edit, "vectors/vector.gguf")
    return cast("Add | Cap | Ablate", edit)


@dataclass(frozen=True)
class CheckedBundle:
    """What `check_bundle` found. sizes: bytes of every file by its name, SHA256SUMS included."""

    persona: Persona
    sizes: Mapping[str, int]
    card: str
    sums: Mapping[str, str]


def check_bundle(
    path: str | os.PathLike[str], *, into: Path | None = None, progress: Progress | None = None
) -> CheckedBundle:
    """Check every file of a bundle against its SHA256SUMS, and persona.json against the schema.

    Args:
        into: an empty folder that gets a copy of the files.

    Raises:
        BundleError: not a bundle; a file is missing, changed, not listed or has a name that leads out of it;
            persona.json is of a newer version or breaks the rules.
    """
    with archive.reading(Path(path)) as reader:
        reader.small(archive.PERSONA)  # not a bundle, said before anything else
        sums = archive.read_sums(reader)
        persona = parse(archive.check_small(reader, sums, archive.PERSONA), f"{path}: {archive.PERSONA}")
        for name in persona.named_files:
            if name not in sums:
                raise BundleError(f"{path}: {name}, which {archive.PERSONA} names, is not listed in {archive.SUMS}")
        card = archive.check_small(reader, sums, CARD).decode("utf-8", "replace") if CARD in sums else ""
        archive.check_all(reader, sums, into, progress)
        if persona.model.file is not None and sums[persona.model.file] != persona.model.sha256:
            raise BundleError(f"{path}: {persona.model.file} is not the model that {archive.PERSONA} describes")
        return CheckedBundle(persona, dict(sorted(reader.sizes.items())), card, sums)


class Bundle:
    """A persona, ready to run: its model with its steering. From `load_bundle`; close it, or use it in a `with` block.

    Attributes:
        persona: what persona.json says.
        model: the model; `close` closes it, unless it was given open.
        steering: the edits that `chat` applies.
        folder: where the files are; of a tar file, a temporary folder until `close`.
    """

    def __init__(
        self, persona: Persona, model: Model, steering: Steering, folder: Path, *, owned: bool, temporary: bool
    ) -> None:
        self.persona, self.model, self.steering, self.folder = persona, model, steering, folder
        self._owned = owned
        self._remove: Callable[[], object] | None = None
        if temporary:
            self._remove = weakref.finalize(self, shutil.rmtree, folder, True)

    def chat(self, conversation: Conversation, *, steer: Steer = None, **options: Any) -> str:
        """The persona's answer. As Model.chat, but None is the bundle's steering, and steer=[] the bare model."""
        return self.model.chat(conversation, steer=self.steering if steer is None else steer, **options)

    def chat_batch(self, conversations: Sequence[Conversation], *, steer: Any = None, **options: Any) -> list[str]:
        """Answers to many conversations. As Model.chat_batch, but None is the bundle's steering for all."""
        return self.model.chat_batch(conversations, steer=self.steering if steer is None else steer, **options)

    def close(self) -> None:
        """Close the model, unless it was given open, and remove temporary files."""
        if self._owned:
            self.model.close()
        if self._remove is not None:
            self._remove()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Bundle({self.persona.name!r}, {len(self.steering)} edits, {self.model!r})"


def load_bundle(
    path: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | Model | None = None,
    allow_other_model: bool = False,
    progress: Progress | None = None,
    **model_options: Any,
) -> Bundle:
    """Open a bundle, a folder or a .tar file: `load_bundle(path).chat("Hello!")`.

    Every file is checked against SHA256SUMS, and the model's SHA-256 against persona.json. That finds damage; it does
    not say who made the bundle.

    Args:
        model: the model that it is for, open or as a file. When None: the included one, the bundled demo model if that
            is the one, or the file of the recorded name beside the bundle.
        allow_other_model: warn where the model is another one of the same shape, instead of refusing.
        progress: called with (bytes checked, bytes in all).
        model_options: as in Model; `lora` beside the bundle's own adapters.

    Raises:
        BundleError: not a bundle, damaged, of a newer version, no model to be found, or another model; a vector that
            does not fit it.
        ModelError: the model cannot be opened.

    Example:
        >>> folder = ship.write_bundle("gloom", model=model.path, steering=[vector * 0.3], name="Gloom")
        >>> with ps.load_bundle(folder, model=model) as bundle:
        ...     text = bundle.chat("How will my exam go?", max_tokens=8)
    """
    given = Path(path)
    if isinstance(model, Model) and model_options:
        raise ArgumentError(f"{', '.join(model_options)}: options of a model that is already open")
    if given.is_dir():
        return _open(given, given, check_bundle(given, progress=progress), model, allow_other_model, model_options)
    folder = Path(tempfile.mkdtemp(prefix="personasteer-bundle-"))
    with archive.removed_on_failure(folder):
        checked = check_bundle(given, into=folder, progress=progress)
        return _open(given, folder, checked, model, allow_other_model, model_options)


def _open(
    path: Path,
    folder: Path,
    checked: CheckedBundle,
    model: str | os.PathLike[str] | Model | None,
    allow_other: bool,
    options: Mapping[str, Any],
) -> Bundle:
    persona = checked.persona
    with _about(path):
        steering, vectors = _load_steering(folder, persona)
    file = _model_file(path, folder, persona, model)
    same = file == folder / (persona.model.file or "") or archive.sha256(file) == persona.model.sha256
    if not same and not allow_other:
        raise BundleError(
            f"{path}: is for {_said(persona)}, and {file} is another file: {_what_differs(persona, file)}; "
            "allow_other_model=True (--allow-other-model) tries it"
        )
    loras = [(folder / a.file, a.scale) for a in persona.adapters]
    if isinstance(model, Model):
        wanted = [(checked.sums[a.file], a.scale) for a in persona.adapters]
        same_loras = [(archive.sha256(file), scale) for file, scale in model.adapters][: len(wanted)] == wanted
        if not same_loras and not allow_other:
            files = ", ".join(f"{a.file} (scale {a.scale:g})" for a in persona.adapters)
            raise BundleError(f"{path}: its model is run with {files}, and the open one is not: lora=[...]")
        same = same and same_loras
        opened = model
    else:
        opened = Model(file, **{**options, "lora": [*loras, *options.get("lora", ())]})
    try:
        with _about(path):
            for vector in vectors.values():
                check_fits(vector, opened)
    except BaseException:
        if opened is not model:
            opened.close()
        raise
    if not same:
        log.warning("%s: is for %s; %s differs: %s; the effect is not proven here",
                    path, _said(persona), file, _what_differs(persona, file))  # fmt: skip
    return Bundle(persona, opened, steering, folder, owned=opened is not model, temporary=folder != path)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """What goes wrong with a bundle's content is the bundle's error."""
    try:
        yield
    except BundleError:
        raise
    except PersonasteerError as e:
        raise BundleError(f"{path}: {e}") from e


def _load_steering(folder: Path, persona: Persona) -> tuple[Steering, dict[str, PersonaVector]]:
    """The edits, checked against the model that persona.json describes."""
    base = ModelInFile.of(persona.model)
    vectors: dict[str, PersonaVector] = {}
    for entry in persona.vectors:
        vector = PersonaVector.load(folder / entry.file)
        if vector_entry(entry.file, vector, entry.exported_strength) != entry:
            raise VectorError(f"{entry.file} is not the vector that {archive.PERSONA} describes")
        vectors[entry.file] = vector
    steering = Steering(edit_of(entry, vectors[entry.vector]) for entry in persona.edits)
    for edit in steering:
        edit.terms(base)
    return steering, vectors


def _model_file(path: Path, folder: Path, persona: Persona, model: str | os.PathLike[str] | Model | None) -> Path:
    """The file of the model to use, not yet compared with the one that it must be, except for the demo model."""
    if isinstance(model, Model):
        return model.path
    if model is not None:
        return check_model_file(model)
    if persona.model.file is not None:
        return folder / persona.model.file
    try:
        demo = demo_model_path()
    except ModelError:
        demo = None
    if demo is not None and demo.stat().st_size == persona.model.size and archive.sha256(demo) == persona.model.sha256:
        return demo
    beside = path.resolve().parent / persona.model.file_name
    if beside.is_file():
        return check_model_file(beside)
    raise BundleError(
        f"{path}: is for {_said(persona)}, which is not included: put that file beside the bundle, or name it with "
        "model= (-m)"
    )


def _said(persona: Persona) -> str:
    return f"{persona.model.file_name} ({persona.model.quantization}, SHA-256 {persona.model.sha256[:12]}…)"


def _what_differs(persona: Persona, file: Path) -> str:
    found = identify(file)
    if found["fingerprint"] == persona.model.fingerprint:
        return "the same weights, tokenizer and template, other descriptive metadata"
    return differences(persona.model.identity.model_dump(), found)
