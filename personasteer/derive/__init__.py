"""Deriving persona vectors: elicit, contrast, choose layers."""

from __future__ import annotations

from collections.abc import Sequence

from personasteer.derive.contrast import (
    Samples,
    contrast,
    difference_of_means,
    prompts_hash,
    vector_from_samples,
)
from personasteer.derive.elicit import Elicited, elicit
from personasteer.engine import Progress
from personasteer.model import Model
from personasteer.traits import Trait, find
from personasteer.vectors import PersonaVector

__all__ = ["Elicited", "Samples", "contrast", "derive", "difference_of_means", "elicit", "from_elicited"]


def derive(
    model: Model,
    trait: str | Trait,
    *,
    n_questions: int | None = None,
    max_tokens: int = 40,
    temperature: float = 0.2,
    seed: int | None = None,
    layers: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> PersonaVector:
    """A trait's persona vector: v_il = mean response activation under prompts for the trait - under prompts against.

    The model answers the trait's questions under each of its contrastive system prompts; block outputs are averaged
    over the answer's tokens (t >= P), then over answers. The direction at the last prompt token comes along, for
    monitoring. The same seed, file, build and number of threads give the same vector, byte for byte.

    Args:
        trait: a name of the library (`personasteer traits`), the path of a .toml file, or a Trait.
        n_questions: questions per system prompt, drawn by the seed; all of the trait's when None.
        max_tokens: length of an answer, at most.
        temperature: of sampling the answers; low, so that few of them give a direction that another seed repeats.
        seed: of sampling; the model's when None.
        layers: recommended blocks to steer at; chosen by held-out separation when None.
        progress: called with (done, total) answers.

    Raises:
        TraitError: unknown trait. TemplateError: no chat template or no system role. ElicitationError: no answers.

    Source: arXiv 2507.21509, section 2.2.
    """
    trait = find(trait) if isinstance(trait, str) else trait
    seed = model.seed if seed is None else seed
    if layers is not None:
        model.check_layers(layers)  # before the work
    found = elicit(
        model,
        trait,
        n_questions=n_questions,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    return from_elicited(model, trait, found, layers=layers)


def from_elicited(
    model: Model,
    trait: Trait,
    found: Elicited,
    *,
    layers: Sequence[int] | None = None,
) -> PersonaVector:
    """The vector of answers that `elicit` has gathered."""
    return vector_from_samples(
        model,
        found.responses,
        name=trait.name,
        layers=layers,
        last_prompt=difference_of_means(found.last_prompt),
        provenance={
            "trait": trait.name,
            "pool": "response mean",
            "prompts_sha256": prompts_hash(trait.system, trait.derive_questions),
            **found.options,
        },
    )
