"""Shared by the verbs: options, FILE:STRENGTH, output, progress."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeAlias

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from personasteer.cli._completion import complete_model, one_of
from personasteer.errors import ArgumentError
from personasteer.files import check_output

if TYPE_CHECKING:
    from rich.table import Table

    from personasteer.live import Answer
    from personasteer.model import Model
    from personasteer.steering import Steering
    from personasteer.vectors import PersonaVector

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)

ModelOption: TypeAlias = Annotated[
    str, typer.Option("-m", "--model", help="GGUF file, or `demo` for the bundled one.", autocompletion=complete_model)
]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
ThreadsOption: TypeAlias = Annotated[int | None, typer.Option("-t", "--threads", help="CPU threads.", min=1, max=1024)]
GpuOption: TypeAlias = Annotated[
    int, typer.Option("-ngl", "--gpu-layers", help="Blocks kept on the GPU; -1: all.", min=-1, max=100_000)
]
RpcOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--rpc", metavar="HOST:PORT,..", help="RPC workers of llama.cpp that hold the blocks."),
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
ScopeOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--scope",
        help="Steered tokens: all, prompt, response, system, user, assistant or thinking.",
        autocompletion=one_of("all", "prompt", "response", "system", "user", "assistant", "thinking"),
    ),
]
CapOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--cap", metavar="FILE", help="Cap readings at the vector's thresholds; may be repeated."),
]
FloorOption: TypeAlias = Annotated[
    list[str] | None, typer.Option("--floor", metavar="FILE", help="Keep readings above the vector's thresholds.")
]
AblateOption: TypeAlias = Annotated[
    list[str] | None, typer.Option("--ablate", metavar="FILE[:SHARE]", help="Take a direction out, or a share of it.")
]
LoraOption: TypeAlias = Annotated[
    list[str] | None, typer.Option("--lora", metavar="FILE[:SCALE]", help="LoRA adapter; may be repeated.")
]
StopOption: TypeAlias = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated.")
]
GrammarOption: TypeAlias = Annotated[
    Path | None, typer.Option("--grammar-file", metavar="FILE", help="GBNF grammar that the answer follows.")
]
SchemaOption: TypeAlias = Annotated[
    Path | None, typer.Option("--json-schema-file", metavar="FILE", help="JSON schema that the answer follows.")
]

MessagesOption: TypeAlias = Annotated[str, typer.Option("--messages", metavar="COLUMN", help="The column of messages.")]
PromptsOption: TypeAlias = Annotated[str, typer.Option("--prompt", metavar="COLUMN", help="The column of prompts.")]
ResponsesOption: TypeAlias = Annotated[
    str, typer.Option("--response", metavar="COLUMN", help="The column of responses.")
]
PrecisionOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--precision", help="Of matrix products: float32 or bfloat16.", autocompletion=one_of("float32", "bfloat16")
    ),
]
WorkOption: TypeAlias = Annotated[
    Path | None, typer.Option("--work", metavar="DIR", help="Where unfinished work is kept, if not FILE.work.")
]
ForceOption: TypeAlias = Annotated[bool, typer.Option("--force", help="Replace FILE, and other work.")]


def say(line: str, *, prose: bool = False) -> None:
    """A line of results, not read as markup: as it is, or, where it is prose, wrapped between words in a terminal."""
    stdout.print(harmless(line), markup=False, soft_wrap=not (prose and stdout.is_terminal))


def print_table(table: Table) -> None:
    """Print a table whose values stay whole: in a narrow terminal headings wrap, frames go, and lines are too long."""
    for column in table.columns:
        column.overflow = "fold"
        head, *cells = [Text.from_markup(str(c)) for c in (column.header, *column.cells)]
        whole = max((c.cell_len for c in cells), default=0)
        words = [cell_len(word) for c in (head, *(cells if whole > WHOLE else [])) for word in c.plain.split()]
        column.min_width = max([*words, whole if whole <= WHOLE else 0, 1])
    n, least = len(table.columns), sum(column.min_width or 0 for column in table.columns)
    if least + 3 * n + 1 > stdout.width:
        table.box, table.show_edge = box.SIMPLE_HEAD, False
        table.padding = (0, 1, 0, 0) if least + 2 * n - 1 <= stdout.width else (0, 0, 0, 0)
    stdout.print(table, crop=False)


WHOLE = 24  # the longest cell that is not wrapped


def harmless(text: str) -> str:
    """The text with what would steer a terminal written out."""
    return _CONTROLS.sub(lambda m: f"\\x{ord(m[0]):02x}", text)


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def open_model(name: str, **options: Any) -> Model:
    """The model of a -m option."""
    from personasteer.model import Model

    return Model(model_path(name), **options)


def model_path(name: str) -> Path:
    """The file of a -m option."""
    from personasteer.model import demo_model_path

    return demo_model_path() if name == "demo" else Path(name)


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


def load_steering(
    vectors: Sequence[str] | None,
    scope: str,
    offset: int,
    *,
    cap: Sequence[str] | None = None,
    floor: Sequence[str] | None = None,
    ablate: Sequence[str] | None = None,
) -> Steering:
    """The Steering of -v, --cap, --floor and --ablate options."""
    from personasteer.ship.projection import load_projection
    from personasteer.ship.verify import kind_of
    from personasteer.steering import Ablate, Add, Cap, Floor, Steering
    from personasteer.vectors import PersonaVector

    def load(file: str) -> PersonaVector:
        return PersonaVector.load(file, offset=offset)

    steering = Steering()
    for file, strength in [need_strength(v) for v in vectors or []]:
        steering.append(Add(load(file), strength, scope=scope))
    steering += [Cap(load(file), scope=scope) for file in cap or []]
    steering += [Floor(load(file), scope=scope) for file in floor or []]
    for file, share in [split_strength(a) for a in ablate or []]:
        if kind_of(file) == "projection":
            steering += load_projection(file).steering(scale=1.0 if share is None else share, scope=scope)
        else:
            steering.append(Ablate(load(file), share=1.0 if share is None else share, scope=scope))
    return steering


def load_measured(file: str, offset: int) -> PersonaVector:
    """A vector to measure by."""
    from personasteer.vectors import PersonaVector

    if split_strength(file)[1] is not None and not Path(file).exists():
        raise ArgumentError(f"{file}: what is measured takes no strength")
    return PersonaVector.load(file, offset=offset)


def workers(rpc: str | None) -> list[str]:
    """The addresses in what --rpc was given."""
    return [address.strip() for address in rpc.split(",")] if rpc is not None else []


def load_adapters(lora: Sequence[str] | None) -> list[tuple[str, float]]:
    """The (file, scale) pairs of --lora options."""
    return [(file, 1.0 if scale is None else scale) for file, scale in (split_strength(a) for a in lora or [])]


def read_text(path: Path | None) -> str | None:
    """The text of an optional file. Raises ArgumentError where it cannot be read."""
    if path is None:
        return None
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as e:
        raise ArgumentError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from e


def as_dict(prompt: str, answer: Answer) -> dict[str, Any]:
    """An answer for --json."""
    return {
        "prompt": prompt,
        "text": answer.text,
        "finish": answer.finish,
        "n_prompt": answer.n_prompt,
        "n_tokens": len(answer.tokens),
        "rho": answer.rho,
    }


def check_new(out: Path, inputs: Iterable[str | os.PathLike[str]], *, force: bool) -> None:
    """Raise ArgumentError where `out` cannot be written, is one of the inputs, or exists and `force` is not given."""
    check_output(out, inputs)
    if out.exists() and not force:
        raise ArgumentError(f"{out}: exists already; --force overwrites it")


def print_json(content: Any) -> None:
    line = json.dumps(content, ensure_ascii=not takes_unicode(sys.stdout), allow_nan=False)
    typer.echo(line.encode("utf-8", "backslashreplace").decode())  # half a character stays an escape


def takes_unicode(stream: TextIO) -> bool:
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


def in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    """What a stream that is not of Unicode writes for what it has no letters for: like ones, or an escape."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_LIKE.get(c) or f"\\u{ord(c):04x}" for c in error.object[error.start : error.end]), error.end


_LIKE = {
    "…": "..", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "±": "+-", "×": "x", "·": ".", "→": ">",
    "▸": ">", "‖": "|", "ρ": "rho", "τ": "tau", "≥": ">=", "≤": "<=", "⟨": "<", "⟩": ">",
    **dict(zip("▁▂▃▄▅▆▇█", "12345678", strict=True)),
}  # fmt: skip


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
