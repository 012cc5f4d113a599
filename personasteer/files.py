"""Reading texts line by line, writing files whole or not at all, and the cache of what was measured."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from personasteer.errors import ArgumentError

log = logging.getLogger("personasteer")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, renamed onto it when the block ends well and deleted otherwise.

    Readers see the old file or the whole new one. Raises ArgumentError as `check_output` does, OSError, of `path`, as
    the disk.
    """
    temporary = _temporary_beside(path)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as e:
        if e.filename in (None, str(temporary)):  # a write that fails names no file
            e.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def check_output(path: Path, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Raise ArgumentError where no file can be written: a folder, a device, a missing or read-only folder; or where it
    would replace one of the inputs.
    """
    _temporary_beside(path).unlink()
    for given in inputs:
        if path.exists() and Path(given).exists() and path.samefile(given):
            raise ArgumentError(f"{path}: is what this is made from; write to another file")


def check_folder(folder: Path) -> None:
    """Raise ArgumentError where no files can be written into a folder, before the work; makes nothing."""
    try:
        there = folder.exists()
        above = next((p for p in folder.parents if p.exists()), Path())
    except OSError as e:
        raise ArgumentError(f"{folder}: cannot write here ({e.strerror})") from e
    if there and not folder.is_dir():
        raise ArgumentError(f"{folder}: cannot write here, it is a file and not a folder")
    check_output(folder / "report.md" if there else above / folder.name)


def read_lines(path: Path) -> list[tuple[str, str]]:
    """(where it stands, for messages; line) of each line that is not blank.

    Raises ArgumentError where the file cannot be read.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise ArgumentError(f"{path}: cannot be read ({reason})") from e
    return [(f"{path}, line {i}", line.rstrip("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def parse_line(line: str, where: str) -> Any:
    """The JSON of a line of `read_lines`. Raises ArgumentError."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ArgumentError(f"{where}: not valid JSON ({e})") from e


def encodable(text: str) -> str:
    """The text with what UTF-8 cannot hold written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _temporary_beside(path: Path) -> Path:
    if path.is_dir():
        raise ArgumentError(f"{path}: cannot write here, it is a folder")
    if path.exists() and not path.is_file():
        raise ArgumentError(f"{path}: cannot write here, it is a pipe or a device")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as e:
        raise ArgumentError(f"{path}: cannot write here ({e.strerror})") from e
    os.close(handle)
    return Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cache_dir() -> Path:
    """Where measurements of models and builds are kept; PERSONASTEER_CACHE_DIR overrides the system's place."""
    return Path(os.environ.get("PERSONASTEER_CACHE_DIR") or user_cache_dir("personasteer"))


def read_cache(name: str) -> dict[str, object]:
    try:
        found = json.loads(cache_dir().joinpath(name).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_cache(name: str, content: dict[str, object]) -> None:
    """Best effort: a cache that cannot be written costs time, not correctness."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        atomic_write(cache_dir() / name, json.dumps(content).encode())
    except (OSError, ArgumentError) as e:
        log.debug("cache not written: %s", e)
