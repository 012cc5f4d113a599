"""What a server must not do, whatever it is sent."""

from __future__ import annotations

import json
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import samples
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from serving import KEY, Running, serving

AUTH = {"Authorization": f"Bearer {KEY}"}
ASK = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    samples.vector(n_layer=30, n_embd=576, layers=(10,), name="v").save(folder / "v.gguf")
    limits = ["-c", "256", "-n", "3", "--max-body", "1"]
    with serving(folder / "log", ["-m", "demo", "-v", f"v={folder / 'v.gguf'}", "-t", "1", "--no-page", *limits]) as s:
        yield s


def test_whatever_fits_the_schema_gets_no_5xx(server: Running) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    counts: dict[str, int] = {}
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        def never_fails(case: Any) -> None:
            answer = case.call(headers=AUTH)
            counts[case.operation.label] = counts.get(case.operation.label, 0) + 1
            assert answer.status_code < 500, (answer.status_code, answer.text, case.body)
            if answer.status_code >= 400 and answer.headers["content-type"] == "application/json":
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        never_fails()
    assert counts["POST /v1/chat/completions"] >= 60
    assert counts["POST /v1/completions"] >= 60
    assert server.get("/health").status_code == 200
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("route", ["/v1/models", "/v1/vectors", "/v1/steering", "/metrics", "/v1/models/x"])
def test_nothing_is_told_without_the_key(server: Running, route: str) -> None:
    for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": KEY[:-1]},
                    {"Authorization": f"Basic {KEY}"}, {"X-Api-Key": "é"}):  # fmt: skip
        got = httpx.get(server.url + route, headers={k: v.encode("latin-1") for k, v in headers.items()})
        assert got.status_code == 401, headers
        assert got.headers["WWW-Authenticate"] == "Bearer"
    assert httpx.get(server.url + route, headers={"X-Api-Key": KEY}).status_code in (200, 404)


def test_a_wrong_key_takes_as_long_wherever_it_is_wrong(server: Running) -> None:
    def seconds(key: str) -> float:
        begin = time.perf_counter()
        httpx_client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        return time.perf_counter() - begin

    with httpx.Client(base_url=server.url) as httpx_client:
        pairs = [(seconds("x" * len(KEY)), seconds(KEY[:-1] + "x")) for _ in range(60)]
    early, late = (statistics.median(side) for side in zip(*pairs, strict=True))
    assert 0.5 < early / late < 2


def test_bodies_that_are_too_large_are_turned_away(server: Running) -> None:
    huge = json.dumps({"messages": [{"role": "user", "content": "x" * 2**20}]}).encode()
    announced = server.post("/v1/chat/completions", content=huge, headers={**AUTH, "Content-Type": "application/json"})
    assert announced.status_code == 413
    assert announced.json()["error"]["message"] == "the request is larger than 1,048,576 bytes"

    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 2**15

    headers = {**AUTH, "Content-Type": "application/json"}
    streamed = server.post("/v1/chat/completions", content=chunks(), headers=headers)
    assert streamed.status_code == 413


@pytest.mark.parametrize(
    "content",
    [
        b"", b"null", b"[]", b"{", b"\xff\xfe", b'{"messages": "\\ud800"}', b"[" * 100_000, b'{"a":' * 50_000,
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
    ],
    ids=range(11),
)  # fmt: skip
def test_broken_bodies_are_400(server: Running, content: bytes) -> None:
    for route in ("/v1/chat/completions", "/v1/completions", "/v1/steering"):
        got = server.post(route, content=content, headers={**AUTH, "Content-Type": "application/json"})
        assert got.status_code == 400, got.text
        assert got.json()["error"]["type"] == "invalid_request_error"


def test_half_a_character_in_a_message_is_answered_or_refused(server: Running) -> None:
    content = b'{"messages": [{"role": "user", "content": "a\\ud800b"}], "max_tokens": 1}'
    got = server.post("/v1/chat/completions", content=content, headers={**AUTH, "Content-Type": "application/json"})
    assert got.status_code in (200, 400)


def test_pages_of_other_sites_cannot_call(server: Running) -> None:
    headers = {**AUTH, "Origin": "https://example.com"}
    got = server.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 1}, headers=headers)
    assert not [h for h in got.headers if h.startswith("access-control")]
    asked = httpx.options(server.url + "/v1/chat/completions", headers={
        "Origin": "https://example.com", "Access-Control-Request-Method": "POST"})  # fmt: skip
    assert asked.status_code == 405
    plain = server.post("/v1/steering", content=b'{"steering": []}', headers={**AUTH, "Content-Type": "text/plain"})
    assert plain.status_code == 400  # what a page may send without being asked
    elsewhere = httpx.get(server.url + "/v1/models", headers={**AUTH, "Host": "attacker.example"})
    assert elsewhere.status_code == 400  # a name that was made to point here


def test_the_log_holds_neither_words_nor_keys(server: Running) -> None:
    secret = "the-purple-giraffe"
    server.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": secret}], "max_tokens": 1})
    server.post("/v1/chat/completions", json={"messages": [{"role": secret, "content": secret}], "max_tokens": 1})
    log = server.log.read_text()
    assert secret not in log
    assert KEY not in log


def test_what_is_refused_late_is_refused_quietly(server: Running) -> None:
    secret = "the-green-zebra"
    schema = {"type": "object", "description": "x" * 140_000}
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    got = server.post("/v1/responses", json={"input": secret, "text": form})
    assert (got.status_code, got.json()["error"]["type"]) == (400, "invalid_request_error")
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "[" * 985 + "]" * 985}}
    deep = [{"role": "user", "content": secret}, {"role": "assistant", "tool_calls": [call]}]
    for _ in range(5):  # more than run at once: none may stay
        assert server.post("/v1/chat/completions", json={"messages": deep, "max_tokens": 1}).status_code in (200, 400)
    assert server.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 1}).status_code == 200
    assert secret not in server.log.read_text()


def test_an_answer_of_millions_of_mistakes_is_short(server: Running) -> None:
    begin = time.monotonic()
    got = server.post("/v1/completions", content=b'{"prompt": [' + b"{}," * 300_000 + b"{}]}",
                      headers={**AUTH, "Content-Type": "application/json"})  # fmt: skip
    assert got.status_code == 400
    assert len(got.content) < 4000
    assert time.monotonic() - begin < 10


def test_the_page_is_not_for_other_sites_sockets(tmp_path: Path) -> None:
    with serving(tmp_path / "log", ["-m", "demo", "-t", "1", "-c", "256"]) as s:
        path = "/_nicegui_ws/socket.io/?EIO=4&transport=polling"
        answer = httpx.get(s.url + path, headers={"Origin": "https://example.com"})
        assert answer.headers.get("access-control-allow-origin") is None
        assert answer.status_code == 400


def test_a_connection_that_says_nothing_holds_nobody_up(server: Running) -> None:
    port = int(server.url.rpartition(":")[2])
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
    try:
        assert server.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 1}).status_code == 200
    finally:
        for s in silent:
            s.close()


def test_requests_are_logged_where_that_is_asked_for(tmp_path: Path) -> None:
    with serving(tmp_path / "log", ["-m", "demo", "-t", "1", "-c", "256", "--no-page", "--log-requests"]) as s:
        s.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 1})
    log = (tmp_path / "log").read_text()
    assert "Hello" in log
    assert KEY not in log
