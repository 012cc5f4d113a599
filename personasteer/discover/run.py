"""One comparison of a base with its fine-tune, from texts to a report and the features that carry the change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from personasteer import traits
from personasteer._native import build_id
from personasteer.conversations import LOOKED_AT, Columns, RowError, answers, find_layout, first_rows, open_data
from personasteer.discover.dictionary import (
    Dictionary,
    DictionaryRecipe,
    check_dictionary_memory,
    imported_dictionary,
    train_dictionary,
    without_outliers,
)
from personasteer.discover.differences import (
    Differences,
    find_differences,
    read_block,
    through_unembedding,
    token_places,
)
from personasteer.discover.features import (
    N_ITEMS,
    Behaviour,
    Effect,
    Feature,
    as_vector,
    blocks_around,
    describe,
    high_readings,
    rank_features,
    try_features,
)
from personasteer.discover.report import write_diff
from personasteer.discover.results import Diff
from personasteer.discover.texts import Text, fixed_pairs, make_texts
from personasteer.engine import Progress
from personasteer.errors import ArgumentError
from personasteer.evaluate import capability, cell_log_odds, halves, measure_coherence, persona_systems, trait_of
from personasteer.extras import need
from personasteer.files import check_folder
from personasteer.identity import check_alike
from personasteer.model import Model
from personasteer.monitor import LEAST_WORDS, Profile, Shift, compare_profiles, measure_profile, whole_states
from personasteer.ship import load_dictionary
from personasteer.statistics import bootstrap_interval
from personasteer.steering import check_fits
from personasteer.traits import Trait
from personasteer.vectors import PersonaVector
from personasteer.work import Work, digest

Stages: TypeAlias = Callable[[str], Progress]

METHOD = 3
WORK = "diff.work"  # folder of unfinished work
N_QUESTIONS, N_PAIRS = 20, 2  # of each trait, for the change of its words
N_KL = 96  # texts on which all blocks and the logits are compared
DEPTH = 2 / 3  # of the block whose features are looked for
N_FEATURES = 10  # that rose, and that fell
MEAN = "mean difference"


def diff(
    base: Model,
    tuned: Model,
    out: str | Path,
    *,
    vectors: Sequence[PersonaVector] = (),
    data: Any = None,
    columns: Columns | None = None,
    layer: int | None = None,
    dictionary: str | Path | DictionaryRecipe | None = None,
    dictionary_key: str | None = None,
    n_features: int = N_FEATURES,
    subjects: Sequence[Trait] | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Stages | None = None,
) -> Diff:
    """Find what a fine-tune changed: in what the model predicts, in its character, and in features of its stream.

    Both read the same fixed texts. A TopK dictionary of a block's outputs in both models is trained; its features are
    ranked by the change of their mean activation and tried by steering: what survives takes at least a fifth of the
    shift of the trait whose words changed most surely from the tuned model, and gives as much to the base, more than
    random directions do, while both stay coherent. `out` gets report.html, diff.json and the survivors as vectors.

    Args:
        base, tuned: open models of one architecture and tokenizer.
        vectors: known traits of the base, beside those of the library; their directions are taken for their traits.
        data: rows of conversations to read instead of the fixed texts; columns: those that are not named are found out.
        layer: the block whose features are looked for; the dictionary's, or at two thirds of the depth, when None.
        dictionary: how it is trained, or a safetensors or npz file with a decoder made elsewhere;
            dictionary_key: its name there, where several might be meant.
        n_features: how many that rose, and how many that fell, are described and tried.
        subjects: traits of the profile, the library's when None.
        force: replace an earlier report.

    Raises:
        ArgumentError: models of other shapes, torch is missing, a folder that cannot be written.

    Source: arXiv 2506.19823 (model diffing with sparse autoencoders, causal filter by steering); 2507.21509 (shift
    along persona vectors).
    """
    stage = progress or (lambda _: lambda done, total: None)
    folder = Path(out)
    check_folder(folder)
    if any((folder / name).exists() for name in ("diff.json", "report.html")) and not force:
        raise ArgumentError(f"{folder}: holds a report already; --force replaces it")
    check_alike(base, tuned)
    if base.unhooked:
        raise ArgumentError(f"{base.name} cannot be read: {base.unhooked}")
    il = round(DEPTH * (base.n_layer - 1)) if layer is None else base.check_layers([layer])[0]
    _check_block(il)
    given = None
    if isinstance(dictionary, (str, Path)):
        given = load_dictionary(dictionary, layer, n_embd=base.n_embd, key=dictionary_key)
    else:
        need("a sparse dictionary needs", "train", "torch")
    if given is not None and layer is None:
        il = base.check_layers([given[1]])[0]
        _check_block(il)
    for v in vectors:
        check_fits(v, base)
    directions = whole_states(vectors, base.n_layer)
    asked = [traits.get(n) for n in traits.names()] if subjects is None else list(subjects)
    own = {trait_of(v).name: trait_of(v) for v in vectors}
    asked = [*own.values(), *(t for t in asked if t.name not in own)]
    texts = make_texts(base, fixed_pairs() if data is None else _pairs(data, columns))
    recipe = dictionary if isinstance(dictionary, DictionaryRecipe) else DictionaryRecipe(seed=seed)
    n_tokens, fewest = len(token_places(texts)), 1 if given is not None else 2 * recipe.batch
    if n_tokens < fewest:
        raise ArgumentError(
            f"the texts have {n_tokens} tokens of answers behind the first 8: at least {fewest} are needed"
        )
    size = recipe.expansion * base.n_embd if given is None else len(given[0])
    check_dictionary_memory(size, base.n_embd, 2 * n_tokens, 0 if given is not None else recipe.batch)
    plan = {
        "method": METHOD, "threads": base.n_threads, "layer": il,
        "base": base.fingerprint, "tuned": tuned.fingerprint, "build": build_id(),
        "texts": digest([t.tokens for t in texts]), "traits": [t.as_dict() for t in asked], "seed": seed,
        "vectors": [digest(v.name, v.directions.tolist()) for v in vectors],
        "gpu_layers": [m.options.get("n_gpu_layers") for m in (base, tuned)],
    }  # fmt: skip
    with Work(folder / WORK, plan, restart=force) as work:
        order = np.random.default_rng(seed).permutation(len(texts))
        some = [texts[i] for i in sorted(order[:N_KL])]
        differences = _differences(work, base, tuned, some, stage("comparing predictions"))
        profile, at_base = _profile(work, base, tuned, asked, directions, stage)
        tried_by = _behaviours(profile, asked, base, tuned)
        rows = [_rows(work, name, m, texts, il, stage) for name, m in (("base", base), ("tuned", tuned))]
        learned = _dictionary(work, rows, given, recipe, base, stage("training the dictionary"))
        features = _features(base, texts, rows, learned, il, n_features, differences, at_base, directions)
        trait = tried_by[0].trait if tried_by else None
        if tried_by:
            features = _tried(work, base, tuned, features, il, *tried_by, seed, stage("trying features"))
        quality = _quality(work, base, tuned, trait, asked, stage("coherence and capability"))
        low, high = bootstrap_interval(differences.kl)
        found = Diff(
            base=_named(base),
            tuned=_named(tuned),
            layer=il,
            n_texts=len(texts),
            n_tokens=len(rows[0]),
            n_compared=len(some),
            kl=(float(differences.kl.mean()), low, high),
            sizes=differences.sizes,
            ranks=tuple(differences.rank(i) for i in range(base.n_layer)),
            early_tokens=tuple(through_unembedding(base, differences.early[[il]])[0]),
            profile=tuple(profile),
            trait=trait.name if trait else "",
            shift=float(np.mean([b.shift for b in tried_by])) if tried_by else None,
            features=tuple(features),
            unexplained=learned.unexplained,
            dead=learned.dead,
            n_features=learned.n_features,
            coherence=quality["coherence"],
            capability=quality["capability"],
            mean=differences.mean,
        )  # fmt: skip
        vectors_of: dict[str, PersonaVector] = {}
        if trait is not None:
            vectors_of = {f.name: survivor_vector(f, il, base, tuned, trait) for f in found.survivors}
        limits = high_readings(base, some, list(vectors_of.values()))
        vectors_of = {n: replace(v, thresholds=x) for (n, v), x in zip(vectors_of.items(), limits, strict=True)}
        write_diff(folder, found, vectors_of, mean_vector(differences, il, base))
        work.remove()
    return found


# ---- parts


def _check_block(il: int) -> None:
    if il == 0:
        raise ArgumentError("features of block 0 cannot be written as control vectors: choose a later layer")


def _named(model: Model) -> str:
    """The model's name, with those of its adapters."""
    adapters = [path.name for path, _ in model.adapters]
    return model.name + (f" with {', '.join(adapters)}" if adapters else "")


