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
from personasteer.engine import Progress, Request
from personasteer.evaluate import (
    SOUND,
    Cell,
    capability,
    cell_log_odds,
    kl_on_neutral,
    measure_coherence,
    persona_systems,
)
from personasteer.model import Model
from personasteer.progress import Meter
from personasteer.steering import Add
from personasteer.traits import Trait
from personasteer.vectors import PersonaVector

N_SNIPPETS = 6
AROUND = 10  # tokens on either side of a snippet's
DOSES = (0.1, 0.2, 0.25, 0.3, 0.4)  # of the stream's norm, over all blocks
LEAST_EFFECT = 0.2  # share of the shift
MOST_SHARE = 1.5  # a dose that does more is too large
N_RANDOM = 8
N_COHERENCE = 8  # questions
N_ITEMS = 40  # of the capability check
N_TRIED = 5  # features whose coherence is measured: those with the largest effect
CAP_PERCENTILE = 99.0  # of the base's readings: where a cap on a raised feature lies


@dataclass(frozen=True)
class Snippet:
    """Where a feature is active: text before its token, the token, text behind; and how strongly."""

    before: str
    token: str
    behind: str
    activation: float


@dataclass(frozen=True)
class Trial:
    """One direction at one dose in one model: taken away from the tuned one (sign -1) or added to the base (1).

    share: of the behavioural shift that it removes or makes; chance: the largest by size over random directions at the
    same blocks and dose. coherence: of the answers, each token judged by what both models say on average: they lie
    between the two styles. kl: KL(unsteered || steered) on everyday answers, in nats per token. None where the share
    was too small to try.
    """

    sign: float
    dose: float
    share: float
    chance: float
    coherence: float | None = None
    kl: float | None = None

    @property
    def strong(self) -> bool:
        return self.share >= max(LEAST_EFFECT, self.chance)

    @property
    def holds(self) -> bool:
        return self.strong and (self.coherence or 0.0) >= SOUND


@dataclass(frozen=True)
class Effect:
    """What steering by a feature does, each way at its best dose.

    Args:
        removed: from the tuned model; induced: in the base. Of what survives, the shares are on questions that did not
            choose the feature and the doses.
        capability: share of multiple-choice items right of both, so steered; None of what does not survive.
        survives: both shares at least 0.2 and above chance, and both models at least 0.9 coherent.
    """

    removed: Trial
    induced: Trial
    capability: tuple[float, float] | None = None
    survives: bool = False


@dataclass(frozen=True)
class Feature:
    """A direction of the stream that two models use differently.

    Args:
        name: "feature 12", or "mean difference".
        direction: (n_embd,), of length 1; by_block: (n_layer, n_embd) where it is another at each block.
        base, tuned: mean activation in each model, in units of the stream.
        rank: among features by |tuned - base|, from 1; 0 of what is no feature of the dictionary.
        trait, cosine: the trait whose direction is nearest; tokens: those that it makes likelier; snippets: where it is
            most active.
        effect: at the best dose, None where there was no behaviour to try it by.
    """

    name: str
    direction: NDArray[np.float32]
    base: float
    tuned: float
    rank: int = 0
    by_block: NDArray[np.float32] | None = None
    trait: str = ""
    cosine: float = 0.0
    tokens: tuple[str, ...] = ()
    snippets: tuple[Snippet, ...] = ()
    effect: Effect | None = None

    @property
    def change(self) -> float:
        """tuned - base, in units of the stream: above 0 the fine-tune uses it more."""
        return self.tuned - self.base

    @property
    def sign(self) -> float:
        """1 where the fine-tune raised it, -1 where it suppressed it."""
        return 1.0 if self.change >= 0 else -1.0

    def as_dict(self) -> dict[str, Any]:
        """As plain data, without the directions."""
        plain = asdict(self)
        del plain["direction"], plain["by_block"]
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


