"""A server in a process of its own, as users start it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

KEY = "sk-a-key-of-the-tests"
PROGRAM = [sys.executable, "-P", "-c", "from personasteer.cli import main; main()"]  # not from the folder we are in


@dataclass
class Running:
    """A server that takes requests."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def client(self, **options: object) -> openai.OpenAI:
        given = {"api_key": KEY, "max_retries": 0, "timeout": 60.0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)  # type: ignore[arg-type]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, headers={"Authorization": f"Bearer {KEY}"})

    def post(self, path: str, **options: object) -> httpx.Response:
        given = {"timeout": 60, "headers": {"Authorization": f"Bearer {KEY}"}, **options}
        return httpx.post(self.url + path, **given)  # type: ignore[arg-type]

    def workers(self) -> list[int]:
        """Process ids of the workers."""
        found = []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for pid in (task / "children").read_text().split():
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"personasteer.serve.worker" in command:
                    found.append(int(pid))
        return found

    def metric(self, name: str) -> float:
        lines = [x for x in self.get("/metrics").text.splitlines() if x.startswith(name + " ")]
        assert lines, name
        return float(lines[0].split()[-1])

    def wait_for(self, holds: object, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not holds():  # type: ignore[operator]
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)


@contextmanager
def serving(log: Path, options: Sequence[str]) -> Iterator[Running]:
    """`personasteer serve` with these options at a free port, with a key."""
    command = [*PROGRAM, "serve", "--port", "0", *options]
    with log.open("w") as f:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=f, text=True, env={**os.environ, "PERSONASTEER_API_KEY": KEY}
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert "is ready" in line, log.read_text()
        yield Running(line.split()[0], process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            finally:
                process.kill()
        process.stdout.close()
