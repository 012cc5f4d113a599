"""The server under many clients, bad ones among them, and when things die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import samples
import uvicorn
from serving import KEY, Running, serving

import personasteer as ps
from personasteer.model import demo_model_path
from personasteer.serve.app import create_app
from personasteer.serve.backend import FairQueue, Job
from personasteer.serve.server import ServerOptions
from personasteer.serve.worker import WorkerOptions

LAYERS = (10, 12, 14)


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "v.gguf"
    samples.vector(n_layer=30, n_embd=576, layers=LAYERS, seed=1, name="v").save(path)
    return path


def body(i: int, **more: Any) -> dict[str, Any]:
    """A request of its own mix."""
    mix = [] if i == 0 else [{"vector": "v", "strength": round(0.04 * i, 2)}]
    return {"messages": [{"role": "user", "content": f"Tell me {i + 2} things about rain."}], "steering": mix,
            "max_tokens": 16 + i, "temperature": 0.8, "seed": i, "logprobs": True, **more}  # fmt: skip


@contextmanager
def in_process(worker: WorkerOptions) -> Iterator[tuple[str, list[Any]]]:
    """(address, what the worker said) of a server in a thread of this process."""
    app = create_app(worker, ServerOptions())
    backend, said = app.state.server.backend, []
    hear = backend._hear
    backend._hear = lambda news: (said.append(news), hear(news))
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        while not (server.started and backend.state == "ready"):
            time.sleep(0.02)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", said
    finally:
        server.should_exit = True
        thread.join(30)
        sock.close()


async def streamed(client: httpx.AsyncClient, data: dict[str, Any]) -> list[tuple[list[int], float]]:
    """(bytes, log p) of each token of a stream."""
    tokens = []
    async with client.stream("POST", "/v1/chat/completions", json={**data, "stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    for t in (choice["logprobs"] or {}).get("content", []):
                        tokens.append((t["bytes"], t["logprob"]))
    return tokens


def test_sixteen_streams_have_the_tokens_of_the_engine_on_the_same_schedule(vector: Path) -> None:
    model = str(demo_model_path())
    options: dict[str, Any] = {"n_ctx": 256, "n_parallel": 16, "n_threads": 1}

    async def all_of_them(url: str) -> list[Any]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            return await asyncio.gather(*(streamed(client, body(i)) for i in range(16)))

    with in_process(WorkerOptions(model, {"v": str(vector)}, **options)) as (url, said):
        got = asyncio.run(all_of_them(url))
    begun = [news["id"] for news in said if "begun" in news]
    n_begun = [sum("begun" in news for news in said[:at]) for at, news in enumerate(said) if "step" in news]
    assert len(begun) == 16
    assert max(n for n, _, _ in (news["step"] for news in said if "step" in news)) == 16
    v = ps.PersonaVector.load(vector)
    with ps.Model(model, **options) as m, m.session() as session:
        wanted: dict[int, Any] = {}
        order = _order(said, got)
        for n in n_begun:
            for request_id in begun[len(wanted) : n]:
                i = order[request_id]
                data = body(i)
                wanted[i] = session.submit(
                    data["messages"], steer=[] if i == 0 else v * round(0.04 * i, 2), max_tokens=data["max_tokens"],
                    temperature=0.8, seed=i, logprobs=0,
                )  # fmt: skip
            session.step()
        session.run()
        for i, stream in wanted.items():
            tokens = stream.tokens()
            assert [bytes(b) for b, _ in got[i]] == m.token_bytes([t for t, _, _ in tokens])
            np.testing.assert_allclose([p for _, p in got[i]], [p for _, p, _ in tokens], atol=1e-6)
    assert len({str([b for b, _ in tokens]) for tokens in got}) > 8


def _order(said: list[Any], got: list[Any]) -> dict[int, int]:
    """Which of our requests each of the worker's ids is."""
    tokens: dict[int, list[Any]] = {}
    for news in said:
        for data, p, _ in news.get("tokens", ()):
            tokens.setdefault(news["id"], []).append((data, p))
    return {request_id: got.index(t) for request_id, t in tokens.items()}