def high_readings(base: Model, texts: Sequence[Text], vectors: Sequence[PersonaVector]) -> NDArray[np.float32]:
    """(n_vectors, n_layer) the 99th percentile of the base's readings <h, v-hat> over answers, at each vector's layers:
    where `Cap` holds what a fine-tune raised.
    """
    limits = np.full((len(vectors), base.n_layer), np.nan, np.float32)
    if not vectors:
        return limits
    reads = tuple({il: v.direction(il) / np.linalg.norm(v.direction(il)) for il in v.layers} for v in vectors)
    requests = [Request(t.tokens, t.n_prompt, outputs=(0, len(t.tokens)), reads=reads) for t in texts]
    found = [r["readings"][t.n_prompt :] for r, t in zip(base.run_alone(requests), texts, strict=True)]
    of_answers = np.concatenate(found)  # (n_tokens, blocks that are read, n_vectors)
    place = {il: i for i, il in enumerate(sorted({il for v in vectors for il in v.layers}))}
    for k, v in enumerate(vectors):
        for il in v.layers:
            limits[k, il] = np.percentile(of_answers[:, place[il], k], CAP_PERCENTILE)
    return limits


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


def blocks_around(il: int, n_layer: int) -> tuple[int, ...]:
    """Where a feature of block il is steered: a third of the depth, in whose middle it is, without the ends.

    A dose at one block leaves the model incoherent before it takes a shift away; the blocks above make it again.
    """
    around = n_layer // 6
    return tuple(i for i in range(il - around, il + around + 1) if i == il or 0 < i < n_layer - 1)


def as_vector(feature: Feature, il: int, n_layer: int, **more: Any) -> PersonaVector:
    """The feature as a vector of the blocks around il, where it has a direction; more of it is more of the feature."""
    data = np.full((n_layer, len(feature.direction)), np.nan, np.float32)
    for i in blocks_around(il, n_layer):
        row = feature.direction if feature.by_block is None else feature.by_block[i]
        if np.isfinite(row).all() and row.any():
            data[i] = row
    layers = np.flatnonzero(np.isfinite(data).all(axis=1))
    return PersonaVector(data, tuple(int(i) for i in layers), feature.name, **more)


