"""The HTTP side: OpenAI's routes, personasteer's own, health and metrics."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from personasteer import __version__
from personasteer.serve.door import Door
from personasteer.serve.edits import check_names
from personasteer.serve.protocol import ApiError, ChatRequest, CompletionRequest, ErrorResponse, SteeringBody
from personasteer.serve.responses import ResponsesRequest
from personasteer.serve.server import Server, ServerOptions
from personasteer.serve.worker import WorkerOptions

log = logging.getLogger("personasteer.serve")


def create_app(worker: WorkerOptions, options: ServerOptions | None = None) -> FastAPI:
    """The application, for uvicorn or another ASGI server: its worker starts and ends with its lifespan."""
    options = options or ServerOptions()
    server = Server(worker, options)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await server.backend.start()
        try:
            yield
        finally:
            await server.backend.stop(grace=0)

    app = FastAPI(title="personasteer", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    if options.hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(options.hosts))
    app.add_middleware(Door, most=options.max_body, key=options.api_key)
    if options.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(options.origins), allow_methods=["GET", "POST"],
                           allow_headers=["Authorization", "Content-Type"])  # fmt: skip

    async def running() -> None:
        await server.backend.ready()

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, e: ApiError) -> Response:
        server.metrics.requests.labels(_route(request), e.status).inc()
        return JSONResponse(e.body(), e.status, headers=e.headers)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def on_invalid(request: Request, e: RequestValidationError | ValidationError) -> Response:
        first = next(iter(e.errors()), {"loc": (), "msg": "invalid"})
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        text = f"{where}: {first['msg']}" if where else str(first["msg"])
        return await on_api_error(request, ApiError(400, text[:2000], param=where or None))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, e: HTTPException) -> Response:
        return await on_api_error(request, ApiError(e.status_code, str(e.detail), headers=dict(e.headers or {})))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, e: Exception) -> Response:
        # not its text, which may quote the request
        log.error("a request failed: %s\n%s", type(e).__name__, "".join(traceback.format_tb(e.__traceback__)))
        return await on_api_error(request, ApiError(500, "an error of the server; its log says more"))

    errors: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorResponse} for code in (400, 401, 404, 413, 429, 500, 503, 504)
    }
    ready = [Depends(running)]

    async def answered(answer: Callable[[Any, Request], Awaitable[Response]], body: Any, request: Request) -> Response:
        if options.log_bodies:
            log.info("%s: %s", _route(request), body.model_dump_json(exclude_none=True))
        response = await answer(body, request)
        server.metrics.requests.labels(_route(request), response.status_code).inc()
        return response

    @app.post("/v1/chat/completions", dependencies=ready, responses=errors)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await answered(server.chat, body, request)

    @app.post("/v1/completions", dependencies=ready, responses=errors)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await answered(server.complete, body, request)

    @app.post("/v1/responses", dependencies=ready, responses=errors)
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        return await answered(server.respond, body, request)

    @app.get("/v1/models", dependencies=ready, responses=errors)
    async def models() -> dict[str, Any]:
        info = server.backend.info
        meta = {k: info[k] for k in ("model", "architecture", "description", "fingerprint", "n_ctx", "n_layer")}
        return {"object": "list", "data": [
            {"id": server.name, "object": "model", "created": server.created, "owned_by": "personasteer", "meta": meta}
        ]}  # fmt: skip

    @app.get("/v1/models/{name}", dependencies=ready, responses=errors)
    async def model(name: str) -> dict[str, Any]:
        if name != server.name:
            raise server.no_model(name)
        return {"id": name, "object": "model", "created": server.created, "owned_by": "personasteer"}

    @app.get("/v1/vectors", dependencies=ready, responses=errors)
    async def vectors() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": n, "object": "vector", **v} for n, v in server.vectors.items()]}

    @app.get("/v1/steering", dependencies=ready, responses=errors)
    async def get_steering() -> dict[str, Any]:
        return {"steering": [e.model_dump() for e in server.default], "bundle": server.bundled}

    @app.post("/v1/steering", dependencies=ready, responses=errors)
    async def set_steering(body: SteeringBody) -> dict[str, Any]:
        check_names([e.vector for e in body.steering], list(server.vectors), "steering")
        await server.backend.check([e.model_dump() for e in body.steering])
        server.default, server.bundled = list(body.steering), False
        return await get_steering()

    @app.get("/health")
    async def health() -> Response:
        state = server.backend.state
        content: dict[str, Any] = {"status": "ok" if state == "ready" else state}
        if server.backend.progress is not None:
            content["progress"] = list(server.backend.progress)
        return JSONResponse(content, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _route(request: Request) -> str:
    route = request.scope.get("route")
    return str(getattr(route, "path", "other"))
