"""llama.cpp's RPC workers on this machine, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def workers(program: Path, n: int) -> Iterator[list[str]]:
    """Addresses of n workers, each a process with one CPU thread, which end with the context."""
    running = []
    try:
        addresses = []
        for _ in range(n):
            with socket.create_server(("127.0.0.1", 0)) as s:
                port = s.getsockname()[1]
            command = [str(program), "-H", "127.0.0.1", "-p", str(port), "-t", "1"]
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            addresses.append(f"127.0.0.1:{port}")
        for address, process in zip(addresses, running, strict=True):
            _wait(int(address.rpartition(":")[2]), process)
        yield addresses
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the RPC worker at port {port} did not start (exit code {process.poll()})")