def _pairs(data: Any, columns: Columns | None) -> list[tuple[str, str]]:
    """(prompt, answer) of the first answer of each row."""
    source = open_data(data)
    layout = find_layout(first_rows(source, LOOKED_AT), columns)
    found = []
    for row in source.rows():
        try:
            messages = layout.conversation(row.value or {})
            at = answers(messages)[0]
        except RowError:
            continue
        asked = [m["content"] for m in messages[:at] if m["role"] == "user"]
        found.append((asked[-1], messages[at]["content"]))
    return found


def _differences(
    work: Work, base: Model, tuned: Model, texts: Sequence[Text], progress: Progress | None
) -> Differences:
    names = ("kl", "mean", "early", "per_text", "norms")

    def compute() -> tuple[dict[str, NDArray[Any]], Any]:
        found = find_differences(base, tuned, texts, progress)
        return {name: getattr(found, name) for name in names}, None

    return Differences(**work.part("differences", compute)[0])


def _profile(
    work: Work, base: Model, tuned: Model, asked: Sequence[Trait], vectors: Sequence[PersonaVector], stage: Stages
) -> tuple[list[Shift], Profile]:
    """The shifts along all traits, and the base's profile."""
    profiles = []
    for name, model in (("base", base), ("tuned", tuned)):

        def compute(name: str = name, model: Model = model) -> tuple[dict[str, NDArray[Any]], Any]:
            found = measure_profile(
                model, asked, n_questions=N_QUESTIONS, n_pairs=N_PAIRS, directions=name == "base", from_answers=True,
                progress=stage(f"profile of the {name}"),
            )  # fmt: skip
            arrays: dict[str, NDArray[Any]] = {"states": found.states, "norms": found.norms}
            arrays |= {f"log_odds/{n}": x for n, x in found.log_odds.items()}
            arrays |= {f"directions/{n}": x for n, x in found.directions.items()}
            return arrays, [list(found.log_odds), list(found.directions)]

        arrays, (words, directed) = work.part(f"profile-{name}", compute)
        profiles.append(
            Profile(
                {n: arrays[f"log_odds/{n}"] for n in words},
                arrays["states"],
                arrays["norms"],
                {n: arrays[f"directions/{n}"] for n in directed},
            )
        )
    before, after = profiles
    return sorted(compare_profiles(before, after, vectors, seed=0), key=lambda s: -_sureness(s)), before


