from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personasteer.cli._common import (
    AblateOption,
    CapOption,
    FloorOption,
    GpuOption,
    JsonOption,
    OffsetOption,
    ScopeOption,
    ThreadsOption,
    check_new,
    load_steering,
    model_path,
    open_model,
    print_json,
    say,
    split_strength,
    stages,
)
from personasteer.cli._completion import complete_model, one_of
from personasteer.errors import ArgumentError

if TYPE_CHECKING:
    from personasteer.model import Model
    from personasteer.ship.directions import Removed
    from personasteer.vectors import PersonaVector

log = logging.getLogger("personasteer")

Stage = Callable[[str], Callable[[int, int], None]]


def register(app: typer.Typer) -> None:
    app.command("export")(export)


@dataclass(frozen=True)
class Order:
    """What is to be exported: vectors with the strengths that were named, and the options of the kinds."""

    parts: list[tuple[PersonaVector, float | None]]
    base: str
    out: Path
    stage: Stage
    threads: int | None
    gpu_layers: int
    options: dict[str, Any]

    def folded(self) -> PersonaVector:
        """All parts as one vector with the norms of the model."""
        small = {"n_ctx": 512, "n_parallel": 1, "repack": False}
        with open_model(self.base, n_threads=self.threads, n_gpu_layers=self.gpu_layers, **small) as m:
            return fold(m, [(v, v.strength if s is None else s) for v, s in self.parts])

    @property
    def model(self) -> Path:
        return model_path(self.base)


def export(
    kind: Annotated[
        str,
        typer.Argument(
            help="control-vector, projection (or glp), lora, bake, ablate or bundle.",
            autocompletion=one_of("control-vector", "projection", "lora", "bake", "ablate", "bundle"),
        ),
    ],
    base: Annotated[
        str,
        typer.Option("-m", "--model", help="The model that it is for; its norms count.", autocompletion=complete_model),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write; a folder or .tar for a bundle.")],
    vectors: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE[:STRENGTH]..", help="Vectors; for lora and ablate the share that is removed."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what exists.")] = False,
    mode: Annotated[
        str, typer.Option("--mode", help="projection: project or add.", autocompletion=one_of("project", "add"))
    ] = "project",
    layer: Annotated[
        int | None,
        typer.Option("--layer", help="lora, ablate: the block whose direction is removed; its best when left out."),
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help="bake: auto, block-bias, as-llama, value-bias.",
            autocompletion=one_of("auto", "block-bias", "as-llama", "value-bias"),
        ),
    ] = "auto",
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", metavar="FILE", help="ablate: importance matrix of llama-imatrix.")
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="ablate: keep the output matrix, where it is the embeddings, as it was.")
    ] = False,
    layer_shares: Annotated[
        str | None,
        typer.Option("--layer-shares", metavar="0-9:0,20:0.5", help="ablate: factors by block; -1: the embeddings."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="bundle: name of the persona.")] = None,
    description: Annotated[str, typer.Option("--description", help="bundle: what the persona does.")] = "",
    include_model: Annotated[bool, typer.Option("--include-model", help="bundle: put the model in.")] = False,
    license: Annotated[str | None, typer.Option("--license", help="bundle: license of the model card.")] = None,  # noqa: A002
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="USER/NAME", help="projection, bundle: the base on the Hub.")
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option("--base-revision", metavar="COMMIT", help="projection: commit of the base, 40 digits.")
    ] = None,
    cap: CapOption = None,
    floor: FloorOption = None,
    ablate: AblateOption = None,
    scope: ScopeOption = "all",
    report: Annotated[
        list[Path] | None, typer.Option("--report", help="bundle: report of `eval --report` to put in; repeatable.")
    ] = None,
    shipped: Annotated[
        list[Path] | None, typer.Option("--file", help="bundle: exported file to put in; repeatable.")
    ] = None,
    offset: OffsetOption = 0,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    json: JsonOption = False,
) -> None:
    """Write what other people's runtimes load: the vectors at given strengths, summed, in one of six forms.

    control-vector: for llama.cpp's --control-vector. projection: the same with GLP metadata. lora: an adapter that
    takes directions out of what the model writes. bake: a model that is steered by itself. ablate: a model whose
    weights no longer write the directions. bundle: vectors, model or its hash, evidence and model card.

    Example: `personasteer export control-vector pessimistic.gguf:-0.3 -m demo -o optimist.gguf`
    """
    from personasteer.vectors import PersonaVector

    kind = "projection" if kind == "glp" else kind
    if kind not in KINDS:
        raise ArgumentError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    specs = [split_strength(v) for v in vectors or []]
    options: dict[str, Any] = {
        "mode": mode, "layer": layer, "strategy": strategy, "imatrix": imatrix, "untie": untie,
        "layer_shares": parse_shares(layer_shares), "name": name, "description": description,
        "include_model": include_model, "license": license, "base_model": base_model, "base_revision": base_revision,
        "reports": report or [], "shipped": shipped or [], "cap": cap, "floor": floor, "ablate": ablate, "scope": scope,
    }  # fmt: skip
    for option, kinds in OPTIONS.items():
        if options[option] not in (None, False, "", [], DEFAULTS.get(option)) and kind not in kinds:
            raise ArgumentError(
                f"--{NAMES.get(option, option).replace('_', '-')} is for {' and '.join(kinds)}, not for {kind}"
            )
    edits = {"cap": cap, "floor": floor, "ablate": ablate}
    if not specs and not any(edits.values()):
        raise ArgumentError("name at least one vector, as FILE:STRENGTH")
    if kind != "bundle":
        inputs: list[str | Path] = [model_path(base), *(file for file, _ in specs), *([imatrix] if imatrix else [])]
        check_new(out, inputs, force=force)
    options |= {"force": force, "edits": load_steering(None, scope, offset, **edits)}
    parts = [(PersonaVector.load(file, offset=offset), s) for file, s in specs]
    with stages() as stage:
        found, how = KINDS[kind](Order(parts, base, out, stage, threads, gpu_layers, options))
    used = [{"file": file, "strength": v.strength if s is None else s} for (file, _), (v, s) in
            zip(specs, parts, strict=True)]  # fmt: skip
    if json:
        print_json({"file": str(out), "kind": kind, "vectors": used, **found})
    else:
        for line in how:
            say(line)


