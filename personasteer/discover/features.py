"""Features that a fine-tune switched on or off: ranked, shown by their texts, tried by steering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.discover.dictionary import Dictionary
from personasteer.discover.texts import Text
from personasteer.engine import Progress
from personasteer.evaluate import Cell, capability, cell_log_odds, kl_on_neutral, measure_coherence
from personasteer.model import Model
from personasteer.progress import Meter
from personasteer.steering import Add
from personasteer.traits import Trait
from personasteer.vectors import PersonaVector

N_SNIPPETS = 6
AROUND = 10  # tokens on either side of a snippet's
DOSES = (0.1, 0.2, 0.3, 0.4)  # of the stream's norm
LEAST_EFFECT = 0.2  # share of the shift
LEAST_COHERENCE = 0.9
N_RANDOM = 8
N_COHERENCE = 6  # questions
N_ITEMS = 40  # of the capability check
N_TRIED = 8  # features whose coherence is measured: those with the largest effect
CAP_PERCENTILE = 99.0  # of the base's readings: where a cap on a raised feature lies


@dataclass(frozen=True)
class Snippet:
    """Where a feature is active: text before its token, the token, text behind; and how strongly."""

    before: str
    token: str
    behind: str
    activation: float


@dataclass(frozen=True)
class Effect:
    """What steering by a feature does, at one dose.

    Args:
        dose: rho, the added length as a share of m_il.
        removed: share of the behavioural shift that subtracting the change takes from the tuned model.
        induced: share of it that adding the change gives the base.
        chance: the largest of both, by size, over random directions at the same block and dose.
        coherence: of the tuned and of the base model, so steered; None where the effects were too small to try. Answers
            of the tuned one are as sound as either model finds them beside its own: they may have the style of both.
        kl: KL(unsteered || steered) of both on everyday answers, in nats per token; None as above.
        capability: share of multiple-choice items right of both, so steered; None of what does not survive.
        survives: both at least 0.2 and above chance, and both models at least 0.9 coherent.
    """

    dose: float
    removed: float
    induced: float
    chance: float
    coherence: tuple[float, float] | None = None
    kl: tuple[float, float] | None = None
    capability: tuple[float, float] | None = None
    survives: bool = False


@dataclass(frozen=True)
class Feature:
    """A direction of the stream that two models use differently.

    Args:
        name: "feature 12", or "mean difference".
        direction: (n_embd,), of length 1.
        base, tuned: mean activation in each model, in units of the stream.
        rank: among features by |tuned - base|, from 1; 0 of what is no feature of the dictionary.
        trait, cosine: the trait whose direction is nearest; tokens: those that it makes likelier.
        effect: at the best dose, None where there was no behaviour to try it by.
    """

    name: str
    direction: NDArray[np.float32]
    base: float
    tuned: float
    rank: int = 0
    trait: str = ""
    cosine: float = 0.0
    tokens: tuple[str, ...] = ()
    snippets: tuple[Snippet, ...] = ()
    effect: Effect | None = None

    @property
    def change(self) -> float:
        return self.tuned - self.base

    @property
    def sign(self) -> float:
        """1 where the fine-tune raised it, -1 where it suppressed it."""
        return 1.0 if self.change >= 0 else -1.0

    def as_dict(self) -> dict[str, Any]:
        """As plain data, without the direction."""
        plain = asdict(self)
        del plain["direction"]
        return plain | {"change": self.change}


def rank_features(
    d: Dictionary, base: NDArray[np.float32], tuned: NDArray[np.float32], n: int
) -> tuple[list[Feature], NDArray[np.float64]]:
    """The n features that rose most and the n that fell most, by the change of their mean activation on the same
    tokens; and the change of all, (n_features,), in units of the stream.

    Source: arXiv 2506.19823, section on model diffing.
    """
    means = [d.scale * d.mean_activations(rows) for rows in (base, tuned)]
    change = means[1] - means[0]
    order = np.argsort(-np.abs(change), kind="stable")
    rank = np.empty(len(order), int)
    rank[order] = np.arange(1, len(order) + 1)
    risen = [int(i) for i in np.argsort(-change, kind="stable")[:n] if change[i] > 0]
    fallen = [int(i) for i in np.argsort(change, kind="stable")[:n] if change[i] < 0]
    found = [
        Feature(f"feature {i}", d.decoder[i], float(means[0][i]), float(means[1][i]), int(rank[i]))
        for i in sorted({*risen, *fallen}, key=lambda i: int(rank[i]))
    ]
    return found, change


def describe(
    feature: Feature,
    model: Model,
    texts: Sequence[Text],
    places: NDArray[np.int64],
    activations: NDArray[np.float32],
    trait_directions: Mapping[str, NDArray[np.float64]],
    tokens: Sequence[str],
) -> Feature:
    """With the texts it is most active in (one place of each), the nearest trait and the tokens it makes likelier.

    activations: (n_tokens,) at `places`; trait_directions: (n_embd,) at the same block.
    """
    snippets: list[Snippet] = []
    seen: set[int] = set()
    for i in np.argsort(-activations, kind="stable"):
        which, t = (int(x) for x in places[i])
        if activations[i] <= 0 or len(snippets) == N_SNIPPETS:
            break
        if which in seen:
            continue
        seen.add(which)
        text = texts[which]
        begins = max(text.n_prompt, t - AROUND), t, t + 1, t + 1 + AROUND
        before, token, behind = (model.detokenize(text.tokens[a:b]) for a, b in pairwise(begins))
        snippets.append(Snippet(before, token, behind, float(activations[i])))
    near, cosine = "", 0.0
    for name, v in trait_directions.items():
        length = float(np.linalg.norm(v))
        c = float(v @ feature.direction) / length if length > 0 else 0.0
        if abs(c) > abs(cosine):
            near, cosine = name, c
    return replace(feature, snippets=tuple(snippets), trait=near, cosine=cosine, tokens=tuple(tokens))


# ---- trying them


@dataclass(frozen=True)
class Behaviour:
    """A shift that can be taken away: the trait's log-odds of both models on held-out cells, (n_cells,)."""

    trait: Trait
    cells: tuple[Cell, ...]
    base: NDArray[np.float64] = field(repr=False)
    tuned: NDArray[np.float64] = field(repr=False)

    @property
    def shift(self) -> float:
        return float((self.tuned - self.base).mean())


