"""How a persona vector survives quantization: the same answers read on other quantizations of the same weights.

    python benchmarks/quantizations.py [SOURCE.gguf] [--work DIR] [--kinds A,B] [--traits A,B] [--widen] [--table]

The source file answers the traits' questions once. Each file of the ladder (made by requantize.py in the work folder)
reads these answers, teacher-forced, and has its own vector and its own sweep over blocks; held-out effects are measured
with that vector and with the source file's. Every result is one JSON file in the work folder, so that the command can
be stopped and started again. --widen first makes a copy of a llama whose rows are multiples of 256 long (zeros in
between), so that K-quants fit. --table prints the Markdown tables of what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from requantize import bits_per_weight, requantize, tensor_types, weights_of, widen
from work_folder import Folder

import personasteer as ps
from personasteer import traits
from personasteer.derive import Response, elicit, from_elicited, load_responses, replay, responses_text, select
from personasteer.derive.calibration import selection_cells, sweep
from personasteer.derive.directions import window_range
from personasteer.derive.selection import require_enough
from personasteer.engine import Request
from personasteer.evaluate import bootstrap_interval, cell_log_odds, make_cells
from personasteer.files import atomic_write
from personasteer.traits import Trait, neutral_pairs

TRAITS = ("pessimistic", "pirate", "formal")
KINDS = ("Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M")
SOURCE = "source"
ELICIT = {"n_questions": 8, "max_tokens": 28}
MOST_CONTRASTS = 16  # read on every file, evenly drawn from those that count
N_QUESTIONS, N_PAIRS = 8, 2  # held out
RHO = 0.2
NEUTRAL_TOKENS = 16


def gather(model: ps.Model, trait: Trait, answers: Path) -> None:
    """Write the source file's answers that count, as JSONL that every file reads."""
    found = elicit(model, trait, seed=0, **ELICIT)
    selection = select(found, trait)
    require_enough(selection, trait, model.path.name)
    at = np.linspace(0, len(selection.kept) - 1, min(MOST_CONTRASTS, len(selection.kept))).round().astype(int)
    rows = sorted(i for k in at for i in selection.kept[k])  # those of one system prompt beside each other
    atomic_write(answers, responses_text(found, rows).encode())


def vector_of(model: ps.Model, trait: Trait, responses: Sequence[Response]) -> tuple[ps.PersonaVector, dict[str, Any]]:
    """The file's own vector at the blocks of its own sweep. Raises ElicitationError where it does not steer."""
    found = replay(model, responses)
    again = select(found, trait)
    vector = from_elicited(model, trait, found)
    systems = trait.system[0] if model.takes_system else None
    cells = selection_cells(model, trait, found, found.contrasts)[::2]
    chosen, table = sweep(model, vector, cells, systems=systems)
    assert vector.reliability is not None
    return chosen, {
        "n_contrasts": again.n,
        "still_count": len(again.kept),
        "layers": list(chosen.layers),
        "sweep": table,
        "split_half": float(np.mean(vector.reliability[list(chosen.layers)])),
    }


def effects(model: ps.Model, trait: Trait, arms: dict[str, ps.PersonaVector]) -> dict[str, Any]:
    """For each vector: change of the held-out log-odds at -RHO and RHO by question, in nats per token."""
    questions = trait.evaluate_questions[:N_QUESTIONS]
    cells = make_cells(questions, trait.evaluation_pairs, N_PAIRS)
    steers = [None, *(replace(v * rho, scope="response") for v in arms.values() for rho in (-RHO, RHO))]
    odds = cell_log_odds(model, cells, steers).reshape(len(steers), len(questions), -1).mean(2)
    out: dict[str, Any] = {"log_odds": float(odds[0].mean())}
    for k, name in enumerate(arms):
        out[name] = {}
        for sign, row in (("minus", odds[1 + 2 * k]), ("plus", odds[2 + 2 * k])):
            change = row - odds[0]
            out[name][sign] = {
                "delta": float(change.mean()),
                "interval": bootstrap_interval(change),
                "by_question": change.tolist(),
            }
    return out