def _sureness(shift: Shift) -> float:
    """The change of the words over the width of its interval."""
    if shift.delta is None or shift.low is None or shift.high is None or shift.high <= shift.low:
        return 0.0
    return abs(shift.delta) / (shift.high - shift.low)


def _tried(
    work: Work, base: Model, tuned: Model, features: Sequence[Feature], il: int, choosing: Behaviour,
    confirming: Behaviour, seed: int, progress: Progress | None,
) -> list[Feature]:  # fmt: skip
    """With their effects, which are kept."""

    def compute() -> tuple[dict[str, NDArray[Any]], Any]:
        found = try_features(base, tuned, features, il, choosing, confirming, seed=seed, progress=progress)
        return {}, {f.name: None if f.effect is None else asdict(f.effect) for f in found}

    rows = [f.direction if f.by_block is None else f.by_block for f in features]
    name = digest(
        [(f.name, f.sign, x.tolist()) for f, x in zip(features, rows, strict=True)], choosing.trait.as_dict()
    )[:12]
    effects = TypeAdapter(dict[str, Effect | None]).validate_python(work.part(f"effects-{name}", compute)[1])
    return [replace(f, effect=effects[f.name]) for f in features]


def _behaviours(
    profile: Sequence[Shift], asked: Sequence[Trait], base: Model, tuned: Model
) -> tuple[Behaviour, Behaviour] | None:
    """Of the trait whose words changed most surely, if any did: on half of its held-out questions, and on the rest."""
    changed = [s for s in profile if s.delta is not None and abs(s.delta) >= LEAST_WORDS]
    changed = [s for s in changed if not (s.low or 0.0) <= 0 <= (s.high or 0.0)]
    if not changed:
        return None
    trait = next(t for t in asked if t.name == changed[0].trait)
    first, rest = (
        Behaviour(trait, cells, *(cell_log_odds(m, cells, [None])[0] for m in (base, tuned)))
        for cells in halves(trait.evaluate_questions, trait.evaluation_pairs, N_PAIRS)
    )
    return first, rest


def _rows(work: Work, name: str, model: Model, texts: Sequence[Text], il: int, stage: Stages) -> NDArray[np.float32]:
    def compute() -> tuple[dict[str, NDArray[Any]], Any]:
        return {"rows": read_block(model, texts, il, stage(f"reading the {name}"))}, None

    rows: NDArray[np.float32] = work.part(f"block-{name}", compute)[0]["rows"]
    return rows


def _dictionary(
    work: Work, rows: Sequence[NDArray[np.float32]], given: Any, recipe: DictionaryRecipe, model: Model,
    progress: Progress | None,
) -> Dictionary:  # fmt: skip
    both = np.concatenate(rows)
    if given is not None:
        return imported_dictionary(given[0], both)

    def compute() -> tuple[dict[str, NDArray[Any]], Any]:
        gpu = model.options.get("n_gpu_layers", -1) != 0
        d = train_dictionary(both, recipe, threads=model.n_threads, gpu=gpu, progress=progress)
        arrays = {name: getattr(d, name) for name in ("encoder", "bias", "decoder", "center")}
        return arrays, {"scale": d.scale, "k": d.k, "unexplained": d.unexplained, "dead": d.dead}

    arrays, numbers = work.part(f"dictionary-{digest(vars(recipe))[:12]}", compute)
    return Dictionary(
        arrays["encoder"], arrays["bias"], arrays["decoder"], arrays["center"], float(numbers["scale"]),
        int(numbers["k"]), float(numbers["unexplained"]), float(numbers["dead"]),
    )  # fmt: skip


