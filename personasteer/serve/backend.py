"""The server's side of the worker: starts it, restarts it, and lets requests wait their turn."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import sys
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from personasteer.serve.protocol import ApiError
from personasteer.serve.worker import WorkerOptions

log = logging.getLogger("personasteer.serve")

MAX_LINE = 2**28  # bytes that the worker may say at once
RESTARTS = (0.0, 1.0, 5.0, 30.0)  # seconds before each restart of a worker that dies before it is ready
MAX_DEPTH = 100  # of a request: JSON is read and written by recursion
TELL_SECONDS = 10.0  # between two lines on progress
STOP_SECONDS = 10.0  # that a worker has to end


@dataclass(eq=False)
class Job:
    """A request: what the worker is told, and what it says."""

    id: int
    client: str
    line: str
    news: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    born: float = field(default_factory=time.monotonic)
    over: bool = False
    timer: asyncio.TimerHandle | None = None

    def end(self) -> None:
        self.over = True
        if self.timer is not None:
            self.timer.cancel()


class FairQueue:
    """Jobs that wait: each client's in their order, and the clients in turn."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[Job]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def put(self, job: Job) -> None:
        self._of.setdefault(job.client, deque()).append(job)

    def take(self) -> Job:
        client, jobs = self._of.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._of[client] = jobs  # behind the others
        return job

    def remove(self, job: Job) -> bool:
        jobs = self._of.get(job.client, deque())
        if job not in jobs:
            return False
        jobs.remove(job)
        if not jobs:
            del self._of[job.client]
        return True

    def clear(self) -> list[Job]:
        left = [job for jobs in self._of.values() for job in jobs]
        self._of.clear()
        return left


