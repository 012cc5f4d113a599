"""Shared by the verbs: options, FILE:STRENGTH, output, progress."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeAlias

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from personasteer.errors import ArgumentError
from personasteer.model import Model, demo_model_path
from personasteer.steering import Add, Steering
from personasteer.vectors import PersonaVector

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)

ModelOption: TypeAlias = Annotated[str, typer.Option("-m", "--model", help="GGUF file, or `demo` for the bundled one.")]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
ThreadsOption: TypeAlias = Annotated[int | None, typer.Option("-t", "--threads", help="CPU threads.", min=1, max=1024)]
GpuOption: TypeAlias = Annotated[
    int, typer.Option("-ngl", "--gpu-layers", help="Blocks kept on the GPU; -1: all.", min=-1, max=100_000)
]
CtxOption: TypeAlias = Annotated[
    int, typer.Option("-c", "--ctx-size", help="Tokens of prompt and answer.", min=8, max=2**24)
]
SeedOption: TypeAlias = Annotated[int, typer.Option("--seed", help="Seed of every random choice.", min=0)]
TempOption: TypeAlias = Annotated[float, typer.Option("--temp", help="Temperature; 0 is greedy.", min=0.0)]
PredictOption: TypeAlias = Annotated[int, typer.Option("-n", "--predict", help="Tokens to generate.", min=1, max=2**24)]
VectorsOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("-v", "--vector", metavar="FILE:STRENGTH", help="Steer by a vector; may be repeated."),
]
OffsetOption: TypeAlias = Annotated[
    int, typer.Option("--offset", help="Of other tools' vector files: block = N - offset.", min=0, max=1)
]
ScopeOption: TypeAlias = Annotated[str, typer.Option("--scope", help="Steered tokens: all, prompt or response.")]


def open_model(name: str, **options: Any) -> Model:
    """The model of a -m option."""
    return Model(demo_model_path() if name == "demo" else name, **options)


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def split_strength(text: str) -> tuple[str, float | None]:
    """("file", 0.3) of "file:0.3": split at the last colon when a number follows, else (text, None)."""
    head, colon, tail = text.rpartition(":")
    if colon and head and _NUMBER.fullmatch(tail):
        return head, float(tail)
    return text, None


def need_strength(text: str) -> tuple[str, float]:
    file, strength = split_strength(text)
    if strength is None:
        raise ArgumentError(f"{text}: a strength is needed, as in {file}:0.3")
    return file, strength


def load_steering(vectors: Sequence[str] | None, scope: str, offset: int) -> Steering:
    """The Steering of -v options."""
    specs = [need_strength(v) for v in vectors or []]
    return Steering([Add(PersonaVector.load(file, offset=offset), strength, scope) for file, strength in specs])


def print_json(content: Any) -> None:
    typer.echo(json.dumps(content, ensure_ascii=False, allow_nan=False))


def write_piece(_: int, text: str) -> None:
    """The on_token callback of streamed answers."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def stages() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Names of stages to progress callbacks: bars on stderr when it is a terminal, nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda _: lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as bars:

        def stage(name: str) -> Callable[[int, int], None]:
            task: TaskID = bars.add_task(name, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield stage
