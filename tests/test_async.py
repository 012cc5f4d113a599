"""Streams of text in an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples

import personasteer as ps
from personasteer.live import Session

WORDS = ["whale", "harbour", "boat", "sea"]
TEXTS = [f"{word} " * 8 for word in WORDS]


@pytest.fixture
def model(tiny_path: Path) -> Iterator[ps.Model]:
    with ps.Model(tiny_path, n_ctx=128, n_parallel=2, n_threads=2) as opened:
        yield opened


def stream(model: ps.Model, text: str, **options: Any) -> AsyncIterator[str]:
    """A text that is prescribed: which requests share a decode, and so the rounding, depends on the threads."""
    return model.stream(prompt="so", grammar=f'root ::= "{text}"', **{"max_tokens": 100, "temperature": 0, **options})


async def joined(pieces: AsyncIterator[str]) -> str:
    return "".join([piece async for piece in pieces])


class Slow:
    """A native session whose decodes take a while."""

    def __init__(self, native: Any, seconds: float) -> None:
        self.native, self.seconds = native, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)

    def step(self, decide: Any) -> Any:
        time.sleep(self.seconds)
        return self.native.step(decide)


def slow_session(model: ps.Model, seconds: float) -> Session:
    session = model.session()
    session._native = Slow(session._native, seconds)
    model._live = session
    return session


def test_several_loops_over_streams_at_once_each_get_their_own_text(model: ps.Model) -> None:
    async def all_at_once() -> list[str]:
        return list(await asyncio.gather(*(joined(stream(model, text)) for text in TEXTS * 2)))

    assert asyncio.run(all_at_once()) == TEXTS * 2
    assert asyncio.run(all_at_once()) == TEXTS * 2  # in another event loop
    assert model._live is not None
    assert model._live.n_running == 0


def test_event_loops_of_two_threads_share_a_model(model: ps.Model) -> None:
    got: dict[int, list[str]] = {}

    async def some(k: int) -> list[str]:
        return list(await asyncio.gather(*(joined(stream(model, text)) for text in TEXTS[k : k + 2])))

    threads = [threading.Thread(target=lambda k=k: got.update({k: asyncio.run(some(k))})) for k in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == {0: TEXTS[:2], 2: TEXTS[2:]}


def test_the_event_loop_goes_on_while_a_decode_is_computed(model: ps.Model) -> None:
    async def ticks() -> tuple[float, int]:
        pauses, last = [], time.monotonic()
        streams = asyncio.gather(*(joined(stream(model, "ab")) for _ in range(3)))
        while not streams.done():
            await asyncio.sleep(0.005)
            pauses.append(time.monotonic() - last)
            last = time.monotonic()
        assert await streams == ["ab"] * 3
        return max(pauses), len(pauses)

    slow_session(model, 0.2)
    longest, n = asyncio.run(ticks())
    assert longest < 0.15  # a decode takes 0.2 s
    assert n > 20


def test_leaving_a_stream_early_cancels_its_request_and_the_others_go_on(model: ps.Model) -> None:
    async def leave() -> str:
        other = asyncio.ensure_future(joined(stream(model, TEXTS[0])))
        pieces = stream(model, TEXTS[1])
        async for _ in pieces:
            break
        await pieces.aclose()  # type: ignore[attr-defined]
        assert model._live is not None
        assert model._live.n_running <= 1
        return await other

    assert asyncio.run(leave()) == TEXTS[0]
    assert model._live is not None
    assert model._live.n_running == 0


def test_a_loop_that_is_left_without_closing_cancels_its_request_when_the_event_loop_ends(model: ps.Model) -> None:
    async def leave() -> None:
        async for _ in stream(model, TEXTS[1]):
            break

    asyncio.run(leave())
    assert model._live is not None
    assert model._live.n_running == 0


@pytest.mark.parametrize("after", [0.0, 0.05, 0.3])
def test_a_cancelled_task_takes_its_request_along_whenever_it_comes(model: ps.Model, after: float) -> None:
    async def cancel() -> str:
        cancelled = asyncio.ensure_future(joined(stream(model, TEXTS[1])))
        other = asyncio.ensure_future(joined(stream(model, "abc")))
        await asyncio.sleep(after)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        return await other

    session = slow_session(model, 0.1)
    assert asyncio.run(cancel()) == "abc"
    assert session.n_running == 0


def test_a_task_that_is_cancelled_while_its_request_is_submitted_leaves_none_behind(
    model: ps.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[Any] = []
    real = Session.submit

    def slowly(self: Session, *args: Any, **options: Any) -> Any:
        time.sleep(0.2)
        submitted.append(real(self, *args, **options))
        return submitted[-1]

    async def cancel() -> None:
        task = asyncio.ensure_future(joined(stream(model, TEXTS[0])))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.4)

    monkeypatch.setattr(Session, "submit", slowly)
    asyncio.run(cancel())
    assert [s.result().finish for s in submitted] == ["cancelled"]


def test_errors_arrive_where_the_stream_is_read_and_nowhere_else(model: ps.Model) -> None:
    async def both() -> tuple[Any, ...]:
        return tuple(
            await asyncio.gather(
                joined(stream(model, TEXTS[0])),
                joined(model.stream(prompt="x" * 200)),
                joined(model.stream(prompt="so", grammar='root ::= "ab" <[999]>', temperature=0)),
                joined(model.stream(prompt="so", max_tokens=0)),
                return_exceptions=True,
            )
        )

    text, too_long, dead_end, bad_option = asyncio.run(both())
    assert text == TEXTS[0]
    assert isinstance(too_long, ps.ContextError)
    assert isinstance(dead_end, ps.ModelError)
    assert "allows no token" in str(dead_end)
    assert isinstance(bad_option, ps.ArgumentError)


def test_what_came_before_an_error_is_read_first(model: ps.Model) -> None:
    pieces: list[str] = []

    async def read() -> None:
        async for piece in model.stream(prompt="so", grammar='root ::= "ab" <[999]>', temperature=0):
            pieces.append(piece)

    with pytest.raises(ps.ModelError, match="allows no token"):
        asyncio.run(read())
    assert pieces == ["a", "b"]


def test_closing_the_model_ends_its_streams_with_an_error(model: ps.Model) -> None:
    async def close() -> None:
        pieces = stream(model, TEXTS[0])
        async for _ in pieces:
            await asyncio.to_thread(model.close)
            break
        with pytest.raises(ps.ModelError, match="closed"):
            await joined(pieces)
        with pytest.raises(ps.ModelError, match="closed"):
            await joined(stream(model, TEXTS[1]))

    asyncio.run(close())


def test_a_steering_block_counts_for_streams_that_begin_in_it(model: ps.Model) -> None:
    strong = ps.Add(samples.vector(), 20.0, raw=True, layers=(0,))

    async def text(**options: Any) -> str:
        return await joined(model.stream(prompt="how deep", max_tokens=20, temperature=0, **options))

    async def inside() -> str:
        with model.steering(strong):
            return await text()

    plain, steered = asyncio.run(text()), asyncio.run(text(steer=strong))
    assert plain != steered
    assert asyncio.run(inside()) == steered
    assert asyncio.run(text()) == plain


def test_a_session_streams_in_an_event_loop_and_its_result_is_the_text(model: ps.Model) -> None:
    async def read(session: Session) -> None:
        gate = ps.When(samples.vector(), samples.vector() * 0.2, threshold=np.full(4, -1e3))
        running = session.submit(prompt="how deep", max_tokens=20, temperature=0, steer=gate)
        assert "".join([piece async for piece in running]) == running.result().text
        assert running.result().rho > 0

    with model.session() as session:
        asyncio.run(read(session))
