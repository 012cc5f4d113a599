"""uvicorn around the application: one address, and an end that lets requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from personasteer.errors import ArgumentError, ModelError

log = logging.getLogger("personasteer.serve")


class _Server(uvicorn.Server):
    """Stops taking requests at the first signal; those that run have `grace` seconds."""

    def __init__(self, app: FastAPI, config: uvicorn.Config, grace: float, *, as_json: bool) -> None:
        super().__init__(config)
        self._as_json = as_json
        self.failed = ""
        self._backend, self._grace = app.state.server.backend, grace
        self._ending: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._telling = asyncio.create_task(self._tell(sockets or []))

    async def _tell(self, sockets: list[socket.socket]) -> None:
        """Say where it is once requests can come; end where the worker cannot start."""
        await self._backend.settled()
        if self._backend.state != "ready":
            self.failed = self._backend.trouble
            self.should_exit = True
            return
        for sock in sockets:
            host, port = sock.getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            said = json.dumps({"url": url, "vectors": list(self._backend.info["vectors"])}) if self._as_json else ""
            print(said or f"{url} is ready", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._ending is None:
            log.warning("stopping: running requests have %g s", self._grace)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ending = asyncio.create_task(self._backend.stop(self._grace))
        await super().shutdown(sockets)
        await self._ending


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address. Raises ArgumentError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as e:
        sock.close()
        raise ArgumentError(f"cannot listen at {host}:{port} ({getattr(e, 'strerror', None) or e})") from e
    return sock


def run(app: FastAPI, sock: socket.socket, *, grace: float, verbose: bool, as_json: bool = False) -> None:
    """Serve until a signal comes; says where it is in a line, as words or as JSON. Raises ModelError or ArgumentError
    where the worker cannot start.
    """
    if verbose:
        log.setLevel(logging.INFO)
    config = uvicorn.Config(
        app, log_level="info" if verbose else "warning", access_log=verbose, server_header=False,
        timeout_graceful_shutdown=max(1, round(grace + 5)), timeout_keep_alive=30, h11_max_incomplete_event_size=65536,
    )  # fmt: skip
    server = _Server(app, config, grace, as_json=as_json)
    with contextlib.suppress(KeyboardInterrupt):  # the signal again, once all is done
        server.run(sockets=[sock])
    if server.failed:
        usage = app.state.server.backend.failed_as == "ArgumentError"
        raise (ArgumentError if usage else ModelError)(server.failed)
