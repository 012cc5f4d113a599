"""One model behind HTTP: what requests come down to, and their answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from personasteer.serve import responses
from personasteer.serve.answers import (
    ChatEvents,
    Choice,
    Events,
    PlainEvents,
    chat_logprobs,
    comment,
    dumps,
    event,
    now,
    plain_logprobs,
    usage,
)
from personasteer.serve.backend import Backend, Job
from personasteer.serve.edits import check_names, split_model
from personasteer.serve.metrics import Metrics
from personasteer.serve.protocol import (
    MAX_MESSAGES,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Edit,
    Generation,
    GuardRule,
)
from personasteer.serve.responses import ResponsesRequest
from personasteer.serve.tools import Calling, messages_of
from personasteer.serve.worker import WorkerOptions

log = logging.getLogger("personasteer.serve")

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # for proxies
PULSE = 15.0  # seconds of silence after which a stream gets a comment
T = TypeVar("T")


@dataclass(frozen=True)
class ServerOptions:
    """How a server is to behave, beside what its worker is started with.

    Args:
        alias: the name of the model; the file's own when None.
        strengths: {name: rho} of vectors that requests without `steering` get.
        api_key: that requests must carry; None for an open server.
        max_waiting: requests that may wait; more get 429.
        max_body: bytes of a request.
        timeout: seconds that a request may take, waiting included.
        max_tokens: of an answer, and what requests get that name no number; None: as many as fit.
        origins: web pages that may call the server (CORS).
        hosts: Host names that it answers to; None for any.
        log_bodies: write requests to the log.
    """

    alias: str | None = None
    strengths: dict[str, float] = field(default_factory=dict)
    api_key: str | None = None
    max_waiting: int = 128
    max_body: int = 8 * 2**20
    timeout: float = 600.0
    max_tokens: int | None = None
    origins: Sequence[str] = ()
    hosts: Sequence[str] | None = None
    log_bodies: bool = False


@dataclass(frozen=True)
class Plan:
    """What a request comes down to, whichever route it came by."""

    steering: list[Edit]
    bundled: bool
    guard: list[GuardRule] | None
    readings: list[str]
    client: str

    def applied(self) -> list[dict[str, Any]]:
        bundle: list[dict[str, Any]] = [{"op": "bundle"}] if self.bundled else []
        return bundle + [e.model_dump() for e in self.steering]


class Server:
    """One model behind HTTP: the worker, the defaults, and what the routes share."""

    def __init__(self, worker: WorkerOptions, options: ServerOptions) -> None:
        self.options = options
        self.backend = Backend(worker, max_waiting=options.max_waiting, patience=options.timeout)
        self.metrics = Metrics(self.backend)
        self.default = [Edit(vector=name, strength=rho) for name, rho in options.strengths.items()]
        self.bundled = worker.bundle is not None
        self.created = now()

    @property
    def name(self) -> str:
        return self.options.alias or str(self.backend.info.get("file", "model"))

    @property
    def vectors(self) -> dict[str, Any]:
        return dict(self.backend.info.get("vectors", {}))

    def plan(self, body: Generation, client: str) -> Plan:
        """Raises ApiError for a model or a vector that is not here."""
        name, in_name = split_model(body.model or "", (self.name, str(self.backend.info.get("model"))))
        if name not in ("", "default", self.name, self.backend.info.get("model")):
            raise self.no_model(name)
        own = body.steering is not None or in_name is not None
        steering = [*(in_name or []), *(body.steering or [])] if own else self.default
        known = list(self.vectors)
        check_names([e.vector for e in steering], known, "model" if body.steering is None else "steering")
        for rule in body.guard or []:
            check_names([rule.vector, *([rule.edit.vector] if rule.edit else [])], known, "guard")
        readings = known if body.readings is True else list(dict.fromkeys(body.readings or []))
        check_names(readings, known, "readings")
        return Plan(steering, self.bundled and not own, body.guard, readings, client)

    def no_model(self, name: str) -> ApiError:
        text = f"there is no model {name[:80]!r}; this server has {self.name!r}"
        return ApiError(404, text, param="model", code="model_not_found")

    def submit(self, plan: Plan, command: dict[str, Any]) -> Job:
        return self.backend.submit(
            plan.client,
            {
                **command,
                "steering": [e.model_dump() for e in plan.steering],
                "bundled": plan.bundled,
                "guard": None if plan.guard is None else [r.model_dump() for r in plan.guard],
                "readings": plan.readings,
            },
            timeout=self.options.timeout,
        )

    async def heard(
        self, jobs: Sequence[Job], choices: Sequence[Choice]
    ) -> AsyncGenerator[tuple[Choice, dict[str, Any]], None]:
        """(choice, news) of all of them as they come; (choice, {}) after a silence."""
        if len(jobs) == 1:  # without the tasks of many
            async with contextlib.aclosing(self.backend.listen(jobs[0], pulse=PULSE)) as only:
                async for news in only:
                    self._note(jobs[0], choices[0], news)
                    yield choices[0], news
            return
        queue: asyncio.Queue[tuple[Choice, dict[str, Any] | BaseException | None]] = asyncio.Queue()

        async def one(job: Job, choice: Choice) -> None:
            try:
                async for news in self.backend.listen(job, pulse=PULSE):
                    queue.put_nowait((choice, news))
                queue.put_nowait((choice, None))
            except ApiError as e:
                queue.put_nowait((choice, e))

        tasks = [asyncio.create_task(one(j, c)) for j, c in zip(jobs, choices, strict=True)]
        try:
            left = len(tasks)
            while left:
                choice, said = await queue.get()
                if isinstance(said, BaseException):
                    raise said
                if said is None:
                    left -= 1
                    continue
                self._note(jobs[choice.index], choice, said)
                yield choice, said
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _note(self, job: Job, choice: Choice, news: dict[str, Any]) -> None:
        if (news.get("text") or "done" in news) and not choice.text:
            self.metrics.first.observe(time.monotonic() - job.born)
        choice.hear(news)
        for e in news.get("events", ()):
            self.metrics.event(e)
            if e["action"] or e["state"] == "alarm":
                log.warning("%s: %s at token %d, %s", e["name"], e["state"], e["token"], e["action"] or "noted")
        if choice.done is not None and "done" in news:
            self.metrics.answered(choice.done, time.monotonic() - job.born)

    # -- answers ----------------------------------------------------------------------------------------------------

    def begin_chat(self, body: ChatRequest, client: str) -> tuple[Plan, list[Job], list[Choice]]:
        """Queue the answers that a chat request asks for."""
        plan = self.plan(body, client)
        if not self.backend.info.get("chat", True):
            raise ApiError(400, "the model has no chat template; use /v1/completions")
        if len(body.messages) > self.backend.info.get("n_ctx", MAX_MESSAGES):
            raise ApiError(400, "there are more messages than the context has tokens", code="context_length_exceeded")
        calling = Calling(body)
        messages = messages_of(body.messages)
        variables = calling.in_messages(messages, template_knows=bool(self.backend.info.get("tools")))
        variables |= body.chat_template_kwargs or {}
        options = {**body.options(), "max_tokens": self._limit(body.max_completion_tokens or body.max_tokens)}
        schema = calling.schema() or _schema(body)
        if schema is not None:
            if "grammar" in options:
                raise ApiError(400, "grammar and response_format or tool_choice exclude each other", param="grammar")
            options["json_schema"] = schema
        if body.wants_logprobs:
            options["logprobs"] = body.top_logprobs or 0
        commands: list[dict[str, Any]] = [
            {"messages": messages, "variables": variables, "options": {**options, "seed": seed}}
            for seed in _seeds(body.seed, body.n or 1)
        ]
        return plan, self._submit_all(plan, commands), [Choice(i, calling) for i in range(len(commands))]

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        plan, jobs, choices = self.begin_chat(body, _client(request))
        head: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}", "created": now(), "model": body.model or self.name,
        }  # fmt: skip
        if body.stream:
            head |= {"object": "chat.completion.chunk"}
            return await self._stream(
                request, jobs, choices, plan, head, ChatEvents(body.wants_logprobs),
                with_usage=body.wants_usage,
            )  # fmt: skip
        await _unless_gone(request, _all(self.heard(jobs, choices)))
        answers = []
        for c in choices:
            text, calls = c.read()
            message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
            if calls:
                message["tool_calls"] = calls
            answers.append({
                "index": c.index, "message": message, "finish_reason": c.finish(calls=bool(calls)),
                "logprobs": chat_logprobs(c.tokens) if body.wants_logprobs else None,
            })  # fmt: skip
        return _json({
            **head, "object": "chat.completion", "choices": answers, "usage": usage(choices),
            "personasteer": _owns(choices, plan),
        })  # fmt: skip

    async def respond(self, body: ResponsesRequest, request: Request) -> Response:
        plan, jobs, choices = self.begin_chat(body.as_chat(), _client(request))
        answer = responses.Response(body.model or self.name, choices[0], plan.applied())
        heard = self.heard(jobs, choices)
        if body.stream:
            first = await _unless_gone(request, _first(heard))
            return StreamingResponse(answer.events(heard, first), media_type="text/event-stream", headers=UNBUFFERED)
        await _unless_gone(request, _all(heard))
        return _json(answer.whole("completed"))

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        plan = self.plan(body, _client(request))
        for name in ("echo", "suffix"):
            if getattr(body, name):
                raise ApiError(400, f"{name} is not supported", param=name)
        if body.best_of not in (None, 1, body.n):
            raise ApiError(400, "best_of is not supported", param="best_of")
        prompts: list[Any] = [body.prompt] if _is_one(body.prompt) else list(body.prompt)
        if len(prompts) * (body.n or 1) > 64:
            raise ApiError(400, "at most 64 answers at once", param="prompt")
        options = {**body.options(), "max_tokens": self._limit(body.max_tokens)}
        if body.logprobs is not None:
            options["logprobs"] = body.logprobs
        commands: list[dict[str, Any]] = [
            {"prompt": prompt, "options": {**options, "seed": seed}}
            for prompt in prompts
            for seed in _seeds(body.seed, body.n or 1)
        ]
        choices = [Choice(i, prompt=i // (body.n or 1)) for i in range(len(commands))]
        head = {"id": f"cmpl-{secrets.token_hex(12)}", "created": now(), "model": body.model or self.name,
                "object": "text_completion"}  # fmt: skip
        jobs = self._submit_all(plan, commands)
        if body.stream:
            return await self._stream(
                request, jobs, choices, plan, head, PlainEvents(body.logprobs is not None),
                with_usage=body.wants_usage,
            )  # fmt: skip
        await _unless_gone(request, _all(self.heard(jobs, choices)))
        answers = [
            {
                "index": c.index, "text": c.text, "finish_reason": c.finish(),
                "logprobs": plain_logprobs(c.tokens) if body.logprobs is not None else None,
            }
            for c in choices
        ]  # fmt: skip
        return _json({**head, "choices": answers, "usage": usage(choices), "personasteer": _owns(choices, plan)})

    def _limit(self, asked: int | None) -> int | None:
        most = self.options.max_tokens
        return most if asked is None else asked if most is None else min(asked, most)

    def _submit_all(self, plan: Plan, commands: Sequence[dict[str, Any]]) -> list[Job]:
        jobs: list[Job] = []
        try:
            for command in commands:
                jobs.append(self.submit(plan, command))
        except ApiError:
            for job in jobs:
                self.backend.cancel(job)
            raise
        return jobs

    async def _stream(
        self,
        request: Request,
        jobs: Sequence[Job],
        choices: Sequence[Choice],
        plan: Plan,
        head: dict[str, Any],
        form: Events,
        *,
        with_usage: bool,
    ) -> Response:
        heard = self.heard(jobs, choices)
        first = await _unless_gone(request, _first(heard))

        async def events() -> AsyncIterator[bytes]:
            try:
                async with contextlib.aclosing(heard):
                    for data in form.begin(choices):
                        yield event({**head, "choices": [data]})
                    pending: tuple[Choice, dict[str, Any]] | None = first
                    while pending is not None:
                        choice, news = pending
                        if not news:
                            yield comment({"waiting": True})
                        for e in news.get("events", ()):
                            yield comment({"personasteer": {"index": choice.index, "event": e}})
                        over = all(c.done is not None for c in choices)
                        own = {"personasteer": _owns(choices, plan)} if over else {}  # with the last finish_reason
                        for data in form.of(choice, news):
                            yield event({**head, "choices": [data], **(own if data["finish_reason"] else {})})
                        pending = await anext(heard, None)
                if with_usage:
                    yield event({**head, "choices": [], "usage": usage(choices)})
                yield b"data: [DONE]\n\n"
            except ApiError as e:
                yield event(e.body())

        return StreamingResponse(events(), media_type="text/event-stream", headers=UNBUFFERED)


def _owns(choices: Sequence[Choice], plan: Plan) -> dict[str, Any]:
    """personasteer's own field: of the one answer, or of each."""
    owns = [c.own(plan.applied()) for c in choices]
    return owns[0] if len(owns) == 1 else {"steering": plan.applied(), "choices": owns}


