"""Packs computed on several machines: Ray Data, with a model of its own in every worker."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, chdir, contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp

from personasteer.conversations.data import parquet
from personasteer.errors import ArgumentError, PersonasteerError
from personasteer.model import Model
from personasteer.screen.journal import Packed
from personasteer.screen.score import Axis, Scorer

PATIENCE = 5.0  # seconds for a cluster to answer
AT_ONCE = 20_000  # packs that are in Ray's object store together
PER_BLOCK = 4  # packs of one task: what a dead worker had begun is done again


class Cluster:
    """Workers of a Ray cluster that compute packs, each as it would be computed here.

    Args:
        address: of the cluster, as ray.init has it; "local" starts one on this machine.
        model: opened on each worker, from the same path and with the same options; n_threads are a worker's.
        workers: how many; None for as many as the cluster's CPUs, or its GPUs where llama.cpp uses them, allow.

    Raises:
        ArgumentError: ray is not installed, there is no such cluster, or it is too small.
    """

    def __init__(
        self, address: str, model: Model, axes: Sequence[Axis], *, max_tokens: int, workers: int | None = None
    ) -> None:
        self._ray = ray = _ray()
        self._own = not ray.is_initialized()
        if self._own:
            quiet = {"log_to_driver": False, "configure_logging": False}
            try:
                with importing_alike():
                    ray.init(address, **quiet, **({"include_dashboard": False} if address == "local" else {}))
            except (ConnectionError, RuntimeError, ValueError) as e:
                raise ArgumentError(f"--ray {address}: {str(e).splitlines()[0]}") from e
        total = ray.cluster_resources()
        threads = model.n_threads
        offloads = model.options.get("n_gpu_layers") != 0 and llama_cpp.llama_supports_gpu_offload()
        gpus = int(total.get("GPU", 0)) if offloads else 0
        self._workers = workers or max(1, gpus or int(total.get("CPU", 1)) // threads)
        if self._workers * threads > total.get("CPU", 0) or 0 < gpus < self._workers:
            self.close()
            raise ArgumentError(
                f"{self._workers} workers of {threads} threads need more than the cluster's {total.get('CPU', 0):g} "
                f"CPUs and {gpus} GPUs: ask for fewer (--workers, -t)"
            )
        self._resources = {"num_cpus": threads, **({"num_gpus": 1} if gpus else {})}
        self._arguments = {
            "path": str(model.path.resolve()), "options": {**model.options, "n_parallel": 1},
            "fingerprint": model.fingerprint, "axes": list(axes), "max_tokens": max_tokens,
            "versions": _versions(),
        }  # fmt: skip

    def compute(self, packs: Iterator[Packed]) -> Iterator[tuple[Packed, list[tuple[Any, ...]]]]:
        """The results of all packs, in the order in which they come."""
        ray = self._ray
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        while some := list(islice(packs, AT_ONCE)):
            known = {(p.kind, p.pack): p for p in some}
            blocks = [_table(some[i : i + PER_BLOCK]) for i in range(0, len(some), PER_BLOCK)]
            found = ray.data.from_arrow(blocks).map_batches(
                Worker,
                fn_constructor_kwargs=self._arguments,
                concurrency=self._workers,
                batch_size=None,
                batch_format="pyarrow",
                **self._resources,
            )
            with _worker_errors(ray):
                for batch in found.iter_batches(batch_size=None, batch_format="pyarrow"):
                    for row in batch.to_pylist():
                        yield known[row["kind"], row["pack"]], [tuple(r) for r in _results(row)]

    def close(self) -> None:
        if self._own:
            self._ray.shutdown()


class Worker:
    """A model in a Ray actor."""

    def __init__(
        self, path: str, options: Mapping[str, Any], fingerprint: str, axes: Sequence[Axis], max_tokens: int,
        versions: Mapping[str, str],
    ) -> None:  # fmt: skip
        if versions != _versions():
            raise ArgumentError(f"a worker has {_versions()}, where the screening was started it is {dict(versions)}")
        model = Model(path, **options)
        if model.fingerprint != fingerprint:
            raise ArgumentError(f"{path} is another model on this worker than where the screening was started")
        self._scorer = Scorer(model, axes, max_tokens=max_tokens)

    def __call__(self, batch: Any) -> Any:
        pa, _ = parquet()
        rows = batch.to_pylist()
        out = []
        for row in rows:
            texts = list(zip(row["tokens"], row["n_prompt"], strict=True))
            pack = Packed(row["kind"], row["pack"], row["n_prefix"], 0, texts)
            results = self._scorer.compute(pack)
            answers = [r[1] for r in results] if pack.kind == "own" else None
            out.append({"kind": pack.kind, "pack": pack.pack, "scores": [r[0] for r in results], "answers": answers})
        fields = [("kind", pa.string()), ("pack", pa.int64())]
        lists = [("scores", pa.list_(pa.binary())), ("answers", pa.list_(pa.string()))]
        return pa.Table.from_pylist(out, schema=pa.schema(fields + lists))


def _table(packs: Sequence[Packed]) -> Any:
    pa, _ = parquet()
    fields = [("kind", pa.string()), ("pack", pa.int64()), ("n_prefix", pa.int32())]
    lists = [("tokens", pa.list_(pa.binary())), ("n_prompt", pa.list_(pa.int32()))]
    rows = [
        {
            "kind": p.kind, "pack": p.pack, "n_prefix": p.n_prefix, "tokens": [t for t, _ in p.texts],
            "n_prompt": [n for _, n in p.texts],
        }
        for p in packs
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=pa.schema(fields + lists))


def _results(row: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    if row["answers"] is None:
        return [(score,) for score in row["scores"]]
    return list(zip(row["scores"], row["answers"], strict=True))


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("personasteer", "llama-cpp-python")}


def importing_alike() -> AbstractContextManager[None]:
    """Around ray.init: workers look for modules first in the folder where it is called. There they find the package
    that is imported here, and not, say, its sources in a clone.
    """
    return chdir(Path(__file__).parents[2])


def check_address(address: str) -> None:
    """Raise ArgumentError where ray is missing, or nothing listens at HOST:PORT: Ray itself would try for minutes."""
    _ray()
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, ValueError, OverflowError) as e:
        raise ArgumentError(f"--ray {address}: no cluster there ({e})") from e


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as e:
        raise ArgumentError("--ray needs Ray: pip install 'personasteer[ray]'") from e
    return ray


@contextmanager
def _worker_errors(ray: Any) -> Iterator[None]:
    try:
        yield
    except ray.exceptions.RayError as e:
        cause = getattr(e, "cause", None)
        if isinstance(cause, PersonasteerError):
            raise cause from e
        last = [line for line in str(e).splitlines() if line.strip()][-1]
        raise PersonasteerError(f"a worker failed: {last.strip():.200}") from e
