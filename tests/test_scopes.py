"""Which tokens an edit acts on.

A request reads the output of its edited block number by number before the edits and keeps it raw after them. An
addition of float32 numbers is exact, so that each token shows whether it was edited, without a tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import samples
from live_requests import basis, before_edits

import personasteer as ps
from personasteer.engine import Request, Sampling, Taps
from personasteer.prompts import Prompt
from personasteer.tiny_model import write_tiny_model

if TYPE_CHECKING:
    from conftest import Loaded

IL = 2
GREEDY = Sampling(temperature=0)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as reasoning models have it: what an earlier answer thought is left out
THINKS = CHATML.replace("m.content", "(m.content.split('</think>')[-1] if m.role == 'assistant' else m.content)")
OPENS = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")  # the answer begins with thinking


def opened(folder: Path, template: str | None, *, name: str = "model.gguf") -> ps.Model:
    return ps.Model(write_tiny_model(folder / name, chat_template=template), n_ctx=256, n_parallel=2, n_threads=2)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> ps.Model:
    return opened(tmp_path_factory.mktemp("chatml"), CHATML)


@pytest.fixture(scope="module")
def thinks(tmp_path_factory: pytest.TempPathFactory) -> ps.Model:
    return opened(tmp_path_factory.mktemp("thinks"), THINKS)


@pytest.fixture(scope="module")
def opens(tmp_path_factory: pytest.TempPathFactory) -> ps.Model:
    return opened(tmp_path_factory.mktemp("opens"), OPENS)


def vector(model: ps.Model, seed: int = 0) -> ps.PersonaVector:
    return samples.vector(n_layer=model.n_layer, n_embd=model.n_embd, layers=(IL,), seed=seed)


def add(model: ps.Model, **where: Any) -> ps.Add:
    return ps.Add(vector(model), 1.0, raw=True, **where)


def strengths(model: ps.Model, given: Prompt, *edits: Any, max_tokens: int = 0, grammar: str = "") -> tuple[Any, str]:
    """How much of the vector each token got, given and generated, and the generated text."""
    n = len(given.tokens)
    request = Request(
        given.tokens, given.n_prompt, ps.Steering(edits), max_tokens, GREEDY, raw=(0, n + max_tokens),
        reads=basis(model, IL), roles=given.roles, think_marks=given.think_marks, thinking=given.thinking,
        grammar=grammar, ignore_end=not grammar,
    )  # fmt: skip
    (result,) = model.run_requests([request], taps=Taps(raw_layers=(IL,)))
    h = before_edits(result)
    assert len(h) == n + len(result["tokens"])
    after, v = result["raw"][0, : len(h)], vector(model).directions[IL]

    def share(t: int) -> float:
        for exact in (0.0, 1.0):
            if np.array_equal(after[t], h[t] + np.float32(exact) * v):
                return exact
        return float((after[t] - h[t]) @ v / (v @ v))

    return np.array([share(t) for t in range(len(h))]), result["text"].decode("utf-8", "replace")


def edited(model: ps.Model, given: Prompt, *edits: Any, **options: Any) -> list[int]:
    found, _ = strengths(model, given, *edits, **options)
    assert set(found) <= {0.0, 1.0}
    return [int(t) for t in np.flatnonzero(found)]


def text_of(model: ps.Model, tokens: Sequence[int], at: Sequence[int]) -> str:
    """The text of the tokens at some places, "|" between those that are no neighbours."""
    gaps = ["|" if i and t != at[i - 1] + 1 else "" for i, t in enumerate(at)]
    return "".join(gap + model.detokenize([tokens[t]], special=True) for gap, t in zip(gaps, at, strict=True))


# ---- prompt and response

N, P = 12, 7
GIVEN: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [*range(12)]),
    ({"scope": "all"}, [*range(12)]),
    ({"scope": "prompt"}, [0, 1, 2, 3, 4, 5]),
    ({"scope": "response"}, [6, 7, 8, 9, 10, 11]),
    ({"scope": (0, 3, 11)}, [0, 3, 11]),
    ({"scope": [5, 5, 99]}, [5]),
    ({"scope": ()}, []),
    ({"start": 0}, [6, 7, 8, 9, 10, 11]),
    ({"start": 2}, [8, 9, 10, 11]),
    ({"stop": 3}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ({"start": -2, "stop": 1}, [4, 5, 6]),
    ({"start": 6}, []),
    ({"scope": "response", "stop": 2}, [6, 7]),
    ({"scope": "prompt", "start": -3}, [3, 4, 5]),
    ({"scope": "prompt", "start": 0}, []),
    ({"scope": (2, 8, 9), "start": 2, "stop": 3}, [8]),
]


@pytest.mark.parametrize(("where", "expected"), GIVEN, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_an_addition_acts_on_exactly_the_given_tokens_of_its_scope_and_schedule(
    chatml: ps.Model, where: dict[str, Any], expected: list[int]
) -> None:
    tokens = chatml.tokenize("the harbour was quiet", add_special=False)[:N]
    assert edited(chatml, Prompt(tokens, P), add(chatml, **where)) == expected


@pytest.mark.parametrize(
    ("where", "expected"),
    [({}, [*range(12)]), ({"scope": "prompt"}, [*range(12)]), ({"scope": "response"}, []), ({"start": 0}, []),
     ({"start": -2}, [10, 11]), ({"scope": (3,)}, [3])],
)  # fmt: skip
def test_all_tokens_of_a_plain_text_are_prompt(chatml: ps.Model, where: dict[str, Any], expected: list[int]) -> None:
    tokens = chatml.tokenize("the harbour was quiet", add_special=False)[:N]
    assert edited(chatml, Prompt(tokens, None), add(chatml, **where)) == expected


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, [*range(10)]),
        ({"scope": "prompt"}, [0, 1, 2]),
        ({"scope": "response"}, [3, 4, 5, 6, 7, 8, 9]),
        ({"scope": (0, 2)}, [0, 2]),
        ({"scope": (0, 5)}, [0]),  # positions are of given tokens
        ({"start": 1}, [4, 5, 6, 7, 8, 9]),
        ({"stop": 1}, [0, 1, 2, 3]),
        ({"stop": 4}, [0, 1, 2, 3, 4, 5, 6]),
        ({"start": 2, "stop": 4}, [5, 6]),
        ({"scope": "response", "start": 0, "stop": 3}, [3, 4, 5]),
        ({"scope": "prompt", "stop": 4}, [0, 1, 2]),
        ({"start": 6}, [9]),
        ({"start": 7}, []),
    ],
)
def test_an_addition_acts_on_exactly_the_generated_tokens_of_its_scope_and_schedule(
    chatml: ps.Model, where: dict[str, Any], expected: list[int]
) -> None:
    # 4 given tokens and 6 generated ones: the last given one is the response's first, j = 0
    tokens = chatml.tokenize("whale", add_special=False)[:4]
    assert edited(chatml, Prompt(tokens, 4), add(chatml, **where), max_tokens=6) == expected


def test_a_response_that_begins_within_the_given_text_goes_on_in_the_generated_one(chatml: ps.Model) -> None:
    tokens = chatml.tokenize("whale", add_special=False)[:6]
    assert edited(chatml, Prompt(tokens, 3), add(chatml, scope="response"), max_tokens=2) == [2, 3, 4, 5, 6, 7]
    assert edited(chatml, Prompt(tokens, 3), add(chatml, start=3, stop=5), max_tokens=4) == [5, 6]


def test_two_edits_of_one_request_each_keep_to_their_own_tokens(chatml: ps.Model) -> None:
    tokens = chatml.tokenize("whale", add_special=False)[:6]
    both = [add(chatml, scope="prompt"), add(chatml, start=2, stop=4), add(chatml, scope=(1,)) * 0.0]
    assert edited(chatml, Prompt(tokens, 4), *both, max_tokens=3) == [0, 1, 2, 5, 6]
    opposite = [add(chatml), add(chatml, scope="response") * -1.0]  # nothing is left of it in the response
    assert edited(chatml, Prompt(tokens, 4), *opposite, max_tokens=3) == [0, 1, 2]


@pytest.mark.parametrize("half_life", [1.0, 3.0, 0.5])
def test_a_half_life_halves_the_strength_every_so_many_tokens_of_the_response_and_leaves_the_prompt_whole(
    chatml: ps.Model, half_life: float
) -> None:
    tokens = chatml.tokenize("whale song", add_special=False)[:8]
    j = np.arange(-3, 10)  # four tokens of prompt, whose last is j = 0; four forced ones; five generated ones
    faded, _ = strengths(chatml, Prompt(tokens, 4), add(chatml, half_life=half_life), max_tokens=5)
    expected = 2.0 ** (-np.maximum(j, 0) / half_life)
    # the difference of two rows about as long as the vector, rounded to float32
    assert np.abs(faded - expected).max() < 1e-6
    response, _ = strengths(chatml, Prompt(tokens, 4), add(chatml, scope="response", half_life=half_life))
    assert np.abs(response - np.where(j < 0, 0, expected)[:8]).max() < 1e-6
    cut, _ = strengths(chatml, Prompt(tokens, 4), add(chatml, start=1, stop=3, half_life=half_life))
    assert np.abs(cut - np.where((j < 1) | (j > 2), 0, expected)[:8]).max() < 1e-6


# ---- roles

CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "how deep"},
    {"role": "assistant", "content": "very deep"},
    {"role": "user", "content": "user how cold"},
]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [("system", "be brief"), ("user", "how deep|user how cold"), ("assistant", "very deep")],
)
def test_a_role_is_the_contents_of_its_messages_without_the_templates_markup(
    chatml: ps.Model, scope: str, expected: str
) -> None:
    given = chatml._chat_prompt(CONVERSATION, roles=True)
    at = edited(chatml, given, add(chatml, scope=scope))
    assert text_of(chatml, given.tokens, at) == expected


def test_generated_text_is_the_assistants_and_nobody_elses(chatml: ps.Model) -> None:
    given = chatml._chat_prompt(CONVERSATION, roles=True)
    n = len(given.tokens)
    for scope, generated in (("assistant", [n, n + 1, n + 2]), ("user", []), ("system", [])):
        at = edited(chatml, given, add(chatml, scope=scope), max_tokens=3)
        assert [t for t in at if t >= n] == generated


def test_an_answer_that_is_given_is_the_assistants(chatml: ps.Model) -> None:
    given = chatml._pair(CONVERSATION, "so cold", roles=True)
    assert text_of(chatml, given.tokens, edited(chatml, given, add(chatml, scope="assistant"))) == "very deep|so cold"
    assert text_of(chatml, given.tokens, edited(chatml, given, add(chatml, scope="user"))) == "how deep|user how cold"


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("system", "You are a sailor."),
        ("user", "How deep is the harbour?|And how cold, user?"),
        ("assistant", "Twelve metres."),
    ],
)
def test_a_role_on_a_real_model_is_the_contents_of_its_messages(smollm2: Loaded, scope: str, expected: str) -> None:
    messages = [
        {"role": "system", "content": "You are a sailor."},
        {"role": "user", "content": "How deep is the harbour?"},
        {"role": "assistant", "content": "Twelve metres."},
        {"role": "user", "content": "And how cold, user?"},
    ]
    with ps.Model(smollm2.path, n_ctx=128, n_parallel=1, n_threads=2) as model:
        given = model._chat_prompt(messages, roles=True)
        assert text_of(model, given.tokens, edited(model, given, add(model, scope=scope))) == expected
        no_system = model._chat_prompt(messages[1:2], roles=True)  # the template then has a system message of its own
        assert "system" in model.detokenize(no_system.tokens, special=True)
        assert edited(model, no_system, add(model, scope="system")) == []


def test_a_role_scope_reaches_generation_through_the_model(chatml: ps.Model) -> None:
    # the shapes are the same, so that the texts differ by the steering alone
    strong = ps.Add(vector(chatml), 20.0, raw=True, layers=(0,))
    scopes = ("system", "user", "assistant", "all")
    steerings = [None, *(replace(strong, scope=scope) for scope in scopes)]
    texts = [chatml.chat(CONVERSATION, steer=steer, max_tokens=24, temperature=0) for steer in steerings]
    assert len(set(texts)) == 5


@pytest.mark.parametrize("scope", ["system", "user", "assistant", "thinking"])
def test_a_plain_text_has_no_roles(chatml: ps.Model, scope: str) -> None:
    edit = add(chatml, scope=scope)
    for call in (chatml.generate, lambda text, steer: chatml.logits([text], steer=steer)):
        with pytest.raises(ps.ArgumentError, match=f"'{scope}' needs messages"):
            call("the harbour", steer=edit)
    assert chatml.generate("the harbour", max_tokens=1, temperature=0) is not None


# ---- thinking


def test_a_template_without_a_thinking_block_says_so(chatml: ps.Model) -> None:
    with pytest.raises(ps.TemplateError, match="no thinking block"):
        chatml.chat("how deep", steer=add(chatml, scope="thinking"), max_tokens=1)


THOUGHTS: list[tuple[str, str, str]] = [  # text that is generated; what of it is thought in a closed, in an open block
    ("<think>ab</think>cd", "ab</think>", "<think>ab</think>"),
    ("ab</think>cd", "", "ab</think>"),
    ("abcd", "", "abcd"),
    ("a<think>b</think>c<think>d", "b</think>|d", "a<think>b</think>|d"),
    ("<think></think>c", "</think>", "<think></think>"),
    ("<thin<think>a</thin</think>k>b", "a</thin</think>", "<thin<think>a</thin</think>"),
]


@pytest.mark.parametrize(("text", "expected"), [(t, e) for t, e, _ in THOUGHTS])
def test_thinking_begins_behind_the_marker_that_the_model_writes_and_ends_with_the_one_that_closes(
    thinks: ps.Model, text: str, expected: str
) -> None:
    assert_thought(thinks, text, expected, inside=False)


@pytest.mark.parametrize(("text", "expected"), [(t, e) for t, _, e in THOUGHTS])
def test_thinking_begins_with_the_answer_where_the_template_opens_the_block(
    opens: ps.Model, text: str, expected: str
) -> None:
    assert_thought(opens, text, expected, inside=True)


def assert_thought(model: ps.Model, text: str, expected: str, *, inside: bool) -> None:
    given = model._chat_prompt("how deep", roles=True)
    assert given.thinking == inside
    amounts, written = strengths(
        model, given, add(model, scope="thinking"), max_tokens=len(text), grammar=f'root ::= "{text}"'
    )
    assert written == text  # every token of this model is one character
    n = len(given.tokens)
    assert text_of(model, given.tokens, np.flatnonzero(amounts[:n]).tolist()) == ("\n" if inside else "")
    at = np.flatnonzero(amounts[n:]).tolist()
    assert "".join(("|" if i and t != at[i - 1] + 1 else "") + text[t] for i, t in enumerate(at)) == expected


def test_thinking_and_a_schedule_hold_together(opens: ps.Model) -> None:
    given = opens._chat_prompt("how deep", roles=True)
    n, text = len(given.tokens), "abcdef</think>gh"
    grammar = f'root ::= "{text}"'
    found, _ = strengths(
        opens, given, add(opens, scope="thinking", start=3, stop=5), max_tokens=len(text), grammar=grammar
    )
    assert np.flatnonzero(found).tolist() == [n + 2, n + 3]  # j = 3 and 4, where the prompt's last token is j = 0
    late = add(opens, scope="thinking", start=9)
    found, _ = strengths(opens, given, late, max_tokens=len(text), grammar=grammar)
    assert np.flatnonzero(found).tolist() == [n + 8, n + 9, n + 10, n + 11, n + 12, n + 13]


def test_given_thinking_is_found_in_the_answer_and_not_in_what_the_user_writes(opens: ps.Model) -> None:
    messages = [
        {"role": "user", "content": "so <think>what</think>"},
        {"role": "assistant", "content": "<think>hm</think>so"},
        {"role": "user", "content": "why"},
    ]
    given = opens._chat_prompt(messages, roles=True)
    at = edited(opens, given, add(opens, scope="thinking"))
    assert text_of(opens, given.tokens, at) == "hm</think>|\n"
    with_answer = opens._pair(messages, "a</think>b", roles=True)
    at = edited(opens, with_answer, add(opens, scope="thinking"))
    # the answer begins with a space that the tokenizer added and that is no part of the text
    assert text_of(opens, with_answer.tokens, at) == "hm</think>|\n|a</think>"


def test_an_edit_of_the_rest_and_one_of_the_thinking_change_over_within_a_text(thinks: ps.Model) -> None:
    # the same vector on everything, taken back inside the block
    given = thinks._chat_prompt("how deep", roles=True)
    text = "a<think>b</think>c"
    both = [add(thinks), add(thinks, scope="thinking") * -1.0]
    amounts, _ = strengths(thinks, given, *both, max_tokens=len(text), grammar=f'root ::= "{text}"')
    outside = [*range(len(given.tokens) + 8), len(given.tokens) + 17]
    assert np.flatnonzero(amounts).tolist() == outside