def _control_vector(order: Order) -> tuple[dict[str, Any], list[str]]:
    vector = order.folded()
    vector.save(order.out)
    lines = [f"{order.out}: blocks {list(vector.layers)}; use it as: llama-cli -m MODEL --control-vector {order.out}"]
    return {"layers": list(vector.layers)}, lines


def _projection(order: Order) -> tuple[dict[str, Any], list[str]]:
    from personasteer.ship.glp import MODES
    from personasteer.ship.projection import save_projection
    from personasteer.steering import check_fits

    mode = order.options["mode"]
    pin = {key: order.options[key] for key in ("base_model", "base_revision")}
    if mode not in MODES:
        raise ArgumentError(f"--mode must be one of {', '.join(MODES)}, not {mode!r}")
    if mode == "add":
        vector = order.folded()
        save_projection(vector, order.out, mode=mode, **pin)
    else:
        if len(order.parts) != 1:
            raise ArgumentError("a projection takes one vector: readers of the format refuse several directions")
        vector, alpha = order.parts[0]
        with open_model(order.base, n_ctx=512, n_parallel=1, n_threads=order.threads, repack=False) as m:
            check_fits(vector, m)
        if alpha is not None and alpha > 1:
            log.warning("alpha %.3g takes out more than is there: personasteer itself does not run such a file", alpha)
        save_projection(vector, order.out, mode=mode, strength=alpha, **pin)
    hint = "add" if mode == "add" else "project; llama.cpp itself would add it: give it to readers of GLP metadata only"
    return {"mode": mode, "layers": list(vector.layers)}, [f"{order.out}: blocks {list(vector.layers)}, mode {hint}"]


