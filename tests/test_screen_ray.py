"""Screening on a Ray cluster of two workers: the same bytes as here, also where a worker dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import samples
import screening

import personasteer as ps
from personasteer.errors import ArgumentError, PersonasteerError
from personasteer.screen import cluster

ray = pytest.importorskip("ray", reason="ray is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def workers() -> Iterator[Any]:
    """A cluster of two machines in one: a CPU each."""
    from ray.cluster_utils import Cluster

    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    machines.add_node(num_cpus=1)
    with cluster.importing_alike():
        ray.init(address=machines.address, log_to_driver=False, configure_logging=False)
    yield machines
    ray.shutdown()
    machines.shutdown()


def run_screen(path: Path, rows: Any, out: Path, **more: Any) -> dict[str, bytes]:
    vectors = [samples.vector(name="t"), samples.vector(name="u", seed=1)]
    with ps.Model(path, n_ctx=512, n_threads=1) as model:
        ps.screen(model, vectors, rows, out, clean=screening.rows(60, seed=99), sample=16, max_tokens=8, **more)
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if not p.name.startswith("work.")}


def test_two_workers_end_in_the_same_bytes_as_one_machine(workers: Any, tiny_path: Path, tmp_path: Path) -> None:
    rows = screening.rows(400)
    here = run_screen(tiny_path, rows, tmp_path / "here")
    assert run_screen(tiny_path, rows, tmp_path / "there", ray="auto", workers=2) == here


def test_the_rows_of_a_dead_worker_are_done_again(workers: Any, tiny_path: Path, tmp_path: Path) -> None:
    rows = screening.rows(3000)
    here = run_screen(tiny_path, rows, tmp_path / "here")
    killed: list[int] = []

    def kill_one() -> None:
        """The process of an actor that has a model, once some packs are done."""
        while not killed:
            time.sleep(0.05)
            if not scored.is_set():
                continue
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    name = process.joinpath("cmdline").read_bytes()
                except OSError:
                    continue
                if name.startswith(b"ray::") and b"Worker" in name and not killed:
                    os.kill(int(process.name), signal.SIGKILL)
                    killed.append(int(process.name))

    scored = threading.Event()

    def stage(name: str) -> Any:
        def progress(done: int, total: int) -> None:
            if name == "scoring" and done > total / 10:
                scored.set()

        return progress

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    there = run_screen(tiny_path, rows, tmp_path / "there", ray="auto", workers=2, progress=stage)
    assert killed
    assert there == here


def test_more_workers_than_the_cluster_has_are_refused(workers: Any, tiny_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="3 workers of 1 threads need more than the cluster's 2 CPUs"):
        run_screen(tiny_path, screening.rows(40), tmp_path, ray="auto", workers=3)


def test_a_worker_with_another_model_is_refused(
    workers: Any, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = cluster.Cluster.__init__

    def other(self: Any, *arguments: Any, **more: Any) -> None:
        begin(self, *arguments, **more)
        self._arguments["fingerprint"] = "0" * 64

    monkeypatch.setattr(cluster.Cluster, "__init__", other)
    with pytest.raises(PersonasteerError, match="another model on this worker"):
        run_screen(tiny_path, screening.rows(40), tmp_path, ray="auto", workers=2)
