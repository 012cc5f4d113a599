"""A folder that keeps finished parts of a long computation, so that it can be interrupted and goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from personasteer.errors import ArgumentError
from personasteer.files import atomic_write

log = logging.getLogger("personasteer")

Part: TypeAlias = tuple[dict[str, NDArray[Any]], Any]  # arrays, and what JSON can hold


class Work:
    """Parts of a computation, kept in `folder` as they are finished; kept nowhere when it is None.

    A part has a fixed content whichever parts were there before, so that an interrupted run that is started again ends
    in the same bytes as one that was not.

    Args:
        plan: everything that the parts depend on. A folder of another plan is refused.
        restart: begin anew instead; what this class has written there goes, and the files named `more`.

    Raises:
        ArgumentError: the folder cannot be written, holds another plan, or another process works in it.
    """

    def __init__(
        self, folder: Path | None, plan: Mapping[str, Any], *, restart: bool = False, more: Sequence[str] = ()
    ) -> None:
        self._folder = folder
        self._lock: Any = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("w")
        except OSError as e:
            raise ArgumentError(f"{folder}: cannot work here ({e.strerror})") from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._lock.close()
            raise ArgumentError(f"{folder}: another process works here") from e
        self._own = (*more, "plan.json")  # the plan goes last: without it the others would be foreign
        try:
            self._claim(folder / "plan.json", plan, restart)
        except BaseException:
            self.close()
            raise

    def _claim(self, file: Path, plan: Mapping[str, Any], restart: bool) -> None:
        text = json.dumps(plan, sort_keys=True, indent=1, ensure_ascii=False, default=str)
        try:
            known = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            foreign = [name for name in self._own if (file.parent / name).exists()]
            if foreign:
                raise ArgumentError(
                    f"{file.parent}: holds {foreign[0]} of something else; name another folder"
                ) from None
            atomic_write(file, text.encode())
            return
        except (OSError, ValueError, RecursionError) as e:
            raise ArgumentError(f"{file}: cannot be read ({e}); name another folder") from e
        wanted = json.loads(text)
        if known != wanted and restart:
            self._forget()
            atomic_write(file, text.encode())
        elif known != wanted:
            same = isinstance(known, dict) and known
            keys = sorted(k for k in {*known, *wanted} if known.get(k) != wanted.get(k)) if same else ["everything"]
            raise ArgumentError(
                f"{file.parent}: holds other work (it differs in: {', '.join(keys)}); name another "
                "folder, or remove this one"
            )

    def _forget(self) -> None:
        if self._folder is not None:
            parts = [file for file in self._folder.glob("*.safetensors") if _is_part(file)]
            for file in (*parts, *(self._folder / name for name in self._own)):
                file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Leave nothing of the work; the folder goes, too, if nothing else is in it."""
        self._forget()
        self.close()
        if self._folder is not None:
            (self._folder / "lock").unlink(missing_ok=True)
            with suppress(OSError):
                self._folder.rmdir()

    def part(self, name: str, compute: Callable[[], Part]) -> Part:
        """What `compute` gives, from the folder if it is there already."""
        if self._folder is None:
            return compute()
        file = self._folder / f"{name}.safetensors"
        with suppress(FileNotFoundError):
            try:
                with safe_open(file, "np") as f:
                    return {key: f.get_tensor(key) for key in f.keys()}, json.loads(f.metadata()["json"])  # noqa: SIM118
            except FileNotFoundError:
                raise
            except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as e:
                log.warning("%s cannot be read (%s): computed again", file, e)
        arrays, rest = compute()
        arrays = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
        atomic_write(file, save(arrays, {"json": json.dumps(rest)}))
        return arrays, rest

    def value(self, name: str, compute: Callable[[], Any]) -> NDArray[Any]:
        """A part that is one array of float64."""
        return self.part(name, lambda: ({"value": np.asarray(compute(), np.float64)}, None))[0]["value"]

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_part(file: Path) -> bool:
    """Whether `Work.part` wrote this file, or began to: the metadata of others' weights hold no "json"."""
    try:
        with safe_open(file, "np") as f:
            return "json" in (f.metadata() or {})
    except (OSError, SafetensorError):
        return False


def digest(*parts: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