def try_features(
    base: Model,
    tuned: Model,
    features: Sequence[Feature],
    il: int,
    choosing: Behaviour,
    confirming: Behaviour,
    *,
    doses: Sequence[float] = DOSES,
    n_random: int = N_RANDOM,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Feature]:
    """Each feature with its effect, both ways at the best dose: of those that keep the model coherent, where the share
    is nearest to all of the shift.

    All steering is on the response. All are tried at one dose; those with the largest effects, and the random
    directions, at the others, too, and for coherence.

    Args:
        choosing: by which features and doses are chosen; confirming: on other questions, of which the effects of what
            survives are told.
    """
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((n_random, base.n_embd)).astype(np.float32)
    controls = [Feature(f"random {i}", v / np.linalg.norm(v), 0.0, 1.0) for i, v in enumerate(noise)]
    sides = ((tuned, -1.0), (base, 1.0))
    meter = Meter(progress, 100)

    def trials(
        model: Model, sign: float, tries: Sequence[tuple[int, float]], cells: Behaviour, share: int
    ) -> list[Trial]:
        asked = [(features[i], dose) for i, dose in tries]
        return _trials(model, sign, asked, controls, il, cells, meter.part(share))

    probe = doses[(len(doses) - 1) // 2]
    first = [trials(m, sign, [(i, probe) for i in range(len(features))], choosing, 10) for m, sign in sides]
    order = sorted(range(len(features)), key=lambda i: -min(side[i].share for side in first))
    strong = sorted(order[:N_TRIED])
    others = [(i, dose) for i in strong for dose in doses if dose != probe]
    best: list[list[Trial]] = []
    for found, (m, sign) in zip(first, sides, strict=True):
        more = trials(m, sign, others, choosing, 15)
        tries = [(i, t) for (i, _), t in zip(others, more, strict=True)] + [(i, found[i]) for i in strong]
        tries = [(i, t) for i, t in tries if t.strong and t.share <= MOST_SHARE]
        asked = [(features[i], t) for i, t in tries]
        judged = _judged(m, (base, tuned), asked, il, choosing.trait, seed, meter.part(15))
        of_feature: dict[int, list[Trial]] = {}
        for (i, _), t in zip(tries, judged, strict=True):
            of_feature.setdefault(i, []).append(t)
        best.append([_nearest(of_feature.get(i, [t])) for i, t in enumerate(found)])
    held = [i for i, both in enumerate(zip(*best, strict=True)) if all(t.holds for t in both)]
    for mine, (m, sign) in zip(best, sides, strict=True):
        again = trials(m, sign, [(i, mine[i].dose) for i in held], confirming, 8)
        for i, t in zip(held, again, strict=True):
            mine[i] = replace(mine[i], share=t.share, chance=t.chance)
    held = [i for i in held if all(mine[i].holds for mine in best)]
    known = [
        capability(m, [_steer(features[i], il, m.n_layer, sign * mine[i].dose) for i in held], n_items=N_ITEMS)
        for mine, (m, sign) in zip(best, sides, strict=True)
        if held
    ]
    capable = {i: (float(known[0][k]), float(known[1][k])) for k, i in enumerate(held)}
    return [
        replace(f, effect=Effect(removed, induced, capable.get(i), i in capable))
        for i, (f, removed, induced) in enumerate(zip(features, *best, strict=True))
    ]


def _nearest(trials: Sequence[Trial]) -> Trial:
    """Of those that hold, or of all, the one whose share is nearest to all of the shift."""
    return min([t for t in trials if t.holds] or trials, key=lambda t: abs(1 - t.share))


def _trials(
    model: Model, sign: float, tries: Sequence[tuple[Feature, float]], controls: Sequence[Feature], il: int,
    b: Behaviour, progress: Progress | None,
) -> list[Trial]:  # fmt: skip
    """Of features at doses, each with what the controls do at the same dose."""
    if not tries:
        return []
    doses = sorted({dose for _, dose in tries})
    steered = [*tries, *((c, dose) for dose in doses for c in controls)]
    steers = [_steer(f, il, model.n_layer, sign * dose) for f, dose in steered]
    values = cell_log_odds(model, b.cells, steers, progress=progress).mean(axis=1)
    shares = sign * (values - (b.tuned if sign < 0 else b.base).mean()) / b.shift
    by_chance = np.abs(shares[len(tries) :]).reshape(len(doses), len(controls)).max(axis=1, initial=0.0)
    chance = dict(zip(doses, by_chance.tolist(), strict=True))
    return [Trial(sign, dose, float(shares[k]), chance[dose]) for k, (_, dose) in enumerate(tries)]


def _steer(feature: Feature, il: int, n_layer: int, strength: float) -> Add:
    return Add(as_vector(feature, il, n_layer, window=(-10.0, 10.0)), strength * feature.sign, scope="response")


def _judged(
    model: Model, judges: tuple[Model, Model], tries: Sequence[tuple[Feature, Trial]], il: int, trait: Trait, seed: int,
    progress: Progress | None,
) -> list[Trial]:  # fmt: skip
    """The trials with the coherence and the KL of the model, so steered."""
    if not tries:
        return []
    systems = [persona_systems(trait, judges)] * len(tries)
    steers = [_steer(f, il, model.n_layer, t.sign * t.dose) for f, t in tries]
    questions = trait.evaluate_questions[-N_COHERENCE:]
    meter = Meter(progress, 4)
    sound = measure_coherence(
        model, questions, steers, systems=systems, seed=seed, judges=judges, progress=meter.part(3)
    )
    kl = kl_on_neutral(model, steers, progress=meter.part(1))
    return [replace(t, coherence=c.coherence, kl=float(x)) for (_, t), c, x in zip(tries, sound, kl, strict=True)]
