"""What Prometheus is told."""

from __future__ import annotations

import math
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest

from personasteer.serve.backend import Backend

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server."""

    def __init__(self, backend: Backend) -> None:
        r = self.registry = CollectorRegistry()
        name = "personasteer_"
        self.requests = Counter(name + "requests", "Requests answered.", ["endpoint", "status"], registry=r)
        self.prompt_tokens = Counter(name + "prompt_tokens", "Tokens of prompts.", registry=r)
        self.reused_tokens = Counter(name + "reused_prompt_tokens", "Prompt tokens that the cache held.", registry=r)
        self.tokens = Counter(name + "generated_tokens", "Tokens generated.", registry=r)
        self.first = Histogram(name + "first_token_seconds", "To the first text.", buckets=SECONDS, registry=r)
        self.whole = Histogram(name + "request_seconds", "To the end of an answer.", buckets=SECONDS, registry=r)
        self.batch = Histogram(name + "batch_size", "Requests in a decode.", buckets=SIZES, registry=r)
        self.decode = Summary(name + "decode_seconds", "Time of a decode.", registry=r)
        self.reading = Summary(name + "reading", "Readings before the answer.", ["vector"], registry=r)
        self.events = Counter(name + "guard_events", "Changes of state, and actions.", ["vector", "state", "action"],
                              registry=r)  # fmt: skip
        gauges: dict[str, tuple[str, Any]] = {
            "queue_waiting": ("Requests that wait.", lambda: backend.n_waiting),
            "requests_running": ("Requests in the batch.", lambda: backend.n_running),
            "worker_restarts": ("Times that the worker was started again.", lambda: backend.n_restarts),
            "worker_ready": ("1 while the worker takes requests.", lambda: backend.state == "ready"),
        }
        for what, (text, value) in gauges.items():
            Gauge(name + what, text, registry=r).set_function(value)
        backend.on_step = self._step

    def _step(self, n_running: int, n_tokens: int, seconds: float) -> None:
        self.batch.observe(n_running)
        self.decode.observe(seconds)
        self.tokens.inc(n_tokens)

    def answered(self, done: dict[str, Any], seconds: float) -> None:
        """An answer that is complete."""
        self.whole.observe(seconds)
        self.prompt_tokens.inc(done["n_prompt"])
        self.reused_tokens.inc(done["n_reused"])
        for vector, value in (done.get("before") or {}).items():
            if value is not None and math.isfinite(value):
                self.reading.labels(vector).observe(value)

    def event(self, event: dict[str, Any]) -> None:
        """What a guard saw or did."""
        self.events.labels(event["name"], event["state"], event["action"]).inc()

    def text(self) -> bytes:
        return bytes(generate_latest(self.registry))