def _removed(order: Order) -> Removed:
    """The directions of the vectors, which are to be of this model."""
    from personasteer.identity import check_model_file
    from personasteer.ship.contents import ModelInFile
    from personasteer.ship.directions import directions_to_remove
    from personasteer.steering import check_fits

    described = ModelInFile.read(check_model_file(order.model))
    for vector, _ in order.parts:
        check_fits(vector, described)
    return directions_to_remove(order.parts, layer=order.options["layer"])


def _lora(order: Order) -> tuple[dict[str, Any], list[str]]:
    from personasteer.ship.lora import save_lora

    removed = _removed(order)
    adapter = save_lora(order.model, order.out, removed, progress=order.stage("reading matrices"))
    lines = [
        f"{order.out}: takes {', '.join(removed.names)} (block {', '.join(map(str, removed.blocks))}) out of "
        f"{len(adapter.matrices)} matrices; use it as: llama-server -m MODEL --lora {order.out}"
    ]
    lines += [f"  left out: {tensor}, {why}" for tensor, why in list(adapter.left_out.items())[:4]]
    if len(adapter.left_out) > 4:
        lines.append(f"  and {len(adapter.left_out) - 4} more")
    return {**adapter.summary(), "file": str(order.out), "blocks": list(removed.blocks)}, lines


def _bake(order: Order) -> tuple[dict[str, Any], list[str]]:
    from personasteer.ship.bake import LLAMA, bake

    baked = bake(
        order.model,
        order.out,
        order.folded(),
        strategy=order.options["strategy"],
        n_threads=order.threads,
        stage=order.stage,
    )
    lines = [f"{order.out}: {baked.strategy} at blocks {list(baked.blocks)}; use it as: llama-server -m {order.out}"]
    if baked.strategy == LLAMA:
        lines.append("  a qwen2 written as the llama that computes alike: its queries and keys in another order")
    for key, value in baked.fit.items():
        lines.append(f"  {key}: {value:.3g}" if isinstance(value, float) else f"  {key}: {value}")
    return {**baked.summary(), "file": str(order.out)}, lines


def _ablate(order: Order) -> tuple[dict[str, Any], list[str]]:
    from personasteer.ship.ablate import ablate_weights

    removed = _removed(order)
    done = ablate_weights(
        order.model,
        order.out,
        removed,
        shares=order.options["layer_shares"],
        importance=order.options["imatrix"],
        untie=order.options["untie"],
        n_threads=order.threads or 2,
        progress=order.stage("writing"),
    )
    summary = done.summary()
    kinds = sorted({t.type for t in done.tensors})
    lines = [f"{order.out}: {', '.join(removed.names)} taken out of {len(done.tensors)} tensors"]
    for kind in kinds:
        tensors = [t for t in done.tensors if t.type == kind]
        lines.append(
            f"  {kind}, {len(tensors)} tensors: at most {max(t.reading for t in tensors):.2%} left of what they write "
            f"along it, norms changed by {min(t.norm_change for t in tensors):+.2%} to "
            f"{max(t.norm_change for t in tensors):+.2%}, rounded by {max(t.requantization for t in tensors):.2%}"
        )
    if done.tied_output and not done.untied:
        lines.append(
            "  the output matrix is the same tensor as the embeddings, and edited with them (--untie keeps it)"
        )
    return {**summary, "file": str(order.out), "blocks": list(removed.blocks)}, lines


def _bundle(order: Order) -> tuple[dict[str, Any], list[str]]:
    from personasteer.ship.bundle import write_bundle
    from personasteer.steering import Add

    o = order.options
    steering = [*(Add(v, v.strength if s is None else s, scope=o["scope"]) for v, s in order.parts), *o["edits"]]
    keys = ("description", "include_model", "license", "base_model", "reports", "shipped", "force")
    name = o["name"] or " + ".join(dict.fromkeys(e.vector.name for e in steering))
    write_bundle(
        order.out,
        model=order.model,
        steering=steering,
        name=name,
        progress=order.stage("writing"),
        **{key: o[key] for key in keys},
    )
    return {"name": name}, [f"{order.out}: {name}; run it as: personasteer bundle chat {order.out} -p TEXT"]