def _features(
    base: Model, texts: Sequence[Text], rows: Sequence[NDArray[np.float32]], learned: Dictionary,
    il: int, n: int, differences: Differences, at_base: Profile, vectors: Sequence[PersonaVector],
) -> list[Feature]:  # fmt: skip
    """The mean difference, and the dictionary's features that changed most, each described."""
    kept = without_outliers(rows[0]) & without_outliers(rows[1])
    places = token_places(texts)[kept]
    before, after = (r[kept] for r in rows)
    found, _ = rank_features(learned, before, after, n)
    moved = (after - before).mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(moved))
    if length > 0:
        unit = (moved / length).astype(np.float32)
        means = float((before @ unit).mean()), float((after @ unit).mean())
        found.insert(0, Feature(MEAN, unit, *means, by_block=differences.mean))
    known = {name: d[il].astype(np.float64) for name, d in at_base.directions.items() if np.isfinite(d[il]).all()}
    for v in vectors:
        if np.isfinite(v.directions[il]).all():
            known[trait_of(v).name] = v.directions[il].astype(np.float64)
    rows_of = np.array([f.direction for f in found], np.float32).reshape(-1, base.n_embd)
    tokens = through_unembedding(base, rows_of)
    out = []
    for f, likelier in zip(found, tokens, strict=True):
        side = after if f.sign > 0 else before
        activations = f.sign * (side @ f.direction) if f.rank == 0 else _activations(learned, f, side)
        out.append(describe(f, base, texts, places, activations, known, [t for t, _ in likelier]))
    return out


def _activations(d: Dictionary, feature: Feature, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n_tokens,) of one feature of the dictionary."""
    at = int(feature.name.rpartition(" ")[2])
    step = 4096
    parts = [d.encode(rows[i : i + step])[:, at] for i in range(0, len(rows), step)]
    return np.concatenate(parts) * np.float32(d.scale)


def _quality(
    work: Work, base: Model, tuned: Model, trait: Trait | None, asked: Sequence[Trait], progress: Progress
) -> dict[str, Any]:
    """How sound the tuned model's answers are beside the base's, and what both know."""

    def compute() -> tuple[dict[str, NDArray[Any]], Any]:
        shown = trait or next(t for t in asked if t.evaluate_questions)
        systems = [persona_systems(shown, (base, tuned))]
        (found,) = measure_coherence(tuned, shown.evaluate_questions[-6:], [None], systems=systems, judges=(base,))
        progress(1, 3)
        known = {}
        for k, (name, m) in enumerate((("base", base), ("tuned", tuned))):
            known[name] = float(capability(m, [None], n_items=N_ITEMS)[0])
            progress(2 + k, 3)
        return {}, {"coherence": found.coherence, "capability": known}

    plain: dict[str, Any] = work.part("quality", compute)[1]
    return plain


def mean_vector(differences: Differences, il: int, base: Model) -> PersonaVector | None:
    """The mean difference of every block that moved, recommended around block il; None where the models do not
    differ.
    """
    moved: NDArray[np.bool_] = np.isfinite(differences.mean).all(axis=1) & np.any(differences.mean, axis=1)
    if not moved[il]:
        return None
    data = np.where(moved[:, None], differences.mean, np.nan).astype(np.float32)
    provenance = {"method": "mean difference", **base.origin}
    layers = tuple(i for i in blocks_around(il, base.n_layer) if moved[i])
    return PersonaVector(data, layers, MEAN, norms=np.asarray(base.norms), provenance=provenance)


def survivor_vector(feature: Feature, il: int, base: Model, tuned: Model, trait: Trait) -> PersonaVector:
    """A feature as a vector that can be added and shipped; more of it is more of the feature."""
    assert feature.effect is not None
    provenance = {
        "method": "feature",
        "trait": trait.name,
        "texts": trait.as_dict(),
        "change": feature.change,
        "effect": asdict(feature.effect),
        "tuned": tuned.fingerprint,
        **base.origin,
    }
    vector = as_vector(
        feature, il, base.n_layer, strength=feature.effect.removed.dose, norms=np.asarray(base.norms),
        provenance=provenance,
    )  # fmt: skip
    return replace(vector, name=f"{feature.name} ({trait.name})")
