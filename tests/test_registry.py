"""The registry of models: what it keeps, several processes, killed writers, damaged and foreign files."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples

import personasteer as ps
from personasteer.monitor import Threshold
from personasteer.monitor.registry import (
    PATIENCE,
    SCHEMA,
    Evaluation,
    Registry,
    TrackedModel,
    TrackedVector,
    registry_path,
)

FIRST, SECOND = "ab" * 32, "cd" * 32


def model(fingerprint: str = FIRST, **more: Any) -> TrackedModel:
    given: dict[str, Any] = {
        "fingerprint": fingerprint, "name": "Tiny", "file": f"{fingerprint[:2]}.gguf", "architecture": "llama",
        "n_layer": 4, "n_embd": 64, "identity": {"metadata": "m", "tensors": "t", "weights": "w"},
    }  # fmt: skip
    return TrackedModel(**{**given, **more})


def threshold(**more: Any) -> Threshold:
    given: dict[str, Any] = {
        "name": "t", "layer": 1, "direction": np.array([1.0, 0.0], np.float32), "watch": 1.0, "alarm": 2.0,
        "slope": 2.0, "intercept": -3.0, "auroc": 1.0, "n_clean": 40, "n_trait": 10, "origin": {"fingerprint": FIRST},
    }  # fmt: skip
    return Threshold(**{**given, **more})


def evaluation(k: int = 0, **more: Any) -> Evaluation:
    arrays = {"a": np.arange(6, dtype=np.float64).reshape(2, 3) + k, "b": np.full(3, k, np.float32)}
    return Evaluation(**{"kind": "profile", "model": FIRST, "content": {"k": k}, "arrays": arrays, **more})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "registry.sqlite"


def filled(file: Path) -> Path:
    """A registry with two models, a vector on one of them and three evaluations."""
    kept = TrackedVector.of(samples.vector())
    with Registry(file) as r:
        r.add_model(model(label="one"))
        r.add_model(model(SECOND))
        r.add_vector(kept)
        r.set_threshold(FIRST, kept.digest, threshold())
        for k in range(3):
            r.add_evaluation(evaluation(k))
        r.add_evaluation(evaluation(9, kind="vector", vector=kept.digest))
    return file


def everything(file: Path) -> list[Any]:
    """All that a registry says, to be compared."""
    with Registry(file) as r:
        out: list[Any] = []
        for m in r.models():
            out.append(m)
            for vector, limits in r.vectors(m.fingerprint):
                out.append((vector, None if limits is None else limits.as_dict()))
                out += [told(e) for e in r.evaluations(model=m.fingerprint, kind="vector", vector=vector.digest)]
            out += [told(e) for e in r.evaluations(model=m.fingerprint, kind="profile")]
        return out


def told(e: Evaluation) -> Any:
    return e.number, e.kind, e.model, e.vector, e.content, {n: (a.dtype, a.tolist()) for n, a in e.arrays.items()}


# -- what it keeps ----------------------------------------------------------------------------------------------------


def test_what_is_added_is_there_again_in_the_order_in_which_it_was_added(file: Path) -> None:
    filled(file)
    with Registry(file, create=False) as r:
        assert r.models() == [model(label="one"), model(SECOND)]
        found = r.evaluations(model=FIRST, kind="profile")
        assert [e.content["k"] for e in found] == [0, 1, 2]
        last = r.latest(model=FIRST, kind="profile")
        assert last is not None
        assert told(last) == told(found[2])
        assert last.arrays["a"].dtype == np.float64
        assert last.arrays["b"].dtype == np.float32
        np.testing.assert_array_equal(last.arrays["a"], evaluation(2).arrays["a"])
        ((vector, limits),) = r.vectors(FIRST)
        assert r.vectors(SECOND) == []
        assert limits is not None
        assert limits.as_dict() == threshold().as_dict()
        assert r.latest(model=FIRST, kind="vector") is None  # that one is of the vector
        assert r.latest(model=FIRST, kind="vector", vector=vector.digest) is not None
    loaded = vector.load()
    np.testing.assert_array_equal(loaded.directions, samples.vector().directions)
    assert TrackedVector.of(loaded) == vector  # the same vector is the same bytes


def test_a_model_that_is_added_again_keeps_its_place_and_its_label(file: Path) -> None:
    filled(file)
    with Registry(file) as r:
        r.add_model(model(file="renamed.gguf"))
        assert [(m.file, m.label) for m in r.models()] == [("renamed.gguf", "one"), ("cd.gguf", None)]
        r.add_model(model(label="other"))
        assert r.model("other").fingerprint == FIRST
        with pytest.raises(ps.ArgumentError, match=r"'other' belongs to another tracked model \(ab\.gguf\)"):
            r.add_model(model(SECOND, label="other"))
        with pytest.raises(ps.ArgumentError, match="must not be empty"):
            r.add_model(model(label=" "))
        for odd in ("\ud800", "\x1b[2J", "a\nb"):
            with pytest.raises(ps.ArgumentError, match="characters that show"):
                r.add_model(model(label=odd))


def test_a_model_is_found_by_its_label_or_the_beginning_of_its_fingerprint(file: Path) -> None:
    filled(file)
    with Registry(file) as r:
        assert r.model("one") == r.model(FIRST) == r.model("ABAB")
        r.add_model(model("abab" + "00" * 30))
        with pytest.raises(ps.RegistryError, match="how 2 fingerprints begin"):
            r.model("abab")
        for unknown in ("two", "aba", "", "_" * 64, "%"):
            with pytest.raises(ps.RegistryError, match="no tracked model has the label or fingerprint"):
                r.model(unknown)


def test_a_rehearsal_leaves_nothing_behind_and_a_transaction_that_fails_neither(file: Path) -> None:
    before = everything(filled(file))
    with Registry(file) as r:
        with r.rehearsal():
            r.add_model(model("ee" * 32))
            assert len(r.models()) == 3
        with pytest.raises(ValueError, match="stop"), r.transaction():  # noqa: PT012 (the block is the test)
            r.add_model(model("ee" * 32))
            r.add_evaluation(evaluation(7))
            raise ValueError("stop")
        with pytest.raises(ps.RegistryError, match="not among the models"):
            r.add_evaluation(evaluation(model="ff" * 32))
        with pytest.raises(ps.RegistryError, match="not among the vectors"):
            r.set_threshold(FIRST, "ff" * 32, None)
        with pytest.raises(ps.ArgumentError, match="int64"):
            r.add_evaluation(evaluation(arrays={"a": np.arange(3)}))
    assert everything(file) == before


def test_its_place_is_the_environments_or_the_users_data_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PERSONASTEER_REGISTRY", str(tmp_path / "mine.db"))
    with Registry() as r:
        assert r.path == registry_path() == tmp_path / "mine.db"
    assert (tmp_path / "mine.db").is_file()
    monkeypatch.delenv("PERSONASTEER_REGISTRY")
    assert registry_path().name == "registry.sqlite"


# -- several processes ------------------------------------------------------------------------------------------------

WRITER = """
import sys
import numpy as np
from personasteer.monitor.registry import Evaluation, Registry, TrackedModel
file, who, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
k = 0
while k < n or n == 0:
    with Registry(file, patience=60) as r, r.transaction():
        r.add_model(TrackedModel(who * 32, who, who, "llama", 4, 64, label=f"{who} {k}"))
        for half in (0, 1):
            arrays = {"a": np.full(20_000, k, np.float32)}
            r.add_evaluation(Evaluation("profile", who * 32, {"k": k, "half": half}, arrays))
    k += 1
    print(k, flush=True)