def _schema(body: ChatRequest) -> dict[str, Any] | None:
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return form.schema_ or {"type": "object"}
    if form.json_schema is None and form.schema_ is None:
        raise ApiError(400, "response_format of the type json_schema needs json_schema", param="response_format")
    return form.json_schema.schema_ if form.json_schema is not None else form.schema_


def _seeds(seed: int | None, n: int) -> list[int]:
    first = secrets.randbits(31) if seed is None else seed
    return [first + i for i in range(n)]


def _is_one(prompt: Any) -> bool:
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))


def _client(request: Request) -> str:
    return request.client.host if request.client else ""


def _json(data: Any) -> Response:
    return Response(dumps(data), media_type="application/json")


Heard: TypeAlias = AsyncGenerator[tuple[Choice, dict[str, Any]], None]


async def _all(heard: Heard) -> None:
    async with contextlib.aclosing(heard):
        async for _ in heard:
            pass


async def _first(heard: Heard) -> tuple[Choice, dict[str, Any]]:
    """What is wrong with a request shows here, before the first line of its answer."""
    try:
        return await anext(heard)
    except BaseException:
        await heard.aclose()
        raise


async def _unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """The answer, unless the client goes away: then it is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    wanted = asyncio.ensure_future(answer)
    watch = asyncio.create_task(gone())
    try:
        await asyncio.wait([wanted, watch], return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        raise ApiError(499, "the client went away")
    finally:
        for task in (wanted, watch):
            task.cancel()
        await asyncio.gather(wanted, watch, return_exceptions=True)
