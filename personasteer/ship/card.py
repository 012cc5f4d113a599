"""What people and other programs read of a bundle: its model card and, where it applies, an Ollama Modelfile."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jinja2

from personasteer.pages import load_template
from personasteer.ship.persona import AblateEntry, AddEntry, Persona, VectorEntry, clean
from personasteer.vectors import PersonaVector, block_ranges

# what the Hub takes for `license`: https://huggingface.co/docs/hub/repositories-licenses
HUB_LICENSES = frozenset((
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m",
    "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2",
    "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "grok2-community",
    "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by",
    "ofl-1.1", "openmdw-1.0", "openmdw-1.1", "openrail", "openrail++", "osl-3.0", "other", "pddl", "postgresql",
    "unknown", "unlicense", "wtfpl", "zlib",
))  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One vector's line of an evaluation report."""

    vector: str
    trait: str
    model: str
    strength: float
    low: float
    high: float
    random_p95: float
    coherence: float
    passes: bool


def evaluations_in(report: bytes) -> list[Row]:
    """The rows of a report.json that `personasteer eval --report` wrote; none where it is something else."""
    try:
        content = json.loads(report)
        found = [_row(e) for e in content.get("vectors", [content])]
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        return []
    return [r for r in found if all(map(math.isfinite, (r.strength, r.low, r.high, r.random_p95, r.coherence)))]


def _row(e: Mapping[str, Any]) -> Row:
    first, last = e["dose"][0], e["dose"][-1]
    return Row(
        vector=clean(e["vector"], 200),
        trait=clean(e["trait"], 200),
        model=clean(e["model"], 200),
        strength=float(e["strength"]),
        low=float(first["delta"]),
        high=float(last["delta"]),
        random_p95=float(e["controls"]["random_p95"]),
        coherence=min(float(first["coherence"]), float(last["coherence"])),
        passes=e["passes"] is True,
    )


