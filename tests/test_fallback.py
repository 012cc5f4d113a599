"""A model whose blocks have no names in the graph: what is left is llama.cpp's own control vector, and it says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import oracle
import pytest
import samples
import tiny_models

import personasteer as ps
from personasteer import _core, _native
from personasteer.engine import Request, Sampling

if TYPE_CHECKING:
    from conftest import Loaded

TEXTS = ["the harbour was quiet", "two boats came back from the night", "how deep"]
VECTOR = samples.vector(layers=(1, 2))
RAW = ps.Add(VECTOR, 0.5, raw=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_unlabelled_model(tmp_path_factory.mktemp("unlabelled") / "unlabelled.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[ps.Model]:
    with ps.Model(path, n_ctx=128, n_parallel=2, n_threads=2) as opened:
        yield opened


def plain_context(path: Path) -> oracle.PlainContext:
    """With the sizes of the model's own session."""
    opened = oracle.PlainModel(path, use_extra_bufts=_native.extra_buffers_work())
    return oracle.PlainContext(opened, n_ctx=128, n_parallel=2, n_batch=512, n_threads=2, n_outputs=64)


def by_llama_cpp(path: Path, model: ps.Model, texts: list[str], rows: np.ndarray | None) -> list[np.ndarray]:
    """Logits under a control vector (n_layer, n_embd), of block 1 and on."""
    plain = plain_context(path)
    if rows is not None:
        plain.set_cvec(rows, 1, model.n_layer - 1)
    tokens = [model.tokenize(t) for t in texts]
    return plain.compute(tokens, [(0, len(t)) for t in tokens])[0]


def test_it_opens_with_a_warning_that_says_what_is_left_and_why(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "personasteer"), ps.Model(path, n_ctx=128) as model:
        assert "l_out" in model.unhooked
        assert np.isnan(model.norms).all()
        assert np.isnan(model.means).all()
    (record,) = caplog.records
    for part in ("deepseek4", "l_out", "control vector", "raw=True", "no capture"):
        assert part in record.getMessage()


def test_a_labelled_model_opens_without_a_warning_and_with_the_hook(
    tiny_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "personasteer"), ps.Model(tiny_path, n_ctx=128) as model:
        assert model.unhooked == ""
    assert caplog.records == []


def test_unsteered_logits_and_raw_additions_are_those_of_llama_cpp_to_the_bit(path: Path, model: ps.Model) -> None:
    two = TEXTS[:2]
    unsteered, steered = model.logits(two), model.logits(two, steer=RAW)
    half = 0.5 * VECTOR.directions
    half[[0, 3]] = 0.0  # the vector's layers are 1 and 2
    for got, expected in zip(unsteered, by_llama_cpp(path, model, two, None), strict=True):
        assert np.array_equal(got, expected)
    for got, expected, plain in zip(steered, by_llama_cpp(path, model, two, half), unsteered, strict=True):
        assert np.array_equal(got, expected)
        assert np.abs(got - plain).max() > 1e-2
    for got, expected in zip(model.logits(two), unsteered, strict=True):  # nothing stays behind
        assert np.array_equal(got, expected)
    for got, expected in zip(model.logits(two, steer=RAW * 0.0), unsteered, strict=True):
        assert np.array_equal(got, expected)


def test_several_additions_are_one_control_vector(path: Path, model: ps.Model) -> None:
    other = samples.vector(seed=3, layers=(1, 3))
    steering = ps.Steering([RAW, ps.Add(other, -1.5, raw=True), RAW * 0.0])
    rows = np.zeros((4, 64))
    rows[[1, 2]] += 0.5 * VECTOR.directions[[1, 2]]
    rows[[1, 3]] -= 1.5 * other.directions[[1, 3]].astype(np.float64)
    (got,) = model.logits(TEXTS[:1], steer=steering)
    assert np.array_equal(got, by_llama_cpp(path, model, TEXTS[:1], rows.astype(np.float32))[0])


def test_requests_of_several_steerings_are_computed_one_steering_after_the_other_in_their_order(
    path: Path, model: ps.Model
) -> None:
    steerings = [ps.Steering([RAW]), ps.Steering([RAW * -1.0]), ps.Steering()]
    got = model.logits(TEXTS, steer=steerings)
    for text, steer, logits in zip(TEXTS, steerings, got, strict=True):
        assert np.array_equal(logits, model.logits([text], steer=steer)[0])  # each is a batch of its own
    pieces: dict[int, str] = {}
    counts = []
    texts = model.generate_batch(
        TEXTS, steer=steerings, max_tokens=6, temperature=0, progress=lambda *count: counts.append(count),
        on_token=lambda i, piece: pieces.update({i: pieces.get(i, "") + piece}),
    )  # fmt: skip
    assert texts == [model.generate(t, steer=s, max_tokens=6, temperature=0)
                     for t, s in zip(TEXTS, steerings, strict=True)]  # fmt: skip
    assert pieces == dict(enumerate(texts))
    assert counts == [(1, 3), (2, 3), (3, 3)]
    nearly_none = [RAW * 1e-6, RAW * 2e-6]
    one, two = model.generate_batch(TEXTS[:1] * 2, steer=nearly_none, max_tokens=8, temperature=3.0, seed=1)
    assert one != two  # every request of a list has a random stream of its own