def cosines(vector: ps.PersonaVector, source: ps.PersonaVector) -> dict[str, float]:
    """Over the blocks that windows are chosen from, and at those that were chosen on the source file."""
    _, low, high = window_range(vector.n_layer)
    cosine = vector.cosine(source)
    return {
        "min": float(np.min(cosine[low:high])),
        "median": float(np.median(cosine[low:high])),
        "chosen": float(np.min(cosine[list(source.layers)])),
    }


def everyday_log_p(model: ps.Model) -> np.ndarray:
    """log p of the next token over the beginnings of everyday answers, unsteered, (n, n_vocab)."""
    requests = []
    for question, answer in neutral_pairs()[:8]:
        tokens, n_prompt = model.pair_tokens(question, answer)
        tokens = tokens[: n_prompt + NEUTRAL_TOKENS]
        requests.append(Request(tokens, n_prompt, outputs=(n_prompt - 1, len(tokens) - 1), keep_logits=True))
    logits = np.concatenate([r["logits"] for r in model.run_alone(requests)])
    logits = logits - logits.max(1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)), np.float32)


def mean_kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p || q), mean over rows, in nats."""
    return float((np.exp(log_p) * (log_p - log_q)).sum(1, dtype=np.float64).mean())


def relative_error(path: Path, source: Path) -> float:
    """Root of the mean square of (w - w of the source), over that of the source's weights, all matrices together."""
    of_source = {t.name: t for t in gguf.GGUFReader(source).tensors}
    error = size = 0.0
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            w = weights_of(of_source[tensor.name])
            size += float((w**2).sum(dtype=np.float64))
            if tensor.tensor_type != of_source[tensor.name].tensor_type:  # otherwise copied
                error += float(((weights_of(tensor) - w) ** 2).sum(dtype=np.float64))
    return float(np.sqrt(error / size))


def describe(path: Path, source: Path) -> dict[str, Any]:
    """What is in a file."""
    return {
        "types": dict(tensor_types(path).most_common()),
        "bits_per_weight": bits_per_weight(path),
        "megabytes": path.stat().st_size / 1e6,
        "weight_error": relative_error(path, source),
    }


def on_file(model: ps.Model, kind: str, path: Path, source: Path, work: Path) -> dict[str, Any]:
    """What is in the file, and how far its unsteered next tokens are from the source file's."""
    log_q = everyday_log_p(model)
    if kind == SOURCE:
        out = io.BytesIO()
        np.save(out, log_q)
        atomic_write(work / "everyday.npy", out.getvalue())
    return describe(path, source) | {"kl": mean_kl(np.load(work / "everyday.npy"), log_q), "model": model.name}


def on_trait(model: ps.Model, trait: Trait, kind: str, work: Path) -> dict[str, Any]:
    """A trait on one file of the ladder."""
    answers, of_source = work / f"{trait.name}.jsonl", work / f"{trait.name}.gguf"
    result: dict[str, Any] = {"kind": kind, "trait": trait.name}
    try:
        if kind != SOURCE and not of_source.exists():
            return result | {"rejected": "no vector on the source file"}
        if not answers.exists():
            gather(model, trait, answers)
        vector, found = vector_of(model, trait, load_responses(answers))
    except ps.ElicitationError as e:
        return result | {"rejected": str(e)}
    if kind == SOURCE:
        vector.save(of_source)
    reference = ps.PersonaVector.load(of_source)
    arms = {"own": vector} if kind == SOURCE else {"own": vector, "source": reference}
    return result | found | {"cosine": cosines(vector, reference), "effects": effects(model, trait, arms)}


def settings(source: Path, n_threads: int | None) -> dict[str, Any]:
    """What results must share to stand in one table."""
    with source.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    how = {"elicit": ELICIT, "contrasts": MOST_CONTRASTS, "held_out": [N_QUESTIONS, N_PAIRS], "rho": RHO}
    return {"source_sha256": sha256, "threads": n_threads, **how}


