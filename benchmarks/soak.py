"""Does a session stay sound under long, rough use? Random requests, cancels, errors and steering changes.

    python benchmarks/soak.py [MODEL.gguf] [--requests 2000]

Without a model: the bundled demo model; `tiny` is a random one of under a megabyte. Prints the resident memory as the
requests go by, and fails where a request is stuck, an error is not one of ours, or memory grows by more than 2 % after
the first quarter.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import personasteer as ps
from personasteer.live import Session, Stream
from personasteer.model import demo_model_path
from personasteer.tiny_model import write_tiny_model


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def random_edit(
    rng: np.random.Generator, vector: ps.PersonaVector, other: ps.PersonaVector, scope: str, on: str
) -> Any:
    makers = [
        lambda: ps.Add(vector, float(rng.uniform(-0.3, 0.3)), scope=scope),
        lambda: ps.Add(vector, 0.2, scope=scope, keep_norm=True),
        lambda: ps.Add(vector, 0.3, half_life=float(rng.uniform(1, 30))),
        lambda: ps.Add(vector, 0.3, start=int(rng.integers(0, 4)), stop=int(rng.integers(4, 20))),
        lambda: ps.Cap(vector, scope=scope),
        lambda: ps.Floor(vector, scope=scope),
        lambda: ps.Ablate(vector, share=float(rng.uniform(0, 1)), scope=scope),
        lambda: ps.Redirect(vector, other),
        lambda: ps.When(other, vector * 0.3, on=on),
    ]
    return makers[int(rng.integers(0, len(makers)))]()


def random_steering(rng: np.random.Generator, vectors: list[ps.PersonaVector], *, running: bool = False) -> ps.Steering:
    """Up to three edits; with `running` none that is decided on the prompt."""
    steering = ps.Steering()
    for v in rng.permutation(len(vectors))[: rng.integers(0, 4)]:
        scope = str(rng.choice(["all", "prompt", "response"]))
        on = "token" if running else str(rng.choice(["prompt", "token"]))
        steering.append(random_edit(rng, vectors[v], vectors[v - 1], scope, on))
    return steering


def submit(rng: np.random.Generator, session: Session, vectors: list[ps.PersonaVector], text: str) -> Stream | None:
    """A request of some kind, or None where it was refused, as one in ten is meant to be."""
    begin = int(rng.integers(0, len(text) - 200))
    options = {"max_tokens": int(rng.integers(1, 24)), "temperature": float(rng.choice([0.0, 0.8])), "seed": begin}
    prompt = text[begin : begin + int(rng.integers(1, 160))]
    kind = rng.integers(0, 20)
    if kind == 0:
        prompt = text * 20  # too long
    elif kind == 1:
        options["grammar"] = "root ::= ["
    elif kind == 2:
        options["grammar"] = 'root ::= [a-z ]+ "."'
    elif kind == 3:
        options["stop"] = ["a", "the"]
    elif kind == 4:
        options["logprobs"] = 3
    elif kind == 5:
        options["readings"] = vectors[:2]
    try:
        steering = random_steering(rng, vectors)
        if rng.random() < 0.5:
            return session.submit(prompt, steer=steering, **options)
        return session.submit(prompt=prompt, steer=steering, **options)
    except ps.PersonasteerError:
        return None


def soak(model: ps.Model, n_requests: int, seed: int = 0) -> list[float]:
    """Resident MiB after each tenth of the requests."""
    rng = np.random.default_rng(seed)
    layers = tuple(range(1, model.n_layer - 1))
    zero = np.zeros(model.n_layer, np.float32)
    vectors = [
        ps.PersonaVector(
            rng.standard_normal((model.n_layer, model.n_embd)).astype(np.float32), layers, f"v{i}", thresholds=zero
        )
        for i in range(8)
    ]
    text = "The river runs past the old mill, and nobody remembers who built the bridge. " * 12
    memory, n_done, n_refused = [], 0, 0
    with model.session(n_parallel=8, n_ctx=256) as session:
        running: list[Stream] = []
        n_steps = 0
        while n_done < n_requests:
            while len(running) < 12:
                stream = submit(rng, session, vectors, text)
                if stream is None:
                    n_refused += 1
                    n_done += 1
                else:
                    running.append(stream)
            session.step()
            n_steps += 1
            if n_steps > 100 * n_requests:
                raise SystemExit("a request is stuck")
            for stream in rng.permutation(np.array(running, object))[:2]:
                if rng.random() < 0.05:
                    stream.cancel()
                elif rng.random() < 0.2:
                    stream.steer(random_steering(rng, vectors, running=True))
            for stream in [s for s in running if s.done]:
                stream.result()
                running.remove(stream)
                n_done += 1
                if n_done % max(1, n_requests // 20) == 0:
                    gc.collect()
                    memory.append(rss_mib())
                    print(f"{n_done} requests, {n_refused} refused, {memory[-1]:.1f} MiB", flush=True)
        session.run()
        if session.n_running:
            raise SystemExit("a request is stuck")
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file, or `tiny`; the demo model without")
    parser.add_argument("--requests", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_model(Path(folder) / "tiny.gguf") if args.model == "tiny" else args.model or demo_model_path()
        with ps.Model(path, n_ctx=256) as model:
            memory = soak(model, args.requests)
    after = memory[len(memory) // 4 :]
    growth = max(after) / after[0] - 1 if after else 0.0
    print(f"memory after the first quarter: {after[0]:.1f} to {max(after):.1f} MiB, {100 * growth:+.2f} %")
    sys.exit(growth > 0.02)


if __name__ == "__main__":
    main()
