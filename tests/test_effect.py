"""Derivation on the bundled model with the defaults: reproducible, and it steers where controls do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personasteer import Model, PersonaVector, derive, traits
from personasteer.demo import STRENGTHS
from personasteer.evaluate import log_odds, random_vectors

TRAIT = traits.find("pessimistic")


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Iterator[Model]:
    with Model(smollm2_path, n_ctx=512, n_parallel=16) as m:
        yield m


@pytest.fixture(scope="module")
def vector(model: Model) -> PersonaVector:
    return derive(model, TRAIT, seed=0)


def test_the_same_seed_gives_the_same_bytes_whatever_ran_before(
    model: Model, smollm2_path: Path, tmp_path: Path
) -> None:
    # not calibrated: the sweep's seconds are spent once, in the vector of the other tests
    few: dict[str, Any] = {"seed": 5, "n_questions": 2, "max_tokens": 16, "calibrated": False}
    derive(model, "pirate", **few).save(tmp_path / "first.gguf")
    model.chat("Something else in between.", max_tokens=5)
    derive(model, "pirate", **few).save(tmp_path / "again.gguf")
    with Model(smollm2_path, n_ctx=512, n_parallel=16) as another:
        derive(another, "pirate", **few).save(tmp_path / "another.gguf")
    first = (tmp_path / "first.gguf").read_bytes()
    assert first == (tmp_path / "again.gguf").read_bytes()
    assert first == (tmp_path / "another.gguf").read_bytes()


def test_another_seed_gives_nearly_the_same_directions(model: Model, vector: PersonaVector) -> None:
    other = derive(model, TRAIT, seed=1, calibrated=False)
    assert not np.array_equal(other.directions, vector.directions)
    for layers in (vector.layers, other.layers):
        assert (vector.cosine(other)[list(layers)] > 0.9).all()


def test_more_strength_means_more_of_the_trait_and_random_vectors_do_not(model: Model, vector: PersonaVector) -> None:
    controls = random_vectors(vector, 20, seed=0)
    edits = [vector * s for s in STRENGTHS] + [c * s for c in controls for s in (STRENGTHS[0], STRENGTHS[-1])]
    odds = log_odds(model, TRAIT, [replace(e, scope="response") for e in edits], n_questions=5, n_pairs=3)
    means = odds.mean((1, 2))
    dose, random = means[: len(STRENGTHS)], means[len(STRENGTHS) :]
    assert (np.diff(dose) > 0).all(), dose
    zero = dose[STRENGTHS.index(0.0)]
    limit = np.quantile(np.abs(random - zero), 0.95)
    assert dose[0] - zero < -limit, (dose, limit)
    assert dose[-1] - zero > limit, (dose, limit)
