"""The process that computes: it holds the model, and takes requests and answers them as lines of JSON.

A process of its own, so that what brings llama.cpp down takes no connection with it. Lines come in on stdin; what it
says goes to the stdout that it was started with. It ends where stdin does.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.errors import ArgumentError, ContextError, PersonasteerError, TemplateError, VectorError
from personasteer.live import Session, Stream
from personasteer.mixes import check_steering
from personasteer.model import Model
from personasteer.monitor.guard import Guard, GuardedStream, Rule
from personasteer.monitor.policy import load_policy
from personasteer.monitor.thresholds import Threshold, load_thresholds, thresholds_for
from personasteer.serve.edits import rules_of, steering_of
from personasteer.serve.protocol import Edit, GuardRule
from personasteer.ship.bundle import load_bundle
from personasteer.steering import Steering, check_fits
from personasteer.vectors import PersonaVector

log = logging.getLogger("personasteer.serve")

FAULTS = (ArgumentError, ContextError, TemplateError, VectorError)  # the request's own


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker is started with.

    Args:
        model: the GGUF file; None for a bundle's own.
        vectors: name -> file.
        bundle: a persona whose vectors and edits are served.
        policy: a guard's rules, a TOML file.
        thresholds: a file of `calibrate`; watched: names of vectors that requests may guard, calibrated where no file
            holds their threshold.
    """

    model: str | None
    vectors: Mapping[str, str] = field(default_factory=dict)
    bundle: str | None = None
    policy: str | None = None
    thresholds: str | None = None
    watched: Sequence[str] = ()
    offset: int = 0
    n_ctx: int = 2048
    n_parallel: int = 4
    n_batch: int = 512
    n_threads: int | None = None
    n_gpu_layers: int = -1
    lora: Sequence[tuple[str, float]] = ()
    rpc: Sequence[str] = ()


@dataclass
class _Running:
    """A request that is not done."""

    stream: Stream | GuardedStream
    names: tuple[str, ...]  # whose readings are wanted
    wants_tokens: bool
    n_prompt: int
    n_told: int = 0  # tokens
    n_events: int = 0
    attempt: int = 0


