"""What does it cost to change the steering of a running request, beside a swap of llama.cpp's own control vector?

    python benchmarks/steering_change.py [MODEL.gguf]

Ours: Stream.steer with a strength never seen before, compiled and handed over, then the next decode. llama.cpp's:
llama_set_adapter_cvec with new rows, then the next decode, which acts on all sequences of the context. "next decode" is
the time of the first decode after the change over that of an undisturbed one.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from plain import PlainContext

import personasteer as ps
from personasteer.engine import Request, Sampling
from personasteer.model import demo_model_path

N_CHANGES = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo_model_path()))
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print("| what | layers | change, ms (median, max) | next decode, ratio | graphs built anew |")
    print("| --- | --- | --- | --- | --- |")
    with ps.Model(args.model, n_ctx=512) as model:
        shape = (model.n_layer, model.n_embd)
        data = rng.standard_normal(shape).astype(np.float32)
        middle = tuple(range(model.n_layer // 2, model.n_layer // 2 + max(1, model.n_layer // 6)))
        tokens = [int(t) for t in rng.integers(0, model.n_vocab, 32)]
        for layers in (middle, tuple(range(1, model.n_layer))):
            vector = ps.PersonaVector(data, layers, thresholds=np.zeros(model.n_layer, np.float32))
            for name, edit in (
                ("add", lambda i, v=vector: v * (0.001 * (i + 1))),
                ("cap", lambda i, v=vector, n=model.n_layer: ps.Cap(v, tau=[0.01 * i] * n)),
            ):
                with model.session(n_parallel=1, reuse_cache=False) as session:
                    request = Request(
                        tokens, 32, ps.Steering([edit(0)]), 3 * N_CHANGES + 9, Sampling(temperature=0), ignore_end=True
                    )
                    stream = session._submit(request)
                    for _ in range(4):
                        session.step()
                    builds = session._native.n_builds
                    change, after, plain = [], [], []
                    for i in range(N_CHANGES):
                        start = time.perf_counter()
                        stream.steer(edit(i + 1))
                        change.append(time.perf_counter() - start)
                        after.append(seconds(session.step))
                        plain.append(seconds(session.step))
                    built = session._native.n_builds - builds
                print(row(f"ours, {name}", layers, change, after, plain, built))
        context = PlainContext(args.model, n_ctx=512, n_parallel=1, n_threads=model.n_threads)
        context.decode(tokens, range(32), [0] * 32, 1)
        change, after, plain = [], [], []
        for i in range(N_CHANGES):
            rows = data[1:] * np.float32(0.001 * (i + 1))
            start = time.perf_counter()
            context.set_control_vector(rows)
            change.append(time.perf_counter() - start)
            position = 32 + 2 * i
            after.append(seconds(lambda p=position: context.decode([5], [p], [0], 1)))
            plain.append(seconds(lambda p=position: context.decode([5], [p + 1], [0], 1)))
        print(row("llama_set_adapter_cvec", range(1, model.n_layer), change, after, plain, None))
        context.close()


def seconds(f: object) -> float:
    start = time.perf_counter()
    f()  # type: ignore[operator]
    return time.perf_counter() - start


def row(name: str, layers: object, change: list[float], after: list[float], plain: list[float], built: object) -> str:
    ratio = np.median(np.array(after) / np.array(plain))
    return (
        f"| {name} | {len(layers)} | {1e3 * np.median(change):.3f}, {1e3 * max(change):.3f} | {ratio:.3f} | "  # type: ignore[arg-type]
        f"{'' if built is None else built} |"
    )


if __name__ == "__main__":
    main()
