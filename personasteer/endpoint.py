"""Endpoint: a client of a server that speaks OpenAI's chat protocol (llama-server, vLLM, a hosted model)."""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import urlsplit, urlunsplit

from personasteer.chat import Conversation, as_messages
from personasteer.errors import ArgumentError, EndpointError

MAX_BYTES = 8 * 2**20
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two tries; each pause is twice the one before
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Reply:
    """An answer: its text, and the most probable first tokens with log p in nats, empty where the server tells none."""

    text: str
    first_token: list[tuple[str, float]] = field(default_factory=list)


class Endpoint:
    """A model behind an OpenAI-compatible server.

    Args:
        url: the base, such as "http://127.0.0.1:8080/v1"; requests go to its /chat/completions.
        model: the name that the server knows the model by.
        api_key: sent as a bearer token; the environment variable OPENAI_API_KEY when None, which goes to https and to
            this machine only. It is in no message.
        timeout: seconds that one try may take.
        retries: further tries after a failed connection, HTTP 429 and 5xx. A try that ran out of time is the last.

    Raises:
        ArgumentError: another scheme than http and https, a url without a host or with a password in it, a key that
            no header can carry, a timeout or a number of retries out of range.
    """

    def __init__(
        self, url: str, model: str, *, api_key: str | None = None, timeout: float = 60.0, retries: int = 2
    ) -> None:
        if not (math.isfinite(timeout) and timeout > 0):
            raise ArgumentError(f"timeout must be a positive number of seconds, not {timeout}")
        if retries < 0:
            raise ArgumentError(f"retries must not be negative, not {retries}")
        self.model = model
        self.timeout = timeout
        self.retries = retries
        self._url, self._shown, host = _address(url)
        if api_key is None:
            safe = self._url.startswith("https:") or host in LOCAL
            api_key = os.environ.get("OPENAI_API_KEY", "") if safe else ""
        self._key = api_key.strip()
        if not self._key.isascii() or not self._key.isprintable() or " " in self._key:
            raise ArgumentError("api_key holds a character that an HTTP header cannot carry")
        # a redirect would carry the key to another host
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if host in LOCAL:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def __repr__(self) -> str:
        return f"Endpoint({self._shown!r}, {self.model!r})"

    def chat(
        self,
        messages: Conversation,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
        top_logprobs: int = 0,
    ) -> Reply:
        """The server's answer to a message or a list of messages.

        Args:
            messages: the user's text, or messages with "role" and "content".
            top_logprobs: so many of the most probable first tokens come along, 0 to 20.

        Raises:
            ArgumentError: an argument out of range, a message without a role or a content.
            EndpointError: no connection, no answer in time, an HTTP error, or an answer of another form.
        """
        if not 0 <= top_logprobs <= 20:
            raise ArgumentError(f"top_logprobs must be 0 to 20, not {top_logprobs}")
        if max_tokens < 1:
            raise ArgumentError(f"max_tokens must be at least 1, not {max_tokens}")
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ArgumentError(f"temperature must be finite and not negative, not {temperature}")
        body: dict[str, Any] = {
            "model": self.model,
            "messages": as_messages(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        if seed is not None:
            body["seed"] = seed
        if top_logprobs:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        answer = self._post(json.dumps(body).encode())
        choice = self._choice(answer)
        return Reply(_whole(choice["message"]["content"] or ""), _first_token(choice) if top_logprobs else [])

    def _post(self, body: bytes) -> Any:
        pause = FIRST_PAUSE
        for left in range(self.retries, -1, -1):
            try:
                return self._try(body)
            except _AgainError as e:
                if not left:
                    raise EndpointError(str(e)) from e.__cause__
                time.sleep(min(max(pause, e.wait), LONGEST_PAUSE))
                pause *= 2
        raise AssertionError("unreachable")

    def _try(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, body, headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                data = self._read(response, deadline)
        except urllib.error.HTTPError as e:
            self._fail(e, deadline)
        except (OSError, http.client.HTTPException) as e:
            reason = getattr(e, "reason", e)
            if isinstance(reason, TimeoutError):
                self._too_late(e)
            raise _AgainError(f"{self._shown}: no connection: {self._line(reason)}") from e
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as e:
            raise EndpointError(f"{self._shown}: the answer is not JSON: {self._line(data[:80])}") from e

    def _read(self, response: Any, deadline: float) -> bytes:
        data = b""
        while piece := response.read1(2**16):
            data += piece
            if len(data) > MAX_BYTES:
                raise EndpointError(f"{self._shown}: the answer is longer than {MAX_BYTES // 2**20} MiB")
            if time.monotonic() > deadline:
                self._too_late(None)
        return data

    def _too_late(self, cause: Exception | None) -> NoReturn:
        raise EndpointError(f"{self._shown}: no answer within {self.timeout:g} seconds: raise timeout") from cause

    def _fail(self, e: urllib.error.HTTPError, deadline: float) -> NoReturn:
        """Raise what an HTTP error means, with the server's own words."""
        with e:
            try:
                data = self._read(e, deadline)
            except (OSError, http.client.HTTPException, EndpointError):  # the status says enough
                data = b""
        message = f"{self._shown}: HTTP {e.code}: {self._line(_message_of(data) or e.reason)}"
        if e.code == 429 or e.code >= 500:
            wait = (e.headers.get("Retry-After") or "").strip()
            raise _AgainError(message, float(wait) if wait.isascii() and wait.isdigit() else 0.0) from e
        raise EndpointError(message) from e

    def _choice(self, answer: Any) -> dict[str, Any]:
        try:
            choice = answer["choices"][0]
            if isinstance(choice["message"]["content"], str | None):
                return dict(choice)
        except (KeyError, IndexError, TypeError, ValueError):
            pass
        if isinstance(answer, dict) and answer.get("error"):
            raise EndpointError(f"{self._shown}: the server says: {self._line(_error_text(answer['error']))}")
        raise EndpointError(
            f"{self._shown}: the answer has no choices[0].message.content: {self._line(json.dumps(answer))}: "
            "is this an OpenAI-compatible server, and does the url end in /v1?"
        )

    def _line(self, said: object) -> str:
        """Foreign words as a part of one line, without the key."""
        text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
        text = text.replace(self._key, "***") if self._key else text
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300] or "(nothing)"


class _AgainError(Exception):
    """A failure that may pass; `wait` is how many seconds the server asks for."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _address(url: str) -> tuple[str, str, str]:
    """(where to post, what to show of it, host)."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as e:
        raise ArgumentError(f"url is not an address: {e}") from e
    if parts.username is not None or parts.password is not None:
        raise ArgumentError("url holds a user name or a password: pass the key as api_key")
    if parts.scheme not in ("http", "https") or not host:
        raise ArgumentError(f"url must begin with http:// or https:// and a host, not {url!r:.80}")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ArgumentError(f"url holds a character that an address cannot have: {url!r:.80}")
    path = parts.path.rstrip("/") + "/chat/completions"
    shown = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")), shown, host


def _first_token(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    try:
        tops = [(t["token"], t["logprob"]) for t in choice["logprobs"]["content"][0]["top_logprobs"]]
        return [(_whole(token), float(p)) for token, p in tops if not math.isnan(p)]
    except (KeyError, IndexError, TypeError, AttributeError):
        return []


def _whole(text: str) -> str:
    """Text without half characters, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _message_of(data: bytes) -> str:
    """What the body of an HTTP error says."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return data.decode("utf-8", "replace")
    return _error_text(body.get("error", body)) if isinstance(body, dict) else data.decode("utf-8", "replace")


def _error_text(error: Any) -> str:
    if isinstance(error, Mapping):
        return str(error.get("message") or error.get("detail") or json.dumps(dict(error)))
    return str(error)