class Worker:
    """The model with its session and its named vectors; `handle` takes a command, `step` computes one decode."""

    def __init__(self, options: WorkerOptions, tell: Any) -> None:
        self.options, self.tell = options, tell
        model_options: dict[str, Any] = {
            "n_ctx": options.n_ctx, "n_parallel": options.n_parallel, "n_batch": options.n_batch,
            "n_threads": options.n_threads, "n_gpu_layers": options.n_gpu_layers, "rpc": list(options.rpc),
        }  # fmt: skip
        self.vectors: dict[str, PersonaVector] = {}
        self.bundled = Steering()
        if options.bundle:
            bundle = load_bundle(options.bundle, model=options.model, lora=list(options.lora), **model_options)
            self.bundle, self.model, self.bundled = bundle, bundle.model, bundle.steering  # its files are there with it
            for edit in bundle.steering:
                vector: PersonaVector = edit.vector  # type: ignore[union-attr]
                names = itertools.chain([vector.name], (f"{vector.name}-{i}" for i in itertools.count(2)))
                if not any(vector is known for known in self.vectors.values()):
                    self.vectors[next(n for n in names if n not in self.vectors)] = vector
        else:
            assert options.model is not None
            self.model = Model(options.model, lora=list(options.lora), **model_options)
        for name, file in options.vectors.items():
            if name in self.vectors:
                raise ArgumentError(f"the bundle has a vector {name!r}, too: give it another name")
            self.vectors[name] = PersonaVector.load(file, offset=options.offset)
        for vector in self.vectors.values():
            check_fits(vector, self.model)
        if options.watched or options.policy or options.thresholds:
            self._check_traits()
        known = load_thresholds(options.thresholds) if options.thresholds else []
        self.thresholds: dict[str, Threshold] = {t.name: t for t in known}
        self._calibrate([self.vectors[name] for name in options.watched])
        policy = load_policy(Path(options.policy)) if options.policy else []
        self.guard = self._guarded(policy) if policy else None
        self.norms = self.model.norms
        self.session: Session = self.model.session()
        self.running: dict[int, _Running] = {}

    def _check_traits(self) -> None:
        """A guard knows vectors by their traits."""
        of: dict[str, str] = {}
        for name, v in self.vectors.items():
            if of.setdefault(v.name, name) != name:
                raise ArgumentError(f"{of[v.name]} and {name} are both of {v.name!r}: a guard cannot tell them apart")

    def _calibrate(self, vectors: Sequence[PersonaVector]) -> None:
        """Thresholds of those that have none."""
        missing = list({v.name: v for v in vectors if v.name not in self.thresholds}.values())
        if missing:
            made = thresholds_for(self.model, missing, running=True, progress=self._progress("calibrating"))
            self.thresholds |= {t.name: t for t in made}

    def _guarded(self, rules: Sequence[Rule]) -> Guard:
        """A guard by known thresholds, where there are; those of the policy file are calibrated."""
        self._calibrate([r.vector for r in rules])
        return Guard(self.model, rules, thresholds=[self.thresholds[n] for n in {r.vector.name for r in rules}])

    def _progress(self, what: str) -> Any:
        last = [0.0]

        def progress(done: int, total: int) -> None:
            if done == total or time.monotonic() - last[0] > 0.5:
                last[0] = time.monotonic()
                self.tell([{"progress": [what, done, total]}])

        return progress

    def described(self) -> dict[str, Any]:
        """What the server tells of the model and the vectors."""
        m = self.model
        return {
            "model": m.name, "file": m.path.stem, "path": str(m.path), "architecture": m.architecture,
            "description": m.description, "adapters": [(str(file), scale) for file, scale in m.adapters],
            "fingerprint": m.fingerprint, "n_ctx": m.n_ctx, "n_parallel": m.n_parallel, "n_layer": m.n_layer,
            "chat": m.has_template,
            "tools": m.has_template and m.template.names("tools"),
            "vectors": {name: self._described(v) for name, v in self.vectors.items()},
        }  # fmt: skip

    def _described(self, v: PersonaVector) -> dict[str, Any]:
        return {
            "trait": v.name, "layers": list(v.layers), "strength": v.strength, "window": list(v.window),
            "calibrated": "calibration" in v.provenance, "cap": v.thresholds is not None,
            "watched": v.name in self.thresholds,
        }  # fmt: skip

    # -- commands ---------------------------------------------------------------------------------------------------

    def handle(self, command: Mapping[str, Any]) -> None:
        """One line of the server's."""
        request_id = int(command["id"])
        try:
            if command["do"] == "submit":
                self._submit(request_id, command)
            elif command["do"] == "check":
                check_steering(steering_of([Edit(**e) for e in command["mix"]], self.vectors), self.model)
                self.tell([{"id": request_id, "done": {}}])
            elif command["do"] == "load":
                vector = PersonaVector.load(command["file"], offset=self.options.offset)
                check_fits(vector, self.model)
                self.vectors[command["name"]] = vector
                self.tell([{"id": request_id, "vectors": {command["name"]: self._described(vector)}, "done": {}}])
            elif command["do"] == "cancel":
                if known := self.running.pop(request_id, None):
                    known.stream.cancel()
                self.tell([{"id": request_id, "cancelled": True}])
        except FAULTS as e:
            self.tell([{"id": request_id, "error": [400, str(e), type(e).__name__]}])
        except (PersonasteerError, MemoryError) as e:
            self.tell([{"id": request_id, "error": [500, str(e) or "out of memory", type(e).__name__]}])
        except Exception as e:  # one request's trouble is not the others'
            log.exception("a request failed")
            self.tell([{"id": request_id, "error": [500, "an error of the server; its log says more", str(e)]}])

    def _submit(self, request_id: int, c: Mapping[str, Any]) -> None:
        steering = steering_of([Edit(**e) for e in c["steering"]], self.vectors)
        if c.get("bundled"):
            steering = self.bundled + steering
        options = dict(c["options"])
        if options.get("logit_bias"):
            options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
        max_tokens = options.pop("max_tokens", None)
        options["max_tokens"] = min(max_tokens or self.model.n_ctx, self.model.n_ctx)
        names = tuple(c.get("readings") or ())
        if names:
            reads = [(v, v.layers) for v in (self.vectors[n] for n in names)]
            options |= {"readings": reads, "read_prompt": False}
        given: dict[str, Any] = {"steer": steering}
        if "messages" in c:
            given |= {"conversation": c["messages"], "variables": c.get("variables") or {}}
        else:
            given["prompt"] = c["prompt"]
        guard = self.guard
        if c.get("guard") is not None:
            rules = rules_of([GuardRule(**r) for r in c["guard"]], self.vectors)
            unknown = [r.vector.name for r in rules if r.vector.name not in self.thresholds]
            if unknown:
                raise ArgumentError(
                    f"there is no threshold of {unknown[0]!r}: start the server with --watch or --thresholds"
                )
            guard = self._guarded(rules) if rules else None
        stream: Stream | GuardedStream
        if guard is None:
            stream = self.session.submit(**given, **options)
        else:
            conversation = given.pop("conversation", None)
            stream = guard.submit(self.session, conversation, **given, **options)
        n_prompt = stream.n_prompt
        self.running[request_id] = _Running(stream, names, bool(names) or "logprobs" in options, n_prompt)
        self.tell([{"id": request_id, "begun": n_prompt}])

    # -- computing --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One decode, and what came of it."""
        begin = time.perf_counter()
        n = len(self.running)
        before = {k: len(r.stream.tokens()) for k, r in self.running.items()}
        try:
            self.session.step()
        except PersonasteerError as e:
            log.error("a decode failed: %s", e)
        took = time.perf_counter() - begin
        news: list[dict[str, Any]] = []
        n_new = 0
        for request_id, r in list(self.running.items()):
            n_new += max(0, len(r.stream.tokens()) - before[request_id])
            try:
                news += self._news(request_id, r)
            except PersonasteerError as e:
                self.running.pop(request_id, None)
                status = 400 if isinstance(e, FAULTS) else 500
                news.append({"id": request_id, "error": [status, str(e), type(e).__name__]})
        self.tell([*news, {"step": [n, n_new, took]}])

    def _news(self, request_id: int, r: _Running) -> list[dict[str, Any]]:
        text = r.stream.take()
        events = []
        if isinstance(r.stream, GuardedStream):
            events = [{**e.as_dict(), "name": self._served_as(e.name)} for e in r.stream.events[r.n_events :]]
            r.n_events += len(events)
            if r.stream.attempt != r.attempt:  # what it said of the attempt before is taken back
                r.attempt, r.n_told = r.stream.attempt, 0
        done = r.stream.done
        held = isinstance(r.stream, GuardedStream) and r.stream.holds_back and not done
        item: dict[str, Any] = {"id": request_id}
        if events:
            item["events"] = events
        final: dict[str, Any] | None = None
        if done:
            final = {}
            if isinstance(r.stream, GuardedStream):
                guarded = r.stream.result()
                answer, text = guarded.answer, guarded.answer.text if r.stream.holds_back else text
                before = {self._served_as(n): _number(x) for n, x in guarded.before.items()}
                states = {self._served_as(n): state for n, state in guarded.states.items()}
                final |= {"before": before, "states": states, "attempts": guarded.attempts}
            else:
                answer = r.stream.result()
            final |= {
                "finish": answer.finish, "n_prompt": answer.n_prompt, "n_reused": answer.n_reused,
                "n_tokens": len(answer.tokens), "rho": answer.rho,
            }  # fmt: skip
        if text:
            item["text"] = text
        stopped = final is not None and final["finish"] == "stopped"  # what a guard took back is not told by its tokens
        if r.wants_tokens and not held and not stopped:
            tokens = r.stream.tokens(r.n_told)
            if tokens:
                ids = [t for t, _, _ in tokens]
                pieces = self.model.token_bytes([*ids, *(t for _, _, top in tokens for t, _ in top)])
                told, others = pieces[: len(ids)], iter(pieces[len(ids) :])
                item["tokens"] = [
                    [list(b), _number(p), [[list(next(others)), _number(q)] for _, q in top]]
                    for b, (_, p, top) in zip(told, tokens, strict=True)
                ]
                if r.names:
                    item["readings"] = self._readings(r, len(tokens))
                r.n_told += len(tokens)
        if final is not None:
            item["done"] = final
            del self.running[request_id]
        return [item] if len(item) > 1 else []

    def _served_as(self, trait: str) -> str:
        """A guard knows vectors by their own names."""
        return next((name for name, v in self.vectors.items() if v.name == trait), trait)

    def _readings(self, r: _Running, n: int) -> dict[str, list[float | None]]:
        """For the n latest tokens, the mean over the vector's layers of <h_il, v-hat_il> / m_il, m_il the block's norm,
        at the token before: where the token was drawn.
        """
        first = r.n_prompt - 1 + r.n_told
        read = r.stream.readings(first)
        return {
            name: [_number(x) for x in _relative(rows[:n], self.norms[list(self.vectors[name].layers)])]
            for name, rows in zip(r.names, read, strict=True)
        }


