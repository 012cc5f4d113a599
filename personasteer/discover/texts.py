"""Fixed texts that two models read: answers in many characters, and sober ones about everyday things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from personasteer import traits
from personasteer.conversations import benign_domains, benign_rows
from personasteer.errors import ArgumentError
from personasteer.model import Model

N_PAIRS = 6  # of each trait's continuation pairs, both sides
PER_DOMAIN = 20  # sober answers of each domain
LONGEST = 48  # tokens of an answer


@dataclass(frozen=True)
class Text:
    """A prompt with an answer as tokens, the same for both models; n_prompt: tokens of the prompt."""

    tokens: tuple[int, ...]
    n_prompt: int

    @property
    def n_answer(self) -> int:
        return len(self.tokens) - self.n_prompt


def fixed_pairs(n_pairs: int = N_PAIRS, per_domain: int = PER_DOMAIN) -> list[tuple[str, str]]:
    """(question, answer): continuations of all traits of the library, both sides, as answers to questions that they are
    derived on; and shipped benign rows. No held-out question is among them.
    """
    pairs = []
    for name in traits.names():
        trait = traits.get(name)
        questions = trait.derive_questions
        for i, both in enumerate(trait.continuations[:n_pairs]):
            pairs += [(questions[i % len(questions)], answer) for answer in both]
    for domain in benign_domains():
        pairs += [(row["prompt"], row["response"]) for row in benign_rows([domain])[:per_domain]]
    return pairs


def make_texts(model: Model, pairs: Sequence[tuple[str, str]], longest: int = LONGEST) -> list[Text]:
    """As the model's template renders them, answers of one token left out, long ones cut. Raises ArgumentError where
    none is left.
    """
    found: dict[Text, None] = {}
    for question, answer in pairs:
        tokens, n_prompt = model.pair_tokens(question, answer)
        text = Text(tuple(tokens[: n_prompt + longest]), n_prompt)
        if 0 < n_prompt < len(text.tokens) - 1 and len(text.tokens) <= model.n_ctx:
            found[text] = None
    if not found:
        raise ArgumentError("there is no text with a prompt and an answer to compare the models on")
    return list(found)
