"""Memory in use does not grow with use: the same rounds again and again, measured by the C library."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import samples

import personasteer as ps
from personasteer import _core
from personasteer._native import extra_buffers_work

# Bytes a round. What a round of these makes and frees is hundreds of kB, and the smallest of llama.cpp's and our
# objects that could be forgotten, a sampler, takes more than this.
BOUND = 64


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                     "keepcost")
    ]  # fmt: skip


def in_use() -> int:
    """Bytes that malloc has given out, mapped ones included."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


@pytest.fixture(autouse=True)
def _measurable() -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("this C library does not tell how much memory is in use")
    before = in_use()
    kept = ctypes.create_string_buffer(1 << 24)
    if in_use() - before < len(kept) // 2:
        pytest.skip("malloc is replaced here")


def growth(work: Callable[[int], None], n: int) -> float:
    """Bytes in use more per round, in the quietest two stretches of n rounds that follow each other: malloc counts what
    it keeps back for later as in use, so that the first hundreds of rounds grow; what leaks grows for ever.
    """
    marks, least = [in_use()], np.inf
    for stretch in range(16):
        for i in range(n):
            work(stretch * n + i)
        marks.append(in_use())
        if stretch >= 2:  # the first one warms up
            least = min(least, np.diff(marks[-3:]).max() / n)
        if least < BOUND:
            break
    return float(least)


def session_of(model: object, *, native: bool) -> object:
    return _core.Session(
        model=model, n_ctx=64, n_parallel=2, n_batch=32, n_threads=1, n_outputs=32, native_on_cpu=native
    )


def everywhere_gated() -> object:
    """A gated turn, a gated addition and a gated window at two blocks."""
    terms = [[il, stage, 0, 1 if stage == 2 else -1, 2] for il in (1, 2) for stage in (0, 1, 2)]
    numbers = np.tile(np.float32([0.0, 1.0, -0.1, 0.1, 0.5, 8.0]), (len(terms), 1))
    vectors = np.random.default_rng(3).standard_normal((3, 64)).astype(np.float32)
    return _core.Mix(key=5, terms=np.array(terms, np.int32), numbers=numbers, vectors=vectors)


@pytest.mark.parametrize("native", [False, True], ids=["fused", "generic"])
def test_sessions_requests_and_their_errors_leave_nothing(tiny_path: Path, native: bool) -> None:
    core = _core.Model(str(tiny_path), use_extra_bufts=extra_buffers_work())

    def work(i: int) -> None:
        session = session_of(core, native=native)
        session.set_taps(pool_layers=[0, 1], raw_layers=[2])
        steered = {"mixes": [everywhere_gated()], "mix_of_token": [0] * 4, "generated": [(0, 0, 0)]}
        reads = _core.Readout([1], np.ones((1, 2, 64), np.float32))
        session.submit(tokens=[1, 70, 71, 72], reads=reads, pools=[(0, -1)], raws=[(1, 4)], max_tokens=3, seed=i,
                       temperature=1.0, repeat_penalty=1.1, logit_bias=[(70, 1.0)], grammar="root ::= [a-z]+",
                       n_logprobs=2, stop=[b"zz"], outputs=(0, 4), keep_logits=True, decides=True, response_begin=3,
                       **steered)  # fmt: skip
        dropped = session.submit(tokens=[1, 80], max_tokens=9)
        with pytest.raises(ps.ArgumentError):
            session.submit(tokens=[1], max_tokens=1, grammar="root ::= (")
        with pytest.raises(ps.VectorError):
            session.submit(tokens=[1], mixes=[None])
        session.step(lambda *_: tuple(steered.values()))
        session.cancel(dropped)
        while session.busy:
            session.step()
        assert [r["error"] for r in session.take_results()] == ["", ""]
        session.detach()
        session.add_edit_layers([0])
        session.submit(tokens=[1, 70], max_tokens=2, decides=True, response_begin=1, reads=reads)
        with pytest.raises(ZeroDivisionError):
            session.step(lambda *_: 1 / 0)

    assert growth(work, 60) < BOUND


def test_models_steered_captured_and_closed_leave_nothing(tiny_path: Path) -> None:
    v = samples.vector(layers=(1, 2), thresholds=np.zeros(4, np.float32), means=np.zeros(4, np.float32))

    def work(i: int) -> None:
        with ps.Model(tiny_path, n_ctx=64, n_parallel=2, n_threads=1, seed=i) as model:
            model.generate("a b c", steer=ps.Steering([v * 0.2, ps.Cap(v)]), max_tokens=2)
            model.capture(["a b"], pool="mean")
            with model.steering(ps.Ablate(v)):
                model.logits(["a b"])
        with pytest.raises(ps.ModelError):
            ps.Model(Path(__file__))

    assert growth(work, 20) < BOUND


@pytest.mark.skipif(not extra_buffers_work(), reason="a stock Llama crashes on this build of llama.cpp")
def test_attachments_leave_nothing(tiny_path: Path) -> None:
    llama = llama_cpp.Llama(str(tiny_path), n_ctx=64, n_threads=1, verbose=False)
    v = samples.vector(layers=(1, 2), thresholds=np.zeros(4, np.float32), means=np.zeros(4, np.float32))

    def work(i: int) -> None:
        ps.attach(llama, ps.Steering([v * 0.2, ps.When(v, ps.Add(v, 0.1))]))
        llama.reset()
        llama.eval([1, 70, 71 + i % 9])
        ps.detach(llama)

    assert growth(work, 60) < BOUND
    llama.close()


def test_files_read_and_written_leave_nothing(tiny_path: Path) -> None:
    path, rows = str(tiny_path), np.ones((2, 256), np.float32)

    def work(_: int) -> None:
        _core.summarize_gguf(path)
        fields = _core.read_gguf_fields(path)
        _core.change_gguf_header(path, [], fields[:3], [("new", "q8_0", (32, 2))])
        with pytest.raises(ps.ArgumentError):
            _core.change_gguf_header(path, [], [], [("new", "q8_0", (33,))])
        with pytest.raises(ps.ModelError):
            _core.summarize_gguf(__file__)
        _core.dequantize("q4_K", _core.quantize("q4_K", rows, np.ones(256, np.float32)), 256)

    assert growth(work, 60) < BOUND