def _relative(rows: NDArray[np.float32], norms: NDArray[np.float32]) -> NDArray[np.float64]:
    scaled = np.asarray(rows, np.float64) / norms
    known = np.isfinite(scaled)
    total = np.where(known, scaled, 0.0).sum(1)
    return np.where(known.any(1), total / np.maximum(known.sum(1), 1), np.nan)


def _number(x: float) -> float | None:
    return round(float(x), 6) if np.isfinite(x) else None


def main() -> int:
    """What `python -m personasteer.serve.worker` runs: the options are the first line of stdin."""
    for sig in (signal.SIGINT, signal.SIGTERM):  # the server's, which lets requests finish
        signal.signal(sig, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    given = sys.stdin.buffer
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")

    def tell(news: list[dict[str, Any]]) -> None:
        if news:
            out.write(json.dumps(news, separators=(",", ":")).encode() + b"\n")
            out.flush()

    commands: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    try:
        worker = Worker(WorkerOptions(**json.loads(given.readline())), tell)
        tell([{"ready": worker.described()}])
        threading.Thread(target=_read, args=(given, commands), daemon=True).start()
        while True:
            while not (worker.running and commands.empty()):
                line = commands.get()
                if not line:
                    return 0
                worker.handle(json.loads(line))
            worker.step()
    except PersonasteerError as e:
        tell([{"failed": [type(e).__name__, str(e)]}])
        return 1
    except BrokenPipeError:  # the server is gone
        return 0


def _read(given: Any, commands: queue.SimpleQueue[bytes]) -> None:
    for line in given:
        commands.put(line)
    commands.put(b"")


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # nothing of the interpreter's end may hang on a thread that reads
