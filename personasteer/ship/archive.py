"""The two forms of a bundle, a folder and a tar file: written whole or not at all, read with every byte checked."""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from personasteer.engine import Progress
from personasteer.errors import ArgumentError, BundleError
from personasteer.files import check_output, replacing
from personasteer.ship.persona import MAX_BYTES, inside

PERSONA, SUMS = "persona.json", "SHA256SUMS"
MAX_FILES = 10_000
CHUNK = 2**20
FICLONE = 0x40049409  # Linux: share the blocks of another file until one of them changes


class Counter:
    """Bytes done, to a callback (done, total)."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, n: int) -> None:
        self._done += n
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def copy_hashed(source: BinaryIO, target: BinaryIO | None, counter: Counter) -> tuple[str, int]:
    """(SHA-256, size) of what is read from `source`, chunk by chunk, and written to `target` on the way."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
        size += len(chunk)
        counter.add(len(chunk))
    return digest.hexdigest(), size


def sha256(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return copy_hashed(f, None, Counter(progress, path.stat().st_size))[0]


# ---- writing


class Writer(ABC):
    """Takes the files of a new bundle, one by one."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}

    @abstractmethod
    def take(self, name: str, source: Path, counter: Counter) -> tuple[str, int]:
        """Put a copy of a file in; its (SHA-256, size)."""

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Put bytes in."""

    def _sums(self) -> bytes:
        """The text of SHA256SUMS, as `sha256sum -c` reads it."""
        return "".join(f"{digest}  {name}\n" for name, digest in sorted(self.sums.items())).encode()


class _FolderWriter(Writer):
    def __init__(self, stage: Path) -> None:
        super().__init__()
        self._stage = stage

    def _target(self, name: str) -> Path:
        target = self._stage / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def take(self, name: str, source: Path, counter: Counter) -> tuple[str, int]:
        with source.open("rb") as f, self._target(name).open("xb+") as copy:
            cloned = _clone(f, copy)
            digest, size = copy_hashed(copy if cloned else f, None if cloned else copy, counter)
        self.sums[name] = digest
        return digest, size

    def put(self, name: str, data: bytes) -> None:
        self._target(name).write_bytes(data)
        self.sums[name] = hashlib.sha256(data).hexdigest()

    def finish(self) -> None:
        (self._stage / SUMS).write_bytes(self._sums())


def _clone(source: Any, copy: Any) -> bool:
    """Whether the file system could give the copy the same blocks, which costs no space and no time."""
    try:
        import fcntl

        fcntl.ioctl(copy.fileno(), FICLONE, source.fileno())
    except (ImportError, OSError):
        return False
    return True


class _TarWriter(Writer):
    """Reads files twice: the sums stand before what they are of."""

    def __init__(self) -> None:
        super().__init__()
        self._entries: dict[str, bytes | tuple[Path, int, Counter]] = {}

    def take(self, name: str, source: Path, counter: Counter) -> tuple[str, int]:
        with source.open("rb") as f:
            digest, size = copy_hashed(f, None, counter)
        self._entries[name] = source, size, counter
        self.sums[name] = digest
        return digest, size

    def put(self, name: str, data: bytes) -> None:
        self._entries[name] = data
        self.sums[name] = hashlib.sha256(data).hexdigest()

    def finish(self, path: Path) -> None:
        self._entries[SUMS] = self._sums()
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for name in sorted(self._entries):
                entry = self._entries[name]
                member = tarfile.TarInfo(name)  # no time, no owner
                if isinstance(entry, bytes):
                    member.size = len(entry)
                    tar.addfile(member, io.BytesIO(entry))
                    continue
                source, member.size, counter = entry
                with source.open("rb") as f:
                    again = _Hashing(f, counter)
                    tar.addfile(member, again)
                    if again.digest.hexdigest() != self.sums[name]:
                        raise BundleError(f"{source}: changed while it was read")


class _Hashing:
    """Reads a file and hashes what it gives."""

    def __init__(self, source: BinaryIO, counter: Counter) -> None:
        self._source, self._counter, self.digest = source, counter, hashlib.sha256()

    def read(self, n: int = -1) -> bytes:
        data = self._source.read(n)
        self.digest.update(data)
        self._counter.add(len(data))
        return data


@contextmanager
def writing(out: Path, *, force: bool) -> Iterator[Writer]:
    """A Writer of the folder `out`, or of the tar file where the name ends in .tar. What the block leaves in it gets
    this name when the block ends well; else nothing stays, and what was there before is there again.

    Raises ArgumentError as `check_target` does.
    """
    check_target(out, force=force)
    if out.suffix == ".tar":
        tar = _TarWriter()
        with replacing(out) as temporary:
            yield tar
            tar.finish(temporary)
        return
    stage = _beside(out)
    try:
        stage.mkdir()
        folder = _FolderWriter(stage)
        yield folder
        folder.finish()
        _replace_folder(stage, out)
    finally:
        if stage.exists():
            shutil.rmtree(stage, ignore_errors=True)


def check_target(out: Path, *, force: bool) -> None:
    """Raise ArgumentError where no bundle can be written; a folder that is no bundle is never replaced."""
    if out.name in ("", ".."):
        raise ArgumentError(f"{out}: name a folder to make, or a file that ends in .tar")
    if out.suffix == ".tar":
        check_output(out)
    else:
        beside = _beside(out)
        try:
            check_output(beside)  # whether the folder above can be written to
        except ArgumentError as e:
            raise ArgumentError(str(e).replace(str(beside), str(out))) from e
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise ArgumentError(f"{out}: cannot write here, it is a {'link' if out.is_symlink() else 'file'}")
        if out.is_dir() and any(out.iterdir()) and not (out / PERSONA).is_file():
            raise ArgumentError(f"{out}: is a folder with other files; a bundle needs one of its own")
    if out.exists() and not force:
        raise ArgumentError(f"{out}: exists already; --force (force=True) overwrites it")


def _beside(out: Path) -> Path:
    return out.with_name(f".{out.name}.{secrets.token_hex(4)}")


def _replace_folder(stage: Path, out: Path) -> None:
    """Give `stage` the name `out`. A folder cannot be renamed onto a full one: the old one steps aside first."""
    if not out.exists():
        os.rename(stage, out)
        return
    aside = _beside(out)
    try:
        os.rename(out, aside)
        os.rename(stage, out)
    except BaseException:
        if aside.exists() and not out.exists():
            os.rename(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


# ---- reading


class Reader(ABC):
    """The files of a bundle: {name: size}, opened one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: dict[str, int] = {}

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """The bytes of one of its files."""

    def small(self, name: str) -> bytes:
        """The bytes of a file that is not large. Raises BundleError when it is missing, or larger than it may be."""
        if name not in self.sizes:
            raise BundleError(f"{self.path}: not a bundle (no {name})")
        if self.sizes[name] > MAX_BYTES:
            raise BundleError(f"{self.path}: {name} has {self.sizes[name]} bytes, at most {MAX_BYTES} are read")
        with self.open(name) as f:
            return f.read(MAX_BYTES)

    def _add(self, name: str, size: int) -> None:
        try:
            inside(name)
        except ValueError as e:
            raise BundleError(f"{self.path}: {e}") from e
        if name in self.sizes:
            raise BundleError(f"{self.path}: {name} is in it twice")
        if len(self.sizes) >= MAX_FILES:
            raise BundleError(f"{self.path}: more than {MAX_FILES} files")
        self.sizes[name] = size


class _FolderReader(Reader):
    """What starts with a dot at the top (.git, .gitattributes, .cache of a download) is none of the bundle's."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not (path / PERSONA).is_file():  # before a walk through somebody's home folder
            raise BundleError(f"{path}: not a bundle (no {PERSONA})")
        for folder, folders, files in os.walk(path, onerror=_raise):
            at = Path(folder)
            if at == path:
                folders[:] = [name for name in folders if not name.startswith(".")]
                files = [name for name in files if not name.startswith(".")]
            for name in (*files, *(d for d in folders if (at / d).is_symlink())):
                file = at / name
                relative = file.relative_to(path).as_posix()
                if not file.is_file():  # a link to a file is one: so a download cache keeps them
                    raise BundleError(f"{path}: {clean_name(relative)} is no regular file")
                self._add(relative, file.stat().st_size)

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")


class _TarReader(Reader):
    def __init__(self, path: Path, tar: tarfile.TarFile) -> None:
        super().__init__(path)
        self._tar = tar
        self._members: dict[str, tarfile.TarInfo] = {}
        for member in tar:
            if not member.isreg() or member.issparse():
                raise BundleError(f"{path}: {clean_name(member.name)} is no regular file")
            self._add(member.name, member.size)
            self._members[member.name] = member

    def open(self, name: str) -> BinaryIO:
        return self._tar.extractfile(self._members[name])  # type: ignore[return-value]  # regular files have one


def _raise(error: OSError) -> None:
    raise error


def clean_name(name: str) -> str:
    """A foreign name for a message."""
    return ascii(name)[:80]


@contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """A Reader of a folder or a tar file. Raises BundleError where it is neither, truncated, or unreadable."""
    try:
        if path.is_dir():
            yield _FolderReader(path)
            return
        if not path.exists():
            raise BundleError(f"{path}: no such folder or file")
        if not path.is_file():
            raise BundleError(f"{path}: is a pipe or a device, not a bundle")
        with tarfile.open(path, "r:") as tar:  # uncompressed: what comes out is no larger than what is there
            yield _TarReader(path, tar)
    except (tarfile.TarError, EOFError, OverflowError) as e:
        raise BundleError(f"{path}: not a bundle: no folder, and no whole tar file ({' '.join(str(e).split())})") from e
    except OSError as e:
        raise BundleError(f"{path}: {'' if e.filename in (None, str(path)) else f'{e.filename}: '}{e.strerror or e}"
                          ) from e  # fmt: skip


def read_sums(reader: Reader) -> dict[str, str]:
    """{name: SHA-256} of the bundle's SHA256SUMS. Raises BundleError where it is missing or malformed."""
    if SUMS not in reader.sizes:
        raise BundleError(f"{reader.path}: {SUMS} is missing, so nothing in it can be checked")
    sums: dict[str, str] = {}
    for number, line in enumerate(reader.small(SUMS).decode("utf-8", "replace").splitlines(), 1):
        found = re.fullmatch(r"([0-9a-f]{64})  (\S+)", line, re.ASCII)
        if not found or found[2] in sums:
            raise BundleError(
                f"{reader.path}: {SUMS}, line {number}: a SHA-256, two spaces and a new name are expected"
            )
        sums[found[2]] = found[1]
    return sums


def check_small(reader: Reader, sums: dict[str, str], name: str) -> bytes:
    """The bytes of a file that is not large, when they are those of SHA256SUMS."""
    data = reader.small(name)
    if sums.get(name) != hashlib.sha256(data).hexdigest():
        raise BundleError(f"{reader.path}: {name} is not the file that {SUMS} names: it was changed")
    return data


def check_all(reader: Reader, sums: dict[str, str], into: Path | None, progress: Progress | None) -> None:
    """Read every file, compare it with SHA256SUMS and, with `into`, write it there.

    Raises BundleError for a file that is missing, not listed, or changed.
    """
    for name in sorted(sums.keys() - reader.sizes.keys()):
        raise BundleError(f"{reader.path}: {clean_name(name)} is missing")
    for name in sorted(reader.sizes.keys() - sums.keys() - {SUMS}):
        raise BundleError(f"{reader.path}: {name} is not listed in {SUMS}")
    counter = Counter(progress, sum(reader.sizes[name] for name in sums))
    for name in sorted(sums):
        with reader.open(name) as source:
            if into is None:
                digest, _ = copy_hashed(source, None, counter)
            else:
                (into / name).parent.mkdir(parents=True, exist_ok=True)
                with (into / name).open("xb") as target:
                    digest, _ = copy_hashed(source, target, counter)
        if digest != sums[name]:
            raise BundleError(f"{reader.path}: {name} is not the file that {SUMS} names: it was changed")
    if into is not None:
        (into / SUMS).write_bytes(reader.small(SUMS))


@contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Remove a folder when the block does not end well, Ctrl-C included."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(folder)
        raise
