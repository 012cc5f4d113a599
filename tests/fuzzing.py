"""Inputs that are damaged, and what a reader of files may do with them: read them, or refuse them in one line."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from personasteer.errors import PersonasteerError

MEMORY = 2 * 2**30  # bytes that one example may take beside what the process has
SECONDS = 20  # after which an example hangs
TIMES = float(os.environ.get("PERSONASTEER_FUZZ", "1"))  # how many times the usual examples; above 1 they are new ones

Where = Callable[[Any], Any]


def fuzz(n: int) -> settings:
    """Settings of n examples, the same each time; PERSONASTEER_FUZZ=50 takes 50 n, and other ones in each run."""
    return settings(
        max_examples=max(1, int(n * TIMES)), derandomize=TIMES <= 1, deadline=None, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@contextmanager
def bounds(memory: int = MEMORY, seconds: int = SECONDS) -> Iterator[None]:
    """Within the block more memory is a MemoryError, and more time a TimeoutError."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def read_or_refuse(read: Callable[[], Any]) -> Any:
    """What `read` gives; None where it raises an error of ours, of one line. Whatever else it raises is a defect."""
    with bounds():
        try:
            return read()
        except PersonasteerError as e:
            text = str(e)
            assert text, "an error without words"
            assert len(text.splitlines()) == 1, repr(text)
            assert text.isprintable() or not any(c in text for c in "\n\r\x00\x1b"), repr(text)
            return None


# ---- raw: bytes flipped, cut, spliced, grown

NUMBERS = [b"\0", b"\xff", b"\x7f", b"\x80", bytes(8), b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\0\0\0\0\x80",
           b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\1\0\0\0\0\0\0\0"]  # fmt: skip
TEXTS = [b'"', b"{", b"[" * 200, b"}", b"\n", b"\\", b"\\ud800", b"NaN", b"1e999", b"9" * 400, b"\xef\xbb\xbf", b"\xff",
         b"null", b"\0", b"'''", b"-", b",,", b"\xe2\x80\xa8"]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes], *, until: int | None = None) -> bytes:
    """One of the seeds with a few places changed, before byte `until`."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        n = max(1, min(len(data), until or len(data)))
        at = draw(st.integers(0, n - 1))
        match draw(st.sampled_from(("flip", "set", "write", "cut", "drop", "splice", "grow", "insert", "text"))):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if data:
                data[at] = draw(st.integers(0, 255))
            case "write":
                number = draw(st.sampled_from(NUMBERS))
                data[at : at + len(number)] = number
            case "cut" if draw(st.integers(0, 2)) == 0:
                del data[at:]
            case "drop":
                del data[at : at + draw(st.sampled_from((1, 2, 4, 8, 32, 200)))]
            case "splice":
                begin, size = draw(st.integers(0, n - 1)), draw(st.sampled_from((1, 4, 8, 16, 64, 512)))
                data[at : at + draw(st.sampled_from((0, size)))] = data[begin : begin + size]
            case "grow":
                data += draw(st.binary(min_size=1, max_size=40))
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=12))
            case "text":
                data[at:at] = draw(st.sampled_from(TEXTS))
    return bytes(data)


# ---- structured: a valid value with parts of other kinds

ODD = [
    None, True, False, 0, 1, -1, 2, 63, 64, 2**31, 2**32, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e-300, 1e308,
    -1e308, float("inf"), float("nan"), "", "a", " ", "\n", "a\nb", "\0", "\ud800", "\u2028", "é" * 50, "../../x",
    "/etc/passwd", "x" * 5000, "0.5", "nan", [], {}, [[]], [None], [0.5, "a"], {"a": 1}, [[1, 2], [3]],
    [[0.0] * 3] * 2, {"": {}},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all parts of plain data, itself included."""
    found = [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        found += places(part, (*path, key))
    return found


@st.composite
def altered(draw: st.DrawFn, seeds: list[Any], odd: list[Any] = ODD) -> Any:
    """One of the seeds, plain data, with a few parts replaced, removed, repeated, renamed or wrapped."""
    value = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(places(value)))
        if not path:
            if draw(st.integers(0, 20)) == 0:
                return draw(st.sampled_from(odd))
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        key = path[-1]
        match draw(st.sampled_from(("replace", "replace", "replace", "remove", "double", "rename", "wrap", "deepen"))):
            case "replace":
                holder[key] = copy.deepcopy(draw(st.sampled_from(odd)))
            case "remove":
                del holder[key]
            case "double" if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case "rename" if isinstance(holder, dict):
                holder[draw(st.sampled_from(("", "x", "__class__", "a.b", "\ud800", key.upper())))] = holder.pop(key)
            case "wrap":
                holder[key] = [holder[key]]
            case "deepen" if draw(st.integers(0, 5)) == 0:
                for _ in range(300):
                    holder[key] = [holder[key]]
    return value


def as_json(value: Any) -> bytes:
    """JSON, with whatever JSON's readers may meet: NaN, halves of characters."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
