"""How fast is the server with sixteen personas, beside its engine and llama-server? What does a new mix cost?

    python benchmarks/serve.py [MODEL.gguf] [--llama-server PROGRAM] [--pairs 30] [--save NAME]
    python benchmarks/serve.py --table NAME

Throughput: the same sixteen requests, each with an addition of its own strength, by one client over HTTP as streams,
and through Session in this process; and the same requests unsteered to llama-server, which has one steering for all
that it is started with. Interleaved; the ratio is of tokens per second. The servers and their client share the cores
with the engine. Change: GET /v1/steering, POST with no edit and with a new mix, and what a new mix does to the
first token of the next request; beside it llama-server, stopped and started with another control vector.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import results

import personasteer as ps
from personasteer.evaluate.overhead import ratio
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


async def served(url: str, *, steered: bool = True) -> float:
    """Tokens per second of sixteen streams."""
    host, _, port = url.removeprefix("http://").partition(":")
    more = {"stream": True, "stream_options": {"include_usage": True}}
    bodies = [body(i, **more) for i in range(N)]
    if not steered:
        bodies = [{k: v for k, v in b.items() if k != "steering"} for b in bodies]
    begin = time.perf_counter()
    n = sum(await asyncio.gather(*(one(host, int(port), b) for b in bodies)))
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


@contextlib.contextmanager
def llama_server(program: str, model: str, threads: int, *more: str) -> Iterator[str]:
    """The address of a llama-server that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    command = [program, "-m", model, "--port", str(port), "-c", "4096", "-np", str(N), "-t", str(threads), *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=60) as client:
            while process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        break
                time.sleep(0.005)
            else:
                raise SystemExit(f"{program} ended with {process.returncode}")
        yield url
    finally:
        process.terminate()
        process.wait()


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
        for i in range(n):
            begin = time.perf_counter()
            with llama_server(program, model, threads, "--control-vector-scaled", f"{files[i % 2]}:0.1") as url:
                with httpx.Client(base_url=url, timeout=60) as client:
                    first_token(client, QUESTIONS[0])
                seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
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
            ways: dict[str, Callable[[], float]] = {
                "server": lambda: asyncio.run(served(url)),
                "engine": lambda: engine(model, vector),
            }
            if args.llama_server:
                other = running.enter_context(llama_server(args.llama_server, args.model, args.threads))
                ways["llama-server, unsteered"] = lambda: asyncio.run(served(other, steered=False))
            rates: dict[str, list[float]] = {name: [] for name in ways}
            for rate in ways.values():
                rate()
            for i in range(args.pairs):
                for name in list(ways)[:: 1 if i % 2 else -1]:
                    rates[name].append(ways[name]())
            name = f"{model.name} ({model.description})"
        changed = changes(url, args.changes)
        process.terminate()
        process.wait()
    content = {"model": name, "threads": args.threads, "pairs": args.pairs, "rates": rates, "ready": ready,
               "changes": changed}  # fmt: skip
    if args.llama_server:
        content["restart"] = restarts(args.llama_server, args.model, 6, args.threads)
    return content


def table(content: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| sixteen streams | tokens/s | of the engine | 95 % |", "| --- | ---: | ---: | --- |"]
    for name, rates in content["rates"].items():
        middle, low, high = ratio(list(zip(rates, content["rates"]["engine"], strict=True)))
        lines.append(f"| {name} | {np.median(rates):.0f} | {middle:.3f} | {low:.3f} … {high:.3f} |")
    lines += ["", "| another steering | |", "| --- | ---: |"]
    lines += [
        f"| {name} /v1/steering | {1e3 * s:.2f} ms |" for name, s in content["changes"].items() if name != "later"
    ]
    lines.append(
        f"| how much later the first token comes after a new mix | {1e3 * content['changes']['later']:+.2f} ms |"
    )
    if "restart" in content:
        lines.append(f"| llama-server, started again with another vector | {1e3 * content['restart']:.0f} ms |")
    return "\n".join(
        [*lines, "", f"From the start of `personasteer serve` to the first token: {content['ready']:.2f} s."]
    )


def describe(content: dict[str, Any]) -> str:
    """What the table is of."""
    return f"{content['model']}, {content['threads']} threads, {content['pairs']} pairs. {content['machine']}."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo_model_path()))
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--changes", type=int, default=60)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--llama-server", metavar="PROGRAM", help="beside it, unsteered, and started again")
    results.options(parser)
    args = parser.parse_args(arguments)
    content = results.measured_or_saved(args, measure)
    print(f"{describe(content)}\n\n{table(content)}")


if __name__ == "__main__":
    main()
