"""Bodies of requests that are damaged, or hold something else: the server answers or refuses, and goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import samples
from fuzzing import altered, as_json, damaged, fuzz
from hypothesis import given
from hypothesis import strategies as st
from serving import KEY, Running, serving

TOOL = {"type": "function", "function": {"name": "f", "parameters": {
    "type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}}}}  # fmt: skip
SHARED: dict[str, Any] = {
    "model": "tiny", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"], "n": 1,
    "logit_bias": {"5": 1.0}, "frequency_penalty": 0.1, "presence_penalty": 0.1, "stream": False,
    "steering": [{"vector": "v", "strength": 0.1, "op": "add", "scope": "response"}], "readings": ["v"],
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["b"]}}, "required": ["a"]}
BODIES: dict[str, list[Any]] = {
    "/v1/chat/completions": [
        {**SHARED, "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
         "logprobs": True, "top_logprobs": 2},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 2, "tools": [TOOL],
         "tool_choice": "auto", "guard": [{"vector": "v", "action": "log", "on": "alarm"}]},
        {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 2, "stream": True,
         "stream_options": {"include_usage": True},
         "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    ],
    "/v1/completions": [{**SHARED, "prompt": "hi", "logprobs": 1, "echo": False}, {"prompt": [[5, 6], [7]],
                                                                                   "max_tokens": 1}],
    "/v1/responses": [{"input": "hi", "max_output_tokens": 2, "instructions": "s",
                       "steering": [{"vector": "v", "strength": 0.1}]},
                      {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
                       "max_output_tokens": 2, "text": {"format": {"type": "json_schema", "name": "x",
                                                                   "schema": SCHEMA}}}],
    "/v1/steering": [{"steering": [{"vector": "v", "strength": 0.1, "op": "add"}]},
                     {"steering": [{"vector": "v", "op": "ablate", "share": 0.5}]}],
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    samples.vector(norms=np.ones(4, np.float32), name="v").save(folder / "v.gguf")
    options = ["-m", str(tiny_path), "--alias", "tiny", "-v", f"v={folder / 'v.gguf'}", "-t", "1", "--no-page"]
    with serving(folder / "log", [*options, "-c", "128", "-n", "3"]) as s:
        yield s


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as c:
        yield c


def test_every_route_that_takes_a_body_is_asked_here(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {path for path, how in paths.items() if how.keys() & {"post", "put", "patch"}} == set(BODIES)


@given(data=st.data())
@fuzz(400)
def test_any_body_is_answered_or_refused(server: Running, client: httpx.Client, data: st.DataObject) -> None:
    route = data.draw(st.sampled_from(sorted(BODIES)))
    seeds = BODIES[route]
    raw = data.draw(st.one_of(altered(seeds).map(as_json), damaged([as_json(s) for s in seeds])))
    got = client.post(route, content=raw, headers={"Content-Type": "application/json"})
    assert got.status_code < 500, (got.status_code, got.text, raw)
    if got.status_code >= 400:
        assert set(got.json()["error"]) == {"message", "type", "param", "code"}
        assert len(got.content) < 5000
    elif got.headers["content-type"].startswith("application/json"):
        json.loads(got.content)


def test_the_server_is_well_after_that(server: Running, client: httpx.Client) -> None:
    client.post("/v1/steering", json={"steering": []})
    ask = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=ask).status_code == 200
    assert client.get("/health").status_code == 200
    assert "Traceback" not in server.log.read_text()
    assert server.metric("personasteer_worker_restarts") == 0