def test_clients_take_turns() -> None:
    queue = FairQueue()
    jobs = [Job(i, client, {}) for i, client in enumerate("aaaabbc")]
    for job in jobs:
        queue.put(job)
    assert queue.remove(jobs[1])
    assert not queue.remove(jobs[1])
    assert [queue.take().id for _ in range(len(queue))] == [0, 4, 6, 2, 5, 3]
    assert len(queue) == 0


@pytest.fixture
def server(vector: Path, tmp_path: Path) -> Iterator[Running]:
    limits = ["-c", "256", "--queue", "16", "--max-body", "1"]
    with serving(tmp_path / "log", ["-m", "demo", "-v", f"v={vector}", "-t", "1", "--no-page", *limits]) as s:
        yield s


def idle(server: Running) -> bool:
    names = ("personasteer_requests_running", "personasteer_queue_waiting")
    return all(server.metric(name) == 0 for name in names)


def test_a_worker_that_dies_answers_503_and_is_started_again(server: Running) -> None:
    answers: list[httpx.Response] = []

    def ask(i: int) -> None:
        answers.append(server.post("/v1/chat/completions", json=body(i, max_tokens=200)))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(10)]
    for t in threads:
        t.start()
    server.wait_for(lambda: server.metric("personasteer_requests_running") == 4)
    server.wait_for(lambda: server.metric("personasteer_generated_tokens_total") > 8)
    (pid,) = server.workers()
    os.kill(pid, signal.SIGKILL)
    for t in threads:
        t.join()
    codes = [a.status_code for a in answers]
    assert codes.count(503) >= 1
    assert codes.count(503) + codes.count(200) == 10
    assert codes.count(200) >= 6  # those that waited
    assert {a.json()["error"]["message"] for a in answers if a.status_code == 503} == {"the worker died"}
    assert server.metric("personasteer_worker_restarts") == 1
    assert server.workers() != [pid]