class Backend:
    """One worker process, and the requests to it.

    Attributes:
        state: "starting", "ready", "stopping" or "failed".
        trouble: why there is no worker, for the log: it may name files.
        info: what the worker says of the model and the vectors, once it was ready.
        on_step: called with (requests running, tokens, seconds) of each decode.
    """

    def __init__(self, options: WorkerOptions, *, max_waiting: int, patience: float) -> None:
        self.options, self.max_waiting, self.patience = options, max_waiting, patience
        self.state, self.trouble = "starting", ""
        self.info: dict[str, Any] = {}
        self.n_restarts = 0
        self.failed_as = ""  # the kind of error that a worker ended with
        self.progress: tuple[str, int, int] | None = None
        self._told = time.monotonic()  # of progress
        self.on_step: Callable[[int, int, float], None] = lambda *_: None
        self._ids = itertools.count(1)
        self._waiting, self._running = FairQueue(), dict[int, Job]()
        self._asked: dict[int, asyncio.Future[None]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._known = asyncio.Event()  # ready, or failed for good
        self._n_parked = 0  # that wait for it
        self._quiet_since: float | None = None  # since when the worker owes an answer
        self._idle = asyncio.Event()
        self._idle.set()
        self._keeper: asyncio.Task[None] | None = None

    # -- the process ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the worker, and keep one."""
        self._keeper = asyncio.create_task(self._keep())

    async def settled(self) -> None:
        """Wait until there is a worker, however long it calibrates, or until there will be none."""
        await self._known.wait()

    async def ready(self) -> None:
        """Wait for the worker. Raises ApiError 503 where there will be none."""
        if self._n_parked >= self.max_waiting:
            raise self._full()
        self._n_parked += 1
        try:
            await asyncio.wait_for(self._known.wait(), self.patience)
        except TimeoutError:
            pass
        finally:
            self._n_parked -= 1
        if self.state != "ready":
            raise ApiError(503, f"there is no worker: {self.state}", headers={"Retry-After": "5"})

    async def _keep(self) -> None:
        failures = 0
        while self.state != "stopping":
            try:
                self.trouble = await self._run()
            except Exception as e:  # whatever it said
                log.exception("the worker is not understood")
                self.trouble = type(e).__name__
            if self.state == "stopping":
                break
            failures = 0 if self.state == "ready" else failures + 1
            self.state = "starting"
            if not self.info or failures >= len(RESTARTS):  # it never worked, or will not again
                self.state = "failed"
                self._known.set()
                self._fail_all(self._waiting.clear(), "there is no worker")
                return
            log.error("the worker ended (%s); it is started again", self.trouble)
            self._known.clear()
            self.n_restarts += 1
            await asyncio.sleep(RESTARTS[failures])

    async def _run(self) -> str:
        """One worker from its start to its end; why it ended."""
        command = [sys.executable, "-P", "-m", "personasteer.serve.worker"]
        pipe = asyncio.subprocess.PIPE
        process = self._process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, limit=MAX_LINE
        )
        assert process.stdout is not None
        trouble = ""
        self._quiet_since = None
        watch = asyncio.create_task(self._watch(process))
        try:
            self._write(json.dumps(asdict(self.options)))
            async for line in process.stdout:
                for news in json.loads(line):
                    if "failed" in news:
                        self.failed_as, trouble = news["failed"]
                    self._hear(news)
                self._quiet_since = time.monotonic() if self._running or self._asked else None
            code = await process.wait()
            trouble = trouble or (f"signal {-code}" if code < 0 else f"exit code {code}")
        finally:
            watch.cancel()
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            self._process = None
            lost, self._running = list(self._running.values()), {}
            self._fail_all(lost, "the worker died" if self.state != "stopping" else "the server is stopping")
            for asked in self._asked.values():
                if not asked.done():
                    asked.set_exception(ApiError(503, "the worker died"))
        return trouble

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """End a worker that was told something and says nothing."""
        while True:
            await asyncio.sleep(min(5.0, self.patience / 4))
            if self._quiet_since is not None and time.monotonic() - self._quiet_since > self.patience:
                log.error("the worker has said nothing for %g s", self.patience)
                process.kill()
                return

    def _write(self, line: str) -> None:
        process = self._process
        if process is not None and process.stdin is not None and not process.stdin.is_closing():
            process.stdin.write(line.encode() + b"\n")
            if self._quiet_since is None and self.state == "ready":
                self._quiet_since = time.monotonic()

    def _hear(self, news: dict[str, Any]) -> None:
        if "step" in news:
            self.on_step(*news["step"])
        elif "ready" in news:
            self.info, self.state, self.progress = news["ready"], "ready", None
            self._known.set()
            self._fill()
        elif "progress" in news:
            self.progress = news["progress"]
            if time.monotonic() - self._told > TELL_SECONDS:
                self._told = time.monotonic()
                log.warning("%s: %d of %d", *news["progress"])
        elif "id" in news:
            if asked := self._asked.pop(news["id"], None):
                if asked.done():  # who asked is gone
                    return
                if "error" in news:
                    status, message, _ = news["error"]
                    asked.set_exception(ApiError(status, message))
                else:
                    self.info.get("vectors", {}).update(news.get("vectors", {}))
                    asked.set_result(None)
            elif job := self._running.get(news["id"]):
                if "done" in news or "error" in news:
                    self._end(job)
                job.news.put_nowait(news)

    def _end(self, job: Job) -> None:
        job.end()
        self._running.pop(job.id, None)
        self._fill()

    def _fail_all(self, jobs: Sequence[Job], why: str) -> None:
        for job in jobs:
            job.end()
            job.news.put_nowait({"id": job.id, "error": [503, why, "worker"]})
        self._note_idle()

    def _full(self) -> ApiError:
        return ApiError(
            429, f"{self.max_waiting} requests are waiting already", code="queue_full", headers={"Retry-After": "1"}
        )

    def _note_idle(self) -> None:
        if self._running or len(self._waiting):
            self._idle.clear()
        else:
            self._idle.set()

    # -- requests ---------------------------------------------------------------------------------------------------

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        return len(self._running)

    def submit(self, client: str, command: Mapping[str, Any], *, timeout: float) -> Job:
        """Queue a request that may take `timeout` seconds, waiting included. Raises ApiError 429 where too many wait,
        503 where there is no worker.
        """
        if self.state not in ("ready", "starting"):
            raise ApiError(503, f"there is no worker: {self.state}", headers={"Retry-After": "5"})
        free = self.state == "ready" and len(self._running) < self.options.n_parallel
        if len(self._waiting) >= self.max_waiting and not free:
            raise self._full()
        request_id = next(self._ids)
        if _is_deep(command):
            raise ApiError(400, f"the request is nested more than {MAX_DEPTH} levels deep")
        line = json.dumps({**command, "do": "submit", "id": request_id}, separators=(",", ":"))
        job = Job(request_id, client, line)
        job.timer = asyncio.get_running_loop().call_later(timeout, self._expire, job, timeout)
        self._waiting.put(job)
        self._fill()
        return job

    def _fill(self) -> None:
        while self.state == "ready" and len(self._waiting) and len(self._running) < self.options.n_parallel:
            job = self._waiting.take()
            self._running[job.id] = job
            self._write(job.line)
        self._note_idle()

    def cancel(self, job: Job) -> None:
        """Forget a request: its place is free at the next decode."""
        if job.over:
            return
        job.end()
        if not self._waiting.remove(job):
            self._running.pop(job.id, None)
            self._write(json.dumps({"do": "cancel", "id": job.id}))
        self._fill()

    async def check(self, mix: Sequence[Mapping[str, Any]]) -> None:
        """Raises ApiError where a request with these edits would fail."""
        await self._ask({"do": "check", "mix": list(mix)})

    async def load(self, name: str, file: str) -> None:
        """One more vector. Raises ApiError for a file that is none, or for another model."""
        if name in self.info.get("vectors", {}):
            raise ApiError(400, f"there is a vector {name!r} already")
        await self._ask({"do": "load", "name": name, "file": file})
        self.options = replace(self.options, vectors={**self.options.vectors, name: file})

    async def _ask(self, command: Mapping[str, Any]) -> None:
        await self.ready()
        request_id = next(self._ids)
        asked = self._asked[request_id] = asyncio.get_running_loop().create_future()
        self._write(json.dumps({**command, "id": request_id}))
        try:
            await asyncio.wait_for(asked, self.patience)
        except TimeoutError as e:
            raise ApiError(503, "the worker does not answer") from e
        finally:
            self._asked.pop(request_id, None)

    def _expire(self, job: Job, seconds: float) -> None:
        if not job.over:
            self.cancel(job)
            job.news.put_nowait({"id": job.id, "error": [504, f"it took longer than {seconds:g} s", "timeout"]})

    async def listen(self, job: Job, *, pulse: float | None = None) -> AsyncGenerator[dict[str, Any], None]:
        """What the worker says of a request, to its end; {} where it says nothing for `pulse` seconds. Cancels the
        request when left before. Raises ApiError where it failed.
        """
        try:
            while True:
                try:
                    news = job.news.get_nowait() if job.news.qsize() else await asyncio.wait_for(job.news.get(), pulse)
                except TimeoutError:
                    yield {}
                    continue
                if "error" in news:
                    status, message, kind = news["error"]
                    code = "context_length_exceeded" if kind == "ContextError" else None
                    raise ApiError(status, message, code=code)
                yield news
                if "done" in news:
                    return
        finally:
            self.cancel(job)

    async def stop(self, grace: float) -> None:
        """Let what runs finish, for so many seconds at most; then end the worker."""
        if self.state == "stopping":
            return
        self.state = "stopping"
        self._known.set()  # who waits for a worker waits in vain
        self._fail_all(self._waiting.clear(), "the server is stopping")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        if self._keeper is not None:
            try:
                await asyncio.wait_for(asyncio.shield(self._keeper), STOP_SECONDS)
            except TimeoutError:
                self._keeper.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._keeper


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [x for v in level if isinstance(v, (dict, list)) for x in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return False
    return True
