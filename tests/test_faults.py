"""What goes wrong around a command: signals, a disk that fills, folders that take nothing. Real processes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import samples

import personasteer as ps
from personasteer.cli import run as run_command
from personasteer.tiny_model import write_tiny_model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")

# a shell that starts the tests in the background lets its children ignore Ctrl-C
MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from personasteer.cli import main
main()
"""
N_LAYER, N_EMBD = 8, 256


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that takes seconds for what the commands do, a vector and texts."""
    folder = tmp_path_factory.mktemp("given")
    write_tiny_model(folder / "m.gguf", n_layer=N_LAYER, n_embd=N_EMBD)
    norms = np.linspace(5.0, 12.0, N_LAYER)
    vector = samples.vector(n_layer=N_LAYER, n_embd=N_EMBD, layers=(3, 4), norms=norms, name="pessimistic")
    vector.save(folder / "v.gguf")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["sea", "boat", "night", "and", "the"], 60)) for _ in range(400)]
    (folder / "t.txt").write_text("\n".join(texts))
    return folder


def seconds_used(process: subprocess.Popen[str]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def command(given: Path, folder: Path, line: str) -> list[str]:
    for file in given.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    return [sys.executable, "-P", "-c", MAIN, *line.split()]


def interrupt(
    given: Path, folder: Path, line: str, act: Callable[[subprocess.Popen[str]], object]
) -> tuple[float, int, str]:
    """Acts once the command has computed for half a second: (seconds until it ended, exit code, stderr).

    Seconds of the process itself: others may hold the machine.
    """
    with subprocess.Popen(
        command(given, folder, line), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while "m.gguf" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
            time.sleep(0.02)
        begun = seconds_used(process)
        while seconds_used(process) < begun + 0.5:
            assert process.poll() is None, "it ended before"
            time.sleep(0.02)
        acted = used = seconds_used(process)
        act(process)
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            used = max(used, seconds_used(process))
            time.sleep(0.02)
        _, err = process.communicate()
    return used - acted, process.returncode, err


def made(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_symlink()}


COMPUTING = {
    "calibrate": "calibrate v.gguf -m m.gguf --trait pessimistic -o o.gguf -t 1",
    "eval": "eval v.gguf:0.3 -m m.gguf --trait pessimistic --report o -t 1",
    "capture": "capture -m m.gguf -f t.txt -o o.safetensors -t 1",
    "audit": "audit -m m.gguf -v v.gguf --out o -t 1",
}


@pytest.mark.parametrize(
    ("verb", "by"),
    [("calibrate", signal.SIGINT), ("eval", signal.SIGTERM), ("capture", signal.SIGINT), ("audit", signal.SIGTERM)],
)
def test_a_signal_while_a_command_computes_ends_it_with_one_line_and_no_file(
    given: Path, tmp_path: Path, verb: str, by: signal.Signals
) -> None:
    took, code, err = interrupt(given, tmp_path, COMPUTING[verb], lambda process: process.send_signal(by))
    assert (code, err) == (1, "personasteer: interrupted\n")
    assert took < 2
    assert made(tmp_path) <= {"o"}  # a folder of results is there, and empty


# every look at the wall clock is years from the one before
JUMPING = """
import datetime, itertools, time
true, looks = time.time, itertools.count()
time.time = lambda: true() + (10 if next(looks) % 2 else -20) * 365 * 86400
time.time_ns = lambda: int(time.time() * 1e9)
class Jumping(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
datetime.datetime = Jumping
"""


def contents(file: Path) -> object:
    data = file.read_bytes()
    if file.suffix != ".safetensors":
        return data
    header = 8 + int.from_bytes(data[:8], "little")  # whose keys stand in another order each time
    return json.loads(data[8:header]), data[header:]


@pytest.mark.parametrize(
    "line",
    [
        "capture -m m.gguf -f few.txt -o o.safetensors -t 1",
        "chat -m m.gguf -v v.gguf:0.2 -p sea -n 4 --json -t 1",
        "calibrate v.gguf -m m.gguf --trait pessimistic -o o.gguf -t 1",
    ],
    ids=["capture", "chat", "calibrate"],
)
def test_a_clock_that_jumps_changes_nothing(given: Path, tmp_path: Path, line: str) -> None:
    results = []
    for prelude in ("", JUMPING):
        folder = tmp_path / ("jumping" if prelude else "steady")
        folder.mkdir()
        run = command(given, folder, line)
        (folder / "few.txt").write_text("the sea\na boat at night\n")
        run[run.index(MAIN)] = prelude + MAIN
        done = subprocess.run(run, cwd=folder, capture_output=True, text=True, timeout=100)
        files = {name: contents(folder / name) for name in made(folder)}
        results.append((done.returncode, done.stdout, done.stderr, files))
    steady, jumping = results
    assert steady[0] == 0, steady[2]
    assert jumping == steady


def test_a_model_cut_short_under_a_command_ends_it_with_one_line_and_no_file(given: Path, tmp_path: Path) -> None:
    mine = tmp_path / "m.gguf"
    shutil.copy(given / "m.gguf", mine)
    _, code, err = interrupt(given, tmp_path, COMPUTING["capture"], lambda _: os.truncate(mine, 4096))
    assert (code, err) == (1, "personasteer: a file in use was cut short, or cannot be read (SIGBUS)\n")
    assert made(tmp_path) == {"m.gguf"}


# ---- a disk that fills


@pytest.fixture
def largest() -> Iterator[Callable[[int], None]]:
    """Sets how many bytes a file may have; a write beyond that fails as on a full disk."""
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, was[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, was)


WRITING = {
    "control-vector": "export control-vector v.gguf:0.3 -m m.gguf -o o.gguf -t 1",
    "projection": "export projection v.gguf:0.3 -m m.gguf -o o.safetensors -t 1",
    "lora": "export lora v.gguf -m m.gguf -o o.gguf -t 1",
    "bake": "export bake v.gguf:0.3 -m m.gguf -o o.gguf -t 1",
    "ablate": "export ablate v.gguf -m m.gguf -o o.gguf -t 1",
    "bundle": "export bundle v.gguf:0.3 -m m.gguf -o o.tar -t 1",
    "folder": "export bundle v.gguf:0.3 -m m.gguf -o o -t 1",
    "capture": "capture -m m.gguf -f t.txt -o o.safetensors -t 1",
    "derive": "derive dry.toml -m m.gguf -o o.gguf --no-calibrate --no-filter -n 4 -t 1",
    "responses": "derive dry.toml -m m.gguf -o v2.gguf --save-responses o --no-calibrate --no-filter -n 4 -t 1",
}
TRAIT = """
name = "dry"
description = "Dry."
[[system]]
positive = "Be dry."
negative = "Be wet."
[questions]
derive = ["How are you?", "And the sea?", "What now?", "Is it far?"]
"""


@pytest.mark.parametrize("what", WRITING)
def test_a_disk_that_fills_at_any_byte_is_one_line_and_leaves_no_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    largest: Callable[[int], None],
    what: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_model("m.gguf")
    samples.vector(norms=np.array([5.0, 8.0, 11.0, 13.0]), name="dry").save("v.gguf")
    Path("t.txt").write_text("the sea\nand the boats\n")
    Path("dry.toml").write_text(TRAIT)
    before = made(tmp_path)
    assert run_command(WRITING[what].split()) == 0
    (out,) = (p for p in tmp_path.iterdir() if p.stem == "o")
    files = [p for p in (out, *out.rglob("*")) if p.is_file()]
    size = max(p.stat().st_size for p in files)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    Path("v2.gguf").unlink(missing_ok=True)
    for limit in (size - 1, size - 40, size - size // 3, 10):
        capsys.readouterr()
        largest(limit)
        code = run_command(WRITING[what].split())
        largest(resource.RLIM_INFINITY)
        printed, err = capsys.readouterr()
        assert (code, printed) == (1, ""), limit
        # a bake tries its header out in the temporary folder
        assert err.startswith("personasteer: " + (f"{out.name}: " if what != "bake" else "")), err
        assert err.count("\n") == 1, err
        assert made(tmp_path) == before


# ---- folders that take nothing


@pytest.mark.parametrize("cache", ["/dev/null/cache", "/proc/cache"])
def test_without_a_cache_everything_is_computed_anew_and_nothing_is_said(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with ps.Model(tiny_path, n_threads=1) as model:
        norms = model.norms
    monkeypatch.setenv("PERSONASTEER_CACHE_DIR", cache)
    with ps.Model(tiny_path, n_threads=1) as model:
        assert np.array_equal(model.norms, norms)
    samples.vector(norms=norms).save("v.gguf")
    assert run_command(f"generate -m {tiny_path} -v v.gguf:0.2 -p sea -n 4 -t 1".split()) == 0
    assert capsys.readouterr().err == ""


def test_a_model_that_is_replaced_by_renaming_stays_the_old_one_to_who_has_it_open(tmp_path: Path) -> None:
    file = write_tiny_model(tmp_path / "m.gguf")
    with ps.Model(file, n_threads=1) as model:
        before = model.logits(["the sea"])[0]
        os.replace(write_tiny_model(tmp_path / "new.gguf", seed=1), file)
        assert np.array_equal(model.logits(["the sea"])[0], before)
        with ps.Model(file, n_threads=1) as other:
            assert other.fingerprint != model.fingerprint
            assert not np.array_equal(other.logits(["the sea"])[0], before)