def as_vector(feature: Feature, il: int, n_layer: int, **more: Any) -> PersonaVector:
    """The feature as a vector of one block; more of it is more of the feature."""
    data = np.full((n_layer, len(feature.direction)), np.nan, np.float32)
    data[il] = feature.direction
    return PersonaVector(data, (il,), feature.name, **more)


def try_features(
    base: Model,
    tuned: Model,
    features: Sequence[Feature],
    il: int,
    behaviour: Behaviour,
    *,
    doses: Sequence[float] = DOSES,
    n_random: int = N_RANDOM,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Feature]:
    """Each feature with its effect at the best dose: the largest share removed among those that keep both models
    coherent.

    All steering is on the response. All are tried at one dose; those with the largest effects, and the random
    directions, at the others, too, and for coherence.
    """
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((n_random, base.n_embd)).astype(np.float32)
    controls = [Feature(f"random {i}", v / np.linalg.norm(v), 0.0, 1.0) for i, v in enumerate(noise)]
    meter = Meter(progress, 100)
    probe = doses[(len(doses) - 1) // 2]
    effects = _effects(base, tuned, features, controls, il, behaviour, [probe], meter.part(40))
    order = sorted(range(len(features)), key=lambda i: -min(effects[i][0].removed, effects[i][0].induced))
    strong = order[:N_TRIED]
    others = [dose for dose in doses if dose != probe]
    more = _effects(base, tuned, [features[i] for i in strong], controls, il, behaviour, others, meter.part(40))
    for i, found_more in zip(strong, more, strict=True):
        effects[i] = sorted([*effects[i], *found_more], key=lambda e: e.dose)
    tries = [(i, e) for i in strong for e in effects[i] if _strong(e)]
    judged = _judged(base, tuned, [(features[i], e) for i, e in tries], il, behaviour.trait, seed, meter.part(20))
    found = []
    for i, f in enumerate(features):
        own = [e for (k, _), e in zip(tries, judged, strict=True) if k == i]
        held = [e for e in own if e.survives] or own
        best = max(held, key=lambda e: e.removed) if held else max(effects[i], key=lambda e: min(e.removed, e.induced))
        if best.survives:
            known = [
                float(capability(m, [_steer(f, il, m.n_layer, sign * best.dose)], n_items=N_ITEMS)[0])
                for m, sign in ((tuned, -1.0), (base, 1.0))
            ]
            best = replace(best, capability=(known[0], known[1]))
        found.append(replace(f, effect=best))
    return found


def _effects(
    base: Model, tuned: Model, features: Sequence[Feature], controls: Sequence[Feature], il: int, b: Behaviour,
    doses: Sequence[float], progress: Progress | None,
) -> list[list[Effect]]:  # fmt: skip
    """[feature][dose], each with what the controls do at the same dose."""
    if not (features and doses):
        return [[] for _ in features]
    n, meter = len(features), Meter(progress, 2)
    removed = _shares(tuned, [*features, *controls], il, b, doses, -1.0, meter.part(1))
    induced = _shares(base, [*features, *controls], il, b, doses, 1.0, meter.part(1))
    by_chance = np.abs(np.concatenate([removed[n:], induced[n:]]))
    chance = by_chance.max(axis=0) if len(by_chance) else np.zeros(len(doses))
    return [
        [Effect(dose, float(removed[i, k]), float(induced[i, k]), float(chance[k])) for k, dose in enumerate(doses)]
        for i in range(n)
    ]


def _strong(e: Effect) -> bool:
    return min(e.removed, e.induced) >= max(LEAST_EFFECT, e.chance)


def _steer(feature: Feature, il: int, n_layer: int, strength: float) -> Add:
    return Add(as_vector(feature, il, n_layer, window=(-10.0, 10.0)), strength * feature.sign, scope="response")


def _shares(
    model: Model, features: Sequence[Feature], il: int, b: Behaviour, doses: Sequence[float], sign: float,
    progress: Progress | None,
) -> NDArray[np.float64]:  # fmt: skip
    """(n_features, n_doses) shares of the shift that steering takes away (sign -1, tuned) or makes (1, base)."""
    steers = [_steer(f, il, model.n_layer, sign * dose) for f in features for dose in doses]
    values = cell_log_odds(model, b.cells, steers, progress=progress).mean(axis=1)
    own = b.tuned if sign < 0 else b.base
    out: NDArray[np.float64] = (sign * (values - own.mean()) / b.shift).reshape(len(features), len(doses))
    return out


def _judged(
    base: Model, tuned: Model, tries: Sequence[tuple[Feature, Effect]], il: int, trait: Trait, seed: int,
    progress: Progress | None,
) -> list[Effect]:  # fmt: skip
    """The effects with the coherence and the KL of both models, so steered."""
    if not tries:
        return []
    questions = trait.evaluate_questions[-N_COHERENCE:]
    systems = [tuple(pair[0] for pair in trait.system[:1]) if base.takes_system else () for _ in tries]
    less = [_steer(f, il, base.n_layer, -e.dose) for f, e in tries]
    more = [_steer(f, il, base.n_layer, e.dose) for f, e in tries]
    meter = Meter(progress, 4)
    by_base, by_tuned, of_base = (
        measure_coherence(m, questions, steers, systems=systems, seed=seed, judge=judge, progress=meter.part(1))
        for m, steers, judge in ((tuned, less, base), (tuned, less, None), (base, more, None))
    )
    kl = kl_on_neutral(tuned, less, progress=meter.part(1)), kl_on_neutral(base, more)
    found = []
    for k, (_, e) in enumerate(tries):
        sound = max(by_base[k].coherence, by_tuned[k].coherence), of_base[k].coherence
        apart = float(kl[0][k]), float(kl[1][k])
        found.append(replace(e, coherence=sound, kl=apart, survives=min(sound) >= LEAST_COHERENCE))
    return found
