"""The client of OpenAI-compatible servers, against a real one in a thread."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from personasteer import ArgumentError, EndpointError, endpoint
from personasteer.endpoint import Endpoint, Reply

KEY = "sk-very-secret"
GOOD = {"choices": [{"message": {"role": "assistant", "content": "Ahoy!"}}]}


class Server(ThreadingHTTPServer):
    """Gives the answers of a list in turn, the last one for ever; keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[Callable[[_Handler], None]] = [says(GOOD)]
        self.asked: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:  # a client that hangs up is part of the tests
        pass


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"path": self.path, "key": self.headers.get("Authorization"), "body": body})
        answers = self.server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    do_GET = do_POST  # noqa: N815 (so that a followed redirect would show)

    def log_message(self, *_: Any) -> None:
        pass


def says(answer: object, status: int = 200, **headers: str) -> Callable[[_Handler], None]:
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    def answer_with(handler: _Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer_with


def test_the_environment_s_key_goes_to_https_and_to_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    sent = {
        url: Endpoint(url, "m")._key for url in ("https://a.example/v1", "http://a.example/v1", "http://localhost/v1")
    }
    assert sent == {"https://a.example/v1": KEY, "http://a.example/v1": "", "http://localhost/v1": KEY}
    assert Endpoint("http://a.example/v1", "m", api_key=KEY)._key == KEY  # given for this server


def hangs_up(handler: _Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def sleeps(handler: _Handler) -> None:
    time.sleep(1.0)


def drips(handler: _Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(30):
        handler.wfile.write(b" ")
        time.sleep(0.05)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as s:
        thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield s
        s.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client slept between tries, without sleeping; and no key from outside."""
    slept: list[float] = []

    class Clock:
        monotonic = staticmethod(time.monotonic)
        sleep = staticmethod(slept.append)

    monkeypatch.setattr(endpoint, "time", Clock)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return slept


def test_an_answer_comes_back_and_the_server_gets_what_was_asked(server: Server) -> None:
    reply = Endpoint(server.url + "/", "small", api_key=KEY).chat("Hi", max_tokens=5, temperature=0.5, seed=3)
    assert reply == Reply("Ahoy!", [])
    assert server.asked == [
        {
            "path": "/v1/chat/completions",
            "key": f"Bearer {KEY}",
            "body": {
                "model": "small",
                "messages": [{"role": "user", "content": "Hi"}],
                "max_tokens": 5,
                "temperature": 0.5,
                "seed": 3,
            },
        }
    ]


def test_the_first_tokens_probabilities_come_along_where_the_server_tells_them(server: Server) -> None:
    top = [{"token": "80", "logprob": -0.1}, {"token": "75", "logprob": -2.5}]
    told = {"content": [{"token": "80", "logprob": -0.1, "top_logprobs": top}, {"token": ".", "top_logprobs": []}]}
    server.answers = [says({"choices": [{"message": {"content": "80."}, "logprobs": told}]}), says(GOOD)]
    e = Endpoint(server.url, "small")
    assert e.chat("Hi", top_logprobs=20) == Reply("80.", [("80", -0.1), ("75", -2.5)])
    assert server.asked[0]["body"]["logprobs"] is True
    assert server.asked[0]["body"]["top_logprobs"] == 20
    assert e.chat("Hi", top_logprobs=20).first_token == []


@pytest.mark.parametrize("told", [None, {"content": []}, {"content": [{"token": "8"}]}, {"tokens": ["8"]}, 7])
def test_probabilities_of_another_form_count_as_none(server: Server, told: object) -> None:
    server.answers = [says({"choices": [{"message": {"content": "8"}, "logprobs": told}]})]
    assert Endpoint(server.url, "small").chat("Hi", top_logprobs=5) == Reply("8", [])


def test_the_key_comes_from_the_environment_and_no_key_sends_no_header(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    Endpoint(server.url, "small").chat("Hi")
    monkeypatch.setenv("OPENAI_API_KEY", "from-outside\n")
    Endpoint(server.url, "small").chat("Hi")
    Endpoint(server.url, "small", api_key="given").chat("Hi")
    assert [a["key"] for a in server.asked] == [None, "Bearer from-outside", "Bearer given"]


def test_a_busy_server_is_asked_again_after_growing_pauses(server: Server, pauses: list[float]) -> None:
    server.answers = [says({}, 429), says({}, 503), says(GOOD)]
    assert Endpoint(server.url, "small").chat("Hi").text == "Ahoy!"
    assert pauses == [0.5, 1.0]


def test_the_pause_is_what_the_server_asks_for_up_to_half_a_minute(server: Server, pauses: list[float]) -> None:
    server.answers = [says({}, 429, Retry_After="7"), says({}, 429, Retry_After="86400"), says(GOOD)]
    assert Endpoint(server.url, "small").chat("Hi").text == "Ahoy!"
    assert pauses == [7.0, 30.0]


def test_a_broken_connection_is_tried_again(server: Server) -> None:
    server.answers = [hangs_up, says(GOOD)]
    assert Endpoint(server.url, "small").chat("Hi").text == "Ahoy!"
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("answer", "n_asked", "message"),
    [
        (says({"error": {"message": "out of\nmemory"}}, 500), 3, "HTTP 500: out of memory"),
        (says({"error": {"message": "slow down"}}, 429), 3, "HTTP 429: slow down"),
        (says({"error": {"message": f"wrong key {KEY}"}}, 401), 1, "HTTP 401: wrong key ***"),
        (says({"detail": "no such model"}, 404), 1, "HTTP 404: no such model"),
        (says(b"<html>busy</html>", 502), 3, "HTTP 502: <html>busy</html>"),
        (says(b"", 400), 1, "HTTP 400: Bad Request"),
        (hangs_up, 3, "no connection: "),
        (says(b"<html>hello</html>"), 1, "the answer is not JSON: <html>hello"),
        (says(b"[" * 100_000), 1, "the answer is not JSON: ["),
        (says(b"\xff\xfe"), 1, "the answer is not JSON"),
        (says({"choices": []}), 1, "the answer has no choices[0].message.content"),
        (says({"choices": [{"message": {"content": 3}}]}), 1, "the answer has no choices[0].message.content"),
        (says([1, 2]), 1, "the answer has no choices[0].message.content"),
        (says(None), 1, "the answer has no choices[0].message.content"),
        (says({"error": {"message": "quota used up"}}), 1, "the server says: quota used up"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line(
    server: Server, answer: Callable[[_Handler], None], n_asked: int, message: str
) -> None:
    server.answers = [answer]
    with pytest.raises(EndpointError) as e:
        Endpoint(server.url, "small", api_key=KEY).chat("Hi")
    assert message in str(e.value)
    assert str(e.value).startswith(server.url)
    assert len(str(e.value)) < 600
    assert str(e.value).isprintable()
    assert KEY not in str(e.value)
    assert len(server.asked) == n_asked


@pytest.mark.parametrize("late", [sleeps, drips])
def test_a_late_answer_is_given_up_and_not_asked_for_again(server: Server, late: Callable[[_Handler], None]) -> None:
    server.answers = [late]
    with pytest.raises(EndpointError, match=r"no answer within 0\.2 seconds"):
        Endpoint(server.url, "small", timeout=0.2).chat("Hi")
    assert len(server.asked) == 1


def test_an_answer_of_more_than_8_mib_is_not_read_to_its_end(server: Server) -> None:
    server.answers = [says({"choices": [{"message": {"content": "a" * (8 * 2**20)}}]})]
    with pytest.raises(EndpointError, match="longer than 8 MiB"):
        Endpoint(server.url, "small").chat("Hi")
    server.answers = [says({"choices": [{"message": {"content": "a" * (8 * 2**20 - 100)}}]})]
    assert len(Endpoint(server.url, "small").chat("Hi").text) == 8 * 2**20 - 100


def test_the_key_does_not_follow_a_redirect(server: Server) -> None:
    server.answers = [says(b"", 302, Location=server.url + "/elsewhere"), says(GOOD)]
    with pytest.raises(EndpointError, match="HTTP 302"):
        Endpoint(server.url, "small", api_key=KEY).chat("Hi")
    assert len(server.asked) == 1


def test_nobody_at_the_address_is_told_after_all_tries(pauses: list[float]) -> None:
    with socket.socket() as s:  # bound and not listening: refuses
        s.bind(("127.0.0.1", 0))
        with pytest.raises(EndpointError, match=r"no connection: .*refused"):
            Endpoint(f"http://127.0.0.1:{s.getsockname()[1]}/v1", "small", retries=3).chat("Hi")
    assert pauses == [0.5, 1.0, 2.0]


def test_a_server_on_this_machine_is_not_asked_through_a_proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert Endpoint(server.url, "small").chat("Hi").text == "Ahoy!"


def test_half_a_character_in_the_answer_becomes_a_replacement(server: Server) -> None:
    server.answers = [says(b'{"choices": [{"message": {"content": "a\\ud83d"}}]}')]
    assert Endpoint(server.url, "small").chat("Hi").text == "a\ufffd"


def test_an_answer_without_content_is_empty(server: Server) -> None:
    server.answers = [says({"choices": [{"message": {"content": None}}]})]
    assert Endpoint(server.url, "small").chat("Hi").text == ""


@pytest.mark.parametrize(
    "url",
    ["ftp://host/v1", "file:///etc/passwd", "localhost:8080", "http://", "http://[::1", "http://h:port", "http://a b"],
)
def test_an_address_that_is_not_one_of_the_web_is_refused(url: str) -> None:
    with pytest.raises(ArgumentError, match="url"):
        Endpoint(url, "small")


def test_a_secret_is_never_shown() -> None:
    with pytest.raises(ArgumentError) as e:
        Endpoint("http://user:hidden@host/v1", "small")
    assert "hidden" not in str(e.value)
    for key in ("two words", "line\nbreak", "schlüssel"):
        with pytest.raises(ArgumentError) as e:
            Endpoint("http://host/v1", "small", api_key=key)
        assert key not in str(e.value)
    assert (
        repr(Endpoint("http://host/v1?api-key=hidden", "small", api_key=KEY)) == "Endpoint('http://host/v1', 'small')"
    )


def test_the_query_of_the_address_stays_at_its_end(server: Server) -> None:
    Endpoint(server.url + "?api-version=2", "small").chat("Hi")
    assert server.asked[0]["path"] == "/v1/chat/completions?api-version=2"


@pytest.mark.parametrize("option", [{"timeout": 0}, {"timeout": float("nan")}, {"retries": -1}])
def test_an_option_out_of_range_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(option))):
        Endpoint("http://host/v1", "small", **option)


@pytest.mark.parametrize("option", [{"top_logprobs": 21}, {"max_tokens": 0}, {"temperature": -1.0}])
def test_a_chat_option_out_of_range_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(option))):
        Endpoint("http://host/v1", "small").chat("Hi", **option)
