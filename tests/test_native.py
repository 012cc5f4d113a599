"""Loading llama.cpp once, keeping clear of broken kernels, and files that are whole or not there."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import samples

from personasteer import ArgumentError, _native, files

SEGFAULT = [sys.executable, "-c", "import os,signal; os.kill(os.getpid(), signal.SIGSEGV)"]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and nothing remembered from before or after."""
    monkeypatch.setenv("PERSONASTEER_CACHE_DIR", str(tmp_path / "cache"))
    _native.extra_buffers_work.cache_clear()
    yield tmp_path / "cache"
    _native.extra_buffers_work.cache_clear()


def with_amx(monkeypatch: pytest.MonkeyPatch, probe: list[str]) -> None:
    monkeypatch.setattr(_native, "cpu_has_amx", lambda: True)
    monkeypatch.setattr(_native, "PROBE", probe)


# ---- loading


def test_another_llama_cpp_python_than_the_one_built_against_is_refused_with_both_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_native, "version", lambda name: "9.8.7")
    with pytest.raises(ImportError) as raised:
        _native.load_core.__wrapped__()
    message = str(raised.value)
    assert "9.8.7" in message
    assert "pip install llama-cpp-python==0.3.36" in message
    assert "\n" not in message


def test_a_missing_llama_cpp_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise _native.PackageNotFoundError(name)

    monkeypatch.setattr(_native, "version", missing)
    with pytest.raises(ImportError, match="needs llama-cpp-python"):
        _native.load_core.__wrapped__()


# ---- the probe


def test_a_cpu_without_amx_is_not_probed(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cpu_has_amx", lambda: False)
    monkeypatch.setattr(_native, "survives", lambda command: pytest.fail("a child was started"))
    assert _native.extra_buffers_work()
    assert not fresh.exists()


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "flags : fpu avx512f amx_bf16 amx_tile amx_int8", True),
        ("AMD64", "flags : amx_tile", True),
        ("x86_64", "flags : fpu avx2", False),
        ("aarch64", "flags : amx_tile", False),
    ],
)
def test_amx_is_read_from_the_cpus_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, flags: str, expected: bool
) -> None:
    monkeypatch.setattr(_native.platform, "machine", lambda: machine)
    (tmp_path / "cpuinfo").write_text(flags)
    assert _native.cpu_has_amx(tmp_path / "cpuinfo") is expected
    assert not _native.cpu_has_amx(tmp_path / "missing")


def test_a_crash_in_the_child_turns_the_kernels_off_with_one_line_and_is_remembered(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_amx(monkeypatch, SEGFAULT)
    with caplog.at_level(logging.WARNING, "personasteer"):
        assert not _native.extra_buffers_work()
        assert not _native.extra_buffers_work()
    (message,) = caplog.messages
    assert "AMX" in message
    assert "\n" not in message
    assert [p.suffix for p in fresh.iterdir()] == [".json"]

    _native.extra_buffers_work.cache_clear()  # another process: no child, the file says it
    monkeypatch.setattr(_native, "survives", lambda command: pytest.fail("a second child was started"))
    assert not _native.extra_buffers_work()


def test_the_real_probe_survives_here(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if _native.cpu_has_amx():
        pytest.skip("this CPU has AMX: the outcome depends on the compiler of llama.cpp")
    with_amx(monkeypatch, _native.PROBE)
    assert _native.extra_buffers_work()


def test_a_cache_that_is_damaged_is_as_good_as_none(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_amx(monkeypatch, [sys.executable, "-c", ""])
    fresh.mkdir()
    for content in ("", "[1]", '{"extra_buffers_work": "no"}', "\x00\xff", '{"extra_buffers_work"'):
        fresh.joinpath(f"build-{_native.build_id()}.json").write_text(content, "latin-1")
        _native.extra_buffers_work.cache_clear()
        assert _native.extra_buffers_work(), content


def test_survives_tells_an_end_from_a_crash_an_error_and_a_hang() -> None:
    assert _native.survives([sys.executable, "-c", ""])
    assert not _native.survives(SEGFAULT)
    assert not _native.survives([sys.executable, "-c", "raise SystemExit(3)"])
    assert not _native.survives(["/nonexistent/program"])
    assert not _native.survives([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.3)


def test_a_probe_that_could_not_run_is_not_remembered_as_a_crash(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # no room for temporary files, a kill, a timeout on a busy machine: nothing was learned about the kernels
    with_amx(monkeypatch, [sys.executable, "-c", "raise SystemExit(1)"])
    _native.extra_buffers_work()
    _native.extra_buffers_work.cache_clear()
    with_amx(monkeypatch, [sys.executable, "-c", ""])
    assert _native.extra_buffers_work()


# ---- the cache and files


def test_a_cache_folder_that_cannot_be_written_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PERSONASTEER_CACHE_DIR", str(tmp_path / "file" / "cache"))
    files.write_cache("x.json", {"a": 1})
    assert files.read_cache("x.json") == {}
    _native.extra_buffers_work.cache_clear()
    with_amx(monkeypatch, [sys.executable, "-c", ""])
    assert _native.extra_buffers_work()
    _native.extra_buffers_work.cache_clear()


def test_the_cache_gives_back_what_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONASTEER_CACHE_DIR", str(tmp_path / "new" / "cache"))
    files.write_cache("x.json", {"a": [1.5, None]})
    assert files.read_cache("x.json") == {"a": [1.5, None]}
    assert samples.no_leftovers(tmp_path / "new" / "cache", "x.json")


def test_atomic_write_replaces_a_file_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    mask = os.umask(0o027)
    try:
        files.atomic_write(path, b"one")
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o640
    files.atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    with pytest.raises(ArgumentError, match="No such file"):
        files.atomic_write(tmp_path / "missing" / "f", b"x")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["replace", "chmod", "write_bytes"])
def test_an_interrupted_write_leaves_the_old_content_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, failure: BaseException
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(Path if call == "write_bytes" else os, call, fail)
    with pytest.raises(type(failure)):
        files.atomic_write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert samples.no_leftovers(tmp_path, "f")