def run(
    source: Path,
    work: Path,
    wanted: Sequence[Trait],
    kinds: Sequence[str],
    *,
    n_threads: int | None = None,
    n_ctx: int = 512,
    widened: bool = False,
) -> dict[str, dict[str, Any]]:
    """Compute whatever is not in the work folder yet; the results."""
    folder = Folder(work, settings(source, n_threads) | {"widened": widened})
    origin = source
    if widened:
        source = work / "widened.gguf"
        if not source.exists():
            widen(origin, source)
    for kind in (SOURCE, *kinds):
        units = [f"{kind}-{trait.name}" for trait in wanted]
        if all(map(folder.has, [f"{kind}-file", *units])):
            continue
        path = source if kind == SOURCE else work / f"{kind}.gguf"
        if not path.exists():
            requantize(source, path, kind)
        with ps.Model(path, n_ctx=n_ctx, n_threads=n_threads) as model:
            more = {"origin": describe(origin, origin)} if widened and kind == SOURCE else {}
            folder.get(f"{kind}-file", lambda: on_file(model, kind, path, source, work) | more)  # noqa: B023 (at once)
            for trait, unit in zip(wanted, units, strict=True):
                folder.get(unit, lambda: on_trait(model, trait, kind, work))  # noqa: B023
    return folder.load()


# -- tables