KINDS: dict[str, Callable[[Order], tuple[dict[str, Any], list[str]]]] = {
    "control-vector": _control_vector,
    "projection": _projection,
    "lora": _lora,
    "bake": _bake,
    "ablate": _ablate,
    "bundle": _bundle,
}


OPTIONS = {  # the kinds that an option is for
    "mode": ("projection",),
    "layer": ("lora", "ablate"),
    "strategy": ("bake",),
    **dict.fromkeys(("imatrix", "untie", "layer_shares"), ("ablate",)),
    **dict.fromkeys(("name", "description", "include_model", "license", "reports", "shipped"), ("bundle",)),
    **dict.fromkeys(("cap", "floor", "ablate", "scope"), ("bundle",)),
    "base_model": ("projection", "bundle"),
    "base_revision": ("projection",),
}
DEFAULTS = {"mode": "project", "strategy": "auto", "scope": "all"}
NAMES = {"reports": "report", "shipped": "file"}
MOST_BLOCKS = 4096


def parse_shares(text: str | None) -> dict[int, float] | None:
    """{block: factor} of "0-9:0,20:0.5". Raises ArgumentError where it is not written so."""
    if text is None:
        return None
    shares: dict[int, float] = {}
    for part in text.split(","):
        blocks, colon, factor = part.rpartition(":")
        try:
            value = float(factor)
            first, dash, last = (
                blocks.strip().partition("-") if not blocks.strip().startswith("-") else (blocks, "", "")
            )
            chosen = range(int(first), int(last) + 1) if dash else range(int(first), int(first) + 1)
        except ValueError:
            colon, value, chosen = "", 0.0, range(0)
        if not colon or not chosen or chosen[-1] >= MOST_BLOCKS:
            raise ArgumentError(f"--layer-shares takes blocks and factors as in 0-9:0,20:0.5, not {part!r}")
        shares |= dict.fromkeys(chosen, value)
    return shares


def fold(model: Model, parts: Sequence[tuple[PersonaVector, float]]) -> PersonaVector:
    """The vector whose recommended strength does on `model` what all parts do together.

    Scaled directions are summed per block; the total strength is rho = sum_il ||sum|| / m_il, the weights each
    block's share of it.
    """
    import numpy as np

    from personasteer.ship import scaled_directions
    from personasteer.steering import check_fits
    from personasteer.vectors import PersonaVector

    for vector, strength in parts:
        check_fits(vector, model)
        if strength == 0:
            raise ArgumentError(f"a strength of 0 for {vector.name!r} exports nothing")
        low, high = vector.window
        if not low <= strength <= high:
            log.warning(
                "strength %.3g of %r is outside its window %g to %g: the model may lose coherence",
                strength, vector.name, low, high,
            )  # fmt: skip
    if len(parts) == 1 and parts[0][1] > 0 and parts[0][0].n_layer == model.n_layer:
        vector, strength = parts[0]
        return replace(vector, norms=model.norms, strength=strength)
    total = np.zeros((model.n_layer, model.n_embd), np.float64)
    for vector, strength in parts:
        for il, row in scaled_directions(replace(vector, norms=model.norms[: vector.n_layer]), strength).items():
            total[il] += row
    share = np.linalg.norm(total, axis=1) / model.norms
    layers = tuple(int(il) for il in np.flatnonzero(share > 0))
    if not layers:
        raise ArgumentError("these vectors cancel: nothing is left to export")
    rho = float(share.sum())
    directions = total.astype(np.float32)
    directions[[il for il in range(model.n_layer) if il not in layers]] = np.nan
    return PersonaVector(
        directions,
        layers,
        "+".join(f"{v.name}:{s:g}" for v, s in parts),
        rho,
        {il: float(share[il] / rho) for il in layers},
        norms=model.norms,
        provenance={
            "method": "fold",
            **model.origin,
            "parts": [{"name": v.name, "strength": s, "provenance": dict(v.provenance)} for v, s in parts],
        },
    )
