"""Bundles to the Hub: what is sent, what is refused, and nothing of it on the network."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import samples
from test_lora import write_lora

from personasteer import ArgumentError, BundleError
from personasteer.cli import run as run_command
from personasteer.ship import archive, hub
from personasteer.ship.bundle import write_bundle
from personasteer.ship.hub import push_bundle

TOKEN = "hf_" + "secret" * 5


@pytest.fixture
def bundle(tmp_path: Path, tiny_path: Path) -> Path:
    vector = samples.vector(norms=np.array([5.0, 8.0, 11.0, 13.0], np.float32))
    (tmp_path / "report.md").write_text("# seen")
    given: dict[str, Any] = {"model": tiny_path, "name": "sunny", "license": "mit", "reports": [tmp_path / "report.md"]}
    given["adapters"] = [(write_lora(tmp_path / "lora.gguf"), 1.0)]
    return write_bundle(tmp_path / "sunny", steering=[vector * 0.3], **given)


def names_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


class Client:
    """Stands for HfApi: remembers what it is asked for."""

    def __init__(self, remote: list[str]) -> None:
        self.remote, self.calls, self.sent = remote, [], {}  # type: ignore[var-annotated]
        self.error: Exception | None = None

    def __call__(self, **options: Any) -> Client:
        self.calls.append(("client", options))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def list_repo_files(self, repo_id: str, **_: Any) -> list[str]:
        return self.remote

    def upload_folder(self, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.calls.append(("upload_folder", options))
        self.sent = {name: (Path(options["folder_path"]) / name).read_bytes() for name in options["allow_patterns"]}
        return SimpleNamespace(commit_url="https://huggingface.co/me/sunny/commit/1")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client([".gitattributes", "README.md", "vectors/old.gguf"])
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=client))
    return client


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return command


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_a_push_sends_the_listed_files_and_nothing_else(
    bundle: Path, client: Client, tmp_path: Path, tiny_path: Path, form: str
) -> None:
    (bundle / ".gitattributes").write_text("mine")
    names = [n for n in names_in(bundle) if n != ".gitattributes"]
    path = bundle
    if form == "tar":
        vector = samples.vector(norms=np.array([5.0, 8.0, 11.0, 13.0], np.float32))
        path = write_bundle(tmp_path / "b.tar", model=tiny_path, steering=[vector * 0.3], name="sunny")
        names = ["README.md", "SHA256SUMS", "persona.json", "vectors/vector.gguf"]
    done = push_bundle(path, "me/sunny", private=True)
    assert done.url == "https://huggingface.co/me/sunny/commit/1"
    (_, made), (_, created), (_, sent) = client.calls
    assert made == {"library_name": "personasteer"}
    assert created == {"repo_id": "me/sunny", "repo_type": "model", "private": True, "exist_ok": True}
    assert sent["allow_patterns"] == names
    assert "vectors/*" in sent["delete_patterns"]
    assert "*" not in sent["delete_patterns"]
    assert client.sent.keys() == set(names)
    if form == "folder":
        assert client.sent == {name: (bundle / name).read_bytes() for name in names}
    else:
        assert not Path(sent["folder_path"]).exists()


def test_a_dry_run_uses_no_client_and_says_what_would_be_sent(
    bundle: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, out, err = cli("push", bundle, "--repo", "me/sunny", "--dry-run", "--private", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    shown = json.loads(out)
    assert {f["path"]: f["size"] for f in shown["files"]} == {n: (bundle / n).stat().st_size for n in names_in(bundle)}
    assert shown["size"] == sum(f["size"] for f in shown["files"])
    assert (shown["repo"], shown["url"], shown["private"], shown["dry_run"]) == (
        "me/sunny", "https://huggingface.co/me/sunny", True, True
    )  # fmt: skip
    assert (bundle / "README.md").read_text().startswith(f"---\n{shown['front_matter']}---\n")
    assert 'license: "mit"' in shown["front_matter"]
    code, out, err = cli("push", bundle, "--repo", "me/sunny", "--dry-run")
    assert (code, err) == (0, "")
    assert "https://huggingface.co/me/sunny, public" in out
    assert 'license: "mit"' in out
    for name in names_in(bundle):
        assert re.search(rf"^ *{(bundle / name).stat().st_size:,}  {re.escape(name)}$", out, re.MULTILINE)


def test_without_the_client_one_line_says_how_to_get_it(
    bundle: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    expected = "personasteer: huggingface-hub is not installed: pip install 'personasteer[hub]'\n"
    assert cli("push", bundle, "--repo", "me/sunny") == (1, "", expected)


@pytest.mark.parametrize("repo", ["", "sunny", "a/b/c", "../x", "me/", "me/a b", "me/..", "me/-x", "https://hf.co/a/b"])
def test_a_repository_of_another_form_is_bad_usage(bundle: Path, client: Client, cli: Any, repo: str) -> None:
    code, out, err = cli("push", bundle, "--repo", repo, "--dry-run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    with pytest.raises(ArgumentError, match="USER/NAME"):
        push_bundle(bundle, repo)
    assert client.calls == []


def test_a_damaged_bundle_is_not_sent(bundle: Path, client: Client, cli: Any) -> None:
    (bundle / "reports/report.md").write_text("# changed")
    code, out, err = cli("push", bundle, "--repo", "me/sunny")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "reports/report.md" in err
    assert [name for name, _ in client.calls] == ["client"]  # made, and asked for nothing


def test_a_repository_with_other_files_is_left_as_it_is(bundle: Path, client: Client) -> None:
    # a bundle with files that are not listed does not load
    client.remote.append("config.json")
    with pytest.raises(BundleError, match=r"'config.json', which is no file of a bundle"):
        push_bundle(bundle, "me/sunny")
    assert "upload_folder" not in [name for name, _ in client.calls]


def test_what_bundles_are_made_of_counts_as_theirs(bundle: Path) -> None:
    assert {archive.PERSONA, archive.SUMS, "README.md", "model.gguf", "Modelfile"} <= set(hub.OURS)
    assert {f"{name.split('/')[0]}/*" for name in names_in(bundle) if "/" in name} <= set(hub.OURS)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("Connection refused"), "Connection refused"),
        (RuntimeError(f"two\nlines with {TOKEN} in"), "two lines with *** in"),
        (ValueError(""), "ValueError"),
    ],
)
def test_whatever_the_client_raises_is_one_line_without_the_token(
    bundle: Path, client: Client, cli: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    client.error = error
    assert cli("push", bundle, "--repo", "me/sunny") == (1, "", f"personasteer: me/sunny: {message}\n")


def test_ctrl_c_during_an_upload_is_not_swallowed(bundle: Path, client: Client, cli: Any) -> None:
    client.error = KeyboardInterrupt()  # type: ignore[assignment]
    assert cli("push", bundle, "--repo", "me/sunny") == (1, "", "personasteer: interrupted\n")


def test_no_option_takes_a_token(cli: Any) -> None:
    _, out, _ = cli("push", "--help")
    assert "--dry-run" in out
    assert "--token" not in out


# ---- the real client, against a Hub on this machine


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as one upload of small files needs; 401 without the token."""

    requests: list[tuple[str, str, str, bytes]]

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        type(self).requests.append((self.command, self.path, self.headers.get("Authorization", ""), body))
        path = self.path.split("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif path == "/api/repos/create":
            self._answer(200, {"url": "https://huggingface.co/me/sunny", "name": "me/sunny", "id": "me/sunny"})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self._answer(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in path:
            url = "https://huggingface.co/me/sunny/commit/1"
            self._answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/tree/" in path:
            entry = {"type": "file", "size": 1, "oid": "0" * 40}
            self._answer(200, [{**entry, "path": name} for name in (".gitattributes", "vectors/old.gguf")])
        else:
            siblings = [{"rfilename": ".gitattributes"}, {"rfilename": "vectors/old.gguf"}]
            self._answer(200, {"id": "me/sunny", "_id": "0", "sha": "0" * 40, "siblings": siblings, "tags": []})

    do_GET = do_POST = do_PUT = _any  # noqa: N815 (names that the server looks for)


@pytest.fixture
def server() -> Iterator[tuple[str, type[Hub]]]:
    class Here(Hub):
        requests: list[tuple[str, str, str, bytes]] = []  # noqa: RUF012 (one for each test)

    with ThreadingHTTPServer(("127.0.0.1", 0), Here) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}", Here
        finally:
            running.shutdown()
            thread.join()


def push_in_a_process(bundle: Path, endpoint: str, token: str, home: Path) -> subprocess.CompletedProcess[str]:
    """`personasteer push` with the installed client, which reads its settings when it is imported."""
    pytest.importorskip("huggingface_hub")
    code = (
        "import sys; from personasteer.ship.hub import push_bundle; from personasteer import PersonasteerError\n"
        "try: print(push_bundle(sys.argv[1], 'me/sunny').url)\n"
        "except PersonasteerError as e: sys.exit(str(e))"
    )
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HOME": str(home),
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1",
                   "NO_PROXY": "127.0.0.1"}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-P", "-c", code, str(bundle)],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_the_installed_client_sends_every_file_in_one_commit(
    bundle: Path, server: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    endpoint, seen = server
    done = push_in_a_process(bundle, endpoint, TOKEN, tmp_path / "home")
    assert (done.returncode, done.stdout) == (0, "https://huggingface.co/me/sunny/commit/1\n"), done.stderr
    commits = [body for method, path, _, body in seen.requests if method == "POST" and "/commit/" in path]
    assert len(commits) == 1
    lines = [json.loads(line) for line in commits[0].splitlines()]
    sent = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
    assert sent == {name: (bundle / name).read_bytes() for name in names_in(bundle)}
    deleted = [x["value"]["path"] for x in lines if x["key"] == "deletedFile"]
    assert deleted == ["vectors/old.gguf"]  # and not .gitattributes
    (header,) = [x["value"] for x in lines if x["key"] == "header"]
    assert header["summary"] == "personasteer bundle: sunny"


def test_the_installed_client_with_a_wrong_token_ends_in_one_line(
    bundle: Path, server: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    endpoint, seen = server
    wrong = TOKEN + "x"
    done = push_in_a_process(bundle, endpoint, wrong, tmp_path / "home")
    assert done.returncode == 1
    assert done.stdout == ""
    assert wrong not in done.stderr
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("me/sunny: ")]
    assert "hf auth login" in line
    assert "Traceback" not in done.stderr
    assert not [path for _, path, _, _ in seen.requests if "/commit/" in path]


def test_the_installed_client_without_a_server_ends_in_one_line(bundle: Path, tmp_path: Path) -> None:
    done = push_in_a_process(bundle, "http://127.0.0.1:9", TOKEN, tmp_path / "home")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("me/sunny: ")
    assert "Traceback" not in done.stderr
