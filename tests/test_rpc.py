"""A model whose blocks lie on two RPC workers steers and captures as one that lies here does."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rpc_workers import workers

import personasteer as ps
from personasteer import rpc
from personasteer._native import load_core
from personasteer.cli import run

TEXTS = ["abcabcabd", "The rain falls.", "hello", "xyz"]
# other kernels sum in another order, and keys and values are kept in 16 bits; seen: 3e-4 of the largest number
ROUNDING = 1e-3


def has_rpc() -> bool:
    return bool(load_core().HAS_RPC)


@pytest.fixture(scope="module")
def program() -> Path:
    folder = os.environ.get("PERSONASTEER_LLAMA_CPP_BIN")
    if not folder or not (found := Path(folder) / "ggml-rpc-server").exists():
        pytest.skip("PERSONASTEER_LLAMA_CPP_BIN names no folder with ggml-rpc-server")
    if not has_rpc():
        pytest.skip("llama-cpp-python was built without GGML_RPC")
    return found


@pytest.fixture(scope="module")
def split(program: Path, tiny_path: Path) -> Iterator[ps.Model]:
    """The tiny model, two of its four blocks on each of two workers."""
    with workers(program, 2) as addresses, ps.Model(tiny_path, n_ctx=64, rpc=addresses) as model:
        yield model


@pytest.fixture(scope="module")
def here(tiny_path: Path) -> Iterator[ps.Model]:
    with ps.Model(tiny_path, n_ctx=64, n_gpu_layers=0) as model:
        yield model


@pytest.fixture(scope="module")
def vector(here: ps.Model) -> ps.PersonaVector:
    data = np.random.default_rng(0).standard_normal((here.n_layer, here.n_embd)).astype(np.float32)
    return ps.PersonaVector(data, range(here.n_layer), thresholds=np.zeros(here.n_layer, np.float32))


@pytest.mark.llama_cpp_programs
def test_every_edit_reaches_blocks_on_both_workers(split: ps.Model, here: ps.Model, vector: ps.PersonaVector) -> None:
    plain = here.logits(TEXTS)
    for il in range(here.n_layer):
        at = (il,)
        for edit in (
            ps.Add(vector, 0.3, layers=at),
            ps.Cap(vector, -2.0, layers=at),
            ps.Floor(vector, 2.0, layers=at),
            ps.Ablate(vector, to=3.0, layers=at),
            ps.When(vector, ps.Add(vector, 0.3, layers=at), threshold=-1e9, on="token"),
        ):
            remote, local = (m.logits(TEXTS, steer=[edit] * 4) for m in (split, here))
            for a, b, unsteered in zip(remote, local, plain, strict=True):
                largest = np.abs(b).max()
                np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING * largest)
                assert np.abs(b - unsteered).max() > 10 * ROUNDING * largest


@pytest.mark.llama_cpp_programs
def test_an_unsteered_text_beside_steered_ones_has_the_unsteered_logits_to_the_bit(
    split: ps.Model, vector: ps.PersonaVector
) -> None:
    plain = split.logits(TEXTS)
    mixed = split.logits(TEXTS, steer=[None, vector * 0.3, vector * 0.0, ps.Cap(vector, np.full(4, 1e30))])
    for k in (0, 2, 3):
        np.testing.assert_array_equal(mixed[k], plain[k])
    assert np.abs(mixed[1] - plain[1]).max() > 1e-3


@pytest.mark.llama_cpp_programs
def test_the_states_that_are_captured_are_those_of_the_model_that_lies_here(split: ps.Model, here: ps.Model) -> None:
    for pool in ("mean", "last", "raw"):
        remote, local = (m.capture(TEXTS[:2], pool=pool, last_layer=True) for m in (split, here))
        for a, b in zip(remote, local, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING * np.abs(b).max())


@pytest.mark.llama_cpp_programs
def test_a_worker_that_is_not_there_is_named(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not has_rpc():
        pytest.skip("llama-cpp-python was built without GGML_RPC")
    with pytest.raises(ps.ModelError, match=r"no RPC worker of protocol \d+\.\d+ answers at 127\.0\.0\.1:1 "):
        ps.Model(tiny_path, rpc=["127.0.0.1:1"])
    assert run(["generate", "-m", str(tiny_path), "-p", "a", "--rpc", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.llama_cpp_programs
def test_a_context_that_outlives_its_workers_ends_the_process_and_does_not_hang(program: Path, tiny_path: Path) -> None:
    code = (
        "import sys, personasteer as ps\n"
        "model = ps.Model(sys.argv[1], n_ctx=64, rpc=sys.argv[2:])\n"
        "model.logits(['hello'])\n"
        "print('computed', flush=True)\n"
        "sys.stdin.read()\n"
        "model.close()\n"
    )
    with workers(program, 1) as addresses:
        command = [sys.executable, "-c", code, str(tiny_path), *addresses]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert child.stdout
        assert child.stdout.readline() == "computed\n"
    try:
        child.communicate(timeout=60)  # the worker is gone; how llama.cpp ends the process is its own
    finally:
        child.kill()


@pytest.mark.llama_cpp_programs
def test_a_command_whose_worker_ends_under_it_says_so_in_one_line(program: Path, tiny_path: Path) -> None:
    with workers(program, 1) as addresses:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "personasteer", "generate", "-m", str(tiny_path), "-p", "hello",
             "-n", "2000", "-c", "2048", "--rpc", *addresses],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdout
        assert child.stdout.read(1)
    try:
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 1
    assert err.startswith("personasteer: llama.cpp: ggml-rpc.cpp:")
    assert err.count("\n") == 1


def answering(server: socket.socket, answer: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(64)
        connection.sendall(answer)


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ""),
        (b"", ""),
        (struct.pack("<Q", 28) + bytes([6, 0]) + bytes(26), ", but one of protocol 6.0"),
        (struct.pack("<Q", 28) + bytes([7, 99]) + bytes(26), ", but one of protocol 7.99"),
    ],
)
def test_what_is_no_worker_of_this_version_is_told_before_llama_cpp_asks_it(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, seen: str
) -> None:
    monkeypatch.setattr(rpc, "load_core", lambda: SimpleNamespace(HAS_RPC=True, RPC_VERSION=(7, 0)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        thread = threading.Thread(target=answering, args=(server, answer))
        thread.start()
        with pytest.raises(ps.ModelError, match=rf"protocol 7\.0 answers at 127\.0\.0\.1:{port}{seen} \("):
            ps.Model(tiny_path, rpc=[f"127.0.0.1:{port}"])
        thread.join()


def test_a_build_without_rpc_says_how_to_get_one(tiny_path: Path) -> None:
    if has_rpc():
        pytest.skip("llama-cpp-python was built with GGML_RPC")
    with pytest.raises(ps.ModelError, match=r"this build of llama\.cpp has no RPC; .*-DGGML_RPC=on"):
        ps.Model(tiny_path, rpc=["127.0.0.1:50052"])


def test_what_is_no_address_is_refused(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("localhost", ":50052", "localhost:", "localhost:port", "localhost:70000"):
        with pytest.raises(ps.ArgumentError, match="is no address of an RPC worker: HOST:PORT is needed"):
            ps.Model(tiny_path, rpc=[wrong])
    with pytest.raises(ps.ArgumentError, match="rpc must be a list of addresses"):
        ps.Model(tiny_path, rpc="localhost:50052")
    assert run(["generate", "-m", str(tiny_path), "-p", "a", "--rpc", "localhost"]) == 2
    assert "'localhost' is no address of an RPC worker" in capsys.readouterr().err