def test_nothing_is_taken_over_from_under_another_control_vector(tiny: Loaded) -> None:
    # a model whose cache keeps all of a text; the unlabelled one's does not
    session = _core.Session(model=tiny.core, n_ctx=64, n_parallel=1, n_batch=64, n_threads=1, n_outputs=1, hook=False)
    tokens = tiny.tokens(20)

    def reused() -> int:
        session.submit(tokens=tokens, reuse_prefix=True)
        while session.busy:
            session.step()
        return int(session.take_results()[0]["n_reused"])

    assert [reused(), reused()] == [0, 19]
    session.set_control_vector(tiny.directions()[1:])
    assert [reused(), reused()] == [0, 19]
    session.set_control_vector(-tiny.directions()[1:])
    assert reused() == 0


def test_a_steered_text_is_greedy_under_the_control_vector(path: Path, model: ps.Model) -> None:
    strong = ps.Add(VECTOR, 8.0, raw=True)
    tokens = model.tokenize(TEXTS[0])
    rows = 8.0 * VECTOR.directions
    rows[[0, 3]] = 0.0
    plain = plain_context(path)
    plain.set_cvec(rows.astype(np.float32), 1, 3)
    (row,) = plain.decode(tokens, range(len(tokens)), [0] * len(tokens), [False] * (len(tokens) - 1) + [True])
    expected = [int(row.argmax())]
    while len(expected) < 6:
        (row,) = plain.decode(expected[-1:], [len(tokens) + len(expected) - 1], [0], [True])
        expected.append(int(row.argmax()))
    (result,) = model.run_requests([Request(tokens, len(tokens), ps.Steering([strong]), 6,
                                                      Sampling(temperature=0), ignore_end=True)])  # fmt: skip
    assert result["tokens"] == expected
    unsteered = model.generate(TEXTS[0], max_tokens=6, temperature=0)
    assert model.generate(TEXTS[0], steer=strong, max_tokens=6, temperature=0) != unsteered


NO = "runs without the hook"
REFUSED: dict[str, tuple[Callable[[ps.Model], Any], str]] = {
    "a scope": (lambda m: m.logits(TEXTS, steer=ps.Add(VECTOR, 1.0, raw=True, scope="response")), NO),
    "a schedule": (lambda m: m.generate("a", steer=ps.Add(VECTOR, 1.0, raw=True, start=2)), NO),
    "an end of the schedule": (lambda m: m.generate("a", steer=ps.Add(VECTOR, 1.0, raw=True, stop=2)), NO),
    "a half-life": (lambda m: m.generate("a", steer=ps.Add(VECTOR, 1.0, raw=True, half_life=2.0)), NO),
    "a kept norm": (lambda m: m.generate("a", steer=ps.Add(VECTOR, 1.0, raw=True, keep_norm=True)), NO),
    "block 0": (lambda m: m.logits(TEXTS, steer=ps.Add(VECTOR, 1.0, raw=True, layers=(0, 1))), "block 0"),
    "a cap": (lambda m: m.logits(TEXTS, steer=ps.Cap(VECTOR, tau=np.zeros(4))), NO),
    "a floor": (lambda m: m.logits(TEXTS, steer=ps.Floor(VECTOR, tau=np.zeros(4))), NO),
    "an ablation": (lambda m: m.logits(TEXTS, steer=ps.Ablate(VECTOR)), NO),
    "a redirection": (lambda m: m.logits(TEXTS, steer=ps.Redirect(VECTOR, samples.vector(seed=1))), NO),
    "a condition": (lambda m: m.logits(TEXTS, steer=ps.When(VECTOR, RAW, threshold=np.zeros(4))), NO),
    "one of several": (lambda m: m.logits(TEXTS, steer=ps.Steering([RAW, ps.Ablate(VECTOR)])), NO),
    "a capture": (lambda m: m.capture(TEXTS), "captured"),
    "a raw capture": (lambda m: m.capture(TEXTS, pool="raw"), "captured"),
    "readings": (lambda m: m.readings(TEXTS, VECTOR.directions), "captured or read"),
    "a steered session": (lambda m: m.session().submit(prompt="a", steer=RAW), "l_out.*neither steer nor"),
    "readings in a session": (lambda m: m.session().submit(prompt="a", readings=[VECTOR]), "l_out.*neither steer nor"),
    "steering a stream": (lambda m: m.session().submit(prompt="a").steer(RAW), "l_out.*neither steer nor"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_control_vector_cannot_do_is_refused_by_name_and_the_model_goes_on(
    path: Path, model: ps.Model, what: str
) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ps.ModelError, match=message) as caught:
        call(model)
    assert model.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert np.array_equal(model.logits(TEXTS[:1])[0], by_llama_cpp(path, model, TEXTS[:1], None)[0])


def test_a_relative_strength_asks_for_raw_additions(model: ps.Model) -> None:
    with pytest.raises(ps.VectorError, match="raw=True"):
        model.generate("a", steer=VECTOR * 0.2)


def test_nothing_is_computed_where_one_of_a_list_is_refused(model: ps.Model) -> None:
    seen: list[Any] = []
    with pytest.raises(ps.ModelError, match=NO):
        model.generate_batch(
            TEXTS[:2], steer=[RAW, ps.Ablate(VECTOR)], max_tokens=2, progress=lambda *c: seen.append(c)
        )
    assert seen == []


def test_an_unsteered_session_streams(model: ps.Model) -> None:
    with model.session() as session:
        stream = session.submit(prompt=TEXTS[0], max_tokens=6, temperature=0, logprobs=1)
        stream.steer(None)
        assert "".join(stream) == stream.result().text == model.generate(TEXTS[0], max_tokens=6, temperature=0)