"""


def writer(file: Path, who: str, n: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(file), who, str(n)]
    process = subprocess.Popen(arguments, cwd=file.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def intact(file: Path) -> bool:
    with sqlite3.connect(file) as db:
        found = [*db.execute("PRAGMA integrity_check"), *db.execute("PRAGMA foreign_key_check")]
    db.close()
    return found == [("ok",)]


def test_processes_that_write_at_once_lose_nothing(file: Path) -> None:
    """They make the file together, too."""
    file.parent.mkdir()
    n, processes = 25, [writer(file, who, 25) for who in ("aa", "bb", "cc")]
    for process in processes:
        begin(process)
    for process in processes:
        assert process.communicate(timeout=120)[0].split() == [str(k + 1) for k in range(n)]
        assert process.returncode == 0
    with Registry(file) as r:
        assert sorted(m.label or "" for m in r.models()) == [f"{who} {n - 1}" for who in ("aa", "bb", "cc")]
        for m in r.models():
            found = r.evaluations(model=m.fingerprint, kind="profile")
            assert [(e.content["k"], e.content["half"]) for e in found] == [(k, h) for k in range(n) for h in (0, 1)]
    assert intact(file)


def test_killed_writers_lose_only_what_they_had_not_committed(file: Path) -> None:
    """Killed one after another in mid-write, while the others write on."""
    file.parent.mkdir()
    rng = random.Random(0)
    processes = {who: writer(file, who, 0) for who in ("aa", "bb", "cc")}
    for process in processes.values():
        begin(process)
    said = {}
    for who, process in processes.items():
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        said[who] = process.communicate()[0].split()
        assert process.returncode == -signal.SIGKILL
    with Registry(file) as r:
        for who in processes:
            found = r.evaluations(model=who * 32, kind="profile")
            done = len(found) // 2
            assert [(e.content["k"], e.content["half"]) for e in found] == [(k, h) for k in range(done) for h in (0, 1)]
            assert done >= int(said[who][-1] if said[who] else 3)  # whatever was reported is there
        r.add_model(model())
        r.add_evaluation(evaluation())
    assert intact(file)


def test_a_registry_that_is_locked_for_long_says_so_and_can_be_used_after(file: Path) -> None:
    filled(file)
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with Registry(file, patience=0.2) as r:
        assert len(r.models()) == 2  # reading goes on
        with pytest.raises(ps.RegistryError, match=r"another process has held the registry for 0\.2 s"):
            r.add_model(model("ee" * 32))
        other.execute("ROLLBACK")
        r.add_model(model("ee" * 32))
        assert len(r.models()) == 3
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ps.RegistryError, match="another process"):
            r.models()
        with pytest.raises(ps.RegistryError, match="another process"):
            Registry(file, patience=0.2)
    other.close()
    assert PATIENCE >= 5


# -- files that are no registry ---------------------------------------------------------------------------------------


def other_program(file: Path) -> None:
    db = sqlite3.connect(file)
    db.execute("CREATE TABLE recipes (name TEXT)")
    db.execute("PRAGMA user_version = 1")
    db.commit()
    db.close()


def newer(file: Path) -> None:
    filled(file)
    db = sqlite3.connect(file)
    db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    db.commit()
    db.close()


def half(file: Path) -> None:
    filled(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def torn(file: Path) -> None:
    filled(file)
    with file.open("r+b") as f:
        f.seek(4096)
        f.write(b"\xff" * 4096)


def without_tables(file: Path) -> None:
    filled(file)
    db = sqlite3.connect(file, isolation_level=None)
    db.execute("DROP TABLE arrays")
    db.close()


BAD = {
    "text": (lambda f: f.write_text("my notes\n" * 400), "not a database"),
    "a few bytes": (lambda f: f.write_bytes(b"GGUF"), "not a database"),
    "zeros": (lambda f: f.write_bytes(bytes(8192)), "not a database"),
    "half of it": (half, "damaged"),
    "a page overwritten": (torn, "damaged"),
    "another program's": (other_program, "another program"),
    "a newer version's": (newer, rf"has schema {SCHEMA + 1}, and this version of personasteer reads {SCHEMA}"),
    "a table missing": (without_tables, "no such table"),
    "a folder": (Path.mkdir, "is a folder"),
    "a pipe": (lambda f: os.mkfifo(f), "is a pipe or a device"),
}


@pytest.mark.parametrize("how", BAD)
def test_a_file_that_is_no_registry_is_refused_in_one_line_and_left_as_it_is(file: Path, how: str) -> None:
    spoil, message = BAD[how]
    file.parent.mkdir()
    spoil(file)
    before = file.read_bytes() if file.is_file() else None
    for _ in range(2):
        with pytest.raises(ps.RegistryError, match=message) as caught:
            everything(file)
        assert "\n" not in str(caught.value)
        assert str(file) in str(caught.value)
    assert file.exists()
    assert (file.read_bytes() if file.is_file() else None) == before


def test_a_flipped_bit_is_never_taken_for_data(file: Path) -> None:
    """Anywhere in the file: what is read is what was written, or a RegistryError."""
    right = everything(filled(file))
    whole = file.read_bytes()
    rng, noticed = random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            found = everything(file)
        except ps.RegistryError:
            noticed += 1
            continue
        # a row that an index no longer finds is missing; names of vectors are not sealed
        assert all(str(entry) in map(str, right) for entry in found) or len(found) == len(right)
    assert noticed > 40


def test_an_empty_file_becomes_a_registry(file: Path) -> None:
    """That is what a process leaves that is killed while it makes one."""
    file.parent.mkdir()
    file.touch()
    assert len(everything(filled(file))) > 0


def test_nothing_is_made_where_there_is_none_and_none_is_wanted(file: Path) -> None:
    with pytest.raises(ps.RegistryError, match=r"no model is tracked yet; begin with: personasteer track add MODEL"):
        Registry(file, create=False)
    assert not file.parent.exists()


@pytest.mark.parametrize("place", ["/dev/null/registry.sqlite", "/proc/personasteer/registry.sqlite"])
def test_a_place_that_cannot_be_written_is_named(place: str) -> None:
    if not Path(place).parents[-2].exists():
        pytest.skip("no such place here")
    with pytest.raises(ps.RegistryError, match="the registry cannot be made here"):
        Registry(place)


READ_ONLY = """
import os, sys
import personasteer as ps
from personasteer.monitor.registry import Registry, TrackedModel
if os.geteuid() == 0:
    os.setuid(65534)  # nothing is read-only for root
