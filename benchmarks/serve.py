"""How fast is the server with sixteen personas, against the engine's own loop? And what does another mix cost?

    python benchmarks/serve.py [MODEL.gguf] [--llama-server PROGRAM]

Throughput: the same sixteen requests, each with an addition of its own strength, by one client over HTTP as streams,
and through Session in this process; interleaved, the ratio is of tokens per second. The server and its client share the
cores with the engine. Change: GET /v1/steering, POST with no edit and with a new mix, and what a new mix does to the
first token of the next request; beside it llama-server, stopped and started with another control vector.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import personasteer as ps
from personasteer.model import demo_model_path

N, N_TOKENS = 16, 48
QUESTIONS = [f"Tell me {i + 2} things about rain." for i in range(N)]


def start(model: str, vector: Path, threads: int) -> tuple[subprocess.Popen[str], str]:
    program = [sys.executable, "-P", "-c", "from personasteer.cli import main; main()"]
    command = [*program, "serve", "-m", model, "--no-page",
               "-v", f"v={vector}", "--port", "0", "--parallel", str(N), "-c", "256", "-t", str(threads)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[0]


def body(i: int, **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": QUESTIONS[i]}], "max_tokens": N_TOKENS, "temperature": 0.7, "seed": i,
        "steering": [{"vector": "v", "strength": strength(i)}], "cache_prompt": False, **more,
    }  # fmt: skip


def strength(i: int) -> float:
    return round(0.01 * (i + 1), 2)


async def one(host: str, port: int, data: dict[str, Any]) -> int:
    """Tokens of a stream, by its usage. Bytes are read as they come and looked at in the end: a client costs little."""
    reader, writer = await asyncio.open_connection(host, port)
    content = json.dumps(data).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    )
    got = await reader.read()
    writer.close()
    usage = next(x for x in reversed(got.split(b"\n")) if b'"usage"' in x)
    return int(json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"])


async def served(url: str) -> float:
    """Tokens per second of sixteen streams."""
    host, _, port = url.removeprefix("http://").partition(":")
    begin = time.perf_counter()
    more = {"stream": True, "stream_options": {"include_usage": True}}
    n = sum(await asyncio.gather(*(one(host, int(port), body(i, **more)) for i in range(N))))
    return n / (time.perf_counter() - begin)


def engine(model: ps.Model, vector: ps.PersonaVector) -> float:
    """Tokens per second of the same requests through a session."""
    with model.session(reuse_cache=False) as session:
        begin = time.perf_counter()
        streams = [
            session.submit(q, steer=vector * strength(i), max_tokens=N_TOKENS, temperature=0.7, seed=i)
            for i, q in enumerate(QUESTIONS)
        ]
        session.run()
        n = sum(len(s.result().tokens) for s in streams)
        return n / (time.perf_counter() - begin)


def first_token(client: httpx.Client, question: str) -> float:
    begin = time.perf_counter()
    data = {"messages": [{"role": "system", "content": question}, {"role": "user", "content": "Why?"}],
            "max_tokens": 2, "stream": True, "temperature": 0, "cache_prompt": False}  # fmt: skip
    with client.stream("POST", "/v1/chat/completions", json=data) as answer:
        for line in answer.iter_lines():
            if '"content":"' in line and '"content":""' not in line:
                return time.perf_counter() - begin
    raise SystemExit("no token came")


def changes(url: str, n: int) -> dict[str, float]:
    """Seconds: of GET and POST /v1/steering with no edit and with a new one; and how much later the first token comes
    after a new mix than after the same one, medians.
    """
    posts: dict[str, list[float]] = {"GET": [], "POST, no edit": [], "POST, a new mix": []}
    later = []
    with httpx.Client(base_url=url, timeout=60) as client:

        def timed(call: Callable[[], httpx.Response]) -> float:
            begin = time.perf_counter()
            call().raise_for_status()
            return time.perf_counter() - begin

        def post(mix: list[dict[str, Any]]) -> float:
            return timed(lambda: client.post("/v1/steering", json={"steering": mix}))

        first_token(client, QUESTIONS[0])
        time.sleep(0.5)  # until the engine's threads rest
        for i in range(n):
            posts["GET"].append(timed(lambda: client.get("/v1/steering")))
            posts["POST, no edit"].append(post([]))
            posts["POST, a new mix"].append(post([{"vector": "v", "strength": round(0.05 + 0.0001 * i, 4)}]))
        for i in range(n):
            pair = {}
            for new in (True, False)[:: 1 if i % 2 else -1]:
                post([{"vector": "v", "strength": round(0.2 + 0.0001 * i, 4) if new else 0.1}])
                pair[new] = first_token(client, "Speak about snow, and of nothing else.")
            later.append(pair[True] - pair[False])
    return {name: float(np.median(x)) for name, x in posts.items()} | {"later": float(np.median(later))}


def restarts(program: str, model: str, n: int, threads: int) -> float:
    """Seconds to the first token of llama-server, stopped and started with another control vector."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder, ps.Model(model, n_threads=threads) as m:
        rng = np.random.default_rng(0)
        files = []
        for k in range(2):
            data = rng.standard_normal((m.n_layer, m.n_embd)).astype(np.float32)
            files.append(Path(folder) / f"{k}.gguf")
            ps.PersonaVector(data, (m.n_layer // 2,)).save(files[-1])
        process = None
        for i in range(n):
            with socket.create_server(("127.0.0.1", 0)) as s:
                port = s.getsockname()[1]
            begin = time.perf_counter()
            if process is not None:
                process.terminate()
                process.wait()
            command = [program, "-m", model, "--port", str(port), "-c", "4096", "-np", str(N), "-t", str(threads),
                       "--control-vector-scaled", f"{files[i % 2]}:0.1"]  # fmt: skip
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                while True:
                    try:
                        if client.get("/health").status_code == 200:
                            break
                    except httpx.TransportError:
                        pass
                    time.sleep(0.005)
                first_token(client, QUESTIONS[0])
            if i:
                seconds.append(time.perf_counter() - begin)
        assert process is not None
        process.terminate()
        process.wait()
    return float(np.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo_model_path()))
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--changes", type=int, default=60)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--llama-server", help="the program, for the row of restarts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.gguf"
        with ps.Model(args.model, n_ctx=256, n_parallel=N, n_threads=args.threads) as model:
            rng = np.random.default_rng(0)
            data = rng.standard_normal((model.n_layer, model.n_embd)).astype(np.float32)
            vector = ps.PersonaVector(data, tuple(range(model.n_layer // 3, model.n_layer // 3 + 4)), name="v")
            vector.save(path)
            began = time.perf_counter()
            process, url = start(args.model, path, args.threads)
            with httpx.Client(base_url=url, timeout=60) as client:
                first_token(client, "Hello")
            ready = time.perf_counter() - began

            rates = np.empty((args.pairs, 2))
            asyncio.run(served(url))
            engine(model, vector)
            for i in range(args.pairs):
                for which in (0, 1)[:: 1 if i % 2 else -1]:
                    rates[i, which] = engine(model, vector) if which else asyncio.run(served(url))
        changed = changes(url, args.changes)
        process.terminate()
        process.wait()
    ratio = rates[:, 0] / rates[:, 1]
    low, middle, high = np.percentile(ratio, [25, 50, 75])
    print(f"{Path(args.model).name}, {args.threads} threads")
    print(f"start to first token: {ready:.2f} s")
    print(f"16 streams: {np.median(rates[:, 0]):.0f} tokens/s, engine {np.median(rates[:, 1]):.0f}; ratio {middle:.3f}"
          f" (quartiles {low:.3f} to {high:.3f}, {args.pairs} pairs)")  # fmt: skip
    print("; ".join(f"{name} {1e3 * changed[name]:.2f} ms" for name in changed if name != "later"), end="; ")
    print(f"the first token after a new mix comes {1e3 * changed['later']:+.2f} ms later than after the same one")
    if args.llama_server:
        print(f"llama-server, started again: {restarts(args.llama_server, args.model, 6, args.threads):.2f} s")


if __name__ == "__main__":
    main()
