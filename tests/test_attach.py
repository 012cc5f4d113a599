"""Steering a llama_cpp.Llama in place.

What it generates is compared with the same Llama unsteered, with llama.cpp's own control vector, and with what a prompt
gives when it is computed anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import pytest
from samples import vector

import personasteer as ps
from personasteer import _core
from personasteer._native import extra_buffers_work
from personasteer.engine import Request, Sampling
from personasteer.errors import ArgumentError, ModelError, VectorError

if TYPE_CHECKING:
    from conftest import Loaded

pytestmark = pytest.mark.skipif(not extra_buffers_work(), reason="a stock Llama crashes on this build of llama.cpp")

PROMPT = "the cat sat on the mat and the dog lay beside the old stove "
MESSAGES = [{"role": "user", "content": "tell me of the cat and the dog"}]


def open_llama(path: Path, **options: Any) -> llama_cpp.Llama:
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, verbose=False, **options)


@pytest.fixture
def llama(tiny_path: Path) -> Iterator[llama_cpp.Llama]:
    opened = open_llama(tiny_path)
    yield opened
    opened.close()


def tokens_of(llama: llama_cpp.Llama, text: str = PROMPT, n: int = 24) -> list[int]:
    """Greedy tokens."""
    given = llama.tokenize(text.encode())
    out = []
    for token in llama.generate(given, temp=0.0, repeat_penalty=1.0):
        out.append(token)
        if len(out) == n:
            return out
    return out


def strong() -> ps.PersonaVector:
    zero = np.zeros(4, np.float32)
    return vector(layers=(1, 2), thresholds=zero, means=zero)


def test_attached_it_steers_at_zero_and_detached_it_computes_as_before(llama: llama_cpp.Llama) -> None:
    before = tokens_of(llama)
    ps.attach(llama, strong() * 0.5)
    steered = tokens_of(llama)
    ps.attach(llama, strong() * 0.0)
    zero = tokens_of(llama)
    ps.attach(llama, ps.Cap(strong(), tau=[1e6] * 4))
    unbinding = tokens_of(llama)
    ps.detach(llama)
    after = tokens_of(llama)

    assert steered != before
    assert before == zero == unbinding == after


def test_an_attached_addition_is_the_control_vector_of_llama_cpp(llama: llama_cpp.Llama) -> None:
    v = vector(layers=(1, 2, 3))
    rows = np.zeros((4, 64), np.float32)
    rows[1:] = 0.4 * v.directions[1:]
    pointer = np.ascontiguousarray(rows[1:]).ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert llama_cpp.llama_set_adapter_cvec(llama._ctx.ctx, pointer, 3 * 64, 64, 1, 3) == 0
    expected = tokens_of(llama)
    assert llama_cpp.llama_set_adapter_cvec(llama._ctx.ctx, None, 0, 64, 1, 3) == 0
    llama.reset()
    llama._ctx.kv_cache_clear()

    ps.attach(llama, ps.Add(v, 0.4, raw=True))
    assert tokens_of(llama) == expected


def test_completions_chats_and_streams_are_steered_alike(llama: llama_cpp.Llama) -> None:
    def chat() -> str:
        answer: Any = llama.create_chat_completion(MESSAGES, max_tokens=16, temperature=0.0)  # type: ignore[arg-type]
        return str(answer["choices"][0]["message"]["content"])

    def stream() -> str:
        chunks: Any = llama.create_chat_completion(MESSAGES, max_tokens=16, temperature=0.0, stream=True)  # type: ignore[arg-type]
        return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)

    def complete() -> str:
        answer: Any = llama.create_completion(PROMPT, max_tokens=16, temperature=0.0)
        return str(answer["choices"][0]["text"])

    # half characters of a random model come out of a stream otherwise: each with its own kind
    plain = chat(), stream(), complete()
    ps.attach(llama, strong() * 0.5)
    steered = chat(), stream(), complete()
    assert all(a != b for a, b in zip(steered, plain, strict=True))
    assert steered == (chat(), stream(), complete())
    ps.detach(llama)
    assert (chat(), stream(), complete()) == plain


def test_a_prefix_computed_under_another_steering_or_another_prompt_is_not_reused(llama: llama_cpp.Llama) -> None:
    longer = PROMPT + "who saw the cat leave the "

    def fresh(steering: Any) -> list[int]:
        ps.attach(llama, steering)
        return tokens_of(llama, longer)

    response = ps.Add(strong(), 0.6, scope="response")
    expected = fresh(response)
    ps.attach(llama, response)
    answer = tokens_of(llama, PROMPT)
    cached = llama.tokenize(PROMPT.encode()) + answer
    given = llama.tokenize(longer.encode())
    # the answer's tokens were computed as response; in a prompt that repeats them they are prompt
    grown = cached[:-4]
    steps = 0
    decode = llama._ctx.decode

    def counting(batch: Any) -> None:
        nonlocal steps
        steps += int(batch.batch.n_tokens)
        decode(batch)

    llama._ctx.decode = counting
    n_computed = []
    for tokens in (grown, given):
        steps = 0
        next(iter(llama.generate(tokens, temp=0.0, repeat_penalty=1.0)))
        n_computed.append(steps)
    n_prompt = len(llama.tokenize(PROMPT.encode()))
    # all but the last prompt token of the first text stay, nothing of its answer
    assert n_computed[0] == len(grown) - (n_prompt - 1)
    llama._ctx.decode = decode
    assert tokens_of(llama, longer) == expected

    everywhere = fresh(strong() * 0.6)
    assert everywhere == fresh(strong() * 0.6) != expected


def test_an_attached_edit_fades_and_begins_as_a_model_s_does(llama: llama_cpp.Llama, tiny_path: Path) -> None:
    given = llama.tokenize(PROMPT.encode())
    with ps.Model(tiny_path, n_ctx=256, n_threads=2) as model:
        answers = []
        for time in ({}, {"half_life": 4.0}, {"start": 8}, {"stop": 6}):
            edit = ps.Add(strong(), 0.8, scope="response", **time)  # type: ignore[arg-type]
            ps.attach(llama, edit)
            request = Request(given, len(given), ps.Steering([edit]), 24, Sampling(temperature=0), ignore_end=True)
            (result,) = model.run_requests([request])
            answers.append(tokens_of(llama))
            assert answers[-1] == list(result["tokens"])
    assert len({tuple(a) for a in answers}) == 4


@pytest.mark.parametrize("above", [True, False])
def test_a_condition_on_the_prompt_opens_or_leaves_the_text_as_it_was(llama: llama_cpp.Llama, above: bool) -> None:
    v = strong()
    before = tokens_of(llama)
    ps.attach(llama, ps.When(v, v * 0.6, threshold=[-1e6] * 4, above=above))
    first, again = tokens_of(llama), tokens_of(llama)
    ps.attach(llama, ps.Add(v, 0.6, scope="response"))
    response = tokens_of(llama)
    assert first == again
    assert (first == before) == (not above)
    if above:  # the prompt's last token is computed alone, in another shape: the same but for rounding
        assert first[:4] == response[:4]


def test_long_prompts_are_cut_to_one_ubatch_and_larger_decodes_are_refused(tiny_path: Path) -> None:
    wide = open_llama(tiny_path, n_batch=128, n_ubatch=16)
    ps.attach(wide, strong() * 0.5)
    assert wide.n_batch == 16
    steered = tokens_of(wide, PROMPT * 2)
    narrow = open_llama(tiny_path, n_batch=16, n_ubatch=16)
    ps.attach(narrow, strong() * 0.5)
    assert steered == tokens_of(narrow, PROMPT * 2)
    for n in (17, 20):
        wide._batch.set_batch(batch=[5] * n, n_past=0, logits_all=False)
        with pytest.raises(ModelError, match=f"{n} tokens is more than n_ubatch = 16"):
            wide._ctx.decode(wide._batch)
    ps.detach(wide)
    assert wide.n_batch == 128


def test_logits_of_all_tokens_stay_available(tiny_path: Path) -> None:
    llama = open_llama(tiny_path, logits_all=True)
    ps.attach(llama, strong() * 0.5)
    answer: Any = llama.create_completion(PROMPT, max_tokens=4, temperature=0.0, logprobs=2)
    assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 4


def test_a_cache_of_states_is_set_aside_while_attached(llama: llama_cpp.Llama) -> None:
    cache = llama_cpp.LlamaRAMCache()
    llama.set_cache(cache)
    before = tokens_of(llama)
    state = llama.save_state()
    ps.attach(llama, strong() * 0.5)
    assert llama.cache is None
    steered = tokens_of(llama)
    llama.load_state(state)  # computed without steering
    assert tokens_of(llama) == steered != before
    ps.detach(llama)
    assert llama.cache is cache


def test_closing_or_dropping_an_attached_llama_frees_it(tiny_path: Path) -> None:
    closed = open_llama(tiny_path)
    ps.attach(closed, strong() * 0.5)
    tokens_of(closed, n=2)
    closed.close()
    dropped = open_llama(tiny_path)
    ps.attach(dropped, strong() * 0.5)
    tokens_of(dropped, n=2)
    gone = weakref.ref(dropped)
    del dropped
    gc.collect()
    assert gone() is None


def test_what_cannot_be_attached_is_refused_and_leaves_the_llama_alone(llama: llama_cpp.Llama, tiny_path: Path) -> None:
    before = tokens_of(llama)
    for steering, error, message in (
        (ps.Add(strong(), 0.3, scope="user"), ArgumentError, "knows no messages"),
        (ps.Cap(vector()), VectorError, "stores no thresholds"),
        (vector(n_embd=32) * 0.3, VectorError, "width"),
        ("evil", ArgumentError, "must be an edit"),
    ):
        with pytest.raises(error, match=message):
            ps.attach(llama, steering)  # type: ignore[arg-type]
        assert not hasattr(llama, "_personasteer")
    ps.detach(llama)  # nothing there: no error
    assert tokens_of(llama) == before
    embedding = open_llama(tiny_path, embedding=True)
    with pytest.raises(ModelError, match="embeddings"):
        ps.attach(embedding, strong() * 0.3)


def test_the_bundled_model_chats_under_an_attached_steering(smollm2_path: Path) -> None:
    llama = open_llama(smollm2_path)

    def chat() -> str:
        answer: Any = llama.create_chat_completion(
            [{"role": "user", "content": "How are you today?"}], max_tokens=12, temperature=0.0
        )
        return str(answer["choices"][0]["message"]["content"])

    before = chat()
    v = vector(n_layer=30, n_embd=576, layers=(14, 15, 16))
    ps.attach(llama, v * 0.4)
    steered = chat()
    ps.detach(llama)
    assert chat() == before != steered
    llama.close()


def test_what_does_not_fit_the_context_is_refused_and_the_next_decode_is_steered(llama: llama_cpp.Llama) -> None:
    hook: Any = ps.attach(llama, ps.Steering())._hook
    mix = _core.Mix(key=7, layers=[2], data=np.ones((1, 64), np.float32))
    other = _core.Mix(key=8, layers=[1], data=np.ones((1, 64), np.float32))

    def arm(mixes: list[Any], slot: int = 0, **more: Any) -> None:
        hook.arm(tokens=[1], positions=[0], slots=[slot], mixes=mixes, mix_of_token=[0], j=[0], **more)

    def logits() -> np.ndarray:
        llama._ctx.kv_cache_clear()
        token = (llama_cpp.llama_token * 1)(1)
        assert llama_cpp.llama_decode(llama._ctx.ctx, llama_cpp.llama_batch_get_one(token, 1)) == 0
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(llama._ctx.ctx), (llama.n_vocab(),)).copy()

    arm([other])
    first = logits()
    hook.finish()
    unsteered = logits()  # nobody said what its tokens get
    for layers, width in ((0, 4), 64), ((-1,), 64), ((1, 0), 64), ((1, 1), 64), ((1,), 32), ((), 64):
        reads = _core.Readout(list(layers), np.ones((len(layers), 1, width), np.float32))
        with pytest.raises(VectorError, match="read-outs need ascending blocks"):
            arm([mix], reads=reads)
    for slot in (-1, 1):
        with pytest.raises(VectorError, match=f"sequence {slot} is none of this context"):
            arm([mix], slot=slot)
    arm([mix])
    steered = logits()
    hook.finish()
    ps.detach(llama)
    plain = logits()
    assert np.array_equal(unsteered, plain)
    assert len({x.tobytes() for x in (plain, first, steered)}) == 3


@contextlib.contextmanager
def two_sequences(path: Path) -> Iterator[Callable[..., None]]:
    """Decodes (token, position, sequence)s under a mix, in a context that computes sequences side by side."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = 128, 2, False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    context = llama_cpp.llama_init_from_model(model, params)
    address = ctypes.cast(context, ctypes.c_void_p).value
    hook: Any = _core.Attachment(address)

    def decode(*tokens: tuple[int, int, int], layers: Sequence[int] = (2,)) -> None:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, 1
            batch.seq_id[i][0] = sequence
        ids, positions, slots = (list(x) for x in zip(*tokens, strict=True))
        mix = _core.Mix(key=7, layers=list(layers), data=np.ones((len(layers), 64), np.float32))
        none = [0] * len(tokens)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        hook.arm(tokens=ids, positions=positions, slots=slots, mixes=[mix], mix_of_token=none, j=none)
        assert llama_cpp.llama_decode(context, batch) == 0
        llama_cpp.llama_batch_free(batch)
        hook.finish()

    try:
        yield decode
    finally:
        hook = None  # before the context that it is in
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def test_a_batch_that_llama_cpp_reorders_is_refused_after_its_decode(tiny_path: Path) -> None:
    with two_sequences(tiny_path) as decode:
        decode((1, 0, 0), (2, 1, 0), (3, 0, 1), (4, 1, 1))
        decode((3, 0, 0), (1, 0, 1))
        for tokens in (
            ((1, 0, 0), (3, 0, 1), (2, 1, 0), (4, 1, 1)),
            ((3, 0, 1), (1, 0, 0)),  # their positions are in order
            ((1, 0, 0), (2, 1, 0), (5, 2, 0), (3, 0, 1)),
            ((1, 0, 0), (3, 1, 1), (2, 1, 0), (4, 2, 1)),  # the positions stay in order, the tokens do not
            ((1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)),  # the tokens stay in order, the positions do not
        ):
            with pytest.raises(ModelError, match="in another token order than given"):
                decode(*tokens)


def test_a_graph_that_could_not_be_edited_is_told_after_its_decode(recurrent: Loaded) -> None:
    with two_sequences(recurrent.path) as decode:
        n_layer = recurrent.n_layer
        with pytest.raises(ModelError, match="after the attention of block 1"):
            decode((1, 0, 0), layers=(n_layer + 1,))


def test_an_attached_llama_that_is_collected_in_a_cycle_ends_well(tiny_path: Path) -> None:
    """In a child process: what could go wrong is a crash."""
    code = (
        "import gc, sys, llama_cpp, numpy as np, personasteer as ps\n"
        "v = ps.PersonaVector(np.ones((4, 64)), (1, 2))\n"
        "for _ in range(10):\n"
        "    llama = llama_cpp.Llama(sys.argv[1], n_ctx=64, verbose=False, n_threads=1)\n"
        "    kept = [llama, ps.attach(llama, ps.Ablate(v))]\n"
        "    llama.eval([1, 5, 6])\n"
        "    kept.append(kept)\n"
        "    del llama, kept\n"
        "    gc.collect()\n"
        "print('fine')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, str(tiny_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "fine"), done.stderr