def front_matter(persona: Persona) -> dict[str, Any]:
    """The metadata that the Hub reads at the top of a model card."""
    out: dict[str, Any] = {"library_name": "personasteer", "pipeline_tag": "text-generation"}
    if persona.license:
        known = persona.license.lower()
        if known in HUB_LICENSES:
            out["license"] = known
        else:  # the Hub refuses a card with a license that it does not know
            out |= {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", known).strip("-.") or "unnamed"}
    if persona.base_model:
        out["base_model"] = persona.base_model
    tags = ["personasteer", "persona-vectors", "steering", "llama.cpp", "gguf", persona.model.architecture]
    out["tags"] = list(dict.fromkeys(filter(None, tags)))
    return out


def render_card(persona: Persona, vectors: Mapping[str, PersonaVector], evaluations: Sequence[Row]) -> str:
    """README.md. vectors: by file name, for what their provenance says of their calibration."""
    model = persona.model
    context = {
        "persona": persona,
        "front_matter": front_matter(persona),
        "base": shlex.quote(model.file or model.file_name),
        "commands": llama_cpp_commands(persona),
        "doses": {v.file: _doses(vectors[v.file]) for v in persona.vectors},
        "evaluations": evaluations,
        "modelfile": modelfile_lines(persona) is not None,
        "version": version("personasteer"),
    }
    return _template("model_card.md.j2").render(context)


def render_modelfile(persona: Persona) -> str | None:
    """The Modelfile; None where the bundle holds nothing that Ollama could run steered."""
    lines = modelfile_lines(persona)
    if lines is None:
        return None
    return _template("modelfile.j2").render(persona=persona, lines=lines)


def modelfile_lines(persona: Persona) -> list[str] | None:
    """FROM and ADAPTER: a model with the persona in its weights, or the base that is included with a LoRA."""
    if persona.adapters:
        return None
    kinds = {kind: [f.file for f in persona.files if f.kind == kind] for kind in ("model", "lora")}
    if kinds["model"]:
        return [f"FROM ./{kinds['model'][0]}"]
    if kinds["lora"] and persona.model.file:
        return [f"FROM ./{persona.model.file}", f"ADAPTER ./{kinds['lora'][0]}"]
    return None


def llama_cpp_commands(persona: Persona) -> list[str]:
    """Command lines of stock llama.cpp that run the persona, from the files of the bundle; [] where there is none."""
    scaled = ",".join(f"{a.file}:{a.scale:g}" for a in persona.adapters)
    loras = f" --lora-scaled {scaled}" if scaled else ""
    base = shlex.quote(persona.model.file or persona.model.file_name) + loras
    out = []
    for f in persona.files:
        if f.kind == "control-vector":
            out.append(f"llama-cli -m {base} --control-vector {f.file}")
        elif f.kind == "lora":
            out.append(f"llama-cli -m {base} --lora {f.file}")
        else:
            out.append(f"llama-cli -m {f.file}{loras}")
    scales = vector_scales(persona)
    if scales and all(abs(scale - 1.0) < 1e-9 for scale in scales.values()):
        out.append(f"llama-cli -m {base} --control-vector {','.join(scales)}")
    elif scales:
        given = ",".join(f"{file}:{scale:.6g}" for file, scale in scales.items())
        out.append(f"llama-cli -m {base} --control-vector-scaled {given}")
    return list(dict.fromkeys(out))


def vector_scales(persona: Persona) -> dict[str, float]:
    """{vector file: llama.cpp's scale} that does what the edits do; {} where control vectors cannot.

    llama.cpp adds the same at every token, from block 1 on, in the norms that the vector was written with.
    """
    if persona.adapters:  # the norms are those of the model with them
        return {}
    by_file = {v.file: v for v in persona.vectors}
    total: dict[str, float] = {}
    for edit in persona.edits:
        vector = by_file[edit.vector]
        if not isinstance(edit, AddEntry) or edit.keep_norm or edit.half_life is not None or edit.scope != "all":
            return {}
        if (edit.start, edit.stop) != (None, None) or edit.layers not in (None, vector.layers) or 0 in vector.layers:
            return {}
        raw = vector.exported_strength is None
        if edit.raw != raw or (not raw and vector.fingerprint != persona.model.fingerprint):
            return {}
        total[edit.vector] = total.get(edit.vector, 0.0) + edit.strength
    return {file: rho / (by_file[file].exported_strength or 1.0) for file, rho in total.items() if rho}


def describe(edit: Any, vectors: Sequence[VectorEntry]) -> dict[str, str]:
    """An edit in words: what, how much, at which blocks, on which tokens."""
    vector = next(v for v in vectors if v.file == edit.vector)
    if isinstance(edit, AddEntry):
        amount = f"{edit.strength:+g}" + (" (raw)" if edit.raw else "") + (", keeping the norm" * edit.keep_norm)
    elif isinstance(edit, AblateEntry):
        to = "" if edit.to == 0 else ", to the everyday mean" if edit.to == "mean" else ", to given readings"
        at = "" if edit.sites == ("block",) else f", at {' and '.join(edit.sites)}"
        amount = f"share {edit.share:g}{to}{at}"
    else:
        amount = "at the vector's thresholds" if edit.tau is None else "at given thresholds"
    blocks = edit.layers if edit.layers is not None else () if isinstance(edit, AblateEntry) else vector.layers
    tokens = edit.scope if isinstance(edit.scope, str) else "given positions"
    if edit.start is not None or edit.stop is not None:
        first, last = edit.start or 0, edit.stop
        tokens += f", answer tokens from {first}" + ("" if last is None else f" to {last - 1}")
    if edit.half_life is not None:
        tokens += f", halved every {edit.half_life:g} tokens"
    return {
        "op": edit.op, "vector": vector.name, "file": edit.vector, "amount": amount,
        "blocks": block_ranges(blocks) if blocks else "all with a direction", "tokens": tokens,
    }  # fmt: skip


def _doses(vector: PersonaVector) -> list[dict[str, float]]:
    """The strengths that calibration tried, with what they left of the text's coherence."""
    calibration = vector.provenance.get("calibration")
    doses = calibration.get("doses") if isinstance(calibration, Mapping) else None
    rows = []
    for dose in doses if isinstance(doses, Sequence) and not isinstance(doses, str) else ():
        try:
            row = {key: float(dose[key]) for key in ("strength", "coherence", "kl")}
        except (KeyError, TypeError, ValueError):
            continue
        if all(map(math.isfinite, row.values())):
            rows.append(row)
    return sorted(rows, key=lambda row: row["strength"])


def _markdown(text: object) -> str:
    """Foreign text as part of a line or a table's cell, shown as it is."""
    line = " ".join(html.escape(str(text), quote=False).split())
    return re.sub(r"([\\`*_\[\]{}|~#$!])", r"\\\1", line)


def _paragraph(text: object) -> str:
    """Foreign text as a paragraph of its own, which does not begin a list."""
    return re.sub(r"^(\d*)(?=[.)])|^(?=[-+=])", r"\1\\", _markdown(text))


_FILTERS: dict[str, Callable[..., Any]] = {
    "md": _markdown,
    "paragraph": _paragraph,
    # a JSON scalar is a YAML scalar, once no control character is in it
    "yaml": lambda value: json.dumps(value, ensure_ascii=False),
    "blocks": block_ranges,
    "describe": describe,
    "signed": lambda x: f"{x:+.2f}",
    "two": lambda x: f"{x:.2f}",
    "number": lambda x: f"{x:g}",
    "code": lambda text: str(text).replace("`", "'"),
}


def _template(name: str) -> jinja2.Template:
    return load_template(__package__, name, _FILTERS, autoescape=False, keep_trailing_newline=True)