def tables(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: the files, a line for each file and trait, and what is left on average."""
    files = {name.removesuffix("-file"): r for name, r in results.items() if name.endswith("-file")}
    kinds = sorted(files, key=lambda kind: (-files[kind]["bits_per_weight"], kind))
    rows = [r for kind in kinds for r in results.values() if r.get("kind") == kind]
    measured = [r for r in rows if "effects" in r]
    reference = {r["trait"]: r for r in measured if r["kind"] == SOURCE}
    out = [
        "| file | matrices hold | bits per weight | MB | weight error | KL unsteered |",
        "| --- " * 6 + "|",
    ]
    for kind in kinds:
        f = files[kind]
        held = ", ".join(f"{n} {name}" for name, n in f["types"].items())
        out.append(
            f"| {label(kind, files)} | {held} | {f['bits_per_weight']:.2f} | {f['megabytes']:.1f} | "
            f"{f['weight_error']:.4f} | {f['kl']:.4f} |"
        )
    out += [
        "",
        f"| file | trait | contrasts that count here | cosine min | median | at the chosen blocks | chosen blocks | "
        f"Δ at -{RHO}, own | Δ at +{RHO}, own | Δ at -{RHO}, source's | Δ at +{RHO}, source's | "
        "effect, own / source's |",
        "| --- " * 12 + "|",
    ]
    for r in rows:
        name = f"| {label(r['kind'], files)} | {r['trait']} "
        if "effects" not in r:
            out.append(name + "|" + " |" * 9 + f" rejected: {r['rejected'].split('. Seen:')[0]} |")
            continue
        own, source = r["effects"]["own"], r["effects"].get("source", r["effects"]["own"])
        cells = [
            f"{r['still_count']} / {r['n_contrasts']}",
            *(f"{r['cosine'][key]:.4f}" for key in ("min", "median", "chosen")),
            f"{r['layers'][0]}-{r['layers'][-1]}",
            *(with_interval(arm[sign]) for arm in (own, source) for sign in ("minus", "plus")),
            " / ".join(share(effect_of(arm), reference.get(r["trait"])) for arm in (own, source)),
        ]
        out.append(name + "| " + " | ".join(cells) + " |")
    out += ["", "Means over the traits; the effect is half of Δ at +ρ less Δ at -ρ, in parts of the source file's.", ""]
    out += ["| file | bits per weight | cosine min | effect, own | 95 % interval | effect, source's | 95 % interval |"]
    out += ["| --- " * 7 + "|"]
    for kind in kinds:
        of_kind = [r for r in measured if r["kind"] == kind and r["trait"] in reference]
        if not of_kind:
            continue
        line = f"| {label(kind, files)} | {files[kind]['bits_per_weight']:.2f} | "
        line += f"{min(r['cosine']['min'] for r in of_kind):.4f}"
        for arm in ("own", "source"):
            mean, low, high = mean_share(of_kind, reference, arm)
            line += f" | {mean:.3f} | {low:.3f} … {high:.3f}"
        out.append(line + " |")
    halves = ", ".join(f"{r['split_half']:.3f} ({trait})" for trait, r in reference.items())
    out += ["", f"{label(SOURCE, files)} is the source file, from whose weights the others are made."]
    origin = files[SOURCE].get("origin", files[SOURCE]) if SOURCE in files else None
    if origin is not None and not {"F32", "F16", "BF16"} & set(origin["types"]):
        copied = ", a widened float32 copy of whose weights is" if "origin" in files[SOURCE] else ": it is"
        out[-1] += (
            f" It is quantized itself, to {origin['bits_per_weight']:.2f} bits per weight{copied} the reference here, "
            "and no row is the original float model."
        )
    out[-1] += (
        " Where a type does not divide a matrix's rows, llama.cpp takes another (a K-quant needs a width that is a "
        "multiple of 256): such a file is named by the types that it holds, with what was "
        "asked for in quotes. Cosines are with the source's vector; those of its own two halves of the answers are "
        f"{halves or 'not known'}. {sum(r['seconds'] for r in results.values()) / 60:.0f} minutes."
    )
    return "\n".join(out)


def label(kind: str, files: dict[str, dict[str, Any]]) -> str:
    """A file by the type that most of it has, or all its types where that is not the one asked for."""
    types = files[kind]["types"] if kind in files else {}
    mostly = max(types, key=types.get, default=kind)
    if kind == SOURCE:
        return f"{mostly} (source)"
    return kind if kind.startswith(mostly) else f"{' + '.join(types)} (“{kind}”)"


def with_interval(change: dict[str, Any]) -> str:
    low, high = change["interval"]
    return f"{change['delta']:+.2f} ({low:+.2f} … {high:+.2f})"


def by_question(arm: dict[str, Any]) -> np.ndarray:
    return (np.array(arm["plus"]["by_question"]) - np.array(arm["minus"]["by_question"])) / 2


def effect_of(arm: dict[str, Any]) -> float:
    return float(by_question(arm).mean())


def share(effect: float, reference: dict[str, Any] | None) -> str:
    return "n/a" if reference is None else f"{effect / effect_of(reference['effects']['own']):.2f}"


def mean_share(
    results: Sequence[dict[str, Any]], reference: dict[str, dict[str, Any]], arm: str
) -> tuple[float, float, float]:
    """Effect in parts of the source file's, mean over traits, with a 95 % interval over the questions of each trait.

    Both files answer for the same questions, which are drawn together.
    """
    rng = np.random.default_rng(0)
    means, draws = [], []
    for r in results:
        ours = by_question(r["effects"].get(arm, r["effects"]["own"]))
        theirs = by_question(reference[r["trait"]]["effects"]["own"])
        at = rng.integers(0, len(ours), (2000, len(ours)))
        means.append(ours.mean() / theirs.mean())
        draws.append(ours[at].mean(1) / theirs[at].mean(1))
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    return float(np.mean(means)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="demo", help="a GGUF file; the demo model without")
    parser.add_argument("--work", type=Path, default=Path("quantizations-work"))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--traits", default=",".join(TRAITS), help="names, or paths of .toml or .json files")
    parser.add_argument(
        "--widen", action="store_true", help="widen the matrices with zeros to multiples of 256 first, for K-quants"
    )
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.table:
        print(tables(Folder(options.work).load()))
        return
    source = ps.model.demo_model_path() if options.source == "demo" else Path(options.source)
    wanted = [traits.find(name) for name in options.traits.split(",")]
    kinds = [kind for kind in options.kinds.split(",") if kind]
    without = ", ".join(trait.name for trait in wanted if not trait.evaluation_pairs)
    if without:
        parser.error(f"these traits have no continuation pairs, which must be the same on every file: {without}")
    print(tables(run(Path(source), options.work, wanted, kinds, n_threads=options.threads, widened=options.widen)))


if __name__ == "__main__":
    main()
