"""What an answer of a session says: text under a grammar, log-probabilities, readings; and that seeds repeat it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import samples
from live_requests import steerable, vector_for

import personasteer as ps
from personasteer import engine
from personasteer.engine import Request, Sampling, Taps

if TYPE_CHECKING:
    from conftest import Loaded

PROMPT = "the harbour was quiet in the morning"
WILD: dict[str, Any] = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
STRONG = ps.Add(samples.vector(seed=1), 0.4)


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Iterator[ps.Model]:
    with ps.Model(tiny_path, n_ctx=256, n_parallel=4, n_threads=2) as opened:
        yield opened


def answer(model: ps.Model, **options: Any) -> ps.Answer:
    with model.session(reuse_cache=False) as session:
        return session.submit(**{"prompt": PROMPT, "max_tokens": 30, "temperature": 0, **options}).result()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


# ---- grammar and schema

GRAMMARS = [
    ('root ::= "yes" | "no"', r"yes|no"),
    ("root ::= [a-f]{4} ([0-9] | [x-z])", r"[a-f]{4}[0-9x-z]"),
    ('root ::= item ("," item){1,2}\nitem ::= "é"+ | "日本"', r"(é+|日本)(,(é+|日本)){1,2}"),
    ('root ::= "\\"" [!#-Z]{0,5} "\\""', r'"[!#-Z]{0,5}"'),
]


@pytest.mark.parametrize(("grammar", "pattern"), GRAMMARS, ids=range(len(GRAMMARS)))
@pytest.mark.parametrize("steer", [None, STRONG], ids=["unsteered", "steered"])
@pytest.mark.parametrize("options", [{}, WILD, {"repeat_penalty": 2.0}], ids=["greedy", "wild", "penalty"])
def test_the_text_matches_the_grammar(
    model: ps.Model, grammar: str, pattern: str, steer: Any, options: dict[str, Any]
) -> None:
    with model.session(reuse_cache=False) as session:
        streams = [
            session.submit(prompt=PROMPT, grammar=grammar, steer=steer, seed=seed, max_tokens=200,
                           **{"temperature": 0, **options})
            for seed in range(3)
        ]  # fmt: skip
        for stream in streams:
            result = stream.result()
            if result.finish == "stop":  # else it repeats "é" until the tokens are used up
                assert re.fullmatch(pattern, result.text), result.text
            else:
                assert "+" in grammar
                assert set(result.text.rstrip("\ufffd")) <= set("é日本,")


SCHEMAS: list[tuple[dict[str, Any], Any]] = [
    (
        {
            "type": "object",
            "properties": {"mood": {"enum": ["calm", "angry"]}, "score": {"type": "boolean"}},
            "required": ["mood", "score"],
            "additionalProperties": False,
        },
        lambda v: set(v) == {"mood", "score"} and v["mood"] in ("calm", "angry") and isinstance(v["score"], bool),
    ),
    (
        {"type": "array", "items": {"type": "string", "pattern": "^[a-c]{2}$"}, "minItems": 2, "maxItems": 3},
        lambda v: 2 <= len(v) <= 3 and all(re.fullmatch("[a-c]{2}", x) for x in v),
    ),
    ({"type": "integer"}, lambda v: isinstance(v, int)),
]


@pytest.mark.parametrize(("schema", "valid"), SCHEMAS, ids=["object", "array", "integer"])
@pytest.mark.parametrize("steer", [None, STRONG], ids=["unsteered", "steered"])
def test_the_text_is_json_of_the_schema(model: ps.Model, schema: dict[str, Any], valid: Any, steer: Any) -> None:
    texts = []
    with model.session() as session:
        streams = [
            session.submit("how", json_schema=as_given, steer=steer, seed=seed, max_tokens=230, **options)
            for seed, options in enumerate([{"temperature": 0}, WILD, WILD, {"temperature": 0.7}])
            for as_given in (schema, json.dumps(schema))
        ]
        for stream in streams:
            result = stream.result()
            assert result.finish == "stop"
            assert valid(json.loads(result.text)), result.text
            texts.append(result.text)
    assert texts[0::2] == texts[1::2]


def test_what_a_schema_asks_for_and_the_grammar_does_not_enforce_is_named(
    model: ps.Model, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "personasteer"):
        answer(model, json_schema=SCHEMAS[0][0])
        answer(model, json_schema={"type": "object", "properties": {"minimum": {"const": {"not": 1}}}})
        assert caplog.text == ""
        limits = {"type": "integer", "minimum": 3, "maximum": 5}
        assert json.loads(answer(model, json_schema={"type": "array", "items": limits, "maxItems": 1}).text) is not None
    assert "maximum, minimum not enforced" in caplog.text


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 10**8}, {"type": "array", "items": {"type": "integer"}, "minItems": 1e9},
        {"type": "string", "pattern": "^a{1,99999999}$"},
        {"type": "object", "properties": {"a": {"anyOf": [{"type": "string", "minLength": 2001}]}}},
    ],
)  # fmt: skip
def test_counts_that_would_fill_the_memory_are_refused(model: ps.Model, schema: dict[str, Any]) -> None:
    with pytest.raises(ps.ArgumentError, match="is beyond 2000"):
        model.generate("x", json_schema=schema)


def test_chat_takes_a_schema_too(model: ps.Model) -> None:
    schema, valid = SCHEMAS[0]
    assert valid(json.loads(model.chat("how", json_schema=schema, max_tokens=230, seed=5)))
    assert model.generate("how", grammar='root ::= "ok"') == "ok"


def test_a_grammar_leaves_the_most_probable_of_the_allowed_tokens(model: ps.Model) -> None:
    (free,) = model.logits([PROMPT])
    digits = [model.tokenize(str(d), add_special=False)[-1] for d in range(10)]
    (best,) = {str(d) for d, token in enumerate(digits) if free[-1, token] == free[-1, digits].max()}
    assert answer(model, grammar="root ::= [0-9]").text == best


# ---- log-probabilities


@pytest.mark.parametrize("steer", [None, STRONG], ids=["unsteered", "steered"])
@pytest.mark.parametrize("options", [{"temperature": 0}, {**WILD, "repeat_penalty": 1.5}], ids=["greedy", "wild"])
def test_log_probabilities_are_the_log_softmax_of_the_steered_models_logits_whatever_the_sampler_does(
    loaded: Loaded, options: dict[str, Any], steer: Any
) -> None:
    n, n_new, n_top = 12, 6, 5
    steering = ps.Steering() if steer is None else ps.Steering([ps.Add(vector_for(loaded, 1), 0.4)])
    session, tokens = loaded.session(n_outputs=1), loaded.tokens(n)
    wanted = Request(tokens, n, steering, n_new, Sampling(**{**WILD, **options}), n_logprobs=n_top, ignore_end=True)
    (result,) = engine.run(session, steerable(loaded), [wanted])
    # the same text, given: with one output row a decode it takes the same decodes
    whole = tokens + result["tokens"]
    given = Request(whole, n, steering, outputs=(n - 1, n + n_new), keep_logits=True)
    logits = engine.run(session, steerable(loaded), [given])[0]["logits"][:-1]
    expected = log_softmax(logits)

    # sums of exponentials in float32 parts: 3e-7 each
    chosen = expected[np.arange(n_new), result["tokens"]]
    assert np.abs(np.array(result["logprobs"]) - chosen).max() < 2e-6
    for step, top in enumerate(result["top_logprobs"]):
        best = sorted(range(len(expected[step])), key=lambda t: (-logits[step, t], t))[:n_top]
        assert [token for token, _ in top] == best
        assert np.abs(np.array([p for _, p in top]) - expected[step, best]).max() < 2e-6
    if options["temperature"] == 0:
        assert result["tokens"] == [top[0][0] for top in result["top_logprobs"]]


def test_an_answer_has_log_probabilities_where_they_are_asked_for_and_as_many_as_there_are_tokens(
    model: ps.Model,
) -> None:
    without = answer(model)
    assert without.logprobs is None
    assert without.top_logprobs is None
    for n in (0, 3, 100):
        with_them = answer(model, logprobs=n)
        assert with_them.text == without.text
        assert with_them.logprobs is not None
        assert with_them.top_logprobs is not None
        assert [len(top) for top in with_them.top_logprobs] == [n] * len(with_them.tokens)
        assert len(with_them.logprobs) == len(with_them.tokens) == 30
    assert np.exp(with_them.logprobs).sum() > 0
    everything = [sum(np.exp(p) for _, p in top) for top in with_them.top_logprobs]
    assert all(0.5 < total <= 1 + 1e-6 for total in everything)  # 100 of 286 tokens


# ---- seeds


def test_the_same_seed_repeats_a_text_in_any_session_and_another_seed_gives_another(model: ps.Model) -> None:
    texts = [answer(model, seed=seed, **WILD).text for seed in (1, 1, 2, 3, 4, -1)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 5
    assert answer(model, **WILD).text == answer(model, seed=model.seed, **WILD).text


def test_requests_of_one_seed_draw_alike_in_a_session_and_apart_in_a_list(model: ps.Model) -> None:
    with model.session(reuse_cache=False, n_parallel=1) as session:  # one at a time: the same decodes
        one, two = (session.submit(prompt=PROMPT, max_tokens=20, seed=4, **WILD).result().text for _ in range(2))
    assert one == two
    one, two = model.generate_batch([PROMPT] * 2, max_tokens=20, seed=4, **WILD)
    assert one != two


def test_a_seed_repeats_a_steered_text_under_a_grammar(model: ps.Model) -> None:
    options = {"steer": STRONG, "grammar": "root ::= [a-z]{20}", "seed": 7, "max_tokens": 40, **WILD}
    assert answer(model, **options).text == answer(model, **options).text
    assert answer(model, **options).text != answer(model, **{**options, "seed": 8}).text


# ---- readings


def test_readings_are_the_projections_of_the_block_outputs_before_the_edits_of_every_token(loaded: Loaded) -> None:
    n, n_new = 14, 6
    il, last = loaded.n_layer // 2, loaded.n_layer - 1
    vectors = [vector_for(loaded, seed, (il, last)) for seed in range(2)]
    row = vector_for(loaded, 5)
    edits = [ps.Add(row, 1.0, raw=True, layers=(0,)), ps.Add(row, 1.0, raw=True, layers=(il,))]
    units = [
        {at: v.directions[at].astype(np.float64) / np.linalg.norm(v.directions[at].astype(np.float64))
         for at in v.layers} for v in vectors
    ]  # fmt: skip
    request = Request(loaded.tokens(n), n, ps.Steering(edits), n_new, Sampling(temperature=0), raw=(0, n + n_new),
                      reads=tuple(units), ignore_end=True)  # fmt: skip
    (result,) = engine.run(loaded.session(), steerable(loaded), [request], taps=Taps(raw_layers=(il, last)))

    h = result["raw"].astype(np.float64)
    h[0] -= row.directions[il]  # raw is what the next block sees
    assert result["readings"].shape == (n + n_new, 2, 2)
    for k, unit in enumerate(units):
        for at, layer in enumerate((il, last)):
            expected = h[at] @ unit[layer]
            got = result["readings"][:, at, k]
            assert np.array_equal(np.isnan(got), np.isnan(expected))
            # float32 sums: a few roundings of the sum of magnitudes
            allowed = 1e-6 * (np.abs(h[at]) @ np.abs(unit[layer]) + np.abs(row.directions[il]).max())
            rows = np.isfinite(expected)
            assert (np.abs(got - expected)[rows] <= allowed[rows]).all()
    assert np.isfinite(result["readings"][:, 0]).all()
    # the last block has rows from the prompt's last token on
    assert np.isfinite(result["readings"][n - 1 :, 1]).all()
    assert np.isnan(result["readings"][: n - 1, 1]).all()


def test_readings_grow_with_the_text_and_come_at_the_layers_asked_for(model: ps.Model) -> None:
    vector = samples.vector(seed=3, layers=(1, 2))
    with model.session(reuse_cache=False) as session:
        stream = session.submit(prompt=PROMPT, max_tokens=8, temperature=0, grammar="root ::= [a-z]*",
                                readings=[vector, (vector, (2,)), (vector, (0, 3, 0)), vector])  # fmt: skip
        assert [r.shape for r in stream.readings()] == [(0, 2), (0, 1), (0, 2), (0, 2)]
        seen = []
        while session.step():
            seen.append(stream.readings())
        final = stream.result().readings
    n_prompt, n_tokens = stream.result().n_prompt, stream.result().n_prompt + 8
    assert [len(r[0]) for r in seen] == list(range(n_prompt, n_tokens))
    assert [r.shape for r in final] == [(n_tokens, 2), (n_tokens, 1), (n_tokens, 2), (n_tokens, 2)]
    for earlier in seen:
        assert all(np.array_equal(a, b[: len(a)], equal_nan=True) for a, b in zip(earlier, final, strict=True))
    assert np.array_equal(final[0][:, 1:], final[1])
    assert np.array_equal(final[0], final[3])
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(stream.readings(), final, strict=True))


def test_readings_of_a_cancelled_request_are_those_of_the_tokens_it_computed(model: ps.Model) -> None:
    vector = samples.vector(seed=3)
    with model.session(n_parallel=1) as session:
        running, queued = (
            session.submit(prompt=PROMPT, max_tokens=20, temperature=0, readings=[vector]) for _ in range(2)
        )
        for _ in range(4):
            session.step()
        running.cancel()
        queued.cancel()
        n = len(model.tokenize(PROMPT))
        assert [r.shape for r in running.result().readings] == [(n + 3, 2)]
        assert [r.shape for r in queued.result().readings] == [(0, 2)]


def test_readings_change_nothing(model: ps.Model) -> None:
    # the last token is computed as well, after all has been sampled
    plain = answer(model, logprobs=3, steer=STRONG)
    read = answer(model, logprobs=3, steer=STRONG, readings=[samples.vector(seed=k) for k in range(5)])
    assert (plain.tokens, plain.logprobs, plain.top_logprobs) == (read.tokens, read.logprobs, read.top_logprobs)