with Registry(sys.argv[1]) as r:
    print(len(r.models()))
    try:
        r.add_model(TrackedModel("ee" * 32, "n", "f", "llama", 4, 64))
    except ps.RegistryError as e:
        print(e)
try:
    Registry(sys.argv[1] + ".new")
except ps.RegistryError as e:
    print(e)
"""


def test_a_read_only_registry_is_read_and_not_written(file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        place = shutil.copy(filled(file), Path(folder, "registry.sqlite"))
        place.chmod(0o444)
        Path(folder).chmod(0o555)
        found = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(place)], cwd=folder, capture_output=True, text=True
        )
        Path(folder).chmod(0o755)
        assert found.returncode == 0, found.stderr
        assert found.stdout.splitlines() == [
            "2",
            f"{place}: the registry cannot be written (read-only)",
            f"{place}.new: the registry cannot be opened here (no permission, or read-only)",
        ]
        assert place.read_bytes() == file.read_bytes()


FULL = """
import resource, shutil, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import numpy as np
import personasteer as ps
from personasteer.monitor.registry import Evaluation, Registry
_, file, model, *sizes = sys.argv
for size in sizes:
    with Registry(shutil.copy(file, file + size)) as r:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))
        for k in range(100):
            try:
                r.add_evaluation(Evaluation("more", model, {"k": k}, {"a": np.full(5000, k, np.float32)}))
            except ps.RegistryError as e:
                print(k, e)
                break
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(len(r.evaluations(model=model, kind="more")))
"""


def test_a_full_disk_ends_in_one_line_and_keeps_what_was_there(file: Path) -> None:
    before = everything(filled(file))
    sizes = ["10000", "200000", "333333"]
    found = subprocess.run(
        [sys.executable, "-c", FULL, str(file), FIRST, *sizes], cwd=file.parent, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 2 * len(sizes)
    for size, said, kept in zip(sizes, lines[::2], lines[1::2], strict=True):
        n = int(said.split()[0])
        assert "the disk is full" in said
        assert int(kept) == n < 100
        assert everything(Path(f"{file}{size}")) == before
        assert intact(Path(f"{file}{size}"))
    assert int(lines[-1]) > 0
