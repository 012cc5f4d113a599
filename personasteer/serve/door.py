"""What is looked at before a request is read: its key, its size, its kind."""

from __future__ import annotations

import contextlib
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from personasteer.serve.answers import dumps
from personasteer.serve.protocol import ApiError


class Door:
    """Answers 401 to /v1 and /metrics without the key, 413 to bodies of more than `most` bytes, announced or not, and
    400 to bodies that do not say that they are JSON: those a page of another site may send without being asked.
    """

    def __init__(self, app: ASGIApp, most: int, key: str | None) -> None:
        self.app, self.most = app, most
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        refused = self._refusal(scope["method"], scope["path"], headers)
        if refused is not None:
            await _answer(send, refused)
            return
        n_read, over, begun = 0, False, False

        async def counted() -> Message:
            nonlocal n_read, over
            message = await receive()
            n_read += len(message.get("body", b""))
            if n_read > self.most:
                over = True
                raise _TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal begun
            if over and not begun:
                return  # what the application makes of the failure
            begun = True
            await send(message)

        with contextlib.suppress(_TooLarge):
            await self.app(scope, counted, watched)
        if over and not begun:
            await _answer(send, self._too_large())

    def _refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        ours = path.startswith("/v1/") or path == "/metrics"
        if self.key is not None and ours and method != "OPTIONS" and not self._has_key(headers):
            return ApiError(401, "the API key is missing or wrong", code="invalid_api_key",
                            headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.most:
            return self._too_large()
        if ours and method == "POST" and b"json" not in headers.get(b"content-type", b"").lower():
            return ApiError(400, "the body must be JSON, with the header Content-Type: application/json")
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer":
            given = headers.get(b"x-api-key", b"")
        return hmac.compare_digest(given.strip(), self.key or b"")

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self.most:,} bytes", headers={"Connection": "close"})


async def _answer(send: Send, e: ApiError) -> None:
    body = dumps(e.body())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(k.lower().encode(), v.encode()) for k, v in (e.headers or {}).items()]
    await send({"type": "http.response.start", "status": e.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _TooLarge(Exception):  # noqa: N818 (it never leaves this module)
    pass
