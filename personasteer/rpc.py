"""llama.cpp's RPC workers: asked whether they are there, because llama.cpp ends the process where one is not."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

from personasteer._native import load_core
from personasteer.errors import ArgumentError, ModelError

HELLO = 14
CAPABILITIES = bytes(24)  # none
PATIENCE = 10.0  # seconds


def check_workers(rpc: Sequence[str]) -> list[str]:
    """The addresses, where an RPC worker of llama.cpp's version answers at each.

    Raises ArgumentError for what is no HOST:PORT, ModelError that names the address where no such worker answers, or
    where llama.cpp was built without RPC.
    """
    if isinstance(rpc, str):
        raise ArgumentError("rpc must be a list of addresses, such as ['192.168.0.2:50052']")
    for address in rpc:
        host, colon, port = address.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise ArgumentError(f"{address!r} is no address of an RPC worker: HOST:PORT is needed")
    core = load_core()
    if rpc and not core.HAS_RPC:
        raise ModelError(
            "this build of llama.cpp has no RPC; install one that has: CMAKE_ARGS=-DGGML_RPC=on pip install "
            f"--no-cache-dir --force-reinstall llama-cpp-python=={core.LLAMA_CPP_PYTHON}"
        )
    for address in rpc:
        version = _version(address)
        if version is None or version[0] != core.RPC_VERSION[0] or version[1] > core.RPC_VERSION[1]:
            seen = "" if version is None else f", but one of protocol {version[0]}.{version[1]}"
            wanted = "{}.{}".format(*core.RPC_VERSION)
            raise ModelError(
                f"no RPC worker of protocol {wanted} answers at {address}{seen} (start one of the same llama.cpp: "
                "ggml-rpc-server -H HOST -p PORT)"
            )
    return list(rpc)


def _version(address: str) -> tuple[int, int] | None:
    """(major, minor) of the protocol that a worker speaks; None where nothing that is one answers in time."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as s:
            s.sendall(struct.pack("<BQ", HELLO, len(CAPABILITIES)) + CAPABILITIES)
            answer = b""
            while len(answer) < 10 and (part := s.recv(10 - len(answer))):
                answer += part
    except (OSError, ValueError):
        return None
    if len(answer) < 10 or struct.unpack("<Q", answer[:8])[0] != 4 + len(CAPABILITIES):
        return None
    return answer[8], answer[9]