def test_load_with_bad_clients_leaves_nothing_behind(server: Running) -> None:
    (pid,) = server.workers()
    codes: list[Any] = []
    lock = threading.Lock()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}

    def client(k: int) -> None:
        rng = random.Random(k)
        for _ in range(300 // 32 + 1):
            kind = rng.choice(["plain", "stream", "leave", "leave", "cut", "malformed", "huge", "vector", "slow"])
            try:
                code = one(kind, rng)
            except httpx.HTTPError as e:
                code = type(e).__name__
            with lock:
                codes.append((kind, code))

    def one(kind: str, rng: random.Random) -> Any:
        with httpx.Client(base_url=server.url, timeout=120, headers=headers) as c:
            data = body(rng.randrange(16), max_tokens=rng.randrange(1, 24))
            if kind == "plain":
                return c.post("/v1/chat/completions", json=data).status_code
            if kind == "malformed":
                return c.post("/v1/chat/completions", content=b'{"messages": [' + b"[" * 5000).status_code
            if kind == "huge":
                return c.post("/v1/chat/completions", content=b" " * (2**20 + 1)).status_code
            if kind == "vector":
                return c.post(
                    "/v1/chat/completions", json={**data, "steering": [{"vector": "w", "op": "cap"}]}
                ).status_code
            if kind == "cut":  # half a request, then gone
                with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as s:  # type: ignore[arg-type]
                    s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{")
                return "gone"
            with c.stream("POST", "/v1/chat/completions", json={**data, "stream": True}) as answer:
                for n, _ in enumerate(answer.iter_lines()):
                    if kind == "leave" and n == rng.randrange(1, 8):
                        return "gone"
                    if kind == "slow":
                        time.sleep(0.05)
                return answer.status_code

    def memory() -> int:
        pages = [int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in (pid, server.process.pid)]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    for k in range(4):
        client(1000 + k)
    before, codes[:] = memory(), []
    threads = [threading.Thread(target=client, args=(k,)) for k in range(32)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(300)
    assert not any(t.is_alive() for t in threads)
    assert len(codes) >= 300
    allowed = {
        "plain": {200, 429}, "stream": {200, 429}, "leave": {"gone", 200, 429}, "slow": {200, 429}, "cut": {"gone"},
        "malformed": {400}, "huge": {413, "WriteError", "ReadError"}, "vector": {400},
    }  # fmt: skip
    assert not [c for c in codes if c[1] not in allowed[c[0]]]
    server.wait_for(lambda: idle(server))
    assert memory() - before < 64 * 2**20
    assert server.workers() == [pid]
    assert server.post("/v1/chat/completions", json=body(1)).status_code == 200


def test_a_full_queue_is_429_with_retry_after(server: Running) -> None:
    os.kill(server.workers()[0], signal.SIGSTOP)  # nothing gets done meanwhile
    try:
        threads = []
        for i in range(20):
            threads.append(
                threading.Thread(target=server.post, args=("/v1/chat/completions",), kwargs={"json": body(i)})
            )
            threads[-1].start()
        server.wait_for(lambda: server.metric("personasteer_queue_waiting") == 16)
        full = server.post("/v1/chat/completions", json=body(1))
        assert full.status_code == 429
        assert full.headers["Retry-After"] == "1"
        assert full.json()["error"]["type"] == "rate_limit_error"
    finally:
        os.kill(server.workers()[0], signal.SIGCONT)
    for t in threads:
        t.join()


def test_sigterm_under_load_finishes_what_runs_and_refuses_the_rest(server: Running) -> None:
    answers: list[Any] = []

    def ask(i: int) -> None:
        try:
            answers.append(server.post("/v1/chat/completions", json=body(i, max_tokens=60)).status_code)
        except httpx.HTTPError as e:
            answers.append(type(e).__name__)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    server.wait_for(lambda: server.metric("personasteer_queue_waiting") == 4)
    server.process.send_signal(signal.SIGTERM)
    for t in threads:
        t.join(60)
    assert sorted(map(str, answers)) == ["200"] * 4 + ["503"] * 4
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_killed_client_gives_its_place_back(server: Running) -> None:
    pid = os.fork()
    if pid == 0:  # a client of its own, which is killed amid its stream
        with httpx.stream("POST", server.url + "/v1/chat/completions", timeout=60,
                          json=body(3, max_tokens=200, stream=True),
                          headers={"Authorization": f"Bearer {KEY}"}) as answer:  # fmt: skip
            for _ in answer.iter_lines():
                pass
        os._exit(0)
    server.wait_for(lambda: server.metric("personasteer_requests_running") == 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    begun = server.metric("personasteer_generated_tokens_total")
    server.wait_for(lambda: idle(server), 10)
    assert server.metric("personasteer_generated_tokens_total") - begun < 150


def test_a_worker_that_hangs_is_started_again(vector: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", ["-m", "demo", "-t", "1", "-c", "256", "--no-page", "--timeout", "3"]) as s:
        (pid,) = s.workers()
        os.kill(pid, signal.SIGSTOP)
        assert s.post("/v1/chat/completions", json={**body(0), "steering": []}).status_code in (503, 504)
        s.wait_for(lambda: s.workers() and s.workers() != [pid])
        s.wait_for(lambda: s.get("/health").status_code == 200)
        assert s.post("/v1/chat/completions", json={**body(0), "steering": []}).status_code == 200
        assert "has said nothing for 3 s" in s.log.read_text()


def test_no_worker_outlives_its_server(server: Running) -> None:
    (pid,) = server.workers()
    threading.Thread(target=lambda: _quietly(server), daemon=True).start()
    server.wait_for(lambda: server.metric("personasteer_requests_running") == 1)
    server.process.kill()
    server.process.wait()
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < end
        time.sleep(0.05)


def _quietly(server: Running) -> None:
    with contextlib.suppress(httpx.HTTPError):
        server.post("/v1/chat/completions", json=body(1, max_tokens=200))


def test_a_request_that_takes_too_long_is_ended(vector: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", ["-m", "demo", "-t", "1", "-c", "2048", "--no-page", "--timeout", "1"]) as s:
        got = s.post("/v1/chat/completions", json={**body(0), "max_tokens": 2000, "logit_bias": {"2": -100}})
        assert (got.status_code, got.json()["error"]["message"]) == (504, "it took longer than 1 s")
        s.wait_for(lambda: idle(s))
