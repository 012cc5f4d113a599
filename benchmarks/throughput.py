"""How fast is the whole engine with sixteen personas, against a bare loop of sixteen unsteered sequences?

    python benchmarks/throughput.py [MODEL.gguf]

Ours: sixteen requests through Session, each with a steering of its own (an addition and a cap), temperature 0.7 with
top-k, top-p and min-p, streamed as text. The bare loop: llama.cpp through ctypes, the same numbers of tokens, nothing
sampled, nothing steered. Both read the prompts and then generate. Interleaved; the ratio is tokens per second of ours
over the bare loop's. Beside it the same engine with one request after the other.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from plain import PlainContext

import personasteer as ps
from personasteer.engine import Request, Sampling
from personasteer.evaluate.overhead import ratio
from personasteer.model import demo_model_path

N, N_PROMPT, N_TOKENS = 16, 16, 32


def ours(session: ps.Session, requests: list[Request]) -> float:
    start = time.perf_counter()
    streams = [session._submit(r) for r in requests]
    for stream in streams:
        for _ in stream:
            pass
    assert all(len(s.result().tokens) == N_TOKENS for s in streams)
    return time.perf_counter() - start


def bare(context: PlainContext, prompts: list[list[int]]) -> float:
    context.clear()
    start = time.perf_counter()
    tokens = [t for p in prompts for t in p]
    context.decode(tokens, [*range(N_PROMPT)] * N, [q for q in range(N) for _ in range(N_PROMPT)], N)
    for step in range(N_TOKENS - 1):  # the last token needs no decode
        context.decode([p[step % N_PROMPT] for p in prompts], [N_PROMPT + step] * N, range(N), N)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo_model_path()))
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with ps.Model(args.model, n_ctx=N_PROMPT + N_TOKENS + 2) as model:
        layers = tuple(range(model.n_layer))
        shape = (model.n_layer, model.n_embd)
        zero = np.zeros(model.n_layer, np.float32)
        vectors = [
            ps.PersonaVector(rng.standard_normal(shape).astype(np.float32), layers, thresholds=zero)
            for _ in range(2 * N)
        ]
        prompts = [[int(t) for t in rng.integers(0, model.n_vocab, N_PROMPT)] for _ in range(N)]
        requests = [
            Request(
                prompt,
                N_PROMPT,
                ps.Steering([vectors[i] * 0.05, ps.Cap(vectors[N + i])]),
                N_TOKENS,
                Sampling(temperature=0.7, seed=i),
                ignore_end=True,
            )
            for i, prompt in enumerate(prompts)
        ]
        context = PlainContext(args.model, n_ctx=N_PROMPT + N_TOKENS + 2, n_parallel=N, n_threads=model.n_threads)
        many = model.session(n_parallel=N, reuse_cache=False)
        one = model.session(n_parallel=1, reuse_cache=False)
        ours(many, requests), bare(context, prompts), ours(one, requests[:1])
        seconds = np.empty((args.pairs, 2))
        for i in range(args.pairs):
            for which in (0, 1)[:: 1 if i % 2 else -1]:
                seconds[i, which] = bare(context, prompts) if which else ours(many, requests)
        alone = float(np.median([sum(ours(one, [r]) for r in requests) for _ in range(2)]))
        median, low, high = ratio([(theirs, own) for own, theirs in seconds.tolist()])
        rate = N * N_TOKENS / np.median(seconds, axis=0)
        print(f"{model.name} ({model.description}), {N} requests of {N_PROMPT} + {N_TOKENS} tokens, {args.pairs} pairs")
        print(f"ours {rate[0]:.0f} tokens/s, bare loop {rate[1]:.0f} tokens/s")
        print(f"ratio {median:.3f}, 95 % interval {low:.3f} ... {high:.3f}")
        slower = alone / np.median(seconds[:, 0])
        print(
            f"one request after the other {N * N_TOKENS / alone:.0f} tokens/s: all at once {slower:.2f} times as fast"
        )
        many.close()
        one.close()
        context.close()


if __name__ == "__main__":
    main()
