"""The results that tables are made of: one JSON file each in benchmarks/results, with command, machine and versions."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from personasteer.evaluate.overhead import machine
from personasteer.files import atomic_write

FOLDER = Path(__file__).with_name("results")
PEERS = ("torch", "transformers", "repeng")


def command() -> str:
    """The command line of this process, without the folders that paths of it lie in."""
    words = [Path(w).name if "/" in w else w for w in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def save(name: str, content: dict[str, Any], *, peers: bool = False) -> Path:
    """Write a result beside those of the other benchmarks. peers: name the versions of what it is compared with."""
    where = machine()
    for package in PEERS if peers else ():
        try:
            where += f", {package} {version(package)}"
        except PackageNotFoundError:
            continue
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{name}.json"
    text = json.dumps({"command": command(), "machine": where, **content}, indent=1, ensure_ascii=False)
    atomic_write(file, text.encode() + b"\n")
    return file


def load(name: str) -> dict[str, Any]:
    """A result that was saved."""
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return content


def options(parser: argparse.ArgumentParser) -> None:
    """--save and --table."""
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    parser.add_argument("--table", metavar="NAME", help="only print the tables of a saved result")


def measured_or_saved(
    args: argparse.Namespace, measure: Callable[[argparse.Namespace], dict[str, Any]], *, peers: bool = False
) -> dict[str, Any]:
    """The result that --table names, or a new one, saved where --save says so."""
    if args.table:
        return load(args.table)
    content = measure(args)
    if not args.save:
        return {"machine": machine(), **content}
    save(args.save, content, peers=peers)
    return load(args.save)
